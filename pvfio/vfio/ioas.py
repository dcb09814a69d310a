"""An IO address space of an iommufd, and the structures its requests are made of.

It is a ``Container``: a driver that allocates and maps through one runs unchanged. Errnos are iommufd's, which differ
from type1's. Rules and errnos: Linux drivers/iommu/iommufd. Not here: page tables and devices (``iommufd.py``).
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import trio

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.vfio.container import Container, IommuInfo

if TYPE_CHECKING:
    from pvfio.memory import DmaBuffer
    from pvfio.vfio.iommufd import Iommufd

__all__ = ["EVERYTHING", "Ioas", "address_of", "command_of", "extent_of"]

EVERYTHING = (1 << 64) - 1
"""``unmap(0, EVERYTHING)`` unmaps everything; ``invalidate(0, EVERYTHING)`` invalidates all pages."""

_PAGE = 4096


class Ioas(Container):
    """An address space, made by ``Iommufd.alloc_ioas``; ``users`` counts the devices attached through this library.

    Without a page table it is only a book: nothing is pinned, any IOVA is allowed. So a buffer that is mapped here
    is kept alive by this object too.
    """

    def __init__(self, iommufd: Iommufd, number: int) -> None:
        super().__init__()
        self.iommufd = iommufd
        self.id = number
        self._ioctl = iommufd.file.ioctl
        self._map = command_of("iommu_ioas_map", ioas_id=number)
        self._unmap = command_of("iommu_ioas_unmap", ioas_id=number)
        self._closed = False
        # IOVA to what is mapped there: (bytes, memory).
        self._kept: dict[int, tuple[int, Any]] = {}

    def map(self, buffer: Any, iova: int | None = None, *, read: bool = True, write: bool = True) -> int:
        """Maps the whole of ``buffer`` at ``iova``, or where the kernel finds room; returns the IOVA.

        Sets ``buffer.iova`` of a DmaBuffer. All or nothing. Raises EINVAL (size 0, alignment, permissions, reserved),
        EOVERFLOW, EEXIST, ENOSPC; once a page table is there also EFAULT (not memory that can be pinned), ENOMEM
        (memlock).
        """
        vaddr, length, plain = extent_of(buffer)
        placed = self._map_address(vaddr, length, iova, _flags(read, write))
        self._kept[placed] = length, buffer
        if not plain:
            buffer.iova = placed
        return placed

    def unmap(self, iova: int, length: int) -> int:
        """Unmaps the mappings inside a range and returns their bytes; (0, EVERYTHING) means all of them.

        When it returns, no DMA lands there any more. Raises ENOENT (nothing is mapped; or a mapping would be split:
        those before it are gone then), EINVAL (length 0), EOVERFLOW.
        """
        command = self._unmap
        try:
            command.iova = iova
            command.length = length
        except OverflowError:
            raise VfioError(errno.EOVERFLOW, "ioas_unmap", "not 64 bits", iova=iova, length=length) from None
        self._ioctl(lib.IOMMU_IOAS_UNMAP, command)
        self._let_go(iova, length)
        return int(command.length)

    def copy(
        self,
        source: Ioas,
        source_iova: int,
        length: int,
        iova: int | None = None,
        *,
        read: bool = True,
        write: bool = True,
    ) -> int:
        """Maps what another address space (or this one) has mapped in a range, without pinning it again; the IOVA.

        Raises ENOENT (a hole in the range), EPERM (write permission to what was mapped without), and as ``map``.
        """
        flags = _flags(read, write) | (0 if iova is None else lib.IOMMU_IOAS_MAP_FIXED_IOVA)
        command = command_of(
            "iommu_ioas_copy",
            flags=flags,
            dst_ioas_id=self.id,
            src_ioas_id=source.id,
            length=length,
            dst_iova=iova or 0,
            src_iova=source_iova,
        )
        self._ioctl(lib.IOMMU_IOAS_COPY, command)
        placed = int(command.dst_iova)
        self._kept[placed] = length, source._memory_of(source_iova, length)
        return placed

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """(first, last) IOVA of what may be mapped; narrower after an attach, wider after a detach."""
        return self._ranges()[0]

    @property
    def alignment(self) -> int:
        """What IOVAs, lengths and process addresses are multiples of, in bytes."""
        return self._ranges()[1]

    def allow_iovas(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Replaces the ranges (first, last) that no attach may narrow, and where the kernel finds room.

        Raises EADDRINUSE where a part is reserved, EINVAL for empty or overlapping ranges.
        """
        listed = ffi.new("struct iommu_iova_range[]", [tuple(found) for found in ranges])
        command = command_of(
            "iommu_ioas_allow_iovas", ioas_id=self.id, num_iovas=len(ranges), allowed_iovas=address_of(listed)
        )
        self._ioctl(lib.IOMMU_IOAS_ALLOW_IOVAS, command)

    def destroy(self) -> None:
        """Destroys the address space with everything mapped in it. Raises EBUSY while a page table uses it."""
        self.iommufd.destroy(self.id)
        self._closed = True
        self._kept.clear()
        self._forget_iovas()

    # The container's side.

    @property
    def ready(self) -> bool:
        return not self._closed

    def check_extension(self, extension: int) -> bool:
        """False: extensions are type1's."""
        return False

    async def set_iommu(self, kind: int | None = None) -> None:
        """An address space has no IOMMU type to choose. Raises ENOTTY."""
        await trio.lowlevel.checkpoint()
        raise VfioError(errno.ENOTTY, "SET_IOMMU", "an iommufd address space")

    def info(self) -> IommuInfo:
        ranges, alignment = self._ranges()
        return IommuInfo(alignment, ranges, None, None)

    def map_dma_nowait(self, iova: int, buffer: Any, *, read: bool = True, write: bool = True) -> None:
        self.map(buffer, iova, read=read, write=write)

    async def map_dma(self, iova: int, buffer: Any, *, read: bool = True, write: bool = True) -> None:
        await trio.lowlevel.checkpoint()
        self.map(buffer, iova, read=read, write=write)

    def try_unmap_dma_nowait(self, iova: int, size: int) -> int:
        return self.unmap(iova, size)

    async def try_unmap_dma(self, iova: int, size: int) -> int:
        await trio.lowlevel.checkpoint()
        return self.unmap(iova, size)

    async def unmap_all(self) -> int:
        await trio.lowlevel.checkpoint()
        unmapped = self.unmap(0, EVERYTHING)
        self._forget_iovas()
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
        """As ``Container.alloc``. Before a device is attached the kernel chooses the IOVA: what an IOMMU can reach is
        not known yet, and it begins from below.
        """
        if not map or iova is not None or self.users:
            return await super().alloc(
                size, map=map, read=read, write=write, iova=iova, scattered=scattered, align=align
            )
        await trio.lowlevel.checkpoint()
        buffer = self._new_buffer(size, align, scattered)
        self._buffers[self.map(buffer, read=read, write=write)] = weakref.ref(buffer)
        return buffer

    async def close(self) -> None:
        """Destroys it where nothing uses it; else it goes with the iommufd."""
        if not self._closed and not self.iommufd.closed:
            try:
                self.destroy()
            except VfioError as error:
                if error.errno != errno.EBUSY:
                    raise
        await trio.lowlevel.checkpoint_if_cancelled()

    def refresh(self) -> None:
        """A device came or went: the IOVA ranges may have changed."""
        if not self._closed and not self.iommufd.closed:
            self.iova_allocator.set_ranges(self.iova_ranges() if self.users else ())

    def _map_address_nowait(self, iova: int, vaddr: int, size: int, flags: int) -> None:
        read, write = flags & lib.VFIO_DMA_MAP_FLAG_READ, flags & lib.VFIO_DMA_MAP_FLAG_WRITE
        self._map_address(vaddr, size, iova, _flags(bool(read), bool(write)))

    def _map_address(self, vaddr: int, length: int, iova: int | None, flags: int) -> int:
        command = self._map
        command.flags = flags | (0 if iova is None else lib.IOMMU_IOAS_MAP_FIXED_IOVA)
        try:
            command.user_va = vaddr
            command.length = length
            command.iova = iova or 0
        except OverflowError:
            raise VfioError(errno.EOVERFLOW, "ioas_map", "not 64 bits", iova=iova, length=length) from None
        self._ioctl(lib.IOMMU_IOAS_MAP, command)
        return int(command.iova)

    def _mapped(self, buffer: DmaBuffer, iova: int, size: int) -> None:
        super()._mapped(buffer, iova, size)
        self._kept[iova] = size, buffer

    def _memory_of(self, iova: int, length: int) -> Any:
        """What keeps the memory of a mapped range alive."""
        found = self._kept.get(iova)
        if found is not None and found[0] >= length:
            return found[1]
        return [
            memory for at, (size, memory) in self._kept.items() if at < iova + length and iova < at + size
        ]

    def _let_go(self, iova: int, length: int) -> None:
        """Forgets the memory of mappings inside a range, which was unmapped."""
        found = self._kept.get(iova)
        if found is not None and found[0] >= length:
            if found[0] == length:
                del self._kept[iova]
            return
        for at in [at for at, (size, _) in self._kept.items() if iova <= at and at + size <= iova + length]:
            del self._kept[at]

    def _ranges(self) -> tuple[tuple[tuple[int, int], ...], int]:
        room = 16
        while True:
            listed = ffi.new("struct iommu_iova_range[]", room)
            command = command_of(
                "iommu_ioas_iova_ranges", ioas_id=self.id, num_iovas=room, allowed_iovas=address_of(listed)
            )
            try:
                self._ioctl(lib.IOMMU_IOAS_IOVA_RANGES, command)
            except VfioError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                room = command.num_iovas
                continue
            found = tuple((listed[i].start, listed[i].last) for i in range(command.num_iovas))
            return found, int(command.out_iova_alignment)

    def _new_buffer(self, size: int, align: int, scattered: bool) -> DmaBuffer:
        return self.iommufd.memory.alloc(size, align=align, scattered=scattered)


def command_of(struct: str, **fields: int) -> Any:
    """A zeroed structure with its own size in the first word."""
    command = ffi.new(f"struct {struct} *")
    ffi.cast("uint32_t *", command)[0] = ffi.sizeof(f"struct {struct}")
    for name, value in fields.items():
        try:
            setattr(command, name, value)
        except OverflowError:
            raise VfioError(errno.EOVERFLOW, struct, f"{name} {value:#x} is too wide") from None
    return command


def address_of(memory: Any) -> int:
    return int(ffi.cast("uintptr_t", memory))


def _flags(read: bool, write: bool) -> int:
    return int((lib.IOMMU_IOAS_MAP_READABLE if read else 0) | (lib.IOMMU_IOAS_MAP_WRITEABLE if write else 0))


def extent_of(buffer: Any) -> tuple[int, int, bool]:
    """Process address and bytes to map, and whether the buffer is no DmaBuffer. ``TypeError`` for what is no
    memory.
    """
    try:
        vaddr, size, whole = buffer.vaddr, buffer.nbytes, buffer.nbytes_mapped
    except AttributeError:
        data = ffi.from_buffer(buffer)
        return address_of(data), len(data), True
    return vaddr, whole if size % _PAGE and 0 <= whole - size < _PAGE else size, False
