"""VFIO's type1 IOMMU driver: a container's mappings, and the paging domains that carry them out.

Every check, its order and its errno are those of Linux 7.3 (drivers/vfio/vfio_iommu_type1.c): for a mapping
overflow, permissions, alignment, overlap, entry limit, aperture and reserved ranges; then pinning, then the page
tables of every domain, with everything undone where a step fails. An unmap clears page tables, flushes once per
domain, and only then unpins. Version 2 refuses to split a mapping; version 1 takes it whole, or not at all.

Not modelled: mediated devices (page pinning by other drivers), nesting domains, VFIO_UPDATE_VADDR (its flags are
unknown here), locking: all calls come from one thread.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pvfio.abi import ffi, lib
from pvfio.errors import HypercallError, PageTableError, VfioError
from pvfio.guest.mapping_index import Mapping, MappingIndex
from pvfio.guest.type1_dirty import write_bitmap
from pvfio.guest.type1_domains import Type1Domains
from pvfio.guest.type1_ioctl import type1_ioctl
from pvfio.guest.type1_iova import IovaRange

if TYPE_CHECKING:
    from pvfio.guest.iommu_group import IommuGroup
    from pvfio.guest.paging_domain import PagingDomain
    from pvfio.guest.pviommu import PvIommu
    from pvfio.memory import GuestMemory

__all__ = ["LockedMemory", "Type1", "Type1Limits"]

_log = logging.getLogger("pvfio.guest.type1")

_READ: int = lib.VFIO_DMA_MAP_FLAG_READ
_WRITE: int = lib.VFIO_DMA_MAP_FLAG_WRITE
_UNMAP_ALL: int = lib.VFIO_DMA_UNMAP_FLAG_ALL
_UNMAP_DIRTY: int = lib.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
_TOP = (1 << 64) - 1
_SPACE = 1 << 64
_RUNS = 64

_pin = lib.pv_memory_pin
_unpin = lib.pv_memory_unpin
_runs = lib.pv_memory_runs
_insert = lib.pv_mappings_insert
_remove = lib.pv_mappings_remove
_NULL = ffi.NULL
_range = lib.pv_mappings_range


@dataclass(frozen=True)
class Type1Limits:
    """``dma_entry_limit``: mappings per container. ``memlock``: RLIMIT_MEMLOCK in bytes, None for no limit."""

    dma_entry_limit: int = 65535
    memlock: int | None = None

    def __post_init__(self) -> None:
        if self.dma_entry_limit < 0 or (self.memlock is not None and self.memlock < 0):
            raise ValueError("limits are not negative")


@dataclass
class LockedMemory:
    """A process's account of pinned memory, in bytes; its containers may share one."""

    limit: int | None = None
    locked: int = 0


class Type1:
    """One container's IOMMU.

    ``v2`` chooses between VFIO_TYPE1v2_IOMMU and VFIO_TYPE1_IOMMU. ``account`` is where pinned memory is counted; by
    default one of this container's own, with the limit of ``limits``. Every method is synchronous, and every
    one raises ``VfioError`` with the errno Linux gives; what raised has changed nothing, unless it says otherwise.
    """

    def __init__(
        self,
        memory: GuestMemory,
        iommu: PvIommu,
        limits: Type1Limits | None = None,
        v2: bool = True,
        *,
        account: LockedMemory | None = None,
    ) -> None:
        limits = limits or Type1Limits()
        self.v2 = v2
        self.account = account or LockedMemory(limits.memlock)
        self.dma_avail = limits.dma_entry_limit
        self.dirty_tracking = False
        self._memory = memory
        self._memory_ptr = memory.ptr
        self._index = MappingIndex()
        self._index_ptr = self._index.ptr
        self._carriers = Type1Domains(iommu)
        # What the checks of a mapping look at, copied from there after every change.
        self.pgsize_bitmap: int
        self.iova_ranges: tuple[IovaRange, ...]
        self._page_mask: int
        self._domains: tuple[PagingDomain, ...]
        self._refresh()
        self._unflushed = False
        self._run_buffer: Any = ffi.new("struct pv_run[]", _RUNS)
        self._first_run = self._run_buffer[0]
        self._found: Any = ffi.new("struct pv_mapping[2]")
        self._first_found = self._found[0]

    def ioctl(self, request: int, arg: Any) -> int:
        """A request of <linux/vfio.h> on the container, for the IOMMU.

        ``arg`` is a cffi pointer to the request's structure, which is updated, or for VFIO_CHECK_EXTENSION a number.
        Raises ``VfioError``: ENOTTY for an unknown request, EFAULT for an ``arg`` that is no pointer.
        """
        return type1_ioctl(self, request, arg)

    def map(self, iova: int, vaddr: int, size: int, flags: int) -> None:
        """Maps ``size`` bytes of process memory at ``vaddr`` (all page-aligned) at ``iova``.

        ``flags``: VFIO_DMA_MAP_FLAG_READ, _WRITE, from the device's view. Raises ``VfioError``: EINVAL, EOVERFLOW,
        EEXIST, ENOSPC, then EFAULT (memory that cannot be pinned), ENOMEM (memlock, page tables).
        """
        bits = iova | vaddr | size
        if (
            bits & self._page_mask
            or bits < 0
            or not size
            or iova + size > _SPACE
            or vaddr + size > _SPACE
            or not 0 < flags < 4
            or not self.dma_avail
        ):
            raise self._refusal(iova, vaddr, size, flags)
        last = iova + size - 1
        for start, end in self.iova_ranges:
            if start <= iova and last <= end:
                break
        else:
            raise self._refusal(iova, vaddr, size, flags)
        extent = _pin(self._memory_ptr, vaddr, size)
        if extent < 0:
            raise self._late_refusal(errno.EFAULT, "vaddr is not pinnable memory", iova, size)
        account = self.account
        if account.limit is not None and account.locked + size > account.limit:
            _unpin(self._memory_ptr, extent)
            raise self._late_refusal(errno.ENOMEM, "RLIMIT_MEMLOCK exceeded", iova, size)
        error = _insert(self._index_ptr, iova, size, vaddr, flags, extent)
        if error:
            _unpin(self._memory_ptr, extent)
            raise self._late_refusal(-error, "", iova, size)
        self.dma_avail -= 1
        account.locked += size
        try:
            if _runs(self._memory_ptr, vaddr, size, self._run_buffer, 1) == 1:
                gpa = self._first_run.gpa
                for domain in self._domains:
                    domain.map(iova, gpa, size, flags)
            else:
                runs = self._runs_of(vaddr, size)
                for domain in self._domains:
                    domain.map_runs(iova, runs, flags)
        except BaseException as failure:
            self._drop([(iova, size, extent)])
            if isinstance(failure, PageTableError):
                raise VfioError(
                    failure.errno or errno.EIO, "map_dma", failure.reason, iova=iova, length=size
                ) from failure
            raise

    def unmap(self, iova: int, size: int, flags: int = 0, bitmap: tuple[int, int] | None = None) -> int:
        """Unmaps the mappings in [iova, iova + size) and returns their bytes, 0 where there is none.

        When it returns, no device can reach the memory, and it is unpinned. ``flags``: VFIO_DMA_UNMAP_FLAG_ALL (with
        ``iova`` and ``size`` 0), or _GET_DIRTY_BITMAP with ``bitmap``: (process address, page size). Version 2 raises
        EINVAL where a mapping would be split; version 1 returns 0 where the range begins inside a mapping, and
        takes one that it ends in whole. Raises ``VfioError``: EINVAL, EOVERFLOW, EFAULT (bitmap).
        """
        if not flags and self.v2 and not self._unflushed:
            # The usual case, one mapping exactly; everything else takes the long way.
            found = self._first_found
            if (
                not (iova | size) & self._page_mask
                and 0 <= iova
                and 0 < size <= _SPACE - iova
                and _range(self._index_ptr, iova, iova + size - 1, self._found, 2) == 1
                and found.iova == iova
                and found.size == size
            ):
                extent = found.cookie
                self._unflushed = True
                for domain in self._domains:
                    domain.unmap(iova, size)
                self._unflushed = False
                _remove(self._index_ptr, iova, _NULL)
                _unpin(self._memory_ptr, extent)
                self.account.locked -= size
                self.dma_avail += 1
                return size
        last = self._check_unmap(iova, size, flags, bitmap)
        mappings = list(self._index.range(iova, last))
        if not mappings:
            return 0
        if not flags & _UNMAP_ALL and not self._whole(mappings, iova, last):
            return 0
        if bitmap is not None:
            try:
                ranges = [(mapping.iova, mapping.size) for mapping in mappings]
                write_bitmap(bitmap[0], iova, bitmap[1].bit_length() - 1, ranges)
            except OSError as error:
                raise VfioError(error.errno or errno.EFAULT, "unmap_dma", "bitmap", iova=iova) from error
        self._drop([(mapping.iova, mapping.size, mapping.cookie) for mapping in mappings])
        return sum(mapping.size for mapping in mappings)

    def find(self, iova: int) -> Mapping | None:
        """The mapping that contains a byte; ``flags`` are its permissions."""
        return self._index.find(iova)

    def mappings(self) -> Iterator[Mapping]:
        """Every mapping, by IOVA."""
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def domains(self) -> tuple[PagingDomain, ...]:
        """The paging domains in use."""
        return self._domains

    @property
    def groups(self) -> tuple[IommuGroup, ...]:
        """The attached groups."""
        return self._carriers.groups

    def get_dirty_bitmap(self, iova: int, size: int, address: int, pgsize: int) -> None:
        """Reports the mapped pages of a range in the bitmap at a process address.

        Raises ``VfioError``: EINVAL (page size not the smallest, range not aligned to it or empty, tracking not
        started, a mapping split by the range), EFAULT.
        """
        operation = "dirty_pages"
        if (
            pgsize != self._page_mask + 1
            or size <= 0
            or not 0 <= iova <= _SPACE - size
            or (iova | size) & self._page_mask
            or not self.dirty_tracking
        ):
            reason = "page size, range or alignment, or no tracking"
            raise VfioError(errno.EINVAL, operation, reason, iova=iova, length=size)
        last = iova + size - 1
        mappings = list(self._index.range(iova, last))
        if mappings and (mappings[0].iova < iova or mappings[-1].last > last):
            raise VfioError(errno.EINVAL, operation, "the range splits a mapping", iova=iova, length=size)
        try:
            ranges = [(mapping.iova, mapping.size) for mapping in mappings]
            write_bitmap(address, iova, pgsize.bit_length() - 1, ranges)
        except OSError as error:
            raise VfioError(
                error.errno or errno.EFAULT, operation, "bitmap", iova=iova, length=size
            ) from error

    def attach_group(self, group: IommuGroup) -> None:
        """Gives the container's mappings to a group's devices, and claims the group where nobody has.

        The group joins a compatible domain, or gets one into which every mapping is replayed. Raises ``VfioError``:
        EINVAL (attached already; its aperture or reserved regions conflict with the mappings or leave no IOVA),
        EPERM (not viable), ENOMEM, or what the host's refusal means.
        """
        try:
            self._carriers.attach(group, self._index, self._runs_of)
        finally:
            self._refresh()

    def detach_group(self, group: IommuGroup) -> None:
        """Moves a group's devices to blocking; with the last group every mapping goes.

        A claim made by ``attach_group`` is released. Raises ``VfioError``: EINVAL for a group that is not attached, or
        what the host's refusal to block a device means: the group stays attached then.
        """
        try:
            self._carriers.detach(group, self._drop_all)
        finally:
            self._refresh()

    def close(self) -> None:
        """Detaches every group and unmaps everything.

        A group whose devices the host does not block is reported in the log and stays attached, to an empty table.
        """
        for group in self.groups:
            try:
                self.detach_group(group)
            except VfioError as error:
                _log.warning("group %d: not detached: %s", group.id, error)
        self._drop_all()

    def _refusal(self, iova: int, vaddr: int, size: int, flags: int) -> VfioError:
        """The first of the checks before pinning that a request to map fails."""

        def refused(number: int, reason: str) -> VfioError:
            return VfioError(number, "map_dma", reason, iova=iova, length=size)

        if flags & ~(_READ | _WRITE):
            return refused(errno.EINVAL, f"unknown flags {flags:#x}")
        if size <= 0 or iova < 0 or vaddr < 0:
            return refused(errno.EINVAL, "size is 0, or an address negative")
        if iova + size > _SPACE or vaddr + size > _SPACE:
            return refused(errno.EOVERFLOW, "iova or vaddr wraps")
        if not flags:
            return refused(errno.EINVAL, "neither read nor write")
        if (iova | vaddr | size) & self._page_mask:
            return refused(errno.EINVAL, "iova, vaddr or size is not page-aligned")
        overlapped = self._index.first(iova, iova + size - 1)
        if overlapped is not None:
            return refused(errno.EEXIST, f"overlaps the mapping at {overlapped.iova:#x}")
        if not self.dma_avail:
            return refused(errno.ENOSPC, "no DMA entry is left")
        return refused(errno.EINVAL, "outside the aperture or in a reserved range")

    def _late_refusal(self, number: int, reason: str, iova: int, size: int) -> VfioError:
        """A failure from pinning on; an overlap, which the index finds only later, comes first all the same."""
        overlapped = self._index.first(iova, iova + size - 1)
        if overlapped is not None:
            number, reason = errno.EEXIST, f"overlaps the mapping at {overlapped.iova:#x}"
        return VfioError(number, "map_dma", reason, iova=iova, length=size)

    def _check_unmap(self, iova: int, size: int, flags: int, bitmap: tuple[int, int] | None) -> int:
        """Checks a request to unmap and returns the last IOVA of its range."""

        def refused(number: int, reason: str) -> VfioError:
            return VfioError(number, "unmap_dma", reason, iova=iova, length=size)

        if flags & ~(_UNMAP_ALL | _UNMAP_DIRTY) or flags == _UNMAP_ALL | _UNMAP_DIRTY:
            raise refused(errno.EINVAL, f"flags {flags:#x}")
        if bool(flags & _UNMAP_DIRTY) != (bitmap is not None):
            raise refused(errno.EINVAL, "the flag and the bitmap go together")
        if iova < 0 or iova & self._page_mask:
            raise refused(errno.EINVAL, "iova is not page-aligned")
        if flags & _UNMAP_ALL:
            if iova or size:
                raise refused(errno.EINVAL, "unmap-all with an iova or a size")
            return _TOP
        if size <= 0 or size & self._page_mask:
            raise refused(errno.EINVAL, "size is 0 or not page-aligned")
        if iova + size > _SPACE:
            raise refused(errno.EOVERFLOW, "iova wraps")
        if bitmap is not None and (not self.dirty_tracking or bitmap[1] != self._page_mask + 1):
            raise refused(errno.EINVAL, "no dirty tracking, or not the smallest page size")
        return iova + size - 1

    def _whole(self, mappings: list[Mapping], iova: int, last: int) -> bool:
        """Whether the range may take these mappings: version 2 raises where one is split, version 1 says no."""
        if not self.v2:
            return mappings[0].iova >= iova
        for mapping in (mappings[0], mappings[-1]):
            if mapping.iova < iova or mapping.last > last:
                raise VfioError(
                    errno.EINVAL,
                    "unmap_dma",
                    f"would split the mapping {mapping.iova:#x}-{mapping.last:#x}",
                    iova=iova,
                    length=last - iova + 1,
                )
        return True

    def _drop(self, mappings: list[tuple[int, int, int]]) -> None:
        """Takes out mappings (iova, size, extent), in order: page tables, one flush per domain, then the rest.

        Where a domain raises, the mappings stay known and pinned; a later unmap begins with a flush of
        everything.
        """
        if self._unflushed:
            try:
                for domain in self._domains:
                    domain.flush_all()
            except HypercallError as error:
                raise VfioError(error.errno or errno.EIO, "unmap_dma", error.reason) from error
        ranges: list[tuple[int, int]] = []
        for iova, size, _ in mappings:
            if ranges and ranges[-1][0] + ranges[-1][1] == iova:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + size)
            else:
                ranges.append((iova, size))
        self._unflushed = True
        for domain in self._domains:
            domain.unmap_ranges(ranges)
        self._unflushed = False
        for iova, size, extent in mappings:
            _remove(self._index_ptr, iova, _NULL)
            _unpin(self._memory_ptr, extent)
            self.account.locked -= size
        self.dma_avail += len(mappings)

    def _drop_all(self) -> None:
        mappings = [(mapping.iova, mapping.size, mapping.cookie) for mapping in self._index]
        if mappings:
            self._drop(mappings)

    def _runs_of(self, vaddr: int, size: int) -> list[tuple[int, int]]:
        """The guest memory behind pinned process memory, as (GPA, bytes)."""
        runs = self._run_buffer
        count = _runs(self._memory_ptr, vaddr, size, runs, _RUNS)
        if count > _RUNS:
            runs = ffi.new("struct pv_run[]", count)
            _runs(self._memory_ptr, vaddr, size, runs, count)
        return [(runs[i].gpa, runs[i].size) for i in range(count)]

    def _refresh(self) -> None:
        self._domains = self._carriers.domains
        self.iova_ranges = self._carriers.iova_ranges
        self.pgsize_bitmap = self._carriers.pgsize_bitmap
        self._page_mask = (self.pgsize_bitmap & -self.pgsize_bitmap) - 1
