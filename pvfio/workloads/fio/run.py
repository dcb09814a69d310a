"""Running jobs: waves between stonewalls, the jobs of a wave side by side, and joining their statistics for reports."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import trio

from pvfio.workloads.fio.engine import Engine
from pvfio.workloads.fio.job import Job
from pvfio.workloads.fio.layout import Clone
from pvfio.workloads.fio.outcome import Place
from pvfio.workloads.fio.queue import IoQueue
from pvfio.workloads.fio.record import Recorder
from pvfio.workloads.fio.stats import DirectionStats, JobStats
from pvfio.workloads.fio.steady import Steady
from pvfio.workloads.fio.values import SECOND
from pvfio.workloads.fio.watch import watch_rate, watch_steady

__all__ = ["Finished", "Run", "joined"]

QueueMaker = Callable[[Clone, int], AbstractAsyncContextManager[tuple[IoQueue, Place]]]
"""Makes a queue for a clone, the second number counting those of its wave."""


@dataclass(frozen=True)
class Finished:
    """A clone that ended, and what is known of it: nothing that keeps its buffer, which is free for the next wave."""

    clone: Clone
    stats: JobStats
    recorder: Recorder


@dataclass
class _Together:
    """Jobs whose state is steady or not together: those of a group that is reported as one, else each for itself."""

    job: Job
    engines: list[Engine] = field(default_factory=list)
    steady: Steady | None = field(init=False)

    def __post_init__(self) -> None:
        job = self.job
        window = job.steady_duration // job.steady_interval
        seconds = job.steady_duration // SECOND
        self.steady = Steady(job.steady, window, seconds) if job.steady_duration else None


def _reported(clone: Clone) -> tuple[bool, int]:
    return clone.job.group_reporting, clone.group if clone.job.group_reporting else clone.thread


@dataclass
class Run:
    """All jobs of a run. ``engines`` are those at work now; ``finished`` those that ended, by thread."""

    clones: Sequence[Clone]
    make_queue: QueueMaker
    failed: Callable[[str], None] = lambda line: None
    engines: list[Engine] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    began: float = 0.0
    elapsed: float = 0.0
    _over: dict[int, trio.Event] = field(default_factory=lambda: defaultdict(trio.Event))  # by group

    async def run(self) -> list[Finished]:
        """Every wave after the other. Cancelled: nothing is in flight afterwards."""
        self.began = time.time()
        begin = time.perf_counter()
        try:
            for wave in sorted({clone.wave for clone in self.clones}):
                members = [clone for clone in self.clones if clone.wave == wave]
                await self._wave([clone for clone in members if not self._over[clone.group].is_set()])
        finally:
            self.elapsed = time.perf_counter() - begin
            self.finished.sort(key=lambda item: item.clone.thread)
        return self.finished

    async def _wave(self, members: Sequence[Clone]) -> None:
        async with trio.open_nursery() as watches:
            steady: dict[tuple[bool, int], _Together] = {}
            async with trio.open_nursery() as nursery:
                for number, clone in enumerate(members):
                    together = steady.setdefault(_reported(clone), _Together(clone.job))
                    nursery.start_soon(self._one, clone, number, len(members) == 1, watches, together)
                for found in steady.values():
                    if found.steady is not None:
                        watches.start_soon(watch_steady, found.engines, found.job, found.steady)
            watches.cancel_scope.cancel()

    async def _one(
        self, clone: Clone, number: int, alone: bool, watches: trio.Nursery, together: _Together
    ) -> None:
        async with self.make_queue(clone, number) as (queue, place):
            stats = JobStats(clone.job.name, clone.group)
            engine = Engine(
                clone.job,
                queue,
                place,
                stats,
                seed=clone.seed,
                thread=clone.thread,
                alone=alone,
                failed=self.failed,
            )
            if clone.job.startdelay:
                with trio.move_on_after(clone.job.startdelay / 1e9):
                    await self._over[clone.group].wait()
                    return
            stats.steady = together.steady
            if self._over[clone.group].is_set():
                engine.stop()
            self.engines.append(engine)
            together.engines.append(engine)
            watches.start_soon(watch_rate, engine, lambda: engine in self.engines)
            try:
                await engine.run()
            finally:
                engine.finish()
                self.engines.remove(engine)
                self.finished.append(Finished(clone, stats, engine.recorder))
        if clone.job.exitall or (clone.job.exitall_on_error and stats.error):
            self.stop(clone.group)

    def stop(self, group: int | None = None) -> None:
        """Ends jobs in order, or does not begin them: those of a group, or all."""
        for clone in self.clones:
            if group in (None, clone.group):
                self._over[clone.group].set()
        for engine in self.engines:
            if group in (None, engine.stats.group):
                engine.stop()


def joined(finished: Sequence[Finished]) -> list[tuple[Job, JobStats]]:
    """What is reported: each clone, or with ``group_reporting`` the group's clones together under the first name."""
    found: list[tuple[Job, JobStats]] = []
    group: int | None = None
    for item in finished:
        job = item.clone.job
        if job.group_reporting and group == item.clone.group and found:
            found[-1][1].merge(item.stats)
        else:
            stats = JobStats(item.stats.name, item.stats.group, jobs=0)
            stats.merge(item.stats)
            found.append((job, stats))
        group = item.clone.group if job.group_reporting else None
    for job, stats in found:
        if job.unified:
            stats.mixed = _mix(stats)
    return found


def _mix(stats: JobStats) -> DirectionStats:
    """All directions as one."""
    mixed = DirectionStats()
    for direction in stats.directions:
        mixed.merge(direction)
    return mixed
