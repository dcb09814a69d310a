"""``pvfio dmatest --bench``: the device's speed beside that of plain C loops, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pvfio.cli_run import DEVICE, UsageError, machine_config, run_program, terminal_progress

if TYPE_CHECKING:
    from pvfio.cli_dmatest import DmatestOptions
    from pvfio.cli_run import EngineChoice
    from pvfio.workloads.dsa_bench import Bench, Figure

__all__ = ["run"]

_ROUNDS = 31
_STEPS = 19  # figures of one engine
_ENGINES = {"inline": "in the caller, one processor", "thread": "a thread of its own"}


def run(options: DmatestOptions, engines: tuple[EngineChoice, ...]) -> int:
    """Measures each engine; 0. ``UsageError`` for options that go with tests only."""

    async def main() -> int:
        if options.input is not None or options.operation is not None:
            raise UsageError("--bench measures every operation: it goes neither with --input nor --operation")
        results: dict[str, Bench] = {}
        total = _STEPS * len(engines)
        with terminal_progress(total, "figures", quiet=options.json, thread=False) as (emit, advance):
            for engine in engines:
                results[engine] = await _measure(options, engine, lambda: advance(1))
                if not options.json:
                    for line in _lines(engine, results[engine]):
                        emit(line)
        if options.json:
            print(json.dumps(_document(options, results), indent=2))
        return 0

    return run_program(main)


async def _measure(options: DmatestOptions, engine: EngineChoice, advance: Any) -> Bench:
    from pvfio.drivers.dsa import DsaDriver, WqConfig
    from pvfio.machine import Machine
    from pvfio.workloads.dsa_bench import measure

    config = machine_config(options.platform, engine, options.ram)
    bench: Bench
    async with Machine(config) as machine, machine.open(DEVICE) as device:
        try:
            async with DsaDriver(device, wqs=[WqConfig(completion="polled")]) as dsa:
                bench = await measure(dsa.wq(0), rounds=_ROUNDS, advance=advance)
        except MemoryError:
            raise UsageError("the buffers do not fit into guest memory") from None
    return bench


def _rate(rate: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate / 1e6:.2f} M/s" if rate >= 1e6 else f"{rate / 1e3:.1f} k/s"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _row(figure: Figure) -> str:
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    wanted = "" if figure.target is None else f">= {figure.target:.2f}"
    missed = figure.target is not None and figure.ratio is not None and figure.ratio < figure.target
    return (
        f"{figure.operation:<9}{_size(figure.size):>8}{_rate(figure.rate):>12}{figure.gigabytes:>7.2f} GB/s"
        f"{_rate(figure.loop_rate):>12}{ratio:>7}{'*' if missed else ' '}{wanted:<8}{_rate(figure.orientation):>11}"
    )


def _lines(engine: str, bench: Bench) -> list[str]:
    from pvfio.workloads.dsa_bench import DEPTH, NOOP_TARGET

    lines = [
        f"engine {engine} ({_ENGINES[engine]}), batches of {DEPTH}, medians of {_ROUNDS} turns",
        f"{'':<9}{'':>8}{'DSA':>12}{'':>12}{'C loop':>12}{'ratio':>7} {'wanted':<8}{'SPDK':>11}",
        *(_row(figure) for figure in bench.table),
        f"fill against a loop of 8-byte stores, {_size(bench.fill8.size)}: {bench.fill8.ratio or 0:.2f}",
        f"noop      {bench.noops / 1e6:.1f} M/s, {bench.noops_without_records / 1e6:.1f} M/s without records "
        f"of their own (wanted: {NOOP_TARGET / 1e6:.0f})",
        f"one 4 KiB memmove: awaited {bench.awaited * 1e6:.1f} us, _nowait and polled {bench.nowait * 1e6:.1f} us",
        "",
    ]
    if any("*" in line for line in lines[2:]):
        lines.insert(-1, "* below what is wanted")
    return lines


def _document(options: DmatestOptions, results: dict[str, Bench]) -> dict[str, Any]:
    from pvfio.abi import lib
    from pvfio.workloads.dsa_bench import DEPTH

    return {
        "config": {
            "platform": options.platform,
            "ram": options.ram,
            "batch": DEPTH,
            "turns": _ROUNDS,
            "crc_instruction": bool(lib.pv_bench_hardware_crc()),
        },
        "engines": {engine: asdict(bench) for engine, bench in results.items()},
    }
