"""IOMMU groups: the devices that cannot be kept apart, the domain they share, and who owns their DMA.

A group starts in its default domain, where kernel drivers make DMA: identity, or a DMA domain with strict or lazy
flushing (Linux: /sys/kernel/iommu_groups/N/type). A claim for userspace moves every device to blocking, an attach
from blocking to a paging domain; everything goes back through blocking. The numbers are those of Linux's
``iommu_group_claim_dma_owner`` and its neighbours.

Not modelled: deferred attach, PASID ownership.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from pvfio.errors import HypercallError, VfioError
from pvfio.guest.dma_domain import DmaDomain, check_kind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pvfio.guest.dma_domain import DomainKind, Spawn
    from pvfio.guest.paging_domain import Domain
    from pvfio.guest.pci import PciDevice
    from pvfio.guest.pviommu import PvIommu

__all__ = ["DRIVER_MANAGED_DMA", "IommuGroup"]

_log = logging.getLogger("pvfio.guest.iommu_group")

# Drivers that claim DMA for somebody else, or make none: they do not take the default domain into use.
DRIVER_MANAGED_DMA = frozenset({"vfio-pci", "pci-stub"})


class IommuGroup:
    """One group. ``domain`` is where all its devices are, ``owner`` whoever claimed its DMA.

    ``kind`` says what its default domain is, ``spawn`` starts tasks of the kernel (flushes by a timer).
    ``dma`` is what the DMA API maps in.
    """

    def __init__(
        self,
        group_id: int,
        iommu: PvIommu,
        devices: Iterable[PciDevice] = (),
        *,
        kind: DomainKind = "identity",
        spawn: Spawn | None = None,
    ) -> None:
        self.id = group_id
        self.iommu = iommu
        self._spawn = spawn
        self.dma = DmaDomain(iommu.memory, iommu, kind, spawn=spawn)
        self.domain: Domain = self.default_domain
        self.owner: object | None = None
        self._untrusted: set[PciDevice] = set()
        self.devices: list[PciDevice] = []
        for device in devices:
            self.add_device(device)

    def __repr__(self) -> str:
        return f"<IOMMU group {self.id}: {', '.join(device.name for device in self.devices)}>"

    @property
    def default_domain(self) -> Domain:
        """Where the group's devices are while a kernel driver, or nobody, has them."""
        return self.dma.domain or self.iommu.identity

    @property
    def default_domain_kind(self) -> DomainKind:
        """identity, strict or lazy."""
        return self.dma.kind

    def set_default_domain(self, kind: DomainKind) -> None:
        """Changes what the default domain is; mappings of the DMA API do not outlive it.

        Raises ``ValueError`` for an unknown kind, ``VfioError`` EINVAL for another one than strict where a device is
        not trusted, EBUSY while a driver that uses the default domain
        is bound or the group's DMA is claimed (from strict to lazy it may be, as on Linux), and
        ``HypercallError`` where a device cannot be moved; nothing has changed then.
        """
        check_kind(kind)
        old = self.dma
        if kind == old.kind:
            return
        operation = f"default domain of IOMMU group {self.id}"
        if self._untrusted and kind != "strict":
            names = ", ".join(sorted(device.name for device in self._untrusted))
            raise VfioError(errno.EINVAL, operation, f"{names} is not trusted")
        if (old.kind, kind) == ("strict", "lazy"):
            old.make_lazy()
            return
        users = self.kernel_users
        if users or self.owner is not None:
            who = f"{users[0].name} belongs to {users[0].driver}" if users else f"claimed by {self.owner}"
            raise VfioError(errno.EBUSY, operation, who)
        new = DmaDomain(self.iommu.memory, self.iommu, kind, spawn=self._spawn)
        try:
            self._set_domain(new.domain or self.iommu.identity)
        except BaseException:
            new.close()
            raise
        self.dma = new
        old.close()

    def distrust(self, device: PciDevice) -> None:
        """Makes the default domain strict, for as long as the device is in the group. Raises as
        ``set_default_domain``.
        """
        self.set_default_domain("strict")
        self._untrusted.add(device)

    def close(self) -> None:
        """Frees the default domain. Raises ``IommuError`` EBUSY while a device is in it."""
        self.dma.close()

    def add_device(self, device: PciDevice) -> None:
        """Takes a probed device in, and attaches it to the group's domain.

        Raises ``HypercallError`` where that is refused (the device is not in the group then), ``ValueError``
        for a device that is in a group.
        """
        if device.iommu_group is not None:
            raise ValueError(f"{device.name} is in IOMMU group {device.iommu_group.id}")
        self.iommu.attach(self.domain, device)
        device.iommu_group = self
        self.devices.append(device)

    def remove_device(self, device: PciDevice) -> None:
        """Blocks a device that goes away and forgets it.

        Raises ``HypercallError`` where it cannot be blocked, ``ValueError`` for a device of another group.
        """
        if device.iommu_group is not self:
            raise ValueError(f"{device.name} is not in IOMMU group {self.id}")
        self.iommu.release(device)
        self.devices.remove(device)
        self._untrusted.discard(device)
        device.iommu_group = None
        device.driver = None

    def bind(self, device: PciDevice, driver: str | None) -> None:
        """Binds a kernel driver by name; ``None`` unbinds.

        Raises ``VfioError`` EBUSY for a driver that wants the default domain while the group's DMA is
        claimed, or for unbinding while it is.
        """
        if device.iommu_group is not self:
            raise ValueError(f"{device.name} is not in IOMMU group {self.id}")
        if self.owner is not None and driver not in DRIVER_MANAGED_DMA:
            reason = f"the DMA of IOMMU group {self.id} is claimed"
            raise VfioError(errno.EBUSY, f"bind {driver}" if driver else "unbind", reason, device=device.name)
        device.driver = driver

    @property
    def kernel_users(self) -> list[PciDevice]:
        """The devices whose kernel driver uses the default domain."""
        return [
            device
            for device in self.devices
            if device.driver is not None and device.driver not in DRIVER_MANAGED_DMA
        ]

    @property
    def viable(self) -> bool:
        """True where no kernel driver owns a device: userspace may claim the group, or has."""
        return not self.kernel_users

    def claim_dma_owner(self, owner: object = "vfio") -> None:
        """Makes ``owner`` the group's: every device goes to blocking.

        Raises ``VfioError`` EPERM where a kernel driver or another owner has the group, and
        ``HypercallError`` where a device cannot be blocked; nothing is claimed then, and the devices are
        where they were.
        """
        operation = f"claim the DMA of IOMMU group {self.id}"
        if owner is None:
            raise ValueError("no owner")
        if self.owner is not None:
            raise VfioError(errno.EPERM, operation, f"claimed by {self.owner}")
        users = self.kernel_users
        if users:
            reason = f"{users[0].name} belongs to kernel driver {users[0].driver}"
            raise VfioError(errno.EPERM, operation, reason)
        self._set_domain(self.iommu.blocking)
        self.owner = owner

    def release_dma_owner(self) -> None:
        """Gives the group back to the kernel: through blocking to the default domain.

        Raises ``HypercallError`` where a device cannot be blocked or moved back; the group stays claimed
        then, and the devices blocked or where they were. ``VfioError`` EINVAL for a group nobody claimed.
        """
        if self.owner is None:
            raise VfioError(errno.EINVAL, f"release the DMA of IOMMU group {self.id}", "not claimed")
        self.detach()
        self._set_domain(self.default_domain)
        self.owner = None

    def attach(self, domain: Domain) -> None:
        """Moves a claimed, blocked group into a domain.

        Raises ``VfioError`` EPERM for a group nobody claimed, EBUSY for one that is in another domain, and
        ``HypercallError`` where a device cannot be moved; all its devices are blocked then.
        """
        operation = f"attach IOMMU group {self.id}"
        if self.owner is None:
            raise VfioError(errno.EPERM, operation, "not claimed")
        if self.domain is domain:
            return
        if self.domain is not self.iommu.blocking:
            raise VfioError(errno.EBUSY, operation, f"in {self.domain}")
        self._set_domain(domain)

    def replace(self, domain: Domain) -> None:
        """Moves a claimed group from whatever domain it is in to another, each device atomically: no DMA meets a gap.

        Raises ``VfioError`` EPERM for a group nobody claimed, and ``HypercallError`` where a device cannot be moved;
        all its devices are in the old domain then.
        """
        if self.owner is None:
            raise VfioError(errno.EPERM, f"replace the domain of IOMMU group {self.id}", "not claimed")
        self._set_domain(domain)

    def detach(self) -> None:
        """Moves a claimed group back to blocking; nothing where it is there.

        Raises ``VfioError`` EPERM for a group nobody claimed, and ``HypercallError`` where a device cannot be
        blocked; the devices are where they were then.
        """
        if self.owner is None:
            raise VfioError(errno.EPERM, f"detach IOMMU group {self.id}", "not claimed")
        blocking = self.iommu.blocking
        # Asked of the devices: after a roll-back that failed, one is not where the group is.
        if any(self.iommu.domain_of(device) is not blocking for device in self.devices):
            self._set_domain(blocking)
        self.domain = blocking

    def _set_domain(self, domain: Domain) -> None:
        """All devices or none; one that cannot go back is logged, and stays where its failure left it."""
        old = self.domain
        moved: list[PciDevice] = []
        try:
            for device in self.devices:
                self.iommu.attach(domain, device)
                moved.append(device)
        except BaseException:
            for device in reversed(moved):
                self._roll_back(device, old)
            raise
        self.domain = domain

    def _roll_back(self, device: PciDevice, domain: Domain) -> None:
        try:
            self.iommu.attach(domain, device)
        except HypercallError as error:
            _log.warning("%s: cannot go back to %r: %s", device.name, domain, error)
