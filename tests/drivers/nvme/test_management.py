"""Identify, logs, features, events, aborts, namespaces, formats, firmware, self-tests, sanitize."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.drivers.nvme import AsyncEvent, NvmeDriver, NvmeError, admin, recovery, status_name

pytestmark = pytest.mark.touches_c

BLOCK = 4096
MANAGED = NvmeConfig(capacity=4 << 20, queues=2)


async def test_what_the_controller_says(running: Any, kind: Any) -> None:
    config = NvmeConfig(serial="S1", model="M1", firmware="F1", mdts_shift=5, queues=2)
    async with running(*kind, config) as r:
        said = r.nvme.controller
        assert (said.sn, said.mn, said.fr, said.max_transfer) == ("S1", "M1", "F1", 32 * BLOCK)
        assert said.supports(lib.NVME_ONCS_COPY)
        assert not said.supports(lib.NVME_ONCS_RESERVATIONS)
        assert r.nvme.capabilities.entries == config.entries
        assert r.nvme.capabilities.version == lib.NVME_VS_2_0
        namespace = r.nvme.namespaces[1]
        assert namespace.size == namespace.blocks * namespace.block_size == 16 << 20
        assert [f.block_size for f in namespace.formats][:2] == [512, 4096]
        assert namespace.formats[namespace.format].block_size == 4096


async def test_fewer_queues_than_asked(running: Any) -> None:
    async with running(config=NvmeConfig(queues=2), queues=8) as r:
        assert len(r.nvme.queues) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queues": 0}, "I/O queues"),
        ({"entries": 1}, "entries"),
        ({"entries": 1 << 17}, "entries"),
        ({"completion": "often"}, "completion"),
        ({"completion": ("polled", "often")}, "completion"),
    ],
)
async def test_options_that_cannot_be(rig: Any, options: Any, message: str) -> None:
    async with rig() as r:
        with pytest.raises(ValueError, match=message):
            NvmeDriver(r.device, **options)


async def test_completion_can_be_changed(running: Any) -> None:
    async with running(queues=2, completion=("polled", "interrupt")) as r:
        polled, other = r.nvme.queues
        buffer = await r.container.alloc(BLOCK)
        with pytest.raises(ValueError, match="without an interrupt"):
            polled.completion = "interrupt"
        with pytest.raises(ValueError, match="one of"):
            other.completion = "often"
        for how in ("polled", "hybrid", "interrupt"):
            other.completion = how
            await other.read(1, 0, buffer)


async def test_many_queues_and_strides(running: Any) -> None:
    async with running(config=NvmeConfig(queues=64, dstrd=2), queues=64, entries=8) as r:
        assert len(r.nvme.queues) == 64
        buffer = await r.container.alloc(BLOCK)
        for queue in r.nvme.queues:
            await queue.read(1, 0, buffer)


async def test_smart_log(running: Any) -> None:
    async with running() as r:
        before = await r.nvme.smart_log()
        buffer = await r.container.alloc(1 << 20)
        await r.nvme.write(1, 0, buffer)
        await r.nvme.read(1, 0, buffer)
        after = await r.nvme.smart_log()
        assert after.host_reads > before.host_reads
        assert after.host_writes > before.host_writes
        assert after.data_units_written > before.data_units_written
        assert after.temperature > 0
        assert after.critical_warning == 0


async def test_error_log(running: Any) -> None:
    async with running() as r:
        buffer = await r.container.alloc(BLOCK)
        with pytest.raises(NvmeError):
            await r.nvme.read(1, r.nvme.namespaces[1].blocks + 5, buffer)
        newest = (await r.nvme.error_log())[0]
        assert (newest.name, newest.sqid, newest.nsid) == ("LBA_RANGE", 1, 1)
        assert newest.lba == r.nvme.namespaces[1].blocks + 5
        assert len(await r.nvme.error_log(1)) == 1


async def test_other_logs(running: Any) -> None:
    async with running() as r:
        assert (await r.nvme.firmware_log()).revisions[1] == r.nvme.controller.fr
        effects = await r.nvme.effects_log()
        assert lib.NVME_ADMIN_IDENTIFY in effects.admin
        assert lib.NVME_CMD_COPY in effects.io
        assert lib.NVME_LOG_SMART in await r.nvme.supported_logs()
        assert await r.nvme.changed_namespaces() == []
        with pytest.raises(NvmeError, match="INVALID_LOG_PAGE"):
            await r.nvme.admin.log_page(0xEE, 512)
        for size, offset in ((3, 0), (0, 0), (4, 2)):
            with pytest.raises(ValueError):
                await r.nvme.admin.log_page(lib.NVME_LOG_SMART, size, offset=offset)
        whole = await r.nvme.admin.log_page(lib.NVME_LOG_CMD_EFFECTS, 4096)
        assert await r.nvme.admin.log_page(lib.NVME_LOG_CMD_EFFECTS, 64, offset=8) == whole[8:72]


async def test_features(running: Any) -> None:
    async with running() as r:
        feature = lib.NVME_FEAT_TEMP_THRESH
        default = await r.nvme.get_features(feature, select=lib.NVME_FEAT_SEL_DEFAULT)
        assert await r.nvme.get_features(feature) == default
        await r.nvme.set_features(feature, default + 1)
        assert await r.nvme.get_features(feature) == default + 1
        await r.nvme.reset()
        assert await r.nvme.get_features(feature) == default
        with pytest.raises(NvmeError, match="INVALID_FIELD"):
            await r.nvme.get_features(0x7F)
        stamp = (12345).to_bytes(8, "little")
        await r.nvme.set_features(lib.NVME_FEAT_TIMESTAMP, data=stamp)
        back = await r.nvme.admin.get_feature_data(lib.NVME_FEAT_TIMESTAMP, 8)
        assert int.from_bytes(back[:6], "little") >= 12345


async def test_an_event(running: Any, kind: Any) -> None:
    """The temperature passes its threshold; the same event comes again only after its log was read."""
    async with running(*kind) as r:
        got: list[AsyncEvent] = []
        arrived = trio.Event()

        async def listen() -> None:
            nonlocal arrived
            async for event in r.nvme.events():
                got.append(event)
                arrived.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            temperature = (await r.nvme.smart_log()).temperature
            for count in (1, 2):
                arrived = trio.Event()
                await r.nvme.set_features(lib.NVME_FEAT_TEMP_THRESH, temperature - 1)
                with trio.fail_after(10):
                    await arrived.wait()
                assert len(got) == count
                await r.nvme.set_features(lib.NVME_FEAT_TEMP_THRESH, temperature + 50)
                await r.nvme.smart_log()
            nursery.cancel_scope.cancel()
        smart = lib.NVME_AER_SMART
        assert got == [AsyncEvent(smart, lib.NVME_AER_SMART_TEMPERATURE, lib.NVME_LOG_SMART)] * 2
        assert got[0].name == "smart"


async def test_events_of_a_controller_that_takes_one_request(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is all that is in flight, and is asked again each time."""
    monkeypatch.setattr(recovery, "_EVENT_REQUESTS", 1)
    async with running() as r:
        for temperature in (400, 401):
            assert r.nvme.admin.outstanding == 1
            r.function.health.set(temperature=temperature)
            with trio.fail_after(10):
                event = await anext(r.nvme.events())
            assert event.information == lib.NVME_AER_SMART_TEMPERATURE
            r.function.health.set(temperature=300)
            await r.nvme.smart_log()


class Unmasked(dict[int, int]):
    """A controller that sends an event again before its log page was read."""

    def __setitem__(self, kind: int, log: int) -> None:
        pass


async def test_events_that_nobody_takes(running: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that has no end of them fills no memory and holds nobody up; none of those it sent is lost."""
    monkeypatch.setattr(admin, "_MOST_EVENTS", 5)
    async with running(*kind) as r:
        r.function.events._masked = Unmasked()
        for number in range(30):
            r.function.events.post(7, number, 0xC0)
        with trio.fail_after(10):
            while r.nvme.admin.outstanding:
                await r.nvme.get_features(lib.NVME_FEAT_TEMP_THRESH)
        assert 5 <= len(r.nvme.admin.events) < 5 + 4
        with trio.fail_after(10):
            got = [(await anext(r.nvme.events())).information for _ in range(30)]
        assert got == list(range(30))
        await r.nvme.smart_log()
        assert r.nvme.admin.outstanding == 4


async def test_events_come_after_a_reset_too(running: Any) -> None:
    async with running() as r:
        await r.nvme.reset()
        temperature = (await r.nvme.smart_log()).temperature
        await r.nvme.set_features(lib.NVME_FEAT_TEMP_THRESH, temperature - 1)
        with trio.fail_after(10):
            event = await anext(r.nvme.events())
        assert event.log == lib.NVME_LOG_SMART


async def test_abort(running: Any) -> None:
    async with running() as r:
        buffer = await r.container.alloc(2 * BLOCK)
        r.function.inject("drop", opcode=lib.NVME_CMD_READ, times=1)
        where = np.uint64(buffer.iova) + np.array([0, BLOCK], dtype=np.uint64)
        cids = r.queue.submit_nowait(lib.NVME_CMD_READ, 1, np.arange(2, dtype=np.uint64), 1, where)
        done = await r.queue.reap()
        assert done.cids.tolist() == [cids[1]]
        assert await r.nvme.abort(r.queue, [cids[0]]) == 1
        done = await r.queue.reap()
        assert [status_name(s) for s in done.status.tolist()] == ["ABORT_REQ"]
        assert await r.nvme.abort(r.queue, [cids[0]]) == 0


async def test_namespace_management(running: Any) -> None:
    async with running(config=MANAGED) as r:
        nsid = await r.nvme.create_namespace(256, format=1)
        assert nsid not in r.nvme.namespaces
        assert nsid in await r.nvme.namespace_list(present=True)
        await r.nvme.attach_namespace(nsid)
        assert r.nvme.namespaces[nsid].blocks == 256
        assert nsid in await r.nvme.changed_namespaces()
        buffer = await r.container.alloc(BLOCK)
        buffer[:] = 5
        await r.nvme.write(nsid, 9, buffer)
        await r.nvme.detach_namespace(nsid)
        with pytest.raises(ValueError, match="no namespace"):
            await r.nvme.write(nsid, 9, buffer)
        await r.nvme.delete_namespace(nsid)
        assert await r.nvme.namespace_list(present=True) == [1]
        with pytest.raises(NvmeError, match="INVALID"):
            await r.nvme.attach_namespace(nsid)


async def test_format(running: Any) -> None:
    """Block sizes change under the driver's feet, and templates with them."""
    async with running(namespaces=(NamespaceSpec(size=1 << 20),)) as r:
        buffer = await r.container.alloc(BLOCK)
        buffer[:] = 1
        await r.nvme.write(1, 0, buffer)
        await r.nvme.format(1, 0)
        assert r.nvme.namespaces[1].block_size == 512
        assert r.nvme.namespaces[1].blocks == 2048
        buffer[:] = 2
        await r.nvme.read(1, 0, buffer[:512])
        assert not buffer[:512].any()
        assert np.all(buffer[512:] == 2)
        with pytest.raises(NvmeError, match="INVALID_FORMAT"):
            await r.nvme.format(1, 15)


async def test_firmware(running: Any) -> None:
    from pvfio.devices.nvme.firmware import firmware_image

    async with running() as r:
        await r.nvme.firmware_download(firmware_image("2.0", bytes(9000)))
        await r.nvme.firmware_commit(2)
        log = await r.nvme.firmware_log()
        assert (log.active, log.next, log.revisions[2]) == (1, 2, "2.0")
        await r.nvme.reset()
        assert (await r.nvme.firmware_log()).active == 2
        await r.nvme.firmware_download(bytes(64))
        with pytest.raises(NvmeError, match="FIRMWARE_IMAGE"):
            await r.nvme.firmware_commit(3)
        with pytest.raises(ValueError, match="dwords"):
            await r.nvme.firmware_download(b"abc")


async def test_self_test(running: Any, autojump_clock: Any) -> None:
    async with running() as r:
        await r.nvme.self_test()
        with pytest.raises(NvmeError, match="SELF_TEST_IN_PROGRESS"):
            await r.nvme.self_test()
        assert (await r.nvme.self_test_log()).current == lib.NVME_SELF_TEST_SHORT
        for _ in range(360):
            await trio.sleep(10)
            log = await r.nvme.self_test_log()
            if not log.current:
                break
        result = log.results[0]
        assert (result.code, result.result) == (lib.NVME_SELF_TEST_SHORT, lib.NVME_SELF_TEST_RESULT_OK)


async def test_sanitize(running: Any, autojump_clock: Any) -> None:
    async with running(namespaces=(NamespaceSpec(size=1 << 20),)) as r:
        buffer = await r.container.alloc(BLOCK)
        buffer[:] = 1
        await r.nvme.write(1, 0, buffer)
        await r.nvme.sanitize()
        for _ in range(3600):
            await trio.sleep(1)
            log = await r.nvme.sanitize_log()
            if log.status != lib.NVME_SSTAT_PROGRESS:
                break
        assert log.status == lib.NVME_SSTAT_OK
        await r.nvme.read(1, 0, buffer)
        assert not buffer.any()
