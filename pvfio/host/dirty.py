"""The host's dirty log: which pages of guest memory the guest's devices have written, exactly.

What live migration of a VM with an assigned device needs. The IOMMU marks the stage-2 leaf of every write dirty;
this log reads the marks and clears them. While it runs, stage 2 has 4 KiB leaves only, as VMMs split their large pages
for logging: with 2 MiB leaves one written byte would say 512 pages. IOTLB misses cost a level more meanwhile; while it
is off, nothing has changed.

Not modelled: the vCPUs' half (EPT or NPT dirty bits, page-modification logging), since the guest's software is the
program itself, and what the hypervisor writes in its answers to hypercalls; splitting lazily; a limit on how many
pages may be dirty. A device's write counts when it was allowed: a page whose write was given up for another
address's fault in the same step (a dualcast's second copy) may be reported.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from pvfio.errors import PageTableError
from pvfio.memory import PAGE_SIZE, GuestMemory
from pvfio.pagetable import PageTable
from pvfio.silicon import Iommu

__all__ = ["DirtyLog"]


class DirtyLog:
    """Pages that DMA wrote since the log was started or last cleared, by GPA; the same for every domain.

    Every byte that a device writes is in a page reported by the ``read_and_clear`` or ``harvest`` that runs
    meanwhile, or by a later one. So whoever copies the reported pages *after* the call has missed nothing that a
    later report does not name. Calls may come from any thread, one at a time is served; each returns only when no
    engine uses a translation from before, at most one bounded copy (64 KiB) of each engine later. None checkpoints.
    """

    def __init__(self, memory: GuestMemory, stage2: PageTable, iommu: Iommu) -> None:
        self._memory = memory
        self._stage2 = stage2
        self._iommu = iommu
        self._lock = threading.Lock()
        self._active = False

    @property
    def active(self) -> bool:
        """Whether the log runs."""
        return self._active

    def start(self) -> None:
        """Begins, with every page clean. ``RuntimeError`` when it runs already; ``MemoryError``, and nothing is
        changed, when host-private memory has no room for the tables: 4 KiB for every 2 MiB of guest RAM.
        """
        with self._lock:
            if self._active:
                raise RuntimeError("the dirty log runs already")
            try:
                for gpa, size in self._memory.ram_ranges():
                    self._stage2.split_range(gpa, size)
            except PageTableError as error:
                self._merge()
                raise MemoryError("no host memory for 4 KiB leaves in stage 2") from error
            for gpa, size in self._memory.ram_ranges():
                self._stage2.read_clear_dirty(gpa, size)
            self._iommu.invalidate_stage2()
            self._active = True

    def stop(self) -> None:
        """Ends, and gives stage 2 its large leaves back. What is dirty is forgotten. Idempotent."""
        with self._lock:
            if self._active:
                self._merge()
                self._active = False

    def _merge(self) -> None:
        for gpa, size in self._memory.ram_ranges():
            self._stage2.merge_range(gpa, size)
        self._iommu.invalidate_stage2()
        self._stage2.release_detached()

    def read_and_clear(self, gpa: int, size: int) -> NDArray[np.bool_]:
        """Which pages of [gpa, gpa + size) are dirty, shape ``(size / 4096,)``; they are clean now.

        Addresses that are no RAM are never dirty. ``ValueError`` for a range that is empty or not of whole pages,
        ``RuntimeError`` when the log does not run.
        """
        return self._read(gpa, size, clear=True)

    def peek(self, gpa: int, size: int) -> NDArray[np.bool_]:
        """As ``read_and_clear``, but they stay dirty."""
        return self._read(gpa, size, clear=False)

    def harvest(self) -> NDArray[np.uint64]:
        """The GPAs of all dirty pages of RAM, ascending; they are clean now. ``RuntimeError`` when it does not run."""
        with self._lock:
            self._check_active()
            parts = [self._dirty_of(gpa, size) for gpa, size in self._memory.ram_ranges()]
            pages = np.concatenate(parts)
            self._flush(pages.size > 0)
            return pages

    def _dirty_of(self, gpa: int, size: int) -> NDArray[np.uint64]:
        found = np.flatnonzero(self._stage2.read_clear_dirty(gpa, size)).astype(np.uint64)
        return found * np.uint64(PAGE_SIZE) + np.uint64(gpa)

    def _read(self, gpa: int, size: int, *, clear: bool) -> NDArray[np.bool_]:
        if gpa < 0 or size <= 0 or gpa % PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError(f"gpa {gpa:#x} length {size:#x} is no range of whole pages")
        with self._lock:
            self._check_active()
            dirty = np.zeros(size // PAGE_SIZE, np.bool_)
            for start, length in self._memory.ram_ranges():
                first, end = max(gpa, start), min(gpa + size, start + length)
                if first < end:
                    found = self._stage2.read_clear_dirty(first, end - first, clear=clear)
                    dirty[(first - gpa) // PAGE_SIZE : (end - gpa) // PAGE_SIZE] = found
            if clear:
                self._flush(bool(dirty.any()))
            return dirty

    def _flush(self, cleared: bool) -> None:
        # A cached translation lets writes pass only where its leaf was dirty: where nothing was, nothing is cached.
        if cleared:
            self._iommu.invalidate_stage2()

    def _check_active(self) -> None:
        if not self._active:
            raise RuntimeError("the dirty log does not run")
