"""A pipeline that checks a file's CRC-32C while it copies: three tasks, and the device in the middle.

    python examples/crc_pipeline.py SOURCE TARGET [CRC]

The reader fills buffers, the device moves each and goes on with the CRC, the writer writes what arrived. Buffers
travel in a circle, so that memory is bounded and all three are at work at once. With CRC, a file that has another
one is not left behind.
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

import pvfio
from pvfio.drivers.dsa import DsaDriver, WorkQueue
from pvfio.vfio import DmaBuffer

CHUNK, BUFFERS = 128 << 10, 4

Chunk = tuple[DmaBuffer, DmaBuffer, int]  # source, destination, bytes
Receiver = trio.MemoryReceiveChannel[Chunk]
Sender = trio.MemorySendChannel[Chunk]


async def read(file: Any, free: Receiver, full: Sender) -> None:
    """File -> source buffers."""
    async with full, free:
        async for source, destination, _ in free:
            size = await file.readinto(source.data)
            if not size:
                return
            await full.send((source, destination, size))


async def move(wq: WorkQueue, full: Receiver, moved: Sender) -> int:
    """Source -> destination buffers; the CRC of everything."""
    crc = 0
    async with moved:
        async for source, destination, size in full:
            crc = await wq.copy_crc(destination, source, size, seed=crc)
            await moved.send((source, destination, size))
    return crc


async def write(file: Any, moved: Receiver, free: Sender) -> None:
    """Destination buffers -> file, and back to the reader."""
    async for source, destination, size in moved:
        await file.write(destination[:size].data)
        with suppress(trio.BrokenResourceError):  # the reader is done
            await free.send((source, destination, 0))


async def copy(source: Path, target: Path) -> int:
    """Copies the file; the CRC-32C of what was moved, as the device has it."""
    to_reader, free = trio.open_memory_channel[Chunk](BUFFERS)
    to_device, full = trio.open_memory_channel[Chunk](BUFFERS)
    to_writer, moved = trio.open_memory_channel[Chunk](BUFFERS)
    async with pvfio.open_device("emu:dsa") as device, DsaDriver(device) as dsa:
        for _ in range(BUFFERS):
            pair = [await device.container.alloc(CHUNK) for _ in range(2)]
            to_reader.send_nowait((pair[0], pair[1], 0))
        async with await trio.open_file(source, "rb") as reader, await trio.open_file(target, "wb") as writer:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, reader, free, to_device)
                nursery.start_soon(write, writer, moved, to_reader)
                crc = await move(dsa.wq(0), full, to_writer)
    return crc


def main() -> None:
    """Copies, and judges the CRC."""
    source, target = (Path(argument) for argument in sys.argv[1:3])
    crc = trio.run(copy, source, target)
    print(f"{target}: {target.stat().st_size} bytes, CRC-32C {crc:#010x}")
    if len(sys.argv) > 3 and crc != int(sys.argv[3], 0):
        target.unlink()
        sys.exit(f"{source}: CRC-32C is not {sys.argv[3]}: {target} removed")


if __name__ == "__main__":
    main()
