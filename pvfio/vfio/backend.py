"""The way into a backend: containers and groups by hand, or one device with everything it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from pvfio.vfio.container import Container
from pvfio.vfio.device import Device
from pvfio.vfio.group import Group
from pvfio.vfio.iommufd import Ioas, Iommufd, IommufdDevice

__all__ = ["Backend"]


class Backend(ABC):
    """Where containers and groups come from."""

    @abstractmethod
    async def open_container(self) -> Container:
        """A new, empty container. Cancelled: none."""

    @abstractmethod
    async def open_group(self, group_id: int) -> Group:
        """Opens a group by number. Raises ENOENT for no such group, EBUSY when it is open. Cancelled: not
        opened.
        """

    @abstractmethod
    def group_of(self, name: str) -> int:
        """The number of the group a device is in, by the device's name. Raises ENODEV for an unknown name."""

    @abstractmethod
    async def open_iommufd(self) -> Iommufd:
        """A new iommufd. Cancelled: none."""

    @abstractmethod
    async def bind_device(self, name: str, iommufd: Iommufd) -> IommufdDevice:
        """Opens a device's own file by the device's name, and binds it to an iommufd of the same backend.

        Raises ENOENT for an unknown name, and what ``IommufdDevice.bind`` raises. Cancelled: not bound.
        """

    @asynccontextmanager
    async def open_device(self, name: str, *, container: Container | None = None) -> AsyncIterator[Device]:
        """A device by name, in a container of its own or, when given, in one that other devices share.

        An ``Ioas`` as container: through the device's own file, bound to the address space's iommufd and attached.
        Leaving closes the device (which resets it), the group, and the container it made, in that order, also when
        cancelled. Raises what the single steps raise, after undoing the ones before.
        """
        async with AsyncExitStack() as stack:
            if isinstance(container, Ioas):
                bound = await stack.enter_async_context(await self.bind_device(name, container.iommufd))
                bound.attach(container)
                yield bound
                return
            group_id = self.group_of(name)
            if container is None:
                container = await stack.enter_async_context(await self.open_container())
            group = await stack.enter_async_context(await self.open_group(group_id))
            group.set_container(container)
            if not container.ready:
                await container.set_iommu()
            yield await stack.enter_async_context(await group.open_device(name))
