"""Bounce buffers: memory a device is given instead of the caller's, with the bytes copied to and fro.

For untrusted devices, whose mappings must not show them what else is in the first and the last page; and, without
an IOMMU, for memory out of a device's reach or not contiguous. A bounce buffer is whole pages, zero outside the
caller's bytes. Rules: Linux kernel/dma/swiotlb.c and dma-iommu. A map copies the caller's bytes in whatever the
direction, for a device may write less than all; one that is at most 256 KiB.

Not modelled: slots smaller than a page (Linux: 2 KiB), areas per CPU, pools that grow, decrypted memory.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np

from pvfio.guest.iova_domain import IovaDomain

if TYPE_CHECKING:
    import numpy.typing as npt

    from pvfio.memory import GuestMemory

__all__ = ["MAX_BOUNCE", "POOL_SIZE", "Bounce", "BouncePool"]

POOL_SIZE = 2 << 20
MAX_BOUNCE = 256 << 10
_PAGE = 4096
_BIDIRECTIONAL, _TO_DEVICE, _FROM_DEVICE = range(3)


class Bounce:
    """One bounce buffer: ``gpa`` and ``whole`` bytes of it, for the caller's ``memory`` (uint8, shape ``(size,)``).

    ``address`` is the DMA address it got.
    """

    __slots__ = ("_slot", "address", "gpa", "memory", "size", "whole")

    def __init__(self, gpa: int, slot: npt.NDArray[np.uint8], memory: npt.NDArray[np.uint8]) -> None:
        self.gpa = gpa
        self.address = 0
        self.memory = memory
        self.size = memory.size
        self.whole = slot.size
        self._slot = slot

    @property
    def pages(self) -> range:
        """The numbers of the pages of its DMA addresses."""
        return range(self.address >> 12, self.address + self.whole >> 12)

    def to_device(self, offset: int = 0, size: int | None = None) -> None:
        """Copies the caller's bytes [offset, offset + size) into the bounce buffer, as far as it has them."""
        end = self.size if size is None else min(offset + size, self.size)
        self._slot[offset:end] = self.memory[offset:end]

    def to_cpu(self, offset: int = 0, size: int | None = None) -> None:
        """Copies back."""
        end = self.size if size is None else min(offset + size, self.size)
        self.memory[offset:end] = self._slot[offset:end]

    def sync(self, direction: int, offset: int, size: int, *, to_cpu: bool) -> None:
        """What ``dma_sync_single_for_cpu`` or ``..._for_device`` copies for that direction."""
        if to_cpu and direction in (_FROM_DEVICE, _BIDIRECTIONAL):
            self.to_cpu(offset, size)
        elif not to_cpu and direction in (_TO_DEVICE, _BIDIRECTIONAL):
            self.to_device(offset, size)


class BouncePool:
    """Guest memory for bounce buffers, contiguous, ``size`` bytes (a power of two), for tasks of ``vps`` virtual
    processors. Raises ``MemoryError``.
    """

    def __init__(self, memory: GuestMemory, size: int = POOL_SIZE, *, vps: int = 1) -> None:
        # An alignment above a page: in one piece, or not at all.
        self._buffer: Any = memory.alloc(size, align=2 * _PAGE)
        ((self.gpa, _),) = memory.runs(self._buffer.vaddr, size)
        self.size = size
        # Not from 0, which is never handed out.
        self._pages = IovaDomain(size, 2 * size - 1, vps=vps)

    @property
    def last(self) -> int:
        """The GPA of its last byte."""
        return self.gpa + self.size - 1

    @property
    def used(self) -> int:
        """How many bounce buffers there are."""
        return self._pages.stats().live

    def take(self, memory: npt.NDArray[np.uint8]) -> Bounce:
        """A bounce buffer for these bytes, with a copy of them. Raises ``OSError`` ENOMEM: too many, or too large."""
        size = memory.size
        if size > MAX_BOUNCE:
            raise OSError(errno.ENOMEM, f"a bounce buffer of {size} bytes: at most {MAX_BOUNCE}")
        try:
            start = self._pages.alloc(size) - self.size
        except OSError:
            raise OSError(errno.ENOMEM, f"no bounce buffer of {size} bytes is free") from None
        whole = -(-size // _PAGE) * _PAGE
        slot = np.asarray(self._buffer[start : start + whole])
        bounce = Bounce(self.gpa + start, slot, memory)
        slot[size:] = 0
        bounce.to_device()
        return bounce

    def give(self, bounce: Bounce) -> None:
        """The bounce buffer is free again."""
        self._pages.free(bounce.gpa - self.gpa + self.size)
