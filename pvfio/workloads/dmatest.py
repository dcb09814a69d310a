"""dmatest: what Linux's module of that name does to a DMA channel, done to a DSA work queue.

A channel is a work queue, a thread is a task. Each test fills a source and a destination with patterns,
moves a random length between random offsets (or fills, for ``memset``), and verifies every byte of both,
and of guard areas around the destination, with numpy. Output lines have the module's format.

Not here: XOR and P+Q tests (a DSA has neither).
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from pvfio.drivers.dsa import DsaError, OperationAborted
from pvfio.errors import DeadlineExceeded, DeviceFailed
from pvfio.workloads.pattern import (
    Mismatches,
    fill_destination,
    fill_source,
    verify_destination,
    verify_source,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.drivers.dsa import WorkQueue
    from pvfio.vfio import DmaBuffer

__all__ = [
    "GUARD",
    "DmatestParams",
    "Summary",
    "TestThread",
    "attempt",
    "channel_name",
    "check_size",
    "dmatest",
    "memory_needed",
]

GUARD = 4096  # bytes before and after a destination that no DMA may touch

Emit = Callable[[str], None]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class DmatestParams:
    """The module's parameters. ``iterations`` 0: until cancelled; ``timeout`` in ms, -1: none;
    ``alignment`` as a power of two, -1: none; ``transfer_size`` 0: random. ``seed`` makes the random
    choices repeatable.

    Raises ``ValueError`` for values that cannot be.
    """

    test_buf_size: int = 16384
    threads_per_chan: int = 1
    iterations: int = 1000
    memset: bool = False
    timeout: int = 3000
    noverify: bool = False
    norandom: bool = False
    verbose: bool = False
    alignment: int = -1
    transfer_size: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.test_buf_size >= 1, "test_buf_size is at least 1"),
            (self.threads_per_chan >= 1, "threads_per_chan is at least 1"),
            (self.iterations >= 0, "iterations is at least 0"),
            (self.timeout >= -1 and self.timeout != 0, "timeout is at least 1 ms, or -1 for none"),
            (-1 <= self.alignment < 32, "alignment is 0 to 31, or -1 for none"),
            (self.transfer_size >= 0, "transfer_size is at least 0"),
        )
        for good, message in checks:
            if not good:
                raise ValueError(message)
        if self.transfer_size and self.transfer_size >= self.test_buf_size:
            raise ValueError(
                f"{self.transfer_size}-byte transfer size must be lower than {self.test_buf_size}-buffer size"
            )
        if self.alignment >= 0 and 1 << self.alignment > self.test_buf_size:
            raise ValueError(
                f"{self.test_buf_size}-byte buffer too small for {1 << self.alignment}-byte alignment"
            )

    @property
    def deadline(self) -> float:
        """The timeout in seconds."""
        return math.inf if self.timeout < 0 else self.timeout / 1000


@dataclass(slots=True)
class Summary:
    """One thread's result: tests, failures, payload bytes, and seconds without filling and comparing."""

    name: str
    tests: int = 0
    failures: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    status: int = 0

    @property
    def hundredths(self) -> int:
        """Tests in a hundred seconds, cut as the module cuts them."""
        micros = int(self.seconds * 1e6)
        iops = (self.tests * 1_000_000 << 8) // micros if micros > 0 else 0
        return (iops >> 8) * 100 + ((iops & 0xFF) * 100 >> 8)

    @property
    def kbs(self) -> int:
        """KiB a second."""
        micros = int(self.seconds * 1e6)
        return (self.nbytes >> 10) * 1_000_000 // micros if micros > 0 else 0

    def line(self) -> str:
        """As the module prints it."""
        iops = self.hundredths
        return (
            f"dmatest: {self.name}: summary {self.tests} tests, {self.failures} failures "
            f"{iops // 100}.{iops % 100:02d} iops {self.kbs} KB/s ({self.status})"
        )


def channel_name(device: int, wq: int) -> str:
    """A work queue's name as a channel."""
    return f"dma{device}chan{wq}"


def memory_needed(params: DmatestParams, channels: int) -> int:
    """Bytes of DMA memory the buffers of a run take."""
    one = 2 * params.test_buf_size + 2 * GUARD + 2 * 4096
    return channels * params.threads_per_chan * one


@dataclass(slots=True)
class TestThread:
    """What one thread works with: a queue, buffers, and where its result goes."""

    __test__ = False  # not one of pytest's

    wq: WorkQueue
    params: DmatestParams
    emit: Emit
    advance: Advance
    rng: np.random.Generator
    summary: Summary
    source: NDArray[np.uint8] = field(init=False)
    destination: NDArray[np.uint8] = field(init=False)
    guarded: NDArray[np.uint8] = field(init=False)
    buffers: tuple[DmaBuffer, DmaBuffer] = field(init=False)
    started: Callable[[int], None] | None = None
    excluded: float = 0.0

    async def allocate(self) -> None:
        """A source, and a destination between two guards."""
        container, size = self.wq.driver.device.container, self.params.test_buf_size
        source = await container.alloc(size)
        try:
            destination = await container.alloc(size + 2 * GUARD)
        except BaseException:
            with trio.CancelScope(shield=True):
                await container.free(source)
            raise
        self.buffers = (source, destination)
        self.source = np.asarray(source)
        self.guarded = np.asarray(destination)
        self.destination = self.guarded[GUARD : GUARD + size]
        if self.started is not None and source.iova is not None:
            self.started(source.iova)

    async def free(self) -> None:
        """Gives the buffers back. Finishes when cancelled."""
        with trio.CancelScope(shield=True):
            for buffer in self.buffers:
                await self.wq.driver.device.container.free(buffer)

    def result(self, what: str, where: tuple[int, int, int], data: int) -> None:
        """One test's result, as the module prints it."""
        src, dst, length = where
        self.emit(
            f"dmatest: {self.summary.name}: result #{self.summary.tests}: '{what}' with src_off={src:#x} "
            f"dst_off={dst:#x} len={length:#x} ({data})"
        )

    def choose(self) -> tuple[int, int, int]:
        """Source offset, destination offset, length."""
        params, size = self.params, self.params.test_buf_size
        align = max(params.alignment, 0)
        if params.transfer_size:
            length = params.transfer_size
        else:
            length = size if params.norandom else int(self.rng.integers(1, size + 1))
            length = (length >> align << align) or 1 << align
        if params.norandom:
            return 0, 0, length
        src, dst = (int(value) for value in self.rng.integers(0, size - length + 1, 2))
        return src >> align << align, dst >> align << align, length

    def prepare(self, where: tuple[int, int, int]) -> None:
        """Writes the patterns, if they are going to be verified."""
        if self.params.noverify:
            return
        began = time.perf_counter()
        src, dst, length = where
        memset = self.params.memset
        fill_source(self.source, src, length, memset=memset)
        fill_destination(self.destination, dst, length, memset=memset)
        self.guarded[:GUARD] = 0
        self.guarded[-GUARD:] = 0
        self.excluded += time.perf_counter() - began

    def verify(self, where: tuple[int, int, int]) -> Mismatches:
        """Every byte of both buffers and the guards."""
        began = time.perf_counter()
        src, dst, length = where
        memset = self.params.memset
        found = verify_source(self.source, src, length, memset=memset)
        found.add(verify_destination(self.destination, dst, length, src, memset=memset))
        found.add(_guards(self.guarded))
        self.excluded += time.perf_counter() - began
        return found

    async def move(self, where: tuple[int, int, int]) -> None:
        """The DMA."""
        src, dst, length = where
        source, destination = self.buffers
        assert source.iova is not None
        assert destination.iova is not None
        target = destination.iova + GUARD + dst
        if self.params.memset:
            byte = bytes([self.source[src]])
            await self.wq.fill(target, byte, length, deadline=self.params.deadline)
        else:
            await self.wq.memmove(target, source.iova + src, length, deadline=self.params.deadline)

    async def test(self) -> None:
        """One iteration."""
        summary = self.summary
        where = self.choose()
        summary.tests += 1
        summary.nbytes += where[2]
        self.prepare(where)
        try:
            failure = await attempt(self.move, where)
        except trio.Cancelled:
            summary.tests -= 1
            summary.nbytes -= where[2]
            raise
        wanted = failure is None and not self.params.noverify
        self.conclude(failure, where, self.verify(where) if wanted else Mismatches())

    def conclude(self, failure: str | None, where: tuple[int, int, int], found: Mismatches) -> None:
        """Counts a test that ended, and prints its result if it failed or all are wanted."""
        summary = self.summary
        if failure is not None:
            summary.failures += 1
            self.result(failure, where, 0)
        elif found.count:
            summary.failures += 1
            for line in found.lines:
                self.emit(f"dmatest: {summary.name}: {line}")
            if found.count > len(found.lines):
                self.emit(f"dmatest: {summary.name}: {found.count - len(found.lines)} errors suppressed")
            self.result("data error", where, found.count)
        elif self.params.verbose:
            self.result("test passed", where, 0)


def _guards(guarded: NDArray[np.uint8]) -> Mismatches:
    """Bytes outside a destination that are not 0 any more."""
    found = Mismatches()
    for name, start, area in (
        ("before", 0, guarded[:GUARD]),
        ("after", guarded.size - GUARD, guarded[-GUARD:]),
    ):
        wrong = np.flatnonzero(area)
        lines = [
            f"guard {name} dstbuf, byte {start + int(i):#x} overwritten! Expected 00, got {int(area[i]):02x}"
            for i in wrong[:4]
        ]
        found.add(Mismatches(int(wrong.size), lines))
    return found


async def attempt(move: Callable[[Any], Any], where: Any) -> str | None:
    """Runs a transfer; ``None``, or in the module's words what went wrong with it."""
    try:
        await move(where)
    except DeadlineExceeded:
        return "test timed out"
    except DsaError as error:
        return f"completion error status {error.name}"
    except OperationAborted:
        return "completion busy status"
    return None


async def _run_thread(thread: TestThread) -> None:
    params, summary = thread.params, thread.summary
    await thread.allocate()
    began = time.perf_counter()
    try:
        while not params.iterations or summary.tests < params.iterations:
            try:
                await thread.test()
            except DeviceFailed as error:
                summary.failures += 1
                summary.status = -errno.ENODEV
                thread.emit(f"dmatest: {summary.name}: {error}")
                break
            thread.advance(1)
    finally:
        summary.seconds = time.perf_counter() - began - thread.excluded
        thread.emit(summary.line())
        await thread.free()


MakeThread = Callable[["WorkQueue", DmatestParams, Emit, Advance, np.random.Generator, Summary], TestThread]


async def dmatest(
    wqs: Sequence[WorkQueue],
    params: DmatestParams,
    *,
    emit: Emit = print,
    advance: Advance = lambda _: None,
    started: Callable[[int], None] | None = None,
    devices: Sequence[int] | None = None,
    operation: str | None = None,
    make: MakeThread | None = None,
) -> list[Summary]:
    """Runs the test on every work queue with ``threads_per_chan`` tasks each and returns their summaries.

    ``devices`` are the numbers of the work queues' devices (default: all are device 0's). ``operation``
    names what ``make`` makes threads for (default: ``TestThread``, for a copy or a set). ``emit`` gets each
    line of output, ``advance`` the number of tests done since its last call, ``started`` the IOVA of the
    first source buffer once it is mapped. Raises ``ValueError`` where a work queue does not take transfers
    of ``test_buf_size``, ``MemoryError`` where the buffers do not fit. Cancelled: the DMA ends, then the
    buffers are freed.
    """
    op = operation or ("set" if params.memset else "copy")
    threads = []
    for wq, device in zip(wqs, devices or [0] * len(wqs), strict=True):
        check_size(wq, params.test_buf_size)
        for number in range(params.threads_per_chan):
            seed = None if params.seed is None else [params.seed, device, wq.id, number]
            summary = Summary(f"{channel_name(device, wq.id)}-{op}{number}")
            rng = np.random.default_rng(seed)
            threads.append((make or TestThread)(wq, params, emit, advance, rng, summary))
    threads[0].started = started
    async with _one_error() as nursery:
        for thread in threads:
            nursery.start_soon(_run_thread, thread)
    return [thread.summary for thread in threads]


def check_size(wq: WorkQueue, size: int) -> None:
    if size > wq.max_transfer:
        raise ValueError(
            f"a buffer of {size} bytes is larger than the device's largest transfer, {wq.max_transfer}"
        )


class _one_error:  # noqa: N801
    """A nursery whose single error comes out as itself, not in a group."""

    def __init__(self) -> None:
        self._manager = trio.open_nursery()

    async def __aenter__(self) -> trio.Nursery:
        return await self._manager.__aenter__()

    async def __aexit__(self, *details: Any) -> bool:
        try:
            return bool(await self._manager.__aexit__(*details))
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error from None
