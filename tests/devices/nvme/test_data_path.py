"""The commands of the NVM command set on the data path: what they do, and the status of every bad field."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pvfio.abi import dtype_of, ffi, lib
from tests.devices.nvme.data_path_rig import DATA, DNR, PAGE, Rig, command, noise

pytestmark = pytest.mark.touches_c

BLOCKS = 256
READ, WRITE, FLUSH, COMPARE = lib.NVME_CMD_READ, lib.NVME_CMD_WRITE, lib.NVME_CMD_FLUSH, lib.NVME_CMD_COMPARE
VERIFY, ZEROES, UNCOR = lib.NVME_CMD_VERIFY, lib.NVME_CMD_WRITE_ZEROES, lib.NVME_CMD_WRITE_UNCOR
DSM, COPY = lib.NVME_CMD_DSM, lib.NVME_CMD_COPY
FUA = lib.NVME_RW_FUA
LAST = 2**64 - 1


class Disk(Rig):
    """A rig with a namespace of 256 blocks of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.content = noise(BLOCKS * PAGE)
        self.backing = self.memory_namespace(size=BLOCKS * PAGE)
        self.set_media(self.backing, 0, self.content)

    def check(self) -> None:
        """The namespace holds what the test says it holds."""
        assert (self.media(self.backing, 0, BLOCKS * PAGE) == self.content).all()

    def block(self, lba: int, count: int = 1) -> Any:
        return self.content[lba * PAGE : (lba + count) * PAGE]


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk() as made:
        yield made


@pytest.mark.parametrize(("lba", "blocks"), [(0, 1), (255, 1), (17, 2), (3, 1), (250, 1)])
def test_read_and_write(disk: Disk, lba: int, blocks: int) -> None:
    """PRP 1 and 2 suffice for two pages."""
    assert disk.run(command(READ, lba=lba, blocks=blocks, prp2=DATA + PAGE)) == 0
    assert (disk.at(DATA, blocks * PAGE) == disk.block(lba, blocks)).all()
    disk.block(lba, blocks)[:] = fresh = noise(blocks * PAGE, 2)
    disk.put(DATA, fresh)
    assert disk.run(command(WRITE, lba=lba, blocks=blocks, prp2=DATA + PAGE, control=FUA)) == 0
    disk.check()


def test_512_byte_blocks() -> None:
    with Rig() as rig:
        backing = rig.memory_namespace(size=1 << 16, lba_shift=9)
        rig.put(DATA, noise(3 * 512))
        assert rig.run(command(WRITE, lba=5, blocks=3)) == 0
        assert (rig.media(backing, 5 * 512, 3 * 512) == noise(3 * 512)).all()
        assert rig.run(command(READ, lba=126, blocks=3)) == lib.NVME_SC_LBA_RANGE | DNR


@pytest.mark.parametrize("opcode", [FLUSH, READ, WRITE, COMPARE, VERIFY, ZEROES, UNCOR, DSM, COPY])
@pytest.mark.parametrize(
    ("nsid", "status"),
    [
        (0, lib.NVME_SC_INVALID_NS),
        (2, lib.NVME_SC_INVALID_FIELD),
        (16, lib.NVME_SC_INVALID_FIELD),
        (17, lib.NVME_SC_INVALID_NS),
        (2**32 - 2, lib.NVME_SC_INVALID_NS),
        (2**32 - 1, lib.NVME_SC_INVALID_FIELD),
    ],
)
def test_namespace_identifiers(disk: Disk, opcode: int, nsid: int, status: int) -> None:
    """NSIDs that cannot be, and inactive ones (Base 3.2.1)."""
    assert disk.run(command(opcode, nsid)) == status | DNR
    disk.check()


@pytest.mark.parametrize("opcode", [o for o in range(256) if o not in (0, 1, 2, 4, 5, 8, 9, 12, 25)])
def test_unknown_opcodes(disk: Disk, opcode: int) -> None:
    assert disk.run(command(opcode)) == lib.NVME_SC_INVALID_OPCODE | DNR


@pytest.mark.parametrize("opcode", [READ, WRITE, COMPARE, VERIFY, ZEROES, UNCOR])
@pytest.mark.parametrize(
    ("lba", "blocks"),
    [(256, 1), (255, 2), (LAST, 1), (LAST, 2), (2**63, 1), (2**32, 1), (2**52, 8), (0, 257)],
)
def test_lba_ranges(disk: Disk, opcode: int, lba: int, blocks: int) -> None:
    """Beyond the end, and where the arithmetic of a careless device wraps."""
    assert disk.run(command(opcode, lba=lba, blocks=blocks)) == lib.NVME_SC_LBA_RANGE | DNR
    disk.check()


@pytest.mark.parametrize("opcode", [READ, WRITE, COMPARE])
def test_transfers_beyond_mdts(disk: Disk, opcode: int) -> None:
    """The rig's is 32 pages."""
    assert disk.run(command(opcode, blocks=33)) == lib.NVME_SC_INVALID_FIELD | DNR
    assert disk.run(command(VERIFY, blocks=256)) == 0


def test_errors_are_logged(disk: Disk) -> None:
    """Queue, identifier, status, the byte in question, LBA and namespace of each; newest first."""
    disk.run(command(READ, lba=2**40))
    disk.run(command(0x7F))
    entries, total = ffi.new("struct nvme_error_log_entry[64]"), ffi.new("uint64_t *")
    assert lib.pv_nvme_errors(disk.nvme, entries, 64, total) == total[0] == 2
    newest, oldest = entries[0], entries[1]
    assert (newest.error_count, newest.status_field >> 1) == (2, lib.NVME_SC_INVALID_OPCODE | DNR)
    assert (oldest.sqid, oldest.cmdid, oldest.nsid, oldest.lba) == (1, 0, 1, 2**40)
    assert oldest.parm_error_location == 40


class TestCompare:
    @pytest.mark.parametrize("blocks", [1, 2])
    def test_equal_and_not(self, disk: Disk, blocks: int) -> None:
        disk.put(DATA, disk.block(9, blocks))
        assert disk.run(command(COMPARE, lba=9, blocks=blocks, prp2=DATA + PAGE)) == 0
        disk.at(DATA, blocks * PAGE)[-1] ^= 1
        assert (
            disk.run(command(COMPARE, lba=9, blocks=blocks, prp2=DATA + PAGE))
            == lib.NVME_SC_COMPARE_FAILED | DNR
        )
        disk.check()


class TestFused:
    """Compare and write (Base 3.4.2, NVM 2.1.2)."""

    def pair(self, disk: Disk, **second: int) -> list[int]:
        disk.submit(
            command(COMPARE, lba=4, flags=lib.NVME_CMD_FUSE_FIRST),
            command(
                **{"opcode": WRITE, "lba": 4, "flags": lib.NVME_CMD_FUSE_SECOND, "prp1": DATA + PAGE} | second
            ),
        )
        return [status for _, status in disk.reap()]

    def test_equal(self, disk: Disk) -> None:
        disk.put(DATA, disk.block(4))
        disk.put(DATA + PAGE, noise(PAGE, 3))
        assert self.pair(disk) == [0, 0]
        disk.block(4)[:] = noise(PAGE, 3)
        disk.check()

    def test_different(self, disk: Disk) -> None:
        assert self.pair(disk) == [lib.NVME_SC_COMPARE_FAILED | DNR, lib.NVME_SC_FUSED_FAIL]
        disk.check()

    @pytest.mark.parametrize(
        "second", [{"lba": 5}, {"blocks": 2}, {"nsid": 2}, {"opcode": READ}, {"opcode": COMPARE}], ids=str
    )
    def test_no_pair(self, disk: Disk, second: dict[str, int]) -> None:
        """Other ranges and other commands."""
        disk.put(DATA, disk.block(4))
        assert self.pair(disk, **second) == [lib.NVME_SC_INVALID_FIELD | DNR] * 2
        disk.check()

    @pytest.mark.parametrize("flags", [lib.NVME_CMD_FUSE_FIRST, lib.NVME_CMD_FUSE_SECOND])
    def test_alone(self, disk: Disk, flags: int) -> None:
        assert disk.run(command(WRITE, flags=flags)) == lib.NVME_SC_FUSED_MISSING | DNR
        disk.check()

    def test_reserved_value(self, disk: Disk) -> None:
        assert disk.run(command(WRITE, flags=lib.NVME_CMD_FUSE_MASK)) == lib.NVME_SC_INVALID_FIELD | DNR

    def test_two_seconds(self, disk: Disk) -> None:
        """The pair is complete; what follows it is missing its first."""
        disk.put(DATA, disk.block(4))
        disk.put(DATA + PAGE, disk.block(4))
        second = command(WRITE, lba=4, flags=lib.NVME_CMD_FUSE_SECOND)
        disk.submit(command(COMPARE, lba=4, flags=lib.NVME_CMD_FUSE_FIRST), second, second.copy())
        assert [status for _, status in disk.reap()] == [0, 0, lib.NVME_SC_FUSED_MISSING | DNR]

    @pytest.mark.parametrize("burst", [0, 1, 7])
    def test_pairs_across_bursts_and_the_end_of_the_queue(self, disk: Disk, burst: int) -> None:
        """However many commands are fetched at once, a pair stays one."""
        lib.pv_nvme_set_arbitration(disk.nvme, burst, 0, 0, 0)
        disk.put(DATA, disk.block(4))
        first = command(COMPARE, lba=4, flags=lib.NVME_CMD_FUSE_FIRST)
        second = command(WRITE, lba=4, flags=lib.NVME_CMD_FUSE_SECOND)
        for _ in range(5):
            some = [command(FLUSH)] * 3 + [first, second] * 12
            disk.submit(*[one.copy() for one in some])
            assert [status for _, status in disk.reap()] == [0] * len(some)


class TestRanges:
    def test_write_zeroes(self, disk: Disk) -> None:
        for control in (0, lib.NVME_RW_DEAC, FUA):
            lba = 10 + control % 7
            assert disk.run(command(ZEROES, lba=lba, blocks=100, control=control)) == 0
            disk.block(lba, 100)[:] = 0
        disk.check()

    def test_write_uncorrectable(self, disk: Disk) -> None:
        """Reading, comparing and verifying fail until somebody writes; other blocks are none the worse."""
        assert disk.run(command(UNCOR, lba=60, blocks=10)) == 0
        for lba, status in ((59, 0), (60, lib.NVME_SC_READ_ERROR), (69, lib.NVME_SC_READ_ERROR), (70, 0)):
            for opcode in (READ, VERIFY):
                assert disk.run(command(opcode, lba=lba)) == status
        assert disk.run(command(COMPARE, lba=62)) == lib.NVME_SC_READ_ERROR
        assert disk.run(command(VERIFY, blocks=256)) == lib.NVME_SC_READ_ERROR
        assert disk.run(command(WRITE, lba=60, blocks=2, prp2=DATA + PAGE)) == 0
        assert disk.run(command(READ, lba=60, blocks=2, prp2=DATA + PAGE)) == 0
        assert disk.run(command(READ, lba=61, blocks=2, prp2=DATA + PAGE)) == lib.NVME_SC_READ_ERROR
        assert disk.run(command(ZEROES, lba=62, blocks=8)) == 0
        assert disk.run(command(VERIFY, blocks=256)) == 0

    def dsm(self, disk: Disk, *ranges: tuple[int, int], attributes: int = lib.NVME_DSM_AD) -> int:
        table = np.zeros(len(ranges), dtype_of("struct nvme_dsm_range"))
        for entry, (lba, count) in zip(table, ranges, strict=True):
            entry["slba"], entry["nlb"] = lba, count
        disk.put(DATA, table)
        return disk.run(command(DSM, cdw10=len(ranges) - 1, cdw11=attributes, cdw12=0))

    def test_deallocate(self, disk: Disk) -> None:
        """Deallocated blocks read as zeroes; an empty range is none."""
        assert self.dsm(disk, (3, 5), (100, 0), (255, 1), (20, 1)) == 0
        for lba, count in ((3, 5), (255, 1), (20, 1)):
            disk.block(lba, count)[:] = 0
        disk.check()

    def test_hints(self, disk: Disk) -> None:
        assert self.dsm(disk, (3, 5), attributes=lib.NVME_DSM_IDR | lib.NVME_DSM_IDW) == 0
        disk.check()

    def test_256_ranges(self, disk: Disk) -> None:
        assert self.dsm(disk, *[(lba, 1) for lba in range(256)]) == 0
        disk.content[:] = 0
        disk.check()

    @pytest.mark.parametrize("bad", [(256, 1), (0, 257), (LAST, 1), (1, 2**32 - 1), (LAST, 2**32 - 1)])
    def test_one_bad_range(self, disk: Disk, bad: tuple[int, int]) -> None:
        """Nothing is deallocated then."""
        assert self.dsm(disk, (3, 5), bad) == lib.NVME_SC_LBA_RANGE | DNR
        disk.check()

    def copy(self, disk: Disk, to: int, *ranges: tuple[int, int], control: int = 0) -> int:
        table = np.zeros(len(ranges), dtype_of("struct nvme_copy_range"))
        for entry, (lba, count) in zip(table, ranges, strict=True):
            entry["slba"], entry["nlb"] = lba, count - 1
        disk.put(DATA, table)
        return disk.run(command(COPY, lba=to, cdw12=len(ranges) - 1 | control))

    def test_copy(self, disk: Disk) -> None:
        assert self.copy(disk, 100, (3, 40), (250, 6), (50, 1), control=FUA) == 0
        disk.block(100, 47)[:] = np.concatenate([disk.block(3, 40), disk.block(250, 6), disk.block(50)])
        disk.check()

    @pytest.mark.parametrize(
        ("to", "ranges", "status"),
        [
            (256, [(0, 1)], lib.NVME_SC_LBA_RANGE),
            (250, [(0, 7)], lib.NVME_SC_LBA_RANGE),
            (0, [(255, 2)], lib.NVME_SC_LBA_RANGE),
            (0, [(1, 1), (LAST, 1)], lib.NVME_SC_LBA_RANGE),
            (0, [(0, 4097)], lib.NVME_SC_CMD_SIZE_LIMIT_EXCEEDED),
            (0, [(0, 1)] * 129, lib.NVME_SC_CMD_SIZE_LIMIT_EXCEEDED),
            (0, [(0, 65536)] * 128, lib.NVME_SC_CMD_SIZE_LIMIT_EXCEEDED),
        ],
    )
    def test_bad_copies(self, disk: Disk, to: int, ranges: list[tuple[int, int]], status: int) -> None:
        assert self.copy(disk, to, *ranges) == status | DNR
        disk.check()

    def test_copy_format(self, disk: Disk) -> None:
        assert self.copy(disk, 0, (9, 1), control=0x100) == lib.NVME_SC_INVALID_FIELD | DNR

    def test_copy_of_unreadable_blocks(self, disk: Disk) -> None:
        disk.run(command(UNCOR, lba=8))
        assert self.copy(disk, 100, (5, 5)) == lib.NVME_SC_READ_ERROR
        assert self.copy(disk, 8, (5, 2)) == 0, "writes make blocks readable again"
        disk.block(8, 2)[:] = disk.block(5, 2)
        disk.check()


WRITES = [
    command(WRITE),
    command(ZEROES),
    command(UNCOR),
    command(DSM, cdw10=0, cdw11=lib.NVME_DSM_AD),
    command(COPY, lba=100, cdw12=0),
]


@pytest.mark.parametrize("one", WRITES, ids=lambda one: hex(one["opcode"]))
def test_write_protection(disk: Disk, one: Any) -> None:
    lib.pv_nvme_write_protect(disk.nvme, 1, 1)
    assert disk.run(one.copy()) == lib.NVME_SC_NS_WRITE_PROTECTED | DNR
    assert disk.run(command(READ)) == disk.run(command(FLUSH)) == 0
    disk.check()
    lib.pv_nvme_write_protect(disk.nvme, 1, 0)
    disk.at(DATA, PAGE)[:] = 0  # the ranges of those that have some
    assert disk.run(one.copy()) == 0


@pytest.mark.parametrize("one", WRITES, ids=lambda one: hex(one["opcode"]))
def test_read_only_namespaces(disk: Disk, one: Any) -> None:
    disk.memory_namespace(2, read_only=1)
    changed = one.copy()
    changed["nsid"] = 2
    assert disk.run(changed) == lib.NVME_SC_READ_ONLY | DNR
    assert disk.run(command(READ, 2)) == 0


def test_refused_io(disk: Disk) -> None:
    """While a sanitize operation runs, say."""
    lib.pv_nvme_refuse_io(disk.nvme, lib.NVME_SC_SANITIZE_IN_PROGRESS)
    assert disk.run(command(READ)) == lib.NVME_SC_SANITIZE_IN_PROGRESS
    lib.pv_nvme_refuse_io(disk.nvme, 0)
    assert disk.run(command(READ)) == 0


def test_statistics(disk: Disk) -> None:
    """What the SMART log counts: commands that succeeded, and their data."""
    for one in (command(READ), command(WRITE, blocks=2, prp2=DATA), command(READ, lba=999)):
        disk.run(one)
    disk.run(command(UNCOR, lba=1))
    disk.run(command(READ, lba=1))
    stats = ffi.new("struct pv_nvme_stats *")
    lib.pv_nvme_get_stats(disk.nvme, stats)
    assert (stats.reads, stats.read_bytes, stats.writes, stats.written_bytes) == (1, PAGE, 1, 2 * PAGE)
    assert stats.media_errors == 1


def test_busy_time(disk: Disk) -> None:
    """It grows with the work, and not beyond the time there was."""
    stats = ffi.new("struct pv_nvme_stats *")
    begin = time.monotonic_ns()
    source = np.zeros(1, dtype_of("struct nvme_copy_range"))
    source["nlb"] = 127
    disk.put(DATA, source)
    for _ in range(100_000):
        assert disk.run(command(COPY, lba=128, cdw12=0)) == 0
        lib.pv_nvme_get_stats(disk.nvme, stats)
        if stats.busy_ns:
            break
    assert 0 < stats.busy_ns <= time.monotonic_ns() - begin + 20_000_000  # a tick or two
