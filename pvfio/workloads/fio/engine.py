"""One job at work: submits I/O while slots are free, takes completions, verifies, and counts. By batches throughout.

A job's passes go on until ``size`` (or ``io_size``) is done ``loops`` times or, with ``time_based``, until ``runtime``
is over. A job that writes and verifies reads back and checks all it wrote after each pass, however long it takes.
Writes that are to be verified never overlap others in flight. What goes wrong is kept in outcome.py. Where there is
nothing to do, other tasks run.

Cancelled: what is in flight ends in the driver's hands; ``stop`` ends a job in order.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from pvfio.workloads.fio.contents import fill, refill
from pvfio.workloads.fio.job import READ, WRITE, Job
from pvfio.workloads.fio.latency import LatencyLimits, Step
from pvfio.workloads.fio.outcome import Outcome, Place
from pvfio.workloads.fio.overlap import Overlaps
from pvfio.workloads.fio.pace import Pace
from pvfio.workloads.fio.plan import Ios, Known, Plan, Source
from pvfio.workloads.fio.queue import IoQueue
from pvfio.workloads.fio.record import Recorder
from pvfio.workloads.fio.slots import Slots
from pvfio.workloads.fio.stats import JobStats, Usage
from pvfio.workloads.fio.verify import Verifier, Written

__all__ = ["Engine", "Place"]

_SPIN_NS: Final = 20_000
_TURN_NS: Final = 500_000  # how long a job runs before others do
_EAGER: Final = 16  # looks before sleeping
_LEAD_NS: Final = 20_000  # waking may take longer


class Engine:
    """A job on its queue and its place. ``seed`` decides everything random; ``thread`` counts jobs from 1.

    ``failed`` is called with each line about a block that does not verify or a command that fails. Raises
    ``ValueError`` for a job that does not fit its place.
    """

    def __init__(
        self,
        job: Job,
        queue: IoQueue,
        place: Place,
        stats: JobStats,
        *,
        seed: int,
        thread: int = 1,
        alone: bool = True,
        failed: Callable[[str], None] | None = None,
    ) -> None:
        self.job, self.queue, self.place, self.stats = job, queue, place, stats
        self._outcome = Outcome(job, place, stats, queue.block_size, failed)
        self._seed = seed
        self._writes_verified = bool(job.verify) and job.mode.writes and not job.mode.trims
        self.plan = self._plan(seed)
        self._slots = Slots(job.iodepth)
        self._pace = Pace(job, np.random.default_rng([seed, 1]))
        self._turn_ns = _TURN_NS if alone else _TURN_NS // 4
        self._limits = LatencyLimits(job)
        self._spin_ns, self._looks, self._lead_ns = (_SPIN_NS, _EAGER, _LEAD_NS) if queue.eager else (0, 0, 0)
        self._stopped = False
        self._stopping = trio.Event()
        self._filling = True
        self._verifier: Verifier | None = None
        if job.verify:
            self._verifier = Verifier(job, queue.buffer, place.base, thread, seed)
        self._written: Written | None = None
        self._overlaps: Overlaps | None = None
        if self._writes_verified or (job.serialize_overlap and job.iodepth > 1):
            self._overlaps = Overlaps(self.plan.size, job.grain)
        self._most = max(job.batch_complete_max, job.batch_complete_min) if job.batch_complete_max else None
        self._checking = job.verifying_reads
        self._numbers_known = self._reading_back = False
        self.recorder = Recorder(job, stats, 0)
        self._deadline = 0
        self._ramp_until = 0
        self._since_flush = 0

    def stop(self) -> None:
        """No more I/O is issued; what is in flight is waited for."""
        self._stopped = True
        self._stopping.set()

    @property
    def inflight(self) -> int:
        """I/Os without a completion yet."""
        return self._slots.used

    @property
    def measured(self) -> bool:
        """What it does now counts: it is neither in its ramp nor reading back what it wrote."""
        return not self._ramp_until and not self._reading_back

    def _plan(self, seed: int) -> Plan:
        """All of the job's passes; one that writes and verifies makes each of them by itself."""
        job = self.job
        passes = 1 if self._writes_verified else None if job.time_based else job.loops
        return Plan(job, self.place.size, seed, unit=self.queue.block_size, passes=passes)

    # The whole job

    async def run(self) -> None:
        """From the first I/O to the last check. Errors of the device are in the statistics, not raised."""
        job = self.job
        if job.mode.writes and self._verifier is None:
            fill(job, self.queue.buffer, self._seed)
        before = Usage.now()
        begin = time.perf_counter_ns()
        self.recorder.restart(begin)
        self._ramp_until = begin + job.ramp_time if job.ramp_time else 0
        self._deadline = begin + job.ramp_time + job.runtime if job.runtime else 0
        self._pace.begin(begin)
        self._limits.begin(begin)
        if self._writes_verified:
            await self._write_and_verify()
        else:
            await self._phase(self.plan)
            self._account(begin)
        if job.end_fsync and job.mode.writes:
            await self._flush()
        self.recorder.fold()
        self.stats.runtime = time.perf_counter_ns() - self.recorder.begin
        self.stats.latency_depth = self._limits.depth
        self.stats.usage = Usage.now().since(before)

    async def _write_and_verify(self) -> None:
        """Each pass: all the writes, then all the checks."""
        job = self.job
        loops = 0
        while not self._stopped and not self.stats.error:
            self._written = Written(self.plan.size, job.grain)
            begin = time.perf_counter_ns()
            if job.verify_only:
                self._pretend()
            else:
                await self._phase(self.plan)
                self._account(begin)
            if job.do_verify and not (self.stats.error and job.verify_fatal):
                await self._check_all()
            loops += 1
            over = self._deadline and time.perf_counter_ns() >= self._deadline
            if over or (not job.time_based and loops >= job.loops):
                return
            self.plan = self._plan(self._seed + loops)

    def _pretend(self) -> None:
        """Remembers what the job would write, which an earlier run has."""
        assert self._written is not None
        while len(ios := self.plan.take(4096)):
            self._written.add(_chosen(ios, ios.direction == WRITE))

    async def _check_all(self) -> None:
        assert self._written is not None
        ios, numbers = self._written.remaining(ordered=self.job.verifysort and not self.job.mode.random)
        begin = time.perf_counter_ns()
        self._written, self._checking, self._reading_back = None, True, True
        # A sequence of numbers is known only to the run that wrote.
        self._numbers_known = self.job.verify_write_sequence and not self.job.verify_only
        deadline, self._deadline = self._deadline, 0
        overlaps, self._overlaps = self._overlaps, None
        self._pace.active, active = False, self._pace.active
        try:
            await self._phase(Known(ios, numbers))
        finally:
            self._checking = self._reading_back = False
            self._deadline, self._overlaps, self._pace.active = deadline, overlaps, active
        self.recorder.fold()
        self.stats.directions[READ].runtime += time.perf_counter_ns() - begin

    def _account(self, begin: int) -> None:
        """The time of a phase, for every direction that took part."""
        self.recorder.fold()
        elapsed = time.perf_counter_ns() - max(begin, self.recorder.begin)
        for direction in self.job.directions:
            self.stats.directions[direction].runtime += elapsed

    # One phase

    async def _phase(self, source: Source) -> None:
        """Issues what the source has, until it has nothing more, time is up or an error stops the job."""
        more, idle = True, 0
        turn = time.perf_counter_ns()
        while more or self.inflight:
            now = time.perf_counter_ns()
            if more and (self._stopped or self.stats.error or (self._deadline and now >= self._deadline)):
                more = False
            if self._ramp_until and now >= self._ramp_until:
                self._end_ramp(now)
            if self._limits.active and not self._reading_back and self._limits.due(now):
                await self._change_depth()
            if more and self._slots.free and self._wants(self.inflight):
                more = await self._issue(source, now)
            done = self._reap() if self._looks else 0  # who sleeps for it looks first
            idle = 0 if done else idle + 1
            if now - turn > self._turn_ns or (idle and not self.inflight):
                await self._rest(now, more)
                turn, idle = time.perf_counter_ns(), 0
            elif idle > self._looks and self.inflight:
                await self._sleep_for_some(now, more)
                turn, idle = time.perf_counter_ns(), 0

    def _wants(self, inflight: int) -> bool:
        """Whether to submit: at all times, or only once few are in flight (``iodepth_low``)."""
        low = self.job.iodepth_low
        if not low or inflight <= low:
            self._filling = True
        elif inflight >= self.job.iodepth:
            self._filling = False
        return self._filling

    async def _rest(self, now: int, more: bool) -> None:
        """Lets others run; until the next I/O is due, where nothing is in flight."""
        if more and self._pace.active and not self.inflight:
            due = self._pace.next_time(now)
            if due > now + 2 * self._lead_ns:
                with trio.move_on_after((due - now - self._lead_ns) / 1e9):
                    await self._stopping.wait()
                return
        await trio.lowlevel.checkpoint()

    async def _sleep_for_some(self, now: int, more: bool) -> None:
        """Until something is complete, or the next I/O is due."""
        limit = float("inf")
        if more and self._pace.active and self._slots.free:
            limit = max(0.0, (self._pace.next_time(now) - now) / 1e9) or float("inf")
        with trio.move_on_after(limit) if limit < float("inf") else contextlib.nullcontext():
            slots, status, failed = await self.queue.wait(self._most)
            self._complete(slots, status, failed)

    async def _issue(self, source: Source, now: int) -> bool:
        """Submits what may be submitted; whether there may be more."""
        count = self._slots.free
        if self._limits.depth < self.job.iodepth and not self._reading_back:
            count = min(count, self._limits.depth - self.inflight)
        if self.job.batch_submit > 1:
            count = min(count, self.job.batch_submit)
        if self._pace.active:
            count = self._pace.limit(count, now)
        if self.job.fsync or self.job.fdatasync:
            every = self.job.fsync or self.job.fdatasync
            if self._since_flush >= every:
                # There is no flush after the last write, as with fio.
                if not len(source.take(1)):
                    return False
                source.untake(1)
                await self._drain()
                await self._flush()
            count = min(count, every - self._since_flush)
        if count <= 0:
            return True
        ios = source.take(count)
        if not len(ios):
            return False
        allowed = self._allowed(ios, now)
        if allowed < len(ios):
            source.untake(len(ios) - allowed)
            ios = ios.part(0, allowed)
        if allowed:
            self._submit(source, ios, now)
        return True

    def _allowed(self, ios: Ios, now: int) -> int:
        allowed = self._pace.allow(ios, now) if self._pace.active else len(ios)
        if self._overlaps is not None and allowed:
            allowed = self._overlaps.independent(ios.part(0, allowed))
        return allowed

    def _submit(self, source: Source, ios: Ios, now: int) -> None:
        count = len(ios)
        slots = self._slots.take(count)
        self._prepare(source, ios, slots)
        base = self.place.base
        absolute = Ios(ios.direction, ios.offset + np.uint64(base), ios.length) if base else ios
        begin = time.perf_counter_ns()
        self.queue.submit(absolute, slots)
        self._slots.begin(slots, ios, begin, time.perf_counter_ns())
        self.stats.count_submit(count)
        self.stats.count_depth(self.inflight, count)
        if self._pace.active:
            self._pace.issued(ios, now)
        if self.job.fsync or self.job.fdatasync:
            self._since_flush += int(np.count_nonzero(ios.direction == WRITE))

    def _prepare(self, source: Source, ios: Ios, slots: NDArray[np.intp]) -> None:
        """What is written, and what is expected of what is read."""
        if self._overlaps is not None:
            self._overlaps.begin(ios)
        if isinstance(source, Known):
            self._slots.number[slots] = source.numbers[source.position - len(ios) : source.position]
            return
        if self._written is not None and self._verifier is not None:
            writes = ios.direction == WRITE
            if writes.any():
                mine = _chosen(ios, writes)
                self._verifier.stamp(self._starts(slots[writes]), mine, self._written.add(mine))
        elif self.job.refills:
            seed = (self._seed, int(self.stats.submits.sum()))
            refill(self.queue.buffer, self._starts(slots), ios.length, seed)

    def _starts(self, slots: NDArray[np.intp]) -> NDArray[np.uint64]:
        return slots.astype(np.uint64) * np.uint64(self.queue.stride)

    # Completion

    def _reap(self) -> int:
        if not self.inflight:
            return 0
        # A device that is nearly done with half of them is worth a few microseconds: batches pay for Python.
        least = max(1, self.inflight // 2, min(self.job.batch_complete_min, self.inflight))
        if self._most is not None:
            least = min(least, self._most)
        slots, status, failed = self.queue.reap(least, self._spin_ns, self._most)
        self._complete(slots, status, failed)
        return len(slots)

    def _complete(self, slots: NDArray[np.intp], status: NDArray[np.uint16], failed: int) -> None:
        count = len(slots)
        if not count:
            return
        now = time.perf_counter_ns()
        self.stats.count_complete(count)
        if self._overlaps is not None:
            self._overlaps.end(self._slots.ios(slots))
        good = slots
        if failed:
            good = slots[status == 0]
            self._report(slots[status != 0], status[status != 0])
        self.recorder.add(now, self._slots, good)
        if self._limits.active and not self._reading_back:
            late = self._limits.took(self._slots.direction[good], now - self._slots.start[good])
            if late:
                self.fail(errno.ETIMEDOUT, late)
        if self._checking and len(good):
            self._check(good)
        self._slots.give_back(slots)

    def _check(self, slots: NDArray[np.intp]) -> None:
        assert self._verifier is not None
        reads = slots[self._slots.direction[slots] == READ]
        numbers = self._slots.number[reads] if self._numbers_known else None
        looked, failures = self._verifier.check(self._starts(reads), self._slots.ios(reads), numbers)
        self._outcome.verified(looked, failures)

    def _report(self, slots: NDArray[np.intp], status: NDArray[np.uint16]) -> None:
        """Commands that failed."""
        for slot, value in zip(slots.tolist(), status.tolist(), strict=True):
            name = self.queue.status_name(value)
            self._outcome.command(int(self._slots.direction[slot]), int(self._slots.offset[slot]), name)

    def fail(self, number: int, reason: str) -> None:
        """Ends the job with an error: a limit was not kept."""
        self._outcome.limit(number, reason)

    def finish(self) -> None:
        """A job with blocks that did not verify has failed, though it went on."""
        self._outcome.finish()

    # Flushes

    async def _drain(self) -> None:
        while self.inflight:
            if not self._reap():
                slots, status, failed = await self.queue.wait(self._most)
                self._complete(slots, status, failed)

    async def _change_depth(self) -> None:
        """A window of ``latency_target`` is over."""
        step = self._limits.step()
        if step is Step.DONE:
            self.stop()
        elif step is not Step.UP:
            await self._drain()
        now = time.perf_counter_ns()
        if step is Step.MEASURE:
            self.recorder.restart(now)
        self._limits.begin(now)

    async def _flush(self) -> None:
        from pvfio.errors import PvfioError

        begin = time.perf_counter_ns()
        self._since_flush = 0
        try:
            await self.queue.flush()
        except PvfioError as error:
            self._outcome.line(f"flush failed: {error}")
            self._outcome.fail(errno.EIO, f"flush: {error}")
            return
        self.stats.flushes.add(np.array([time.perf_counter_ns() - begin], dtype=np.int64))

    def _end_ramp(self, now: int) -> None:
        self._ramp_until = 0
        self.recorder.restart(now)


def _chosen(ios: Ios, which: NDArray[np.bool_]) -> Ios:
    return Ios(ios.direction[which], ios.offset[which], ios.length[which])
