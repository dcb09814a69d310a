"""The host's dirty log is the set of pages that DSA devices wrote, no more and no fewer; and a log that is read while
engines write without a pause loses nothing: who copies what it reports ends with the same memory.

What was written is told by the descriptors that went to the portals and by their completion records; where it
lies by a walk of the tables, which marks nothing. ``PVFIO_STRESS_SECONDS`` bounds the second test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from pvfio import Machine, MachineConfig
from pvfio.abi import lib
from pvfio.drivers.dsa import DsaDriver, descriptors
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec
from pvfio.vfio import DmaBuffer

pytestmark = pytest.mark.touches_c

SECONDS = float(os.environ.get("PVFIO_STRESS_SECONDS", "3"))
PAGE = 4096
AREA = 96 * PAGE
MATRIX = [(platform, engine) for platform in ("intel", "amd") for engine in ("inline", "thread")]
WRITERS = {lib.DSA_OPCODE_MEMMOVE, lib.DSA_OPCODE_MEMFILL, lib.DSA_OPCODE_COPY_CRC, lib.DSA_OPCODE_DUALCAST}


def machine_of(platform: Any, engine: Any, dsas: int) -> Machine:
    specs = tuple(DeviceSpec(kind="dsa") for _ in range(dsas))
    return Machine(MachineConfig(iommu=IommuConfig(platform=platform), engine=engine, devices=specs))


class Portals:
    """Stands before a WQ's portals and keeps every descriptor the device is given."""

    def __init__(self, wq: Any) -> None:
        self.seen: list[NDArray[Any]] = []
        self._region = wq._portals
        wq._portals = self

    def movdir64b(self, offset: int, items: NDArray[Any]) -> None:
        self.seen.append(items.copy())
        self._region.movdir64b(offset, items)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._region, name)


class Truth:
    """GPAs of the pages that a device's descriptors made it write."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._requester = machine.devices[name].requester
        self.pages: set[int] = set()

    def add(self, iova: int, size: int) -> None:
        for at in range(iova & ~(PAGE - 1), iova + size, PAGE):
            leaf = next(step for step in self._requester.walk(at).steps if step.stage == 1 and step.leaf)
            inside = (1 << (12 + 9 * (leaf.level - 1))) - 1
            self.pages.add(leaf.output + (at & inside))

    def take(self, descs: NDArray[Any], records: NDArray[Any]) -> None:
        """The destinations as far as the records say, and the records themselves."""
        for desc, record in zip(descs, records, strict=True):
            self.add(int(desc["completion_addr"]), int(lib.DSA_COMPLETION_SIZE))
            opcode = int(desc["flags_opcode"]) >> 24
            failed = int(record["status"]) & int(lib.DSA_COMP_STATUS_MASK) != lib.DSA_COMP_SUCCESS
            size = int(record["bytes_completed"] if failed else desc["xfer_size"])
            if opcode in WRITERS and size:
                self.add(int(desc["dst_addr"]), size)
                if opcode == lib.DSA_OPCODE_DUALCAST:
                    self.add(int(desc["dest2"]), size)


def random_descriptors(
    rng: np.random.Generator, src: int, dst: int, hole: int, count: int, *, faults: bool = True
) -> NDArray[Any]:
    """Descriptors over two areas of ``AREA`` bytes; ``hole`` is where nothing is mapped, behind ``dst``'s end."""
    made = []
    for _ in range(count):
        size = int(rng.choice([1, 64, PAGE, 3 * PAGE + 17, 70000]))
        a = int(rng.integers(0, AREA - size))
        b = int(rng.integers(0, AREA // 2 - size)) if size < AREA // 2 else 0
        to = hole - min(size - 1, int(rng.integers(0, size))) if faults and rng.random() < 0.1 else dst + a
        second = dst + AREA // 2 + (b & ~(PAGE - 1)) + (dst + b) % PAGE
        makers: list[Callable[[], NDArray[Any]]] = [
            lambda to=to, b=b, size=size: descriptors.memmove(to, src + b, size),  # type: ignore[misc]
            lambda to=to, size=size: descriptors.fill(to, int(rng.integers(1 << 62)), size),  # type: ignore[misc]
            lambda to=to, b=b, size=size: descriptors.copy_crc(to, src + b, size),  # type: ignore[misc]
            lambda b=b, s=second: descriptors.dualcast(dst + b, s, src, 2 * PAGE),  # type: ignore[misc]
            lambda a=a, size=size: descriptors.compare(dst + a, src + a, size),  # type: ignore[misc]
            lambda a=a, size=size: descriptors.crcgen(dst + a, size),  # type: ignore[misc]
            lambda: descriptors.noop(),
        ]
        made.append(makers[int(rng.integers(len(makers)))]())
    return descriptors.join(*made)


@pytest.mark.parametrize(("platform", "engine"), MATRIX)
async def test_the_record_is_the_set_of_pages_written(platform: str, engine: str) -> None:
    rng = np.random.default_rng(6)
    async with machine_of(platform, engine, 2) as machine:
        log = machine.hypervisor.dirty
        async with machine.open("dsa0") as one, machine.open("dsa1") as two:
            async with DsaDriver(one) as first, DsaDriver(two) as second:
                sides = []
                for name, device, dsa in (("dsa0", one, first), ("dsa1", two, second)):
                    src = await device.container.alloc(AREA, scattered=True)
                    dst = await device.container.alloc(2 * AREA, align=2 << 20 if name == "dsa0" else PAGE)
                    assert src.iova is not None
                    assert dst.iova is not None
                    iova, hole = dst.iova, dst.iova + AREA
                    await device.container.unmap_dma(iova, 2 * AREA)
                    await device.container.map_dma(iova, dst[:AREA])
                    sides.append((dsa.wq(0), Portals(dsa.wq(0)), Truth(machine, name), src, iova, hole, dst))
                log.start()
                for _ in range(12):
                    expected: set[int] = set()
                    for wq, portals, truth, src, iova, hole, _dst in sides:
                        portals.seen.clear()
                        truth.pages.clear()
                        assert src.iova is not None
                        made = random_descriptors(rng, src.iova, iova, hole, int(rng.integers(1, 9)))
                        records = await (await wq.submit(made)).wait()
                        truth.take(descriptors.join(*portals.seen), records)
                        expected |= truth.pages
                    found = log.harvest().tolist()
                    assert found == sorted(expected)
                    assert not log.harvest().size
                log.stop()


@pytest.mark.parametrize("platform", ["intel", "amd"])
async def test_members_of_a_batch_and_its_record_are_written_pages(platform: str) -> None:
    async with machine_of(platform, "thread", 1) as machine, machine.open("dsa0") as device:
        async with DsaDriver(device) as dsa:
            dst = await device.container.alloc(64 * PAGE, scattered=True)
            assert dst.iova is not None
            wq, truth = dsa.wq(0), Truth(machine, "dsa0")
            portals = Portals(wq)
            batch = await wq.alloc_batch(8)
            targets = dst.iova + np.arange(8, dtype=np.uint64) * np.uint64(7 * PAGE)
            members = descriptors.fill(targets, 0x1122, 2 * PAGE)
            descriptors.words_of(batch.descriptors)[:] = descriptors.words_of(members)
            machine.hypervisor.dirty.start()
            records = await wq.batch(batch)
            truth.take(batch.descriptors, records)
            (desc,) = descriptors.join(*portals.seen)
            truth.add(int(desc["completion_addr"]), int(lib.DSA_COMPLETION_SIZE))
            assert machine.hypervisor.dirty.harvest().tolist() == sorted(truth.pages)


class Mirror:
    """The other side of a migration: memory made of what the log reported, and no more."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.pages: dict[int, bytes] = {}
        self.reports = 0

    def round(self) -> int:
        found = self._machine.hypervisor.dirty.harvest().tolist()
        for gpa in found:
            self.pages[gpa] = bytes(self._machine.memory.view_guest(gpa, PAGE))
        self.reports += len(found)
        return len(found)


async def hammer(dsa: DsaDriver, src: DmaBuffer, dst: DmaBuffer, seed: int, stop: trio.Event) -> None:
    rng = np.random.default_rng(seed)
    assert src.iova is not None
    assert dst.iova is not None
    previous = None
    while not stop.is_set():
        made = random_descriptors(rng, src.iova, dst.iova, 0, 16, faults=False)
        submission = await dsa.wq(0).submit(made, keep=(src, dst))
        if previous is not None:
            await previous.wait()
        previous = submission
    if previous is not None:
        await previous.wait()


@pytest.mark.parametrize("platform", ["intel", "amd"])
async def test_a_log_that_is_read_while_engines_write_loses_nothing(platform: str) -> None:
    async with machine_of(platform, "thread", 3) as machine:
        log = machine.hypervisor.dirty
        async with (
            machine.open("dsa0") as one,
            machine.open("dsa1", container=one.container) as two,
            machine.open("dsa2") as three,
        ):
            buffers: list[tuple[DmaBuffer, DmaBuffer]] = []
            for device in (one, two, three):
                src = await device.container.alloc(AREA)
                src[:] = np.random.default_rng(len(buffers)).integers(0, 256, AREA, np.uint8)
                dst = await device.container.alloc(AREA, scattered=device is three)
                buffers.append((src, dst))
            mirror = Mirror(machine)
            log.start()
            async with DsaDriver(one) as a, DsaDriver(two) as b, DsaDriver(three) as c:
                stop = trio.Event()
                with trio.fail_after(SECONDS * 4 + 60):
                    async with trio.open_nursery() as engines:
                        for seed, (dsa, (src, dst)) in enumerate(zip((a, b, c), buffers, strict=True)):
                            engines.start_soon(hammer, dsa, src, dst, seed, stop)
                        until = trio.current_time() + SECONDS / 2
                        rounds = busy = 0
                        while trio.current_time() < until or busy < 20:
                            busy += mirror.round() > 0
                            rounds += 1
                            await trio.lowlevel.checkpoint()
                        stop.set()
                mirror.round()
                assert mirror.round() == 0, "nothing runs any more"
                print(f"{rounds} rounds, {busy} with dirty pages, {mirror.reports} reports")
                for number, (_src, dst) in enumerate(buffers):
                    for gpa, size in machine.memory.runs(dst.vaddr, AREA):
                        for at in range(gpa, gpa + size, PAGE):
                            now = bytes(machine.memory.view_guest(at, PAGE))
                            then = mirror.pages.get(at, bytes(PAGE))
                            assert then == now, f"dsa{number}: a write to {at:#x} was not reported"
