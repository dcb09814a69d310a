"""An open device of a vfio-user server, and its interrupts. What users of a device share is in function.py."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import trio

from pvfio.abi import lib
from pvfio.errors import VfioError
from pvfio.vfio.device import Device
from pvfio.vfio.irq import Irq, close_all
from pvfio.vfio.region import Region
from pvfio.vfio_user.client.region import UserRegion

if TYPE_CHECKING:
    from pvfio.vfio.container import Container
    from pvfio.vfio_user.client.function import UserFunction

__all__ = ["UserDevice", "UserIrq"]

_TEAR_DOWN: int = lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_TRIGGER


class UserIrq(Irq):
    """Made by ``UserDevice.irq``."""

    def __init__(
        self, device: UserDevice, function: UserFunction, index: int, count: int, flags: int
    ) -> None:
        super().__init__(function.name, index, count, flags)
        self._owner = device
        self._function = function

    async def wait(self, vector: int = 0, *, deadline: float) -> int:
        """As the base class says; raises VfioError ENODEV where the server goes away."""
        try:
            return await super().wait(vector, deadline=deadline)
        except trio.ClosedResourceError:
            if self._function.link.connected:
                raise
            raise self._function.link.error(f"wait for interrupt {self.index}.{vector}") from None

    async def _set(self, flags: int, start: int, count: int, data: bytes = b"") -> None:
        self._owner.check_open("SET_IRQS")
        fds = struct.unpack(f"={len(data) // 4}i", data)
        await self._function.set_irqs(self.index, flags, start, count, fds)

    def lost(self) -> None:
        """The server has gone: tasks that wait are told."""
        for fd in self._fds:
            trio.lowlevel.notify_closing(fd)

    async def close(self) -> None:
        """The device is being closed."""
        fds = self._take()
        if fds:
            try:
                await self._function.set_irqs(self.index, _TEAR_DOWN, 0, 0, ())
            finally:
                close_all(fds)


class UserDevice(Device):
    """Made by ``UserGroup.open_device``."""

    def __init__(self, name: str, function: UserFunction, container: Container) -> None:
        self.name = name
        self.container = container
        self.info = function.info
        self._function = function
        self._regions: dict[int, UserRegion] = {}
        self._irqs: dict[int, UserIrq] = {}
        self._open = True

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return self._open

    def region(self, index: int) -> Region:
        self.check_open("GET_REGION_INFO")
        if index not in self._regions:
            known = self._function.regions
            if not 0 <= index < len(known):
                raise self._error(errno.EINVAL, "GET_REGION_INFO", f"region {index}")
            info = known[index]
            if isinstance(info, VfioError):
                raise info
            if index == lib.VFIO_PCI_VGA_REGION_INDEX and not info.size:
                raise self._error(errno.EINVAL, "GET_REGION_INFO", "it is no VGA device")
            self._regions[index] = UserRegion(self, self._function, info)
        return self._regions[index]

    def irq(self, index: int) -> Irq:
        self.check_open("GET_IRQ_INFO")
        if index not in self._irqs:
            known = self._function.irqs
            if not 0 <= index < len(known):
                raise self._error(errno.EINVAL, "GET_IRQ_INFO", f"interrupt index {index}")
            info = known[index]
            if isinstance(info, VfioError):
                raise info
            self._irqs[index] = UserIrq(self, self._function, index, info.count, info.flags)
        return self._irqs[index]

    async def reset(self) -> None:
        """As the base class says. Cancelled while it resets: what reset had changed may stay so."""
        await trio.lowlevel.checkpoint()
        self.check_open("DEVICE_RESET")
        await self._function.reset()

    async def close(self) -> None:
        """As the base class says. Raises DeadlineExceeded where the server does not say that DMA has ended."""
        if self._open:
            self._open = False
            with trio.CancelScope(shield=True):
                for region in self._regions.values():
                    region.close()
                for irq in self._irqs.values():
                    await irq.close()
                await self._function.close()
        await trio.lowlevel.checkpoint_if_cancelled()

    def lost(self) -> None:
        """The server has gone."""
        for irq in self._irqs.values():
            irq.lost()

    def check_open(self, operation: str) -> None:
        """Raises EBADF once it is closed."""
        if not self._open:
            raise self._error(errno.EBADF, operation, "closed")

    def _error(self, number: int, operation: str, reason: str) -> VfioError:
        return VfioError(number, operation, reason, device=self.name)
