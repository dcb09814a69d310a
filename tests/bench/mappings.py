"""Print what the index of mappings costs from a thousand entries on, and what type1 makes of it.

The index is driven through its C calls: inserting in order and scattered, finding scattered, bytes per entry. Then a
4 KiB map and unmap of ``Type1`` itself with few and with many mappings standing. Run by hand (``--entries`` up to
10000000); it states figures and judges nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

from pvfio.abi import ffi, lib
from pvfio.guest.mapping_index import MappingIndex
from pvfio.guest.type1 import Type1

PAGE = 0x1000
BASE = 1 << 32
SAMPLES = 20_000


def each_ns(work: Callable[[int], object], over: Sequence[int]) -> float:
    """Nanoseconds of one call: the median over twenty stretches of ``over``, loop included."""
    length = max(1, len(over) // 20)
    means = []
    for first in range(0, len(over) - length + 1, length):
        stretch = over[first : first + length]
        start = time.perf_counter_ns()
        for value in stretch:
            work(value)
        means.append((time.perf_counter_ns() - start) / length)
    return statistics.median(means)


def print_index(entries: int, order: str) -> None:
    """One line for an index of ``entries`` entries, inserted in that order."""
    index = MappingIndex()
    ptr, insert, find = index.ptr, lib.pv_mappings_insert, lib.pv_mappings_find
    out = ffi.new("struct pv_mapping *")
    # An odd factor that shares none with a decimal count visits every page once, far from the one before.
    step = 2654435761 if order == "scattered" else 1
    inserting = each_ns(lambda i: insert(ptr, i * step % entries * PAGE, PAGE, 0, 3, i), range(entries))
    finding = each_ns(lambda i: find(ptr, i * 2654435761 % entries * PAGE, out), range(SAMPLES))
    print(
        f"index of {entries:>9,}, {order:9} insert {inserting:6.0f} ns  find {finding:6.0f} ns  "
        f"{index.nbytes / entries:5.1f} bytes an entry"
    )


def print_type1(type1: Type1, vaddr: int, standing: int) -> None:
    """One line for mapping and unmapping 4 KiB beside ``standing`` mappings."""
    for page in range(standing - len(type1)):
        type1.map(BASE + page * PAGE, vaddr, PAGE, 3)
    iovas = [page * PAGE for page in range(2000)]
    mapping = each_ns(lambda iova: type1.map(iova, vaddr, PAGE, 3), iovas)
    unmapping = each_ns(lambda iova: type1.unmap(iova, PAGE), iovas)
    type1.unmap(0, 0, lib.VFIO_DMA_UNMAP_FLAG_ALL)
    print(f"type1 beside {standing:>7,} mappings: map {mapping:6.0f} ns, unmap {unmapping:6.0f} ns")


def main() -> None:
    """Print all lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000, help="the largest index")
    entries = parser.parse_args().entries
    for order in ("in order", "scattered"):
        for count in sorted({1000, 100_000, entries}):
            print_index(count, order)
    import trio

    trio.run(print_machine)


async def print_machine() -> None:
    """Type1 on the default machine's IOMMU."""
    from pvfio import Machine, MachineConfig

    async with Machine(MachineConfig()) as machine:
        iommu = machine.kernel.iommu
        assert iommu is not None
        group = next(iter(machine.kernel.groups.values()))
        type1 = Type1(machine.memory, iommu)
        type1.attach_group(group)
        buffer = machine.memory.alloc(PAGE)
        for standing in (1, 1000, 60_000):
            print_type1(type1, buffer.vaddr, standing)
        type1.close()


if __name__ == "__main__":
    main()
