"""The picture of ``pvfio fio --plot``: I/Os a second and latency over time, and how latencies spread.

matplotlib draws it, without a display; it is an optional dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pvfio.cli_map_plot import check

if TYPE_CHECKING:
    from pvfio.workloads.fio.report import Result
    from pvfio.workloads.fio.run import Finished

__all__ = ["check", "draw"]

_POINTS: Final = 200


def draw(path: Path, finished: Sequence[Finished], results: Sequence[Result]) -> None:
    """Writes the picture: a column for each of the three, a line for each job and direction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    iops, latency, spread = figure.subplots(1, 3)
    for item in finished:
        _over_time(iops, latency, item)
    for job, stats in results:
        for name, direction in zip(("read", "write", "trim"), stats.directions, strict=True):
            if direction.lat.count:
                _spread(spread, f"{job.name} {name}", direction.lat.buckets)
    iops.set(xlabel="seconds", ylabel="I/Os a second", title="IOPS", ylim=(0, None))
    latency.set(xlabel="seconds", ylabel="microseconds", title="mean latency", ylim=(0, None))
    spread.set(xlabel="microseconds", ylabel="percent of I/Os", title="latency", xscale="log", ylim=(0, 100))
    for axes in (iops, latency, spread):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path)


def _over_time(iops: Any, latency: Any, item: Finished) -> None:
    from pvfio.workloads.fio.record import TIMELINE_NS

    timeline = item.recorder.timeline
    bins = int(np.flatnonzero(timeline[:, 0].any(axis=0)).max(initial=-1)) + 1
    if not bins:
        return
    width = -(-bins // _POINTS)
    padded = np.zeros((3, 3, -(-bins // width) * width), dtype=np.int64)
    padded[:, :, :bins] = timeline[:, :, :bins]
    columns = padded.reshape(3, 3, -1, width).sum(axis=3)
    seconds = width * TIMELINE_NS / 1e9
    times = (np.arange(columns.shape[2]) + 0.5) * seconds
    for index, name in enumerate(("read", "write", "trim")):
        ios, _, total = columns[index]
        if ios.any():
            label = f"{item.clone.job.name} {name}" + (f" {item.clone.number}" if item.clone.number else "")
            iops.plot(times, ios / seconds, label=label)
            some = np.flatnonzero(ios)
            latency.plot(times[some], total[some] / ios[some] / 1000, label=label)


def _spread(axes: Any, label: str, buckets: Any) -> None:
    from pvfio.workloads.fio.histogram import middle_of

    filled = np.flatnonzero(buckets)
    values = np.array([middle_of(int(index)) for index in filled]) / 1000
    axes.step(values, 100 * np.cumsum(buckets[filled]) / buckets.sum(), where="post", label=label)
