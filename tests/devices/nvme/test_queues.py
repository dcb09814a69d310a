"""Creating and deleting queues, shadow doorbells, and admin commands that are none."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NvmeConfig
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import PLACES, Place, running
from tests.devices.nvme.rig import SIZE as SIZE_OF_MEMORY

pytestmark = pytest.mark.touches_c

CREATE_CQ, CREATE_SQ = lib.NVME_ADMIN_CREATE_CQ, lib.NVME_ADMIN_CREATE_SQ
DELETE_CQ, DELETE_SQ = lib.NVME_ADMIN_DELETE_CQ, lib.NVME_ADMIN_DELETE_SQ
QID, SIZE, INVALID = lib.NVME_SC_QID_INVALID, lib.NVME_SC_QUEUE_SIZE, lib.NVME_SC_INVALID_FIELD
BASE = 0x80000
SMALL = 63 << 16


@pytest.mark.parametrize(
    ("opcode", "fields", "status"),
    [
        (CREATE_CQ, {"cdw10": SMALL}, QID),
        (CREATE_CQ, {"cdw10": SMALL | 1}, QID),
        (CREATE_CQ, {"cdw10": SMALL | 9}, QID),
        (CREATE_CQ, {"cdw10": SMALL | 0xFFFF}, QID),
        (CREATE_CQ, {"cdw10": 2}, SIZE),
        (CREATE_CQ, {"cdw10": 1024 << 16 | 2}, SIZE),
        (CREATE_CQ, {"cdw10": SMALL | 2, "cdw11": 0}, INVALID),
        (CREATE_CQ, {"cdw10": SMALL | 2, "cdw11": 9 << 16 | 3}, lib.NVME_SC_INVALID_VECTOR),
        (CREATE_CQ, {"cdw10": SMALL | 2, "prp1": 0x100010}, lib.NVME_SC_PRP_INVALID_OFFSET),
        (CREATE_SQ, {"cdw10": SMALL, "cdw11": 1 << 16 | 1}, QID),
        (CREATE_SQ, {"cdw10": SMALL | 1, "cdw11": 1 << 16 | 1}, QID),
        (CREATE_SQ, {"cdw10": SMALL | 9, "cdw11": 1 << 16 | 1}, QID),
        (CREATE_SQ, {"cdw10": SMALL | 2, "cdw11": 0 << 16 | 1}, QID),
        (CREATE_SQ, {"cdw10": SMALL | 2, "cdw11": 9 << 16 | 1}, QID),
        (CREATE_SQ, {"cdw10": SMALL | 2, "cdw11": 5 << 16 | 1}, lib.NVME_SC_CQ_INVALID),
        (CREATE_SQ, {"cdw10": 0 | 2, "cdw11": 1 << 16 | 1}, SIZE),
        (CREATE_SQ, {"cdw10": 1024 << 16 | 2, "cdw11": 1 << 16 | 1}, SIZE),
        (CREATE_SQ, {"cdw10": SMALL | 2, "cdw11": 1 << 16}, INVALID),
        (CREATE_SQ, {"cdw10": SMALL | 2, "cdw11": 1 << 16 | 1, "prp1": 8}, lib.NVME_SC_PRP_INVALID_OFFSET),
        (DELETE_SQ, {"cdw10": 0}, QID),
        (DELETE_SQ, {"cdw10": 2}, QID),
        (DELETE_SQ, {"cdw10": 0xFFFF}, QID),
        (DELETE_CQ, {"cdw10": 0}, QID),
        (DELETE_CQ, {"cdw10": 2}, QID),
        (DELETE_CQ, {"cdw10": 1}, lib.NVME_SC_INVALID_QUEUE),
    ],
)
async def test_refused(opcode: int, fields: dict[str, Any], status: int) -> None:
    async with running(NvmeConfig(queues=8)) as rig:
        fields = {"prp1": rig.iova + BASE, "cdw11": 1, **fields}
        done = await rig.admin(opcode, **fields)
        assert (done.code, done.dnr) == (status, True)


async def test_entry_sizes_are_checked_when_a_queue_is_made() -> None:
    async with running(enable=False) as rig:
        rig.enable()
        cc = rig.read(lib.NVME_REG_CC, 4)
        rig.write(lib.NVME_REG_CC, 4, cc & ~(lib.NVME_CC_IOSQES_MASK | lib.NVME_CC_IOCQES_MASK))
        done = await rig.admin(CREATE_CQ, cdw10=SMALL | 1, cdw11=1, prp1=rig.iova + BASE)
        assert done.code == SIZE


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_deleting_a_queue_ends_what_waits_in_it(place: Place, engine: EngineKind) -> None:
    async with running(place=place, engine=engine) as rig:
        fault = rig.device.inject("drop", opcode=lib.NVME_CMD_READ)
        lost = rig.submit(lib.NVME_CMD_READ, ring=rig.io_ring, nsid=1, prp1=rig.iova)
        await rig.until(lambda: fault.count)
        assert (await rig.admin(DELETE_SQ, cdw10=1)).status == 0
        assert (await rig.wait(lost, ring=rig.io_ring)).code == lib.NVME_SC_ABORT_QUEUE
        assert (await rig.admin(DELETE_CQ, cdw10=1)).status == 0
        rig.rings_of_io()
        await rig.make_queues()
        assert (await rig.io(lib.NVME_CMD_READ)).status == 0


@pytest.mark.parametrize("opcode", sorted(set(range(256)) - {0, 1, 2, 4, 5, 6, 8, 9, 0xA, 0xC, 0xD}))
async def test_opcodes_that_are_none(opcode: int) -> None:
    known = {0x10, 0x11, 0x14, 0x15, 0x18, 0x7C, 0x80, 0x84}
    async with running() as rig:
        done = await rig.admin(opcode)
        assert (done.code == lib.NVME_SC_INVALID_OPCODE) == (opcode not in known)


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_shadow_doorbells(place: Place, engine: EngineKind) -> None:
    """The tail is heard from memory; the event index says up to where it was (Base 5.8)."""
    async with running(place=place, engine=engine) as rig:
        shadow, index = rig.iova + BASE, rig.iova + BASE + 4096
        done = await rig.admin(lib.NVME_ADMIN_DBBUF, prp1=shadow, prp2=index)
        assert done.status == 0
        cid = rig.push(rig.io_ring, lib.NVME_CMD_READ, nsid=1, prp1=rig.iova + 0x10000)
        rig.memory[BASE + 8 : BASE + 12].view("<u4")[0] = rig.io_ring.tail
        rig.doorbell(1, rig.io_ring.tail)
        assert (await rig.wait(cid, ring=rig.io_ring)).status == 0
        await rig.settle()
        assert rig.memory[BASE + 4096 + 8] == rig.io_ring.tail


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_shadow_doorbells_of_a_queue_that_is_made_again(place: Place, engine: EngineKind) -> None:
    """They are zero before the queue is there: nothing that is left in the buffer counts."""
    async with running(place=place, engine=engine) as rig:
        shadow, index = rig.iova + BASE, rig.iova + BASE + 4096
        assert (await rig.admin(lib.NVME_ADMIN_DBBUF, prp1=shadow, prp2=index)).status == 0
        values = rig.memory[BASE + 8 : BASE + 16].view("<u4")
        for _ in range(2):
            assert values.tolist() == [0, 0]
            for _ in range(3):
                cid = rig.push(rig.io_ring, lib.NVME_CMD_READ, nsid=1, prp1=rig.iova + 0x10000)
            values[0] = rig.io_ring.tail
            rig.doorbell(1, rig.io_ring.tail)
            with trio.fail_after(30):
                while cid not in rig.io_ring.done:
                    rig.io_ring.collect()
                    await trio.lowlevel.checkpoint()
            values[1] = rig.io_ring.head
            rig.doorbell(1, rig.io_ring.head, completion=True)
            await rig.settle()
            assert (await rig.admin(DELETE_SQ, cdw10=1)).status == 0
            assert (await rig.admin(DELETE_CQ, cdw10=1)).status == 0
            assert values.tolist() == [3, 3]
            rig.rings_of_io()
            await rig.make_queues()


@pytest.mark.parametrize("field", ["prp1", "prp2"])
@pytest.mark.parametrize("address", [0x100800, 0x180004, 1 << 40, 0x100000 + SIZE_OF_MEMORY])
async def test_shadow_doorbells_are_pages_that_are_there(field: str, address: int) -> None:
    async with running() as rig:
        fields: dict[str, Any] = {field: address}
        assert (await rig.admin(lib.NVME_ADMIN_DBBUF, **fields)).code == INVALID
        assert not rig.csts & lib.NVME_CSTS_CFS


async def test_no_shadow_doorbells_with_a_wide_stride() -> None:
    async with running(NvmeConfig(dstrd=4)) as rig:
        page = await rig.identify(lib.NVME_ID_CNS_CTRL, kind="nvme_id_ctrl")
        assert not page.oacs & lib.NVME_OACS_DBBUF
        assert (await rig.admin(lib.NVME_ADMIN_DBBUF)).code == lib.NVME_SC_INVALID_OPCODE
