"""dma_map_benchmark: what a map and an unmap take, as Linux's tool of that name measures and reports them.

Parameters, their limits and the report are those of Linux's kernel/dma/map_benchmark.c and its program: every thread
owns a buffer of ``granule`` pages and, until the time is over, writes to it (unless the device does), maps it, waits
``xdelay`` nanoseconds as if DMA went on, and unmaps it; each half is timed by itself. Averages are exact, where Linux
cuts every latency to 100 ns.

Threads are threads of the operating system only where that means something: in a loop of C over page tables of
their own (``measure_loops``). The guest kernel and VFIO are Python and run one call at a time, so there a "thread"
is a trio task (``measure``): tasks interleave where DMA would go on, so that all their mappings are live together,
but never contend inside a call. What a buffer is and how it is mapped is ``map_targets.py``.

Not modelled: NUMA (there is node 0), binding threads to processors.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import trio

from pvfio.abi import lib
from pvfio.errors import PageTableError
from pvfio.workloads.latency import Latencies

__all__ = [
    "DIRECTIONS",
    "MODES",
    "MapParams",
    "MapResult",
    "Mapper",
    "linux_lines",
    "measure",
    "measure_loops",
]

MODES = ("single", "sg")
DIRECTIONS = ("BIDIRECTIONAL", "TO_DEVICE", "FROM_DEVICE")
"""By their numbers."""

MAX_THREADS = 1024
MAX_SECONDS = 300
MAX_DELAY = 10_000_000  # ns
MAX_GRANULE = 1024
PAGE = 4096

_BLOCK = 1024  # mappings between two looks at the rest of the program
_BLOCK_NS = 20_000_000  # ... or so many nanoseconds
_TICK = 0.1  # seconds between two reports of progress
_STAIN = 0x66


@dataclass(frozen=True, slots=True)
class MapParams:
    """The tool's parameters.

    ``seconds``: how long. ``bits``: of addresses the device can reach. ``dir``: 0 both ways, 1 to the device, 2
    from it. ``xdelay``: nanoseconds from map to unmap. ``granule``: pages of a mapping; in mode "sg" entries of
    one page each.
    ``ValueError`` for what Linux's tool or its ioctl refuses.
    """

    threads: int = 1
    seconds: float = 20.0
    node: int = -1
    bits: int = 32
    dir: int = 0
    xdelay: int = 0
    granule: int = 1
    mode: str = "single"

    def __post_init__(self) -> None:
        _between("threads", self.threads, 1, MAX_THREADS)
        if not 0 < self.seconds <= MAX_SECONDS:
            raise ValueError(f"seconds is more than 0 and at most {MAX_SECONDS}, not {self.seconds:g}")
        if self.node not in (-1, 0):
            raise ValueError(f"node is 0, the only one, or -1 for any, not {self.node}")
        _between("bits", self.bits, 20, 64)
        if not 0 <= self.dir < len(DIRECTIONS):
            names = ", ".join(f"{number} ({name})" for number, name in enumerate(DIRECTIONS))
            raise ValueError(f"dir is one of {names}, not {self.dir}")
        _between("xdelay", self.xdelay, 0, MAX_DELAY)
        _between("granule", self.granule, 1, MAX_GRANULE)
        if self.mode not in MODES:
            raise ValueError(f"mode is single or sg, not {self.mode!r}")

    @property
    def size(self) -> int:
        """Bytes of one mapping."""
        return self.granule * PAGE


def _between(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {least} to {most}, not {value}")


@dataclass(slots=True)
class MapResult:
    """What was measured: a latency for every map and every unmap, and how many seconds that took."""

    map: Latencies = field(default_factory=Latencies)
    unmap: Latencies = field(default_factory=Latencies)
    seconds: float = 0.0

    @property
    def loops(self) -> int:
        """How many mappings came and went."""
        return self.unmap.count

    def merge(self, other: MapResult) -> None:
        """Takes in another thread's."""
        self.map.merge(other.map)
        self.unmap.merge(other.unmap)


@dataclass(frozen=True, slots=True)
class Mapper:
    """How one thread maps: ``handle = map(place)``, ``unmap(place, handle)``, for each of its places in turn.

    ``fill``, if there is one, writes a byte all over its buffer first.
    """

    places: Sequence[Any]
    map: Callable[[Any], Any]
    unmap: Callable[[Any, Any], object]
    fill: Callable[[int], object] | None = None


def linux_lines(params: MapParams, result: MapResult) -> list[str]:
    """The three lines Linux's tool prints.

    The first has the form it had before there were modes; for mode "sg" that of the versions which have it.
    """
    seconds, direction = f"{params.seconds:g}", DIRECTIONS[params.dir]
    what = f"threads:{params.threads} seconds:{seconds} node:{params.node} dir:{direction}"
    if params.mode == "single":
        first = f"dma mapping benchmark: {what} granule: {params.granule}"
    else:
        first = f"dma mapping benchmark(SG_MODE): {what} granule:{params.granule}"
    return [first, *(_average(name, getattr(result, name)) for name in ("map", "unmap"))]


def _average(name: str, latencies: Latencies) -> str:
    average, deviation = latencies.average / 1000, latencies.deviation / 1000
    return f"average {name} latency(us):{average:.1f} standard deviation:{deviation:.1f}"


async def measure(
    mappers: Sequence[Mapper],
    *,
    seconds: float,
    xdelay: int = 0,
    progress: Callable[[float], None] | None = None,
    on_vp: Callable[[int], AbstractContextManager[None]] | None = None,
) -> MapResult:
    """Runs a task for each of ``mappers`` for ``seconds``, at least one mapping each.

    Task i runs inside ``on_vp(i)``. ``progress`` gets the seconds gone, now and then and in the end. A map or unmap
    that raises ends the run with that. Cancelled, or ended: mappings may stay behind.
    """
    results = [MapResult() for _ in mappers]
    alone = len(mappers) == 1

    async def one(number: int, end: int) -> None:
        with on_vp(number) if on_vp is not None else nullcontext():
            run = _run_alone if alone else _run_among
            await run(mappers[number], xdelay, end, results[number])

    return await _together(one, results, seconds, progress)


async def _together(
    job: Callable[[int, int], Awaitable[None]],
    results: Sequence[MapResult],
    seconds: float,
    progress: Callable[[float], None] | None,
) -> MapResult:
    """Runs ``job(number, when to end)`` for every result, reports progress meanwhile, and merges what they recorded."""

    async def tick() -> None:
        while progress is not None:
            await trio.sleep(_TICK)
            progress(time.perf_counter() - began)

    with _no_collector():
        began = time.perf_counter()
        end = time.perf_counter_ns() + int(seconds * 1e9)
        async with trio.open_nursery() as beside:
            beside.start_soon(tick)
            async with trio.open_nursery() as workers:
                for number in range(len(results)):
                    workers.start_soon(job, number, end)
            beside.cancel_scope.cancel()
    whole = MapResult(seconds=time.perf_counter() - began)
    if progress is not None:
        progress(whole.seconds)
    for result in results:
        whole.merge(result)
    return whole


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's garbage collector, whose pauses are no part of a mapping."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Series:
    """Room for the latencies of a block, and the result they go to."""

    def __init__(self, result: MapResult) -> None:
        self.maps = array("Q", bytes(8 * _BLOCK))
        self.unmaps = array("Q", bytes(8 * _BLOCK))
        self._result = result
        self._arrays = [np.frombuffer(values, np.uint64) for values in (self.maps, self.unmaps)]

    def record(self, count: int) -> None:
        """Takes the first ``count`` of each over."""
        self._result.map.add(self._arrays[0][:count])
        self._result.unmap.add(self._arrays[1][:count])


async def _run_alone(mapper: Mapper, xdelay: int, end: int, result: MapResult) -> None:
    """The only thread: nothing between map and unmap but the delay; a checkpoint after every block."""
    series = _Series(result)
    at = 0
    while True:
        count = _block(mapper, at, xdelay, end, series)
        at += count
        series.record(count)
        await trio.lowlevel.checkpoint()
        if time.perf_counter_ns() >= end:
            return


def _block(mapper: Mapper, at: int, xdelay: int, end: int, series: _Series) -> int:
    """Maps and unmaps up to a block's worth and returns how often."""
    clock, map_, unmap, fill, places = (
        time.perf_counter_ns,
        mapper.map,
        mapper.unmap,
        mapper.fill,
        mapper.places,
    )
    maps, unmaps, count = series.maps, series.unmaps, len(places)
    end = min(end, clock() + _BLOCK_NS)
    for i in range(_BLOCK):
        place = places[(at + i) % count]
        if fill is not None:
            fill(_STAIN)
        start = clock()
        handle = map_(place)
        mapped = clock()
        if xdelay:
            while clock() < mapped + xdelay:
                pass
        before = clock()
        unmap(place, handle)
        after = clock()
        maps[i] = mapped - start
        unmaps[i] = after - before
        if after >= end:
            return i + 1
    return _BLOCK


async def _run_among(mapper: Mapper, xdelay: int, end: int, result: MapResult) -> None:
    """One of several threads: the others run between its map and its unmap."""
    clock, map_, unmap, fill = time.perf_counter_ns, mapper.map, mapper.unmap, mapper.fill
    checkpoint = trio.lowlevel.checkpoint
    series = _Series(result)
    at = count = 0
    while True:
        place = mapper.places[at % len(mapper.places)]
        at += 1
        if fill is not None:
            fill(_STAIN)
        start = clock()
        handle = map_(place)
        mapped = clock()
        await checkpoint()
        while clock() < mapped + xdelay:
            await checkpoint()
        before = clock()
        unmap(place, handle)
        after = clock()
        series.maps[count] = mapped - start
        series.unmaps[count] = after - before
        count += 1
        if count == _BLOCK or after >= end:
            series.record(count)
            count = 0
        if after >= end:
            return
        await checkpoint()


async def measure_loops(
    loops: Sequence[Any], *, seconds: float, progress: Callable[[float], None] | None = None
) -> MapResult:
    """Runs each ``struct pv_map_loop *`` on a thread of its own for ``seconds``; nothing else may use its page table.

    Raises ``PageTableError`` for what the page table refuses. Cancelled: every thread ends within 50 ms, and has
    unmapped what it mapped.
    """
    results = [MapResult() for _ in loops]
    limiter = trio.CapacityLimiter(max(1, len(loops)))

    async def one(number: int, end: int) -> None:
        await trio.to_thread.run_sync(_run_loop, loops[number], end, results[number], limiter=limiter)

    return await _together(one, results, seconds, progress)


def _run_loop(loop: Any, end: int, result: MapResult) -> None:
    while True:
        left = end - time.perf_counter_ns()
        error = lib.pv_map_loop_run(loop, max(0, min(left, 50_000_000)), result.map.ptr, result.unmap.ptr)
        if error:
            raise PageTableError(-error, "map", "the benchmark's mapping", length=loop.piece * loop.pieces)
        trio.from_thread.check_cancelled()
        if time.perf_counter_ns() >= end:
            return


def clock_cost(rounds: int = 15, readings: int = 2000) -> float:
    """Nanoseconds that reading Python's clock costs, loop included: the median of some series."""
    clock, costs = time.perf_counter_ns, []
    for _ in range(rounds):
        start = clock()
        for _ in range(readings):
            clock()
        costs.append((clock() - start) / readings)
    return float(np.median(costs))


def loop_clock_cost() -> float:
    """The same of the loop in C."""
    return float(np.median([lib.pv_clock_cost() for _ in range(15)]))
