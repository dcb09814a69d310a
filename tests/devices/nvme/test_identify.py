"""Identify: every structure and list a driver asks for, and what each refuses."""

from __future__ import annotations

import pytest

from pvfio.abi import ffi, lib
from pvfio.devices.nvme import NvmeConfig
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import PLACES, Place, running

pytestmark = pytest.mark.touches_c


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_controller(place: Place, engine: EngineKind) -> None:
    async with running(place=place, engine=engine) as rig:
        page = await rig.identify(lib.NVME_ID_CNS_CTRL, kind="nvme_id_ctrl")
        assert bytes(page.sn).rstrip() == (b"pvfio-nvme" if place == "table" else b"pvfio-nvme0")
        assert (page.ver, page.cntrltype, page.nn) == (lib.NVME_VS_2_0, 1, 32)
        assert (page.sqes, page.cqes, page.mdts) == (0x66, 0x44, 9)
        assert page.oacs & (1 | lib.NVME_OACS_DBBUF) == lib.NVME_OACS_DBBUF
        assert page.oncs == 0x1DF
        assert (page.acl, page.aerl, page.elpe, page.frmw >> 1 & 7) == (3, 3, 63, 3)
        assert ffi.string(page.subnqn).startswith(b"nqn.2014-08.org.nvmexpress:uuid:")
        assert int.from_bytes(bytes(page.tnvmcap), "little") == 2 << 20
        assert page.vwc == lib.NVME_VWC_FLUSH_NO_BROADCAST


@pytest.mark.parametrize(
    ("cns", "nsid", "cdw11", "status"),
    [
        (lib.NVME_ID_CNS_NS, 0, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_ID_CNS_NS, 33, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_ID_CNS_NS_ACTIVE_LIST, 0xFFFFFFFE, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_ID_CNS_NS_ACTIVE_LIST, 0xFFFFFFFF, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_ID_CNS_NS_DESC_LIST, 3, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_ID_CNS_NVMSET_LIST, 0, 0, lib.NVME_SC_INVALID_FIELD),
        (lib.NVME_ID_CNS_CS_NS, 1, lib.NVME_CSI_ZNS << 24, lib.NVME_SC_INVALID_IO_CMD_SET),
        (lib.NVME_ID_CNS_CS_NS, 0, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_ID_CNS_CS_CTRL, 0, 9 << 24, lib.NVME_SC_INVALID_IO_CMD_SET),
        (lib.NVME_ID_CNS_CS_NS_ACTIVE_LIST, 0, 1 << 24, lib.NVME_SC_INVALID_IO_CMD_SET),
        (lib.NVME_ID_CNS_CS_INDEP_NS, 0, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_ID_CNS_NS_PRESENT_LIST, 0xFFFFFFFE, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_ID_CNS_NS_PRESENT, 0xFFFFFFFF, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_ID_CNS_CTRL_NS_LIST, 3, 0, lib.NVME_SC_INVALID_FIELD),
        (lib.NVME_ID_CNS_PRIMARY_CTRL_CAP, 0, 0, lib.NVME_SC_INVALID_FIELD),
        (lib.NVME_ID_CNS_SECONDARY_CTRL_LIST, 0, 0, lib.NVME_SC_INVALID_FIELD),
        (lib.NVME_ID_CNS_CS_LIST | 5 << 16, 0, 0, lib.NVME_SC_INVALID_FIELD),
        (0xFF, 0, 0, lib.NVME_SC_INVALID_FIELD),
    ],
)
async def test_refused(cns: int, nsid: int, cdw11: int, status: int) -> None:
    async with running() as rig:
        done = await rig.admin(lib.NVME_ADMIN_IDENTIFY, nsid=nsid, cdw10=cns, cdw11=cdw11)
        assert (done.code, done.dnr) == (status, True)


async def test_namespaces() -> None:
    async with running() as rig:
        page = await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")
        assert (page.nsze, page.flbas, page.lbaf[page.flbas].ds) == (256, 1, 12)
        page = await rig.identify(lib.NVME_ID_CNS_NS, 2, kind="nvme_id_ns")
        assert (page.nsze, page.flbas, page.lbaf[0].ds, page.npwg) == (2048, 0, 9, 7)
        assert bytes(page.eui64) != bytes(8)
        assert await rig.identify(lib.NVME_ID_CNS_NS, 3) == bytes(4096)
        common = await rig.identify(lib.NVME_ID_CNS_NS, 0xFFFFFFFF, kind="nvme_id_ns")
        assert (common.nsze, common.nlbaf, common.dpc) == (0, 4, 0x19)
        independent = await rig.identify(lib.NVME_ID_CNS_CS_INDEP_NS, 1, kind="nvme_id_ns_indep")
        assert independent.nstat == lib.NVME_NSTAT_NRDY
        assert await rig.identify(lib.NVME_ID_CNS_CS_NS, 1) == bytes(4096)
        assert await rig.identify(lib.NVME_ID_CNS_CS_CTRL) == bytes(4096)


async def test_lists() -> None:
    async with running(NvmeConfig(max_namespaces=8)) as rig:
        for cns in (
            lib.NVME_ID_CNS_NS_ACTIVE_LIST,
            lib.NVME_ID_CNS_CS_NS_ACTIVE_LIST,
            lib.NVME_ID_CNS_NS_PRESENT_LIST,
            lib.NVME_ID_CNS_CS_NS_PRESENT_LIST,
        ):
            assert (await rig.identify(cns))[:12] == bytes.fromhex("01000000 02000000 00000000")
            assert (await rig.identify(cns, 1))[:8] == bytes.fromhex("02000000 00000000")
        assert (await rig.identify(lib.NVME_ID_CNS_CTRL_LIST))[:4] == bytes.fromhex("0100 0000")
        assert (await rig.identify(lib.NVME_ID_CNS_CTRL_LIST | 1 << 16))[:4] == bytes(4)
        assert (await rig.identify(lib.NVME_ID_CNS_CTRL_NS_LIST, 1))[:4] == bytes.fromhex("0100 0000")
        assert (await rig.identify(lib.NVME_ID_CNS_CS_LIST | 0xFFFF0000))[:16] == (1).to_bytes(16, "little")


async def test_descriptors() -> None:
    async with running() as rig:
        raw = await rig.identify(lib.NVME_ID_CNS_NS_DESC_LIST, 1)
        kinds = {}
        while raw[0]:
            kinds[raw[0]] = raw[4 : 4 + raw[1]]
            raw = raw[4 + raw[1] :]
        assert {kind: len(value) for kind, value in kinds.items()} == {1: 8, 2: 16, 3: 16, 4: 1}
        page = await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")
        assert (kinds[1], kinds[2]) == (bytes(page.eui64), bytes(page.nguid))
