"""Process memory that IO address spaces refer to: pinned while a hardware page table holds it, accounted once.

A mapping refers to a range of process memory; a copy of it refers to the same range and shares its pin and its
account. As in Linux (drivers/iommu/iommufd/pages.c) nothing is pinned before a page table needs it: until then the
range may be any addresses at all. Not modelled: access by other drivers (mediated devices), files, dma-bufs.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError

if TYPE_CHECKING:
    from pvfio.guest.type1 import LockedMemory
    from pvfio.memory import GuestMemory

__all__ = ["PageStore", "Pages"]

PAGE = 4096
_RUNS = 64


@dataclass(slots=True, eq=False)
class Pages:
    """Whole pages of process memory: ``users`` mappings refer to them, ``holders`` of those want them pinned."""

    number: int
    start: int
    size: int
    writable: bool
    account: LockedMemory
    users: int = 0
    holders: int = 0
    extent: int = field(default=-1, repr=False)


class PageStore:
    """The pages of one iommufd, by number, and the way to their guest memory."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory.ptr
        self._by_number: dict[int, Pages] = {}
        self._next = 1
        self._run_buffer: Any = ffi.new("struct pv_run[]", _RUNS)

    def __len__(self) -> int:
        return len(self._by_number)

    def add(self, vaddr: int, size: int, writable: bool, account: LockedMemory) -> Pages:
        """Refers to the pages of ``size`` bytes from ``vaddr`` on, with one user."""
        start = vaddr & -PAGE
        end = -(-(vaddr + size) // PAGE) * PAGE
        pages = Pages(self._next, start, end - start, writable, account, users=1)
        self._by_number[self._next] = pages
        self._next += 1
        return pages

    def get(self, number: int) -> Pages:
        """The pages of a number that ``add`` gave."""
        return self._by_number[number]

    def put(self, pages: Pages) -> None:
        """One user fewer; the last one's pages are forgotten."""
        pages.users -= 1
        if not pages.users:
            del self._by_number[pages.number]

    def pin(self, pages: Pages) -> None:
        """One holder more; the first one's pages are pinned. Raises ``VfioError`` EFAULT, ENOMEM (memlock)."""
        if not pages.holders:
            extent = lib.pv_memory_pin(self._memory, pages.start, pages.size)
            if extent < 0:
                reason = f"process address {pages.start:#x} is not pinnable memory"
                raise VfioError(errno.EFAULT, "pin", reason, length=pages.size)
            if not pages.account.charge(pages.size):
                lib.pv_memory_unpin(self._memory, extent)
                raise VfioError(errno.ENOMEM, "pin", "RLIMIT_MEMLOCK exceeded", length=pages.size)
            pages.extent = extent
        pages.holders += 1

    def unpin(self, pages: Pages) -> None:
        """One holder fewer; the last one's pages are unpinned: no device may reach them any more."""
        pages.holders -= 1
        if not pages.holders:
            lib.pv_memory_unpin(self._memory, pages.extent)
            pages.account.charge(-pages.size)

    def runs(self, vaddr: int, size: int) -> list[tuple[int, int]]:
        """The guest memory behind pinned process memory, as (GPA, bytes)."""
        runs = self._run_buffer
        count = lib.pv_memory_runs(self._memory, vaddr, size, runs, _RUNS)
        if count > _RUNS:
            runs = ffi.new("struct pv_run[]", count)
            lib.pv_memory_runs(self._memory, vaddr, size, runs, count)
        return [(runs[i].gpa, runs[i].size) for i in range(count)]
