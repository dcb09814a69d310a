"""The driver's rings against lists: what is written for the controller, and what is believed of what it writes.

The test is the controller: it reads the submission queue and writes completions, good ones and bad ones, into memory.
"""

from __future__ import annotations

import errno
import mmap
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pvfio.abi import ffi, lib
from pvfio.drivers.nvme.ring import Ring, Template, queue_bytes
from pvfio.errors import DeviceFailed, VfioError
from pvfio.memory import BLOCK_SIZE, DmaBuffer, GuestMemory
from pvfio.vfio import Region
from pvfio.vfio.mapped_bar import mapped_bar

pytestmark = pytest.mark.touches_c

PAGE = 4096
SQ, CQ = 8, 16  # offsets of the doorbells
NOW = 7
ENTRY = Template(0x1_ABCD_0002, 0x44, 0x66, 512)
CID = 0xFFFF0000  # of word 0


class Bells(Region):
    """A BAR of one page of memory; without ``mmio``, its registers are reached one at a time. ``deaf``: not at all, as
    one of a server that does not read.
    """

    def __init__(self, mapped: bool = True) -> None:
        super().__init__("nvme", 0, PAGE, 0, ())
        self.page = mmap.mmap(-1, PAGE)
        self.mmio = mapped_bar(PAGE, [(0, self.page)]) if mapped else None
        self.deaf = False

    def read_nowait(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.page[offset : offset + size], "little")

    def write_nowait(self, offset: int, value: int, size: int = 4) -> None:
        if self.deaf:
            raise VfioError(errno.EAGAIN, "doorbell")
        self.page[offset : offset + size] = value.to_bytes(size, "little")

    async def read(self, offset: int, size: int = 4) -> int:
        return self.read_nowait(offset, size)

    async def write(self, offset: int, value: int, size: int = 4) -> None:
        self.write_nowait(offset, value, size)

    def mmap(self, offset: int, size: int) -> memoryview:
        raise VfioError(22, "mmap")


def cids_of(begun: Any) -> list[int]:
    assert begun is not None, "there is room"
    cids: list[int] = begun.tolist()
    return cids


def make(entries: int, cq_entries: int, mapped: bool = True) -> tuple[Ring, Bells, DmaBuffer]:
    buffer = GuestMemory(BLOCK_SIZE).alloc(queue_bytes(entries, cq_entries))
    buffer.iova = 1 << 20
    bells = Bells(mapped)
    return Ring(buffer, entries, cq_entries, bells, (SQ, CQ)), bells, buffer


def words(count: int, first: int = 0) -> Any:
    return np.arange(first, first + count, dtype=np.uint64)


class Controller:
    """What a controller sees of the queues: it fetches up to the doorbell, and completes."""

    def __init__(self, entries: int, cq_entries: int, bells: Bells, buffer: DmaBuffer) -> None:
        plain = np.asarray(buffer)
        start = -(-entries * 64 // PAGE) * PAGE
        self.sq = plain[: entries * 64].view(np.uint64).reshape(entries, 8)
        self.cq = plain[start : start + cq_entries * 16].view(np.uint32).reshape(cq_entries, 4)
        self.bells = bells
        self.head = self.tail = 0
        self.phase = 1

    def fetch(self) -> list[list[int]]:
        fetched = []
        tail = self.bells.read_nowait(SQ)
        while self.head != tail:
            fetched.append(self.sq[self.head].tolist())
            self.head = (self.head + 1) % len(self.sq)
        return fetched

    def room(self) -> int:
        return (self.bells.read_nowait(CQ) - self.tail - 1) % len(self.cq)

    def complete(self, cid: int, status: int, result: int = 0) -> None:
        self.cq[self.tail] = result, 0, 0, cid | self.phase << 16 | status << 17
        self.tail += 1
        if self.tail == len(self.cq):
            self.tail, self.phase = 0, self.phase ^ 1


class RingMachine(RuleBasedStateMachine):
    """A ring of some size, the controller that the test is, and lists of what is where."""

    @initialize(entries=st.integers(2, 12), spare=st.integers(0, 5), mapped=st.booleans())
    def begin(self, entries: int, spare: int, mapped: bool) -> None:
        self.ring, bells, buffer = make(entries, entries + spare, mapped)
        self.controller = Controller(entries, entries + spare, bells, buffer)
        self.queued: list[tuple[int, int, int]] = []  # identifier, LBA, address; the doorbell has not rung
        self.running: list[int] = []
        self.completed: list[tuple[int, int, int]] = []  # identifier, status, result; not taken yet
        self.held: list[int] = []
        self.lba = 1

    @property
    def names(self) -> list[int]:
        """Identifiers nobody may get."""
        return [each[0] for each in self.queued + self.completed] + self.running + self.held

    def begun(self, cids: list[int], lba: int) -> None:
        assert not set(cids) & set(self.names)
        assert len(set(cids)) == len(cids)
        self.queued += [(cid, lba + i, PAGE * (lba + i)) for i, cid in enumerate(cids)]
        self.lba += len(cids)

    def rang(self) -> None:
        fetched = self.controller.fetch()
        assert [(w[0] >> 16 & 0xFFFF, w[5], w[3]) for w in fetched] == self.queued
        for command in fetched:
            assert command[0] & ~CID == ENTRY.word0 & ~CID
            assert command[1:3] + command[4:5] + command[6:] == [0, 0, ENTRY.word4, ENTRY.word6, 0]
        self.running += [cid for cid, _, _ in self.queued]
        self.queued = []

    @rule(data=st.data(), how=st.sampled_from(["post", "fill", "one", "strided"]))
    def submit(self, data: Any, how: str) -> None:
        ring, lba = self.ring, self.lba
        if not ring.room:
            return
        if how == "one":
            self.begun([ring.post_one(ENTRY, lba, PAGE * lba, lambda: NOW)], lba)
            self.rang()
            return
        count = data.draw(st.integers(0, ring.room))
        lbas = words(count, lba)
        addresses = lbas * np.uint64(PAGE)
        if how == "fill":
            self.begun(cids_of(ring.fill(ENTRY, lbas, addresses, NOW)), lba)
            return
        if how == "strided":
            lbas, addresses = np.repeat(lbas, 2)[::2], addresses.astype(np.int64)
        self.begun(cids_of(ring.post(ENTRY, lbas, addresses, NOW)), lba)
        self.rang()

    @precondition(lambda self: self.ring.room and not self.queued and not self.controller.bells.mmio)
    @rule(data=st.data(), how=st.sampled_from(["post", "one", "put", "fill"]))
    def submit_to_the_deaf(self, data: Any, how: str) -> None:
        """What the controller was not told of was never there."""
        ring, bells = self.ring, self.controller.bells
        count = data.draw(st.integers(1, ring.room))
        bells.deaf = True
        with pytest.raises(VfioError):
            if how == "one":
                ring.post_one(ENTRY, 99, 99, lambda: NOW)
            elif how == "post":
                ring.post(ENTRY, words(count, 99), words(count), NOW)
            elif how == "put":
                ring.put(ENTRY.entry, NOW)
                ring.ring()
            else:
                ring.fill(ENTRY, words(count, 99), words(count), NOW)
                ring.ring()
        bells.deaf = False

    @precondition(lambda self: not self.controller.bells.mmio)
    @rule(most=st.integers(1, 4))
    def reap_from_the_deaf(self, most: int) -> None:
        """What was taken is not lost where the controller cannot be told, and it is told at the next look."""
        self.controller.bells.deaf = True
        self.reap(most, False)
        self.reap_one()
        self.controller.bells.deaf = False
        self.ring.reap(0)

    @rule()
    def tell(self) -> None:
        self.ring.ring()
        self.rang()

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(), status=st.sampled_from([0, 0, 0, 1, 0x4281, 0x7FFF]), result=st.integers(0, 2**32 - 1)
    )
    def complete(self, data: Any, status: int, result: int) -> None:
        for cid in data.draw(st.permutations(self.running)):
            assert self.controller.room(), "the driver did not say in time what it has taken"
            self.running.remove(cid)
            self.controller.complete(cid, status, result)
            self.completed.append((cid, status, result))
            if data.draw(st.integers(0, 7)) == 0:
                break

    @rule(most=st.none() | st.integers(1, 20), release=st.booleans())
    def reap(self, most: int | None, release: bool) -> None:
        before_end = len(self.controller.cq) - self.ring._state.head
        expected = self.completed[: min(most or 99, before_end)]
        taken = self.ring.reap(most, release=release)
        if not expected:
            assert taken is None
            return
        assert taken is not None
        cids = taken.cids.tolist()
        assert list(zip(cids, taken.status.tolist(), self.ring.results(len(cids)), strict=True)) == expected
        assert taken.failed == sum(status != 0 for _, status, _ in expected)
        del self.completed[: len(expected)]
        if not release:
            self.held += cids

    @rule()
    def reap_one(self) -> None:
        taken = self.ring.reap_one()
        if not self.completed:
            assert taken is None
            return
        assert taken == self.completed[0][:2]
        assert self.ring.result() == self.completed.pop(0)[2]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        some = data.draw(st.lists(st.sampled_from(self.held), unique=True))
        self.ring.release(np.array(some, dtype=np.intp))
        self.held = [cid for cid in self.held if cid not in some]

    @rule(data=st.data())
    def forget(self, data: Any) -> None:
        """The controller was reset."""
        self.ring.forget(np.array(self.held, dtype=np.intp) if self.held else None)
        self.controller.bells.page[:] = bytes(PAGE)
        self.controller.head = self.controller.tail = 0
        self.controller.phase = 1
        self.queued, self.running, self.completed = [], [], []

    @precondition(lambda self: not self.completed and self.ring.outstanding and self.controller.room())
    @rule(data=st.data())
    def lie(self, data: Any) -> None:
        """A completion of nothing is refused as long as it stands there; a reset helps."""
        ours = [each[0] for each in self.queued] + self.running
        others = [*sorted(set(range(self.ring.depth + 3)) - set(ours)), 0xFFFF]
        self.controller.complete(data.draw(st.sampled_from(others)), 0)
        for _ in range(2):
            with pytest.raises(DeviceFailed, match="not in flight"):
                self.ring.reap()
            with pytest.raises(DeviceFailed, match="not in flight"):
                self.ring.reap_one()
        assert sorted(self.ring.in_flight().tolist()) == sorted(ours)
        self.forget(data)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "ring"):
            return
        ring, flying = self.ring, [each[0] for each in self.queued + self.completed] + self.running
        assert ring.outstanding == len(flying)
        assert ring.room == ring.depth - len(flying) - len(self.held)
        assert sorted(ring.in_flight().tolist()) == sorted(flying)


TestRing = RingMachine.TestCase


def test_good_completions_before_a_bad_one_are_not_lost() -> None:
    ring, bells, buffer = make(8, 8)
    controller = Controller(8, 8, bells, buffer)
    cids = cids_of(ring.post(ENTRY, words(4), words(4), NOW))
    controller.complete(cids[2], 0)
    controller.complete(cids[0], 5)
    controller.complete(cids[2], 0)  # again
    taken = ring.reap()
    assert taken is not None
    assert (taken.cids.tolist(), taken.status.tolist()) == ([cids[2], cids[0]], [0, 5])
    with pytest.raises(DeviceFailed, match="not in flight"):
        ring.reap()


@pytest.mark.parametrize(
    ("lbas", "addresses"),
    [
        (words(2), words(1)),
        (words(2), words(3)),
        (words(2), words(2).astype(np.uint32)[:1]),
        (words(4).reshape(2, 2), words(2)),
        (np.empty((2, 0), dtype=np.uint64), words(2)),
    ],
)
def test_arrays_of_other_lengths(lbas: Any, addresses: Any) -> None:
    ring, bells, _ = make(8, 8)
    with pytest.raises(ValueError, match="values for 2 commands"):
        ring.post(ENTRY, lbas, addresses, NOW)
    assert (ring.outstanding, ring.room, bells.read_nowait(SQ)) == (0, 7, 0)


def test_words_of_the_last_commands_are_written_again() -> None:
    """Also over the end of the queue."""
    ring, bells, buffer = make(6, 6)
    controller = Controller(6, 6, bells, buffer)
    for cid in cids_of(ring.post(ENTRY, words(4), words(4), NOW)):
        controller.complete(cid, 0)
    controller.fetch()
    assert ring.reap(release=True)
    ring.fill(ENTRY, words(5), words(5), NOW)
    ring.overwrite(2, words(4, 40))
    ring.ring()
    assert [command[2] for command in controller.fetch()] == [0, 40, 41, 42, 43]


BAD_RELEASES = [[1], [-1], [7], [1 << 40], [0, 1]]


@pytest.mark.parametrize("cids", BAD_RELEASES)
def test_what_was_not_reaped_is_not_released(cids: list[int]) -> None:
    ring, bells, buffer = make(8, 8)
    controller = Controller(8, 8, bells, buffer)
    begun = cids_of(ring.post(ENTRY, words(1), words(1), NOW))
    if max(cids) > 1 or min(cids) < 0:  # one may be released: but not these
        controller.complete(begun[0], 0)
        assert ring.reap()
    room = ring.room
    with pytest.raises(ValueError, match="not to be released"):
        ring.release(np.array(cids, dtype=np.intp))
    assert ring.room == room


def test_more_than_there_is_room_for() -> None:
    ring, bells, _ = make(8, 8)
    assert ring.post(ENTRY, words(8), words(8), NOW) is None
    assert ring.fill(ENTRY, words(8), words(8), NOW) is None
    assert (ring.outstanding, ring.room, bells.read_nowait(SQ)) == (0, 7, 0)
    assert len(cids_of(ring.fill(ENTRY, words(7), words(7), NOW))) == 7
    assert ring.post_one(ENTRY, 0, 0, lambda: NOW) < 0
    assert ring.post(ENTRY, words(1), words(1), NOW) is None


def test_more_than_there_is_room_for_is_refused_in_c() -> None:
    ring, bells, _ = make(4, 4)
    state, cids = ring._state, ffi.new("int64_t[8]")
    data = ffi.new("uint64_t[8]")
    assert lib.pv_nvme_post(state, bells.mmio, ENTRY.entry, 4, data, data, NOW, cids) == -11
    assert (ring.outstanding, bells.read_nowait(SQ)) == (0, 0)
    for _ in range(3):
        assert lib.pv_nvme_put(state, ENTRY.entry, NOW) >= 0
    assert lib.pv_nvme_put(state, ENTRY.entry, NOW) == -11
    assert lib.pv_nvme_post_one(state, bells.mmio, ENTRY.entry, 0, 0, NOW) == -11


@pytest.mark.parametrize(("lba", "address"), [(1 << 64, 0), (0, 1 << 64), (-1, 0)])
def test_numbers_of_more_than_64_bits(lba: int, address: int) -> None:
    ring, bells, _ = make(4, 4)
    with pytest.raises(OverflowError):
        ring.post_one(ENTRY, lba, address, lambda: NOW)
    assert (ring.outstanding, ring.room, bells.read_nowait(SQ)) == (0, 3, 0)
