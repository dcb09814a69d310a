"""A job as it will run: every option of a section, or fio's default for it. The options by name are in options.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pvfio.workloads.fio.steady import Criterion

if TYPE_CHECKING:
    from pvfio.workloads.fio.pattern import Pattern

__all__ = ["DIRECTIONS", "PERCENTILES", "READ", "TRIM", "WRITE", "Distribution", "Job", "Mode", "Value3"]

READ, WRITE, TRIM = 0, 1, 2
DIRECTIONS: Final = ("read", "write", "trim")
PERCENTILES: Final = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)

Value3 = tuple[int, int, int]
"""Something for reads, for writes and for trims."""
Splits = tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, slots=True)
class Mode:
    """What ``rw=`` says: the directions, whether offsets are random, and the number after the colon."""

    name: str = "read"
    reads: bool = True
    writes: bool = False
    trims: bool = False
    random: bool = False
    modifier: int = 0

    @property
    def mixed(self) -> bool:
        """Whether reads and writes are mixed by ``rwmixread``."""
        return self.reads and self.writes

    @property
    def trim_then_write(self) -> bool:
        """Whether every block is trimmed and then written."""
        return self.trims and self.writes


@dataclass(frozen=True, slots=True)
class Distribution:
    """``random_distribution``: its kind, its parameter, its centre (0 to 1; None: fio's hash), or its zones as
    (share of the I/O in percent, share of the file in percent, or bytes for ``zoned_abs``).
    """

    kind: str = "random"
    theta: float = 0.0
    center: float | None = None
    zones: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job. Sizes are bytes, times nanoseconds; what comes in threes is for reads, writes, trims.

    ``size`` and ``offset`` may be a percentage of the file instead (``size_percent``, ``offset_percent``).
    """

    name: str
    where: str = ""
    own: tuple[tuple[str, str], ...] = ()
    inherited: tuple[tuple[str, str], ...] = ()
    description: str = ""
    mode: Mode = field(default_factory=Mode)
    ioengine: str = "psync"
    filename: str = ""
    size: int = 0
    size_percent: float | None = None
    io_size: int = 0
    offset: int = 0
    offset_percent: float | None = None
    offset_increment: int = 0
    number_ios: int = 0
    bs: tuple[tuple[int, int], ...] = ((4096, 4096),) * 3
    bssplit: Splits = ((), (), ())
    blockalign: Value3 = (0, 0, 0)
    iodepth: int = 1
    batch_submit: int = 1
    batch_complete_min: int = 1
    batch_complete_max: int = 0
    iodepth_low: int = 0
    numjobs: int = 1
    loops: int = 1
    runtime: int = 0
    time_based: bool = False
    ramp_time: int = 0
    startdelay: int = 0
    stonewall: bool = False
    new_group: bool = False
    group_reporting: bool = False
    exitall: bool = False
    exitall_on_error: bool = False
    rwmixread: float = 50
    rw_sequencer: str = "sequential"
    randseed: int = 0
    randrepeat: bool = True
    norandommap: bool = False
    distributions: tuple[Distribution, ...] = (Distribution(),) * 3
    percentage_random: Value3 = (100, 100, 100)
    rate: Value3 = (0, 0, 0)
    rate_iops: Value3 = (0, 0, 0)
    rate_min: Value3 = (0, 0, 0)
    rate_iops_min: Value3 = (0, 0, 0)
    rate_cycle: int = 10**9
    rate_process: str = "linear"
    max_latency: Value3 = (0, 0, 0)
    latency_target: int = 0
    latency_window: int = 0
    latency_percentile: float = 100.0
    latency_run: bool = False
    steady: Criterion = field(default_factory=Criterion)
    steady_duration: int = 0
    steady_ramp: int = 0
    steady_interval: int = 10**9
    thinktime: int = 0
    thinktime_blocks: int = 1
    verify: str = ""
    do_verify: bool = True
    verify_only: bool = False
    verify_pattern: Pattern | None = None
    verify_interval: int = 0
    verify_fatal: bool = False
    verify_write_sequence: bool = True
    verifysort: bool = True
    serialize_overlap: bool = False
    zero_buffers: bool = False
    refill_buffers: bool = False
    buffer_pattern: Pattern | None = None
    sync: bool = False
    fsync: int = 0
    fdatasync: int = 0
    end_fsync: bool = False
    continue_on_error: str = "none"
    percentiles: tuple[float, ...] = PERCENTILES
    precision: int = 2
    clat_percentiles: bool = True
    lat_percentiles: bool = False
    slat_percentiles: bool = False
    disable_lat: bool = False
    disable_clat: bool = False
    disable_slat: bool = False
    disable_bw: bool = False
    unified: bool = False
    bw_interval: int = 500 * 10**6
    iops_interval: int = 500 * 10**6
    write_bw_log: str = ""
    write_iops_log: str = ""
    write_lat_log: str = ""
    log_interval: int = 0
    kb_base: int = 1024

    def sizes(self, direction: int) -> list[int]:
        """What the blocks of a direction are multiples of."""
        return [size for size, _ in self.bssplit[direction]] or [self.bs[direction][0]]

    def least_block(self, direction: int) -> int:
        """The smallest block of a direction."""
        return min(self.sizes(direction))

    def most_block(self, direction: int) -> int:
        """The largest block of a direction."""
        split = self.bssplit[direction]
        return max(size for size, _ in split) if split else self.bs[direction][1]

    @property
    def directions(self) -> tuple[int, ...]:
        """Those it uses."""
        wanted = (self.mode.reads, self.mode.writes, self.mode.trims)
        return tuple(direction for direction in (READ, WRITE, TRIM) if wanted[direction])

    @property
    def grain(self) -> int:
        """Every block begins and ends at a multiple of so many bytes of the job's file."""
        sizes = [size for direction in self.directions for size in self.sizes(direction)]
        return math.gcd(self.hole, *sizes, *(self.blockalign[direction] for direction in self.directions))

    @property
    def refills(self) -> bool:
        """Whether each write has new data: there is nothing new in zeroes or in a pattern."""
        return (
            self.refill_buffers and self.mode.writes and not self.zero_buffers and self.buffer_pattern is None
        )

    @property
    def hole(self) -> int:
        """Bytes left out after each block of sequential I/O."""
        return 0 if self.mode.random else self.mode.modifier

    @property
    def verifying_reads(self) -> bool:
        """Whether what is read is verified as it comes: of a job that only reads."""
        return bool(self.verify) and self.mode.reads and not self.mode.writes
