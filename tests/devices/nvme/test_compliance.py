"""Every admin opcode, feature and log the controller says it has, everywhere it can be: one good use of each.

What each refuses is in the tests of its subject; here nothing may be missing.
"""

from __future__ import annotations

from typing import Any

import pytest

from pvfio.abi import ffi, lib
from pvfio.devices.nvme import NvmeConfig
from pvfio.devices.nvme.firmware import firmware_image
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import MIB, PLACES, Place, running

pytestmark = pytest.mark.touches_c

SMALL = 63 << 16
GOOD = firmware_image("2.0")
CREATED = bytes(ffi.buffer(ffi.new("struct nvme_id_ns *", {"nsze": 256, "ncap": 256, "flbas": 1})))
LIST = b"\1\0\0\0".ljust(4096, b"\0")
QUEUE = 0x80000

# In an order in which each has what it needs. Requests for events wait; their completion comes with the sanitize.
ADMIN: tuple[tuple[int, dict[str, Any]], ...] = (
    (lib.NVME_ADMIN_CREATE_CQ, {"cdw10": SMALL | 2, "cdw11": 1, "queue": 0}),
    (lib.NVME_ADMIN_CREATE_SQ, {"cdw10": SMALL | 2, "cdw11": 2 << 16 | 1, "queue": 0x1000}),
    (lib.NVME_ADMIN_DELETE_SQ, {"cdw10": 2}),
    (lib.NVME_ADMIN_DELETE_CQ, {"cdw10": 2}),
    (lib.NVME_ADMIN_IDENTIFY, {"cdw10": 1}),
    (lib.NVME_ADMIN_GET_LOG_PAGE, {"cdw10": lib.NVME_LOG_SMART | 127 << 16}),
    (lib.NVME_ADMIN_ABORT, {"cdw10": 1}),
    (lib.NVME_ADMIN_SET_FEATURES, {"cdw10": lib.NVME_FEAT_WRITE_ATOMIC, "cdw11": 1}),
    (lib.NVME_ADMIN_GET_FEATURES, {"cdw10": lib.NVME_FEAT_WRITE_ATOMIC}),
    (lib.NVME_ADMIN_KEEP_ALIVE, {}),
    (lib.NVME_ADMIN_NS_MGMT, {"data": CREATED}),
    (lib.NVME_ADMIN_NS_ATTACH, {"nsid": 3, "data": LIST}),
    (lib.NVME_ADMIN_FW_DOWNLOAD, {"cdw10": len(GOOD) // 4 - 1, "data": GOOD}),
    (lib.NVME_ADMIN_FW_COMMIT, {"cdw10": 3 << 3 | 2}),
    (lib.NVME_ADMIN_SELF_TEST, {"cdw10": lib.NVME_SELF_TEST_EXTENDED}),
    (lib.NVME_ADMIN_DBBUF, {"queue": 0x2000, "second": 0x3000}),
    (lib.NVME_ADMIN_FORMAT_NVM, {"nsid": 3, "cdw10": 0}),
    (lib.NVME_ADMIN_SANITIZE, {"cdw10": lib.NVME_SANITIZE_CRYPTO}),
)
IO: tuple[tuple[int, dict[str, Any]], ...] = (
    (lib.NVME_CMD_WRITE, {"cdw12": lib.NVME_RW_FUA}),
    (lib.NVME_CMD_READ, {}),
    (lib.NVME_CMD_FLUSH, {}),
    (lib.NVME_CMD_COMPARE, {}),
    (lib.NVME_CMD_WRITE_ZEROES, {"cdw12": lib.NVME_RW_DEAC}),
    (lib.NVME_CMD_VERIFY, {}),
    (lib.NVME_CMD_DSM, {"cdw11": lib.NVME_DSM_AD, "data": bytes(4096)}),
    (lib.NVME_CMD_COPY, {"cdw10": 8, "data": bytes(4096)}),
    (lib.NVME_CMD_WRITE_UNCOR, {}),
)


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_every_opcode(place: Place, engine: EngineKind) -> None:
    config = NvmeConfig(capacity=MIB, sanitize_seconds=0)
    async with running(config, place=place, engine=engine) as rig:
        effects = await rig.log(lib.NVME_LOG_CMD_EFFECTS, kind="nvme_effects_log")
        for opcode, fields in IO:
            assert (await rig.io(opcode, **fields)).status == 0, hex(opcode)
        used = {lib.NVME_ADMIN_ASYNC_EVENT}
        event = await rig.events()
        for opcode, fields in ADMIN:
            rest = {name: value for name, value in fields.items() if name not in ("queue", "second")}
            for field, name in (("prp1", "queue"), ("prp2", "second")):
                if name in fields:
                    rest[field] = rig.iova + QUEUE + fields[name]
            assert (await rig.admin(opcode, **rest)).status == 0, hex(opcode)
            used.add(opcode)
        assert (await rig.wait(event)).result == lib.NVME_AER_IO | 1 << 8 | lib.NVME_LOG_SANITIZE << 16
        assert {opcode for opcode in range(256) if effects.acs[opcode]} == used
        assert {opcode for opcode in range(256) if effects.iocs[opcode]} == {opcode for opcode, _ in IO}


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_every_feature(place: Place, engine: EngineKind) -> None:
    """Each can be read, current and default, and set to what it is."""
    per_namespace = {lib.NVME_FEAT_ERR_RECOVERY, lib.NVME_FEAT_WRITE_PROTECT}
    async with running(place=place, engine=engine) as rig:
        raw = await rig.log(lib.NVME_LOG_FEATURE_EFFECTS, 1024)
        found = {fid for fid in range(256) if raw[4 * fid] & 1} - {lib.NVME_FEAT_VOLATILE_WC}
        assert len(found) == 16
        for fid in found:
            nsid = int(fid in per_namespace)
            for select in (lib.NVME_FEAT_SEL_SUPPORTED, lib.NVME_FEAT_SEL_DEFAULT, lib.NVME_FEAT_SEL_CURRENT):
                now = await rig.get_feature(fid, nsid=nsid, select=select)
                assert now.status == 0, hex(fid)
            done = await rig.set_feature(fid, now.result, nsid=nsid)
            expected = lib.NVME_SC_CMD_SEQ_ERROR if fid == lib.NVME_FEAT_NUM_QUEUES else 0
            assert done.code == expected, hex(fid)


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_every_log(place: Place, engine: EngineKind) -> None:
    async with running(place=place, engine=engine) as rig:
        raw = await rig.log(lib.NVME_LOG_SUPPORTED, 1024)
        for lid in range(256):
            done = await rig.admin(lib.NVME_ADMIN_GET_LOG_PAGE, cdw10=lid | 127 << 16)
            assert done.code == (0 if raw[4 * lid] & 1 else lib.NVME_SC_INVALID_LOG_PAGE), hex(lid)
