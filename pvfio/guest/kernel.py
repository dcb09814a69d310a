"""The guest kernel: what boots on the machine and hands devices to userspace.

Booting makes the hypercall transport and looks for the pvIOMMU. A vPCI channel becomes a PCI bus: its logical
device IDs are registered, its functions enumerated, each accepted by the IOMMU and put into a group, and
bound to a driver. Functions of a bus that is not isolated share one group. Without an IOMMU there are no
groups, and so no VFIO.

Not modelled: processes (there is one, which holds all files), other kernel drivers than by name, device
hot-plug events, sysfs.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import trio

from pvfio.abi import lib
from pvfio.abi.hyperv import logical_id_prefix
from pvfio.errors import HypercallError, IommuError, VfioError
from pvfio.guest.dma_domain import check_kind
from pvfio.guest.iommu_group import IommuGroup
from pvfio.guest.iommufd import IommufdFile
from pvfio.guest.logical_id import LogicalIdRegistry
from pvfio.guest.pci import PciDevice, VpciChannel, enumerate_bus
from pvfio.guest.pviommu import PvIommu
from pvfio.guest.swiotlb import BouncePool
from pvfio.guest.transport import HypercallEntry, HypercallTransport
from pvfio.guest.type1 import LockedMemory, Type1, Type1Limits
from pvfio.guest.vfio_cdev import CdevFile
from pvfio.guest.vfio_container import ContainerFile
from pvfio.guest.vfio_files import FileTable
from pvfio.guest.vfio_group import GroupFile, VfioGroup
from pvfio.guest.vfio_pci import DeviceFile, VfioPciDevice

if TYPE_CHECKING:
    from pvfio.guest.dma_api import DmaDebugHook
    from pvfio.guest.dma_domain import DomainKind
    from pvfio.memory import GuestMemory

__all__ = ["GuestKernel", "VfioNamespace"]

_log = logging.getLogger("pvfio.guest.kernel")

VFIO_PCI = "vfio-pci"


class GuestKernel:
    """The kernel of one guest. Booted when it is made; ``close`` undoes everything.

    ``entry`` is the hypercall entry point, ``vps`` the number of virtual processors, ``limits`` what type1
    allows, ``default_domain`` what new groups begin in, ``dma_debug`` who watches the DMA API. ``iommu`` is None
    where none was found. ``devices`` are the PCI functions, ``groups`` the IOMMU groups by number, ``vfio`` the
    files a process can open.
    """

    def __init__(
        self,
        memory: GuestMemory,
        entry: HypercallEntry,
        *,
        vps: int = 2,
        limits: Type1Limits | None = None,
        default_domain: DomainKind = "identity",
    ) -> None:
        self.memory = memory
        self.default_domain = check_kind(default_domain)
        self.dma_debug: DmaDebugHook | None = None
        self._bounce_pool: BouncePool | None = None
        self.limits = limits or Type1Limits()
        self.transport = HypercallTransport(memory, entry, vps)
        try:
            self.iommu = PvIommu.detect(self.transport, memory)
        except BaseException:
            self.transport.close()
            raise
        self.registry = LogicalIdRegistry()
        self.devices: list[PciDevice] = []
        self.groups: dict[int, IommuGroup] = {}
        self.vfio = VfioNamespace(self)
        self._buses: dict[int, VpciChannel] = {}
        self._next_group = 0
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The kernel's own tasks (irqfds), until cancelled. Without it, unmasking by eventfd is refused."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def spawn(self, task: Callable[[], Coroutine[Any, Any, None]]) -> trio.CancelScope:
        """Starts a task of the kernel and returns what cancels it. Raises ENOTTY while ``run`` does not run."""
        if self._nursery is None:
            raise VfioError(errno.ENOTTY, "start a kernel task", "the kernel's tasks do not run")
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await task()

        self._nursery.start_soon(run)
        return scope

    @property
    def bounce_pool(self) -> BouncePool:
        """The DMA API's bounce buffers, made when first asked for. Raises ``MemoryError``."""
        if self._bounce_pool is None:
            self._bounce_pool = BouncePool(self.memory, vps=self.transport.vps)
        return self._bounce_pool

    def add_bus(
        self, channel: VpciChannel, *, isolated: bool = True, driver: str | None = VFIO_PCI
    ) -> list[PciDevice]:
        """Brings a PCI bus up and binds ``driver`` to its functions; returns them.

        Functions that the IOMMU does not accept are there, but in no group and without a driver. Raises
        IommuError EEXIST for a segment that is in use, and ``HypercallError``; the bus is gone again then.
        """
        segment = channel.segment
        if segment in self._buses:
            raise IommuError(errno.EEXIST, "add bus", f"segment {segment:04x} has one")
        self.registry.register(segment, logical_id_prefix(channel.instance_guid.bytes_le))
        self._buses[segment] = channel
        try:
            found = enumerate_bus(channel, self.registry)
            self.devices += found
            shared: IommuGroup | None = None
            for device in found:
                shared = self._group(device, None if isolated else shared)
                if device.iommu_group is not None and driver is not None:
                    self.bind(device, driver)
        except BaseException:
            self.remove_bus(channel)
            raise
        return found

    def remove_bus(self, channel: VpciChannel) -> None:
        """Takes a bus down: its functions are blocked and forgotten. Raises EBUSY while one is in use by
        VFIO.
        """
        gone = [device for device in self.devices if device.channel is channel]
        for device in gone:
            if self.vfio.in_use(device):
                raise VfioError(errno.EBUSY, "remove bus", "open in VFIO", device=device.name)
        for device in gone:
            group = device.iommu_group
            if group is not None:
                self.vfio.remove(device)
                self._leave(group, device)
                if not group.devices:
                    group.close()
                    del self.groups[group.id]
            self.devices.remove(device)
            self._driver_left(device, None)
        if self._buses.pop(channel.segment, None) is not None:
            self.registry.unregister(channel.segment)

    def device(self, name: str) -> PciDevice:
        """A function by name ("0001:00:00.0"). Raises ENODEV for an unknown one."""
        for device in self.devices:
            if device.name == name:
                return device
        raise VfioError(errno.ENODEV, "find device", f"no device {name!r}", device=name)

    def bind(self, device: PciDevice, driver: str | None) -> None:
        """Binds a driver by name, or none; "vfio-pci" gives the function to userspace.

        The function may be making DMA: it stays in the default domain, with what the driver before left mapped,
        until VFIO claims it. Raises EBUSY while the function is open, or for a driver that wants the group's DMA
        while VFIO has claimed it; EINVAL for vfio-pci without a group.
        """
        group, before = device.iommu_group, device.driver
        if group is None:
            if driver == VFIO_PCI:
                raise VfioError(errno.EINVAL, "bind vfio-pci", "no IOMMU group", device=device.name)
            device.driver = driver
            self._driver_left(device, before)
            return
        if driver != device.driver and self.vfio.in_use(device):
            raise VfioError(errno.EBUSY, f"bind {driver}", "open in VFIO", device=device.name)
        group.bind(device, driver)
        if driver == VFIO_PCI:
            self.vfio.add(device)
        else:
            self.vfio.remove(device)
        self._driver_left(device, before)

    async def unbind(self, device: PciDevice) -> None:
        """Takes a function from its driver; from VFIO by asking for it (REQ) until its user closes it.

        Cancelled while it waits: still bound.
        """
        await trio.lowlevel.checkpoint()
        await self.vfio.wait_unused(device)
        self.bind(device, None)

    def close(self) -> None:
        """Takes the buses down, then the IOMMU and the hypercall pages. Raises EBUSY while VFIO files are
        open.
        """
        for channel in list(self._buses.values()):
            self.remove_bus(channel)
        if self.iommu is not None:
            self.iommu.close()
            self.iommu = None
        self.transport.close()

    def _driver_left(self, device: PciDevice, before: str | None) -> None:
        """What a driver that is gone left mapped is for the checks to find. A function that went has none."""
        gone = device not in self.devices
        if (gone or device.driver != before) and self.dma_debug is not None:
            self.dma_debug.unbound(device.name)

    def _leave(self, group: IommuGroup, device: PciDevice) -> None:
        """Out of the group, and of the blocking domain too, so that it can be deleted.

        A function that the host took away by surprise cannot be blocked, and need not be.
        """
        try:
            group.remove_device(device)
            self.transport.detach_device_domain(device.logical_id)
        except HypercallError as error:
            _log.warning("%s: %s", device.name, error)
            if device.iommu_group is group:
                group.devices.remove(device)
                group.domain.devices.discard(device.name)
                device.iommu_group = None

    def _group(self, device: PciDevice, shared: IommuGroup | None) -> IommuGroup | None:
        """Puts a function the IOMMU accepts into a group, the shared one or a new one."""
        if self.iommu is None:
            return None
        try:
            self.iommu.probe(device)
        except IommuError as error:
            if error.errno != errno.ENODEV:
                raise
            return shared
        if shared is not None:
            shared.add_device(device)
            return shared
        group = IommuGroup(self._next_group, self.iommu, [device], kind=self.default_domain, spawn=self.spawn)
        self.groups[group.id] = group
        self._next_group += 1
        return group


class VfioNamespace:
    """The VFIO files of the guest: containers, groups, iommufds, and the devices bound to vfio-pci."""

    def __init__(self, kernel: GuestKernel) -> None:
        self._kernel = kernel
        self._account = LockedMemory(kernel.limits.memlock)
        self._user_account = LockedMemory(kernel.limits.memlock)
        self.files = FileTable()
        self.groups: dict[int, VfioGroup] = {}

    def open_container(self) -> ContainerFile:
        """A new container file."""
        return ContainerFile(self._make_type1, self.files)

    def open_group(self, group_id: int) -> GroupFile:
        """Opens a group's file. Raises ENOENT where no device of such a group is bound to vfio-pci, EBUSY."""
        group = self.groups.get(group_id)
        if group is None:
            raise VfioError(errno.ENOENT, f"open group {group_id}", "no such group")
        return group.open()

    def open_iommufd(self) -> IommufdFile:
        """A new iommufd (/dev/iommu)."""
        return IommufdFile(self._kernel.memory, self.files, (self._user_account, self._account))

    def open_cdev(self, name: str) -> CdevFile:
        """Opens a device's own file by the device's name. Raises ENOENT where no such device is bound to vfio-pci."""
        for group in self.groups.values():
            if name in group.devices:
                return CdevFile(group.devices[name], group, self.files)
        raise VfioError(errno.ENOENT, "open cdev", "no such device", device=name)

    def device_file(self, fd: int) -> DeviceFile:
        """The device file of a number. Raises EBADF."""
        file = self.files.get(fd)
        if not isinstance(file, DeviceFile):
            raise VfioError(errno.EBADF, "device file", f"number {fd} is another file")
        return file

    def device(self, device: PciDevice) -> VfioPciDevice | None:
        """VFIO's side of a function, None while it is not bound to vfio-pci."""
        group = self.groups.get(device.iommu_group.id) if device.iommu_group is not None else None
        return group.devices.get(device.name) if group is not None else None

    def in_use(self, device: PciDevice) -> bool:
        """Whether a process has the function, or its group, open."""
        found = self.device(device)
        if found is None or device.iommu_group is None:
            return False
        return bool(found.users) or (
            len(device.iommu_group.devices) == 1 and self.groups[device.iommu_group.id].in_use
        )

    def signal(self, device: PciDevice, index: int) -> bool:
        """Rings ERR or REQ of an open function; false where nobody listens."""
        found = self.device(device)
        return found is not None and bool(found.users) and found.irqs.signal(index)

    def add(self, device: PciDevice) -> None:
        """A function was bound to vfio-pci."""
        group = device.iommu_group
        if group is None:
            raise ValueError(f"{device.name} is in no group")
        entry = self.groups.setdefault(group.id, VfioGroup(group, self.files))
        entry.devices.setdefault(device.name, VfioPciDevice(device, self._kernel.spawn))

    def remove(self, device: PciDevice) -> None:
        """A function is not bound to vfio-pci any more; a group without one has no file to open."""
        group = device.iommu_group
        entry = self.groups.get(group.id) if group is not None else None
        if entry is not None:
            entry.devices.pop(device.name, None)
            if not entry.devices and not entry.in_use:
                del self.groups[entry.id]

    async def wait_unused(self, device: PciDevice) -> None:
        """Asks for a function (REQ) and waits until its user closes it, however long. Cancelling takes nothing back."""
        found = self.device(device)
        if found is not None and found.users:
            self.signal(device, lib.VFIO_PCI_REQ_IRQ_INDEX)
            await found.idle.wait()

    def _make_type1(self, v2: bool) -> Type1:
        kernel = self._kernel
        if kernel.iommu is None:
            raise VfioError(errno.ENODEV, "SET_IOMMU", "no IOMMU")
        return Type1(kernel.memory, kernel.iommu, kernel.limits, v2, account=self._account)
