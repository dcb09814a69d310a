"""A device: its regions, its interrupts, its reset.

The abstract surface, and the few things every driver of a PCI device does through config space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pvfio.abi import lib

if TYPE_CHECKING:
    from pvfio.vfio.container import Container
    from pvfio.vfio.irq import Irq
    from pvfio.vfio.region import Region

__all__ = ["Device", "DeviceInfo"]

_COMMAND = 4
_COMMAND_MEMORY = 2
_COMMAND_MASTER = 4


@dataclass(frozen=True)
class DeviceInfo:
    """VFIO_DEVICE_GET_INFO: flags (VFIO_DEVICE_FLAGS_*), number of regions, number of interrupt indexes."""

    flags: int
    num_regions: int
    num_irqs: int


class Device(ABC):
    """An open device. Use as ``async with``: leaving closes it, which resets it."""

    name: str
    """As the system names it, "SSSS:BB:DD.F"."""
    container: Container
    info: DeviceInfo

    async def __aenter__(self) -> Self:
        # Opening was the checkpoint: one here could be cancelled with nobody to close.
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @abstractmethod
    def region(self, index: int) -> Region:
        """A region by VFIO_PCI_*_REGION_INDEX. Raises EINVAL for one the device cannot have."""

    @abstractmethod
    def irq(self, index: int) -> Irq:
        """An interrupt by VFIO_PCI_*_IRQ_INDEX. Raises EINVAL for one the device cannot have."""

    @abstractmethod
    async def reset(self) -> None:
        """Resets the function; configuration space keeps what the kernel restores (command, BARs, MSI-X).

        Raises EINVAL where the device cannot be reset. Cancelled: it may or may not have been reset.
        """

    @abstractmethod
    async def close(self) -> None:
        """Tears interrupts down, resets the device and gives it back. Safe to call twice; finishes if
        cancelled.
        """

    @property
    def config(self) -> Region:
        """PCI configuration space."""
        return self.region(lib.VFIO_PCI_CONFIG_REGION_INDEX)

    async def set_bus_master(self, on: bool = True) -> None:
        """Lets the device do DMA and answer at its BARs, or (``on=False``) forbids the DMA.

        A device is opened with memory decoding on and DMA forbidden. Cancelled: as it was.
        """
        command = await self.config.read(_COMMAND, 2)
        command = (command | _COMMAND_MEMORY | _COMMAND_MASTER) if on else command & ~_COMMAND_MASTER
        await self.config.write(_COMMAND, command, 2)

    async def find_capability(self, capability: int) -> int | None:
        """Offset of a PCI capability in config space, or None. Cancelling leaves nothing behind."""
        config = self.config
        if not await config.read(6, 2) & 0x10:
            return None
        offset = await config.read(0x34, 1) & 0xFC
        for _ in range(48):
            if not offset:
                return None
            header = await config.read(offset, 2)
            if header & 0xFF == capability:
                return offset
            offset = header >> 8 & 0xFC
        return None
