"""Device domains and the devices in them: what the hypercalls create, configure, attach and flush.

Models one partition's device domains in terms of the IOMMU's domains and requesters. A device in no domain
is blocked; where the machine or the device has no para-virtualized IOMMU it stands in the host's default
domain and reaches guest memory by GPA. Not modelled: other partitions, other VTLs, PASIDs, the quarantine a
real host keeps between owners. Where the IOMMU has ATS, every device context allows it: a flush then reaches
the device's own translation cache as well, if the guest enabled it there.
"""

from __future__ import annotations

from typing import Final

from pvfio.abi import lib
from pvfio.host.config import IommuConfig
from pvfio.memory import GuestMemory
from pvfio.silicon import Domain, Iommu, Requester

__all__ = ["DeviceDomains", "HostDevice", "HostDomain"]

_SUCCESS: Final[int] = lib.HV_STATUS_SUCCESS
_INVALID_PARAMETER: Final[int] = lib.HV_STATUS_INVALID_PARAMETER
_INVALID_DEVICE_ID: Final[int] = lib.HV_STATUS_INVALID_DEVICE_ID
_OPERATION_DENIED: Final[int] = lib.HV_STATUS_OPERATION_DENIED
_TYPE_S1: Final[int] = lib.HV_DEVICE_DOMAIN_TYPE_S1
_ID_SHIFT: Final[int] = lib.HV_DEVICE_DOMAIN_ID_SHIFT


class HostDevice:
    """A device the host gave the guest: its requester and the domain it is in (None: no domain)."""

    __slots__ = ("domain", "enabled", "name", "requester")

    def __init__(self, name: str, requester: Requester, enabled: bool) -> None:
        self.name = name
        self.requester = requester
        self.enabled = enabled
        self.domain: HostDomain | None = None


class HostDomain:
    """A device domain of the guest."""

    __slots__ = ("configured", "devices", "key", "silicon")

    def __init__(self, key: int, silicon: Domain) -> None:
        self.key = key
        self.silicon = silicon
        self.configured = False
        self.devices: set[HostDevice] = set()


class DeviceDomains:
    """The partition's domains by the whole domain id word, its devices by their logical id.

    Each method is one hypercall after its input was copied out, and returns its HV_STATUS. A malformed id
    word (type, reserved bits, ids 0 and ~0) is simply an unknown domain: both are INVALID_PARAMETER.
    """

    def __init__(self, memory: GuestMemory, iommu: Iommu, config: IommuConfig) -> None:
        self._memory = memory
        self._iommu = iommu
        self._config = config
        self._domains: dict[int, HostDomain] = {}
        self._devices: dict[int, HostDevice] = {}
        self._default: Domain | None = None
        self.find = self._domains.get
        self.device = self._devices.get

    def add_device(self, name: str, device_id: int, *, enabled: bool) -> Requester:
        """Makes the requester of a new device: in no domain, or where ``enabled`` is False in the default
        one.
        """
        requester = self._iommu.requester(device_id)
        requester.allow_ats(self._config.present and self._config.ats)
        device = HostDevice(name, requester, enabled and self._config.present)
        self._devices[device_id] = device
        if not device.enabled:
            if self._default is None:
                self._default = self._iommu.domain(lib.HV_DEVICE_DOMAIN_ID_DEFAULT)
                self._default.configure(lib.PV_DOMAIN_IDENTITY)
            requester.attach(self._default)
        return requester

    def remove_device(self, device_id: int) -> None:
        """Takes a device out of its domain, ends its DMA and forgets it."""
        device = self._devices.pop(device_id)
        device.requester.attach(None)
        if device.domain is not None:
            device.domain.devices.discard(device)
            device.domain = None

    def close(self) -> None:
        """Ends all DMA and every domain. Devices stay known, in no domain."""
        for device in self._devices.values():
            device.requester.attach(None)
            device.domain = None
        for domain in self._domains.values():
            domain.devices.clear()
            domain.silicon.destroy()
        self._domains.clear()
        if self._default is not None:
            self._default.destroy()
            self._default = None

    def name(self, device_id: int) -> str:
        """The name of a device, or its id in hexadecimal when it is gone."""
        device = self._devices.get(device_id)
        return device.name if device else f"{device_id:#x}"

    def create(self, key: int, flags: int) -> int:
        """CREATE_DEVICE_DOMAIN. The two known flags promise things this host always does."""
        ident = key >> _ID_SHIFT
        if key & lib.HV_DEVICE_DOMAIN_ID_NULL != _TYPE_S1 or flags & lib.HV_CREATE_DOMAIN_RESERVED_MASK:
            return _INVALID_PARAMETER
        if not lib.HV_DEVICE_DOMAIN_ID_FIRST <= ident <= lib.HV_DEVICE_DOMAIN_ID_LAST:
            return _INVALID_PARAMETER
        if key in self._domains:
            return int(lib.HV_STATUS_KEY_ALREADY_EXISTS)
        if len(self._domains) >= self._config.max_domains:
            return int(lib.HV_STATUS_INSUFFICIENT_MEMORY)
        try:
            silicon = self._iommu.domain(ident)
        except (OSError, MemoryError):
            return int(lib.HV_STATUS_INSUFFICIENT_MEMORY)
        self._domains[key] = HostDomain(key, silicon)
        return _SUCCESS

    def configure(self, key: int, flags: int, root: int) -> int:
        """CONFIGURE_DEVICE_DOMAIN: blocked, identity or paging. The root counts only where it is used."""
        domain = self._domains.get(key)
        if domain is None or flags & lib.HV_DOMAIN_RESERVED_MASK:
            return _INVALID_PARAMETER
        five_level = bool(flags & lib.HV_DOMAIN_FIRST_STAGE_5_LEVEL)
        if five_level and not self._config.five_level:
            return _INVALID_PARAMETER
        translation = flags & lib.HV_DOMAIN_TRANSLATION_ENABLED
        blocked = flags & lib.HV_DOMAIN_BLOCKED
        if blocked and not translation:
            return _INVALID_PARAMETER
        paging = translation and not blocked
        if paging and not (self._config.stage1 and self._is_table(root)):
            return _INVALID_PARAMETER
        if domain.devices:
            return _OPERATION_DENIED
        if paging:
            domain.silicon.configure(lib.PV_DOMAIN_PAGING, root, 5 if five_level else 4)
        else:
            domain.silicon.configure(lib.PV_DOMAIN_BLOCKED if blocked else lib.PV_DOMAIN_IDENTITY)
        # Whatever was cached under the configuration before must not outlive it.
        domain.silicon.invalidate()
        domain.configured = True
        return _SUCCESS

    def _is_table(self, root: int) -> bool:
        size: int = lib.PV_PAGE_SIZE
        if root % size:
            return False
        return any(start <= root <= start + length - size for start, length in self._memory.ram_ranges())

    def attach(self, key: int, device_id: int) -> int:
        """ATTACH_DEVICE_DOMAIN: replaces the domain the device had, in one step."""
        domain = self._domains.get(key)
        if domain is None:
            return _INVALID_PARAMETER
        device = self._devices.get(device_id)
        if device is None or not device.enabled:
            return _INVALID_DEVICE_ID
        if device.domain is domain:
            return int(lib.HV_STATUS_DEVICE_ALREADY_IN_DOMAIN)
        if not domain.configured:
            return _OPERATION_DENIED
        device.requester.attach(domain.silicon)
        if device.domain is not None:
            device.domain.devices.discard(device)
        domain.devices.add(device)
        device.domain = domain
        return _SUCCESS

    def detach(self, device_id: int) -> int:
        """DETACH_DEVICE_DOMAIN: the device is in no domain afterwards, blocked."""
        device = self._devices.get(device_id)
        if device is None or not device.enabled:
            return _INVALID_DEVICE_ID
        if device.domain is None:
            return int(lib.HV_STATUS_INVALID_DEVICE_STATE)
        device.requester.attach(None)
        device.domain.devices.discard(device)
        device.domain = None
        return _SUCCESS

    def delete(self, key: int) -> int:
        """DELETE_DEVICE_DOMAIN: forgets every cached translation, reads no table (the guest has freed it)."""
        domain = self._domains.get(key)
        if domain is None:
            return _INVALID_PARAMETER
        if domain.devices:
            return _OPERATION_DENIED
        domain.silicon.invalidate()
        domain.silicon.destroy()
        del self._domains[key]
        return _SUCCESS
