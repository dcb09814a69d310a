"""A program whose power fails: it writes through the driver, and says what is durable until somebody kills it.

Not a test: test_power_loss.py runs it as ``python power_loss.py IMAGE OPTIONS`` (the options as JSON) and reads a line
"sequence block" for every block from the moment on that its loss would be an error: once a flush that follows the
write, or a write with FUA, has completed. Block contents say which write they are of.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec
from pvfio.drivers.nvme import NvmeDriver
from pvfio.machine import DeviceSpec, Machine, MachineConfig

BLOCK = 4096
BLOCKS = 512
MOST = 8
_WORDS = BLOCK // 8


@dataclass(frozen=True)
class Options:
    """How the drive works. ``lies``: a fault rule of the device completes every flush and does nothing."""

    volatile_cache: bool = False
    engine: Any = "thread"
    lies: bool = False
    seed: int = 0
    sequence: int = 1


def contents(sequence: int, block: int) -> NDArray[np.uint64]:
    """What a write puts into a block: no other write has any of its words in that place."""
    first = np.uint64(sequence << 32 | block << 16)
    words: NDArray[np.uint64] = first + np.arange(_WORDS, dtype=np.uint64)
    return words


def sequences(image: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Which write every block of an image is of, 0: none. ``ValueError`` for one that is no write's."""
    words = image.view(np.uint64).reshape(-1, _WORDS)
    found: NDArray[np.uint64] = words[:, 0] >> np.uint64(32)
    for block in np.flatnonzero(words.any(axis=1)).tolist():
        if not np.array_equal(words[block], contents(int(found[block]), block)):
            raise ValueError(f"block {block} is no write's")
    return found


@asynccontextmanager
async def opened(image: str, options: Options) -> AsyncIterator[NvmeDriver]:
    """A driver of a controller whose namespace is the image."""
    namespace = NamespaceSpec(image=image, size=0, volatile_cache=options.volatile_cache)
    devices = (DeviceSpec(kind="nvme", options={"namespaces": (namespace,)}),)
    config = MachineConfig(engine=options.engine, ram=64 << 20, devices=devices)
    async with Machine(config) as machine, machine.open("nvme0") as device:
        if options.lies:
            function: Any = machine.devices["nvme0"].function
            function.inject("status", opcode=lib.NVME_CMD_FLUSH, queue=1, times=None, status=0)
        async with NvmeDriver(device) as nvme:
            yield nvme


async def work(image: str, options: Options) -> None:
    """Writes for ever."""
    rng = random.Random(options.seed)
    sequence = options.sequence
    async with opened(image, options) as nvme:
        buffer = await nvme.device.container.alloc(MOST * BLOCK)
        while True:
            durable = []
            fua = not options.lies and rng.random() < 0.25
            for _ in range(1 if fua else rng.randrange(1, 8)):
                count = rng.randrange(1, MOST + 1)
                first = rng.randrange(BLOCKS - count + 1)
                for index in range(count):
                    made = contents(sequence, first + index)
                    buffer[index * BLOCK : (index + 1) * BLOCK] = made.view(np.uint8)
                    durable.append(f"{sequence} {first + index}\n")
                data: Any = buffer[: count * BLOCK]
                await nvme.write(1, first, data, fua=fua)
                sequence += 1
            if not fua:
                await nvme.flush(1)
            # At most 56 lines, less than PIPE_BUF: all of them arrive, or none.
            os.write(sys.stdout.fileno(), "".join(durable).encode())


if __name__ == "__main__":
    trio.run(work, sys.argv[1], Options(**json.loads(sys.argv[2])))
