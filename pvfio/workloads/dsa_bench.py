"""How fast a DSA is, as ratios to plain C loops over the same buffers in the same run.

Device and loop take turns, and the figures are medians over the turns: the absolute ones change with the
machine's mood, the ratios much less. A turn of the device is up to 128 batches of 32 descriptors, every one
with a completion record, written to the portal at once, so that what Python does for a submission is shared
by four thousand descriptors; a list of descriptors may serve several of the batches. Buffers are as many as
stay in the processor's cache, in 2 MiB pages.

Not measured: mapping (``tests/bench/spine.py`` does), several work queues at once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from pvfio.abi import dtype_of, ffi, lib
from pvfio.drivers.dsa import descriptors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.drivers.dsa import Batch, WorkQueue
    from pvfio.vfio import DmaBuffer

__all__ = ["DEPTH", "ORIENTATION", "SIZES", "TARGETS", "Bench", "Figure", "measure"]

DEPTH = 32
"""Descriptors in a batch."""
SIZES = (4 << 10, 64 << 10, 1 << 20)

ORIENTATION: dict[str, tuple[float, float, float]] = {
    "copy": (7.6e6, 637e3, 19e3),
    "fill": (13.8e6, 1230e3, 39e3),
    "crc32c": (9.4e6, 830e3, 33e3),
    "compare": (8.2e6, 664e3, 20e3),
    "dualcast": (6.6e6, 341e3, 7.8e3),
    "copy+crc": (4.9e6, 363e3, 11.6e3),
}
"""SPDK's software accel in operations a second at the three sizes: one core of an idle machine, queue depth
32, buffers in the cache, no IOMMU in between."""

TARGETS: dict[tuple[str, int], float] = {
    ("copy", 4 << 10): 0.60,
    ("copy", 64 << 10): 0.90,
    ("copy", 1 << 20): 0.90,
    ("fill", 4 << 10): 0.40,
    ("crc32c", 64 << 10): 0.90,
}
"""The ratios to reach."""
NOOP_TARGET = 15e6

_WORKING_SET = 512 << 10  # of each buffer: two of them stay in a second-level cache
_BUFFER = 2 << 20
_MOST_BATCHES = 128
_MOST_MEMBERS = 1024  # descriptors in memory
_TURN_BYTES = 32 << 20
_WAKE_SECONDS = 0.1
_PATTERN = 0x0123456789ABCDEF


@dataclass(frozen=True, slots=True)
class Figure:
    """One operation at one size: operations a second of the device and of the loop (``None``: there is no
    loop for it), and the median ratio of a turn to the loop's turn beside it.
    """

    operation: str
    size: int
    rate: float
    loop_rate: float | None = None
    ratio: float | None = None
    target: float | None = None
    orientation: float | None = None

    @property
    def gigabytes(self) -> float:
        """GB/s of the device, each byte of the transfer size counted once."""
        return self.rate * self.size / 1e9


@dataclass(frozen=True, slots=True)
class Bench:
    """A whole run: the table, the loops that are not in it, NOOPs a second with and without completion
    records of their own, and the median seconds of one 4 KiB MEMMOVE.
    """

    table: list[Figure]
    fill8: Figure
    noops: float
    noops_without_records: float
    awaited: float
    nowait: float


@dataclass(slots=True)
class _Buffers:
    a: DmaBuffer
    b: DmaBuffer
    c: DmaBuffer

    def iovas(self) -> tuple[int, int, int]:
        """Of a, b, c."""
        return tuple(int(buffer.iova or 0) for buffer in (self.a, self.b, self.c))  # type: ignore[return-value]


def _build(operation: str, buffers: _Buffers, at: NDArray[np.uint64], size: int) -> NDArray[Any]:
    """The descriptors of an operation at these offsets in the buffers."""
    a, b, c = (np.uint64(iova) + at for iova in buffers.iovas())
    if operation == "fill":
        return descriptors.fill(b, _PATTERN, size)
    if operation == "crc32c":
        return descriptors.crcgen(a, size)
    if operation == "compare":
        return descriptors.compare(a, b, size)
    if operation == "copy+crc":
        return descriptors.copy_crc(b, a, size)
    if operation == "dualcast":
        return descriptors.dualcast(b, c, a, size)
    return descriptors.memmove(b, a, size)


_LOOPS = {
    "copy": lib.PV_LOOP_COPY,
    "fill": lib.PV_LOOP_FILL,
    "crc32c": lib.PV_LOOP_CRC,
    "compare": lib.PV_LOOP_COMPARE,
    "dualcast": lib.PV_LOOP_DUALCAST,
    "copy+crc": lib.PV_LOOP_COPY_CRC,
}


class _Turns:
    """Turns of the device: one submission of batches that were prepared before."""

    def __init__(
        self, wq: WorkQueue, batch: Batch, members: NDArray[Any], batches: int, *, records: bool = True
    ) -> None:
        self.wq = wq
        self.batch = batch
        self.members = len(members)
        self.count = batches * DEPTH
        descriptors.words_of(batch.descriptors)[: self.members] = descriptors.words_of(members)
        batch.prepare(self.members, records=records)
        self.outer = descriptors.empty(batches)
        self.outer["flags_opcode"] = lib.DSA_OPCODE_BATCH << lib.DSA_DESC_OPCODE_SHIFT
        step = DEPTH * np.dtype(dtype_of("struct dsa_hw_desc")).itemsize
        lists = np.arange(batches, dtype=np.uint64) % np.uint64(self.members // DEPTH)
        self.outer["desc_list_addr"] = lists * np.uint64(step) + np.uint64(batch.iova)
        self.outer["desc_count"] = DEPTH

    async def turn(self) -> float:
        """Seconds from submission to the last completion. ``DsaError`` for a batch that fails."""
        began = time.perf_counter()
        submission = self.wq.submit_nowait(self.outer)
        while not submission.poll():
            await trio.lowlevel.checkpoint()
        took = time.perf_counter() - began
        for record in submission.records:
            self.wq.check(record, "batch")
        return took

    @property
    def records(self) -> NDArray[Any]:
        """The members' records."""
        return self.batch.records[: self.members]


def _batches(size: int, wq: WorkQueue) -> int:
    return max(1, min(_MOST_BATCHES, wq.size, _TURN_BYTES // (DEPTH * size)))


def _members(batch: Batch, batches: int) -> int:
    """How many descriptors lie in memory: whole lists, of which some may be used more than once."""
    return min(batch.capacity // DEPTH, batches) * DEPTH


def _distinct(size: int) -> int:
    return max(1, min(DEPTH, _WORKING_SET // size))


async def _figure(
    wq: WorkQueue, batch: Batch, buffers: _Buffers, operation: str, size: int, rounds: int, loop: int
) -> Figure:
    distinct = _distinct(size)
    batches = _batches(size, wq)
    at = np.arange(_members(batch, batches), dtype=np.uint64) % np.uint64(distinct) * np.uint64(size)
    _prepare(buffers, operation)
    turns = _Turns(wq, batch, _build(operation, buffers, at, size), batches)
    count = turns.count
    pointers = [ffi.cast("uint8_t *", ffi.from_buffer(x)) for x in (buffers.a, buffers.b, buffers.c)]
    pairs = []
    for number in range(rounds + 1):
        device = await turns.turn()
        began = time.perf_counter()
        lib.pv_bench_loop(loop, *pointers, size, distinct, count)
        if number:  # the first one warms caches up
            pairs.append((device, time.perf_counter() - began))
    wrong = np.count_nonzero(turns.records["status"] != lib.DSA_COMP_SUCCESS)
    if wrong:
        raise RuntimeError(f"{operation}: {wrong} of {turns.members} descriptors failed")
    index = SIZES.index(size) if size in SIZES else None
    return Figure(
        operation,
        size,
        rate=count / statistics.median(device for device, _ in pairs),
        loop_rate=count / statistics.median(loop for _, loop in pairs),
        ratio=statistics.median(loop / device for device, loop in pairs),
        target=TARGETS.get((operation, size)) if loop != lib.PV_LOOP_FILL8 else None,
        orientation=ORIENTATION[operation][index] if index is not None else None,
    )


def _prepare(buffers: _Buffers, operation: str) -> None:
    """Contents: random bytes, the same in a and b where they are compared."""
    a = np.asarray(buffers.a)
    a[:] = np.random.default_rng(1).integers(0, 256, a.size, dtype=np.uint8)
    np.asarray(buffers.b)[:] = a if operation == "compare" else 0


async def _noops(wq: WorkQueue, batch: Batch, rounds: int, *, records: bool) -> float:
    batches = _batches(1, wq)
    turns = _Turns(wq, batch, descriptors.noop(_members(batch, batches)), batches, records=records)
    times = [await turns.turn() for _ in range(4 * rounds)]
    return turns.count / statistics.median(times)


async def _single(buffers: _Buffers, wq: WorkQueue, rounds: int) -> tuple[float, float]:
    """Median seconds of one 4 KiB MEMMOVE: awaited, and ``_nowait`` with polling."""
    a, b, _ = buffers.iovas()
    awaited, nowait = [], []
    for _ in range(20 * rounds):
        began = time.perf_counter()
        await wq.memmove(b, a, 4096)
        awaited.append(time.perf_counter() - began)
        began = time.perf_counter()
        submission = wq.memmove_nowait(b, a, 4096)
        while not submission.poll():
            pass
        nowait.append(time.perf_counter() - began)
        wq.check(submission.records[0], "memmove")
    return statistics.median(awaited), statistics.median(nowait)


async def measure(
    wq: WorkQueue,
    *,
    rounds: int = 31,
    sizes: tuple[int, ...] = SIZES,
    advance: Callable[[], None] | None = None,
) -> Bench:
    """Runs everything on one work queue; ``advance`` is called after each figure.

    ``rounds`` turns of device and loop for each figure. Raises ``ValueError`` for a size that is no
    multiple of 8 from 8 to 2 MiB and for a work queue without batches of 32, ``RuntimeError`` where a
    descriptor fails, and what the driver raises. Cancelled: what was submitted is finished or taken back
    when the driver is left.
    """
    if wq.max_batch < DEPTH:
        raise ValueError(f"the work queue takes batches of {wq.max_batch}, not of {DEPTH}")
    if not all(8 <= size <= _BUFFER and size % 8 == 0 for size in sizes):
        raise ValueError(f"sizes are multiples of 8 from 8 to {_BUFFER}")
    container = wq.driver.device.container
    buffers = _Buffers(*[await container.alloc(_BUFFER, align=_BUFFER) for _ in range(3)])
    try:
        return await _measure(wq, buffers, rounds, sizes, advance or (lambda: None))
    finally:
        with trio.CancelScope(shield=True):
            for buffer in (buffers.a, buffers.b, buffers.c):
                await container.free(buffer)


def _wake(buffers: _Buffers) -> None:
    """Keeps a processor that was idle busy until its clock is up."""
    a, b, c = (ffi.cast("uint8_t *", ffi.from_buffer(x)) for x in (buffers.a, buffers.b, buffers.c))
    began = time.perf_counter()
    while time.perf_counter() - began < _WAKE_SECONDS:
        lib.pv_bench_loop(lib.PV_LOOP_COPY, a, b, c, DEPTH << 10, 1, DEPTH)


async def _measure(
    wq: WorkQueue, buffers: _Buffers, rounds: int, sizes: tuple[int, ...], advance: Callable[[], None]
) -> Bench:
    batch = await wq.alloc_batch(min(wq.max_batch, _MOST_MEMBERS) // DEPTH * DEPTH)
    _wake(buffers)
    table = []
    for operation in ORIENTATION:
        for size in sizes:
            if operation == "dualcast" and not wq.driver.capabilities.has_operation(lib.DSA_OPCODE_DUALCAST):
                continue
            table.append(await _figure(wq, batch, buffers, operation, size, rounds, _LOOPS[operation]))
            advance()
    fill8 = await _figure(wq, batch, buffers, "fill", sizes[0], rounds, lib.PV_LOOP_FILL8)
    with_records = await _noops(wq, batch, rounds, records=True)
    without = await _noops(wq, batch, rounds, records=False)
    awaited, nowait = await _single(buffers, wq, rounds)
    advance()
    return Bench(table, fill8, with_records, without, awaited, nowait)
