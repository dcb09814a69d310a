"""The far end of a table bus's remote ranges: memory that devices reach by asking for it."""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from typing import Any

import numpy as np

from pvfio.abi import ffi
from pvfio.silicon import READ, WRITE, TableBus

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class FarMemory:
    """Answers what ``bus`` asks, in whatever thread asks.

    ``before`` is called with every request's iova, size and direction, and may answer it with an errno. Each is also in
    ``requests``.
    """

    def __init__(self, bus: TableBus, before: Callable[[int, int, bool], int] | None = None) -> None:
        self.bus = bus
        self.before = before
        self.requests: list[tuple[int, int, bool]] = []
        self._starts: list[int] = []
        self._arrays: dict[int, Bytes] = {}
        self._function = ffi.callback("pv_remote_fn", self._answer, error=-errno.EIO)
        bus.set_remote(self._function)

    def map(self, iova: int, memory: Bytes, perm: int = READ | WRITE) -> None:
        """Puts an array there."""
        self.bus.map_remote(iova, memory.nbytes, perm)
        self._arrays[iova] = memory
        insort(self._starts, iova)

    def unmap(self, iova: int, size: int) -> None:
        """Takes out what is inside."""
        self.bus.unmap(iova, size)
        low, high = bisect_left(self._starts, iova), bisect_left(self._starts, iova + size)
        for start in self._starts[low:high]:
            del self._arrays[start]
        del self._starts[low:high]

    def close(self) -> None:
        """Nobody answers any more."""
        self.bus.set_remote(ffi.NULL)

    def _answer(self, argument: Any, iova: int, data: Any, size: int, write: int) -> int:
        self.requests.append((iova, size, bool(write)))
        error = self.before(iova, size, bool(write)) if self.before else 0
        if error:
            return -error
        at = bisect_right(self._starts, iova) - 1
        start = self._starts[max(at, 0)] if self._starts else 0
        memory = self._arrays.get(start)
        if at < 0 or memory is None or iova + size > start + memory.nbytes:
            return -errno.EFAULT
        part = memory[iova - start : iova - start + size]
        here = np.frombuffer(ffi.buffer(data, size), np.uint8)
        if write:
            part[:] = here
        else:
            here[:] = part
        return 0
