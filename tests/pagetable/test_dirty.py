"""Dirty and accessed bits, splitting and merging, against a reference that keeps a mark beside every leaf."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from pvfio.errors import PageTableError
from pvfio.memory import GuestMemory
from pvfio.pagetable import Format, PageTable, Perm
from tests.pagetable.reference import G1, K4, M2, SHAPES, Leaf, Model, bitmap, input_bits, leaf_level, try_map

pytestmark = pytest.mark.touches_c

RW = Perm.READ | Perm.WRITE
# Accessed, dirty: Intel VT-d 9.8, AMD IOMMU 2.2.3.
BITS = {
    Format.VTDSS: {"accessed": 1 << 8, "dirty": 1 << 9},
    Format.AMDV1: {"accessed": 1 << 5, "dirty": 1 << 6},
}
TRACKING = [shape for shape in SHAPES if shape[0] in BITS]


def mark(table: PageTable, iova: int, what: str) -> None:
    """What a walker does to the entry it reads for ``iova``."""
    leaf = table.walk(iova)[-1]
    assert leaf.leaf
    view = table.memory.view_guest(leaf.table + 8 * leaf.index, 8)
    entry = int.from_bytes(view, "little") | BITS[table.format][what]
    view[:] = entry.to_bytes(8, "little")


class MarkedModel(Model):
    """The reference: leaves, and by the IOVA of each leaf the marks it has."""

    def __init__(self, fmt: Format, sizes: int) -> None:
        super().__init__(fmt, sizes)
        self.marks: dict[str, set[int]] = {"accessed": set(), "dirty": set()}

    def pages(self, what: str, iova: int, size: int) -> NDArray[np.bool_]:
        """By brute force: each page asks for its leaf."""
        found = [self.find(at) for at in range(iova, iova + size, K4)]
        return np.array([leaf is not None and leaf.iova in self.marks[what] for leaf in found], np.bool_)

    def clear(self, what: str, iova: int, size: int) -> None:
        for leaf in self.within(iova, size):
            if iova <= leaf.iova and leaf.iova + leaf.size <= iova + size:
                self.marks[what].discard(leaf.iova)

    def within(self, iova: int, size: int) -> list[Leaf]:
        """Leaves that meet the range."""
        return [
            leaf for leaf in self.leaves.values() if leaf.iova < iova + size and leaf.iova + leaf.size > iova
        ]

    def unmap(self, iova: int, size: int) -> int:
        done = super().unmap(iova, size)
        for marks in self.marks.values():
            marks.intersection_update(self.leaves)
        return done

    def replace(self, old: list[Leaf], new: list[Leaf]) -> None:
        inherited = [what for what, marks in self.marks.items() if any(leaf.iova in marks for leaf in old)]
        for leaf in old:
            del self.leaves[leaf.iova]
        self.leaves.update((leaf.iova, leaf) for leaf in new)
        self.order = sorted(self.leaves)
        for what, marks in self.marks.items():
            marks -= {leaf.iova for leaf in old}
            if what in inherited:
                marks |= {leaf.iova for leaf in new}

    def split(self, iova: int, size: int) -> None:
        """A large leaf becomes leaves of the next level's own size, down to 4 KiB where the range is."""
        while large := [leaf for leaf in self.within(iova, size) if leaf.size > K4]:
            for leaf in large:
                level = leaf_level(leaf.size)
                step = K4 if level == 1 else 1 << (12 + 9 * (level - 2))
                parts = range(0, leaf.size, step)
                self.replace([leaf], [Leaf(leaf.iova + n, leaf.phys + n, step, leaf.perm) for n in parts])

    def merge(self, iova: int, size: int) -> int:
        merged = 0
        for large, small in ((M2, K4), (G1, M2)):
            if not self.sizes & large:
                continue
            first = -(-iova // large) * large
            for at in range(first, (iova + size) // large * large, large):
                head = self.leaves.get(at)
                if head is None or head.phys % large or head.size != small:
                    continue
                row = [replace(head, iova=at + n, phys=head.phys + n) for n in range(0, large, small)]
                if all(self.leaves.get(leaf.iova) == leaf for leaf in row):
                    self.replace(row, [replace(head, size=large)])
                    merged += 1
        return merged


def read(table: PageTable, what: str, iova: int, size: int, *, clear: bool) -> NDArray[np.bool_]:
    call = table.read_clear_dirty if what == "dirty" else table.read_clear_accessed
    return call(iova, size, clear=clear)


# Where a rule works: 2 MiB block, page in it, pages. Few places, so that rules meet.
BLOCK = st.integers(0, 1)
PAGE = st.sampled_from((0, 0, 0, 1, 16, 256))
SIZE = st.sampled_from((1, 16, 100, 512, 512, 513, 1024))
WHAT = st.sampled_from(("accessed", "dirty"))


class DirtyMachine(RuleBasedStateMachine):
    """One table of a format whose leaves walkers mark, beside the reference."""

    memory = GuestMemory(32 << 20)

    @initialize(
        shape=st.sampled_from(TRACKING),
        sizes=st.sampled_from((K4, K4 | M2, (1 << 24) - K4, (1 << 24) - K4)),
        base=st.sampled_from((0, G1, 1 << 40, (1 << 64) - G1)),
    )
    def create(self, shape: tuple[Format, int], sizes: int, base: int) -> None:
        self.pages = self.memory.stats().table_pages
        self.table = PageTable(shape[0], self.memory, owner="guest", levels=shape[1], pgsize_bitmap=sizes)
        self.model = MarkedModel(shape[0], sizes & bitmap(shape[0]))
        self.base = min(base, (1 << input_bits(*shape)) - G1)
        self.map(0, 0, 1024, 0)

    def place(self, block: int, page: int) -> int:
        return self.base + block * M2 + page * K4

    @rule(block=BLOCK, page=PAGE, size=SIZE, skew=st.sampled_from((0, 0, 0, 1, 512)))
    def map(self, block: int, page: int, size: int, skew: int) -> None:
        iova = self.place(block, page)
        phys = (iova + skew * K4) % (1 << 51)
        if self.model.map(iova, phys, size * K4, RW):
            self.table.map_range(iova, phys, size * K4, RW)

    @rule(block=BLOCK, page=PAGE, size=SIZE, dirty=st.booleans())
    def unmap(self, block: int, page: int, size: int, dirty: bool) -> None:
        iova = self.place(block, page)
        if not dirty:
            assert self.table.unmap_range(iova, size * K4) == self.model.unmap(iova, size * K4)
            return
        before = self.model.pages("dirty", iova, size * K4)
        gone, found = self.table.unmap_range_dirty(iova, size * K4)
        assert gone == self.model.unmap(iova, size * K4)
        assert found.tolist() == (before.tolist() if gone else [False] * size)

    @rule(
        block=BLOCK,
        page=PAGE,
        size=SIZE,
        what=WHAT,
        count=st.integers(1, 8),
        seed=st.integers(0, 99),
    )
    def walkers_mark(self, block: int, page: int, size: int, what: str, count: int, seed: int) -> None:
        iova, rng = self.place(block, page), random.Random(seed)
        for _ in range(count):
            at = iova + rng.randrange(size) * K4
            leaf = self.model.find(at)
            if leaf is not None:
                mark(self.table, at, what)
                self.model.marks[what].add(leaf.iova)

    @rule(block=BLOCK, page=PAGE, size=SIZE, what=WHAT, clear=st.booleans())
    def read(self, block: int, page: int, size: int, what: str, clear: bool) -> None:
        iova = self.place(block, page)
        found = read(self.table, what, iova, size * K4, clear=clear)
        assert found.tolist() == self.model.pages(what, iova, size * K4).tolist()
        if clear:
            self.model.clear(what, iova, size * K4)

    @rule(block=BLOCK, page=PAGE, size=SIZE)
    def split(self, block: int, page: int, size: int) -> None:
        iova = self.place(block, page)
        self.table.split_range(iova, size * K4)
        self.model.split(iova, size * K4)

    @rule(block=BLOCK, page=PAGE, size=st.sampled_from((511, 512, 1024, 2048)))
    def merge(self, block: int, page: int, size: int) -> None:
        iova = self.place(block, page)
        assert self.table.merge_range(iova, size * K4) == self.model.merge(iova, size * K4)

    @rule()
    def flush(self) -> None:
        self.table.release_detached()

    @invariant()
    def marks_and_tables_agree(self) -> None:
        if not hasattr(self, "table"):
            return
        stats = self.table.stats()
        assert stats.tables == self.model.tables(self.table.levels)
        assert self.memory.stats().table_pages == self.pages + stats.tables + stats.detached
        for what in ("accessed", "dirty"):
            found = read(self.table, what, self.base, 6 * M2, clear=False)
            assert found.sum() * K4 == sum(self.model.leaves[iova].size for iova in self.model.marks[what])

    def teardown(self) -> None:
        if hasattr(self, "table"):
            for leaf in self.model.leaves.values():
                assert self.table.iova_to_phys(leaf.iova + leaf.size - 1) == leaf.phys + leaf.size - 1
            self.table.destroy()
            assert self.memory.stats().table_pages == self.pages


TestDirtyMachine = DirtyMachine.TestCase
TestDirtyMachine.settings = settings(stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("levels", [4, 5])
def test_x86_64_says_that_it_cannot(memory: GuestMemory, levels: int) -> None:
    """Its leaves are written dirty, so the bit tells nothing."""
    table = PageTable(Format.X86_64, memory, owner="guest", levels=levels)
    table.map_range(0, 0, M2, RW)
    for call in (table.read_clear_dirty, table.read_clear_accessed, table.unmap_range_dirty):
        with pytest.raises(PageTableError) as caught:
            call(0, M2)
        assert caught.value.errno == errno.EOPNOTSUPP
    assert table.iova_to_phys(K4) == K4


MISTAKES = {
    "size 0": (0, 0, errno.EINVAL),
    "wraps": ((1 << 64) - K4, 2 * K4, errno.EOVERFLOW),
    "below 0": (-K4, K4, errno.EOVERFLOW),
    "iova unaligned": (1, K4, errno.ENXIO),
    "size unaligned": (0, K4 + 1, errno.ENXIO),
    "too wide": (1 << 48, K4, errno.ERANGE),
    "its end too wide": ((1 << 48) - K4, 2 * K4, errno.ERANGE),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_change_nothing(memory: GuestMemory, mistake: str) -> None:
    iova, size, number = MISTAKES[mistake]
    table = PageTable(Format.VTDSS, memory, owner="guest", levels=4)
    table.map_range(0, 0, M2, RW)
    mark(table, 0, "dirty")
    calls: tuple[Callable[[int, int], object], ...] = (
        table.read_clear_dirty,
        table.read_clear_accessed,
        table.unmap_range_dirty,
        table.split_range,
        table.merge_range,
    )
    for call in calls:
        with pytest.raises(PageTableError) as caught:
            call(iova, size)
        assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]
    assert table.walk(0)[-1].size == M2
    assert table.read_clear_dirty(0, M2).all()


def test_a_bitmap_of_the_whole_address_space_is_refused(memory: GuestMemory) -> None:
    table = PageTable(Format.AMDV1, memory, owner="guest", levels=6)
    with pytest.raises(MemoryError):
        table.read_clear_dirty(0, 1 << 60)


def test_a_table_without_4k_pages_is_not_split(memory: GuestMemory) -> None:
    table = PageTable(Format.VTDSS, memory, owner="guest", levels=4, pgsize_bitmap=M2)
    table.map_range(0, 0, M2, RW)
    with pytest.raises(PageTableError) as caught:
        table.split_range(0, M2)
    assert caught.value.errno == errno.EINVAL


def test_a_1g_leaf_splits_where_it_is_asked_to_and_merges_whole(
    make: Callable[..., PageTable], shape: tuple[Format, int]
) -> None:
    table = make(pgsize_bitmap=K4 | M2 | G1)
    table.map_range(G1, G1, G1, RW)
    table.release_detached()  # amdv1 may have grown
    levels_above = table.levels - 3
    table.split_range(G1 + 5 * M2 + K4, K4)
    assert table.walk(G1 + 4 * M2)[-1].size == M2
    assert table.walk(G1 + 5 * M2)[-1].size == K4
    assert table.stats().tables == 1 + levels_above + 2
    for at in (0, 5 * M2 + 3 * K4, 6 * M2 - 1, G1 - 1):
        assert table.iova_to_phys(G1 + at) == G1 + at
    assert table.merge_range(G1, G1 - K4) == 1, "not what is only partly in the range"
    assert table.walk(G1 + 5 * M2)[-1].size == M2
    assert table.merge_range(G1, G1) == 1
    assert table.walk(G1)[-1].size == G1
    assert table.stats().detached == 2


@pytest.mark.parametrize("hole", ["missing", "elsewhere", "permission"])
def test_what_is_not_one_piece_is_not_merged(memory: GuestMemory, hole: str) -> None:
    table = PageTable(Format.AMDV1, memory, owner="guest", levels=3, pgsize_bitmap=K4 | M2)
    table.map_range(0, M2, M2, RW)
    table.split_range(0, M2)
    table.unmap_range(7 * K4, K4)
    if hole != "missing":
        table.map_range(
            7 * K4, M2 + (8 if hole == "elsewhere" else 7) * K4, K4, RW if hole == "elsewhere" else Perm.READ
        )
    assert table.merge_range(0, M2) == 0
    assert table.walk(0)[-1].size == K4


def test_no_memory_leaves_what_was_split(memory: GuestMemory) -> None:
    table = PageTable(Format.VTDSS, memory, owner="host", levels=4)
    table.map_range(0, 0, 8 * M2, RW)
    taken = []
    while True:
        try:
            taken.append(memory.host_page())
        except MemoryError:
            break
    for page in taken[:3]:
        memory.free_host_page(page)
    with pytest.raises(PageTableError) as caught:
        table.split_range(0, 8 * M2)
    assert caught.value.errno == errno.ENOMEM
    assert [table.walk(n * M2)[-1].size for n in range(8)] == [K4] * 3 + [M2] * 5
    assert all(table.iova_to_phys(at) == at for at in range(0, 8 * M2, 16 * K4))
    assert table.merge_range(0, 8 * M2) == 3
    assert table.release_detached() == 3
    for page in taken[3:]:
        memory.free_host_page(page)


@pytest.mark.parametrize("fmt", [Format.VTDSS, Format.AMDV1])
def test_a_device_that_scribbles_over_the_tables_breaks_nothing(fmt: Format) -> None:
    memory = GuestMemory(4 << 20)
    rng = random.Random(3)
    before = memory.stats()
    for _ in range(20):
        table = PageTable(fmt, memory, owner="guest", levels=4)
        for _ in range(40):
            iova = rng.choice((0, M2, G1)) + rng.randrange(600) * K4
            size = rng.choice((K4, 3 * K4, M2, 3 * M2))
            calls: list[Callable[[int, int], object]] = [
                table.read_clear_dirty,
                table.unmap_range_dirty,
                table.merge_range,
                table.unmap_range,
            ]
            action = rng.randrange(7)
            if action < len(calls):
                calls[action](iova, size)
            elif action == 4:
                try_map(table, iova, iova % (1 << 40), size)
            elif action == 5:
                with contextlib.suppress(PageTableError):  # no memory
                    table.split_range(iova, size)
            else:
                pages = {table.root} | {step.table for step in table.walk(iova)}
                page = memory.view_guest(rng.choice([p for p in sorted(pages) if p < 4 << 20]), K4)
                at = rng.choice((0, 1, 2, rng.randrange(512))) * 8
                page[at : at + 8] = rng.randbytes(8) if rng.random() < 0.7 else bytes(8)
        table.destroy()
    assert memory.stats() == before
