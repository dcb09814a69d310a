"""Print what an emulated NVMe controller does: IOPS over queues, namespaces and devices beside a plain loop in C.

4 KiB random reads from memory, submitted and reaped by the array in one thread; the plain loop copies random blocks of
as much memory to as many slots, in turn with what it is compared with. Then the share of a core that 1,000 reads a
second take at depth 1 with interrupts, paced by trio's timer and by a plain sleep (and what pacing alone takes), and
that a machine takes whose disk nobody uses. Run by hand on a machine that has nothing else to do: it states figures and
judges nothing. Needs gcc.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio
from numpy.typing import NDArray

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec
from pvfio.drivers.nvme import NvmeDriver, QueuePair
from pvfio.drivers.nvme.queue import Completion
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.workloads.fio.share import RATE, measure_shares, plain_sleep, trio_timer

BLOCK: Final = 4096
TOTAL: Final = 256 << 20
DEPTHS: Final = (1, 32, 128)
READ: Final[int] = lib.NVME_CMD_READ


class PlainLoop:
    """``random_copies.c``, compiled here."""

    def __init__(self, directory: str) -> None:
        source, made = Path(__file__).with_name("random_copies.c"), Path(directory, "random_copies.so")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", made, source], check=True)
        self._copy = ctypes.CDLL(str(made)).random_copies
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_uint64, *[ctypes.c_void_p] * 2, ctypes.c_uint64]
        self._from = np.ones(TOTAL, dtype=np.uint8)
        self._blocks = np.random.default_rng(1).integers(0, TOTAL // BLOCK, 1 << 15, dtype=np.uint64)

    def per_second(self, slots: int, seconds: float) -> float:
        """Copies a second, to so many slots in turn."""
        to = np.ones(slots * BLOCK, dtype=np.uint8)
        arrays = (self._from.ctypes.data, self._blocks.ctypes.data, len(self._blocks))
        start, done = time.perf_counter(), 0
        while (took := time.perf_counter() - start) < seconds:
            self._copy(to.ctypes.data, slots, *arrays)
            done += len(self._blocks)
        return done / took


@dataclass
class Lane:
    """A queue that is kept full: which namespaces it reads in turn, and where to."""

    queue: QueuePair
    nsids: list[int]
    lbas: NDArray[np.uint64]
    iovas: NDArray[np.uint64]
    at: int = 0
    turn: int = 0

    def submit(self, count: int) -> None:
        """Some more reads, all of one namespace."""
        first = self.at % (len(self.lbas) - count + 1)
        nsid = self.nsids[self.turn % len(self.nsids)]
        self.queue.submit_nowait(
            READ, nsid, self.lbas[first : first + count], 1, self.iovas[first : first + count]
        )
        self.at += count
        self.turn += 1


async def lane(driver: NvmeDriver, queue: QueuePair, depth: int) -> Lane:
    """Random blocks, the same ones again after a while, and a slot of memory for each in flight."""
    buffer = await driver.device.container.alloc(depth * BLOCK)
    assert buffer.iova is not None
    blocks = min(namespace.blocks for namespace in driver.namespaces.values())
    count = 1 << 13
    lbas = np.random.default_rng(queue.id).integers(0, blocks, count, dtype=np.uint64)
    slots = np.arange(count, dtype=np.uint64) % np.uint64(depth)
    return Lane(queue, sorted(driver.namespaces), lbas, slots * np.uint64(BLOCK) + np.uint64(buffer.iova))


def reads_per_second(lanes: list[Lane], depth: int, seconds: float) -> float:
    """Keeps every queue at ``depth`` for a time. Raises ``RuntimeError`` for a read that fails."""
    patience = 20_000 if len(lanes) == 1 else 0
    for each in lanes:
        each.submit(depth)
    start, done = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < seconds:
        for each in lanes:
            taken = each.queue.reap_nowait(wait_ns=patience)
            if taken.failed:
                raise RuntimeError(f"{taken.failed} reads failed")
            if len(taken):
                done += len(taken)
                each.submit(len(taken))
    for each in lanes:
        while each.queue.outstanding:
            each.queue.reap_nowait(wait_ns=20_000)
    return done / took


@asynccontextmanager
async def running(
    engine: Any, devices: int = 1, namespaces: int = 1, queues: int = 1, completion: Completion = "polled"
) -> AsyncIterator[list[NvmeDriver]]:
    """Controllers with their drivers; all memory of all namespaces is ``TOTAL`` bytes."""
    share = TOTAL // (devices * namespaces)
    specs = (NamespaceSpec(size=share),) * namespaces
    config = MachineConfig(
        engine=engine, devices=(DeviceSpec(kind="nvme", options={"namespaces": specs}),) * devices
    )
    async with Machine(config) as machine, AsyncExitStack() as stack:
        drivers = []
        for number in range(devices):
            device = await stack.enter_async_context(machine.open(f"nvme{number}"))
            driver = NvmeDriver(device, queues=queues, completion=completion)
            drivers.append(await stack.enter_async_context(driver))
        for driver in drivers:
            await fill(driver)
        yield drivers


async def fill(driver: NvmeDriver) -> None:
    """Writes every block: memory that nobody wrote is one page of zeroes, which is always in the cache."""
    buffer = await driver.device.container.alloc(1 << 20)
    buffer[:] = 1
    for nsid, namespace in driver.namespaces.items():
        for lba in range(0, namespace.blocks, buffer.nbytes // BLOCK):
            await driver.write(nsid, lba, buffer)
    await driver.device.container.free(buffer)


async def row(plain: PlainLoop, label: str, shape: dict[str, Any], engine: Any, seconds: float) -> None:
    """One line of a table: IOPS and ratio at every depth."""
    cells = []
    async with running(engine, **shape) as drivers:
        for depth in DEPTHS:
            lanes = [await lane(driver, queue, depth) for driver in drivers for queue in driver.queues]
            rates, ratios = [], []
            for _ in range(5):
                rates.append(reads_per_second(lanes, depth, seconds))
                ratios.append(rates[-1] / plain.per_second(depth * len(lanes), seconds / 4))
            cells.append(f"{statistics.median(rates) / 1e6:6.2f} M {statistics.median(ratios):6.2f}")
    print(f"{engine:6} {label:>14}  " + "   ".join(cells), flush=True)


async def tables(plain: PlainLoop, seconds: float) -> None:
    """IOPS over what there is many of."""
    print("4 KiB random reads: IOPS, and the ratio to a plain loop; at depth " + ", ".join(map(str, DEPTHS)))
    for key, numbers in {
        "queues": (1, 2, 4, 8, 16, 32, 64),
        "namespaces": (1, 2, 4, 8, 16, 32),
        "devices": (1, 2, 4, 8, 16),
    }.items():
        for engine in ("inline", "thread"):
            for number in numbers:
                await row(plain, f"{number} {key}", {key: number}, engine, seconds)


async def shares(seconds: float) -> None:
    """What a thread engine, its device and its driver take of a core when little happens."""
    async with running("thread", completion="interrupt") as (driver,):
        for label, pause in {"trio's timer": trio_timer, "a plain sleep": plain_sleep}.items():
            found = await measure_shares(driver, seconds=seconds, pause=pause)
            print(
                f"{RATE:,} reads a second at depth 1, interrupts, paced by {label}: {found.reads:.1f} % of a core, "
                f"{found.pace:.1f} % without the reads"
            )
        print(f"a driver that waits for nothing: {found.idle:.2f} % of a core")


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each of a figure's five rounds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        plain = PlainLoop(directory)
        trio.run(tables, plain, arguments.seconds)
    trio.run(shares, 10 * arguments.seconds)


if __name__ == "__main__":
    main()
