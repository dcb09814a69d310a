"""What a job did: latencies, bytes, depths, rates sampled over time, errors; and joining several jobs of a group.

Latencies are taken in as arrays. ``clat`` is from the end of submission to completion, ``slat`` the submission,
``lat`` both, as fio has it; commands of one batch share the times of the batch. Processor time is the whole process's
while the job ran. Not here: the reports (report.py, report_json.py).
"""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.histogram import BUCKETS, bucket_of
from pvfio.workloads.fio.job import DIRECTIONS
from pvfio.workloads.fio.steady import Steady

__all__ = ["LATENCY_EDGES", "DirectionStats", "JobStats", "Latency", "Samples", "Usage"]

_NS: Final = (2, 4, 10, 20, 50, 100, 250, 500, 750, 1000)
LATENCY_EDGES: Final[NDArray[np.int64]] = np.array(
    list(_NS) + [n * 1000 for n in _NS] + [n * 1000_000 for n in _NS] + [2 * 10**9], dtype=np.int64
)
"""Where the coarse latency table's columns end: ten of nanoseconds, ten of microseconds, twelve of milliseconds."""
_DEPTHS: Final = 7


@dataclass
class Latency:
    """Least, most, mean and spread of latencies in nanoseconds, and fio's histogram of them."""

    count: int = 0
    least: int = 0
    most: int = 0
    total: int = 0
    squares: float = 0.0
    buckets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BUCKETS, dtype=np.int64))

    def add(self, values: NDArray[np.int64]) -> None:
        """Takes in values."""
        if not len(values):
            return
        low, high = int(values.min()), int(values.max())
        self.least = min(self.least, low) if self.count else low
        self.most = max(self.most, high)
        self.count += len(values)
        self.total += int(values.sum())
        self.squares += float(np.square(values, dtype=np.float64).sum())
        self.buckets += np.bincount(bucket_of(values), minlength=BUCKETS)

    def merge(self, other: Latency) -> None:
        """Takes in what another has."""
        if not other.count:
            return
        self.least = min(self.least, other.least) if self.count else other.least
        self.most = max(self.most, other.most)
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.buckets += other.buckets

    @property
    def mean(self) -> float:
        """0 where there is nothing."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """The sample's standard deviation (divided by n - 1)."""
        if self.count < 2:
            return 0.0
        return math.sqrt(max(self.squares - self.count * self.mean**2, 0.0) / (self.count - 1))


@dataclass
class Samples:
    """A rate sampled over time. ``values`` in order of ``times`` (milliseconds since the job began)."""

    values: list[float] = field(default_factory=list)
    times: list[int] = field(default_factory=list)

    def merge(self, other: Samples) -> None:
        """As fio joins jobs that ran side by side: their samples are added up, one by one."""
        longer, shorter = (self, other) if len(self.values) >= len(other.values) else (other, self)
        values = list(longer.values)
        for index, value in enumerate(shorter.values):
            values[index] += value
        self.values, self.times = values, list(longer.times)

    @property
    def mean(self) -> float:
        """0 where there is nothing."""
        return float(np.mean(self.values)) if self.values else 0.0

    @property
    def deviation(self) -> float:
        """The sample's standard deviation."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def least(self) -> int:
        """The smallest."""
        return int(min(self.values, default=0))

    @property
    def most(self) -> int:
        """The largest."""
        return int(max(self.values, default=0))


@dataclass
class DirectionStats:
    """Reads, writes or trims: ``runtime`` is nanoseconds."""

    ios: int = 0
    nbytes: int = 0
    runtime: int = 0
    slat: Latency = field(default_factory=Latency)
    clat: Latency = field(default_factory=Latency)
    lat: Latency = field(default_factory=Latency)
    bw: Samples = field(default_factory=Samples)
    iops: Samples = field(default_factory=Samples)

    def merge(self, other: DirectionStats) -> None:
        """Takes in what another job, running beside this one, did in the direction."""
        self.ios += other.ios
        self.nbytes += other.nbytes
        self.runtime = max(self.runtime, other.runtime)
        for mine, its in ((self.slat, other.slat), (self.clat, other.clat), (self.lat, other.lat)):
            mine.merge(its)
        self.bw.merge(other.bw)
        self.iops.merge(other.iops)

    @property
    def seconds(self) -> float:
        """At least a millisecond, which is fio's unit."""
        return max(self.runtime, 10**6) / 1e9

    @property
    def milliseconds(self) -> int:
        """Whole ones; 0 where nothing was done."""
        return max(self.runtime // 10**6, 1) if self.ios else 0

    @property
    def bytes_per_second(self) -> float:
        """The mean over the whole run."""
        return self.nbytes * 1000 / self.milliseconds if self.ios else 0.0

    @property
    def ios_per_second(self) -> float:
        """The mean over the whole run."""
        return self.ios * 1000 / self.milliseconds if self.ios else 0.0


@dataclass
class Usage:
    """The process while a job ran: seconds of processor time, context switches and page faults."""

    user: float = 0.0
    system: float = 0.0
    switches: int = 0
    major: int = 0
    minor: int = 0

    @classmethod
    def now(cls) -> Usage:
        """All of the process so far."""
        found = resource.getrusage(resource.RUSAGE_SELF)
        switches = found.ru_nvcsw + found.ru_nivcsw
        return cls(found.ru_utime, found.ru_stime, switches, found.ru_majflt, found.ru_minflt)

    def since(self, before: Usage) -> Usage:
        """What came after that."""
        return Usage(
            self.user - before.user,
            self.system - before.system,
            self.switches - before.switches,
            self.major - before.major,
            self.minor - before.minor,
        )

    def merge(self, other: Usage) -> None:
        """The same process ran both: the larger of each."""
        for name in ("user", "system", "switches", "major", "minor"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


@dataclass
class JobStats:
    """Everything of one job, or of a group of jobs. ``runtime`` in nanoseconds; ``error`` an errno, ``reason`` what it
    was about; ``failures`` lines about blocks that did not verify or commands that failed; ``latency_depth`` the depth
    that ``latency_target`` came to; ``steady`` what became of ``steadystate``.
    """

    name: str = ""
    group: int = 0
    jobs: int = 1
    runtime: int = 0
    directions: tuple[DirectionStats, ...] = field(
        default_factory=lambda: tuple(DirectionStats() for _ in DIRECTIONS)
    )
    mixed: DirectionStats | None = None
    flushes: Latency = field(default_factory=Latency)
    coarse: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(LATENCY_EDGES) + 1, dtype=np.int64)
    )
    depths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_DEPTHS, dtype=np.int64))
    submits: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_DEPTHS, dtype=np.int64))
    completes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_DEPTHS, dtype=np.int64))
    usage: Usage = field(default_factory=Usage)
    error: int = 0
    reason: str = ""
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    verified: int = 0
    latency_depth: int = 0
    steady: Steady | None = None

    def merge(self, other: JobStats) -> None:
        """Takes in another job of the group."""
        self.jobs += other.jobs
        self.runtime = max(self.runtime, other.runtime)
        for mine, its in zip(self.directions, other.directions, strict=True):
            mine.merge(its)
        self.flushes.merge(other.flushes)
        self.coarse += other.coarse
        self.depths += other.depths
        self.submits += other.submits
        self.completes += other.completes
        self.usage.merge(other.usage)
        self.failures += other.failures
        self.failed += other.failed
        self.verified += other.verified
        self.latency_depth = self.latency_depth or other.latency_depth
        self.steady = self.steady or other.steady
        if not self.error:
            self.error, self.reason = other.error, other.reason

    def count_depth(self, depth: int, count: int) -> None:
        """``count`` commands were submitted while so many were outstanding."""
        self.depths[min(max(depth, 1).bit_length() - 1, _DEPTHS - 1)] += count

    def count_submit(self, count: int) -> None:
        """A submission of so many."""
        self.submits[_batch_column(count)] += 1

    def count_complete(self, count: int) -> None:
        """A look that found so many complete."""
        self.completes[_batch_column(count)] += 1

    def add_coarse(self, values: NDArray[np.int64]) -> None:
        """Counts latencies in the table of powers of ten."""
        found = np.searchsorted(LATENCY_EDGES, values, side="right")
        self.coarse += np.bincount(found, minlength=len(self.coarse))

    @property
    def ios(self) -> int:
        """Of all directions."""
        return sum(direction.ios for direction in self.directions)


def _batch_column(count: int) -> int:
    """0, 1 to 4, 5 to 8, 9 to 16, and so on."""
    return 0 if count <= 0 else min(max((count - 1).bit_length() - 1, 1), _DEPTHS - 1)
