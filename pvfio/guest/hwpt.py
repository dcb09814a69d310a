"""Hardware page tables of an iommufd: paging ones, which carry an IO address space out, and nested ones over them.

A nested page table is managed by its user, in x86-64 format, in memory that the parent's address space maps; every
address in it is an IOVA of the parent. The pvIOMMU offers the guest one stage only, so the kernel shadows it, as a
hypervisor does for a virtual IOMMU in caching mode (VT-d 6.1): the device domain holds one table that says what both
stages say together. It is brought into step when it is made, when the user invalidates, and when the parent changes.
What only appears or goes is changed in place; where something is replaced, a new domain is filled and the devices
move over atomically, so that no DMA meets a gap.

Not modelled: dirty tracking (x86-64 stage-1 leaves are written dirty; refused with EOPNOTSUPP), page faults, PASIDs,
vIOMMU objects; accessed and dirty bits are not written to the user's table.
"""

from __future__ import annotations

import errno
import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from pvfio.abi import ffi, lib
from pvfio.errors import HypercallError, IommuError, VfioError
from pvfio.guest.ioas import Ioas
from pvfio.guest.ioas_iova import TOP
from pvfio.guest.refusals import as_vfio_errors

if TYPE_CHECKING:
    from pvfio.guest.iommu_group import IommuGroup
    from pvfio.guest.paging_domain import PagingDomain
    from pvfio.guest.pviommu import PvIommu

__all__ = ["SHADOW_BUDGET", "Hwpt", "NestedHwpt", "PagingHwpt"]

_log = logging.getLogger("pvfio.guest.iommufd")

SHADOW_BUDGET = 1 << 21
"""Places of a nested page table (pages, and holes between them) that the kernel looks at in one pass."""

_LEVELS = {48: 4, 57: 5}


class Hwpt(ABC):
    """What both kinds have: a device domain, and the groups attached to it."""

    domain: PagingDomain

    def __init__(self, iommu: PvIommu) -> None:
        self.iommu = iommu
        self.groups: list[IommuGroup] = []

    @property
    @abstractmethod
    def paging(self) -> PagingHwpt:
        """The page table that carries an address space: this one, or the parent."""

    def close(self) -> None:
        """Frees the domain; no group is attached. One that a device is stuck in is emptied and kept."""
        start, last = self.domain.aperture
        try:
            self.domain.free()
        except IommuError as error:
            self.domain.unmap(start, last - start + 1)
            _log.warning("domain %d is not freed: %s", self.domain.id, error)


class PagingHwpt(Hwpt):
    """Carries ``ioas`` out. ``nest_parent``: nested ones may be made over it. ``auto``: made by an attach to the
    address space, and gone with the last device.

    Raises ``VfioError``: what ``Ioas.add_carrier`` refuses, ENOMEM, or what the host's refusal means.
    """

    def __init__(self, iommu: PvIommu, ioas: Ioas, *, nest_parent: bool = False, auto: bool = False) -> None:
        super().__init__(iommu)
        self.ioas = ioas
        self.nest_parent = nest_parent
        self.auto = auto
        self.children: list[NestedHwpt] = []
        with as_vfio_errors("hwpt_alloc"):
            self.domain = iommu.paging_domain()
        try:
            ioas.add_carrier(self)
        except BaseException:
            self.domain.free()
            raise

    @property
    def paging(self) -> PagingHwpt:
        return self

    def mapped(self) -> None:
        for child in self.children:
            child.parent_mapped()

    def unmapped(self) -> None:
        for child in self.children:
            child.parent_unmapped()

    def close(self) -> None:
        super().close()
        self.ioas.remove_carrier(self)


class NestedHwpt(Hwpt):
    """A user's table over ``parent``. ``root`` is the IOVA of its top page, ``width`` 48 (4 levels) or 57 (5).

    Raises ``VfioError``: EINVAL (width the IOMMU has not, root not page-aligned), ENOSPC (a table beyond
    ``SHADOW_BUDGET``), ENOMEM, or what the host's refusal means.
    """

    def __init__(self, parent: PagingHwpt, root: int, width: int) -> None:
        super().__init__(parent.iommu)
        self.parent = parent
        self._root = root
        self._levels = _LEVELS.get(width, 0)
        if not self._levels or self._levels > self.iommu.levels or root % 4096:
            raise VfioError(errno.EINVAL, "hwpt_alloc", f"address width {width}, root {root:#x}")
        self._dangling = False
        self.domain = self._filled()
        parent.children.append(self)

    @property
    def paging(self) -> PagingHwpt:
        return self.parent

    def invalidate(self, first: int = 0, last: int = TOP) -> None:
        """Brings [first, last] into step with the user's table; when it returns nothing older is in use there.

        What is replaced is replaced without a gap, and then the whole table is read again, as an IOTLB may. Raises
        ``VfioError`` ENOSPC, ENOMEM, or what the host's refusal means; the domain is empty then.
        """
        try:
            found = self._pass(lib.pv_shadow_compare, self.domain, first, last)
            if found.changed:
                self._swap()
                return
            if found.stale:
                gone = self._pass(lib.pv_shadow_remove, self.domain, first, last)
                if gone.first <= gone.last:
                    with as_vfio_errors("hwpt_invalidate"):
                        self.domain.flush_range(gone.first, gone.last)
                    # A page that changed under the removal went whole, and may reach out of the range.
                    first, last = min(first, gone.first), max(last, gone.last)
            if found.missing or found.stale:
                self._pass(lib.pv_shadow_add, self.domain, first, last)
        except BaseException:
            self._empty()
            raise
        # A pass over a part says nothing about the rest.
        self._dangling = bool(found.dangling) or (self._dangling and (first > 0 or last < TOP))

    def parent_mapped(self) -> None:
        """The parent maps more: where the user's table led nowhere, it may lead somewhere now."""
        if self._dangling:
            self._follow()

    def parent_unmapped(self) -> None:
        """The parent maps less: what the user's table reaches through it goes before the memory is unpinned."""
        self._follow()

    def close(self) -> None:
        super().close()
        self.parent.children.remove(self)

    def _follow(self) -> None:
        try:
            self.invalidate()
        except VfioError as error:
            _log.warning("nested domain %d is empty: %s", self.domain.id, error)

    def _filled(self) -> PagingDomain:
        """A new domain that says what both stages say now."""
        with as_vfio_errors("hwpt_alloc"):
            domain = self.iommu.paging_domain()
        try:
            self._dangling = bool(self._pass(lib.pv_shadow_add, domain, 0, TOP).dangling)
        except BaseException:
            domain.free()
            raise
        return domain

    def _swap(self) -> None:
        """Moves every device to a new domain, each atomically."""
        old, new = self.domain, self._filled()
        moved: list[IommuGroup] = []
        try:
            for group in self.groups:
                with as_vfio_errors("hwpt_invalidate"):
                    group.replace(new)
                moved.append(group)
        except BaseException:
            for group in moved:
                self._back(group, old)
            if not new.devices:
                new.free()
            raise
        self.domain = new
        old.free()

    def _back(self, group: IommuGroup, domain: PagingDomain) -> None:
        try:
            group.replace(domain)
        except HypercallError as error:
            _log.warning("group %d cannot go back to domain %d: %s", group.id, domain.id, error)

    def _empty(self) -> None:
        start, last = self.domain.aperture
        self.domain.unmap(start, last - start + 1)
        self._dangling = True

    def _pass(self, which: Any, domain: PagingDomain, first: int, last: int) -> Any:
        """Runs one of the passes of shadow.h over a domain's table and returns its result."""
        shadow = ffi.new("struct pv_shadow *")
        shadow.table = domain.table.ptr
        shadow.parent = self.parent.domain.table.ptr
        shadow.space = self.iommu.memory.guest_space
        shadow.root = self._root
        shadow.levels = self._levels
        result = ffi.new("struct pv_shadow_result *")
        error = which(shadow, first, min(last, domain.aperture[1]), SHADOW_BUDGET, result)
        if error:
            raise VfioError(-error, "shadow", "a nested page table of this size", iova=first)
        return result
