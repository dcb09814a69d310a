"""Waiting for memory that a device writes, in C, with a deadline, as a trio citizen.

``Word`` is one aligned word (a phase bit, a status), ``Records`` the status bytes of many completion records.
Each has a look that never waits, a wait that blocks the thread (for polled drivers that want the lowest
latency), and a coroutine: one look, a spin of a few microseconds in C, then polls between trio sleeps of at
most 1 ms.

Not here: interrupts (``Irq.wait``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import trio

from pvfio.abi import ffi, lib
from pvfio.errors import DeadlineExceeded

__all__ = ["Records", "Word", "wait_records", "wait_word"]

_SPIN_NS = 20_000
_FIRST_NAP = 20e-6
_LONGEST_NAP = 1e-3


async def _poll(
    look: Callable[[int], bool], deadline: float, operation: str, device: str | None, spin_ns: int = _SPIN_NS
) -> None:
    """Until ``look(nanoseconds)`` is true; it is given 0 for a look, more for a spin."""
    if look(0) or look(spin_ns):
        await trio.lowlevel.checkpoint()
        return
    end = trio.current_time() + deadline
    nap = _FIRST_NAP
    while True:
        left = end - trio.current_time()
        await trio.sleep(max(0.0, min(nap, left)))
        if look(0):
            return
        if left <= 0:
            raise DeadlineExceeded(operation, deadline, device=device)
        nap = min(nap * 2, _LONGEST_NAP)


class Word:
    """One aligned word of 1, 2, 4 or 8 bytes that a device writes.

    ``array`` holds exactly one unsigned element (a 0-d or 1-element view, e.g. ``record["status"]``); the
    object keeps it alive. Raises ``ValueError`` for another shape, dtype or alignment.
    """

    def __init__(self, array: np.ndarray[Any, Any], *, mask: int | None = None) -> None:
        if array.size != 1 or array.dtype.kind != "u":
            raise ValueError("a word is one unsigned integer")
        self._array = array
        self._address = array.__array_interface__["data"][0]
        self._size = array.dtype.itemsize
        if self._address % self._size:
            raise ValueError(f"a word of {self._size} bytes at {self._address:#x} is not aligned")
        self._pointer = ffi.cast("void *", self._address)
        self._mask = (1 << 8 * self._size) - 1 if mask is None else mask
        self._value = ffi.new("uint64_t *")

    @property
    def value(self) -> int:
        """The word as the last look saw it, unmasked."""
        return int(self._value[0])

    def look(self, wanted: int, *, negate: bool = False, timeout_ns: int = 0) -> bool:
        """Whether ``word & mask == wanted`` (``!=`` with ``negate``), waiting up to ``timeout_ns`` in this
        thread.
        """
        rc = lib.pv_wait_word(self._pointer, self._size, self._mask, wanted, negate, timeout_ns, self._value)
        return bool(rc == 1)

    async def wait(
        self,
        wanted: int,
        *,
        negate: bool = False,
        deadline: float,
        operation: str = "wait for a word",
        device: str | None = None,
    ) -> int:
        """Until ``word & mask == wanted`` (``!=`` with ``negate``); returns the whole word.

        ``deadline`` is in seconds; raises ``DeadlineExceeded``. Cancelling it leaves nothing behind.
        """
        await _poll(lambda ns: self.look(wanted, negate=negate, timeout_ns=ns), deadline, operation, device)
        return self.value


class Records:
    """The status bytes of n completion records, ready when a bit of ``mask`` is set.

    ``status`` is a 1-D uint8 view, strided or not (``records["status"]``); the object keeps it alive. Raises
    ``ValueError`` for another shape or dtype.
    """

    def __init__(self, status: np.ndarray[Any, Any], *, mask: int = 0xFF) -> None:
        if status.ndim != 1 or status.dtype != np.uint8:
            raise ValueError("status bytes are a 1-D uint8 array")
        self._status = status
        self._pointer = ffi.cast("void *", status.__array_interface__["data"][0])
        self._stride = status.strides[0]
        self._mask = mask
        self.count = status.shape[0]

    def ready(self, timeout_ns: int = 0) -> int:
        """How many are ready; waits in this thread, up to ``timeout_ns``, while it is not all of them."""
        return int(lib.pv_wait_bytes(self._pointer, self._stride, self.count, self._mask, timeout_ns))

    async def wait(
        self, *, deadline: float, operation: str = "wait for completion records", device: str | None = None
    ) -> None:
        """Until all are ready.

        ``deadline`` is in seconds; raises ``DeadlineExceeded``. Cancelling it leaves nothing behind: the
        device goes on with what it was given.
        """
        await _poll(lambda ns: self.ready(ns) == self.count, deadline, operation, device)


async def wait_word(
    array: np.ndarray[Any, Any],
    wanted: int,
    *,
    mask: int | None = None,
    negate: bool = False,
    deadline: float,
    operation: str = "wait for a word",
    device: str | None = None,
) -> int:
    """``Word(array, mask=mask).wait(...)``, for a word that is waited for once."""
    return await Word(array, mask=mask).wait(
        wanted, negate=negate, deadline=deadline, operation=operation, device=device
    )


async def wait_records(
    status: np.ndarray[Any, Any],
    *,
    mask: int = 0xFF,
    deadline: float,
    operation: str = "wait for completion records",
    device: str | None = None,
) -> None:
    """``Records(status, mask=mask).wait(...)``, for records that are waited for once."""
    await Records(status, mask=mask).wait(deadline=deadline, operation=operation, device=device)
