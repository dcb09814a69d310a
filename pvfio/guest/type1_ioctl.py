"""The requests of <linux/vfio.h> that a container hands to type1: structures, ``argsz``, flags.

Structures are in user memory: an ``arg`` is a cffi pointer, its ``argsz`` says how much lies behind it, and bitmaps are
at addresses that may be wrong (EFAULT). Not modelled: VFIO_IOMMU_ENABLE and _DISABLE (SPAPR), VFIO_UPDATE_VADDR.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.guest.type1_dirty import bitmap_size_fits
from pvfio.guest.type1_info import write_info
from pvfio.guest.user_copy import USER_TOP

if TYPE_CHECKING:
    from pvfio.guest.type1 import Type1

__all__ = ["check_extension", "type1_ioctl"]

_CHECK_EXTENSION: int = lib.VFIO_CHECK_EXTENSION
_GET_INFO: int = lib.VFIO_IOMMU_GET_INFO
_MAP: int = lib.VFIO_IOMMU_MAP_DMA
_UNMAP: int = lib.VFIO_IOMMU_UNMAP_DMA
_DIRTY: int = lib.VFIO_IOMMU_DIRTY_PAGES

_MAP_FLAGS: int = lib.VFIO_DMA_MAP_FLAG_READ | lib.VFIO_DMA_MAP_FLAG_WRITE
_UNMAP_ALL: int = lib.VFIO_DMA_UNMAP_FLAG_ALL
_UNMAP_DIRTY: int = lib.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
_START: int = lib.VFIO_IOMMU_DIRTY_PAGES_FLAG_START
_STOP: int = lib.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP
_GET_BITMAP: int = lib.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP

_MAP_TYPE = ffi.typeof("struct vfio_iommu_type1_dma_map *")
_UNMAP_TYPE = ffi.typeof("struct vfio_iommu_type1_dma_unmap *")
_DIRTY_TYPE = ffi.typeof("struct vfio_iommu_type1_dirty_bitmap *")
_MAP_SIZE: int = ffi.sizeof("struct vfio_iommu_type1_dma_map")
_UNMAP_SIZE: int = ffi.offsetof("struct vfio_iommu_type1_dma_unmap", "data")
_DIRTY_SIZE: int = ffi.offsetof("struct vfio_iommu_type1_dirty_bitmap", "data")
_BITMAP_SIZE: int = ffi.sizeof("struct vfio_bitmap")
_RANGE_SIZE: int = ffi.sizeof("struct vfio_iommu_type1_dirty_bitmap_get")
_TOP = (1 << 64) - 1

_EXTENSIONS = frozenset({lib.VFIO_TYPE1_IOMMU, lib.VFIO_TYPE1v2_IOMMU, lib.VFIO_UNMAP_ALL})


def check_extension(extension: int) -> int:
    """VFIO_CHECK_EXTENSION: 1 for the IOMMU types and extensions that type1 has here, else 0."""
    return int(extension in _EXTENSIONS)


def type1_ioctl(type1: Type1, request: int, arg: Any) -> int:
    """Carries out one request; see ``Type1.ioctl``."""
    handler = _REQUESTS.get(request)
    if handler is None:
        if request == _CHECK_EXTENSION:
            return check_extension(int(arg))
        raise VfioError(errno.ENOTTY, f"ioctl {request:#x}", "not a request of type1")
    if not isinstance(arg, ffi.CData) or not arg or ffi.typeof(arg).kind not in ("pointer", "array"):
        raise VfioError(errno.EFAULT, f"ioctl {request:#x}", "the argument is not a pointer")
    handler(type1, arg)
    return 0


def _get_info(type1: Type1, arg: Any) -> None:
    if not write_info(arg, type1.pgsize_bitmap, type1.dma_avail, type1.iova_ranges):
        raise VfioError(errno.EINVAL, "get_info", "argsz is too small")


def _map_dma(type1: Type1, arg: Any) -> None:
    request = arg if ffi.typeof(arg) is _MAP_TYPE else ffi.cast(_MAP_TYPE, arg)
    flags = request.flags
    if request.argsz < _MAP_SIZE or flags & ~_MAP_FLAGS:
        raise VfioError(errno.EINVAL, "map_dma", f"argsz {request.argsz}, flags {flags:#x}")
    type1.map(request.iova, request.vaddr, request.size, flags)


def _unmap_dma(type1: Type1, arg: Any) -> None:
    request = arg if ffi.typeof(arg) is _UNMAP_TYPE else ffi.cast(_UNMAP_TYPE, arg)
    argsz, flags, size = request.argsz, request.flags, request.size
    known = flags in (0, _UNMAP_ALL, _UNMAP_DIRTY)
    if argsz < _UNMAP_SIZE or not known:
        raise VfioError(errno.EINVAL, "unmap_dma", f"argsz {argsz}, flags {flags:#x}")
    bitmap = None
    if flags & _UNMAP_DIRTY:
        if argsz < _UNMAP_SIZE + _BITMAP_SIZE:
            raise VfioError(errno.EINVAL, "unmap_dma", f"argsz {argsz} has no bitmap")
        described = ffi.cast("struct vfio_bitmap *", request.data)
        bitmap = (_check_bitmap("unmap_dma", described, size), described.pgsize)
    request.size = type1.unmap(request.iova, size, flags, bitmap)


def _check_bitmap(operation: str, bitmap: Any, size: int) -> int:
    """The bitmap's address. Raises EINVAL where it cannot be one for ``size`` bytes of IOVAs."""
    address = int(ffi.cast("uintptr_t", bitmap.data))
    pgsize = bitmap.pgsize
    if address + bitmap.size > USER_TOP:
        raise VfioError(errno.EINVAL, operation, "the bitmap is not at a process address")
    if not pgsize or not bitmap_size_fits(size >> ((pgsize & -pgsize).bit_length() - 1), bitmap.size):
        raise VfioError(errno.EINVAL, operation, f"a bitmap of {bitmap.size} bytes does not fit the range")
    return address


def _dirty_pages(type1: Type1, arg: Any) -> None:
    operation = "dirty_pages"
    if not type1.v2:
        raise VfioError(errno.EACCES, operation, "type1 version 1 has no dirty tracking")
    request = ffi.cast(_DIRTY_TYPE, arg)
    argsz, flags = request.argsz, request.flags
    if argsz < _DIRTY_SIZE or flags not in (_START, _STOP, _GET_BITMAP):
        raise VfioError(errno.EINVAL, operation, f"argsz {argsz}, flags {flags:#x}")
    if flags != _GET_BITMAP:
        type1.dirty_tracking = flags == _START
        return
    if argsz < _DIRTY_SIZE + _RANGE_SIZE:
        raise VfioError(errno.EINVAL, operation, f"argsz {argsz} has no range")
    asked = ffi.cast("struct vfio_iommu_type1_dirty_bitmap_get *", request.data)
    if asked.size and asked.iova + asked.size - 1 > _TOP:
        raise VfioError(errno.EINVAL, operation, "the range wraps", iova=asked.iova, length=asked.size)
    address = _check_bitmap(operation, asked.bitmap, asked.size)
    type1.get_dirty_bitmap(asked.iova, asked.size, address, asked.bitmap.pgsize)


_REQUESTS = {_GET_INFO: _get_info, _MAP: _map_dma, _UNMAP: _unmap_dma, _DIRTY: _dirty_pages}
