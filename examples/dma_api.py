"""A driver inside the guest kernel: its device reaches what the DMA API mapped, for as long as it is mapped.

The other use of an IOMMU. Nothing is assigned to userspace here: the kernel keeps the device and protects itself
against it. The debugging aid watches, and catches the driver at what it does wrong in the end.
"""

import logging
import sys

import numpy as np
import trio

from pvfio.guest.dma_api import Direction, DmaDevice
from pvfio.guest.dma_debug import DmaDebug
from pvfio.guest.kernel import GuestKernel
from pvfio.guest.pci import PciDevice
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.memory import GuestMemory

SIZE = 16384
SRC, DST, COUNT, CMD, STATUS = (
    0x4008,
    0x4010,
    0x4018,
    0x401C,
    0x4020,
)  # registers of the teaching device, in BAR 0
COPY, DONE = 3, 1


class CopyDriver:
    """A kernel driver for the teaching device: it copies from DMA address to DMA address."""

    def __init__(self, kernel: GuestKernel, pci: PciDevice) -> None:
        kernel.bind(pci, "copy")
        pci.enable()
        self.pci = pci
        self.dma = DmaDevice(kernel, pci)

    def copy(self, dst: int, src: int, size: int) -> bool:
        """False where the device met an abort."""
        for register, width, value in ((SRC, 8, src), (DST, 8, dst), (COUNT, 4, size), (CMD, 4, COPY)):
            self.pci.channel.mmio_write(self.pci.function, 0, register, width, value)
        return self.pci.channel.mmio_read(self.pci.function, 0, STATUS, 4) == DONE


def streaming(driver: CopyDriver, memory: GuestMemory) -> None:
    """Two buffers lent to the device, one for each direction, and taken back."""
    dma = driver.dma
    src, dst = memory.alloc(SIZE), memory.alloc(SIZE)
    src[:] = np.random.default_rng(0).integers(0, 256, SIZE)
    from_here = dma.map_single(src, Direction.TO_DEVICE)
    to_here = dma.map_single(dst, Direction.FROM_DEVICE)
    print(f"copied {from_here:#x} -> {to_here:#x}: {driver.copy(to_here, from_here, SIZE)}")
    dma.unmap_single(to_here, SIZE, Direction.FROM_DEVICE)
    print(f"equal: {np.array_equal(src, dst)}; and once more: {driver.copy(to_here, from_here, SIZE)}")
    dma.unmap_single(from_here, SIZE, Direction.TO_DEVICE)


def mistakes(driver: CopyDriver, memory: GuestMemory) -> None:
    """What the debugging aid is for."""
    buffer = memory.alloc(SIZE)
    address = driver.dma.map_single(buffer, Direction.TO_DEVICE)
    driver.dma.sync_single_for_cpu(address, SIZE, Direction.FROM_DEVICE)
    driver.dma.unmap_single(address, SIZE, Direction.BIDIRECTIONAL)
    driver.dma.map_single(buffer, Direction.TO_DEVICE)


async def main() -> None:
    config = MachineConfig(devices=(DeviceSpec(kind="testdev", driver=None),), default_domain="strict")
    async with Machine(config) as machine:
        kernel = machine.kernel
        kernel.dma_debug = debug = DmaDebug()
        pci = kernel.device(machine.devices["testdev0"].pci_name)
        driver = CopyDriver(kernel, pci)
        streaming(driver, machine.memory)
        for fault in machine.hypervisor.faults.snapshot():
            print(f"the fault log: {fault}")
        mistakes(driver, machine.memory)
        kernel.bind(pci, None)
        print(f"{debug.count} mistakes: {', '.join(report.rule for report in debug.reports)}")


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s: DMA debugging: %(message)s")
    trio.run(main)
