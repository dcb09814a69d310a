"""Get Log Page: the pages, parts of them, what is refused, and counters that count."""

from __future__ import annotations

from typing import Any

import pytest

from pvfio.abi import ffi, lib
from tests.devices.nvme.rig import running

pytestmark = pytest.mark.touches_c

INVALID = lib.NVME_SC_INVALID_FIELD
PAGES = {0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x12, 0x13, 0x81}
IO = {0x00, 0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0C, 0x19}
ADMIN = {0, 1, 2, 4, 5, 6, 8, 9, 0xA, 0xC, 0xD, 0x10, 0x11, 0x14, 0x15, 0x18, 0x7C, 0x80, 0x84}


def number(field: object) -> int:
    return int.from_bytes(bytes(ffi.buffer(field)), "little")


async def test_supported_pages() -> None:
    async with running() as rig:
        raw = await rig.log(lib.NVME_LOG_SUPPORTED, 1024)
        assert {lid for lid in range(256) if raw[4 * lid] & 1} == PAGES


@pytest.mark.parametrize("lid", range(0x20))
async def test_every_page_is_there_or_refused(lid: int) -> None:
    async with running() as rig:
        done = await rig.admin(lib.NVME_ADMIN_GET_LOG_PAGE, cdw10=lid | 127 << 16)
        assert done.code == (0 if lid in PAGES else lib.NVME_SC_INVALID_LOG_PAGE)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"nsid": 1}, INVALID),
        ({"cdw12": 2}, INVALID),
        ({"cdw12": 516}, INVALID),
        ({"cdw13": 1}, INVALID),
        ({"cdw14": 1 << 23}, INVALID),
        ({"cdw11": 0xFFFF}, INVALID),
        ({"prp1": 0xDEAD000}, lib.NVME_SC_DATA_XFER_ERROR),
        ({"flags": lib.NVME_CMD_SGL_METABUF}, INVALID),
        ({"flags": lib.NVME_CMD_FUSE_FIRST}, INVALID),
    ],
)
async def test_refused(fields: dict[str, Any], status: int) -> None:
    async with running() as rig:
        done = await rig.admin(lib.NVME_ADMIN_GET_LOG_PAGE, cdw10=lib.NVME_LOG_SMART | 127 << 16, **fields)
        assert done.code == status


async def test_offsets() -> None:
    async with running() as rig:
        whole = await rig.log(lib.NVME_LOG_CMD_EFFECTS, 4096)
        assert await rig.log(lib.NVME_LOG_CMD_EFFECTS, 64, offset=1024) == whole[1024:1088]
        assert await rig.log(lib.NVME_LOG_SMART, 64, offset=500) == bytes(64)


async def test_command_effects() -> None:
    async with running() as rig:
        log = await rig.log(lib.NVME_LOG_CMD_EFFECTS, kind="nvme_effects_log")
        assert {opcode for opcode in range(256) if log.acs[opcode] & 1} == ADMIN
        assert {opcode for opcode in range(256) if log.iocs[opcode] & 1} == IO
        assert log.iocs[lib.NVME_CMD_WRITE] & lib.NVME_CMD_EFFECTS_LBCC
        # Whatever else is set in an I/O command's word, Linux warns about.
        usual = lib.NVME_CMD_EFFECTS_CSUPP | lib.NVME_CMD_EFFECTS_LBCC
        assert not any(word & ~usual for word in log.iocs)
        assert not log.iocs[lib.NVME_CMD_READ] & lib.NVME_CMD_EFFECTS_LBCC
        done = await rig.admin(lib.NVME_ADMIN_GET_LOG_PAGE, cdw10=5, cdw14=lib.NVME_CSI_ZNS << 24)
        assert done.code == INVALID


async def test_feature_effects() -> None:
    async with running() as rig:
        raw = await rig.log(lib.NVME_LOG_FEATURE_EFFECTS, 1024)
        found = {fid for fid in range(256) if raw[4 * fid] & 1}
        assert found >= {1, 2, 4, 5, 7, 8, 9, 0xA, 0xB, 0xE, 0xF, 0x16, 0x19, 0x80, 0x81, 0x84}
        assert await rig.log(lib.NVME_LOG_MI_EFFECTS, 4096) == bytes(4096)


async def test_errors_newest_first() -> None:
    async with running() as rig:
        await rig.admin(0x7F, nsid=5)
        cid = rig.admin_ring.next_cid
        await rig.set_feature(lib.NVME_FEAT_WRITE_ATOMIC, 2)
        await rig.io(lib.NVME_CMD_READ, cdw10=0x1000)
        raw = await rig.log(lib.NVME_LOG_ERROR, 64 * 64)
        entries = ffi.from_buffer("struct nvme_error_log_entry[]", raw)
        assert [entry.error_count for entry in entries[0:4]] == [3, 2, 1, 0]
        status = [(entry.status_field >> 1) & lib.NVME_SC_MASK for entry in entries[0:3]]
        assert status == [lib.NVME_SC_LBA_RANGE, INVALID, lib.NVME_SC_INVALID_OPCODE]
        assert (entries[0].sqid, entries[0].lba, entries[0].nsid) == (1, 0x1000, 1)
        assert (entries[1].sqid, entries[1].cmdid, entries[1].parm_error_location) == (0, cid, 44)
        assert (entries[2].nsid, entries[2].parm_error_location) == (5, 0)
        smart = await rig.log(lib.NVME_LOG_SMART, 512, kind="nvme_smart_log")
        assert number(smart.num_err_log_entries) == 3


async def test_smart_counts() -> None:
    async with running() as rig:
        for _ in range(3):
            await rig.io(lib.NVME_CMD_WRITE, cdw12=1)
        await rig.io(lib.NVME_CMD_READ)
        await rig.io(lib.NVME_CMD_WRITE_UNCOR, cdw10=8)
        await rig.io(lib.NVME_CMD_READ, cdw10=8)
        smart = await rig.log(lib.NVME_LOG_SMART, 512, kind="nvme_smart_log")
        assert number(smart.host_writes) == 3
        assert number(smart.data_units_written) == 1
        assert number(smart.data_units_read) == 1
        assert number(smart.media_errors) == 1
        assert number(smart.power_cycles) == 1
        assert (smart.temperature, smart.temp_sensor[0], smart.temp_sensor[1]) == (313, 313, 0)
        assert (smart.critical_warning, smart.avail_spare, smart.spare_thresh) == (0, 100, 10)


async def test_smart_says_what_the_host_made_of_the_drive() -> None:
    async with running() as rig:
        rig.device.health.set(temperature=345, available_spare=5, percentage_used=120, degraded=True)
        smart = await rig.log(lib.NVME_LOG_SMART, 512, kind="nvme_smart_log")
        assert smart.critical_warning == 0x7
        assert (smart.temperature, smart.avail_spare, smart.percent_used) == (345, 5, 120)
        impossible: tuple[dict[str, Any], ...] = (
            {"temperature": -1},
            {"available_spare": 101},
            {"percentage_used": 256},
        )
        for bad in impossible:
            with pytest.raises(ValueError):
                rig.device.health.set(**bad)
