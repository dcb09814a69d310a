"""The DMA API against the real IOMMU: what a mapping lets a device do, and what is left of it afterwards."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.guest.dma_api import DMA_ATTR_SKIP_CPU_SYNC, Direction, DmaDevice, DmaMappingError, DmaSegment
from pvfio.guest.dma_domain import DmaDomain
from pvfio.host import IommuConfig
from pvfio.memory import GuestMemory
from pvfio.silicon import BusMaster, DmaAborted

pytestmark = pytest.mark.touches_c

PAGE = 4096
KINDS = ["identity", "strict", "lazy"]
TRANSLATED = ["strict", "lazy"]
BIDIRECTIONAL, TO_DEVICE, FROM_DEVICE, NONE = Direction
FLUSHES = (lib.HVCALL_FLUSH_DEVICE_DOMAIN, lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST)


class Driver(NamedTuple):
    """A kernel driver's view: its device's DMA side, and the device itself."""

    machine: Any
    dma: DmaDevice
    bus: BusMaster

    @property
    def memory(self) -> GuestMemory:
        memory: GuestMemory = self.machine.memory
        return memory

    def held(self) -> tuple[int, int]:
        stats = self.memory.stats()
        return stats.pins, stats.table_pages


MakeDriver = Callable[..., Awaitable[Driver]]


@pytest.fixture
def driver(emulated: Any) -> MakeDriver:
    """``await driver("strict", mask_bits=64, untrusted=False, config=IommuConfig())``."""

    async def make(kind: str, *, config: IommuConfig | None = None, **side: Any) -> Driver:
        machine = await emulated(driver=None, default_domain=kind, config=config)
        device = machine.kernel.devices[0]
        device.enable()
        dma = DmaDevice(machine.kernel, device, **side)
        machine.kernel.bind(device, "testdev")
        return Driver(machine, dma, machine.functions[0].bus)

    return make


def aborts() -> Any:
    return pytest.raises(DmaAborted)


def refused(number: int) -> Any:
    return pytest.raises(DmaMappingError, match=f": {errno.errorcode[number]}: ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", [BIDIRECTIONAL, TO_DEVICE, FROM_DEVICE])
async def test_a_device_may_do_what_the_direction_says(
    driver: MakeDriver, kind: str, direction: Direction
) -> None:
    machine, dma, bus = await driver(kind)
    buffer = machine.memory.alloc(3 * PAGE)
    buffer[:] = np.arange(buffer.size) % 251
    part = buffer[100:9000]
    address = dma.map_single(part, direction)
    assert address % PAGE == 100
    assert bus.read(address, part.nbytes) == part.tobytes()
    if direction is TO_DEVICE and kind != "identity":
        with aborts():
            bus.write(address, b"no")
    else:
        bus.write(address + 5, b"written")
        assert part[5:12].tobytes() == b"written"
    dma.unmap_single(address, part.nbytes, direction)
    if kind == "strict":
        with aborts():
            bus.read(address, 1)


@pytest.mark.parametrize("kind", TRANSLATED)
async def test_addresses_are_below_the_interrupt_window_or_above_and_not_zero(
    driver: MakeDriver, kind: str
) -> None:
    _, dma, _ = side = await driver(kind)
    buffer = side.memory.alloc(1 << 20)
    addresses = [dma.map_single(buffer, TO_DEVICE) for _ in range(64)]
    assert all(address % (1 << 20) == 0 and address for address in addresses)
    assert 0xFEE0_0000 not in addresses
    assert len(set(addresses)) == 64
    assert all(address < 1 << 32 for address in addresses)


@pytest.mark.parametrize("bits", [32, 48, 57])
@pytest.mark.parametrize("five_level", [False, True])
async def test_masks(driver: MakeDriver, bits: int, five_level: bool) -> None:
    config = IommuConfig(five_level=five_level, max_iova_width=57 if five_level else 48)
    _, dma, bus = side = await driver("strict", mask_bits=bits, config=config)
    buffer = side.memory.alloc(4 << 20)
    # 4 MiB each: below 4 GiB there is room for 1024, less the first, with page 0, and the window's.
    most = 1100
    fit = 1022 if bits == 32 else most
    addresses = [dma.map_single(buffer, TO_DEVICE) for _ in range(fit)]
    if bits == 32:
        with refused(errno.ENOMEM):
            dma.map_single(buffer, TO_DEVICE)
    width = min(bits, 57 if five_level else 48)
    assert max(addresses) < 1 << width
    assert max(addresses) >> 32 == (0 if bits == 32 else (1 << (width - 32)) - 1)
    assert len(set(addresses)) == fit
    assert bus.read(max(addresses), 4) == bytes(4)
    for address in addresses:
        dma.unmap_single(address, buffer.nbytes, TO_DEVICE)
    assert dma.map_single(buffer, TO_DEVICE) in addresses


@pytest.mark.parametrize(
    ("kind", "bits", "works"),
    [
        ("identity", 64, True),
        ("identity", 32, True),
        ("identity", 26, True),
        ("identity", 24, True),
        ("identity", 23, False),
        ("identity", 11, False),
        ("strict", 24, True),
        ("strict", 12, True),
        ("strict", 11, False),
        ("strict", 65, False),
        ("strict", 0, False),
        ("lazy", -1, False),
    ],
)
async def test_set_mask(driver: MakeDriver, kind: str, bits: int, works: bool) -> None:
    _, dma, _ = side = await driver(kind)
    if works:
        dma.set_mask(bits)
        return
    with refused(errno.EIO):
        dma.set_mask(bits)
    assert dma.map_single(side.memory.alloc(PAGE), TO_DEVICE) >= 0
    with refused(errno.EIO):
        DmaDevice(side.machine.kernel, dma.device, mask_bits=bits)


async def test_a_mask_without_a_page_maps_nothing(driver: MakeDriver) -> None:
    _, dma, _ = side = await driver("strict", mask_bits=12)
    with refused(errno.ENOMEM):
        dma.map_single(side.memory.alloc(PAGE), TO_DEVICE)
    dma.set_mask(13)
    assert dma.map_single(side.memory.alloc(PAGE), TO_DEVICE) == PAGE


@pytest.mark.parametrize("kind", TRANSLATED)
async def test_nothing_is_left_of_what_is_unmapped(driver: MakeDriver, kind: str) -> None:
    _, dma, _ = side = await driver(kind)
    before = side.held()
    buffers = [side.memory.alloc(size) for size in (1, PAGE, 70 * PAGE, 3 << 20)]
    buffers.append(side.memory.alloc(40 * PAGE, scattered=True))
    mapped = [(dma.map_single(buffer, FROM_DEVICE), buffer.nbytes) for buffer in buffers]
    assert side.memory.stats().pins == before[0] + 5
    for address, size in mapped:
        dma.unmap_single(address, size, FROM_DEVICE)
    assert dma.domain.flush()
    assert side.held() == before
    assert dma.domain.iova is not None
    assert dma.domain.iova.stats().live == 0


async def test_a_mapped_buffer_outlives_its_array(driver: MakeDriver) -> None:
    _, dma, bus = side = await driver("strict")
    extents = side.memory.stats().extents
    buffer = side.memory.alloc(PAGE)
    buffer[:4] = 9
    address = dma.map_single(buffer, TO_DEVICE)
    del buffer
    assert side.memory.stats().extents == extents + 1
    assert bus.read(address, 4) == bytes([9] * 4)
    dma.unmap_single(address, PAGE, TO_DEVICE)
    assert side.memory.stats().extents == extents


BAD_MAPS: list[tuple[str, Any, Any, int]] = [
    ("no bytes", lambda memory: memory.alloc(PAGE)[:0], TO_DEVICE, errno.EINVAL),
    ("no direction", lambda memory: memory.alloc(PAGE), NONE, errno.EINVAL),
    ("direction 4", lambda memory: memory.alloc(PAGE), 4, errno.EINVAL),
    ("direction -1", lambda memory: memory.alloc(PAGE), -1, errno.EINVAL),
    ("every second byte", lambda memory: memory.alloc(PAGE)[::2], TO_DEVICE, errno.EINVAL),
    ("a copy", lambda memory: memory.alloc(PAGE).copy(), TO_DEVICE, errno.EFAULT),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "make", "direction", "number"), BAD_MAPS, ids=[row[0] for row in BAD_MAPS])
async def test_what_map_single_refuses(
    driver: MakeDriver, kind: str, what: str, make: Any, direction: int, number: int
) -> None:
    _, dma, _ = side = await driver(kind)
    buffer = make(side.memory)
    before = side.held()
    with pytest.raises(DmaMappingError) as raised:
        dma.map_single(buffer, direction)
    error = raised.value
    assert (error.device, error.errno) == (dma.name, number)
    with refused(number):
        dma.map_sg([side.memory.alloc(PAGE), buffer], direction)
    assert side.held() == before


BAD_UNMAPS = [
    ("never mapped", 0x5000_0000, PAGE, TO_DEVICE),
    ("fewer pages", 0, PAGE, TO_DEVICE),
    ("more pages", 0, 3 * PAGE, TO_DEVICE),
    ("from the second page", PAGE, PAGE, TO_DEVICE),
    ("no bytes", 0, 0, TO_DEVICE),
    ("negative bytes", 0, -PAGE, TO_DEVICE),
    ("too many bytes", 0, 1 << 70, TO_DEVICE),
    ("no direction", 0, 2 * PAGE, NONE),
    ("no address", -(1 << 40), PAGE, TO_DEVICE),
    ("no such address", 1 << 70, PAGE, TO_DEVICE),
]


@pytest.mark.parametrize("kind", TRANSLATED)
@pytest.mark.parametrize(
    ("what", "offset", "size", "direction"), BAD_UNMAPS, ids=[row[0] for row in BAD_UNMAPS]
)
async def test_what_unmap_refuses(
    driver: MakeDriver, kind: str, what: str, offset: int, size: int, direction: int
) -> None:
    _, dma, bus = side = await driver(kind)
    buffer = side.memory.alloc(2 * PAGE)
    address = dma.map_single(buffer, TO_DEVICE)
    with refused(errno.EINVAL):
        dma.unmap_single(address + offset, size, direction)
    bus.read(address, 2 * PAGE)
    dma.unmap_single(address, 2 * PAGE, TO_DEVICE)
    for _ in range(2):
        with refused(errno.EINVAL):
            dma.unmap_single(address, 2 * PAGE, TO_DEVICE)


@pytest.mark.parametrize("kind", TRANSLATED)
async def test_sync_of_what_is_not_mapped(driver: MakeDriver, kind: str) -> None:
    _, dma, _ = side = await driver(kind)
    address = dma.map_single(side.memory.alloc(PAGE), BIDIRECTIONAL)
    dma.sync_single_for_cpu(address, PAGE, BIDIRECTIONAL)
    dma.sync_single_for_device(address + 100, 8, BIDIRECTIONAL)
    for bad in (address, -1, 1 << 64, 0x1000):
        if bad == address:
            for direction, size in ((NONE, PAGE), (BIDIRECTIONAL, 0)):
                with refused(errno.EINVAL):
                    dma.sync_single_for_cpu(address, size, direction)
        else:
            with refused(errno.EINVAL):
                dma.sync_single_for_device(bad, PAGE, BIDIRECTIONAL)
    dma.unmap_single(address, PAGE, BIDIRECTIONAL)
    with refused(errno.EINVAL):
        dma.sync_single_for_cpu(address, PAGE, BIDIRECTIONAL)


@pytest.mark.parametrize("kind", KINDS)
async def test_map_page(driver: MakeDriver, kind: str) -> None:
    _, dma, bus = side = await driver(kind)
    gpa = side.memory.guest_page()
    address = dma.map_page(gpa, 0x123, 8, FROM_DEVICE)
    assert address & 0xFFF == 0x123
    bus.write(address, b"by a gpa")
    assert bytes(side.memory.view_guest(gpa + 0x123, 8)) == b"by a gpa"
    dma.unmap_page(address, 8, FROM_DEVICE)
    for bad_gpa, offset, size, number in (
        (gpa + 1, 0, 8, errno.EINVAL),
        (-PAGE, 0, 8, errno.EINVAL),
        (gpa, -1, 8, errno.EINVAL),
        (gpa, 0, 0, errno.EINVAL),
        (0xFEE0_0000, 0, 8, errno.EFAULT),
        (1 << 45, 0, 8, errno.EFAULT),
        (1 << 70, 0, 8, errno.EFAULT),
        ((1 << 64) - PAGE, 0, 2 * PAGE, errno.EFAULT),
        (gpa, 0, 1 << 40, errno.EFAULT),
    ):
        with refused(number):
            dma.map_page(bad_gpa, offset, size, FROM_DEVICE)


@pytest.mark.parametrize("kind", KINDS)
async def test_map_sg(driver: MakeDriver, kind: str) -> None:
    _, dma, bus = side = await driver(kind)
    before = side.held()
    buffer = side.memory.alloc(16 * PAGE)
    buffer[:] = np.arange(buffer.size) * 7 % 256
    entries: list[Any] = [
        buffer[: 2 * PAGE],
        buffer[8 * PAGE : 9 * PAGE],
        buffer[100:300],
        buffer[12 * PAGE :],
    ]
    segments = dma.map_sg(entries, BIDIRECTIONAL)
    seen = b"".join(bus.read(segment.address, segment.length) for segment in segments)
    assert seen == b"".join(entry.tobytes() for entry in entries)
    if kind == "identity":
        assert [segment.length for segment in segments] == [2 * PAGE, PAGE, 200, 4 * PAGE]
    else:
        # The third begins inside a page, the fourth follows one that ends inside a page.
        assert [segment.length for segment in segments] == [3 * PAGE, 200, 4 * PAGE]
    dma.sync_sg_for_cpu(segments, BIDIRECTIONAL)
    dma.sync_sg_for_device(segments, BIDIRECTIONAL)
    dma.unmap_sg(segments, BIDIRECTIONAL)
    assert dma.domain.flush()
    assert side.held() == before
    if kind != "identity":
        with aborts():
            bus.read(segments[0].address, 1)
        with refused(errno.EINVAL):
            dma.unmap_sg(segments, BIDIRECTIONAL)
    with refused(errno.EINVAL):
        dma.map_sg([], BIDIRECTIONAL)
    with refused(errno.EINVAL):
        dma.unmap_sg([], BIDIRECTIONAL)
    with refused(errno.EINVAL):
        dma.sync_sg_for_cpu([], BIDIRECTIONAL)


async def test_segments_end_at_max_segment(driver: MakeDriver) -> None:
    _, dma, _ = side = await driver("strict")
    pages = [side.memory.alloc(8 * PAGE) for _ in range(5)]
    assert [length for _, length in dma.map_sg(pages, TO_DEVICE)] == [16 * PAGE, 16 * PAGE, 8 * PAGE]
    dma.max_segment = 1 << 20
    ((address, length),) = dma.map_sg(pages, TO_DEVICE)
    assert length == 40 * PAGE
    # Another list than what was mapped is not what is mapped there.
    with refused(errno.EINVAL):
        dma.unmap_sg([DmaSegment(address, PAGE)], TO_DEVICE)


@pytest.mark.parametrize("kind", KINDS)
async def test_coherent_memory(driver: MakeDriver, kind: str) -> None:
    _, dma, bus = side = await driver(kind)
    before = side.held()
    buffer, address = dma.alloc_coherent(PAGE + 1)
    assert buffer.shape == (PAGE + 1,)
    assert not buffer.any()
    bus.write(address + PAGE, b"x")
    assert buffer[PAGE] == ord("x")
    buffer[0] = 77
    assert bus.read(address, 1) == b"M"
    dma.free_coherent(buffer, address)
    if kind != "identity":
        with refused(errno.EINVAL):
            dma.free_coherent(buffer, address)
    del buffer
    assert dma.domain.flush()
    assert side.held() == before
    for size, number in ((0, errno.EINVAL), (-1, errno.EINVAL), (1 << 40, errno.ENOMEM)):
        with refused(number):
            dma.alloc_coherent(size)


@pytest.mark.parametrize("kind", TRANSLATED)
async def test_a_map_that_finds_no_table_page_leaves_nothing(driver: MakeDriver, kind: str) -> None:
    _, dma, bus = side = await driver(kind)
    memory = side.memory
    buffer = memory.alloc(600 * PAGE, scattered=True)
    assert dma.domain.iova is not None
    # Its IOVAs span two tables; there is a page for one, at most.
    taken = []
    while memory.stats().free_frames > 3:
        taken.append(memory.guest_page())
    with refused(errno.ENOMEM):
        dma.map_single(buffer, TO_DEVICE)
    for page in taken:
        memory.free_guest_page(page)
    assert dma.domain.flush()
    assert memory.stats().pins == 0
    assert dma.domain.iova.stats().live == 0
    address = dma.map_single(buffer, TO_DEVICE)
    assert bus.read(address + 599 * PAGE, 4) == bytes(4)


async def test_a_domain_exhausted_is_usable_again(driver: MakeDriver) -> None:
    _, dma, _ = side = await driver("lazy", mask_bits=20)
    page = side.memory.alloc(PAGE)
    # 256 pages less page 0.
    addresses = [dma.map_single(page, TO_DEVICE) for _ in range(255)]
    for _ in range(3):
        with refused(errno.ENOMEM):
            dma.map_single(page, TO_DEVICE)
    for address in addresses:
        dma.unmap_single(address, PAGE, TO_DEVICE)
    assert dma.domain.flush()
    assert sorted(dma.map_single(page, TO_DEVICE) for _ in range(255)) == sorted(addresses)


@pytest.mark.parametrize("a_list", [False, True])
async def test_refused_flushes_keep_the_range_until_one_succeeds(driver: MakeDriver, a_list: bool) -> None:
    machine, dma, bus = side = await driver("strict")
    hypervisor = machine.hypervisor
    buffer = side.memory.alloc(PAGE)
    ((address, _),) = segments = dma.map_sg([buffer], FROM_DEVICE)
    if not a_list:
        dma.unmap_sg(segments, FROM_DEVICE)
        assert dma.map_single(buffer, FROM_DEVICE) == address
    bus.write(address, b"cached")
    for call in FLUSHES:
        hypervisor.inject(call, lib.HV_STATUS_INSUFFICIENT_MEMORY, 1)
    dma.unmap_single(address, PAGE, FROM_DEVICE)
    assert side.memory.stats().pins == 1
    other = dma.map_single(side.memory.alloc(PAGE), FROM_DEVICE)
    assert other != address
    dma.unmap_single(other, PAGE, FROM_DEVICE)
    assert side.memory.stats().pins == 0
    with aborts():
        bus.write(address, b"no")
    assert {dma.map_single(buffer, FROM_DEVICE), dma.map_single(buffer, FROM_DEVICE)} == {address, other}


@pytest.mark.parametrize("kind", TRANSLATED)
async def test_a_group_that_goes_takes_its_mappings_along(driver: MakeDriver, kind: str) -> None:
    machine, dma, _ = side = await driver(kind)
    before = side.memory.stats()
    buffer = side.memory.alloc(PAGE)
    dma.map_single(buffer, TO_DEVICE)
    dma.map_sg([buffer, buffer], TO_DEVICE)
    assert side.memory.stats().pins == 3
    machine.kernel.remove_bus(machine.buses[0])
    assert side.memory.stats().pins == 0
    assert side.memory.stats().table_pages == before.table_pages - 1
    with refused(errno.ENODEV):
        dma.map_single(buffer, TO_DEVICE)
    with refused(errno.ENODEV):
        dma.map_sg([buffer], TO_DEVICE)
    for operation in (dma.unmap_single, dma.sync_single_for_cpu):
        with refused(errno.EINVAL):
            operation(0x1000, PAGE, TO_DEVICE)


async def test_the_kind_of_a_groups_default_domain(emulated: Any) -> None:
    machine = await emulated(driver=None)
    kernel = machine.kernel
    device = kernel.devices[0]
    device.enable()
    group = device.iommu_group
    pages = machine.memory.stats().table_pages
    for kind in ("strict", "identity", "lazy", "strict", "lazy", "identity"):
        group.set_default_domain(kind)
        assert group.default_domain_kind == kind
        assert group.domain is group.default_domain
        assert (group.domain is kernel.iommu.identity) == (kind == "identity")
    assert machine.memory.stats().table_pages == pages
    group.set_default_domain("strict")
    kernel.bind(device, "testdev")
    with pytest.raises(VfioError, match="EBUSY"):
        group.set_default_domain("identity")
    with pytest.raises(ValueError):
        group.set_default_domain("DMA")
    dma = DmaDevice(kernel, device)
    address = dma.map_single(machine.memory.alloc(PAGE), TO_DEVICE)
    group.set_default_domain("lazy")
    assert dma.domain.kind == "lazy"
    dma.unmap_single(address, PAGE, TO_DEVICE)
    with pytest.raises(VfioError, match="EBUSY"):
        group.set_default_domain("strict")
    kernel.bind(device, None)
    group.claim_dma_owner()
    with pytest.raises(VfioError, match="EBUSY"):
        group.set_default_domain("strict")
    group.release_dma_owner()
    assert group.domain is dma.domain.domain


async def test_a_default_domain_that_the_host_refuses_changes_nothing(emulated: Any) -> None:
    machine = await emulated(driver=None)
    group = machine.kernel.devices[0].iommu_group
    for call in (lib.HVCALL_CREATE_DEVICE_DOMAIN, lib.HVCALL_ATTACH_DEVICE_DOMAIN):
        machine.hypervisor.inject(call, lib.HV_STATUS_INSUFFICIENT_MEMORY, 1)
        with pytest.raises(OSError, match="ENOMEM"):
            group.set_default_domain("strict")
        assert group.default_domain_kind == "identity"
        assert group.domain is machine.kernel.iommu.identity


def test_a_machine_without_an_iommu_has_identity_only() -> None:
    memory = GuestMemory(8 << 20)
    assert DmaDomain(memory, None, "identity").map_buffer(memory.alloc(PAGE).vaddr, PAGE, 3, 1 << 40) >= 0
    with pytest.raises(OSError, match="ENODEV"):
        DmaDomain(memory, None, "strict")


@given(st.data())
def test_the_c_half_survives_any_arguments(data: st.DataObject) -> None:
    memory = GuestMemory(4 << 20)
    number = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, PAGE - 1, PAGE, (1 << 64) - 1]))
    vaddr, size, limit = (data.draw(number) for _ in range(3))
    assert lib.pv_dma_direct(memory.ptr, vaddr, size, limit) < 0
    buffer = memory.alloc(3 * PAGE)
    address = lib.pv_dma_direct(memory.ptr, buffer.vaddr + vaddr % (4 * PAGE), size % (4 * PAGE), limit)
    assert (address >= 0) <= (size % (4 * PAGE) > 0 and vaddr % (4 * PAGE) + size % (4 * PAGE) <= 3 * PAGE)
    assert ffi.sizeof("struct pv_iova_range") == 24


async def test_skip_cpu_sync_means_nothing_without_a_bounce(driver: MakeDriver) -> None:
    _, dma, bus = side = await driver("strict")
    buffer = side.memory.alloc(PAGE)
    address = dma.map_single(buffer, FROM_DEVICE, attrs=DMA_ATTR_SKIP_CPU_SYNC)
    bus.write(address, b"there")
    dma.unmap_single(address, PAGE, FROM_DEVICE, attrs=DMA_ATTR_SKIP_CPU_SYNC)
    assert buffer[:5].tobytes() == b"there"
