"""The IOVA allocator of the DMA API: Python's hold on ``iova.c``.

Addresses and sizes are bytes here, in whole pages of 4 KiB. A range is aligned to its size (rounded up to a power of
two) and lies as high below its limit as it can; freed ranges of up to 32 pages come back from magazines of the
VP first. The facts are those of Linux's ``iova`` and its rcache.

Not modelled: NUMA, granules other than 4 KiB.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, NamedTuple

from pvfio.abi import ffi, lib
from pvfio.guest.transport import current_vp

__all__ = ["IovaDomain", "IovaStats"]

_PAGE_SHIFT = 12
_PAGE = 1 << _PAGE_SHIFT
_NONE: int = lib.PV_IOVA_NONE
_CHUNK = 256


class IovaStats(NamedTuple):
    """``struct pv_iova_stats``."""

    live: int
    live_pages: int
    cached: int
    cached_pages: int
    gaps: int
    gap_pages: int
    visited: int
    bytes: int


class IovaDomain:
    """The IOVAs from ``first`` to ``last`` (inclusive), for ``vps`` virtual processors.

    Page 0 is never handed out, nor are the ``reserved`` (first, last) ranges. Raises ``ValueError`` for a space that
    cannot be, ``MemoryError``. ``ptr`` is the ``struct pv_iova *``.
    """

    def __init__(
        self, first: int, last: int, *, vps: int = 1, reserved: tuple[tuple[int, int], ...] = ()
    ) -> None:
        start, end = max(first >> _PAGE_SHIFT, 1), (last + 1 >> _PAGE_SHIFT) - 1
        if not 0 <= start <= end < 1 << 52 or not 1 <= vps <= 4096:
            raise ValueError(f"IOVAs {first:#x}-{last:#x} for {vps} VPs")
        ptr = lib.pv_iova_create(start, end, vps)
        if ptr == ffi.NULL:
            raise MemoryError("no memory for an IOVA allocator")
        self.ptr: Any = ffi.gc(ptr, lib.pv_iova_destroy)
        self.first, self.last = start << _PAGE_SHIFT, (end + 1 << _PAGE_SHIFT) - 1
        for low, high in reserved:
            self.reserve(low, high)

    def reserve(self, first: int, last: int) -> int:
        """Keeps the free pages of [first, last] from being handed out; returns their bytes. Raises ``OSError``."""
        pages = ffi.new("uint64_t *")
        error = lib.pv_iova_reserve(self.ptr, first >> _PAGE_SHIFT, last >> _PAGE_SHIFT, pages)
        if error:
            raise OSError(-error, f"reserve {first:#x}-{last:#x}: {errno.errorcode[-error]}")
        return int(pages[0]) << _PAGE_SHIFT

    def alloc(self, size: int, limit: int = (1 << 64) - 1, *, purge: bool = True) -> int:
        """An IOVA for ``size`` bytes, no byte above ``limit``.

        ``purge``: where nothing is left, take back what the magazines hold and try again. Raises ``OSError`` EINVAL
        (size 0 or less), ENOMEM (no place).
        """
        pages = -(-size // _PAGE)
        if pages <= 0:
            raise OSError(errno.EINVAL, f"an IOVA range of {size} bytes")
        top = min(limit, self.last) + 1 >> _PAGE_SHIFT
        pfn: int = _NONE
        if top and pages < 1 << 32:
            pfn = lib.pv_iova_alloc(self.ptr, current_vp(), pages, top - 1, purge)
        if pfn == _NONE:
            raise OSError(errno.ENOMEM, f"no IOVAs for {size:#x} bytes below {limit:#x}")
        return pfn << _PAGE_SHIFT

    def free(self, iova: int) -> None:
        """Gives a range back by its first byte. Raises ``KeyError``: none begins there."""
        if iova % _PAGE or not 0 <= iova >> _PAGE_SHIFT < 1 << 52:
            raise KeyError(iova)
        if lib.pv_iova_free(self.ptr, current_vp(), iova >> _PAGE_SHIFT):
            raise KeyError(iova)

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """The ranges in use as (IOVA, bytes, cookie), in no order."""
        cursor = ffi.new("uint64_t *")
        out = ffi.new("struct pv_iova_range[]", _CHUNK)
        while count := lib.pv_iova_ranges(self.ptr, cursor, out, _CHUNK):
            yield from [
                (out[i].pfn << _PAGE_SHIFT, out[i].pages << _PAGE_SHIFT, out[i].cookie) for i in range(count)
            ]

    def purge(self) -> None:
        """Takes back what the magazines hold."""
        lib.pv_iova_purge(self.ptr)

    def stats(self) -> IovaStats:
        """Counts as they are now; looks at every gap."""
        raw = ffi.new("struct pv_iova_stats *")
        lib.pv_iova_get_stats(self.ptr, raw)
        return IovaStats(*(int(getattr(raw, name)) for name in IovaStats._fields))

    def check(self) -> None:
        """Checks the allocator's invariants. Raises AssertionError."""
        wrong = lib.pv_iova_check(self.ptr)
        if wrong:
            raise AssertionError(f"the IOVA allocator is broken: invariant {wrong}")
