"""A real file system on an image: read whole through the driver, and written through it."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec
from pvfio.drivers.nvme import NvmeDriver
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from tests.file_system import FSCK, SIZE, make_image, needs_ext4

pytestmark = pytest.mark.touches_c

CHUNK = 1 << 20


@asynccontextmanager
async def opened(image: Path, engine: Any, **options: Any) -> AsyncIterator[NvmeDriver]:
    devices = (
        DeviceSpec(kind="nvme", options={"namespaces": (NamespaceSpec(image=image, size=0, **options),)}),
    )
    config = MachineConfig(engine=engine, ram=64 << 20, devices=devices)
    async with Machine(config) as machine, machine.open("nvme0") as device, NvmeDriver(device) as nvme:
        yield nvme


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path)


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def fill(path: Path) -> None:
    """Something else."""
    path.write_bytes(bytes(range(256)) * (SIZE // 256))


def check(image: Path) -> None:
    """e2fsck has no complaint: it would exit with 4 for an error that it may not correct."""
    command = [str(FSCK), "-f", "-n", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


async def whole(nvme: NvmeDriver, opcode: int, contents: bytes | None = None) -> bytes:
    """Reads the namespace, or writes all of it, with several commands in flight."""
    namespace = nvme.namespaces[1]
    assert namespace.size == SIZE
    buffer = await nvme.device.container.alloc(8 * CHUNK)
    blocks = min(CHUNK, nvme.max_transfer) // namespace.block_size
    step = blocks * namespace.block_size
    parts = []
    for start in range(0, SIZE, buffer.nbytes):
        if contents is not None:
            buffer[:] = np.frombuffer(contents[start : start + buffer.nbytes], dtype=np.uint8)
        offsets = np.arange(0, buffer.nbytes, step, dtype=np.uint64)
        lbas = (offsets + np.uint64(start)) // np.uint64(namespace.block_size)
        status = await nvme.queues[0].transfer(opcode, 1, lbas, blocks, offsets + np.uint64(buffer.iova or 0))
        assert not status.any()
        parts.append(buffer.tobytes())
    return b"".join(parts)


@needs_ext4
@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize("lba_shift", [9, 12])
async def test_reading_a_whole_file_system(image: Path, engine: str, lba_shift: int) -> None:
    before = bytes_of(image)
    async with opened(image, engine, lba_shift=lba_shift, read_only=True) as nvme:
        assert await whole(nvme, lib.NVME_CMD_READ) == before
    assert bytes_of(image) == before


@needs_ext4
@pytest.mark.parametrize("engine", ["inline", "thread"])
async def test_a_file_system_written_through_the_driver_is_clean(
    image: Path, tmp_path: Path, engine: str
) -> None:
    contents = bytes_of(image)
    copy = tmp_path / "copy.img"
    fill(copy)
    async with opened(copy, engine) as nvme:
        await whole(nvme, lib.NVME_CMD_WRITE, contents)
        await nvme.flush(1)
    assert bytes_of(copy) == contents
    check(copy)


@needs_ext4
async def test_e2fsck_would_see_a_block_that_went_wrong(image: Path) -> None:
    check(image)
    async with opened(image, "inline") as nvme:
        super_block = await nvme.device.container.alloc(nvme.namespaces[1].block_size)
        await nvme.read(1, 0, super_block)
        super_block[1024 + 0x10 : 1024 + 0x14] += 1  # s_free_inodes_count
        await nvme.write(1, 0, super_block)
        await nvme.flush(1)
    with pytest.raises(AssertionError):
        check(image)
