"""A device that never stops: what the IOMMU is for, and what tests of it hold against it.

Told where, its thread writes numbered words into a window of IOVAs, round and round, whatever happens: it does not
look at bus master enable, a function level reset does not stop it, and an aborted write is followed by the next. What
became of each write is known (``log``), so a checker can say where every one must be. Only a window of no size and
``close`` end it. Not modelled: a device that is of any use; reads.

Registers in BAR 0 (64-bit, 4 KiB), little endian, 64 bits each:

| offset | name | |
|---|---|---|
| 0x00 | IOVA | first byte of the window |
| 0x08 | SIZE | bytes, a multiple of 8; a write starts it, 0 stops it |
| 0x10 | NEXT | number of the next write; read only |
| 0x18 | LANDED | writes that reached memory; read only |
| 0x20 | ABORTED | writes that did not translate; read only |
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pvfio.abi import ffi, lib
from pvfio.devices.pci import Bar, PciFunction, PciIdentity
from pvfio.silicon import BusMaster, Engine

__all__ = ["RogueDevice", "RogueStats"]

_PAGE: Final = 0x1000
_IOVA, _SIZE, _NEXT, _LANDED, _ABORTED = 0x00, 0x08, 0x10, 0x18, 0x20


@dataclass(frozen=True)
class RogueStats:
    """``next`` is the number of the next write; the others count how the writes before it ended."""

    next: int
    landed: int
    aborted: int
    cancelled: int


class RogueDevice(PciFunction):
    """PCI 1234:11e9, class 0x00ff00.

    Its engine is always a thread. ``engine`` is the handle: ``pause`` it to look at ``log`` and the memory.
    ``log_shift``: the log holds the last 2**log_shift writes. ``ats``: it can have a device TLB. Raises
    ``MemoryError``.
    """

    LANDED: Final = lib.PV_ROGUE_LANDED
    ABORTED: Final = lib.PV_ROGUE_ABORTED
    CANCELLED: Final = lib.PV_ROGUE_CANCELLED

    def __init__(self, bus: BusMaster, *, log_shift: int = 20, ats: bool = False) -> None:
        ptr = lib.pv_rogue_create(bus.ptr, lib.PV_ENGINE_THREAD, log_shift)
        if ptr == ffi.NULL:
            raise MemoryError("no room for a rogue device")
        # The engine stops where the handle dies: memory that it writes may go next.
        weakref.finalize(self, _stop, ptr)
        self._ptr = ffi.gc(ptr, lib.pv_rogue_destroy)
        self._log_size = 1 << log_shift
        self._window = [0, 0]
        self.engine = Engine(lib.pv_rogue_engine(ptr), self._ptr, "thread")
        super().__init__(
            bus,
            PciIdentity(vendor=0x1234, device=0x11E9, class_code=0x00FF00),
            bars=(Bar(index=0, size=_PAGE),),
            ats=ats,
        )

    def aim(self, iova: int, size: int) -> None:
        """Writes into ``size`` bytes (a multiple of 8) from ``iova`` on; 0 stops. ``ValueError`` for another size."""
        if size < 0 or size % 8:
            raise ValueError(f"a window of {size} bytes")
        self._window = [iova, size]
        lib.pv_rogue_aim(self._ptr, iova, size // 8)

    def stats(self) -> RogueStats:
        """Counts as they are now."""
        raw = ffi.new("struct pv_rogue_stats *")
        lib.pv_rogue_stats(self._ptr, raw)
        return RogueStats(raw.next, raw.landed, raw.aborted, raw.cancelled)

    def log(self, first: int) -> npt.NDArray[np.uint8]:
        """How writes ``first`` to the last ended: LANDED, ABORTED, CANCELLED; a copy. The engine must be paused.

        ``ValueError`` where the log has forgotten the first of them.
        """
        last = self.stats().next
        if not 0 <= first <= last or last - first > self._log_size:
            raise ValueError(f"the log holds writes {max(0, last - self._log_size)} to {last}, not {first}")
        log: npt.NDArray[np.uint8] = np.frombuffer(
            ffi.buffer(lib.pv_rogue_log(self._ptr), self._log_size), np.uint8
        )
        return log[np.arange(first, last) % self._log_size]

    def mmio_read(self, bar: int, offset: int, size: int) -> int:
        """A register, or zero."""
        stats = self.stats()
        values = {_IOVA: self._window[0], _SIZE: self._window[1]}
        values |= {_NEXT: stats.next, _LANDED: stats.landed, _ABORTED: stats.aborted}
        base = offset & ~7
        return values.get(base, 0) >> 8 * (offset - base) & (1 << 8 * size) - 1

    def mmio_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """IOVA and SIZE, 8 bytes at a time; the rest is dropped."""
        if size == 8 and offset == _IOVA:
            self._window[0] = value
        elif size == 8 and offset == _SIZE:
            self.aim(self._window[0], value & ~7)

    def close(self) -> None:
        """Stops it for good."""
        if not self._closed:
            super().close()
            self.engine.pause()

    def _gate_dma(self) -> None:
        self.bus.cancel(self._closed)


def _stop(rogue: Any) -> None:
    lib.pv_engine_pause(lib.pv_rogue_engine(rogue))
