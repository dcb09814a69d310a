"""The driver and the event log: typed entries, and records that reach whoever waits for them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.dsa import DsaConfig
from pvfio.drivers.dsa import DsaDriver, Event, descriptors
from pvfio.drivers.dsa.eventlog import EventLog

pytestmark = pytest.mark.touches_c

CONFIG = DsaConfig(event_log=True, int_handles=8)
Kind = tuple[str, str]


async def withhold_records(r: Any) -> None:
    """The ring of completion records is mapped no more."""
    await r.container.unmap_dma(r.wq._ring.iova, r.wq._ring.buffer.nbytes)


async def give_back(r: Any) -> None:
    await r.container.map_dma(r.wq._ring.iova, r.wq._ring.buffer)


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_a_record_reaches_its_descriptor(running: Any, kind: Kind, completion: Any) -> None:
    platform, engine = kind
    async with running(platform, engine, CONFIG) as r:
        r.wq.completion = completion
        a, b = await r.container.alloc(4096), await r.container.alloc(4096)
        a[:] = 7
        await withhold_records(r)
        moves = descriptors.memmove(np.array([b.iova], np.uint64), np.array([a.iova], np.uint64), 4096)
        submission = await r.wq.submit(moves)
        await r.device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).wait(0, deadline=10)
        (event,) = await r.dsa.events()
        assert (event.code, event.name) == (lib.DSA_COMP_CRA_XLAT, "DSA_COMP_CRA_XLAT")
        assert (event.wq, event.operation, event.batch_index) == (0, lib.DSA_OPCODE_MEMMOVE, None)
        assert event.fault_addr == r.wq._ring.iova
        assert event.write
        assert (event.interrupt_handle is None) == (completion == "polled")
        records = await submission.wait(deadline=10)
        assert records["status"].tolist() == [lib.DSA_COMP_SUCCESS]
        assert np.array_equal(a, b)
        assert await r.dsa.events() == ()
        await give_back(r)
        await r.wq.noop()


async def test_an_operation_that_is_given_up_looks_there(running: Any, kind: Kind) -> None:
    """Nobody listened: its end is known all the same, and nothing is aborted."""
    async with running(*kind, CONFIG, deadline=0.2) as r:
        await withhold_records(r)
        submission = await r.wq.submit(descriptors.noop(2))
        with pytest.raises(TimeoutError):
            await submission.wait()
        assert (submission.done, submission.aborted) == (True, None)
        assert submission.records["status"].tolist() == [lib.DSA_COMP_SUCCESS] * 2
        await give_back(r)
        await r.wq.noop()


async def test_a_batch(running: Any, kind: Kind) -> None:
    """A member's record and then the batch's come through the log."""
    async with running(*kind, CONFIG) as r:
        batch = await r.wq.alloc_batch(4)
        batch.descriptors[:] = descriptors.noop(4)
        good = batch._addresses
        batch._addresses = good + np.array([0, 0, 0x4000_0000, 0], np.uint64)
        submission = r.wq.batch_nowait(batch)
        events: list[Event] = []
        with trio.fail_after(10):
            while len(events) < 2:
                events += await r.dsa.events()
        record = (await submission.wait(deadline=10))[0]
        assert [event.name for event in events] == ["DSA_COMP_CRA_XLAT", "DSA_COMP_BATCH_EVL_ERR"]
        assert [event.batch_index for event in events] == [2, None]
        assert events[0].first_in_batch
        assert record["status"] == lib.DSA_COMP_BATCH_FAIL
        batch._addresses = good
        await r.wq.batch(batch)


async def test_recover_reads_the_log(running: Any, kind: Kind) -> None:
    async with running(*kind, CONFIG) as r:
        await withhold_records(r)
        await r.wq.submit(descriptors.noop(1))
        await r.device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).wait(0, deadline=10)
        recovery = await r.dsa.recover()
        assert [event.name for event in recovery.events] == ["DSA_COMP_CRA_XLAT"]
        assert (recovery.software_error, recovery.reset) == (None, False)
        assert recovery.causes & lib.IDXD_INTC_EVL
        await give_back(r)


async def test_an_abort_leaves_no_event_behind(running: Any) -> None:
    """Or the old record would end a new descriptor."""
    async with running(config=CONFIG) as r:
        await withhold_records(r)
        old = await r.wq.submit(descriptors.noop(3))
        await r.dsa.abort(r.wq)
        assert (await old.wait())["status"].tolist() == [1, 1, 1]
        await give_back(r)
        capacity = r.wq._ring.capacity
        r.engine.stop_before(capacity)
        for _ in range(capacity // 64):
            submission = await r.wq.submit(descriptors.noop(64))
            assert await r.dsa.events() == ()
            assert (await submission.wait())["status"].all()
        r.engine.stop_before(0)
        new = await r.wq.submit(descriptors.noop(3))
        assert await r.dsa.events() == ()
        assert not new.poll()
        r.engine.stop_before(-1)
        r.engine.resume()
        await new.wait()


async def test_it_can_stay_off(running: Any) -> None:
    async with running(config=CONFIG, event_log=0) as r:
        await withhold_records(r)
        submission = await r.wq.submit(descriptors.noop(1))
        recovery = await r.dsa.recover()
        assert recovery.events == await r.dsa.events() == ()
        assert recovery.software_error.name == "DSA_COMP_CRA_XLAT"
        await give_back(r)
        await r.dsa.reset()
        assert submission.aborted


async def test_it_survives_a_reset_and_a_full_ring(running: Any) -> None:
    async with running(config=CONFIG, event_log=64) as r:
        await withhold_records(r)
        for times in range(3):
            await r.wq.submit(descriptors.noop(100))
            events = await r.dsa.events()
            assert len(events) == 63
            assert (await r.dsa.recover()).software_error.overflow
            await r.dsa.reset()
            assert await r.dsa.events() == (), times
        await give_back(r)
        await r.wq.noop()


@pytest.mark.parametrize("entries", [1, 63, 65536, -1])
async def test_sizes_that_cannot_be(rig: Any, entries: int) -> None:
    async with rig(config=CONFIG) as r:
        with pytest.raises(ValueError, match="64 to 65535"):
            DsaDriver(r.device, event_log=entries)


def test_decoding() -> None:
    flags = lib.IDXD_SWERR_DESC_VALID | lib.IDXD_SWERR_BATCH | lib.DSA_EVL_ERR_INFO_VALID
    status = flags | lib.DSA_COMP_INVALID_FLAGS << 8 | 5 << 24 | 3 << 32
    event = Event.decode(struct.pack("<QHHIQQ32x", status, 9, 0, 0x123456, 0xABC, 0))
    assert (event.name, event.wq, event.operation) == ("DSA_COMP_INVALID_FLAGS", None, 3)
    assert (event.batch_index, event.batch_id, event.first_in_batch) == (9, 5, False)
    assert (event.invalid_flags, event.fault_addr, event.record) == (0x123456, 0xABC, None)
    with pytest.raises(ValueError, match="64 bytes"):
        Event.decode(bytes(63))
    assert EventLog.nbytes(64) == 4096
