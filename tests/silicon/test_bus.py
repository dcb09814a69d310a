"""Bus-master operations, on the table bus and through both stages, against slices of bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.pagetable import Perm
from pvfio.silicon import READ, WRITE, BusMaster, DmaAborted, DmaCancelled, TableBus
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

PAGE = 4096
BASE = 0x10_0000
PAGES = 40

Opened = tuple[BusMaster, Any]


def open_table_bus(rig_factory: Callable[[str], Any]) -> Opened:
    """The table bus over single pages, so that every page boundary is a boundary of translations."""
    memory = np.zeros(PAGES * PAGE, np.uint8)
    bus = TableBus()
    for page in range(PAGES):
        bus.map(BASE + page * PAGE, memory[page * PAGE : (page + 1) * PAGE])
    return bus, memory


def open_pviommu(rig_factory: Callable[[str], Any]) -> Opened:
    """A requester over scattered guest pages."""
    rig = rig_factory("intel")
    domain, table = rig.paging()
    memory = rig.memory.alloc(PAGES * PAGE, scattered=True)
    iova = BASE
    for gpa, size in rig.memory.runs(memory.vaddr, memory.nbytes):
        table.map_range(iova, gpa, size, Perm.READ | Perm.WRITE)
        iova += size
    bus = rig.requester(domain)
    bus.kept = (rig, table)
    return bus, memory


@pytest.fixture(params=[open_table_bus, open_pviommu], ids=["table", "pviommu"], scope="module")
def opened(request: pytest.FixtureRequest, make_rig: Callable[[str], Any]) -> Opened:
    result: Opened = request.param(make_rig)
    return result


offsets = st.integers(0, PAGES * PAGE - 1)


@settings(max_examples=tries(150), deadline=None)
@given(dst=offsets, src=offsets, size=st.integers(0, PAGES * PAGE), seed=st.integers(0, 1 << 32))
def test_move_is_memmove(opened: Opened, dst: int, src: int, size: int, seed: int) -> None:
    bus, memory = opened
    size = min(size, PAGES * PAGE - max(dst, src))
    memory[:] = np.random.default_rng(seed).integers(0, 256, memory.size, dtype=np.uint8)
    expected = bytearray(memory.tobytes())
    expected[dst : dst + size] = expected[src : src + size]
    bus.move(BASE + dst, BASE + src, size)
    assert memory.tobytes() == bytes(expected)


@settings(max_examples=tries(80), deadline=None)
@given(at=offsets, data=st.binary(min_size=0, max_size=3 * PAGE))
def test_write_then_read(opened: Opened, at: int, data: bytes) -> None:
    bus, memory = opened
    data = data[: PAGES * PAGE - at]
    bus.write(BASE + at, data)
    assert memory[at : at + len(data)].tobytes() == data
    assert bus.read(BASE + at, len(data)) == data


@settings(max_examples=tries(80), deadline=None)
@given(at=offsets, size=st.integers(0, PAGES * PAGE), pattern=st.binary(min_size=8, max_size=8))
def test_fill_repeats_the_pattern_over_page_boundaries(
    opened: Opened, at: int, size: int, pattern: bytes
) -> None:
    bus, memory = opened
    size = min(size, PAGES * PAGE - at)
    memory[:] = 0xEE
    bus.fill(BASE + at, pattern, size)
    assert memory[at : at + size].tobytes() == (pattern * (size // 8 + 1))[:size]
    assert (memory[:at] == 0xEE).all()
    assert (memory[at + size :] == 0xEE).all()


@settings(max_examples=tries(80), deadline=None)
@given(size=st.integers(1, PAGES * PAGE // 2), flip=st.integers(0, PAGES * PAGE // 2), differ=st.booleans())
def test_compare_finds_the_first_difference(opened: Opened, size: int, flip: int, differ: bool) -> None:
    bus, memory = opened
    half = PAGES * PAGE // 2
    memory[half:] = memory[:half] = np.arange(half, dtype=np.uint32).astype(np.uint8)
    flip %= size
    if differ:
        memory[half + flip] ^= 1
        memory[half + size - 1] ^= 2
        first = flip
    assert bus.compare(BASE, BASE + half, size) == (first if differ else None)


@pytest.mark.parametrize(
    ("operation", "fault", "done", "perm"),
    [
        (lambda bus, hole: bus.read(hole - 10, 20), 0, 10, READ),
        (lambda bus, hole: bus.write(hole - 10, bytes(20)), 0, 10, WRITE),
        (lambda bus, hole: bus.fill(hole - 3, bytes(8), 9), 0, 3, WRITE),
        (lambda bus, hole: bus.move(hole - 100, BASE, 5000), 0, 100, WRITE),
        (lambda bus, hole: bus.move(BASE, hole - 100, 5000), 0, 100, READ),
        (lambda bus, hole: bus.compare(BASE, hole - 7, 20), 0, 7, READ),
        (lambda bus, hole: bus.read(hole + 5, 1), 5, 0, READ),
        # backwards: the last byte is in the hole's last page, counted from the end
        (lambda bus, hole: bus.move(hole - PAGE + 8, hole - PAGE, PAGE), 7, 0, WRITE),
    ],
)
def test_abort_says_where_and_how_far(operation: Any, fault: int, done: int, perm: int) -> None:
    memory = np.full(4 * PAGE, 0x11, np.uint8)
    bus = TableBus()
    bus.map(BASE, memory)
    hole = BASE + 4 * PAGE
    with pytest.raises(DmaAborted) as caught:
        operation(bus, hole)
    assert (caught.value.fault_iova - hole, caught.value.done, caught.value.perm) == (fault, done, perm)


def test_no_byte_of_the_faulting_page_is_touched() -> None:
    memory = np.zeros(3 * PAGE, np.uint8)
    bus = TableBus()
    bus.map(BASE, memory[:PAGE])
    bus.map(BASE + 2 * PAGE, memory[2 * PAGE :])
    with pytest.raises(DmaAborted):
        bus.fill(BASE, b"\xff" * 8, 3 * PAGE)
    assert (memory[:PAGE] == 0xFF).all()
    assert not memory[PAGE:].any()


def test_permissions_of_the_table() -> None:
    memory = np.zeros(2 * PAGE, np.uint8)
    bus = TableBus()
    bus.map(BASE, memory[:PAGE], READ)
    bus.map(BASE + PAGE, memory[PAGE:], WRITE)
    bus.write(BASE + PAGE, b"x")
    for refused in (lambda: bus.write(BASE, b"x"), lambda: bus.read(BASE + PAGE, 1)):
        with pytest.raises(DmaAborted):
            refused()
    assert bus.read(BASE, 1) == b"\0"


@pytest.mark.parametrize(
    ("iova", "size", "perm", "error"),
    [
        (0x1000, 4096, 0, errno.EINVAL),
        (0x1000, 4096, 4, errno.EINVAL),
        ((1 << 64) - 4096, 8192, READ, errno.EINVAL),
        (BASE + 4095, 4096, READ, errno.EEXIST),
        (BASE - 4095, 4096, READ, errno.EEXIST),
    ],
)
def test_entries_that_cannot_be(iova: int, size: int, perm: int, error: int) -> None:
    bus = TableBus()
    bus.map(BASE, bytearray(PAGE))
    with pytest.raises(OSError) as caught:
        bus.map(iova, bytearray(size), perm)
    assert caught.value.errno == error


def test_unmap_takes_whole_entries_only() -> None:
    bus = TableBus()
    for page in range(4):
        bus.map(BASE + page * PAGE, bytearray(PAGE))
    with pytest.raises(OSError) as caught:
        bus.unmap(BASE + 100, 2 * PAGE)
    assert caught.value.errno == errno.EINVAL
    bus.read(BASE, 4 * PAGE)
    bus.unmap(BASE + PAGE, 2 * PAGE)
    bus.read(BASE + 3 * PAGE, 1)
    for gone in (BASE + PAGE, BASE + 2 * PAGE):
        with pytest.raises(DmaAborted):
            bus.read(gone, 1)


def test_cancel_ends_every_operation_until_it_is_lifted() -> None:
    bus = TableBus()
    bus.map(BASE, bytearray(2 * PAGE))
    bus.cancel(True)
    for operation in (
        lambda: bus.read(BASE, 1),
        lambda: bus.write(BASE, b"x"),
        lambda: bus.move(BASE, BASE + PAGE, 8),
        lambda: bus.move(BASE + 8, BASE, 64),
        lambda: bus.fill(BASE, bytes(8), 8),
        lambda: bus.compare(BASE, BASE + 8, 8),
    ):
        with pytest.raises(DmaCancelled):
            operation()
    assert not bus.msi(0xFEE0_0000, 1)
    bus.cancel(False)
    assert bus.read(BASE, 1) == b"\0"


def test_dword_into_the_interrupt_window_is_a_message() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        bus = TableBus(fd)
        bus.write(0xFEE0_1000, (0x4021).to_bytes(4, "little"))
        assert bus.msis() == (1, 0xFEE0_1000, 0x4021)
        assert os.eventfd_read(fd) == 1
        for data, at in ((bytes(8), 0xFEE0_1000), (bytes(4), 0xFEE0_1002), (bytes(2), 0xFEE0_1000)):
            with pytest.raises(DmaAborted):
                bus.write(at, data)
        assert bus.msis()[0] == 1
    finally:
        os.close(fd)


@pytest.mark.parametrize("pattern", [b"", b"1234567", b"123456789"])
def test_patterns_have_eight_bytes(pattern: bytes) -> None:
    with pytest.raises(ValueError, match="8 bytes"):
        TableBus().fill(BASE, pattern, 8)


@pytest.mark.parametrize("pieces", [(PAGE // 2,) * 4, (100,) * 80 + (192,), (5000, 3192), (1,) * 7 + (8185,)])
def test_moves_stay_inside_translations_that_end_inside_pages(pieces: tuple[int, ...]) -> None:
    """A list of ranges may cut pages anywhere; what lies behind a piece in the process is not the next one."""
    bus = TableBus()
    iova, kept = BASE, []
    for size in pieces:
        memory = np.full(3 * size, 0xEE, np.uint8)
        memory[size : 2 * size] = np.arange(iova, iova + size) % 251
        bus.map(iova, memory[size : 2 * size])
        kept.append(memory)
        iova += size
    before = np.frombuffer(bus.read(BASE, 8192), np.uint8)
    bus.move(BASE + 50, BASE, 8192 - 50)
    after = np.frombuffer(bus.read(BASE, 8192), np.uint8)
    assert (after[50:] == before[:-50]).all()
    assert all((memory[:size] == 0xEE).all() for memory, size in zip(kept, pieces, strict=True))
    assert all((memory[2 * size :] == 0xEE).all() for memory, size in zip(kept, pieces, strict=True))
