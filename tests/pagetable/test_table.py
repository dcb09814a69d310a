"""Mapping and unmapping in tables of every format and depth."""

from __future__ import annotations

import errno
import gc
import itertools
import random
from collections.abc import Callable

import pytest

from pvfio.errors import PageTableError
from pvfio.memory import GuestMemory
from pvfio.pagetable import Format, PageTable, Perm, TableStats, WalkEntry
from tests.pagetable.reference import (
    G1,
    K4,
    M2,
    SHAPES,
    Leaf,
    Model,
    bitmap,
    granted,
    input_bits,
    leaf_entry,
    leaf_level,
    table_entry,
)

pytestmark = pytest.mark.touches_c

Make = Callable[..., PageTable]
Shape = tuple[Format, int]
RW = Perm.READ | Perm.WRITE


def leaves(table: PageTable, iova: int, size: int) -> list[Leaf]:
    """The leaves of a range that is mapped throughout, as walks find them."""
    found, at = [], iova
    while at < iova + size:
        last = table.walk(at)[-1]
        assert last.leaf
        assert not last.reserved
        assert at % last.size == 0, "a leaf begins where the one before it ends"
        found.append(Leaf(at, last.address, last.size, last.perm))
        at += last.size
    return found


def absent(table: PageTable, iova: int) -> bool:
    steps = table.walk(iova)
    return table.iova_to_phys(iova) is None and (not steps or not steps[-1].present)


def refused(number: int, call: Callable[..., object], *arguments: int) -> None:
    with pytest.raises(PageTableError) as caught:
        call(*arguments)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


def test_levels_decode_contiguous_bits_that_do_not_overlap(table: PageTable, shape: Shape) -> None:
    bits = range(12, input_bits(*shape))
    rng = random.Random(1)
    iovas = [1 << bit for bit in bits] + [rng.getrandbits(bits.stop) & ~0xFFF for _ in range(20)]
    for iova in iovas:
        table.map_range(iova, 0x5000, K4, RW)
        steps = table.walk(iova + 0xABC)
        assert [step.level for step in steps] == list(range(table.levels, 0, -1))
        assert sum(step.index << (12 + 9 * (step.level - 1)) for step in steps) == iova
        assert all(step.index < 512 for step in steps)
        assert table.unmap_range(iova, K4) == K4


def test_a_walk_shows_every_entry_from_the_root_down(
    table: PageTable, shape: Shape, memory: GuestMemory
) -> None:
    table.map_range(M2 + 3 * K4, 0x7000, K4, Perm.READ)
    steps = table.walk(M2 + 3 * K4)
    assert steps[0].table == table.root
    for step, below in itertools.pairwise(steps):
        assert step == WalkEntry(
            level=step.level,
            table=step.table,
            index=step.index,
            entry=table_entry(shape[0], step.level, below.table),
            present=True,
            leaf=False,
            perm=RW,
            address=below.table,
            size=1 << (12 + 9 * (step.level - 1)),
            reserved=False,
        )
    entry = leaf_entry(shape[0], 1, K4, 0x7000, Perm.READ)
    assert (steps[-1].entry, steps[-1].index, steps[-1].perm) == (entry, 3, Perm.READ)
    raw = memory.view_guest(steps[-1].table + 8 * steps[-1].index, 8)
    assert int.from_bytes(raw, "little") == entry


def test_every_permission_comes_back(table: PageTable, shape: Shape) -> None:
    for perm in (Perm.READ, Perm.WRITE, RW):
        table.map_range(K4 * perm, 0, K4, perm)
        assert table.walk(K4 * perm)[-1].perm == granted(shape[0], perm)


def test_each_page_size_maps_with_one_leaf(table: PageTable, shape: Shape) -> None:
    for size in (1 << lg2 for lg2 in range(64) if table.pgsize_bitmap >> lg2 & 1):
        for iova in {0, size} if size < 1 << (input_bits(*shape) - 1) else {0}:
            phys = size if size < 1 << 51 else 0
            table.map_range(iova, phys, size, RW)
            assert leaves(table, iova, size) == [Leaf(iova, phys, size, RW)]
            item = 1 << (12 + 9 * (leaf_level(size) - 1))
            steps = [table.walk(iova + at)[-1] for at in range(0, size, item)]
            assert {step.entry for step in steps} == {steps[0].entry}
            assert len({step.index for step in steps}) == len(steps)
            assert table.iova_to_phys(iova + size - 1) == phys + size - 1
            assert table.unmap_range(iova, size) == size
            assert absent(table, iova)
            assert absent(table, iova + size - 1)


def test_the_format_has_all_its_sizes(make: Make, shape: Shape) -> None:
    assert make().pgsize_bitmap == bitmap(shape[0])
    assert make(pgsize_bitmap=K4 | M2 | 1 << 63).pgsize_bitmap == K4 | M2


def test_a_mixed_range_has_the_fewest_leaves(make: Make) -> None:
    table = make(pgsize_bitmap=K4 | M2 | G1)
    start, end = 0x3FE400 << 12, 0x4C0600 << 12
    table.map_range(start, start, end - start, RW)
    assert [leaf.size for leaf in leaves(table, start, end - start)] == [M2] * 14 + [G1] * 3 + [M2] * 3
    assert table.unmap_range(start, end - start) == end - start


@pytest.mark.parametrize("sizes", [K4, M2, K4 | M2, K4 | G1, M2 | G1, K4 | M2 | G1, None])
def test_leaves_are_the_largest_that_the_bitmap_allows(make: Make, shape: Shape, sizes: int | None) -> None:
    table = make(pgsize_bitmap=sizes)
    model = Model(shape[0], table.pgsize_bitmap)
    smallest = table.pgsize_bitmap & -table.pgsize_bitmap
    rng = random.Random(sizes)
    for _ in range(8):
        size = rng.randrange(1, 3 * M2 // smallest + 40) * smallest
        iova = rng.randrange(G1 // smallest) * smallest + rng.choice((0, G1 - G1 // 2))
        phys = rng.choice((iova, iova + rng.choice((smallest, M2)), rng.randrange(1 << 18) * smallest))
        table.map_range(iova, phys, size, RW)
        assert leaves(table, iova, size) == model.plan(iova, phys, size, RW)
        assert table.unmap_range(iova, size) == size
    assert table.stats().tables == 1


def test_boundary_below_four_gib(table: PageTable, shape: Shape) -> None:
    model = Model(shape[0], table.pgsize_bitmap)
    start = 0xFEF80000
    for size in (K4, 0x80000, 0x80000 + M2, (1 << 32) - start, (1 << 32) - start + G1):
        table.map_range(start, start, size, RW)
        assert leaves(table, start, size) == model.plan(start, start, size, RW)
        assert absent(table, start - 1)
        assert absent(table, start + size)
        refused(errno.EADDRINUSE, table.map_range, start + size - K4, 0, K4, RW)
        assert table.unmap_range(start, size) == size
        assert table.stats().tables == 1


def test_the_first_and_the_last_page(make: Make, shape: Shape) -> None:
    table = make()
    last = (1 << input_bits(*shape)) - K4
    for iova in (last, 0):
        table.map_range(iova, (1 << 52) - K4, K4, RW)
        assert table.iova_to_phys(iova + 0xFFF) == (1 << 52) - 1
    assert table.unmap_range(last, K4) == K4
    assert table.iova_to_phys(0) == (1 << 52) - K4
    assert table.unmap_range(0, last) == K4
    assert table.stats().tables == 1


def test_a_table_is_replaced_by_a_large_leaf(make: Make) -> None:
    """The table goes with its last page, before any flush: the large leaf takes its place at once."""
    table = make(pgsize_bitmap=K4 | M2)
    for page in range(512):
        table.map_range(M2 + page * K4, page * K4, K4, RW)
    refused(errno.EADDRINUSE, table.map_range, M2, 0, M2, RW)
    assert table.unmap_range(M2, M2) == M2
    waiting = table.stats().detached
    table.map_range(M2, 0, M2, RW)
    assert leaves(table, M2, M2) == [Leaf(M2, 0, M2, RW)]
    assert table.release_detached() >= waiting > 0
    assert table.unmap_range(M2, M2) == M2


def test_a_large_leaf_is_not_split_by_a_map(table: PageTable) -> None:
    table.map_range(0, 0, M2, RW)
    for iova, size in ((0, K4), (K4, K4), (M2 - K4, K4), (0, M2), (M2 - K4, 2 * K4)):
        refused(errno.EADDRINUSE, table.map_range, iova, 0, size, RW)
    assert leaves(table, 0, M2) == [Leaf(0, 0, M2, RW)]
    assert absent(table, M2)


class TestErrno:
    """The column "page table layer" of the table of mistakes, and which mistake is named first."""

    ROWS: tuple[tuple[str, int, tuple[int, int, int, int]], ...] = (
        ("size 0", errno.EINVAL, (0, 0, 0, RW)),
        ("size 0 before all else", errno.EINVAL, (1, 1, 0, 0)),
        ("wraps", errno.EOVERFLOW, ((1 << 64) - K4, 0, 2 * K4, RW)),
        ("wraps by one page", errno.EOVERFLOW, (2 * K4, 0, (1 << 64) - K4, RW)),
        ("wraps, and no permission", errno.EOVERFLOW, ((1 << 64) - K4, 0, 2 * K4, 0)),
        ("IOVA wider than a word", errno.EOVERFLOW, (1 << 64, 0, K4, RW)),
        ("size wider than a word", errno.EOVERFLOW, (0, 0, 1 << 64, RW)),
        ("IOVA not aligned", errno.ENXIO, (1, 0, K4, RW)),
        ("IOVA aligned to half a page", errno.ENXIO, (K4 // 2, 0, K4, RW)),
        ("physical address not aligned", errno.ENXIO, (0, 0x800, K4, RW)),
        ("size not aligned", errno.ENXIO, (0, 0, K4 + 1, RW)),
        ("size below a page", errno.ENXIO, (0, 0, 1, RW)),
        ("no permission", errno.EINVAL, (0, 0, K4, 0)),
        ("no permission, and not aligned", errno.EINVAL, (1, 0, K4, 0)),
        ("unknown permission", errno.EINVAL, (0, 0, K4, 4 | RW)),
        ("output too wide", errno.ERANGE, (0, 1 << 40, K4, RW)),
        ("output grows too wide", errno.ERANGE, (0, (1 << 40) - K4, 2 * K4, RW)),
        ("output wraps", errno.ERANGE, (0, (1 << 64) - K4, 2 * K4, RW)),
        ("overlaps a page", errno.EADDRINUSE, (G1, 0, K4, RW)),
        ("overlaps with its end", errno.EADDRINUSE, (G1 - M2, 0, M2 + K4, RW)),
        ("overlaps with its start", errno.EADDRINUSE, (G1, 0, M2, RW)),
    )

    @pytest.mark.parametrize(("number", "call"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
    def test_map(self, make: Make, number: int, call: tuple[int, int, int, int]) -> None:
        table = make(output_bits=40)
        table.map_range(G1, 0x9000, K4, RW)
        before = table.stats().tables
        refused(number, table.map_range, *call)
        assert table.stats().tables == before
        assert leaves(table, G1, K4) == [Leaf(G1, 0x9000, K4, RW)]
        assert absent(table, 0)
        assert absent(table, G1 - K4)
        assert absent(table, G1 + K4)

    def test_beyond_the_aperture(self, make: Make, shape: Shape) -> None:
        bits = 60 if shape[0] is Format.AMDV1 else input_bits(*shape)
        for width in {bits, bits - 1}:
            table = make(input_bits=width)
            end = 1 << width
            for iova, size in ((end, K4), (end - K4, 2 * K4), (0, end + K4)):
                refused(errno.ERANGE, table.map_range, iova, 0, size, RW)
                refused(errno.ERANGE, table.unmap_range, iova, size)
            assert table.stats() == TableStats(tables=1, detached=0)
            assert table.walk(end) == []
            assert table.iova_to_phys(end) is None
            table.map_range(end - K4, 0, K4, RW)
            assert table.iova_to_phys(end - 1) == K4 - 1

    @pytest.mark.parametrize(
        ("iova", "size", "number"),
        [
            (0, 0, errno.EINVAL),
            ((1 << 64) - K4, 2 * K4, errno.EOVERFLOW),
            (1 << 64, K4, errno.EOVERFLOW),
            (0, 1 << 64, errno.EOVERFLOW),
            (1, K4, errno.ENXIO),
            (0, K4 - 1, errno.ENXIO),
        ],
    )
    def test_unmap(self, table: PageTable, iova: int, size: int, number: int) -> None:
        table.map_range(0, 0, K4, RW)
        refused(number, table.unmap_range, iova, size)
        assert table.iova_to_phys(0) == 0

    def test_the_smallest_page_size_decides_alignment(self, make: Make) -> None:
        table = make(pgsize_bitmap=M2 | G1)
        refused(errno.ENXIO, table.map_range, K4, 0, M2, RW)
        refused(errno.ENXIO, table.map_range, 0, K4, M2, RW)
        refused(errno.ENXIO, table.map_range, 0, 0, K4, RW)
        refused(errno.ENXIO, table.unmap_range, 0, K4)

    def test_the_error_names_what_was_asked(self, table: PageTable) -> None:
        with pytest.raises(PageTableError, match=r"map iova 0x1000 length 0x1001: ENXIO") as caught:
            table.map_range(0x1000, 0, 0x1001, RW)
        assert (caught.value.iova, caught.value.length, caught.value.operation) == (0x1000, 0x1001, "map")


BAD_CONFIGURATIONS: dict[str, tuple[Format, dict[str, int]]] = {
    "x86_64 of 3 levels": (Format.X86_64, {"levels": 3}),
    "x86_64 of 6 levels": (Format.X86_64, {"levels": 6}),
    "vtdss of 2 levels": (Format.VTDSS, {"levels": 2}),
    "vtdss of 6 levels": (Format.VTDSS, {"levels": 6}),
    "amdv1 of no level": (Format.AMDV1, {"levels": 0}),
    "amdv1 of 7 levels": (Format.AMDV1, {"levels": 7}),
    "negative levels": (Format.AMDV1, {"levels": -1}),
    "2**32 - 1 levels": (Format.VTDSS, {"levels": (1 << 32) - 1}),
    "more input bits than the levels reach": (Format.X86_64, {"levels": 4, "input_bits": 49}),
    "fewer input bits than the levels": (Format.AMDV1, {"levels": 4, "input_bits": 39}),
    "input of 65 bits": (Format.AMDV1, {"levels": 4, "input_bits": 65}),
    "input of one page": (Format.AMDV1, {"levels": 1, "input_bits": 12}),
    "output of 53 bits": (Format.X86_64, {"levels": 4, "output_bits": 53}),
    "output of one page": (Format.X86_64, {"levels": 4, "output_bits": 12}),
    "no output bits": (Format.X86_64, {"levels": 4, "output_bits": 0}),
    "no input bits": (Format.X86_64, {"levels": 4, "input_bits": 0}),
    "no page sizes": (Format.VTDSS, {"levels": 4, "pgsize_bitmap": 0}),
    "no page size of the format": (Format.VTDSS, {"levels": 4, "pgsize_bitmap": 1 << 16}),
    "512G": (Format.AMDV1, {"levels": 4, "pgsize_bitmap": 1 << 39}),
    "page larger than the input": (Format.AMDV1, {"levels": 1, "input_bits": 20, "pgsize_bitmap": M2}),
    "page larger than the output": (Format.X86_64, {"levels": 4, "output_bits": 29, "pgsize_bitmap": G1}),
}


@pytest.mark.parametrize("name", BAD_CONFIGURATIONS)
def test_tables_that_cannot_be(memory: GuestMemory, name: str) -> None:
    fmt, options = BAD_CONFIGURATIONS[name]
    before = memory.stats()
    with pytest.raises(ValueError):
        PageTable(fmt, memory, owner="guest", **options)
    assert memory.stats() == before


def test_an_owner_is_guest_or_host(memory: GuestMemory) -> None:
    with pytest.raises(ValueError, match="owner"):
        PageTable(Format.X86_64, memory, owner="device", levels=4)  # type: ignore[arg-type]


def test_pages_come_from_their_owner_and_go_back_without_destroy(memory: GuestMemory) -> None:
    before = memory.stats()
    guest = PageTable(Format.X86_64, memory, owner="guest", levels=4)
    host = PageTable(Format.AMDV1, memory, owner="host", levels=4)
    for table in (guest, host):
        table.map_range(0, 0, K4, RW)
        table.unmap_range(0, K4)
        table.map_range(G1, 0, K4, RW)
    middle = memory.stats()
    assert middle.table_pages - before.table_pages == 1 + 2 * 3
    assert middle.host_pages - before.host_pages == 1 + 2 * 3
    del guest, host, table
    gc.collect()
    assert memory.stats() == before


def test_a_destroyed_table_refuses(memory: GuestMemory) -> None:
    table = PageTable(Format.X86_64, memory, owner="guest", levels=4)
    table.destroy()
    table.destroy()
    with pytest.raises(TypeError):
        table.map_range(0, 0, K4, RW)
    with pytest.raises(TypeError):
        table.walk(0)


@pytest.mark.parametrize(("fmt", "levels"), SHAPES)
def test_levels_that_do_not_grow_stay(memory: GuestMemory, fmt: Format, levels: int) -> None:
    table = PageTable(fmt, memory, owner="guest", levels=levels)
    root = table.root
    table.map_range(0, 0, K4, RW)
    assert (table.root, table.levels) == (root, levels)


class TestGrowingTop:
    """amdv1: the top rises as far as an address needs, and what was mapped stays where it is."""

    @pytest.fixture
    def shape(self) -> Shape:
        return (Format.AMDV1, 1)

    def test_one_level_at_a_time(self, make: Make) -> None:
        table = make(pgsize_bitmap=K4)
        table.map_range(0, 0x1000, K4, RW)
        for level in range(2, 7):
            below = table.root
            iova = 1 << (12 + 9 * (level - 1))
            table.map_range(iova, iova & 0xFFFFFFFFF000, K4, RW)
            assert table.levels == level
            assert table.root != below
            first = table.walk(0)[0]
            assert (first.address, first.level) == (below, level), "the old top stays valid below the new one"
            assert table.iova_to_phys(0) == 0x1000
        for level in range(2, 7):
            assert table.unmap_range(1 << (12 + 9 * (level - 1)), K4) == K4
        assert table.iova_to_phys(0) == 0x1000
        assert table.unmap_range(0, K4) == K4
        assert (table.levels, table.stats().tables) == (6, 1)

    def test_all_at_once(self, make: Make) -> None:
        table = make()
        table.map_range(K4, 0x1000, K4, RW)
        table.map_range((1 << 64) - K4, 0x2000, K4, RW)
        assert table.levels == 6
        assert table.walk((1 << 64) - 1)[0].index == 127
        assert [table.iova_to_phys(iova) for iova in (K4, (1 << 64) - 1)] == [0x1000, 0x2FFF]
        assert table.unmap_range(0, (1 << 64) - K4) == K4
        assert table.iova_to_phys((1 << 64) - 1) == 0x2FFF

    def test_an_empty_top_is_exchanged_and_waits_for_the_flush(self, make: Make) -> None:
        table = make()
        table.map_range(G1, 0, K4, RW)
        assert (table.levels, table.stats()) == (3, TableStats(tables=3, detached=1))
        assert table.release_detached() == 1

    def test_a_page_as_large_as_the_table_needs_one_level_more(self, make: Make) -> None:
        table = make()
        table.map_range(0, 0, M2, RW)
        assert table.levels == 2
        assert leaves(table, 0, M2) == [Leaf(0, 0, M2, RW)]

    def test_addresses_above_the_top_are_not_mapped(self, make: Make) -> None:
        table = make()
        table.map_range(0, 0, K4, RW)
        assert table.iova_to_phys(M2) is None
        assert table.walk(M2) == []
        assert table.unmap_range(M2, G1) == 0
        assert table.unmap_range(0, G1) == K4


def test_512g_of_amdv1_is_two_pages(memory: GuestMemory) -> None:
    table = PageTable(Format.AMDV1, memory, owner="guest", levels=6)
    table.map_range(1 << 39, 1 << 39, 1 << 39, RW)
    assert [leaf.size for leaf in leaves(table, 1 << 39, 1 << 39)] == [1 << 38, 1 << 38]
