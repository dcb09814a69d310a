"""The fault campaign: traffic on four channels of two threaded DSAs while mappings are pulled away and given back,
WQs aborted, devices and functions reset, devices halted, operations cancelled and descriptors failed by injection.

Nothing may hang, crash or write a wrong byte, and every operation must end as what was done to it says: done to the
last byte; a page fault at an address that was not mapped, with exactly the bytes before it; taken back, with every
byte old or new; or the code that was injected. What an operation left behind must stay as it is. The random choices
have a seed, the threads' timing has none. ``PVFIO_CAMPAIGN_SECONDS``, else ``PVFIO_STRESS_SECONDS``, says for how long.
"""

from __future__ import annotations

import errno
import math
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np
import pytest
import trio

from pvfio import Machine, MachineConfig
from pvfio.abi import lib
from pvfio.devices.dsa import DsaConfig
from pvfio.drivers.dsa import BatchError, DsaDriver, DsaError, Event, OperationAborted, WqConfig, descriptors
from pvfio.errors import VfioError
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec
from pvfio.vfio import Container, Device, DmaBuffer

pytestmark = pytest.mark.touches_c

SECONDS = float(os.environ.get("PVFIO_CAMPAIGN_SECONDS") or os.environ.get("PVFIO_STRESS_SECONDS") or "3")
DEADLINE = 30.0  # of an operation: reaching it is a hang
PAGE = 4096
SIZE = 64 * 1024
GUARD = PAGE
LANES = 2  # tasks a channel
MEMBERS = 8  # of a batch
MARK = 0x5A
HARDWARE = (lib.DSA_COMP_HW_ERR1, lib.DSA_COMP_HW_ERR_DRB, lib.DSA_COMP_TRANSLATION_FAIL)
TROUBLES = ("abort", "reset", "function reset", "halt", "halt for a function reset", "injection", "records")


@dataclass
class Unit:
    """One device, and what is being done to it."""

    machine: Machine
    name: str
    device: Device
    dsa: DsaDriver
    lanes: list[Lane] = field(default_factory=list)
    interruptions: int = 0  # begun and ended: odd while one goes on
    injected: int = 0
    reported: int = 0

    @property
    def function(self) -> Any:
        return self.machine.devices[self.name].function


class Lane:
    """A task with a source, a destination between guards, and its operations."""

    def __init__(self, unit: Unit, wq: int, number: int, pool: np.ndarray[Any, Any]) -> None:
        self.unit = unit
        self.wq = unit.dsa.wq(wq)
        self.flags = int(lib.IDXD_OP_FLAG_BOF) if wq else 0  # the second channel blocks on faults
        self.rng = random.Random(f"{unit.name} {wq} {number}")
        self.pool = pool
        self.outcomes: Counter[str] = Counter()
        self.writes = 0  # by this task, to its buffers
        self.pulls = 0  # begun and ended: odd while a mapping is away
        self.src: DmaBuffer
        self.dst: DmaBuffer

    async def allocate(self, container: Container) -> None:
        self.src = await container.alloc(SIZE, scattered=self.rng.random() < 0.5)
        self.dst = await container.alloc(SIZE + 2 * GUARD, scattered=self.rng.random() < 0.5)
        self.addresses = {"src": int(self.src.iova or 0), "dst": int(self.dst.iova or 0)}
        self.dst[:] = MARK

    def prepare(self) -> None:
        """New contents, a new place and size; what the operation before left must still be there."""
        assert (np.asarray(self.dst) == MARK).all(), "a byte landed after its operation had ended"
        start = self.rng.randrange(len(self.pool) - SIZE)
        self.source = self.pool[start : start + SIZE]
        self.src[:] = self.source
        self.old = self.rng.randrange(256)
        self.dst[:] = self.old
        self.size = self.rng.choice((self.rng.randint(1, SIZE), self.rng.randint(1, 256), SIZE))
        self.at = self.rng.randint(0, SIZE - self.size)
        self.writes += 1

    async def run(self) -> None:
        """Operation after operation, until cancelled."""
        while True:
            self.prepare()
            kind = self.rng.choice(("memmove", "fill", "copy_crc", "crcgen", "batch"))
            if self.flags and kind == "batch":
                kind = "memmove"
            before = (self.pulls, self.unit.interruptions)
            limit = self.rng.random() * 2e-3 if self.rng.random() < 0.05 else DEADLINE * 2
            with trio.move_on_after(limit) as scope:
                await self.attempt(kind, before)
            if scope.cancelled_caught:
                assert limit < DEADLINE
                self.outcomes["cancelled"] += 1
                self.check_mixture()
            assert np.array_equal(np.asarray(self.src), self.source), "the source changed"
            self.dst[:] = MARK
            self.writes += 1
            await trio.lowlevel.checkpoint()

    async def attempt(self, kind: str, before: tuple[int, int]) -> None:
        try:
            await getattr(self, kind)()
        except BatchError as error:
            self.outcomes["batch error"] += 1
            self.check_batch(error, before)
        except OperationAborted:
            self.outcomes["taken back"] += 1
            assert self.disturbed(before[1], self.unit.interruptions), "nobody took anything back"
            self.check_mixture()
        except DsaError as error:
            self.check_error(error.code, error.fault_addr, before)
            self.check_prefix(kind, error.bytes_completed)
        else:
            self.outcomes["done"] += 1

    @staticmethod
    def disturbed(before: int, now: int) -> bool:
        return bool(before % 2 or now != before)

    # The operations; those that end well are checked here.

    @property
    def target(self) -> int:
        return self.addresses["dst"] + GUARD + self.at

    @property
    def options(self) -> dict[str, Any]:
        return {"flags": self.flags, "deadline": DEADLINE}

    async def memmove(self) -> None:
        await self.wq.memmove(self.target, self.addresses["src"], self.size, **self.options)
        self.check_prefix("memmove", self.size)

    async def fill(self) -> None:
        await self.wq.fill(self.target, self.source[:8].tobytes(), self.size, **self.options)
        self.check_prefix("fill", self.size)

    async def copy_crc(self) -> None:
        crc = await self.wq.copy_crc(self.target, self.addresses["src"], self.size, **self.options)
        assert crc == google_crc32c.value(self.source[: self.size].tobytes())
        self.check_prefix("copy_crc", self.size)

    async def crcgen(self) -> None:
        crc = await self.wq.crcgen(self.addresses["src"], self.size, **self.options)
        assert crc == google_crc32c.value(self.source[: self.size].tobytes())
        self.check_prefix("crcgen", 0)

    async def batch(self) -> None:
        """Eight copies side by side."""
        self.at, self.size = 0, SIZE
        offsets = np.arange(MEMBERS, dtype=np.uint64) * np.uint64(SIZE // MEMBERS)
        source = np.uint64(self.addresses["src"]) + offsets
        await self.wq.batch(
            descriptors.memmove(np.uint64(self.target) + offsets, source, SIZE // MEMBERS), deadline=DEADLINE
        )
        self.check_prefix("memmove", self.size)

    # What the destination must be.

    def wanted(self, kind: str) -> np.ndarray[Any, Any]:
        """The destination's bytes after the whole operation, the guards with it."""
        whole = np.full(SIZE + 2 * GUARD, self.old, np.uint8)
        begin, end = GUARD + self.at, GUARD + self.at + self.size
        if kind == "fill":
            whole[begin:end] = np.resize(self.source[:8], self.size)
        elif kind != "crcgen":
            whole[begin:end] = self.source[: self.size]
        return whole

    def check_prefix(self, kind: str, done: int) -> None:
        wanted = self.wanted(kind)
        wanted[GUARD + self.at + done :] = self.old
        wrong = np.flatnonzero(np.asarray(self.dst) != wanted)
        assert not wrong.size, (
            f"{kind}: {wrong.size} bytes wrong, the first at {wrong[0]:#x} of {done:#x} done"
        )

    def check_mixture(self) -> None:
        """Every byte is old or new; which, nobody knows."""
        now, good = np.asarray(self.dst), np.zeros(SIZE + 2 * GUARD, bool)
        for kind in ("memmove", "fill", "crcgen"):
            good |= now == self.wanted(kind)
        assert good.all(), f"{(~good).sum()} bytes are neither old nor new"

    def check_error(self, code: int, address: int | None, before: tuple[int, int]) -> None:
        if code in HARDWARE:
            self.outcomes["injected"] += 1
            self.unit.reported += 1
            assert self.unit.reported <= self.unit.injected, "an error nobody injected"
            return
        self.outcomes["page fault"] += 1
        assert code == lib.DSA_COMP_PAGE_FAULT_NOBOF
        assert not self.flags, "it was to block"
        assert address is not None
        assert self.disturbed(before[0], self.pulls), "all was mapped"
        buffers = ((self.addresses["src"], SIZE), (self.addresses["dst"], SIZE + 2 * GUARD))
        assert any(0 <= address - start < size for start, size in buffers)
        faults = self.unit.machine.hypervisor.faults
        known = any(f.device == self.unit.device.name and f.iova == address for f in faults.snapshot())
        assert known or faults.lost, "the IOMMU knows nothing of it"

    def check_batch(self, error: BatchError, before: tuple[int, int]) -> None:
        assert error.code == lib.DSA_COMP_BATCH_FAIL
        assert error.failed
        step, wanted = SIZE // MEMBERS, self.wanted("memmove")
        for number, record in enumerate(error.records):
            status = int(record["status"]) & lib.DSA_COMP_STATUS_MASK
            done = step
            if status != lib.DSA_COMP_SUCCESS:
                self.check_error(status, int(record["fault_addr"]) or None, before)
                done = int(record["bytes_completed"])
            start = GUARD + number * step
            wanted[start + done : start + step] = self.old
        assert np.array_equal(np.asarray(self.dst), wanted)


async def pull(lanes: list[Lane], rng: random.Random, until: float, applied: Counter[str]) -> None:
    """Takes mappings away for some time, from all lanes alike; what was unmapped must not change then."""
    while trio.current_time() < until:
        lane = rng.choice(lanes)
        name = rng.choice(("src", "dst"))
        buffer = lane.src if name == "src" else lane.dst
        container = lane.unit.device.container
        lane.pulls += 1
        container.unmap_dma_nowait(lane.addresses[name], buffer.nbytes)
        contents, writes = np.array(buffer), lane.writes
        applied["pull"] += 1
        await trio.sleep(rng.random() * 3e-3)
        if lane.writes == writes:
            assert np.array_equal(contents, np.asarray(buffer)), "a byte landed after the unmap"
        await container.map_dma(lane.addresses[name], buffer)
        lane.pulls += 1
        await trio.sleep(rng.random() * 2e-3)


async def trouble(unit: Unit, rng: random.Random, until: float, applied: Counter[str]) -> None:
    """Each kind of trouble in turn, in an order of chance."""
    while trio.current_time() < until:
        for kind in rng.sample(TROUBLES, len(TROUBLES)):
            await trio.sleep(rng.random() * 20e-3)
            if kind == "records":
                await withhold_records(unit, rng)
            elif kind == "injection":
                unit.injected += 1
                opcode = int(lib.DSA_OPCODE_MEMMOVE)
                unit.function.inject_completion(
                    int(rng.choice(HARDWARE)), opcode=opcode, skip=rng.randrange(9)
                )
            else:
                unit.interruptions += 1
                await disturb(unit, kind, rng)
                unit.interruptions += 1
            applied[kind] += 1


async def withhold_records(unit: Unit, rng: random.Random) -> None:
    """Completion records cannot be written for some time, where there is an event log to have them."""
    ring = unit.dsa.wq(rng.randrange(2))._ring
    if unit.dsa.capabilities.event_log:
        unit.device.container.unmap_dma_nowait(ring.iova, ring.buffer.nbytes)
        await trio.sleep(rng.random() * 3e-3)
        await unit.device.container.map_dma(ring.iova, ring.buffer)


async def listen(unit: Unit, applied: Counter[str]) -> None:
    """What a driver's interrupt handler would do: looks for events whenever interrupt 0 fires."""
    while True:
        await unit.device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).wait(0, deadline=math.inf)
        before = unit.interruptions
        events: tuple[Event, ...] = ()
        refused = None
        try:
            events = await unit.dsa.events()
        except VfioError as error:
            refused = error.errno
        assert refused in (None, errno.EIO)
        assert refused is None or Lane.disturbed(before, unit.interruptions), "nobody reset the function"
        for event in events:
            assert event.code == lib.DSA_COMP_CRA_XLAT
            applied["record from the log"] += 1


async def disturb(unit: Unit, kind: str, rng: random.Random) -> None:
    if kind == "abort":
        await unit.dsa.abort(unit.dsa.wq(rng.randrange(2)))
        return
    if kind == "reset":
        await unit.dsa.reset()
        return
    if kind == "function reset":
        await unit.device.reset()  # behind the driver's back
    else:
        unit.function.inject_halt("the campaign", reset="software" if kind == "halt" else "flr")
    await trio.sleep(rng.random() * 2e-3)
    recovery = await unit.dsa.recover()
    assert recovery.reset
    assert recovery.halted == kind.startswith("halt")
    dropped = recovery.software_error
    assert dropped is None or dropped.code == lib.DSA_SWERR_WQ_NOT_ENABLED


@asynccontextmanager
async def units(machine: Machine) -> AsyncIterator[list[Unit]]:
    """Two devices in one IO address space, two WQs each, the second of which blocks on faults."""
    wqs = (WqConfig(size=64), WqConfig(size=64, block_on_fault=True))
    async with (
        machine.open("dsa0") as first,
        machine.open("dsa1", container=first.container) as second,
        DsaDriver(first, wqs=wqs, deadline=DEADLINE) as one,
        DsaDriver(second, wqs=wqs, deadline=DEADLINE) as two,
    ):
        yield [Unit(machine, "dsa0", first, one), Unit(machine, "dsa1", second, two)]


async def campaign(machine: Machine, seconds: float) -> tuple[Counter[str], Counter[str]]:
    """What was done to the devices how often, and how operations ended."""
    pool = np.random.default_rng(11).integers(0, 256, 4 * SIZE, dtype=np.uint8)
    applied: Counter[str] = Counter()
    async with units(machine) as both:
        for unit in both:
            for wq in range(2):
                unit.lanes += [Lane(unit, wq, number, pool) for number in range(LANES)]
            for lane in unit.lanes:
                await lane.allocate(unit.device.container)
        lanes = [lane for unit in both for lane in unit.lanes]
        until = trio.current_time() + seconds
        async with trio.open_nursery() as traffic:
            for lane in lanes:
                traffic.start_soon(lane.run)
            for unit in both:
                traffic.start_soon(listen, unit, applied)
            async with trio.open_nursery() as troubles:
                troubles.start_soon(pull, lanes, random.Random(1), until, applied)
                for unit in both:
                    troubles.start_soon(trouble, unit, random.Random(unit.name), until, applied)
            traffic.cancel_scope.cancel()
        outcomes = sum((lane.outcomes for lane in lanes), Counter())
        for unit in both:
            unit.function.clear_injections()
            for queue in unit.dsa.wqs:
                await queue.noop(deadline=DEADLINE)
    return applied, outcomes


@pytest.mark.parametrize("platform", ["intel", "amd"])
async def test_the_campaign(platform: Any) -> None:
    devices = tuple(
        DeviceSpec(kind="dsa", options={"config": DsaConfig.preset(preset)})
        for preset in ("dsa1.0", "dsa2.0")
    )
    config = MachineConfig(iommu=IommuConfig(platform=platform), devices=devices)
    with trio.fail_after(SECONDS + 2 * DEADLINE):
        async with Machine(config) as machine:
            applied, outcomes = await campaign(machine, SECONDS / 2)
            assert machine.memory.stats().pins == 0
    print(platform, dict(applied), dict(outcomes))
    assert set(applied) == {"pull", "record from the log", *TROUBLES}
    assert set(outcomes) >= {"done", "page fault", "taken back", "cancelled"}
