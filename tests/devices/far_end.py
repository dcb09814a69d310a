"""Far ends that find out whether the trio thread is free while they are asked."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import trio

from pvfio.silicon import TableBus

LONGEST = 10.0  # seconds, for what takes no time


class Attentive:
    """Answers once the trio thread has done something meanwhile; a thread that is not free is a timeout."""

    def __init__(self, ask: Callable[[], object] = lambda: None) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ask = ask
        self.answers = 0

    def __call__(self, iova: int, size: int, write: bool) -> int:
        done = threading.Event()

        def answer() -> None:
            self._ask()
            done.set()

        self._token.run_sync_soon(answer)
        if not done.wait(LONGEST):
            return errno.ETIMEDOUT
        self.answers += 1
        return 0


class Held:
    """Keeps whoever asks for a certain range until told to let go, or the bus is cancelled."""

    def __init__(self, start: int, size: int, bus: Callable[[], TableBus]) -> None:
        self._range = range(start, start + size)
        self._bus = bus
        self.inside = threading.Event()
        self.let_go = threading.Event()
        self.cancelled = 0

    def __call__(self, iova: int, size: int, write: bool) -> int:
        if iova not in self._range or self.let_go.is_set():
            return 0
        self.inside.set()
        for _ in range(int(LONGEST * 1000)):
            if self._bus().cancelled:
                self.cancelled += 1
                return errno.ECANCELED
            if self.let_go.wait(0.001):
                return 0
        return errno.ETIMEDOUT

    async def arrived(self) -> None:
        """Waits until somebody is inside."""
        assert await trio.to_thread.run_sync(self.inside.wait, LONGEST)
