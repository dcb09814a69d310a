"""A page table and its entries: the Python face of pagetable.h.

Models what software does to a table: map, unmap, look up, walk. Does not model permission changes in place,
splitting of large pages or dirty tracking, and takes no locks: one task at a time changes a table.
"""

from __future__ import annotations

import enum
import errno
import weakref
from dataclasses import dataclass
from typing import Any, Literal

from pvfio.abi import ffi, lib
from pvfio.errors import PageTableError
from pvfio.memory import GuestMemory

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


def _destroy(table: Any, _memory: Any) -> None:
    lib.pt_destroy(table)
