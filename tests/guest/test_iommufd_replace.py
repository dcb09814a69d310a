"""A device that never stops changes its address space: no write meets a gap, and none goes through the old one
afterwards.

The engine writes numbered words into one window of IOVAs all the time. Address spaces and page tables map the
window to memory of their own, so where a word is says through which one it went; the log says that none was refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import trio

from pvfio import Machine, MachineConfig
from pvfio.abi import lib
from pvfio.devices.rogue import RogueDevice
from pvfio.errors import VfioError
from pvfio.guest.hwpt import NestedHwpt
from pvfio.guest.iommu_group import IommuGroup
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec
from pvfio.vfio import DmaBuffer, Hwpt, Ioas, Iommufd, IommufdDevice
from tests.guest.ownership import Watch

pytestmark = pytest.mark.touches_c

PAGE = 4096
SIZE = 1 << 18
WINDOW = 1 << 40
TABLES = 0x4000_0000
DATA = 0x8000_0000
ALL = 7
MOVES = 5

SHAPES = [("intel", True), ("intel", False), ("amd", False)]


class NestedTable:
    """A user's page table for the window, in memory mapped at ``TABLES``; it leads to what is mapped at ``DATA``."""

    def __init__(self, ioas: Ioas, memory: DmaBuffer, tables: DmaBuffer) -> None:
        self._half = memory.nbytes // 2
        ioas.map(memory, DATA)
        ioas.map(tables, TABLES)
        entries = np.asarray(tables).view(np.uint64).reshape(4, 512)
        for row, level in enumerate((4, 3, 2)):
            entries[row, WINDOW >> (12 + 9 * (level - 1)) & 511] = TABLES + (row + 1) * PAGE | ALL
        self._leaves = entries[3, : self._half // PAGE]
        self.turn(0)

    def turn(self, half: int) -> None:
        """Leads the window to one half of the memory; seen when it is invalidated."""
        pages = np.arange(self._half // PAGE, dtype=np.uint64)
        self._leaves[:] = np.uint64(DATA + half * self._half | ALL) + pages * np.uint64(PAGE)


@dataclass
class Rig:
    """A rogue device, bound and let loose on the window; ``places`` is where it can be attached, by the names of the
    memory behind the window there."""

    machine: Machine
    iommufd: Iommufd
    device: IommufdDevice
    places: dict[str, Ioas | Hwpt]
    table: NestedTable
    nested: Hwpt
    watch: Watch

    def attach(self, name: str) -> None:
        self.watch.step(lambda: self.device.attach(self.places[name]), name)


def words(buffer: Any) -> Any:
    return np.asarray(buffer).view(np.uint64)


@asynccontextmanager
async def running(platform: Any = "intel", ats: bool = False, size: int = SIZE) -> AsyncIterator[Rig]:
    """``size``: bytes of the window. What changes it in place changes it page by page: one page is watched there."""
    config = MachineConfig(
        iommu=IommuConfig(platform=platform),
        ram=64 << 20,
        devices=(DeviceSpec(kind="rogue", options={"log_shift": 24, "ats": ats}),),
    )
    with trio.fail_after(120):
        async with Machine(config) as machine, await machine.vfio.open_iommufd() as iommufd:
            known = machine.devices["rogue0"]
            rogue = known.function
            assert isinstance(rogue, RogueDevice)
            async with await machine.vfio.bind_device(known.pci_name, iommufd) as device:
                memories = {
                    "one": machine.memory.alloc(size),
                    "two": machine.memory.alloc(size, scattered=True),
                    "by hand": machine.memory.alloc(size),
                }
                spaces = [iommufd.alloc_ioas() for _ in range(4)]
                for ioas, memory in zip(spaces, memories.values(), strict=False):
                    ioas.map(memory, WINDOW)
                halves = machine.memory.alloc(2 * size, scattered=True)
                table = NestedTable(spaces[3], halves, machine.memory.alloc(4 * PAGE))
                parent = iommufd.alloc_hwpt(device, spaces[3], flags=lib.IOMMU_HWPT_ALLOC_NEST_PARENT)
                nested = iommufd.alloc_nested(device, parent, TABLES)
                places: dict[str, Ioas | Hwpt] = {
                    "one": spaces[0],
                    "two": spaces[1],
                    "by hand": iommufd.alloc_hwpt(device, spaces[2]),
                    "half 0": nested,
                }
                seen = {name: words(memory) for name, memory in memories.items()}
                seen |= {"half 0": words(halves[:size]), "half 1": words(halves[size:])}
                rogue.aim(WINDOW, size)
                watch = Watch(rogue, seen, None)
                try:
                    yield Rig(machine, iommufd, device, places, table, nested, watch)
                finally:
                    rogue.aim(0, 0)
        assert machine.memory.stats().pins == 0


@pytest.mark.parametrize(("platform", "ats"), SHAPES)
async def test_from_place_to_place(platform: Any, ats: bool) -> None:
    async with running(platform, ats) as rig:
        rig.attach("one")
        refused = rig.watch.aborted
        assert refused
        for _ in range(MOVES):
            for name in ("two", "by hand", "half 0", "one", "by hand", "one"):
                rig.attach(name)
        assert rig.watch.aborted == refused
        assert rig.watch.landed
        rig.watch.step(rig.device.detach, None)
        assert rig.watch.aborted > refused


@pytest.mark.parametrize(("platform", "ats"), SHAPES)
async def test_inside_a_nested_table(platform: Any, ats: bool) -> None:
    """What the user's table replaces is replaced without a gap, by whole and by parts of an invalidation."""
    async with running(platform, ats) as rig:
        rig.attach("half 0")
        refused = rig.watch.aborted
        for n in range(1, 4 * MOVES):
            rig.table.turn(n & 1)
            part = (WINDOW, SIZE // PAGE) if n % 3 else ()
            rig.watch.step(partial(rig.nested.invalidate, *part), f"half {n & 1}")
        assert rig.watch.aborted == refused


async def test_the_parent_takes_its_memory_back() -> None:
    """No write lands in memory that was unmapped from under a nested table."""
    async with running(size=PAGE) as rig:
        rig.attach("half 0")
        space = rig.nested.ioas
        halves = space._kept[DATA][1]
        for _ in range(MOVES):
            rig.watch.step(lambda: space.unmap(DATA, 2 * PAGE), None)
            rig.watch.step(lambda: space.map(halves, DATA), "half 0")


async def test_a_replacement_that_is_refused() -> None:
    """The host says no: not one write ends otherwise."""
    async with running() as rig:
        rig.attach("one")
        refused = rig.watch.aborted

        def attach(where: Ioas | Hwpt) -> None:
            rig.machine.hypervisor.inject(lib.HVCALL_ATTACH_DEVICE_DOMAIN, lib.HV_STATUS_OPERATION_DENIED)
            with pytest.raises(VfioError, match="EACCES"):
                rig.device.attach(where)

        for name in ("two", "by hand", "half 0"):
            rig.watch.step(partial(attach, rig.places[name]), "one")
            assert rig.device.container is rig.places["one"]
        assert rig.watch.aborted == refused
        assert len(rig.places["two"].iova_ranges()) == 1  # type: ignore[union-attr]


async def test_a_nested_table_that_cannot_be_renewed() -> None:
    """The invalidation fails, and what it was to replace is out of reach: nothing stale is used."""
    async with running(size=PAGE) as rig:
        rig.attach("half 0")
        rig.table.turn(1)
        rig.machine.hypervisor.inject(lib.HVCALL_ATTACH_DEVICE_DOMAIN, lib.HV_STATUS_OPERATION_DENIED)

        def invalidate() -> None:
            with pytest.raises(VfioError, match="EACCES"):
                rig.nested.invalidate()

        rig.watch.step(invalidate, None)
        rig.watch.step(rig.nested.invalidate, "half 1")


async def move(rig: Rig) -> None:
    for name in ("two", "one"):
        rig.attach(name)


async def turn(rig: Rig) -> None:
    for half in (1, 0):
        rig.table.turn(half)
        rig.watch.step(rig.nested.invalidate, f"half {half}")


def by_way_of_blocking(group: IommuGroup, domain: Any) -> None:
    """A replacement that is a detach and an attach."""
    group.detach()
    group.attach(domain)


def remove_and_add(nested: NestedHwpt) -> None:
    """A renewal of what is in use, in place."""
    start, last = nested.domain.aperture
    nested.domain.unmap(start, last - start + 1)
    nested._pass(lib.pv_shadow_add, nested.domain, start, last)


BROKEN: list[tuple[str, Any, str, Any, str]] = [
    ("replace", IommuGroup, "replace", by_way_of_blocking, "one"),
    ("renew", NestedHwpt, "_swap", remove_and_add, "half 0"),
]


@pytest.mark.parametrize(("why", "kind", "method", "broken", "start"), BROKEN, ids=[row[0] for row in BROKEN])
async def test_the_checker_sees_a_gap(
    monkeypatch: pytest.MonkeyPatch,
    why: str,
    kind: type,
    method: str,
    broken: Callable[..., None],
    start: str,
) -> None:
    async with running() as rig:
        rig.attach(start)
        refused = rig.watch.aborted
        monkeypatch.setattr(kind, method, broken)
        with trio.fail_after(60):
            while rig.watch.aborted == refused:
                try:
                    await (move if start == "one" else turn)(rig)
                except AssertionError:
                    # In and out again, page by page: that is seen too.
                    break
                await trio.lowlevel.checkpoint()
