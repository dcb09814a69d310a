"""``pvfio fio``: job files on a machine of their own, and fio's reports.

The machine has one NVMe controller with a namespace in memory, as large as the jobs' files need, or with an image file.
Exit statuses are the command line's, 1 where a job ended with an error, and 128, as fio's, where the first interrupt
ended the jobs. Not here: fio's ``--client``, ``--server``, ``--latency-log``, ``terse``.
"""

from __future__ import annotations

import json
import math
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import trio

from pvfio.cli_run import EngineChoice, Platform, UsageError, check_output, run_program, single

if TYPE_CHECKING:
    from pvfio.drivers.nvme import Completion, NvmeDriver
    from pvfio.machine import Machine, MachineConfig
    from pvfio.workloads.fio.job import Job
    from pvfio.workloads.fio.layout import Clone, Layout
    from pvfio.workloads.fio.options import Notes
    from pvfio.workloads.fio.run import Run
    from pvfio.workloads.fio.stats import JobStats

__all__ = ["FORMATS", "FioOptions", "Format", "machine_for", "queue_maker", "read_jobs", "run"]

Format = Literal["normal", "json", "json+"]
FORMATS: Final = ("normal", "json", "json+")
_PAGE: Final = 4096
_LEAST_NAMESPACE: Final = 256 << 20
_MOST_NAMESPACE: Final = 1 << 40
_MOST_QUEUES: Final = 64
_DEEPEST: Final = 1023
_BLOCK: Final = 2 << 20
_INTERRUPTED: Final = 128


@dataclass(frozen=True, slots=True)
class FioOptions:
    """The command's options. ``size``: of the namespace in memory, 0 for what the jobs need; ``sections``: the jobs to
    run, all when empty; ``overrides``: options added to every job, as ``key=value``.
    """

    files: Sequence[Path]
    platform: Platform = "intel"
    engine: EngineChoice = "thread"
    completion: Completion = "hybrid"
    ram: int = 512 << 20
    size: int = 0
    image: Path | None = None
    read_only: bool = False
    formats: tuple[Format, ...] = ("normal",)
    output: Path | None = None
    sections: Sequence[str] = ()
    overrides: Sequence[str] = ()
    plot: Path | None = None
    log_folder: Path = field(default_factory=Path)
    parse_only: bool = False
    faults: Sequence[str] = ()


def run(options: FioOptions) -> int:
    """Runs the command; its exit status."""

    async def main() -> int:
        return await _main(options)

    return run_program(main)


def read_jobs(options: FioOptions, notes: Notes) -> list[Job]:
    """The jobs of the files, with overrides. ``UsageError`` for a file or an option that cannot be."""
    from pvfio.workloads.fio import JobFileError, build, parse_job_files

    extra = []
    for word in options.overrides:
        key, equals, value = word.partition("=")
        extra.append((key.strip().lower(), value.strip() if equals else "1"))
    jobs = []
    try:
        for path in options.files:
            for section in parse_job_files([path]):
                section.options += extra
                jobs.append(build(section, notes, folder=path.parent))
    except JobFileError as error:
        raise UsageError(str(error)) from None
    unknown = set(options.sections) - {job.name for job in jobs}
    if unknown:
        raise UsageError(f"there is no job {sorted(unknown)[0]!r}")
    return [job for job in jobs if not options.sections or job.name in options.sections]


def _stride(job: Job) -> int:
    longest = max(job.most_block(direction) for direction in job.directions)
    return -(-longest // _PAGE) * _PAGE


def _lba_shift(jobs: Sequence[Job]) -> int:
    """4096-byte blocks where all I/O is of such; else 512."""
    whole = all(math.gcd(job.grain, job.offset, job.offset_increment) % _PAGE == 0 for job in jobs)
    return 12 if whole else 9


def machine_for(options: FioOptions, jobs: Sequence[Job], found: Sequence[Clone]) -> MachineConfig:
    """The machine the jobs run on. ``UsageError`` for what it cannot have."""
    from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
    from pvfio.host.config import IommuConfig
    from pvfio.machine import DeviceSpec, MachineConfig
    from pvfio.workloads.fio.layout import space_needed

    if options.ram < 16 * _BLOCK or options.ram % _BLOCK:
        raise UsageError(f"guest memory is a multiple of 2 MiB, at least 32 MiB, not {options.ram} bytes")
    shift = _lba_shift(jobs)
    size = options.size or max(_LEAST_NAMESPACE, space_needed(found))
    if options.image is None and size > _MOST_NAMESPACE:
        raise UsageError(f"the jobs' files need {size} bytes: more than a namespace in memory may have")
    try:
        spec = NamespaceSpec(
            size=0 if options.image is not None else -(-size // _PAGE) * _PAGE,
            image=options.image,
            read_only=options.read_only,
            lba_shift=shift,
        )
        return MachineConfig(
            iommu=IommuConfig(platform=options.platform),
            engine=options.engine,
            ram=options.ram,
            devices=(DeviceSpec(kind="nvme", options={"config": NvmeConfig(), "namespaces": (spec,)}),),
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def queue_maker(nvme: NvmeDriver, layout: Layout) -> Any:
    """Makes queues for ``Run``: clone n of a wave has the controller's queue n, and a buffer while it runs."""
    from pvfio.workloads.fio.queue import NullQueue, NvmeQueue

    @asynccontextmanager
    async def make(clone: Clone, number: int) -> AsyncIterator[Any]:
        job = clone.job
        nsid, place = layout.place(clone)
        stride = _stride(job)
        namespace = nvme.namespaces[nsid]
        if job.ioengine == "null":
            yield NullQueue(job.iodepth, stride, namespace.block_size), place
            return
        if place.base % namespace.block_size:
            raise UsageError(
                f"job {job.name}: {place.base} bytes are not whole blocks of {namespace.block_size}"
            )
        limit = nvme.max_transfer
        if stride > limit:
            raise UsageError(
                f"job {job.name}: blocks of {stride} bytes, and the controller takes {limit} at a time"
            )
        container = nvme.device.container
        buffer = await container.alloc(stride * job.iodepth, align=_BLOCK)
        queue = NvmeQueue(nvme.queues[number], nsid, namespace.block_size, buffer, stride, sync=job.sync)
        try:
            yield queue, place
        finally:
            with trio.CancelScope(shield=True):
                await queue.drain()
                await container.free(buffer)

    return make


def _check(options: FioOptions, jobs: Sequence[Job], found: Sequence[Clone], notes: Notes) -> tuple[int, int]:
    """How many queues, and how many entries in each. ``UsageError`` for what cannot be."""
    if not jobs:
        raise UsageError("there is no job")
    waves = [[clone for clone in found if clone.wave == wave] for wave in {clone.wave for clone in found}]
    queues = max(len(wave) for wave in waves)
    if queues > _MOST_QUEUES:
        raise UsageError(f"{queues} jobs side by side, and the controller has {_MOST_QUEUES} queues")
    deepest = max(job.iodepth for job in jobs)
    if deepest > _DEEPEST:
        raise UsageError(f"iodepth={deepest}: the controller's queues take {_DEEPEST}")
    needed = max(sum(_stride(c.job) * c.job.iodepth + _BLOCK for c in wave) for wave in waves)
    if needed > options.ram - 16 * _BLOCK:
        raise UsageError(f"buffers need {needed} bytes of the {options.ram} bytes of guest memory: use --ram")
    for path in (options.output, options.plot):
        for source in (*options.files, options.image):
            if path is not None and source is not None:
                check_output(path, source)
    return queues, max(2, deepest + 1)


async def _main(options: FioOptions) -> int:
    from pvfio.drivers.nvme import NvmeDriver
    from pvfio.machine import Machine
    from pvfio.workloads.fio.layout import Layout, clones
    from pvfio.workloads.fio.options import Notes
    from pvfio.workloads.fio.run import Run

    notes = Notes()
    jobs = read_jobs(options, notes)
    found = clones(jobs, entropy=secrets.randbits(63))
    queues, entries = _check(options, jobs, found, notes)
    if options.plot is not None:
        from pvfio.cli_fio_plot import check

        check(options.plot)
    _say(notes)
    if options.parse_only:
        return 0
    config = machine_for(options, jobs, found)
    try:
        async with AsyncExitStack() as stack:
            machine = await stack.enter_async_context(Machine(config))
            device = await stack.enter_async_context(machine.open("nvme0"))
            driver = NvmeDriver(device, queues=queues, entries=entries, completion=options.completion)
            nvme = await stack.enter_async_context(driver)
            _inject(machine, options.faults)
            said = len(notes.lines)
            layout = Layout({nsid: ns.size for nsid, ns in nvme.namespaces.items()}, notes)
            layout.plan(found)
            for clone in found:
                layout.place(clone)
            _say(notes, said)
            work = Run(
                found, queue_maker(nvme, layout), failed=lambda line: print(f"fio: {line}", file=sys.stderr)
            )
            interrupted = await _run(options, jobs, work)
    except* (ValueError, MemoryError) as errors:
        raise UsageError(str(single(errors)) or "the buffers do not fit into guest memory") from None
    return _report(options, work) or (_INTERRUPTED if interrupted else 0)


def _inject(machine: Machine, faults: Sequence[str]) -> None:
    """Faults as ``kind:key=value,...``, of the device's ``inject``. ``UsageError`` for what it does not know."""
    from pvfio.workloads.fio.values import evaluate

    function: Any = machine.devices["nvme0"].function
    for text in faults:
        kind, _, rest = text.partition(":")
        try:
            words = [word.partition("=") for word in rest.split(",") if word]
            values: dict[str, Any] = {
                key: evaluate(value) if key in ("probability", "delay") else int(value, 0)
                for key, _, value in words
            }
            function.inject(kind, **values)
        except (ValueError, TypeError, BlockingIOError) as error:
            raise UsageError(f"--inject {text}: {error}") from None


def _say(notes: Notes, since: int = 0) -> None:
    for line in notes.lines[since:]:
        print(f"fio: {line}", file=sys.stderr)


async def _run(options: FioOptions, jobs: Sequence[Job], work: Run) -> bool:
    """Whether it was interrupted."""
    from pvfio.cli_fio_status import status_line

    interrupted = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(status_line, work)
        await nursery.start(_wait_for_interrupt, work, interrupted)
        if "normal" in options.formats and options.output is None:
            _announce(jobs, work)
        await work.run()
        nursery.cancel_scope.cancel()
    return interrupted.is_set()


def _announce(jobs: Sequence[Job], work: Run) -> None:
    """What fio says before the jobs begin."""
    from pvfio.workloads.fio.report import VERSION, header_lines

    for job in jobs:
        group = next(clone.group for clone in work.clones if clone.job is job)
        print("\n".join(header_lines(job, group)))
    count = len(work.clones)
    print(f"{VERSION}\nStarting {count} process{'es' if count > 1 else ''}", flush=True)


async def _wait_for_interrupt(
    work: Run, interrupted: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """The first interrupt ends the jobs in order, with their reports, as fio does; the next one at once."""
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            print("\nfio: terminating on signal 2", file=sys.stderr)
            interrupted.set()
            work.stop()
            break


def _report(options: FioOptions, work: Run) -> int:
    from pvfio.workloads.fio.record import write_logs
    from pvfio.workloads.fio.report import job_lines, run_status
    from pvfio.workloads.fio.report_json import document
    from pvfio.workloads.fio.run import joined

    results = joined(work.finished)
    parts = []
    for form in options.formats:
        if form == "normal":
            lines = (
                [""] + [line for result in results for line in job_lines(result)] + list(run_status(results))
            )
            parts.append("\n".join(lines))
        else:
            found = document(results, began=work.began, elapsed=work.elapsed, bins=form == "json+")
            parts.append(json.dumps(found, indent=2, separators=(",", " : ")))
    text = "\n".join(parts) + "\n"
    if options.output is not None:
        options.output.write_text(text)
    else:
        sys.stdout.write(text)
    for item in work.finished:
        write_logs(item.recorder, item.clone.thread, options.log_folder)
    if options.plot is not None:
        from pvfio.cli_fio_plot import draw

        draw(options.plot, work.finished, results)
    return 1 if _failed(results) else 0


def _failed(results: Sequence[tuple[Job, JobStats]]) -> bool:
    return any(stats.error for _, stats in results)
