"""An iommufd (/dev/iommu): address spaces, hardware page tables and bound devices as objects with numbers.

A device is bound through its cdev (vfio_cdev.py) and then attached to a page table, or to an address space, which finds
or makes a page table for it. Attaching it again replaces the page table without a gap: the hypervisor moves a device
between domains atomically. Devices of one group move together. An object goes when nothing uses it any more (EBUSY
before). Rules and errnos: Linux drivers/iommu/iommufd/{main,device,hw_pagetable}.c; the requests are in
iommufd_ioctl.py.

Not modelled: access objects (mediated devices), the VFIO compatibility IOAS, fault queues, vIOMMU objects, PASIDs.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from pvfio.errors import VfioError
from pvfio.guest.hwpt import Hwpt, NestedHwpt, PagingHwpt
from pvfio.guest.ioas import Ioas
from pvfio.guest.ioas_pages import PageStore
from pvfio.guest.iommufd_ioctl import iommufd_ioctl
from pvfio.guest.refusals import as_vfio_errors

if TYPE_CHECKING:
    from pvfio.guest.iommu_group import IommuGroup
    from pvfio.guest.pci import PciDevice
    from pvfio.guest.type1 import LockedMemory
    from pvfio.guest.vfio_files import FileTable
    from pvfio.memory import GuestMemory

__all__ = ["BoundDevice", "BoundGroup", "IommufdFile"]

_log = logging.getLogger("pvfio.guest.iommufd")

_T = TypeVar("_T")


class BoundGroup:
    """A group whose DMA an iommufd owns: its ``bound`` devices, those ``attached``, and the page table they are in."""

    def __init__(self, group: IommuGroup) -> None:
        self.group = group
        self.bound: list[BoundDevice] = []
        self.attached: list[BoundDevice] = []
        self.hwpt: Hwpt | None = None


class BoundDevice:
    """A device of an iommufd, in its group there."""

    def __init__(self, pci: PciDevice, group: BoundGroup) -> None:
        self.pci = pci
        self.group = group

    @property
    def attached(self) -> bool:
        """Whether it is attached to a page table."""
        return self in self.group.attached

    @property
    def reserved(self) -> list[tuple[int, int]]:
        """Its reserved regions, as (first, last) IOVA."""
        return [(region.start, region.last) for region in self.group.group.iommu.reserved_regions]


class IommufdFile:
    """An open /dev/iommu.

    ``accounts`` are where pinned memory is counted: the user's, and the process's (IOMMU_OPTION_RLIMIT_MODE 0, 1).
    """

    def __init__(
        self, memory: GuestMemory, files: FileTable, accounts: tuple[LockedMemory, LockedMemory]
    ) -> None:
        self.store = PageStore(memory)
        self.accounts = accounts
        self.rlimit_mode = 0
        self.objects: dict[int, Any] = {}
        self._users: dict[int, int] = {}
        self._groups: dict[int, BoundGroup] = {}
        self._files = files
        self._open = True
        self.fd = files.install(self)

    def __repr__(self) -> str:
        return f"<iommufd {self.fd:#x}>"

    def ioctl(self, request: int, arg: Any = 0) -> int:
        """A request of <linux/iommufd.h>; ``arg`` is a cffi pointer to its structure, which is updated.

        Raises ``VfioError``; EBADF once closed, ENOTTY for an unknown request.
        """
        if not self._open:
            raise VfioError(errno.EBADF, "iommufd", "closed")
        return iommufd_ioctl(self, request, arg)

    def close(self) -> None:
        """Closes the file; its objects live on while a device is bound. Safe to call twice."""
        if self._open:
            self._open = False
            self._files.remove(self.fd)
            self._collect()

    @property
    def account(self) -> LockedMemory:
        """Where a mapping's memory is counted now."""
        return self.accounts[self.rlimit_mode]

    # Objects: numbers from 1 on, the lowest free one first.

    def add(self, thing: object) -> int:
        """Gives an object a number."""
        number = 1
        while number in self.objects:
            number += 1
        self.objects[number] = thing
        self._users[number] = 0
        return number

    def get(self, number: int, kind: type[_T]) -> _T:
        """The object of a number. Raises ENOENT for none, or one of another kind."""
        thing = self.objects.get(number)
        if thing is None or not isinstance(thing, kind):
            raise VfioError(errno.ENOENT, "iommufd", f"object {number}")
        return thing

    def number_of(self, thing: object) -> int:
        """The number of an object."""
        return next(number for number, other in self.objects.items() if other is thing)

    def use(self, thing: object, more: int = 1) -> None:
        """Something begins (or, with -1, stops) to use an object."""
        self._users[self.number_of(thing)] += more

    def destroy(self, number: int) -> None:
        """Destroys an object that nothing uses. Raises ENOENT, EBUSY."""
        thing = self.get(number, object)
        if self._users[number] or isinstance(thing, BoundDevice):
            raise VfioError(errno.EBUSY, "destroy", f"object {number} is in use")
        self._destroy(number, thing)

    def alloc_ioas(self) -> int:
        """A new address space's number."""
        return self.add(Ioas(self.store))

    def alloc_hwpt(self, device: BoundDevice, ioas: Ioas, *, nest_parent: bool, auto: bool = False) -> int:
        """A new page table for an address space, filled with its mappings; its number."""
        number = self.add(PagingHwpt(device.group.group.iommu, ioas, nest_parent=nest_parent, auto=auto))
        self.use(ioas)
        return number

    def alloc_nested(self, parent: PagingHwpt, root: int, width: int) -> int:
        """A nested page table's number. Raises EINVAL for a parent that is none."""
        if parent.auto or not parent.nest_parent:
            raise VfioError(errno.EINVAL, "hwpt_alloc", "the page table is no nesting parent")
        number = self.add(NestedHwpt(parent, root, width))
        self.use(parent)
        return number

    # Devices.

    def has_group(self, group: IommuGroup) -> bool:
        """Whether a device of the group is bound here."""
        return group.id in self._groups

    def bind(self, pci: PciDevice) -> BoundDevice:
        """Takes a device: the first of its group brings the group's DMA, which goes to blocking.

        Raises ENODEV (no group), EPERM (a kernel driver, or somebody else, owns the group), or what the host's refusal
        means.
        """
        group = pci.iommu_group
        if group is None:
            raise VfioError(errno.ENODEV, "bind", "no IOMMU group", device=pci.name)
        bound = self._groups.get(group.id)
        if bound is None:
            with as_vfio_errors("bind"):
                owner = group.owner
                if isinstance(owner, IommufdFile) and not owner.has_group(group):
                    # It could not be blocked when its last device was unbound.
                    group.release_dma_owner()
                group.claim_dma_owner(self)
            bound = self._groups[group.id] = BoundGroup(group)
        device = BoundDevice(pci, bound)
        bound.bound.append(device)
        self.add(device)
        return device

    def unbind(self, device: BoundDevice) -> None:
        """Gives a device back, detached where it was not yet; with the group's last one the kernel has its DMA again.

        A group that the host does not block stays claimed, which is logged.
        """
        bound = device.group
        try:
            self.detach(device)
        except VfioError as error:
            _log.warning("%s: not detached: %s", device.pci.name, error)
            self._forget_attachment(device)
        bound.bound.remove(device)
        number = self.number_of(device)
        del self.objects[number], self._users[number]
        if not bound.bound:
            del self._groups[bound.group.id]
            try:
                with as_vfio_errors("unbind"):
                    bound.group.release_dma_owner()
            except VfioError as error:
                _log.warning("group %d stays claimed: %s", bound.group.id, error)
        if not self._open:
            self._collect()

    def attach(self, device: BoundDevice, number: int) -> int:
        """Attaches a device to a page table, or to an address space's; attached already: replaces without a gap.

        Returns the page table's number. Raises ENOENT, EINVAL (another kind of object; another device of its group is
        elsewhere), EADDRINUSE (its reserved regions are mapped or allowed), or what filling a page table raises; the
        device is where it was then.
        """
        thing = self.get(number, object)
        if isinstance(thing, Ioas):
            return self._attach_auto(device, thing)
        if not isinstance(thing, Hwpt):
            raise VfioError(
                errno.EINVAL, "attach", f"object {number} is no page table", device=device.pci.name
            )
        self._attach(device, thing)
        return number

    def detach(self, device: BoundDevice) -> None:
        """Blocks a device; nothing where it is not attached. The rest of its group stays while one is attached.

        Raises what the host's refusal to block means; it stays attached then.
        """
        bound = device.group
        if not device.attached:
            return
        if len(bound.attached) == 1:
            with as_vfio_errors("detach"):
                bound.group.detach()
        self._forget_attachment(device)

    def _forget_attachment(self, device: BoundDevice) -> None:
        bound, hwpt = device.group, device.group.hwpt
        if hwpt is None or not device.attached:
            return
        bound.attached.remove(device)
        hwpt.paging.ioas.iovas.release(device)
        if not bound.attached:
            hwpt.groups.remove(bound.group)
            bound.hwpt = None
        self._put_hwpt(hwpt)

    def _attach_auto(self, device: BoundDevice, ioas: Ioas) -> int:
        """Into a page table that an earlier attach made for the address space, or a new one."""
        for carrier in list(ioas.carriers):
            if isinstance(carrier, PagingHwpt) and carrier.auto:
                try:
                    self._attach(device, carrier)
                except VfioError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    continue
                return self.number_of(carrier)
        number = self.alloc_hwpt(device, ioas, nest_parent=False, auto=True)
        try:
            self._attach(device, self.get(number, PagingHwpt))
        except BaseException:
            self._destroy(number, self.objects[number])
            raise
        return number

    def _attach(self, device: BoundDevice, hwpt: Hwpt) -> None:
        bound, old = device.group, device.group.hwpt
        if not device.attached and old is not None and old is not hwpt:
            raise VfioError(
                errno.EINVAL, "attach", "its group is in another page table", device=device.pci.name
            )
        if device.attached and old is hwpt:
            return
        moving = bound.attached if device.attached else [device]
        with self._reserving(moving, old if device.attached else None, hwpt), as_vfio_errors("attach"):
            if device.attached:
                bound.group.replace(hwpt.domain)
            elif not bound.attached:
                bound.group.attach(hwpt.domain)
        if not device.attached:
            bound.attached.append(device)
        if old is not hwpt:
            hwpt.groups.append(bound.group)
            bound.hwpt = hwpt
        self.use(hwpt, len(moving))
        if old is not None and old is not hwpt:
            old.groups.remove(bound.group)
            if old.paging.ioas is not hwpt.paging.ioas:
                for member in moving:
                    old.paging.ioas.iovas.release(member)
            for _ in moving:
                self._put_hwpt(old)

    def _reserving(self, devices: list[BoundDevice], old: Hwpt | None, new: Hwpt) -> _Reserving:
        same = old is not None and old.paging.ioas is new.paging.ioas
        return _Reserving([] if same else devices, new.paging.ioas)

    def _put_hwpt(self, hwpt: Hwpt) -> None:
        """A device left a page table; one that was made for the attachment goes with the last of them."""
        self.use(hwpt, -1)
        number = self.number_of(hwpt)
        if isinstance(hwpt, PagingHwpt) and hwpt.auto and not self._users[number]:
            self._destroy(number, hwpt)

    def _destroy(self, number: int, thing: object) -> None:
        if isinstance(thing, Ioas | Hwpt):
            thing.close()
        del self.objects[number], self._users[number]
        if isinstance(thing, PagingHwpt):
            self.use(thing.ioas, -1)
        elif isinstance(thing, NestedHwpt):
            self.use(thing.parent, -1)

    def _collect(self) -> None:
        """The file is closed: every object that nothing uses goes, until none is left or a device keeps it."""
        while True:
            idle = [
                n
                for n, thing in self.objects.items()
                if not self._users[n] and not isinstance(thing, BoundDevice)
            ]
            if not idle:
                return
            for number in idle:
                self._destroy(number, self.objects[number])


class _Reserving:
    """Reserves devices' regions in an address space for as long as nothing raises inside."""

    def __init__(self, devices: list[BoundDevice], ioas: Ioas) -> None:
        self._devices = devices
        self._ioas = ioas
        self._done: list[BoundDevice] = []

    def __enter__(self) -> None:
        try:
            for device in self._devices:
                self._ioas.iovas.reserve(device, device.reserved)
                self._done.append(device)
        except BaseException:
            self._undo()
            raise

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        if kind is not None:
            self._undo()

    def _undo(self) -> None:
        for device in self._done:
            self._ioas.iovas.release(device)
