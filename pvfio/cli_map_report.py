"""What ``pvfio dma-map-benchmark`` says in the end: Linux's lines and tables for people, or one JSON document.

Tables are in microseconds, or nanoseconds where they say so; every latency of the document is in nanoseconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pvfio.workloads.dma_map_benchmark import DIRECTIONS, linux_lines

if TYPE_CHECKING:
    from pvfio.cli_dma_map_benchmark import MapOptions, Measured
    from pvfio.workloads.dma_map_benchmark import MapResult

__all__ = ["report"]

_PARAMETERS = ("threads", "seconds", "node", "bits", "dir", "xdelay", "granule", "mode")


def _microseconds(ns: float) -> str:
    return f"{ns / 1000:.3f}" if ns < 10_000 else f"{ns / 1000:.1f}"


def _table(result: MapResult) -> list[str]:
    names = ("min", "median", "p90", "p99", "p999", "max")
    titles = ("min", "median", "90 %", "99 %", "99.9 %", "max")
    lines = [f"{'latency (us)':<14}" + "".join(f"{title:>11}" for title in titles)]
    for name in ("map", "unmap"):
        values = getattr(result, name).as_dict()
        lines.append(f"{name:<14}" + "".join(f"{_microseconds(values[key]):>11}" for key in names))
    return lines


def _breakdown_table(measured: Measured) -> list[str]:
    """Each step's nanoseconds and share; their sum, beside the median of the run without timers."""
    from pvfio.cli_map_breakdown import STEPS

    breakdown = measured.breakdown
    assert breakdown is not None
    parts = (breakdown.map, breakdown.unmap)
    sums = [sum(part.values()) for part in parts]
    lines = [
        f"{'where it goes':<18}" + "".join(f"{title:>11}{'':>8}" for title in ("map (ns)", "unmap (ns)"))
    ]
    for step in STEPS:
        if any(step in part for part in parts):
            cells = [
                f"{part[step]:>11,.0f}{part[step] / whole:>8.0%}" if step in part else f"{'-':>11}{'':>8}"
                for part, whole in zip(parts, sums, strict=True)
            ]
            lines.append(f"{step:<18}" + "".join(cells))
    lines.append(f"{'all of it':<18}" + "".join(f"{whole:>11,.0f}{1:>8.0%}" for whole in sums))
    plain = [getattr(measured.result, name).quantile(0.5) for name in ("map", "unmap")]
    return [
        *lines,
        f"{'without timers':<18}" + "".join(f"{median:>11,.0f}{'':>8}" for median in plain).rstrip(),
    ]


def _sweep_table(measured: Measured) -> list[str]:
    lines = [f"{'live mappings':<14}{'map (us)':>11}{'':>8}{'unmap (us)':>13}{'':>8}"]
    bases = [getattr(measured.sweep[0][1], name).quantile(0.5) for name in ("map", "unmap")]
    for count, result in measured.sweep:
        medians = [getattr(result, name).quantile(0.5) for name in ("map", "unmap")]
        ratios = [f"x{median / base:.2f}" for median, base in zip(medians, bases, strict=True)]
        lines.append(
            f"{count:<14,}{_microseconds(medians[0]):>11}{ratios[0]:>8}"
            f"{_microseconds(medians[1]):>13}{ratios[1]:>8}"
        )
    return [*lines, "medians, and how many times that of the first line"]


def _hypercalls(calls: int, loops: int) -> str:
    if not calls:
        return "none"
    each = f"{calls / loops:.2f} a mapping" if 2 * calls >= loops else f"one for {loops / calls:.0f} mappings"
    return f"{calls:,}, {each}"


def _facts(options: MapOptions, measured: Measured) -> list[tuple[str, str]]:
    result, params = measured.result, options.params
    api = {
        "dma": f"the DMA API, domain {options.domain}",
        "vfio": "VFIO type1, map_dma_nowait and unmap_dma_nowait",
        "pagetable": "the page-table layer alone, in a loop of C: x86-64, 4 levels",
    }[options.api]
    what = "threads" if options.api == "pagetable" else "tasks on one thread"
    facts = [
        ("api", f"{api}; {params.threads} {what}" if params.threads > 1 else api),
        ("mappings", f"{result.loops:,} in {result.seconds:.1f} s beside {options.mappings:,} live ones"),
    ]
    if options.api != "pagetable":
        facts.append(("hypercalls", _hypercalls(measured.hypercalls, result.loops)))
    facts.append(("clock", f"{measured.clock:.0f} ns to read, part of every latency"))
    return facts


def report(options: MapOptions, measured: Measured) -> None:
    """Draws the picture, if one is wanted, and prints the lines or the document."""
    if options.plot is not None:
        from pvfio.cli_map_plot import draw

        draw(options, measured)
    if options.json:
        print(json.dumps(_document(options, measured), indent=2))
        return
    lines = linux_lines(options.params, measured.result)
    lines += ["", *_table(measured.result), ""]
    if measured.breakdown is not None:
        lines += [*_breakdown_table(measured), ""]
    if measured.sweep:
        lines += [*_sweep_table(measured), ""]
    lines += [f"{name:<11} {value}" for name, value in _facts(options, measured)]
    if options.plot is not None:
        lines.append(f"{'plot':<11} {options.plot}")
    print("\n".join(lines))


def _document(options: MapOptions, measured: Measured) -> dict[str, Any]:
    """The run as one document; every latency in nanoseconds."""
    params, result = options.params, measured.result
    return {
        "config": {
            **{name: getattr(params, name) for name in _PARAMETERS},
            "dir_name": DIRECTIONS[params.dir],
            "api": options.api,
            "domain": options.domain if options.api == "dma" else None,
            "mappings": options.mappings,
            "platform": options.platform,
            "ram": options.ram,
        },
        "lines": linux_lines(params, result),
        "loops": result.loops,
        "seconds": result.seconds,
        "hypercalls": measured.hypercalls,
        "clock": measured.clock,
        "map": _latencies(result, "map"),
        "unmap": _latencies(result, "unmap"),
        "breakdown": None if measured.breakdown is None else asdict(measured.breakdown),
        "sweep": [
            {"mappings": count, "map": swept.map.as_dict(), "unmap": swept.unmap.as_dict()}
            for count, swept in measured.sweep
        ],
    }


def _latencies(result: MapResult, name: str) -> dict[str, Any]:
    latencies = getattr(result, name)
    edges, counts = latencies.histogram()
    buckets = [[int(edge), int(count)] for edge, count in zip(edges[:-1], counts, strict=True) if count]
    return {**latencies.as_dict(), "histogram": buckets}
