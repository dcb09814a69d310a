"""vPCI: the PCI buses Hyper-V gives a guest, one per PCI domain (segment), one slot, up to eight functions.

A bus is named by the instance GUID of its VMBus channel; the logical ids of its functions follow from it.
This is also the channel the guest is handed: offers, configuration space, BARs, interrupts, reset. A
function that was taken away by surprise reads as all ones and drops writes. Not modelled: VMBus messages
and their ring, resource assignment, the hypervisor's interrupt retargeting (a message goes where it was
composed for), SR-IOV.
"""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from pvfio.abi.hyperv import logical_id_prefix
from pvfio.host.domains import DeviceDomains
from pvfio.silicon import MSI_START, BarInfo, BusFunction, Requester

__all__ = ["VpciBus", "VpciFunction"]

_SIZES: Final = frozenset((1, 2, 4, 8))
_CONFIG_SIZES: Final = frozenset((1, 2, 4))
_MAX_FUNCTIONS: Final = 8
_FIRST_MSI_DATA: Final = 0x20
_LAST_MSI_DATA: Final = 0xFFF


class VpciFunction(BusFunction, Protocol):
    """What a bus needs of a device's function; ``pvfio.devices.pci.PciFunction`` is one.

    ``map_area`` gives pages of a BAR that a driver may map; it raises ``OSError`` EINVAL for what is not memory.
    """

    def map_area(self, bar: int, offset: int, size: int) -> memoryview: ...


F = TypeVar("F", bound=VpciFunction)


class _Slot:
    """A plugged function and the interrupt messages composed for it."""

    def __init__(self, function: VpciFunction, requester: Requester) -> None:
        self.function = function
        self.requester = requester
        self.messages: set[int] = set()
        self.free: list[int] = []
        self.next_data = _FIRST_MSI_DATA


class VpciBus:
    """One bus. Made by ``Hypervisor.add_bus``; functions are numbered 0 to 7."""

    def __init__(self, instance_guid: uuid.UUID, segment: int, domains: DeviceDomains) -> None:
        self.instance_guid = instance_guid
        self.segment = segment
        self.prefix = logical_id_prefix(instance_guid.bytes_le)
        self._domains = domains
        self._slots: dict[int, _Slot] = {}

    # The host's side.

    @property
    def functions(self) -> dict[int, VpciFunction]:
        """The plugged functions by number."""
        return {number: slot.function for number, slot in sorted(self._slots.items())}

    def device_name(self, function: int) -> str:
        """``SSSS:00:00.F``, as the guest will call it."""
        return f"{self.segment:04x}:00:00.{function}"

    def logical_id(self, function: int) -> int:
        """The logical device ID of a function number."""
        return self.prefix | function

    def plug(self, function: int, make: Callable[[Requester], F], *, pviommu: bool = True) -> F:
        """Makes a device on this bus. ``make`` is called with its bus master; what it returns is the
        function.

        ``pviommu=False``: the hypervisor says the device has no para-virtualized IOMMU, and its DMA goes to
        guest memory by GPA. Raises ``ValueError`` for a function number above 7 or in use.
        """
        if not 0 <= function < _MAX_FUNCTIONS or function in self._slots:
            raise ValueError(f"{self.device_name(function)}: not a free function number")
        device_id = self.logical_id(function)
        requester = self._domains.add_device(self.device_name(function), device_id, enabled=pviommu)
        try:
            made = make(requester)
        except BaseException:
            self._domains.remove_device(device_id)
            raise
        self._slots[function] = _Slot(made, requester)
        return made

    def unplug(self, function: int) -> None:
        """Takes a function away, whatever the guest is doing with it; its task is the caller's to cancel."""
        slot = self._slots.pop(function)
        for data in slot.messages:
            slot.requester.set_msi(data, -1)
        slot.function.connect_intx(None)
        slot.function.close()
        self._domains.remove_device(self.logical_id(function))

    def close(self) -> None:
        """Takes all functions away."""
        for function in list(self._slots):
            self.unplug(function)

    # The guest's side. `function` is a number; one that is not there is a device that was removed.

    def offers(self) -> list[int]:
        """The function numbers the host offers, lowest first."""
        return sorted(self._slots)

    def config_read(self, function: int, offset: int, size: int) -> int:
        """Configuration space, 1, 2 or 4 bytes. ``OSError`` (EINVAL) for another size."""
        slot = self._slots.get(function)
        if size not in _CONFIG_SIZES:
            raise OSError(errno.EINVAL, f"a configuration access of {size} bytes")
        return slot.function.config_read(offset, size) if slot else (1 << 8 * size) - 1

    def config_write(self, function: int, offset: int, size: int, value: int) -> None:
        """As ``config_read``."""
        slot = self._slots.get(function)
        if size not in _CONFIG_SIZES:
            raise OSError(errno.EINVAL, f"a configuration access of {size} bytes")
        if slot:
            slot.function.config_write(offset, size, value)

    def bars(self, function: int) -> tuple[BarInfo, ...]:
        """The BARs of a function, lowest index first; none of a removed one."""
        slot = self._slots.get(function)
        return slot.function.bars() if slot else ()

    def mmio_read(self, function: int, bar: int, offset: int, size: int) -> int:
        """A BAR, 1, 2, 4 or 8 bytes. ``OSError`` (EINVAL) for another size or outside the BAR."""
        slot = self._slots.get(function)
        if slot:
            return slot.function.read(bar, offset, size)
        if size not in _SIZES:
            raise OSError(errno.EINVAL, f"an access of {size} bytes")
        return (1 << 8 * size) - 1

    def mmio_write(self, function: int, bar: int, offset: int, size: int, value: int) -> None:
        """As ``mmio_read``."""
        slot = self._slots.get(function)
        if slot:
            slot.function.write(bar, offset, size, value)
        elif size not in _SIZES:
            raise OSError(errno.EINVAL, f"an access of {size} bytes")

    def mmio(self, function: int, bar: int) -> Any:
        """The ``struct pv_mmio *`` of a BAR with a path in C, else None."""
        slot = self._slots.get(function)
        return slot.function.mmio(bar) if slot else None

    def map_area(self, function: int, bar: int, offset: int, size: int) -> memoryview:
        """Memory of a BAR. ``OSError``: EINVAL outside its mmap areas, ENODEV for a removed function."""
        return self._slot(function).function.map_area(bar, offset, size)

    def compose_msi(self, function: int, vector: int, eventfd: int) -> tuple[int, int]:
        """An interrupt message that rings ``eventfd`` (which is duplicated) when the function sends it.

        Returns (address, data) for the vector's MSI-X entry; the data is unlike any other of this function.
        Raises ``OSError``: ENOSPC when the function has no message left, EBADF for what is not a file,
        ENODEV.
        """
        slot = self._slot(function)
        if slot.free:
            data = slot.free.pop()
        elif slot.next_data <= _LAST_MSI_DATA:
            data = slot.next_data
            slot.next_data += 1
        else:
            raise OSError(errno.ENOSPC, f"{self.device_name(function)} vector {vector}: no message is free")
        try:
            slot.requester.set_msi(data, eventfd)
        except OSError:
            slot.free.append(data)
            raise
        slot.messages.add(data)
        return MSI_START, data

    def release_msi(self, function: int, data: int) -> None:
        """Ends a message: sent again, it is a fault. Unknown data and removed functions: nothing happens."""
        slot = self._slots.get(function)
        if slot and data in slot.messages:
            slot.requester.set_msi(data, -1)
            slot.messages.discard(data)
            slot.free.append(data)

    def set_intx(self, function: int, callback: Callable[[bool], None] | None) -> None:
        """Where the level of the function's pin goes; called now if it is asserted. ``OSError`` (ENODEV)."""
        self._slot(function).function.connect_intx(callback)

    async def reset(self, function: int) -> None:
        """Function level reset; checkpoints after it was done.

        ``OSError`` (ENODEV) for a removed function.
        """
        await self._slot(function).function.reset()

    def _slot(self, function: int) -> _Slot:
        slot = self._slots.get(function)
        if slot is None:
            raise OSError(errno.ENODEV, f"{self.device_name(function)}: no such function")
        return slot
