"""Which descriptor runs when: groups, priorities, stop points, aborts, drains, many submitters."""

from __future__ import annotations

import select
import threading

import numpy as np
import pytest

from pvfio.abi import ffi, lib
from tests.devices.dsa.conftest import MakeRig
from tests.devices.dsa.rig import CRAV_RCR, MEMORY, RECORDS, Rig, descriptor, descriptors

pytestmark = pytest.mark.touches_c

NOOP = lib.DSA_OPCODE_NOOP


def occupancy(rig: Rig, wq: int) -> int:
    return int(lib.pv_dsa_wq_occupancy(rig.dsa, wq))


def done(rig: Rig, count: int) -> list[int]:
    """The numbers of the records that were written."""
    return np.flatnonzero(rig.records(count)["status"]).tolist()


def fill(rig: Rig, wq: int, count: int, first: int = 0) -> None:
    rig.submit(
        descriptors(*(descriptor(NOOP, completion_addr=RECORDS + 32 * (first + i)) for i in range(count))), wq
    )


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 3), (2, 15)])
def test_priorities_are_weights(rig: Rig, low: int, high: int) -> None:
    """Of two full WQs each gets its share of any run, and neither starves."""
    rig.enable(1, priority=low)
    rig.enable(2, priority=high)
    rig.engine.stop_before(0)
    fill(rig, 1, 16)
    fill(rig, 2, 16, first=16)
    total = low + high
    rig.engine.stop_before(total)
    rig.engine.resume()
    served = done(rig, 32)
    assert (sum(i < 16 for i in served), sum(i >= 16 for i in served)) == (low, min(high, 16))
    rig.engine.stop_before(-1)
    rig.engine.resume()
    assert len(done(rig, 32)) == 32


def test_an_idle_wq_costs_the_others_nothing(rig: Rig) -> None:
    rig.enable(1, priority=15)
    fill(rig, 0, 16)
    assert len(done(rig, 16)) == 16


def test_groups_share_no_engine(rig: Rig) -> None:
    """A WQ in a group whose engines all wait, waits; another group's works."""
    rig.enable(1)
    rig.assign([0, 1, -1, -1], [0, 1, 1, 1])
    blocked = descriptor(
        lib.DSA_OPCODE_MEMFILL, CRAV_RCR | lib.IDXD_OP_FLAG_BOF, dst_addr=0xDEAD000, pattern=0, xfer_size=1
    )
    rig.submit(blocked)
    fill(rig, 0, 2, first=1)
    fill(rig, 1, 2, first=3)
    assert done(rig, 5) == [3, 4]
    rig.abort(0)
    fill(rig, 0, 1, first=1)
    assert done(rig, 5) == [1, 3, 4]


def test_a_wq_in_no_group_waits_for_one(rig: Rig) -> None:
    rig.assign([-1] * 4, [0] * 4)
    fill(rig, 0, 3)
    assert (done(rig, 3), occupancy(rig, 0)) == ([], 3)
    rig.assign([2, -1, -1, -1], [2] * 4)
    assert (done(rig, 3), occupancy(rig, 0)) == ([0, 1, 2], 0)


def test_stop_points_stand_before_the_queue(rig: Rig) -> None:
    """What has not begun still counts as queued."""
    rig.engine.stop_before(2)
    fill(rig, 0, 5)
    assert (rig.engine.stopped, done(rig, 5), occupancy(rig, 0)) == (True, [0, 1], 3)
    rig.engine.stop_before(1)
    rig.engine.resume()
    assert (rig.engine.stopped, done(rig, 5), occupancy(rig, 0)) == (True, [0, 1, 2], 2)
    rig.engine.resume()
    assert (rig.engine.stopped, done(rig, 5)) == (False, [0, 1, 2, 3, 4])


def test_abort_of_one_wq(rig: Rig) -> None:
    """Queued work is gone without a trace, other WQs' is not."""
    rig.enable(1)
    rig.engine.stop_before(0)
    fill(rig, 0, 4)
    fill(rig, 1, 4, first=4)
    rig.abort(0)
    assert (occupancy(rig, 0), occupancy(rig, 1)) == (0, 4)
    rig.engine.resume()
    assert done(rig, 8) == [4, 5, 6, 7]
    fill(rig, 0, 1)
    assert done(rig, 1) == [0]


def test_abort_in_the_middle_of_a_batch(rig: Rig) -> None:
    members = np.repeat(
        descriptor(lib.DSA_OPCODE_MEMFILL, 0, dst_addr=MEMORY, pattern=0x1111111111111111, xfer_size=8), 8
    )
    members["dst_addr"] += np.arange(8, dtype=np.uint64) * 8
    rig.engine.stop_before(4)
    record = rig.batch(members)
    rig.abort(0)
    rig.engine.resume()
    assert record["status"] == 0
    assert np.array_equal(rig.at(MEMORY, 64), np.repeat(np.array([0x11, 0], np.uint8), [24, 40]))


def test_abort_by_pasid(rig: Rig) -> None:
    """Of a shared WQ those that carry the PASID go, the rest keeps its order; a dedicated WQ is not looked at."""
    rig.enable(1, dedicated=0, threshold=8)
    rig.engine.stop_before(0)
    rig.submit(descriptor(NOOP, pasid_priv=7))
    for i, pasid in enumerate((7, 8, 7, 9)):
        assert rig.enqcmd(descriptor(NOOP, pasid_priv=pasid, completion_addr=RECORDS + 32 * (i + 1)), 1) == 0
    mark = lib.pv_dsa_wq_mark(rig.dsa, 1)
    lib.pv_dsa_abort_pasid(rig.dsa, 7)
    assert (occupancy(rig, 0), occupancy(rig, 1)) == (1, 2)
    rig.engine.resume()
    assert done(rig, 5) == [0, 2, 4]
    assert lib.pv_dsa_wq_drained(rig.dsa, 1, mark)


def test_work_that_is_cancelled_goes_on(rig: Rig) -> None:
    """While DMA is cancelled nothing ends and nothing fails; record and interrupt come afterwards."""
    rci = CRAV_RCR | lib.IDXD_OP_FLAG_RCI
    rig.bus.cancel(True)
    record = rig.run(lib.DSA_OPCODE_MEMFILL, rci, dst_addr=MEMORY, pattern=0xFF, xfer_size=1, int_handle=1)
    rig.submit(descriptor(NOOP, lib.IDXD_OP_FLAG_RCI, int_handle=2))
    assert (record["status"], rig.interrupts(), rig.swerr().status) == (0, 0, 0)
    rig.bus.cancel(False)
    rig.engine.kick()
    assert (record["status"], rig.interrupts()) == (lib.DSA_COMP_SUCCESS, 2)


def test_marks(rig: Rig) -> None:
    """A mark is behind what was submitted before it, whatever comes later."""
    assert lib.pv_dsa_wq_drained(rig.dsa, 0, lib.pv_dsa_wq_mark(rig.dsa, 0))
    rig.engine.stop_before(0)
    fill(rig, 0, 2)
    mark = lib.pv_dsa_wq_mark(rig.dsa, 0)
    fill(rig, 0, 2, first=2)
    assert not lib.pv_dsa_wq_drained(rig.dsa, 0, mark)
    rig.engine.stop_before(2)
    rig.engine.resume()
    assert occupancy(rig, 0) == 2
    assert lib.pv_dsa_wq_drained(rig.dsa, 0, mark)


def test_the_drain_operation(rig: Rig) -> None:
    """It ends after what came before it in its WQ, and does not look at other WQs."""
    rig.enable(1)
    blocked = descriptor(
        lib.DSA_OPCODE_MEMFILL, CRAV_RCR | lib.IDXD_OP_FLAG_BOF, dst_addr=0xDEAD000, pattern=0, xfer_size=1
    )
    rig.submit(blocked, 1)
    rig.submit(descriptor(lib.DSA_OPCODE_DRAIN, completion_addr=RECORDS + 32), 0)
    rig.submit(descriptor(lib.DSA_OPCODE_DRAIN, completion_addr=RECORDS + 64), 1)
    assert done(rig, 3) == [1]
    rig.abort(1)
    assert done(rig, 3) == [1]


@pytest.mark.parametrize("wqs", [(1, 1), (2, 2)])
def test_many_threads_submit(make_rig: MakeRig, wqs: tuple[int, int]) -> None:
    """Every descriptor of two submitting threads is run once, by an engine that is a third."""
    rig = make_rig("thread", wqs=4)
    for wq in set(wqs):
        rig.enable(wq, dedicated=0, threshold=16)
    count = 2000

    def submit(number: int, wq: int) -> None:
        desc = descriptor(lib.DSA_OPCODE_MEMFILL, 0, pattern=number + 1, xfer_size=1)
        for i in range(count):
            desc["dst_addr"] = MEMORY + number * count + i
            while rig.enqcmd(desc, wq):
                pass

    threads = [threading.Thread(target=submit, args=item) for item in enumerate(wqs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lib.pv_dsa_watch(rig.dsa, 1)
    for wq in set(wqs):
        assert rig.enqcmd(descriptor(lib.DSA_OPCODE_DRAIN, completion_addr=RECORDS), wq) == 0
        while not lib.pv_dsa_wq_drained(rig.dsa, wq, lib.pv_dsa_wq_mark(rig.dsa, wq)):
            assert select.select([lib.pv_dsa_watch_fd(rig.dsa)], [], [], 10)[0]
    got = rig.at(MEMORY, 2 * count)
    assert np.array_equal(got, np.repeat(np.array([1, 2], np.uint8), count))
    assert rig.handed == 2 * count + len(set(wqs))


def test_it_ends_with_work_in_hand(make_rig: MakeRig) -> None:
    """Destroying a device whose thread waits for a page, and one that stands at a stop point."""
    rig = make_rig("thread")
    flags = CRAV_RCR | lib.IDXD_OP_FLAG_BOF
    rig.submit(descriptor(lib.DSA_OPCODE_MEMFILL, flags, dst_addr=0xDEAD000, pattern=0, xfer_size=1))
    stopped = make_rig("thread")
    stopped.engine.stop_before(0)
    stopped.submit(descriptor(NOOP))
    assert select.select([stopped.engine.stop_fd], [], [], 10)[0]


@pytest.mark.parametrize(
    "fields",
    [{"wqs": 0}, {"wqs": 256}, {"groups": 0}, {"engines": 0}, {"handles": 0}],
)
def test_what_cannot_be_made(rig: Rig, fields: dict[str, int]) -> None:
    config = {"wqs": 1, "groups": 1, "engines": 1, "handles": 1} | fields
    raw = ffi.new("struct pv_dsa_config *", config)
    assert lib.pv_dsa_create(raw, rig.bus.ptr, rig.msix.ptr, lib.PV_ENGINE_INLINE) == ffi.NULL


def test_a_long_overlapping_move_lets_others_run(rig: Rig) -> None:
    """It is done in parts, from the end: a record that another descriptor writes meanwhile is among what it copies."""
    rig.enable(1)
    memory = np.zeros(4 << 20, np.uint8)
    rig.bus.map(0x100_0000, memory)
    size = (3 << 20) + 123
    memory[64:size] = np.arange(64, size) % 251
    before = memory.copy()
    rig.engine.pause()
    rig.submit(descriptor(lib.DSA_OPCODE_MEMMOVE, src_addr=0x100_0000, dst_addr=0x100_0040, xfer_size=size))
    rig.submit(descriptor(NOOP, completion_addr=0x100_0000), wq=1)
    rig.engine.unpause()
    assert rig.record["status"] == lib.DSA_COMP_SUCCESS
    assert memory[0] == lib.DSA_COMP_SUCCESS
    assert memory[64] == lib.DSA_COMP_SUCCESS, "the record came after the whole of the move"
    assert (memory[128 : size + 64] == before[64:size]).all()
