"""The table of ranges against a list, ranges by the thousand, and its interrupts."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pvfio.abi import ffi
from pvfio.silicon import MSI_END, MSI_START, READ, WRITE, DmaAborted, TableBus, is_eventfd
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

UNIT = 16
UNITS = 2048
MEMORY = np.random.default_rng(1).integers(0, 256, UNITS * UNIT, dtype=np.uint8)
BYTES = MEMORY.tobytes()
ADDRESS = MEMORY.ctypes.data

places = st.integers(0, UNITS - 1)
sizes = st.one_of(st.integers(1, 3), st.integers(1, 40))


def error_of(operation: Callable[..., None], *arguments: int) -> int:
    """What it raises, 0: nothing."""
    try:
        operation(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


class AgainstAList(RuleBasedStateMachine):
    """Ranges of a few units each; every one shows its own part of one array, so the right bytes are the right range."""

    @initialize(
        step=st.integers(1, 8), count=st.integers(0, 300), base=st.sampled_from([0, 2**64 - UNITS * UNIT])
    )
    def fill(self, step: int, count: int, base: int) -> None:
        self.bus = TableBus()
        self.base = base
        self.ranges: dict[int, tuple[int, int]] = {}  # first unit: units, permissions
        for at in range(0, min(count * step, UNITS), step):
            self.map(at, 1, READ)

    def overlapping(self, at: int, size: int) -> list[int]:
        return [
            first for first, (units, _) in self.ranges.items() if first < at + size and at < first + units
        ]

    def iova(self, at: int) -> int:
        return self.base + at * UNIT

    @rule(at=places, size=sizes, perm=st.integers(1, 3))
    def map(self, at: int, size: int, perm: int) -> None:
        size = min(size, UNITS - at)
        taken = self.overlapping(at, size)
        error = error_of(self.bus.map_address, self.iova(at), ADDRESS + at * UNIT, size * UNIT, perm)
        assert error == (errno.EEXIST if taken else 0)
        if not taken:
            self.ranges[at] = (size, perm)

    @rule(at=places, count=st.integers(1, 200), gap=st.integers(0, 2))
    def map_many(self, at: int, count: int, gap: int) -> None:
        for i in range(count):
            if at + i * (gap + 1) < UNITS:
                self.map(at + i * (gap + 1), 1, READ | WRITE)

    @rule(at=places, size=st.one_of(sizes, st.integers(1, UNITS)))
    def unmap(self, at: int, size: int) -> None:
        size = min(size, UNITS - at)
        found = self.overlapping(at, size)
        split = any(first < at or first + self.ranges[first][0] > at + size for first in found)
        assert error_of(self.bus.unmap, self.iova(at), size * UNIT) == (errno.EINVAL if split else 0)
        for first in found if not split else ():
            del self.ranges[first]

    @rule(part=st.integers(2, 40), of=st.integers(0, 39))
    def thin_out(self, part: int, of: int) -> None:
        """Leaves few of many, so that chunks of the table join."""
        for i, first in enumerate(sorted(self.ranges)):
            if i % part != of % part:
                self.unmap(first, self.ranges[first][0])

    @rule(at=places, size=sizes, perm=st.sampled_from([READ, WRITE]))
    def reach(self, at: int, size: int, perm: int) -> None:
        size = min(size, UNITS - at)
        fits = size
        for unit in range(at, at + size):
            inside = self.overlapping(unit, 1)
            if not inside or not self.ranges[inside[0]][1] & perm:
                fits = unit - at
                break
        data = BYTES[at * UNIT : (at + size) * UNIT]
        if fits == size and perm == WRITE:
            self.bus.write(self.iova(at), data)
        elif fits == size:
            assert self.bus.read(self.iova(at), len(data)) == data
        else:
            with pytest.raises(DmaAborted) as caught:
                if perm == WRITE:
                    self.bus.write(self.iova(at), data)
                else:
                    self.bus.read(self.iova(at), len(data))
            abort = caught.value
            assert (abort.done, abort.fault_iova, abort.perm) == (fits * UNIT, self.iova(at + fits), perm)

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "bus"):
            assert self.bus.maps == len(self.ranges)
            assert MEMORY.tobytes() == BYTES


AgainstAList.TestCase.settings = settings(max_examples=tries(60), stateful_step_count=25, deadline=None)
TestAgainstAList = AgainstAList.TestCase


@pytest.mark.parametrize("order", ["up", "down", "anyhow"])
def test_every_page_of_a_guest_by_itself(order: str) -> None:
    count = 65_535
    bus = TableBus()
    page = np.arange(4096, dtype=np.uint32).astype(np.uint8)
    numbers = np.arange(count)
    if order == "down":
        numbers = numbers[::-1]
    elif order == "anyhow":
        np.random.default_rng(2).shuffle(numbers)
    address = ffi.cast("void *", page.ctypes.data)
    for number in numbers.tolist():
        bus.map_address(number << 12, address, 4096)
    assert bus.maps == count
    for number in numbers[::997].tolist():
        assert bus.read((number << 12) + 5, 2) == b"\x05\x06"
    with pytest.raises(DmaAborted) as caught:
        bus.read((count << 12) - 1, 2)
    assert caught.value.fault_iova == count << 12
    for number in numbers[: count // 2].tolist():
        bus.unmap(number << 12, 4096)
    assert bus.maps == count - count // 2
    bus.unmap(0, count << 12)
    assert bus.maps == 0


def test_address_zero_is_no_memory() -> None:
    with pytest.raises(OSError) as caught:
        TableBus().map_address(0x1000, 0, 4096)
    assert caught.value.errno == errno.EINVAL


# Interrupts.


@pytest.fixture
def bells() -> Iterator[list[int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    yield made
    for descriptor in made:
        os.close(descriptor)


def rung(descriptor: int) -> int:
    try:
        return os.eventfd_read(descriptor)
    except BlockingIOError:
        return 0


def test_a_message_rings_the_vector_it_names(bells: list[int]) -> None:
    bus = TableBus(bells[2])
    bus.vectors(4)
    bus.vector(0, bells[0])
    bus.vector(3, bells[1])
    assert bus.msi(MSI_START, 3)
    bus.write(MSI_END & ~3, (0).to_bytes(4, "little"))
    assert [rung(bell) for bell in bells] == [1, 1, 0]
    for address, data in ((MSI_START, 1), (MSI_START, 4), (MSI_START, 2**32 - 1), (MSI_END + 1, 0), (0, 0)):
        assert not bus.msi(address, data)
    assert [rung(bell) for bell in bells] == [0, 0, 0]
    bus.vector(3, -1)
    assert not bus.msi(MSI_START, 3)
    bus.vectors(0)
    assert bus.msi(MSI_START, 3)
    assert [rung(bell) for bell in bells] == [0, 0, 1]


def test_a_vector_keeps_its_eventfd_though_the_descriptor_goes() -> None:
    bus = TableBus()
    bus.vectors(1)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    kept = os.dup(bell)
    bus.vector(0, bell)
    os.close(bell)
    taken = os.open("/dev/null", os.O_RDWR)  # the number is another file's now
    try:
        assert bus.msi(MSI_START, 0)
        assert rung(kept) == 1
    finally:
        os.close(taken)
        os.close(kept)


def test_a_full_eventfd_stops_nobody() -> None:
    bell = os.eventfd(0)
    try:
        bus = TableBus()
        bus.vectors(1)
        bus.vector(0, bell)
        os.eventfd_write(bell, 2**64 - 2)
        assert bus.msi(MSI_START, 0)
        assert os.eventfd_read(bell) >= 2**64 - 2
    finally:
        os.close(bell)


def test_an_eventfd_that_is_filled_at_the_wrong_moment() -> None:
    """Its owner makes it blocking, and fills it again and again while messages ring it: none of them waits."""
    bell, bus, rung, over = os.eventfd(0), TableBus(), [0], threading.Event()
    bus.vectors(1)
    bus.vector(0, bell)

    def ring() -> None:
        while not over.is_set():
            bus.write(MSI_START, bytes(4))
            rung[0] += 1

    ringer, interval = threading.Thread(target=ring), sys.getswitchinterval()
    ringer.start()
    try:
        sys.setswitchinterval(1e-5)
        for _ in range(500):
            os.set_blocking(bell, False)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bell)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(bell, 2**64 - 2)
            os.set_blocking(bell, True)
            seen, until = rung[0], time.monotonic() + 10
            while rung[0] < seen + 2:
                assert time.monotonic() < until, "whoever rings waits"
    finally:
        sys.setswitchinterval(interval)
        over.set()
        os.set_blocking(bell, False)
        while ringer.is_alive():
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bell)
        os.close(bell)
        bus.close()


def test_only_eventfds_are_vectors(tmp_path: Path) -> None:
    bus = TableBus()
    bus.vectors(2)
    readable, writable = os.pipe()
    file = os.open(tmp_path / "anon_inode:[eventfd]", os.O_CREAT | os.O_RDWR)
    closed = os.dup(file)
    os.close(closed)
    before = len(os.listdir("/proc/self/fd"))
    try:
        for descriptor, error in (
            (readable, errno.EINVAL),
            (writable, errno.EINVAL),
            (file, errno.EINVAL),
            (closed, errno.EBADF),
        ):
            assert not is_eventfd(descriptor)
            with pytest.raises(OSError) as caught:
                bus.vector(0, descriptor)
            assert caught.value.errno == error
        assert not is_eventfd(-1)
    finally:
        for descriptor in (readable, writable, file):
            os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) == before - 3


def test_vectors_that_are_not_there(bells: list[int]) -> None:
    bus = TableBus()
    assert is_eventfd(bells[0])
    for index in (0, 2048):
        with pytest.raises(OSError) as caught:
            bus.vector(index, bells[0])
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError) as caught:
        bus.vectors(2049)
    assert caught.value.errno == errno.EINVAL


def test_no_descriptor_is_left_behind(bells: list[int]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    bus = TableBus()
    bus.vectors(64)
    for index in range(64):
        bus.vector(index, bells[0])
        bus.vector(index, bells[1])
    bus.vectors(3)
    bus.vector(1, bells[2])
    assert len(os.listdir("/proc/self/fd")) == before + 2  # and the bell
    bus.close()
    assert len(os.listdir("/proc/self/fd")) == before
