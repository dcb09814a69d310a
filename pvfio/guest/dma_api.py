"""The DMA API: how a driver of the guest kernel gives memory to its device and takes it back.

``DmaDevice`` is a device's DMA side. Streaming mappings (``map_single`` and its neighbours) lend memory to the
device for a direction, coherent memory is shared with it; what a DMA address is, and what an unmap means, is the
affair of the group's default domain (dma_domain.py). Untrusted devices get whole pages only, through bounce buffers
where they must (swiotlb.py). Names and rules: Linux Documentation/core-api/dma-api.rst, dma-api-howto.rst,
dma-attributes.rst.

Not modelled: CPU caches that do not snoop (ownership between syncs is for the checks and for bounce buffers), DMA
of MMIO (P2P), segment boundaries, a coherent mask of its own, pools of small coherent buffers.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np

from pvfio.errors import DmaMappingError, VfioError
from pvfio.guest.dma_domain import DmaDomain
from pvfio.guest.dma_types import (
    DMA_ATTR_SKIP_CPU_SYNC,
    DMA_ATTR_WEAK_ORDERING,
    Direction,
    DmaDebugHook,
    DmaSegment,
    segments_of,
    span,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from pvfio.guest.kernel import GuestKernel
    from pvfio.guest.pci import PciDevice
    from pvfio.guest.swiotlb import BouncePool
    from pvfio.memory import DmaBuffer

__all__ = [
    "DMA_ATTR_SKIP_CPU_SYNC",
    "DMA_ATTR_WEAK_ORDERING",
    "Direction",
    "DmaDebugHook",
    "DmaDevice",
    "DmaMappingError",
    "DmaSegment",
]

_PAGE = 4096
_OFFSET = _PAGE - 1
_MAX_SEGMENT = 64 << 10


# BIDIRECTIONAL, TO_DEVICE, FROM_DEVICE as page-table permissions; stage 1 has no write-only.
_PERM = (3, 1, 3)
_READ_WRITE = 3


class DmaDevice:
    """A device's DMA side; ``close`` it when the driver lets go of the device.

    ``mask_bits``: how wide an address it can put on the bus. Without an IOMMU, or behind an identity domain, DMA
    addresses are GPAs, nothing is pinned and an unmap has nothing to check. ``untrusted`` needs a strict domain,
    and makes the group's strict for good where it may (EBUSY otherwise). ``max_segment`` bounds what
    ``map_sg`` puts together. Every method is synchronous; all raise ``DmaMappingError``.
    """

    def __init__(
        self, kernel: GuestKernel, device: PciDevice, *, mask_bits: int = 64, untrusted: bool = False
    ) -> None:
        self.kernel = kernel
        self.device = device
        self.name = device.name
        self.untrusted = untrusted
        self.max_segment = _MAX_SEGMENT
        self._group = device.iommu_group
        self._direct = DmaDomain(kernel.memory, None, "identity")
        self._debug: DmaDebugHook | None = kernel.dma_debug
        self._limit = 0
        if untrusted:
            self._contain()
        self.set_mask(mask_bits)

    def _contain(self) -> None:
        if self._group is None:
            raise self._error(errno.ENODEV, "contain", "no IOMMU for an untrusted device")
        try:
            self._group.distrust(self.device)
        except VfioError as error:
            raise self._error(error.errno or 0, "contain", error.reason) from error

    @property
    def domain(self) -> DmaDomain:
        """Where its mappings go now."""
        group = self._group
        return self._direct if group is None else group.dma

    def set_mask(self, bits: int) -> None:
        """Says how many address bits the device has, 32, 48 or 57 for most.

        Raises EIO, and changes nothing, for a mask that cannot work: not 12 to 64 bits, or for identity one that
        reaches neither all of RAM nor 16 MiB of it.
        """
        limit = (1 << bits) - 1 if 12 <= bits <= 64 else 0
        if not limit:
            raise self._error(errno.EIO, "set DMA mask", f"{bits} bits")
        if self.domain.domain is None:
            start, size = self.kernel.memory.ram_ranges()[-1]
            if limit < min(start + size - 1, (1 << 24) - 1):
                raise self._error(errno.EIO, "set DMA mask", f"{bits} bits do not reach RAM")
        self._limit = limit

    def map_single(self, buffer: DmaBuffer, direction: int, *, attrs: int = 0) -> int:
        """Lends a contiguous array to the device and returns its DMA address.

        Raises EINVAL (no bytes, no direction, not contiguous), EFAULT (not memory a device can be given), ENOMEM (no
        IOVA, no table page, no bounce buffer), EIO (identity: out of the device's reach).
        """
        size = buffer.nbytes
        if not 0 <= direction <= 2 or not size or not buffer.flags.c_contiguous:
            self._bad(direction, size)
        vaddr = buffer.vaddr
        try:
            if self.untrusted and (vaddr | size) & _OFFSET:
                address = self._bounce(_bytes_of(buffer), direction)
            else:
                address = self.domain.map_buffer(vaddr, size, _PERM[direction], self._limit)
        except OSError as error:
            address = self._bounce_direct(error, buffer, size)
        if self._debug is not None:
            self._debug.mapped(self.name, "single", address, size, direction, cpu=vaddr)
        return address

    def unmap_single(self, address: int, size: int, direction: int, *, attrs: int = 0) -> None:
        """Takes memory back; when it returns from a strict domain no device can reach it.

        Raises EINVAL for what is not mapped with these pages; nothing has changed then.
        """
        if self._debug is not None:
            self._debug.unmapping(self.name, "single", address, size, direction)
        self._unmap(address, size, direction, attrs)

    def map_page(self, gpa: int, offset: int, size: int, direction: int, *, attrs: int = 0) -> int:
        """Lends ``size`` bytes from ``offset`` on of the page(s) at ``gpa``, which its owner keeps.

        Raises as ``map_single``; EINVAL also for a GPA that is no page's, EFAULT for what is not RAM.
        """
        if not 0 <= direction <= 2 or size <= 0 or offset < 0 or gpa & _OFFSET or gpa < 0:
            self._bad(direction, size)
        start = gpa + offset
        try:
            if self.untrusted and (start | size) & _OFFSET:
                memory = np.frombuffer(self.kernel.memory.view_guest(start, size), np.uint8)
                address = self._bounce(memory, direction)
            else:
                address = self.domain.map_phys(start, size, _PERM[direction], self._limit)
        except (ValueError, OverflowError) as error:
            raise self._error(errno.EFAULT, "map", str(error), size=size) from error
        except OSError as error:
            raise self._error(error.errno or 0, "map", error.strerror or "", size=size) from error
        if self._debug is not None:
            self._debug.mapped(self.name, "page", address, size, direction, cpu=start)
        return address

    def unmap_page(self, address: int, size: int, direction: int, *, attrs: int = 0) -> None:
        """As ``unmap_single``, for ``map_page``."""
        if self._debug is not None:
            self._debug.unmapping(self.name, "page", address, size, direction)
        self._unmap(address, size, direction, attrs)

    def map_sg(self, entries: Sequence[DmaBuffer], direction: int, *, attrs: int = 0) -> list[DmaSegment]:
        """Lends a list of contiguous arrays; returns the segments the device sees, at most as many, in order.

        Behind an IOMMU the list gets one range of IOVAs, and neighbours that meet at a page boundary become one segment
        of at most ``max_segment`` bytes (Linux dma-iommu); identity and untrusted devices get a mapping an entry.
        Raises as ``map_single``; nothing is mapped then.
        """
        total = sum(buffer.nbytes for buffer in entries)
        if not 0 <= direction <= 2 or not total:
            self._bad(direction, total)
        for buffer in entries:
            if not buffer.nbytes or not buffer.flags.c_contiguous:
                self._bad(direction, buffer.nbytes)
        if self.domain.domain is None or self.untrusted:
            segments = self._map_each(entries, direction, attrs)
        else:
            segments = self._map_range(entries, direction)
        if self._debug is not None:
            address, size = span(segments)
            cpu = entries[0].vaddr
            self._debug.mapped(
                self.name, "scatter-gather", address, size, direction, cpu=cpu, entries=len(segments)
            )
        return segments

    def unmap_sg(self, segments: Sequence[DmaSegment], direction: int, *, attrs: int = 0) -> None:
        """Takes a list back, as ``map_sg`` returned it. Raises EINVAL as ``unmap_single``, and for no segments."""
        if not segments:
            self._bad(direction, 0)
        address, size = span(segments)
        if self._debug is not None:
            self._debug.unmapping(
                self.name, "scatter-gather", address, size, direction, entries=len(segments)
            )
        if self.domain.domain is None or self.untrusted:
            for segment in segments:
                self._unmap(segment.address, segment.length, direction, attrs)
        else:
            self._unmap(address, size, direction, attrs)

    def alloc_coherent(self, size: int) -> tuple[DmaBuffer, int]:
        """Zeroed memory for both sides at once, in whole pages, and its DMA address. Raises EINVAL, ENOMEM."""
        if size <= 0:
            self._bad(Direction.BIDIRECTIONAL, size)
        whole = -(-size // _PAGE) * _PAGE
        # An alignment above a page asks for one piece: without an IOMMU the device needs one.
        align = _PAGE if self.domain.domain is not None else 2 * _PAGE
        try:
            buffer = self.kernel.memory.alloc(whole, align=align)
            address = self.domain.map_buffer(buffer.vaddr, whole, _READ_WRITE, self._limit)
        except (OSError, MemoryError) as error:
            raise self._error(errno.ENOMEM, "alloc coherent", str(error), size=size) from error
        if self._debug is not None:
            self._debug.mapped(
                self.name, "coherent", address, whole, Direction.BIDIRECTIONAL, cpu=buffer.vaddr
            )
        return cast("DmaBuffer", buffer[:size]), address

    def free_coherent(self, buffer: DmaBuffer, address: int) -> None:
        """Gives coherent memory back. Raises EINVAL for what is not mapped so."""
        whole = -(-buffer.nbytes // _PAGE) * _PAGE
        if self._debug is not None:
            self._debug.unmapping(
                self.name, "coherent", address, whole, Direction.BIDIRECTIONAL, cpu=buffer.vaddr
            )
        self._unmap(address, whole, Direction.BIDIRECTIONAL, 0)

    def sync_single_for_cpu(self, address: int, size: int, direction: int) -> None:
        """The CPU may look at (a part of) a mapping: what the device wrote is there now.

        Raises EINVAL for what is not mapped, no bytes, no direction.
        """
        self._sync_single(address, size, direction, True)

    def sync_single_for_device(self, address: int, size: int, direction: int) -> None:
        """The device may look at (a part of) a mapping: what the CPU wrote is there now. Raises EINVAL."""
        self._sync_single(address, size, direction, False)

    def sync_sg_for_cpu(self, segments: Sequence[DmaSegment], direction: int) -> None:
        """``sync_single_for_cpu`` of each segment."""
        self._sync_sg(segments, direction, True)

    def sync_sg_for_device(self, segments: Sequence[DmaSegment], direction: int) -> None:
        """``sync_single_for_device`` of each segment."""
        self._sync_sg(segments, direction, False)

    def close(self) -> None:
        """The driver lets go of its device. What it left mapped stays mapped, for the checks to report."""
        if self._debug is not None:
            self._debug.unbound(self.name)

    def _sync_single(self, address: int, size: int, direction: int, to_cpu: bool) -> None:
        if not 0 <= direction <= 2 or size <= 0:
            self._bad(direction, size)
        if self._debug is not None:
            self._debug.syncing(self.name, "single", address, size, direction, to_cpu=to_cpu)
        self._sync(address, size, direction, to_cpu)

    def _sync_sg(self, segments: Sequence[DmaSegment], direction: int, to_cpu: bool) -> None:
        if not 0 <= direction <= 2 or not segments:
            self._bad(direction, 0)
        if self._debug is not None:
            address, size = span(segments)
            entries = len(segments)
            self._debug.syncing(
                self.name, "scatter-gather", address, size, direction, to_cpu=to_cpu, entries=entries
            )
        for segment in segments:
            self._sync(segment.address, segment.length, direction, to_cpu)

    def _sync(self, address: int, size: int, direction: int, to_cpu: bool) -> None:
        bounces = self.domain.bounces
        bounce = bounces.get(address >> 12) if bounces else None
        if bounce is not None:
            bounce.sync(direction, address - bounce.address, size, to_cpu=to_cpu)
        elif not (0 <= address < 1 << 64 and self.domain.is_mapped(address)):
            raise self._error(errno.EINVAL, "sync", "not mapped", address=address, size=size)

    def _unmap(self, address: int, size: int, direction: int, attrs: int) -> None:
        if not 0 <= direction <= 2 or size <= 0:
            if self._debug is not None:
                self._debug.unmap_refused()
            self._bad(direction, size, "unmap")
        domain = self.domain
        bounce = domain.bounces.get(address >> 12) if domain.bounces else None
        try:
            if bounce is None:
                domain.unmap(address, size)
                return
            if bounce.address != address or -(-size // _PAGE) * _PAGE != bounce.whole:
                raise OSError(errno.EINVAL, "not the bounce buffer that is mapped there")
            domain.unmap(address, bounce.whole)
        except OSError as error:
            if self._debug is not None:
                self._debug.unmap_refused()
            raise self._error(
                errno.EINVAL, "unmap", str(error.strerror), address=address, size=size
            ) from error
        # After the unmap: what the device writes now is nobody's.
        if direction != Direction.TO_DEVICE and not attrs & DMA_ATTR_SKIP_CPU_SYNC:
            bounce.to_cpu(0, size)
        for page in bounce.pages:
            del domain.bounces[page]

    def _map_each(self, entries: Sequence[DmaBuffer], direction: int, attrs: int) -> list[DmaSegment]:
        debug, self._debug = self._debug, None
        segments: list[DmaSegment] = []
        try:
            for buffer in entries:
                address = self.map_single(buffer, direction, attrs=attrs)
                segments.append(DmaSegment(address, buffer.nbytes))
        except BaseException:
            for segment in segments:
                self._unmap(segment.address, segment.length, direction, DMA_ATTR_SKIP_CPU_SYNC)
            raise
        finally:
            self._debug = debug
        return segments

    def _map_range(self, entries: Sequence[DmaBuffer], direction: int) -> list[DmaSegment]:
        memory = self.kernel.memory
        runs: list[tuple[int, int]] = []
        pins: list[int] = []
        try:
            for buffer in entries:
                start = buffer.vaddr & ~_OFFSET
                whole = (buffer.vaddr + buffer.nbytes + _OFFSET & ~_OFFSET) - start
                runs += memory.runs(start, whole)
                pins.append(memory.pin(start, whole))
            at = self.domain.map_runs(runs, _PERM[direction], self._limit, pins)
        except OSError as error:
            for pin in pins:
                memory.unpin(pin)
            raise self._error(error.errno or 0, "map", error.strerror or "") from error
        return segments_of(entries, at, self.max_segment)

    def _bounce(self, memory: npt.NDArray[np.uint8], direction: int) -> int:
        pool = self._pool()
        bounce = pool.take(memory)
        try:
            return self.domain.map_bounce(bounce, _PERM[direction], self._limit, pool)
        except BaseException:
            pool.give(bounce)
            raise

    def _pool(self) -> BouncePool:
        try:
            return self.kernel.bounce_pool
        except MemoryError as error:
            raise OSError(errno.ENOMEM, "no memory for bounce buffers") from error

    def _bounce_direct(self, refused: OSError, buffer: DmaBuffer, size: int) -> int:
        """Without an IOMMU, memory out of reach is bounced; anything else, and what cannot be, is an error."""
        if refused.errno == errno.EIO:
            try:
                if self._pool().last <= self._limit:
                    return self._bounce(_bytes_of(buffer), Direction.BIDIRECTIONAL)
            except OSError as error:
                refused = error
        raise self._error(refused.errno or 0, "map", refused.strerror or "", size=size) from refused

    def _bad(self, direction: int, size: int, operation: str = "map") -> NoReturn:
        reason = f"direction {direction!r}" if not 0 <= direction <= 2 else "no bytes, or not contiguous"
        raise self._error(errno.EINVAL, operation, reason, size=size)

    def _error(
        self, number: int, operation: str, reason: str, *, address: int | None = None, size: int | None = None
    ) -> DmaMappingError:
        return DmaMappingError(number, operation, reason, device=self.name, iova=address, length=size)


def _bytes_of(buffer: DmaBuffer) -> npt.NDArray[np.uint8]:
    """The same memory as plain bytes."""
    return np.asarray(buffer).reshape(-1).view(np.uint8)
