"""Print what one more mapping costs beside a thousand to ten million live ones, and what each of those takes.

Every row is a container of its own, with a device in it, that maps one page again and again: at every other page of
a window, in random order, so that the one more always goes between two others and finds nothing cached. Measured are
whole operations, as a driver makes them: ``map_dma_nowait``, a device's read of 8 bytes there (an IOTLB miss with its
whole walk), ``unmap_dma_nowait`` with its flush hypercall, and the batch forms. The rows take turns; figures are
medians of processor time, which other programs disturb least (nothing here sleeps). ``--in-order``: the one more goes
behind all others, as from an allocator.

Run as a program; ``--live`` gives the largest row (default 1,000,000), ``--plot FILE`` draws cost against number (needs
matplotlib). It states figures and judges nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from pvfio import Machine, MachineConfig
from pvfio.guest.type1 import Type1, Type1Limits
from pvfio.machine import DeviceSpec
from pvfio.vfio import Container

PAGE = 4096
BASE = 1 << 40
CHUNK = 100_000
PROBES = 400
BATCH = 1000
KINDS = ("map", "translate", "unmap", "batch map", "batch unmap")


@dataclass
class Row:
    """One container: its live mappings, and nanoseconds of each operation per round."""

    live: int
    container: Container
    bus: Any
    vaddr: int
    page: Any
    rng: np.random.Generator
    scattered: bool = True
    costs: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def fill(self) -> float:
        """Maps them all; nanoseconds of one."""
        pages = self.rng.permutation(self.live).astype(np.uint64)
        start = time.thread_time_ns()
        for first in range(0, self.live, CHUNK):
            some = BASE + 2 * PAGE * pages[first : first + CHUNK]
            self.container.map_dma_batch_nowait(some, np.full(len(some), self.vaddr, np.uint64), PAGE)
        return (time.thread_time_ns() - start) / self.live

    def places(self, count: int) -> npt.NDArray[np.uint64]:
        """Free pages, none twice: between the live ones in random order, or behind them all in order."""
        if not self.scattered:
            return BASE + PAGE * np.arange(2 * self.live, 2 * self.live + count, dtype=np.uint64)
        if self.live <= 4 * count:
            found = self.rng.permutation(self.live)[:count]
        else:
            found = self.rng.permutation(np.unique(self.rng.integers(0, self.live, count)))
        return BASE + PAGE * (2 * found.astype(np.uint64) + 1)

    def singles(self) -> None:
        """A round of single operations."""
        iovas = self.places(PROBES).tolist()
        map_one, unmap_one = self.container.map_dma_nowait, self.container.unmap_dma_nowait
        page, read = self.page, self.bus.read
        times = [time.thread_time_ns()]
        for iova in iovas:
            map_one(iova, page)
        times.append(time.thread_time_ns())
        for iova in iovas:
            read(iova, 8)
        times.append(time.thread_time_ns())
        for iova in iovas:
            unmap_one(iova, PAGE)
        times.append(time.thread_time_ns())
        self.note(KINDS[:3], times, len(iovas))

    def batches(self) -> None:
        """A round of batches."""
        iovas = self.places(BATCH)
        vaddrs = np.full(len(iovas), self.vaddr, np.uint64)
        times = [time.thread_time_ns()]
        self.container.map_dma_batch_nowait(iovas, vaddrs, PAGE)
        times.append(time.thread_time_ns())
        self.container.unmap_dma_batch_nowait(iovas, PAGE)
        times.append(time.thread_time_ns())
        self.note(KINDS[3:], times, len(iovas))

    def note(self, kinds: tuple[str, ...], times: list[int], count: int) -> None:
        for kind, before, after in zip(kinds, times, times[1:], strict=False):
            self.costs[kind].append((after - before) / count)

    def cost(self, kind: str) -> float:
        """The median over the rounds, in nanoseconds."""
        return statistics.median(self.costs[kind])

    @property
    def bytes_each(self) -> float:
        """What the index takes for one live mapping."""
        type1: Type1 = self.container._batch_file.iommu  # type: ignore[union-attr]
        return type1.index_bytes / self.live


def print_table(rows: list[Row]) -> None:
    """Nanoseconds of one operation, and how they grow from the first row on."""
    print(f"{'live':>10} " + "".join(f"{kind:>19}" for kind in KINDS) + f"{'index bytes':>13}")
    for row in rows:
        cells = "".join(
            f"{row.cost(kind):9.0f} ns x{row.cost(kind) / rows[0].cost(kind):5.2f} " for kind in KINDS
        )
        print(f"{row.live:10,} {cells}{row.bytes_each:13.1f}")


def draw(rows: list[Row], path: Path) -> None:
    """Cost against the number of live mappings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for kind in KINDS:
        axes.plot([row.live for row in rows], [row.cost(kind) / 1000 for row in rows], marker="o", label=kind)
    axes.set(xscale="log", yscale="log", xlabel="live mappings", ylabel="microseconds an operation")
    axes.legend()
    figure.savefig(path)


async def measure(live: int, rounds: int, scattered: bool, plot: Path | None) -> None:
    """One machine with a device for each row."""
    sizes = [n for n in (1_000, 10_000, 100_000, 1_000_000, 10_000_000) if n < live] + [live]
    config = MachineConfig(
        ram=(256 << 20)
        + sum(sizes) * 17,  # a table page holds 256 of them; the root of a container's comes on top
        devices=tuple(DeviceSpec(kind="testdev") for _ in sizes),
        limits=Type1Limits(dma_entry_limit=live + BATCH),
    )
    config = MachineConfig(
        ram=-(-config.ram // (2 << 20)) * (2 << 20), devices=config.devices, limits=config.limits
    )
    async with Machine(config) as machine, contextlib.AsyncExitStack() as stack:
        rows = []
        for number, size in enumerate(sizes):
            device = await stack.enter_async_context(machine.open(f"testdev{number}"))
            page = await device.container.alloc(PAGE, map=False)
            bus = machine.devices[f"testdev{number}"].requester
            command = device.config
            await command.write(4, await command.read(4, 2) | 6, 2)
            row = Row(size, device.container, bus, page.vaddr, page, np.random.default_rng(number), scattered)
            print(f"{size:,} mapped, {row.fill():.0f} ns each")
            rows.append(row)
        for _ in range(rounds):
            for row in rows:
                row.singles()
            for row in rows:
                row.batches()
        print_table(rows)
        if plot is not None:
            draw(rows, plot)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--live", type=int, default=1_000_000, help="the largest number of live mappings")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--plot", type=Path, help="where to draw the plot")
    parser.add_argument(
        "--in-order", action="store_true", help="the one more goes where an allocator would put it"
    )
    options = parser.parse_args()
    trio.run(measure, options.live, options.rounds, not options.in_order, options.plot)


if __name__ == "__main__":
    main()
