"""The DMA API against the real IOMMU: what a mapping lets a device do, and what is left of it afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from pvfio.guest.dma_api import Direction, DmaDevice
from pvfio.silicon import DmaAborted

pytestmark = pytest.mark.touches_c


async def test_map_single_strict(emulated: Any) -> None:
    machine = await emulated(driver=None, default_domain="strict")
    device = machine.kernel.devices[0]
    device.enable()
    machine.kernel.bind(device, "testdev")
    bus = machine.functions[0].bus
    dma = DmaDevice(machine.kernel, device)
    buffer = machine.memory.alloc(3000)
    buffer[:] = 7
    address = dma.map_single(buffer[100:], Direction.TO_DEVICE)
    assert bus.read(address, 2900) == bytes([7]) * 2900
    with pytest.raises(DmaAborted):
        bus.write(address, b"no")
    dma.unmap_single(address, 2900, Direction.TO_DEVICE)
    with pytest.raises(DmaAborted):
        bus.read(address, 1)
