"""iommufd's requests, one mistake at a time: structures and their sizes, flags, objects, mappings, page tables."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.guest.type1 import Type1Limits
from pvfio.vfio import Ioas, Iommufd, IommufdDevice
from pvfio.vfio.ioas import EVERYTHING, address_of, command_of

pytestmark = pytest.mark.touches_c

PAGE = 4096
TOP = (1 << 64) - 1
READ, WRITE, FIXED = (
    lib.IOMMU_IOAS_MAP_READABLE,
    lib.IOMMU_IOAS_MAP_WRITEABLE,
    lib.IOMMU_IOAS_MAP_FIXED_IOVA,
)
RW = READ | WRITE
IOVA = 0x1000_0000
UNPINNABLE = 0x7000_0000_0000
APERTURE_END = 1 << 48
MSI = 0xFEE0_0000


@dataclass
class Bench:
    """An iommufd with an address space that a device is attached to, and one of 64 KiB that is mapped."""

    machine: Any
    iommufd: Iommufd
    device: IommufdDevice
    ioas: Ioas
    buffer: Any

    def ioctl(self, request: int, command: Any) -> Any:
        self.iommufd.file.ioctl(request, command)
        return command

    def free(self) -> Ioas:
        """An address space without a page table."""
        return self.iommufd.alloc_ioas()


@pytest.fixture
async def bench(emulated: Callable[..., Awaitable[Any]]) -> AsyncIterator[Bench]:
    machine = await emulated(buses=(1, 1), limits=Type1Limits(memlock=1 << 20))
    async with await machine.vfio.open_iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        async with await machine.vfio.bind_device(machine.names[0], iommufd) as device:
            await device.set_bus_master()
            device.attach(ioas)
            buffer = machine.memory.alloc(16 * PAGE)
            ioas.map(buffer, IOVA)
            yield Bench(machine, iommufd, device, ioas, buffer)
    assert machine.memory.stats().pins == 0


def refused(number: int) -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: ")


# Every row of the table of mistakes, with its errno.

MAPPINGS: list[tuple[str, int, dict[str, int]]] = [
    ("size 0", errno.EINVAL, {"length": 0}),
    ("iova + size wraps", errno.EOVERFLOW, {"iova": TOP - PAGE + 1, "length": 2 * PAGE}),
    ("vaddr + size wraps", errno.EOVERFLOW, {"user_va": TOP - PAGE + 1, "length": 2 * PAGE}),
    ("iova is 2^64 - 1", errno.EOVERFLOW, {"iova": TOP}),
    ("length is 2^64 - 1", errno.EOVERFLOW, {"length": TOP}),
    ("iova not aligned", errno.EINVAL, {"iova": 0x2000_0800}),
    ("size not aligned", errno.EINVAL, {"length": PAGE + 8}),
    ("vaddr not aligned", errno.EINVAL, {"user_va": 8}),
    ("neither read nor write", errno.EINVAL, {"flags": FIXED}),
    ("overlaps a mapping", errno.EEXIST, {"iova": IOVA + PAGE}),
    ("covers a mapping", errno.EEXIST, {"iova": IOVA - PAGE, "length": 32 * PAGE}),
    ("beyond the aperture", errno.EINVAL, {"iova": APERTURE_END}),
    ("half beyond the aperture", errno.EINVAL, {"iova": APERTURE_END - PAGE, "length": 2 * PAGE}),
    ("touches the MSI window", errno.EINVAL, {"iova": MSI - PAGE, "length": 2 * PAGE}),
    ("inside the MSI window", errno.EINVAL, {"iova": 0xFEEF_F000}),
    ("over RLIMIT_MEMLOCK", errno.ENOMEM, {"length": 1 << 20}),
    ("not pinnable memory", errno.EFAULT, {"user_va": UNPINNABLE}),
    ("unknown flags", errno.EOPNOTSUPP, {"flags": RW | FIXED | 8}),
    ("reserved word", errno.EOPNOTSUPP, {"__reserved": 1}),
    ("size of the structure too small", errno.EINVAL, {"size": 39}),
    ("no such address space", errno.ENOENT, {"ioas_id": 77}),
    # The order in which they are seen.
    ("flags before overflow", errno.EOPNOTSUPP, {"flags": 8, "iova": TOP}),
    ("overflow before permissions", errno.EOVERFLOW, {"flags": FIXED, "iova": TOP}),
    ("permissions before the object", errno.EINVAL, {"flags": FIXED, "ioas_id": 77}),
    ("reserved before overlap", errno.EINVAL, {"iova": IOVA, "length": APERTURE_END}),
    ("overlap before memory", errno.EEXIST, {"iova": IOVA, "user_va": UNPINNABLE}),
]


@pytest.mark.parametrize(("why", "number", "fields"), MAPPINGS, ids=[row[0] for row in MAPPINGS])
async def test_a_mapping_that_is_refused(bench: Bench, why: str, number: int, fields: dict[str, int]) -> None:
    buffer = bench.machine.memory.alloc(1 << 20)
    whole = {"flags": RW | FIXED, "ioas_id": bench.ioas.id, "user_va": buffer.vaddr, "length": PAGE}
    command = command_of("iommu_ioas_map", **(whole | {"iova": 0x2000_0000} | fields))
    if fields.get("user_va") == 8:
        command.user_va = buffer.vaddr + 8
    pins, locked = bench.machine.memory.stats().pins, bench.machine.kernel.vfio._user_account.locked
    with refused(number):
        bench.ioctl(lib.IOMMU_IOAS_MAP, command)
    assert (bench.machine.memory.stats().pins, bench.machine.kernel.vfio._user_account.locked) == (
        pins,
        locked,
    )
    bench.ioas.map(buffer[:PAGE], 0x2000_0000)


UNMAPS: list[tuple[str, int, tuple[int, int]]] = [
    ("would split at the end", errno.ENOENT, (IOVA, PAGE)),
    ("would split at the start", errno.ENOENT, (IOVA + PAGE, 32 * PAGE)),
    ("would split in the middle", errno.ENOENT, (IOVA + PAGE, PAGE)),
    ("finds nothing", errno.ENOENT, (0x7000_0000, PAGE)),
    ("size 0", errno.EINVAL, (IOVA, 0)),
    ("wraps", errno.EOVERFLOW, (TOP - PAGE + 1, 2 * PAGE)),
    ("iova is 2^64 - 1", errno.EOVERFLOW, (TOP, 1)),
    ("unmap-all with an iova", errno.EOVERFLOW, (PAGE, TOP)),
]


@pytest.mark.parametrize(("why", "number", "where"), UNMAPS, ids=[row[0] for row in UNMAPS])
async def test_an_unmap_that_is_refused(bench: Bench, why: str, number: int, where: tuple[int, int]) -> None:
    with refused(number):
        bench.ioas.unmap(*where)
    assert bench.ioas.unmap(IOVA, 16 * PAGE) == 16 * PAGE


async def test_unmap_takes_what_lies_inside(bench: Bench) -> None:
    other = bench.machine.memory.alloc(PAGE)
    bench.ioas.map(other, 0x3000_0000)
    assert bench.ioas.unmap(0, 1 << 40) == 17 * PAGE
    # Everything, of nothing, is no mistake.
    assert bench.ioas.unmap(0, EVERYTHING) == 0
    bench.ioas.map(other, 0x3000_0000)
    assert bench.ioas.unmap(0, EVERYTHING) == PAGE


async def test_what_lies_before_a_split_is_gone(bench: Bench) -> None:
    other = bench.machine.memory.alloc(PAGE)
    bench.ioas.map(other, IOVA - PAGE)
    with refused(errno.ENOENT):
        bench.ioas.unmap(IOVA - PAGE, 2 * PAGE)
    assert bench.ioas.map(other, IOVA - PAGE) == IOVA - PAGE


SIZES = [
    (lib.IOMMU_DESTROY, "iommu_destroy", 8),
    (lib.IOMMU_IOAS_ALLOC, "iommu_ioas_alloc", 12),
    (lib.IOMMU_IOAS_ALLOW_IOVAS, "iommu_ioas_allow_iovas", 24),
    (lib.IOMMU_IOAS_COPY, "iommu_ioas_copy", 40),
    (lib.IOMMU_IOAS_IOVA_RANGES, "iommu_ioas_iova_ranges", 32),
    (lib.IOMMU_IOAS_MAP, "iommu_ioas_map", 40),
    (lib.IOMMU_IOAS_UNMAP, "iommu_ioas_unmap", 24),
    (lib.IOMMU_OPTION, "iommu_option", 24),
    (lib.IOMMU_HWPT_ALLOC, "iommu_hwpt_alloc", 24),
    (lib.IOMMU_GET_HW_INFO, "iommu_hw_info", 32),
    (lib.IOMMU_HWPT_SET_DIRTY_TRACKING, "iommu_hwpt_set_dirty_tracking", 16),
    (lib.IOMMU_HWPT_GET_DIRTY_BITMAP, "iommu_hwpt_get_dirty_bitmap", 48),
    (lib.IOMMU_HWPT_INVALIDATE, "iommu_hwpt_invalidate", 32),
]


@pytest.mark.parametrize(("request_number", "struct", "least"), SIZES, ids=[row[1] for row in SIZES])
async def test_sizes_of_structures(bench: Bench, request_number: int, struct: str, least: int) -> None:
    memory = ffi.new("uint32_t[]", 64)
    for size in (0, 4, least - 1):
        memory[0] = size
        with refused(errno.EINVAL):
            bench.ioctl(request_number, memory)
    # A newer program's structure: what is not known here must be zero.
    memory[0] = 256
    memory[63] = 1
    with refused(errno.E2BIG):
        bench.ioctl(request_number, memory)
    with refused(errno.EFAULT):
        bench.ioctl(request_number, 0)
    with refused(errno.EFAULT):
        bench.ioctl(request_number, ffi.NULL)


async def test_a_longer_structure_that_ends_in_zeros(bench: Bench) -> None:
    memory = ffi.new("uint32_t[]", 64)
    memory[0] = 256
    bench.ioctl(lib.IOMMU_IOAS_ALLOC, memory)
    bench.iommufd.destroy(memory[2])


async def test_unknown_requests(bench: Bench) -> None:
    for request in (0, 0x3B88, 0x3B8E, 0x3B65, 0x3BFF):
        with refused(errno.ENOTTY):
            bench.ioctl(request, ffi.new("uint32_t[]", 16))


ZEROES = [
    (lib.IOMMU_IOAS_ALLOC, "iommu_ioas_alloc", {"flags": 1}),
    (lib.IOMMU_IOAS_IOVA_RANGES, "iommu_ioas_iova_ranges", {"__reserved": 1}),
    (lib.IOMMU_IOAS_ALLOW_IOVAS, "iommu_ioas_allow_iovas", {"__reserved": 1}),
    (lib.IOMMU_IOAS_COPY, "iommu_ioas_copy", {"flags": 8}),
    (lib.IOMMU_OPTION, "iommu_option", {"__reserved": 1, "op": 1}),
    (lib.IOMMU_OPTION, "iommu_option", {"option_id": 7}),
    (lib.IOMMU_OPTION, "iommu_option", {"op": 7}),
    (lib.IOMMU_OPTION, "iommu_option", {"op": 1, "object_id": 1}),
    (lib.IOMMU_HWPT_ALLOC, "iommu_hwpt_alloc", {"__reserved": 1}),
    (lib.IOMMU_HWPT_ALLOC, "iommu_hwpt_alloc", {"__reserved2": 1}),
    (lib.IOMMU_GET_HW_INFO, "iommu_hw_info", {"flags": 1}),
    (lib.IOMMU_GET_HW_INFO, "iommu_hw_info", {"__reserved": 1}),
    (lib.IOMMU_HWPT_SET_DIRTY_TRACKING, "iommu_hwpt_set_dirty_tracking", {"flags": 2}),
    (lib.IOMMU_HWPT_GET_DIRTY_BITMAP, "iommu_hwpt_get_dirty_bitmap", {"flags": 2}),
    (lib.IOMMU_HWPT_GET_DIRTY_BITMAP, "iommu_hwpt_get_dirty_bitmap", {"__reserved": 1}),
    (lib.IOMMU_HWPT_INVALIDATE, "iommu_hwpt_invalidate", {"__reserved": 1}),
]


@pytest.mark.parametrize(("request_number", "struct", "fields"), ZEROES, ids=lambda value: str(value))
async def test_unknown_flags_and_reserved_words(
    bench: Bench, request_number: int, struct: str, fields: dict[str, int]
) -> None:
    with refused(errno.EOPNOTSUPP):
        bench.ioctl(request_number, command_of(struct, **fields))


UNKNOWN_IDS = [
    (lib.IOMMU_DESTROY, "iommu_destroy", {"id": 77}, errno.ENOENT),
    (lib.IOMMU_IOAS_ALLOW_IOVAS, "iommu_ioas_allow_iovas", {"ioas_id": 77}, errno.ENOENT),
    (lib.IOMMU_IOAS_IOVA_RANGES, "iommu_ioas_iova_ranges", {"ioas_id": 77}, errno.ENOENT),
    (lib.IOMMU_IOAS_UNMAP, "iommu_ioas_unmap", {"ioas_id": 77, "length": PAGE}, errno.ENOENT),
    (lib.IOMMU_IOAS_COPY, "iommu_ioas_copy", {"flags": RW, "src_ioas_id": 77, "length": PAGE}, errno.ENOENT),
    (lib.IOMMU_OPTION, "iommu_option", {"option_id": 1, "object_id": 77}, errno.ENOENT),
    (lib.IOMMU_HWPT_ALLOC, "iommu_hwpt_alloc", {"dev_id": 77, "pt_id": 1}, errno.ENOENT),
    (lib.IOMMU_HWPT_ALLOC, "iommu_hwpt_alloc", {"dev_id": 2, "pt_id": 77}, errno.EINVAL),
    (lib.IOMMU_GET_HW_INFO, "iommu_hw_info", {"dev_id": 77}, errno.ENOENT),
    (lib.IOMMU_HWPT_SET_DIRTY_TRACKING, "iommu_hwpt_set_dirty_tracking", {"hwpt_id": 1}, errno.ENOENT),
    (lib.IOMMU_HWPT_GET_DIRTY_BITMAP, "iommu_hwpt_get_dirty_bitmap", {"hwpt_id": 1}, errno.ENOENT),
    (lib.IOMMU_HWPT_INVALIDATE, "iommu_hwpt_invalidate", {"hwpt_id": 77}, errno.ENOENT),
    (lib.IOMMU_HWPT_INVALIDATE, "iommu_hwpt_invalidate", {"hwpt_id": 1}, errno.EINVAL),
]


@pytest.mark.parametrize(("request_number", "struct", "fields", "number"), UNKNOWN_IDS, ids=lambda v: str(v))
async def test_objects_that_are_not_there(
    bench: Bench, request_number: int, struct: str, fields: dict[str, int], number: int
) -> None:
    assert (bench.ioas.id, bench.device.id) == (1, 2)
    with refused(number):
        bench.ioctl(request_number, command_of(struct, **fields))


async def test_numbers_and_lifetimes_of_objects(bench: Bench) -> None:
    first, second = bench.free(), bench.free()
    assert second.id == first.id + 1
    first.destroy()
    assert bench.free().id == first.id
    for busy in (bench.ioas.id, bench.device.id, 3):
        with refused(errno.EBUSY):
            bench.iommufd.destroy(busy)
    bench.device.detach()
    # The page table that the attach made went with it.
    with refused(errno.ENOENT):
        bench.iommufd.destroy(3)
    bench.ioas.destroy()
    assert bench.machine.memory.stats().pins == 0
    with refused(errno.ENOENT):
        bench.ioas.unmap(0, EVERYTHING)


async def test_iova_ranges_follow_the_devices(bench: Bench) -> None:
    narrow = ((0, MSI - 1), (0xFEF0_0000, APERTURE_END - 1))
    assert bench.ioas.iova_ranges() == narrow
    assert bench.ioas.alignment == PAGE
    bench.device.detach()
    assert bench.ioas.iova_ranges() == ((0, TOP),)
    assert bench.ioas.alignment == 1
    hwpt = bench.iommufd.alloc_hwpt(bench.device, bench.ioas)
    # A page table brings its aperture, a device its reserved regions.
    assert bench.ioas.iova_ranges() == ((0, APERTURE_END - 1),)
    bench.device.attach(hwpt)
    assert bench.ioas.iova_ranges() == narrow


async def test_iova_ranges_without_room(bench: Bench) -> None:
    listed = ffi.new("struct iommu_iova_range[2]")
    command = command_of(
        "iommu_ioas_iova_ranges", ioas_id=bench.ioas.id, num_iovas=1, allowed_iovas=address_of(listed)
    )
    with refused(errno.EMSGSIZE):
        bench.ioctl(lib.IOMMU_IOAS_IOVA_RANGES, command)
    assert (command.num_iovas, command.out_iova_alignment) == (2, PAGE)
    assert (listed[0].start, listed[0].last, listed[1].last) == (0, MSI - 1, 0)
    command.allowed_iovas = 8
    with refused(errno.EFAULT):
        bench.ioctl(lib.IOMMU_IOAS_IOVA_RANGES, command)


ALLOWED: list[tuple[int, list[tuple[int, int]]]] = [
    (errno.EINVAL, [(5, 5)]),
    (errno.EINVAL, [(5, 4)]),
    (errno.EINVAL, [(0, 0xFFFF), (0xFFFF, 0x1FFFF)]),
    (errno.EADDRINUSE, [(0, 0xFFFF_FFFF)]),
    (errno.EADDRINUSE, [(0, 0xFFFF), (1 << 48, 1 << 49)]),
]


@pytest.mark.parametrize(("number", "ranges"), ALLOWED)
async def test_allowed_iovas_that_cannot_be(bench: Bench, number: int, ranges: list[tuple[int, int]]) -> None:
    bench.ioas.allow_iovas([(0x4000_0000, 0x4000_FFFF)])
    with refused(number):
        bench.ioas.allow_iovas(ranges)
    # The old list stands.
    assert bench.ioas.map(bench.buffer) == 0x4000_0000


async def test_allowed_iovas_are_where_the_kernel_places_mappings(bench: Bench) -> None:
    bench.ioas.allow_iovas([(0x4000_0000, 0x4000_0000 + 16 * PAGE - 1), (0x5000_0000, 0x5FFF_FFFF)])
    assert bench.ioas.map(bench.buffer) == 0x4000_0000
    assert bench.ioas.map(bench.buffer) == 0x5000_0000
    # A fixed one may be anywhere.
    assert bench.ioas.map(bench.buffer, 0x6000_0000) == 0x6000_0000
    bench.ioas.allow_iovas([(0x4000_0000, 0x4000_0FFF)])
    with refused(errno.ENOSPC):
        bench.ioas.map(bench.buffer)
    bench.ioas.allow_iovas([])
    bench.ioas.map(bench.buffer)


async def test_no_attach_narrows_what_is_allowed(bench: Bench) -> None:
    for ranges in ([(MSI, MSI + 1)], [(0, APERTURE_END)]):
        ioas = bench.free()
        ioas.allow_iovas(ranges)
        with refused(errno.EADDRINUSE):
            bench.device.attach(ioas)
        assert bench.device.container is bench.ioas
        ioas.destroy()


ATTACH_CONFLICTS = [
    ("in the MSI window", MSI + PAGE, PAGE, 0, errno.EADDRINUSE),
    ("beyond the aperture", APERTURE_END, PAGE, 0, errno.EADDRINUSE),
    ("not aligned", 0x2000_0001, 17, 0, errno.EADDRINUSE),
    ("not pinnable", 0x2000_0000, PAGE, UNPINNABLE, errno.EFAULT),
    ("over the limit", 0x2000_0000, (1 << 20) + PAGE, 0, errno.ENOMEM),
]


@pytest.mark.parametrize(("why", "iova", "length", "vaddr", "number"), ATTACH_CONFLICTS)
async def test_a_book_that_no_device_can_have(
    bench: Bench, why: str, iova: int, length: int, vaddr: int, number: int
) -> None:
    """Without a page table an address space takes everything; the attach sees what cannot be."""
    big = bench.machine.memory.alloc(2 << 20)
    ioas = bench.free()
    where = vaddr or big.vaddr
    command = command_of(
        "iommu_ioas_map", flags=RW | FIXED, ioas_id=ioas.id, user_va=where, length=length, iova=iova
    )
    bench.ioctl(lib.IOMMU_IOAS_MAP, command)
    pins = bench.machine.memory.stats().pins
    with refused(number):
        bench.device.attach(ioas)
    assert bench.machine.memory.stats().pins == pins
    assert ioas.iova_ranges() == ((0, TOP),)
    ioas.destroy()
    # The device is where it was.
    assert bench.machine.functions[0].bus.read(IOVA, 4) == bytes(4)


async def test_where_the_kernel_places_mappings(bench: Bench) -> None:
    ioas = bench.free()
    huge = bench.machine.memory.alloc(2 << 20, align=2 << 20)
    first = ioas.map(huge[:PAGE])
    assert first == PAGE
    placed = ioas.map(huge)
    assert placed % (2 << 20) == 0
    command = command_of("iommu_ioas_map", flags=RW, ioas_id=ioas.id, user_va=huge.vaddr + 0x123, length=0x10)
    bench.ioctl(lib.IOMMU_IOAS_MAP, command)
    assert command.iova % PAGE == 0x123
    command = command_of("iommu_ioas_map", flags=RW, ioas_id=ioas.id, length=1 << 63)
    with refused(errno.EOVERFLOW):
        bench.ioctl(lib.IOMMU_IOAS_MAP, command)


async def test_a_book_keeps_the_buffers_of_a_batch(bench: Bench) -> None:
    """Nothing pins them yet: whoever got their memory next would be in the page table that comes."""
    ioas = bench.free()
    buffers = [bench.machine.memory.alloc(PAGE) for _ in range(4)]
    mapped = [buffer.vaddr for buffer in buffers]
    ioas.map_dma_batch_nowait([IOVA + at * PAGE for at in range(4)], buffers)
    del buffers
    others = [bench.machine.memory.alloc(PAGE) for _ in range(4)]
    assert not {buffer.vaddr for buffer in others} & set(mapped)
    del others
    ioas.unmap_dma_batch_nowait([IOVA + at * PAGE for at in range(4)], PAGE)
    others = [bench.machine.memory.alloc(PAGE) for _ in range(4)]
    assert {buffer.vaddr for buffer in others} & set(mapped)


async def test_a_copy_shares_pages_and_account(bench: Bench) -> None:
    account = bench.machine.kernel.vfio._user_account
    pins, locked = bench.machine.memory.stats().pins, account.locked
    assert locked == 16 * PAGE
    assert bench.ioas.copy(bench.ioas, IOVA + PAGE, 4 * PAGE, 0x2000_0000) == 0x2000_0000
    assert (bench.machine.memory.stats().pins, account.locked) == (pins, locked)
    bus = bench.machine.functions[0].bus
    bus.write(0x2000_0000, b"copied")
    assert bytes(bench.buffer[PAGE : PAGE + 6]) == b"copied"
    # The copy keeps the pages.
    bench.ioas.unmap(IOVA, 16 * PAGE)
    bus.write(0x2000_0000, b"again!")
    assert bytes(bench.buffer[PAGE : PAGE + 6]) == b"again!"
    assert account.locked == locked
    bench.ioas.unmap(0x2000_0000, 4 * PAGE)
    assert (account.locked, bench.machine.memory.stats().pins) == (0, 0)


async def test_a_copy_of_several_mappings(bench: Bench) -> None:
    bench.buffer[:] = 7
    other = bench.machine.memory.alloc(2 * PAGE)
    other[:] = 9
    bench.ioas.map(other, IOVA + 16 * PAGE)
    target = bench.free()
    at = target.copy(bench.ioas, IOVA + 15 * PAGE, 2 * PAGE)
    bench.device.attach(target)
    data = bench.machine.functions[0].bus.read(at, 2 * PAGE)
    assert data == bytes([7]) * PAGE + bytes([9]) * PAGE
    assert target.unmap(at, 2 * PAGE) == 2 * PAGE


COPIES: list[tuple[str, int, dict[str, int]]] = [
    ("a hole", errno.ENOENT, {"src_iova": IOVA + PAGE, "length": 16 * PAGE}),
    ("nothing", errno.ENOENT, {"src_iova": 0x9000_0000}),
    ("length 0", errno.EINVAL, {"length": 0}),
    ("source wraps", errno.EOVERFLOW, {"src_iova": TOP - PAGE + 1, "length": 2 * PAGE}),
    ("2^64 - 1", errno.EOVERFLOW, {"dst_iova": TOP}),
    ("no permission", errno.EINVAL, {"flags": FIXED}),
    ("unknown target", errno.ENOENT, {"dst_ioas_id": 77}),
    ("overlap", errno.EEXIST, {"dst_iova": IOVA}),
    ("reserved", errno.EINVAL, {"dst_iova": MSI}),
    ("not aligned", errno.EINVAL, {"dst_iova": 0x2000_0010}),
    ("write to what was mapped for reading", errno.EPERM, {"src_iova": 0x3000_0000}),
]


@pytest.mark.parametrize(("why", "number", "fields"), COPIES, ids=[row[0] for row in COPIES])
async def test_a_copy_that_is_refused(bench: Bench, why: str, number: int, fields: dict[str, int]) -> None:
    bench.ioas.map(bench.machine.memory.alloc(PAGE), 0x3000_0000, write=False)
    whole = {"flags": RW | FIXED, "dst_ioas_id": 1, "src_ioas_id": 1, "length": PAGE, "dst_iova": 0x2000_0000}
    with refused(number):
        bench.ioctl(
            lib.IOMMU_IOAS_COPY, command_of("iommu_ioas_copy", **(whole | {"src_iova": IOVA} | fields))
        )
    bench.ioas.unmap(0, EVERYTHING)
    assert bench.machine.memory.stats().pins == 0


async def test_huge_pages_option(bench: Bench) -> None:
    option = lib.IOMMU_OPTION_HUGE_PAGES
    assert bench.iommufd.option(option, object_id=1) == 1
    with refused(errno.EINVAL):
        bench.iommufd.option(option, object_id=1, value=2)
    with refused(errno.EINVAL):
        bench.iommufd.option(option, object_id=1, value=0)
    ioas = bench.free()
    assert bench.iommufd.option(option, object_id=ioas.id, value=0) == 0
    assert ioas.alignment == PAGE
    large = bench.machine.memory.alloc(1 << 19, align=2 << 20)
    ioas.map(large, 0x20_0000)
    bench.device.attach(ioas)
    carrier = bench.machine.kernel.devices[0].iommu_group.domain
    assert carrier.walk(0x20_0000)[-1].size == PAGE
    unaligned = bench.free()
    bench.ioctl(
        lib.IOMMU_IOAS_MAP,
        command_of("iommu_ioas_map", flags=RW | FIXED, ioas_id=unaligned.id, user_va=1, length=1, iova=1),
    )
    with refused(errno.EADDRINUSE):
        bench.iommufd.option(option, object_id=unaligned.id, value=0)


async def test_rlimit_mode_option(emulated: Callable[..., Awaitable[Any]]) -> None:
    machine = await emulated()
    option = lib.IOMMU_OPTION_RLIMIT_MODE
    async with await machine.vfio.open_iommufd() as iommufd:
        assert iommufd.option(option) == 0
        with refused(errno.EINVAL):
            iommufd.option(option, value=2)
        assert iommufd.option(option, value=1) == iommufd.option(option) == 1
        ioas = iommufd.alloc_ioas()
        with refused(errno.EBUSY):
            iommufd.option(option, value=0)
        async with machine.vfio.open_device(machine.names[0], container=ioas):
            await ioas.alloc(PAGE)
            assert machine.kernel.vfio._account.locked == PAGE


HWPTS: list[tuple[str, int, dict[str, int]]] = [
    ("dirty tracking", errno.EOPNOTSUPP, {"flags": lib.IOMMU_HWPT_ALLOC_DIRTY_TRACKING}),
    ("both flags", errno.EOPNOTSUPP, {"flags": 3}),
    ("fault queue", errno.EOPNOTSUPP, {"flags": lib.IOMMU_HWPT_FAULT_ID_VALID}),
    ("unknown flag", errno.EOPNOTSUPP, {"flags": 0x100}),
    ("data without a type", errno.EINVAL, {"data_len": 24}),
    ("a type without data", errno.EINVAL, {"data_type": 1}),
    ("data for a paging one", errno.EOPNOTSUPP, {"data_type": 1, "data_len": 24}),
    ("an address space as device", errno.ENOENT, {"dev_id": 1}),
    ("over a device", errno.EINVAL, {"pt_id": 2}),
    ("over a page table that an attach made", errno.EINVAL, {"pt_id": 3, "data_type": 1, "data_len": 24}),
    ("nested without data", errno.EOPNOTSUPP, {"pt_id": 3}),
]


@pytest.mark.parametrize(("why", "number", "fields"), HWPTS, ids=[row[0] for row in HWPTS])
async def test_a_page_table_that_is_refused(
    bench: Bench, why: str, number: int, fields: dict[str, int]
) -> None:
    objects = len(bench.iommufd.file._file.objects)  # type: ignore[attr-defined]
    with refused(number):
        bench.ioctl(
            lib.IOMMU_HWPT_ALLOC, command_of("iommu_hwpt_alloc", **({"dev_id": 2, "pt_id": 1} | fields))
        )
    assert len(bench.iommufd.file._file.objects) == objects  # type: ignore[attr-defined]


async def test_dirty_tracking_is_refused(bench: Bench) -> None:
    hwpt = bench.iommufd.alloc_hwpt(bench.device, bench.ioas)
    for on in (True, False):
        with refused(errno.EOPNOTSUPP):
            hwpt.set_dirty_tracking(on)
    whole = {"hwpt_id": hwpt.id, "iova": IOVA, "length": PAGE, "page_size": PAGE}
    for fields, number in (
        ({}, errno.EOPNOTSUPP),
        ({"length": 0}, errno.EOPNOTSUPP),
        ({"iova": TOP - PAGE + 1, "length": 2 * PAGE}, errno.EOVERFLOW),
        ({"iova": IOVA + 1}, errno.EINVAL),
        ({"length": 1}, errno.EINVAL),
        ({"page_size": 0}, errno.EINVAL),
        ({"page_size": 2 * PAGE}, errno.EINVAL),
    ):
        with refused(number):
            bench.ioctl(
                lib.IOMMU_HWPT_GET_DIRTY_BITMAP, command_of("iommu_hwpt_get_dirty_bitmap", **(whole | fields))
            )


async def test_page_tables_follow_their_address_space(bench: Bench) -> None:
    hwpt = bench.iommufd.alloc_hwpt(bench.device, bench.ioas)
    bench.buffer[:4] = 1, 2, 3, 4
    bench.device.attach(hwpt)
    bus = bench.machine.functions[0].bus
    assert bus.read(IOVA, 4) == bytes([1, 2, 3, 4])
    with refused(errno.EBUSY):
        hwpt.destroy()
    assert bench.ioas.unmap(IOVA, 16 * PAGE) == 16 * PAGE
    bench.ioas.map(bench.buffer, IOVA + PAGE)
    assert bus.read(IOVA + PAGE, 4) == bytes([1, 2, 3, 4])
    bench.device.detach()
    # Attached by hand, it stays.
    hwpt.destroy()
    assert bench.machine.memory.stats().pins == 0


async def test_hw_info(bench: Bench) -> None:
    info = bench.iommufd.hw_info(bench.device)
    assert info.type == lib.IOMMU_HW_INFO_TYPE_INTEL_VTD
    assert info.cap_reg >> 16 & 0x3F == 47
    assert not info.cap_reg >> 60 & 1
    assert info.ecap_reg >> 26 & 1
    assert info.capabilities == 0
    room = ffi.new("uint8_t[32]", [0xFF] * 32)
    for given in (0, 8, 24, 30):
        command = command_of("iommu_hw_info", dev_id=2, data_len=given, data_uptr=address_of(room))
        bench.ioctl(lib.IOMMU_GET_HW_INFO, command)
        assert command.data_len == 24
    # What is longer than the answer is cleared.
    assert bytes(ffi.buffer(room))[24:] == bytes(6) + b"\xff\xff"


async def test_closing_takes_everything(bench: Bench) -> None:
    bench.iommufd.alloc_hwpt(bench.device, bench.ioas)
    await bench.iommufd.close()
    with refused(errno.EBADF):
        bench.ioctl(lib.IOMMU_IOAS_ALLOC, command_of("iommu_ioas_alloc"))
    # The device keeps what it needs.
    assert bench.machine.functions[0].bus.read(IOVA, 4) == bytes(4)
    await bench.device.close()
    assert bench.machine.memory.stats().pins == 0
