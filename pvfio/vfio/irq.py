"""An interrupt index of a device: eventfds for its vectors, and waiting for them.

The eventfds are the user's side and live here; ``_set`` hands VFIO_DEVICE_SET_IRQS to the backend, which may wait.

A task that parks in trio costs some 40 us of processor time to wake, more than all the rest of a short command. So
whoever has just given a device something quick to do may first sleep for its interrupt in C (``soon``), which holds
the loop meanwhile: for at most 50 us and the kernel's timer slack (50 us unless it was set), and hardly ever where that
turns out to be in vain.
"""

from __future__ import annotations

import errno
import os
import struct
from abc import ABC, abstractmethod
from typing import Final

import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, VfioError

__all__ = ["Irq", "close_all"]

_NAP_NS: Final = 50_000
_VAIN: Final = 3  # naps in vain, before naps are left out
_LONGEST_PAUSE: Final = 1024  # how many are left out in a row, at most
_TEAR_DOWN: int = lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_TRIGGER


class _Nap:
    """Whether sleeping in C for one vector has lately been of use. In vain some times in a row, it is left out 16
    times, then after each time in vain twice as often; once it was of use it is worth trying again.
    """

    __slots__ = ("pause", "skip", "vain")

    def __init__(self) -> None:
        self.vain = self.skip = 0
        self.pause = 8

    def wanted(self) -> bool:
        if self.skip:
            self.skip -= 1
            return False
        return True

    def learn(self, count: int) -> None:
        if count:
            self.vain, self.pause = 0, 8
        elif self.vain < _VAIN:
            self.vain += 1
        else:
            self.skip = self.pause = min(2 * self.pause, _LONGEST_PAUSE)


class Irq(ABC):
    """``index`` VFIO_PCI_*_IRQ_INDEX, ``count`` vectors (0: the device has none), ``flags`` VFIO_IRQ_INFO_*."""

    def __init__(self, device: str, index: int, count: int, flags: int) -> None:
        self.device = device
        self.index = index
        self.count = count
        self.flags = flags
        self._fds: list[int] = []
        self._naps: list[_Nap] = []

    @abstractmethod
    async def _set(self, flags: int, start: int, count: int, data: bytes = b"") -> None:
        """VFIO_DEVICE_SET_IRQS; after a checkpoint, so it need not be one. Raises VfioError. Cancelled: not set, unless
        it tears down, which it finishes.
        """

    @property
    def enabled(self) -> int:
        """How many vectors have an eventfd."""
        return len(self._fds)

    async def enable(self, n: int = 1) -> None:
        """Makes eventfds for vectors 0 to n - 1 and enables the index.

        Raises VfioError EINVAL when it is enabled, when another index is (INTx, MSI and MSI-X exclude each
        other), or for more vectors than there are. Cancelled: not enabled.
        """
        await trio.lowlevel.checkpoint()
        if self._fds or n < 1:
            raise VfioError(
                errno.EINVAL, "enable interrupts", "enabled already" if self._fds else "", device=self.device
            )
        fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(n)]
        flags = lib.VFIO_IRQ_SET_DATA_EVENTFD | lib.VFIO_IRQ_SET_ACTION_TRIGGER
        try:
            await self._set(flags, 0, n, struct.pack(f"={n}i", *fds))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self._fds, self._naps = fds, [_Nap() for _ in fds]

    async def disable(self) -> None:
        """Tears the index down and closes its eventfds; tasks that wait get trio.ClosedResourceError.

        Nothing happens when it is not enabled. Cancelled: still enabled, unless it had begun.
        """
        await trio.lowlevel.checkpoint()
        fds = self._take()
        if fds:
            try:
                await self._set(_TEAR_DOWN, 0, 0)
            finally:
                close_all(fds)

    async def wait(self, vector: int = 0, *, deadline: float) -> int:
        """Waits until the vector has fired; returns how often it has since the last wait (at least 1).

        ``deadline`` is in seconds; raises DeadlineExceeded. Raises VfioError EINVAL for a vector that is not
        enabled, trio.ClosedResourceError when it is disabled meanwhile. Cancelled: no interrupt is lost.
        """
        with trio.move_on_after(deadline):
            return await self.fired(vector)
        raise DeadlineExceeded(f"wait for interrupt {self.index}.{vector}", deadline, device=self.device)

    async def fired(self, vector: int = 0) -> int:
        """As ``wait``, for a caller whose scope has a deadline already."""
        fd = self.fd(vector)
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            if self._fds[vector : vector + 1] != [fd]:
                raise trio.ClosedResourceError(f"interrupts of {self.device} were disabled")
            try:
                count = os.eventfd_read(fd)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(fd)
                waited = True
                continue
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
            return count

    def soon(self, vector: int = 0) -> int:
        """How often the vector has fired since the last wait, asleep for at most 50 us (and the kernel's timer slack)
        until it does: 0 when it has not, when it is not enabled, or when lately it never did so soon and this is one of
        those times in which nobody sleeps at all. No other task runs meanwhile: for a caller whose device is about to
        be done.
        """
        if not 0 <= vector < len(self._fds) or not self._naps[vector].wanted():
            return 0
        count: int = lib.pv_wait_event(self._fds[vector], _NAP_NS)
        self._naps[vector].learn(count)
        return count

    def wait_nowait(self, vector: int = 0) -> int:
        """How often the vector has fired since the last wait; raises trio.WouldBlock when it has not."""
        try:
            return os.eventfd_read(self.fd(vector))
        except BlockingIOError:
            raise trio.WouldBlock from None

    async def trigger(self, vector: int = 0) -> None:
        """Fires a vector from here (loopback), as if the device had. Cancelled: not fired."""
        await trio.lowlevel.checkpoint()
        await self._set(lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_TRIGGER, vector, 1)

    async def mask(self, vector: int = 0) -> None:
        """Masks. INTx only: MSI and MSI-X raise VfioError ENOTTY, as Linux does. Cancelled: not masked."""
        await trio.lowlevel.checkpoint()
        await self._set(lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_MASK, vector, 1)

    async def unmask(self, vector: int = 0) -> None:
        """Unmasks; INTx masks itself whenever it fires. Otherwise as ``mask``."""
        await trio.lowlevel.checkpoint()
        await self._set(lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_UNMASK, vector, 1)

    def fd(self, vector: int = 0) -> int:
        """The eventfd of a vector; it stays this object's. Raises VfioError EINVAL for one that is not
        enabled.
        """
        if not 0 <= vector < len(self._fds):
            raise VfioError(
                errno.EINVAL, f"interrupt {self.index}.{vector}", "not enabled", device=self.device
            )
        return self._fds[vector]

    def _take(self) -> list[int]:
        """The eventfds of an index that is being torn down; waiting tasks are told."""
        fds, self._fds = self._fds, []
        for fd in fds:
            trio.lowlevel.notify_closing(fd)
        return fds


def close_all(fds: list[int]) -> None:
    """Closes eventfds that ``_take`` gave."""
    for fd in fds:
        os.close(fd)
