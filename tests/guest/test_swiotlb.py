"""Bounce buffers: what an untrusted device sees and may spoil, and whose bytes move when."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.errors import VfioError
from pvfio.guest.dma_api import DMA_ATTR_SKIP_CPU_SYNC, Direction, DmaDevice, DmaMappingError
from pvfio.guest.swiotlb import MAX_BOUNCE, BouncePool
from pvfio.guest.transport import on_vp
from pvfio.memory import GuestMemory
from pvfio.silicon import BusMaster, DmaAborted

pytestmark = pytest.mark.touches_c

PAGE = 4096
BIDIRECTIONAL, TO_DEVICE, FROM_DEVICE, _ = Direction
DIRECTIONS = [BIDIRECTIONAL, TO_DEVICE, FROM_DEVICE]
SECRET = 0x55
OURS = 0x11


class Side(NamedTuple):
    machine: Any
    dma: DmaDevice
    bus: BusMaster

    def memory(self, offset: int, size: int) -> tuple[Any, Any]:
        """A buffer full of secrets, and the part of it that is the device's."""
        whole = self.machine.memory.alloc(-(-(offset + size) // PAGE) * PAGE)
        whole[:] = SECRET
        part = whole[offset : offset + size]
        part[:] = OURS
        return whole, part

    @property
    def used(self) -> int:
        pool: BouncePool = self.machine.kernel.bounce_pool
        return pool.used


MakeSide = Callable[..., Awaitable[Side]]


@pytest.fixture
def untrusted(emulated: Any) -> MakeSide:
    async def make(kind: str = "strict", **side: Any) -> Side:
        machine = await emulated(driver=None, default_domain=kind)
        device = machine.kernel.devices[0]
        device.enable()
        side.setdefault("untrusted", True)
        return Side(machine, DmaDevice(machine.kernel, device, **side), machine.functions[0].bus)

    return make


PARTS = [(0, 1), (100, 200), (0, PAGE - 1), (1, PAGE), (PAGE - 8, 16), (16, 5 * PAGE), (0, PAGE + 1)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("offset", "size"), PARTS)
async def test_it_sees_the_bytes_and_zeroes(
    untrusted: MakeSide, offset: int, size: int, direction: Direction
) -> None:
    side = await untrusted()
    whole, part = side.memory(offset, size)
    address = side.dma.map_single(part, direction)
    pages = -(-size // PAGE)
    assert address % PAGE == 0
    seen = side.bus.read(address, pages * PAGE)
    # Whatever the direction: a device that writes less than all must not make the rest anything else.
    assert seen == bytes([OURS]) * size + bytes(pages * PAGE - size)
    for outside in (address - PAGE, address + pages * PAGE):
        with pytest.raises(DmaAborted):
            side.bus.read(outside, 1)
    if direction is not TO_DEVICE:
        side.bus.write(address, b"\x77" * (pages * PAGE))
    assert (part == OURS).all()
    side.dma.unmap_single(address, size, direction)
    assert (part == (OURS if direction is TO_DEVICE else 0x77)).all()
    part[:] = SECRET
    assert (whole == SECRET).all()
    assert side.used == 0
    with pytest.raises(DmaAborted):
        side.bus.read(address, 1)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("start", "size"), [(0, 300), (10, 50), (290, 10), (0, 1)])
async def test_syncs_move_the_part_that_is_named(
    untrusted: MakeSide, direction: Direction, start: int, size: int
) -> None:
    side = await untrusted()
    _whole, part = side.memory(700, 300)
    address = side.dma.map_single(part, direction)
    named = np.zeros(300, dtype=bool)
    named[start : start + size] = True
    part[:] = 0x22
    side.dma.sync_single_for_device(address + start, size, direction)
    seen = np.frombuffer(side.bus.read(address, 300), np.uint8)
    assert (seen == np.where(named & (direction is not FROM_DEVICE), 0x22, OURS)).all()
    if direction is TO_DEVICE:
        part[:] = 0x33
        side.dma.sync_single_for_cpu(address + start, size, direction)
        assert (part == 0x33).all()
        return
    side.bus.write(address, b"\x77" * 300)
    side.dma.sync_single_for_cpu(address + start, size, direction)
    assert (part == np.where(named, 0x77, 0x22)).all()
    side.dma.unmap_single(address, 300, direction)
    assert (part == 0x77).all()


async def test_a_sync_beyond_the_bytes_stays_inside_them(untrusted: MakeSide) -> None:
    side = await untrusted()
    whole, part = side.memory(0, 300)
    address = side.dma.map_single(part, BIDIRECTIONAL)
    side.bus.write(address, b"\x77" * PAGE)
    side.dma.sync_single_for_cpu(address + 200, PAGE, BIDIRECTIONAL)
    side.dma.sync_single_for_cpu(address + 400, 8, BIDIRECTIONAL)
    assert (whole[300:] == SECRET).all()
    assert (part == np.where(np.arange(300) < 200, OURS, 0x77)).all()
    whole[300:] = OURS
    side.dma.sync_single_for_device(address, PAGE, BIDIRECTIONAL)
    assert side.bus.read(address + 300, 4) == b"\x77" * 4


async def test_skip_cpu_sync_brings_nothing_back(untrusted: MakeSide) -> None:
    side = await untrusted()
    _, part = side.memory(8, 100)
    address = side.dma.map_single(part, FROM_DEVICE, attrs=DMA_ATTR_SKIP_CPU_SYNC)
    side.bus.write(address, b"\x77" * 100)
    side.dma.unmap_single(address, 100, FROM_DEVICE, attrs=DMA_ATTR_SKIP_CPU_SYNC)
    assert (part == OURS).all()


async def test_whole_pages_are_not_bounced(untrusted: MakeSide) -> None:
    side = await untrusted()
    buffer = side.machine.memory.alloc(2 * PAGE)
    address = side.dma.map_single(buffer, FROM_DEVICE)
    side.bus.write(address, b"straight")
    assert buffer[:8].tobytes() == b"straight"
    side.dma.unmap_single(address, 2 * PAGE, FROM_DEVICE)


async def test_the_next_user_of_a_slot_sees_nothing_of_the_last(untrusted: MakeSide) -> None:
    side = await untrusted()
    _, long = side.memory(0, PAGE - 1)
    address = side.dma.map_single(long, TO_DEVICE)
    gpa = side.dma.domain.domain.iova_to_phys(address)  # type: ignore[union-attr]
    side.dma.unmap_single(address, PAGE - 1, TO_DEVICE)
    _, short = side.memory(0, 3)
    address = side.dma.map_single(short, TO_DEVICE)
    assert side.dma.domain.domain.iova_to_phys(address) == gpa  # type: ignore[union-attr]
    assert side.bus.read(address, PAGE) == bytes([OURS] * 3) + bytes(PAGE - 3)


@pytest.mark.parametrize("kind", ["identity", "strict"])
async def test_no_memory_for_a_pool(untrusted: MakeSide, kind: str) -> None:
    side = await untrusted(kind, untrusted=kind == "strict")
    memory = side.machine.memory
    buffer = memory.alloc(3 * PAGE, scattered=True)[64 : 2 * PAGE]
    kept = []
    with contextlib.suppress(MemoryError):
        while True:
            kept.append(memory.alloc(1 << 20))
    with pytest.raises(DmaMappingError) as raised:
        side.dma.map_single(buffer, TO_DEVICE)
    assert raised.value.errno == errno.ENOMEM
    kept.clear()
    side.dma.unmap_single(side.dma.map_single(buffer, TO_DEVICE), buffer.nbytes, TO_DEVICE)
    assert side.used == 0


async def test_every_vp_bounces(untrusted: MakeSide) -> None:
    side = await untrusted()
    _, buffer = side.memory(64, 1000)
    for vp in range(side.machine.kernel.transport.vps):
        with on_vp(vp):
            address = side.dma.map_single(buffer, TO_DEVICE)
            assert side.bus.read(address, 1000) == bytes([OURS]) * 1000
            side.dma.unmap_single(address, 1000, TO_DEVICE)
    assert side.used == 0


async def test_lists_and_pages(untrusted: MakeSide) -> None:
    side = await untrusted()
    _, first = side.memory(3, 500)
    second = side.machine.memory.alloc(PAGE)
    segments = side.dma.map_sg([first, second], BIDIRECTIONAL)
    assert [segment.length for segment in segments] == [500, PAGE]
    assert side.used == 1
    for segment in segments:
        side.bus.write(segment.address, b"\x77" * segment.length)
    assert (second == 0x77).all()
    assert (first == OURS).all()
    side.dma.sync_sg_for_cpu(segments, BIDIRECTIONAL)
    assert (first == 0x77).all()
    first[:] = 5
    side.dma.sync_sg_for_device(segments, BIDIRECTIONAL)
    assert side.bus.read(segments[0].address, 1) == b"\x05"
    side.dma.unmap_sg(segments, BIDIRECTIONAL)
    gpa = side.machine.memory.guest_page()
    address = side.dma.map_page(gpa, 16, 32, FROM_DEVICE)
    side.bus.write(address, b"x" * 64)
    side.dma.unmap_page(address, 32, FROM_DEVICE)
    assert bytes(side.machine.memory.view_guest(gpa, 64)) == bytes(16) + b"x" * 32 + bytes(16)
    assert side.used == 0


async def test_a_list_of_which_one_does_not_fit_maps_nothing(untrusted: MakeSide) -> None:
    side = await untrusted()
    _, small = side.memory(0, 9)
    _, large = side.memory(0, MAX_BOUNCE + 1)
    with pytest.raises(DmaMappingError) as raised:
        side.dma.map_sg([small, large], TO_DEVICE)
    assert raised.value.errno == errno.ENOMEM
    assert side.used == 0
    iova = side.dma.domain.iova
    assert iova is not None
    assert iova.stats().live == 0


async def test_an_exhausted_pool(untrusted: MakeSide) -> None:
    side = await untrusted()
    _, part = side.memory(1, MAX_BOUNCE - PAGE)
    count = side.machine.kernel.bounce_pool.size // MAX_BOUNCE
    addresses = [side.dma.map_single(part, TO_DEVICE) for _ in range(count)]
    with pytest.raises(DmaMappingError) as raised:
        side.dma.map_single(part, TO_DEVICE)
    assert raised.value.errno == errno.ENOMEM
    for address in addresses:
        side.dma.unmap_single(address, part.nbytes, TO_DEVICE)
    assert side.dma.map_single(part, TO_DEVICE)


@pytest.mark.parametrize(
    ("what", "shift", "size"),
    [
        ("more pages", 0, 3 * PAGE),
        ("fewer pages", 0, 300),
        ("its second page", PAGE, 300),
        ("inside its first page", 1, PAGE + 300),
    ],
)
async def test_a_wrong_unmap_changes_nothing(untrusted: MakeSide, what: str, shift: int, size: int) -> None:
    side = await untrusted()
    _, part = side.memory(0, PAGE + 300)
    address = side.dma.map_single(part, BIDIRECTIONAL)
    side.bus.write(address, b"\x77")
    with pytest.raises(DmaMappingError) as raised:
        side.dma.unmap_single(address + shift, size, BIDIRECTIONAL)
    assert raised.value.errno == errno.EINVAL
    assert (part == OURS).all()
    assert side.bus.read(address, 2) == bytes([0x77, OURS])
    side.dma.unmap_single(address, PAGE + 300, BIDIRECTIONAL)
    assert part[0] == 0x77


@pytest.mark.parametrize("kind", ["identity", "strict", "lazy"])
async def test_an_untrusted_device_makes_its_group_strict(emulated: Any, kind: str) -> None:
    machine = await emulated(driver=None, default_domain=kind)
    device = machine.kernel.devices[0]
    machine.kernel.bind(device, "testdev")
    if kind != "strict":
        with pytest.raises(DmaMappingError) as raised:
            DmaDevice(machine.kernel, device, untrusted=True)
        assert raised.value.errno == errno.EBUSY
        assert device.iommu_group.default_domain_kind == kind
        machine.kernel.bind(device, None)
    DmaDevice(machine.kernel, device, untrusted=True)
    assert device.iommu_group.default_domain_kind == "strict"


async def test_an_untrusted_device_stays_strict(untrusted: MakeSide) -> None:
    """Lazy would leave it a window into bounce buffers that are somebody else's by then."""
    side = await untrusted()
    group = side.machine.kernel.devices[0].iommu_group
    for kind in ("lazy", "identity"):
        with pytest.raises(VfioError) as raised:
            group.set_default_domain(kind)
        assert raised.value.errno == errno.EINVAL
    group.set_default_domain("strict")
    assert group.default_domain_kind == "strict"
    _, buffer = side.memory(64, 1000)
    address = side.dma.map_single(buffer, FROM_DEVICE)
    side.bus.write(address, b"in time")
    side.dma.unmap_single(address, 1000, FROM_DEVICE)
    with pytest.raises(DmaAborted):
        side.bus.write(address, b"too late")


async def test_a_slot_waits_for_the_flush_that_covers_it(untrusted: MakeSide) -> None:
    side = await untrusted()
    _, first = side.memory(64, 1000)
    _, second = side.memory(64, 1000)
    address = side.dma.map_single(first, FROM_DEVICE)
    side.bus.write(address, b"cached")
    for call in (lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST, lib.HVCALL_FLUSH_DEVICE_DOMAIN):
        side.machine.hypervisor.inject(call, lib.HV_STATUS_INSUFFICIENT_MEMORY, 1)
    side.dma.unmap_single(address, 1000, FROM_DEVICE)
    assert first[:6].tobytes() == b"cached"
    # No flush was made: the device still reaches the slot, which is nobody else's meanwhile.
    other = side.dma.map_single(second, TO_DEVICE)
    side.bus.write(address, b"stale!")
    assert side.bus.read(other, 6) == bytes([OURS]) * 6
    assert side.used == 2
    side.dma.unmap_single(other, 1000, TO_DEVICE)
    assert side.used == 0


async def test_a_default_domain_that_goes_gives_its_slots_back(untrusted: MakeSide) -> None:
    side = await untrusted("identity", untrusted=False)
    memory = side.machine.memory
    address = side.dma.map_single(memory.alloc(2 * PAGE, scattered=True), BIDIRECTIONAL)
    assert side.used == 1
    side.machine.kernel.devices[0].iommu_group.set_default_domain("strict")
    assert side.used == 0
    with pytest.raises(DmaMappingError) as raised:
        side.dma.unmap_single(address, 2 * PAGE, BIDIRECTIONAL)
    assert raised.value.errno == errno.EINVAL


async def test_identity_bounces_what_is_in_pieces(untrusted: MakeSide) -> None:
    side = await untrusted("identity", untrusted=False)
    buffer = side.machine.memory.alloc(5 * PAGE, scattered=True)
    buffer[:] = np.arange(5 * PAGE) * 3 % 256
    address = side.dma.map_single(buffer, BIDIRECTIONAL)
    assert side.bus.read(address, 5 * PAGE) == buffer.tobytes()
    side.bus.write(address + 4 * PAGE, b"written")
    side.dma.sync_single_for_cpu(address + 4 * PAGE, 4, BIDIRECTIONAL)
    assert buffer[4 * PAGE : 4 * PAGE + 7].tobytes() != b"written"
    side.dma.unmap_single(address, 5 * PAGE, BIDIRECTIONAL)
    assert buffer[4 * PAGE : 4 * PAGE + 7].tobytes() == b"written"
    assert side.used == 0
    large = side.machine.memory.alloc(MAX_BOUNCE + PAGE, scattered=True)
    with pytest.raises(DmaMappingError) as raised:
        side.dma.map_single(large, BIDIRECTIONAL)
    assert raised.value.errno == errno.ENOMEM


async def test_identity_out_of_reach(untrusted: MakeSide) -> None:
    side = await untrusted("identity", untrusted=False)
    kept = side.machine.memory.alloc(48 << 20)
    far = next(
        kept[at : at + PAGE]
        for at in range(0, kept.size, PAGE)
        if _gpa(side, kept[at : at + PAGE]) >= 1 << 24
    )
    pool = side.machine.kernel.bounce_pool
    side.dma.set_mask(24)
    if pool.last >= 1 << 24:
        with pytest.raises(DmaMappingError) as raised:
            side.dma.map_single(far, TO_DEVICE)
        assert raised.value.errno == errno.EIO
    else:
        assert side.dma.map_single(far, TO_DEVICE) < 1 << 24


def _gpa(side: Side, buffer: Any) -> int:
    gpa: int = side.machine.memory.runs(buffer.vaddr, buffer.nbytes)[0][0]
    return gpa


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3 * PAGE), st.integers(0, 255)), max_size=40))
def test_a_pool_against_a_model(operations: list[tuple[int, int, int]]) -> None:
    pool = BouncePool(GuestMemory(4 << 20), 128 << 10)
    memory = GuestMemory(2 << 20)
    held: list[tuple[Any, Any, bytes]] = []
    for kind, size, value in operations:
        if kind and held:
            bounce, data, shadow = held.pop(value % len(held))
            assert data.tobytes() == shadow
            data[:] = 0
            bounce.to_cpu()
            assert data.tobytes() == shadow
            pool.give(bounce)
            continue
        data = np.asarray(memory.alloc(size))
        data[:] = value
        try:
            bounce = pool.take(data)
        except OSError:
            continue
        for other, _, _ in held:
            assert bounce.gpa + bounce.whole <= other.gpa or other.gpa + other.whole <= bounce.gpa
        held.append((bounce, data, data.tobytes()))
    assert pool.used == len(held)
