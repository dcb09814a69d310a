"""A userspace NVMe driver: identify, write and read blocks one by one, then a thousand of them by the array."""

import numpy as np
import trio

import pvfio
from pvfio.abi import lib
from pvfio.drivers.nvme import NvmeDriver, NvmeError

COUNT = 1024


async def main() -> None:
    async with pvfio.open_device("emu:nvme") as device, NvmeDriver(device, entries=COUNT) as nvme:
        disk = nvme.namespaces[1]
        print(f"{nvme.controller.mn}: namespace 1 has {disk.blocks} blocks of {disk.block_size} bytes")

        # One command at a time; what went wrong is an exception.
        block = await device.container.alloc(disk.block_size)
        block[:] = 7
        await nvme.write(1, 100, block)
        await nvme.flush(1)
        block[:] = 0
        await nvme.read(1, 100, block)
        print(f"block 100 came back: {bool((block == 7).all())}")
        try:
            await nvme.read(1, disk.blocks, block)
        except NvmeError as error:
            print(f"beyond the end: {error.name}")

        # By the array: any number of commands, no Python for any single one of them.
        rng = np.random.default_rng(0)
        lbas = rng.permutation(disk.blocks)[:COUNT].astype(np.uint64)
        data = await device.container.alloc(COUNT * disk.block_size)
        assert data.iova is not None
        iovas = np.uint64(data.iova) + np.arange(COUNT, dtype=np.uint64) * np.uint64(disk.block_size)
        data.reshape(COUNT, -1).view(np.uint64)[:] = lbas[:, np.newaxis]
        written = await nvme.queues[0].transfer(lib.NVME_CMD_WRITE, 1, lbas, 1, iovas)
        data[:] = 0
        read = await nvme.queues[0].transfer(lib.NVME_CMD_READ, 1, lbas, 1, iovas)
        same = (data.reshape(COUNT, -1).view(np.uint64) == lbas[:, np.newaxis]).all()
        print(f"{COUNT} random blocks: {np.count_nonzero(written | read)} errors, equal: {bool(same)}")


if __name__ == "__main__":
    trio.run(main)
