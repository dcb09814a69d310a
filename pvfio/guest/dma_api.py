"""The DMA API: how a driver of the guest kernel gives memory to its device and takes it back.

``DmaDevice`` is a device's DMA side. Streaming mappings (``map_single`` and its neighbours) lend memory to the
device for a direction; what a DMA address is, and what an unmap means, is the group's default domain's affair
(dma_domain.py). Names and rules: Linux Documentation/core-api/dma-api.rst, dma-api-howto.rst, dma-attributes.rst.

Not modelled: CPU caches that do not snoop (ownership between syncs is for the checks and for bounce buffers), DMA
of MMIO (P2P), segment boundaries, per-device pools.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from pvfio.errors import DmaMappingError
from pvfio.guest.dma_domain import DmaDomain

if TYPE_CHECKING:
    from pvfio.guest.kernel import GuestKernel
    from pvfio.guest.pci import PciDevice
    from pvfio.memory import DmaBuffer

__all__ = ["DMA_ATTR_SKIP_CPU_SYNC", "Direction", "DmaDebugHook", "DmaDevice", "DmaMappingError"]

DMA_ATTR_SKIP_CPU_SYNC = 1 << 5
"""The caller syncs itself: nothing is copied at map and unmap."""


class Direction(IntEnum):
    """Whom the data is for (Linux ``enum dma_data_direction``)."""

    BIDIRECTIONAL = 0
    TO_DEVICE = 1
    FROM_DEVICE = 2
    NONE = 3


# BIDIRECTIONAL, TO_DEVICE, FROM_DEVICE as page-table permissions; stage 1 has no write-only.
_PERM = (3, 1, 3)


class DmaDebugHook(Protocol):
    """Who is told of every map, unmap and sync. ``device`` is the PCI name; ``kind`` is "single", "page",
    "scatter-gather" or "coherent"; addresses are DMA addresses, sizes bytes, ``cpu`` names the memory, ``entries``
    is the length of the list.

    ``mapped`` comes after a success, ``unmapping`` and ``syncing`` before anything is done, ``unbound`` when the
    driver lets go of its device. What it raises goes to the driver.
    """

    def mapped(
        self,
        device: str,
        kind: str,
        address: int,
        size: int,
        direction: int,
        *,
        cpu: int = 0,
        entries: int = 1,
    ) -> None: ...
    def unmapping(
        self,
        device: str,
        kind: str,
        address: int,
        size: int,
        direction: int,
        *,
        cpu: int = 0,
        entries: int = 1,
    ) -> None: ...
    def syncing(
        self,
        device: str,
        kind: str,
        address: int,
        size: int,
        direction: int,
        *,
        to_cpu: bool,
        entries: int = 1,
    ) -> None: ...
    def unbound(self, device: str) -> None: ...


class DmaDevice:
    """A device's DMA side.

    ``mask_bits``: how wide an address it can put on the bus. Without an IOMMU, or behind an identity domain, DMA
    addresses are GPAs. Every method is synchronous; all raise ``DmaMappingError``.
    """

    def __init__(
        self, kernel: GuestKernel, device: PciDevice, *, mask_bits: int = 64, untrusted: bool = False
    ) -> None:
        self.kernel = kernel
        self.device = device
        self.name = device.name
        self.untrusted = untrusted
        self._group = device.iommu_group
        self._direct = DmaDomain(kernel.memory, None, "identity")
        self._debug: DmaDebugHook | None = kernel.dma_debug
        self._limit = 0
        self.set_mask(mask_bits)

    @property
    def domain(self) -> DmaDomain:
        """Where its mappings go now."""
        group = self._group
        return self._direct if group is None else group.dma

    def set_mask(self, bits: int) -> None:
        """Says how many address bits the device has. Raises EIO for a width that cannot work."""
        if not 12 <= bits <= 64:
            raise self._error(errno.EIO, "set DMA mask", f"{bits} bits")
        self._limit = (1 << bits) - 1

    def map_single(self, buffer: DmaBuffer, direction: int, *, attrs: int = 0) -> int:
        """Lends a contiguous buffer to the device and returns its DMA address.

        Raises EINVAL (no bytes, no direction, not contiguous), EFAULT (not memory a device can be given), ENOMEM
        (no IOVA, no table page), EIO (out of the device's reach).
        """
        size = buffer.nbytes
        if not size or direction not in (0, 1, 2) or not buffer.flags.c_contiguous:
            raise self._error(errno.EINVAL, "map", "no bytes, no direction, or not contiguous", size=size)
        try:
            address = self.domain.map_buffer(buffer.vaddr, size, _PERM[direction], self._limit)
        except OSError as error:
            raise self._error(error.errno or errno.EIO, "map", str(error), size=size) from error
        if self._debug is not None:
            self._debug.mapped(self.name, "single", address, size, direction, cpu=buffer.vaddr)
        return address

    def unmap_single(self, address: int, size: int, direction: int, *, attrs: int = 0) -> None:
        """Takes memory back. Raises EINVAL for what is not mapped so; nothing has changed then."""
        if self._debug is not None:
            self._debug.unmapping(self.name, "single", address, size, direction)
        try:
            self.domain.unmap(address, size)
        except OSError as error:
            raise self._error(errno.EINVAL, "unmap", str(error), address=address, size=size) from error

    def close(self) -> None:
        """The driver lets go of its device. What it left mapped stays mapped."""
        if self._debug is not None:
            self._debug.unbound(self.name)

    def _error(
        self, number: int, operation: str, reason: str, *, address: int | None = None, size: int | None = None
    ) -> DmaMappingError:
        return DmaMappingError(number, operation, reason, device=self.name, iova=address, length=size)
