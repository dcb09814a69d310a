"""iommufd: IO address spaces and hardware page tables as objects of their own, and devices that change between them.

An ``Iommufd`` makes address spaces (``Ioas``) and page tables (``Hwpt``); a device bound to it (``IommufdDevice``) is
attached to one and may be moved to another while it makes DMA. An ``Ioas`` is a ``Container``, so a driver that
allocates and maps through ``device.container`` runs unchanged. Errors are ``VfioError`` with iommufd's errnos,
which differ from type1's: an unmap that finds nothing, or would split a mapping, is ENOENT.

The abstract kernel is a file of requests (``KernelFile``), as in ``ioctl.py``; what a request means is the
kernel's. Not here: fault queues, vIOMMU objects, PASIDs, dirty tracking (which an x86-64 stage 1 has not:
EOPNOTSUPP).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.vfio.container import Container
from pvfio.vfio.ioas import EVERYTHING, Ioas, address_of, command_of
from pvfio.vfio.ioctl import IoctlDevice

if TYPE_CHECKING:
    from pvfio.vfio.ioctl import BufferSource, KernelDeviceFile, KernelFile

__all__ = ["EVERYTHING", "HwInfo", "Hwpt", "Ioas", "Iommufd", "IommufdDevice"]


@dataclass(frozen=True)
class HwInfo:
    """IOMMU_GET_HW_INFO: the kind (IOMMU_HW_INFO_TYPE_*), VT-d's capability registers, IOMMU_HW_CAP_* bits."""

    type: int
    cap_reg: int
    ecap_reg: int
    capabilities: int


class Iommufd:
    """An open /dev/iommu. Use as ``async with``: leaving closes it, with every object that no device keeps.

    ``file`` carries the requests, ``memory`` is where ``Ioas.alloc`` takes buffers from. Requests never wait, so they
    have no awaited form, but for closing.
    """

    def __init__(self, file: KernelFile, memory: BufferSource) -> None:
        self.file = file
        self.memory = memory
        self.closed = False

    async def __aenter__(self) -> Self:
        # Opening was the checkpoint: one here could be cancelled with nobody to close.
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the file. Objects live on while a bound device uses them. Safe to call twice; finishes if
        cancelled.
        """
        if not self.closed:
            self.closed = True
            with trio.CancelScope(shield=True):
                await self.file.close()
        await trio.lowlevel.checkpoint_if_cancelled()

    def alloc_ioas(self) -> Ioas:
        """A new, empty address space."""
        command = command_of("iommu_ioas_alloc")
        self.file.ioctl(lib.IOMMU_IOAS_ALLOC, command)
        return Ioas(self, command.out_ioas_id)

    def alloc_hwpt(self, device: IommufdDevice, ioas: Ioas, *, flags: int = 0) -> Hwpt:
        """A page table that carries ``ioas`` out, filled with what is mapped there, for devices like ``device``.

        ``flags``: IOMMU_HWPT_ALLOC_NEST_PARENT; IOMMU_HWPT_ALLOC_DIRTY_TRACKING is EOPNOTSUPP here. Raises EADDRINUSE
        (a mapping or an allowed range outside the aperture), EFAULT, ENOMEM.
        """
        return self._alloc_hwpt(device, ioas, ioas.id, flags, lib.IOMMU_HWPT_DATA_NONE, None)

    def alloc_nested(self, device: IommufdDevice, parent: Hwpt, root: int, *, width: int = 48) -> Hwpt:
        """A page table that the caller manages, over ``parent`` (made with IOMMU_HWPT_ALLOC_NEST_PARENT).

        It is in x86-64 format, in memory mapped in the parent's address space; ``root``, and every address in it,
        is an IOVA there. ``width``: 48 for 4 levels, 57 for 5. Changes are seen after ``Hwpt.invalidate``; what was
        not present may be seen before. Raises EINVAL, EOPNOTSUPP, ENOSPC (too large to be shadowed), ENOMEM.
        """
        data = ffi.new("struct iommu_hwpt_vtd_s1 *")
        data.pgtbl_addr = root
        data.addr_width = width
        return self._alloc_hwpt(device, parent.ioas, parent.id, 0, lib.IOMMU_HWPT_DATA_VTD_S1, data)

    def hw_info(self, device: IommufdDevice) -> HwInfo:
        """What the IOMMU behind a device can do."""
        data = ffi.new("struct iommu_hw_info_vtd *")
        command = command_of(
            "iommu_hw_info", dev_id=device.id, data_len=ffi.sizeof(data[0]), data_uptr=address_of(data)
        )
        self.file.ioctl(lib.IOMMU_GET_HW_INFO, command)
        return HwInfo(command.out_data_type, data.cap_reg, data.ecap_reg, command.out_capabilities)

    def destroy(self, number: int) -> None:
        """Destroys an object by its number. Raises ENOENT, EBUSY while it is in use."""
        self.file.ioctl(lib.IOMMU_DESTROY, command_of("iommu_destroy", id=number))

    def option(self, option: int, *, object_id: int = 0, value: int | None = None) -> int:
        """Sets (or, without ``value``, reads) IOMMU_OPTION_RLIMIT_MODE or IOMMU_OPTION_HUGE_PAGES; returns the
        value.
        """
        op = lib.IOMMU_OPTION_OP_GET if value is None else lib.IOMMU_OPTION_OP_SET
        command = command_of("iommu_option", option_id=option, op=op, object_id=object_id, val64=value or 0)
        self.file.ioctl(lib.IOMMU_OPTION, command)
        return int(command.val64)

    def _alloc_hwpt(
        self, device: IommufdDevice, ioas: Ioas, over: int, flags: int, kind: int, data: Any
    ) -> Hwpt:
        command = command_of("iommu_hwpt_alloc", flags=flags, dev_id=device.id, pt_id=over, data_type=kind)
        if data is not None:
            command.data_len = ffi.sizeof(data[0])
            command.data_uptr = address_of(data)
        self.file.ioctl(lib.IOMMU_HWPT_ALLOC, command)
        return Hwpt(self, command.out_hwpt_id, ioas)


class Hwpt:
    """A hardware page table: ``id``, and the address space it carries out or, nested, translates into."""

    def __init__(self, iommufd: Iommufd, number: int, ioas: Ioas) -> None:
        self.iommufd = iommufd
        self.id = number
        self.ioas = ioas

    def invalidate(self, iova: int = 0, pages: int = EVERYTHING) -> None:
        """Nested only: what the caller changed in its table, in ``pages`` 4 KiB pages from ``iova`` on, is seen now.

        When it returns no device uses anything older there. Raises EINVAL (not nested, alignment), ENOSPC, ENOMEM.
        """
        entry = ffi.new("struct iommu_hwpt_vtd_s1_invalidate *")
        entry.addr = iova
        entry.npages = pages
        command = command_of(
            "iommu_hwpt_invalidate",
            hwpt_id=self.id,
            data_uptr=address_of(entry),
            data_type=lib.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
            entry_len=ffi.sizeof(entry[0]),
            entry_num=1,
        )
        self.iommufd.file.ioctl(lib.IOMMU_HWPT_INVALIDATE, command)

    def set_dirty_tracking(self, on: bool = True) -> None:
        """EOPNOTSUPP where the format has no exact dirty bits, as the x86-64 stage 1."""
        flags = lib.IOMMU_HWPT_DIRTY_TRACKING_ENABLE if on else 0
        command = command_of("iommu_hwpt_set_dirty_tracking", flags=flags, hwpt_id=self.id)
        self.iommufd.file.ioctl(lib.IOMMU_HWPT_SET_DIRTY_TRACKING, command)

    def destroy(self) -> None:
        """Destroys it. Raises EBUSY while a device is attached or a nested one is over it."""
        self.iommufd.destroy(self.id)


class IommufdDevice(IoctlDevice):
    """A device bound to an iommufd through its own file: ``id`` is its number there. Made by ``bind``.

    ``container`` is the address space it is attached to; asking for it while there is none raises EINVAL.
    """

    def __init__(self, name: str, file: KernelDeviceFile, iommufd: Iommufd, number: int) -> None:
        self._ioas: Ioas | None = None
        self.iommufd = iommufd
        self.id = number
        super().__init__(name, file, None)

    @classmethod
    async def bind(cls, name: str, file: KernelDeviceFile, iommufd: Iommufd) -> Self:
        """Binds the device of an open cdev; it is reset, and blocked until it is attached.

        Raises EBUSY (its group is open), EINVAL (bound already), EPERM (a kernel driver or another iommufd owns its
        group). Cancelled: not bound, and the file is closed.
        """
        try:
            command = command_of("vfio_device_bind_iommufd", iommufd=iommufd.file.fd)
            await file.ioctl_sleeping(lib.VFIO_DEVICE_BIND_IOMMUFD, command)
            return cls(name, file, iommufd, command.out_devid)
        except BaseException:
            with trio.CancelScope(shield=True):
                await file.close()
            raise

    @property
    def container(self) -> Container:
        if self._ioas is None:
            raise VfioError(errno.EINVAL, "container", "attached to no address space", device=self.name)
        return self._ioas

    @container.setter
    def container(self, container: Container) -> None:
        raise TypeError("attach() gives a device its address space")

    def attach(self, where: Ioas | Hwpt) -> int:
        """Attaches the device to a page table, or to an address space (the kernel finds or makes a page table).

        Where it is attached already this replaces the page table: every DMA goes through the old or the new one,
        none is refused in between, and when it returns none goes through the old one. Returns the page table's
        number. Raises ENOENT, EINVAL (another device of its group is elsewhere), EADDRINUSE (its reserved or
        unreachable IOVAs are mapped or allowed), EFAULT, ENOMEM; it is where it was then.
        """
        command = command_of("vfio_device_attach_iommufd_pt", pt_id=where.id)
        self.file.ioctl(lib.VFIO_DEVICE_ATTACH_IOMMUFD_PT, command)
        self._moved(where if isinstance(where, Ioas) else where.ioas)
        return int(command.pt_id)

    def detach(self) -> None:
        """Blocks the device; nothing where it is not attached."""
        self.file.ioctl(lib.VFIO_DEVICE_DETACH_IOMMUFD_PT, command_of("vfio_device_detach_iommufd_pt"))
        self._moved(None)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._open

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            self._moved(None)

    def _moved(self, ioas: Ioas | None) -> None:
        old, self._ioas = self._ioas, ioas
        if old is not None:
            old.users -= 1
            old.refresh()
        if ioas is not None:
            ioas.users += 1
            ioas.refresh()
