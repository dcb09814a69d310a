"""``pvfio fio --bench``: the NVMe path's speed beside that of a plain C loop, as a table or as JSON."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from pvfio.cli_run import EngineChoice, Platform, UsageError, run_program, terminal_progress

if TYPE_CHECKING:
    from pvfio.workloads.fio.bench import Bench, Figure

__all__ = ["run"]

_STEPS: Final = 7
_NOWAIT_US: Final = 3.0


def run(platform: Platform, engine: EngineChoice, ram: int, *, json: bool) -> int:
    """Measures on a machine with 256 MiB of namespace in memory; 0."""

    async def main() -> int:
        with terminal_progress(_STEPS, "figures", quiet=json, label="fio --bench") as (emit, advance):
            bench = await _measure(platform, engine, ram, lambda: advance(1))
            if not json:
                for line in _lines(engine, bench):
                    emit(line)
        if json:
            config = {"platform": platform, "engine": engine, "ram": ram}
            print(json_module.dumps({"config": config} | asdict(bench), indent=2))
        return 0

    return run_program(main)


async def _measure(platform: Platform, engine: EngineChoice, ram: int, advance: Callable[[], None]) -> Bench:
    from pvfio.cli_fio import FioOptions, machine_for
    from pvfio.drivers.nvme import NvmeDriver
    from pvfio.machine import Machine
    from pvfio.workloads.fio.bench import measure

    config = machine_for(FioOptions(files=(), platform=platform, engine=engine, ram=ram), [], [])
    async with Machine(config) as machine, machine.open("nvme0") as device:
        try:
            async with NvmeDriver(device, entries=256, completion="polled") as nvme:
                found: Bench = await measure(nvme, advance=advance)
        except MemoryError:
            raise UsageError("the buffers do not fit into guest memory") from None
    return found


def _row(figure: Figure) -> str:
    wanted = "" if figure.target is None else f">= {figure.target:.2f}"
    missed = figure.target is not None and figure.ratio < figure.target
    return (
        f"4 KiB rand{figure.operation:<6}{figure.depth:>5}{figure.rate / 1e6:>9.2f} M/s{figure.microseconds:>8.2f} us"
        f"{figure.loop_rate / 1e6:>9.2f} M/s{figure.ratio:>7.2f}{'*' if missed else ' '}{wanted:<8}"
        f"{figure.orientation / 1e6:>6.2f} M/s{figure.rate / figure.orientation:>7.2f}"
    )


def _lines(engine: str, bench: Bench) -> list[str]:
    header = f"{'':<16}{'depth':>5}{'NVMe':>13}{'':>11}{'C loop':>13}{'ratio':>7} {'wanted':<8}{'SPDK':>10}{'ratio':>7}"
    single = {figure.operation: figure.microseconds for figure in bench.table if figure.depth == 1}
    lines = [
        f"engine {engine}, one queue, 256 MiB of namespace in memory, medians of turns",
        header,
        *(_row(figure) for figure in bench.table),
        f"one read: {single['read']:.2f} us submitted and waited for in C (wanted: {_NOWAIT_US:g}), "
        f"{bench.awaited_read * 1e6:.1f} us awaited",
        f"one write: {single['write']:.2f} us submitted and waited for in C (wanted: {_NOWAIT_US:g}), "
        f"{bench.awaited_write * 1e6:.1f} us awaited",
    ]
    if any("*" in row for row in lines[2:]):
        lines.append("* below what is wanted")
    return lines
