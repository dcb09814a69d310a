"""Dualcast: one read of a journal entry, two copies, as a mirrored log wants them.

The two destinations must share bits 11:0 of their addresses; buffers from ``alloc`` begin at a page, so the same
offset in both will do.
"""

import numpy as np
import trio

import pvfio
from pvfio.drivers.dsa import DsaDriver, DsaError, descriptors

ENTRY, ENTRIES = 768, 64


async def main() -> None:
    async with pvfio.open_device("emu:dsa") as device, DsaDriver(device) as dsa:
        wq, container = dsa.wq(0), device.container
        journal = await container.alloc(ENTRY * ENTRIES)
        mirrors = [await container.alloc(ENTRY * ENTRIES) for _ in range(2)]
        journal[:] = np.random.default_rng(2).integers(0, 256, journal.size, dtype=np.uint8)
        for mirror in mirrors:
            mirror[:] = 0

        # One entry now; the others in one batch.
        await wq.dualcast(mirrors[0], mirrors[1], journal, ENTRY)
        at = np.arange(1, ENTRIES, dtype=np.uint64) * ENTRY
        first, second, source = (descriptors.address_of(buffer) + at for buffer in (*mirrors, journal))
        await wq.batch(descriptors.dualcast(first, second, source, ENTRY))

        assert all(np.array_equal(mirror, journal) for mirror in mirrors)
        print(f"{ENTRIES} entries of {ENTRY} bytes in both mirrors")

        try:
            await wq.dualcast(mirrors[0], mirrors[1][64:], journal, ENTRY)
        except DsaError as error:
            print(f"destinations 64 bytes out of step: {error.name}")


if __name__ == "__main__":
    trio.run(main)
