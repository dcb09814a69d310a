"""The I/Os of one job that are in flight, each in a slot. The loops over them are in slots.c: every I/O passes here.

A slot is also a piece of the job's buffer. Not here: what is done about them (engine.py), and what they add up to
(stats.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvfio.abi import ffi, lib
from pvfio.workloads.fio.plan import Ios

__all__ = ["Slots"]


class Slots:
    """``depth`` slots. Arrays of shape (depth,): ``direction`` (uint8), ``offset`` (uint64) and ``length`` (int64) in
    bytes, ``start`` and ``submitted`` (int64, ns), ``number`` (int64): which write a read is to find, -1: not known.

    ``free``: how many have nothing in them.
    """

    def __init__(self, depth: int) -> None:
        self.depth = self.free = depth
        self.direction: NDArray[np.uint8] = np.zeros(depth, dtype=np.uint8)
        self.offset: NDArray[np.uint64] = np.zeros(depth, dtype=np.uint64)
        self.length: NDArray[np.int64] = np.zeros(depth, dtype=np.int64)
        self.start: NDArray[np.int64] = np.zeros(depth, dtype=np.int64)
        self.submitted: NDArray[np.int64] = np.zeros(depth, dtype=np.int64)
        self.number: NDArray[np.int64] = np.full(depth, -1, dtype=np.int64)
        self._free: NDArray[np.intp] = np.arange(depth - 1, -1, -1, dtype=np.intp)
        self._kept = {
            "direction": ffi.from_buffer("uint8_t[]", self.direction),
            "offset": ffi.from_buffer("uint64_t[]", self.offset),
            "length": ffi.from_buffer("int64_t[]", self.length),
            "start": ffi.from_buffer("int64_t[]", self.start),
            "submitted": ffi.from_buffer("int64_t[]", self.submitted),
        }
        self.table: Any = ffi.new("struct pv_fio_slots *", self._kept | {"depth": depth})

    @property
    def used(self) -> int:
        """How many have an I/O in them."""
        return self.depth - self.free

    def take(self, count: int) -> NDArray[np.intp]:
        """``count`` slots, at most ``free``."""
        self.free -= count
        return self._free[self.free : self.free + count].copy()

    def give_back(self, slots: NDArray[np.intp]) -> None:
        """They have nothing in them any more."""
        end = self.free + len(slots)
        self._free[self.free : end] = slots
        self.free = end

    def begin(self, slots: NDArray[np.intp], ios: Ios, start: int, submitted: int) -> None:
        """Puts I/Os into slots that were taken; their submission began and ended at these times."""
        error = lib.pv_fio_begin(
            self.table,
            ffi.from_buffer("int64_t[]", slots),
            min(len(slots), len(ios)),
            ffi.from_buffer("uint8_t[]", ios.direction),
            ffi.from_buffer("uint64_t[]", ios.offset),
            ffi.from_buffer("uint64_t[]", ios.length),
            start,
            submitted,
        )
        if error:
            raise ValueError(f"there is no such slot among {self.depth}")

    def ios(self, slots: NDArray[np.intp]) -> Ios:
        """What is in some of them."""
        return Ios(self.direction[slots], self.offset[slots], self.length[slots].astype(np.uint64))
