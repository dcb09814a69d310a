"""Steady state: a job ends once its IOPS, bandwidth or latency have not changed for ``steadystate_duration``.

What is looked at, every ``steadystate_check_interval``, is the largest deviation from the mean or the slope of the
line of least squares, over the window.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "Criterion", "Steady"]

KINDS: Final = ("iops", "bw", "lat")


@dataclass(frozen=True, slots=True)
class Criterion:
    """``steadystate``: what is looked at, the slope of it or its deviation, and the limit, in percent of the mean or in
    IOPS, bytes a second, nanoseconds.
    """

    kind: str = "iops"
    slope: bool = True
    percent: bool = True
    limit: float = 0.01

    @property
    def name(self) -> str:
        """``iops_slope``."""
        return self.kind + "_slope" * self.slope

    @property
    def unit(self) -> str:
        """What follows its numbers."""
        return "%" if self.percent else ""


class Steady:
    """The last ``window`` samples of a job, or of the jobs of a group; ``duration`` is what they span, in seconds.

    ``attained``: the criterion was met; ``value`` what it was at the last look, 0 before there were enough samples.
    """

    def __init__(self, criterion: Criterion, window: int, duration: int) -> None:
        self.criterion = criterion
        self.duration = duration
        self.samples: dict[str, deque[int]] = {kind: deque(maxlen=window) for kind in KINDS}
        self.attained = False
        self.value = self.slope = self.deviation = 0.0

    def add(self, iops: float, bw: float, lat: float) -> bool:
        """One more sample of each kind; whether the state is steady."""
        for kind, value in zip(KINDS, (iops, bw, lat), strict=True):
            self.samples[kind].append(int(value))
        chosen = self.samples[self.criterion.kind]
        if len(chosen) == chosen.maxlen:
            self._judge(np.array(chosen, dtype=np.float64))
        return self.attained

    def _judge(self, values: NDArray[np.float64]) -> None:
        mean = float(values.mean())
        if self.criterion.slope:
            distance = np.arange(len(values)) - (len(values) - 1) / 2
            self.slope = found = float(distance @ values / (distance @ distance))
        else:
            self.deviation = found = float(np.abs(values - mean).max())
        if self.criterion.percent:
            found = 100 * found / mean if mean else 0.0
        self.value = found
        self.attained = bool(mean) and abs(found) < self.criterion.limit

    def mean(self, kind: str) -> float:
        """Of the samples there are; 0 for none."""
        samples = self.samples[kind]
        return sum(samples) / len(samples) if samples else 0.0
