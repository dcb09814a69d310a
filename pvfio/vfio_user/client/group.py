"""A group: one server's socket, which one container at a time may have.

Opening it connects; taking it out of its container, or closing it, ends the connection, with which the server forgets
what was mapped and resets its device. Rules and errnos: Linux vfio_main.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import trio

from pvfio.errors import DeadlineExceeded, VfioError
from pvfio.vfio.container import Container
from pvfio.vfio.group import Group, GroupStatus
from pvfio.vfio_user.client.container import UserContainer
from pvfio.vfio_user.client.device import UserDevice
from pvfio.vfio_user.client.function import UserFunction
from pvfio.vfio_user.client.link import Link

__all__ = ["UserGroup"]


class UserGroup(Group):
    """Made by ``VfioUserVfio.open_group``."""

    def __init__(self, number: int, name: str, link: Link, nursery: Callable[[], trio.Nursery]) -> None:
        self.id = number
        self.name = name
        self.container: UserContainer | None = None
        self.closed = False
        self._link = link
        self._nursery = nursery
        self._function = UserFunction(link)
        self._devices: list[UserDevice] = []
        link.on_lost = self._lost

    def status(self) -> GroupStatus:
        self._check_open("GET_STATUS")
        return GroupStatus(viable=True, container_set=self.container is not None)

    def set_container(self, container: Container) -> None:
        self._check_open("SET_CONTAINER")
        if not isinstance(container, UserContainer):
            raise self._error(errno.EINVAL, "SET_CONTAINER", "a container of another backend")
        if container.closed:
            raise self._error(errno.EBADF, "SET_CONTAINER", "the container is closed")
        if self.container is not None:
            raise self._error(errno.EINVAL, "SET_CONTAINER", "it has a container")
        container.join(self._link)
        self.container = container

    def unset_container(self) -> None:
        self._check_open("UNSET_CONTAINER")
        if self.container is None:
            raise self._error(errno.EINVAL, "UNSET_CONTAINER", "it has no container")
        if self._function.users:
            raise self._error(errno.EBUSY, "UNSET_CONTAINER", "a device is open")
        self._leave()

    async def open_device(self, name: str) -> UserDevice:
        await trio.lowlevel.checkpoint()
        self._check_open("GET_DEVICE_FD")
        if name != self.name:
            raise self._error(errno.ENODEV, "GET_DEVICE_FD", f"no device {name[:80]!r}")
        container = self.container
        if container is None or not container.ready:
            raise self._error(errno.EINVAL, "GET_DEVICE_FD", "its container has no IOMMU type")
        await self._function.open(container, self._nursery())
        device = UserDevice(name, self._function, container)
        self._devices = [*(other for other in self._devices if other.is_open), device]
        return device

    async def close(self) -> None:
        """As the base class says. Raises DeadlineExceeded as closing a device does."""
        failed: DeadlineExceeded | None = None
        with trio.CancelScope(shield=True):
            for device in reversed(self._devices):
                try:
                    await device.close()
                except DeadlineExceeded as error:
                    failed = error
            self._devices.clear()
            if not self.closed:
                self.closed = True
                self._leave()
        if failed is not None:
            raise failed
        await trio.lowlevel.checkpoint_if_cancelled()

    def _leave(self) -> None:
        self._link.disconnect()
        container, self.container = self.container, None
        if container is not None:
            container.leave(self._link)

    def _lost(self) -> None:
        for device in self._devices:
            device.lost()

    def _check_open(self, operation: str) -> None:
        if self.closed:
            raise self._error(errno.EBADF, operation, "closed")

    def _error(self, number: int, operation: str, reason: str) -> VfioError:
        return VfioError(number, operation, f"group {self.id}: {reason}")
