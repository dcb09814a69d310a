"""A million live mappings in a container: what one takes, that each is right, and that all of it comes back."""

from __future__ import annotations

import numpy as np
import pytest
import trio

from pvfio import Machine, MachineConfig
from pvfio.guest.type1 import Type1, Type1Limits
from pvfio.machine import DeviceSpec
from pvfio.silicon import DmaAborted

# Not for the sanitizers: the model-based test goes the same ways in C, and what this one adds is number.

PAGE = 4096
LIVE = 1_000_000
BASE = 1 << 40
BYTES_EACH = 150


def test_a_million_live_mappings() -> None:
    trio.run(_a_million)


async def _a_million() -> None:
    config = MachineConfig(
        ram=128 << 20,
        devices=(DeviceSpec(kind="testdev"),),
        limits=Type1Limits(dma_entry_limit=LIVE + 1, memlock=(LIVE + 1) * PAGE),
    )
    async with Machine(config) as machine, machine.open("testdev0") as device:
        container = device.container
        await device.config.write(4, await device.config.read(4, 2) | 6, 2)
        read = machine.devices["testdev0"].requester.read
        buffer = await container.alloc(4 * PAGE, map=False)
        buffer[::PAGE] = np.arange(1, 5, dtype=np.uint8)
        before = machine.memory.stats()

        rng = np.random.default_rng(5)
        pages = rng.permutation(LIVE).astype(np.uint64)
        iovas = BASE + 2 * PAGE * pages
        container.map_dma_batch_nowait(iovas, buffer.vaddr + PAGE * (pages % 4), PAGE)
        type1: Type1 = container._batch_file.iommu  # type: ignore[union-attr]
        assert (len(type1), container.info().dma_avail) == (LIVE, 1)
        assert type1.index_bytes / LIVE <= BYTES_EACH
        type1._index.check()

        for page in rng.integers(0, LIVE, 500).tolist():
            iova = BASE + 2 * PAGE * page
            assert read(iova, 1)[0] == page % 4 + 1
            with pytest.raises(DmaAborted):
                read(iova + PAGE, 1)
            container.map_dma_nowait(iova + PAGE, buffer[:PAGE])
            assert read(iova + PAGE, 1) == b"\1"
            container.unmap_dma_nowait(iova + PAGE, PAGE)
            container.unmap_dma_nowait(iova, PAGE)
            with pytest.raises(DmaAborted):
                read(iova, 1)
            container.map_dma_nowait(iova, buffer[page % 4 * PAGE :][:PAGE])

        half = iovas[: LIVE // 2]
        container.unmap_dma_batch_nowait(half, PAGE)
        type1._index.check()
        assert len(type1) == LIVE - len(half)
        assert await container.unmap_all() == (LIVE - len(half)) * PAGE
        after = machine.memory.stats()
        assert (after.pins, after.free_frames) == (before.pins, before.free_frames)
