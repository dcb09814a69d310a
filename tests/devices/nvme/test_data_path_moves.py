"""Commands whose data moves together: a burst does what its commands do one by one, whatever stands between them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.abi import ffi, lib
from pvfio.silicon import READ as READABLE
from tests.devices.nvme.data_path_rig import DATA, DNR, LISTS, PAGE, Rig, command, noise, wait_for
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

READ, WRITE, COMPARE = lib.NVME_CMD_READ, lib.NVME_CMD_WRITE, lib.NVME_CMD_COMPARE
FLUSH, ZEROES, UNCOR = lib.NVME_CMD_FLUSH, lib.NVME_CMD_WRITE_ZEROES, lib.NVME_CMD_WRITE_UNCOR
FAILED = lib.NVME_SC_DATA_XFER_ERROR | DNR
BLOCKS, BUFFERS = 8, 6
UNMAPPED, READ_ONLY = DATA + 4 * PAGE, DATA + 5 * PAGE
MOVES = 16  # commands whose data waits at most
SGL = lib.NVME_CMD_SGL_METABUF


def sgl(kind: int, length: int) -> int:
    """The second half of an SGL descriptor."""
    return kind << 60 | length


class Disk(Rig):
    """Eight blocks in memory, in an image, and with metadata; six buffers: one does not translate, one is read-only."""

    def __init__(self, kind: Any = "inline") -> None:
        super().__init__(kind)
        self.backing = self.memory_namespace(size=BLOCKS * PAGE)
        with tempfile.NamedTemporaryFile() as image:
            os.truncate(image.name, BLOCKS * PAGE)
            self.backings = (
                self.backing,
                self.file_namespace(image.name, 2),
                self.memory_namespace(3, BLOCKS * PAGE, metadata=8),
            )
        for number, backing in enumerate(self.backings):
            self.set_media(backing, 0, noise(BLOCKS * PAGE, 10 + number))
        self.put(DATA, noise(BUFFERS * PAGE, 2))
        for blocks in (1, 2):
            bucket = (DATA, sgl(lib.NVME_SGL_BIT_BUCKET, blocks * PAGE))
            self.put(LISTS + 16 * blocks, np.array(bucket, dtype=np.uint64))
        self.unmap(UNMAPPED)
        self.unmap(READ_ONLY)
        self.map(READ_ONLY, READABLE)

    def state(self) -> tuple[Any, ...]:
        """What anybody can see of it but the queues."""
        stats, entries = ffi.new("struct pv_nvme_stats *"), ffi.new("struct nvme_error_log_entry[64]")
        total = ffi.new("uint64_t *")
        lib.pv_nvme_get_stats(self.nvme, stats)
        lib.pv_nvme_errors(self.nvme, entries, 64, total)
        log = [(e.cmdid, e.status_field, e.parm_error_location, e.lba, e.nsid, e.sqid) for e in entries]
        counted = (stats.reads, stats.writes, stats.read_bytes, stats.written_bytes, stats.media_errors)
        memory = self.at(DATA, BUFFERS * PAGE).tobytes()
        media = [self.media(backing, 0, BLOCKS * PAGE).tobytes() for backing in self.backings]
        return counted, log[: total[0]], memory, media


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk() as made:
        yield made


@dataclass(frozen=True)
class Io:
    """A command on a block, its data in a buffer, and, of two blocks, in one that is ``step`` further on; or, as one
    SGL descriptor, in the buffers from there on or in no memory at all. ``fused``: a compare and a write of that block.
    """

    opcode: int
    lba: int
    buffer: int
    blocks: int
    nsid: int
    step: int
    control: int
    sgl: str | None
    fused: bool

    def commands(self) -> list[Any]:
        second = DATA + (self.buffer + self.step) % BUFFERS * PAGE
        more = {"prp2": second, "metadata": DATA + BUFFERS * PAGE, "control": self.control}
        prp1 = DATA + self.buffer * PAGE
        if self.fused:
            first, then = lib.NVME_CMD_FUSE_FIRST, lib.NVME_CMD_FUSE_SECOND
            return [
                command(COMPARE, self.nsid, lba=self.lba, prp1=prp1, flags=first),
                command(WRITE, self.nsid, lba=self.lba, prp1=second, flags=then),
            ]
        if self.sgl == "block":
            more |= {"prp2": sgl(lib.NVME_SGL_DATA_BLOCK, self.blocks * PAGE), "flags": SGL}
        elif self.sgl == "bucket":
            more |= {"prp2": sgl(lib.NVME_SGL_LAST_SEGMENT, 16), "flags": SGL}
            prp1 = LISTS + 16 * self.blocks
        return [command(self.opcode, self.nsid, lba=self.lba, blocks=self.blocks, prp1=prp1, **more)]


ios = st.builds(
    Io,
    st.sampled_from([READ] * 4 + [WRITE] * 4 + [COMPARE, FLUSH, ZEROES, UNCOR]),
    st.integers(0, BLOCKS),  # the last one is no block
    st.integers(0, BUFFERS - 1),
    st.sampled_from([1, 1, 1, 2]),
    st.sampled_from([1] * 6 + [2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([0, 0, 0, lib.NVME_RW_FUA]),
    st.sampled_from([None] * 4 + ["block", "bucket"]),
    st.sampled_from([False] * 7 + [True]),
)


@settings(max_examples=tries(150), deadline=None)
@given(burst=st.lists(ios, min_size=1, max_size=30), interrupts=st.booleans())
def test_as_one_by_one(burst: list[Io], interrupts: bool) -> None:
    with Disk() as disk, Disk() as reference:
        if not interrupts:
            delete_and_create(disk)
        wanted = []
        for one in burst:
            reference.submit(*one.commands())
            wanted += reference.reap()
        disk.submit(*(each for one in burst for each in one.commands()))
        assert disk.reap() == wanted
        assert disk.state() == reference.state()


def delete_and_create(disk: Rig) -> None:
    """Its queue pair again, without interrupts: completions come while the burst runs."""
    assert lib.pv_nvme_delete_sq(disk.nvme, 1) == lib.pv_nvme_delete_cq(disk.nvme, 1) == 0
    assert lib.pv_nvme_create_cq(disk.nvme, 1, disk.cq_base(1), 64, 0, 0) == 0
    assert lib.pv_nvme_create_sq(disk.nvme, 1, disk.sq_base(1), 64, 1, 0) == 0


def test_one_that_does_not_move_is_one_error(disk: Disk) -> None:
    """It is not counted, it is logged, and the commands around it succeed."""
    failing = {3: UNMAPPED, MOVES: READ_ONLY}
    count = 2 * MOVES + 1
    disk.submit(*(command(READ, lba=i % BLOCKS, prp1=failing.get(i, DATA)) for i in range(count)))
    assert disk.reap() == [(i, FAILED if i in failing else 0) for i in range(count)]
    (reads, _, read_bytes, *_), log, *_ = disk.state()
    assert (reads, read_bytes) == (count - 2, (count - 2) * PAGE)
    assert [(cid, status >> 1, sq) for cid, status, _, _, _, sq in log] == [
        (MOVES, FAILED, 1),
        (3, FAILED, 1),
    ]


def test_a_read_sees_the_write_before_it(disk: Disk) -> None:
    """Plain or through a list, the same block within a burst."""
    disk.put(LISTS, b"".join((DATA + at * PAGE).to_bytes(8, "little") for at in (1, 3)))
    fresh = noise(PAGE, 3)
    disk.put(DATA, fresh)
    disk.submit(
        command(WRITE, lba=2, prp1=DATA),
        command(READ, lba=2, prp1=DATA + 2 * PAGE),
        command(WRITE, lba=3, prp1=DATA + 2 * PAGE),
        command(READ, lba=1, blocks=3, prp1=LISTS + PAGE, prp2=LISTS),
    )
    assert [status for _, status in disk.reap()] == [0] * 4
    for at in (DATA + PAGE, DATA + 2 * PAGE, DATA + 3 * PAGE):
        assert (disk.at(at, PAGE) == fresh).all()


@pytest.mark.parametrize("segment", [False, True])
def test_a_list_that_the_command_before_reads(disk: Disk, segment: bool) -> None:
    """Where data goes may be among the data of the command before."""
    old, new = ([DATA + at * PAGE for at in pages] for pages in ((0, 1), (2, 3)))
    for found in (old, new):
        words = [word for at in found for word in ((at, PAGE) if segment else (at,))]
        page = b"".join(word.to_bytes(8, "little") for word in words).ljust(PAGE, b"\0")
        if found is old:
            disk.put(LISTS, page)
        else:
            disk.set_media(disk.backing, 0, np.frombuffer(page, np.uint8))
    listed = (
        command(READ, lba=1, blocks=2, prp1=LISTS, prp2=sgl(lib.NVME_SGL_LAST_SEGMENT, 32), flags=SGL)
        if segment
        else command(READ, lba=1, blocks=3, prp1=DATA + PAGE, prp2=LISTS)
    )
    before = disk.at(DATA, PAGE).copy()
    disk.submit(command(READ, lba=0, prp1=LISTS), listed)
    assert [status for _, status in disk.reap()] == [0, 0]
    assert (disk.at(DATA, PAGE) == before).all()
    assert (
        disk.at(DATA + 3 * PAGE, PAGE) == disk.media(disk.backing, (2 if segment else 3) * PAGE, PAGE)
    ).all()


def test_nothing_but_a_bucket(disk: Disk) -> None:
    """Reads into no memory, among others: they succeed, and move nothing."""
    before = disk.at(DATA, BUFFERS * PAGE).copy()
    bucket = {"prp1": LISTS + 16, "prp2": sgl(lib.NVME_SGL_LAST_SEGMENT, 16), "flags": SGL}
    disk.submit(*(command(READ, lba=i, **(bucket if i % 2 else {"prp1": DATA + PAGE})) for i in range(4)))
    assert [status for _, status in disk.reap()] == [0] * 4
    before[PAGE : 2 * PAGE] = disk.media(disk.backing, 2 * PAGE, PAGE)
    assert (disk.at(DATA, BUFFERS * PAGE) == before).all()


def test_writes_that_make_blocks_usable_do_not_wait(disk: Disk) -> None:
    """A refused one leaves the block as it was, to the reads of the same burst."""
    disk.submit(
        command(UNCOR, lba=1),
        command(WRITE, lba=1, prp1=UNMAPPED),
        command(READ, lba=1),
        command(WRITE, lba=1, prp1=DATA),
        command(READ, lba=1, prp1=DATA + PAGE),
    )
    statuses = [status for _, status in disk.reap()]
    assert statuses == [0, FAILED, lib.NVME_SC_READ_ERROR, 0, 0]
    assert (disk.at(DATA, PAGE) == disk.at(DATA + PAGE, PAGE)).all()


def test_data_is_there_before_its_completion() -> None:
    """On a thread: whoever sees a completion sees its data."""
    with Disk("thread") as disk:
        buffers = DATA + BUFFERS * PAGE
        wanted = noise(BLOCKS * PAGE, 10).reshape(BLOCKS, PAGE)
        disk.submit(*(command(READ, lba=i % BLOCKS, prp1=buffers + i * PAGE) for i in range(40)))

        def all_there() -> bool:
            found = disk.peek()
            for entry in found:
                cid = int(entry["cid"])
                assert entry["status"] >> 1 == 0
                assert (disk.at(buffers + cid * PAGE, PAGE) == wanted[cid % BLOCKS]).all()
            return len(found) == 40

        wait_for(all_there)


@pytest.mark.parametrize("before", [1, 2, MOVES - 1, MOVES, MOVES + 1, 39])
def test_a_stop_point_within_a_burst(disk: Disk, before: int) -> None:
    """What was begun before it is complete, data and all; what comes after it has not moved a byte."""
    buffers = DATA + BUFFERS * PAGE
    wanted = noise(BLOCKS * PAGE, 10).reshape(BLOCKS, PAGE)
    disk.engine.stop_before(before)
    disk.submit(*(command(READ, lba=i % BLOCKS, prp1=buffers + i * PAGE) for i in range(40)))
    assert disk.engine.stopped
    assert [int(entry["cid"]) for entry in disk.peek()] == list(range(before))
    pages = disk.at(buffers, 40 * PAGE).reshape(40, PAGE)
    assert (pages[:before] == np.tile(wanted, (5, 1))[:before]).all()
    assert not pages[before:].any()
    disk.engine.resume()
    assert disk.reap() == [(i, 0) for i in range(40)]
    assert (pages == np.tile(wanted, (5, 1))).all()


def test_paused_within_a_burst_nothing_moves() -> None:
    """On a thread, wherever it was stopped: what is complete is there, and nothing comes until it goes on."""
    with Disk("thread") as disk:
        buffers = DATA + BUFFERS * PAGE
        wanted = np.tile(noise(BLOCKS * PAGE, 10).reshape(BLOCKS, PAGE), (5, 1))
        pages = disk.at(buffers, 40 * PAGE).reshape(40, PAGE)
        for turn in range(50):
            pages[:] = 0
            disk.submit(*(command(READ, lba=i % BLOCKS, prp1=buffers + i * PAGE) for i in range(40)))
            disk.engine.pause()
            done = [int(entry["cid"]) - 40 * turn for entry in disk.peek()]
            found = pages.copy()
            assert (found[done] == wanted[done]).all()
            assert len(disk.peek()) == len(done)
            assert (pages == found).all()
            disk.engine.unpause()
            wait_for(lambda: len(disk.peek()) == 40)
            assert [status for _, status in disk.reap()] == [0] * 40
            assert (pages == wanted).all()
