"""Looking at jobs from outside while they work: rates that must not fall below ``rate_min`` or ``rate_iops_min``, and
steady states.

A job has two seconds, after its ramp, before its rate is looked at, as with fio.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from pvfio.workloads.fio.job import DIRECTIONS, Job
from pvfio.workloads.fio.values import SECOND

if TYPE_CHECKING:
    from pvfio.workloads.fio.engine import Engine
    from pvfio.workloads.fio.stats import JobStats
    from pvfio.workloads.fio.steady import Steady

__all__ = ["RateFloor", "watch_rate", "watch_steady"]

_SETTLE: Final = 2 * SECOND
_MILLISECOND: Final = SECOND // 1000


class RateFloor:
    """``rate_min`` and ``rate_iops_min`` of one job. Rates are of whole milliseconds."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._before: list[tuple[int, int, int]] = []

    def restart(self) -> None:
        """What was seen does not count."""
        self._before = []

    def look(self, now: int, stats: JobStats) -> str:
        """Why the job fails, or nothing. At intervals of ``rate_cycle``."""
        totals = [(now, direction.nbytes, direction.ios) for direction in stats.directions]
        before, self._before = self._before, totals
        for index, old in enumerate(before):
            milliseconds = (now - old[0]) // _MILLISECOND
            if not totals[index][2] or not milliseconds:
                continue
            rate, ios = ((totals[index][n] - old[n]) * 1000 // milliseconds for n in (1, 2))
            least, least_ios = self._job.rate_min[index], self._job.rate_iops_min[index]
            if rate < least:
                return f"{DIRECTIONS[index]}: rate_min={least}B/s not met, got {rate}B/s"
            if ios < least_ios:
                return f"{DIRECTIONS[index]}: rate_iops_min={least_ios} not met, got {ios} IOPS"
        return ""


async def watch_rate(engine: Engine, at_work: Callable[[], bool]) -> None:
    """Fails a job that is too slow; until it is not at work any more, or cancelled."""
    job = engine.job
    if not any(job.rate_min) and not any(job.rate_iops_min):
        return
    floor = RateFloor(job)
    while at_work():
        begin = engine.recorder.begin
        settled = begin + _SETTLE
        now = time.perf_counter_ns()
        if not engine.measured or now < settled:
            floor.restart()
            await trio.sleep(min(_SETTLE, max(settled - now, _MILLISECOND)) / SECOND)
            continue
        engine.recorder.fold()
        if reason := floor.look(now, engine.stats):
            engine.fail(errno.EIO, f"{job.name}: {reason}")
            return
        await trio.sleep(job.rate_cycle / SECOND)


async def watch_steady(engines: Sequence[Engine], job: Job, steady: Steady) -> None:
    """Stops the jobs once their state together is steady. ``engines`` are those that have begun. Until cancelled."""
    interval = job.steady_interval
    before = (time.perf_counter_ns(), 0, 0, 0)
    over = before[0] + job.steady_ramp
    while not steady.attained:
        began = bool(engines)
        await trio.sleep(interval / SECOND)
        now, ios, nbytes, latency = _totals(engines)
        elapsed, more = now - before[0], ios - before[1]
        usable = began and more >= 0 and before[0] >= over
        if usable and steady.add(
            more * SECOND / elapsed,
            (nbytes - before[2]) * SECOND / elapsed,
            (latency - before[3]) / more if more else 0.0,
        ):
            for engine in engines:
                engine.stop()
        before = (now, ios, nbytes, latency)


def _totals(engines: Sequence[Engine]) -> tuple[int, int, int, int]:
    """The time, I/Os, bytes, and the sum of completion latencies."""
    ios = nbytes = latency = 0
    for engine in engines:
        engine.recorder.fold()
        for direction in engine.stats.directions:
            ios += direction.ios
            nbytes += direction.nbytes
            latency += direction.clat.total
    return time.perf_counter_ns(), ios, nbytes, latency
