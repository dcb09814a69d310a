"""Where a group's devices make DMA for the kernel: identity, or an IOVA space with strict or lazy flushing.

Identity: a DMA address is a GPA and nothing is mapped. Strict: every mapping has IOVAs of its own, and an unmap
returns when no device can reach the memory any more. Lazy: an unmap clears the entries and returns, and a
flush of the whole domain follows later (flush_queue.py); until then a device may still reach the memory through its
IOTLB. The work of a map and an unmap is C (dma_map.c); what is here decides about flushes and errors.

Not modelled: the machine's policy (kernel command line, firmware); whoever makes a group says what it gets.
"""

from __future__ import annotations

import errno
import typing
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pvfio.abi import ffi, lib
from pvfio.errors import IommuError
from pvfio.guest.flush_queue import FlushQueue, Spawn
from pvfio.guest.iova_domain import IovaDomain
from pvfio.guest.transport import current_vp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pvfio.guest.paging_domain import PagingDomain
    from pvfio.guest.pviommu import PvIommu
    from pvfio.guest.swiotlb import Bounce, BouncePool
    from pvfio.memory import GuestMemory

__all__ = ["DmaDomain", "DomainKind", "Spawn", "check_kind"]

DomainKind = Literal["identity", "strict", "lazy"]

_PAGE = 4096
_OFFSET = _PAGE - 1
_map = lib.pv_dma_map
_unmap = lib.pv_dma_unmap
_unmap_lazy = lib.pv_dma_unmap_lazy
_end = lib.pv_dma_end
_REASONS = {
    errno.EINVAL: "no bytes, or no such mapping",
    errno.EFAULT: "not memory a device can be given",
    errno.ENOMEM: "no IOVAs or no table page",
    errno.EIO: "not contiguous, or out of the device's reach",
}


def check_kind(kind: str) -> DomainKind:
    """The kind, if it is one. Raises ``ValueError``."""
    if kind not in typing.get_args(DomainKind):
        raise ValueError(f"a default domain is identity, strict or lazy, not {kind!r}")
    return typing.cast("DomainKind", kind)


class DmaDomain:
    """The DMA addresses of one group's devices.

    ``domain`` is the paging domain, ``iova`` its allocator, ``queue`` the flush queue where the kind is lazy; None
    otherwise, the first two for identity too. ``bounces`` are its bounce buffers by every page of their DMA
    addresses. Sizes are bytes; ``perm`` is read 1, write 2; ``limit`` is the highest
    address the device can put on the bus. Every method is synchronous. Without an IOMMU only identity can be.
    """

    def __init__(
        self, memory: GuestMemory, iommu: PvIommu | None, kind: DomainKind, *, spawn: Spawn | None = None
    ) -> None:
        self.memory = memory
        self.kind: DomainKind = kind
        self.domain: PagingDomain | None = None
        self.iova: IovaDomain | None = None
        self.queue: FlushQueue | None = None
        self._spawn = spawn
        self._ptr: Any = None
        self.bounces: dict[int, Bounce] = {}
        # What gives a mapping's memory back when it has ended, by the DMA address, where it is not one extent's pin.
        self._release: dict[int, Callable[[], None]] = {}
        # (address, VP) of ended mappings that no flush has covered.
        self._unflushed: list[tuple[int, int]] = []
        if kind != "identity":
            self._translate(iommu)

    def _translate(self, iommu: PvIommu | None) -> None:
        if iommu is None:
            raise IommuError(errno.ENODEV, f"make a {self.kind} domain", "no IOMMU")
        vps = iommu.transport.vps
        first, last = 0, (1 << iommu.width) - 1
        regions = tuple((region.start, region.last) for region in iommu.reserved_regions)
        self.iova = IovaDomain(first, last, vps=vps, reserved=regions)
        self.domain = iommu.paging_domain()
        ptr = lib.pv_dma_create(self.memory.ptr, self.domain.table.ptr, self.iova.ptr, vps)
        if ptr == ffi.NULL:
            self.domain.free()
            raise MemoryError("no memory for a DMA domain")
        self._ptr = ffi.gc(ptr, lib.pv_dma_destroy)
        if self.kind == "lazy":
            self.make_lazy()

    def make_lazy(self) -> None:
        """From strict to lazy, with all its mappings. Raises ``ValueError`` for identity."""
        if self.domain is None:
            raise ValueError("an identity domain flushes nothing")
        self.kind = "lazy"
        self.queue = FlushQueue(self._ptr, self.domain, self._spawn, self._settle)

    def map_buffer(self, vaddr: int, size: int, perm: int, limit: int) -> int:
        """Maps process memory of one allocation and pins it; identity pins nothing. Returns the DMA address.

        Raises ``OSError``: EINVAL (size 0), EFAULT (not DMA memory), ENOMEM (no IOVAs, no table page), EIO (identity:
        not contiguous, or above ``limit``).
        """
        address: int
        if self._ptr is None:
            self._check_live()
            address = lib.pv_dma_direct(self.memory.ptr, vaddr, size, limit)
        else:
            address = _map(self._ptr, current_vp(), vaddr, size, perm, limit)
        if address < 0:
            self._refused(address)
        return address

    def map_phys(self, gpa: int, size: int, perm: int, limit: int) -> int:
        """Maps guest memory that its owner keeps; it must be RAM. Raises ``OSError`` as ``map_buffer``."""
        if self.memory.guest_ptr(gpa, size) == ffi.NULL:
            raise OSError(errno.EFAULT, _REASONS[errno.EFAULT])
        self._check_live()
        address = gpa
        if self._ptr is not None:
            address = lib.pv_dma_map_phys(self._ptr, current_vp(), gpa, size, perm, limit)
        elif gpa + size - 1 > limit:
            address = -errno.EIO
        if address < 0:
            self._refused(address)
        return address

    def map_runs(self, runs: Sequence[tuple[int, int]], perm: int, limit: int, pins: list[int]) -> int:
        """Maps runs (GPA, bytes) of whole pages one after the other, and keeps their pins with the mapping.

        Raises ``OSError`` as ``map_buffer``; the pins are the caller's still then. ``ValueError`` for identity.
        """
        if self._ptr is None:
            self._check_live()
            raise ValueError("an identity domain maps nothing")
        array = ffi.new("struct pv_run[]", [{"gpa": gpa, "size": size} for gpa, size in runs])
        address: int = lib.pv_dma_map_runs(
            self._ptr, current_vp(), array, len(runs), perm, limit, lib.PV_DMA_NO_PIN
        )
        if address < 0:
            self._refused(address)
        if pins:
            self._release[address & ~_OFFSET] = partial(self._unpin, pins)
        return address

    def map_bounce(self, bounce: Bounce, perm: int, limit: int, pool: BouncePool) -> int:
        """Maps a bounce buffer, sets its ``address``, and gives it back to its pool when no device can reach it any
        more after the unmap. Raises ``OSError`` as ``map_phys``; it is the caller's still then.
        """
        address = self.map_phys(bounce.gpa, bounce.whole, perm, limit)
        bounce.address = address
        self.bounces.update((page, bounce) for page in bounce.pages)
        self._release[address] = partial(pool.give, bounce)
        return address

    def unmap(self, address: int, size: int) -> None:
        """Ends a mapping, and flushes it, or leaves that to the queue; nothing to do for identity.

        Raises ``OSError`` EINVAL for what is not mapped with these pages; nothing has changed then.
        """
        if self._ptr is None:
            self._check_live()
            if self._release:
                self._ended(address)
            return
        try:
            if self.queue is None:
                if _unmap(self._ptr, address, size):
                    self._refused(-errno.EINVAL)
                self._flush(address, size)
                return
            flags: int = _unmap_lazy(self._ptr, current_vp(), address, size)
        except OverflowError:
            self._refused(-errno.EINVAL)
        if flags < 0:
            self._unmap_full(flags, address, size)
            return
        if self._release:
            self._ended(address & ~_OFFSET)
        if flags:
            self.queue.added(flags)

    def is_mapped(self, address: int) -> bool:
        """Whether a device can read that byte; always, for identity."""
        if self.domain is None:
            return True
        return self._ptr is not None and self.domain.iova_to_phys(address) is not None

    def flush(self) -> bool:
        """Flushes the queue now; False where the host refuses."""
        return self.queue is None or self.queue.flush()

    def close(self) -> None:
        """Frees it, and the memory of what is still mapped. Raises ``IommuError`` EBUSY while a device is in it."""
        if self.domain is not None and self.iova is not None and self.domain.live:
            self._free(self.domain, self.iova)
        self.bounces.clear()
        for address in list(self._release):
            self._ended(address)

    def _free(self, domain: PagingDomain, iova: IovaDomain) -> None:
        domain.free()
        if self.queue is not None:
            self.queue.close()
        for _, _, pin in iova.ranges():
            if pin >= 0:
                self.memory.unpin(pin)
        self._ptr = self.iova = self.queue = None

    def _check_live(self) -> None:
        if self.kind != "identity" and self._ptr is None:
            raise OSError(errno.ENODEV, "the domain is gone")

    def set_laps(self, laps: Any) -> None:
        """Lets a ``struct pv_laps *`` take the time of every step of maps and unmaps, until it is None again.

        It must live as long. Identity has no steps.
        """
        if self._ptr is not None:
            lib.pv_dma_set_laps(self._ptr, laps or ffi.NULL)

    def _flush(self, address: int, size: int) -> None:
        assert self.domain is not None
        start = address & ~_OFFSET
        if self.domain.flush_range(start, (address + size - 1) | _OFFSET):
            _end(self._ptr, current_vp(), start)
            if self._release:
                self._ended(start)
            if self._unflushed:
                self._settle()
        else:
            # The IOVAs, and the memory, must not be used again before a flush that covers them.
            self._unflushed.append((start, current_vp()))

    def _settle(self) -> None:
        """A flush has covered whatever was held back."""
        for address, vp in self._unflushed:
            _end(self._ptr, vp, address)
            self._ended(address)
        self._unflushed.clear()

    def _unmap_full(self, error: int, address: int, size: int) -> None:
        """A lazy unmap that C refused: because the queue is full (the host has refused to flush), or as a mistake."""
        assert self.queue is not None
        if error != -errno.ENOSPC or _unmap(self._ptr, address, size):
            self._refused(-errno.EINVAL)
        self._unflushed.append((address & ~_OFFSET, current_vp()))
        self.queue.flush()

    def _ended(self, address: int) -> None:
        """The mapping that begins in this page can be reached no more, or (lazy) need not be waited for."""
        release = self._release.pop(address, None)
        if release is not None:
            release()

    def _unpin(self, pins: list[int]) -> None:
        for pin in pins:
            self.memory.unpin(pin)

    def _refused(self, error: int) -> NoReturn:
        """Takes back what a map had done before it was refused, and raises."""
        if self._ptr is not None:
            iova = ffi.new("uint64_t *")
            size = lib.pv_dma_failed(self._ptr, iova)
            if size and self.queue is None:
                self._flush(iova[0], size)
            elif size:
                flags = lib.pv_dma_queue(self._ptr, current_vp(), iova[0])
                if flags == -errno.ENOSPC:
                    self._unflushed.append((iova[0], current_vp()))
                elif flags > 0:
                    assert self.queue is not None
                    self.queue.added(flags)
        raise OSError(-error, _REASONS.get(-error, errno.errorcode.get(-error, "")))
