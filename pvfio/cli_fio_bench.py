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
_TIMES_SPDK: Final = 1.5  # at depth


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
    from pvfio.devices.nvme import NvmeDevice
    from pvfio.drivers.nvme import NvmeDriver
    from pvfio.machine import Machine
    from pvfio.workloads.fio.bench import measure

    config = machine_for(FioOptions(files=(), platform=platform, engine=engine, ram=ram), [], [])
    async with Machine(config) as machine, machine.open("nvme0") as device:
        try:
            model = machine.devices["nvme0"].function
            assert isinstance(model, NvmeDevice)
            async with NvmeDriver(device, entries=256, completion="polled") as nvme:
                media = model.namespaces.by_nsid[min(nvme.namespaces)].memory
                assert media is not None
                found: Bench = await measure(nvme, media, advance=advance)
        except MemoryError:
            raise UsageError("the buffers do not fit into guest memory") from None
    return found


def _against(ratio: float, wanted: float | None) -> str:
    if wanted is None:
        return f"{ratio:>7.2f} {'':<8}"
    return f"{ratio:>7.2f}{'*' if ratio < wanted else ' '}{f'>= {wanted:.2f}':<8}"


def _row(figure: Figure) -> str:
    times = None if figure.target is None else _TIMES_SPDK
    return (
        f"4 KiB rand{figure.operation:<6}{figure.depth:>5}{figure.rate / 1e6:>9.2f} M/s{figure.microseconds:>8.2f} us"
        f"{figure.loop_rate / 1e6:>9.2f} M/s{_against(figure.ratio, figure.target)}"
        f"{figure.orientation / 1e6:>6.2f} M/s{_against(figure.rate / figure.orientation, times)}"
    ).rstrip()


def _single(operation: str, nowait: float, awaited: float) -> str:
    return (
        f"one {operation}: {nowait:.2f}{'*' if nowait > _NOWAIT_US else ''} us submitted and waited for in C "
        f"(wanted: {_NOWAIT_US:g}), {awaited * 1e6:.1f} us awaited"
    )


def _lines(engine: str, bench: Bench) -> list[str]:
    compared = f"{'ratio':>7} {'wanted':<8}"
    single = {figure.operation: figure.microseconds for figure in bench.table if figure.depth == 1}
    lines = [
        f"engine {engine}, one queue, 256 MiB of namespace in memory, medians of turns",
        f"{'':<16}{'depth':>5}{'NVMe':>13}{'':>11}{'C loop':>13}{compared}{'SPDK':>10}{compared}".rstrip(),
        *(_row(figure) for figure in bench.table),
        _single("read", single["read"], bench.awaited_read),
        _single("write", single["write"], bench.awaited_write),
    ]
    if any("*" in row for row in lines[2:]):
        lines.append("* not what is wanted")
    return lines
