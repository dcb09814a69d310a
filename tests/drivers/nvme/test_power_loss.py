"""Nothing that was acknowledged as durable is lost when the process dies in the middle of its work.

Every round starts a program that writes and flushes (power_loss.py), kills it at a random moment, opens the image again
and looks at every block. The kernel's page cache survives the kill, so there are also rounds with the device's volatile
cache, which does not: there, a device that forgets to sync must be caught.
``PVFIO_POWER_LOSSES`` says how many rounds.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import trio

import pvfio
from tests.drivers.nvme import power_loss
from tests.drivers.nvme.power_loss import BLOCK, BLOCKS, Options

ROUNDS = int(os.environ.get("PVFIO_POWER_LOSSES", "3"))
PATIENCE = 60


def new_image(directory: Path) -> Path:
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(BLOCKS * BLOCK)
    return image


async def until_killed(image: Path, options: Options, lines: int) -> dict[int, int]:
    """Runs the program until it has said so many lines; the last durable write of every block it spoke of."""
    command = [sys.executable, power_loss.__file__, str(image), json.dumps(asdict(options))]
    environment = os.environ | {"PYTHONPATH": str(Path(pvfio.__file__).parents[1])}
    said = b""
    with trio.fail_after(PATIENCE):
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        async with process.stdout:
            while said.count(b"\n") < lines:
                part = await process.stdout.receive_some()
                assert part, "it ended by itself"
                said += part
            process.kill()
            async for part in process.stdout:  # what it had said before it died
                said += part
        await process.wait()
    durable: dict[int, int] = {}
    for line in said.splitlines():
        sequence, block = map(int, line.split())
        durable[block] = max(sequence, durable.get(block, 0))
    return durable


async def survivors(image: Path, options: Options) -> list[int]:
    """Which write every block is of, read through the driver of another process's controller: this one's."""
    async with power_loss.opened(str(image), replace(options, lies=False)) as nvme:
        buffer = await nvme.device.container.alloc(BLOCKS * BLOCK)
        await nvme.read(1, 0, buffer)
        assert np.array_equal(buffer, np.fromfile(image, dtype=np.uint8))
        return [int(found) for found in power_loss.sequences(np.asarray(buffer))]


async def lost(image: Path, options: Options, rounds: int) -> list[tuple[int, int, int]]:
    """Blocks that went back to before their last durable write: which, what was promised, what is there."""
    rng = random.Random(options.seed)
    missing = []
    promised: dict[int, int] = {}
    for _ in range(rounds):
        options = replace(
            options, seed=rng.randrange(1 << 32), sequence=max(promised.values(), default=0) + 1000
        )
        promised |= await until_killed(image, options, rng.randrange(1, 400))
        found = await survivors(image, options)
        missing += [(block, seq, found[block]) for block, seq in promised.items() if found[block] < seq]
    return missing


@pytest.mark.parametrize("volatile_cache", [False, True], ids=["page-cache", "volatile-cache"])
async def test_nothing_acknowledged_is_lost(tmp_path: Path, volatile_cache: bool) -> None:
    options = Options(volatile_cache=volatile_cache, seed=volatile_cache)
    assert not await lost(new_image(tmp_path), options, ROUNDS)


async def test_nothing_acknowledged_is_lost_inline(tmp_path: Path) -> None:
    assert not await lost(new_image(tmp_path), Options(volatile_cache=True, engine="inline", seed=2), 1)


async def test_a_device_that_forgets_to_sync_is_caught(tmp_path: Path) -> None:
    options = Options(volatile_cache=True, lies=True, seed=3)
    assert await lost(new_image(tmp_path), options, 1)


def test_a_block_of_two_writes_is_caught() -> None:
    image = np.zeros((2, BLOCK // 8), dtype=np.uint64)
    image[1] = power_loss.contents(7, 1)
    assert power_loss.sequences(image.view(np.uint8).reshape(-1)).tolist() == [0, 7]
    image[1, 256:] = power_loss.contents(8, 1)[256:]
    with pytest.raises(ValueError, match="block 1"):
        power_loss.sequences(image.view(np.uint8).reshape(-1))
