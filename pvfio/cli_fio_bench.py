"""``pvfio fio --bench``: the NVMe path beside a plain C loop, and what little work costs, as a table or as JSON."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from pvfio.cli_run import EngineChoice, Platform, UsageError, run_program, terminal_progress

if TYPE_CHECKING:
    from pvfio.workloads.fio.bench import Bench, Figure
    from pvfio.workloads.fio.share import Shares

__all__ = ["run"]

_STEPS: Final = 10
_NOWAIT_US: Final = 3.0
_TIMES_SPDK: Final = 1.5  # at depth
_INTERRUPTS: Final = 10.0  # percent of a core
_IDLE: Final = 1.0


def run(platform: Platform, engine: EngineChoice, ram: int, *, json: bool) -> int:
    """Measures on a machine with 256 MiB of namespace in memory; 0."""

    async def main() -> int:
        progress = terminal_progress(_STEPS, "figures", quiet=json, label="fio --bench", thread=False)
        with progress as (emit, advance):
            bench, shares = await _measure(platform, engine, ram, lambda: advance(1))
            if not json:
                for line in _lines(engine, bench, shares):
                    emit(line)
        if json:
            config = {"platform": platform, "engine": engine, "ram": ram}
            document = {"config": config} | asdict(bench) | {"shares": asdict(shares)}
            print(json_module.dumps(document, indent=2))
        return 0

    return run_program(main)


async def _measure(
    platform: Platform, engine: EngineChoice, ram: int, advance: Callable[[], None]
) -> tuple[Bench, Shares]:
    from pvfio.cli_fio import FioOptions, machine_for
    from pvfio.devices.nvme import NvmeDevice
    from pvfio.drivers.nvme import NvmeDriver
    from pvfio.machine import Machine
    from pvfio.workloads.fio.bench import measure
    from pvfio.workloads.fio.share import measure_shares

    config = machine_for(FioOptions(files=(), platform=platform, engine=engine, ram=ram), [], [])
    async with Machine(config) as machine, machine.open("nvme0") as device:
        try:
            model = machine.devices["nvme0"].function
            assert isinstance(model, NvmeDevice)
            async with NvmeDriver(device, entries=256, completion="polled") as nvme:
                media = model.namespaces.by_nsid[min(nvme.namespaces)].memory
                assert media is not None
                bench: Bench = await measure(nvme, media, advance=advance)
            async with NvmeDriver(device, completion="interrupt") as nvme:
                shares: Shares = await measure_shares(nvme)
            advance()
        except MemoryError:
            raise UsageError("the buffers do not fit into guest memory") from None
    return bench, shares


def _against(ratio: float, wanted: float | None) -> str:
    if wanted is None:
        return f"{ratio:>7.2f} {'':<8}"
    return f"{ratio:>7.2f}{'*' if ratio < wanted else ' '}{f'>= {wanted:.2f}':<8}"


def _rate(figure: Figure, rate: float) -> str:
    if figure.case.random:
        return f"{rate / 1e6:.2f} M/s"
    return f"{rate * figure.case.size / 1e9:.1f} GB/s"


def _row(figure: Figure) -> str:
    case = figure.case
    times = None if case.target is None else _TIMES_SPDK
    name = f"{case.size >> 10} KiB {case.name}"
    return (
        f"{name:<17}{case.depth:>4}{_rate(figure, figure.rate):>13}{figure.microseconds:>8.2f} us"
        f"{_rate(figure, figure.loop_rate):>13}{_against(figure.ratio, case.target)}"
        f"{_rate(figure, case.orientation):>10}{_against(figure.rate / case.orientation, times)}"
    ).rstrip()


def _single(operation: str, nowait: float, awaited: float) -> str:
    return (
        f"one {operation}: {nowait:.2f}{'*' if nowait > _NOWAIT_US else ''} us submitted and waited for in C "
        f"(wanted: {_NOWAIT_US:g}), {awaited * 1e6:.1f} us awaited"
    )


def _little(shares: Shares) -> str:
    reads = shares.reads - shares.pace
    return (
        f"1,000 reads a second by interrupt: {reads:.1f}{'*' if reads > _INTERRUPTS else ''} % of a core "
        f"(wanted: under {_INTERRUPTS:g}) beside the {shares.pace:.1f} % of their pace; nobody at work: "
        f"{shares.idle:.2f}{'*' if shares.idle > _IDLE else ''} % (wanted: under {_IDLE:g})"
    )


def _lines(engine: str, bench: Bench, shares: Shares) -> list[str]:
    compared = f"{'ratio':>7} {'wanted':<8}"
    single = {figure.case.operation: figure.microseconds for figure in bench.table if figure.case.depth == 1}
    lines = [
        f"engine {engine}, one queue, 256 MiB of namespace in memory, medians of turns",
        f"{'':<16}{'depth':>5}{'NVMe':>13}{'':>11}{'C loop':>13}{compared}{'SPDK':>10}{compared}".rstrip(),
        *(_row(figure) for figure in bench.table),
        _single("read", single["read"], bench.awaited_read),
        _single("write", single["write"], bench.awaited_write),
        _little(shares),
    ]
    if any("*" in row for row in lines[2:]):
        lines.append("* not what is wanted")
    return lines
