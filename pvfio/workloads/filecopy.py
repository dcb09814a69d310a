"""A file through a DSA: copied chunk by chunk, every byte and the CRC-32C verified by other means than the
device.

Each chunk is read from the file into ordinary memory, put into a DMA buffer, moved by the device, and then
source, destination and the guards around it are compared with what was read. Not here: several chunks in
flight at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from pvfio.workloads.crc32c import crc32c
from pvfio.workloads.dmatest import (
    GUARD,
    DmatestParams,
    Summary,
    TestThread,
    attempt,
    channel_name,
    check_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pvfio.drivers.dsa import WorkQueue
    from pvfio.workloads.dmatest import Advance, Emit

__all__ = ["FileCopy", "copy_file"]


@dataclass(slots=True)
class FileCopy:
    """A file that went through the device: bytes, chunks, guard bytes looked at, and the CRC-32C as the
    device and as numpy have it.
    """

    summary: Summary
    nbytes: int = 0
    chunks: int = 0
    guard_bytes: int = 0
    device_crc: int = 0
    expected_crc: int = 0


@dataclass(slots=True)
class _Copier:
    """One file on its way."""

    thread: TestThread
    copy: FileCopy
    copy_crc: bool
    target: Any = None

    async def chunk(self, data: NDArray[np.uint8]) -> None:
        """One chunk: in, through, and looked at."""
        thread, summary, size = self.thread, self.copy.summary, data.size
        offset = 0 if thread.params.norandom else int(thread.rng.integers(0, GUARD)) - GUARD // 2
        start = GUARD + offset
        began = time.perf_counter()
        thread.source[:size] = data
        thread.guarded[:] = 0
        self.copy.expected_crc = crc32c(data, self.copy.expected_crc)
        thread.excluded += time.perf_counter() - began
        summary.tests += 1
        summary.nbytes += size
        self.copy.nbytes += size
        self.copy.chunks += 1
        where = (0, offset, size)
        failure = await attempt(self._move, (start, size))
        if failure is not None:
            summary.failures += 1
            thread.result(failure, where, 0)
        elif not thread.params.noverify and (wrong := self._wrong_bytes(data, start)):
            summary.failures += 1
            thread.result("data error", where, wrong)
        if self.target is not None:
            await self.target.write(thread.guarded[start : start + size].tobytes())
        thread.advance(size)

    async def _move(self, where: tuple[int, int]) -> None:
        start, size = where
        copy, wq, deadline = self.copy, self.thread.wq, self.thread.params.deadline
        source, destination = self.thread.buffers
        to = destination[start:]
        if self.copy_crc:
            copy.device_crc = await wq.copy_crc(to, source, size, seed=copy.device_crc, deadline=deadline)
            return
        await wq.memmove(to, source, size, deadline=deadline)
        copy.device_crc = await wq.crcgen(to, size, seed=copy.device_crc, deadline=deadline)

    def _wrong_bytes(self, data: NDArray[np.uint8], start: int) -> int:
        thread, end = self.thread, start + data.size
        began = time.perf_counter()
        wrong = 0
        for actual in (thread.guarded[start:end], thread.source[: data.size]):
            if not np.array_equal(actual, data):
                wrong += int(np.count_nonzero(actual != data))
        wrong += int(np.count_nonzero(thread.guarded[:start]) + np.count_nonzero(thread.guarded[end:]))
        self.copy.guard_bytes += thread.guarded.size - data.size
        thread.excluded += time.perf_counter() - began
        return wrong


async def copy_file(
    wq: WorkQueue,
    path: Path,
    params: DmatestParams,
    *,
    copy_crc: bool = False,
    output: Path | None = None,
    device: int = 0,
    number: int = 0,
    emit: Emit = print,
    advance: Advance = lambda _: None,
    started: Callable[[int], None] | None = None,
) -> FileCopy:
    """Copies a file through the device in chunks of ``test_buf_size`` bytes.

    Each chunk is moved by MEMMOVE and the CRC of the copy taken by CRCGEN, or (``copy_crc``) both done by
    COPY_CRC; the CRC goes on from chunk to chunk. ``output`` gets the copy; ``device`` and
    ``number`` are the device's and the thread's in the summary's name. ``emit`` gets lines,
    ``advance`` bytes, ``started`` the IOVA of the source buffer once it is mapped. Raises ``OSError`` for
    the files, ``ValueError`` for a chunk the work queue does not take, ``MemoryError`` where the buffers do
    not fit. Cancelled: the DMA ends, then the buffers are freed.
    """
    check_size(wq, params.test_buf_size)
    copy = FileCopy(Summary(f"{channel_name(device, wq.id)}-copy{number}"))
    seed = None if params.seed is None else [params.seed, device, wq.id, number]
    thread = TestThread(wq, params, emit, advance, np.random.default_rng(seed), copy.summary)
    thread.started = started
    async with await trio.open_file(path, "rb") as source:
        target = await trio.open_file(output, "wb") if output is not None else None
        try:
            await thread.allocate()
            try:
                await _copy_all(_Copier(thread, copy, copy_crc, target), source)
            finally:
                await thread.free()
        finally:
            if target is not None:
                await target.aclose()
    if copy.device_crc != copy.expected_crc:
        copy.summary.failures += 1
        crcs = f"{copy.expected_crc:#010x}, the device says {copy.device_crc:#010x}"
        emit(f"dmatest: {copy.summary.name}: CRC-32C of the file is {crcs}")
    emit(copy.summary.line())
    return copy


async def _copy_all(copier: _Copier, source: Any) -> None:
    began = time.perf_counter()
    excluded = 0.0
    while True:
        reading = time.perf_counter()
        data = await source.read(copier.thread.params.test_buf_size)
        excluded += time.perf_counter() - reading
        if not data:
            break
        await copier.chunk(np.frombuffer(data, np.uint8))
    copier.copy.summary.seconds = time.perf_counter() - began - copier.thread.excluded - excluded
