"""An IO address space of an iommufd: mappings of process memory, carried out by any number of hardware page tables.

Every check, its order and its errno are those of Linux (drivers/iommu/iommufd/io_pagetable.c). An address space without
a page table is only a book: nothing is pinned, no IOVA is reserved, and IOVAs need no alignment. A page table that
joins is filled with every mapping, or refused. An unmap clears every page table, flushes each once, brings the nested
tables over them into step, and only then unpins.

Not modelled: access by mediated devices, locking (all calls come from one thread), the VFIO compatibility interface.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from pvfio.abi import lib
from pvfio.errors import VfioError
from pvfio.guest.ioas_iova import TOP, IovaSpace
from pvfio.guest.ioas_pages import PAGE, Pages, PageStore
from pvfio.guest.mapping_index import Mapping, MappingIndex
from pvfio.guest.refusals import as_vfio_errors

if TYPE_CHECKING:
    from pvfio.guest.paging_domain import PagingDomain
    from pvfio.guest.type1 import LockedMemory
    from pvfio.guest.type1_iova import IovaRange

__all__ = ["FIXED", "PROT", "Carrier", "Ioas"]

FIXED: int = lib.IOMMU_IOAS_MAP_FIXED_IOVA
_READ: int = lib.IOMMU_IOAS_MAP_READABLE
_WRITE: int = lib.IOMMU_IOAS_MAP_WRITEABLE
PROT = _READ | _WRITE
_PERM = {_READ: lib.PT_READ, _WRITE: lib.PT_WRITE, PROT: lib.PT_READ | lib.PT_WRITE}

Slice = tuple[Pages, int, int]
"""Pages, the process address a piece of them begins at, and its bytes."""


class Carrier(Protocol):
    """A hardware page table that carries the address space out, as ``Ioas`` sees it."""

    @property
    def domain(self) -> PagingDomain: ...
    def mapped(self) -> None:
        """Mappings were added."""

    def unmapped(self) -> None:
        """Mappings were taken out, and flushed; their memory is unpinned when this returns."""


class Ioas:
    """One address space. ``store`` holds the pages of all address spaces of its iommufd, ``account`` is where a
    new mapping's memory is counted. Raises ``VfioError``; what raised has changed nothing, unless it says otherwise.
    """

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self._index = MappingIndex()
        self.iovas = IovaSpace(self._index)
        self.large_pages = True
        self.carriers: list[Carrier] = []
        self._unflushed = False

    def __len__(self) -> int:
        return len(self._index)

    @property
    def alignment(self) -> int:
        """What IOVAs, lengths and process addresses are multiples of, in bytes."""
        most = 1 if self.large_pages else PAGE
        for carrier in self.carriers:
            most = max(most, carrier.domain.pgsize_bitmap & -carrier.domain.pgsize_bitmap)
        return most

    def mappings(self) -> Iterator[Mapping]:
        """Every mapping, by IOVA; ``flags`` are IOMMU_IOAS_MAP_READABLE and _WRITEABLE."""
        return iter(self._index)

    def map(self, iova: int, vaddr: int, length: int, flags: int, account: LockedMemory) -> int:
        """Maps process memory at ``iova``, or without IOMMU_IOAS_MAP_FIXED_IOVA where there is room; returns the IOVA.

        Raises EOVERFLOW, EINVAL (length, alignment, reserved), EEXIST, ENOSPC; with a page table also EFAULT, ENOMEM.
        """
        if vaddr + length > TOP:
            raise VfioError(errno.EOVERFLOW, "ioas_map", "the memory wraps", iova=iova, length=length)
        if length == 0 or length > TOP - PAGE:
            raise VfioError(errno.EINVAL, "ioas_map", "length", iova=iova, length=length)
        pages = self._store.add(vaddr, length, bool(flags & _WRITE), account)
        try:
            return self._place([(pages, vaddr, length)], iova, length, flags)
        finally:
            self._store.put(pages)

    def slices(self, iova: int, length: int) -> list[Slice]:
        """What is mapped in a range without a hole, for a copy; each piece has a user more, given back by the caller.

        Raises EINVAL (length 0), EOVERFLOW, ENOENT (a hole).
        """
        if not length:
            raise VfioError(errno.EINVAL, "ioas_copy", "length is 0", iova=iova)
        last = iova + length - 1
        if last > TOP:
            raise VfioError(errno.EOVERFLOW, "ioas_copy", "the range wraps", iova=iova, length=length)
        found: list[Slice] = []
        at = iova
        for mapping in self._index.range(iova, last):
            if mapping.iova > at:
                break
            size = min(mapping.last, last) - at + 1
            found.append((self._store.get(mapping.cookie), mapping.vaddr + at - mapping.iova, size))
            at += size
        if at <= last:
            raise VfioError(errno.ENOENT, "ioas_copy", "not mapped", iova=at, length=last - at + 1)
        for pages, _, _ in found:
            pages.users += 1
        return found

    def copy(self, slices: Sequence[Slice], iova: int, length: int, flags: int) -> int:
        """Maps what ``slices`` gave, of this or another address space, and gives it back; returns the IOVA.

        Raises as ``map``, and EPERM for write permission to what was mapped without.
        """
        try:
            return self._place(slices, iova, length, flags)
        finally:
            for pages, _, _ in slices:
                self._store.put(pages)

    def unmap(self, iova: int, length: int) -> int:
        """Unmaps the mappings inside a range and returns their bytes; (0, 2^64 - 1) means everything.

        Raises EOVERFLOW, EINVAL (length 0), ENOENT where nothing is mapped, or where a mapping would be split: the
        mappings before that one are gone then, as on Linux.
        """
        everything = iova == 0 and length == TOP
        if not everything:
            if iova >= TOP or length >= TOP or iova + length - 1 > TOP:
                raise VfioError(errno.EOVERFLOW, "ioas_unmap", "the range wraps", iova=iova, length=length)
            if not length:
                raise VfioError(errno.EINVAL, "ioas_unmap", "length is 0", iova=iova)
        last = TOP if everything else iova + length - 1
        whole: list[Mapping] = []
        split: Mapping | None = None
        for mapping in self._index.range(iova, last):
            if mapping.iova < iova or mapping.last > last:
                split = mapping
                break
            whole.append(mapping)
        self._drop(whole)
        if split is not None:
            reason = f"would split the mapping {split.iova:#x}-{split.last:#x}"
            raise VfioError(errno.ENOENT, "ioas_unmap", reason, iova=iova, length=length)
        if not whole and not everything:
            raise VfioError(errno.ENOENT, "ioas_unmap", "nothing is mapped", iova=iova, length=length)
        return sum(mapping.size for mapping in whole)

    def set_large_pages(self, on: bool) -> None:
        """IOMMU_OPTION_HUGE_PAGES: off, page tables are filled with the smallest pages.

        Raises EINVAL where a page table holds mappings already, EADDRINUSE where one is not page-aligned.
        """
        if not on and self.large_pages:
            if self.carriers and len(self._index):
                raise VfioError(errno.EINVAL, "option", "page tables hold mappings")
            self._check_alignment(PAGE)
        self.large_pages = on

    def add_carrier(self, carrier: Carrier) -> None:
        """Fills a page table with every mapping; from now on it follows.

        Raises EADDRINUSE (a mapping or an allowed range outside its aperture, or not aligned to its pages), EFAULT,
        ENOMEM.
        """
        domain = carrier.domain
        alignment = max(domain.pgsize_bitmap & -domain.pgsize_bitmap, self.alignment)
        if alignment != self.alignment:
            self._check_alignment(alignment)
        start, last = domain.aperture
        outside: list[IovaRange] = [(0, start - 1)] if start else []
        if last < TOP:
            outside.append((last + 1, TOP))
        self.iovas.reserve(carrier, outside)
        done: list[Mapping] = []
        try:
            for mapping in self._index:
                self._fill(mapping, [domain], not self.carriers)
                done.append(mapping)
        except BaseException:
            if not self.carriers:
                for mapping in done:
                    self._store.unpin(self._store.get(mapping.cookie))
            self.iovas.release(carrier)
            raise
        self.carriers.append(carrier)

    def remove_carrier(self, carrier: Carrier) -> None:
        """Forgets a page table that no device uses; its owner frees it before anything else may use the memory."""
        self.carriers.remove(carrier)
        self.iovas.release(carrier)
        if not self.carriers:
            for mapping in self._index:
                self._store.unpin(self._store.get(mapping.cookie))

    def close(self) -> None:
        """Forgets every mapping. No page table is left."""
        self._drop(list(self._index))

    def _place(self, slices: Sequence[Slice], iova: int, length: int, flags: int) -> int:
        """Checks a mapping of pieces one behind the other and makes it, all or nothing."""
        alignment = self.alignment
        if length % alignment or not length:
            raise VfioError(errno.EINVAL, "ioas_map", "length", iova=iova, length=length)
        if flags & FIXED:
            self._check_free(iova, length, alignment)
        else:
            iova = self.iovas.find(slices[0][1], length, alignment)
        at = iova
        made: list[int] = []
        try:
            for pages, vaddr, size in slices:
                if flags & _WRITE and not pages.writable:
                    raise VfioError(errno.EPERM, "ioas_map", "mapped for reading", iova=at, length=size)
                if vaddr % PAGE % alignment:
                    raise VfioError(errno.EINVAL, "ioas_map", "memory is not aligned", iova=at, length=size)
                self._add(Mapping(at, size, vaddr, flags & PROT, pages.number), pages)
                made.append(at)
                at += size
        except BaseException:
            self._drop([found for start in made for found in self._index.range(start, start)])
            raise
        for carrier in self.carriers:
            carrier.mapped()
        return iova

    def _check_free(self, iova: int, length: int, alignment: int) -> None:
        if iova % alignment:
            raise VfioError(errno.EINVAL, "ioas_map", "iova is not aligned", iova=iova, length=length)
        last = iova + length - 1
        if last > TOP:
            raise VfioError(errno.EOVERFLOW, "ioas_map", "iova wraps", iova=iova, length=length)
        if self.iovas.reserved(iova, last):
            raise VfioError(errno.EINVAL, "ioas_map", "reserved", iova=iova, length=length)
        overlapped = self._index.first(iova, last)
        if overlapped is not None:
            reason = f"overlaps the mapping at {overlapped.iova:#x}"
            raise VfioError(errno.EEXIST, "ioas_map", reason, iova=iova, length=length)

    def _add(self, mapping: Mapping, pages: Pages) -> None:
        """One mapping more, in the index and in every page table; or nothing."""
        try:
            self._index.insert(*mapping)
        except OSError as error:
            raise VfioError(error.errno or errno.ENOMEM, "ioas_map", str(error), iova=mapping.iova) from error
        try:
            self._fill(mapping, [carrier.domain for carrier in self.carriers], bool(self.carriers))
        except BaseException:
            self._index.remove(mapping.iova)
            raise
        pages.users += 1

    def _fill(self, mapping: Mapping, domains: Sequence[PagingDomain], pin: bool) -> None:
        """Pins a mapping's memory where asked, and writes it into page tables; or nothing."""
        pages = self._store.get(mapping.cookie)
        if pin:
            self._store.pin(pages)
        filled: list[PagingDomain] = []
        try:
            with as_vfio_errors("ioas_map"):
                for domain in domains:
                    runs = self._store.runs(mapping.vaddr, mapping.size)
                    if not self.large_pages:
                        runs = [(gpa + at, PAGE) for gpa, size in runs for at in range(0, size, PAGE)]
                    domain.map_runs(mapping.iova, runs, _PERM[mapping.flags])
                    filled.append(domain)
        except BaseException:
            for domain in filled:
                domain.unmap(mapping.iova, mapping.size)
            if pin:
                self._store.unpin(pages)
            raise

    def _drop(self, mappings: Sequence[Mapping]) -> None:
        """Takes mappings out: page tables with one flush each, nested tables, index, and last the pins.

        Where a page table raises, the mappings stay known and pinned; a later unmap begins with a flush of everything.
        """
        if not mappings:
            return
        if self.carriers:
            ranges = [(mapping.iova, mapping.size) for mapping in mappings]
            with as_vfio_errors("ioas_unmap"):
                if self._unflushed:
                    for carrier in self.carriers:
                        carrier.domain.flush_all()
                self._unflushed = True
                for carrier in self.carriers:
                    carrier.domain.unmap_ranges(ranges)
                    carrier.unmapped()
            self._unflushed = False
        for mapping in mappings:
            self._index.remove(mapping.iova)
            pages = self._store.get(mapping.cookie)
            if self.carriers:
                self._store.unpin(pages)
            self._store.put(pages)

    def _check_alignment(self, alignment: int) -> None:
        for mapping in self._index:
            if (mapping.iova | mapping.size | mapping.vaddr % PAGE) % alignment:
                reason = f"the mapping is not aligned to {alignment:#x} bytes"
                raise VfioError(errno.EADDRINUSE, "attach", reason, iova=mapping.iova, length=mapping.size)
