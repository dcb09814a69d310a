"""A paging domain: an x86-64 stage-1 table in guest RAM, and the flushes that keep the IOTLB in step with it.

Mapping makes no hypercall: an entry that was not present is not cached. Unmapping clears entries, gathers the
range, flushes it with one list entry, and only then hands emptied table pages back (the flush drops page-walk
caches too).

Not modelled: dirty tracking (stage-1 leaves are written dirty), PASIDs. When to flush is the caller's affair
(the DMA API's lazy domains defer it), and mapping does not refuse the interrupt window; keeping reserved regions
out is the caller's duty.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvfio.errors import IommuError
from pvfio.pagetable import Format, PageTable, Perm

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pvfio.guest.pviommu import PvIommu, ReservedRegion
    from pvfio.pagetable import WalkEntry

__all__ = ["Domain", "IotlbGather", "PagingDomain", "flush_entry"]

_log = logging.getLogger("pvfio.guest.pviommu")

_PAGE_SHIFT = 12
_ADDRESS_BITS = 64


def flush_entry(start: int, last: int) -> int:
    """The one list entry whose power-of-two span covers bytes ``start`` to ``last`` inclusive.

    ``page_number << 12 | page_mask_shift``. A span that reaches bit 63 covers everything, with a warning.
    """
    size_lg2 = max((start ^ last).bit_length(), _PAGE_SHIFT)
    if size_lg2 >= _ADDRESS_BITS:
        _log.warning("flush of %#x-%#x covers the whole address space", start, last)
        return _ADDRESS_BITS - _PAGE_SHIFT
    return start >> size_lg2 << size_lg2 | size_lg2 - _PAGE_SHIFT


class Domain:
    """A device domain: what a device's DMA goes through.

    ``kind`` is identity, blocking or paging; ``devices`` are the names of those attached; ``live`` until
    freed.
    """

    kind: str

    def __init__(self, iommu: PvIommu, domain_id: int, kind: str) -> None:
        self.iommu = iommu
        self.id = domain_id
        self.kind = kind
        self.live = True
        self.devices: set[str] = set()

    def __repr__(self) -> str:
        return f"<{self.kind} domain {self.id}>"


@dataclass
class IotlbGather:
    """The inclusive range of IOVAs that were unmapped and not flushed yet; empty at first."""

    start: int = (1 << _ADDRESS_BITS) - 1
    last: int = 0

    def add(self, iova: int, size: int) -> None:
        """Takes ``size`` (> 0) bytes from ``iova`` on in."""
        if iova < self.start:
            self.start = iova
        if iova + size - 1 > self.last:
            self.last = iova + size - 1

    @property
    def empty(self) -> bool:
        """True where nothing waits for a flush."""
        return self.last < self.start


class PagingDomain(Domain):
    """IOVA to GPA, made by ``PvIommu.paging_domain``.

    ``aperture`` is (first, last) IOVA, ``pgsize_bitmap`` the page sizes in bytes, or-ed. Every method is
    synchronous. Raises ``PageTableError`` with the errno of the page-table layer for a request it refuses.
    """

    def __init__(self, iommu: PvIommu, domain_id: int, levels: int, width: int) -> None:
        super().__init__(iommu, domain_id, "paging")
        self.aperture = (0, (1 << width) - 1)
        self.table = PageTable(
            Format.X86_64,
            iommu.memory,
            owner="guest",
            levels=levels,
            pgsize_bitmap=iommu.pgsize_bitmap,
            input_bits=width,
        )
        self.pgsize_bitmap = self.table.pgsize_bitmap
        self._flush_pages = iommu.transport.flush_pages
        # What no flush has covered yet, after one that was refused altogether.
        self._owed: tuple[int, int] | None = None

    @property
    def reserved_regions(self) -> tuple[ReservedRegion, ...]:
        """IOVA ranges a caller must keep out of."""
        return self.iommu.reserved_regions

    def map(self, iova: int, gpa: int, size: int, perm: int = Perm.READ | Perm.WRITE) -> None:
        """Maps ``size`` bytes of contiguous guest memory, all or nothing; no hypercall is made."""
        self.table.map_range(iova, gpa, size, perm)

    def map_runs(self, iova: int, runs: Iterable[tuple[int, int]], perm: int = Perm.READ | Perm.WRITE) -> int:
        """Maps runs of guest memory ``(gpa, size)`` one after the other from ``iova`` on; returns the bytes.

        All or nothing: where a run is refused, those before it are unmapped and flushed again.
        """
        at = iova
        try:
            for gpa, size in runs:
                self.table.map_range(at, gpa, size, perm)
                at += size
        except BaseException:
            if at > iova:
                self.unmap(iova, at - iova)
            raise
        return at - iova

    def unmap(self, iova: int, size: int) -> int:
        """Unmaps and flushes; returns the bytes unmapped, which may be fewer or more than ``size``.

        When it returns, no DMA of any device in this domain can land there. Fewer: there was nothing, or
        less, in the range. More: it ended inside a large page, which is gone whole.
        """
        done = self.table.unmap_range(iova, size)
        if done:
            # A large page that outlasts the range: either it began the range, and `done` counts it, or it lies
            # whole inside the power-of-two span of the range.
            self._flush(iova, iova + (done if done > size else size) - 1)
        return done

    def unmap_ranges(self, ranges: Sequence[tuple[int, int]]) -> int:
        """Unmaps several ``(iova, size)`` with one flush over all of them; returns the bytes unmapped."""
        gather = IotlbGather()
        try:
            return sum(self.unmap_fast(iova, size, gather) for iova, size in ranges)
        finally:
            self.iotlb_sync(gather)

    def unmap_fast(self, iova: int, size: int, gather: IotlbGather) -> int:
        """Unmaps without a flush; the memory is not free before ``iotlb_sync(gather)`` has returned."""
        done = self.table.unmap_range(iova, size)
        if done:
            gather.add(iova, done if done > size else size)
        return done

    def iotlb_sync(self, gather: IotlbGather) -> None:
        """Flushes what was gathered and empties it; nothing where it is empty."""
        if not gather.empty:
            start, last = gather.start, gather.last
            gather.start, gather.last = (1 << _ADDRESS_BITS) - 1, 0
            self._flush(start, last)

    def flush_range(self, start: int, last: int) -> bool:
        """Flushes bytes ``start`` to ``last`` (inclusive), whose entries somebody else has cleared in the table.

        True when no flush is owed any more; False where the host has refused, and a later flush will cover these.
        """
        self._flush(start, last)
        return self._owed is None

    def flush_all(self) -> None:
        """Drops every cached translation. Raises ``HypercallError`` where the host refuses."""
        self.iommu.transport.flush_device_domain(self.id)
        self._owed = None
        self.table.release_detached()

    def iova_to_phys(self, iova: int) -> int | None:
        """The GPA behind an IOVA; ``None`` where nothing is mapped."""
        return self.table.iova_to_phys(iova)

    def walk(self, iova: int) -> list[WalkEntry]:
        """Every level's entry on the way of an IOVA."""
        return self.table.walk(iova)

    def free(self) -> None:
        """Frees the table and deletes the device domain, without a flush: the host forgets its translations.

        Raises ``IommuError`` EBUSY while a device is attached. A domain the host does not delete is reported
        in the log and its id is not used again.
        """
        if not self.live:
            return
        if self.devices:
            raise IommuError(errno.EBUSY, "free domain", f"{', '.join(sorted(self.devices))} attached")
        self.live = False
        self.table.destroy()
        self.iommu.delete_domain(self.id)

    def _flush(self, start: int, last: int) -> None:
        if self._owed is not None:
            start, last = min(start, self._owed[0]), max(last, self._owed[1])
        refused, again = self._flush_pages(self.id, flush_entry(start, last))
        if refused is not None:
            _log.warning("domain %d: flush of %#x-%#x failed: %s", self.id, start, last, refused)
        if again is not None:
            _log.warning("domain %d: flush of the whole domain failed: %s", self.id, again)
            # The walk caches may still know the emptied table pages: they wait for a flush that covers this one.
            self._owed = (start, last)
            return
        self._owed = None
        self.table.release_detached()
