"""Fault injection: what a rule matches, how often, what each fault does, surprise removal."""

from __future__ import annotations

from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import DNR, PLACES, Place, Rig, running

pytestmark = pytest.mark.touches_c

READ, WRITE = lib.NVME_CMD_READ, lib.NVME_CMD_WRITE
FAULT = lib.NVME_SC_INTERNAL


async def reads(rig: Rig, *lbas: int, **fields: Any) -> list[int]:
    """Which of these reads met the fault."""
    done = [await rig.io(READ, cdw10=lba, **fields) for lba in lbas]
    return [lba for lba, one in zip(lbas, done, strict=True) if one.code == FAULT]


@pytest.mark.parametrize(
    ("rule", "hit"),
    [
        ({}, [0]),
        ({"times": None}, [0, 1, 2, 3, 4, 5]),
        ({"times": 2, "skip": 1}, [1, 2]),
        ({"lba": 3}, [3]),
        ({"opcode": READ, "nsid": 1, "queue": 1}, [0]),
        ({"opcode": WRITE}, []),
        ({"nsid": 2}, []),
        ({"queue": 0}, []),
        ({"match": {"cdw10": (1, 1)}, "times": None}, [1, 3, 5]),
        ({"match": {"cid": 0xFFF}}, []),
        ({"probability": 0.0}, []),
    ],
)
async def test_what_a_rule_matches(rule: dict[str, Any], hit: list[int]) -> None:
    async with running() as rig:
        fault = rig.device.inject("status", status=FAULT, **rule)
        assert await reads(rig, *range(6)) == hit
        assert fault.count == len(hit)


async def test_chance_is_the_seeds() -> None:
    seen = []
    for seed in (1, 1, 2):
        async with running() as rig:
            rig.device.seed_injections(seed)
            rig.device.inject("status", status=FAULT, probability=0.5, times=None)
            seen.append(await reads(rig, *range(64)))
    assert seen[0] == seen[1] != seen[2]
    assert 10 < len(seen[0]) < 54


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_status_of_admin_commands(place: Place, engine: EngineKind) -> None:
    async with running(place=place, engine=engine) as rig:
        rig.device.inject("status", status=FAULT | DNR, opcode=lib.NVME_ADMIN_IDENTIFY, queue=0)
        done = await rig.admin(lib.NVME_ADMIN_IDENTIFY, cdw10=1)
        assert (done.code, done.dnr) == (FAULT, True)
        assert (await rig.admin(lib.NVME_ADMIN_IDENTIFY, cdw10=1)).status == 0


async def test_success_of_what_was_not_done() -> None:
    async with running() as rig:
        fault = rig.device.inject("status", opcode=WRITE)
        assert (await rig.io(WRITE, data=b"x" * 4096)).status == 0
        assert fault.count == 1
        assert (await rig.io(READ)).status == 0
        assert not rig.data[:4096].any()


async def test_a_rule_is_forgotten_and_survives_a_reset() -> None:
    async with running() as rig:
        fault = rig.device.inject("status", status=FAULT, times=None)
        rig.reset()
        rig.device.inject("status", status=FAULT, opcode=0x7F, times=None)
        assert fault.count == 0
        fault.clear()
        await rig.make_queues()
        assert await reads(rig, 0) == []
        rig.device.inject("status", status=FAULT, times=None)
        rig.device.clear_injections()
        assert await reads(rig, 0) == []


async def test_delay() -> None:
    """The command comes after those that were sent after it."""
    async with running() as rig:
        rig.device.inject("delay", lba=1, delay=0.05)
        late, soon = (rig.submit(READ, ring=rig.io_ring, nsid=1, cdw10=n, prp1=rig.iova) for n in (1, 2))
        await rig.settle()
        rig.io_ring.collect()
        assert soon in rig.io_ring.done
        assert late not in rig.io_ring.done
        assert (await rig.wait(late, ring=rig.io_ring)).status == 0


@pytest.mark.parametrize("opcode", [READ, WRITE])
async def test_corruption_is_one_bit_and_succeeds(opcode: int) -> None:
    async with running() as rig:
        rig.device.inject("corrupt", opcode=opcode)
        assert (await rig.io(WRITE, data=bytes(4096))).status == 0
        rig.data[:4096] = 0xFF
        assert (await rig.io(READ)).status == 0
        assert sum(int(byte).bit_count() for byte in rig.data[:4096]) == 1


async def test_a_dropped_admin_command_can_be_aborted() -> None:
    async with running() as rig:
        rig.device.inject("drop", opcode=lib.NVME_ADMIN_KEEP_ALIVE)
        lost = rig.submit(lib.NVME_ADMIN_KEEP_ALIVE)
        await rig.settle()
        assert lost not in rig.admin_ring.done
        assert (await rig.admin(lib.NVME_ADMIN_ABORT, cdw10=lost << 16)).result == 0
        assert (await rig.wait(lost)).code == lib.NVME_SC_ABORT_REQ


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_fatal_status(place: Place, engine: EngineKind) -> None:
    async with running(place=place, engine=engine) as rig:
        rig.device.inject("fatal", opcode=READ)
        lost = rig.submit(READ, ring=rig.io_ring, nsid=1, prp1=rig.iova)
        await rig.until(lambda: rig.csts & lib.NVME_CSTS_CFS)
        rig.io_ring.collect()
        assert lost not in rig.io_ring.done
        rig.reset()
        await rig.make_queues()
        assert (await rig.io(READ)).status == 0


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_surprise_removal(place: Place, engine: EngineKind) -> None:
    """Ones from everywhere, for good; nothing is written any more."""
    async with running(place=place, engine=engine) as rig:
        rig.device.inject("vanish", opcode=READ)
        rig.submit(READ, ring=rig.io_ring, nsid=1, prp1=rig.iova)
        await rig.until(lambda: rig.csts == 0xFFFFFFFF)
        device = rig.device
        assert device.removed
        assert device.config_read(0, 2) == 0xFFFF
        rig.memory[:0x4000] = 0
        rig.write(lib.NVME_REG_CC, 4, 0)
        rig.doorbell(0, 5)
        await device.reset()
        assert rig.csts == 0xFFFFFFFF
        assert device.config_read(lib.PCI_COMMAND, 2) == 0xFFFF
        assert not rig.memory[:0x4000].any()


@pytest.mark.parametrize(
    "rule",
    [
        {"fault": "explode"},
        {"fault": "drop", "status": 6},
        {"fault": "status", "status": 0x10000},
        {"fault": "drop", "times": 0},
        {"fault": "drop", "skip": -1},
        {"fault": "drop", "probability": 1.5},
        {"fault": "delay", "delay": -1.0},
        {"fault": "drop", "queue": 65},
        {"fault": "drop", "opcode": 256},
        {"fault": "drop", "match": {"colour": 1}},
        {"fault": "drop", "match": {"cid": 0x10000}},
    ],
)
async def test_rules_that_cannot_be(rule: dict[str, Any]) -> None:
    async with running() as rig:
        with pytest.raises(ValueError):
            rig.device.inject(**rule)


async def test_there_are_32_rules() -> None:
    async with running() as rig:
        for _ in range(lib.PV_NVME_RULES):
            rig.device.inject("drop", opcode=0x7F)
        with pytest.raises(BlockingIOError):
            rig.device.inject("drop")
