"""``pvfio dmatest``: the workload on the default machine, and what happened on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from pvfio.cli_run import (
    DEVICE,
    EngineChoice,
    Platform,
    UsageError,
    check_input,
    check_output,
    machine_config,
    run_program,
    terminal_progress,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvfio.drivers.dsa import Completion, DsaDriver
    from pvfio.machine import Machine
    from pvfio.workloads.dmatest import DmatestParams
    from pvfio.workloads.filecopy import FileCopy

__all__ = ["DmatestOptions", "run"]

_SHOWN_FAULTS = 4


@dataclass(frozen=True, slots=True)
class DmatestOptions:
    """The command's options, checked for form."""

    params: DmatestParams
    platform: Platform
    engine: EngineChoice
    channels: int
    completion: Completion
    ram: int
    input: Path | None
    output: Path | None
    copy_crc: bool
    walk: bool


def run(options: DmatestOptions) -> int:
    """Runs the command; its exit status."""

    async def main() -> int:
        return await _main(options)

    return run_program(main)


async def _main(options: DmatestOptions) -> int:
    from pvfio.drivers.dsa import DsaDriver, WqConfig
    from pvfio.machine import Machine
    from pvfio.workloads.dmatest import memory_needed

    if options.input is None and (options.output is not None or options.copy_crc):
        raise UsageError("--output and --copy-crc are for --input")
    size = check_input(options.input) if options.input is not None else 0
    if options.input is not None and options.output is not None:
        check_output(options.output, options.input)
    needed = memory_needed(options.params, options.channels)
    if needed > options.ram:
        raise UsageError(
            f"buffers of {options.params.test_buf_size} bytes need {needed} bytes, more than the "
            f"{options.ram} bytes of guest memory"
        )
    config = machine_config(options.platform, options.engine, options.ram)
    wqs = [WqConfig(completion=options.completion)] * options.channels
    async with Machine(config) as machine:
        async with machine.open(DEVICE) as device:
            try:
                driver = DsaDriver(device, wqs=wqs)
                async with driver as dsa:
                    status = await _work(machine, dsa, options, size)
            except (ValueError, MemoryError) as error:
                raise UsageError(str(error) or "the buffers do not fit into guest memory") from None
    return status


async def _work(machine: Machine, dsa: DsaDriver, options: DmatestOptions, size: int) -> int:
    from pvfio.cli_walk import Translation, show, translate
    from pvfio.workloads.dmatest import dmatest

    params = options.params
    threads = params.threads_per_chan * options.channels
    calls = machine.kernel.transport.calls
    first: list[Translation] = []

    def started(iova: int) -> None:
        first.append(translate(machine, DEVICE, iova))

    if options.input is not None:
        with terminal_progress(size * threads, "bytes") as (emit, advance):
            copies = await _copy_files(dsa, options, emit, advance, started)
        failures = sum(copy.summary.failures for copy in copies)
        facts = _file_facts(options, copies[0])
    else:
        total = params.iterations * threads or None
        with terminal_progress(total, "tests") as (emit, advance):
            summaries = await dmatest(dsa.wqs, params, emit=emit, advance=advance, started=started)
        failures = sum(summary.failures for summary in summaries)
        moved = sum(summary.nbytes for summary in summaries)
        checked = "not verified" if params.noverify else "every byte verified, guards too"
        facts = [("moved", f"{moved:,} bytes in {sum(s.tests for s in summaries):,} transfers, {checked}")]
    facts += [*_machine_facts(machine, calls), *(("first buffer", translation.line) for translation in first)]
    _report(options, facts)
    if options.walk:
        for translation in first:
            print()
            show(translation, options.platform)
    return 1 if failures else 0


async def _copy_files(
    dsa: DsaDriver,
    options: DmatestOptions,
    emit: Callable[[str], None],
    advance: Callable[[int], None],
    started: Callable[[int], None],
) -> list[FileCopy]:
    """Every thread of every channel copies the whole file; the first one's copy is the output."""
    from pvfio.workloads.filecopy import copy_file

    copies: list[FileCopy] = []

    async def one(wq: Any, number: int) -> None:
        assert options.input is not None
        first = wq.id == 0 and number == 0
        copy = await copy_file(
            wq,
            options.input,
            options.params,
            copy_crc=options.copy_crc,
            output=options.output if first else None,
            number=number,
            emit=emit,
            advance=advance,
            started=started if first else None,
        )
        copies.insert(0 if first else len(copies), copy)

    async with trio.open_nursery() as nursery:
        for wq in dsa.wqs:
            for number in range(options.params.threads_per_chan):
                nursery.start_soon(one, wq, number)
    return copies


def _file_facts(options: DmatestOptions, copy: FileCopy) -> list[tuple[str, str]]:
    how = "COPY_CRC" if options.copy_crc else "MEMMOVE and CRCGEN"
    chunks = "1 chunk" if copy.chunks == 1 else f"{copy.chunks:,} chunks"
    facts = [("file", f"{options.input}: {copy.nbytes:,} bytes in {chunks}, by {how}")]
    same = "agree" if copy.device_crc == copy.expected_crc else "DIFFER"
    facts.append(
        (
            "CRC-32C",
            f"{copy.device_crc:#010x} from the device, {copy.expected_crc:#010x} from numpy: they {same}",
        )
    )
    if not options.params.noverify:
        facts.append(("verified", f"{copy.nbytes:,} bytes, and {copy.guard_bytes:,} guard bytes around them"))
    if options.output is not None:
        facts.append(("output", str(options.output)))
    return facts


def _machine_facts(machine: Machine, before: int) -> list[tuple[str, str]]:
    faults = machine.hypervisor.faults
    logged = faults.snapshot()
    facts = [("page faults logged", str(len(logged) + faults.lost))]
    facts.extend(("", str(fault)) for fault in logged[:_SHOWN_FAULTS])
    calls = machine.kernel.transport.calls
    facts.append(
        ("hypercalls", f"{calls}, {calls - before} of them since the driver began: unmapping flushes")
    )
    return facts


def _report(options: DmatestOptions, facts: list[tuple[str, str]]) -> None:
    """What happened, one fact a line."""
    stage2 = {"intel": "VT-d second stage", "amd": "AMD v1"}[options.platform]
    facts = [
        ("platform", f"{options.platform}: stage 1 x86-64, stage 2 {stage2}"),
        ("engine", f"{options.engine}, completion {options.completion}"),
        *facts,
    ]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")
