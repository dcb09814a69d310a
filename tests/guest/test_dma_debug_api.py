"""DMA debugging behind the DMA API: a right driver earns no report, a wrong one the right report, from its own line."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple, cast

import pytest

from pvfio.guest.dma_api import Direction, DmaDevice, DmaMappingError
from pvfio.guest.dma_debug import DmaDebug, DmaMisuseError, Rule
from pvfio.memory import DmaBuffer, GuestMemory
from pvfio.silicon import BusMaster, DmaAborted

pytestmark = pytest.mark.touches_c

PAGE = 4096
KINDS = ["identity", "strict", "lazy"]
BIDIRECTIONAL, TO_DEVICE, FROM_DEVICE, _ = Direction


class Driver(NamedTuple):
    """A kernel driver that is watched."""

    machine: Any
    dma: DmaDevice
    debug: DmaDebug
    bus: BusMaster

    def alloc(self, size: int = PAGE, *, start: int = 0) -> DmaBuffer:
        """``size`` bytes that begin ``start`` bytes into a page."""
        memory: GuestMemory = self.machine.memory
        return cast("DmaBuffer", memory.alloc(start + size)[start:])


MakeDriver = Callable[..., Awaitable[Driver]]


@pytest.fixture
def driver(emulated: Any) -> MakeDriver:
    """``await driver("strict", raises=False, untrusted=False)``."""

    async def make(kind: str, *, raises: bool = False, **side: Any) -> Driver:
        machine = await emulated(driver=None, default_domain=kind)
        device = machine.kernel.devices[0]
        device.enable()
        machine.kernel.dma_debug = debug = DmaDebug(raises=raises)
        dma = DmaDevice(machine.kernel, device, **side)
        machine.kernel.bind(device, "testdev")
        return Driver(machine, dma, debug, machine.functions[0].bus)

    return make


@pytest.mark.parametrize("untrusted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_right_driver(driver: MakeDriver, kind: str, untrusted: bool) -> None:
    rig = await driver(kind, untrusted=untrusted)
    dma = rig.dma
    for direction in (BIDIRECTIONAL, TO_DEVICE, FROM_DEVICE):
        buffer = rig.alloc(9000, start=100)
        address = dma.map_single(buffer, direction)
        dma.sync_single_for_cpu(address + 64, 100, direction)
        dma.sync_single_for_device(address + 64, 100, direction)
        dma.unmap_single(address, buffer.size, direction)
        page = rig.machine.memory.guest_page()
        address = dma.map_page(page, 64, 1000, direction)
        dma.sync_single_for_cpu(address, 1000, direction)
        dma.unmap_page(address, 1000, direction)
        rig.machine.memory.free_guest_page(page)
        segments = dma.map_sg([rig.alloc(size) for size in (PAGE, 100, PAGE)], direction)
        dma.sync_sg_for_cpu(segments, direction)
        dma.sync_sg_for_device(segments, direction)
        dma.unmap_sg(segments, direction)
    coherent, address = dma.alloc_coherent(10_000)
    dma.free_coherent(coherent, address)
    rig.machine.kernel.bind(dma.device, None)
    dma.close()
    assert list(rig.debug.reports) == []
    assert len(rig.debug) == 0


def unmap_twice(rig: Driver) -> None:
    buffer = rig.alloc()
    address = rig.dma.map_single(buffer, TO_DEVICE)
    rig.dma.unmap_single(address, PAGE, TO_DEVICE)
    rig.dma.unmap_single(address, PAGE, TO_DEVICE)


def unmap_never_mapped(rig: Driver) -> None:
    rig.dma.unmap_single(0x7000, PAGE, TO_DEVICE)


def unmap_less(rig: Driver) -> None:
    address = rig.dma.map_single(rig.alloc(2 * PAGE), TO_DEVICE)
    rig.dma.unmap_single(address, PAGE, TO_DEVICE)


def unmap_less_of_a_page(rig: Driver) -> None:
    address = rig.dma.map_single(rig.alloc(), TO_DEVICE)
    rig.dma.unmap_single(address, 100, TO_DEVICE)


def unmap_the_other_way(rig: Driver) -> None:
    address = rig.dma.map_single(rig.alloc(), TO_DEVICE)
    rig.dma.unmap_single(address, PAGE, FROM_DEVICE)


def unmap_no_way(rig: Driver) -> None:
    address = rig.dma.map_single(rig.alloc(), TO_DEVICE)
    rig.dma.unmap_single(address, PAGE, 7)


def unmap_as_a_page(rig: Driver) -> None:
    address = rig.dma.map_single(rig.alloc(), TO_DEVICE)
    rig.dma.unmap_page(address, PAGE, TO_DEVICE)


def unmap_coherent(rig: Driver) -> None:
    _, address = rig.dma.alloc_coherent(PAGE)
    rig.dma.unmap_single(address, PAGE, BIDIRECTIONAL)


def free_other_memory(rig: Driver) -> None:
    first, address = rig.dma.alloc_coherent(PAGE)
    rig.dma.free_coherent(rig.alloc(), address)
    assert first.any() == 0


def sync_after_unmap(rig: Driver) -> None:
    address = rig.dma.map_single(rig.alloc(), FROM_DEVICE)
    rig.dma.unmap_single(address, PAGE, FROM_DEVICE)
    rig.dma.sync_single_for_cpu(address, PAGE, FROM_DEVICE)


def sync_too_much(rig: Driver) -> None:
    address = rig.dma.map_single(rig.alloc(), FROM_DEVICE)
    rig.dma.sync_single_for_cpu(address + 64, PAGE, FROM_DEVICE)


def sync_the_other_way(rig: Driver) -> None:
    address = rig.dma.map_single(rig.alloc(), FROM_DEVICE)
    rig.dma.sync_single_for_cpu(address, PAGE, TO_DEVICE)


def give_what_is_given(rig: Driver) -> None:
    address = rig.dma.map_single(rig.alloc(), TO_DEVICE)
    rig.dma.sync_single_for_device(address, PAGE, TO_DEVICE)


def unmap_a_part_of_a_list(rig: Driver) -> None:
    segments = rig.dma.map_sg([rig.alloc(100) for _ in range(3)], TO_DEVICE)
    rig.dma.unmap_sg(segments[:2], TO_DEVICE)


def map_twice(rig: Driver) -> None:
    buffer = rig.alloc()
    rig.dma.map_single(buffer, FROM_DEVICE)
    rig.dma.map_single(buffer, FROM_DEVICE)


MISUSES: list[tuple[Callable[[Driver], None], set[Rule]]] = [
    (unmap_twice, {Rule.DOUBLE_UNMAP}),
    (unmap_never_mapped, {Rule.UNMAP_UNKNOWN}),
    (unmap_less, {Rule.WRONG_SIZE}),
    (unmap_less_of_a_page, {Rule.WRONG_SIZE}),
    (unmap_the_other_way, {Rule.WRONG_DIRECTION}),
    (unmap_no_way, {Rule.WRONG_DIRECTION}),
    (unmap_as_a_page, {Rule.WRONG_FUNCTION}),
    (unmap_coherent, {Rule.WRONG_FUNCTION}),
    (free_other_memory, {Rule.WRONG_MEMORY}),
    (sync_after_unmap, {Rule.SYNC_AFTER_UNMAP}),
    (sync_too_much, {Rule.SYNC_RANGE}),
    (sync_the_other_way, {Rule.SYNC_DIRECTION}),
    (give_what_is_given, {Rule.SYNC_OWNER}),
    (unmap_a_part_of_a_list, {Rule.WRONG_COUNT, Rule.WRONG_SIZE}),
    (map_twice, {Rule.OVERLAP}),
]


@pytest.mark.parametrize(("wrong", "rules"), MISUSES, ids=[wrong.__name__ for wrong, _ in MISUSES])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_wrong_driver(
    driver: MakeDriver, kind: str, wrong: Callable[[Driver], None], rules: set[Rule]
) -> None:
    rig = await driver(kind)
    with suppress(DmaMappingError):
        wrong(rig)
    assert {report.rule for report in rig.debug.reports} == rules
    lines, first = inspect.getsourcelines(wrong)
    for report in rig.debug.reports:
        assert report.at[0] == __file__
        assert report.at[2] == wrong.__name__
        assert "rig.dma." in lines[report.at[1] - first]
        assert report.mapped_at is None or report.mapped_at[1] < report.at[1]
    before = rig.debug.count
    rig.machine.kernel.bind(rig.dma.device, None)
    assert rig.debug.count == before + (1 if len(rig.debug) else 0)


@pytest.mark.parametrize("size", [PAGE, 0])
async def test_a_refused_unmap_is_no_unmap(driver: MakeDriver, size: int) -> None:
    """What the API refuses has not happened: the mapping is still known, and its right unmap right."""
    rig = await driver("strict")
    address = rig.dma.map_single(rig.alloc(2 * PAGE), TO_DEVICE)
    for _ in range(2):
        with pytest.raises(DmaMappingError):
            rig.dma.unmap_single(address, size, TO_DEVICE)
    rig.dma.unmap_single(address, 2 * PAGE, TO_DEVICE)
    assert [report.rule for report in rig.debug.reports] == [Rule.WRONG_SIZE] * 2
    with pytest.raises(DmaMappingError):
        rig.dma.unmap_single(address, 2 * PAGE, TO_DEVICE)
    assert rig.debug.reports[-1].rule is Rule.DOUBLE_UNMAP
    assert len(rig.debug) == 0


async def test_a_raise_is_in_time(driver: MakeDriver) -> None:
    """The wrong unmap is not made, the wrong sync copies nothing."""
    rig = await driver("strict", raises=True, untrusted=True)
    buffer = rig.alloc(100)
    address = rig.dma.map_single(buffer, FROM_DEVICE)
    rig.bus.write(address, b"bounced")
    with pytest.raises(DmaMisuseError, match="in another direction"):
        rig.dma.sync_single_for_cpu(address, 100, TO_DEVICE)
    with pytest.raises(DmaMisuseError, match="with another size"):
        rig.dma.unmap_single(address, 64, FROM_DEVICE)
    assert not buffer.any()
    rig.bus.write(address, b"again")
    rig.dma.unmap_single(address, 100, FROM_DEVICE)
    assert bytes(buffer[:7]) == b"agained"
    with pytest.raises(DmaAborted):
        rig.bus.write(address, b"late")
    assert rig.debug.count == 2
