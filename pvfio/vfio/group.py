"""A group: the devices that can only be owned together, because the IOMMU cannot tell them apart.

The abstract surface; the rules are in the guest kernel or in Linux.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pvfio.vfio.container import Container
from pvfio.vfio.device import Device

__all__ = ["Group", "GroupStatus"]


@dataclass(frozen=True)
class GroupStatus:
    """VFIO_GROUP_GET_STATUS: ``viable``: no kernel driver owns one of its devices; ``container_set``: it is
    in one.
    """

    viable: bool
    container_set: bool


class Group(ABC):
    """An open group. Use as ``async with``: leaving closes it, which takes it out of its container."""

    id: int

    async def __aenter__(self) -> Self:
        # Opening was the checkpoint: one here could be cancelled with nobody to close.
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @abstractmethod
    def status(self) -> GroupStatus:
        """Whether the group is viable and has a container."""

    @abstractmethod
    def set_container(self, container: Container) -> None:
        """Puts the group into a container of the same backend.

        Its devices are claimed (they can do no DMA until the container has an IOMMU type). Raises EPERM when
        the group is not viable, EINVAL when it has a container or its reserved ranges conflict with what is
        mapped there.
        """

    @abstractmethod
    def unset_container(self) -> None:
        """Takes the group out. Raises EBUSY while a device is open, EINVAL without a container."""

    @abstractmethod
    async def open_device(self, name: str) -> Device:
        """Opens a device of the group by its name ("0001:00:00.0"); the device is reset.

        Opened again while it is open, it is the same device and is not reset. Raises ENODEV for an unknown
        name, EINVAL before the container has an IOMMU type. Cancelled: not opened.
        """

    @abstractmethod
    async def close(self) -> None:
        """Closes the group; the last of it goes when its devices are closed. Safe to call twice; finishes if
        cancelled.
        """
