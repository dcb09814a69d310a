"""The picture of ``pvfio dma-map-benchmark --plot``: how latencies spread, and what live mappings do to them.

matplotlib draws it, without a display; it is an optional dependency.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvfio.cli_run import UsageError

if TYPE_CHECKING:
    from pvfio.cli_dma_map_benchmark import MapOptions, Measured

__all__ = ["check", "draw"]

_SHOWN = 0.99  # the share of latencies the histogram shows
_STYLES = (("map", "C0"), ("unmap", "C1"))


def check(path: Path) -> None:
    """``UsageError`` where there is no matplotlib, or the file cannot be written or has no picture's name."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise UsageError("--plot needs matplotlib (pip install 'pvfio[plot]')") from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UsageError(f"{path}: a picture's name ends in .{', .'.join(sorted(kinds))}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{path}: cannot be written")


def draw(options: MapOptions, measured: Measured) -> None:
    """Writes the picture to ``options.plot``."""
    from matplotlib.figure import Figure

    assert options.plot is not None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    result = measured.result
    unit, scale = (
        ("ns", 1) if max(result.map.quantile(0.5), result.unmap.quantile(0.5)) < 1000 else ("us", 1000)
    )
    _histogram(left, measured, unit, scale)
    _sweep(right, measured, unit, scale)
    figure.suptitle(_title(options))
    figure.savefig(options.plot)


def _title(options: MapOptions) -> str:
    params = options.params
    api = f"dma ({options.domain})" if options.api == "dma" else options.api
    pages = "1 page" if params.granule == 1 else f"{params.granule} pages"
    threads = "1 thread" if params.threads == 1 else f"{params.threads} threads"
    return f"dma-map-benchmark: api {api}, {pages} a mapping, mode {params.mode}, {threads}"


def _histogram(axes: Any, measured: Measured, unit: str, scale: int) -> None:
    """The share of the mappings in each bucket of the record; the buckets are equally wide on this axis."""
    ends = []
    for name, colour in _STYLES:
        latencies = getattr(measured.result, name)
        edges, counts = latencies.histogram()
        label = f"{name}, median {latencies.quantile(0.5) / scale:.3g} {unit}"
        shares = 100 * counts / latencies.count
        axes.stairs(shares, edges / scale, color=colour, fill=True, alpha=0.5, label=label)
        axes.axvline(latencies.quantile(0.5) / scale, color=colour, linestyle="--", linewidth=1)
        ends += [latencies.least / scale, latencies.quantile(_SHOWN) / scale]
    axes.set_xscale("log")
    axes.set_xlim(0.9 * min(ends) or None, 1.2 * max(ends))
    _plain_numbers(axes.xaxis)
    axes.set(
        xlabel=f"latency ({unit}); the slowest 1 % may lie beyond",
        ylabel="% of the mappings",
        title="Latencies",
    )
    axes.legend()


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, 20 in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _sweep(axes: Any, measured: Measured, unit: str, scale: int) -> None:
    """Medians, and the band of the middle 80 %, against the number of live mappings."""
    counts = [count for count, _ in measured.sweep]
    for name, colour in _STYLES:
        results = [getattr(result, name) for _, result in measured.sweep]
        low, middle, high = ([each.quantile(share) / scale for each in results] for share in (0.1, 0.5, 0.9))
        axes.plot(counts, middle, color=colour, marker="o", markersize=4, label=f"{name}, median")
        axes.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set(
        xlabel="live mappings",
        ylabel=f"latency ({unit}), middle 80 % shaded",
        title="Cost beside live mappings",
    )
    axes.legend()
