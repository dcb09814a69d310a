"""Limits of latency: ``max_latency``, and fio's search for the depth that keeps to ``latency_target``.

The search doubles the depth from 1 on as long as ``latency_percentile`` percent of the I/Os of a ``latency_window`` are
in time, and halves the distance to the best depth known when they are not. With 100 percent, one I/O that is late ends
the window. Once the depth does not change any more, one window is measured and ends the job, or with ``latency_run``
the search goes on. A job that is late at depth 1 fails, where every I/O has to be in time.
"""

from __future__ import annotations

from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.job import Job

__all__ = ["LatencyLimits", "Step"]

_STABLE: int = 3  # windows, after which one more than was too much is tried


class Step(Enum):
    """What a look at a window leads to."""

    UP = auto()
    """Nothing but another depth, or the same one."""
    DOWN = auto()
    """What is in flight has to end first."""
    MEASURE = auto()
    """The same, and everything counted so far is forgotten."""
    DONE = auto()


class LatencyLimits:
    """The limits of one job; ``depth`` is how many I/Os may be in flight now. Times are nanoseconds."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._most = np.array([limit or np.iinfo(np.int64).max for limit in job.max_latency])
        self.active = bool(job.latency_target or any(job.max_latency))
        self.depth = 1 if job.latency_target else job.iodepth
        self._low, self._high = 1, job.iodepth
        self._stable = 0
        self._last = False
        self._early = False
        self._quiet = False
        self._since = self._ios = self._late = 0

    def begin(self, now: int) -> None:
        """A window begins."""
        self._since, self._ios, self._late = now, 0, 0
        self._early = self._quiet = False

    def took(self, direction: NDArray[np.uint8], latency: NDArray[np.int64]) -> str:
        """Takes in I/Os; why the job fails, or nothing."""
        over = np.flatnonzero(latency > self._most[direction])
        if len(over):
            return _exceeds(int(latency[over[0]]), int(self._most[direction[over[0]]]))
        target = self._job.latency_target
        if not target or self._quiet:
            return ""
        late = np.flatnonzero(latency > target)
        self._ios += len(latency)
        self._late += len(late)
        if len(late) and self._strict:
            if self.depth == 1:
                return _exceeds(int(latency[late[0]]), target)
            self._early = True
        return ""

    @property
    def _strict(self) -> bool:
        return self._job.latency_percentile >= 100

    def due(self, now: int) -> bool:
        """Whether it is time to look at the window."""
        if not self._job.latency_target or not self._ios:
            return False
        return self._early or now - self._since >= self._job.latency_window

    def step(self) -> Step:
        """Looks at the window, and changes the depth. What completes from here to ``begin`` does not count."""
        self._quiet = True
        share = 100 * (self._ios - self._late) / self._ios
        if self._early or share < self._job.latency_percentile:
            return self._down()
        return self._up()

    def _down(self) -> Step:
        if self.depth == 1:
            return Step.UP
        self._high = self.depth
        if self.depth == self._low:
            self._low -= 1
        self.depth = max(1, (self.depth + self._low) // 2)
        self._stable = 0
        self._last = False
        return Step.DOWN

    def _up(self) -> Step:
        before = self._low = self.depth
        if self.depth + 1 == self._high:
            self._stable += 1
            if self._stable >= _STABLE:
                self._high, self._stable = self._high + 1, 0
        grown = 2 * self.depth if self._high == self._job.iodepth else (self.depth + self._high) // 2
        self.depth = min(grown, self._job.iodepth)
        if self._job.latency_run or self.depth != before:
            return Step.UP
        if self._last:
            return Step.DONE
        self._last = True
        return Step.MEASURE


def _exceeds(latency: int, limit: int) -> str:
    return f"latency of {latency} nsec exceeds specified max ({limit} nsec)"
