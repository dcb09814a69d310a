"""What of a core little work takes: single reads by interrupt at a steady rate, and nothing at all.

Processor time is that of the whole process, the device's engine and trio's loop included. Reading and only keeping the
pace take turns, and figures are medians over the turns: on a shared host, time that others had counts as ours.

Not here: speed (bench.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from pvfio.drivers.nvme import NvmeDriver
    from pvfio.vfio import DmaBuffer

__all__ = ["RATE", "Shares", "measure_shares", "plain_sleep", "trio_timer"]

RATE: Final = 1000
_SIZE: Final = 4096
_TURNS: Final = 10


@dataclass(frozen=True, slots=True)
class Shares:
    """In percent of a core: ``RATE`` reads a second, what of that their pace takes by itself, and nobody at work. Of
    reads that did not keep up with their pace, what as many of them take.
    """

    reads: float
    pace: float
    idle: float


async def plain_sleep(until: float) -> None:
    """The cheapest pace there is: the thread sleeps, and nothing else runs in it. ``until`` is a time of trio's."""
    time.sleep(max(0.0, until - trio.current_time()))  # noqa: ASYNC251 - that is what it is for


async def trio_timer(until: float) -> None:
    """The pace of a task among others."""
    await trio.sleep_until(until)


async def measure_shares(
    nvme: NvmeDriver, *, seconds: float = 2.0, pause: Callable[[float], Awaitable[None]] = plain_sleep
) -> Shares:
    """Awaits 4 KiB reads of the first namespace, one at a time, for ``seconds`` in all; as long each for the rest.

    ``nvme`` waits for interrupts; nobody else uses it. Raises what the driver raises. Cancelled: no read is in flight.
    """
    container = nvme.device.container
    buffer = await container.alloc(_SIZE)
    turn = seconds / _TURNS
    try:
        both = [
            [await _share(partial(_paced, nvme, read, turn, pause), turn) for read in (buffer, None)]
            for _ in range(_TURNS)
        ]
        idle = await _share(partial(trio.sleep, seconds), seconds)
        reads, pace = (statistics.median(turns) for turns in zip(*both, strict=True))
        return Shares(reads, pace, idle)
    finally:
        with trio.CancelScope(shield=True):
            await container.free(buffer)


async def _paced(
    nvme: NvmeDriver, buffer: DmaBuffer | None, seconds: float, pause: Callable[[float], Awaitable[None]]
) -> None:
    nsid = min(nvme.namespaces)
    namespace = nvme.namespaces[nsid]
    step = _SIZE // namespace.block_size
    there = namespace.blocks // step
    start = trio.current_time()
    for number in range(round(RATE * seconds)):
        await pause(start + number / RATE)
        if buffer is not None:
            await nvme.read(nsid, number * 7919 % there * step, buffer)


async def _share(work: Callable[[], Awaitable[None]], seconds: float) -> float:
    before = time.process_time()
    await work()
    return 100 * (time.process_time() - before) / seconds
