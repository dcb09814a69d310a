"""What completed, gathered in arrays and counted some thousands at a time; rates sampled over time; fio's log files.

A log line is "time in ms, value, direction, block size, priority", of which there is none; values are KiB/s, I/Os a
second and nanoseconds, averaged over ``log_avg_msec``, or one line an I/O without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pvfio.abi import ffi, lib
from pvfio.workloads.fio.job import DIRECTIONS, Job
from pvfio.workloads.fio.slots import Slots
from pvfio.workloads.fio.stats import JobStats

__all__ = ["TIMELINE_NS", "Recorder", "write_logs"]

_CAPACITY: Final = 8192
_MOST_LOGGED: Final = 20_000_000
TIMELINE_NS: Final = 10_000_000
"""The width of a timeline's bins."""
_NEVER: Final = 1 << 63
_FIELDS: Final = ("when", "direction", "length", "slat", "clat")


class Recorder:
    """Collects a job's completions into ``stats``. Times are nanoseconds of one clock; ``begin`` is its zero.

    ``timeline``: I/Os, bytes and the sum of latencies for each direction and 10 ms, shape (3, 3, bins).
    """

    def __init__(self, job: Job, stats: JobStats, begin: int) -> None:
        self.job = job
        self.stats = stats
        self.begin = begin
        self._used = 0
        self._arrays: dict[str, NDArray[np.int64]] = {name: np.zeros(_CAPACITY, np.int64) for name in _FIELDS}
        self._kept = {name: ffi.from_buffer("int64_t[]", array) for name, array in self._arrays.items()}
        self._record = ffi.new("struct pv_fio_record *", self._kept | {"capacity": _CAPACITY})
        self._keep = bool(job.write_bw_log or job.write_iops_log or job.write_lat_log)
        self.logged: list[dict[str, NDArray[np.int64]]] = []
        self._logged = 0
        self.timeline: NDArray[np.int64] = np.zeros((3, 3, 64), dtype=np.int64)
        self._begin_samples(begin)

    def add(self, now: int, slots: Slots, which: NDArray[np.intp]) -> None:
        """The I/Os in some of the slots completed at ``now``."""
        count, chosen = len(which), ffi.from_buffer("int64_t[]", which)
        while count:
            noted = lib.pv_fio_note(slots.table, self._record, self._used, chosen, count, now)
            if noted < 0:
                raise ValueError(f"there is no such slot among {slots.depth}")
            self._used += noted
            if self._used == _CAPACITY:
                self.fold()
            count -= noted
            chosen += noted
        if now >= self._next_sample:
            self._sample(now)

    def restart(self, now: int) -> None:
        """Forgets everything: the ramp is over."""
        self._used = 0
        stats = self.stats
        fresh = JobStats(stats.name, stats.group)
        for name in ("directions", "coarse", "depths", "submits", "completes", "flushes"):
            setattr(stats, name, getattr(fresh, name))
        self.timeline[:] = 0
        self.logged, self._logged = [], 0
        self.begin = now
        self._begin_samples(now)

    def fold(self) -> None:
        """Counts what was gathered."""
        if not self._used:
            return
        part = {name: array[: self._used] for name, array in self._arrays.items()}
        directions = part["direction"]
        for index in np.flatnonzero(np.bincount(directions, minlength=3)).tolist():
            chosen = np.flatnonzero(directions == index)
            self._count(index, {name: array[chosen] for name, array in part.items()})
        if self._keep and self._logged < _MOST_LOGGED:
            self.logged.append({name: array.copy() for name, array in part.items()})
            self._logged += self._used
        self._used = 0

    def _count(self, index: int, part: dict[str, NDArray[np.int64]]) -> None:
        stats, job = self.stats.directions[index], self.job
        stats.ios += len(part["length"])
        stats.nbytes += int(part["length"].sum())
        slat, clat = part["slat"], part["clat"]
        lat = slat + clat
        if not job.disable_slat and job.iodepth > 1:
            stats.slat.add(slat)
        if not job.disable_clat:
            stats.clat.add(clat)
        if not job.disable_lat:
            stats.lat.add(lat)
            self.stats.add_coarse(lat)
        self._draw(index, part, lat)

    def _draw(self, index: int, part: dict[str, NDArray[np.int64]], lat: NDArray[np.int64]) -> None:
        bins = np.maximum(part["when"] - self.begin, 0) // TIMELINE_NS
        last = int(bins.max())
        if last >= self.timeline.shape[2]:
            grown = np.zeros((3, 3, max(2 * self.timeline.shape[2], last + 1)), dtype=np.int64)
            grown[:, :, : self.timeline.shape[2]] = self.timeline
            self.timeline = grown
        width = last + 1
        self.timeline[index, 0, :width] += np.bincount(bins, minlength=width)
        self.timeline[index, 1, :width] += np.bincount(bins, part["length"], width).astype(np.int64)
        self.timeline[index, 2, :width] += np.bincount(bins, lat, width).astype(np.int64)

    def _begin_samples(self, now: int) -> None:
        job = self.job
        self._sampled = {"bw": now, "iops": now}
        self._before = {name: [0] * len(DIRECTIONS) for name in self._sampled}
        self._next_sample = _NEVER if job.disable_bw else now + min(job.bw_interval, job.iops_interval)

    def _sample(self, now: int) -> None:
        self.fold()
        job = self.job
        for name, interval in (("bw", job.bw_interval), ("iops", job.iops_interval)):
            elapsed = now - self._sampled[name]
            if elapsed < interval:
                continue
            before = self._before[name]
            for index, stats in enumerate(self.stats.directions):
                total = stats.nbytes if name == "bw" else stats.ios
                delta = total - before[index]
                before[index] = total
                if stats.ios:
                    samples = stats.bw if name == "bw" else stats.iops
                    samples.values.append(delta * 1e9 / elapsed / (1024 if name == "bw" else 1))
                    samples.times.append((now - self.begin) // 10**6)
            self._sampled[name] = now
        self._next_sample = min(
            self._sampled["bw"] + job.bw_interval, self._sampled["iops"] + job.iops_interval
        )


def _averages(
    part: dict[str, NDArray[np.int64]], begin: int, interval: int
) -> list[tuple[int, int, NDArray[np.intp]]]:
    """(ms of the end, direction, indexes) of every interval of each direction."""
    found = []
    bins = (part["when"] - begin) // interval
    for direction in range(len(DIRECTIONS)):
        mine = np.flatnonzero(part["direction"] == direction)
        if not len(mine):
            continue
        edges = np.flatnonzero(np.diff(bins[mine])) + 1
        groups = np.split(mine, edges)
        found += [((int(bins[group[0]]) + 1) * interval // 10**6, direction, group) for group in groups]
    return sorted(found, key=lambda row: row[:2])


def write_logs(recorder: Recorder, number: int, folder: Path) -> list[Path]:
    """Writes the logs the job asks for; ``number`` counts jobs from 1. ``OSError``."""
    job = recorder.job
    if not recorder.logged:
        return []
    part = {name: np.concatenate([chunk[name] for chunk in recorder.logged]) for name in _FIELDS}
    kinds = [("bw", job.write_bw_log), ("iops", job.write_iops_log)]
    kinds += [(kind, job.write_lat_log) for kind in ("slat", "clat", "lat")]
    written = []
    for kind, prefix in kinds:
        if prefix:
            path = folder / f"{prefix}_{kind}.{number}.log"
            path.write_text("".join(f"{line}\n" for line in _log_lines(kind, part, recorder.begin, job)))
            written.append(path)
    return written


def _log_lines(kind: str, part: dict[str, NDArray[np.int64]], begin: int, job: Job) -> list[str]:
    latencies = {"slat": part["slat"], "clat": part["clat"], "lat": part["slat"] + part["clat"]}
    if job.log_interval:
        lines = []
        seconds = job.log_interval / 1e9
        for ms, direction, group in _averages(part, begin, job.log_interval):
            if kind == "bw":
                value = part["length"][group].sum() / 1024 / seconds
            else:
                value = len(group) / seconds if kind == "iops" else latencies[kind][group].mean()
            lines.append(f"{ms}, {int(value)}, {direction}, 0, 0")
        return lines
    times = ((part["when"] - begin) // 10**6).tolist()
    lat = np.maximum(latencies["lat"], 1)
    if kind == "iops":
        values = [1] * len(times)
    else:
        values = (part["length"] * 1_000_000_000 // 1024 // lat if kind == "bw" else latencies[kind]).tolist()
    rows = zip(times, values, part["direction"].tolist(), part["length"].tolist(), strict=True)
    return [f"{ms}, {value}, {direction}, {length}, 0" for ms, value, direction, length in rows]
