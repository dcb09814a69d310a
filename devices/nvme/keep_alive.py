"""The keep alive timer (NVMe Base 2.0c 3.9): a host that falls silent finds its controller in fatal status.

Not modelled: traffic based keep alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from pvfio.abi import lib

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Command, Handler

__all__ = ["GRANULARITY", "KeepAlive"]

GRANULARITY: Final = 1
"""Identify's KAS: the timer goes in steps of that many 100 ms."""


class KeepAlive:
    """The timer. ``expired`` is called from the device's task."""

    def __init__(self, expired: Callable[[], None]) -> None:
        self._expired = expired
        self._timeout = 0.0
        self._again = trio.Event()

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_KEEP_ALIVE: self._keep_alive}

    def set_timeout(self, milliseconds: int) -> int:
        """Feature 0Fh: rounded up to the granularity; 0 stops the timer. Returns what it became."""
        step = 100 * GRANULARITY
        rounded = min(-(-milliseconds // step) * step, 0xFFFFFFFF)
        self._timeout = rounded / 1000
        self._again.set()
        return rounded

    async def run(self) -> None:
        """Waits for silence until cancelled."""
        while True:
            self._again = trio.Event()
            with trio.move_on_after(self._timeout or math.inf) as scope:
                await self._again.wait()
            if scope.cancelled_caught:
                self._timeout = 0.0
                self._expired()

    def _keep_alive(self, command: Command) -> int:
        self._again.set()
        return 0
