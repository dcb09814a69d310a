"""dma_map_benchmark: its parameters' limits, its lines, and that every mapping it counts really came and went."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio

from pvfio.errors import DmaMappingError, PageTableError, VfioError
from pvfio.guest.dma_api import DmaDevice
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.memory import GuestMemory
from pvfio.pagetable import Format, PageTable
from pvfio.workloads.dma_map_benchmark import (
    MapParams,
    Mapper,
    MapResult,
    clock_cost,
    linux_lines,
    loop_clock_cost,
    measure,
)
from pvfio.workloads.map_targets import DmaTarget, TableTarget, VfioTarget, lay_out

pytestmark = pytest.mark.touches_c

PAGE = 4096
SHORT = 0.01

WRONG: list[tuple[str, Any, str]] = [
    ("threads", 0, "threads is 1 to 1024, not 0"),
    ("threads", 1025, "threads is 1 to 1024"),
    ("seconds", 0, "more than 0 and at most 300, not 0"),
    ("seconds", -1, "at most 300"),
    ("seconds", 300.5, "at most 300"),
    ("seconds", float("nan"), "at most 300"),
    ("node", 1, "node is 0, the only one, or -1"),
    ("node", -2, "node is 0"),
    ("bits", 19, "bits is 20 to 64"),
    ("bits", 65, "bits is 20 to 64"),
    ("dir", -1, "dir is one of 0 .BIDIRECTIONAL., 1 .TO_DEVICE., 2 .FROM_DEVICE., not -1"),
    ("dir", 3, "dir is one of"),
    ("xdelay", -1, "xdelay is 0 to 10000000"),
    ("xdelay", 10_000_001, "xdelay is 0 to 10000000"),
    ("granule", 0, "granule is 1 to 1024"),
    ("granule", 1025, "granule is 1 to 1024"),
    ("mode", "both", "mode is single or sg, not 'both'"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_limits(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MapParams(**{name: value})


def test_what_is_just_allowed() -> None:
    MapParams(1024, 300, 0, 64, 2, 10_000_000, 1024, "sg")
    MapParams(1, 0.001, -1, 20, 0, 0, 1, "single")


def test_lines() -> None:
    import numpy as np

    result = MapResult()
    result.map.add(np.array([1000, 2000, 3000], np.uint64))
    result.unmap.add(np.array([12345, 12345], np.uint64))
    assert linux_lines(MapParams(), result) == [
        "dma mapping benchmark: threads:1 seconds:20 node:-1 dir:BIDIRECTIONAL granule: 1",
        "average map latency(us):2.0 standard deviation:0.8",
        "average unmap latency(us):12.3 standard deviation:0.0",
    ]
    params = MapParams(threads=8, seconds=30, node=0, dir=2, granule=8, mode="sg")
    assert linux_lines(params, result)[0] == (
        "dma mapping benchmark(SG_MODE): threads:8 seconds:30 node:0 dir:FROM_DEVICE granule:8"
    )


LAYOUTS: list[tuple[int, int, int]] = [
    (0, 1, PAGE),
    (0, 3, 16 * PAGE),
    (1, 1, PAGE),
    (5, 2, PAGE),
    (5000, 1, PAGE),
    (5000, 3, 3 * PAGE),
    (100, 1024, PAGE),
    (10, 1, 1024 * PAGE),
]


@pytest.mark.parametrize(("live", "threads", "size"), LAYOUTS)
def test_layout(live: int, threads: int, size: int) -> None:
    layout = lay_out([(0, 0xFFFF), (0x100000, 0xFFFFFFFF)], live, threads, size)
    assert sum(pages for _, pages in layout.live) == live
    assert len(layout.holes) == threads
    assert all(layout.holes)
    holes = [(at, size) for thread in layout.holes for at in thread]
    assert all(at % min(size, 2 << 20 if size == 1024 * PAGE else PAGE) == 0 for at, _ in holes)
    pieces = sorted([(at, pages * PAGE) for at, pages in layout.live] + holes)
    assert all(at + length <= following for (at, length), (following, _) in pairwise(pieces))
    assert PAGE <= pieces[0][0]
    assert pieces[-1][0] + pieces[-1][1] <= 1 << 32
    if live >= len(holes):
        assert len(layout.live) == len(holes)  # some before every hole


def test_no_room() -> None:
    with pytest.raises(ValueError, match="room for 255 live mappings"):
        lay_out([(0, (1 << 20) - 1)], 255, 1, PAGE)
    with pytest.raises(ValueError, match="room for 0 live mappings and 2 of"):
        lay_out([(0, (4 << 20) - 1)], 0, 2, 512 * PAGE)
    assert lay_out([(0, (1 << 20) - 1)], 254, 1, PAGE).holes == ((0xFF000,),)


class Recorder:
    """A mapper that maps nothing, and says what it was asked."""

    def __init__(self, name: str, log: list[str], places: tuple[int, ...] = (1, 2)) -> None:
        self.name, self.log = name, log
        self.live: set[tuple[int, int]] = set()
        self.count = 0
        self.mapper = Mapper(places, self.map, self.unmap, self.fill)

    def fill(self, byte: int) -> None:
        assert byte == 0x66
        self.log.append(f"{self.name} fill")

    def map(self, place: int) -> tuple[int, int]:
        self.count += 1
        handle = (place, self.count)
        self.live.add(handle)
        self.log.append(f"{self.name} map {place}")
        return handle

    def unmap(self, place: int, handle: tuple[int, int]) -> None:
        assert handle[0] == place
        self.live.remove(handle)
        self.log.append(f"{self.name} unmap")


async def test_one_thread_maps_its_places_in_turn() -> None:
    log: list[str] = []
    recorder = Recorder("a", log, (5, 6, 7))
    seen: list[float] = []
    result = await measure([recorder.mapper], seconds=0.15, progress=seen.append)
    assert not recorder.live
    assert result.loops == result.map.count == recorder.count
    assert result.seconds >= 0.15
    whole = [event for place in (5, 6, 7) for event in ("a fill", f"a map {place}", "a unmap")]
    assert log == (whole * recorder.count)[: len(log)]
    assert seen == sorted(seen)
    assert seen[-1] == result.seconds


async def test_threads_are_live_together_and_on_their_vps() -> None:
    log: list[str] = []
    entered: list[int] = []

    @contextmanager
    def on_vp(number: int) -> Any:
        entered.append(number)
        yield

    recorders = [Recorder(name, log) for name in "abc"]
    most = 0

    def counting(recorder: Recorder) -> Callable[[int], tuple[int, int]]:
        def map(place: int) -> tuple[int, int]:
            nonlocal most
            handle = recorder.map(place)
            most = max(most, sum(len(each.live) for each in recorders))
            return handle

        return map

    mappers = [Mapper((1,), counting(each), each.unmap) for each in recorders]
    result = await measure(mappers, seconds=SHORT, on_vp=on_vp)
    assert sorted(entered) == [0, 1, 2]
    assert most == 3
    assert all(each.count and not each.live for each in recorders)
    assert result.loops == sum(each.count for each in recorders)


@pytest.mark.parametrize("threads", [1, 2])
async def test_the_delay_is_between_and_not_counted(threads: int) -> None:
    times: dict[int, int] = {}
    waits: list[int] = []

    def map(place: int) -> int:
        times[place] = time.perf_counter_ns()
        return place

    def unmap(place: int, _: int) -> None:
        waits.append(time.perf_counter_ns() - times[place])

    mappers = [Mapper((number,), map, unmap) for number in range(threads)]
    result = await measure(mappers, seconds=SHORT, xdelay=1_000_000)
    assert min(waits) >= 1_000_000
    assert result.unmap.quantile(0.5) < 1_000_000


@pytest.mark.parametrize("threads", [1, 2])
async def test_an_error_ends_the_run_and_the_collector_runs_again(threads: int) -> None:
    def map(place: int) -> None:
        assert not gc.isenabled()
        raise VfioError(28, "map_dma", "refused")

    with pytest.raises((VfioError, ExceptionGroup)) as caught:
        await measure([Mapper((1,), map, lambda *_: None)] * threads, seconds=5)
    assert gc.isenabled()
    assert "refused" in repr(caught.value)


async def test_it_can_be_cancelled() -> None:
    recorder = Recorder("a", [])
    with trio.move_on_after(0.05) as scope:
        await measure([recorder.mapper], seconds=200)
    assert scope.cancelled_caught
    assert not recorder.live


PARAMS: list[dict[str, Any]] = [
    {},
    {"threads": 3, "granule": 4},
    {"mode": "sg", "granule": 7, "dir": 1},
    {"granule": 512, "dir": 2, "bits": 26},
]


@pytest.mark.parametrize("changes", PARAMS)
@pytest.mark.parametrize("live", [0, 300])
async def test_vfio(changes: dict[str, Any], live: int) -> None:
    params = MapParams(**changes)
    config = MachineConfig(engine="inline", ram=64 << 20)
    async with Machine(config) as machine, machine.open("dsa0") as device:
        container = device.container
        free = container.info().dma_avail
        target = VfioTarget(container, params)
        seen: list[int] = []
        await target.prepare(live, seen.append)
        assert sum(seen) == live
        assert container.info().dma_avail == (free or 0) - live
        mapper = target.mappers[-1]
        handle = mapper.map(mapper.places[0])
        first = int(mapper.places[0] if params.mode == "single" else mapper.places[0][0])
        walk = machine.devices["dsa0"].requester.walk(first + params.size - 1)
        assert walk.hpa is not None
        leaf = next(step for step in walk.steps if step.stage == 1 and step.leaf)
        assert (leaf.level == 2) == (params.granule == 512)
        assert bool(leaf.entry & 2) == (params.dir != 1)
        mapper.unmap(mapper.places[0], handle)
        calls = machine.kernel.transport.calls
        result = await target.measure(SHORT)
        assert result.loops == result.map.count == machine.kernel.transport.calls - calls > 0
        assert container.info().dma_avail == (free or 0) - live
        await target.clear()
        assert container.info().dma_avail == free


async def test_vfio_where_the_mask_leaves_no_room() -> None:
    config = MachineConfig(engine="inline", ram=64 << 20)
    async with Machine(config) as machine, machine.open("dsa0") as device:
        target = VfioTarget(device.container, MapParams(bits=20))
        with pytest.raises(ValueError, match="room"):
            await target.prepare(300, lambda _: None)
        await target.prepare(200, lambda _: None)
        assert (await target.measure(SHORT)).loops


def dma_machine(kind: Any) -> MachineConfig:
    return MachineConfig(
        engine="inline",
        ram=64 << 20,
        default_domain=kind,
        devices=(DeviceSpec(kind="dsa", driver="dma_map_benchmark"),),
    )


@pytest.mark.parametrize("changes", PARAMS)
@pytest.mark.parametrize("kind", ["strict", "lazy", "identity"])
async def test_dma(changes: dict[str, Any], kind: str) -> None:
    # Behind 26 bits there are fewer large mappings than a flush queue holds: the IOVAs would run out.
    params = MapParams(**changes | ({"bits": 32} if kind == "lazy" else {}))
    async with Machine(dma_machine(kind)) as machine:
        dma = DmaDevice(machine.kernel, machine.kernel.devices[0])
        target = DmaTarget(dma, params, lambda size, align: machine.memory.alloc(size, align=align))
        pins = machine.memory.stats().pins
        for live in (20, 5, 30):
            await target.prepare(live, lambda _: None)
            assert machine.memory.stats().pins - pins == (0 if kind == "identity" else live)
        requester = machine.devices["dsa0"].requester
        mapper = target.mappers[0]
        handle = mapper.map(mapper.places[0])
        address = handle if params.mode == "single" else handle[0].address
        assert address + params.size <= 1 << params.bits
        assert requester.walk(address).hpa is not None
        assert (requester.walk(address, 2).hpa is None) == (params.dir == 1 and kind != "identity")
        mapper.unmap(mapper.places[0], handle)
        calls = machine.kernel.transport.calls
        result = await target.measure(SHORT)
        calls = machine.kernel.transport.calls - calls
        assert result.loops == result.map.count > 0
        if kind == "strict":
            assert calls == result.loops
        elif kind == "lazy":
            assert calls <= result.loops / 256 + result.seconds / 0.010 + 1
        else:
            assert calls == 0
        await target.clear()
        assert machine.memory.stats().pins == pins
        dma.close()


async def test_dma_where_the_mask_leaves_no_room() -> None:
    async with Machine(dma_machine("strict")) as machine:
        dma = DmaDevice(machine.kernel, machine.kernel.devices[0])
        target = DmaTarget(
            dma, MapParams(bits=20), lambda size, align: machine.memory.alloc(size, align=align)
        )
        with pytest.raises(DmaMappingError, match="no IOVAs"):
            await target.prepare(300, lambda _: None)


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(64 << 20)


def tables_of(memory: GuestMemory, count: int) -> list[PageTable]:
    return [PageTable(Format.X86_64, memory, owner="guest", levels=4) for _ in range(count)]


@pytest.mark.parametrize("changes", PARAMS)
@pytest.mark.parametrize("live", [0, 3000])
async def test_page_tables(memory: GuestMemory, changes: dict[str, Any], live: int) -> None:
    params = MapParams(**changes)
    tables = tables_of(memory, params.threads)
    empty = memory.stats().table_pages
    target = TableTarget(tables, 0x200000, params)
    seen: list[int] = []
    await target.prepare(live, seen.append)
    assert sum(seen) == live * params.threads
    standing = memory.stats().table_pages
    result = await target.measure(SHORT)
    assert result.loops == result.map.count >= params.threads
    assert memory.stats().table_pages == standing
    for table, loop in zip(tables, target.loops, strict=True):
        assert all(table.iova_to_phys(loop.iovas[i]) is None for i in range(loop.count))
    await target.clear()
    assert memory.stats().table_pages == empty


async def test_page_tables_really_map(memory: GuestMemory) -> None:
    """A loop that finds its IOVA taken is refused; so it does map there."""
    (table,) = tables_of(memory, 1)
    target = TableTarget([table], 0, MapParams())
    await target.prepare(0, lambda _: None)
    table.map_range(target.loops[0].iovas[0], 0, PAGE, 3)
    with pytest.raises((PageTableError, ExceptionGroup)) as caught:
        await target.measure(SHORT)
    assert "EADDRINUSE" in repr(caught.value) or "98" in repr(caught.value)


async def test_an_sg_mapping_that_is_refused_half_way_leaves_nothing(memory: GuestMemory) -> None:
    (table,) = tables_of(memory, 1)
    target = TableTarget([table], 0, MapParams(mode="sg", granule=4))
    await target.prepare(0, lambda _: None)
    first = target.loops[0].iovas[0]
    table.map_range(first + 2 * PAGE, 0, PAGE, 3)
    with pytest.raises((PageTableError, ExceptionGroup)):
        await target.measure(SHORT)
    assert table.iova_to_phys(first) is None
    assert table.unmap_range(first, 4 * PAGE) == PAGE


async def test_no_memory_for_live_page_tables() -> None:
    memory = GuestMemory(32 << 20)
    target = TableTarget(tables_of(memory, 1), 0, MapParams(bits=48))
    with pytest.raises(MemoryError, match="live"):
        await target.prepare(10_000_000, lambda _: None)


async def test_a_loop_can_be_cancelled(memory: GuestMemory) -> None:
    target = TableTarget(tables_of(memory, 2), 0, MapParams(threads=2))
    await target.prepare(0, lambda _: None)
    with trio.move_on_after(0.05) as scope:
        await target.measure(200)
    assert scope.cancelled_caught


def test_the_clock_takes_its_time() -> None:
    assert clock_cost(3, 100) > 0
    assert loop_clock_cost() > 0
