"""Unmapping: what goes, what stays, and when table pages go back."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from pvfio.errors import PageTableError
from pvfio.memory import GuestMemory
from pvfio.pagetable import Format, PageTable, Perm, TableStats
from tests.pagetable.reference import G1, K4, M2, try_map

pytestmark = pytest.mark.touches_c

Make = Callable[..., PageTable]
Shape = tuple[Format, int]
RW = Perm.READ | Perm.WRITE


def mapped(table: PageTable, *iovas: int) -> list[bool]:
    return [table.iova_to_phys(iova) is not None for iova in iovas]


def test_nothing_there_is_no_bytes(table: PageTable) -> None:
    assert table.unmap_range(0, K4) == 0
    assert table.unmap_range(0, M2) == 0
    table.map_range(M2, 0, K4, RW)
    assert table.unmap_range(M2 + K4, K4) == 0
    assert table.unmap_range(0, M2) == 0
    assert mapped(table, M2) == [True]


@pytest.mark.parametrize("size", [M2, G1])
def test_a_range_that_ends_inside_a_large_leaf_takes_all_of_it(table: PageTable, size: int) -> None:
    table.map_range(0, 0, 2 * size, RW)
    first = table.walk(0)[-1].size
    assert first >= size
    assert table.unmap_range(0, K4) == first
    assert mapped(table, 0, first - 1) == [False, False]


@pytest.mark.parametrize("size", [M2, G1])
def test_a_range_that_begins_inside_a_large_leaf_takes_nothing(make: Make, size: int) -> None:
    table = make(pgsize_bitmap=K4 | M2 | G1)
    table.map_range(size, 0, size, RW)
    table.map_range(2 * size, size, K4, RW)
    for start, length in ((K4, K4), (size - K4, K4), (size // 2, size), (K4, size), (size // 2, size // 2)):
        assert table.unmap_range(size + start, length) == 0
        assert mapped(table, size, 2 * size - 1, 2 * size) == [True, True, True]
    assert table.unmap_range(size, size + K4) == size + K4


def test_a_range_over_pages_and_a_large_leaf_it_ends_in(make: Make) -> None:
    table = make(pgsize_bitmap=K4 | M2)
    table.map_range(M2 - 3 * K4, M2 - 3 * K4, 3 * K4 + 2 * M2, RW)
    assert table.unmap_range(M2 - 2 * K4, 3 * K4) == 2 * K4 + M2
    assert mapped(table, M2 - 3 * K4, M2 - 2 * K4, M2, 2 * M2 - 1, 2 * M2) == [
        True,
        False,
        False,
        False,
        True,
    ]


def test_holes_are_passed_over(make: Make) -> None:
    table = make(pgsize_bitmap=K4 | M2 | G1)
    pages = (0, 5 * K4, M2 + 511 * K4, 7 * M2, G1, 3 * G1 + M2, 64 * G1)
    for iova in pages:
        table.map_range(iova, 0, K4, RW)
    table.map_range(2 * G1, 0, G1, RW)
    table.map_range(G1 + M2, 0, M2, RW)
    assert table.unmap_range(0, 64 * G1) == 6 * K4 + G1 + M2
    assert mapped(table, *pages) == [False] * 6 + [True]
    assert table.unmap_range(0, 64 * G1) == 0


@pytest.mark.parametrize("lg2", [13, 16, 20, 22, 29, 33, 38, 40, 47])
def test_a_replicated_leaf_goes_as_one(memory: GuestMemory, lg2: int) -> None:
    table = PageTable(Format.AMDV1, memory, owner="guest", levels=4)
    size = 1 << lg2
    table.map_range(size, 0, size, RW)
    table.map_range(2 * size, size, K4, RW)
    for start in (K4, size // 2, size - K4):
        assert table.unmap_range(size + start, size) == 0
    assert mapped(table, size, 2 * size - 1) == [True, True]
    assert table.unmap_range(size, K4) == size
    assert mapped(table, *range(size, 2 * size, max(size // 16, K4)), 2 * size) == [False] * min(
        16, size // K4
    ) + [True]
    assert table.unmap_range(2 * size, K4) == K4
    assert table.stats().tables == 1


class TestDetached:
    """Table pages that unmap has emptied."""

    def test_wait_for_the_flush(self, table: PageTable, memory: GuestMemory) -> None:
        before = memory.stats().table_pages
        table.map_range(0, 0, K4, RW)
        pages = {step.table for step in table.walk(0)[1:]}
        table.unmap_range(0, K4)
        assert table.stats() == TableStats(tables=1, detached=len(pages))
        assert memory.stats().table_pages == before + len(pages)
        fresh = [memory.guest_page() for _ in range(16)]
        assert pages.isdisjoint(fresh), "a page that a walker may still read was handed out again"
        for page in fresh:
            memory.free_guest_page(page)
        assert table.release_detached() == len(pages)
        assert table.release_detached() == 0
        assert memory.stats().table_pages == before

    def test_are_not_used_again_before_the_flush(self, table: PageTable) -> None:
        waiting: set[int] = set()
        for _ in range(5):
            table.map_range(0, 0, K4, RW)
            pages = {step.table for step in table.walk(0)[1:]}
            assert waiting.isdisjoint(pages)
            waiting |= pages
            table.unmap_range(0, K4)
        assert table.release_detached() == len(waiting)

    def test_are_empty_and_unhooked(self, table: PageTable, memory: GuestMemory) -> None:
        table.map_range(0, 0, 3 * M2 + K4, RW)
        pages = {step.table for iova in (0, 3 * M2) for step in table.walk(iova)}
        table.unmap_range(0, 3 * M2 + K4)
        for page in pages:
            assert bytes(memory.view_guest(page, K4)) == bytes(K4)

    def test_only_tables_without_any_page_left(self, make: Make) -> None:
        table = make(pgsize_bitmap=K4)
        for page in range(512):
            table.map_range(page * K4, 0, K4, RW)
        tables = table.stats().tables
        assert table.unmap_range(0, 511 * K4) == 511 * K4
        assert table.stats() == TableStats(tables=tables, detached=0)
        assert table.unmap_range(511 * K4, K4) == K4
        assert table.stats() == TableStats(tables=1, detached=tables - 1)

    def test_a_range_over_many_tables_in_one_pass(self, make: Make, memory: GuestMemory) -> None:
        table = make(pgsize_bitmap=K4)
        before = memory.stats().table_pages
        table.map_range(G1 - 5 * M2, 0, 10 * M2, RW)
        table.release_detached()
        tables = table.stats().tables
        assert table.unmap_range(0, 4 * G1) == 10 * M2
        assert table.stats() == TableStats(tables=1, detached=tables - 1)
        table.release_detached()
        assert memory.stats().table_pages == before

    def test_destroy_hands_them_back_too(self, make: Make, memory: GuestMemory) -> None:
        before = memory.stats()
        table = make()
        table.map_range(0, 0, K4, RW)
        table.unmap_range(0, K4)
        table.map_range(G1, 0, K4, RW)
        table.destroy()
        assert memory.stats() == before


def test_a_failed_map_leaves_its_tables_to_the_flush(make: Make, memory: GuestMemory) -> None:
    """They were hooked in, so a walker may have them; no leaf was ever in them."""
    table = make(pgsize_bitmap=K4)
    table.map_range(4 * M2, 0, K4, RW)
    before = table.stats()
    with pytest.raises(PageTableError) as caught:
        table.map_range(0, 0, 4 * M2 + K4, RW)
    assert caught.value.errno == errno.EADDRINUSE
    assert table.stats() == TableStats(tables=before.tables, detached=before.detached + 4)
    assert mapped(table, 0, M2, 4 * M2 - K4, 4 * M2) == [False, False, False, True]
    assert table.release_detached() == before.detached + 4


def exhaust(memory: GuestMemory) -> list[int]:
    pages = []
    while True:
        try:
            pages.append(memory.host_page())
        except MemoryError:
            return pages


def test_without_table_pages_nothing_is_mapped(shape: Shape) -> None:
    """ENOMEM at every single allocation of a map: each time all is as before, and nothing is lost."""
    memory = GuestMemory(2 << 20, host_private=256 << 10)
    table = PageTable(shape[0], memory, owner="host", levels=shape[1], pgsize_bitmap=K4 | M2)
    table.map_range(2 * G1, 0, K4, RW)
    table.release_detached()
    held = exhaust(memory)
    start, size = M2 - K4, 2 * M2 + G1
    failures = 0
    while True:
        before = (table.stats(), memory.stats())
        error = try_map(table, start, start, size)
        if error == 0:
            break
        assert error == errno.ENOMEM
        failures += 1
        assert table.stats().tables == before[0].tables
        table.release_detached()
        assert (table.stats(), memory.stats()) == before
        assert mapped(table, start, M2, start + size - K4, 2 * G1) == [False, False, False, True]
        memory.free_host_page(held.pop())
    assert failures >= 3
    assert table.unmap_range(0, 2 * G1) == size
    table.release_detached()
    assert table.unmap_range(2 * G1, K4) == K4
    table.destroy()
    assert memory.stats().host_pages == len(held)


def test_without_a_page_for_the_root_there_is_no_table() -> None:
    memory = GuestMemory(2 << 20, host_private=256 << 10)
    held = exhaust(memory)
    with pytest.raises(MemoryError):
        PageTable(Format.VTDSS, memory, owner="host", levels=4)
    assert memory.stats().host_pages == len(held)


def test_the_top_does_not_grow_without_pages() -> None:
    memory = GuestMemory(2 << 20, host_private=256 << 10)
    table = PageTable(Format.AMDV1, memory, owner="host", levels=1)
    table.map_range(0, 0, K4, RW)
    held = exhaust(memory)
    root = table.root
    for spare in range(5 + 5):
        before = memory.stats().host_pages
        with pytest.raises(PageTableError) as caught:
            table.map_range(1 << 63, 0, K4, RW)
        assert caught.value.errno == errno.ENOMEM
        if spare < 5:
            assert (table.root, table.levels, table.stats().tables) == (root, 1, 1)
        table.release_detached()
        assert memory.stats().host_pages == before + (5 if spare == 5 else 0)
        assert mapped(table, 0, 1 << 63) == [True, False]
        memory.free_host_page(held.pop())
    table.map_range(1 << 63, 0, K4, RW)
    assert mapped(table, 0, 1 << 63) == [True, True]
