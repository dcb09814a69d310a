"""Time-outs, aborts, resets with commands in flight, removal, and a controller that does not stop."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.drivers.nvme import NvmeDriver, NvmeError, OperationAborted
from pvfio.errors import DeadlineExceeded, DeviceFailed
from pvfio.silicon import DmaCancelled
from tests.drivers.nvme.commands import BLOCK, addresses, check_works, inject, lbas

pytestmark = pytest.mark.touches_c

HOST_ABORTED = lib.NVME_SC_HOST_ABORTED_CMD


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_a_dropped_command_is_aborted(running: Any, autojump_clock: Any, completion: str) -> None:
    """The first step of the ladder is enough: nothing else in flight is touched."""
    async with running(completion=completion) as r:
        buffer = await r.container.alloc(4 * BLOCK)
        inject(r, lib.PV_NVME_INJECT_DROP, times=1)
        other = inject(r, lib.PV_NVME_INJECT_DROP, opcode=lib.NVME_CMD_VERIFY)
        r.queue.submit_nowait(lib.NVME_CMD_VERIFY, 1, lbas(1), 1, lbas(1))
        began = trio.current_time()
        with pytest.raises(DeadlineExceeded) as caught:
            await r.nvme.read(1, 0, buffer, deadline=3)
        assert 3 <= trio.current_time() - began < 3.5
        assert caught.value.operation == "read"
        assert r.queue.outstanding == 1
        lib.pv_nvme_inject_clear(r.function._nvme, other)
        done = await r.queue.reap(deadline=1)
        assert done.status.tolist() == [lib.NVME_SC_ABORT_REQ]
        await check_works(r, buffer)


async def test_a_command_of_an_array_that_is_late_is_aborted(running: Any, autojump_clock: Any) -> None:
    async with running(entries=16) as r:
        buffer = await r.container.alloc(8 * BLOCK)
        inject(r, lib.PV_NVME_INJECT_DROP, skip=2, times=2)
        cids = r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas(8), 1, addresses(buffer, 8)).tolist()
        first = await r.queue.reap(deadline=2)
        assert first.cids.tolist() == cids[:2] + cids[4:]
        began = trio.current_time()
        second = await r.queue.reap(deadline=2)
        assert 1.9 <= trio.current_time() - began < 2.5
        assert sorted(second.cids.tolist()) == sorted(cids[2:4])
        assert second.status.tolist() == [lib.NVME_SC_ABORT_REQ] * 2
        await check_works(r, buffer)


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_a_reaper_and_commands_that_others_await(
    running: Any, autojump_clock: Any, completion: str
) -> None:
    """They may take longer than what is reaped, and are nobody's but their tasks'."""
    async with running(completion=completion, entries=4) as r:
        buffer = await r.container.alloc(4 * BLOCK)
        inject(r, lib.PV_NVME_INJECT_DROP, opcode=lib.NVME_CMD_VERIFY)

        async def wait() -> None:
            await r.nvme.verify(1, 0, 1, deadline=60)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(1)
            inject(r, lib.PV_NVME_INJECT_DROP, skip=1, times=1)
            with pytest.raises(BaseExceptionGroup) as caught:  # a transfer that is cancelled lets them be
                async with trio.open_nursery() as inner:
                    inner.start_soon(
                        partial(
                            r.queue.transfer,
                            lib.NVME_CMD_READ,
                            1,
                            lbas(2),
                            1,
                            addresses(buffer, 2),
                            deadline=9,
                        )
                    )
                    await trio.sleep(0.1)
                    raise ZeroDivisionError
            assert caught.group_contains(ZeroDivisionError)
            assert r.queue.outstanding == 1
            for _ in range(2):
                nursery.start_soon(wait)
            await trio.sleep(1)
            began = trio.current_time()
            assert len(await r.queue.reap(deadline=0.5)) == 0
            assert trio.current_time() == began
            with pytest.raises(DeadlineExceeded):  # there is no room
                await r.queue.transfer(lib.NVME_CMD_READ, 1, lbas(1), 1, addresses(buffer, 1), deadline=0.5)
            assert r.queue.outstanding == 3
            nursery.cancel_scope.cancel()
        await r.queue.transfer(lib.NVME_CMD_READ, 1, lbas(4), 1, addresses(buffer, 4))
        lib.pv_nvme_inject_clear(r.function._nvme, -1)
        await check_works(r, buffer)


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_no_abort_then_the_controller_is_reset(
    running: Any, autojump_clock: Any, completion: str
) -> None:
    """A controller that aborts nothing. All queues come back, everything in flight has ended."""
    async with running(queues=2, completion=completion) as r:
        buffer = await r.container.alloc(4 * BLOCK)
        inject(r, lib.PV_NVME_INJECT_DROP, sq=-1)
        r.function._admin.register({lib.NVME_ADMIN_ABORT: lambda command: 1})
        raw = r.nvme.queues[1].submit_nowait(lib.NVME_CMD_READ, 1, lbas(3), 1, addresses(buffer, 3))
        awaited: list[str] = []

        async def wait(nursery_read: Any) -> None:
            with pytest.raises(OperationAborted) as caught:
                await nursery_read()
            awaited.append(caught.value.reason)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, lambda: r.nvme.queues[1].read(1, 0, buffer, deadline=60))
            with pytest.raises(DeadlineExceeded):
                await r.nvme.read(1, 0, buffer, deadline=1)
        assert len(awaited) == 1
        assert "reset" in awaited[0]
        done = await r.nvme.queues[1].reap()
        assert sorted(done.cids.tolist()) == sorted(raw.tolist())
        assert done.status.tolist() == [HOST_ABORTED] * 3
        lib.pv_nvme_inject_clear(r.function._nvme, -1)
        await check_works(r, buffer)


async def test_reset_with_commands_in_flight(running: Any, kind: Any) -> None:
    async with running(*kind, queues=3) as r:
        buffer = await r.container.alloc(32 * BLOCK)
        inject(r, lib.PV_NVME_INJECT_DROP, sq=-1)
        for queue in r.nvme.queues:
            queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas(32), 1, addresses(buffer, 32))
        failures = []

        async def wait() -> None:
            try:
                await r.nvme.read(1, 0, buffer)
            except OperationAborted as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            while r.queue.outstanding < 33:
                await trio.lowlevel.checkpoint()
            await r.nvme.reset()
        assert len(failures) == 1
        for queue in r.nvme.queues:
            done = await queue.reap()
            assert done.status.tolist() == [HOST_ABORTED] * 32
        lib.pv_nvme_inject_clear(r.function._nvme, -1)
        await check_works(r, buffer)


async def test_resets_under_load(running: Any, kind: Any) -> None:
    """Tasks that read all the while see either data or a typed error; then everything is as before."""
    async with running(*kind, queues=2, entries=32) as r:
        buffer = await r.container.alloc(8 * BLOCK)
        count = {"ok": 0, "aborted": 0}
        stop = False

        async def reader(index: int) -> None:
            view = buffer[index * BLOCK : (index + 1) * BLOCK]
            while not stop:
                try:
                    await r.nvme.queues[index % 2].read(1, index, view)
                    count["ok"] += 1
                except OperationAborted:
                    count["aborted"] += 1

        async with trio.open_nursery() as nursery:
            for index in range(4):
                nursery.start_soon(reader, index)
            for _ in range(5):
                before = count["ok"]
                while count["ok"] < before + 8:
                    await trio.lowlevel.checkpoint()
                await r.nvme.reset()
            stop = True
        await check_works(r, buffer)


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_a_fatal_status_is_noticed_and_reset(
    running: Any, autojump_clock: Any, completion: str
) -> None:
    async with running(completion=completion) as r:
        buffer = await r.container.alloc(BLOCK)
        inject(r, lib.PV_NVME_INJECT_FATAL, times=1)
        began = trio.current_time()
        with pytest.raises(OperationAborted, match="fatal status"):
            await r.nvme.read(1, 0, buffer, deadline=60)
        assert trio.current_time() - began < 1
        await check_works(r, buffer)


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_surprise_removal_fails_everything_promptly(
    running: Any, autojump_clock: Any, completion: str
) -> None:
    async with running(queues=2, completion=completion) as r:
        buffer = await r.container.alloc(8 * BLOCK)
        inject(r, lib.PV_NVME_INJECT_DROP, sq=-1)
        inject(r, lib.PV_NVME_INJECT_VANISH, opcode=lib.NVME_CMD_FLUSH, sq=-1)
        r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas(4), 1, addresses(buffer, 4))
        failed = []

        async def wait(queue: Any) -> None:
            with pytest.raises(DeviceFailed, match="removed"):
                await queue.read(1, 0, buffer, deadline=60)
            failed.append(queue.id)

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for queue in r.nvme.queues:
                nursery.start_soon(wait, queue)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(DeviceFailed, match="removed"):
                await r.nvme.flush(1, deadline=60)
        assert sorted(failed) == [1, 2]
        assert trio.current_time() - began < 2
        assert (await r.queue.reap()).status.tolist() == [HOST_ABORTED] * 4
        for operation in (r.queue.reap, r.nvme.flush, r.nvme.reset, r.nvme.smart_log):
            with pytest.raises(DeviceFailed):
                await operation()
        with pytest.raises(DeviceFailed):
            r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas(1), 1, addresses(buffer, 1))


async def test_no_reset_then_the_device_is_closed(rig: Any, autojump_clock: Any) -> None:
    """A broken controller: neither CC.EN nor a function level reset does anything. It loses its right to DMA."""
    async with rig() as r:
        async with NvmeDriver(r.device) as nvme:
            buffer = await r.container.alloc(BLOCK)
            iova = buffer.iova or 0
            r.engine.stop_before(0)
            r.function.registers.write = lambda offset, size, value: None
            r.function.function_level_reset = lambda: None
            with pytest.raises(DeadlineExceeded):
                await nvme.read(1, 0, buffer, deadline=1)
            with pytest.raises(DeviceFailed, match="closed and does no DMA"):
                await nvme.reset()
            buffer[:] = 4
            r.engine.resume()
            assert np.all(buffer == 4)
            with pytest.raises(DmaCancelled):
                r.machine.devices["nvme0"].requester.read(iova, 4)
            with pytest.raises(DeviceFailed):
                await nvme.read(1, 0, buffer)


async def test_admin_commands_time_out_too(running: Any, autojump_clock: Any) -> None:
    async with running() as r:
        buffer = await r.container.alloc(BLOCK)
        inject(r, lib.PV_NVME_INJECT_DROP, opcode=lib.NVME_ADMIN_GET_LOG_PAGE, sq=0, times=1)
        with pytest.raises(DeadlineExceeded):
            await r.nvme.smart_log()
        await r.nvme.smart_log()
        await check_works(r, buffer)


async def test_a_failed_command_says_so_once(running: Any) -> None:
    async with running() as r:
        buffer = await r.container.alloc(BLOCK)
        inject(r, lib.PV_NVME_INJECT_STATUS, status=lib.NVME_SC_READ_ERROR, times=1)
        with pytest.raises(NvmeError) as caught:
            await r.nvme.read(1, 9, buffer)
        assert (caught.value.name, caught.value.sct, caught.value.sc) == ("READ_ERROR", 2, 0x81)
        await r.nvme.read(1, 9, buffer)


async def test_a_lost_interrupt_costs_a_moment(running: Any, autojump_clock: Any) -> None:
    """Whoever waits for an interrupt looks at the queue now and then all the same."""
    async with running(completion="interrupt") as r:
        r.function.inject("lose_interrupt", opcode=lib.NVME_CMD_VERIFY, times=None)
        r.engine.stop_before(0)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.nvme.verify, 1, 0, 1)
            await trio.testing.wait_all_tasks_blocked()
            r.engine.stop_before(-1)
            r.engine.resume()
            await trio.testing.wait_all_tasks_blocked()
            assert r.queue.outstanding == 1
        assert 0 < trio.current_time() - began < 1


async def test_the_driver_has_the_first_queue_s_commands(running: Any) -> None:
    async with running(queues=2) as r:
        buffer = await r.container.alloc(BLOCK)
        buffer[:] = 6
        await r.nvme.write(1, 0, buffer, fua=True)
        await r.nvme.copy(1, [(0, 1)], 9)
        await r.nvme.compare(1, 9, buffer)
        await r.nvme.write_zeroes(1, 9, 1)
        with pytest.raises(NvmeError, match="COMPARE_FAILED"):
            await r.nvme.compare(1, 9, buffer)


async def test_a_queue_has_its_interrupt_after_a_reset_too(running: Any, autojump_clock: Any) -> None:
    """However completion was learned of at the time."""
    async with running(completion="interrupt") as r:
        buffer = await r.container.alloc(BLOCK)
        r.queue.completion = "polled"
        await r.nvme.reset()
        r.queue.completion = "interrupt"
        began = trio.current_time()
        await check_works(r, buffer)
        assert trio.current_time() == began
