"""Sanitize: what becomes of the blocks, what is refused meanwhile, the log, failure and the way out of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import MIB, PLACES, Place, Rig, running

pytestmark = pytest.mark.touches_c

SANITIZE, LOG = lib.NVME_ADMIN_SANITIZE, lib.NVME_LOG_SANITIZE
BLOCK, OVERWRITE, CRYPTO = lib.NVME_SANITIZE_BLOCK, lib.NVME_SANITIZE_OVERWRITE, lib.NVME_SANITIZE_CRYPTO
UNRESTRICTED, INVERT, KEEP = 0x8, 0x100, 0x200
BUSY, FAILED = lib.NVME_SC_SANITIZE_IN_PROGRESS, lib.NVME_SC_SANITIZE_FAILED
ALLOWED = {0, 1, 4, 5, 6, 8, 9, 0xA, 0x18}
REFUSED = {0xD, 0x10, 0x11, 0x14, 0x15, 0x7C, 0x80, 0x84}


async def state(rig: Rig) -> Any:
    return await rig.log(LOG, 512, kind="nvme_sanitize_log")


@asynccontextmanager
async def sanitizing(word: int = BLOCK, *, fails: bool = False) -> AsyncIterator[Rig]:
    """A controller with an operation under way; the clock jumps."""
    async with running(NvmeConfig(sanitize_seconds=10)) as rig:
        rig.device.sanitize.media_fails = fails
        assert (await rig.io(lib.NVME_CMD_WRITE, data=b"secret" * 100)).status == 0
        assert (await rig.admin(SANITIZE, cdw10=word, cdw11=0x11223344)).status == 0
        yield rig


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_erases(place: Place, engine: EngineKind) -> None:
    async with running(NvmeConfig(sanitize_seconds=0), place=place, engine=engine) as rig:
        assert (await state(rig)).sstat == lib.NVME_SSTAT_NEVER | lib.NVME_SSTAT_GLOBAL_ERASED
        assert (await rig.io(lib.NVME_CMD_WRITE, data=b"secret" * 100)).status == 0
        assert (await state(rig)).sstat == lib.NVME_SSTAT_NEVER
        request = await rig.events()
        assert (await rig.admin(SANITIZE, cdw10=CRYPTO)).status == 0
        done = await rig.wait(request)
        assert done.result == lib.NVME_AER_IO | 1 << 8 | LOG << 16
        log = await state(rig)
        assert (log.sprog, log.scdw10, log.eto) == (0xFFFF, CRYPTO, 0xFFFFFFFF)
        assert log.sstat == lib.NVME_SSTAT_OK | lib.NVME_SSTAT_GLOBAL_ERASED
        assert (await rig.io(lib.NVME_CMD_READ)).status == 0
        assert not rig.data[:600].any()
        assert (await rig.io(lib.NVME_CMD_WRITE)).status == 0
        assert (await state(rig)).sstat == lib.NVME_SSTAT_OK


@pytest.mark.parametrize(
    ("word", "passes", "block"),
    [
        (OVERWRITE, 16, bytes(4)),
        (OVERWRITE | 1 << 4, 1, bytes(4)),
        (OVERWRITE | 1 << 4 | KEEP, 1, bytes.fromhex("44332211")),
        (OVERWRITE | 2 << 4 | KEEP, 2, bytes.fromhex("44332211")),
        (OVERWRITE | 2 << 4 | KEEP | INVERT, 2, bytes.fromhex("44332211")),
        (OVERWRITE | 3 << 4 | KEEP | INVERT, 3, bytes.fromhex("44332211")),
    ],
)
async def test_overwrites(word: int, passes: int, block: bytes, autojump_clock: trio.abc.Clock) -> None:
    async with sanitizing(word) as rig:
        await trio.sleep(11)
        assert (await state(rig)).sstat >> 3 & 0x1F == passes
        assert (await rig.io(lib.NVME_CMD_READ, cdw10=9)).status == 0
        assert rig.data[:4096].tobytes() == block * 1024


@pytest.mark.parametrize("opcode", sorted(ALLOWED | REFUSED))
async def test_commands_meanwhile(opcode: int, autojump_clock: trio.abc.Clock) -> None:
    async with sanitizing() as rig:
        log = LOG if opcode == lib.NVME_ADMIN_GET_LOG_PAGE else 0
        done = await rig.admin(opcode, nsid=1, cdw10=log or 1)
        assert (done.code == BUSY) == (opcode in REFUSED)
        assert not (done.dnr and opcode in REFUSED)


@pytest.mark.parametrize("lid", [1, 2, 3, 4, 5, 6, 0x81])
async def test_logs_meanwhile(lid: int, autojump_clock: trio.abc.Clock) -> None:
    async with sanitizing() as rig:
        done = await rig.admin(lib.NVME_ADMIN_GET_LOG_PAGE, cdw10=lid | 127 << 16)
        assert done.code == (0 if lid in (1, 2, 4, 0x81) else BUSY)


async def test_progress_and_io(autojump_clock: trio.abc.Clock) -> None:
    async with sanitizing() as rig:
        seen = []
        for _ in range(4):
            log = await state(rig)
            assert log.sstat == lib.NVME_SSTAT_PROGRESS
            seen.append(log.sprog)
            assert (await rig.io(lib.NVME_CMD_READ)).code == BUSY
            await trio.sleep(2)
        assert seen == sorted(set(seen))
        rig.reset()
        await rig.make_queues()
        assert (await rig.io(lib.NVME_CMD_READ)).code == BUSY
        await trio.sleep(5)
        assert (await rig.io(lib.NVME_CMD_READ)).status == 0


async def test_failure_and_the_way_out(autojump_clock: trio.abc.Clock) -> None:
    async with sanitizing(BLOCK | UNRESTRICTED, fails=True) as rig:
        request = await rig.events()
        await trio.sleep(11)
        assert (await rig.wait(request)).result >> 16 == LOG
        assert (await state(rig)).sstat == lib.NVME_SSTAT_FAILED
        assert (await rig.io(lib.NVME_CMD_READ)).code == FAILED
        assert (await rig.admin(lib.NVME_ADMIN_FORMAT_NVM, nsid=1)).code == FAILED
        assert (await rig.admin(SANITIZE, cdw10=1)).status == 0
        assert (await state(rig)).sstat == lib.NVME_SSTAT_FAILED  # the last one, still
        assert (await rig.io(lib.NVME_CMD_READ)).status == 0


@pytest.mark.parametrize("word", [BLOCK, CRYPTO, OVERWRITE | 1 << 4])
@pytest.mark.parametrize("keep", [0, KEEP])
async def test_deallocation(word: int, keep: int, tmp_path: Path) -> None:
    """With No-Deallocate After Sanitize, blocks keep the room they have."""
    image = tmp_path / "disk"
    image.write_bytes(b"secret" * (MIB // 6 + 1))
    os.truncate(image, MIB)
    config = NvmeConfig(sanitize_seconds=0)
    async with running(config, (NamespaceSpec(image=image, size=0),)) as rig:
        assert (await state(rig)).sstat == lib.NVME_SSTAT_NEVER  # the image may hold anything
        page = await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")
        assert page.nuse == page.nsze
        assert (await rig.admin(SANITIZE, cdw10=word | keep)).status == 0
        await rig.wait(await rig.events())
        page = await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")
        assert page.nuse == (page.nsze if keep else 0)
        assert image.read_bytes() == bytes(MIB)


async def test_the_event_of_the_operation_before_is_gone(autojump_clock: trio.abc.Clock) -> None:
    async with sanitizing() as rig:
        await trio.sleep(11)
        assert (await rig.admin(SANITIZE, cdw10=BLOCK)).status == 0
        request = await rig.events()
        assert request not in rig.admin_ring.done
        await trio.sleep(11)
        assert (await rig.wait(request)).result >> 16 == LOG


async def test_the_error_log_names_no_blocks_meanwhile(autojump_clock: trio.abc.Clock) -> None:
    async with running(NvmeConfig(sanitize_seconds=10)) as rig:
        assert (await rig.io(lib.NVME_CMD_READ, cdw10=77777)).code == lib.NVME_SC_LBA_RANGE
        assert (await rig.log(lib.NVME_LOG_ERROR, 64, kind="nvme_error_log_entry")).lba == 77777
        assert (await rig.admin(SANITIZE, cdw10=BLOCK)).status == 0
        assert (await rig.log(lib.NVME_LOG_ERROR, 64, kind="nvme_error_log_entry")).lba == 0
        await trio.sleep(11)
        assert (await rig.log(lib.NVME_LOG_ERROR, 64, kind="nvme_error_log_entry")).lba == 77777


async def test_a_restricted_failure_only_ends_by_success(autojump_clock: trio.abc.Clock) -> None:
    async with sanitizing(BLOCK, fails=True) as rig:
        await trio.sleep(11)
        for word in (1, BLOCK | UNRESTRICTED):
            assert (await rig.admin(SANITIZE, cdw10=word)).code == FAILED
        rig.device.sanitize.media_fails = False
        assert (await rig.admin(SANITIZE, cdw10=BLOCK)).status == 0
        await trio.sleep(11)
        assert (await rig.io(lib.NVME_CMD_READ)).status == 0


@pytest.mark.parametrize("action", [0, 5, 6, 7])
async def test_refused(action: int) -> None:
    async with running() as rig:
        assert (await rig.admin(SANITIZE, cdw10=action)).code == lib.NVME_SC_INVALID_FIELD


async def test_nothing_to_exit_from() -> None:
    async with running() as rig:
        assert (await rig.admin(SANITIZE, cdw10=lib.NVME_SANITIZE_EXIT_FAILURE)).status == 0
