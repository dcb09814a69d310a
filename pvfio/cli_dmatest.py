"""``pvfio dmatest``: the workload on a machine of its own, and what happened on the way."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from pvfio.cli_run import (
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
    from collections.abc import Callable, Mapping

    from pvfio.cli_walk import Translation
    from pvfio.drivers.dsa import Completion, WorkQueue
    from pvfio.machine import Machine
    from pvfio.workloads.dmatest import DmatestParams, Summary
    from pvfio.workloads.filecopy import FileCopy

__all__ = ["DmatestOptions", "Outcome", "list_operations", "make_options", "run"]


@dataclass(frozen=True, slots=True)
class DmatestOptions:
    """The command's options, checked for form. ``channels`` are those to use, as (device, work queue)."""

    params: DmatestParams
    platform: Platform
    engine: EngineChoice
    devices: int
    queues: int
    channels: tuple[tuple[int, int], ...]
    operation: str | None
    completion: Completion
    ram: int
    input: Path | None
    output: Path | None
    copy_crc: bool
    walk: bool
    json: bool


@dataclass(slots=True)
class Outcome:
    """What a run was: every thread's summary, the lines it printed beside them, how the first buffer was
    translated, the first copy of a file, and the hypercalls made before the driver began.
    """

    summaries: list[Summary] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    first: list[Translation] = field(default_factory=list)
    copy: FileCopy | None = None
    calls: int = 0


def list_operations() -> int:
    """Prints the names that ``--operation`` takes."""
    from pvfio.workloads.operations import OPERATIONS

    print("\n".join(OPERATIONS))
    return 0


def make_options(
    given: Mapping[str, Any], *, seed: int | None, devices: int | None, channels: int | None, **others: Any
) -> DmatestOptions:
    """Options from the module's parameters by name, and the command's own.

    Raises ``ValueError`` for values that cannot be, or do not go together.
    """
    from pvfio.workloads.dmatest import DmatestParams
    from pvfio.workloads.operations import OPERATIONS

    operation, memset, size = others["operation"], given["dmatest"], given["test_buf_size"]
    if operation is not None and operation not in OPERATIONS:
        raise ValueError(f"operation is one of {', '.join(OPERATIONS)}, not {operation!r}")
    if operation is not None and (memset or others["input"] is not None):
        raise ValueError("--operation goes neither with --input nor with dmatest=1")
    if size is None:
        size = 1 << 20 if others["input"] is not None else 16384
    same = ("threads_per_chan", "iterations", "timeout", "noverify", "norandom", "alignment", "transfer_size")
    params = DmatestParams(
        test_buf_size=size,
        memset=memset,
        verbose=given["verbose"],
        seed=seed,
        **{name: given[name] for name in same},
    )
    devices, queues, used = _channels(given["channel"], given["max_channels"], devices, channels)
    polled = given["polled"]
    return DmatestOptions(
        params=params,
        devices=devices,
        queues=queues,
        channels=used,
        completion="hybrid" if polled is None else "polled" if polled else "interrupt",
        **others,
    )


def _channels(
    named: list[tuple[int, int]], most: int, devices: int | None, queues: int | None
) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Devices, work queues of each, and the channels to use. What was left open becomes what is needed."""
    if most < 0:
        raise ValueError("max_channels is at least 0")
    if devices is None:
        devices = max((device for device, _ in named), default=0) + 1
    if queues is None and named:
        queues = max(wq for _, wq in named) + 1
    elif queues is None:
        queues = -(-most // devices) or 1
    if devices > 64:
        raise ValueError(f"64 devices at most, not {devices}")
    missing = [f"dma{d}chan{q}" for d, q in named if d >= devices or q >= queues]
    if missing:
        raise ValueError(f"there is no channel {missing[0]}: {devices} devices have {queues} channels each")
    found = list(dict.fromkeys(named)) or [(d, q) for d in range(devices) for q in range(queues)]
    return devices, queues, tuple(found[: most or None])


def run(options: DmatestOptions) -> int:
    """Runs the command; its exit status."""

    async def main() -> int:
        return await _main(options)

    return run_program(main)


def _check(options: DmatestOptions) -> int:
    """The size of the input file. ``UsageError`` for what cannot be."""
    from pvfio.workloads.dmatest import memory_needed
    from pvfio.workloads.operations import area_bytes

    params = options.params
    if options.input is None and (options.output is not None or options.copy_crc):
        raise UsageError("--output and --copy-crc are for --input")
    size = check_input(options.input) if options.input is not None else 0
    if options.input is not None and options.output is not None:
        check_output(options.output, options.input)
    if options.operation is None:
        needed = memory_needed(params, len(options.channels))
    else:
        needed = len(options.channels) * params.threads_per_chan * area_bytes(options.operation, params)
    if needed > options.ram:
        raise UsageError(
            f"buffers of {params.test_buf_size} bytes need {needed} bytes, more than the "
            f"{options.ram} bytes of guest memory"
        )
    return size


async def _main(options: DmatestOptions) -> int:
    from pvfio.cli_report import document, report
    from pvfio.machine import Machine

    size = _check(options)
    config = machine_config(options.platform, options.engine, options.ram, options.devices)
    async with Machine(config) as machine:
        outcome = Outcome(calls=machine.kernel.transport.calls)
        try:
            async with AsyncExitStack() as stack:
                wqs = await _open(machine, options, stack)
                await _work(machine, wqs, options, size, outcome)
                if options.json:
                    print(document(machine, options, outcome))
                else:
                    report(machine, options, outcome)
        except (ValueError, MemoryError) as error:
            raise UsageError(str(error) or "the buffers do not fit into guest memory") from None
    return 1 if any(summary.failures for summary in outcome.summaries) else 0


async def _open(machine: Machine, options: DmatestOptions, stack: AsyncExitStack) -> list[WorkQueue]:
    """The work queues to use, of devices opened on ``stack``."""
    from pvfio.drivers.dsa import DsaDriver, WqConfig

    drivers = []
    for number in range(options.devices):
        device = await stack.enter_async_context(machine.open(f"dsa{number}"))
        wqs = [WqConfig(completion=options.completion)] * options.queues
        drivers.append(await stack.enter_async_context(DsaDriver(device, wqs=wqs)))
    return [drivers[device].wq(wq) for device, wq in options.channels]


async def _work(
    machine: Machine, wqs: list[WorkQueue], options: DmatestOptions, size: int, outcome: Outcome
) -> None:
    from pvfio.cli_walk import translate
    from pvfio.workloads.dmatest import dmatest
    from pvfio.workloads.operations import operation_thread

    params = options.params
    threads = params.threads_per_chan * len(wqs)
    outcome.calls = machine.kernel.transport.calls

    def started(iova: int) -> None:
        outcome.first.append(translate(machine, f"dsa{options.channels[0][0]}", iova))

    total = size * threads if options.input is not None else params.iterations * threads or None
    unit = "tests" if options.input is None else "bytes"
    with terminal_progress(total, unit, quiet=options.json) as (show, advance):

        def emit(line: str) -> None:
            if options.json:
                outcome.messages.append(line)
            else:
                show(line)

        if options.input is not None:
            await _copy_files(wqs, options, outcome, emit, advance, started)
            return
        operation = options.operation
        outcome.summaries += await dmatest(
            wqs,
            params,
            emit=emit,
            advance=advance,
            started=started,
            devices=[device for device, _ in options.channels],
            operation=operation,
            make=None if operation is None else partial(operation_thread, operation),
        )


async def _copy_files(
    wqs: list[WorkQueue],
    options: DmatestOptions,
    outcome: Outcome,
    emit: Callable[[str], None],
    advance: Callable[[int], None],
    started: Callable[[int], None],
) -> None:
    """Every thread of every channel copies the whole file; the first one's copy is the output."""
    from pvfio.workloads.filecopy import copy_file

    async def one(wq: WorkQueue, device: int, number: int, first: bool) -> None:
        assert options.input is not None
        copy = await copy_file(
            wq,
            options.input,
            options.params,
            copy_crc=options.copy_crc,
            output=options.output if first else None,
            device=device,
            number=number,
            emit=emit,
            advance=advance,
            started=started if first else None,
        )
        if first:
            outcome.copy = copy
        outcome.summaries.append(copy.summary)

    async with trio.open_nursery() as nursery:
        first = True
        for wq, (device, _) in zip(wqs, options.channels, strict=True):
            for number in range(options.params.threads_per_chan):
                nursery.start_soon(one, wq, device, number, first)
                first = False
