"""The paging domains that carry a container's mappings, and the groups in them.

Groups share a domain where one serves both (same aperture, same page sizes) and the host takes it; else a group gets a
domain of its own, into which every mapping is replayed. The container may map what lies inside every domain's
aperture and outside every reserved region. Not modelled: nesting domains, coherency (every domain is coherent).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pvfio.errors import HypercallError, VfioError
from pvfio.guest.refusals import as_vfio_errors
from pvfio.guest.type1_iova import IovaRange, gaps, usable_ranges

if TYPE_CHECKING:
    from pvfio.guest.iommu_group import IommuGroup
    from pvfio.guest.mapping_index import MappingIndex
    from pvfio.guest.paging_domain import PagingDomain
    from pvfio.guest.pviommu import PvIommu

__all__ = ["Type1Domains"]

_log = logging.getLogger("pvfio.guest.type1")

_PAGE_SIZES = (1 << 64) - (1 << 12)

Replay = Callable[["PagingDomain"], None]
"""Puts every mapping into a new domain."""


@dataclass
class _Placed:
    """A paging domain and the groups in it; the value says whether this container claimed the group."""

    domain: PagingDomain
    groups: dict[IommuGroup, bool] = field(default_factory=dict)


class Type1Domains:
    """``domains`` and ``groups`` in the order they came, and what follows from them.

    ``iova_ranges`` is empty, and ``pgsize_bitmap`` says every size from 4 KiB up, while there is no group.
    """

    def __init__(self, iommu: PvIommu) -> None:
        self._iommu = iommu
        self._placed: list[_Placed] = []
        self.domains: tuple[PagingDomain, ...] = ()
        self.iova_ranges: tuple[IovaRange, ...] = ()
        self.pgsize_bitmap = _PAGE_SIZES

    @property
    def groups(self) -> tuple[IommuGroup, ...]:
        """The attached groups."""
        return tuple(group for placed in self._placed for group in placed.groups)

    def attach(self, group: IommuGroup, mappings: MappingIndex, replay: Replay) -> None:
        """See ``Type1.attach_group``; a group that was not claimed is again unclaimed where this raises."""
        if group in self.groups:
            raise VfioError(errno.EINVAL, "attach_group", f"group {group.id} is attached already")
        with as_vfio_errors("attach_group"):
            claim = group.owner is None
            if claim:
                group.claim_dma_owner()
            try:
                self._place(group, claim, mappings, replay)
            except BaseException:
                if claim:
                    group.release_dma_owner()
                raise
        self._refresh()

    def detach(self, group: IommuGroup, drop_all: Callable[[], None]) -> None:
        """See ``Type1.detach_group``; ``drop_all`` unmaps everything, before the last domain is freed."""
        placed = next((placed for placed in self._placed if group in placed.groups), None)
        if placed is None:
            raise VfioError(errno.EINVAL, "detach_group", f"group {group.id} is not attached")
        with as_vfio_errors("detach_group"):
            group.detach()
            if len(placed.groups) == 1:
                if len(self._placed) == 1:
                    drop_all()
                self._placed.remove(placed)
                _discard(placed.domain)
            claimed = placed.groups.pop(group)
            self._refresh()
            if claimed:
                group.release_dma_owner()

    def _place(self, group: IommuGroup, claimed: bool, mappings: MappingIndex, replay: Replay) -> None:
        """Finds the claimed group a domain and attaches it."""
        domain = self._iommu.paging_domain()
        used = False
        try:
            ranges = _ranges([*self.domains, domain])
            if not ranges or any(mappings.first(*gap) is not None for gap in gaps(ranges)):
                raise VfioError(
                    errno.EINVAL, "attach_group", f"the IOVAs of group {group.id} conflict with mappings"
                )
            if self._share(domain, group, claimed):
                return
            replay(domain)
            group.attach(domain)
            self._placed.append(_Placed(domain, {group: claimed}))
            used = True
        finally:
            if not used:
                _discard(domain)

    def _share(self, like: PagingDomain, group: IommuGroup, claimed: bool) -> bool:
        """Attaches the group to a domain that serves it as well as ``like`` would, where the host takes it."""
        for placed in self._placed:
            domain = placed.domain
            if domain.aperture != like.aperture or domain.pgsize_bitmap != like.pgsize_bitmap:
                continue
            try:
                group.attach(domain)
            except HypercallError as error:
                _log.warning("group %d does not share domain %d: %s", group.id, domain.id, error)
                continue
            placed.groups[group] = claimed
            return True
        return False

    def _refresh(self) -> None:
        self.domains = tuple(placed.domain for placed in self._placed)
        self.iova_ranges = _ranges(self.domains)
        bitmap = _PAGE_SIZES
        for domain in self.domains:
            bitmap &= domain.pgsize_bitmap
        self.pgsize_bitmap = bitmap


def _ranges(domains: tuple[PagingDomain, ...] | list[PagingDomain]) -> tuple[IovaRange, ...]:
    reserved = ((region.start, region.last) for domain in domains for region in domain.reserved_regions)
    return usable_ranges((domain.aperture for domain in domains), reserved)


def _discard(domain: PagingDomain) -> None:
    """Frees a domain no group is in; one that a device is stuck in is emptied and kept."""
    if domain.devices:
        start, last = domain.aperture
        domain.unmap(start, last - start + 1)
        _log.warning("domain %d is not freed: %s stuck in it", domain.id, ", ".join(sorted(domain.devices)))
        return
    domain.free()
