"""The emulated backend: VFIO over the guest kernel of a machine in this process.

Only the machine's own DmaBuffers can be mapped; other memory is EFAULT. Register accesses, maps and unmaps
never wait, so every ``_nowait`` twin works.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio

from pvfio.vfio.backend import Backend
from pvfio.vfio.ioctl import IoctlContainer, IoctlGroup
from pvfio.vfio.iommufd import Iommufd, IommufdDevice

if TYPE_CHECKING:
    from pvfio.guest.iommufd import IommufdFile
    from pvfio.guest.kernel import GuestKernel
    from pvfio.guest.vfio_container import ContainerFile
    from pvfio.guest.vfio_group import GroupFile
    from pvfio.vfio.ioctl import BufferSource

__all__ = ["EmulatedVfio"]


class _File:
    """A container's, iommufd's or group's file: their closing never sleeps, nor do their requests but one."""

    def __init__(self, file: ContainerFile | GroupFile | IommufdFile) -> None:
        self._file = file
        self.fd = file.fd
        self.ioctl = file.ioctl

    async def ioctl_sleeping(self, request: int, arg: Any) -> int:
        await trio.lowlevel.checkpoint()
        return self.ioctl(request, arg)

    async def close(self) -> None:
        self._file.close()
        await trio.lowlevel.checkpoint()


class _GroupFile(_File):
    def __init__(self, file: GroupFile) -> None:
        super().__init__(file)
        self._group = file

    async def ioctl_sleeping(self, request: int, arg: Any) -> int:
        return await self._group.ioctl_sleeping(request, arg)


class EmulatedVfio(Backend):
    """VFIO of one guest. Use as ``async with`` to close what is left open, or call ``close``.

    ``kernel`` is the guest's, ``memory`` its RAM, where ``alloc`` takes its buffers from.
    """

    def __init__(self, kernel: GuestKernel, memory: BufferSource) -> None:
        self.kernel = kernel
        self.memory = memory
        self._containers: list[IoctlContainer] = []
        self._groups: list[IoctlGroup] = []
        self._iommufds: list[Iommufd] = []
        self._bound: list[IommufdDevice] = []

    async def __aenter__(self) -> Self:
        # Opening was the checkpoint: one here could be cancelled with nobody to close.
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def devices(self) -> dict[str, int]:
        """The devices userspace can have: name -> number of its group."""
        groups = self.kernel.vfio.groups
        return {name: number for number, group in sorted(groups.items()) for name in group.devices}

    def group_of(self, name: str) -> int:
        group = self.kernel.device(name).iommu_group
        return -1 if group is None else group.id

    async def open_container(self) -> IoctlContainer:
        await trio.lowlevel.checkpoint()
        file = self.kernel.vfio.open_container()
        container = IoctlContainer(_File(file), self.memory, file)
        self._containers = [*(other for other in self._containers if not other.closed), container]
        return container

    async def open_group(self, group_id: int) -> IoctlGroup:
        await trio.lowlevel.checkpoint()
        file = _GroupFile(self.kernel.vfio.open_group(group_id))
        group = IoctlGroup(group_id, file, self.kernel.vfio.device_file)
        self._groups = [*(other for other in self._groups if not other.closed), group]
        return group

    async def open_iommufd(self) -> Iommufd:
        await trio.lowlevel.checkpoint()
        iommufd = Iommufd(_File(self.kernel.vfio.open_iommufd()), self.memory)
        self._iommufds = [*(other for other in self._iommufds if not other.closed), iommufd]
        return iommufd

    async def bind_device(self, name: str, iommufd: Iommufd) -> IommufdDevice:
        device = await IommufdDevice.bind(name, self.kernel.vfio.open_cdev(name), iommufd)
        self._bound = [*(other for other in self._bound if not other.closed), device]
        return device

    async def close(self) -> None:
        """Closes every device, group, container and iommufd that is still open. Safe to call twice; finishes if
        cancelled.
        """
        with trio.CancelScope(shield=True):
            for device in reversed(self._bound):
                await device.close()
            for group in reversed(self._groups):
                await group.close()
            for container in self._containers:
                await container.close()
            for iommufd in self._iommufds:
                await iommufd.close()
        self._bound.clear()
        self._iommufds.clear()
        self._groups.clear()
        self._containers.clear()
        await trio.lowlevel.checkpoint_if_cancelled()
