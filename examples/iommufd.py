"""iommufd: a device changes its address space while its driver runs, and a program brings a page table of its own.

Two address spaces map the same IOVAs to different buffers. The driver's own memory is copied into both, so it notices
nothing when the device moves from one to the other. Then the device goes through a page table that this program wrote
by hand, in memory the device's address space maps: a nested one, as a hypervisor makes for its guest.
"""

import numpy as np
import trio

from pvfio.abi import lib
from pvfio.drivers.dsa import DsaDriver
from pvfio.machine import Machine, MachineConfig
from pvfio.vfio import Ioas, IommufdDevice

SIZE = 4096
TARGET = 0x1_0000_0000
TABLES, DATA = 0x2_0000_0000, 0x3_0000_0000
PRESENT_WRITABLE_USER = 7


def copy_all(source: Ioas, target: Ioas) -> None:
    """What the driver has mapped for itself, at the same IOVAs, without pinning it again."""
    for iova, size in source.iova_allocator.allocated.items():
        target.copy(source, iova, size, iova)


def write_table(tables: np.ndarray, pages: dict[int, int]) -> int:
    """An x86-64 page table for ``pages`` (IOVA to the parent's IOVA) in zeroed memory mapped at TABLES; its root."""
    entries = tables.view(np.uint64).reshape(-1, 512)
    used = 1
    for iova, target in pages.items():
        row = 0
        for level in (4, 3, 2):
            index = iova >> (12 + 9 * (level - 1)) & 511
            if not entries[row, index]:
                entries[row, index] = TABLES + used * 4096 | PRESENT_WRITABLE_USER
                used += 1
            row = (int(entries[row, index]) - TABLES) >> 12
        entries[row, iova >> 12 & 511] = target | PRESENT_WRITABLE_USER
    return TABLES


async def main() -> None:
    async with Machine(MachineConfig()) as machine, await machine.vfio.open_iommufd() as iommufd:
        first, second = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        async with machine.open("dsa0", container=first) as device:
            assert isinstance(device, IommufdDevice)
            print(f"IOVA ranges: {[(hex(a), hex(b)) for a, b in first.iova_ranges()]}")
            source = await first.alloc(SIZE)
            here, there = machine.memory.alloc(SIZE), machine.memory.alloc(SIZE)
            first.map(here, TARGET)
            second.map(there, TARGET)
            async with DsaDriver(device) as dsa:
                copy_all(first, second)
                wq = dsa.wq(0)
                source[:] = 1
                await wq.memmove(TARGET, source, SIZE)
                device.attach(second)  # atomically: no DMA is refused on the way
                source[:] = 2
                await wq.memmove(TARGET, source, SIZE)
                print(f"first space: {here[0]}, second space: {there[0]}")

                tables = machine.memory.alloc(64 * 4096)
                second.map(tables, TABLES)
                second.map(here, DATA)
                own = {
                    iova + at: iova + at
                    for iova, size in first.iova_allocator.allocated.items()
                    for at in range(0, size, 4096)
                }
                root = write_table(np.asarray(tables), own | {TARGET: DATA})
                parent = iommufd.alloc_hwpt(device, second, flags=lib.IOMMU_HWPT_ALLOC_NEST_PARENT)
                nested = iommufd.alloc_nested(device, parent, root)
                device.attach(nested)
                source[:] = 3
                await wq.memmove(TARGET, source, SIZE)
                print(f"through a table of our own: {here[0]}")
                device.attach(first)


if __name__ == "__main__":
    trio.run(main)
