"""Random histories of a table against the model, and against a device that scribbles over it."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pvfio.errors import PageTableError
from pvfio.memory import GuestMemory
from pvfio.pagetable import Format, PageTable, Perm
from tests.pagetable.reference import G1, K4, M2, SHAPES, Model, bitmap, input_bits, try_map
from tests.profiles import PROFILE, tries

pytestmark = pytest.mark.touches_c

RW = Perm.READ | Perm.WRITE
BASES = (0, M2, 3 * M2, G1, 2 * G1, 0xFEF80000, (1 << 39) - G1, 1 << 47, (1 << 57) - M2, (1 << 64) - G1)
PERMS = (Perm.READ, Perm.WRITE, RW)


def check_page(table: PageTable, model: Model, iova: int) -> None:
    leaf = model.find(iova)
    if leaf is None:
        assert table.iova_to_phys(iova) is None
        return
    assert table.iova_to_phys(iova) == leaf.phys + (iova - leaf.iova)
    last = table.walk(iova)[-1]
    assert (last.address, last.size, last.perm) == (leaf.phys, leaf.size, leaf.perm)


def apply_map(table: PageTable, model: Model, iova: int, phys: int, size: int, perm: int) -> None:
    if model.map(iova, phys, size, perm):
        table.map_range(iova, phys, size, perm)
        return
    with pytest.raises(PageTableError) as caught:
        table.map_range(iova, phys, size, perm)
    assert caught.value.errno == errno.EADDRINUSE


def bases(fmt: Format, levels: int) -> list[int]:
    return [base for base in BASES if base + G1 <= 1 << input_bits(fmt, levels)]


@pytest.mark.parametrize("sizes", [K4, K4 | M2 | G1, None], ids=["4K", "4K-2M-1G", "all"])
def test_1000_random_maps_and_unmaps(
    make: Callable[..., PageTable], shape: tuple[Format, int], memory: GuestMemory, sizes: int | None
) -> None:
    rng = random.Random(sizes)
    before = memory.stats().table_pages
    sizes = sizes or bitmap(shape[0])
    table, model = make(pgsize_bitmap=sizes), Model(shape[0], sizes)
    places = bases(*shape)
    # Under sanitizers churn.c does a million.
    for step in range(250 if PROFILE == "sanitized" else 1000):
        iova = rng.choice(places) + rng.choice(
            (0, M2, rng.randrange(1024) * K4, rng.randrange(G1 // M2) * M2)
        )
        size = (
            min(rng.choice((1, 1, 2, 3, 16, 64, 512, rng.randrange(1, 1100))), 40 if sizes == K4 else 1100)
            * K4
        )
        size = min(size, (1 << input_bits(*shape)) - iova)
        phys = rng.choice((iova % (1 << 50), rng.randrange(1 << 30) * K4))
        if rng.random() < 0.55:
            apply_map(table, model, iova, phys, size, rng.choice(PERMS))
        else:
            assert table.unmap_range(iova, size) == model.unmap(iova, size)
        check_page(table, model, iova)
        check_page(table, model, iova + size - K4)
        if step % 50 == 0:
            assert table.stats().tables == model.tables(table.levels)
        if rng.random() < 0.1:
            table.release_detached()
    for leaf in list(model.leaves.values()):
        check_page(table, model, leaf.iova + leaf.size - 1)
        assert table.unmap_range(leaf.iova, leaf.size) == leaf.size
    table.release_detached()
    assert table.stats().tables == 1
    assert memory.stats().table_pages == before + 1


# Where a rule works: base, 2 MiB block, page in it, pages.
BASE, BLOCK = st.integers(0, 2), st.integers(0, 2)
PAGE = st.sampled_from((0, 0, 1, 16, 256, 511))
SIZE = st.sampled_from((1, 1, 2, 3, 16, 100, 511, 512, 513, 1024))


class TableMachine(RuleBasedStateMachine):
    """One table of any shape beside the model."""

    memory = GuestMemory(32 << 20)

    @initialize(
        shape=st.sampled_from(SHAPES),
        sizes=st.sampled_from((K4, K4 | M2, K4 | G1, K4 | M2 | G1, (1 << 52) - K4)),
    )
    def create(self, shape: tuple[Format, int], sizes: int) -> None:
        self.shape = shape
        self.pages = self.memory.stats().table_pages
        self.table = PageTable(shape[0], self.memory, owner="guest", levels=shape[1], pgsize_bitmap=sizes)
        self.model = Model(shape[0], sizes & bitmap(shape[0]))
        self.bases = bases(*shape)

    def place(self, base: int, block: int, page: int) -> int:
        return self.bases[base % len(self.bases)] + block * M2 + page * K4

    @rule(
        base=BASE,
        block=BLOCK,
        page=PAGE,
        size=SIZE,
        skew=st.sampled_from((0, 0, 1, 16, 512)),
        perm=st.sampled_from(PERMS),
    )
    def map(self, base: int, block: int, page: int, size: int, skew: int, perm: Perm) -> None:
        iova = self.place(base, block, page)
        apply_map(self.table, self.model, iova, (iova + skew * K4) % (1 << 51), size * K4, perm)

    @rule(base=BASE, block=BLOCK, page=PAGE, size=SIZE)
    def unmap(self, base: int, block: int, page: int, size: int) -> None:
        iova = self.place(base, block, page)
        assert self.table.unmap_range(iova, size * K4) == self.model.unmap(iova, size * K4)

    @rule()
    def flush(self) -> None:
        waiting = self.table.stats().detached
        assert self.table.release_detached() == waiting

    @rule(base=BASE, block=BLOCK, page=PAGE)
    def look(self, base: int, block: int, page: int) -> None:
        check_page(self.table, self.model, self.place(base, block, page))

    @invariant()
    def no_table_too_many(self) -> None:
        if hasattr(self, "table"):
            stats = self.table.stats()
            assert stats.tables == self.model.tables(self.table.levels)
            assert self.memory.stats().table_pages == self.pages + stats.tables + stats.detached

    def teardown(self) -> None:
        if hasattr(self, "table"):
            for leaf in self.model.leaves.values():
                check_page(self.table, self.model, leaf.iova)
            self.table.destroy()
            assert self.memory.stats().table_pages == self.pages


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=tries(60), stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("fmt", Format)
@settings(max_examples=tries(40), deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_a_device_that_scribbles_over_the_tables_breaks_no_software(fmt: Format, seed: int) -> None:
    """Entries in guest memory become anything: calls answer or refuse, and every page still comes back."""
    memory = GuestMemory(4 << 20)
    rng = random.Random(seed)
    before = memory.stats()
    table = PageTable(fmt, memory, owner="guest", levels=4)
    pages = {table.root}
    for _ in range(60):
        iova = rng.choice((0, M2, G1, 1 << 40)) + rng.randrange(600) * K4
        size = rng.choice((K4, 3 * K4, M2, 3 * M2))
        action = rng.randrange(4)
        if action == 0:
            assert try_map(table, iova, iova % (1 << 40), size) in (0, errno.EADDRINUSE, errno.ENOMEM)
        elif action == 1:
            table.unmap_range(iova, size)
        elif action == 2:
            page = memory.view_guest(rng.choice(sorted(pages)), K4)
            at = rng.choice((0, 1, 2, rng.randrange(512))) * 8
            page[at : at + 8] = rng.randbytes(8) if rng.random() < 0.7 else bytes(8)
        else:
            table.iova_to_phys(iova)
            pages = {table.root} | {step.table for step in table.walk(iova)}
            pages = {page for page in pages if page < 4 << 20}
    table.destroy()
    assert memory.stats() == before
