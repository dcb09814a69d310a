"""Which parts of a job's file have I/O in flight: nothing overlaps what is in flight where data are verified, or with
``serialize_overlap``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.plan import Ios

__all__ = ["Overlaps", "units_of"]


def units_of(ios: Ios, unit: int) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Every unit of so many bytes that the I/Os touch, and whose it is."""
    first = (ios.offset // np.uint64(unit)).astype(np.int64)
    last = -(-(ios.offset + ios.length).astype(np.int64) // unit)
    counts = last - first
    owner = np.repeat(np.arange(len(ios)), counts)
    inside = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return first[owner] + inside, owner


class Overlaps:
    """A flag for each ``unit`` bytes of ``size``, set while I/O on it is in flight."""

    def __init__(self, size: int, unit: int) -> None:
        self._unit = unit
        self._busy = np.zeros(-(-size // unit), dtype=bool)

    def independent(self, ios: Ios) -> int:
        """How many of the first I/Os overlap neither each other nor what is in flight."""
        units, owner = units_of(ios, self._unit)
        taken = self._busy[units]
        _, first = np.unique(units, return_index=True)
        again = np.ones(len(units), dtype=bool)
        again[first] = False
        bad = np.flatnonzero(taken | again)
        return int(owner[bad].min()) if len(bad) else len(ios)

    def begin(self, ios: Ios) -> None:
        """They are in flight."""
        self._busy[units_of(ios, self._unit)[0]] = True

    def end(self, ios: Ios) -> None:
        """They are complete."""
        self._busy[units_of(ios, self._unit)[0]] = False
