"""Asynchronous events: requests and their limit, every event there is, when it comes again; Abort."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NvmeConfig
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import MIB, PLACES, Place, Rig, running

pytestmark = pytest.mark.touches_c

SMART, NS = lib.NVME_LOG_SMART, lib.NVME_LOG_CHANGED_NS


def event(kind: int, information: int, log: int) -> int:
    return kind | information << 8 | log << 16


async def _over(rig: Rig) -> None:
    rig.device.health.set(temperature=344)


async def _under(rig: Rig) -> None:
    await rig.set_feature(lib.NVME_FEAT_TEMP_THRESH, 1 << 20 | 320)


async def _threshold(rig: Rig) -> None:
    await rig.set_feature(lib.NVME_FEAT_TEMP_THRESH, 300)


async def _spare(rig: Rig) -> None:
    rig.device.health.set(available_spare=9)


async def _degraded(rig: Rig) -> None:
    rig.device.health.set(degraded=True)


async def _detach(rig: Rig) -> None:
    assert (await rig.admin(lib.NVME_ADMIN_NS_ATTACH, nsid=2, cdw10=1, data=b"\1\0\0\0")).status == 0


async def _delete(rig: Rig) -> None:
    assert (await rig.admin(lib.NVME_ADMIN_NS_MGMT, nsid=2, cdw10=1)).status == 0


async def _format(rig: Rig) -> None:
    assert (await rig.admin(lib.NVME_ADMIN_FORMAT_NVM, nsid=2, cdw10=1)).status == 0


async def _no_queue(rig: Rig) -> None:
    rig.doorbell(9, 1)
    await rig.settle()


async def _bad_value(rig: Rig) -> None:
    rig.doorbell(1, 64)
    await rig.settle()


EVENTS: dict[str, tuple[Callable[[Rig], Awaitable[None]], int]] = {
    "over": (_over, event(lib.NVME_AER_SMART, lib.NVME_AER_SMART_TEMPERATURE, SMART)),
    "under": (_under, event(lib.NVME_AER_SMART, lib.NVME_AER_SMART_TEMPERATURE, SMART)),
    "threshold": (_threshold, event(lib.NVME_AER_SMART, lib.NVME_AER_SMART_TEMPERATURE, SMART)),
    "spare": (_spare, event(lib.NVME_AER_SMART, lib.NVME_AER_SMART_SPARE, SMART)),
    "degraded": (_degraded, event(lib.NVME_AER_SMART, lib.NVME_AER_SMART_RELIABILITY, SMART)),
    "detach": (_detach, event(lib.NVME_AER_NOTICE, lib.NVME_AER_NOTICE_NS_CHANGED, NS)),
    "delete": (_delete, event(lib.NVME_AER_NOTICE, lib.NVME_AER_NOTICE_NS_CHANGED, NS)),
    "format": (_format, event(lib.NVME_AER_NOTICE, lib.NVME_AER_NOTICE_NS_CHANGED, NS)),
    "no queue": (_no_queue, event(0, lib.NVME_AER_ERROR_INVALID_DB_REG, lib.NVME_LOG_ERROR)),
    "bad value": (_bad_value, event(0, lib.NVME_AER_ERROR_INVALID_DB_VALUE, lib.NVME_LOG_ERROR)),
}
ALWAYS = {"no queue", "bad value"}


@pytest.mark.parametrize(("place", "engine"), PLACES)
@pytest.mark.parametrize("name", EVENTS)
async def test_fires(name: str, place: Place, engine: EngineKind) -> None:
    cause, expected = EVENTS[name]
    async with running(place=place, engine=engine) as rig:
        await rig.set_feature(lib.NVME_FEAT_ASYNC_EVENT, 0x31F)
        request = await rig.events()
        await cause(rig)
        done = await rig.wait(request)
        assert (done.status, done.result) == (0, expected)


@pytest.mark.parametrize(("place", "engine"), PLACES)
@pytest.mark.parametrize(
    ("cause", "status"), [(_no_queue, lib.NVME_SC_QID_INVALID), (_bad_value, lib.NVME_SC_INVALID_FIELD)]
)
async def test_a_bad_doorbell_is_logged(
    cause: Callable[[Rig], Awaitable[None]], status: int, place: Place, engine: EngineKind
) -> None:
    """Every time, of no command (Base 5.16.1.2), whether anybody asked for the event or not."""
    async with running(place=place, engine=engine) as rig:
        for count in (1, 2):
            await cause(rig)
            entry = await rig.log(lib.NVME_LOG_ERROR, 64, kind="nvme_error_log_entry", retain=True)
            assert (entry.error_count, entry.status_field >> 1) == (count, status)
            assert (entry.sqid, entry.cmdid, entry.parm_error_location) == (0xFFFF, 0xFFFF, 0xFFFF)
            assert (entry.nsid, entry.lba) == (0, 0)
        assert (await rig.wait(await rig.events())).result >> 16 == lib.NVME_LOG_ERROR


@pytest.mark.parametrize("name", sorted(EVENTS.keys() - ALWAYS))
async def test_is_silent_unless_asked_for(name: str) -> None:
    async with running() as rig:
        request = await rig.events()
        await EVENTS[name][0](rig)
        await rig.settle()
        assert request not in rig.admin_ring.done


async def test_comes_again_after_the_log_was_read() -> None:
    async with running() as rig:
        await rig.set_feature(lib.NVME_FEAT_ASYNC_EVENT, 0x1F)
        await _over(rig)
        await rig.wait(await rig.events())
        request = await rig.events()
        for read in (None, True, False):
            if read is not None:
                await rig.log(SMART, 512, retain=read)
            rig.device.health.set(temperature=300)
            rig.device.health.set(temperature=344)
            await rig.settle()
            assert (request in rig.admin_ring.done) == (read is False)


async def test_one_warning_is_one_event() -> None:
    async with running() as rig:
        await rig.set_feature(lib.NVME_FEAT_ASYNC_EVENT, 0x1F)
        await _over(rig)
        await rig.wait(await rig.events())
        await rig.log(SMART, 512)
        request = await rig.events()
        rig.device.health.set(temperature=346)
        await rig.settle()
        assert request not in rig.admin_ring.done


async def test_limit() -> None:
    async with running() as rig:
        waiting = [await rig.events() for _ in range(4)]
        assert (await rig.admin(lib.NVME_ADMIN_ASYNC_EVENT)).code == lib.NVME_SC_ASYNC_LIMIT
        assert not set(waiting) & rig.admin_ring.done.keys()


async def test_abort_of_a_request() -> None:
    async with running() as rig:
        request = await rig.events()
        done = await rig.admin(lib.NVME_ADMIN_ABORT, cdw10=request << 16)
        assert (done.status, done.result) == (0, 0)
        assert (await rig.wait(request)).code == lib.NVME_SC_ABORT_REQ
        assert (await rig.admin(lib.NVME_ADMIN_ABORT, cdw10=request << 16)).result == 1


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_abort_of_io_that_waits(place: Place, engine: EngineKind) -> None:
    async with running(place=place, engine=engine) as rig:
        rig.device.inject("drop", opcode=lib.NVME_CMD_READ)
        lost = rig.submit(lib.NVME_CMD_READ, ring=rig.io_ring, nsid=1, prp1=rig.iova)
        await rig.settle()
        with trio.fail_after(30):  # a thread may not have fetched it yet
            while (await rig.admin(lib.NVME_ADMIN_ABORT, cdw10=1 | lost << 16)).result:
                pass
        assert (await rig.wait(lost, ring=rig.io_ring)).code == lib.NVME_SC_ABORT_REQ


async def test_abort_limit() -> None:
    async with running() as rig:
        cids = [rig.push(rig.admin_ring, lib.NVME_ADMIN_ABORT, cdw10=1) for _ in range(6)]
        rig.doorbell(0, rig.admin_ring.tail)
        codes = [(await rig.wait(cid)).code for cid in cids]
        assert codes == [0, 0, 0, 0, lib.NVME_SC_ABORT_LIMIT, lib.NVME_SC_ABORT_LIMIT]


async def test_reset_forgets_requests_and_events() -> None:
    async with running() as rig:
        await rig.events()
        rig.reset()
        await rig.set_feature(lib.NVME_FEAT_ASYNC_EVENT, 0x1F)
        await _over(rig)
        rig.reset()
        request = await rig.events()
        await rig.settle()
        assert request not in rig.admin_ring.done


async def test_changed_namespaces_are_listed_once() -> None:
    async with running(NvmeConfig(capacity=MIB)) as rig:
        await _detach(rig)
        assert (await rig.log(NS, retain=True))[:8] == bytes.fromhex("02000000 00000000")
        assert (await rig.log(NS))[:8] == bytes.fromhex("02000000 00000000")
        assert await rig.log(NS) == bytes(4096)
