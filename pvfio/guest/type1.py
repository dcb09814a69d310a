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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pvfio.abi import ffi, lib
from pvfio.errors import HypercallError, PageTableError, VfioBatchError, VfioError
from pvfio.guest.mapping_index import Mapping, MappingIndex
from pvfio.guest.type1_dirty import write_bitmap
from pvfio.guest.type1_domains import Type1Domains
from pvfio.guest.type1_errors import map_refusal, no_64_bits, unmap_refusal
from pvfio.guest.type1_ioctl import type1_ioctl
from pvfio.guest.type1_iova import IovaRange
from pvfio.guest.type1_limits import LockedMemory, Type1Limits

if TYPE_CHECKING:
    from pvfio.guest.iommu_group import IommuGroup
    from pvfio.guest.paging_domain import PagingDomain
    from pvfio.guest.pviommu import PvIommu
    from pvfio.memory import GuestMemory

__all__ = ["LockedMemory", "Type1", "Type1Limits", "Words"]

_log = logging.getLogger("pvfio.guest.type1")

_MAP_DMA: int = lib.VFIO_IOMMU_MAP_DMA
_UNMAP_DMA: int = lib.VFIO_IOMMU_UNMAP_DMA
_UNMAP_ALL: int = lib.VFIO_DMA_UNMAP_FLAG_ALL
_UNMAP_DIRTY: int = lib.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
_BAD_REQUEST: int = lib.PV_TYPE1_BAD_REQUEST
_TOP = (1 << 64) - 1
_SPACE = 1 << 64

_map_request = lib.pv_type1_map_request
_map = lib.pv_type1_map
_unmap_request = lib.pv_type1_unmap_request
_unmap = lib.pv_type1_unmap
_unmap_all = lib.pv_type1_unmap_all
_finish_request = lib.pv_type1_finish_request
_finish = lib.pv_type1_unmap_finish

Words = npt.NDArray[np.uint64]
"""Shape (n,), contiguous: addresses or bytes."""


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
        self.dirty_tracking = False
        self._memory = memory
        self._index = MappingIndex()
        self._carriers = Type1Domains(iommu)
        state = ffi.new("struct pv_type1 *")
        state.memory = memory.ptr
        state.mappings = self._index.ptr
        state.account = self.account.ptr
        state.dma_avail = min(limits.dma_entry_limit, _TOP)
        state.v2 = v2
        self._state: Any = ffi.gc(state, lib.pv_type1_drop_scratch)
        # What the checks of a mapping look at, copied from the domains after every change.
        self.pgsize_bitmap: int
        self.iova_ranges: tuple[IovaRange, ...]
        self._page_mask: int
        self._domains: tuple[PagingDomain, ...]
        self._refresh()
        self._unflushed = False
        self._shown: Any = ffi.new("int *")
        self._done: Any = ffi.new("uint64_t *")
        self._refused: Any = ffi.new("uint64_t *")

    def ioctl(self, request: int, arg: Any) -> int:
        """A request of <linux/vfio.h> on the container, for the IOMMU.

        ``arg`` is a cffi pointer to the request's structure, which is updated, or for VFIO_CHECK_EXTENSION a number.
        Raises ``VfioError``: ENOTTY for an unknown request, EFAULT for an ``arg`` that is no pointer.
        """
        # The two that some drivers make for every I/O go straight to C; whatever is unusual takes the long way.
        if request == _MAP_DMA:
            try:
                error = _map_request(self._state, arg, self._shown)
            except TypeError:
                return type1_ioctl(self, request, arg)
            if not error:
                return 0
            if self._state.reason != _BAD_REQUEST:
                raise self._map_failed(error, arg[0].iova, arg[0].size)
            return type1_ioctl(self, request, arg)
        if request == _UNMAP_DMA and not self._unflushed:
            try:
                done = _unmap_request(self._state, arg)
            except TypeError:
                done = -1
            if done >= 0:
                if done:
                    self._flush()
                _finish_request(self._state, arg, done)
                return 0
        return type1_ioctl(self, request, arg)

    def map(self, iova: int, vaddr: int, size: int, flags: int) -> None:
        """Maps ``size`` bytes of process memory at ``vaddr`` (all page-aligned) at ``iova``.

        ``flags``: VFIO_DMA_MAP_FLAG_READ, _WRITE, from the device's view. Raises ``VfioError``: EINVAL, EOVERFLOW,
        EEXIST, ENOSPC, then EFAULT (memory that cannot be pinned), ENOMEM (memlock, page tables).
        """
        try:
            error = _map(self._state, iova, vaddr, size, flags, self._shown)
        except OverflowError:
            raise no_64_bits("map_dma", iova, size, vaddr, flags) from None
        if error:
            raise self._map_failed(error, iova, size)

    def map_batch(self, iovas: Words, vaddrs: Words, sizes: Words, flags: int) -> None:
        """As ``map`` for each element of three contiguous arrays of one length, in order; all or none is mapped.

        Raises ``VfioBatchError`` with what ``map`` raises for the element ``index``; what was mapped before it is
        unmapped again with one flush. Until then devices have been able to use it.
        """
        n = len(iovas)
        arrays = [ffi.from_buffer("uint64_t[]", array) for array in (iovas, vaddrs, sizes)]
        error = lib.pv_type1_map_batch(
            self._state, n, *arrays, flags & 0xFFFF_FFFF, self._done, self._refused
        )
        if not error:
            return
        index, done = self._refused[0], self._done[0]
        refusal = map_refusal(self._state, -error, int(iovas[index]), int(sizes[index]))
        if done:
            self._unmap_arrays(iovas[:done], sizes[:done])
        raise VfioBatchError(refusal, index)

    def unmap_batch(self, iovas: Words, sizes: Words) -> Words:
        """As ``unmap`` without flags for each element of two contiguous arrays, in order, with one flush per domain.

        Returns the bytes of each. Raises ``VfioBatchError`` for the first element that is refused: those before it
        are unmapped, those after it are not.
        """
        unmapped, error = self._unmap_arrays(iovas, sizes)
        if error:
            index = len(unmapped)
            refusal = unmap_refusal(self._state, -error, int(iovas[index]), int(sizes[index]))
            raise VfioBatchError(refusal, index, unmapped)
        return unmapped

    def unmap(self, iova: int, size: int, flags: int = 0, bitmap: tuple[int, int] | None = None) -> int:
        """Unmaps the mappings in [iova, iova + size) and returns their bytes, 0 where there is none.

        When it returns, no device can reach the memory, and it is unpinned. ``flags``: VFIO_DMA_UNMAP_FLAG_ALL (with
        ``iova`` and ``size`` 0), or _GET_DIRTY_BITMAP with ``bitmap``: (process address, page size). Version 2 raises
        EINVAL where a mapping would be split; version 1 returns 0 where the range begins inside a mapping, and
        takes one that it ends in whole. Raises ``VfioError``: EINVAL, EOVERFLOW, EFAULT (bitmap).
        """
        if flags or bitmap is not None:
            last = self._check_unmap(iova, size, flags, bitmap)
            if bitmap is not None:
                self._report_dirty("unmap_dma", iova, size, bitmap)
        else:
            last = iova + size - 1
        if self._unflushed:
            self._flush_everything()
        try:
            done = _unmap_all(self._state) if flags & _UNMAP_ALL else _unmap(self._state, iova, size)
        except OverflowError:
            raise no_64_bits("unmap_dma", iova, size) from None
        if done < 0:
            raise unmap_refusal(self._state, -done, iova, size)
        if done:
            self._flush()
            _finish(self._state, iova, last)
        return int(done)

    def find(self, iova: int) -> Mapping | None:
        """The mapping that contains a byte; ``flags`` are its permissions."""
        return self._index.find(iova)

    def mappings(self) -> Iterator[Mapping]:
        """Every mapping, by IOVA."""
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def dma_avail(self) -> int:
        """How many more mappings there may be."""
        return int(self._state.dma_avail)

    @property
    def index_bytes(self) -> int:
        """What the index of the mappings takes."""
        return self._index.nbytes

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
        self._report_dirty(operation, iova, size, (address, pgsize))

    def attach_group(self, group: IommuGroup) -> None:
        """Gives the container's mappings to a group's devices, and claims the group where nobody has.

        The group joins a compatible domain, or gets one into which every mapping is replayed. Raises ``VfioError``:
        EINVAL (attached already; its aperture or reserved regions conflict with the mappings or leave no IOVA),
        EPERM (not viable), ENOMEM, or what the host's refusal means.
        """
        try:
            self._carriers.attach(group, self._index, self._replay)
        finally:
            self._refresh()

    def detach_group(self, group: IommuGroup) -> None:
        """Moves a group's devices to blocking; with the last group every mapping goes.

        A claim made by ``attach_group`` is released. Raises ``VfioError``: EINVAL for a group that is not attached,
        or what the host's refusal to block a device means: the group stays attached then.
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

    def set_laps(self, laps: Any) -> None:
        """Lets a ``struct pv_laps *`` take the time of every step of maps and unmaps, until it is None again.

        It must live as long.
        """
        self._state.laps = laps or ffi.NULL

    def _map_failed(self, error: int, iova: int, size: int) -> VfioError:
        """What to raise for a negative errno of a map; undoes what devices may have seen of it."""
        refusal = map_refusal(self._state, -error, iova, size)
        if self._shown[0]:
            self.unmap(iova, size)
        return refusal

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

    def _report_dirty(self, operation: str, iova: int, size: int, bitmap: tuple[int, int]) -> None:
        """Every mapped page of the range into the bitmap (process address, page size)."""
        last = iova + size - 1
        mappings = list(self._index.range(iova, last))
        if mappings and (mappings[0].iova < iova or mappings[-1].last > last):
            raise VfioError(errno.EINVAL, operation, "the range splits a mapping", iova=iova, length=size)
        try:
            ranges = [(mapping.iova, mapping.size) for mapping in mappings]
            write_bitmap(bitmap[0], iova, bitmap[1].bit_length() - 1, ranges)
        except OSError as error:
            number = error.errno or errno.EFAULT
            raise VfioError(number, operation, "bitmap", iova=iova, length=size) from error

    def _flush(self) -> None:
        """Between the halves of an unmap: one flush per domain, over all that was cleared.

        Where it raises, the mappings stay known and pinned; the next unmap begins with a flush of everything.
        """
        state = self._state
        first, last = state.flush_first, state.flush_last
        try:
            for domain in self._domains:
                domain.flush_range(first, last)
        except BaseException:
            self._unflushed = True
            lib.pv_type1_unmap_undo(state)
            raise

    def _flush_everything(self) -> None:
        try:
            for domain in self._domains:
                domain.flush_all()
        except HypercallError as error:
            raise VfioError(error.errno or errno.EIO, "unmap_dma", error.reason) from error
        self._unflushed = False

    def _unmap_arrays(self, iovas: Words, sizes: Words) -> tuple[Words, int]:
        """Unmaps element by element until one is refused: the bytes of those before it, and its negative errno."""
        if self._unflushed:
            self._flush_everything()
        unmapped = np.zeros(len(iovas), np.uint64)
        at, length = (ffi.from_buffer("uint64_t[]", array) for array in (iovas, sizes))
        out = ffi.from_buffer("uint64_t[]", unmapped)
        error = lib.pv_type1_unmap_batch(self._state, len(iovas), at, length, out, self._done)
        done = self._done[0]
        if self._state.flush_first <= self._state.flush_last:
            self._flush()
            lib.pv_type1_unmap_finish_batch(self._state, done, at, length)
        return unmapped[:done], error

    def _drop_all(self) -> None:
        self.unmap(0, 0, _UNMAP_ALL)

    def _replay(self, domain: PagingDomain) -> None:
        """Every mapping into a new domain. Raises ``PageTableError``, with some of them in it."""
        error = lib.pv_type1_replay(self._state, domain.table.ptr)
        if error:
            raise PageTableError(-error, "replay", "")

    def _refresh(self) -> None:
        self._domains = self._carriers.domains
        self.iova_ranges = self._carriers.iova_ranges
        self.pgsize_bitmap = self._carriers.pgsize_bitmap
        self._page_mask = (self.pgsize_bitmap & -self.pgsize_bitmap) - 1
        state = self._state
        self._tables: Any = ffi.new("struct pt_table *[]", [domain.table.ptr for domain in self._domains])
        self._ranges: Any = ffi.new("struct vfio_iova_range[]", list(self.iova_ranges))
        state.tables, state.table_count = self._tables, len(self._domains)
        state.ranges, state.range_count = self._ranges, len(self.iova_ranges)
        state.page_mask = self._page_mask
