"""ATS through the whole machine: the driver turns it on and off, the unmap's flush reaches the device, or does not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pvfio.host import IommuConfig
from pvfio.silicon import DmaAborted, Requester

pytestmark = pytest.mark.touches_c

PAGE = 4096
BASE = 0x40_0000


def bus_of(function: Any) -> Requester:
    bus = function.bus
    assert isinstance(bus, Requester)
    return bus


@pytest.fixture
async def machine(emulated: Callable[..., Awaitable[Any]]) -> Any:
    return await emulated(ats=True)


async def test_a_missing_device_tlb_invalidation_means_stale_dma(machine: Any) -> None:
    """Everything in the guest and the host is as it should be, and the memory is not the device's any more."""
    bus = bus_of(machine.functions[0])
    async with machine.vfio.open_device(machine.names[0]) as device:
        container = device.container
        await device.set_bus_master()
        kept = await container.alloc(PAGE, map=False)
        await container.map_dma(BASE, kept)
        bus.write(BASE, b"mapped")
        assert bus.atc_stats().entries == 1
        bus.lose_invalidations(1)
        assert await container.unmap_dma(BASE, PAGE) == PAGE
        bus.write(BASE, b"stale!")
        assert kept[:6].tobytes() == b"stale!"
        assert bus.atc_stats().lost == 1

        other = await container.alloc(PAGE, map=False)
        await container.map_dma(BASE, other)
        bus.write(BASE, b"wrong!")
        assert (kept[:6].tobytes(), other[0]) == (b"wrong!", 0)
        assert await container.unmap_dma(BASE, PAGE) == PAGE
        with pytest.raises(DmaAborted):
            bus.write(BASE, b"after!")
        assert kept[:6].tobytes() == b"wrong!"


async def test_every_unmap_tells_the_device(machine: Any) -> None:
    bus = bus_of(machine.functions[0])
    async with machine.vfio.open_device(machine.names[0]) as device:
        container = device.container
        await device.set_bus_master()
        for turn in range(5):
            buffer = await container.alloc(64 * PAGE, iova=BASE, scattered=turn % 2 == 1)
            for page in range(64):
                bus.write(BASE + page * PAGE, b"x")
            before = bus.atc_stats()
            assert before.entries > 0
            await container.free(buffer)
            after = bus.atc_stats()
            assert (after.entries, after.invalidations) == (0, before.invalidations + 1)


async def test_blocking_turns_it_off_and_a_reset_empties_it(machine: Any) -> None:
    function, pci = machine.functions[0], machine.kernel.devices[0]
    bus = bus_of(function)
    async with machine.vfio.open_device(machine.names[0]) as device:
        await device.set_bus_master()
        await device.container.alloc(PAGE, iova=BASE)
        bus.write(BASE, b"x")
        assert (pci.ats_enabled, function.ats_enabled, bus.atc_stats().entries) == (True, True, 1)
        await device.reset()
        assert (pci.ats_enabled, bus.atc_stats().entries) == (True, 0)
        bus.write(BASE, b"x")
        assert bus.atc_stats().entries == 1
        # The release after a refused invalidation: ATS is off before the device is blocked, so nothing stale is left.
        bus.lose_invalidations(100)
        machine.kernel.iommu.attach(machine.kernel.iommu.blocking, pci)
        assert (pci.ats_enabled, bus.atc_stats().entries) == (False, 0)
        with pytest.raises(DmaAborted):
            bus.write(BASE, b"y")
        bus.lose_invalidations(0)


@pytest.mark.parametrize(("iommu_has", "device_has"), [(False, True), (True, False)])
async def test_without_it_on_both_sides_nothing_is_cached(
    emulated: Callable[..., Awaitable[Any]], iommu_has: bool, device_has: bool
) -> None:
    machine = await emulated(config=IommuConfig(ats=iommu_has), ats=device_has)
    bus = bus_of(machine.functions[0])
    async with machine.vfio.open_device(machine.names[0]) as device:
        await device.set_bus_master()
        await device.container.alloc(PAGE, iova=BASE)
        bus.write(BASE, b"x")
        assert (bus.atc_stats().requests, bus.tlb_stats().entries) == (0, 1)


async def test_a_guest_that_turns_it_on_where_the_iommu_has_none(
    emulated: Callable[..., Awaitable[Any]],
) -> None:
    machine = await emulated(config=IommuConfig(ats=False), ats=True)
    bus, pci = bus_of(machine.functions[0]), machine.kernel.devices[0]
    async with machine.vfio.open_device(machine.names[0]) as device:
        await device.set_bus_master()
        buffer = await device.container.alloc(PAGE, iova=BASE)
        pci.enable_ats()
        bus.write(BASE, b"x")
        stats = bus.atc_stats()
        assert (stats.requests, stats.untranslated, stats.entries) == (1, 1, 0)
        await device.container.free(buffer)
        with pytest.raises(DmaAborted):
            bus.write(BASE, b"y")
