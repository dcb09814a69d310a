"""When ``unmap_dma`` returns, nothing lands in the old pages any more, however hard the engines write; and no unmap
waits for an engine that waits itself.

Three threaded engines, two of them sharing one IO address space, fill the same IOVAs without a pause while the test
maps, lets them write, unmaps, and then watches the unmapped memory stay what it made of it. ``PVFIO_STRESS_SECONDS``
says for how long, ``PVFIO_STRESS_UNMAPS`` how many unmaps it takes at least, on each platform.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import trio

from pvfio import Machine, MachineConfig
from pvfio.abi import lib
from pvfio.drivers.dsa import DsaDriver, WqConfig, descriptors
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec
from pvfio.vfio import Container, Device, DmaBuffer

pytestmark = pytest.mark.touches_c

SECONDS = float(os.environ.get("PVFIO_STRESS_SECONDS", "3"))
UNMAPS = int(os.environ.get("PVFIO_STRESS_UNMAPS", "0"))
PAGE = 4096
WINDOW = 0x20_0000_0000
SLOTS = 16
SLOT_BYTES = 16 * PAGE
MARK = 0x5A


@dataclass
class Space:
    """One IO address space: who writes into it, and what the test has done to it."""

    container: Container
    retired: list[DmaBuffer] = field(default_factory=list)
    unmaps: int = 0
    written: int = 0


async def hammer(dsa: DsaDriver) -> None:
    """Fills every slot of the window, again and again; the ones that are not mapped fault, as they should."""
    wq = dsa.wq(0)
    slots = np.uint64(WINDOW) + np.arange(SLOTS, dtype=np.uint64) * np.uint64(SLOT_BYTES)
    descs = descriptors.fill(slots, 0xA5A5_A5A5_A5A5_A5A5, SLOT_BYTES)
    previous = None
    while True:
        submission = await wq.submit(descs)
        if previous is not None:
            records = await previous.wait()
            statuses = set((records["status"] & lib.DSA_COMP_STATUS_MASK).tolist())
            assert statuses <= {lib.DSA_COMP_SUCCESS, lib.DSA_COMP_PAGE_FAULT_NOBOF}, statuses
        previous = submission


async def churn(space: Space, rng: random.Random, until: float, unmaps: int) -> None:
    """Maps, lets the engines write, unmaps, marks; every retired buffer must still carry its mark at the end."""
    container = space.container
    mapped: dict[int, DmaBuffer] = {}
    while trio.current_time() < until or space.unmaps < unmaps:
        slot = rng.randrange(SLOTS)
        iova = WINDOW + slot * SLOT_BYTES
        if slot not in mapped:
            buffer = await container.alloc(SLOT_BYTES, map=False, scattered=rng.random() < 0.5)
            await container.map_dma(iova, buffer)
            mapped[slot] = buffer
            continue
        if rng.random() < 0.5:
            await trio.lowlevel.checkpoint()
        buffer = mapped.pop(slot)
        container.unmap_dma_nowait(iova, SLOT_BYTES)
        space.written += bool((buffer == 0xA5).any())
        buffer[:] = MARK
        space.unmaps += 1
        space.retired.append(buffer)
        if len(space.retired) > 64:
            check(space.retired.pop(0))
    for slot in mapped:
        container.unmap_dma_nowait(WINDOW + slot * SLOT_BYTES, SLOT_BYTES)
    for buffer in space.retired:
        check(buffer)


def check(buffer: DmaBuffer) -> None:
    stray = np.flatnonzero(buffer != MARK)
    assert not stray.size, f"{stray.size} bytes landed after the unmap, the first at {stray[0]:#x}"


@pytest.mark.parametrize("platform", ["intel", "amd"])
async def test_no_byte_lands_after_unmap_returned(platform: Any) -> None:
    config = MachineConfig(
        iommu=IommuConfig(platform=platform), devices=tuple(DeviceSpec(kind="dsa") for _ in range(3))
    )
    rng = random.Random(7)
    with trio.fail_after(SECONDS * 4 + 60 + UNMAPS / 50):
        async with Machine(config) as machine:
            async with (
                machine.open("dsa0") as first,
                machine.open("dsa1", container=first.container) as second,
                machine.open("dsa2") as third,
            ):
                spaces = [Space(first.container), Space(third.container)]
                async with (
                    DsaDriver(first) as one,
                    DsaDriver(second) as two,
                    DsaDriver(third) as three,
                    trio.open_nursery() as engines,
                ):
                    for dsa in (one, two, three):
                        engines.start_soon(hammer, dsa)
                    until = trio.current_time() + SECONDS / 2
                    async with trio.open_nursery() as churners:
                        for space in spaces:
                            churners.start_soon(churn, space, rng, until, UNMAPS // len(spaces))
                    engines.cancel_scope.cancel()
            assert machine.memory.stats().pins == 0
    print([(space.unmaps, space.written) for space in spaces])
    for space in spaces:
        assert space.unmaps > 20
        assert space.written > 0, "no engine ever wrote: this test tested nothing"


async def stopped_inside_a_fill(machine: Machine, device: Device, dsa: DsaDriver) -> None:
    """The engine stands at a stop point, with a descriptor of this address space in hand."""
    engine: Any = machine.devices["dsa0"].function
    engine.engine.stop_before(1)
    wq = dsa.wq(0)
    target = await device.container.alloc(PAGE)
    submission = await wq.submit(descriptors.fill(np.repeat(np.uint64(target.iova or 0), 4), 1, PAGE))
    with trio.fail_after(10):
        await trio.lowlevel.wait_readable(engine.engine.stop_fd)
    assert not submission.done


async def blocked_on_a_fault(machine: Machine, device: Device, dsa: DsaDriver) -> None:
    """The engine waits, as block-on-fault says, for a page nobody maps."""
    await dsa.wq(0).submit(descriptors.fill(WINDOW, 1, PAGE, flags=lib.IDXD_OP_FLAG_BOF))
    with trio.fail_after(10):
        async for fault in machine.hypervisor.faults:
            if fault.iova == WINDOW:
                break


@pytest.mark.parametrize("waiting", [stopped_inside_a_fill, blocked_on_a_fault])
async def test_no_unmap_waits_for_an_engine_that_waits(waiting: Any) -> None:
    async with Machine(MachineConfig()) as machine, machine.open("dsa0") as device:
        async with DsaDriver(device, wqs=[WqConfig(block_on_fault=True)]) as dsa:
            await waiting(machine, device, dsa)
            buffer = await device.container.alloc(PAGE)
            assert buffer.iova is not None
            iova = buffer.iova
            done = trio.Event()

            def unmap() -> None:
                device.container.unmap_dma_nowait(iova, PAGE)

            async def unmap_in_a_thread() -> None:
                await trio.to_thread.run_sync(unmap, abandon_on_cancel=True)
                done.set()

            with trio.move_on_after(10):
                await unmap_in_a_thread()
            assert done.is_set(), "the flush waits for an engine that waits"
            function: Any = machine.devices["dsa0"].function
            function.engine.resume()
