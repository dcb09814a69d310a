"""The pvIOMMU driver: detection, the static identity and blocking domains, attaching, ATS, paging domains.

It programs the host's IOMMU by hypercalls only (transport.py) and writes stage-1 tables itself
(paging_domain.py). Attaching replaces the domain a device had, atomically: there is no detached state in
between, and releasing a device means blocking it.

Not modelled: PASIDs, page requests (PRI), nested translation, hot removal of the IOMMU.
"""

from __future__ import annotations

import errno
import heapq
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvfio.abi import lib
from pvfio.errors import HypercallError, IommuError
from pvfio.guest.paging_domain import Domain, IotlbGather, PagingDomain, flush_entry
from pvfio.guest.pci import PciDevice

if TYPE_CHECKING:
    from pvfio.guest.transport import HypercallTransport, IommuCapabilities
    from pvfio.memory import GuestMemory

__all__ = ["Domain", "IotlbGather", "PagingDomain", "PvIommu", "ReservedRegion", "flush_entry"]

_log = logging.getLogger("pvfio.guest.pviommu")

_PAGE_4K = 1 << 12
_X86_64_SIZES = 1 << 12 | 1 << 21 | 1 << 30
_FOUR_LEVEL_WIDTH = 48
_FIVE_LEVEL_WIDTH = 57


@dataclass(frozen=True)
class ReservedRegion:
    """IOVAs ``start`` to ``last`` inclusive that no mapping may use; ``type`` says why."""

    start: int
    last: int
    type: str


class PvIommu:
    """The guest's IOMMU, made by ``detect``.

    ``width`` is the width of an IOVA in bits, ``levels`` of the paging domains' tables, ``pgsize_bitmap`` the
    page sizes both the format and the host have, ``ats`` whether devices may use ATS.
    """

    reserved_regions = (ReservedRegion(0xFEE0_0000, 0xFEEF_FFFF, "msi"),)

    def __init__(
        self, transport: HypercallTransport, memory: GuestMemory, capabilities: IommuCapabilities
    ) -> None:
        self.transport = transport
        self.memory = memory
        self.capabilities = capabilities
        self.ats = bool(capabilities.iommu_cap & lib.HV_IOMMU_CAP_ATS)
        five_level = bool(capabilities.iommu_cap & lib.HV_IOMMU_CAP_S1_5LVL)
        widest = _FIVE_LEVEL_WIDTH if five_level else _FOUR_LEVEL_WIDTH
        self.width = min(capabilities.max_iova_width, widest)
        self.levels = 4 if self.width <= _FOUR_LEVEL_WIDTH else 5
        self.pgsize_bitmap = capabilities.pgsize_bitmap & _X86_64_SIZES
        self._next_id: int = lib.HV_DEVICE_DOMAIN_ID_FIRST
        self._free_ids: list[int] = []
        self._domain_of: dict[PciDevice, Domain] = {}
        self.identity = self._static_domain("identity")
        try:
            self.blocking = self._static_domain("blocking")
        except BaseException:
            self.delete_domain(self.identity.id)
            raise

    @classmethod
    def detect(cls, transport: HypercallTransport, memory: GuestMemory) -> PvIommu | None:
        """Finds the IOMMU and makes its static domains; ``None`` where there is none a driver can use.

        Quietly where the host has no IOMMU; with an error in the log where it has one without stage 1 or 4
        KiB pages. Raises ``HypercallError`` for any other refusal.
        """
        try:
            capabilities = transport.get_iommu_capabilities()
        except HypercallError as error:
            if error.status == lib.HV_STATUS_INVALID_HYPERCALL_CODE:
                return None
            raise
        if not capabilities.iommu_cap & lib.HV_IOMMU_CAP_PRESENT:
            return None
        if not capabilities.iommu_cap & lib.HV_IOMMU_CAP_S1:
            _log.error("pvIOMMU without stage-1 translation (capabilities %#x)", capabilities.iommu_cap)
            return None
        if not capabilities.pgsize_bitmap & _PAGE_4K:
            _log.error("pvIOMMU without 4 KiB pages (page sizes %#x)", capabilities.pgsize_bitmap)
            return None
        return cls(transport, memory, capabilities)

    def close(self) -> None:
        """Deletes the static domains; every device must be gone and every paging domain freed."""
        self.delete_domain(self.blocking.id)
        self.delete_domain(self.identity.id)

    def probe(self, device: object) -> None:
        """Accepts a device.

        Raises ``IommuError`` ENODEV: not PCI, no logical ID, or the host's IOMMU does not translate it.
        """
        if not isinstance(device, PciDevice):
            raise IommuError(errno.ENODEV, "probe", "not a PCI device")
        device_id = device.logical_id
        try:
            answer = self.transport.get_logical_device_property(
                device_id, lib.HV_LOGICAL_DEVICE_PROPERTY_PVIOMMU
            )
        except HypercallError as error:
            raise IommuError(errno.ENODEV, "probe", str(error), device=device.name) from error
        if not answer & lib.HV_DEVICE_IOMMU_ENABLED:
            raise IommuError(errno.ENODEV, "probe", "not behind the pvIOMMU", device=device.name)

    def paging_domain(self) -> PagingDomain:
        """A new, empty paging domain that no device is attached to.

        Raises ``HypercallError`` where the host refuses it and ``MemoryError`` without room for its table;
        nothing is left behind then.
        """
        domain_id = self._create_domain()
        try:
            domain = PagingDomain(self, domain_id, self.levels, self.width)
        except BaseException:
            self.delete_domain(domain_id)
            raise
        try:
            self.transport.configure_device_domain(
                domain_id,
                translation_enabled=True,
                five_level=self.levels == 5,
                root=domain.table.root,
            )
        except BaseException:
            domain.free()
            raise
        return domain

    def domain_of(self, device: PciDevice) -> Domain | None:
        """The domain the device was last attached to by this driver; ``None`` before the first."""
        return self._domain_of.get(device)

    def attach(self, domain: Domain, device: PciDevice) -> None:
        """Moves a device into a domain, atomically.

        ATS is turned off before blocking, and on after a success elsewhere where both sides have it. Raises
        ``HypercallError`` (the device stays where it was; a failure to block is also logged, and ATS stays
        off then) and ``IommuError`` ENODEV where the device has no logical ID any more; ``ValueError`` for a
        freed domain.
        """
        if not domain.live:
            raise ValueError(f"{domain} was freed")
        device_id = device.logical_id
        blocking = domain.kind == "blocking"
        if blocking and device.ats_enabled:
            device.disable_ats()
        try:
            self.transport.attach_device_domain(domain.id, device_id)
        except HypercallError as error:
            if error.status != lib.HV_STATUS_DEVICE_ALREADY_IN_DOMAIN:
                if blocking:
                    _log.warning("%s: not blocked: %s", device.name, error)
                raise
        old = self._domain_of.get(device)
        if old is not None:
            old.devices.discard(device.name)
        domain.devices.add(device.name)
        self._domain_of[device] = domain
        if not blocking and self.ats and device.ats_supported and not device.ats_enabled:
            device.enable_ats()

    def release(self, device: PciDevice) -> None:
        """Blocks a device that goes away and forgets it. Raises as ``attach``."""
        self.attach(self.blocking, device)
        self.blocking.devices.discard(device.name)
        del self._domain_of[device]

    def delete_domain(self, domain_id: int) -> None:
        """Deletes a device domain. Its id is used again only when the host has really forgotten it."""
        try:
            self.transport.delete_device_domain(domain_id)
        except HypercallError as error:
            _log.warning("domain %d was not deleted: %s", domain_id, error)
            return
        heapq.heappush(self._free_ids, domain_id)

    def _create_domain(self) -> int:
        if self._free_ids:
            domain_id = heapq.heappop(self._free_ids)
        elif self._next_id <= lib.HV_DEVICE_DOMAIN_ID_LAST:
            domain_id = self._next_id
            self._next_id += 1
        else:
            raise IommuError(errno.ENOSPC, "create domain", "no domain id is free")
        try:
            self.transport.create_device_domain(domain_id)
        except HypercallError as error:
            # An id that the host knows belongs to something that was never deleted.
            if error.status != lib.HV_STATUS_KEY_ALREADY_EXISTS:
                heapq.heappush(self._free_ids, domain_id)
            raise
        return domain_id

    def _static_domain(self, kind: str) -> Domain:
        blocked = kind == "blocking"
        domain_id = self._create_domain()
        try:
            # The hypervisor refuses `blocked` without translation.
            self.transport.configure_device_domain(domain_id, translation_enabled=blocked, blocked=blocked)
        except BaseException:
            self.delete_domain(domain_id)
            raise
        return Domain(self, domain_id, kind)
