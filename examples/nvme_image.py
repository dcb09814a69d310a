"""Reads a disk image through an NVMe controller whose namespace it is, and compares with the file.

    mkfs.ext4 -q disk.img 64M
    python examples/nvme_image.py disk.img

The controller opens the image read-only. Of an ext2, ext3 or ext4 file system it says how big it is.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec
from pvfio.drivers.nvme import NvmeDriver
from pvfio.machine import DeviceSpec, Machine, MachineConfig

CHUNK = 8 << 20
SUPER_BLOCK, MAGIC = 1024, 0xEF53  # where ext4 has its superblock, and the number in it (ext4(5))


async def read_all(nvme: NvmeDriver) -> tuple[bytes, str]:
    """The namespace's first 4 KiB, and the SHA-256 of all of it."""
    disk, queue = nvme.namespaces[1], nvme.queues[0]
    buffer = await nvme.device.container.alloc(CHUNK)
    assert buffer.iova is not None
    blocks = min(256 << 10, nvme.max_transfer) // disk.block_size
    digest, start = hashlib.sha256(), b""
    for first in range(0, disk.blocks, CHUNK // disk.block_size):
        last = min(disk.blocks, first + CHUNK // disk.block_size)
        lbas = np.arange(first, last, blocks, dtype=np.uint64)
        counts = np.minimum(blocks, np.uint64(last) - lbas)
        iovas = np.uint64(buffer.iova) + (lbas - np.uint64(first)) * np.uint64(disk.block_size)
        if (await queue.transfer(lib.NVME_CMD_READ, 1, lbas, counts, iovas)).any():
            raise SystemExit(f"blocks {first} to {last} cannot be read")
        digest.update(buffer[: (last - first) * disk.block_size].data)
        start = start or buffer[:4096].tobytes()
    return start, digest.hexdigest()


async def look(image: Path) -> tuple[bytes, str]:
    """The same for an image, of which there are whole blocks of 512 bytes."""
    namespace = NamespaceSpec(image=image, size=0, read_only=True, lba_shift=9)
    config = MachineConfig(devices=(DeviceSpec(kind="nvme", options={"namespaces": (namespace,)}),))
    async with Machine(config) as machine, machine.open("nvme0") as device, NvmeDriver(device) as nvme:
        start, digest = await read_all(nvme)
    return start, digest


def main() -> None:
    """Reads, describes, compares."""
    image = Path(sys.argv[1])
    start, digest = trio.run(look, image)
    if int.from_bytes(start[SUPER_BLOCK + 0x38 : SUPER_BLOCK + 0x3A], "little") == MAGIC:
        words = np.frombuffer(start, dtype="<u4", offset=SUPER_BLOCK, count=7)
        print(f"a file system of {words[1]} blocks of {1024 << int(words[6])} bytes, {words[0]} inodes")
    with image.open("rb") as file:
        expected = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"{image}: SHA-256 {digest} through the driver, equal: {digest == expected}")
    sys.exit(digest != expected)


if __name__ == "__main__":
    main()
