"""Strict and lazy: what a device can still reach after the kernel has taken its memory back.

A lazy domain saves the flush of every unmap and makes it up later, for many at once. Until then the IOTLB may know
the old translation: memory that has long found another use can be written by the device that had it before.
"""

import trio

from pvfio.abi import lib
from pvfio.guest.dma_api import Direction, DmaDevice
from pvfio.guest.dma_domain import DomainKind
from pvfio.guest.flush_queue import FLUSH_SECONDS
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.silicon import DmaAborted, Requester


def write(device: Requester, address: int) -> bool:
    """The device writes; false where it is kept out."""
    try:
        device.write(address, b"the device was here")
    except DmaAborted:
        return False
    return True


async def window(kind: DomainKind) -> None:
    config = MachineConfig(devices=(DeviceSpec(kind="testdev", driver="nic"),), default_domain=kind)
    async with Machine(config) as machine:
        device = machine.devices["testdev0"]
        pci = machine.kernel.device(device.pci_name)
        pci.enable()
        dma = DmaDevice(machine.kernel, pci)
        buffer = machine.memory.alloc(lib.PV_PAGE_SIZE)

        address = dma.map_single(buffer, Direction.FROM_DEVICE)
        write(device.requester, address)
        dma.unmap_single(address, buffer.size, Direction.FROM_DEVICE)

        # The buffer is the kernel's again, and it keeps something important in it.
        secret = b"important"
        buffer[: len(secret)] = list(secret)
        landed = write(device.requester, address)
        kept = bytes(buffer[: len(secret)]) == secret
        print(f"{kind:6}: after the unmap the device {'still writes' if landed else 'is kept out'}; {kept=}")

        # The flush queue's timer goes off in between.
        await trio.sleep(2 * FLUSH_SECONDS)
        landed = write(device.requester, address)
        print(f"{kind:6}: after the flush the device {'still writes' if landed else 'is kept out'}")


async def main() -> None:
    await window("strict")
    await window("lazy")


if __name__ == "__main__":
    trio.run(main)
