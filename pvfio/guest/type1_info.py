"""VFIO_IOMMU_GET_INFO: type1's answer and its chain of capabilities, as bytes.

Capabilities, in Linux's order: migration (dirty bitmaps), DMA entries still available, IOVA ranges. Not modelled:
anything a later ABI adds to the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pvfio.abi import ffi, lib
from pvfio.guest.type1_iova import IovaRange

__all__ = ["DIRTY_BITMAP_SIZE_MAX", "write_info"]

DIRTY_BITMAP_SIZE_MAX = 1 << 28
"""Bytes of the largest dirty bitmap: a bit for each of 2^31 pages."""

_INFO_SIZE: int = ffi.sizeof("struct vfio_iommu_type1_info")
_MIN_SIZE: int = ffi.offsetof("struct vfio_iommu_type1_info", "cap_offset")
_HEADER_SIZE: int = ffi.sizeof("struct vfio_info_cap_header")
_CAP_ALIGN = 8


def _bytes(structure: Any) -> bytes:
    return bytes(ffi.buffer(structure))


def _iova_ranges(ranges: Sequence[IovaRange]) -> bytes:
    cap = ffi.new("struct vfio_iommu_type1_info_cap_iova_range *", {"iova_ranges": len(ranges)})
    cap.header.id = lib.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE
    cap.nr_iovas = len(ranges)
    for i, (start, last) in enumerate(ranges):
        cap.iova_ranges[i].start = start
        cap.iova_ranges[i].end = last
    fixed = ffi.offsetof("struct vfio_iommu_type1_info_cap_iova_range", "iova_ranges")
    return bytes(ffi.buffer(cap, fixed + len(ranges) * ffi.sizeof("struct vfio_iova_range")))


def _migration(pgsize: int) -> bytes:
    cap = ffi.new("struct vfio_iommu_type1_info_cap_migration *")
    cap.header.id = lib.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION
    cap.pgsize_bitmap = pgsize
    cap.max_dirty_bitmap_size = DIRTY_BITMAP_SIZE_MAX
    return _bytes(cap)


def _dma_avail(avail: int) -> bytes:
    cap = ffi.new("struct vfio_iommu_type1_info_dma_avail *")
    cap.header.id = lib.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL
    cap.avail = avail
    return _bytes(cap)


def _chain(caps: Sequence[bytes]) -> bytes:
    """The capabilities behind each other, each `next` counted from the start of the info structure."""
    chain = bytearray()
    for i, cap in enumerate(caps):
        at = len(chain)
        chain += cap + bytes(-len(cap) % _CAP_ALIGN)
        header = ffi.from_buffer("struct vfio_info_cap_header *", memoryview(chain)[at : at + _HEADER_SIZE])
        header.version = 1
        header.next = _INFO_SIZE + len(chain) if i + 1 < len(caps) else 0
        ffi.release(header)
    return bytes(chain)


def write_info(arg: Any, pgsize_bitmap: int, dma_avail: int, ranges: Sequence[IovaRange]) -> bool:
    """Answers into ``arg``, a pointer to ``struct vfio_iommu_type1_info`` with ``argsz`` bytes behind it.

    Where ``argsz`` has no room for the chain, it is set to what is needed and ``cap_offset`` to 0. Returns False, with
    nothing written, where it is shorter than the structure's first form (vfio.h: up to ``iova_pgsizes``).
    """
    info = ffi.cast("struct vfio_iommu_type1_info *", arg)
    argsz: int = info.argsz
    if argsz < _MIN_SIZE:
        return False
    caps = [_migration(pgsize_bitmap & -pgsize_bitmap), _dma_avail(dma_avail)]
    if ranges:
        caps.append(_iova_ranges(ranges))
    chain = _chain(caps)
    needed = _INFO_SIZE + len(chain)
    answer = ffi.new("struct vfio_iommu_type1_info *")
    answer.argsz = max(argsz, needed)
    answer.flags = lib.VFIO_IOMMU_INFO_PGSIZES | lib.VFIO_IOMMU_INFO_CAPS
    answer.iova_pgsizes = pgsize_bitmap
    if argsz >= needed:
        answer.cap_offset = _INFO_SIZE
        ffi.memmove(ffi.cast("char *", arg) + _INFO_SIZE, chain, len(chain))
    ffi.memmove(arg, answer, min(argsz, _INFO_SIZE))
    return True
