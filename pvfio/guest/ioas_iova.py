"""Which IOVAs an IO address space may use: reserved ranges by owner, allowed ranges, and the search for a free place.

A page table reserves what lies outside its aperture, a device its reserved regions; both go with their owner. Allowed
ranges are a promise to the user: whatever would reserve a part of one is refused. Rules: Linux io_pagetable.c, but that
a search begins where the last one ended. Not modelled: direct-mapped regions, software-managed MSI windows.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pvfio.errors import VfioError
from pvfio.guest.type1_iova import IovaRange

if TYPE_CHECKING:
    from pvfio.guest.mapping_index import MappingIndex

__all__ = ["TOP", "IovaSpace"]

TOP = (1 << 64) - 1
_PAGE = 4096
_LARGEST_ALIGN = 2 << 20


def _overlap(ranges: Iterable[IovaRange], start: int, last: int) -> bool:
    return any(a <= last and start <= b for a, b in ranges)


class IovaSpace:
    """The reserved and allowed ranges ((first, last) IOVA) around the mappings of an index."""

    def __init__(self, index: MappingIndex) -> None:
        self._index = index
        self._reserved: dict[object, list[IovaRange]] = {}
        self.allowed: tuple[IovaRange, ...] = ()
        self._cursor = _PAGE
        self._holes: tuple[IovaRange, ...] = ((0, TOP),)

    @property
    def ranges(self) -> tuple[IovaRange, ...]:
        """What no one has reserved, in order."""
        return self._holes

    def reserved(self, start: int, last: int) -> bool:
        """Whether a byte of the range is reserved."""
        return not any(a <= start and last <= b for a, b in self._holes)

    def reserve(self, owner: object, ranges: Sequence[IovaRange]) -> None:
        """Reserves ranges for an owner, all or none.

        Raises ``VfioError`` EADDRINUSE where a mapping or an allowed range is in the way.
        """
        for start, last in ranges:
            if self._index.first(start, last) is not None or _overlap(self.allowed, start, last):
                reason = f"{start:#x}-{last:#x} would be reserved, but is mapped or allowed"
                raise VfioError(errno.EADDRINUSE, "reserve", reason, iova=start, length=last - start + 1)
        self._reserved.setdefault(owner, []).extend(ranges)
        self._refresh()

    def release(self, owner: object) -> None:
        """Forgets what an owner has reserved."""
        if self._reserved.pop(owner, None) is not None:
            self._refresh()

    def allow(self, ranges: Sequence[IovaRange]) -> None:
        """Replaces the allowed ranges.

        Raises ``VfioError``: EINVAL (a range of one byte or less, two that overlap), EADDRINUSE (reserved).
        """
        before = -1
        ordered = sorted(ranges)
        for start, last in ordered:
            if start >= last or start <= before:
                raise VfioError(errno.EINVAL, "allow_iovas", f"{start:#x}-{last:#x} is empty or overlaps")
            before = last
        for start, last in ordered:
            if self.reserved(start, last):
                raise VfioError(errno.EADDRINUSE, "allow_iovas", f"{start:#x}-{last:#x} is reserved in part")
        self.allowed = tuple(ordered)

    def find(self, vaddr: int, length: int, alignment: int) -> int:
        """A free place for ``length`` bytes, congruent to ``vaddr`` as far as large pages can use it; never 0.

        ``alignment`` is the least an IOVA may have. Raises ``VfioError``: EOVERFLOW, EINVAL, ENOSPC.
        """
        if length == 0 or length >= TOP // 2:
            raise VfioError(errno.EOVERFLOW, "map", "length", length=length)
        align = 1 << (length - 1).bit_length()
        if vaddr:
            align = min(align, vaddr & -vaddr)
        align = min(align, _LARGEST_ALIGN)
        if align < alignment:
            raise VfioError(errno.EINVAL, "map", "the memory is not aligned", length=length)
        offset = vaddr % _PAGE
        for floor in (self._cursor, _PAGE):
            for start, last in self._candidates(floor):
                at = -(-start // _PAGE) * _PAGE + offset if offset else -(-start // align) * align
                if at + length - 1 <= last:
                    self._cursor = at + length
                    return at
        raise VfioError(errno.ENOSPC, "map", "no free IOVA range is large enough", length=length)

    def _candidates(self, floor: int) -> Iterator[IovaRange]:
        """Free ranges from ``floor`` on, inside the allowed ones where there are any."""
        for first, end in self.allowed or ((_PAGE, TOP - _PAGE),):
            for a, b in self._holes:
                start, last = max(first, a, floor), min(end, b)
                while start <= last:
                    mapping = self._index.first(start, last)
                    if mapping is None:
                        yield start, last
                        break
                    if mapping.iova > start:
                        yield start, mapping.iova - 1
                    start = mapping.last + 1

    def _refresh(self) -> None:
        holes = []
        start = 0
        for first, last in sorted(r for ranges in self._reserved.values() for r in ranges):
            if first > start:
                holes.append((start, first - 1))
            start = max(start, last + 1)
        if start <= TOP:
            holes.append((start, TOP))
        self._holes = tuple(holes)
