"""Lazy flushing: what a device can still reach after an unmap, until the queue is flushed; and that strict has none.

The timer is trio's, driven by the autojump clock: the devices are inline.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest
import trio

from pvfio.abi import lib
from pvfio.guest.dma_api import Direction, DmaDevice
from pvfio.guest.flush_queue import FLUSH_SECONDS, QUEUE_SIZE, FlushQueue
from pvfio.guest.transport import on_vp
from pvfio.silicon import BusMaster, DmaAborted

pytestmark = pytest.mark.touches_c

PAGE = 4096
FROM_DEVICE = Direction.FROM_DEVICE
FULL_FLUSH = lib.HVCALL_FLUSH_DEVICE_DOMAIN
BEFORE = FLUSH_SECONDS * 0.9


class Lazy(NamedTuple):
    machine: Any
    dma: DmaDevice
    bus: BusMaster

    @property
    def queue(self) -> FlushQueue:
        assert self.dma.domain.queue is not None
        return self.dma.domain.queue

    def reaches(self, address: int) -> bool:
        try:
            self.bus.write(address, b"stale?")
        except DmaAborted:
            return False
        return True

    def map(self) -> int:
        """A page of its own, mapped and in the IOTLB."""
        address = self.dma.map_single(self.machine.memory.alloc(PAGE), FROM_DEVICE)
        self.bus.write(address, b"fresh")
        return address


MakeLazy = Callable[..., Awaitable[Lazy]]


@pytest.fixture
def lazy(emulated: Any) -> MakeLazy:
    async def make(kind: str = "lazy") -> Lazy:
        machine = await emulated(driver=None, default_domain=kind)
        device = machine.kernel.devices[0]
        device.enable()
        return Lazy(machine, DmaDevice(machine.kernel, device), machine.functions[0].bus)

    return make


async def test_the_window_lazy_opens_and_the_timer_closes(lazy: MakeLazy, autojump_clock: Any) -> None:
    side = await lazy()
    memory = side.machine.memory
    buffer = memory.alloc(PAGE)
    address = side.dma.map_single(buffer, FROM_DEVICE)
    side.bus.write(address, b"fresh")
    side.dma.unmap_single(address, PAGE, FROM_DEVICE)
    assert memory.stats().pins == 0
    assert side.dma.domain.domain is not None
    assert side.dma.domain.domain.iova_to_phys(address) is None
    # The entry is gone, the translation in the IOTLB is not: the device still writes what is the driver's again.
    side.bus.write(address, b"stale")
    assert buffer[:5].tobytes() == b"stale"
    await trio.sleep(BEFORE)
    assert side.reaches(address)
    await trio.sleep(FLUSH_SECONDS)
    assert not side.reaches(address)
    assert (len(side.queue), side.queue.flushes) == (0, 1)


async def test_strict_has_no_window(lazy: MakeLazy) -> None:
    side = await lazy("strict")
    for _ in range(2 * QUEUE_SIZE):
        address = side.map()
        side.dma.unmap_single(address, PAGE, FROM_DEVICE)
        assert not side.reaches(address)
    assert side.dma.domain.queue is None


async def test_an_address_waits_for_the_flush_before_it_is_used_again(lazy: MakeLazy) -> None:
    side = await lazy()
    waiting: set[int] = set()
    for count in range(1, QUEUE_SIZE):
        address = side.map()
        assert address not in waiting
        waiting.add(address)
        side.dma.unmap_single(address, PAGE, FROM_DEVICE)
        assert len(side.queue) == count
    assert all(side.reaches(address) for address in waiting)
    assert side.queue.flushes == 0
    last = side.map()
    side.dma.unmap_single(last, PAGE, FROM_DEVICE)
    # Full: one flush, of everything.
    assert (len(side.queue), side.queue.flushes) == (0, 1)
    assert not any(side.reaches(address) for address in (*waiting, last))
    assert side.map() in waiting | {last}


async def test_each_vp_has_a_queue_and_one_flush_empties_all(lazy: MakeLazy) -> None:
    side = await lazy()
    held = [side.map() for _ in range(2 * (QUEUE_SIZE - 1) + 1)]
    for number, address in enumerate(held[:-1]):
        with on_vp(number & 1):
            side.dma.unmap_single(address, PAGE, FROM_DEVICE)
    assert (len(side.queue), side.queue.flushes) == (2 * (QUEUE_SIZE - 1), 0)
    with on_vp(1):
        side.dma.unmap_single(held[-1], PAGE, FROM_DEVICE)
    assert (len(side.queue), side.queue.flushes) == (0, 1)
    assert side.dma.domain.iova is not None
    side.dma.domain.iova.check()


async def test_table_pages_wait_for_the_flush_too(lazy: MakeLazy, autojump_clock: Any) -> None:
    side = await lazy()
    memory = side.machine.memory
    before = memory.stats().table_pages
    address = side.map()
    mapped = memory.stats().table_pages
    assert mapped > before
    side.dma.unmap_single(address, PAGE, FROM_DEVICE)
    assert memory.stats().table_pages == mapped
    await trio.sleep(2 * FLUSH_SECONDS)
    assert memory.stats().table_pages == before


async def test_the_timer_runs_only_while_something_waits(lazy: MakeLazy, autojump_clock: Any) -> None:
    side = await lazy()
    for round_number in range(1, 4):
        for _ in range(3):
            side.dma.unmap_single(side.map(), PAGE, FROM_DEVICE)
        await trio.sleep(1)
        assert (len(side.queue), side.queue.flushes) == (0, round_number)


async def test_the_first_range_starts_the_timer_and_others_do_not_put_it_off(
    lazy: MakeLazy, autojump_clock: Any
) -> None:
    side = await lazy()
    first = side.map()
    side.dma.unmap_single(first, PAGE, FROM_DEVICE)
    await trio.sleep(BEFORE)
    second = side.map()
    side.dma.unmap_single(second, PAGE, FROM_DEVICE)
    await trio.sleep(FLUSH_SECONDS - BEFORE + FLUSH_SECONDS / 100)
    assert not side.reaches(first)
    assert not side.reaches(second)


async def test_there_is_one_timer(lazy: MakeLazy, autojump_clock: Any) -> None:
    side = await lazy()
    nursery = side.machine.kernel._nursery
    assert len(nursery.child_tasks) == 0
    for _ in range(3 * QUEUE_SIZE + 1):
        side.dma.unmap_single(side.map(), PAGE, FROM_DEVICE)
    assert (len(side.queue), side.queue.flushes) == (1, 3)
    assert len(nursery.child_tasks) == 1
    await trio.sleep(2 * FLUSH_SECONDS)
    assert (len(side.queue), side.queue.flushes) == (0, 4)
    assert len(nursery.child_tasks) == 0


async def test_a_timer_whose_flush_is_refused_tries_again(lazy: MakeLazy, autojump_clock: Any) -> None:
    side = await lazy()
    side.machine.hypervisor.inject(FULL_FLUSH, lib.HV_STATUS_INSUFFICIENT_MEMORY, 2)
    address = side.map()
    side.dma.unmap_single(address, PAGE, FROM_DEVICE)
    await trio.sleep(2.5 * FLUSH_SECONDS)
    assert side.reaches(address)
    assert len(side.queue) == 1
    await trio.sleep(FLUSH_SECONDS)
    assert not side.reaches(address)


async def test_a_full_queue_whose_flush_is_refused_keeps_everything(lazy: MakeLazy) -> None:
    side = await lazy()
    addresses = [side.map() for _ in range(QUEUE_SIZE + 2)]
    side.machine.hypervisor.inject(FULL_FLUSH, lib.HV_STATUS_INSUFFICIENT_MEMORY, 2)
    for address in addresses[:-1]:
        side.dma.unmap_single(address, PAGE, FROM_DEVICE)
    # One refusal when it was full, one for the range that found no room: that range is held, with its memory.
    assert len(side.queue) == QUEUE_SIZE
    assert side.machine.memory.stats().pins == 2
    with pytest.raises(OSError) as raised:
        side.dma.unmap_single(addresses[-2], PAGE, FROM_DEVICE)
    assert raised.value.errno == errno.EINVAL
    assert all(side.reaches(address) for address in addresses)
    side.dma.unmap_single(addresses[-1], PAGE, FROM_DEVICE)
    assert len(side.queue) == 0
    assert side.machine.memory.stats().pins == 0
    assert not any(side.reaches(address) for address in addresses)
    iova = side.dma.domain.iova
    assert iova is not None
    assert iova.stats().live == 0
    iova.check()


async def test_a_domain_that_goes_takes_its_timer_along(lazy: MakeLazy, autojump_clock: Any) -> None:
    side = await lazy()
    side.dma.unmap_single(side.map(), PAGE, FROM_DEVICE)
    device = side.machine.kernel.devices[0]
    queue = side.queue
    device.iommu_group.set_default_domain("identity")
    calls = side.machine.kernel.transport.calls
    await trio.sleep(10 * FLUSH_SECONDS)
    assert side.machine.kernel.transport.calls == calls
    assert queue.flushes == 0


async def test_without_the_kernels_tasks_only_a_full_queue_is_flushed(lazy: MakeLazy) -> None:
    side = await lazy()
    kernel = side.machine.kernel
    kernel._nursery = None
    address = side.map()
    side.dma.unmap_single(address, PAGE, FROM_DEVICE)
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()
    assert side.reaches(address)
    for _ in range(QUEUE_SIZE - 1):
        side.dma.unmap_single(side.map(), PAGE, FROM_DEVICE)
    assert not side.reaches(address)
