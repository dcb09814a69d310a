"""A page table and its entries: the Python face of pagetable.h.

Models what software does to a table: map, unmap, look up, walk, read and clear what walkers mark, split large pages
and merge small ones. Does not model permission changes in place, and takes no locks: one task at a time changes a
table.
"""

from __future__ import annotations

import enum
import errno
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pvfio.abi import ffi, lib
from pvfio.errors import PageTableError
from pvfio.memory import PAGE_SIZE, GuestMemory

_NONE: int = lib.PT_NONE
_ROOT: int = ~0xFFF


class Format(enum.IntEnum):
    """The entry formats, by their numbers in format.h."""

    X86_64 = lib.PT_X86_64
    VTDSS = lib.PT_VTDSS
    AMDV1 = lib.PT_AMDV1


class Perm(enum.IntFlag):
    """What a device may do. x86_64 has no write-only: WRITE there grants READ too."""

    READ = lib.PT_READ
    WRITE = lib.PT_WRITE


@dataclass(frozen=True, slots=True)
class WalkEntry:
    """One entry on the way of an IOVA.

    ``table`` is the physical address of the table read, ``index`` the entry's place in it, ``entry`` its 64
    bits. ``address`` is the page's or the next table's, ``size`` the bytes of the page (of what the entry
    covers, where it is no leaf); ``reserved`` says that the hardware would refuse the entry as malformed.
    """

    level: int
    table: int
    index: int
    entry: int
    present: bool
    leaf: bool
    perm: Perm
    address: int
    size: int
    reserved: bool


@dataclass(frozen=True, slots=True)
class TableStats:
    """Table pages in use (the root included), and pages that wait for ``release_detached``."""

    tables: int
    detached: int


_REASONS = {
    errno.EINVAL: "size 0, or neither read nor write",
    errno.EOVERFLOW: "the range wraps past 2**64",
    errno.ENXIO: "not aligned to the smallest page size",
    errno.ERANGE: "beyond the input or output address width",
    errno.EADDRINUSE: "overlaps a mapping",
    errno.ENOMEM: "no memory for a table page",
    errno.EOPNOTSUPP: "x86_64 leaves are born accessed and dirty",
}


class PageTable:
    """A page table whose pages come from ``memory``: guest pages (addresses are GPAs) or host pages (HPAs).

    ``levels`` is 4 or 5 (x86_64), 3 to 5 (vtdss), 1 to 6 (amdv1, where the top grows from there).
    ``pgsize_bitmap`` allows page sizes (default: all of the format); ``input_bits`` defaults to what the
    levels reach, 64 for amdv1; ``output_bits`` is at most 52. Raises ``ValueError`` for what the format
    cannot have, ``MemoryError`` where there is no page for the root.

    Unmapping detaches the table pages it empties and keeps them until ``release_detached``, which the owner
    calls when the IOMMU has forgotten them. ``errno`` of every ``PageTableError``: reference table "page
    table layer" of VFIO, as Linux's generic page table. A destroyed table raises ``TypeError`` when used.
    """

    def __init__(
        self,
        fmt: Format,
        memory: GuestMemory,
        *,
        owner: Literal["guest", "host"],
        levels: int,
        pgsize_bitmap: int | None = None,
        input_bits: int | None = None,
        output_bits: int = 52,
    ) -> None:
        if owner not in ("guest", "host"):
            raise ValueError(f"owner is 'guest' or 'host', not {owner!r}")
        space = memory.guest_space if owner == "guest" else memory.host_space
        # 0 asks C for the default; a caller's own 0 is a mistake.
        if pgsize_bitmap == 0 or input_bits == 0 or output_bits == 0:
            raise ValueError("a page table without page sizes or address bits")
        config = ffi.new("struct pt_config *")
        try:
            config.format = int(fmt)
            config.levels = levels
            config.pgsize_bitmap = pgsize_bitmap or 0
            config.input_bits = input_bits or 0
            config.output_bits = output_bits
        except OverflowError as e:
            raise ValueError(f"no such page table: {e}") from None
        config.space = space
        config.owner = memory.ptr
        config.alloc_page = ffi.addressof(lib, f"pv_memory_{owner}_page")
        config.free_page = ffi.addressof(lib, f"pv_memory_{owner}_page_free")
        error = ffi.new("int *")
        table = lib.pt_create(config, error)
        if table == ffi.NULL:
            if error[0] == -errno.ENOMEM:
                raise MemoryError("no page for the root of a page table")
            raise ValueError(
                f"{Format(fmt).name} has no table of {levels} levels, {input_bits or 'default'} input bits, "
                f"{output_bits} output bits, page sizes {pgsize_bitmap or 'default'}"
            )
        self.format = Format(fmt)
        self.memory = memory
        self.pgsize_bitmap: int = lib.pt_pgsize_bitmap(table)
        self._table: Any = table
        # Not a cffi destructor: in a reference cycle the memory could be destroyed before the table that lies in it.
        # A finalizer holds the memory from outside the cycle.
        self._destroy = weakref.finalize(self, _destroy, table, memory.ptr)
        self._unmapped = ffi.new("uint64_t *")

    @property
    def ptr(self) -> Any:
        """``struct pt_table *``, valid while this object lives."""
        return self._table

    @property
    def root(self) -> int:
        """Physical address of the root table; amdv1's changes when the top grows."""
        return int(lib.pt_top(self._table)) & _ROOT

    @property
    def levels(self) -> int:
        """Levels now."""
        return int(lib.pt_top(self._table)) & 7

    def map_range(self, iova: int, phys: int, size: int, perm: int) -> None:
        """Maps ``size`` bytes at ``iova`` to ``phys`` with the largest pages that fit: all of it, or nothing.

        ``PageTableError``, in this order: EINVAL (size 0), EOVERFLOW, EINVAL (no or unknown permission),
        ENXIO, ERANGE, EADDRINUSE, ENOMEM. No walker sees any part of a mapping that fails.
        """
        try:
            error = lib.pt_map_range(self._table, iova, phys, size, perm)
        except OverflowError:
            error = -errno.EOVERFLOW
        if error:
            raise PageTableError(-error, "map", _REASONS.get(-error, ""), iova=iova, length=size)

    def unmap_range(self, iova: int, size: int) -> int:
        """Unmaps what is mapped in the range and returns the bytes: 0 where nothing is.

        A large page that begins in the range goes whole, and counts whole; a range that begins inside one
        unmaps 0 bytes. ``PageTableError``: EINVAL (size 0), EOVERFLOW, ENXIO, ERANGE.
        """
        try:
            error = lib.pt_unmap_range(self._table, iova, size, self._unmapped)
        except OverflowError:
            error = -errno.EOVERFLOW
        if error:
            raise PageTableError(-error, "unmap", _REASONS.get(-error, ""), iova=iova, length=size)
        return int(self._unmapped[0])

    def unmap_range_dirty(self, iova: int, size: int) -> tuple[int, NDArray[np.bool_]]:
        """As ``unmap_range``, entry by entry by exchange; and which pages were dirty, as ``read_clear_dirty``.

        No mark of a walker falls between the two. Errors as both.
        """
        bitmap = _Bitmap(size)
        self._ranged("unmap", lib.pt_unmap_range_dirty, iova, size, self._unmapped, bitmap.words)
        return int(self._unmapped[0]), bitmap.pages()

    def read_clear_dirty(self, iova: int, size: int, *, clear: bool = True) -> NDArray[np.bool_]:
        """Which 4 KiB pages of the range walkers have marked dirty: shape ``(size / 4096,)``.

        Their leaves are clean afterwards (not with ``clear=False``), right beside walkers that mark meanwhile; then
        flush the IOMMU, for a cached translation marks nothing. A large leaf is dirty as a whole, and stays dirty
        where only a part of it is in the range. ``PageTableError``: EINVAL (size 0), EOVERFLOW, ENXIO, ERANGE;
        EOPNOTSUPP for x86_64. ``MemoryError`` where the range has more pages than a bitmap can.
        """
        return self._read_clear("read dirty", lib.pt_read_clear_dirty, iova, size, clear)

    def read_clear_accessed(self, iova: int, size: int, *, clear: bool = True) -> NDArray[np.bool_]:
        """As ``read_clear_dirty``, for pages that were read or written."""
        return self._read_clear("read accessed", lib.pt_read_clear_accessed, iova, size, clear)

    def _read_clear(self, operation: str, call: Any, iova: int, size: int, clear: bool) -> NDArray[np.bool_]:
        bitmap = _Bitmap(size)
        self._ranged(operation, call, iova, size, bitmap.words, 0 if clear else lib.PT_PEEK, self._unmapped)
        return bitmap.pages()

    def split_range(self, iova: int, size: int) -> None:
        """Replaces the large pages that meet the range by 4 KiB pages, under walkers; translations stay the same.

        Flush the IOMMU afterwards: it may hold the large ones. ``PageTableError``: EINVAL (size 0, or a table
        without 4 KiB pages), EOVERFLOW, ENXIO, ERANGE; ENOMEM, and what was split until then stays so.
        """
        self._ranged("split", lib.pt_split_range, iova, size)

    def merge_range(self, iova: int, size: int) -> int:
        """Replaces whole tables of pages in a row by one page of 2 MiB or 1 GiB each, and returns how many.

        Marks that walkers set meanwhile may be lost. Flush, then ``release_detached``. ``PageTableError``: EINVAL
        (size 0), EOVERFLOW, ENXIO, ERANGE.
        """
        self._ranged("merge", lib.pt_merge_range, iova, size, self._unmapped)
        return int(self._unmapped[0])

    def _ranged(self, operation: str, call: Any, iova: int, size: int, *rest: Any) -> None:
        try:
            error = call(self._table, iova, size, *rest)
        except OverflowError:
            error = -errno.EOVERFLOW
        if error:
            raise PageTableError(-error, operation, _REASONS.get(-error, ""), iova=iova, length=size)

    def release_detached(self) -> int:
        """Hands the table pages that unmaps have emptied back to memory, oldest first; how many.

        Only after a flush: until then the IOMMU may still walk them.
        """
        return int(lib.pt_release_detached(self._table))

    def iova_to_phys(self, iova: int) -> int | None:
        """Where ``iova`` leads, or ``None`` where nothing is mapped."""
        phys: int = lib.pt_iova_to_phys(self._table, iova)
        return None if phys == _NONE else phys

    def walk(self, iova: int) -> list[WalkEntry]:
        """The entries a walker reads for ``iova``, from the root down to a leaf or to what is not present.

        They are read from the table pages themselves. Empty for an IOVA that the table cannot reach.
        """
        steps = ffi.new("struct pt_walk_entry[]", lib.PT_MAX_LEVELS)
        count: int = lib.pt_walk(self._table, iova, steps)
        return [
            WalkEntry(
                level=step.level,
                table=step.table,
                index=step.index,
                entry=step.entry,
                present=bool(step.present),
                leaf=bool(step.leaf),
                perm=Perm(step.perm),
                address=step.addr,
                size=1 << step.size_lg2,
                reserved=bool(step.reserved),
            )
            for step in (steps[i] for i in range(count))
        ]

    def stats(self) -> TableStats:
        """How many table pages there are."""
        raw = ffi.new("struct pt_stats *")
        lib.pt_get_stats(self._table, raw)
        return TableStats(raw.tables, raw.detached)

    def destroy(self) -> None:
        """Hands every table page back; idempotent. Nothing may walk the table any more."""
        self._table = None
        self._destroy()


class _Bitmap:
    """A bit per 4 KiB page of ``size`` bytes, as C fills it."""

    def __init__(self, size: int) -> None:
        self._pages = max(size, 0) // PAGE_SIZE
        if self._pages >= 1 << 40:
            raise MemoryError(f"a bitmap of {self._pages} pages")
        self._bits = np.zeros(-(-self._pages // 64), np.uint64)
        self.words = ffi.from_buffer("uint64_t[]", self._bits, require_writable=True)

    def pages(self) -> NDArray[np.bool_]:
        """One element per page."""
        return np.unpackbits(self._bits.view(np.uint8), count=self._pages, bitorder="little").view(np.bool_)


def _destroy(table: Any, _memory: Any) -> None:
    lib.pt_destroy(table)
