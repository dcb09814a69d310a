"""Latencies of an operation: their average and spread, quantiles, and a histogram in constant space (``latency.h``).

Not modelled: single values. A quantile is right within 3 %; average, deviation, least and most are exact.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pvfio.abi import ffi, lib

__all__ = ["Latencies"]

_BUCKETS: int = lib.PV_LATENCY_BUCKETS


class Latencies:
    """A record of latencies in nanoseconds; ``ptr`` is its ``struct pv_latency *`` for loops in C."""

    def __init__(self) -> None:
        self.ptr: Any = ffi.new("struct pv_latency *")

    def add(self, values: npt.NDArray[np.uint64]) -> None:
        """Takes in an array of nanoseconds, shape (n,), contiguous."""
        lib.pv_latency_add(self.ptr, ffi.cast("uint64_t *", ffi.from_buffer(values)), len(values))

    def merge(self, other: Latencies) -> None:
        """Takes in what another recorded."""
        lib.pv_latency_merge(self.ptr, other.ptr)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.ptr.count)

    @property
    def least(self) -> int:
        """The shortest; 0 where there is none."""
        return int(self.ptr.min)

    @property
    def most(self) -> int:
        """The longest; 0 where there is none."""
        return int(self.ptr.max)

    @property
    def average(self) -> float:
        """Their mean; 0 where there is none."""
        return float(self.ptr.sum) / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Their standard deviation, that of the whole record as Linux's tool has it (divided by n)."""
        if not self.count:
            return 0.0
        variance = float(self.ptr.sum_of_squares) / self.count - self.average**2
        return math.sqrt(max(variance, 0.0))

    def quantile(self, share: float) -> float:
        """What a share (0 to 1) of them does not exceed, e.g. 0.5 for the median."""
        return float(lib.pv_latency_quantile(self.ptr, share))

    def histogram(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """(edges, counts), shapes (n + 1,), (n,): ``counts[i]`` are from ``edges[i]`` to below ``edges[i + 1]``.

        Empty buckets below the first and above the last that is not are left out; n is 0 where there is nothing.
        """
        whole = np.frombuffer(ffi.buffer(self.ptr.bucket), dtype=np.uint64)
        filled = np.flatnonzero(whole)
        if not len(filled):
            return np.zeros(1, np.uint64), np.zeros(0, np.uint64)
        first, end = int(filled[0]), int(filled[-1]) + 1
        edges = [lib.pv_latency_floor(bucket) for bucket in range(first, end + 1)]
        return np.array(edges, np.uint64), whole[first:end].copy()

    def as_dict(self) -> dict[str, float]:
        """Average, deviation and quantiles by name, in nanoseconds."""
        return {
            "average": round(self.average, 1),
            "standard_deviation": round(self.deviation, 1),
            "min": self.least,
            "median": self.quantile(0.5),
            "p90": self.quantile(0.9),
            "p99": self.quantile(0.99),
            "p999": self.quantile(0.999),
            "max": self.most,
        }
