"""PRP entries and lists, scatter gather lists: against a small reference, and every way to get them wrong."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import dtype_of, ffi, lib
from pvfio.silicon import READ as MAY_READ
from pvfio.silicon import WRITE as MAY_WRITE
from tests.devices.nvme.data_path_rig import DATA, DNR, LISTS, MEMORY, PAGE, SIZE, Rig, command, noise

pytestmark = pytest.mark.touches_c

READ, WRITE = lib.NVME_CMD_READ, lib.NVME_CMD_WRITE
BLOCKS = 64
HOLE = DATA + 0x80000  # a page that does not translate
SGL = lib.NVME_CMD_SGL_METABUF
BLOCK, BUCKET, SEGMENT, LAST = (
    lib.NVME_SGL_DATA_BLOCK,
    lib.NVME_SGL_BIT_BUCKET,
    lib.NVME_SGL_SEGMENT,
    lib.NVME_SGL_LAST_SEGMENT,
)
OFFSET = lib.NVME_SC_PRP_INVALID_OFFSET | DNR
TRANSFER = lib.NVME_SC_DATA_XFER_ERROR | DNR


class Disk(Rig):
    def __init__(self) -> None:
        super().__init__()
        self.content = noise(BLOCKS * PAGE)
        self.backing = self.memory_namespace(size=BLOCKS * PAGE)
        self.set_media(self.backing, 0, self.content)
        self.unmap(HOLE)

    def clear(self) -> None:
        self.at(LISTS, MEMORY + SIZE - LISTS)[:] = 0

    def words(self, at: int, *words: int) -> None:
        self.put(at, np.array(words, np.uint64))

    def transfer(self, opcode: int, blocks: int, pages: list[tuple[int, int]], **fields: int) -> int:
        """Reads or writes from LBA 0 on and compares with those pieces of memory, where it succeeds."""
        fresh = noise(blocks * PAGE, 7)
        if opcode == WRITE:
            at = 0
            for iova, length in pages:
                self.put(iova, fresh[at : at + length])
                at += length
        status = self.run(command(opcode, blocks=blocks, **fields))
        if not status and opcode == WRITE:
            assert (self.media(self.backing, 0, blocks * PAGE) == fresh).all()
        elif not status:
            got = np.concatenate([self.at(iova, length) for iova, length in pages])
            assert (got == self.media(self.backing, 0, blocks * PAGE)).all()
        return status


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk() as made:
        yield made


pages = st.integers(0, 300).map(lambda n: DATA + 0x100000 + n * PAGE)


@given(
    opcode=st.sampled_from([READ, WRITE]),
    blocks=st.integers(1, 32),
    offset=st.integers(0, PAGE // 4 - 1).map(lambda n: 4 * n),
    list_offset=st.integers(0, 511).map(lambda n: 8 * n),
    data=st.data(),
)
def test_prps(opcode: int, blocks: int, offset: int, list_offset: int, data: st.DataObject) -> None:
    """Any offset of the first page, any start of a list: chained where it comes to the end of its page."""
    count = (offset + blocks * PAGE + PAGE - 1) // PAGE
    frames = data.draw(st.lists(pages, min_size=count, max_size=count, unique=True))
    left, pieces = blocks * PAGE, []
    for index, frame in enumerate(frames):
        begin = offset if index == 0 else 0
        length = min(PAGE - begin, left)
        pieces.append((frame + begin, length))
        left -= length
    with Disk() as disk:
        fields = {"prp1": frames[0] + offset}
        if count == 2:
            fields["prp2"] = frames[1]
        elif count > 2:
            fields["prp2"] = LISTS + list_offset
            at, rest = LISTS + list_offset, frames[1:]
            fit = (PAGE - list_offset) // 8
            if len(rest) > fit:
                disk.words(at, *rest[: fit - 1], LISTS + PAGE)
                at, rest = LISTS + PAGE, rest[fit - 1 :]
            disk.words(at, *rest)
        assert disk.transfer(opcode, blocks, pieces, **fields) == 0


GOOD = [DATA + PAGE * n for n in range(1, 12)]


@pytest.mark.parametrize("opcode", [READ, WRITE])
@pytest.mark.parametrize(
    ("blocks", "prp1", "prp2", "entries", "status"),
    [
        (1, DATA + 1, 0, (), OFFSET),
        (1, DATA + 2, 0, (), OFFSET),
        (2, DATA, GOOD[0] + 4, (), OFFSET),
        (2, DATA, GOOD[0] + 2048, (), OFFSET),
        (3, DATA, LISTS + 4, (), OFFSET),
        (3, DATA, LISTS + 1, (), OFFSET),
        (3, DATA, LISTS, (GOOD[0], GOOD[1] + 4), OFFSET),
        (3, DATA, LISTS, (GOOD[0] + 4095, GOOD[1]), OFFSET),
        (1, HOLE, 0, (), TRANSFER),
        (1, 0, 0, (), TRANSFER),
        (1, 2**64 - PAGE, 0, (), TRANSFER),
        (2, DATA, HOLE, (), TRANSFER),
        (2, DATA, 0, (), TRANSFER),
        (3, DATA, HOLE, (), TRANSFER),
        (3, DATA, 0, (), TRANSFER),
        (3, DATA, 2**64 - 8, (), TRANSFER),
        (3, DATA, LISTS, (GOOD[0], HOLE), TRANSFER),
        (3, DATA, LISTS + PAGE - 8, (LISTS + 2 * PAGE + 8,), OFFSET),
        (3, DATA, LISTS + PAGE - 8, (HOLE,), TRANSFER),
        (3, DATA, LISTS + PAGE - 16, (GOOD[0], GOOD[1]), 0),
        (32, 2**64 - PAGE, 2**64 - PAGE, (), TRANSFER),
    ],
)
def test_bad_prps(
    disk: Disk, opcode: int, blocks: int, prp1: int, prp2: int, entries: tuple[int, ...], status: int
) -> None:
    """A malformed pointer moves nothing at all."""
    if entries:
        disk.words(prp2, *entries)
    before = disk.memory[DATA - MEMORY :].copy()
    assert disk.run(command(opcode, blocks=blocks, prp1=prp1, prp2=prp2)) == status
    if status == OFFSET:
        assert (disk.memory[DATA - MEMORY :] == before).all()
        assert (disk.media(disk.backing, 0, BLOCKS * PAGE) == disk.content).all()
    disk.run(command(lib.NVME_CMD_FLUSH))


@pytest.mark.parametrize("shift", [13, 16])
def test_larger_memory_pages(shift: int) -> None:
    """CC.MPS: entries are of 8 KiB, of 64 KiB, and so are lists."""
    page = 1 << shift
    with Disk() as disk:
        lib.pv_nvme_disable(disk.nvme)
        assert lib.pv_nvme_enable(disk.nvme, MEMORY, 64, MEMORY + 0x10000, 64, shift, 0) == 0
        disk.tail, disk.head = [0, 0], [0, 0]
        assert lib.pv_nvme_create_cq(disk.nvme, 1, MEMORY + 0x20000, 64, 0, 0) == 0
        assert lib.pv_nvme_create_sq(disk.nvme, 1, MEMORY + 0x30000, 64, 1, 0) == 0
        disk.memory[:0x40000] = 0
        disk.sq_base = lambda queue: MEMORY + 0x30000  # type: ignore[method-assign]
        disk.cq_base = lambda queue: MEMORY + 0x20000  # type: ignore[method-assign]
        first = DATA + 0x100000 + page - PAGE
        rest = [DATA + 0x200000 + (1 << 16) * n for n in range(4)]
        disk.words(LISTS, *rest)
        lengths = [PAGE, *[page] * 4]
        blocks = min(32, sum(lengths) // PAGE)
        pieces, left = [], blocks * PAGE
        for iova, length in zip([first, *rest], lengths, strict=True):
            pieces.append((iova, min(length, left)))
            left -= pieces[-1][1]
        assert disk.transfer(READ, blocks, pieces, prp1=first, prp2=LISTS) == 0
        assert disk.run(command(READ, blocks=3, prp1=first, prp2=rest[0] + PAGE)) == OFFSET


def sgl(*descs: tuple[int, int, int]) -> Any:
    """Descriptors: address, length, type."""
    out = np.zeros(len(descs), dtype_of("struct nvme_sgl_desc"))
    for entry, (address, length, kind) in zip(out, descs, strict=True):
        entry["addr"], entry["length"], entry["type"] = address, length, kind << 4 if kind < 16 else kind
    return out


def inline(address: int, length: int, kind: int) -> dict[str, int]:
    """The descriptor in a command."""
    word = (kind << 4 if kind < 16 else kind) & 0xFF
    return {"flags": SGL, "prp1": address, "prp2": length | word << 56}


@given(opcode=st.sampled_from([READ, WRITE]), blocks=st.integers(1, 8), data=st.data())
def test_sgls(opcode: int, blocks: int, data: st.DataObject) -> None:
    """Any cut into pieces of any alignment, empty ones among them, in any chain of segments; a bucket takes from reads
    and counts nothing in writes."""
    left, at, descs, pieces = blocks * PAGE, DATA + 0x100000, [], []
    while left:
        length = min(left, data.draw(st.one_of(st.integers(0, 64), st.integers(0, 4 * PAGE), st.just(left))))
        at += data.draw(st.integers(1, 40))
        descs.append((at, length, BLOCK))
        pieces.append((at, length))
        at += length
        left -= length
        if len(descs) == 200:
            descs.append((at, left, BLOCK))
            pieces.append((at, left))
            break
    if opcode == WRITE:
        for _ in range(data.draw(st.integers(0, 3))):
            descs.insert(data.draw(st.integers(0, len(descs))), (2**60, 1 << 20, BUCKET))
    with Disk() as disk:
        segments, place = [], LISTS
        rest = list(descs)
        while rest:
            count = data.draw(st.integers(1, len(rest)))
            segments.append(rest[:count])
            rest = rest[count:]
        places = []
        for segment in segments:
            places.append(place)
            place += 16 * (len(segment) + 1)
        for index, segment in enumerate(segments):
            follow = []
            if index + 1 < len(segments):
                last = index + 2 == len(segments)
                size = 16 * (len(segments[index + 1]) + (not last))
                follow = [(places[index + 1], size, LAST if last else SEGMENT)]
            disk.put(places[index], sgl(*segment, *follow))
        size = 16 * (len(segments[0]) + (len(segments) > 1))
        fields = inline(places[0], size, SEGMENT if len(segments) > 1 else LAST)
        assert disk.transfer(opcode, blocks, pieces, **fields) == 0


def test_one_data_block(disk: Disk) -> None:
    assert disk.transfer(READ, 4, [(DATA + 3, 4 * PAGE)], **inline(DATA + 3, 4 * PAGE, BLOCK)) == 0
    assert disk.transfer(WRITE, 4, [(DATA + 3, 4 * PAGE)], **inline(DATA + 3, 9 * PAGE, BLOCK)) == 0


def test_bit_buckets(disk: Disk) -> None:
    """The host sees what lies around them."""
    disk.put(LISTS, sgl((DATA, 100, BLOCK), (0, PAGE - 200, BUCKET), (DATA + PAGE, 100, BLOCK)))
    assert disk.run(command(READ, **inline(LISTS, 48, LAST))) == 0
    assert (disk.at(DATA, 100) == disk.content[:100]).all()
    assert not disk.at(DATA + 100, PAGE - 100).any()
    assert (disk.at(DATA + PAGE, 100) == disk.content[PAGE - 100 : PAGE]).all()


INVALID_SEGMENT = lib.NVME_SC_SGL_INVALID_LAST | DNR
INVALID_TYPE = lib.NVME_SC_SGL_INVALID_TYPE | DNR
INVALID_LENGTH = lib.NVME_SC_SGL_INVALID_DATA | DNR
INVALID_COUNT = lib.NVME_SC_SGL_INVALID_COUNT | DNR


@pytest.mark.parametrize("opcode", [READ, WRITE])
@pytest.mark.parametrize(
    ("first", "descs", "status"),
    [
        ((DATA, PAGE - 1, BLOCK), [], INVALID_LENGTH),
        ((DATA, 0, BLOCK), [], INVALID_LENGTH),
        ((HOLE, PAGE, BLOCK), [], TRANSFER),
        ((2**64 - 100, PAGE, BLOCK), [], TRANSFER),
        ((DATA, PAGE, 4), [], INVALID_TYPE),
        ((DATA, PAGE, 0x10 | 5), [], INVALID_TYPE),
        ((DATA, PAGE, 15), [], INVALID_TYPE),
        ((DATA, PAGE, 0xF1), [], INVALID_TYPE),
        ((LISTS, 0, LAST), [], INVALID_SEGMENT),
        ((LISTS, 15, LAST), [], INVALID_SEGMENT),
        ((LISTS, 24, SEGMENT), [], INVALID_SEGMENT),
        ((HOLE, 16, LAST), [], TRANSFER),
        ((LISTS, 16, LAST), [(DATA, PAGE, 5)], INVALID_TYPE),
        ((LISTS, 16, LAST), [(DATA, PAGE - 1, BLOCK)], INVALID_LENGTH),
        ((LISTS, 32, LAST), [(DATA, PAGE - 1, BLOCK), (HOLE, 1, BLOCK)], TRANSFER),
        ((LISTS, 16, SEGMENT), [(DATA, PAGE, BLOCK)], INVALID_SEGMENT),
        ((LISTS, 16, LAST), [(LISTS, 16, LAST)], INVALID_SEGMENT),
        ((LISTS, 16, LAST), [(LISTS, 16, SEGMENT)], INVALID_SEGMENT),
        ((LISTS, 32, SEGMENT), [(LISTS + 16, 16, LAST), (DATA, PAGE, BLOCK)], INVALID_SEGMENT),
        ((LISTS, 16, SEGMENT), [(LISTS, 16, SEGMENT)], INVALID_COUNT),
        ((LISTS, 2**32 - 16, LAST), [], INVALID_COUNT),
        ((LISTS, 16 * 600, LAST), [(DATA + 8 * n, 4, BLOCK) for n in range(600)], INVALID_COUNT),
    ],
)
def test_bad_sgls(
    disk: Disk, opcode: int, first: tuple[int, int, int], descs: list[tuple[int, int, int]], status: int
) -> None:
    """Statuses of Base 4.1.2; a chain that leads to itself ends."""
    if descs:
        disk.put(LISTS, sgl(*descs))
    assert disk.run(command(opcode, **inline(*first))) == status
    if status != TRANSFER:
        assert (disk.media(disk.backing, 0, BLOCKS * PAGE) == disk.content).all()


def test_reserved_psdt(disk: Disk) -> None:
    status = disk.run(command(READ, flags=lib.NVME_CMD_PSDT_MASK))
    assert status == lib.NVME_SC_INVALID_FIELD | DNR


def test_a_pointer_without_permission(disk: Disk) -> None:
    """Reads of the namespace write memory, and the other way round."""
    for perm, fails in ((MAY_READ, READ), (MAY_WRITE, WRITE)):
        disk.unmap(DATA)
        disk.map(DATA, perm)
        for opcode in (READ, WRITE):
            assert disk.run(command(opcode)) == (TRANSFER if opcode == fails else 0)


@pytest.mark.parametrize("to_host", [True, False])
def test_admin_transfers(disk: Disk, to_host: bool) -> None:
    """What Python's admin commands move."""
    one = command(lib.NVME_ADMIN_IDENTIFY if to_host else lib.NVME_ADMIN_SET_FEATURES, prp1=DATA + 8)
    raw = ffi.from_buffer("struct nvme_command *", one.tobytes())
    data = noise(PAGE - 8)
    if not to_host:
        disk.put(DATA + 8, data)
    buffer = data.copy() if to_host else np.zeros_like(data)
    pointer = ffi.from_buffer(buffer)
    assert lib.pv_nvme_transfer(disk.nvme, raw, pointer, PAGE - 8, to_host, 0) == 0
    assert (disk.at(DATA + 8, PAGE - 8) == buffer).all()
    assert (buffer == data).all()
    assert lib.pv_nvme_transfer(disk.nvme, raw, pointer, PAGE - 8, to_host, 1) == -errno.ECANCELED
    assert (
        lib.pv_nvme_transfer(disk.nvme, raw, pointer, 2**32 - 1, to_host, 0)
        == lib.NVME_SC_INVALID_FIELD | DNR
    )
