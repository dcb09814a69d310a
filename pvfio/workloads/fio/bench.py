"""How fast the NVMe path is: 4 KiB random reads and writes beside a plain C loop of the same copies.

The loop copies between random places of the namespace's own memory and the same DMA buffers, with no device between
them; device and loop take turns, and figures are medians over the turns. At depth 1 a turn is single commands: through
``submit_one_nowait`` and a wait in C for the phase bit, and, beside it, awaited.
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

__all__ = ["DEPTHS", "ORIENTATION", "SIZE", "Bench", "Figure", "fill", "measure", "turn", "turn_of_one"]

DEPTHS: Final = (1, 32, 128)
SIZE: Final = 4096
_WORKING_SET: Final = 256 << 20
_COUNT: Final = {1: 2000, 32: 32 * 512, 128: 128 * 128}
_WAIT_NS: Final = 1_000_000
_AWAITED: Final = 300

ORIENTATION: Final = {
    ("read", 1): 0.78e6,
    ("read", 32): 1.36e6,
    ("read", 128): 1.36e6,
    ("write", 1): 0.82e6,
    ("write", 32): 1.59e6,
    ("write", 128): 1.51e6,
}
"""I/Os a second of SPDK's vfio-user target and perf tool, a core each, on an idle machine of this kind."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One direction at one depth: I/Os a second of the device and of the loop, and the median of their ratios."""

    operation: str
    depth: int
    rate: float
    loop_rate: float
    ratio: float
    target: float | None
    orientation: float

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
    media: NDArray[np.uint8], buffers: NDArray[np.uint8], offsets: NDArray[np.uint64], slots: int, write: bool
) -> float:
    began = time.perf_counter()
    lib.pv_fio_copy_loop(
        ffi.cast("uint8_t *", ffi.from_buffer(media)),
        ffi.cast("uint8_t *", ffi.from_buffer(buffers)),
        ffi.cast("uint64_t *", ffi.from_buffer(offsets)),
        len(offsets),
        SIZE,
        slots,
        write,
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
    buffer = await container.alloc(2 * max(DEPTHS) * SIZE, align=2 << 20)
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
    pair, block = nvme.queues[0], nvme.namespaces[nsid].block_size
    rng = np.random.default_rng(1)
    table = []
    for operation in ("read", "write"):
        write = operation == "write"
        opcode = lib.NVME_CMD_WRITE if write else lib.NVME_CMD_READ
        for depth in DEPTHS:
            iovas = np.uint64(buffer.iova or 0) + np.tile(np.arange(depth, dtype=np.uint64), 2) * np.uint64(
                SIZE
            )
            pairs = []
            for number in range(rounds + 1):
                # Places of its own for each: those of the other are in a cache.
                places = rng.integers(0, _WORKING_SET // SIZE, (2, _COUNT[depth]), dtype=np.uint64)
                lbas = places[0] * np.uint64(SIZE // block)
                if depth == 1:
                    device = turn_of_one(pair, opcode, nsid, SIZE // block, lbas.tolist(), int(iovas[0]))
                else:
                    device = turn(pair, opcode, nsid, SIZE // block, lbas, iovas, depth)
                loop = _loop(media, buffer, places[1] * np.uint64(SIZE), depth, write)
                if number:  # the first one warms caches up
                    pairs.append((device, loop))
                await trio.lowlevel.checkpoint()
            table.append(_figure(operation, depth, pairs))
            advance()
    lbas = rng.integers(0, _WORKING_SET // SIZE, _AWAITED, dtype=np.uint64) * np.uint64(SIZE // block)
    awaited = [await _awaited(nvme, nsid, buffer, lbas, write) for write in (False, True)]
    advance()
    return Bench(table, *awaited)


def _figure(operation: str, depth: int, pairs: list[tuple[float, float]]) -> Figure:
    count = _COUNT[depth]
    return Figure(
        operation,
        depth,
        rate=count / statistics.median(device for device, _ in pairs),
        loop_rate=count / statistics.median(loop for _, loop in pairs),
        ratio=statistics.median(loop / device for device, loop in pairs),
        target=0.75 if depth > 1 else None,
        orientation=ORIENTATION[operation, depth],
    )
