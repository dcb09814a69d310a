"""Firmware slots, self-tests and keep alive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.devices.nvme.firmware import firmware_image
from tests.devices.nvme.rig import MIB, Rig, running

pytestmark = pytest.mark.touches_c

DOWNLOAD, COMMIT, TEST = lib.NVME_ADMIN_FW_DOWNLOAD, lib.NVME_ADMIN_FW_COMMIT, lib.NVME_ADMIN_SELF_TEST
IMAGE, SLOT = lib.NVME_SC_FIRMWARE_IMAGE, lib.NVME_SC_FIRMWARE_SLOT
REPLACE, AT_RESET, ACTIVATE, NOW = (action << 3 for action in range(4))
INVALID = lib.NVME_SC_INVALID_FIELD


async def download(rig: Rig, image: bytes, offset: int = 0) -> int:
    done = await rig.admin(DOWNLOAD, cdw10=len(image) // 4 - 1, cdw11=offset // 4, data=image)
    return done.code


async def slots(rig: Rig) -> tuple[int, int, list[bytes]]:
    log = await rig.log(lib.NVME_LOG_FW_SLOT, 512, kind="nvme_fw_slot_log")
    frs = bytes(log.frs)
    return log.afi & 7, log.afi >> 4, [frs[at : at + 8].strip(b" \0") for at in (0, 8, 16, 24)]


async def running_revision(rig: Rig) -> bytes:
    return bytes((await rig.identify(lib.NVME_ID_CNS_CTRL, kind="nvme_id_ctrl")).fr).strip()


async def test_firmware_at_the_next_reset() -> None:
    async with running() as rig:
        assert await slots(rig) == (1, 0, [b"1.0", b"", b"", b""])
        image = firmware_image("2.0", bytes(5000))
        assert await download(rig, image[4096:], 4096) == 0
        assert await download(rig, image[:4096]) == 0
        assert (await rig.admin(COMMIT, cdw10=AT_RESET | 2)).status == 0
        assert await slots(rig) == (1, 2, [b"1.0", b"2.0", b"", b""])
        assert (await rig.admin(lib.NVME_ADMIN_SANITIZE, cdw10=2)).code == lib.NVME_SC_FW_NEEDS_RESET
        assert await running_revision(rig) == b"1.0"
        rig.reset()
        assert await slots(rig) == (2, 0, [b"1.0", b"2.0", b"", b""])
        assert await running_revision(rig) == b"2.0"
        assert (await rig.admin(COMMIT, cdw10=ACTIVATE | 1)).status == 0
        rig.reset()
        assert await running_revision(rig) == b"1.0"


async def test_firmware_at_once() -> None:
    async with running() as rig:
        await rig.set_feature(lib.NVME_FEAT_ASYNC_EVENT, lib.NVME_OAES_FW_ACT)
        request = await rig.events()
        assert await download(rig, firmware_image("3.0")) == 0
        assert (await rig.admin(COMMIT, cdw10=NOW)).status == 0
        assert await slots(rig) == (2, 0, [b"1.0", b"3.0", b"", b""])
        assert (await rig.wait(request)).result == lib.NVME_AER_NOTICE | 1 << 8 | lib.NVME_LOG_FW_SLOT << 16
        assert (await rig.admin(COMMIT, cdw10=NOW | 1)).status == 0
        assert await running_revision(rig) == b"1.0"


async def test_the_controller_chooses_a_slot() -> None:
    async with running() as rig:
        for revision in ("a", "b", "c"):
            assert await download(rig, firmware_image(revision)) == 0
            assert (await rig.admin(COMMIT, cdw10=REPLACE)).status == 0
        assert await slots(rig) == (1, 0, [b"1.0", b"c", b"b", b""])


GOOD = firmware_image("9.9")


@pytest.mark.parametrize(
    ("image", "word", "status"),
    [
        (b"", REPLACE | 2, IMAGE),
        (b"", ACTIVATE | 2, IMAGE),
        (b"", NOW | 3, IMAGE),
        (b"", ACTIVATE, SLOT),
        (GOOD, REPLACE | 4, SLOT),
        (GOOD, ACTIVATE | 7, SLOT),
        (GOOD, 4 << 3 | 1, INVALID),
        (GOOD, 7 << 3 | 1, INVALID),
        (b"JUNK" * 8, REPLACE | 1, IMAGE),
        (GOOD[:-4] + bytes(4), REPLACE | 1, IMAGE),
        (GOOD[:8], REPLACE | 1, IMAGE),
    ],
)
async def test_commits_refused(image: bytes, word: int, status: int) -> None:
    async with running() as rig:
        if image:
            assert await download(rig, image) == 0
        assert (await rig.admin(COMMIT, cdw10=word)).code == status
        assert await running_revision(rig) == b"1.0"


async def test_downloads_refused() -> None:
    async with running(NvmeConfig(mdts_shift=1)) as rig:
        assert await download(rig, bytes(64)) == 0
        assert await download(rig, bytes(64), 32) == lib.NVME_SC_OVERLAPPING_RANGE
        assert (await rig.admin(DOWNLOAD, cdw10=8192 // 4)).code == INVALID
        assert (await rig.admin(DOWNLOAD, cdw10=0, cdw11=0xFFFFFFFF)).code == INVALID
        assert (await rig.admin(DOWNLOAD, cdw11=4096, prp1=0xDEAD000)).code == lib.NVME_SC_DATA_XFER_ERROR
        assert (await rig.admin(COMMIT, cdw10=REPLACE | 1)).code == IMAGE


async def test_a_gap_and_a_reset() -> None:
    async with running() as rig:
        image = firmware_image("2.0", bytes(1000))
        assert await download(rig, image[:512]) == 0
        assert await download(rig, image[516:], 516) == 0
        assert (await rig.admin(COMMIT, cdw10=REPLACE | 1)).code == IMAGE
        assert await download(rig, image) == 0
        rig.reset()
        assert (await rig.admin(COMMIT, cdw10=REPLACE | 1)).code == IMAGE


@pytest.mark.parametrize("revision", ["", "123456789", "\u00e9"])
def test_no_such_revision(revision: str) -> None:
    with pytest.raises(ValueError):
        firmware_image(revision)


async def results(rig: Rig) -> Any:
    return await rig.log(lib.NVME_LOG_SELF_TEST, 564, kind="nvme_self_test_log")


@pytest.mark.parametrize(("code", "seconds"), [(1, 3), (2, 5)])
@pytest.mark.parametrize("nsid", [0, 1, 0xFFFFFFFF])
async def test_self_test(code: int, seconds: int, nsid: int, autojump_clock: trio.abc.Clock) -> None:
    async with running() as rig:
        assert (await results(rig)).result[0].dsts == lib.NVME_SELF_TEST_RESULT_UNUSED
        assert (await rig.admin(TEST, nsid=nsid, cdw10=code)).status == 0
        await trio.sleep(seconds / 2 + 0.01)
        log = await results(rig)
        assert (log.current_operation, log.completion) == (code, 50)
        again = await rig.admin(TEST, nsid=nsid, cdw10=1)
        assert again.code == lib.NVME_SC_SELF_TEST_IN_PROGRESS
        await trio.sleep(seconds / 2 + 0.01)
        log = await results(rig)
        assert (log.current_operation, log.completion, log.result[0].dsts) == (0, 0, code << 4)
        assert (log.result[0].vdi, log.result[0].nsid) == ((1, nsid) if nsid else (0, 0))


@pytest.mark.parametrize(
    ("opcode", "fields", "result"),
    [
        (TEST, {"cdw10": 15}, lib.NVME_SELF_TEST_RESULT_ABORTED),
        (lib.NVME_ADMIN_FORMAT_NVM, {"nsid": 1, "cdw10": 1}, lib.NVME_SELF_TEST_RESULT_FORMAT),
        (lib.NVME_ADMIN_SANITIZE, {"cdw10": 2}, lib.NVME_SELF_TEST_RESULT_SANITIZE),
        (lib.NVME_ADMIN_NS_MGMT, {"nsid": 1, "cdw10": 1}, lib.NVME_SELF_TEST_RESULT_NS_GONE),
    ],
)
async def test_what_ends_a_self_test(
    opcode: int, fields: dict[str, Any], result: int, autojump_clock: trio.abc.Clock
) -> None:
    async with running() as rig:
        assert (await rig.admin(TEST, nsid=1, cdw10=2)).status == 0
        assert (await rig.admin(opcode, **fields)).status == 0
        await trio.sleep(10)
        log = await results(rig)
        assert (log.current_operation, log.result[0].dsts) == (0, 2 << 4 | result)
        assert log.result[1].dsts == lib.NVME_SELF_TEST_RESULT_UNUSED


async def test_a_reset_ends_a_short_test_only(autojump_clock: trio.abc.Clock) -> None:
    async with running() as rig:
        assert (await rig.admin(TEST, cdw10=1)).status == 0
        rig.reset()
        assert (await results(rig)).result[0].dsts == 1 << 4 | lib.NVME_SELF_TEST_RESULT_RESET
        assert (await rig.admin(TEST, cdw10=2)).status == 0
        rig.reset()
        assert (await results(rig)).current_operation == 2
        await trio.sleep(6)
        assert (await results(rig)).result[0].dsts == 2 << 4


async def test_twenty_results_are_kept(autojump_clock: trio.abc.Clock) -> None:
    async with running() as rig:
        for _ in range(21):
            assert (await rig.admin(TEST, cdw10=2)).status == 0
            assert (await rig.admin(TEST, cdw10=15)).status == 0
        assert all(r.dsts == 0x21 for r in (await results(rig)).result)


async def test_unreadable_media_fail_a_test(tmp_path: Path) -> None:
    """The file of an image is cut short: the test says where, and an event that there is something to read."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    config = NvmeConfig(short_test_seconds=0)
    async with running(config, (NamespaceSpec(image=image, size=0),)) as rig:
        request = await rig.events()
        with image.open("r+b") as file:
            file.truncate(65536)
        assert (await rig.admin(TEST, nsid=1, cdw10=1)).status == 0
        done = await rig.wait(request)
        assert done.result == lib.NVME_AER_ERROR_DIAG_FAILURE << 8 | lib.NVME_LOG_ERROR << 16
        log = await results(rig)  # kept: the entry is a part of it
        entry = log.result[0]
        assert (entry.dsts, entry.vdi, entry.nsid) == (0x17, 0xF, 1)
        assert entry.flba >= 16
        assert entry.sct << 8 | entry.sc == lib.NVME_SC_READ_ERROR
        logged = await rig.log(lib.NVME_LOG_ERROR, 64, kind="nvme_error_log_entry")
        assert (logged.status_field >> 1, logged.nsid, logged.lba) == (lib.NVME_SC_READ_ERROR, 1, entry.flba)
        assert (logged.sqid, logged.cmdid) == (0xFFFF, 0xFFFF)


@pytest.mark.parametrize(
    ("nsid", "code", "status"),
    [
        (0, 0, INVALID),
        (0, 3, INVALID),
        (0, 14, INVALID),
        (3, 1, INVALID),
        (33, 1, lib.NVME_SC_INVALID_NS),
        (0, 15, 0),
    ],
)
async def test_self_tests_refused(nsid: int, code: int, status: int) -> None:
    async with running() as rig:
        assert (await rig.admin(TEST, nsid=nsid, cdw10=code)).code == status


async def test_a_silent_host(autojump_clock: trio.abc.Clock) -> None:
    """Base 3.9: rounded up to KAS; any keep alive begins the time again; then fatal, until a reset."""
    async with running() as rig:
        fid = lib.NVME_FEAT_KATO
        assert (await rig.set_feature(fid, 1950)).status == 0
        assert (await rig.get_feature(fid)).result == 2000
        for _ in range(3):
            await trio.sleep(1.5)
            assert (await rig.admin(lib.NVME_ADMIN_KEEP_ALIVE)).status == 0
        assert not rig.csts & lib.NVME_CSTS_CFS
        await trio.sleep(2.5)
        assert rig.csts & lib.NVME_CSTS_CFS
        rig.reset()
        assert rig.csts == lib.NVME_CSTS_RDY
        assert (await rig.get_feature(fid)).result == 0
        entry = await rig.log(lib.NVME_LOG_ERROR, 64, kind="nvme_error_log_entry")
        assert entry.status_field >> 1 == lib.NVME_SC_KAT_EXPIRED
        assert (entry.sqid, entry.cmdid, entry.parm_error_location) == (0xFFFF, 0xFFFF, 0xFFFF)
        await trio.sleep(10)
        assert rig.csts == lib.NVME_CSTS_RDY
