"""Bus-master operations over local and remote memory in every mixture, against bytes; who waits, and for what."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.abi import ffi
from pvfio.silicon import READ, WRITE, BusMaster, DmaAborted, DmaCancelled, TableBus
from tests.far_memory import FarMemory
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

PAGE = 4096
PAGES = 40
BASE = 0x10_0000
SIZE = PAGES * PAGE
SECTION = 65536
LONGEST = 10.0  # seconds, for what takes no time

# What a page is: permission bits, then whether it is remote, then whether the far end refuses it after all.
FAR, REFUSED = 4, 8
KINDS = (
    READ | WRITE,
    READ | WRITE | FAR,
    READ | FAR,
    WRITE | FAR,
    READ,
    WRITE,
    0,
    READ | WRITE | FAR | REFUSED,
)
pages = st.one_of(
    st.lists(st.sampled_from(KINDS), min_size=PAGES, max_size=PAGES),
    st.lists(st.sampled_from(KINDS[:2]), min_size=PAGES, max_size=PAGES),
    st.just([READ | WRITE | FAR] * PAGES),
)
offsets = st.integers(0, SIZE - 1)


class Space:
    """Pages of each kind over one array; neighbours of one kind are one range, as far as ``longest`` pages."""

    def __init__(self, kinds: list[int], longest: int) -> None:
        self.kinds = kinds
        self.memory = np.random.default_rng(PAGES).integers(0, 256, SIZE, dtype=np.uint8)
        self.bus = TableBus()
        self.far = FarMemory(self.bus, self._refuse)
        first = 0
        for page in range(1, PAGES + 1):
            if page == PAGES or page - first == longest or (kinds[page] ^ kinds[first]) & ~REFUSED:
                self._map(first, page, kinds[first])
                first = page

    def _map(self, first: int, end: int, kind: int) -> None:
        place: Any = self.far if kind & FAR else self.bus
        if kind:
            place.map(BASE + first * PAGE, self.memory[first * PAGE : end * PAGE], kind & (READ | WRITE))

    def _refuse(self, iova: int, size: int, write: bool) -> int:
        assert size <= SECTION
        touched = range((iova - BASE) // PAGE, (iova + size - 1 - BASE) // PAGE + 1)
        return errno.EFAULT if any(self.kinds[page] & REFUSED for page in touched) else 0

    def allowed(self, offset: int, perm: int) -> bool:
        kind = self.kinds[offset // PAGE]
        return bool(kind & perm) and not kind & REFUSED

    def reach(self, size: int, *ranges: tuple[int, int]) -> int:
        """How many bytes go before the first that one of the ranges (offset, permission) has not."""
        return next(
            (i for i in range(size) if not all(self.allowed(at + i, perm) for at, perm in ranges)), size
        )


def run(
    space: Space, size: int, operation: Callable[[BusMaster], Any], *ranges: tuple[int, int]
) -> tuple[int, Any]:
    """Runs it; how far it must have come, and what it gave. Where it aborts, that is checked."""
    done = space.reach(size, *ranges)
    if done == size:
        return done, operation(space.bus)
    with pytest.raises(DmaAborted) as caught:
        operation(space.bus)
    abort = caught.value
    wrong = [(BASE + at + done, perm) for at, perm in ranges if not space.allowed(at + done, perm)]
    assert abort.done == done
    assert (abort.fault_iova, abort.perm) in wrong
    return done, None


@settings(max_examples=tries(150), deadline=None)
@given(
    kinds=pages, longest=st.sampled_from([1, 3, PAGES]), dst=offsets, src=offsets, size=st.integers(0, SIZE)
)
def test_move(kinds: list[int], longest: int, dst: int, src: int, size: int) -> None:
    space = Space(kinds, longest)
    size = min(size, SIZE - max(dst, src))
    expected = bytearray(space.memory.tobytes())
    if src < dst < src + size:
        backward(space, expected, dst, src, size)
    else:
        done, _ = run(
            space, size, lambda bus: bus.move(BASE + dst, BASE + src, size), (src, READ), (dst, WRITE)
        )
        expected[dst : dst + done] = expected[src : src + done]
    assert space.memory.tobytes() == bytes(expected)


def backward(space: Space, expected: bytearray, dst: int, src: int, size: int) -> None:
    left = size
    while left and space.allowed(src + left - 1, READ) and space.allowed(dst + left - 1, WRITE):
        left -= 1
    expected[dst + left : dst + size] = expected[src + left : src + size]
    if not left:
        space.bus.move(BASE + dst, BASE + src, size)
        return
    with pytest.raises(DmaAborted) as caught:
        space.bus.move(BASE + dst, BASE + src, size)
    abort = caught.value
    wrong = [
        (BASE + at + left - 1, perm)
        for at, perm in ((src, READ), (dst, WRITE))
        if not space.allowed(at + left - 1, perm)
    ]
    assert abort.done == size - left
    assert (abort.fault_iova, abort.perm) in wrong


@settings(max_examples=tries(80), deadline=None)
@given(kinds=pages, longest=st.sampled_from([1, 3, PAGES]), at=offsets, size=st.integers(0, SIZE))
def test_read_and_write(kinds: list[int], longest: int, at: int, size: int) -> None:
    space = Space(kinds, longest)
    size = min(size, SIZE - at)
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    expected = bytearray(space.memory.tobytes())
    _, read = run(space, size, lambda bus: bus.read(BASE + at, size), (at, READ))
    assert read in (None, bytes(expected[at : at + size]))
    done, _ = run(space, size, lambda bus: bus.write(BASE + at, data), (at, WRITE))
    expected[at : at + done] = data[:done]
    assert space.memory.tobytes() == bytes(expected)


@settings(max_examples=tries(80), deadline=None)
@given(kinds=pages, at=offsets, size=st.integers(0, SIZE), pattern=st.binary(min_size=8, max_size=8))
def test_fill(kinds: list[int], at: int, size: int, pattern: bytes) -> None:
    space = Space(kinds, 7)
    size = min(size, SIZE - at)
    expected = bytearray(space.memory.tobytes())
    done, _ = run(space, size, lambda bus: bus.fill(BASE + at, pattern, size), (at, WRITE))
    expected[at : at + done] = (pattern * (done // 8 + 1))[:done]
    assert space.memory.tobytes() == bytes(expected)


@settings(max_examples=tries(100), deadline=None)
@given(
    kinds=pages, a=offsets, b=offsets, size=st.integers(1, SIZE), differ=st.none() | st.integers(0, SIZE - 1)
)
def test_compare(kinds: list[int], a: int, b: int, size: int, differ: int | None) -> None:
    space = Space(kinds, 5)
    size = min(size, SIZE - max(a, b))
    space.memory[:] = 0x5A
    if differ is not None:
        space.memory[a + differ % size] ^= 1
    unlike = np.flatnonzero(space.memory[a : a + size] != space.memory[b : b + size])
    first = int(unlike[0]) if unlike.size else None
    reach = space.reach(size, (a, READ), (b, READ))
    if first is not None and first < reach:
        assert space.bus.compare(BASE + a, BASE + b, size) == first
    else:
        _, found = run(space, size, lambda bus: bus.compare(BASE + a, BASE + b, size), (a, READ), (b, READ))
        assert found is None


def remote_bus(before: Callable[[int, int, bool], int]) -> tuple[TableBus, np.ndarray[Any, Any]]:
    """A local page at BASE, then sixteen remote ones."""
    bus = TableBus()
    local, memory = np.zeros(PAGE, np.uint8), np.zeros(16 * PAGE, np.uint8)
    bus.far = FarMemory(bus, before)  # type: ignore[attr-defined]
    bus.map(BASE, local)
    bus.far.map(BASE + PAGE, memory)  # type: ignore[attr-defined]
    return bus, memory


def test_one_request_for_what_is_one_range() -> None:
    bus = TableBus()
    far = FarMemory(bus)
    far.map(BASE, np.zeros(5 * SECTION, np.uint8))
    bus.read(BASE + 16, 2 * SECTION)
    bus.fill(BASE, bytes(8), SECTION + 1)
    bus.write(BASE + PAGE - 8, bytes(16))
    assert far.requests == [
        (BASE + 16, SECTION, False),
        (BASE + 16 + SECTION, SECTION, False),
        (BASE, SECTION, True),
        (BASE + SECTION, 1, True),
        (BASE + PAGE - 8, 16, True),
    ]


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.ENOTCONN])
def test_a_far_end_that_does_not_answer_is_asked_once(error: int) -> None:
    asked = []

    def stay_away(iova: int, size: int, write: bool) -> int:
        asked.append(iova)
        return error

    bus, _ = remote_bus(stay_away)
    with pytest.raises(DmaAborted) as caught:
        bus.move(BASE + 3 * PAGE, BASE, 3 * PAGE)
    assert (caught.value.fault_iova, caught.value.perm, caught.value.done) == (BASE + 3 * PAGE, WRITE, 0)
    assert len(asked) == 1


def test_nobody_to_ask() -> None:
    bus = TableBus()
    bus.map_remote(BASE, PAGE)
    with pytest.raises(DmaAborted) as caught:
        bus.read(BASE + 5, 1)
    assert (caught.value.fault_iova, caught.value.done) == (BASE + 5, 0)


def test_remote_says_so_while_there_are_such_ranges() -> None:
    bus = TableBus()
    bus.map(BASE, bytearray(PAGE))
    assert not bus.remote
    for page in (1, 2):
        bus.map_remote(BASE + page * PAGE, PAGE)
    with pytest.raises(OSError, match="EEXIST"):
        bus.map_remote(BASE, PAGE)
    bus.unmap(BASE, 2 * PAGE)
    assert bus.remote
    bus.unmap(BASE, SIZE)
    assert not bus.remote


def test_no_section_is_open_while_somebody_is_asked() -> None:
    """Else a change of the table from in here would wait for it for ever."""
    local = bytearray(PAGE)

    def change(iova: int, size: int, write: bool) -> int:
        bus.map(BASE + 32 * PAGE, local)
        bus.unmap(BASE + 32 * PAGE, PAGE)
        return bus.read(BASE, 1)[0]

    bus, _ = remote_bus(change)
    bus.move(BASE + PAGE, BASE + 2 * PAGE, PAGE)
    bus.move(BASE + 2 * PAGE, BASE + PAGE + 8, 2 * PAGE)
    bus.move(BASE, BASE + PAGE, PAGE)
    assert bus.compare(BASE, BASE + PAGE, PAGE) is None


@pytest.mark.parametrize("becomes", ["gone", "remote", "elsewhere"])
def test_a_local_range_that_changes_while_the_other_is_asked_for(becomes: str) -> None:
    """It is looked up again when the bytes are there."""
    other = np.zeros(PAGE, np.uint8)
    once = [True]

    def change(iova: int, size: int, write: bool) -> int:
        if once:
            once.clear()
            bus.unmap(BASE, PAGE)
            if becomes == "remote":
                bus.far.map(BASE, other)  # type: ignore[attr-defined]
            elif becomes == "elsewhere":
                bus.map(BASE, other)
        return 0

    bus, memory = remote_bus(change)
    memory[:] = 7
    if becomes == "gone":
        with pytest.raises(DmaAborted) as caught:
            bus.move(BASE, BASE + PAGE, PAGE)
        assert (caught.value.fault_iova, caught.value.done, caught.value.perm) == (BASE, 0, WRITE)
    else:
        bus.move(BASE, BASE + PAGE, PAGE)
        assert (other == 7).all()


def test_cancel_while_somebody_is_asked() -> None:
    """What is asked comes to nothing: nothing is done with it, nothing more is asked."""

    def cancel(iova: int, size: int, write: bool) -> int:
        bus.cancel(True)
        return 0

    bus, memory = remote_bus(cancel)
    memory[:] = 7
    for operation in (
        lambda: bus.read(BASE + PAGE, PAGE),
        lambda: bus.move(BASE, BASE + PAGE, PAGE),
        lambda: bus.move(BASE + 4 * PAGE, BASE + PAGE, PAGE),
        lambda: bus.move(BASE + PAGE + 8, BASE + PAGE, PAGE),
        lambda: bus.compare(BASE, BASE + PAGE, 8),
    ):
        bus.cancel(False)
        with pytest.raises(DmaCancelled) as caught:
            operation()
        assert caught.value.done == 0
    bus.cancel(False)
    assert bus.read(BASE, PAGE) == bytes(PAGE)
    assert (memory == 7).all()


def test_who_gives_the_far_end_up_waits_for_those_inside() -> None:
    inside, leave = threading.Event(), threading.Event()

    def stay(iova: int, size: int, write: bool) -> int:
        inside.set()
        return 0 if leave.wait(LONGEST) else errno.ETIMEDOUT

    bus, _ = remote_bus(stay)
    order: list[str] = []

    def give_up() -> None:
        bus.set_remote(ffi.NULL)
        order.append("given up")

    def read() -> None:
        bus.read(BASE + PAGE, 8)

    reader, giver = threading.Thread(target=read), threading.Thread(target=give_up)
    reader.start()
    assert inside.wait(LONGEST)
    giver.start()
    giver.join(0.02)
    order.append("left")
    leave.set()
    for thread in (reader, giver):
        thread.join(LONGEST)
        assert not thread.is_alive()
    assert order == ["left", "given up"]
    with pytest.raises(DmaAborted):
        bus.read(BASE + PAGE, 8)
