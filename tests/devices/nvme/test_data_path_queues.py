"""Queues of the data path: arbitration, coalescing, doorbells and their shadows, full queues, aborts, lifetimes."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvfio.abi import ffi, lib
from pvfio.silicon.engine import EngineKind
from tests.devices.nvme.data_path_rig import DATA, DNR, ENTRIES, MEMORY, PAGE, Rig, command, noise, wait_for

pytestmark = pytest.mark.touches_c

READ, WRITE, FLUSH = lib.NVME_CMD_READ, lib.NVME_CMD_WRITE, lib.NVME_CMD_FLUSH
SHADOW, EVENTS = MEMORY + 0xE0000, MEMORY + 0xE1000
INLINE_AND_THREAD: list[EngineKind] = ["inline", "thread"]
BAD_DOORBELL, BAD_VALUE = lib.PV_NVME_EVENT_DOORBELL, lib.PV_NVME_EVENT_DOORBELL_VALUE


def completions(rig: Rig, count: int, queue: int = 1) -> None:
    """Waits until so many are there."""
    wait_for(lambda: len(rig.peek(queue)) == count)


def reads(count: int) -> list[Any]:
    return [command(READ, lba=n % 16) for n in range(count)]


class TestCompletions:
    def test_many_rounds(self) -> None:
        """Around the ring some times, in batches that do not divide it: order, phase, head pointers."""
        with Rig() as rig:
            rig.memory_namespace()
            for batch in (1, 5, 31, 63, 17, 40, 2, 63, 62):
                cids = rig.submit(*reads(batch))
                found = rig.peek()
                assert [int(entry["cid"]) for entry in found] == cids
                assert all(int(entry["sq_id"]) == 1 for entry in found)
                assert int(found[-1]["sq_head"]) == rig.tail[1]
                assert rig.reap() == [(cid, 0) for cid in cids]

    def test_a_full_queue(self) -> None:
        """No entry is overwritten; what waits comes when there is room."""
        with Rig() as rig:
            rig.memory_namespace()
            cids = rig.submit(*reads(63))
            more = rig.submit(*reads(40))
            assert [cid for cid, _ in rig.reap()] == cids
            assert [cid for cid, _ in rig.reap()] == more

    def test_two_queues_share_one(self) -> None:
        """Both go on after the queue they share was full, whatever the other one's doorbells say meanwhile."""
        with Rig() as rig:
            rig.memory_namespace()
            rig.tail += [0]
            rig.head += [0]
            rig.cids += [1000]
            rig.create(2, cq=1)
            rig.submit(*reads(63))
            rig.submit(*reads(10), queue=2)
            rig.submit(*reads(5))
            rig.doorbell(2, rig.tail[1])
            rig.doorbell(4, rig.tail[2])
            got = [cid for _ in range(3) for cid, _ in rig.reap()]
            assert sorted(got) == [*range(68), *range(1000, 1010)]

    def test_completions_that_found_no_room(self) -> None:
        """Those of commands that had been waiting are kept, in order."""
        with Rig() as rig:
            rig.memory_namespace()
            assert rig.inject(lib.PV_NVME_INJECT_DROP, sq=1, times=30) == 0
            dropped = rig.submit(*reads(30))
            cids = rig.submit(*reads(63 - 30), *reads(30))
            for cid in dropped:
                assert lib.pv_nvme_abort(rig.nvme, 1, cid) == 1
            statuses = rig.reap() + rig.reap() + rig.reap()
            assert Counter(statuses) == Counter([(cid, 0) for cid in cids] + [(c, 7) for c in dropped])

    @pytest.mark.parametrize("kind", INLINE_AND_THREAD)
    def test_without_bus_mastering(self, kind: EngineKind) -> None:
        """Commands wait for it, and nothing is lost."""
        with Rig(kind) as rig:
            rig.memory_namespace()
            rig.bus.cancel(True)
            cids = rig.submit(*reads(9))
            assert not rig.peek()
            rig.bus.cancel(False)
            rig.engine.kick()
            wait_for(lambda: len(rig.peek()) == 9)
            assert rig.reap() == [(cid, 0) for cid in cids]


@pytest.mark.parametrize("where", ["sq", "cq"])
def test_queues_that_do_not_translate_are_fatal(where: str) -> None:
    with Rig() as rig:
        rig.memory_namespace()
        rig.unmap(rig.sq_base(1) if where == "sq" else rig.cq_base(1))
        rig.submit(command(READ))
        assert rig.events() & lib.PV_NVME_EVENT_FATAL
        lib.pv_nvme_disable(rig.nvme)
        rig.map(rig.sq_base(1) if where == "sq" else rig.cq_base(1))
        rig.enable()
        assert rig.run(command(READ)) == 0


class TestDoorbells:
    @pytest.mark.parametrize("dstrd", [0, 2, 4])
    def test_strides(self, dstrd: int) -> None:
        with Rig(dstrd=dstrd, queues=3) as rig:
            rig.memory_namespace()
            for queue in (1, 2, 3):
                assert rig.run(command(READ), queue) == 0

    @pytest.mark.parametrize(
        ("index", "value", "event"),
        [
            (2, ENTRIES, BAD_VALUE),
            (2, 2**32 - 1, BAD_VALUE),
            (3, 1, BAD_VALUE),
            (3, ENTRIES, BAD_VALUE),
            (3, 2**31, BAD_VALUE),
            (4, 1, BAD_DOORBELL),
            (5, 0, BAD_DOORBELL),
            (129, 1, BAD_DOORBELL),
            (130, 1, BAD_DOORBELL),
            (1023, 1, BAD_DOORBELL),
        ],
    )
    def test_bad_values(self, index: int, value: int, event: int) -> None:
        """Reported, and without effect."""
        with Rig() as rig:
            rig.memory_namespace()
            rig.events()
            rig.doorbell(index, value)
            assert rig.events() & (BAD_DOORBELL | BAD_VALUE) == event
            rig.doorbell(2, rig.tail[1])
            assert rig.run(command(READ)) == 0

    def test_a_tail_that_passes_the_head(self) -> None:
        """More entries than were free (Base 3.3.1.5): refused; the commands there are stay."""
        with Rig() as rig:
            rig.memory_namespace()
            rig.engine.stop_before(0)
            cids = rig.submit(*reads(10))
            rig.engine.resume()
            rig.reap()
            rig.engine.stop_before(0)
            cids = rig.submit(*reads(10))
            rig.engine.pause()
            rig.doorbell(2, (rig.tail[1] - 3) % ENTRIES)
            rig.engine.unpause()
            rig.engine.resume()
            assert rig.events() & BAD_VALUE
            assert rig.reap() == [(cid, 0) for cid in cids]

    @pytest.mark.parametrize(("offset", "size"), [(8, 8), (8, 2), (9, 4), (8, 1)])
    def test_stores_of_other_sizes(self, offset: int, size: int) -> None:
        """None of them is a doorbell."""
        with Rig() as rig:
            rig.memory_namespace()
            rig.fill(command(READ))
            lib.pv_mmio_store(rig.mmio, lib.NVME_REG_DBS + offset, size, 1)
            assert not rig.peek()

    def test_not_decoded(self) -> None:
        with Rig() as rig:
            rig.memory_namespace()
            lib.pv_nvme_decode(rig.nvme, 0)
            rig.submit(command(READ))
            assert not rig.peek()


class TestShadowDoorbells:
    """Base 5.8: the driver rings only where its value passes the event index."""

    @pytest.mark.parametrize("kind", INLINE_AND_THREAD)
    @pytest.mark.parametrize("poll", [False, True])
    def test_the_protocol(self, kind: EngineKind, poll: bool) -> None:
        """What the doorbells in BAR 0 say does not count any more, not even where it is looked at."""
        with Rig(kind, poll=poll) as rig:
            rig.memory_namespace()
            rig.submit(*reads(3))
            wait_for(lambda: len(rig.peek()) == 3)
            rig.reap()
            shadow, events = (rig.at(at, PAGE).view("<u4") for at in (SHADOW, EVENTS))
            shadow[2:8] = events[2:4] = 0xDEAD
            assert lib.pv_nvme_set_shadow(rig.nvme, SHADOW, EVENTS) == 0
            # As the doorbells of the queues that are there.
            wait_for(lambda: [*shadow[2:8], *events[2:4]] == [3, 3, *[0xDEAD] * 4, 3, 3])
            rung = 0
            for batch in (1, 4, 30, 2, 60, 7):
                old, cids = rig.tail[1], rig.fill(*reads(batch))
                shadow[2] = rig.tail[1]
                index = int(events[2])
                if (rig.tail[1] - index - 1) % 65536 < (rig.tail[1] - old) % 65536 or rig.tail[1] < old:
                    rung += 1
                    rig.doorbell(2, 0 if poll else rig.tail[1])
                completions(rig, batch)
                found = rig.peek()
                assert [int(entry["cid"]) for entry in found] == cids
                rig.head[1] = (rig.head[1] + len(found)) % (2 * ENTRIES)
                shadow[3] = rig.head[1] % ENTRIES
                rig.doorbell(3, int(shadow[3]))
                wait_for(lambda: int(events[2]) == rig.tail[1] and events[3] == shadow[3])
            assert rung
            assert not rig.events() & (BAD_VALUE | BAD_DOORBELL)

    @pytest.mark.parametrize("kind", INLINE_AND_THREAD)
    @pytest.mark.parametrize("batch", [1, 5, 6])
    def test_a_queue_that_is_made_again(self, kind: EngineKind, batch: int) -> None:
        """Its doorbells begin at zero in the buffer too, though the driver left there what the old queue's were."""
        with Rig(kind) as rig:
            rig.memory_namespace()
            shadow, events = (rig.at(at, PAGE).view("<u4") for at in (SHADOW, EVENTS))
            shadow[2:4] = events[2:4] = 0xDEAD
            assert lib.pv_nvme_set_shadow(rig.nvme, SHADOW, EVENTS) == 0
            for size in (5, batch):
                wait_for(lambda: shadow[2:4].tolist() == events[2:4].tolist() == [0, 0])
                old, cids = int(shadow[2]), rig.fill(*reads(size))
                shadow[2] = rig.tail[1]
                if (rig.tail[1] - int(events[2]) - 1) % 65536 < (rig.tail[1] - old) % 65536:
                    rig.doorbell(2, rig.tail[1])
                completions(rig, size)
                assert [int(entry["cid"]) for entry in rig.peek()] == cids
                shadow[3] = size
                rig.doorbell(3, size)
                wait_for(lambda: events[3] == shadow[3])
                assert lib.pv_nvme_delete_sq(rig.nvme, 1) == lib.pv_nvme_delete_cq(rig.nvme, 1) == 0
                rig.create(1)
            assert not rig.events() & (BAD_VALUE | BAD_DOORBELL)

    @pytest.mark.parametrize(("shadow", "events"), [(SHADOW + 8, EVENTS), (SHADOW, EVENTS + 2048)])
    def test_bad_pages(self, shadow: int, events: int) -> None:
        with Rig() as rig:
            assert lib.pv_nvme_set_shadow(rig.nvme, shadow, events) < 0

    @pytest.mark.parametrize("kind", INLINE_AND_THREAD)
    def test_what_was_rung_before_counts(self, kind: EngineKind) -> None:
        """And is what the buffer begins with."""
        with Rig(kind) as rig:
            rig.memory_namespace()
            shadow, events = (rig.at(at, PAGE).view("<u4") for at in (SHADOW, EVENTS))
            shadow[2:4] = 9
            rig.engine.pause()
            cids = rig.submit(*reads(3))
            assert lib.pv_nvme_set_shadow(rig.nvme, SHADOW, EVENTS) == 0
            rig.engine.unpause()
            completions(rig, 3)
            assert [int(entry["cid"]) for entry in rig.peek()] == cids
            assert (shadow[2:4].tolist(), events[2:4].tolist()) == ([3, 0], [3, 0])

    @pytest.mark.parametrize("page", [SHADOW, EVENTS])
    def test_a_page_that_does_not_translate_any_more(self, page: int) -> None:
        with Rig() as rig:
            rig.memory_namespace()
            assert lib.pv_nvme_set_shadow(rig.nvme, 0, EVENTS) == 0
            assert lib.pv_nvme_set_shadow(rig.nvme, SHADOW, EVENTS) == 0
            assert not rig.events() & lib.PV_NVME_EVENT_FATAL
            rig.at(SHADOW, PAGE).view("<u4")[2] = rig.tail[1] + 1
            rig.unmap(page)
            rig.submit(command(READ))
            assert rig.events() & lib.PV_NVME_EVENT_FATAL


def order(rig: Rig, queues: int, count: int, base: int = 1) -> list[int]:
    """Which queue each of the commands was of, by the order they began in. All completion entries are in one place."""
    rig.engine.pause()
    for queue in range(base, queues + base):
        rig.submit(*reads(count), queue=queue)
    rig.engine.unpause()
    return [int(entry["sq_id"]) for entry in rig.peek(1)]


def shared(queues: int, ams: int, priorities: list[int]) -> Rig:
    """A rig whose submission queues all complete into queue 1."""
    rig = Rig(queues=0, ams=ams)
    rig.memory_namespace()
    rig.tail += [0] * queues
    rig.head += [0] * queues
    rig.cids += [0] * queues
    rig.create(1, priority=priorities[0])
    for queue in range(2, queues + 1):
        rig.create(queue, priority=priorities[queue - 1], cq=1)
    return rig


class TestArbitration:
    """Base 3.4.4."""

    def test_round_robin(self) -> None:
        with shared(4, 0, [0, 3, 1, 2]) as rig:
            lib.pv_nvme_set_arbitration(rig.nvme, 1, 0, 0, 0)
            assert order(rig, 4, 6) == [1, 1, 2, 2, 3, 3, 4, 4] * 3

    def test_weights(self) -> None:
        """Of every seven, four are of high priority, two of medium and one of low."""
        urgent, high, medium, low = range(4)
        with shared(4, lib.NVME_CC_AMS_WRRU, [low, medium, high, urgent]) as rig:
            lib.pv_nvme_set_arbitration(rig.nvme, 0, 0, 1, 3)
            found = order(rig, 4, 12)
            assert found[:12] == [4] * 12
            for begin in (12, 19):
                assert Counter(found[begin : begin + 7]) == {3: 4, 2: 2, 1: 1}
            assert Counter(found) == dict.fromkeys((1, 2, 3, 4), 12)

    def test_a_class_pays_for_what_it_used(self) -> None:
        """A queue that had one command only has not used up the credit of another one of its class."""
        high, low = lib.NVME_SQ_QPRIO_HIGH, lib.NVME_SQ_QPRIO_LOW
        with shared(3, lib.NVME_CC_AMS_WRRU, [high, high, low]) as rig:
            lib.pv_nvme_set_arbitration(rig.nvme, 7, 0, 0, 7)
            rig.engine.pause()
            rig.submit(*reads(1), queue=1)
            rig.submit(*reads(7), queue=2)
            rig.submit(*reads(3), queue=3)
            rig.engine.unpause()
            assert [int(entry["sq_id"]) for entry in rig.peek(1)] == [1] + [2] * 7 + [3] * 3


class TestCoalescing:
    """Base 5.27.1.6; the vector of queue 1 is 1."""

    @pytest.fixture
    def rig(self) -> Any:
        with Rig(queues=2) as made:
            made.memory_namespace()
            yield made

    def rang(self, rig: Rig) -> bool:
        rig.engine.kick()
        return rig.interrupts() == 1

    def test_off(self, rig: Rig) -> None:
        rig.run(command(READ))
        rig.run(command(READ))
        assert rig.interrupts() == 2

    def test_the_threshold(self, rig: Rig) -> None:
        """Zero-based: four completions."""
        lib.pv_nvme_set_coalescing(rig.nvme, 3, 255)
        for done in range(1, 9):
            rig.run(command(READ))
            assert rig.interrupts() == done // 4

    def test_the_time(self, rig: Rig) -> None:
        lib.pv_nvme_set_coalescing(rig.nvme, 200, 255)
        rig.run(command(READ))
        assert lib.pv_nvme_due(rig.nvme)
        wait_for(lambda: self.rang(rig))
        assert not lib.pv_nvme_due(rig.nvme)

    @pytest.mark.parametrize("change", [(0, 0), (0, 5), (9, 0), (9, 255)])
    def test_a_change_loses_none(self, rig: Rig, change: tuple[int, int]) -> None:
        """What was held is announced. Nothing is held for more than 25 ms, which a busy machine may take from us."""
        for count in range(50):
            lib.pv_nvme_set_coalescing(rig.nvme, 200, 255)
            rig.run(command(READ))
            held = rig.interrupts() == count
            lib.pv_nvme_set_coalescing(rig.nvme, *change)
            assert rig.interrupts() == count + 1
            if held:
                return
        raise AssertionError("nothing is ever held")

    def test_a_vector_without(self, rig: Rig) -> None:
        lib.pv_nvme_set_coalescing(rig.nvme, 200, 255)
        lib.pv_nvme_set_vector_coalescing(rig.nvme, 2, 0)
        rig.run(command(READ), 2)
        assert rig.interrupts() == 1
        lib.pv_nvme_set_vector_coalescing(rig.nvme, 2, 1)
        rig.run(command(READ), 2)
        assert rig.interrupts() == 1

    def test_threaded(self) -> None:
        with Rig("thread") as rig:
            rig.memory_namespace()
            lib.pv_nvme_set_coalescing(rig.nvme, 200, 20)
            rig.submit(*reads(4))
            wait_for(lambda: rig.interrupts() == 1)


def test_the_pin() -> None:
    """INTx: its level follows the queues and the mask."""
    with Rig() as rig:
        rig.memory_namespace()
        lib.pv_nvme_set_pin(rig.nvme, 1)
        assert lib.pv_nvme_pin(rig.nvme) == 0
        rig.submit(command(READ))
        assert lib.pv_nvme_pin(rig.nvme) == 1
        lib.pv_nvme_mask_pin(rig.nvme, 1)
        assert lib.pv_nvme_pin(rig.nvme) == 0
        lib.pv_nvme_mask_pin(rig.nvme, 0)
        rig.reap()
        assert lib.pv_nvme_pin(rig.nvme) == 0
        assert rig.interrupts() == 0


class TestAborts:
    def drop(self, rig: Rig, **fields: int) -> None:
        assert rig.inject(lib.PV_NVME_INJECT_DROP, sq=1, **fields) >= 0

    def test_abort(self) -> None:
        """The command ends as aborted, once; another queue's and those that are over are not found."""
        with Rig(queues=2) as rig:
            rig.memory_namespace()
            self.drop(rig, times=1)
            cids = rig.submit(*reads(3))
            assert rig.reap() == [(cid, 0) for cid in cids[1:]]
            assert [lib.pv_nvme_abort(rig.nvme, queue, cids[0]) for queue in (2, 1, 1)] == [0, 1, 0]
            assert lib.pv_nvme_abort(rig.nvme, 1, cids[1]) == 0
            assert rig.reap() == [(cids[0], lib.NVME_SC_ABORT_REQ)]

    def test_deleting_a_queue(self) -> None:
        """Its waiting commands end as aborted; the completion queue goes last."""
        with Rig() as rig:
            rig.memory_namespace()
            self.drop(rig)
            cids = rig.submit(*reads(3))
            assert lib.pv_nvme_delete_cq(rig.nvme, 1) == lib.NVME_SC_INVALID_QUEUE
            assert lib.pv_nvme_delete_sq(rig.nvme, 1) == 0
            assert rig.reap() == [(cid, lib.NVME_SC_ABORT_QUEUE) for cid in cids]
            assert lib.pv_nvme_delete_cq(rig.nvme, 1) == 0
            assert lib.pv_nvme_delete_cq(rig.nvme, 1) == lib.NVME_SC_QID_INVALID
            assert lib.pv_nvme_delete_sq(rig.nvme, 1) == lib.NVME_SC_QID_INVALID

    def test_a_reset_forgets_them(self) -> None:
        with Rig() as rig:
            rig.memory_namespace()
            self.drop(rig, times=3)
            rig.submit(*reads(3))
            lib.pv_nvme_disable(rig.nvme)
            rig.enable()
            assert rig.run(command(READ)) == 0

    def test_too_many(self) -> None:
        """Room for commands that wait is bounded; what does not fit ends with an internal error."""
        with Rig() as rig:
            rig.memory_namespace()
            self.drop(rig)
            for _ in range(8192 // 32):
                rig.submit(*reads(32))
            assert not rig.reap()
            assert rig.run(command(READ)) == lib.NVME_SC_INTERNAL


@pytest.mark.parametrize(
    ("queue", "size", "base", "status"),
    [
        (0, 64, 0, lib.NVME_SC_QID_INVALID),
        (65, 64, 0, lib.NVME_SC_QID_INVALID),
        (2**32 - 1, 64, 0, lib.NVME_SC_QID_INVALID),
        (1, 64, 0, lib.NVME_SC_QID_INVALID),
        (2, 1, 0, lib.NVME_SC_QUEUE_SIZE),
        (2, 65537, 0, lib.NVME_SC_QUEUE_SIZE),
        (2, 64, 16, lib.NVME_SC_PRP_INVALID_OFFSET),
    ],
)
def test_bad_queues(queue: int, size: int, base: int, status: int) -> None:
    with Rig() as rig:
        assert lib.pv_nvme_create_cq(rig.nvme, queue, base, size, 1, 0) == status
        assert lib.pv_nvme_create_sq(rig.nvme, queue, base, size, 1, 0) == status


@pytest.mark.parametrize(
    ("cq", "status"),
    [(0, lib.NVME_SC_QID_INVALID), (65, lib.NVME_SC_QID_INVALID), (2, lib.NVME_SC_CQ_INVALID)],
)
def test_queues_without_a_completion_queue(cq: int, status: int) -> None:
    with Rig() as rig:
        assert lib.pv_nvme_create_sq(rig.nvme, 2, 0, 64, cq, 0) == status


class TestLifetimes:
    """Namespaces, queues and controllers that go while images are being synchronised."""

    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        path = tmp_path / "image"
        path.write_bytes(noise(64 * PAGE).tobytes())
        return path

    def flushes(self, rig: Rig, count: int) -> list[int]:
        return rig.submit(*[command(WRITE, lba=n % 64, control=lib.NVME_RW_FUA) for n in range(count)])

    def test_many_at_once(self, image: Path) -> None:
        with Rig("thread") as rig:
            rig.file_namespace(image)
            cids = self.flushes(rig, 60)
            wait_for(lambda: len(rig.peek()) == 60)
            assert sorted(rig.reap()) == [(cid, 0) for cid in cids]

    @pytest.mark.parametrize("what", ["namespace", "queue", "controller", "everything"])
    def test_something_goes(self, image: Path, what: str) -> None:
        """Every command ends, or goes with its queue; nothing is used after it was freed."""
        for _ in range(10):
            with Rig("thread") as rig:
                rig.file_namespace(image)
                count = len(self.flushes(rig, 40))
                if what == "everything":
                    continue
                if what == "namespace":
                    assert lib.pv_nvme_set_namespace(rig.nvme, 1, ffi.NULL, ffi.NULL) == 0
                    completions(rig, count)
                    gone = lib.NVME_SC_INVALID_FIELD | DNR
                    assert {status for _, status in rig.reap()} <= {0, gone}
                    continue
                if what == "queue":
                    assert lib.pv_nvme_delete_sq(rig.nvme, 1) == 0
                    assert {status for _, status in rig.reap()} <= {0, lib.NVME_SC_ABORT_QUEUE}
                    assert lib.pv_nvme_delete_cq(rig.nvme, 1) == 0
                    rig.create(1)
                else:
                    lib.pv_nvme_disable(rig.nvme)
                    rig.enable()
                rig.submit(command(READ))
                wait_for(rig.peek)
                assert [status for _, status in rig.reap()] == [0]

    def test_doorbells_from_other_threads(self, image: Path) -> None:
        """While namespaces come and go, and resets come by: garbage at every doorbell harms nobody else."""
        with Rig("thread") as rig:
            rig.file_namespace(image)
            leave = threading.Event()

            def ring() -> None:
                rng = np.random.default_rng(os.getpid())
                while not leave.is_set():
                    index, value = int(rng.integers(0, 200)), int(rng.integers(0, 70))
                    rig.doorbell(index, value)

            threads = [threading.Thread(target=ring) for _ in range(2)]
            for thread in threads:
                thread.start()
            rig.put(DATA, noise(PAGE))
            for _ in range(50):
                self.flushes(rig, 9)
                lib.pv_nvme_set_namespace(rig.nvme, 1, ffi.NULL, ffi.NULL)
                lib.pv_nvme_disable(rig.nvme)
                rig.enable()
                rig.file_namespace(image)
            leave.set()
            for thread in threads:
                thread.join()
            lib.pv_nvme_disable(rig.nvme)
            rig.enable()
            rig.submit(command(READ))
            wait_for(rig.peek)
            assert [status for _, status in rig.reap()] == [0]
