"""Copies a file through the device, chunk by chunk: COPY_CRC moves the bytes and gives their CRC-32C on the way.

    python examples/copy_file.py SOURCE TARGET

Two chunks are in flight at a time: while the device moves one, the other is written out and the next one read.
"""

import sys
from pathlib import Path

import trio

import pvfio
from pvfio.drivers.dsa import DsaDriver
from pvfio.workloads.crc32c import crc32c

CHUNK = 256 << 10


async def copy(source: Path, target: Path) -> int:
    """Copies the file; the CRC-32C of what was moved, as the device has it."""
    async with pvfio.open_device("emu:dsa") as device, DsaDriver(device) as dsa:
        wq, crc = dsa.wq(0), 0
        src = [await device.container.alloc(CHUNK, write=False) for _ in range(2)]
        dst = [await device.container.alloc(CHUNK) for _ in range(2)]
        async with await trio.open_file(source, "rb") as reader, await trio.open_file(target, "wb") as writer:
            turn, size = 0, await reader.readinto(src[0].data)
            while size:
                submission = wq.copy_crc_nowait(dst[turn], src[turn], size, seed=crc)
                following = await reader.readinto(src[1 - turn].data)
                record = wq.check((await submission.wait())[0])
                crc = int(record["crc_val"])
                await writer.write(dst[turn][:size].data)
                turn, size = 1 - turn, following
    return crc


def main() -> None:
    """Copies, and checks the CRC against one computed without the device."""
    source, target = (Path(argument) for argument in sys.argv[1:3])
    crc = trio.run(copy, source, target)
    expected = crc32c(target.read_bytes())
    print(f"{target}: {target.stat().st_size} bytes, CRC-32C {crc:#010x}, expected {expected:#010x}")
    sys.exit(crc != expected)


if __name__ == "__main__":
    main()
