"""Cancellation at every await: what was in flight has ended or was taken back, and the buffers are the caller's."""

from __future__ import annotations

import itertools
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.devices.nvme import NvmeConfig
from pvfio.drivers.nvme import NvmeDriver
from pvfio.errors import DeadlineExceeded
from tests.drivers.nvme.commands import BLOCK, addresses, lbas
from tests.drivers.rig import cancelled_at

pytestmark = pytest.mark.touches_c

SIZE = 4 * BLOCK


OPERATIONS: dict[str, Any] = {
    "read": lambda r, a, b: r.queue.read(1, 0, b),
    "write": lambda r, a, b: r.queue.write(1, 0, a),
    "compare": lambda r, a, b: r.queue.compare(1, 0, a),
    "readv": lambda r, a, b: r.queue.readv(1, 0, [b[:BLOCK], b[BLOCK:]]),
    "flush": lambda r, a, b: r.queue.flush(),
    "write_zeroes": lambda r, a, b: r.queue.write_zeroes(1, 8, 8),
    "copy": lambda r, a, b: r.queue.copy(1, [(0, 2), (2, 2)], 8),
    "deallocate": lambda r, a, b: r.queue.deallocate(1, [(8, 8)]),
    "compare_and_write": lambda r, a, b: r.queue.compare_and_write(1, 0, a, a),
    "transfer": lambda r, a, b: r.queue.transfer(
        lib.NVME_CMD_READ, 1, lbas(9) % np.uint64(4), 1, np.tile(addresses(b, 3), 3)
    ),
    "identify": lambda r, a, b: r.nvme.rescan(),
    "log": lambda r, a, b: r.nvme.error_log(),
    "reset": lambda r, a, b: r.nvme.reset(),
}


def hold(r: Any) -> None:
    """Every I/O command waits for an abort."""
    rule = ffi.new("struct pv_nvme_rule *", {"sq": 1, "action": lib.PV_NVME_INJECT_DROP, "per_mille": 1000})
    assert lib.pv_nvme_inject(r.function._nvme, rule) >= 0


async def check_reusable(r: Any, a: Any, b: Any) -> None:
    """The caller uses its buffers again; nothing the device still has may write to them; then all works as before."""
    lib.pv_nvme_inject_clear(r.function._nvme, -1)
    a[:], b[:] = 3, 4
    r.engine.kick()
    assert np.all(a == 3)
    assert np.all(b == 4)
    await r.nvme.write(1, 0, a)
    await r.nvme.read(1, 0, b)
    assert np.all(b == 3)
    assert r.queue.outstanding == 0
    assert not r.queue._ready
    await r.nvme.smart_log()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
@pytest.mark.parametrize("held", [False, True], ids=["answered", "held"])
async def test_cancelled_at_every_await(
    running: Any, autojump_clock: Any, name: str, completion: Any, held: bool
) -> None:
    async with running(config=NvmeConfig(queues=2, entries=8), entries=4, completion=completion) as r:
        a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
        r.nvme.deadline, r.nvme.grace = 0.01, 0.005
        for n in itertools.count(1):
            a[:] = 3
            await r.nvme.write(1, 0, a)
            if held:
                hold(r)
            try:
                was_cancelled = await cancelled_at(n, partial(OPERATIONS[name], r, a, b))
            except DeadlineExceeded:  # nobody lets the commands go: it was not cancelled early enough
                was_cancelled = False
            await check_reusable(r, a, b)
            if not was_cancelled:
                break
        assert n > 1


async def test_cancelled_while_the_queue_is_full(running: Any, autojump_clock: Any) -> None:
    async with running(entries=4) as r:
        a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
        hold(r)
        held = r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas(3), 1, addresses(b, 3))
        for n in range(1, 4):
            assert await cancelled_at(n, partial(r.queue.read, 1, 0, a))
        with pytest.raises(DeadlineExceeded):
            await r.queue.submit(lib.NVME_CMD_READ, 1, lbas(1), 1, addresses(a, 1), deadline=0.1)
        assert r.queue.outstanding == 3
        assert await r.nvme.abort(r.queue, held.tolist()) == 3
        assert (await r.queue.reap()).status.tolist() == [lib.NVME_SC_ABORT_REQ] * 3
        await check_reusable(r, a, b)


async def test_cancelled_with_a_native_thread(running: Any, kind: Any) -> None:
    async with running(*kind, grace=0.001, deadline=0.05) as r:
        a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
        for n in range(1, 12):
            if n % 2:
                hold(r)
            with suppress(DeadlineExceeded):
                await cancelled_at(n, partial(r.queue.read, 1, 0, b))
            await check_reusable(r, a, b)


async def test_a_cancelled_command_that_ends_in_time_is_not_aborted(
    running: Any, autojump_clock: Any
) -> None:
    async with running() as r:
        a = await r.container.alloc(SIZE)
        a[:] = 5
        await r.nvme.write(1, 0, a)
        a[:] = 0
        r.engine.stop_before(0)
        scope = trio.CancelScope()

        async def read() -> None:
            with scope:
                await r.nvme.read(1, 0, a)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep(r.nvme.grace / 2)
            r.engine.stop_before(-1)
            r.engine.resume()
        assert scope.cancelled_caught
        assert np.all(a == 5)


async def test_cancelled_reap_loses_nothing(running: Any, autojump_clock: Any) -> None:
    async with running() as r:
        a = await r.container.alloc(SIZE)
        r.engine.stop_before(0)
        cids = r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas(4), 1, addresses(a, 4))
        for n in range(1, 4):
            assert await cancelled_at(n, r.queue.reap)
        r.engine.stop_before(-1)
        r.engine.resume()
        assert (await r.queue.reap()).cids.tolist() == cids.tolist()


async def test_cancelled_while_starting_or_leaving_leaves_nothing(rig: Any, autojump_clock: Any) -> None:
    async with rig(config=NvmeConfig(queues=3)) as r:
        pins = r.machine.memory.stats().pins

        async def whole_life() -> None:
            async with NvmeDriver(r.device, queues=2) as nvme:
                await nvme.flush()

        for n in itertools.count(1):
            if not await cancelled_at(n, whole_life):
                break
            assert r.machine.memory.stats().pins == pins
        assert n > 10
        async with NvmeDriver(r.device) as nvme:
            await nvme.flush()
        assert r.machine.memory.stats().pins == pins


async def test_leaving_the_driver_ends_what_is_in_flight(rig: Any, autojump_clock: Any) -> None:
    async with rig() as r:
        buffer = await r.container.alloc(SIZE)
        async with NvmeDriver(r.device, admin_deadline=0.1) as nvme:
            r.engine.stop_before(0)
            nvme.queues[0].submit_nowait(lib.NVME_CMD_READ, 1, lbas(4), 1, addresses(buffer, 4))
        buffer[:] = 9
        r.engine.stop_before(-1)
        r.engine.resume()
        assert np.all(buffer == 9)
        async with NvmeDriver(r.device) as nvme:
            await nvme.read(1, 0, buffer)
        assert not buffer.any()
