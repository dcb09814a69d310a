"""How fast the NVMe path is: reads and writes beside a plain C loop of the same copies.

4 KiB at random places, at several depths, and 128 KiB one after the other. The loop copies between places of the
namespace's own memory and the same DMA buffers, with no device between them; device and loop take turns, and figures
are medians over the turns. At depth 1 a turn is single commands: through ``submit_one_nowait`` and a wait in C for the
phase bit, and, beside it, awaited.

Not here: what little work costs (share.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import numpy as np
import trio
from numpy.typing import NDArray

from pvfio.abi import ffi, lib

if TYPE_CHECKING:
    from pvfio.drivers.nvme import NvmeDriver, QueuePair
    from pvfio.vfio import DmaBuffer

__all__ = ["CASES", "DEPTHS", "SIZE", "Bench", "Case", "Figure", "fill", "measure", "turn", "turn_of_one"]

DEPTHS: Final = (1, 32, 128)
SIZE: Final = 4096
_LONG: Final = 128 << 10
_WORKING_SET: Final = 256 << 20
_COUNT: Final = {
    (SIZE, 1): 2000,
    (SIZE, 32): 32 * 512,
    (SIZE, 128): 128 * 128,
    (_LONG, 32): _WORKING_SET // _LONG,
}
_WAIT_NS: Final = 1_000_000
_AWAITED: Final = 300


@dataclass(frozen=True, slots=True)
class Case:
    """I/Os of ``size`` bytes, ``depth`` in flight, at random places or one after the other.

    ``orientation``: I/Os a second of SPDK's vfio-user target and perf tool, a core each, on an idle machine of this
    kind. ``target``: the ratio to the loop that is wanted, where one is.
    """

    operation: str
    random: bool
    size: int
    depth: int
    orientation: float
    target: float | None

    @property
    def name(self) -> str:
        """In fio's words."""
        return f"{'rand' if self.random else ''}{self.operation}"


CASES: Final = (
    Case("read", True, SIZE, 1, 0.78e6, None),
    Case("read", True, SIZE, 32, 1.36e6, 0.75),
    Case("read", True, SIZE, 128, 1.36e6, 0.75),
    Case("write", True, SIZE, 1, 0.82e6, None),
    Case("write", True, SIZE, 32, 1.59e6, 0.75),
    Case("write", True, SIZE, 128, 1.51e6, 0.75),
    Case("read", False, _LONG, 32, 22e9 / _LONG, None),
    Case("write", False, _LONG, 32, 19e9 / _LONG, None),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A case's I/Os a second, by the device and by the loop, and the median of their ratios."""

    case: Case
    rate: float
    loop_rate: float
    ratio: float

    @property
    def microseconds(self) -> float:
        """An I/O's share of the time."""
        return 1e6 / self.rate


@dataclass(frozen=True, slots=True)
class Bench:
    """The table, and the median seconds of one awaited 4 KiB read and write."""

    table: list[Figure]
    awaited_read: float
    awaited_write: float


def turn(
    pair: QueuePair,
    opcode: int,
    nsid: int,
    blocks: int,
    lbas: NDArray[np.uint64],
    iovas: NDArray[np.uint64],
    depth: int,
) -> float:
    """Seconds for all ``lbas`` with ``depth`` commands in flight. A slot's buffer is whoever's turn it is: what is in
    them does not matter here. ``RuntimeError`` for a command that fails or does not come back.
    """
    count = len(lbas)
    begun = ended = 0
    began = time.perf_counter()
    while ended < count:
        some = min(depth - (begun - ended), count - begun)
        if some:
            end = begun + some
            at = begun % depth
            # Buffers in turn; the array of them is twice as long, so that a run never wraps.
            pair.submit_nowait(opcode, nsid, lbas[begun:end], blocks, iovas[at : at + some])
            begun = end
        done = pair.reap_nowait(least=max(1, (begun - ended) // 2), wait_ns=_WAIT_NS)
        if done.failed:
            raise RuntimeError("a command of the benchmark failed")
        ended += len(done)
    return time.perf_counter() - began


def turn_of_one(pair: QueuePair, opcode: int, nsid: int, blocks: int, lbas: list[int], iova: int) -> float:
    """As ``turn`` with one command in flight, in plain numbers."""
    began = time.perf_counter()
    for lba in lbas:
        pair.submit_one_nowait(opcode, nsid, lba, blocks, iova)
        while (done := pair.reap_one_nowait(_WAIT_NS)) is None:
            pass
        if done[1]:
            raise RuntimeError("a command of the benchmark failed")
    return time.perf_counter() - began


def _loop(
    case: Case, media: NDArray[np.uint8], buffers: NDArray[np.uint8], offsets: NDArray[np.uint64]
) -> float:
    began = time.perf_counter()
    lib.pv_fio_copy_loop(
        ffi.cast("uint8_t *", ffi.from_buffer(media)),
        ffi.cast("uint8_t *", ffi.from_buffer(buffers)),
        ffi.cast("uint64_t *", ffi.from_buffer(offsets)),
        len(offsets),
        case.size,
        case.depth,
        case.operation == "write",
    )
    return time.perf_counter() - began


async def _awaited(
    nvme: NvmeDriver, nsid: int, buffer: DmaBuffer, lbas: NDArray[np.uint64], write: bool
) -> float:
    one = cast("DmaBuffer", buffer[:SIZE])
    times = []
    for lba in lbas[:_AWAITED].tolist():
        began = time.perf_counter()
        await (nvme.write(nsid, lba, one) if write else nvme.read(nsid, lba, one))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


async def measure(
    nvme: NvmeDriver,
    media: NDArray[np.uint8],
    *,
    rounds: int = 15,
    advance: Callable[[], None] | None = None,
) -> Bench:
    """Runs everything on the first queue and namespace; ``advance`` is called after each figure.

    ``media``: the memory of that namespace, which the loop copies from and to. The namespace is overwritten. Raises
    ``ValueError`` where it has less than 256 MiB or the queue takes fewer than 128 commands, ``RuntimeError`` where a
    command fails, and what the driver raises.
    """
    nsid = min(nvme.namespaces)
    namespace, pair = nvme.namespaces[nsid], nvme.queues[0]
    if min(namespace.size, len(media)) < _WORKING_SET or pair.depth < max(DEPTHS):
        raise ValueError("the benchmark needs 256 MiB of namespace and a queue for 128 commands")
    container = nvme.device.container
    buffer = await container.alloc(max(case.depth * case.size for case in CASES), align=2 << 20)
    try:
        await fill(pair, nsid, namespace.block_size, buffer, _WORKING_SET)
        return await _measure(nvme, nsid, buffer, media, rounds, advance or (lambda: None))
    finally:
        with trio.CancelScope(shield=True):
            while pair.outstanding:
                await pair.reap()
            await container.free(buffer)


async def fill(pair: QueuePair, nsid: int, block: int, buffer: DmaBuffer, total: int) -> None:
    """Writes ``total`` bytes from a buffer of 64 KiB or more: their pages are there before anything is measured."""
    size = 1 << 16
    offsets = np.arange(0, total, size, dtype=np.uint64)
    iovas = np.full(len(offsets), buffer.iova, dtype=np.uint64)
    await pair.transfer(lib.NVME_CMD_WRITE, nsid, offsets // np.uint64(block), size // block, iovas)


async def _measure(
    nvme: NvmeDriver,
    nsid: int,
    buffer: DmaBuffer,
    media: NDArray[np.uint8],
    rounds: int,
    advance: Callable[[], None],
) -> Bench:
    rng = np.random.default_rng(1)
    block = nvme.namespaces[nsid].block_size
    table = []
    for case in CASES:
        pairs = []
        for number in range(rounds + 1):
            # Random places of its own for each: those of the other are in a cache.
            turns = [_places(case, rng) for _ in range(2)]
            device = _device_turn(case, nvme.queues[0], nsid, block, buffer, turns[0])
            loop = _loop(case, media, buffer, turns[1] * np.uint64(case.size))
            if number:  # the first one warms caches up
                pairs.append((device, loop))
            await trio.lowlevel.checkpoint()
        table.append(_figure(case, pairs))
        advance()
    lbas = rng.integers(0, _WORKING_SET // SIZE, _AWAITED, dtype=np.uint64) * np.uint64(SIZE // block)
    awaited = [await _awaited(nvme, nsid, buffer, lbas, write) for write in (False, True)]
    advance()
    return Bench(table, *awaited)


def _places(case: Case, rng: np.random.Generator) -> NDArray[np.uint64]:
    """Where a turn's I/Os are, in units of their size."""
    count, there = _COUNT[case.size, case.depth], _WORKING_SET // case.size
    if case.random:
        return rng.integers(0, there, count, dtype=np.uint64)
    return np.arange(count, dtype=np.uint64) % np.uint64(there)


def _device_turn(
    case: Case, pair: QueuePair, nsid: int, block: int, buffer: DmaBuffer, places: NDArray[np.uint64]
) -> float:
    opcode = lib.NVME_CMD_WRITE if case.operation == "write" else lib.NVME_CMD_READ
    blocks, iova = case.size // block, buffer.iova or 0
    lbas = places * np.uint64(blocks)
    if case.depth == 1:
        return turn_of_one(pair, opcode, nsid, blocks, lbas.tolist(), iova)
    slots = np.tile(np.arange(case.depth, dtype=np.uint64), 2)
    iovas = np.uint64(iova) + slots * np.uint64(case.size)
    return turn(pair, opcode, nsid, blocks, lbas, iovas, case.depth)


def _figure(case: Case, pairs: list[tuple[float, float]]) -> Figure:
    count = _COUNT[case.size, case.depth]
    return Figure(
        case,
        rate=count / statistics.median(device for device, _ in pairs),
        loop_rate=count / statistics.median(loop for _, loop in pairs),
        ratio=statistics.median(loop / device for device, loop in pairs),
    )
