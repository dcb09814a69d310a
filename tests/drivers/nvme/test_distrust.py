"""A controller that completes nonsense, and a server that does not listen or say anything."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, DeviceFailed, VfioError
from pvfio.silicon import DmaCancelled
from tests.drivers.nvme.commands import BLOCK, addresses, check_works, inject, lbas

pytestmark = pytest.mark.touches_c

HOST_ABORTED = lib.NVME_SC_HOST_ABORTED_CMD


def lie(queue: Any) -> None:
    """The controller completes what is not in flight."""
    ring = queue._ring
    first = 8 * ring._state.head
    ring._cq.view(np.uint16)[first + 6 : first + 8] = 200, ring._state.phase  # identifier and phase


def check_given_up(r: Any, buffer: Any) -> None:
    """What was in flight touches nothing any more."""
    buffer[:] = 4
    r.engine.stop_before(-1)
    r.engine.resume()
    assert np.all(buffer == 4)
    with pytest.raises(DmaCancelled):
        r.machine.devices["nvme0"].requester.read(buffer.iova, 4)


async def test_a_completion_of_nothing_condemns_the_controller(running: Any, autojump_clock: Any) -> None:
    async with running(completion="polled") as r:
        buffer = await r.container.alloc(BLOCK)
        r.engine.stop_before(0)
        cids = r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas(1), 1, addresses(buffer, 1))
        lie(r.queue)
        with pytest.raises(DeviceFailed, match="not in flight"):
            r.queue.reap_nowait()
        with pytest.raises(DeviceFailed, match="not in flight"):
            await r.nvme.read(1, 0, buffer)
        done = await r.queue.reap()
        assert (done.cids.tolist(), done.status.tolist()) == (cids.tolist(), [HOST_ABORTED])
        check_given_up(r, buffer)
        for operation in (r.queue.reap, r.nvme.reset, r.nvme.smart_log):
            with pytest.raises(DeviceFailed, match="not in flight"):
                await operation()


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_a_completion_of_nothing_while_others_wait(
    running: Any, autojump_clock: Any, completion: str
) -> None:
    """All of them fail at once, and only when the controller touches nothing any more."""
    async with running(queues=2, completion=completion) as r:
        buffer = await r.container.alloc(BLOCK)
        r.engine.stop_before(0)
        failed = []

        async def wait(queue: Any) -> None:
            with pytest.raises(DeviceFailed, match="not in flight"):
                await queue.read(1, 0, buffer, deadline=60)
            failed.append(queue.id)

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for queue in (r.queue, r.queue, r.nvme.queues[1]):
                nursery.start_soon(wait, queue)
            while r.queue.outstanding < 2 or not r.nvme.queues[1].outstanding:
                await trio.lowlevel.checkpoint()
            lie(r.queue)
        assert sorted(failed) == [1, 1, 2]
        assert trio.current_time() - began < 1
        check_given_up(r, buffer)


async def test_a_status_that_cannot_be_read(
    running: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not say: the command is taken back all the same."""

    async def silent() -> int:
        raise DeadlineExceeded("read", 1.0)

    async with running() as r:
        buffer = await r.container.alloc(BLOCK)
        inject(r, lib.PV_NVME_INJECT_DROP, times=1)
        monkeypatch.setattr(r.nvme._registers, "status", silent)
        with pytest.raises(DeadlineExceeded) as caught:
            await r.nvme.read(1, 0, buffer, deadline=3)
        assert caught.value.seconds == 3
        assert r.queue.outstanding == 0
        monkeypatch.undo()
        await check_works(r, buffer)


@pytest.mark.parametrize("operation", ["read", "readv", "compare_and_write", "submit", "smart_log"])
async def test_a_doorbell_that_cannot_be_rung(
    running: Any, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Nothing was submitted, so nothing touches the buffers when the next command rings it."""
    async with running() as r:
        buffer = await r.container.alloc(2 * BLOCK)
        calls = {
            "read": lambda: r.nvme.read(1, 0, buffer),
            "readv": lambda: r.nvme.readv(1, 0, [buffer[:BLOCK], buffer[BLOCK:]]),
            "compare_and_write": lambda: r.nvme.compare_and_write(1, 0, buffer[:BLOCK], buffer[BLOCK:]),
            "submit": lambda: r.queue.submit(lib.NVME_CMD_READ, 1, lbas(2), 1, addresses(buffer, 2)),
            "smart_log": r.nvme.smart_log,
        }
        before = r.queue.outstanding, r.nvme.admin.outstanding
        with monkeypatch.context() as deaf:
            region = r.nvme._registers.region
            deaf.setattr(region, "mmio", None)
            deaf.setattr(region, "write_nowait", refuse)
            with pytest.raises(VfioError):
                await calls[operation]()
        assert (r.queue.outstanding, r.nvme.admin.outstanding) == before
        assert not r.queue._waiters
        buffer[:] = 5
        await r.nvme.flush(1)
        await r.nvme.smart_log()
        assert np.all(buffer == 5)
        await check_works(r, buffer)


def refuse(offset: int, value: int, size: int) -> None:
    """As a region of a server that does not read."""
    raise VfioError(errno.EAGAIN, "doorbell")


async def test_completions_of_which_the_controller_cannot_be_told_are_not_lost(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(entries=16) as r:
        buffer = await r.container.alloc(8 * BLOCK)
        r.queue._ring._most_unacknowledged = 1
        cids = r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas(8), 1, addresses(buffer, 8))
        with monkeypatch.context() as deaf:
            region = r.nvme._registers.region
            deaf.setattr(region, "mmio", None)
            deaf.setattr(region, "write_nowait", refuse)
            assert (await r.queue.reap()).cids.tolist() == cids.tolist()
        await check_works(r, buffer)
