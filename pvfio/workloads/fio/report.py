"""fio's report for people: a line of each job before it runs, what each job or group did, and the groups' rates."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.histogram import percentiles
from pvfio.workloads.fio.job import DIRECTIONS, READ, TRIM, WRITE, Job
from pvfio.workloads.fio.stats import DirectionStats, JobStats, Latency, Samples
from pvfio.workloads.fio.steady import Steady
from pvfio.workloads.fio.units import bytes_text, number_text, rate_text

__all__ = ["VERSION", "Result", "header_lines", "job_lines", "run_status"]

VERSION: Final = "fio-3.33"
"""What the reports call themselves: tools look at it to know the format."""

Result = tuple[Job, JobStats]
_DEPTH_NAMES: Final = ("1", "2", "4", "8", "16", "32", ">=64")
_BATCH_NAMES: Final = ("0", "4", "8", "16", "32", "64", ">=64")
_LATENCY_NAMES: Final = ("2", "4", "10", "20", "50", "100", "250", "500", "750", "1000")


def _block_range(job: Job, direction: int) -> str:
    return f"{bytes_text(job.least_block(direction))}-{bytes_text(job.most_block(direction))}"


def header_lines(job: Job, group: int) -> list[str]:
    """What fio says about a job before it begins."""
    sizes = ", ".join(f"({'RWT'[d]}) {_block_range(job, d)}" for d in (READ, WRITE, TRIM))
    line = f"{job.name}: (g={group}): rw={job.mode.name}, bs={sizes}, ioengine={job.ioengine}, iodepth={job.iodepth}"
    return [line, "..."] if job.numjobs > 1 else [line]


def _scale(latency: Latency) -> tuple[int, str]:
    """The divisor and unit in which all of it is readable."""
    if latency.least > 2_000_000 and latency.most > 99_999_999 and latency.deviation > 1_000_000:
        return 1_000_000, "msec"
    if latency.least > 2_000 and latency.most > 99_999 and latency.deviation > 1_000:
        return 1_000, "usec"
    return 1, "nsec"


def _latency_line(name: str, latency: Latency) -> str:
    divisor, unit = _scale(latency)
    least, most = (number_text(value // divisor, 6) for value in (latency.least, latency.most))
    mean, deviation = latency.mean / divisor, latency.deviation / divisor
    return f"    {name} ({unit}): min={least:>5}, max={most:>5}, avg={mean:5.2f}, stdev={deviation:5.2f}"


def _percentile_lines(
    name: str, counts: NDArray[np.int64], shares: Sequence[float], precision: int
) -> Iterator[str]:
    values = percentiles(counts, shares)
    unit, divisor = "nsec", 1
    if min(values) > 2_000_000 and max(values) > 99_999_999:
        unit, divisor = "msec", 1_000_000
    elif min(values) > 2_000 and max(values) > 99_999:
        unit, divisor = "usec", 1_000
    if divisor > 1:
        values = [(value + divisor - 1) // divisor for value in values]
    width = max(5, len(str(max(values))))
    a_line = max(1, (80 - 7) // (precision + 10 + width))
    yield f"    {name} percentiles ({unit}):"
    cells = [
        f" {share:{precision + 3}.{precision}f}th=[{value:>{width}}]"
        for share, value in zip(shares, values, strict=True)
    ]
    for start in range(0, len(cells), a_line):
        end = start + a_line
        yield f"     |{','.join(cells[start:end])}{',' if end < len(cells) else ''}"


def _sample_lines(stats: DirectionStats) -> Iterator[str]:
    bw, iops = stats.bw, stats.iops
    if bw.values:
        divisor, unit = (1, "KiB") if bw.mean <= 999_999 else (1024, "MiB")
        share = min(100.0, 100 * bw.mean * 1024 / stats.bytes_per_second)
        yield (
            f"   bw ({unit:>5}/s): min={bw.least // divisor:5d}, max={bw.most // divisor:5d}, per={share:3.2f}%, "
            f"avg={bw.mean / divisor:5.2f}, stdev={bw.deviation / divisor:5.2f}, samples={len(bw.values)}"
        )
        yield _iops_line(iops)


def _iops_line(iops: Samples) -> str:
    return (
        f"   iops        : min={iops.least:5d}, max={iops.most:5d}, avg={iops.mean:5.2f}, "
        f"stdev={iops.deviation:5.2f}, samples={len(iops.values)}"
    )


def _direction_lines(job: Job, name: str, stats: DirectionStats) -> Iterator[str]:
    rate = stats.bytes_per_second
    yield (
        f"  {name}: IOPS={number_text(stats.ios_per_second)}, BW={rate_text(rate)} "
        f"({rate_text(rate, binary=False)})({bytes_text(stats.nbytes)}/{stats.milliseconds}msec)"
        + ("; 0 zone resets" if name == "write" else "")
    )
    for label, latency in (("slat", stats.slat), ("clat", stats.clat), (" lat", stats.lat)):
        if latency.count:
            yield _latency_line(label, latency)
    wanted = (
        (job.clat_percentiles and not job.lat_percentiles, "clat", stats.clat),
        (job.slat_percentiles, "slat", stats.slat),
        (job.lat_percentiles, " lat", stats.lat),
    )
    for shown, label, latency in wanted:
        if shown and latency.count:
            yield from _percentile_lines(label, latency.buckets, job.percentiles, job.precision)
    yield from _sample_lines(stats)


def _coarse_lines(stats: JobStats) -> Iterator[str]:
    total = int(stats.coarse.sum())
    if not total:
        return
    tables = (
        ("nsec", _LATENCY_NAMES, stats.coarse[:10]),
        ("usec", _LATENCY_NAMES, stats.coarse[10:20]),
        ("msec", (*_LATENCY_NAMES, "2000", ">=2000"), stats.coarse[20:]),
    )
    for unit, names, counts in tables:
        cells = [f"{n}={_percent(c, total):3.2f}%" for n, c in zip(names, counts.tolist(), strict=True) if c]
        for start in range(0, len(cells), 5):
            yield f"  lat ({unit})   : {', '.join(cells[start : start + 5])}"


def _percent(count: int, total: int) -> float:
    """What is there at all is at least 0.01 %."""
    return max(100 * count / total, 0.01) if count else 0.0


def _depth_line(label: str, names: Sequence[str], counts: NDArray[np.int64]) -> str:
    total = int(counts.sum())
    cells = (
        f"{name}={_share(count, total):3.1f}%" for name, count in zip(names, counts.tolist(), strict=True)
    )
    return f"{label}: {', '.join(cells)}"


def _share(count: int, total: int) -> float:
    return max(100 * count / total, 0.1) if count and total else 0.0


def job_lines(result: Result, *, when: float | None = None) -> Iterator[str]:
    """What a job, or a group of jobs, did."""
    job, stats = result
    error = f"{stats.error:2d}" + (f" ({stats.reason})" if stats.error else "")
    moment = time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(when))
    yield f"{stats.name}: (groupid={stats.group}, jobs={stats.jobs}): err={error}: pid={os.getpid()}: {moment}"
    if job.description:
        yield f"  Description  : [{job.description}]"
    shown = (
        [("mixed", stats.mixed)]
        if stats.mixed is not None
        else [*zip(DIRECTIONS, stats.directions, strict=True)]
    )
    for name, direction in shown:
        if direction.ios:
            yield from _direction_lines(job, name, direction)
    if stats.flushes.count:
        yield "  fsync/fdatasync/sync_file_range:"
        yield _latency_line("sync", stats.flushes)
        if job.clat_percentiles:
            yield from _percentile_lines("sync", stats.flushes.buckets, job.percentiles, job.precision)
    yield from _coarse_lines(stats)
    yield from _tail_lines(job, stats)


def _tail_lines(job: Job, stats: JobStats) -> Iterator[str]:
    seconds = max(stats.runtime, 10**6) / 1e9
    usage = stats.usage
    yield (
        f"  cpu          : usr={100 * usage.user / seconds:3.2f}%, sys={100 * usage.system / seconds:3.2f}%, "
        f"ctx={usage.switches}, majf={usage.major}, minf={usage.minor}"
    )
    yield _depth_line("  IO depths    ", _DEPTH_NAMES, stats.depths)
    yield _depth_line("     submit    ", _BATCH_NAMES, stats.submits)
    yield _depth_line("     complete  ", _BATCH_NAMES, stats.completes)
    issued = ",".join(str(direction.ios) for direction in stats.directions)
    yield f"     issued rwts: total={issued},{stats.flushes.count} short=0,0,0,0 dropped=0,0,0,0"
    yield (
        f"     latency   : target={job.latency_target}, window={job.latency_window // 1000}, "
        f"percentile={job.latency_percentile:3.2f}%, depth={stats.latency_depth or job.iodepth}"
    )
    if stats.steady is not None:
        yield _steady_line(stats.steady)
    if stats.verified:
        yield f"     verify    : {job.verify}: {stats.verified} blocks, {stats.failed} failed"


def _steady_line(steady: Steady) -> str:
    bw, criterion = steady.mean("bw"), steady.criterion
    latency = f", lat={number_text(steady.mean('lat'), unit='nsec')}" if criterion.kind == "lat" else ""
    return (
        f"  steadystate  : attained={'yes' if steady.attained else 'no'}, "
        f"bw={rate_text(bw)} ({rate_text(bw, binary=False)}), iops={number_text(steady.mean('iops'))}{latency}, "
        f"{criterion.kind}{' slope' if criterion.slope else ' mean dev'}={steady.value:.3f}{criterion.unit}"
    )


def run_status(results: Sequence[Result]) -> Iterator[str]:
    """The rates of every group of jobs: together, the slowest, the fastest."""
    for group in sorted({stats.group for _, stats in results}):
        yield ""
        yield f"Run status group {group} (all jobs):"
        members = [stats for _, stats in results if stats.group == group]
        for index, name in enumerate(("READ", "WRITE", "TRIM")):
            found = [stats.directions[index] for stats in members if stats.directions[index].ios]
            if found:
                yield _group_line(name, found, [s.jobs for s in members if s.directions[index].ios])


def _group_line(name: str, found: Sequence[DirectionStats], jobs: Sequence[int]) -> str:
    longest = max(direction.milliseconds for direction in found)
    nbytes = sum(direction.nbytes for direction in found)
    total = nbytes * 1000 / longest
    rates = [direction.bytes_per_second for direction in found]
    low, high = min(rates), max(rates)
    return (
        f"{name:>7}: bw={rate_text(total)} ({rate_text(total, binary=False)}), "
        f"{rate_text(low)}-{rate_text(high)} ({rate_text(low, binary=False)}-{rate_text(high, binary=False)}), "
        f"io={bytes_text(nbytes)} ({bytes_text(nbytes, binary=False)}), "
        f"run={min(direction.milliseconds for direction in found)}-{longest}msec"
    )
