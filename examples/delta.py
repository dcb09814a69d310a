"""Delta compression of two snapshots: what changed between them is created by the device, kept, and applied again.

A delta record describes at most 512 KiB and has 10 bytes for every 8 that differ, so each block of the snapshot gets
a record of its own, and a block that changed so much that a record does not pay is kept whole.
"""

import numpy as np
import trio

import pvfio
from pvfio.drivers.dsa import DsaDriver, WorkQueue
from pvfio.vfio import DmaBuffer

BLOCK, BLOCKS = 128 << 10, 32
ROOM = BLOCK // 20 * 10  # a record larger than half a block is not worth it


async def difference(wq: WorkQueue, old: DmaBuffer, new: DmaBuffer) -> list[bytes | None]:
    """For each block its delta record (empty: no change), or ``None`` where the new block is kept whole."""
    room = await wq.driver.device.container.alloc(ROOM)
    records: list[bytes | None] = []
    for start in range(0, old.size, BLOCK):
        delta = await wq.create_delta(old[start:], new[start:], room, BLOCK, max_delta_size=ROOM)
        records.append(room[: delta.size].tobytes() if delta.fits else None)
    await wq.driver.device.container.free(room)
    return records


async def restore(wq: WorkQueue, blocks: DmaBuffer, records: list[bytes | None], whole: DmaBuffer) -> None:
    """Makes the new snapshot of the old one in place; blocks without a record come from ``whole``."""
    room = await wq.driver.device.container.alloc(ROOM)
    for number, record in enumerate(records):
        start = number * BLOCK
        if record is None:
            await wq.memmove(blocks[start:], whole[start:], BLOCK)
        elif record:
            room[: len(record)] = np.frombuffer(record, np.uint8)
            await wq.apply_delta(blocks[start:], room, len(record), BLOCK)
    await wq.driver.device.container.free(room)


async def main() -> None:
    rng = np.random.default_rng(3)
    async with pvfio.open_device("emu:dsa") as device, DsaDriver(device) as dsa:
        monday, tuesday = [await device.container.alloc(BLOCK * BLOCKS) for _ in range(2)]
        monday[:] = rng.integers(0, 256, monday.size, dtype=np.uint8)
        tuesday[:] = monday
        for _ in range(2000):  # a day's work: small changes in the first half, and one block rewritten
            tuesday[rng.integers(0, tuesday.size // 2)] ^= 1
        tuesday[-BLOCK:] = rng.integers(0, 256, BLOCK, dtype=np.uint8)

        records = await difference(dsa.wq(0), monday, tuesday)
        kept = sum(BLOCK if record is None else len(record) for record in records)
        await restore(dsa.wq(0), monday, records, tuesday)

        assert np.array_equal(monday, tuesday)
        print(f"{BLOCKS} blocks, {records.count(None)} rewritten, {records.count(b'')} unchanged")
        print(f"{tuesday.size} bytes kept as {kept}, restored: {np.array_equal(monday, tuesday)}")


if __name__ == "__main__":
    trio.run(main)
