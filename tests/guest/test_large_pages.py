"""Buffers aligned to large pages are mapped with large pages, by ``alloc`` and in batches; scattered ones are not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pvfio import Machine, MachineConfig
from pvfio.guest.paging_domain import PagingDomain
from pvfio.machine import DeviceSpec

pytestmark = pytest.mark.touches_c

K4, M2, G1 = 4096, 2 << 20, 1 << 30


def leaves(domain: PagingDomain, iova: int, size: int) -> Counter[int]:
    """How many leaves of each size map the range."""
    found: Counter[int] = Counter()
    at = iova
    while at < iova + size:
        leaf = domain.walk(at)[-1]
        assert leaf.present
        assert leaf.leaf
        assert at % leaf.size == 0
        found[leaf.size] += 1
        at += leaf.size
    return found


# Bytes, alignment, scattered: the leaves.
CASES: dict[str, tuple[int, int, bool, dict[int, int]]] = {
    "2M": (M2, M2, False, {M2: 1}),
    "several 2M": (5 * M2, M2, False, {M2: 5}),
    "2M and a rest": (M2 + 3 * K4, M2, False, {M2: 1, K4: 3}),
    "less than 2M": (M2 - K4, M2, False, {K4: 511}),
    "1G": (G1, G1, False, {G1: 1}),
    "1G, aligned to 2M only where it lies": (G1, M2, False, {}),
    "scattered": (M2, K4, True, {K4: 512}),
}


@pytest.mark.parametrize("case", CASES)
async def test_leaves_of_an_allocated_buffer(case: str) -> None:
    size, align, scattered, expected = CASES[case]
    config = MachineConfig(ram=(4 << 30) if size >= G1 else (64 << 20), devices=(DeviceSpec(kind="testdev"),))
    async with Machine(config) as machine, machine.open("testdev0") as device:
        container: Any = device.container
        buffer = await container.alloc(size, align=align, scattered=scattered)
        assert buffer.iova is not None
        assert buffer.iova % align == 0
        domain = container._batch_file.iommu.domains[0]
        found = leaves(domain, buffer.iova, buffer.nbytes_mapped)
        assert sum(size * count for size, count in found.items()) == buffer.nbytes_mapped
        if expected:
            assert found == expected
        else:
            assert set(found) <= {M2, G1}
        await container.free(buffer)
        assert domain.iova_to_phys(buffer.iova or 0) is None


async def test_batches_take_large_pages_too() -> None:
    config = MachineConfig(ram=64 << 20, devices=(DeviceSpec(kind="testdev"),))
    async with Machine(config) as machine, machine.open("testdev0") as device:
        container: Any = device.container
        buffers = [await container.alloc(4 * M2, align=M2, map=False) for _ in range(3)]
        iovas = [1 << 40, (1 << 40) + 8 * M2, (1 << 41) + M2 + K4]
        await container.map_dma_batch(iovas, buffers)
        domain = container._batch_file.iommu.domains[0]
        counts = [leaves(domain, iova, 4 * M2) for iova in iovas]
        assert counts == [{M2: 4}, {M2: 4}, {K4: 2048}]
        await container.unmap_dma_batch(iovas, 4 * M2)
        assert domain.table.stats().tables == 1
