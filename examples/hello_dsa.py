"""A userspace driver moves a megabyte: open the device, map two buffers, submit a descriptor, see it completed."""

import numpy as np
import trio

import pvfio
from pvfio.drivers.dsa import DsaDriver


async def main() -> None:
    async with pvfio.open_device("emu:dsa") as device:
        # Allocated, given an IOVA and mapped for the device in one step; they are numpy arrays.
        src = await device.container.alloc(1 << 20)
        dst = await device.container.alloc(1 << 20)
        src[:] = np.arange(src.size, dtype=np.uint32).astype(np.uint8)

        async with DsaDriver(device) as dsa:
            crc = await dsa.wq(0).copy_crc(dst, src, src.size)

        assert (dst == src).all()
        print(f"{device.name} moved {src.size} bytes: iova {src.iova:#x} -> {dst.iova:#x}, CRC {crc:#010x}")


if __name__ == "__main__":
    trio.run(main)
