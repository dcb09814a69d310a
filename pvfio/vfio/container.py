"""A container: an IO address space that one or more groups' devices share.

The abstract surface, and what every backend does alike: allocating memory with an IOVA, and refusing to let
an unmap of the wrong size pass unnoticed. Rules and errnos: Linux's vfio_iommu_type1.

Not here: batches (``batch.py``), how requests travel (``ioctl.py``), the kernel's side (``guest/vfio_container.py``,
``guest/type1.py``).
"""

from __future__ import annotations

import errno
import weakref
from abc import abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio

from pvfio.errors import VfioError
from pvfio.vfio.batch import BatchOperations, UnmapMismatch
from pvfio.vfio.iova import IovaAllocator

if TYPE_CHECKING:
    from pvfio.memory import DmaBuffer

__all__ = ["Container", "IommuInfo", "MigrationInfo", "UnmapMismatch"]


@dataclass(frozen=True)
class MigrationInfo:
    """Dirty-page logging: supported page sizes (a bitmap) and the largest dirty bitmap in bytes."""

    pgsize_bitmap: int
    max_dirty_bitmap_size: int


@dataclass(frozen=True)
class IommuInfo:
    """What the IOMMU of a container offers (VFIO_IOMMU_GET_INFO)."""

    pgsizes: int
    """Bitmap of page sizes in bytes."""
    iova_ranges: tuple[tuple[int, int], ...]
    """(first, last) usable IOVA, both inclusive, reserved ranges left out."""
    dma_avail: int | None
    """How many more mappings are allowed."""
    migration: MigrationInfo | None


class Container(BatchOperations):
    """An IO address space. Use as ``async with``: leaving closes it, with everything mapped in it."""

    iova_allocator: IovaAllocator
    """Where ``alloc`` gets its IOVAs; follows ``info().iova_ranges``."""

    users: int
    """How many groups are in it."""

    def __init__(self) -> None:
        self.iova_allocator = IovaAllocator(())
        self.users = 0
        self._aside: list[int] = []
        self._buffers: dict[int, weakref.ref[DmaBuffer]] = {}

    async def __aenter__(self) -> Self:
        # Opening was the checkpoint: one here could be cancelled with nobody to close.
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether an IOMMU type has been set."""

    @abstractmethod
    def check_extension(self, extension: int) -> bool:
        """Whether an extension or IOMMU type (``VFIO_TYPE1v2_IOMMU``, ``VFIO_UNMAP_ALL``, ...) is supported."""

    @abstractmethod
    async def set_iommu(self, kind: int | None = None) -> None:
        """Chooses the IOMMU type, by default type1 v2. A group must have been set before.

        Raises EINVAL with no group or when called twice, ENODEV for an unknown type. Cancelled: not set.
        """

    @abstractmethod
    def info(self) -> IommuInfo:
        """What the IOMMU offers. Raises EINVAL before ``set_iommu``."""

    @abstractmethod
    def map_dma_nowait(self, iova: int, buffer: Any, *, read: bool = True, write: bool = True) -> None:
        """Maps the whole of ``buffer`` (a DmaBuffer, or what else the backend can pin) at ``iova``.

        ``read`` and ``write`` are what devices may do. Sets ``buffer.iova`` of a DmaBuffer. All or nothing.
        Raises EINVAL (alignment, permissions, size 0, outside the IOVA ranges), EOVERFLOW, EEXIST, ENOSPC
        (too many mappings), ENOMEM (memlock), EFAULT (not memory that can be pinned).
        """

    @abstractmethod
    async def map_dma(self, iova: int, buffer: Any, *, read: bool = True, write: bool = True) -> None:
        """As ``map_dma_nowait``. Cancelled: nothing is mapped."""

    @abstractmethod
    def try_unmap_dma_nowait(self, iova: int, size: int) -> int:
        """Unmaps what is mapped in [iova, iova + size) and returns how many bytes that were, 0 included.

        When it returns, no DMA lands there any more. Raises EINVAL (alignment, or it would split a mapping),
        EOVERFLOW.
        """

    @abstractmethod
    async def try_unmap_dma(self, iova: int, size: int) -> int:
        """As ``try_unmap_dma_nowait``. Cancelled: nothing is unmapped."""

    @abstractmethod
    async def unmap_all(self) -> int:
        """Unmaps everything and returns how many bytes that were. Cancelled: nothing is unmapped."""

    @abstractmethod
    async def close(self) -> None:
        """Lets go of the container. Groups in it keep it until they leave. Safe to call twice; finishes if
        cancelled.
        """

    @abstractmethod
    def _new_buffer(self, size: int, align: int, scattered: bool) -> DmaBuffer:
        """Zeroed memory that devices can be given. Raises MemoryError."""

    def unmap_dma_nowait(self, iova: int, size: int) -> int:
        """Unmaps exactly ``size`` bytes at ``iova``; raises ``UnmapMismatch`` when it was another number."""
        unmapped = self.try_unmap_dma_nowait(iova, size)
        if unmapped != size:
            raise UnmapMismatch(iova, size, unmapped)
        return unmapped

    async def unmap_dma(self, iova: int, size: int) -> int:
        """Unmaps exactly ``size`` bytes at ``iova``; raises ``UnmapMismatch`` when it was another number.

        Cancelled: nothing is unmapped.
        """
        unmapped = await self.try_unmap_dma(iova, size)
        if unmapped != size:
            raise UnmapMismatch(iova, size, unmapped)
        return unmapped

    async def alloc(
        self,
        size: int,
        *,
        map: bool = True,
        read: bool = True,
        write: bool = True,
        iova: int | None = None,
        scattered: bool = False,
        align: int = 4096,
    ) -> DmaBuffer:
        """Zeroed memory of ``size`` bytes (at least 1), mapped at an IOVA that is picked here unless ``iova``
        is given.

        ``align`` (a power of two, bytes) holds for memory and IOVA. ``map=False`` neither maps nor picks. The
        buffer has shape (size,) and dtype uint8. Give it back with ``free``; one that is only forgotten stays
        mapped and pinned until it is unmapped. Raises ValueError, MemoryError, VfioError ENOSPC (no IOVA
        left) and what ``map_dma`` raises. Cancelled: nothing is left allocated or mapped.
        """
        await trio.lowlevel.checkpoint()
        buffer = self._new_buffer(size, align, scattered)
        if not map:
            return buffer
        if iova is not None:
            owned = self.iova_allocator.reserve(iova, size)
            await self._map_allocated(buffer, iova, owned, read, write)
            return buffer
        looked_aside, times = False, 1
        while True:
            try:
                chosen = self.iova_allocator.alloc(size, align)
            except VfioError:
                if looked_aside or not self._aside:
                    raise
                looked_aside = True
                self._give_back_aside()
                continue
            try:
                await self._map_allocated(buffer, chosen, True, read, write)
            except VfioError as error:
                if error.errno != errno.EEXIST:
                    raise
                self._put_aside(chosen, size, times)
                times = 1 if looked_aside else 2 * times
                continue
            return buffer

    async def free(self, buffer: DmaBuffer) -> None:
        """Unmaps a whole buffer that ``alloc`` mapped, and gives its IOVA back. Its memory goes when no view
        of it lives.

        Raises VfioError EINVAL for one that is not mapped. Cancelled: it stays mapped.
        """
        iova = buffer.iova
        if iova is None:
            raise VfioError(errno.EINVAL, "free", "the buffer is not mapped")
        size = buffer.nbytes_mapped
        if not 0 <= size - buffer.nbytes < 4096:
            raise VfioError(
                errno.EINVAL, "free", "a view, not the whole buffer", iova=iova, length=buffer.nbytes
            )
        await self.unmap_dma(iova, size)
        buffer.iova = None
        self._buffers.pop(iova, None)
        if self.iova_allocator.owns(iova):
            self.iova_allocator.free(iova)

    def _put_aside(self, iova: int, size: int, times: int) -> None:
        """Something was mapped by hand at ``iova``: that, and ``times - 1`` such places below it, are not tried
        again before everything else is used up. The more in a row, the larger the steps: it may be a large one.
        """
        size = -(-size // 4096) * 4096
        for start in (iova - (times - 1) * size, iova):
            if start > 0 and self.iova_allocator.reserve(start, iova + size - start):
                self._aside.append(start)
                return

    def _give_back_aside(self) -> None:
        for iova in self._aside:
            self.iova_allocator.free(iova)
        self._aside.clear()

    def _forget_iovas(self) -> None:
        """Everything was unmapped at once."""
        for reference in self._buffers.values():
            buffer = reference()
            if buffer is not None:
                buffer.iova = None
        self._buffers.clear()
        self._aside.clear()
        self.iova_allocator = IovaAllocator(self.iova_allocator.ranges)

    async def _map_allocated(
        self, buffer: DmaBuffer, iova: int, owned: bool, read: bool, write: bool
    ) -> None:
        try:
            await self.map_dma(iova, buffer, read=read, write=write)
        except BaseException:
            if owned:
                self.iova_allocator.free(iova)
            raise
        self._buffers[iova] = weakref.ref(buffer)
