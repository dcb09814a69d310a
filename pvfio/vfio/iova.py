"""Choosing IOVAs: ranges of a container's IO address space, handed out from the top down.

Free ranges are kept by both their ends, and in size classes (one per power of two), each class a heap of
highest addresses, so allocating and freeing cost O(log n). Ranges are aligned to their size rounded up to a
power of two, at most 2 MiB, so that the page table can use large pages. IOVA 0 is never given out.

Not here: what is mapped where. A range mapped by hand without `reserve` is unknown here, and mapping over it
is refused by the kernel.
"""

from __future__ import annotations

import errno
from heapq import heappop, heappush

from pvfio.errors import VfioError

__all__ = ["IovaAllocator"]

PAGE = 4096
LARGEST_ALIGN = 2 << 20
_PEEK = 4


class IovaAllocator:
    """Hands out IOVA ranges inside ``ranges``: (first, last) addresses, both inclusive, as GET_INFO reports
    them.
    """

    def __init__(self, ranges: tuple[tuple[int, int], ...]) -> None:
        self._allocated: dict[int, int] = {}
        self.set_ranges(ranges)

    @property
    def allocated(self) -> dict[int, int]:
        """A copy of what is handed out: IOVA -> size in bytes."""
        return dict(self._allocated)

    @property
    def free_bytes(self) -> int:
        """Bytes that are not handed out."""
        return sum(end - start for start, end in self._ends.items())

    def set_ranges(self, ranges: tuple[tuple[int, int], ...]) -> None:
        """Uses other ranges from now on (a group joined or left); what is handed out stays handed out. O(n
        log n).
        """
        self.ranges = tuple(ranges)
        pages = [(max(PAGE, -(-first // PAGE) * PAGE), (last + 1) // PAGE * PAGE) for first, last in ranges]
        self._bounds = [(start, end) for start, end in pages if start < end]
        self._ends: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._classes: list[list[int]] = [[] for _ in range(66)]
        taken = sorted(self._allocated.items())
        for start, end in self._bounds:
            for iova, size in taken:
                if iova + size <= start or iova >= end:
                    continue
                self._insert(start, iova)
                start = iova + size
            self._insert(start, end)

    def alloc(self, size: int, align: int = 0) -> int:
        """A free range of ``size`` bytes (rounded up to pages), aligned to ``align`` (a power of two) if that
        is more.

        Raises ``ValueError`` for a size below 1 or a bad alignment, ``VfioError`` ENOSPC when nothing fits.
        """
        if size < 1 or align & (align - 1) or align < 0:
            raise ValueError(f"cannot allocate {size} bytes aligned to {align}")
        size = -(-size // PAGE) * PAGE
        align = max(align, min(1 << (size - 1).bit_length(), LARGEST_ALIGN), PAGE)
        start = self._find(size, align)
        if start is None:
            raise VfioError(errno.ENOSPC, "allocate IOVA", "no free range is large enough", length=size)
        end = self._ends[start]
        iova = (end - size) // align * align
        self._remove(start)
        self._insert(start, iova)
        self._insert(iova + size, end)
        self._allocated[iova] = size
        return iova

    def reserve(self, iova: int, size: int) -> bool:
        """Takes this very range; false where it is not wholly free. O(free ranges). Given back by ``free``."""
        size = -(-size // PAGE) * PAGE
        if iova % PAGE or size < PAGE:
            return False
        for start, end in self._ends.items():
            if start <= iova and iova + size <= end:
                self._remove(start)
                self._insert(start, iova)
                self._insert(iova + size, end)
                self._allocated[iova] = size
                return True
        return False

    def owns(self, iova: int) -> bool:
        """Whether ``iova`` begins a range that is handed out."""
        return iova in self._allocated

    def free(self, iova: int) -> int:
        """Takes a range back and returns its size in bytes. Raises ``KeyError`` for one that is not handed
        out.
        """
        size = self._allocated.pop(iova)
        for first, last in self._bounds:
            self._insert(max(iova, first), min(iova + size, last))
        return size

    def _find(self, size: int, align: int) -> int | None:
        """Where a free range starts that holds `size` aligned bytes."""
        certain = size + align - PAGE
        for number in range(size.bit_length(), len(self._classes)):
            heap = self._classes[number]
            while heap and not self._live(number, heap[0]):
                heappop(heap)
            for key in heap[:_PEEK]:
                start = self._starts.get(-key)
                if start is not None and (-key - size) // align * align >= start:
                    return start
            if heap and 1 << (number - 1) >= certain:
                return self._starts[-heap[0]]
        fitting = (start for start, end in self._ends.items() if (end - size) // align * align >= start)
        return next(fitting, None)

    def _live(self, number: int, key: int) -> bool:
        start = self._starts.get(-key)
        return start is not None and (-key - start).bit_length() == number

    def _remove(self, start: int) -> None:
        """Forgets a free range; its heap entry dies where it is."""
        del self._starts[self._ends.pop(start)]

    def _insert(self, start: int, end: int) -> None:
        """A free range, merged with its neighbours."""
        if start >= end:
            return
        below = self._starts.get(start)
        if below is not None:
            self._remove(below)
            start = below
        above = self._ends.get(end)
        if above is not None:
            self._remove(end)
            end = above
        self._ends[start] = end
        self._starts[end] = start
        number = (end - start).bit_length()
        heap = self._classes[number]
        heappush(heap, -end)
        if len(heap) > 2 * len(self._ends) + 64:
            heap[:] = sorted({key for key in heap if self._live(number, key)})
