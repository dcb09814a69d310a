"""What dma_map_benchmark maps with: a VFIO container, a device's DMA API, or page tables alone.

A target sets up live mappings that stay (all of one page, mapped again and again) and gives each thread a buffer and
places to map it at. Where the caller chooses IOVAs (VFIO, page tables) the places lie in holes spread among the live
mappings and are visited in random order, so that what grows with their number is felt; the DMA API chooses its own.

Not modelled: what a device would do with the mappings.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import trio

from pvfio.abi import ffi, lib
from pvfio.workloads.dma_map_benchmark import PAGE, MapParams, Mapper, MapResult, measure, measure_loops

if TYPE_CHECKING:
    from pvfio.guest.dma_api import DmaDevice
    from pvfio.pagetable import PageTable
    from pvfio.vfio import Container, DmaBuffer

__all__ = ["DmaTarget", "Layout", "TableTarget", "Target", "VfioTarget", "lay_out"]

_HOLES = 1024  # at most so many, but one a thread at least
_LARGE = 2 << 20
_CHUNK = 8192  # live mappings between two checkpoints
_READ, _WRITE = lib.PT_READ, lib.PT_WRITE
# By direction: what the device may do.
_PERMS = (_READ | _WRITE, _READ, _WRITE)

Progress = Callable[[int], None]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in an IO address space: ``live`` as (first IOVA, pages), ``holes`` for each thread."""

    live: tuple[tuple[int, int], ...]
    holes: tuple[tuple[int, ...], ...]


def alignment(size: int) -> int:
    """That of a mapping: its size rounded up to a power of two, 2 MiB at most, so that large pages fit."""
    return min(_LARGE, 1 << (size - 1).bit_length())


def lay_out(ranges: Sequence[tuple[int, int]], live: int, threads: int, size: int) -> Layout:
    """Spreads holes of ``size`` bytes among ``live`` pages, in one of ``ranges`` (first, last IOVA).

    As many holes as there are live pages, within reason, where there is room; one a thread at least.
    ``ValueError`` where no range has room for that.
    """
    align = alignment(size)
    wanted = max(1, min(live, _HOLES) // threads)
    best = (0, 0)
    for first, last in ranges:
        start = max(first, PAGE)
        # A hole may cost what is left out before it, too.
        each = min(wanted, (last + 1 - start - live * PAGE) // (threads * (size + align - PAGE)))
        if each > best[0]:
            best = (each, start)
    if not best[0]:
        raise ValueError(f"no range of IOVAs has room for {live} live mappings and {threads} of {size} bytes")
    each, at = best
    count = each * threads
    share, rest = divmod(live, count)
    runs, holes = [], []
    for number in range(count):
        pages = share + (number < rest)
        if pages:
            runs.append((at, pages))
            at += pages * PAGE
        at = -(-at // align) * align
        holes.append(at)
        at += size
    random.Random(count).shuffle(holes)
    return Layout(tuple(runs), tuple(tuple(holes[i::threads]) for i in range(threads)))


class Target(ABC):
    """Something to benchmark: ``prepare``, ``measure``, as often as wanted, and ``clear`` in the end."""

    clock_in_c = False
    """Whether the clock is read by the loop in C."""
    mappers: Sequence[Mapper] = ()
    """How each thread maps, where Python does it."""

    @abstractmethod
    async def prepare(self, live: int, progress: Progress) -> None:
        """Sets up the threads' places beside exactly that many live mappings; ``progress`` gets how many came."""

    @abstractmethod
    async def measure(self, seconds: float, progress: Callable[[float], None] | None = None) -> MapResult:
        """Runs every thread for so long; see ``dma_map_benchmark.measure``."""

    @abstractmethod
    async def clear(self) -> None:
        """Takes the live mappings away."""


class VfioTarget(Target):
    """A container with an IOMMU: ``map_dma_nowait`` and ``unmap_dma_nowait``, with its flush.

    In mode "sg" a mapping is a batch of pages, unmapped by one call. ``on_vp`` puts a task on a thread's VP.
    """

    def __init__(
        self,
        container: Container,
        params: MapParams,
        on_vp: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.container = container
        self.params = params
        self.on_vp = on_vp
        self.mappers = []
        self._page: Any = None
        self._buffers: list[Any] = []

    async def prepare(self, live: int, progress: Progress) -> None:
        """Raises ``ValueError`` where the mask leaves no room, and what mapping raises."""
        params, container = self.params, self.container
        top = (1 << params.bits) - 1
        ranges = [
            (first, min(last, top)) for first, last in container.info().iova_ranges if first <= min(last, top)
        ]
        layout = lay_out(ranges, live, params.threads, params.size)
        await self.clear()
        if not self._buffers:
            align = alignment(params.size)
            self._page = await container.alloc(PAGE, map=False)
            self._buffers = [
                await container.alloc(params.size, map=False, align=align) for _ in range(params.threads)
            ]
        for first, pages in layout.live:
            for start in range(0, pages, _CHUNK):
                count = min(_CHUNK, pages - start)
                iovas = first + (start + np.arange(count, dtype=np.uint64)) * np.uint64(PAGE)
                await container.map_dma_batch(iovas, np.full(count, self._page.vaddr, np.uint64), PAGE)
                progress(count)
        self.mappers = [
            self._mapper(buffer, holes) for buffer, holes in zip(self._buffers, layout.holes, strict=True)
        ]

    def _mapper(self, buffer: Any, holes: tuple[int, ...]) -> Mapper:
        params = self.params
        read, write = bool(_PERMS[params.dir] & _READ), bool(_PERMS[params.dir] & _WRITE)
        fill = buffer.fill if params.dir != 2 else None
        map_one, unmap = self.container.map_dma_nowait, self.container.unmap_dma_nowait
        map_batch, size = self.container.map_dma_batch_nowait, params.size

        def unmap_one(iova: int, _: None) -> None:
            unmap(iova, size)

        if params.mode == "single":

            def single(iova: int) -> None:
                map_one(iova, buffer, read=read, write=write)

            return Mapper(holes, single, unmap_one, fill)

        offsets = np.arange(0, size, PAGE, dtype=np.uint64)
        pages = np.uint64(buffer.vaddr) + offsets

        def several(iovas: Words) -> None:
            map_batch(iovas, pages, PAGE, read=read, write=write)

        def unmap_several(iovas: Words, _: None) -> None:
            unmap(int(iovas[0]), size)

        return Mapper([np.uint64(hole) + offsets for hole in holes], several, unmap_several, fill)

    async def measure(self, seconds: float, progress: Callable[[float], None] | None = None) -> MapResult:
        return await measure(
            self.mappers, seconds=seconds, xdelay=self.params.xdelay, progress=progress, on_vp=self.on_vp
        )

    async def clear(self) -> None:
        await self.container.unmap_all()


class DmaTarget(Target):
    """A device of the kernel: the DMA API. Mode "sg" maps a scatter list of single pages.

    ``buffer(size, align)`` makes memory. ``on_vp`` puts a task on a thread's VP. The device keeps the mask.
    """

    def __init__(
        self,
        device: DmaDevice,
        params: MapParams,
        buffer: Callable[[int, int], DmaBuffer],
        on_vp: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.device = device
        self.params = params
        self.on_vp = on_vp
        device.set_mask(params.bits)
        self._page = buffer(PAGE, PAGE)
        align = alignment(params.size)
        self.mappers = [self._mapper(buffer(params.size, align)) for _ in range(params.threads)]
        self._live: list[int] = []

    async def prepare(self, live: int, progress: Progress) -> None:
        """Raises ``DmaMappingError``: ENOMEM where the mask leaves no room or there is no memory for tables."""
        device, page, done = self.device, self._page, self._live
        await self._keep(live)
        while len(done) < live:
            count = min(_CHUNK, live - len(done))
            done.extend([device.map_single(page, 0) for _ in range(count)])
            progress(count)
            await trio.lowlevel.checkpoint()

    def _mapper(self, buffer: DmaBuffer) -> Mapper:
        device, size, direction = self.device, self.params.size, self.params.dir
        fill = buffer.fill if direction != 2 else None
        if self.params.mode == "single":
            map_single, unmap_single = device.map_single, device.unmap_single

            def single(_: None) -> int:
                return map_single(buffer, direction)

            def unmap_one(_: None, address: int) -> None:
                unmap_single(address, size, direction)

            return Mapper((None,), single, unmap_one, fill)
        map_sg, unmap_sg = device.map_sg, device.unmap_sg
        entries: list[Any] = [buffer[start : start + PAGE] for start in range(0, size, PAGE)]

        def several(_: None) -> Any:
            return map_sg(entries, direction)

        def unmap_several(_: None, mapped: Any) -> None:
            unmap_sg(mapped, direction)

        return Mapper((None,), several, unmap_several, fill)

    async def measure(self, seconds: float, progress: Callable[[float], None] | None = None) -> MapResult:
        return await measure(
            self.mappers, seconds=seconds, xdelay=self.params.xdelay, progress=progress, on_vp=self.on_vp
        )

    async def clear(self) -> None:
        await self._keep(0)

    async def _keep(self, most: int) -> None:
        """Takes live mappings away until no more than so many are left."""
        unmap, live = self.device.unmap_single, self._live
        while len(live) > most:
            for _ in range(min(_CHUNK, len(live) - most)):
                unmap(live.pop(), PAGE, 0)
            await trio.lowlevel.checkpoint()


class TableTarget(Target):
    """Page tables alone, one a thread, each with all the live mappings, in a loop of C.

    ``tables`` are empty and nothing walks them; the pages behind ``phys`` are never touched, so it may be any
    address, aligned as ``alignment`` says.
    """

    clock_in_c = True

    def __init__(self, tables: Sequence[PageTable], phys: int, params: MapParams) -> None:
        self.params = params
        self.tables = tables
        self.phys = phys
        self.loops: list[Any] = []
        self._layout = Layout((), ())
        self._iovas: list[Any] = []

    async def prepare(self, live: int, progress: Progress) -> None:
        """Raises ``ValueError`` where the mask leaves no room, ``MemoryError`` without memory for the tables."""
        params = self.params
        top = min(1 << params.bits, 1 << 48) - 1
        await self.clear()
        self._layout = lay_out([(0, top)], live, len(self.tables), params.size)
        for table in self.tables:
            for first, pages in self._layout.live:
                done = lib.pv_map_loop_fill(table.ptr, first, self.phys, pages, _READ | _WRITE)
                progress(done)
                if done < pages:
                    raise MemoryError("no memory for the tables of the live mappings")
            await trio.lowlevel.checkpoint()
        self._iovas = [ffi.new("uint64_t[]", holes) for holes in self._layout.holes]
        piece, pieces = (params.size, 1) if params.mode == "single" else (PAGE, params.granule)
        self.loops = [
            ffi.new(
                "struct pv_map_loop *",
                {
                    "table": table.ptr,
                    "iovas": iovas,
                    "count": len(iovas),
                    "phys": self.phys,
                    "piece": piece,
                    "pieces": pieces,
                    "delay_ns": params.xdelay,
                    "perm": _PERMS[params.dir],
                },
            )
            for table, iovas in zip(self.tables, self._iovas, strict=True)
        ]

    async def measure(self, seconds: float, progress: Callable[[float], None] | None = None) -> MapResult:
        return await measure_loops(self.loops, seconds=seconds, progress=progress)

    async def clear(self) -> None:
        for table in self.tables:
            for first, pages in self._layout.live:
                table.unmap_range(first, pages * PAGE)
            table.release_detached()
        await trio.lowlevel.checkpoint()
