"""When I/O may be issued: ``rate``, ``rate_iops`` and ``thinktime``, for many I/Os at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.job import Job
from pvfio.workloads.fio.plan import Ios
from pvfio.workloads.fio.values import SECOND

__all__ = ["Pace"]


class Pace:
    """Each direction has a time at which its next I/O is due; one that is late is made up for, as fio does.

    With ``rate_process=poisson`` the times between are exponentially distributed around the same mean.
    """

    def __init__(self, job: Job, rng: np.random.Generator) -> None:
        self._job = job
        self._rng = rng
        self._due: dict[int, float] = {}
        self._limited = tuple(d for d in job.directions if job.rate_iops[d] or job.rate[d])
        self._blocks = 0  # issued since the last thought
        self._thinking_until = 0
        self.active = bool(self._limited) or bool(job.thinktime)

    def begin(self, now: int) -> None:
        """The clock starts."""
        self._due = {direction: float(now) for direction in self._limited}

    def limit(self, count: int, now: int) -> int:
        """How many of ``count`` I/Os may be issued now as far as thinking goes."""
        if not self._job.thinktime:
            return count
        if now < self._thinking_until:
            return 0
        return min(count, self._job.thinktime_blocks - self._blocks)

    def allow(self, ios: Ios, now: int) -> int:
        """How many of the first I/Os are due."""
        count = len(ios)
        if count == 1:
            return int(self._due.get(int(ios.direction[0]), now) <= now)
        for direction in self._limited:
            chosen = np.flatnonzero(ios.direction == direction)
            if not len(chosen):
                continue
            steps = self._steps(direction, ios.length[chosen])
            due = self._due[direction] + np.cumsum(steps) - steps
            late = int(np.searchsorted(due, now, side="right"))
            if late < len(chosen):
                count = min(count, int(chosen[late]))
        return count

    def issued(self, ios: Ios, now: int) -> None:
        """They were issued."""
        if len(ios) == 1:
            self._issued_one(int(ios.direction[0]), int(ios.length[0]))
        else:
            self._issued_many(ios)
        if self._job.thinktime:
            self._blocks += len(ios)
            if self._blocks >= self._job.thinktime_blocks:
                self._blocks, self._thinking_until = 0, now + self._job.thinktime

    def _issued_one(self, direction: int, length: int) -> None:
        """In plain numbers, which is faster for one."""
        if direction in self._due:
            step = self._step(direction, length)
            if self._job.rate_process == "poisson":
                step *= self._rng.exponential(1.0)
            self._due[direction] += step

    def _issued_many(self, ios: Ios) -> None:
        for direction in self._limited:
            chosen = np.flatnonzero(ios.direction == direction)
            if len(chosen):
                steps = self._steps(direction, ios.length[chosen])
                if self._job.rate_process == "poisson":
                    steps = steps * self._rng.exponential(1.0, len(steps))
                self._due[direction] += float(steps.sum())

    def next_time(self, now: int) -> int:
        """When something may be issued again, at least a little after ``now``."""
        times = [self._due[direction] for direction in self._limited if self._due[direction] > now]
        if self._thinking_until > now:
            return self._thinking_until
        return int(min(times, default=now))

    def _step(self, direction: int, length: int) -> float:
        """Nanoseconds an I/O takes of the direction's time."""
        iops, rate = self._job.rate_iops[direction], self._job.rate[direction]
        return SECOND / iops if iops else length * (SECOND / rate)

    def _steps(self, direction: int, lengths: NDArray[np.uint64]) -> NDArray[np.float64]:
        """``_step`` of each."""
        if self._job.rate_iops[direction]:
            return np.full(len(lengths), self._step(direction, 0))
        return lengths.astype(np.float64) * self._step(direction, 1)
