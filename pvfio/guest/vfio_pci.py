"""vfio-pci: a PCI function in the hands of a process.

Opening it for the first time forbids its DMA, enables it and resets it; the last close forbids its DMA, tears
its interrupts down and resets it. In between: regions (BARs and configuration space), mapping, interrupts,
reset. The MSI-X table is the kernel's: reads give ones, writes are dropped, and the pages of table and PBA
cannot be mapped. Rules and errnos: Linux vfio_pci_core.c and vfio_pci_rdwr.c.

Not modelled: bus reset (hot reset answers ENODEV, as for a bus that cannot be reset), expansion ROMs, VGA,
ioeventfds, device features (ENOTTY), power management of an idle device.
"""

from __future__ import annotations

import errno
import logging
import struct
from typing import TYPE_CHECKING, Any

import trio

from pvfio.abi import ffi, lib
from pvfio.errors import DeviceFailed, VfioError
from pvfio.guest.vfio_config import VirtualConfig
from pvfio.guest.vfio_files import FileTable, argument, write_capabilities
from pvfio.guest.vfio_irq import Spawn, VfioIrqs

if TYPE_CHECKING:
    from pvfio.guest.pci import PciDevice
    from pvfio.guest.vfio_group import VfioGroup

__all__ = ["DeviceFile", "VfioPciDevice"]

_log = logging.getLogger("pvfio.guest.vfio_pci")

_SHIFT = 40
_MASK = (1 << _SHIFT) - 1
_PAGE = 4096
_NO_HOT_RESET = (lib.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, lib.VFIO_DEVICE_PCI_HOT_RESET)

Area = tuple[int, int]


class VfioPciDevice:
    """A function bound to vfio-pci; ``users`` counts its open files, ``claimed``: one is bound to an iommufd.

    The rest exists while it is open.
    """

    config: VirtualConfig
    irqs: VfioIrqs

    def __init__(self, pci: PciDevice, spawn: Spawn) -> None:
        self.pci = pci
        self.users = 0
        self.claimed = False
        self.resettable = pci.has_flr
        self.idle = trio.Event()
        self.idle.set()
        self._spawn = spawn
        self._lock = trio.Lock()
        self._closed_areas = self._msix_pages()

    async def open(self) -> None:
        """Another user. The first one finds the device reset. Cancelled or failed: no user was added."""
        async with self._lock:
            if self.users == 0:
                await self._enable()
                self.idle = trio.Event()
            self.users += 1

    async def close(self) -> None:
        """One user fewer; the last one leaves it reset and unable to make DMA. Not cancelled, and bounded in
        time.
        """
        with trio.CancelScope(shield=True):
            async with self._lock:
                self.users -= 1
                if self.users == 0:
                    await self._disable()
                    self.idle.set()

    async def reset(self) -> None:
        """Function level reset; command, BARs and MSI-X are put back. Raises EINVAL where it cannot be reset."""
        if not self.resettable:
            raise VfioError(errno.EINVAL, "DEVICE_RESET", "no function level reset", device=self.pci.name)
        await self.pci.reset()

    async def _enable(self) -> None:
        self.pci.disable()
        self.pci.set_command(on=lib.PCI_COMMAND_MEMORY, off=lib.PCI_COMMAND_INTX_DISABLE)
        if self.resettable:
            await self.pci.reset()
        else:
            await trio.lowlevel.checkpoint()
        self.irqs = VfioIrqs(self.pci, self._spawn)
        self.config = VirtualConfig(self.pci, self.irqs.set_intx_disabled)

    async def _disable(self) -> None:
        self.pci.disable()
        self.irqs.tear_down()
        if not self.resettable:
            return
        try:
            await self.pci.reset()
        except (OSError, DeviceFailed) as error:
            _log.warning("%s: not reset when it was closed: %s", self.pci.name, error)

    def _msix_pages(self) -> dict[int, list[Area]]:
        """By BAR, the pages that hold the MSI-X table or the PBA."""
        pages: dict[int, list[Area]] = {}
        msix = self.pci.msix
        if msix is not None:
            table = (msix.table_bar, msix.table_offset, msix.vectors * lib.PCI_MSIX_ENTRY_SIZE)
            pba = (msix.pba_bar, msix.pba_offset, -(-msix.vectors // 64) * 8)
            for bar, start, size in (table, pba):
                first = start & -_PAGE
                last = -(-(start + size) // _PAGE) * _PAGE
                pages.setdefault(bar, []).append((first, last - first))
        return pages

    def closed_areas(self, index: int) -> tuple[Area, ...]:
        """(offset, size) of the pages of a BAR that nobody may map."""
        return tuple(self._closed_areas.get(index, ()))

    def bar_size(self, index: int) -> int:
        """Bytes of a BAR, 0 for none."""
        return next((bar.size for bar in self.pci.bars if bar.index == index), 0)

    def areas(self, index: int) -> tuple[Area, ...]:
        """(offset, size) of what can be mapped of a BAR, lowest first."""
        bars = self.pci.channel.bars(self.pci.function)
        areas = [area for bar in bars if bar.index == index for area in bar.mmap_areas]
        for closed, length in self.closed_areas(index):
            areas = [rest for area in areas for rest in _without(area, closed, closed + length)]
        return tuple(sorted(areas))

    def region(self, index: int) -> tuple[int, int]:
        """(size, VFIO_REGION_INFO_* flags) of a region. Raises EINVAL for one a PCI device cannot have."""
        rw: int = lib.VFIO_REGION_INFO_FLAG_READ | lib.VFIO_REGION_INFO_FLAG_WRITE
        if index == lib.VFIO_PCI_CONFIG_REGION_INDEX:
            return self.config.size, rw
        if index == lib.VFIO_PCI_ROM_REGION_INDEX:
            return 0, 0
        if not 0 <= index < lib.VFIO_PCI_ROM_REGION_INDEX:
            raise self.error(errno.EINVAL, "GET_REGION_INFO", f"region {index}")
        size = self.bar_size(index)
        if not size:
            return 0, 0
        return size, rw | (lib.VFIO_REGION_INFO_FLAG_MMAP if self.areas(index) else 0)

    def read(self, position: int, size: int) -> int:
        """1, 2, 4 or 8 bytes of a region at ``index << 40 | offset``, little-endian."""
        index, offset = self._locate(position, size, "read")
        if index == lib.VFIO_PCI_CONFIG_REGION_INDEX:
            return self.config.read(offset, size)
        value = 0
        for at, width, hidden in self._bar_pieces(index, offset, size, "read"):
            piece = (1 << 8 * width) - 1
            if not hidden:
                piece = self.pci.channel.mmio_read(self.pci.function, index, at, width)
            value |= piece << 8 * (at - offset)
        return value

    def write(self, position: int, value: int, size: int) -> None:
        """The counterpart of ``read``. Raises ``trio.WouldBlock`` where it asks for a function level reset."""
        index, offset = self._locate(position, size, "write")
        if not 0 <= value < 1 << 8 * size:
            raise self.error(errno.EINVAL, "write", f"value {value:#x} is not {size} bytes")
        if index == lib.VFIO_PCI_CONFIG_REGION_INDEX:
            if self.config.asks_for_reset(offset, value, size):
                raise trio.WouldBlock
            self.config.write(offset, value, size)
            return
        for at, width, hidden in self._bar_pieces(index, offset, size, "write"):
            if not hidden:
                piece = value >> 8 * (at - offset) & (1 << 8 * width) - 1
                self.pci.channel.mmio_write(self.pci.function, index, at, width, piece)

    async def write_sleeping(self, position: int, value: int, size: int) -> None:
        """A write that ``write`` would not make: to device control, with the reset it asks for."""
        _, offset = self._locate(position, size, "write")
        self.config.write(offset, value, size)
        if self.config.asks_for_reset(offset, value, size):
            await self.reset()

    def map(self, position: int, size: int) -> memoryview:
        """Maps whole pages of one area of a BAR. Raises EINVAL for anything else."""
        index, offset = position >> _SHIFT, position & _MASK
        inside = index < lib.VFIO_PCI_ROM_REGION_INDEX and any(
            start <= offset and offset + size <= start + length for start, length in self.areas(index)
        )
        if not inside or size <= 0 or offset % _PAGE or size % _PAGE:
            raise self.error(errno.EINVAL, "mmap", f"region {index} offset {offset:#x} size {size:#x}")
        return self.pci.channel.map_area(self.pci.function, index, offset, size)

    def error(self, number: int, operation: str, reason: str) -> VfioError:
        """A VfioError that names this device."""
        return VfioError(number, operation, reason, device=self.pci.name)

    def _locate(self, position: int, size: int, operation: str) -> tuple[int, int]:
        index, offset = position >> _SHIFT, position & _MASK
        if size not in (1, 2, 4, 8):
            raise self.error(errno.EINVAL, operation, f"{size} bytes")
        if index == lib.VFIO_PCI_CONFIG_REGION_INDEX:
            return index, offset
        length = self.bar_size(index) if 0 <= index < lib.VFIO_PCI_ROM_REGION_INDEX else 0
        if offset + size > length:
            raise self.error(errno.EINVAL, operation, f"region {index} offset {offset:#x} size {size}")
        return index, offset

    def _bar_pieces(self, index: int, offset: int, size: int, operation: str) -> list[tuple[int, int, bool]]:
        """An access as aligned (offset, width, in the MSI-X table) pieces. Raises EIO with decoding off."""
        if not self.config.memory_enabled():
            raise self.error(errno.EIO, operation, "memory decoding is off")
        msix = self.pci.msix
        start = end = 0
        if msix is not None and msix.table_bar == index:
            start = msix.table_offset
            end = start + msix.vectors * lib.PCI_MSIX_ENTRY_SIZE
        pieces = []
        at, last = offset, offset + size
        while at < last:
            width = 8
            while at % width or at + width > last:
                width //= 2
            pieces.append((at, width, start <= at < end))
            at += width
        return pieces


class DeviceFile:
    """One open file of a device. It keeps its group's file, and so the container, in place."""

    def __init__(self, device: VfioPciDevice, group: VfioGroup, files: FileTable) -> None:
        self._device = device
        self._group = group
        self._files = files
        self._open = True
        self.fd = files.install(self)

    def ioctl(self, request: int, arg: Any = 0) -> int:
        """A request that never sleeps. Raises VfioError; EBADF once the file is closed, ENOTTY for an unknown
        one.
        """
        self._check()
        if request == lib.VFIO_DEVICE_GET_INFO:
            self._get_info(arg)
        elif request == lib.VFIO_DEVICE_GET_REGION_INFO:
            self._get_region_info(arg)
        elif request == lib.VFIO_DEVICE_GET_IRQ_INFO:
            self._get_irq_info(arg)
        elif request == lib.VFIO_DEVICE_SET_IRQS:
            typed = argument("vfio_irq_set", arg, "SET_IRQS")
            self._device.irqs.set_irqs(typed)
        elif request == lib.VFIO_DEVICE_RESET:
            raise trio.WouldBlock
        else:
            number = errno.ENODEV if request in _NO_HOT_RESET else errno.ENOTTY
            raise self._device.error(number, "ioctl", f"request {request:#x}")
        return 0

    async def ioctl_sleeping(self, request: int, arg: Any = 0) -> int:
        """As ``ioctl``, and DEVICE_RESET. Cancelled in a reset: the device may be left unable to make DMA."""
        await trio.lowlevel.checkpoint()
        if request != lib.VFIO_DEVICE_RESET:
            return self.ioctl(request, arg)
        self._check()
        await self._device.reset()
        return 0

    def read(self, position: int, size: int) -> int:
        """See ``VfioPciDevice.read``."""
        self._check()
        return self._device.read(position, size)

    def write(self, position: int, value: int, size: int) -> None:
        """See ``VfioPciDevice.write``."""
        self._check()
        self._device.write(position, value, size)

    async def write_sleeping(self, position: int, value: int, size: int) -> None:
        """See ``VfioPciDevice.write_sleeping``."""
        self._check()
        await self._device.write_sleeping(position, value, size)

    def map(self, position: int, size: int) -> memoryview:
        """See ``VfioPciDevice.map``."""
        self._check()
        return self._device.map(position, size)

    def mmio(self, index: int) -> Any:
        """The ``struct pv_mmio *`` of a BAR for stores in C, or None."""
        self._check()
        if not self._device.bar_size(index):
            return None
        return self._device.pci.channel.mmio(self._device.pci.function, index)

    def closed_areas(self, index: int) -> tuple[Area, ...]:
        """See ``VfioPciDevice.closed_areas``."""
        return self._device.closed_areas(index)

    async def close(self) -> None:
        """Closes the file; the last one resets the device. Safe to call twice; is not cancelled."""
        if not self._open:
            return
        self._open = False
        self._files.remove(self.fd)
        try:
            await self._device.close()
        finally:
            self._group.drop_user()

    def _check(self) -> None:
        if not self._open:
            raise self._device.error(errno.EBADF, "device file", "closed")

    def _get_info(self, arg: Any) -> None:
        base = ffi.offsetof("struct vfio_device_info", "cap_offset")
        info = argument("vfio_device_info", arg, "GET_INFO", base)
        if info.argsz >= ffi.sizeof("struct vfio_device_info"):
            info.cap_offset = 0
        info.flags = lib.VFIO_DEVICE_FLAGS_PCI
        if self._device.resettable:
            info.flags |= lib.VFIO_DEVICE_FLAGS_RESET
        info.num_regions = lib.VFIO_PCI_NUM_REGIONS
        info.num_irqs = lib.VFIO_PCI_NUM_IRQS

    def _get_region_info(self, arg: Any) -> None:
        info = argument("vfio_region_info", arg, "GET_REGION_INFO")
        size, flags = self._device.region(info.index)
        info.size = size
        info.offset = info.index << _SHIFT
        info.flags = flags
        chain: list[tuple[int, int, bytes]] = []
        areas = self._device.areas(info.index) if flags & lib.VFIO_REGION_INFO_FLAG_MMAP else ()
        if areas and areas != ((0, size),):
            body = struct.pack("<II", len(areas), 0) + b"".join(struct.pack("<QQ", *a) for a in areas)
            chain.append((lib.VFIO_REGION_INFO_CAP_SPARSE_MMAP, 1, body))
            info.flags |= lib.VFIO_REGION_INFO_FLAG_CAPS
        write_capabilities(info, ffi.sizeof("struct vfio_region_info"), chain)

    def _get_irq_info(self, arg: Any) -> None:
        info = argument("vfio_irq_info", arg, "GET_IRQ_INFO")
        info.flags, info.count = self._device.irqs.info(info.index)


def _without(area: Area, start: int, end: int) -> list[Area]:
    """What is left of an area when [start, end) is taken out."""
    first, last = area[0], area[0] + area[1]
    pieces = [(first, min(last, start)), (max(first, end), last)]
    return [(a, b - a) for a, b in pieces if a < b]
