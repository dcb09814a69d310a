"""fio's report for programs: ``--output-format=json`` with fio's keys, in fio's order.

``json+`` adds the histogram's buckets to each latency. ``verify`` in a job (blocks verified and failed, and lines about
those that failed) is pvfio's own. Not modelled: disk utilisation, client and server.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.histogram import middle_of, percentiles
from pvfio.workloads.fio.job import DIRECTIONS, Job
from pvfio.workloads.fio.report import VERSION, Result
from pvfio.workloads.fio.stats import DirectionStats, JobStats, Latency, Samples
from pvfio.workloads.fio.steady import Steady

__all__ = ["document"]

_NAMES: Final = ("2", "4", "10", "20", "50", "100", "250", "500", "750", "1000")
_DEPTHS: Final = ("1", "2", "4", "8", "16", "32", ">=64")
_BATCHES: Final = ("0", "4", "8", "16", "32", "64", ">=64")
_NO_ETA: Final = 0x7FFFFFFF


def _latency(latency: Latency, job: Job, shares: bool, bins: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "min": latency.least,
        "max": latency.most,
        "mean": latency.mean,
        "stddev": latency.deviation,
        "N": latency.count,
    }
    if shares and latency.count:
        values = percentiles(latency.buckets, job.percentiles)
        found["percentile"] = {f"{s:.6f}": value for s, value in zip(job.percentiles, values, strict=True)}
        if bins:
            filled = np.flatnonzero(latency.buckets)
            found["bins"] = {str(middle_of(int(index))): int(latency.buckets[index]) for index in filled}
    return found


def _samples(name: str, samples: Samples, agg: float | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {f"{name}_min": samples.least, f"{name}_max": samples.most}
    if agg is not None:
        found[f"{name}_agg"] = agg
    found[f"{name}_mean"] = samples.mean
    found["bw_dev" if name == "bw" else "iops_stddev"] = samples.deviation
    found[f"{name}_samples"] = len(samples.values)
    return found


def _direction(stats: DirectionStats, job: Job, bins: bool) -> dict[str, Any]:
    rate = stats.bytes_per_second
    share = min(100.0, 100 * stats.bw.mean * 1024 / rate) if rate and stats.bw.values else 0.0
    return {
        "io_bytes": stats.nbytes,
        "io_kbytes": stats.nbytes >> 10,
        "bw_bytes": int(rate),
        "bw": int(rate) >> 10,
        "iops": stats.ios_per_second,
        "runtime": stats.milliseconds,
        "total_ios": stats.ios,
        "short_ios": 0,
        "drop_ios": 0,
        "slat_ns": _latency(stats.slat, job, job.slat_percentiles, bins),
        "clat_ns": _latency(stats.clat, job, job.clat_percentiles and not job.lat_percentiles, bins),
        "lat_ns": _latency(stats.lat, job, job.lat_percentiles, bins),
        **_samples("bw", stats.bw, share),
        **_samples("iops", stats.iops),
    }


def _steady(steady: Steady) -> dict[str, Any]:
    criterion = steady.criterion
    return {
        "ss": f"{criterion.name}:{criterion.limit:f}{criterion.unit}",
        "duration": steady.duration,
        "attained": int(steady.attained),
        "criterion": f"{steady.value:f}{criterion.unit}",
        "max_deviation": steady.deviation,
        "slope": steady.slope,
        "data": {
            "bw_mean": int(steady.mean("bw")),
            "iops_mean": int(steady.mean("iops")),
            "iops": list(steady.samples["iops"]),
            "bw": list(steady.samples["bw"]),
        },
    }


def _shares(names: Sequence[str], counts: NDArray[np.int64], total: int, least: float) -> dict[str, float]:
    values = counts.tolist()
    return {
        name: max(100 * count / total, least) if count and total else 0.0
        for name, count in zip(names, values, strict=True)
    }


def _job(result: Result, elapsed: float, bins: bool) -> dict[str, Any]:
    job, stats = result
    found: dict[str, Any] = {
        "jobname": stats.name,
        "groupid": stats.group,
        "error": stats.error,
        "eta": _NO_ETA,
        "elapsed": int(elapsed) + 1,
        "job options": dict(job.own),
    }
    if job.description:
        found["desc"] = job.description
    if stats.mixed is not None:
        found["mixed"] = _direction(stats.mixed, job, bins)
    else:
        for name, direction in zip(DIRECTIONS, stats.directions, strict=True):
            found[name] = _direction(direction, job, bins)
    flushes = _latency(stats.flushes, job, job.clat_percentiles, bins)
    found["sync"] = {"total_ios": stats.flushes.count, "lat_ns": flushes}
    return found | _rest(job, stats)


def _rest(job: Job, stats: JobStats) -> dict[str, Any]:
    seconds = max(stats.runtime, 10**6) / 1e9
    total = int(stats.coarse.sum())
    found: dict[str, Any] = {
        "job_runtime": stats.runtime // 10**6,
        "usr_cpu": 100 * stats.usage.user / seconds,
        "sys_cpu": 100 * stats.usage.system / seconds,
        "ctx": stats.usage.switches,
        "majf": stats.usage.major,
        "minf": stats.usage.minor,
        "iodepth_level": _shares(_DEPTHS, stats.depths, int(stats.depths.sum()), 0.1),
        "iodepth_submit": _shares(_BATCHES, stats.submits, int(stats.submits.sum()), 0.1),
        "iodepth_complete": _shares(_BATCHES, stats.completes, int(stats.completes.sum()), 0.1),
        "latency_ns": _shares(_NAMES, stats.coarse[:10], total, 0.01),
        "latency_us": _shares(_NAMES, stats.coarse[10:20], total, 0.01),
        "latency_ms": _shares((*_NAMES, "2000", ">=2000"), stats.coarse[20:], total, 0.01),
        "latency_depth": stats.latency_depth or job.iodepth,
        "latency_target": job.latency_target,
        "latency_percentile": job.latency_percentile,
        "latency_window": job.latency_window // 1000,
    }
    if stats.steady is not None:
        found["steadystate"] = _steady(stats.steady)
    if stats.verified:
        found["verify"] = {"blocks": stats.verified, "failed": stats.failed, "failures": stats.failures}
    if stats.error:
        found["reason"] = stats.reason
    return found


def document(
    results: Sequence[Result], *, began: float, elapsed: float, bins: bool = False
) -> dict[str, Any]:
    """The report of a run that began at ``began`` (seconds since the epoch) and took ``elapsed`` seconds."""
    ended = began + elapsed
    options = [dict(job.inherited) for job, _ in results]
    shared = options[0] if options and all(found == options[0] for found in options) else {}
    return {
        "fio version": VERSION,
        "timestamp": int(ended),
        "timestamp_ms": int(ended * 1000),
        "time": time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(ended)),
        "global options": shared,
        "jobs": [_job(result, elapsed, bins) for result in results],
    }
