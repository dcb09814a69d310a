"""VFIO through a kernel's files: the structures of <linux/vfio.h> filled in once, for every kernel-shaped
backend.

A backend gives objects that carry out requests (``KernelFile``): the emulated guest's kernel, or file
descriptors of the real one. What a request means, and every errno, is the kernel's.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import trio

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.vfio.batch import BatchFile
from pvfio.vfio.container import Container, IommuInfo, MigrationInfo
from pvfio.vfio.device import Device, DeviceInfo
from pvfio.vfio.group import Group, GroupStatus
from pvfio.vfio.irq import Irq, close_all
from pvfio.vfio.region import Region

if TYPE_CHECKING:
    from pvfio.memory import DmaBuffer

__all__ = [
    "BufferSource",
    "IoctlContainer",
    "IoctlDevice",
    "IoctlGroup",
    "KernelDeviceFile",
    "KernelFile",
]

_READ: int = lib.VFIO_DMA_MAP_FLAG_READ
_WRITE: int = lib.VFIO_DMA_MAP_FLAG_WRITE
_MAP: int = lib.VFIO_IOMMU_MAP_DMA
_UNMAP: int = lib.VFIO_IOMMU_UNMAP_DMA
_MAP_SIZE: int = ffi.sizeof("struct vfio_iommu_type1_dma_map")
_UNMAP_SIZE: int = ffi.sizeof("struct vfio_iommu_type1_dma_unmap")
# struct vfio_iommu_type1_dma_map, and _unmap, in one store.
_fill_map = struct.Struct("=IIQQQ").pack_into
_fill_unmap = struct.Struct("=IIQQ").pack_into
_PAGE_MASK = 4095
_CAP_ROOM = 512


class KernelFile(Protocol):
    """An open VFIO file. ``ioctl`` raises OSError; trio.WouldBlock for a request only ``ioctl_sleeping``
    makes. ``ioctl_sleeping`` undoes what it began when it is cancelled; ``close`` finishes.
    """

    @property
    def fd(self) -> int: ...
    def ioctl(self, request: int, arg: Any, /) -> int: ...
    async def ioctl_sleeping(self, request: int, arg: Any, /) -> int: ...
    async def close(self) -> None: ...


class KernelDeviceFile(KernelFile, Protocol):
    """A device's file: 1, 2, 4 or 8 bytes at a position; ``write`` raises trio.WouldBlock where it must
    sleep.

    ``mmio`` is a BAR's ``struct pv_mmio *`` or None, ``closed_areas`` what a mapping of it leaves out.
    """

    def read(self, position: int, size: int) -> int: ...
    def write(self, position: int, value: int, size: int) -> None: ...
    async def write_sleeping(self, position: int, value: int, size: int) -> None: ...
    def map(self, position: int, size: int) -> memoryview: ...
    def mmio(self, index: int) -> Any: ...
    def closed_areas(self, index: int) -> tuple[tuple[int, int], ...]: ...


def _query(file: KernelFile, request: int, name: str, **fields: int) -> tuple[Any, Any]:
    """An INFO request with room for its capabilities: (structure, what keeps it alive)."""
    size = ffi.sizeof(f"struct {name}")
    room = _CAP_ROOM
    while True:
        memory = ffi.new("uint64_t[]", (size + room + 7) // 8)
        info = ffi.cast(f"struct {name} *", memory)
        info.argsz = size + room
        for field, value in fields.items():
            setattr(info, field, value)
        file.ioctl(request, info)
        if info.argsz <= size + room:
            return info, memory
        room = info.argsz - size


def _capabilities(info: Any, memory: Any) -> Iterator[tuple[int, Any]]:
    """The (id, pointer to header) of a chain. A chain that leaves its memory or loops ends."""
    base = ffi.cast("uint8_t *", info)
    offset = info.cap_offset
    header_size = ffi.sizeof("struct vfio_info_cap_header")
    last = 0
    while last < offset <= ffi.sizeof(memory) - header_size:
        header = ffi.cast("struct vfio_info_cap_header *", base + offset)
        yield header.id, header
        last, offset = offset, header.next


class BufferSource(Protocol):
    """Where memory comes from that the kernel can pin, e.g. a ``GuestMemory``."""

    def alloc(self, size: int, *, align: int = ..., scattered: bool = ...) -> DmaBuffer: ...


class IoctlContainer(Container):
    """A container file, and where its buffers come from. ``batch``: the file's own way to take batches, if any."""

    def __init__(self, file: KernelFile, memory: BufferSource, batch: BatchFile | None = None) -> None:
        super().__init__()
        self.file = file
        self._batch_file = batch
        self._memory = memory
        self.closed = False
        self._ioctl = file.ioctl
        self._ready = False
        self._map = ffi.new("struct vfio_iommu_type1_dma_map *")
        self._map_bytes = ffi.buffer(self._map)
        self._unmap = ffi.new("struct vfio_iommu_type1_dma_unmap *")
        self._unmap_bytes = ffi.buffer(self._unmap)

    @property
    def ready(self) -> bool:
        return self._ready

    def check_extension(self, extension: int) -> bool:
        return self._ioctl(lib.VFIO_CHECK_EXTENSION, extension) > 0

    async def set_iommu(self, kind: int | None = None) -> None:
        await trio.lowlevel.checkpoint()
        self._ioctl(lib.VFIO_SET_IOMMU, lib.VFIO_TYPE1v2_IOMMU if kind is None else kind)
        self._ready = True
        self.refresh()

    def refresh(self) -> None:
        """The container's groups have changed: the IOVA ranges may have."""
        if self._ready:
            self.iova_allocator.set_ranges(self.info().iova_ranges)

    def lost_iommu(self) -> None:
        """The last group has left: type and mappings are gone."""
        self._ready = False
        self._forget_iovas()

    def info(self) -> IommuInfo:
        info, memory = _query(self.file, lib.VFIO_IOMMU_GET_INFO, "vfio_iommu_type1_info")
        ranges: tuple[tuple[int, int], ...] = ()
        avail: int | None = None
        migration: MigrationInfo | None = None
        for cap_id, header in _capabilities(info, memory):
            if cap_id == lib.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                cap = ffi.cast("struct vfio_iommu_type1_info_cap_iova_range *", header)
                listed = ffi.cast("struct vfio_iova_range *", cap.iova_ranges)
                ranges = tuple((listed[i].start, listed[i].end) for i in range(cap.nr_iovas))
            elif cap_id == lib.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
                avail = ffi.cast("struct vfio_iommu_type1_info_dma_avail *", header).avail
            elif cap_id == lib.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION:
                cap = ffi.cast("struct vfio_iommu_type1_info_cap_migration *", header)
                migration = MigrationInfo(cap.pgsize_bitmap, cap.max_dirty_bitmap_size)
        return IommuInfo(info.iova_pgsizes, ranges, avail, migration)

    def map_dma_nowait(self, iova: int, buffer: Any, *, read: bool = True, write: bool = True) -> None:
        plain = False
        try:
            vaddr, size = buffer.vaddr, buffer.nbytes
            if size & _PAGE_MASK and 0 <= buffer.nbytes_mapped - size <= _PAGE_MASK:
                size = buffer.nbytes_mapped
        except AttributeError:
            vaddr, size = _plain_memory(buffer)
            plain = True
        self._map_address_nowait(iova, vaddr, size, (_READ if read else 0) | (_WRITE if write else 0))
        if not plain:
            buffer.iova = iova

    def _map_address_nowait(self, iova: int, vaddr: int, size: int, flags: int) -> None:
        try:
            _fill_map(self._map_bytes, 0, _MAP_SIZE, flags, vaddr, iova, size)
        except struct.error:
            raise VfioError(errno.EINVAL, "map_dma", "not 64 bits", iova=iova, length=size) from None
        self._ioctl(_MAP, self._map)

    async def map_dma(self, iova: int, buffer: Any, *, read: bool = True, write: bool = True) -> None:
        await trio.lowlevel.checkpoint()
        self.map_dma_nowait(iova, buffer, read=read, write=write)

    def try_unmap_dma_nowait(self, iova: int, size: int) -> int:
        try:
            _fill_unmap(self._unmap_bytes, 0, _UNMAP_SIZE, 0, iova, size)
        except struct.error:
            raise VfioError(errno.EINVAL, "unmap_dma", "not 64 bits", iova=iova, length=size) from None
        self._ioctl(_UNMAP, self._unmap)
        unmapped: int = self._unmap.size
        return unmapped

    async def try_unmap_dma(self, iova: int, size: int) -> int:
        await trio.lowlevel.checkpoint()
        return self.try_unmap_dma_nowait(iova, size)

    async def unmap_all(self) -> int:
        await trio.lowlevel.checkpoint()
        _fill_unmap(self._unmap_bytes, 0, _UNMAP_SIZE, lib.VFIO_DMA_UNMAP_FLAG_ALL, 0, 0)
        self._ioctl(_UNMAP, self._unmap)
        self._forget_iovas()
        unmapped: int = self._unmap.size
        return unmapped

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            await _shielded(self.file.close)
        await trio.lowlevel.checkpoint_if_cancelled()

    def _new_buffer(self, size: int, align: int, scattered: bool) -> DmaBuffer:
        return self._memory.alloc(size, align=align, scattered=scattered)


def _plain_memory(buffer: Any) -> tuple[int, int]:
    """(address, bytes) of memory that is no DmaBuffer. ``TypeError`` for what is no memory."""
    data = ffi.from_buffer(buffer)
    return int(ffi.cast("uintptr_t", data)), len(data)


class IoctlGroup(Group):
    """A group file. ``open_file`` gives the device file for a number that GET_DEVICE_FD returned."""

    def __init__(self, group_id: int, file: KernelFile, open_file: Callable[[int], KernelDeviceFile]) -> None:
        self.id = group_id
        self.file = file
        self.container: IoctlContainer | None = None
        self.closed = False
        self._open_file = open_file
        self._devices: list[IoctlDevice] = []

    def status(self) -> GroupStatus:
        status = ffi.new("struct vfio_group_status *")
        status.argsz = ffi.sizeof("struct vfio_group_status")
        self.file.ioctl(lib.VFIO_GROUP_GET_STATUS, status)
        return GroupStatus(
            viable=bool(status.flags & lib.VFIO_GROUP_FLAGS_VIABLE),
            container_set=bool(status.flags & lib.VFIO_GROUP_FLAGS_CONTAINER_SET),
        )

    def set_container(self, container: Container) -> None:
        if not isinstance(container, IoctlContainer):
            raise VfioError(errno.EINVAL, "SET_CONTAINER", "a container of another backend")
        self.file.ioctl(lib.VFIO_GROUP_SET_CONTAINER, ffi.new("int32_t *", container.file.fd))
        self.container = container
        container.users += 1
        container.refresh()

    def unset_container(self) -> None:
        self.file.ioctl(lib.VFIO_GROUP_UNSET_CONTAINER, 0)
        self._left()

    async def open_device(self, name: str) -> IoctlDevice:
        number = await self.file.ioctl_sleeping(
            lib.VFIO_GROUP_GET_DEVICE_FD, ffi.new("char[]", name.encode())
        )
        file = self._open_file(number)
        if self.container is None:
            raise VfioError(errno.EINVAL, "GET_DEVICE_FD", "no container", device=name)
        device = IoctlDevice(name, file, self.container)
        self._devices.append(device)
        return device

    async def close(self) -> None:
        with trio.CancelScope(shield=True):
            for device in reversed(self._devices):
                await device.close()
            self._devices.clear()
            if not self.closed:
                self.closed = True
                await self.file.close()
                self._left()
        await trio.lowlevel.checkpoint_if_cancelled()

    def _left(self) -> None:
        container, self.container = self.container, None
        if container is not None:
            container.users -= 1
            if container.users:
                container.refresh()
            else:
                container.lost_iommu()


class IoctlRegion(Region):
    """A region at a position in a device file."""

    def __init__(self, device: str, file: KernelDeviceFile, index: int) -> None:
        info, memory = _query(file, lib.VFIO_DEVICE_GET_REGION_INFO, "vfio_region_info", index=index)
        areas: tuple[tuple[int, int], ...] = ()
        if info.flags & lib.VFIO_REGION_INFO_FLAG_MMAP:
            areas = ((0, info.size),)
        for cap_id, header in _capabilities(info, memory):
            if cap_id == lib.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
                cap = ffi.cast("struct vfio_region_info_cap_sparse_mmap *", header)
                listed = ffi.cast("struct vfio_region_sparse_mmap_area *", cap.areas)
                areas = tuple((listed[i].offset, listed[i].size) for i in range(cap.nr_areas))
        super().__init__(device, index, info.size, info.flags, areas)
        self._file = file
        self._position: int = info.offset
        self.mmio = file.mmio(index)
        self.closed_areas = file.closed_areas(index)

    def _at(self, offset: int, operation: str, size: int) -> int:
        if not 0 <= offset < 1 << 40:
            raise self._error(errno.EINVAL, operation, offset, size)
        return self._position + offset

    def read_nowait(self, offset: int, size: int = 4) -> int:
        return self._file.read(self._at(offset, "read", size), size)

    def write_nowait(self, offset: int, value: int, size: int = 4) -> None:
        self._file.write(self._at(offset, "write", size), value, size)

    async def read(self, offset: int, size: int = 4) -> int:
        await trio.lowlevel.checkpoint()
        return self.read_nowait(offset, size)

    async def write(self, offset: int, value: int, size: int = 4) -> None:
        await trio.lowlevel.checkpoint()
        try:
            self.write_nowait(offset, value, size)
        except trio.WouldBlock:
            await self._file.write_sleeping(self._at(offset, "write", size), value, size)

    def mmap(self, offset: int, size: int) -> memoryview:
        return self._file.map(self._at(offset, "mmap", size), size)

    def close(self) -> None:
        """The device was closed: no store reaches the BAR any more."""
        self.mmio = None


class IoctlIrq(Irq):
    """An interrupt index through SET_IRQS."""

    def __init__(self, device: str, file: KernelDeviceFile, index: int) -> None:
        info, _ = _query(file, lib.VFIO_DEVICE_GET_IRQ_INFO, "vfio_irq_info", index=index)
        super().__init__(device, index, info.count, info.flags)
        self._file = file

    async def _set(self, flags: int, start: int, count: int, data: bytes = b"") -> None:
        self._set_nowait(flags, start, count, data)

    def _set_nowait(self, flags: int, start: int, count: int, data: bytes = b"") -> None:
        size = ffi.sizeof("struct vfio_irq_set")
        memory = ffi.new("uint8_t[]", size + len(data))
        request = ffi.cast("struct vfio_irq_set *", memory)
        try:
            request.argsz = size + len(data)
            request.flags = flags
            request.index = self.index
            request.start = start
            request.count = count
        except OverflowError:
            raise VfioError(
                errno.EINVAL, "SET_IRQS", f"vectors {start}+{count}", device=self.device
            ) from None
        ffi.buffer(memory)[size:] = data
        self._file.ioctl(lib.VFIO_DEVICE_SET_IRQS, request)

    def close(self) -> None:
        """The device is being closed: waiting tasks are told, eventfds closed."""
        fds = self._take()
        if fds:
            try:
                self._set_nowait(lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0)
            finally:
                close_all(fds)


class IoctlDevice(Device):
    """A device file."""

    def __init__(self, name: str, file: KernelDeviceFile, container: Container | None) -> None:
        info, _ = _query(file, lib.VFIO_DEVICE_GET_INFO, "vfio_device_info")
        self.name = name
        self.file = file
        if container is not None:
            self.container = container
        self.info = DeviceInfo(info.flags, info.num_regions, info.num_irqs)
        self._regions: dict[int, IoctlRegion] = {}
        self._irqs: dict[int, IoctlIrq] = {}
        self._open = True

    def region(self, index: int) -> Region:
        if index not in self._regions:
            _check_index("GET_REGION_INFO", self.name, index)
            self._regions[index] = IoctlRegion(self.name, self.file, index)
        return self._regions[index]

    def irq(self, index: int) -> Irq:
        if index not in self._irqs:
            _check_index("GET_IRQ_INFO", self.name, index)
            self._irqs[index] = IoctlIrq(self.name, self.file, index)
        return self._irqs[index]

    async def reset(self) -> None:
        await self.file.ioctl_sleeping(lib.VFIO_DEVICE_RESET, 0)

    async def close(self) -> None:
        if self._open:
            self._open = False
            for region in self._regions.values():
                region.close()
            for irq in self._irqs.values():
                irq.close()
            await _shielded(self.file.close)
        await trio.lowlevel.checkpoint_if_cancelled()


def _check_index(operation: str, device: str, index: int) -> None:
    if not 0 <= index < 1 << 32:
        raise VfioError(errno.EINVAL, operation, f"index {index}", device=device)


async def _shielded(close: Callable[[], Awaitable[None]]) -> None:
    with trio.CancelScope(shield=True):
        await close()
