"""A DSA without a driver: container, group and device step by step, then registers, portal and completion record.

Everything that ``pvfio.open_device`` and ``DsaDriver`` do for you, in the order in which it has to be done.
"""

import numpy as np
import trio

from pvfio.abi import dtype_of, lib
from pvfio.machine import Machine, MachineConfig
from pvfio.vfio import Device, Region, wait_records

SIZE = 65536


async def command(registers: Region, number: int, operand: int = 0) -> None:
    """Runs an administrative command and polls its status."""
    await registers.write(lib.IDXD_CMD_OFFSET, number << lib.IDXD_CMD_SHIFT | operand)
    for _ in range(1000):
        await trio.sleep(0.0001)
        status = await registers.read(lib.IDXD_CMDSTS_OFFSET)
        if not status & lib.IDXD_CMDSTS_ACTIVE:
            break
    else:
        raise RuntimeError(f"command {number}: no answer")
    if status & lib.IDXD_CMDSTS_ERR_MASK:
        raise RuntimeError(f"command {number}: error {status & lib.IDXD_CMDSTS_ERR_MASK:#x}")


async def enable(device: Device) -> Region:
    """One dedicated work queue of 16 entries and one engine in group 0; returns the portals."""
    registers = device.region(lib.VFIO_PCI_BAR0_REGION_INDEX)
    await device.set_bus_master()
    await command(registers, lib.IDXD_CMD_RESET_DEVICE)
    tables = await registers.read(lib.IDXD_TABLE_OFFSET, 8)
    grpcfg = (tables & 0xFFFF) * lib.IDXD_TABLE_MULT
    wqcfg = (tables >> lib.IDXD_TABLE_WQCFG_SHIFT & 0xFFFF) * lib.IDXD_TABLE_MULT
    await registers.write(wqcfg, 16)  # size
    await registers.write(wqcfg + 8, lib.IDXD_WQCFG_MODE_DEDICATED | 10 << lib.IDXD_WQCFG_PRIORITY_SHIFT)
    await registers.write(wqcfg + 12, 21)  # transfers of up to 2 MiB, no batches to speak of
    await registers.write(grpcfg, 1, 8)  # WQ 0
    await registers.write(grpcfg + lib.IDXD_GRPCFG_ENGINES_OFFSET, 1, 8)  # engine 0
    await command(registers, lib.IDXD_CMD_ENABLE_DEVICE)
    await command(registers, lib.IDXD_CMD_ENABLE_WQ, 0)
    return device.region(lib.VFIO_PCI_BAR2_REGION_INDEX)


async def move(device: Device) -> None:
    """Memory, a descriptor, a store to the portal, a record."""
    container = device.container
    portals = await enable(device)
    src, dst, page = [await container.alloc(size) for size in (SIZE, SIZE, 4096)]
    src[:] = np.random.default_rng(0).integers(0, 256, SIZE)
    record = np.asarray(page)[:32].view(dtype_of("struct dsa_completion_record"))

    descriptor = np.zeros(1, dtype=dtype_of("struct dsa_hw_desc"))
    flags = lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR
    descriptor["flags_opcode"] = lib.DSA_OPCODE_MEMMOVE << lib.DSA_DESC_OPCODE_SHIFT | flags
    descriptor["completion_addr"] = page.iova
    descriptor["src_addr"], descriptor["dst_addr"], descriptor["xfer_size"] = src.iova, dst.iova, SIZE

    portals.movdir64b(lib.IDXD_PORTAL_LIMITED * lib.IDXD_PORTAL_SIZE, descriptor)
    await wait_records(record["status"], deadline=1)
    print(f"status {record['status'][0]:#x}, equal: {np.array_equal(src, dst)}")


async def main() -> None:
    async with Machine(MachineConfig()) as machine:
        vfio, name = machine.vfio, machine.devices["dsa0"].pci_name
        async with await vfio.open_container() as container:
            async with await vfio.open_group(vfio.group_of(name)) as group:
                print(f"group {group.id}: {group.status()}")
                group.set_container(container)
                await container.set_iommu()
                print(f"IOVA ranges: {[(hex(a), hex(b)) for a, b in container.info().iova_ranges]}")
                async with await group.open_device(name) as device:
                    await move(device)


if __name__ == "__main__":
    trio.run(main)
