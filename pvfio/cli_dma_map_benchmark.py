"""``pvfio dma-map-benchmark``: what mapping costs, on a machine of its own, in the lines of Linux's tool and more."""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvfio.cli_run import DEVICE, Platform, UsageError, machine_config, run_program, terminal_progress
from pvfio.errors import DmaMappingError
from pvfio.workloads.dma_map_benchmark import DIRECTIONS, MODES, MapParams, MapResult

if TYPE_CHECKING:
    from pvfio.cli_map_breakdown import Breakdown
    from pvfio.guest.dma_api import DmaDevice
    from pvfio.guest.dma_domain import DomainKind
    from pvfio.machine import Machine, MachineConfig
    from pvfio.vfio import Container
    from pvfio.workloads.map_targets import Target

__all__ = ["MapOptions", "Measured", "make_options", "run"]

_BITS = 32  # of Linux's tool
_MOST_MAPPINGS = 100_000_000
_MOST_VPS = 16
_QUEUE = 256  # mappings that wait in a VP's flush queue
_CLOSING = 0.025  # share of the seconds that is left for ending
_SWEEP_SHARE = 0.4  # ... for the sweep of a plot
_BREAKDOWN_SHARE = 0.2
_LEAST_SWEEP = 100_000
_PARAMETERS = ("threads", "seconds", "node", "bits", "dir", "xdelay", "granule", "mode")


@dataclass(frozen=True, slots=True)
class MapOptions:
    """The command's options, checked for form."""

    params: MapParams
    api: str
    domain: DomainKind
    mappings: int
    breakdown: bool
    plot: Path | None
    platform: Platform
    ram: int
    json: bool


@dataclass(slots=True)
class Measured:
    """A run: its result, hypercalls made meanwhile, the clock's cost in ns, what it divides into, and (live mappings,
    result) of a sweep.
    """

    result: MapResult
    hypercalls: int = 0
    clock: float = 0.0
    breakdown: Breakdown | None = None
    sweep: list[tuple[int, MapResult]] = field(default_factory=list)


def _direction(text: str) -> int:
    """A direction's number, from the number or the name."""
    name = text.upper().replace("-", "_")
    if name in DIRECTIONS:
        return DIRECTIONS.index(name)
    return _integer(text)


def _mode(text: str) -> str:
    """A mode's name, from the name or Linux's number for it."""
    return MODES[int(text)] if text in ("0", "1") else text.lower()


def _integer(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds") from None


_PARSERS: dict[str, Callable[[str], Any]] = {"seconds": _seconds, "dir": _direction, "mode": _mode}


def _parse(given: dict[str, str], words: Sequence[str]) -> dict[str, Any]:
    """Parameters from options and from words like ``threads=2``; the words win. ``ValueError``."""
    texts = dict(given)
    for word in words:
        name, equals, text = word.partition("=")
        if name not in _PARAMETERS:
            raise ValueError(f"unknown parameter {name!r} (there are {', '.join(_PARAMETERS)})")
        if not equals:
            raise ValueError(f"{name} needs a value: {name}=...")
        texts[name] = text
    values = {}
    for name, text in texts.items():
        try:
            values[name] = _PARSERS.get(name, _integer)(text)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return values


def make_options(given: dict[str, str], words: Sequence[str], **rest: Any) -> MapOptions:
    """The options from the texts of those that are parameters of Linux's tool, and all others as they are.

    ``domain`` None is "strict". ``ValueError`` for what cannot be.
    """
    api, domain, mappings = rest["api"], rest.pop("domain"), rest["mappings"]
    if domain is not None and api != "dma":
        raise ValueError(f"--domain is about the DMA API: it does not go with --api {api}")
    if not 0 <= mappings <= _MOST_MAPPINGS:
        raise ValueError(f"mappings is 0 to {_MOST_MAPPINGS}, not {mappings}")
    if rest["breakdown"] and api == "pagetable":
        raise ValueError("--breakdown divides a whole mapping: with --api pagetable it has one part only")
    values = _parse(given, words)
    params = MapParams(**values)
    if "bits" not in values:
        most = max(mappings, _LEAST_SWEEP if rest["plot"] else 0)
        params = MapParams(**values | {"bits": _bits(params, most, lazy=domain == "lazy")})
    return MapOptions(params=params, domain=domain or "strict", **rest)


def _bits(params: MapParams, live: int, *, lazy: bool) -> int:
    """Those of Linux's tool, or more where so many live mappings, and those in flush queues, need them."""
    mappings = params.threads + min(live, 1024) + (min(params.threads, _MOST_VPS) * _QUEUE if lazy else 0)
    room = 2 * 4096 * (live + params.granule * mappings)
    return min(64, max(_BITS, room.bit_length()))


def run(options: MapOptions, began: float) -> int:
    """Runs the command, which began at ``began`` (``time.perf_counter``); its exit status."""

    from pvfio.cli_map_report import report

    async def main() -> int:
        _check(options)
        async with _open(options) as bench:
            measured = await _measure(options, bench, began)
        report(options, measured)
        return 0

    return run_program(main)


def _check(options: MapOptions) -> None:
    """``UsageError`` for what would be noticed only after the measuring."""
    if options.plot is not None:
        from pvfio.cli_map_plot import check

        check(options.plot)


@dataclass(frozen=True, slots=True)
class _Bench:
    """What is measured; its machine, and its container or device there, if it takes one."""

    target: Target
    machine: Machine | None = None
    source: Container | DmaDevice | None = None


@asynccontextmanager
async def _open(options: MapOptions) -> AsyncIterator[_Bench]:
    if options.api == "pagetable":
        yield _Bench(_page_tables(options))
        return
    from pvfio.guest.dma_api import DmaDevice
    from pvfio.guest.transport import on_vp
    from pvfio.machine import Machine
    from pvfio.workloads.map_targets import DmaTarget, VfioTarget

    config, params = _machine_config(options), options.params

    def vp_of(number: int) -> AbstractContextManager[None]:
        return on_vp(number % config.vps)

    async with Machine(config) as machine:
        if options.api == "vfio":
            async with machine.open(DEVICE) as device:
                yield _Bench(VfioTarget(device.container, params, vp_of), machine, device.container)
            return
        pci_name = machine.devices[DEVICE].pci_name
        pci_device = next(each for each in machine.kernel.devices if each.name == pci_name)
        dma = DmaDevice(machine.kernel, pci_device)
        try:
            target = DmaTarget(
                dma, params, lambda size, align: machine.memory.alloc(size, align=align), vp_of
            )
            yield _Bench(target, machine, dma)
        except MemoryError as error:
            raise UsageError(f"--ram {options.ram >> 20}M: {error}") from None
        finally:
            dma.close()


def _machine_config(options: MapOptions) -> MachineConfig:
    from pvfio.guest.type1 import Type1Limits
    from pvfio.machine import DeviceSpec

    params = options.params
    pages = params.granule if params.mode == "sg" else 1
    entries = max(options.mappings, _LEAST_SWEEP) + params.threads * pages
    return replace(
        machine_config(options.platform, "inline", options.ram),
        vps=max(2, min(params.threads, _MOST_VPS)),
        limits=Type1Limits(dma_entry_limit=max(65535, entries)),
        devices=(
            DeviceSpec(kind="dsa", driver="vfio-pci" if options.api == "vfio" else "dma_map_benchmark"),
        ),
        default_domain=options.domain if options.api == "dma" else "identity",
    )


def _page_tables(options: MapOptions) -> Target:
    from pvfio.memory import GuestMemory
    from pvfio.pagetable import Format, PageTable
    from pvfio.workloads.map_targets import TableTarget

    machine_config(options.platform, "inline", options.ram)  # for its opinion of the memory
    memory = GuestMemory(options.ram)
    tables = [
        PageTable(Format.X86_64, memory, owner="guest", levels=4) for _ in range(options.params.threads)
    ]
    return TableTarget(tables, 0, options.params)


async def _measure(options: MapOptions, bench: _Bench, began: float) -> Measured:
    """Prepares and measures: the run itself, and what else was asked for, each with a share of the time."""
    from pvfio.workloads.dma_map_benchmark import clock_cost, loop_clock_cost

    params, target, machine = options.params, bench.target, bench.machine
    clock = loop_clock_cost() if target.clock_in_c else clock_cost()
    await _prepare(options, target, options.mappings)
    # The time it took to get here counts, unless live mappings were set up: the command is to take what was asked.
    used = time.perf_counter() - began if not options.mappings else 0.0
    seconds = max(params.seconds * (1 - _CLOSING) - used, params.seconds / 2)
    sweep = seconds * _SWEEP_SHARE if options.plot is not None else 0.0
    steps = seconds * _BREAKDOWN_SHARE if options.breakdown else 0.0
    calls = machine.kernel.transport.calls if machine is not None else 0
    measured = Measured(await _timed(options, target, seconds - sweep - steps), clock=clock)
    if machine is not None:
        measured.hypercalls = machine.kernel.transport.calls - calls
    if options.breakdown:
        measured.breakdown = await _steps(bench, steps)
    if options.plot is not None:
        counts = _sweep_counts(options.mappings)
        for count in counts:
            await _prepare(options, target, count)
            result = await _timed(options, target, sweep / len(counts), f"{count:,} live")
            measured.sweep.append((count, result))
    await target.clear()
    return measured


async def _steps(bench: _Bench, seconds: float) -> Breakdown:
    from pvfio.cli_map_breakdown import break_down

    assert bench.machine is not None
    assert bench.source is not None
    return await break_down(bench.source, bench.target.mappers[0], bench.machine, DEVICE, seconds)


def _sweep_counts(mappings: int) -> list[int]:
    """1, 10, 100 and on, to at least 100,000, and the number that was asked for."""
    most = max(mappings, _LEAST_SWEEP)
    counts = {10**power for power in range(len(str(most))) if 10**power <= most}
    return sorted(counts | ({mappings} if mappings else set()))


async def _prepare(options: MapOptions, target: Target, live: int) -> None:
    quiet = options.json or live < 10_000
    with terminal_progress(live, "mappings", quiet=quiet, label="live") as (_, advance):
        try:
            await target.prepare(live, advance)
        except ValueError as error:
            raise UsageError(f"--bits {options.params.bits}: {error}") from None
        except DmaMappingError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise UsageError(f"--bits {options.params.bits}, --ram {options.ram >> 20}M: {error}") from None
        except MemoryError as error:
            raise UsageError(f"--ram {options.ram >> 20}M: {error}") from None


async def _timed(options: MapOptions, target: Target, seconds: float, label: str = "") -> MapResult:
    with terminal_progress(seconds, "s", quiet=options.json, label=label or "measuring", thread=False) as (
        _,
        advance,
    ):
        shown = 0.0

        def progress(now: float) -> None:
            nonlocal shown
            advance(now - shown)
            shown = now

        return await target.measure(seconds, progress)
