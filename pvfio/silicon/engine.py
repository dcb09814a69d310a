"""Engines from Python: stop points, pausing, counts. Devices make engines in C; this is the handle they give out.

Does not model scheduling of any kind: a threaded engine is a native thread, an inline one runs in its callers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pvfio.abi import ffi, lib

EngineKind = Literal["inline", "thread"]
KINDS: dict[str, int] = {"inline": lib.PV_ENGINE_INLINE, "thread": lib.PV_ENGINE_THREAD}


@dataclass(frozen=True)
class EngineStats:
    """Descriptors begun, doorbells heard, times slept."""

    gates: int
    kicks: int
    sleeps: int


class Engine:
    """A device's engine. ``owner`` is what keeps the C engine alive."""

    def __init__(self, ptr: Any, owner: Any, kind: EngineKind) -> None:
        self.ptr = ptr
        self._owner = owner
        self.kind: EngineKind = kind

    def kick(self) -> None:
        """As a doorbell: an inline engine runs now, a thread is woken."""
        lib.pv_engine_kick(self.ptr)

    def stop_before(self, descriptors: int) -> None:
        """Sets a stop point after that many more descriptors (0: before the next); a negative number removes it."""
        lib.pv_engine_stop_before(self.ptr, descriptors)

    @property
    def stopped(self) -> bool:
        """True while the engine stands at a stop point."""
        return bool(lib.pv_engine_stopped(self.ptr))

    @property
    def stop_fd(self) -> int:
        """An eventfd, readable once the engine stands at a stop point. The engine's: do not close it."""
        return int(lib.pv_engine_stop_fd(self.ptr))

    def resume(self) -> None:
        """Goes on from a stop point; an inline engine does so in this call."""
        lib.pv_engine_resume(self.ptr)

    def pause(self) -> None:
        """Waits (briefly: for one step) until the engine does nothing, and keeps it so until ``unpause``. Nests.

        Where the bus is remote a step may wait for somebody: then this is for a worker thread.
        """
        lib.pv_engine_pause(self.ptr)

    def unpause(self) -> None:
        """Undoes one ``pause``."""
        lib.pv_engine_unpause(self.ptr)

    def stats(self) -> EngineStats:
        """Counts since the engine was made."""
        raw = ffi.new("struct pv_engine_stats *")
        lib.pv_engine_stats(self.ptr, raw)
        return EngineStats(raw.gates, raw.kicks, raw.sleeps)
