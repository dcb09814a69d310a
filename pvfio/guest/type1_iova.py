"""Which IOVAs a container may map: the aperture its domains share, less every group's reserved regions.

Not modelled: direct-mapped ("relaxable") regions and software-managed MSI windows; the pvIOMMU has neither.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["IovaRange", "gaps", "usable_ranges"]

IovaRange = tuple[int, int]
"""(first, last) IOVA, both included."""

TOP = (1 << 64) - 1


def usable_ranges(apertures: Iterable[IovaRange], reserved: Iterable[IovaRange]) -> tuple[IovaRange, ...]:
    """What lies inside every aperture and outside every reserved region, in order; empty without an aperture."""
    start, last, any_aperture = 0, TOP, False
    for aperture_start, aperture_last in apertures:
        any_aperture = True
        start = max(start, aperture_start)
        last = min(last, aperture_last)
    if not any_aperture or start > last:
        return ()
    ranges = []
    for hole_start, hole_last in sorted(reserved):
        if hole_last < start or hole_start > last:
            continue
        if hole_start > start:
            ranges.append((start, hole_start - 1))
        start = max(start, hole_last + 1)
    if start <= last:
        ranges.append((start, last))
    return tuple(ranges)


def gaps(ranges: Iterable[IovaRange]) -> list[IovaRange]:
    """What the ordered ``ranges`` leave of the 64-bit space."""
    found = []
    start = 0
    for range_start, range_last in ranges:
        if range_start > start:
            found.append((start, range_start - 1))
        start = range_last + 1
    if start <= TOP:
        found.append((start, TOP))
    return found
