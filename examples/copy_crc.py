"""Copy with CRC: one pass moves a message and computes its CRC-32C, in pieces that go on from each other."""

import numpy as np
import trio

import pvfio
from pvfio.drivers.dsa import DsaDriver
from pvfio.workloads.crc32c import crc32c

SIZE = 1_000_000


async def main() -> None:
    async with pvfio.open_device("emu:dsa") as device, DsaDriver(device) as dsa:
        wq = dsa.wq(0)
        src, dst = await device.container.alloc(SIZE), await device.container.alloc(SIZE)
        src[:] = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)

        whole = await wq.copy_crc(dst, src, SIZE)

        # The CRC of the first part is the seed of the next: the same CRC, whatever the cut.
        crc = 0
        for start, size in ((0, 1), (1, 4095), (4096, SIZE - 4096)):
            crc = await wq.copy_crc(dst[start:], src[start:], size, seed=crc)

        # CRCGEN reads memory again: what arrived is what was sent.
        arrived = await wq.crcgen(dst, SIZE)
        assert whole == crc == arrived == crc32c(src)
        assert np.array_equal(dst, src)
        print(f"{SIZE} bytes copied, CRC-32C {whole:#010x}: at once, in parts, of the copy, and by numpy")


if __name__ == "__main__":
    trio.run(main)
