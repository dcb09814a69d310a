"""The vfio-user backend: VFIO over devices that other processes serve on Unix sockets.

Each socket is a group with one device, which is named by the socket's path. Memory for DMA comes from a memfd of each
container, and goes to the servers as the file and an offset (or, without sharing, piece by piece as they ask). Only
such buffers can be mapped; other memory is EFAULT. A server to which memory is given can keep it: give it to those you
trust with it.

Whatever needs a server's answer waits, so ``_nowait`` twins raise trio.WouldBlock, but for doorbells and submissions.
There is no iommufd. Not modelled: twin sockets, migration.
"""

from __future__ import annotations

import errno
import itertools
import weakref
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

import trio

from pvfio.errors import VfioError
from pvfio.memory import GuestMemory
from pvfio.vfio.backend import Backend
from pvfio.vfio.iommufd import Iommufd, IommufdDevice
from pvfio.vfio_user.client.container import UserContainer
from pvfio.vfio_user.client.group import UserGroup
from pvfio.vfio_user.client.link import OWN_LIMITS, Link

__all__ = ["VfioUserVfio"]

_HOST_PRIVATE: Final = 4096


class VfioUserVfio(Backend):
    """VFIO over the servers at ``paths``. Use as ``async with``; leaving closes what is left open.

    ``ram``: bytes of DMA memory of each container, a multiple of 2 MiB, not taken before it is used. ``deadline``:
    seconds a server has for an answer, ``grace``: seconds it has after a request was cancelled. ``share=False``:
    servers get no file, and ask for every byte. ``max_dma_maps``: mappings of each container, at most; a buffer is
    one for each piece it is in. Raises ValueError for the same path twice.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        ram: int = 512 << 20,
        deadline: float = 5.0,
        grace: float = 1.0,
        share: bool = True,
        max_dma_maps: int = OWN_LIMITS.max_dma_maps,
    ) -> None:
        self.paths = tuple(paths)
        if len(set(self.paths)) != len(self.paths):
            raise ValueError("a path is there twice")
        self.ram = ram
        self.deadline = deadline
        self.share = share
        offer = replace(OWN_LIMITS, max_dma_maps=max_dma_maps)
        self._links = [Link(path, path, deadline=deadline, grace=grace, offer=offer) for path in self.paths]
        self.memories: weakref.WeakValueDictionary[int, GuestMemory] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._groups: list[UserGroup] = []
        self._containers: list[UserContainer] = []
        self._stack = AsyncExitStack()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.close()
        finally:
            # The listeners have ended and never raise: what is on its way out stays as it is, in no group.
            nursery, self._nursery = self._nursery, None
            if nursery is not None:
                nursery.cancel_scope.shield = True
            await self._stack.aclose()

    @property
    def devices(self) -> dict[str, int]:
        """The devices: name -> number of its group."""
        return {path: number for number, path in enumerate(self.paths)}

    def group_of(self, name: str) -> int:
        try:
            return self.paths.index(name)
        except ValueError:
            raise VfioError(
                errno.ENODEV, "find device", "no socket of that name", device=name[:120]
            ) from None

    async def open_container(self) -> UserContainer:
        await trio.lowlevel.checkpoint()
        container = UserContainer(self)
        self._containers = [*(other for other in self._containers if not other.closed), container]
        return container

    async def open_group(self, group_id: int) -> UserGroup:
        """As the base class says. Connects: raises VfioError (ENOENT, ECONNREFUSED, EACCES: no server that may be
        used), DeadlineExceeded.
        """
        await trio.lowlevel.checkpoint()
        if not 0 <= group_id < len(self.paths):
            raise VfioError(errno.ENOENT, f"open group {group_id}", "no such group")
        if any(group.id == group_id and not group.closed for group in self._groups):
            raise VfioError(errno.EBUSY, f"open group {group_id}", "it is open")
        link = self._links[group_id]
        group = UserGroup(group_id, self.paths[group_id], link, self._running)
        self._groups = [*(other for other in self._groups if not other.closed), group]
        try:
            await link.connect(self._running())
        except BaseException:
            group.closed = True
            raise
        return group

    async def open_iommufd(self) -> Iommufd:
        """Raises ENOENT: there is no /dev/iommu."""
        await trio.lowlevel.checkpoint()
        raise VfioError(errno.ENOENT, "open iommufd", "vfio-user has none")

    async def bind_device(self, name: str, iommufd: Iommufd) -> IommufdDevice:
        """Raises ENOENT: devices have no files of their own."""
        await trio.lowlevel.checkpoint()
        raise VfioError(errno.ENOENT, "bind device", "vfio-user has no iommufd", device=name[:120])

    def new_memory(self) -> GuestMemory:
        """DMA memory for a container. Raises MemoryError."""
        try:
            memory = GuestMemory(self.ram, host_private=_HOST_PRIVATE, seed=None)
        except OSError as error:
            raise MemoryError(str(error)) from None
        self.memories[next(self._numbers)] = memory
        return memory

    async def close(self) -> None:
        """Closes every device, group and container that is still open. Safe to call twice; finishes if cancelled."""
        with trio.CancelScope(shield=True):
            for group in reversed(self._groups):
                await group.close()
            for container in self._containers:
                await container.close()
        self._groups.clear()
        self._containers.clear()
        await trio.lowlevel.checkpoint_if_cancelled()

    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise RuntimeError("the backend is used inside of 'async with'")
        return self._nursery
