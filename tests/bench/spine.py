"""Print what the spine costs: map and unmap in nanoseconds, MEMMOVE in GB/s beside a plain memcpy, lines of code.

All in one process and one run, interleaved, medians; the machines are noisy, so read the ratios. Run by hand: it states
figures and judges nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from pvfio import Machine, MachineConfig
from pvfio.drivers.dsa import DsaDriver, WqConfig, descriptors

if TYPE_CHECKING:
    from pvfio.vfio import Container, DmaBuffer

PAGE = 4096
ROUNDS = 15
IOVA = 0x40_0000_0000


def median_ns(work: Callable[[], Any], per_round: int) -> float:
    """Median over rounds of the nanoseconds one of ``per_round`` calls takes."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        work()
        rounds.append((time.perf_counter_ns() - start) / per_round)
    return statistics.median(rounds)


def print_maps(container: Container, page: DmaBuffer) -> None:
    """The ``_nowait`` twins, one 4 KiB page mapped again and again at neighbouring IOVAs."""
    count = 512
    maps, unmaps = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        for at in range(IOVA, IOVA + count * PAGE, PAGE):
            container.map_dma_nowait(at, page)
        middle = time.perf_counter_ns()
        for at in range(IOVA, IOVA + count * PAGE, PAGE):
            container.unmap_dma_nowait(at, PAGE)
        maps.append((middle - start) / count)
        unmaps.append((time.perf_counter_ns() - middle) / count)
    print(f"map_dma_nowait   4 KiB {statistics.median(maps):8.0f} ns")
    print(f"unmap_dma_nowait 4 KiB {statistics.median(unmaps):8.0f} ns, its flush hypercall included")


async def print_awaited_maps(container: Container, page: DmaBuffer) -> None:
    """The awaited forms: the same, and their checkpoints."""
    count = 128
    maps, unmaps = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        for at in range(IOVA, IOVA + count * PAGE, PAGE):
            await container.map_dma(at, page)
        middle = time.perf_counter_ns()
        for at in range(IOVA, IOVA + count * PAGE, PAGE):
            await container.unmap_dma(at, PAGE)
        maps.append((middle - start) / count)
        unmaps.append((time.perf_counter_ns() - middle) / count)
    print(f"await map_dma    4 KiB {statistics.median(maps):8.0f} ns")
    print(f"await unmap_dma  4 KiB {statistics.median(unmaps):8.0f} ns")


def plain_copy(dst: DmaBuffer, src: DmaBuffer, size: int) -> None:
    """The same bytes by memcpy, ``size`` at a time: numpy copies the rows of a strided array one by one."""
    rows = src.size // size
    if size == src.size:
        np.copyto(dst, src)
    else:
        np.copyto(dst.reshape(rows // 2, 2 * size)[:, :size], src.reshape(rows // 2, 2 * size)[:, :size])
        np.copyto(dst.reshape(rows // 2, 2 * size)[:, size:], src.reshape(rows // 2, 2 * size)[:, size:])


async def print_moves(dsa: DsaDriver, engine: str) -> None:
    """MEMMOVE over the same two buffers as memcpy, in submissions of 32 descriptors, waited for by polling."""
    wq = dsa.wq(0)
    container = dsa.device.container
    for size in (PAGE, 16 * PAGE, 256 * PAGE):
        total = 32 * size
        src, dst = await container.alloc(total), await container.alloc(total)
        src[:] = np.arange(total, dtype=np.uint32).astype(np.uint8)
        dst[:] = 0
        assert src.iova is not None
        assert dst.iova is not None
        offsets = np.arange(32, dtype=np.uint64) * np.uint64(size)
        descs = descriptors.memmove(np.uint64(dst.iova) + offsets, np.uint64(src.iova) + offsets, size)
        repeats = max(1, (32 << 20) // total)
        moved, copied = [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(repeats):
                await (await wq.submit(descs)).wait()
            moved.append(repeats * total / (time.perf_counter() - start) / 1e9)
            start = time.perf_counter()
            for _ in range(repeats):
                plain_copy(dst, src, size)
            copied.append(repeats * total / (time.perf_counter() - start) / 1e9)
        assert (dst == src).all()
        ratio = statistics.median(a / b for a, b in zip(moved, copied, strict=True))
        print(
            f"MEMMOVE {size >> 10:5} KiB, {engine:6} {statistics.median(moved):6.2f} GB/s, "
            f"memcpy {statistics.median(copied):6.2f} GB/s, ratio {ratio:.2f}"
        )
        await container.free(src)
        await container.free(dst)


def print_lines() -> None:
    """Lines of C and Python that git tracks, tests apart."""
    root = Path(__file__).resolve().parents[2]
    files = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    counts = {"C": 0, "Python": 0, "tests": 0}
    for name in files.splitlines():
        path = root / name
        if path.suffix not in (".c", ".h", ".py") or path.is_symlink():
            continue
        kind = "tests" if name.startswith("tests/") else "Python" if path.suffix == ".py" else "C"
        counts[kind] += len(path.read_text().splitlines())
    print(", ".join(f"{count} lines of {kind}" for kind, count in counts.items()))


async def measure(engine: str) -> None:
    """One machine with that engine."""
    config = MachineConfig(engine="inline" if engine == "inline" else "thread")
    async with Machine(config) as machine, machine.open("dsa0") as device:
        if engine == "inline":
            page = await device.container.alloc(PAGE)
            print_maps(device.container, page)
            await print_awaited_maps(device.container, page)
        async with DsaDriver(device, wqs=[WqConfig(completion="polled")]) as dsa:
            await print_moves(dsa, engine)


def main() -> None:
    """Print everything."""
    for engine in ("inline", "thread"):
        trio.run(measure, engine)
    print_lines()


if __name__ == "__main__":
    main()
