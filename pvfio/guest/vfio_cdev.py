"""A device's own file (/dev/vfio/devices/vfioN): bound to an iommufd it is the device, before that it is nothing.

Binding takes the device, and its group's DMA, for the iommufd; a group that is open through its own file refuses
(EBUSY), and refuses to be opened while a device of it is bound. A device is bound by one file at a time. Attaching
gives it an address space, attaching again replaces that without a gap, detaching blocks it. Rules and errnos: Linux
device_cdev.c, iommufd.c.

Not modelled: PASIDs (EOPNOTSUPP), KVM's reference, VF tokens, no-IOMMU.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import trio

from pvfio.abi import ffi, lib
from pvfio.guest.iommufd import BoundDevice, IommufdFile
from pvfio.guest.vfio_files import FileTable, argument
from pvfio.guest.vfio_pci import DeviceFile

if TYPE_CHECKING:
    from pvfio.guest.vfio_group import VfioGroup
    from pvfio.guest.vfio_pci import VfioPciDevice

__all__ = ["CdevFile"]

_EBADFD = 77
_BIND_SIZE = ffi.sizeof("struct vfio_device_bind_iommufd")
_ATTACH_SIZE = ffi.offsetof("struct vfio_device_attach_iommufd_pt", "pasid")
_DETACH_SIZE = ffi.offsetof("struct vfio_device_detach_iommufd_pt", "pasid")


class CdevFile(DeviceFile):
    """One open file of a device. Until it is bound every request but BIND_IOMMUFD is EINVAL."""

    def __init__(self, device: VfioPciDevice, group: VfioGroup, files: FileTable) -> None:
        super().__init__(device, group, files)
        self._iommufd: IommufdFile | None = None
        self._bound: BoundDevice | None = None

    def ioctl(self, request: int, arg: Any = 0) -> int:
        if request == lib.VFIO_DEVICE_BIND_IOMMUFD:
            self._check_open()
            raise trio.WouldBlock
        if request == lib.VFIO_DEVICE_ATTACH_IOMMUFD_PT:
            self._attach(arg)
        elif request == lib.VFIO_DEVICE_DETACH_IOMMUFD_PT:
            self._detach(arg)
        else:
            return super().ioctl(request, arg)
        return 0

    async def ioctl_sleeping(self, request: int, arg: Any = 0) -> int:
        """As ``ioctl``, and DEVICE_RESET and BIND_IOMMUFD. Cancelled while it binds: not bound."""
        if request != lib.VFIO_DEVICE_BIND_IOMMUFD:
            return await super().ioctl_sleeping(request, arg)
        await trio.lowlevel.checkpoint()
        self._check_open()
        bind = argument("vfio_device_bind_iommufd", arg, "BIND_IOMMUFD", _BIND_SIZE)
        if bind.flags or bind.iommufd < 0:
            raise self._device.error(errno.EINVAL, "BIND_IOMMUFD", "flags, or no file number")
        bind.out_devid = await self._bind(bind.iommufd)
        return 0

    async def close(self) -> None:
        """Closes the file; a bound device is reset, detached and given back. Safe to call twice; is not cancelled."""
        if not self._open:
            return
        self._open = False
        self._files.remove(self.fd)
        if self._bound is None or self._iommufd is None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        try:
            await self._device.close()
        finally:
            self._release(self._iommufd, self._bound)

    async def _bind(self, fd: int) -> int:
        """Binds to the iommufd of a file number and opens the device; returns its number there."""
        device, group = self._device, self._group
        group.block()
        try:
            if group.devices.get(device.pci.name) is not device:
                raise device.error(errno.ENODEV, "BIND_IOMMUFD", "not bound to vfio-pci any more")
            if self._iommufd is not None:
                raise device.error(errno.EINVAL, "BIND_IOMMUFD", "bound already")
            iommufd = self._files.get(fd)
            if not isinstance(iommufd, IommufdFile):
                raise device.error(_EBADFD, "BIND_IOMMUFD", f"file {fd} is no iommufd")
            if device.users or device.claimed:
                raise device.error(errno.EINVAL, "BIND_IOMMUFD", "bound by another file")
            bound = iommufd.bind(device.pci)
        except BaseException:
            group.unblock()
            raise
        self._iommufd, device.claimed = iommufd, True
        try:
            await device.open()
        except BaseException:
            self._release(iommufd, bound)
            raise
        if not self._open:
            # Closed meanwhile.
            with trio.CancelScope(shield=True):
                await device.close()
            self._release(iommufd, bound)
            raise device.error(errno.EBADF, "BIND_IOMMUFD", "closed")
        self._bound = bound
        return iommufd.number_of(bound)

    def _release(self, iommufd: IommufdFile, bound: BoundDevice) -> None:
        self._iommufd = self._bound = None
        self._device.claimed = False
        iommufd.unbind(bound)
        self._group.unblock()

    def _attach(self, arg: Any) -> None:
        iommufd, bound = self._access()
        request = argument("vfio_device_attach_iommufd_pt", arg, "ATTACH_IOMMUFD_PT", _ATTACH_SIZE)
        self._check_flags("ATTACH_IOMMUFD_PT", request.flags, lib.VFIO_DEVICE_ATTACH_PASID)
        request.pt_id = iommufd.attach(bound, request.pt_id)

    def _detach(self, arg: Any) -> None:
        iommufd, bound = self._access()
        request = argument("vfio_device_detach_iommufd_pt", arg, "DETACH_IOMMUFD_PT", _DETACH_SIZE)
        self._check_flags("DETACH_IOMMUFD_PT", request.flags, lib.VFIO_DEVICE_DETACH_PASID)
        iommufd.detach(bound)

    def _check_flags(self, operation: str, flags: int, pasid: int) -> None:
        if flags & ~pasid:
            raise self._device.error(errno.EINVAL, operation, f"flags {flags:#x}")
        if flags:
            raise self._device.error(errno.EOPNOTSUPP, operation, "the pvIOMMU has no PASIDs")

    def _check(self) -> None:
        self._access()

    def _check_open(self) -> None:
        super()._check()

    def _access(self) -> tuple[IommufdFile, BoundDevice]:
        super()._check()
        if self._iommufd is None or self._bound is None:
            raise self._device.error(errno.EINVAL, "device file", "not bound to an iommufd")
        return self._iommufd, self._bound
