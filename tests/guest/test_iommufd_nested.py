"""Nested page tables: what a user's own stage 1 over an address space says is what devices get, and nothing else.

The checker knows nothing of shadows: it follows a model of the user's table and of the address space, and asks the
IOMMU where a device's access goes.
"""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.guest import hwpt as guest_hwpt
from pvfio.host import IommuConfig
from pvfio.pagetable import Perm
from pvfio.silicon import DmaAborted
from pvfio.vfio import Hwpt, Ioas, Iommufd, IommufdDevice
from pvfio.vfio.ioas import EVERYTHING, address_of, command_of

pytestmark = pytest.mark.touches_c

PAGE = 4096
LARGE = 2 << 20
PRESENT, WRITABLE, USER, PS = 1, 2, 4, 0x80
ALL = PRESENT | WRITABLE | USER
TABLES = 0x4000_0000
"""Where the parent maps the pages of the user's table."""
DATA = 0x8000_0000
"""Where it maps the data."""
NEAR = 0x10_0000_0000
"""An IOVA of the nested address space."""


class UserTable:
    """A page table that its user writes by hand, in memory mapped at ``TABLES``."""

    def __init__(self, memory: Any, levels: int = 4, pages: int = 64) -> None:
        self.buffer = memory.alloc(pages * PAGE)
        self.entries = np.asarray(self.buffer).view(np.uint64).reshape(pages, 512)
        self.levels = levels
        self.root = TABLES
        self._used = 1

    def set(self, iova: int, target: int, *, level: int = 1, flags: int = ALL) -> None:
        """Writes the entry of ``level`` for an IOVA, and the tables above it."""
        page = 0
        for above in range(self.levels, level, -1):
            index = iova >> (12 + 9 * (above - 1)) & 511
            entry = int(self.entries[page, index])
            if not entry & PRESENT or entry & PS:
                entry = TABLES + self._used * PAGE | ALL
                self._used += 1
                self.entries[page, index] = entry
            page = ((entry & ~0xFFF) - TABLES) // PAGE
        self.entries[page, iova >> (12 + 9 * (level - 1)) & 511] = target | flags | (PS if level > 1 else 0)

    def clear(self, iova: int, *, level: int = 1) -> None:
        self.set(iova, 0, level=level, flags=0)


@dataclass
class Bench:
    """A device, attached to a nested page table over an address space with 64 pages at ``DATA``."""

    machine: Any
    iommufd: Iommufd
    device: IommufdDevice
    ioas: Ioas
    parent: Hwpt
    table: UserTable
    data: Any
    nested: Hwpt

    @property
    def bus(self) -> Any:
        return self.machine.functions[0].bus

    def goes(self, iova: int, perm: Perm = Perm.READ) -> int | None:
        """The page of ``data`` a device's access ends in, or None for a fault: by a walk and, reading, by doing it."""
        hpa = self.bus.walk(iova, int(perm)).hpa
        place = None if hpa is None else self.places[hpa & -PAGE]
        if perm == Perm.READ:
            # The IOTLB has its say here.
            try:
                seen = self.bus.read(iova + PAGE - 1, 1)[0]
            except DmaAborted:
                seen = None
            assert seen == place
        return place

    @cached_property
    def places(self) -> dict[int, int]:
        memory = self.machine.memory
        found = {}
        at = 0
        for gpa, size in memory.runs(self.data.vaddr, self.data.nbytes):
            for offset in range(0, size, PAGE):
                found[memory.gpa_to_hpa(gpa + offset)] = at
                at += 1
        return found


async def make_bench(
    emulated: Callable[..., Awaitable[Any]], *, levels: int = 4, scattered: bool = True, **how: Any
) -> Bench:
    machine = await emulated(buses=(1, 1), **how)
    iommufd = await machine.vfio.open_iommufd()
    device = await machine.vfio.bind_device(machine.names[0], iommufd)
    await device.set_bus_master()
    ioas = iommufd.alloc_ioas()
    table = UserTable(machine.memory, levels)
    ioas.map(table.buffer, TABLES)
    data = machine.memory.alloc(64 * PAGE, scattered=scattered)
    data[PAGE - 1 :: PAGE] = np.arange(64)
    ioas.map(data, DATA)
    parent = iommufd.alloc_hwpt(device, ioas, flags=lib.IOMMU_HWPT_ALLOC_NEST_PARENT)
    nested = iommufd.alloc_nested(device, parent, table.root, width=57 if levels == 5 else 48)
    device.attach(nested)
    return Bench(machine, iommufd, device, ioas, parent, table, data, nested)


@pytest.fixture
async def bench(emulated: Callable[..., Awaitable[Any]]) -> AsyncIterator[Bench]:
    made = await make_bench(emulated)
    yield made
    await made.device.close()
    await made.iommufd.close()
    assert made.machine.memory.stats().pins == 0


def refused(number: int) -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: ")


async def test_two_stages_are_one_way(bench: Bench) -> None:
    assert bench.goes(NEAR) is None
    bench.table.set(NEAR, DATA + 5 * PAGE)
    bench.table.set(NEAR + PAGE, DATA + 3 * PAGE, flags=PRESENT | USER)
    bench.nested.invalidate()
    assert (bench.goes(NEAR), bench.goes(NEAR + PAGE), bench.goes(NEAR + 2 * PAGE)) == (5, 3, None)
    assert bench.goes(NEAR, Perm.WRITE) == 5
    assert bench.goes(NEAR + PAGE, Perm.WRITE) is None
    bench.bus.write(NEAR + 100, b"through two stages")
    assert bytes(bench.data[5 * PAGE + 100 :][:18]) == b"through two stages"
    # The parent's own IOVAs are not the nested table's.
    assert bench.goes(DATA) is None


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("platform", ["intel", "amd"])
async def test_levels_and_platforms(
    emulated: Callable[..., Awaitable[Any]], platform: Any, levels: int
) -> None:
    config = IommuConfig(platform=platform, five_level=True, max_iova_width=57)
    bench = await make_bench(emulated, levels=levels, config=config)
    far = 1 << 52 if levels == 5 else 1 << 46
    bench.table.set(far, DATA + 7 * PAGE)
    bench.nested.invalidate(far, 1)
    assert bench.goes(far) == 7
    bench.table.clear(far)
    bench.nested.invalidate(far, 1)
    assert bench.goes(far) is None


WIDTHS = [(39, errno.EINVAL), (52, errno.EINVAL), (57, errno.EINVAL), (0, errno.EINVAL)]


@pytest.mark.parametrize(("width", "number"), WIDTHS)
async def test_widths_that_cannot_be(bench: Bench, width: int, number: int) -> None:
    with refused(number):
        bench.iommufd.alloc_nested(bench.device, bench.parent, TABLES, width=width)


async def test_a_large_page_over_scattered_memory(bench: Bench) -> None:
    bench.ioas.unmap(DATA, 64 * PAGE)
    bench.ioas.map(bench.data, DATA & -LARGE)
    bench.table.set(NEAR, DATA & -LARGE, level=2)
    bench.nested.invalidate(NEAR, 512)
    assert [bench.goes(NEAR + n * PAGE) for n in range(64)] == list(range(64))
    assert bench.goes(NEAR + 64 * PAGE) is None
    # A part of it becomes something else.
    page = bench.table.set
    for n in range(512):
        page(NEAR + n * PAGE, (DATA & -LARGE) + n * PAGE)
    page(NEAR + 9 * PAGE, (DATA & -LARGE) + 11 * PAGE)
    bench.nested.invalidate(NEAR, 512)
    assert [bench.goes(NEAR + n * PAGE) for n in (8, 9, 10)] == [8, 11, 10]


async def test_permissions_are_those_of_every_level(bench: Bench) -> None:
    bench.ioas.map(bench.data[: 4 * PAGE], 0x9000_0000, write=False)
    bench.table.set(NEAR, 0x9000_0000)
    bench.table.set(NEAR + PAGE, DATA, flags=PRESENT | WRITABLE)  # supervisor only
    bench.nested.invalidate()
    assert (bench.goes(NEAR), bench.goes(NEAR, Perm.WRITE)) == (0, None)
    assert bench.goes(NEAR + PAGE) is None
    bench.table.set(NEAR, DATA)
    bench.table.entries[0, NEAR >> 39 & 511] &= ~np.uint64(WRITABLE)
    bench.nested.invalidate()
    assert (bench.goes(NEAR), bench.goes(NEAR, Perm.WRITE)) == (0, None)


async def test_only_what_was_invalidated_must_be_seen(bench: Bench) -> None:
    bench.table.set(NEAR, DATA)
    bench.table.set(NEAR + LARGE, DATA + PAGE)
    bench.nested.invalidate()
    bench.table.clear(NEAR)
    bench.table.clear(NEAR + LARGE)
    bench.nested.invalidate(NEAR, 1)
    assert (bench.goes(NEAR), bench.goes(NEAR + LARGE)) == (None, 1)
    bench.nested.invalidate(NEAR + LARGE, 1)
    assert bench.goes(NEAR + LARGE) is None


async def test_a_page_that_changes_under_an_invalidation_of_its_beginning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old or new, but never nothing: the rest of the page was not asked about, and is not lost."""
    data = bench.machine.memory.alloc(2 * LARGE, align=LARGE)
    data[::LARGE] = (1, 2)
    data[LARGE - 1 :: LARGE] = (1, 2)
    bench.ioas.map(data, 0xC000_0000)
    bench.table.set(NEAR - PAGE, DATA)
    bench.table.set(NEAR, 0xC000_0000, level=2)
    bench.nested.invalidate()
    assert bench.bus.read(NEAR + LARGE - 1, 1) == b"\1"
    bench.table.clear(NEAR - PAGE)
    whole = guest_hwpt.NestedHwpt._pass

    def between(self: Any, which: Any, *rest: Any) -> Any:
        if which is lib.pv_shadow_remove:
            bench.table.set(NEAR, 0xC000_0000 + LARGE, level=2)
        return whole(self, which, *rest)

    monkeypatch.setattr(guest_hwpt.NestedHwpt, "_pass", between)
    bench.nested.invalidate(NEAR - PAGE, 2)
    assert bench.goes(NEAR - PAGE) is None
    assert bench.bus.read(NEAR, 1) == bench.bus.read(NEAR + LARGE - 1, 1) == b"\2"


async def test_the_parent_loses_a_mapping(bench: Bench) -> None:
    """When the unmap returns, no way through the nested table leads to the memory."""
    bench.table.set(NEAR, DATA)
    bench.table.set(NEAR + PAGE, 0x9000_0000)
    bench.nested.invalidate()
    assert (bench.goes(NEAR), bench.goes(NEAR + PAGE)) == (0, None)
    bench.ioas.map(bench.data[:PAGE], 0x9000_0000)
    # What led nowhere leads somewhere: real hardware caches no such thing, and needs no invalidation.
    assert bench.goes(NEAR + PAGE) == 0
    bench.ioas.unmap(DATA, 64 * PAGE)
    assert (bench.goes(NEAR), bench.goes(NEAR + PAGE)) == (None, 0)
    bench.ioas.unmap(TABLES, 64 * PAGE)
    assert (bench.goes(NEAR), bench.goes(NEAR + PAGE)) == (None, None)
    bench.ioas.map(bench.table.buffer, TABLES)
    assert bench.goes(NEAR + PAGE) == 0


async def test_malformed_and_knotted_tables(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    table = bench.table
    table.set(NEAR, DATA + PAGE)
    table.set(NEAR + LARGE, DATA + 2 * PAGE, level=2)  # not aligned: malformed
    table.set(NEAR + (1 << 39), 0x7777_7000, level=4)  # a top-level page does not exist
    table.set(NEAR + (2 << 39), 0x5555_5000, level=3, flags=ALL)
    bench.nested.invalidate()
    assert bench.goes(NEAR) == 1
    assert [bench.goes(NEAR + at) for at in (LARGE, 1 << 39, 2 << 39)] == [None, None, None]
    # The root is its own child: everything leads everywhere.
    monkeypatch.setattr(guest_hwpt, "SHADOW_BUDGET", 1 << 12)
    table.entries[0, :] = TABLES | ALL
    with refused(errno.ENOSPC):
        bench.nested.invalidate()
    assert bench.goes(NEAR) is None
    with refused(errno.ENOSPC):
        bench.iommufd.alloc_nested(bench.device, bench.parent, TABLES)
    # It is not lost: a table that is in order again is shadowed again.
    table.entries[:] = 0
    table.set(NEAR, DATA + 2 * PAGE)
    bench.nested.invalidate()
    assert bench.goes(NEAR) == 2


INVALIDATIONS: list[tuple[str, int, dict[str, int], dict[str, int]]] = [
    ("not nested", errno.EINVAL, {"hwpt_id": 3}, {}),
    ("unknown", errno.ENOENT, {"hwpt_id": 77}, {}),
    ("entries of no bytes", errno.EINVAL, {"entry_len": 0}, {}),
    ("entries nowhere", errno.EINVAL, {"data_uptr": 0}, {}),
    ("entries too short", errno.EINVAL, {"entry_len": 16}, {}),
    ("another type", errno.EINVAL, {"data_type": 1}, {}),
    ("not in memory", errno.EFAULT, {"data_uptr": 8}, {}),
    ("reserved word", errno.EOPNOTSUPP, {"__reserved": 1}, {}),
    ("not aligned", errno.EINVAL, {}, {"addr": 8}),
    ("everything but the first page", errno.EINVAL, {}, {"addr": PAGE, "npages": EVERYTHING}),
    ("no page", errno.EINVAL, {}, {"npages": 0}),
    ("unknown flags", errno.EOPNOTSUPP, {}, {"flags": 2}),
    ("the entry's reserved word", errno.EOPNOTSUPP, {}, {"__reserved": 1}),
]


@pytest.mark.parametrize(
    ("why", "number", "fields", "entry"), INVALIDATIONS, ids=[r[0] for r in INVALIDATIONS]
)
async def test_an_invalidation_that_is_refused(
    bench: Bench, why: str, number: int, fields: dict[str, int], entry: dict[str, int]
) -> None:
    entries = ffi.new("struct iommu_hwpt_vtd_s1_invalidate[2]", [{"npages": 1}, {"npages": 1}])
    for name, value in entry.items():
        setattr(entries[1], name, value)
    whole = {
        "hwpt_id": bench.nested.id,
        "data_uptr": address_of(entries),
        "entry_len": ffi.sizeof(entries[0]),
        "entry_num": 2,
    }
    command = command_of("iommu_hwpt_invalidate", **(whole | fields))
    with refused(number):
        bench.iommufd.file.ioctl(lib.IOMMU_HWPT_INVALIDATE, command)
    # How many were handled before the one that was not.
    assert command.entry_num == (1 if entry else 0)


async def test_invalidating_nothing_asks_for_the_type(bench: Bench) -> None:
    bench.iommufd.file.ioctl(
        lib.IOMMU_HWPT_INVALIDATE, command_of("iommu_hwpt_invalidate", hwpt_id=bench.nested.id)
    )


STAGES: list[tuple[str, int, dict[str, int], dict[str, int]]] = [
    ("SRE", errno.EOPNOTSUPP, {}, {"flags": lib.IOMMU_VTD_S1_SRE}),
    ("reserved word", errno.EOPNOTSUPP, {}, {"__reserved": 1}),
    ("root not aligned", errno.EINVAL, {}, {"pgtbl_addr": 8}),
    ("another type", errno.EOPNOTSUPP, {"data_type": 2}, {}),
    ("too short", errno.EINVAL, {"data_len": 16}, {}),
    ("not in memory", errno.EFAULT, {"data_uptr": 8}, {}),
    ("a nesting parent over it", errno.EOPNOTSUPP, {"flags": lib.IOMMU_HWPT_ALLOC_NEST_PARENT}, {}),
    ("over a nested one", errno.EINVAL, {"pt_id": 4}, {}),
]


@pytest.mark.parametrize(("why", "number", "fields", "stage"), STAGES, ids=[row[0] for row in STAGES])
async def test_a_nested_table_that_is_refused(
    bench: Bench, why: str, number: int, fields: dict[str, int], stage: dict[str, int]
) -> None:
    assert (bench.parent.id, bench.nested.id) == (3, 4)
    data = ffi.new("struct iommu_hwpt_vtd_s1 *", {"pgtbl_addr": TABLES, "addr_width": 48})
    for name, value in stage.items():
        setattr(data, name, value)
    whole = {
        "dev_id": bench.device.id,
        "pt_id": 3,
        "data_type": 1,
        "data_len": 24,
        "data_uptr": address_of(data),
    }
    with refused(number):
        bench.iommufd.file.ioctl(lib.IOMMU_HWPT_ALLOC, command_of("iommu_hwpt_alloc", **(whole | fields)))


async def test_a_parent_that_is_none(bench: Bench) -> None:
    plain = bench.iommufd.alloc_hwpt(bench.device, bench.ioas)
    with refused(errno.EINVAL):
        bench.iommufd.alloc_nested(bench.device, plain, TABLES)


async def test_lifetimes(bench: Bench) -> None:
    with refused(errno.EBUSY):
        bench.nested.destroy()
    bench.device.attach(bench.parent)
    assert bench.goes(DATA) == 0
    with refused(errno.EBUSY):
        bench.parent.destroy()
    bench.nested.destroy()
    bench.device.detach()
    bench.parent.destroy()
    bench.ioas.destroy()


class Model:
    """What the user's table and the address space say, as dictionaries of pages."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.nested: dict[int, tuple[int, bool]] = {}
        self.parent = {DATA + n * PAGE: n for n in range(64)}

    def expected(self, iova: int, write: bool) -> int | None:
        target = self.nested.get(iova)
        if target is None or (write and not target[1]):
            return None
        return self.parent.get(target[0])

    def check(self) -> None:
        for n in range(24):
            iova = NEAR + n * PAGE
            for write in (False, True):
                got = self.bench.goes(iova, Perm.WRITE if write else Perm.READ)
                assert got == self.expected(iova, write), (n, write)


def random_walk(bench: Bench, rng: random.Random, steps: int) -> None:
    model = Model(bench)
    extra = [0x9000_0000 + n * PAGE for n in range(8)]
    for _ in range(steps):
        touched = []
        for _ in range(rng.randrange(1, 6)):
            iova = NEAR + rng.randrange(24) * PAGE
            touched.append(iova)
            if rng.random() < 0.3:
                bench.table.clear(iova)
                model.nested.pop(iova, None)
                continue
            target = rng.choice([DATA + rng.randrange(64) * PAGE, rng.choice(extra)])
            writable = rng.random() < 0.7
            bench.table.set(iova, target, flags=PRESENT | USER | (WRITABLE if writable else 0))
            model.nested[iova] = (target, writable)
        if rng.random() < 0.5:
            bench.nested.invalidate()
        else:
            for iova in touched:
                bench.nested.invalidate(iova, 1)
        model.check()
        where = rng.choice(extra)
        if where in model.parent:
            bench.ioas.unmap(where, PAGE)
            del model.parent[where]
        else:
            n = rng.randrange(64)
            bench.ioas.map(bench.data[n * PAGE : (n + 1) * PAGE], where)
            model.parent[where] = n
        model.check()


@pytest.mark.parametrize("seed", range(4))
async def test_random_tables_against_a_model(bench: Bench, seed: int) -> None:
    random_walk(bench, random.Random(seed), 40)
