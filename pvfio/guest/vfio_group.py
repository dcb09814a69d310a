"""A group and its file (/dev/vfio/N): who may open it, its container, and the way to its devices.

Opened by one at a time. A file that is closed while devices of it are open lives on until they are closed;
then the group leaves its container and can be opened again. Rules and errnos: Linux vfio_main.c.

A device of it that is bound to an iommufd through its own file (vfio_cdev.py) keeps the group's file closed.

Not modelled: KVM's reference to a group.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any

import trio

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.guest.vfio_container import ContainerFile
from pvfio.guest.vfio_files import FileTable, argument
from pvfio.guest.vfio_pci import DeviceFile, VfioPciDevice

if TYPE_CHECKING:
    from pvfio.guest.iommu_group import IommuGroup

__all__ = ["GroupFile", "VfioGroup"]

_log = logging.getLogger("pvfio.guest.vfio_group")

_NAME_MAX = 4096


class VfioGroup:
    """VFIO's side of an IOMMU group; ``devices`` are those bound to vfio-pci, by name."""

    def __init__(self, iommu_group: IommuGroup, files: FileTable) -> None:
        self.iommu_group = iommu_group
        self.devices: dict[str, VfioPciDevice] = {}
        self.container: ContainerFile | None = None
        self.files = files
        self._file: GroupFile | None = None
        self._device_users = 0
        self._cdev_users = 0

    @property
    def id(self) -> int:
        """The group's number."""
        return self.iommu_group.id

    @property
    def in_use(self) -> bool:
        """Whether its file, or a device of it, is open."""
        return self._file is not None or self._cdev_users > 0

    def open(self) -> GroupFile:
        """Opens the group's file.

        Raises ENODEV with no device bound to vfio-pci, EBUSY while it is open, and what the host's refusal
        means where its devices could not be blocked when it was closed.
        """
        if not self.devices:
            raise VfioError(errno.ENODEV, f"open group {self.id}", "no device is bound to vfio-pci")
        if self._file is not None or self._cdev_users:
            raise VfioError(errno.EBUSY, f"open group {self.id}", "it, or a device of it, is open")
        if self.container is not None:
            # Its devices could not be blocked when it was closed.
            self.unset_container()
        self._file = GroupFile(self)
        return self._file

    def block(self) -> None:
        """A device of it is being bound to an iommufd: it cannot be opened until ``unblock``. Raises EBUSY."""
        if self._file is not None:
            raise self._error(errno.EBUSY, "BIND_IOMMUFD", "the group is open")
        self._cdev_users += 1

    def unblock(self) -> None:
        """The counterpart of ``block``."""
        self._cdev_users -= 1

    def set_container(self, fd: int) -> None:
        """Puts the group into the container of that file number."""
        container = self.files.get(fd)
        if self.container is not None:
            raise self._error(errno.EINVAL, "SET_CONTAINER", "it has a container")
        if not isinstance(container, ContainerFile):
            raise self._error(errno.EINVAL, "SET_CONTAINER", f"file {fd} is no container")
        container.attach(self.iommu_group)
        self.container = container

    def unset_container(self) -> None:
        """Takes the group out of its container."""
        if self.container is None:
            raise self._error(errno.EINVAL, "UNSET_CONTAINER", "it has no container")
        if self._device_users:
            raise self._error(errno.EBUSY, "UNSET_CONTAINER", f"{self._device_users} device files are open")
        self.container.detach(self.iommu_group)
        self.container = None

    async def open_device(self, name: str) -> DeviceFile:
        """Opens a device by name. Cancelled or failed: not opened."""
        device = self.devices.get(name)
        if device is None:
            raise self._error(errno.ENODEV, "GET_DEVICE_FD", f"no device {name!r}")
        if self.container is None or self.container.iommu is None:
            raise self._error(errno.EINVAL, "GET_DEVICE_FD", "its container has no IOMMU type")
        self._device_users += 1
        try:
            await device.open()
        except BaseException:
            self.drop_user()
            raise
        return DeviceFile(device, self, self.files)

    def drop_user(self) -> None:
        """A device file is gone; the last one may be what kept a closed group file."""
        self._device_users -= 1
        if self._file is not None and self._file.closed:
            self.release()

    def release(self) -> None:
        """The group's file is gone, if no device file keeps it: out of the container, and free to be opened.

        Where the host does not let its devices go, the group stays claimed, and opening it tries again.
        """
        if self._device_users:
            return
        self._file = None
        if self.container is not None:
            try:
                self.unset_container()
            except VfioError as error:
                _log.warning("group %d stays claimed: %s", self.id, error)

    def _error(self, number: int, operation: str, reason: str) -> VfioError:
        return VfioError(number, operation, f"group {self.id}: {reason}")


class GroupFile:
    """The one open file of a group."""

    def __init__(self, group: VfioGroup) -> None:
        self._group = group
        self.closed = False
        self.fd = group.files.install(self)

    def ioctl(self, request: int, arg: Any = 0) -> int:
        """A request that never sleeps. Raises VfioError; EBADF once closed, ENOTTY for an unknown request."""
        self._check()
        group = self._group
        if request == lib.VFIO_GROUP_GET_STATUS:
            self._get_status(arg)
        elif request == lib.VFIO_GROUP_SET_CONTAINER:
            if isinstance(arg, int) or arg == ffi.NULL:
                raise VfioError(errno.EFAULT, "SET_CONTAINER", "no file number")
            group.set_container(ffi.cast("int32_t *", arg)[0])
        elif request == lib.VFIO_GROUP_UNSET_CONTAINER:
            group.unset_container()
        elif request == lib.VFIO_GROUP_GET_DEVICE_FD:
            raise trio.WouldBlock
        else:
            raise VfioError(errno.ENOTTY, "group ioctl", f"request {request:#x}")
        return 0

    async def ioctl_sleeping(self, request: int, arg: Any = 0) -> int:
        """As ``ioctl``, and GET_DEVICE_FD, which returns the number of a device file. Cancelled: not opened."""
        await trio.lowlevel.checkpoint()
        if request != lib.VFIO_GROUP_GET_DEVICE_FD:
            return self.ioctl(request, arg)
        self._check()
        if isinstance(arg, int) or arg == ffi.NULL:
            raise VfioError(errno.EFAULT, "GET_DEVICE_FD", "no name")
        raw = ffi.string(ffi.cast("char *", arg), _NAME_MAX)
        if len(raw) == _NAME_MAX:
            raise VfioError(errno.EINVAL, "GET_DEVICE_FD", "a name without end")
        return (await self._group.open_device(raw.decode(errors="replace"))).fd

    def close(self) -> None:
        """Closes the file; what keeps the group in its container now is only its open devices. Safe to call
        twice.
        """
        if self.closed:
            return
        self.closed = True
        self._group.files.remove(self.fd)
        self._group.release()

    def _check(self) -> None:
        if self.closed:
            raise VfioError(errno.EBADF, f"group {self._group.id}", "closed")

    def _get_status(self, arg: Any) -> None:
        status = argument("vfio_group_status", arg, "GET_STATUS")
        status.flags = 0
        if self._group.container is not None:
            status.flags = lib.VFIO_GROUP_FLAGS_CONTAINER_SET | lib.VFIO_GROUP_FLAGS_VIABLE
        elif self._group.iommu_group.viable and self._group.iommu_group.owner is None:
            status.flags = lib.VFIO_GROUP_FLAGS_VIABLE
