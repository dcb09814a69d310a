"""What the commands share: running a trio program on a machine, and saying in one line what went wrong."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import trio

from pvfio.errors import PvfioError

if TYPE_CHECKING:
    from pvfio.machine import MachineConfig

Platform = Literal["intel", "amd"]
EngineChoice = Literal["inline", "thread"]

DEVICE = "dsa0"
"""The machine's DSA."""

__all__ = [
    "DEVICE",
    "EngineChoice",
    "Platform",
    "UsageError",
    "check_input",
    "check_output",
    "machine_config",
    "run_program",
    "single",
    "terminal_progress",
]

_REFRESH = 0.05  # seconds between updates of a progress bar
_BLOCK = 2 << 20


class UsageError(PvfioError):
    """The request cannot be: exit status 2."""


def run_program(main: Callable[[], Awaitable[int]]) -> int:
    """Runs ``main`` under trio and returns its exit status: 130 when interrupted, 2 for a request that
    cannot be, 1 for a failure.

    Both of the latter print one line on standard error.
    """
    try:
        return trio.run(main)
    except BaseException as error:
        return _explain(error)


def single(error: BaseException) -> BaseException:
    """The error in a group of one; of several, an interrupt if there is one, else the first."""
    while isinstance(error, BaseExceptionGroup):
        interrupts, _ = error.split(KeyboardInterrupt)
        error = KeyboardInterrupt() if interrupts else error.exceptions[0]
    return error


def _explain(error: BaseException) -> int:
    cause = single(error)
    if isinstance(cause, KeyboardInterrupt):
        return 130
    if isinstance(cause, UsageError):
        print(f"pvfio: {cause}", file=sys.stderr)
        return 2
    if isinstance(cause, PvfioError) or (
        isinstance(cause, OSError) and not isinstance(cause, BrokenPipeError)
    ):
        print(f"pvfio: {cause}", file=sys.stderr)
        return 1
    raise cause


def machine_config(platform: Platform, engine: EngineChoice, ram: int, devices: int = 1) -> MachineConfig:
    """The default machine with so many DSAs, "dsa0" and on. ``UsageError`` for memory it cannot have."""
    from pvfio.host.config import IommuConfig
    from pvfio.machine import DeviceSpec, MachineConfig

    if ram < 16 * _BLOCK or ram % _BLOCK:
        raise UsageError(f"guest memory is a multiple of 2 MiB, at least 32 MiB, not {ram} bytes")
    try:
        return MachineConfig(
            iommu=IommuConfig(platform=platform),
            engine=engine,
            ram=ram,
            devices=(DeviceSpec(kind="dsa"),) * devices,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_input(path: Path) -> int:
    """The size of a file that can be read. ``UsageError`` for one that cannot."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: Is not a regular file")
    return status.st_size


def check_output(path: Path, source: Path) -> None:
    """``UsageError`` for a file that cannot be written, or is the input."""
    try:
        if path.exists() and path.samefile(source):
            raise UsageError(f"{path}: is the input file")
        with open(path, "ab"):
            pass
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


@contextmanager
def terminal_progress(
    total: float | None, unit: str, *, quiet: bool = False, label: str = "dmatest", thread: bool = True
) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """A way to print a line and a way to say how much more is done; with a progress bar where output is a
    terminal and not ``quiet``.

    Without ``thread`` the bar moves only when told, and takes no time of the program's in between.
    """
    if quiet or not sys.stdout.isatty():
        yield (lambda line: print(line, flush=True)), (lambda _: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # A number of seconds is no whole number.
    digits, most = (".1f", "{task.total:.1f}") if isinstance(total, float) else (".0f", "{task.total}")
    done = f"{{task.completed:{digits}}}/{most if total is not None else '?'}"
    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{done} {unit}"),
    ]
    console = Console(highlight=False)
    columns.append(TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=thread) as progress:
        task = progress.add_task(label, total=total)
        pending, shown = 0.0, time.monotonic()

        def advance(amount: float) -> None:
            nonlocal pending, shown
            pending += amount
            now = time.monotonic()
            if now - shown >= _REFRESH:
                progress.update(task, advance=pending, refresh=not thread)
                pending, shown = 0.0, now

        def emit(line: str) -> None:
            console.print(line, markup=False, soft_wrap=True)

        yield emit, advance
        progress.advance(task, pending)
