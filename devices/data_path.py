"""The C side of a device, from Python: how long it lives, and its engine between two steps.

Nothing of what a device does: that is each one's own.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from pvfio.abi import ffi, lib
from pvfio.silicon import BusMaster

__all__ = ["DataPath", "paused"]


class DataPath:
    """A C object with an engine. It lives as long as anybody holds ``ptr``.

    ``engine`` and ``destroy``: the C functions of its kind. Raises ``MemoryError`` where there is no object.
    """

    def __init__(
        self, ptr: Any, engine: Callable[[Any], Any], destroy: Callable[[Any], None], *, name: str
    ) -> None:
        if ptr == ffi.NULL:
            raise MemoryError(f"no room for {name}")
        self.ptr = ptr
        # Where a reference cycle dies, and at exit, the engine stops first of all: memory it writes may go next. Its
        # own memory goes with the last who holds the pointer: `finally` blocks of coroutines still look into it.
        weakref.finalize(self, _stop, engine, ptr)
        same = ffi.cast(ffi.typeof(ptr), ptr)
        weakref.finalize(ptr, destroy, same).atexit = False

    def keeps(self, mmio: Any) -> Any:
        """A ``struct pv_mmio *`` of the object, as one that keeps this alive."""
        return ffi.gc(mmio, self._let_go)

    def _let_go(self, mmio: Any) -> None:
        pass


def _stop(engine: Callable[[Any], Any], ptr: Any) -> None:
    lib.pv_engine_pause(engine(ptr))


@asynccontextmanager
async def paused(engine: Any, bus: BusMaster) -> AsyncIterator[None]:
    """Between two steps of a ``struct pv_engine *`` whose transfers are on this bus.

    Where a step may wait for somebody, a worker thread waits for its end. Cancelled while it waits: it waits on, and
    nothing is done then.
    """
    if bus.remote:
        await trio.to_thread.run_sync(lib.pv_engine_pause, engine)
    else:
        lib.pv_engine_pause(engine)
    try:
        await trio.lowlevel.checkpoint_if_cancelled()
        yield
    finally:
        lib.pv_engine_unpause(engine)
