"""Injected faults: what each action does, which commands it meets, and that a seed makes the same ones again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pvfio.abi import ffi, lib
from tests.devices.nvme.data_path_rig import DATA, DNR, PAGE, Bytes, Rig, command, noise, wait_for

pytestmark = pytest.mark.touches_c

READ, WRITE, FLUSH, COMPARE = lib.NVME_CMD_READ, lib.NVME_CMD_WRITE, lib.NVME_CMD_FLUSH, lib.NVME_CMD_COMPARE
DELAY, DROP, STATUS, CORRUPT = (
    lib.PV_NVME_INJECT_DELAY,
    lib.PV_NVME_INJECT_DROP,
    lib.PV_NVME_INJECT_STATUS,
    lib.PV_NVME_INJECT_CORRUPT,
)
BLOCKS = 16


class Disk(Rig):
    def __init__(self) -> None:
        super().__init__(queues=2)
        self.backing = self.memory_namespace(size=BLOCKS * PAGE)
        self.set_media(self.backing, 0, noise(BLOCKS * PAGE))

    def content(self) -> Bytes:
        return self.media(self.backing, 0, BLOCKS * PAGE)

    def kicked(self) -> list[Any]:
        """The completions that are there once it has looked at the time."""
        self.engine.kick()
        return self.peek()


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk() as made:
        yield made


def test_status(disk: Disk) -> None:
    """The command is not executed; others are."""
    rule = disk.inject(STATUS, opcode=WRITE, cdw10=3, status=lib.NVME_SC_WRITE_FAULT)
    assert disk.run(command(WRITE, lba=3)) == lib.NVME_SC_WRITE_FAULT
    assert (disk.content() == noise(BLOCKS * PAGE)).all()
    assert disk.run(command(WRITE, lba=4)) == disk.run(command(READ, lba=3)) == 0
    assert lib.pv_nvme_injected(disk.nvme, rule) == 1
    lib.pv_nvme_inject_clear(disk.nvme, rule)
    assert disk.run(command(WRITE, lba=3)) == 0


def test_a_lie(disk: Disk) -> None:
    """Status 0: it succeeds, and nothing was done."""
    disk.inject(STATUS, opcode=WRITE)
    assert disk.run(command(WRITE)) == 0
    assert (disk.content() == noise(BLOCKS * PAGE)).all()


def test_what_is_matched(disk: Disk) -> None:
    """A queue; the fourth and fifth command of an opcode."""
    disk.inject(STATUS, sq=2, opcode=FLUSH, status=7)
    disk.inject(STATUS, opcode=READ, skip=3, times=2, status=7)
    assert [disk.run(command(FLUSH), queue) for queue in (1, 2, 1)] == [0, 7, 0]
    assert [disk.run(command(READ)) for _ in range(8)] == [0, 0, 0, 7, 7, 0, 0, 0]


@pytest.mark.parametrize("seed", [1, 2, 2**64 - 1])
def test_chance(seed: int) -> None:
    """The same seed, the same faults; about as many as asked for."""
    patterns = []
    for again in (seed, seed, seed ^ 0xFF00):
        with Disk() as disk:
            lib.pv_nvme_inject_seed(disk.nvme, again)
            disk.inject(STATUS, per_mille=250, status=7)
            patterns.append([disk.run(command(READ)) for _ in range(400)])
    assert patterns[0] == patterns[1] != patterns[2]
    assert 60 < patterns[0].count(7) < 140


def test_delay(disk: Disk) -> None:
    """Others pass it; it is executed when its time has come, not before."""
    disk.inject(DELAY, opcode=WRITE, delay_ns=30_000_000)
    [slow] = disk.submit(command(WRITE, lba=2))
    [fast] = disk.submit(command(READ))
    assert disk.reap() == [(fast, 0)]
    assert (disk.content() == noise(BLOCKS * PAGE)).all()
    assert lib.pv_nvme_due(disk.nvme)
    wait_for(disk.kicked)
    assert disk.reap() == [(slow, 0)]
    assert not (disk.content() == noise(BLOCKS * PAGE)).all()
    assert not lib.pv_nvme_due(disk.nvme)


def test_errors_of_delayed_commands(disk: Disk) -> None:
    """They are logged as any other's."""
    disk.inject(DELAY, delay_ns=1)
    disk.submit(command(READ, lba=2**40))
    wait_for(disk.kicked)
    assert [status for _, status in disk.reap()] == [lib.NVME_SC_LBA_RANGE | DNR]
    entries, total = ffi.new("struct nvme_error_log_entry[4]"), ffi.new("uint64_t *")
    assert lib.pv_nvme_errors(disk.nvme, entries, 4, total) == 1
    assert (entries[0].lba, entries[0].parm_error_location) == (2**40, 40)


def test_fused_pairs_are_not_delayed(disk: Disk) -> None:
    disk.inject(DELAY, delay_ns=1 << 40)
    disk.put(DATA, noise(BLOCKS * PAGE)[:PAGE])
    first, second = lib.NVME_CMD_FUSE_FIRST, lib.NVME_CMD_FUSE_SECOND
    disk.submit(command(COMPARE, flags=first), command(WRITE, flags=second))
    assert [status for _, status in disk.reap()] == [0, 0]


def test_a_dropped_half_of_a_pair(disk: Disk) -> None:
    """The other one fails because of it."""
    disk.inject(DROP, opcode=COMPARE)
    first, second = lib.NVME_CMD_FUSE_FIRST, lib.NVME_CMD_FUSE_SECOND
    disk.submit(command(COMPARE, flags=first), command(WRITE, flags=second))
    assert [status for _, status in disk.reap()] == [lib.NVME_SC_FUSED_FAIL]
    assert (disk.content() == noise(BLOCKS * PAGE)).all()


@pytest.mark.parametrize("opcode", [READ, WRITE])
@pytest.mark.parametrize("control", [0, lib.NVME_RW_FUA])
def test_corruption(disk: Disk, opcode: int, control: int) -> None:
    """One bit of the command's data, and success."""
    disk.inject(CORRUPT, opcode=opcode)
    disk.put(DATA, noise(2 * PAGE, 2))
    assert disk.run(command(opcode, lba=5, blocks=2, prp2=DATA + PAGE, control=control)) == 0
    content, memory = disk.content(), disk.at(DATA, 2 * PAGE)
    assert np.bitwise_count(content[5 * PAGE : 7 * PAGE] ^ memory).sum() == 1
    assert (content[: 5 * PAGE] == noise(BLOCKS * PAGE)[: 5 * PAGE]).all()
    if opcode == READ:
        assert (content == noise(BLOCKS * PAGE)).all()


def test_corruption_of_commands_without_data(disk: Disk) -> None:
    """None."""
    disk.inject(CORRUPT)
    for one in (command(FLUSH), command(lib.NVME_CMD_VERIFY), command(READ, lba=99)):
        disk.run(one)
    assert (disk.content() == noise(BLOCKS * PAGE)).all()


def test_a_lost_interrupt(disk: Disk) -> None:
    """The completion is there, and the next one rings."""
    disk.inject(lib.PV_NVME_INJECT_LOSE_INTERRUPT, times=1)
    assert disk.run(command(READ)) == 0
    assert disk.interrupts() == 0
    assert disk.run(command(READ)) == 0
    assert disk.interrupts() == 1


@pytest.mark.parametrize(
    ("action", "event"),
    [
        (lib.PV_NVME_INJECT_FATAL, lib.PV_NVME_EVENT_FATAL),
        (lib.PV_NVME_INJECT_VANISH, lib.PV_NVME_EVENT_VANISH),
    ],
)
def test_the_end(disk: Disk, action: int, event: int) -> None:
    """What came before completes; nothing after, and no timer goes on."""
    disk.inject(DELAY, opcode=FLUSH, delay_ns=1)
    disk.inject(action, cdw10=2)
    disk.submit(*[command(READ, lba=lba) for lba in range(5)], command(FLUSH))
    assert [cid for cid, _ in disk.reap()] == [0, 1]
    disk.submit(command(READ))
    assert not disk.peek()
    assert disk.events() & event
    assert not lib.pv_nvme_due(disk.nvme)


@pytest.mark.parametrize("action", [lib.PV_NVME_INJECT_FATAL, lib.PV_NVME_INJECT_VANISH])
def test_the_end_comes_between_the_halves_of_a_pair(disk: Disk, action: int) -> None:
    """The second one does not complete either, and does nothing."""
    disk.inject(action, opcode=COMPARE)
    disk.put(DATA, noise(BLOCKS * PAGE)[:PAGE])
    disk.put(DATA + PAGE, noise(PAGE, 2))
    first, second = lib.NVME_CMD_FUSE_FIRST, lib.NVME_CMD_FUSE_SECOND
    disk.submit(command(COMPARE, flags=first), command(WRITE, flags=second, prp1=DATA + PAGE))
    assert not disk.peek()
    assert (disk.content() == noise(BLOCKS * PAGE)).all()


def test_fatal_status_ends_with_a_reset(disk: Disk) -> None:
    disk.inject(lib.PV_NVME_INJECT_FATAL, times=1)
    disk.submit(command(READ))
    lib.pv_nvme_disable(disk.nvme)
    disk.enable(2)
    assert disk.run(command(READ)) == 0


@pytest.mark.parametrize("bad", [{"action": 0}, {"action": 8}, {"sq": -2}, {"sq": 65}, {"per_mille": 1001}])
def test_bad_rules(disk: Disk, bad: dict[str, Any]) -> None:
    assert disk.inject(**{"action": STATUS} | bad) < 0


def test_room_for_rules(disk: Disk) -> None:
    assert [disk.inject(STATUS) for _ in range(33)][-2:] == [31, -28]
    lib.pv_nvme_inject_clear(disk.nvme, 7)
    assert disk.inject(STATUS) == 7
    lib.pv_nvme_inject_clear(disk.nvme, -1)
    lib.pv_nvme_inject_clear(disk.nvme, 99)
    assert lib.pv_nvme_injected(disk.nvme, -1) == lib.pv_nvme_injected(disk.nvme, 32) == 0
    assert disk.run(command(READ)) == 0
