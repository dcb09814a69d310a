"""Page faults: exact bytes and addresses, the fault log, recovery, and that nobody else suffers."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.drivers.dsa import BatchError, DsaError, WqConfig, descriptors

pytestmark = pytest.mark.touches_c

PAGE = 4096
Kind = tuple[str, str]


async def with_hole(r: Any, pages: int, hole: int) -> tuple[Any, int]:
    """A buffer at an IOVA whose page number ``hole`` is not mapped: the buffers of its two halves, and the IOVA."""
    iova = 0x4000_0000
    before = await r.container.alloc(hole * PAGE, iova=iova)
    after = await r.container.alloc((pages - hole - 1) * PAGE, iova=iova + (hole + 1) * PAGE)
    return (before, after), iova


async def test_a_hole_in_the_source(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        (before, after), iova = await with_hole(r, 4, 2)
        before[:], after[:] = 0xAA, 0xBB
        dst = await r.container.alloc(4 * PAGE)
        with pytest.raises(DsaError) as caught:
            await r.wq.memmove(dst, iova + 100, 3 * PAGE)
        error = caught.value
        assert error.name == "DSA_COMP_PAGE_FAULT_NOBOF"
        assert error.code == lib.DSA_COMP_PAGE_FAULT_NOBOF
        assert error.fault_addr == iova + 2 * PAGE
        assert error.bytes_completed == 2 * PAGE - 100
        assert not error.write
        assert error.device == r.device.name
        assert "reading iova 0x40002000" in str(error)
        assert np.all(dst[: 2 * PAGE - 100] == 0xAA)
        assert not dst[2 * PAGE - 100 :].any()
        (fault,) = r.machine.hypervisor.faults.snapshot()
        assert (fault.device, fault.iova, fault.permission) == (r.device.name, iova + 2 * PAGE, "read")
        await r.wq.noop()


async def test_a_hole_in_the_destination(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        (before, after), iova = await with_hole(r, 4, 1)
        src = await r.container.alloc(4 * PAGE)
        src[:] = 0xCC
        with pytest.raises(DsaError) as caught:
            await r.wq.memmove(iova, src, 4 * PAGE)
        assert caught.value.write
        assert caught.value.fault_addr == iova + PAGE
        assert caught.value.bytes_completed == PAGE
        assert "writing" in str(caught.value)
        assert np.all(before == 0xCC)
        assert not after.any()
        (fault,) = r.machine.hypervisor.faults.snapshot()
        assert (fault.iova, fault.permission) == (iova + PAGE, "write")


@pytest.mark.parametrize("flags", ["read-only", "write-only"])
async def test_permissions_are_those_of_the_mapping(running: Any, kind: Kind, flags: str) -> None:
    async with running(*kind) as r:
        a = await r.container.alloc(PAGE, write=flags != "read-only")
        b = await r.container.alloc(PAGE)
        await r.wq.memmove(b, a, PAGE)
        with pytest.raises(DsaError) as caught:
            await r.wq.memmove(a, b, PAGE) if flags == "read-only" else await r.wq.memmove(0x2000, a, PAGE)
        assert caught.value.write
        assert caught.value.bytes_completed == 0


OPERATIONS: list[tuple[str, Any, bool]] = [
    ("fill", lambda wq, good, bad: wq.fill(bad, 0, 100), True),
    ("compare", lambda wq, good, bad: wq.compare(good, bad, 100), False),
    ("compare", lambda wq, good, bad: wq.compare(bad, good, 100), False),
    ("crcgen", lambda wq, good, bad: wq.crcgen(bad, 100), False),
    ("copy_crc", lambda wq, good, bad: wq.copy_crc(bad, good, 100), True),
    ("copy_crc", lambda wq, good, bad: wq.copy_crc(good, bad, 100), False),
    ("memmove", lambda wq, good, bad: wq.memmove(good, bad, 100), False),
    ("compval", lambda wq, good, bad: wq.compval(bad, 0, 100), False),
    ("create_delta", lambda wq, good, bad: wq.create_delta(bad, good, good[200:], 96), False),
    ("create_delta", lambda wq, good, bad: wq.create_delta(good, bad, good[200:], 96), False),
    ("create_delta", lambda wq, good, bad: wq.create_delta(good, good[200:], bad, 96), True),
    ("apply_delta", lambda wq, good, bad: wq.apply_delta(bad, good[200:], 10, 4096), True),
    ("apply_delta", lambda wq, good, bad: wq.apply_delta(good, bad, 10, 96), False),
    ("dualcast", lambda wq, good, bad: wq.dualcast(bad, good[64:], good[200:], 100), True),
    ("dualcast", lambda wq, good, bad: wq.dualcast(good[64:], bad, good[200:], 100), True),
    ("dualcast", lambda wq, good, bad: wq.dualcast(good, good.iova + PAGE, bad, 100), False),
    ("transl_fetch", lambda wq, good, bad: wq.transl_fetch(bad, 100), False),
    ("cflush", lambda wq, good, bad: wq.cflush(bad, 100), False),
]


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
async def test_every_operation_reports_its_fault(running: Any, number: int) -> None:
    name, action, write = OPERATIONS[number]
    async with running() as r:
        good = await r.container.alloc(PAGE)
        good[:100] = 1
        with pytest.raises(DsaError) as caught:
            await action(r.wq, good, 0x7000_0040)
        error = caught.value
        assert (error.operation, error.write, error.fault_addr) == (name, write, 0x7000_0040)
        assert error.bytes_completed == 0


async def test_unmapping_a_buffer_while_a_batch_runs_against_it(running: Any, kind: Kind) -> None:
    """The device stops inside a batch, before its third member; the buffer goes away; the device goes on."""
    platform, engine = kind
    async with running(platform, engine, wqs=(WqConfig(), WqConfig())) as r:
        src = await r.container.alloc(4 * PAGE)
        victim = await r.container.alloc(4 * PAGE)
        bystander = await r.container.alloc(4 * PAGE)
        src[:] = np.random.default_rng(3).integers(1, 256, src.size)
        offsets = np.arange(4, dtype=np.uint64) * PAGE
        batch = await r.wq.alloc_batch(4)
        other = await r.dsa.wq(1).alloc_batch(4)
        victim_iova = victim.iova
        descriptors.memmove(victim.iova + offsets, src.iova + offsets, PAGE, out=batch.descriptors)
        descriptors.memmove(bystander.iova + offsets, src.iova + offsets, PAGE, out=other.descriptors)
        for member in batch.descriptors[1:]:  # in order, so that the stop point is between the same two moves
            member["flags_opcode"] |= lib.IDXD_OP_FLAG_FENCE

        r.engine.stop_before(3)  # the batch itself is one
        submission = r.wq.batch_nowait(batch, keep=(src, victim))
        if engine == "thread":
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(r.engine.stop_fd)
        assert r.engine.stopped
        assert not submission.poll()
        beside = r.dsa.wq(1).batch_nowait(other, keep=(src, bystander))
        await r.container.unmap_dma(victim_iova, 4 * PAGE)
        r.engine.resume()
        record = (await submission.wait())[0]
        assert int(record["status"]) == lib.DSA_COMP_BATCH_FAIL

        statuses = batch.records["status"] & lib.DSA_COMP_STATUS_MASK
        assert statuses[:2].tolist() == [1, 1]
        assert int(batch.records["status"][2]) == lib.DSA_COMP_PAGE_FAULT_NOBOF | lib.DSA_COMP_STATUS_WRITE
        assert int(batch.records["fault_addr"][2]) == victim_iova + 2 * PAGE
        assert int(batch.records["bytes_completed"][2]) == 0
        assert np.array_equal(victim[: 2 * PAGE], src[: 2 * PAGE])
        assert not victim[2 * PAGE :].any()
        faults = r.machine.hypervisor.faults.snapshot()
        assert (faults[0].device, faults[0].iova) == (r.device.name, victim_iova + 2 * PAGE)

        assert (await beside.wait())["status"].tolist() == [1]
        assert np.array_equal(bystander, src)

        recovery = await r.dsa.recover()
        assert (recovery.reset, recovery.reenabled, recovery.software_error) == (False, (), None)
        await r.container.map_dma(victim_iova, victim)
        assert (await r.wq.batch(batch))["status"].tolist() == [1] * 4
        assert np.array_equal(victim, src)


def check_each(batch: Any, iova: int, victim: Any, src: Any) -> None:
    """What each move of a page of a batch to ``iova`` did is what its record says, and no more."""
    for record, start in zip(batch.records, range(0, len(victim), PAGE), strict=True):
        part = slice(start, start + PAGE)
        if record["status"] == lib.DSA_COMP_SUCCESS:
            assert np.array_equal(victim[part], src[part])
        else:
            assert int(record["status"]) == 0x83
            assert iova <= int(record["fault_addr"]) < iova + len(victim)
            done = int(record["bytes_completed"])
            assert np.array_equal(victim[part][:done], src[part][:done])
            assert not victim[part][done:].any()


@pytest.mark.parametrize("platform", ["intel", "amd"])
async def test_buffers_come_and_go_under_running_batches(running: Any, platform: str) -> None:
    """The same without a stop point: a native thread runs batches while their target is unmapped and mapped again."""
    least, most, members = 20, 500, 256
    async with running(platform, "thread", wqs=(WqConfig(), WqConfig())) as r:
        src = await r.container.alloc(members * PAGE)
        src[:] = np.random.default_rng(4).integers(1, 256, src.size)
        offsets = np.arange(members, dtype=np.uint64) * PAGE
        victim = await r.container.alloc(members * PAGE)
        victim_iova = victim.iova
        outcomes = {"whole": 0, "faulted": 0}
        running_on = True

        async def steady() -> int:
            target = await r.container.alloc(members * PAGE)
            moves = descriptors.memmove(target.iova + offsets, src.iova + offsets, PAGE)
            done = 0
            while running_on:
                target[:] = 0
                await r.dsa.wq(1).batch(moves)
                assert np.array_equal(target, src)
                done += 1
            return done

        async def troubled() -> None:
            nonlocal running_on
            batch = await r.wq.alloc_batch(members)
            descriptors.memmove(victim_iova + offsets, src.iova + offsets, PAGE, out=batch.descriptors)
            while outcomes["faulted"] < least and outcomes["whole"] < most:
                victim[:] = 0
                # Where the two share a processor the engine may be done each time: then it begins after the unmap.
                late = sum(outcomes.values()) % 20 == 19
                if late:
                    r.engine.pause()
                submission = r.wq.batch_nowait(batch)
                r.container.unmap_dma_nowait(victim_iova, members * PAGE)
                if late:
                    r.engine.unpause()
                landed = np.array(victim)  # from here on nothing may land any more
                status = int((await submission.wait())[0]["status"])
                assert np.array_equal(victim, landed)
                outcomes["whole" if status == lib.DSA_COMP_SUCCESS else "faulted"] += 1
                check_each(batch, victim_iova, victim, src)
                assert (await r.dsa.recover()).reset is False
                await r.container.map_dma(victim_iova, victim)
            running_on = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(troubled)
            assert await steady() > 0
        assert outcomes["faulted"]
        assert {fault.device for fault in r.machine.hypervisor.faults.snapshot()} == {r.device.name}


async def test_a_batch_list_that_cannot_be_read(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        batch = await r.wq.alloc_batch(4)
        iova = batch.iova
        descriptors.noop(4, out=batch.descriptors)
        array = descriptors.empty(1)
        array["flags_opcode"] = lib.DSA_OPCODE_BATCH << lib.DSA_DESC_OPCODE_SHIFT
        array["desc_list_addr"], array["desc_count"] = 0x5000_0000, 4
        record = (await (await r.wq.submit(array)).wait())[0]
        assert int(record["status"]) & lib.DSA_COMP_STATUS_MASK == lib.DSA_COMP_BATCH_PAGE_FAULT
        assert int(record["fault_addr"]) == 0x5000_0000
        batch.iova = 0x5000_0000
        with pytest.raises(BatchError) as caught:
            await r.wq.batch(batch)
        assert caught.value.name == "DSA_COMP_BATCH_PAGE_FAULT"
        assert caught.value.fault_addr == 0x5000_0000
        assert caught.value.failed == []
        batch.iova = iova
        await r.wq.batch(batch)


async def test_what_has_no_record_is_a_software_error(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        member = descriptors.noop(2)
        batch = await r.wq.alloc_batch(2)
        batch.descriptors[:] = member
        batch._addresses = batch._addresses + np.uint64(0x4000_0000)  # records where nothing is mapped
        await r.wq._run(r.wq._batch(batch, 2, True, ()), 0, None)
        with trio.fail_after(10):
            await r.device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).wait(0, deadline=5)
        recovery = await r.dsa.recover()
        error = recovery.software_error
        assert error is not None
        assert recovery.causes & lib.IDXD_INTC_ERR
        assert error.fault_addr in batch._addresses.tolist()
        assert (error.wq, error.operation, error.device) == (0, lib.DSA_OPCODE_NOOP, r.device.name)
        assert error.batch_index in (0, 1)
        assert error.write
        assert error.overflow
        assert r.dsa.last_software_error is error
        assert (await r.dsa.recover()).software_error is None
        await r.wq.noop()


async def test_a_delta_record_touches_only_the_pages_of_its_words(running: Any, kind: Kind) -> None:
    """A page between them may be missing, and the device does not even ask for it; a missing one is asked for once."""
    async with running(*kind) as r:
        (before, after), iova = await with_hole(r, 3, 1)
        delta = await r.container.alloc(PAGE, iova=0x5000_0000)
        delta[:40] = np.frombuffer(struct.pack("<HQHQHQHQ", 0, 1, 511, 2, 1024, 3, 1500, 4), np.uint8)
        await r.wq.apply_delta(iova, delta, 40, 3 * PAGE)
        assert [int(word) for word in before.view(np.uint64)[[0, 511]]] == [1, 2]
        assert [int(word) for word in after.view(np.uint64)[[0, 476]]] == [3, 4]
        assert len(r.machine.hypervisor.faults.snapshot()) == 0
        delta[10:12] = np.frombuffer(struct.pack("<H", 600), np.uint8)
        with pytest.raises(DsaError) as caught:
            await r.wq.apply_delta(iova, delta, 40, 3 * PAGE)
        assert (caught.value.fault_addr, caught.value.bytes_completed) == (iova + 8 * 600, 10)
        (fault,) = r.machine.hypervisor.faults.snapshot()
        assert (fault.iova, fault.permission) == (iova + 8 * 600, "write")
