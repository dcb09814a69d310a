"""Mapping on machines of every shape, seen by a DSA: what is mapped is reached, nothing else is, and the flush holds.

Drives the library and the kernel's domains, not a backend: some of what a shape is (levels, leaf sizes, device TLBs)
can be seen only from inside the machine.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import trio

from pvfio import Machine, MachineConfig
from pvfio.abi import lib
from pvfio.drivers.dsa import DsaDriver, DsaError, descriptors
from pvfio.errors import VfioError
from pvfio.machine import DeviceSpec
from pvfio.silicon import DmaAborted, Requester
from pvfio.vfio import Container, DmaBuffer
from tests.conformance.shapes import G1, K4, M2, Shape, full

pytestmark = [pytest.mark.touches_c, pytest.mark.every_shape]

STEPS = 200 if full() else 100
MARK, STRAY = 0x5A, 0xA5
EVERY_BYTE = 0x0101_0101_0101_0101


@dataclass
class Rig:
    machine: Machine
    container: Container
    dsa: DsaDriver
    requester: Requester

    async def refused(self, operation: Awaitable[object], iova: int, reason: str) -> None:
        """The device reports the fault, and the hypervisor has it in its log, ATS or not."""
        with pytest.raises(DsaError) as caught:
            await operation
        assert caught.value.fault_addr == iova
        log = self.machine.hypervisor.faults
        log.drain()
        last = log.snapshot()[-1]
        assert (last.iova, last.reason) == (iova, reason)


@asynccontextmanager
async def running(shape: Shape) -> AsyncIterator[Rig]:
    config = MachineConfig(
        iommu=shape.iommu(), engine=shape.engine, ram=64 << 20, devices=(DeviceSpec(kind="dsa"),)
    )
    with trio.fail_after(120):
        async with Machine(config) as machine, machine.open("dsa0") as device, DsaDriver(device) as dsa:
            yield Rig(machine, device.container, dsa, machine.devices["dsa0"].requester)
        assert machine.memory.stats().pins == 0


async def test_the_shape_shows(shape: Shape) -> None:
    """IOVA width, levels, and whether the device has a cache of its own, which the unmap empties."""
    async with running(shape) as rig:
        container, requester = rig.container, rig.requester
        assert container.info().iova_ranges[-1][1] == (1 << shape.bits) - 1
        assert container.info().pgsizes & K4
        with pytest.raises(VfioError):
            await container.alloc(K4, iova=1 << shape.bits)
        top = await container.alloc(K4, iova=(1 << shape.bits) - K4)
        await rig.dsa.wq(0).fill(top, 0x11 * EVERY_BYTE, K4)
        assert (top == 0x11).all()
        steps = requester.walk((1 << shape.bits) - 1).steps
        assert {step.level for step in steps if step.stage == 1} == set(range(1, shape.levels + 1))
        assert (requester.atc_stats().entries > 0) == shape.ats
        before = requester.atc_stats().invalidations
        await container.free(top)
        assert requester.atc_stats().invalidations - before == shape.ats
        last = (1 << shape.bits) - K4
        await rig.refused(rig.dsa.wq(0).fill(last, 0x22 * EVERY_BYTE, K4), last, "not present")
        assert (top == 0x11).all()


@pytest.mark.parametrize("size", [K4, 256 * K4, M2, M2 + K4, G1])
async def test_leaves_are_as_large_as_the_host_allows(shape: Shape, size: int) -> None:
    """And each of them is translated, with the device in the domain."""
    async with running(shape) as rig:
        iommu, pci = rig.machine.kernel.iommu, rig.machine.kernel.devices[0]
        assert iommu is not None
        domain = iommu.paging_domain()
        home = iommu.domain_of(pci)
        assert home is not None
        # Guest RAM begins at GPA 0; most of the gigabyte is not there, which concerns whoever reaches for it.
        iova = 1 << 34
        domain.map(iova, 0, size)
        expected = max(leaf for leaf in (K4, M2, G1) if shape.pgsizes & leaf and leaf <= size)
        assert domain.walk(iova)[-1].size == expected
        assert domain.walk(iova + size - 1)[-1].size == (expected if size % expected == 0 else K4)
        gpa = rig.machine.memory.guest_page()
        iommu.attach(domain, pci)
        for at in (0, size - K4, gpa):
            if at < min(size, rig.machine.memory.size):
                assert rig.requester.read(iova + at, 8) == bytes(rig.machine.memory.view_guest(at, 8))
            else:
                with pytest.raises(DmaAborted):
                    rig.requester.read(iova + at, 8)
        assert domain.unmap(iova, size) == size
        with pytest.raises(DmaAborted):
            rig.requester.read(iova, 1)
        iommu.attach(home, pci)
        domain.free()
        rig.machine.memory.free_guest_page(gpa)


@dataclass
class Model:
    """Mappings by IOVA: the buffer's bytes and whether the device may write them."""

    rig: Rig
    shape: Shape
    random: random.Random
    mapped: dict[int, tuple[DmaBuffer, bool]] = field(default_factory=dict)
    landed: int = 0
    refused: int = 0

    def pick(self) -> int:
        """An IOVA near the bottom, around the interrupt window, or at the top."""
        base = self.random.choice((M2, 0xFED0_0000, 1 << 33, (1 << self.shape.bits) - 8 * M2))
        return base + self.random.choice((self.random.randrange(16) * K4, self.random.randrange(4) * M2))

    def overlaps(self, iova: int, size: int) -> bool:
        return any(at < iova + size and iova < at + buffer.nbytes for at, (buffer, _) in self.mapped.items())

    async def map(self) -> None:
        size = self.random.choice((K4, 3 * K4, 64 * K4, M2, M2 + K4))
        align = M2 if size == M2 and self.random.random() < 0.7 else K4
        scattered = align == K4 and size < M2 and self.random.random() < 0.4
        buffer = await self.rig.container.alloc(size, map=False, align=align, scattered=scattered)
        iova, write = self.pick(), self.random.random() < 0.8
        window = iova < 0xFEF0_0000 and iova + size > 0xFEE0_0000
        if self.overlaps(iova, size) or window or iova + size > 1 << self.shape.bits:
            with pytest.raises(VfioError):
                await self.rig.container.map_dma(iova, buffer, write=write)
            return
        buffer[:] = self.random.randrange(256)
        await self.rig.container.map_dma(iova, buffer, write=write)
        self.mapped[iova] = buffer, write

    async def unmap(self) -> None:
        if not self.mapped:
            return
        iova = self.random.choice(sorted(self.mapped))
        buffer, _write = self.mapped.pop(iova)
        await self.rig.container.unmap_dma(iova, buffer.nbytes)
        before = buffer.copy()
        at = self.random.randrange(buffer.nbytes // 8) * 8
        await self.rig.refused(
            self.rig.dsa.wq(0).fill(iova + at, 0xEE * EVERY_BYTE, 8), iova + at, "not present"
        )
        assert np.array_equal(buffer, before)

    async def copy(self) -> None:
        """A piece of one mapping to another one, over its end now and then."""
        if len(self.mapped) < 2:
            return
        (src, (source, _)), (dst, (target, write)) = self.random.sample(sorted(self.mapped.items()), 2)
        size = min(self.random.randrange(1, 5 * K4), source.nbytes)
        at = self.random.choice((0, target.nbytes - min(size, target.nbytes), target.nbytes - 1))
        source[:size] = np.frombuffer(self.random.randbytes(size), np.uint8)
        inside = min(size, target.nbytes - at)
        if inside < size and self.overlaps(dst + target.nbytes, K4):
            return
        expected = target.copy()
        if write:
            expected[at : at + inside] = source[:inside]
        if write and inside == size:
            await self.rig.dsa.wq(0).memmove(dst + at, src, size)
            self.landed += 1
        else:
            where, reason = (dst + at + inside, "not present") if write else (dst + at, "permission")
            await self.rig.refused(self.rig.dsa.wq(0).memmove(dst + at, src, size), where, reason)
            self.refused += 1
        assert np.array_equal(target, expected)


async def test_random_mappings(shape: Shape) -> None:
    """Against a dictionary: every copy lands where it should and nowhere else, or faults where it should."""
    async with running(shape) as rig:
        model = Model(rig, shape, random.Random(str(shape)))
        for _ in range(STEPS):
            await model.random.choices((model.map, model.unmap, model.copy), (3, 1, 4))[0]()
        assert model.landed > 0
        for iova in list(model.mapped):
            (buffer, _write) = model.mapped.pop(iova)
            assert await rig.container.unmap_dma(iova, buffer.nbytes) == buffer.nbytes


async def test_a_batch(shape: Shape) -> None:
    """Pages of one buffer back to front, in one call each way, and one flush."""
    pages, base = 96, (1 << 33) - 32 * K4
    async with running(shape) as rig:
        container, invalidations = rig.container, rig.requester.atc_stats().invalidations
        source = await container.alloc(pages * K4, map=False)
        source[:] = np.random.default_rng(3).integers(0, 256, source.nbytes)
        target = await container.alloc(pages * K4)
        iovas = np.uint64(base) + np.arange(pages, dtype=np.uint64) * np.uint64(K4)
        vaddrs = np.uint64(source.vaddr) + np.arange(pages, dtype=np.uint64)[::-1] * np.uint64(K4)
        await container.map_dma_batch(iovas, vaddrs, K4, write=False)
        await rig.dsa.wq(0).memmove(target, base, pages * K4)
        assert np.array_equal(target.reshape(pages, K4), source.reshape(pages, K4)[::-1])
        assert (await container.unmap_dma_batch(iovas, K4) == K4).all()
        assert rig.requester.atc_stats().invalidations - invalidations == shape.ats
        for iova in (base, base + (pages - 1) * K4):
            await rig.refused(rig.dsa.wq(0).memmove(target, iova, K4), iova, "not present")


async def test_no_byte_lands_after_an_unmap(shape: Shape) -> None:
    """Fills before, beside (where the engine is a thread) and after the unmaps: the last ones all fault."""
    slots, size = 4, 4 * K4
    base = 1 << 33
    written = 0
    async with running(shape) as rig:
        iovas = np.uint64(base) + np.repeat(np.arange(slots, dtype=np.uint64), 4) * np.uint64(size)
        descs = descriptors.fill(iovas, STRAY * EVERY_BYTE, size)
        rng = random.Random(str(shape))
        for turn in range(STEPS // 4):
            buffers = []
            for slot in range(slots):
                buffer = await rig.container.alloc(size, map=False, scattered=turn % 2 == 1)
                await rig.container.map_dma(base + slot * size, buffer)
                buffers.append(buffer)
            submission = await rig.dsa.wq(0).submit(descs)
            for slot in rng.sample(range(slots), slots):
                rig.container.unmap_dma_nowait(base + slot * size, size)
                written += bool((buffers[slot] == STRAY).any())
                buffers[slot][:] = MARK
            late = await rig.dsa.wq(0).submit(descs)
            await submission.wait()
            statuses = (await late.wait())["status"] & lib.DSA_COMP_STATUS_MASK
            assert set(statuses.tolist()) == {lib.DSA_COMP_PAGE_FAULT_NOBOF}
            for buffer in buffers:
                assert (buffer == MARK).all()
    assert written > 0
