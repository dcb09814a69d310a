"""Type1's requests as structures: argsz, flags, the capability chain of GET_INFO, dirty bitmaps."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.guest.type1 import Type1

pytestmark = pytest.mark.touches_c

PAGE = 0x1000
TOP = (1 << 64) - 1
START: int = lib.VFIO_IOMMU_DIRTY_PAGES_FLAG_START
STOP: int = lib.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP
GET: int = lib.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP
ALL: int = lib.VFIO_DMA_UNMAP_FLAG_ALL
DIRTY: int = lib.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
VADDR: int = lib.VFIO_DMA_UNMAP_FLAG_VADDR
UNMAP_SIZE, DIRTY_SIZE = 24, 8


def refused(type1: Type1, request: int, arg: Any) -> int | None:
    with pytest.raises(VfioError) as caught:
        type1.ioctl(request, arg)
    return caught.value.errno


def map_request(iova: int, vaddr: int, size: int, flags: int = 3, argsz: int = 32) -> Any:
    return ffi.new("struct vfio_iommu_type1_dma_map *", [argsz, flags, vaddr, iova, size])


def unmap_request(iova: int, size: int, flags: int = 0, argsz: int = UNMAP_SIZE, bitmap: Any = None) -> Any:
    room = ffi.sizeof("struct vfio_bitmap") if bitmap is not None else 0
    request = ffi.new("struct vfio_iommu_type1_dma_unmap *", {"data": room})
    request.argsz, request.flags, request.iova, request.size = argsz, flags, iova, size
    if bitmap is not None:
        ffi.memmove(request.data, bitmap, room)
    return request


def bitmap_of(words: Any, size: int, pgsize: int = PAGE) -> Any:
    return ffi.new("struct vfio_bitmap *", [pgsize, size, ffi.cast("uint64_t *", words)])


def dirty_request(flags: int, argsz: int = DIRTY_SIZE, asked: tuple[int, int, Any] | None = None) -> Any:
    room = ffi.sizeof("struct vfio_iommu_type1_dirty_bitmap_get") if asked else 0
    request = ffi.new("struct vfio_iommu_type1_dirty_bitmap *", {"data": room})
    request.argsz, request.flags = argsz, flags
    if asked:
        get = ffi.cast("struct vfio_iommu_type1_dirty_bitmap_get *", request.data)
        get.iova, get.size, get.bitmap = asked[0], asked[1], asked[2][0]
        request.argsz = max(argsz, DIRTY_SIZE + room) if argsz == DIRTY_SIZE else argsz
    return request


def caps(info: Any, argsz: int) -> dict[int, bytes]:
    raw = bytes(ffi.buffer(info, argsz))
    found, at = {}, struct.unpack_from("<I", raw, 16)[0]
    while at:
        number, version, following = struct.unpack_from("<HHI", raw, at)
        assert (version, at % 8) == (1, 0)
        found[number] = raw[at + 8 : following or argsz]
        at = following
    return found


def test_get_info_with_room_for_the_chain(type1_machine: Any) -> None:
    type1 = type1_machine.type1(entries=77)
    buffer = type1_machine.memory.alloc(PAGE)
    type1.map(0, buffer.vaddr, PAGE, 3)
    raw = ffi.new("char[256]")
    info = ffi.cast("struct vfio_iommu_type1_info *", raw)
    info.argsz = 256
    assert type1.ioctl(lib.VFIO_IOMMU_GET_INFO, info) == 0
    assert info.argsz == 256
    assert info.flags == lib.VFIO_IOMMU_INFO_PGSIZES | lib.VFIO_IOMMU_INFO_CAPS
    assert info.iova_pgsizes == 1 << 12 | 1 << 21 | 1 << 30
    found = caps(info, 256)
    assert set(found) == {1, 2, 3}
    nr, _ = struct.unpack_from("<II", found[lib.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE])
    assert struct.unpack_from(f"<{2 * nr}Q", found[lib.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE], 8) == (
        0,
        0xFEDF_FFFF,
        0xFEF0_0000,
        (1 << 48) - 1,
    )
    assert struct.unpack_from("<IIQQ", found[lib.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION]) == (
        0,
        0,
        PAGE,
        1 << 28,
    )
    assert struct.unpack_from("<I", found[lib.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL]) == (76,)


@pytest.mark.parametrize("argsz", [16, 20, 24, 100])
def test_get_info_without_room_says_how_much_it_needs(type1_machine: Any, argsz: int) -> None:
    type1 = type1_machine.type1()
    raw = ffi.new("char[256]", b"\xaa" * 255)
    info = ffi.cast("struct vfio_iommu_type1_info *", raw)
    info.argsz = argsz
    type1.ioctl(lib.VFIO_IOMMU_GET_INFO, info)
    needed = info.argsz
    assert 100 < needed <= 256
    assert info.flags == lib.VFIO_IOMMU_INFO_PGSIZES | lib.VFIO_IOMMU_INFO_CAPS
    assert bytes(ffi.buffer(raw))[min(argsz, 24) : 255] == b"\xaa" * (255 - min(argsz, 24))
    if argsz >= 20:
        assert info.cap_offset == 0
    info.argsz = needed
    type1.ioctl(lib.VFIO_IOMMU_GET_INFO, info)
    assert info.argsz == needed
    assert set(caps(info, needed)) == {1, 2, 3}
    assert bytes(ffi.buffer(raw))[needed:255] == b"\xaa" * (255 - needed)


def test_get_info_without_a_group_has_no_iova_ranges(type1_machine: Any) -> None:
    type1 = Type1(type1_machine.memory, type1_machine.iommu)
    info = ffi.cast("struct vfio_iommu_type1_info *", raw := ffi.new("char[128]"))
    info.argsz = len(raw)
    type1.ioctl(lib.VFIO_IOMMU_GET_INFO, info)
    assert info.iova_pgsizes == TOP & ~0xFFF
    assert set(caps(info, 128)) == {2, 3}


def test_get_info_argsz_too_small(type1_machine: Any) -> None:
    info = ffi.new("struct vfio_iommu_type1_info *", [15])
    assert refused(type1_machine.type1(), lib.VFIO_IOMMU_GET_INFO, info) == errno.EINVAL
    assert info.flags == 0


def test_check_extension(type1_machine: Any) -> None:
    type1 = type1_machine.type1()
    answers = [type1.ioctl(lib.VFIO_CHECK_EXTENSION, extension) for extension in range(12)]
    assert [i for i, answer in enumerate(answers) if answer] == [
        lib.VFIO_TYPE1_IOMMU,
        lib.VFIO_TYPE1v2_IOMMU,
        lib.VFIO_UNMAP_ALL,
    ]


@pytest.mark.parametrize("request_number", [0, 0x3B73, 0x3B74, 0x3B76, 0x3B6B, 0xFFFF_FFFF])
def test_unknown_request(type1_machine: Any, request_number: int) -> None:
    assert refused(type1_machine.type1(), request_number, ffi.new("char[64]")) == errno.ENOTTY


@pytest.mark.parametrize("arg", [0, 4096, None, ffi.NULL, b"bytes"])
def test_an_argument_that_is_no_pointer(type1_machine: Any, arg: object) -> None:
    assert refused(type1_machine.type1(), lib.VFIO_IOMMU_MAP_DMA, arg) == errno.EFAULT


def test_map_and_unmap(type1_machine: Any) -> None:
    type1 = type1_machine.type1()
    buffer = type1_machine.memory.alloc(4 * PAGE)
    assert type1.ioctl(lib.VFIO_IOMMU_MAP_DMA, map_request(0, buffer.vaddr, 4 * PAGE)) == 0
    assert refused(type1, lib.VFIO_IOMMU_MAP_DMA, map_request(0, buffer.vaddr, PAGE)) == errno.EEXIST
    request = unmap_request(0, 8 * PAGE)
    assert type1.ioctl(lib.VFIO_IOMMU_UNMAP_DMA, request) == 0
    assert request.size == 4 * PAGE
    assert type1.ioctl(lib.VFIO_IOMMU_UNMAP_DMA, request) == 0
    assert request.size == 0
    type1.map(PAGE, buffer.vaddr, PAGE, 3)
    request = unmap_request(0, 0, ALL)
    type1.ioctl(lib.VFIO_IOMMU_UNMAP_DMA, request)
    assert request.size == PAGE


@pytest.mark.parametrize(
    ("argsz", "flags", "expected"),
    [
        (31, 3, errno.EINVAL),
        (0, 3, errno.EINVAL),
        (32, 7, errno.EINVAL),
        (32, 4, errno.EINVAL),
        (32, 1 << 31, errno.EINVAL),
        (32, 0, errno.EINVAL),
    ],
)
def test_map_argsz_and_flags(type1_machine: Any, argsz: int, flags: int, expected: int) -> None:
    type1 = type1_machine.type1()
    buffer = type1_machine.memory.alloc(PAGE)
    request = map_request(0, buffer.vaddr, PAGE, flags, argsz)
    assert refused(type1, lib.VFIO_IOMMU_MAP_DMA, request) == expected
    assert len(type1) == 0


@pytest.mark.parametrize(
    ("argsz", "flags"),
    [
        (23, 0),
        (0, 0),
        (24, 8),
        (24, VADDR),
        (24, DIRTY),
        (47, DIRTY),
        (48, DIRTY | ALL),
        (48, DIRTY | VADDR),
        (24, ALL | VADDR),
    ],
)
def test_unmap_argsz_and_flags(type1_machine: Any, argsz: int, flags: int) -> None:
    type1 = type1_machine.type1()
    buffer = type1_machine.memory.alloc(PAGE)
    type1.map(0, buffer.vaddr, PAGE, 3)
    type1.ioctl(lib.VFIO_IOMMU_DIRTY_PAGES, dirty_request(START))
    words = ffi.new("uint64_t[8]")
    request = unmap_request(0, PAGE, flags, argsz, bitmap_of(words, 64))
    assert refused(type1, lib.VFIO_IOMMU_UNMAP_DMA, request) == errno.EINVAL
    assert (len(type1), request.size) == (1, PAGE)


class Tracked:
    """Pages 3 to 69 and 72 are mapped, tracking is on; the bitmap is of pages 0 to 127."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.type1: Type1 = machine.type1()
        self.buffer = machine.memory.alloc(128 * PAGE)
        self.type1.map(3 * PAGE, self.buffer.vaddr, 60 * PAGE, 3)
        self.type1.map(63 * PAGE, self.buffer.vaddr, 7 * PAGE, 3)
        self.type1.map(72 * PAGE, self.buffer.vaddr, PAGE, 3)
        self.type1.ioctl(lib.VFIO_IOMMU_DIRTY_PAGES, dirty_request(START))
        self.words = ffi.new("uint64_t[4]")
        self.expected = {*range(3, 70), 72}

    def bits(self) -> set[int]:
        value = int.from_bytes(bytes(ffi.buffer(self.words)), "little")
        return {i for i in range(256) if value >> i & 1}


@pytest.fixture
def tracked(type1_machine: Any) -> Tracked:
    return Tracked(type1_machine)


def test_every_mapped_page_is_dirty_each_time(tracked: Tracked) -> None:
    for _ in range(2):
        ffi.buffer(tracked.words)[:] = bytes(32)
        asked = (0, 128 * PAGE, bitmap_of(tracked.words, 16))
        assert tracked.type1.ioctl(lib.VFIO_IOMMU_DIRTY_PAGES, dirty_request(GET, asked=asked)) == 0
        assert tracked.bits() == tracked.expected


def test_all_that_is_pinned_is_dirty_whatever_a_device_may_do(tracked: Tracked) -> None:
    """Mappings for reading only, and those made while tracking runs; started twice or not, as Linux."""
    tracked.type1.ioctl(lib.VFIO_IOMMU_DIRTY_PAGES, dirty_request(START))
    tracked.type1.map(100 * PAGE, tracked.buffer.vaddr, 3 * PAGE, lib.VFIO_DMA_MAP_FLAG_READ)
    asked = (0, 128 * PAGE, bitmap_of(tracked.words, 16))
    assert tracked.type1.ioctl(lib.VFIO_IOMMU_DIRTY_PAGES, dirty_request(GET, asked=asked)) == 0
    assert tracked.bits() == {*tracked.expected, 100, 101, 102}


def test_whole_words_of_the_bitmap_are_written(tracked: Tracked) -> None:
    """As Linux: bits below a mapping's first page in its word are kept, those above its last become 0."""
    ffi.buffer(tracked.words)[:] = b"\xff" * 32
    asked = (0, 128 * PAGE, bitmap_of(tracked.words, 16))
    assert tracked.type1.ioctl(lib.VFIO_IOMMU_DIRTY_PAGES, dirty_request(GET, asked=asked)) == 0
    assert tracked.bits() == {0, 1, 2, *tracked.expected, *range(128, 256)}


def test_unmap_reports_dirty_pages(tracked: Tracked) -> None:
    bitmap = bitmap_of(tracked.words, 32)
    request = unmap_request(PAGE, 80 * PAGE, DIRTY, 48, bitmap)
    tracked.type1.ioctl(lib.VFIO_IOMMU_UNMAP_DMA, request)
    assert request.size == 68 * PAGE
    assert tracked.bits() == {i - 1 for i in tracked.expected}
    assert len(tracked.type1) == 0


def test_stop_ends_tracking(tracked: Tracked) -> None:
    tracked.type1.ioctl(lib.VFIO_IOMMU_DIRTY_PAGES, dirty_request(STOP))
    asked = dirty_request(GET, asked=(0, 128 * PAGE, bitmap_of(tracked.words, 16)))
    assert refused(tracked.type1, lib.VFIO_IOMMU_DIRTY_PAGES, asked) == errno.EINVAL
    request = unmap_request(0, 128 * PAGE, DIRTY, 48, bitmap_of(tracked.words, 16))
    assert refused(tracked.type1, lib.VFIO_IOMMU_UNMAP_DMA, request) == errno.EINVAL
    assert len(tracked.type1) == 3


# iova, size, bitmap bytes, page size
BAD_BITMAPS = {
    "page size 0": (0, 128 * PAGE, 16, 0),
    "not the smallest page size": (0, 1 << 30, 1 << 20, 1 << 21),
    "page size not a power of two": (0, 128 * PAGE, 16, PAGE | PAGE << 1),
    "bitmap too small": (0, 128 * PAGE, 15, PAGE),
    "bitmap of nothing": (0, 128 * PAGE, 0, PAGE),
    "bitmap too large": (0, 128 * PAGE, (1 << 28) + 1, PAGE),
    "size 0": (0, 0, 16, PAGE),
    "size unaligned": (0, 128 * PAGE - 1, 16, PAGE),
    "iova unaligned": (1, 128 * PAGE, 24, PAGE),
    "splits a mapping at the start": (4 * PAGE, 128 * PAGE, 24, PAGE),
    "splits a mapping at the end": (0, 65 * PAGE, 24, PAGE),
    "wraps": (TOP - PAGE + 1, 2 * PAGE, 24, PAGE),
}


@pytest.mark.parametrize("mistake", BAD_BITMAPS)
def test_get_bitmap_mistakes(tracked: Tracked, mistake: str) -> None:
    iova, size, nbytes, pgsize = BAD_BITMAPS[mistake]
    asked = dirty_request(GET, asked=(iova, size, bitmap_of(tracked.words, nbytes, pgsize)))
    assert refused(tracked.type1, lib.VFIO_IOMMU_DIRTY_PAGES, asked) == errno.EINVAL
    assert tracked.bits() == set()


@pytest.mark.parametrize(
    ("address", "expected"),
    [(0, errno.EFAULT), (0x1000, errno.EFAULT), (0x7FFF_FFFF_F000, errno.EINVAL), (TOP, errno.EINVAL)],
)
def test_a_bitmap_at_a_bad_address(tracked: Tracked, address: int, expected: int) -> None:
    bitmap = bitmap_of(ffi.cast("uint64_t *", address), 16)
    asked = dirty_request(GET, asked=(0, 128 * PAGE, bitmap))
    assert refused(tracked.type1, lib.VFIO_IOMMU_DIRTY_PAGES, asked) == expected
    request = unmap_request(0, 128 * PAGE, DIRTY, 48, bitmap)
    assert refused(tracked.type1, lib.VFIO_IOMMU_UNMAP_DMA, request) == expected
    assert len(tracked.type1) == 3


@pytest.mark.parametrize(
    ("argsz", "flags"),
    [(7, START), (8, 0), (8, START | STOP), (8, 8), (8, GET), (8 + 39, GET), (48, GET | START)],
)
def test_dirty_pages_argsz_and_flags(tracked: Tracked, argsz: int, flags: int) -> None:
    request = dirty_request(flags, argsz)
    assert refused(tracked.type1, lib.VFIO_IOMMU_DIRTY_PAGES, request) == errno.EINVAL


def test_version_1_has_no_dirty_pages(type1_machine: Any) -> None:
    type1 = type1_machine.type1(v2=False)
    assert refused(type1, lib.VFIO_IOMMU_DIRTY_PAGES, dirty_request(START)) == errno.EACCES
