"""Type1's mappings: every mistake and its errno, the order of the checks, what unmap returns, what a device sees."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.errors import VfioError
from pvfio.guest.type1 import LockedMemory, Type1, Type1Limits
from pvfio.silicon import DmaAborted

pytestmark = pytest.mark.touches_c

PAGE = 0x1000
READ, WRITE = 1, 2
TOP = (1 << 64) - 1
APERTURE = 1 << 48
MAPPED = 0x10_0000
UNMAP_ALL: int = lib.VFIO_DMA_UNMAP_FLAG_ALL
UNMAP_DIRTY: int = lib.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP


class Room:
    """A container of one group with [MAPPED, + 4 pages) mapped; `v` is a buffer's address."""

    def __init__(self, machine: Any, **how: Any) -> None:
        self.machine = machine
        self.type1: Type1 = machine.type1(**how)
        self.buffer = machine.memory.alloc(16 * PAGE)
        self.v = self.buffer.vaddr
        self.type1.map(MAPPED, self.v, 4 * PAGE, READ | WRITE)


@pytest.fixture
def room(type1_machine: Any) -> Room:
    return Room(type1_machine)


def errno_of(call: Callable[..., object], *arguments: Any) -> int | None:
    with pytest.raises(VfioError) as caught:
        call(*arguments)
    return caught.value.errno


# iova, offset into the buffer (None: no address of a buffer), size, flags
MAP_MISTAKES = {
    "size 0": (0x20_0000, 0, 0, 3, errno.EINVAL),
    "size negative": (0x20_0000, 0, -PAGE, 3, errno.EINVAL),
    "iova negative": (-PAGE, 0, PAGE, 3, errno.EINVAL),
    "unknown flag": (0x20_0000, 0, PAGE, 8 | 3, errno.EINVAL),
    "vaddr update flag": (0x20_0000, 0, PAGE, 4, errno.EINVAL),
    "iova wraps": (TOP - PAGE + 1, 0, 2 * PAGE, 3, errno.EOVERFLOW),
    "vaddr wraps": (0x20_0000, TOP - PAGE + 1, 2 * PAGE, 3, errno.EOVERFLOW),
    "no permission": (0x20_0000, 0, PAGE, 0, errno.EINVAL),
    "iova unaligned": (0x20_0001, 0, PAGE, 3, errno.EINVAL),
    "vaddr unaligned": (0x20_0000, 0x800, PAGE, 3, errno.EINVAL),
    "size unaligned": (0x20_0000, 0, PAGE + 1, 3, errno.EINVAL),
    "same range": (MAPPED, 0, 4 * PAGE, 3, errno.EEXIST),
    "overlaps the end": (MAPPED + 3 * PAGE, 0, 2 * PAGE, 3, errno.EEXIST),
    "overlaps the start": (MAPPED - PAGE, 0, 2 * PAGE, 3, errno.EEXIST),
    "inside": (MAPPED + PAGE, 0, PAGE, 3, errno.EEXIST),
    "around": (MAPPED - PAGE, 0, 6 * PAGE, 3, errno.EEXIST),
    "beyond the aperture": (APERTURE, 0, PAGE, 3, errno.EINVAL),
    "across the aperture's end": (APERTURE - PAGE, 0, 2 * PAGE, 3, errno.EINVAL),
    "first interrupt page": (0xFEE0_0000, 0, PAGE, 3, errno.EINVAL),
    "last interrupt page": (0xFEEF_F000, 0, PAGE, 3, errno.EINVAL),
    "into the interrupt range": (0xFEDF_F000, 0, 2 * PAGE, 3, errno.EINVAL),
    "out of the interrupt range": (0xFEEF_F000, 0, 2 * PAGE, 3, errno.EINVAL),
    "not a buffer": (0x20_0000, None, PAGE, 3, errno.EFAULT),
    "past the buffer": (0x20_0000, 15 * PAGE, 2 * PAGE, 3, errno.EFAULT),
}


@pytest.mark.parametrize("mistake", MAP_MISTAKES)
def test_map_mistakes(room: Room, mistake: str) -> None:
    iova, offset, size, flags, expected = MAP_MISTAKES[mistake]
    vaddr = 0x1000 if offset is None else offset if offset > 1 << 32 else room.v + offset
    before = room.machine.held()
    assert errno_of(room.type1.map, iova, vaddr, size, flags) == expected
    assert room.machine.held() == before
    assert len(room.type1) == 1


FAULTY = 0x1000
# Two mistakes each: the earlier check answers. The container has no entry left where `full` says so.
MAP_ORDER = {
    "flags before overflow": (TOP - PAGE + 1, 0, 2 * PAGE, 8, False, errno.EINVAL),
    "overflow before permissions": (TOP - PAGE + 1, 0, 2 * PAGE, 0, False, errno.EOVERFLOW),
    "overflow before alignment": (TOP - PAGE, 0, 2 * PAGE, 3, False, errno.EOVERFLOW),
    "alignment before overlap": (MAPPED + 1, 0, PAGE, 3, False, errno.EINVAL),
    "permissions before overlap": (MAPPED, 0, PAGE, 0, False, errno.EINVAL),
    "overlap before the entry limit": (MAPPED, 0, PAGE, 3, True, errno.EEXIST),
    "overlap before the aperture": (MAPPED, 0, APERTURE, 3, False, errno.EEXIST),
    "overlap before pinning": (MAPPED, FAULTY, PAGE, 3, False, errno.EEXIST),
    "entry limit before the aperture": (APERTURE, 0, PAGE, 3, True, errno.ENOSPC),
    "entry limit before pinning": (0x20_0000, FAULTY, PAGE, 3, True, errno.ENOSPC),
    "reserved range before pinning": (0xFEE0_0000, FAULTY, PAGE, 3, False, errno.EINVAL),
}


@pytest.mark.parametrize("case", MAP_ORDER)
def test_the_earlier_check_answers(type1_machine: Any, case: str) -> None:
    iova, vaddr, size, flags, full, expected = MAP_ORDER[case]
    room = Room(type1_machine, entries=1 if full else 2)
    assert errno_of(room.type1.map, iova, vaddr or room.v, size, flags) == expected


def test_overlap_before_memlock(type1_machine: Any) -> None:
    room = Room(type1_machine, memlock=4 * PAGE)
    assert errno_of(room.type1.map, MAPPED, room.v, PAGE, 3) == errno.EEXIST
    assert errno_of(room.type1.map, 0x20_0000, room.v, PAGE, 3) == errno.ENOMEM
    assert errno_of(room.type1.map, 0x20_0000, FAULTY, PAGE, 3) == errno.EFAULT
    assert type1_machine.memory.stats().pins == 1


def test_entry_limit(type1_machine: Any) -> None:
    room = Room(type1_machine, entries=3)
    room.type1.map(0, room.v, PAGE, 3)
    room.type1.map(PAGE, room.v, PAGE, 3)
    assert room.type1.dma_avail == 0
    assert errno_of(room.type1.map, 2 * PAGE, room.v, PAGE, 3) == errno.ENOSPC
    assert room.type1.unmap(PAGE, PAGE) == PAGE
    room.type1.map(2 * PAGE, room.v, PAGE, 3)
    assert errno_of(room.type1.map, PAGE, room.v, PAGE, 3) == errno.ENOSPC


def test_memlock_is_counted_per_mapping_and_given_back(type1_machine: Any) -> None:
    room = Room(type1_machine, memlock=6 * PAGE)
    assert room.type1.account.locked == 4 * PAGE
    room.type1.map(0, room.v, 2 * PAGE, 3)
    assert errno_of(room.type1.map, 0x20_0000, room.v, PAGE, 3) == errno.ENOMEM
    assert room.type1.unmap(MAPPED, 4 * PAGE) == 4 * PAGE
    room.type1.map(0x20_0000, room.v, PAGE, 3)
    assert room.type1.account.locked == 3 * PAGE
    room.type1.unmap(0, 0, UNMAP_ALL)
    assert room.type1.account.locked == 0


def test_containers_of_one_process_share_its_account(type1_machine: Any) -> None:
    account = LockedMemory(limit=4 * PAGE)
    room = Room(type1_machine, account=account)
    other = Type1(type1_machine.memory, type1_machine.iommu, account=account)
    other.attach_group(type1_machine.groups[1])
    assert errno_of(other.map, 0, room.v, PAGE, 3) == errno.ENOMEM
    room.type1.close()
    other.map(0, room.v, PAGE, 3)
    assert account.locked == PAGE


@pytest.mark.parametrize("limits", [{"dma_entry_limit": -1}, {"memlock": -1}])
def test_limits_are_not_negative(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        Type1Limits(**limits)


def test_mapping_without_a_group_finds_no_aperture(type1_machine: Any) -> None:
    type1 = Type1(type1_machine.memory, type1_machine.iommu)
    buffer = type1_machine.memory.alloc(PAGE)
    assert errno_of(type1.map, 0, buffer.vaddr, PAGE, 3) == errno.EINVAL


@pytest.mark.parametrize("scattered", [False, True])
def test_a_device_sees_what_was_mapped_until_unmap_returns(type1_machine: Any, scattered: bool) -> None:
    type1 = type1_machine.type1()
    buffer = type1_machine.memory.alloc(300 * PAGE, scattered=scattered)
    buffer[::PAGE] = [i % 251 for i in range(300)]
    bus = type1_machine.buses[0]
    type1.map(0x7000_0000, buffer.vaddr, buffer.nbytes, READ | WRITE)
    for i in range(300):
        assert bus.read(0x7000_0000 + i * PAGE, 1)[0] == i % 251
    bus.write(0x7000_0000 + 299 * PAGE + 5, b"there")
    assert bytes(buffer[299 * PAGE + 5 : 299 * PAGE + 10]) == b"there"
    assert type1.unmap(0x7000_0000, buffer.nbytes) == buffer.nbytes
    for i in (0, 1, 150, 299):
        with pytest.raises(DmaAborted):
            bus.read(0x7000_0000 + i * PAGE, 1)


def test_permissions_reach_the_page_table(room: Room) -> None:
    bus = room.machine.buses[0]
    room.type1.map(0x20_0000, room.v, PAGE, READ)
    assert bus.read(0x20_0000, 4) == bytes(4)
    with pytest.raises(DmaAborted):
        bus.write(0x20_0000, b"no")
    room.type1.map(0x30_0000, room.v, PAGE, WRITE)
    bus.write(0x30_0000, b"yes")
    assert bytes(room.buffer[:3]) == b"yes"
    mapping = room.type1.find(0x20_0000)
    assert mapping is not None
    assert mapping.flags == READ


@pytest.mark.parametrize("first", [0, 0xFEDF_F000, 0xFEF0_0000, APERTURE - PAGE])
def test_the_edges_of_the_usable_ranges_are_usable(room: Room, first: int) -> None:
    room.type1.map(first, room.v, PAGE, 3)
    assert room.machine.buses[0].read(first, 1) == b"\0"
    assert room.type1.unmap(first, PAGE) == PAGE


# iova, size, flags
UNMAP_MISTAKES = {
    "size 0": (MAPPED, 0, 0, errno.EINVAL),
    "size negative": (MAPPED, -PAGE, 0, errno.EINVAL),
    "iova negative": (-PAGE, PAGE, 0, errno.EINVAL),
    "iova unaligned": (MAPPED + 1, PAGE, 0, errno.EINVAL),
    "size unaligned": (MAPPED, PAGE + 1, 0, errno.EINVAL),
    "wraps": (TOP - PAGE + 1, 2 * PAGE, 0, errno.EOVERFLOW),
    "unknown flag": (MAPPED, 4 * PAGE, 8, errno.EINVAL),
    "vaddr update flag": (MAPPED, 4 * PAGE, 4, errno.EINVAL),
    "all with a size": (0, 4 * PAGE, UNMAP_ALL, errno.EINVAL),
    "all with an iova": (MAPPED, 0, UNMAP_ALL, errno.EINVAL),
    "all and dirty": (0, 0, UNMAP_ALL | UNMAP_DIRTY, errno.EINVAL),
    "dirty without a bitmap": (MAPPED, 4 * PAGE, UNMAP_DIRTY, errno.EINVAL),
    "splits at the end": (MAPPED, 3 * PAGE, 0, errno.EINVAL),
    "splits at the start": (MAPPED + PAGE, 3 * PAGE, 0, errno.EINVAL),
    "splits on both sides": (MAPPED + PAGE, PAGE, 0, errno.EINVAL),
    "splits, from before": (MAPPED - PAGE, 2 * PAGE, 0, errno.EINVAL),
    "splits, to behind": (MAPPED + 3 * PAGE, 2 * PAGE, 0, errno.EINVAL),
}


@pytest.mark.parametrize("mistake", UNMAP_MISTAKES)
def test_unmap_mistakes(room: Room, mistake: str) -> None:
    iova, size, flags, expected = UNMAP_MISTAKES[mistake]
    before = room.machine.held()
    assert errno_of(room.type1.unmap, iova, size, flags) == expected
    assert room.machine.held() == before
    assert room.machine.buses[0].read(MAPPED + 3 * PAGE, 1) == b"\0"


def test_unmap_that_finds_nothing_succeeds_with_0_and_no_flush(room: Room) -> None:
    flushes = room.machine.flushes()
    assert room.type1.unmap(0x9000_0000, PAGE) == 0
    assert room.type1.unmap(TOP - PAGE + 1, PAGE) == 0
    assert room.machine.flushes() == flushes


def test_one_unmap_of_several_mappings_with_holes_is_one_flush(room: Room) -> None:
    type1 = room.type1
    for i in (8, 10, 11, 30):
        type1.map(MAPPED + i * PAGE, room.v, PAGE, 3)
    type1.map(0x4000_0000, room.v, PAGE, 3)
    bus = room.machine.buses[0]
    for i in (0, 8, 10, 11, 30):
        bus.read(MAPPED + i * PAGE, 1)
    flushes = room.machine.flushes()
    assert type1.unmap(MAPPED - PAGE, 40 * PAGE) == 8 * PAGE
    assert room.machine.flushes() == flushes + 1
    for i in (0, 3, 8, 10, 11, 30):
        with pytest.raises(DmaAborted):
            bus.read(MAPPED + i * PAGE, 1)
    assert bus.read(0x4000_0000, 1) == b"\0"
    assert [mapping.iova for mapping in type1.mappings()] == [0x4000_0000]


def test_unmap_all(room: Room) -> None:
    empty = room.machine.held()[0] - 1
    for i in range(600):
        room.type1.map(0x20_0000 + 2 * i * PAGE, room.v, PAGE, 3)
    room.type1.map(0xFEF0_0000, room.v, 2 * PAGE, 3)
    flushes = room.machine.flushes()
    assert room.type1.unmap(0, 0, UNMAP_ALL) == 606 * PAGE
    assert room.machine.flushes() == flushes + 1
    assert room.machine.held()[0] == empty
    assert (len(room.type1), room.type1.dma_avail) == (0, 65535)
    assert room.type1.unmap(0, 0, UNMAP_ALL) == 0


def test_a_frame_of_a_mapping_is_not_recycled(type1_machine: Any) -> None:
    type1 = type1_machine.type1()
    before = type1_machine.held()
    buffer = type1_machine.memory.alloc(4 * PAGE)
    type1.map(0, buffer.vaddr, 4 * PAGE, 3)
    del buffer
    assert type1_machine.held()[2] < before[2]
    type1.unmap(0, 4 * PAGE)
    assert type1_machine.held() == before


# What version 1 makes of a request: iova, size, bytes.
V1 = {
    "exactly": (MAPPED, 4 * PAGE, 4 * PAGE),
    "only its first page": (MAPPED, PAGE, 4 * PAGE),
    "from before into it": (MAPPED - PAGE, 2 * PAGE, 4 * PAGE),
    "from inside": (MAPPED + PAGE, 3 * PAGE, 0),
    "from inside over the next": (MAPPED + PAGE, 20 * PAGE, 0),
    "both, the second in part": (MAPPED, 9 * PAGE, 6 * PAGE),
    "nothing": (0x9000_0000, PAGE, 0),
}


@pytest.mark.parametrize("case", V1)
def test_version_1_takes_a_mapping_whole_or_not_at_all(type1_machine: Any, case: str) -> None:
    iova, size, expected = V1[case]
    room = Room(type1_machine, v2=False)
    room.type1.map(MAPPED + 8 * PAGE, room.v, 2 * PAGE, 3)
    assert room.type1.unmap(iova, size) == expected
    assert sum(mapping.size for mapping in room.type1.mappings()) == 6 * PAGE - expected


def test_page_tables_that_run_out_undo_the_mapping(make_type1_machine: Callable[..., Any]) -> None:
    machine = make_type1_machine(ram=4 << 20)
    type1 = machine.type1()
    buffer = machine.memory.alloc(64 * PAGE, scattered=True)
    pages = [machine.memory.guest_page() for _ in range(machine.memory.stats().free_frames - 3)]
    pins = machine.held()[0]
    # Three tables are there for the first page; the range ends under a fourth.
    assert errno_of(type1.map, 0x4000_0000 - 2 * PAGE, buffer.vaddr, 64 * PAGE, 3) == errno.ENOMEM
    assert machine.held()[0] == pins
    assert (len(type1), type1.dma_avail, type1.account.locked) == (0, 65535, 0)
    with pytest.raises(DmaAborted):
        machine.buses[0].read(0x4000_0000 - 2 * PAGE, 1)
    for page in pages:
        machine.memory.free_guest_page(page)
    type1.map(0x4000_0000 - 2 * PAGE, buffer.vaddr, 64 * PAGE, 3)
    assert machine.buses[0].read(0x4000_0000, 1) == b"\0"
