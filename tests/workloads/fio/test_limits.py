"""What ends a job or holds it back: minimum rates, latency limits and targets, steady state, overlaps, batches."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from pvfio.workloads.fio import Job, Notes, build, parse_job_text
from pvfio.workloads.fio.engine import Engine
from pvfio.workloads.fio.latency import LatencyLimits, Step
from pvfio.workloads.fio.layout import clones
from pvfio.workloads.fio.outcome import Place
from pvfio.workloads.fio.overlap import Overlaps
from pvfio.workloads.fio.plan import Ios
from pvfio.workloads.fio.queue import NullQueue
from pvfio.workloads.fio.record import Recorder
from pvfio.workloads.fio.run import Finished, Run
from pvfio.workloads.fio.stats import JobStats
from pvfio.workloads.fio.steady import Criterion, Steady
from pvfio.workloads.fio.watch import RateFloor

SECOND = 10**9


def job_of(*lines: str) -> Job:
    (section,) = parse_job_text("[j]\n" + "\n".join(lines) + "\n", {})
    return build(section, Notes())


def ios_of(*extents: tuple[int, int]) -> Ios:
    offsets, lengths = zip(*extents, strict=True)
    return Ios(np.zeros(len(extents), np.uint8), np.array(offsets, np.uint64), np.array(lengths, np.uint64))


async def run_null(text: str, said: Callable[[str], None] = lambda line: None) -> list[Finished]:
    """Jobs that move nothing."""
    jobs = [build(section, Notes()) for section in parse_job_text(text, {})]

    class Queues:
        def __init__(self, clone: Any, _number: int) -> None:
            self.clone = clone

        async def __aenter__(self) -> Any:
            return NullQueue(self.clone.job.iodepth, 4096), Place("f", 0, 1 << 20)

        async def __aexit__(self, *_: object) -> None:
            pass

    return await Run(clones(jobs, entropy=1), Queues, failed=said).run()


# Rates

FLOORS: list[tuple[str, list[tuple[int, int]], str]] = [
    ("rate_min=1000", [(0, 0), (1000, 1), (2000, 2)], ""),
    ("rate_min=1000", [(5000, 5), (6000, 6), (6999, 7)], "read: rate_min=1000B/s not met, got 999B/s"),
    ("rate_iops_min=10", [(1, 5), (2, 14)], "read: rate_iops_min=10 not met, got 9 IOPS"),
    ("rate_iops_min=10", [(1, 5), (2, 15)], ""),
    ("rate_min=,1000", [(0, 0), (10, 1)], ""),
    ("rate_min=1000", [(0, 0), (0, 0)], ""),
]


@pytest.mark.parametrize(("line", "totals", "reason"), FLOORS)
def test_a_rate_floor(line: str, totals: list[tuple[int, int]], reason: str) -> None:
    """Totals of reads, a second apart: nothing is judged before there is an interval, nor where nothing was done."""
    floor, stats = RateFloor(job_of("rw=read", line)), JobStats()
    found = []
    for second, (nbytes, ios) in enumerate(totals):
        stats.directions[0].nbytes, stats.directions[0].ios = nbytes, ios
        found.append(floor.look(second * SECOND, stats))
    assert found == [""] * (len(totals) - 1) + [reason]


async def test_a_job_below_its_rate_fails() -> None:
    """Two seconds after its beginning at the earliest, with fio's error."""
    said: list[str] = []
    (item,) = await run_null(
        "[slow]\nrw=randread\nsize=1m\ntime_based\nruntime=60\nthinktime=5ms\nrate_iops_min=400\nrate_cycle=100\n",
        said.append,
    )
    assert item.stats.error == errno.EIO
    assert "slow: read: rate_iops_min=400 not met, got " in said[0]
    assert 2 * SECOND <= item.stats.runtime < 50 * SECOND


async def test_a_job_above_its_rate_goes_on() -> None:
    job = "[fast]\nrw=randread\nsize=1m\ntime_based\nruntime=3200ms\nrate_iops=4000\nrate_iops_min=50\nrate_cycle=500\n"
    (item,) = await run_null(job)
    assert (item.stats.error, item.stats.reason) == (0, "")


# Latencies


def search(
    job: Job, latency_of: Callable[[int], float], windows: int
) -> tuple[LatencyLimits, list[int], str]:
    """The depths tried, where the latencies of a window go from 1 us evenly up to what the depth makes them."""
    limits, tried, now = LatencyLimits(job), [], 0
    limits.begin(now)
    for _ in range(windows):
        tried.append(limits.depth)
        worst = 1000 * latency_of(limits.depth)
        latencies = np.linspace(1000, worst, 100).astype(np.int64)
        if why := limits.took(np.zeros(100, np.uint8), latencies):
            return limits, tried, why
        now += job.latency_window
        assert limits.due(now)
        if limits.step() is Step.DONE:
            return limits, tried, "done"
        limits.begin(now)
    return limits, tried, ""


SEARCH = ("rw=randread", "iodepth=64", "latency_target=100us", "latency_window=10ms")


def test_the_search_doubles_and_bisects() -> None:
    limits, tried, why = search(job_of(*SEARCH), lambda depth: 5.0 * depth, 40)
    assert tried[:8] == [1, 2, 4, 8, 16, 32, 24, 20]
    assert (limits.depth, why) == (20, "done")


def test_the_search_ends_at_the_job_s_depth() -> None:
    limits, tried, why = search(job_of(*SEARCH), lambda depth: 10.0, 40)
    assert (tried, limits.depth, why) == ([1, 2, 4, 8, 16, 32, 64, 64], 64, "done")


def test_the_search_goes_on() -> None:
    _, tried, why = search(job_of(*SEARCH, "latency_run=1"), lambda depth: 5.0 * depth, 60)
    assert why == ""
    assert set(tried[30:]) <= {19, 20, 21, 22}


def test_a_percentile_may_be_late() -> None:
    """Half of the I/Os are in time at twice the depth."""
    limits, _, why = search(job_of(*SEARCH, "latency_percentile=50"), lambda depth: 5.0 * depth, 60)
    assert why == "done"
    assert limits.depth in (39, 40)


def test_late_at_depth_one() -> None:
    _, tried, why = search(job_of(*SEARCH), lambda depth: 101.0, 9)
    assert (tried, why) == ([1], "latency of 101000 nsec exceeds specified max (100000 nsec)")
    _, tried, why = search(job_of(*SEARCH, "latency_percentile=99"), lambda depth: 300.0, 9)
    assert (tried, why) == ([1] * 9, "")


def test_the_most_latency_is_of_a_direction() -> None:
    limits = LatencyLimits(job_of("rw=randrw", "max_latency=10us,20us"))
    both = np.array([0, 1], np.uint8)
    assert limits.took(both, np.array([10_000, 20_000])) == ""
    assert (
        limits.took(both, np.array([9_000, 20_001]))
        == "latency of 20001 nsec exceeds specified max (20000 nsec)"
    )
    assert (
        limits.took(both, np.array([10_001, 1])) == "latency of 10001 nsec exceeds specified max (10000 nsec)"
    )


class SlowQueue(NullQueue):
    """I/O completes one by one, in order; ``inflight`` says which is, ``batches`` what each look found."""

    def __init__(self, depth: int, a_look: int = 1) -> None:
        super().__init__(depth, 4096)
        self.inflight: dict[int, tuple[int, int]] = {}
        self.deepest = 0
        self.overlapped = 0
        self.batches: list[int] = []
        self._a_look = a_look

    def submit(self, ios: Ios, slots: NDArray[np.intp]) -> None:
        for slot, offset, length in zip(
            slots.tolist(), ios.offset.tolist(), ios.length.tolist(), strict=True
        ):
            self.overlapped += any(a < offset + length and offset < b for a, b in self.inflight.values())
            self.inflight[slot] = (offset, offset + length)
        self.deepest = max(self.deepest, len(self.inflight))
        super().submit(ios, slots)

    def reap(self, least: int, wait_ns: int, most: int | None = None) -> Any:
        done = super().reap(least, wait_ns, min(self._a_look, most or self._a_look))
        for slot in done[0].tolist():
            del self.inflight[slot]
        self.batches.append(len(done[0]))
        return done

    async def wait(self, most: int | None = None) -> Any:
        return self.reap(1, 0, most)


async def work(*lines: str, queue: SlowQueue) -> JobStats:
    stats = JobStats()
    engine = Engine(job_of(*lines), queue, Place("f", 0, 1 << 20), stats, seed=1)
    with trio.fail_after(60):
        await engine.run()
    return stats


async def test_a_latency_target_holds_the_depth_back() -> None:
    """Nothing is as fast as a nanosecond, so the target allows no more than one I/O at a time."""
    queue = SlowQueue(8)
    lines = ("rw=randread", "iodepth=8", "latency_target=1ns", "latency_percentile=99", "latency_window=1us")
    stats = await work(*lines, "number_ios=50", queue=queue)
    assert (queue.deepest, stats.latency_depth, stats.directions[0].ios) == (1, 1, 50)
    stats = await work("rw=randread", "iodepth=8", "latency_target=1ns", queue=SlowQueue(8))
    assert (stats.error, stats.directions[0].ios) == (errno.ETIMEDOUT, 1)


async def test_a_latency_target_that_is_easy() -> None:
    """Doubled to the job's depth; what was counted on the way is forgotten, and a last window ends the job."""
    queue = SlowQueue(8, a_look=4)
    lines = (
        "rw=randread",
        "iodepth=8",
        "latency_target=100s",
        "latency_window=1ms",
        "time_based",
        "runtime=30",
    )
    stats = await work(*lines, queue=queue)
    assert (queue.deepest, stats.latency_depth, stats.error) == (8, 8, 0)
    assert stats.runtime < 29 * SECOND
    assert int(stats.depths[:2].sum()) == 0 < int(stats.depths.sum())


# Overlaps and batches


def test_overlaps() -> None:
    overlaps = Overlaps(1 << 20, 4096)
    assert overlaps.independent(ios_of((0, 4096), (4096, 8192), (8192, 4096))) == 2
    overlaps.begin(ios_of((4096, 8192)))
    assert overlaps.independent(ios_of((0, 4096), (12288, 4096), (0, 512))) == 2
    assert (
        overlaps.independent(
            ios_of(
                (8192, 4096),
            )
        )
        == 0
    )
    assert (
        overlaps.independent(
            ios_of(
                (512, 4096),
            )
        )
        == 0
    )  # it reaches into the next unit
    overlaps.end(ios_of((4096, 8192)))
    assert (
        overlaps.independent(
            ios_of(
                (8192, 4096),
            )
        )
        == 1
    )


@pytest.mark.parametrize("serialize", [0, 1])
async def test_overlaps_are_serialized(serialize: int) -> None:
    queue = SlowQueue(16)
    lines = ("rw=randrw", "iodepth=16", "bsrange=4k-16k", "norandommap", "size=128k", "io_size=1m")
    stats = await work(*lines, f"serialize_overlap={serialize}", queue=queue)
    assert stats.ios > 60
    assert bool(queue.overlapped) == (not serialize)


@pytest.mark.parametrize(
    ("lines", "most"),
    [
        ((), 32),
        (("iodepth_batch_complete_max=3",), 3),
        (("iodepth_batch_complete_min=5", "iodepth_batch_complete_max=2"), 5),
    ],
)
async def test_completions_come_in_batches_of_at_most(lines: tuple[str, ...], most: int) -> None:
    queue = SlowQueue(32, a_look=64)
    stats = await work("rw=read", "iodepth=32", "size=1m", *lines, queue=queue)
    assert (stats.directions[0].ios, max(queue.batches)) == (256, most)


async def test_rates_that_are_not_sampled_do_not_divide_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions are counted some thousands at a time, not one by one once the first interval is over."""
    counted: list[int] = []
    count = Recorder._count

    def watched(recorder: Recorder, index: int, part: dict[str, NDArray[np.int64]]) -> None:
        counted.append(len(part["length"]))
        count(recorder, index, part)

    monkeypatch.setattr(Recorder, "_count", watched)
    lines = "rw=read\nbs=4k\nsize=1m\nio_size=64m\niodepth=4\ndisable_bw=1\nbwavgtime=1ms\niopsavgtime=1ms\n"
    (item,) = await run_null(f"[j]\n{lines}")
    assert (counted, item.stats.directions[0].bw.values) == ([8192, 8192], [])


# Steady state


@pytest.mark.parametrize(
    ("criterion", "samples", "value", "attained"),
    [
        (Criterion("iops", True, True, 1.0), [100, 101, 102, 103], 100 / 101.5, True),
        (Criterion("iops", True, True, 0.9), [100, 101, 102, 103], 100 / 101.5, False),
        (Criterion("iops", True, False, 1.5), [103, 102, 101, 100], -1.0, True),
        (Criterion("bw", False, True, 10.0), [90, 110, 95, 105], 10.0, False),
        (Criterion("bw", False, False, 11.0), [90, 110, 95, 105], 10.0, True),
        (Criterion("lat", False, False, 1.0), [7, 7, 7, 7], 0.0, True),
        (Criterion("iops", True, True, 1.0), [0, 0, 0, 0], 0.0, False),
        (Criterion("iops", True, True, 50.0), [1, 1, 1], 0.0, False),
    ],
)
def test_steady(criterion: Criterion, samples: list[int], value: float, attained: bool) -> None:
    steady = Steady(criterion, 4, 4)
    for sample in [10**6, 0, *samples] if len(samples) == 4 else samples:
        found = steady.add(sample, sample, sample)
    assert (found, steady.attained) == (attained, attained)
    assert steady.value == pytest.approx(value)


STEADY = "ss=iops:60%\nss_dur=300ms\nss_interval=50ms\nrw=randread\nsize=1m\ntime_based\nruntime=20\nrate_iops=2000\n"


async def test_a_steady_job_ends() -> None:
    (item,) = await run_null("[s]\n" + STEADY)
    steady = item.stats.steady
    assert steady is not None
    assert steady.attained
    assert item.stats.error == 0
    assert 0.3 * SECOND <= item.stats.runtime < 15 * SECOND
    assert 1000 < steady.mean("iops") < 3000
    assert steady.mean("bw") == pytest.approx(4096 * steady.mean("iops"), rel=0.01)


async def test_a_group_is_steady_together() -> None:
    items = await run_null("[s]\nnumjobs=3\ngroup_reporting\nss_ramp=100ms\n" + STEADY)
    assert len({id(item.stats.steady) for item in items}) == 1
    steady = items[0].stats.steady
    assert steady is not None
    assert steady.attained
    assert 3000 < steady.mean("iops") < 9000
    assert max(item.stats.runtime for item in items) < 15 * SECOND


async def test_a_restless_job_goes_on() -> None:
    (item,) = await run_null(
        "[s]\nss=iops:1\nss_dur=100ms\nss_interval=50ms\nrw=randread\nsize=1m\ntime_based\nruntime=700ms\n"
    )
    assert item.stats.steady is not None
    assert not item.stats.steady.attained
    assert item.stats.runtime >= 0.7 * SECOND


async def test_exitall_on_error_ends_the_group() -> None:
    long = "rw=randread\nsize=1m\ntime_based\nruntime=30\n"
    for limit, ended in (("max_latency=1ns\n", True), ("", False)):
        runtime = "" if ended else "runtime=500ms\n"
        items = await run_null(f"[short]\nexitall_on_error\nrw=read\nsize=1m\n{limit}[a]\n{long}{runtime}")
        assert [bool(item.stats.error) for item in items] == [ended, False]
        assert (items[1].stats.runtime < 20 * SECOND) if ended else (items[1].stats.runtime >= SECOND // 2)


async def test_exitall_ends_the_group() -> None:
    """Those of it that wait for their delay are not begun; another group goes on."""
    long = "rw=randread\nsize=1m\ntime_based\nruntime=30\n"
    items = await run_null(
        f"[short]\nexitall\nrw=read\nsize=1m\n[a]\n{long}[never]\nstartdelay=30\n{long}"
        "[other]\nnew_group\nrw=randread\nsize=1m\ntime_based\nruntime=500ms\n"
    )
    assert {item.stats.name for item in items} == {"short", "a", "other"}
    runtimes = {item.stats.name: item.stats.runtime for item in items}
    assert runtimes["other"] >= SECOND // 2
    assert runtimes["a"] < 20 * SECOND
