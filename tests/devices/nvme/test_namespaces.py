"""Namespace Management, Namespace Attachment and Format NVM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import MIB, PLACES, Completion, Place, Rig, running

pytestmark = pytest.mark.touches_c

MGMT, ATTACH, FORMAT = lib.NVME_ADMIN_NS_MGMT, lib.NVME_ADMIN_NS_ATTACH, lib.NVME_ADMIN_FORMAT_NVM
INVALID, INVALID_NS = lib.NVME_SC_INVALID_FIELD, lib.NVME_SC_INVALID_NS
ONE_CONTROLLER = b"\1\0\0\0".ljust(4096, b"\0")
ROOM = NvmeConfig(capacity=4 * MIB, max_namespaces=4)


def wanted(**fields: Any) -> bytes:
    values = {"nsze": 256, "ncap": 256, "flbas": 1} | fields
    return bytes(ffi.buffer(ffi.new("struct nvme_id_ns *", values)))


async def create(rig: Rig, csi: int = 0, **fields: Any) -> Completion:
    return await rig.admin(MGMT, cdw10=lib.NVME_NS_MGMT_CREATE, cdw11=csi << 24, data=wanted(**fields))


async def attach(rig: Rig, nsid: int, *, detach: bool = False, controllers: bytes = ONE_CONTROLLER) -> int:
    return (await rig.admin(ATTACH, nsid=nsid, cdw10=int(detach), data=controllers)).code


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_a_life(place: Place, engine: EngineKind) -> None:
    """Created, attached, written, detached, attached with its data, deleted; the number is free again."""
    async with running(ROOM, place=place, engine=engine) as rig:
        made = await create(rig, nsze=511, ncap=511, flbas=0)
        assert (made.status, made.result) == (0, 3)
        assert (await rig.io(lib.NVME_CMD_READ, nsid=3)).code == INVALID
        assert await rig.identify(lib.NVME_ID_CNS_NS, 3) == bytes(4096)
        allocated = await rig.identify(lib.NVME_ID_CNS_NS_PRESENT, 3, kind="nvme_id_ns")
        assert allocated.nsze == 511
        assert await attach(rig, 3) == 0
        page = await rig.identify(lib.NVME_ID_CNS_NS, 3, kind="nvme_id_ns")
        assert (page.nsze, page.flbas) == (511, 0)
        assert (await rig.io(lib.NVME_CMD_WRITE, nsid=3, cdw10=510, data=b"x" * 512)).status == 0
        assert (await rig.io(lib.NVME_CMD_WRITE, nsid=3, cdw10=511)).code == lib.NVME_SC_LBA_RANGE
        assert await attach(rig, 3, detach=True) == 0
        assert (await rig.io(lib.NVME_CMD_READ, nsid=3)).code == INVALID
        assert await attach(rig, 3) == 0
        rig.data[:512] = 0
        assert (await rig.io(lib.NVME_CMD_READ, nsid=3, cdw10=510)).status == 0
        assert rig.data[:512].tobytes() == b"x" * 512
        controller = await rig.identify(lib.NVME_ID_CNS_CTRL, kind="nvme_id_ctrl")
        assert int.from_bytes(bytes(controller.unvmcap), "little") == 4 * MIB - 256 * 1024
        assert (await rig.admin(MGMT, nsid=3, cdw10=lib.NVME_NS_MGMT_DELETE)).status == 0
        assert (await rig.io(lib.NVME_CMD_READ, nsid=3)).code == INVALID
        again = await create(rig)
        assert again.result == 3
        assert await attach(rig, 3) == 0
        renewed = await rig.identify(lib.NVME_ID_CNS_NS, 3, kind="nvme_id_ns")
        assert bytes(renewed.nguid) != bytes(page.nguid)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"nsze": 0, "ncap": 0}, INVALID),
        ({"ncap": 255}, lib.NVME_SC_THIN_PROV_NOT_SUPP),
        ({"ncap": 257}, INVALID),
        ({"flbas": 5}, lib.NVME_SC_INVALID_FORMAT),
        ({"dps": 1}, lib.NVME_SC_INVALID_FORMAT),
        ({"flbas": 3, "dps": 2}, lib.NVME_SC_INVALID_FORMAT),
        ({"nmic": 1}, INVALID),
        ({"anagrpid": 1}, INVALID),
        ({"nvmsetid": 1}, INVALID),
        ({"endgid": 1}, INVALID),
        ({"nsze": 1025, "ncap": 1025}, lib.NVME_SC_NS_INSUFFICIENT_CAP),
        ({"nsze": 2**63, "ncap": 2**63}, lib.NVME_SC_NS_INSUFFICIENT_CAP),
        ({"csi": lib.NVME_CSI_ZNS}, lib.NVME_SC_IOCS_NOT_SUPPORTED),
    ],
)
async def test_what_cannot_be_created(fields: dict[str, int], status: int) -> None:
    async with running(ROOM) as rig:
        assert (await create(rig, **fields)).code == status


async def test_numbers_run_out() -> None:
    async with running(ROOM) as rig:
        assert [(await create(rig)).code for _ in range(3)] == [0, 0, lib.NVME_SC_NS_ID_UNAVAILABLE]


@pytest.mark.parametrize(
    ("opcode", "fields", "status"),
    [
        (MGMT, {"cdw10": 2}, INVALID),
        (MGMT, {"cdw10": 1, "nsid": 0}, INVALID_NS),
        (MGMT, {"cdw10": 1, "nsid": 5}, INVALID_NS),
        (MGMT, {"cdw10": 1, "nsid": 3}, INVALID),
        (MGMT, {"cdw10": 0, "prp1": 0xDEAD000}, lib.NVME_SC_DATA_XFER_ERROR),
        (ATTACH, {"cdw10": 2, "nsid": 1}, INVALID),
        (ATTACH, {"cdw10": 0, "nsid": 0}, INVALID_NS),
        (ATTACH, {"cdw10": 0, "nsid": 0xFFFFFFFF}, INVALID_NS),
        (ATTACH, {"cdw10": 0, "nsid": 3}, INVALID),
        (ATTACH, {"cdw10": 0, "nsid": 1}, lib.NVME_SC_NS_ALREADY_ATTACHED),
        (FORMAT, {"nsid": 0}, INVALID_NS),
        (FORMAT, {"nsid": 5}, INVALID_NS),
        (FORMAT, {"nsid": 3}, INVALID),
        (FORMAT, {"nsid": 1, "cdw10": 5}, lib.NVME_SC_INVALID_FORMAT),
        (FORMAT, {"nsid": 1, "cdw10": 0x1000}, lib.NVME_SC_INVALID_FORMAT),
        (FORMAT, {"nsid": 1, "cdw10": 1 << 5}, lib.NVME_SC_INVALID_FORMAT),
        (FORMAT, {"nsid": 1, "cdw10": 2 << 5 | 3}, lib.NVME_SC_INVALID_FORMAT),
        (FORMAT, {"nsid": 1, "cdw10": 4 << 5}, INVALID),
        (FORMAT, {"nsid": 1, "cdw10": 3 << 9}, INVALID),
    ],
)
async def test_refused(opcode: int, fields: dict[str, int], status: int) -> None:
    async with running(ROOM) as rig:
        assert (await rig.admin(opcode, data=ONE_CONTROLLER, **fields)).code == status


@pytest.mark.parametrize("controllers", [b"", b"\2\0\0\0\1\0", b"\1\0\5\0", b"\xff\xff"])
async def test_controller_lists(controllers: bytes) -> None:
    async with running(ROOM) as rig:
        page = controllers.ljust(4096, b"\0")
        assert await attach(rig, 1, detach=True, controllers=page) == lib.NVME_SC_CTRL_LIST_INVALID


async def test_detaching_twice() -> None:
    async with running(ROOM) as rig:
        assert await attach(rig, 1, detach=True) == 0
        assert await attach(rig, 1, detach=True) == lib.NVME_SC_NS_NOT_ATTACHED


async def test_deleting_all() -> None:
    async with running(ROOM) as rig:
        assert (await rig.admin(MGMT, nsid=0xFFFFFFFF, cdw10=1)).status == 0
        assert await rig.identify(lib.NVME_ID_CNS_NS_PRESENT_LIST) == bytes(4096)


@pytest.mark.parametrize(("place", "engine"), PLACES)
@pytest.mark.parametrize("erase", [0, 1, 2])
async def test_format(place: Place, engine: EngineKind, erase: int) -> None:
    async with running(place=place, engine=engine) as rig:
        assert (await rig.io(lib.NVME_CMD_WRITE, data=b"secret" * 100)).status == 0
        assert (await rig.io(lib.NVME_CMD_WRITE_UNCOR, cdw10=5)).status == 0
        assert (await rig.admin(FORMAT, nsid=1, cdw10=0 | erase << 9)).status == 0
        page = await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")
        assert (page.nsze, page.flbas, page.fpi) == (2048, 0, lib.NVME_FPI_SUPPORTED)
        rig.data[:4096] = 1
        assert (await rig.io(lib.NVME_CMD_READ, cdw12=7)).status == 0
        assert not rig.data[:4096].any()
        assert (await rig.io(lib.NVME_CMD_READ, cdw10=40)).status == 0


@pytest.mark.parametrize("index", [2, 3, 4])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("first", [False, True])
async def test_format_with_protection(index: int, extended: bool, first: bool) -> None:
    """Protection goes where the format says, and is checked there."""
    async with running() as rig:
        word = index | lib.NVME_FORMAT_MSET * extended | 1 << 5 | lib.NVME_FORMAT_PIL * first
        assert (await rig.admin(FORMAT, nsid=1, cdw10=word)).status == 0
        page = await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")
        assert page.dps == 1 | lib.NVME_DPS_FIRST * first
        assert page.flbas == index | lib.NVME_FLBAS_EXTENDED * extended
        shift, size = page.lbaf[index].ds, page.lbaf[index].ms
        metadata = rig.iova + 0x20000
        rig.memory[0x20000 : 0x20000 + 64] = 0xAB
        make = lib.NVME_RW_PRACT | lib.NVME_RW_PRCHK_GUARD | lib.NVME_RW_PRCHK_REF
        assert (await rig.io(lib.NVME_CMD_WRITE, cdw12=make, metadata=metadata)).status == 0
        check = lib.NVME_RW_PRCHK_GUARD | lib.NVME_RW_PRCHK_REF
        assert (await rig.io(lib.NVME_CMD_READ, cdw12=check, metadata=metadata)).status == 0
        where = 0x10000 + (1 << shift) if extended else 0x20000
        kept = rig.memory[where : where + size].tobytes()
        tuple_at = 0 if first else size - 8
        assert kept[tuple_at + 4 : tuple_at + 8] == bytes(4)
        assert kept[:tuple_at] + kept[tuple_at + 8 :] in (b"", b"\xab" * (size - 8), bytes(size - 8))


async def test_an_image_has_no_metadata(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(b"x" * MIB)
    async with running(namespaces=(NamespaceSpec(image=image, size=0),)) as rig:
        page = await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")
        assert (page.nlbaf, page.mc, page.dpc) == (1, 0, 0)
        assert (await rig.admin(FORMAT, nsid=1, cdw10=2)).code == lib.NVME_SC_INVALID_FORMAT
        assert (await rig.admin(FORMAT, nsid=1, cdw10=0)).status == 0
        assert image.read_bytes() == bytes(MIB)


async def test_what_it_is_kept_in(tmp_path: Path) -> None:
    """Memory can be looked at beside the device; an image is a file."""
    image = tmp_path / "disk"
    image.write_bytes(b"x" * MIB)
    async with running(namespaces=(NamespaceSpec(size=MIB), NamespaceSpec(image=image, size=0))) as rig:
        assert (await rig.io(lib.NVME_CMD_WRITE, data=b"abc" + bytes(4093), nsid=1, cdw10=7)).status == 0
        memory = rig.device.namespaces.by_nsid[1].memory
        assert memory is not None
        assert memory.shape == (MIB,)
        assert memory[7 * 4096 : 7 * 4096 + 3].tobytes() == b"abc"
        assert rig.device.namespaces.by_nsid[2].memory is None


async def test_a_read_only_image_is_left_alone(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(b"x" * MIB)
    async with running(namespaces=(NamespaceSpec(image=image, size=0, read_only=True),)) as rig:
        page = await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")
        assert page.nsattr == lib.NVME_NSATTR_WRITE_PROTECTED
        for opcode, word in ((FORMAT, 0), (lib.NVME_ADMIN_SANITIZE, 2), (MGMT, 1)):
            done = await rig.admin(opcode, nsid=1, cdw10=word)
            assert done.code == lib.NVME_SC_NS_WRITE_PROTECTED
        assert image.read_bytes() == b"x" * MIB


async def test_while_a_format_goes_on() -> None:
    """Its own namespace refuses, others work; a reset does not stop it, and nothing completes afterwards."""
    async with running(ROOM, namespaces=(NamespaceSpec(size=256 * MIB), NamespaceSpec(size=MIB))) as rig:
        busy = rig.submit(FORMAT, nsid=1, cdw10=0)
        with_io = rig.submit(lib.NVME_CMD_READ, ring=rig.io_ring, nsid=1, prp1=rig.iova)
        progress = rig.submit(lib.NVME_ADMIN_IDENTIFY, nsid=1, prp1=rig.iova + 0x20000)
        others = [
            rig.submit(opcode, nsid=1, cdw10=word, prp1=rig.iova + 0x30000)
            for opcode, word in ((FORMAT, 0), (MGMT, 1), (lib.NVME_ADMIN_SANITIZE, 2))
        ]
        assert (await rig.wait(progress)).status == 0
        remaining = rig.memory[0x20000 + 32]
        assert remaining & lib.NVME_FPI_SUPPORTED
        assert remaining & 0x7F
        for cid in others:
            assert (await rig.wait(cid)).code == lib.NVME_SC_FORMAT_IN_PROGRESS
        assert busy not in rig.admin_ring.done
        first = await rig.wait(with_io, ring=rig.io_ring)
        assert first.code in (0, lib.NVME_SC_FORMAT_IN_PROGRESS)
        refused = await rig.io(lib.NVME_CMD_READ, nsid=1)
        assert (refused.code, refused.dnr) == (lib.NVME_SC_FORMAT_IN_PROGRESS, False)
        assert (await rig.io(lib.NVME_CMD_READ, nsid=2)).status == 0
        rig.reset()
        with trio.fail_after(30):
            while (await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")).flbas:
                pass
        assert busy not in rig.admin_ring.done


async def test_all_namespaces_are_formatted() -> None:
    async with running() as rig:
        assert (await rig.admin(FORMAT, nsid=0xFFFFFFFF, cdw10=1)).status == 0
        for nsid in (1, 2):
            assert (await rig.identify(lib.NVME_ID_CNS_NS, nsid, kind="nvme_id_ns")).flbas == 1
