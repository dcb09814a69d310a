"""Guest RAM: layout, permutation, frames, extents and pins."""

from __future__ import annotations

import errno
import gc
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pvfio.errors import VfioError
from pvfio.memory import BLOCK_SIZE, PAGE_SIZE, DmaBuffer, GuestMemory
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

MIB = 1 << 20


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(32 * MIB)


def test_gpa_and_hpa_always_differ_and_no_block_is_lost(memory: GuestMemory) -> None:
    blocks = {memory.gpa_to_hpa(gpa) for gpa in range(0, memory.size, BLOCK_SIZE)}
    assert len(blocks) == memory.size // BLOCK_SIZE
    assert all(hpa % BLOCK_SIZE == 0 for hpa in blocks)
    assert all(memory.gpa_to_hpa(gpa) != gpa for gpa in range(0, memory.size, BLOCK_SIZE))
    first = memory.gpa_to_hpa(0)
    assert [memory.gpa_to_hpa(gpa) - first for gpa in range(0, memory.size, BLOCK_SIZE)] != list(
        range(0, memory.size, BLOCK_SIZE)
    )


def test_seed_decides_the_permutation() -> None:
    def order(seed: int) -> list[int]:
        memory = GuestMemory(64 * MIB, seed=seed)
        return [memory.gpa_to_hpa(gpa) for gpa in range(0, memory.size, BLOCK_SIZE)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_both_views_show_the_same_byte(memory: GuestMemory) -> None:
    for gpa in range(0, memory.size, BLOCK_SIZE // 2):
        memory.view_guest(gpa + 5, 8)[:] = gpa.to_bytes(8, "little")
    for gpa in range(0, memory.size, BLOCK_SIZE // 2):
        assert bytes(memory.view_host(memory.gpa_to_hpa(gpa + 5), 8)) == gpa.to_bytes(8, "little")


def test_ram_above_the_hole() -> None:
    memory = GuestMemory(3 * 1024 * MIB + 4 * MIB)
    assert memory.ram_ranges() == ((0, 0xC000_0000), (0x1_0000_0000, 4 * MIB))
    for gpa in (0xC000_0000, 0xFEE0_0000, 0xFFFF_FFFF, 0x1_0000_0000 + 4 * MIB, 1 << 60):
        with pytest.raises(ValueError, match="is not RAM"):
            memory.gpa_to_hpa(gpa)
    with pytest.raises(ValueError):
        memory.view_guest(0xC000_0000 - 4, 8)
    memory.view_guest(0x1_0000_0000, 4)[:] = b"high"
    assert bytes(memory.view_host(memory.gpa_to_hpa(0x1_0000_0000), 4)) == b"high"


@pytest.mark.parametrize("size", [0, -1, 4096, BLOCK_SIZE + 1, 1 << 60])
def test_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        GuestMemory(size)


@pytest.mark.parametrize(
    ("size", "align", "error"),
    [
        (0, PAGE_SIZE, ValueError),
        (-1, PAGE_SIZE, ValueError),
        (64 * MIB, PAGE_SIZE, MemoryError),
        (32 * MIB, PAGE_SIZE, MemoryError),  # GPA 0 is nobody's
        (PAGE_SIZE, 3 * PAGE_SIZE, ValueError),
        (PAGE_SIZE, 1 << 40, ValueError),
        (20 * MIB, 32 * MIB, MemoryError),  # no room once aligned
    ],
)
def test_buffers_that_cannot_be(memory: GuestMemory, size: int, align: int, error: type[Exception]) -> None:
    before = memory.stats()
    with pytest.raises(error):
        memory.alloc(size, align=align)
    assert memory.stats() == before


def test_buffer_is_zeroed_even_when_its_frames_were_used(memory: GuestMemory) -> None:
    buffer = memory.alloc(MIB)
    buffer[:] = 0xAA
    del buffer
    again = memory.alloc(MIB)
    assert not again.any()


def test_contiguous_buffer_is_one_run_and_aligned(memory: GuestMemory) -> None:
    buffer = memory.alloc(3 * PAGE_SIZE + 1, align=BLOCK_SIZE)
    runs = memory.runs(buffer.vaddr, 3 * PAGE_SIZE + 1)
    assert len(runs) == 1
    assert runs[0][0] % BLOCK_SIZE == 0
    assert runs[0][1] == 3 * PAGE_SIZE + 1


def test_scattered_buffer_has_no_page_after_its_neighbour(memory: GuestMemory) -> None:
    buffer = memory.alloc(64 * PAGE_SIZE, scattered=True)
    runs = memory.runs(buffer.vaddr, 64 * PAGE_SIZE)
    assert len(runs) == 64
    buffer[:] = np.arange(64 * PAGE_SIZE, dtype=np.uint32).view(np.uint8)[: 64 * PAGE_SIZE]
    joined = b"".join(bytes(memory.view_guest(gpa, size)) for gpa, size in runs)
    assert joined == buffer.tobytes()


def test_fragmented_memory_still_gives_a_large_buffer(memory: GuestMemory) -> None:
    pages = [memory.alloc(PAGE_SIZE) for _ in range(memory.stats().free_frames)]
    del pages[::2]
    gc.collect()
    big = memory.alloc(4 * MIB)
    big[:] = 7
    assert sum(size for _gpa, size in memory.runs(big.vaddr, big.nbytes)) == 4 * MIB
    assert len(memory.runs(big.vaddr, big.nbytes)) > 1


def test_iova_follows_views_and_leaves_copies(memory: GuestMemory) -> None:
    buffer = memory.alloc(2 * PAGE_SIZE)
    assert buffer.iova is None
    buffer.iova = 0x10000
    view = buffer[100:200]
    assert isinstance(view, DmaBuffer)
    assert (view.iova, view.vaddr) == (0x10064, buffer.vaddr + 100)
    words = buffer.view(np.uint64)[2:]
    assert isinstance(words, DmaBuffer)
    assert words.iova == 0x10010
    assert buffer.copy().iova is None
    with pytest.raises(ValueError, match="a copy"):
        buffer.copy().iova = 1
    buffer.iova = None
    assert view.iova is None


def test_frames_wait_for_the_last_view_and_the_last_pin(memory: GuestMemory) -> None:
    before = memory.stats()
    buffer = memory.alloc(PAGE_SIZE)
    extent = memory.pin(buffer.vaddr, PAGE_SIZE)
    again = memory.pin(buffer.vaddr + 10, 20)
    view = buffer[5:6]
    del buffer
    gc.collect()
    assert memory.stats().extents == 1
    del view
    gc.collect()
    assert memory.stats().extents == 1
    memory.unpin(extent)
    assert memory.stats().extents == 1
    memory.unpin(again)
    assert memory.stats() == before
    with pytest.raises(ValueError, match="not pinned"):
        memory.unpin(extent)


def test_only_dma_memory_can_be_pinned(memory: GuestMemory) -> None:
    one, other = memory.alloc(PAGE_SIZE), memory.alloc(PAGE_SIZE)
    plain = np.zeros(PAGE_SIZE, np.uint8)
    page = memory.guest_page()
    table = memory.alloc(PAGE_SIZE).vaddr  # gone at once
    gc.collect()
    low = min(one.vaddr, other.vaddr)
    for vaddr, size in [
        (plain.__array_interface__["data"][0], PAGE_SIZE),
        (low, 3 * PAGE_SIZE),  # runs over into a neighbour
        (one.vaddr + PAGE_SIZE - 1, 2),
        (one.vaddr, (1 << 64) - 1),
        (0, 1),
        ((1 << 64) - 1, 1),
        (table, PAGE_SIZE),
        (one.vaddr - memory.runs(one.vaddr, 1)[0][0] + page, PAGE_SIZE),  # a table page of the kernel's
    ]:
        with pytest.raises(VfioError) as caught:
            memory.pin(vaddr, size)
        assert caught.value.errno == errno.EFAULT


def test_table_pages_are_zeroed_counted_and_end(memory: GuestMemory) -> None:
    page = memory.guest_page()
    assert page % PAGE_SIZE == 0
    assert page != 0
    memory.view_guest(page, PAGE_SIZE)[:] = b"\xff" * PAGE_SIZE
    memory.free_guest_page(page)
    assert memory.stats().table_pages == 0
    pages = [memory.guest_page() for _ in range(memory.stats().free_frames)]
    assert all(not any(memory.view_guest(gpa, PAGE_SIZE)) for gpa in pages[:8])
    with pytest.raises(MemoryError):
        memory.guest_page()


def test_many_table_pages_keep_their_bytes_in_both_views_when_their_blocks_become_huge(
    memory: GuestMemory,
) -> None:
    pages = [memory.guest_page() for _ in range(2500)]
    for number, gpa in enumerate(pages):
        memory.view_guest(gpa, 8)[:] = number.to_bytes(8, "little")
    for number, gpa in enumerate(pages):
        assert bytes(memory.view_host(memory.gpa_to_hpa(gpa), 8)) == number.to_bytes(8, "little")
    for gpa in pages:
        memory.free_guest_page(gpa)
    again = [memory.guest_page() for _ in range(2500)]
    assert not any(any(memory.view_guest(gpa, 4096)) for gpa in again)
    for gpa in again:
        memory.free_guest_page(gpa)
    assert memory.stats().table_pages == 0


def test_host_pages_are_apart_from_guest_ram() -> None:
    memory = GuestMemory(4 * MIB, host_private=2 * PAGE_SIZE)
    first, second = memory.host_page(), memory.host_page()
    with pytest.raises(MemoryError):
        memory.host_page()
    memory.view_host(second, 4)[:] = b"host"
    memory.free_host_page(second)
    assert memory.host_page() == second
    assert bytes(memory.view_host(second, 4)) == bytes(4)
    assert first != second
    assert all(first != memory.gpa_to_hpa(gpa) for gpa in range(0, memory.size, PAGE_SIZE))


def test_memory_outlives_its_object_while_a_buffer_lives() -> None:
    memory = GuestMemory(4 * MIB)
    buffer = memory.alloc(PAGE_SIZE)
    view = memory.view_guest(0x2000, 4)
    del memory
    gc.collect()
    buffer[:] = 1
    view[:] = b"left"
    assert int(buffer.sum()) == PAGE_SIZE


class Frames(RuleBasedStateMachine):
    """Allocations and pins against a dictionary: no frame is given twice, none is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = GuestMemory(4 * MIB)
        self.frames = self.memory.stats().free_frames
        self.buffers: list[tuple[DmaBuffer, set[int]]] = []
        self.pinned: list[tuple[int, set[int]]] = []

    @rule(pages=st.integers(1, 300), scattered=st.booleans())
    def alloc(self, pages: int, scattered: bool) -> None:
        try:
            buffer = self.memory.alloc(pages * PAGE_SIZE, scattered=scattered)
        except MemoryError:
            assert self.memory.stats().free_frames < pages
            return
        taken = {
            gpa + offset
            for gpa, size in self.memory.runs(buffer.vaddr, buffer.nbytes)
            for offset in range(0, size, PAGE_SIZE)
        }
        assert len(taken) == pages
        self.buffers.append((buffer, taken))

    @precondition(lambda self: self.buffers)
    @rule(data=st.data())
    def pin(self, data: Any) -> None:
        buffer, taken = self.buffers[data.draw(st.integers(0, len(self.buffers) - 1))]
        self.pinned.append((self.memory.pin(buffer.vaddr, buffer.nbytes), taken))

    @precondition(lambda self: self.buffers)
    @rule(data=st.data())
    def drop(self, data: Any) -> None:
        del self.buffers[data.draw(st.integers(0, len(self.buffers) - 1))]

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: Any) -> None:
        extent, _taken = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.memory.unpin(extent)

    @invariant()
    def frames_add_up(self) -> None:
        live: dict[frozenset[int], None] = {}
        for _what, taken in [*self.buffers, *self.pinned]:
            live[frozenset(taken)] = None
        assert len(set().union(*live)) == sum(len(frames) for frames in live)
        assert self.memory.stats().free_frames == self.frames - sum(len(frames) for frames in live)


TestFrames = Frames.TestCase
TestFrames.settings = settings(max_examples=tries(40), stateful_step_count=30, deadline=None)


@settings(max_examples=tries(60), deadline=None)
@given(data=st.data(), pages=st.integers(1, 40), scattered=st.booleans())
def test_runs_of_any_piece(data: Any, pages: int, scattered: bool) -> None:
    memory = GuestMemory(2 * MIB)
    buffer = memory.alloc(pages * PAGE_SIZE, scattered=scattered)
    start = data.draw(st.integers(0, pages * PAGE_SIZE - 1))
    size = data.draw(st.integers(1, pages * PAGE_SIZE - start))
    buffer[:] = np.random.default_rng(pages).integers(0, 256, buffer.size, dtype=np.uint8)
    runs = memory.runs(buffer.vaddr + start, size)
    assert b"".join(bytes(memory.view_guest(*run)) for run in runs) == buffer[start : start + size].tobytes()


def test_where_a_buffer_is_in_the_memfd() -> None:
    """Its pieces, read from the file, are its bytes; without a permutation a contiguous buffer is one piece."""
    for seed, least in ((None, 1), (3, 5)):
        memory = GuestMemory(64 << 20, seed=seed)
        whole, scattered = memory.alloc(10 << 20), memory.alloc(5 * 4096, scattered=True)
        for buffer, fewest in ((whole, least), (scattered, 5)):
            buffer[:] = np.random.default_rng(1).integers(0, 256, buffer.nbytes)
            pieces = memory.file_pieces(buffer.vaddr, buffer.nbytes)
            assert b"".join(os.pread(memory.fd, size, offset) for offset, size in pieces) == buffer.tobytes()
            assert len(pieces) >= fewest
        if seed is None:
            assert len(memory.file_pieces(whole.vaddr, whole.nbytes)) == 1
        with pytest.raises(VfioError):
            memory.file_pieces(whole.vaddr, (10 << 20) + 4096)


def test_the_memfd_cannot_be_truncated() -> None:
    memory = GuestMemory(2 << 20)
    for size in (0, 1 << 20, 4 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
