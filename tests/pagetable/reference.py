"""Page tables in plain Python, to hold the C against.

Models what a mapping means: a set of leaves, each the largest page that fits where it stands, found by
trying every size; what unmap removes; and the three entry formats, written out from the specifications.
Does not model table pages, order of stores, or how entries are found.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass

from pvfio.errors import PageTableError
from pvfio.pagetable import Format, PageTable, Perm

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30
MASK64 = (1 << 64) - 1
ADDRESS = ((1 << 52) - 1) & ~0xFFF

SIZES: dict[Format, tuple[int, ...]] = {
    Format.X86_64: (K4, M2, G1),
    Format.VTDSS: (K4, M2, G1),
    Format.AMDV1: tuple(1 << lg2 for lg2 in range(12, 52) if lg2 != 39),
}

# (format, levels) of every table the project can make.
SHAPES: tuple[tuple[Format, int], ...] = (
    (Format.X86_64, 4),
    (Format.X86_64, 5),
    (Format.VTDSS, 3),
    (Format.VTDSS, 4),
    (Format.VTDSS, 5),
    (Format.AMDV1, 1),
    (Format.AMDV1, 3),
    (Format.AMDV1, 6),
)


def bitmap(fmt: Format) -> int:
    """Every page size of the format."""
    return sum(SIZES[fmt])


def input_bits(fmt: Format, levels: int) -> int:
    """Bits of an IOVA that the table can reach, growth included."""
    return 64 if fmt is Format.AMDV1 else 12 + 9 * levels


@functools.lru_cache
def sizes_of(sizes: int) -> tuple[int, ...]:
    """The page sizes of a bitmap, in bytes."""
    return tuple(1 << lg2 for lg2 in range(64) if sizes >> lg2 & 1)


def best_page_size(sizes: int, iova: int, phys: int, left: int) -> int:
    """The largest page of the bitmap that fits at the start of a range, by trying all; 0 where none does."""
    fitting = [s for s in sizes_of(sizes) if iova % s == 0 and phys % s == 0 and s <= left]
    return max(fitting, default=0)


def granted(fmt: Format, perm: int) -> Perm:
    """What a leaf made with ``perm`` lets a device do."""
    return Perm(perm | Perm.READ) if fmt is Format.X86_64 else Perm(perm)


def try_map(table: PageTable, iova: int, phys: int, size: int) -> int:
    """Maps for reading and writing; 0 or the errno."""
    try:
        table.map_range(iova, phys, size, Perm.READ | Perm.WRITE)
    except PageTableError as refused:
        return refused.errno or 0
    return 0


@dataclass(frozen=True)
class Leaf:
    """One page of a mapping."""

    iova: int
    phys: int
    size: int
    perm: Perm


class Model:
    """What is mapped: the leaves by IOVA, and their IOVAs in order."""

    def __init__(self, fmt: Format, sizes: int) -> None:
        self.fmt = fmt
        self.sizes = sizes
        self.leaves: dict[int, Leaf] = {}
        self.order: list[int] = []

    def plan(self, iova: int, phys: int, size: int, perm: int) -> list[Leaf]:
        """The leaves of one mapping: at each address the largest page."""
        leaves = []
        while size:
            page = best_page_size(self.sizes, iova, phys, size)
            leaves.append(Leaf(iova, phys, page, granted(self.fmt, perm)))
            iova, phys, size = iova + page, phys + page, size - page
        return leaves

    def overlaps(self, iova: int, size: int) -> bool:
        begins = bisect.bisect_left(self.order, iova)
        inside = begins < len(self.order) and self.order[begins] < iova + size
        return inside or self.find(iova) is not None

    def map(self, iova: int, phys: int, size: int, perm: int) -> bool:
        """False, and nothing done, where something is mapped already."""
        if self.overlaps(iova, size):
            return False
        new = self.plan(iova, phys, size, perm)
        self.leaves.update((leaf.iova, leaf) for leaf in new)
        at = bisect.bisect_left(self.order, iova)
        self.order[at:at] = [leaf.iova for leaf in new]
        return True

    def unmap(self, iova: int, size: int) -> int:
        """Bytes unmapped: every leaf that begins in the range, none when the range begins inside one."""
        around = self.find(iova)
        if around is not None and around.iova != iova:
            return 0
        first, end = bisect.bisect_left(self.order, iova), bisect.bisect_left(self.order, iova + size)
        gone = [self.leaves.pop(start) for start in self.order[first:end]]
        del self.order[first:end]
        return sum(leaf.size for leaf in gone)

    def find(self, iova: int) -> Leaf | None:
        at = bisect.bisect_right(self.order, iova) - 1
        leaf = self.leaves[self.order[at]] if at >= 0 else None
        return leaf if leaf is not None and iova < leaf.iova + leaf.size else None

    def tables(self, levels: int) -> int:
        """Table pages that a tree of ``levels`` needs for the leaves: the root, and one for each place in
        use.
        """
        places = {
            (level, leaf.iova >> (12 + 9 * level))
            for leaf in self.leaves.values()
            for level in range(leaf_level(leaf.size), levels)
        }
        return len(places) + 1


def leaf_level(size: int) -> int:
    """The level of the table that holds leaves of ``size`` bytes."""
    return next(level for level in range(1, 7) if size < 1 << (12 + 9 * level))


def leaf_entry(fmt: Format, level: int, size: int, phys: int, perm: int) -> int:
    """A leaf's 64 bits, from the table of bits in the specifications."""
    read, write = bool(perm & Perm.READ), bool(perm & Perm.WRITE)
    large = level > 1
    if fmt is Format.X86_64:
        return phys | 1 | write << 1 | 1 << 2 | 1 << 5 | write << 6 | large << 7
    if fmt is Format.VTDSS:
        return phys | read | write << 1 | large << 7
    entry = phys | 1 | 1 << 60 | read << 61 | write << 62
    if size != 1 << (12 + 9 * (level - 1)):
        entry |= 7 << 9
        # AMD IOMMU Table 14: 8K is a 0 in bit 12, 16K a 1 there and a 0 in bit 13, and so on.
        bit = 12
        while 1 << (bit + 1) != size:
            entry |= 1 << bit
            bit += 1
    return entry


def table_entry(fmt: Format, level: int, phys: int) -> int:
    """The 64 bits of an entry in a table of ``level`` that points to the next table."""
    if fmt is Format.X86_64:
        return phys | 0b100111
    if fmt is Format.VTDSS:
        return phys | 0b11
    return phys | 1 | (level - 1) << 9 | 0b11 << 61
