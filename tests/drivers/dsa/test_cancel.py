"""Deadlines, cancellation at every await, and what is done about a device that does not stop."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.drivers.dsa import DsaDriver, OperationAborted, WqConfig, descriptors
from pvfio.errors import DeadlineExceeded, DeviceFailed
from pvfio.machine import Machine, MachineConfig
from pvfio.silicon import DmaCancelled
from tests.drivers.rig import cancelled_at

pytestmark = pytest.mark.touches_c

SIZE = 8192
SMALL = (WqConfig(size=4),)


OPERATIONS: dict[str, Any] = {
    "memmove": lambda r, a, b: r.wq.memmove(b, a, SIZE),
    "fill": lambda r, a, b: r.wq.fill(b, 0xFF, SIZE),
    "copy_crc": lambda r, a, b: r.wq.copy_crc(b, a, SIZE),
    "compval": lambda r, a, b: r.wq.compval(a, b"\x01", SIZE),
    "create_delta": lambda r, a, b: r.wq.create_delta(a, b, b[4096:], 2048),
    "apply_delta": lambda r, a, b: r.wq.apply_delta(b, a, 10, SIZE),
    "dualcast": lambda r, a, b: r.wq.dualcast(b, b[4096:], a, 4096),
    "transl_fetch": lambda r, a, b: r.wq.transl_fetch(a, SIZE),
    "cflush": lambda r, a, b: r.wq.cflush(a, SIZE),
    "batch": lambda r, a, b: r.wq.batch(
        descriptors.join(descriptors.memmove(b, a, 100), descriptors.memmove(b[200:], a, 100))
    ),
    "array": lambda r, a, b: _submit_and_wait(r, descriptors.join(*[descriptors.memmove(b, a, SIZE)] * 9)),
}


async def _submit_and_wait(r: Any, array: Any) -> None:
    await (await r.wq.submit(array)).wait()


async def check_reusable(r: Any, a: Any, b: Any) -> None:
    """The caller uses its buffers again; nothing the device still has may write to them; then all works as before."""
    a[:], b[:] = 3, 4
    r.engine.stop_before(-1)
    r.engine.resume()
    await r.wq.drain()
    assert np.all(a == 3)
    assert np.all(b == 4)
    await r.wq.memmove(b, a, SIZE)
    assert np.all(b == 3)
    assert r.wq.outstanding == 0


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
@pytest.mark.parametrize("where", ["not stopped", "before it", "full queue"])
async def test_cancelled_at_every_await(
    running: Any, autojump_clock: Any, name: str, completion: Any, where: str
) -> None:
    for n in itertools.count(1):
        async with running(wqs=SMALL, deadline=0.01, grace=0.005) as r:
            r.wq.completion = completion
            a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
            a[:] = 1
            if where != "not stopped":
                r.engine.stop_before(0)
            if where == "full queue":
                r.wq.submit_nowait(descriptors.noop(4))
            try:
                was_cancelled = await cancelled_at(n, partial(OPERATIONS[name], r, a, b))
            except DeadlineExceeded:  # nobody resumes the device: it was not cancelled early enough
                was_cancelled = False
            await check_reusable(r, a, b)
            if not was_cancelled:
                break
    assert n > 1


@pytest.mark.parametrize("platform", ["intel", "amd"])
async def test_cancelled_with_a_native_thread(running: Any, platform: str) -> None:
    for n in range(1, 12):
        async with running(platform, "thread", wqs=SMALL, grace=0.001, deadline=0.05) as r:
            a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
            r.engine.stop_before(n % 2)
            try:
                await cancelled_at(n, partial(r.wq.memmove, b, a, SIZE))
                await cancelled_at(n, partial(r.wq.memmove, b, a, SIZE))
            except DeadlineExceeded:
                pass
            await check_reusable(r, a, b)


async def test_a_cancelled_operation_that_ends_in_time_is_not_aborted(
    running: Any, autojump_clock: Any, nursery: trio.Nursery
) -> None:
    async with running() as r:
        a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
        a[:] = 5
        r.engine.stop_before(0)
        other = r.wq.submit_nowait(descriptors.noop(3))
        scope = trio.CancelScope()

        async def move() -> None:
            with scope:
                await r.wq.memmove(b, a, SIZE)

        async with trio.open_nursery() as inner:
            inner.start_soon(move)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep(r.dsa.grace / 2)
            r.engine.resume()
        assert scope.cancelled_caught
        assert np.all(b == 5)
        assert (await other.wait())["status"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_a_device_that_never_answers(running: Any, autojump_clock: Any, completion: Any) -> None:
    async with running() as r:
        r.wq.completion = completion
        a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
        r.engine.stop_before(0)
        began = trio.current_time()
        with pytest.raises(DeadlineExceeded) as caught:
            await r.wq.memmove(b, a, SIZE, deadline=7)
        assert 7 <= trio.current_time() - began < 7.5
        assert (caught.value.operation, caught.value.device) == ("memmove", r.device.name)
        await check_reusable(r, a, b)


async def test_the_driver_s_deadline_holds_where_none_is_given(running: Any, autojump_clock: Any) -> None:
    async with running(deadline=2) as r:
        r.engine.stop_before(0)
        with pytest.raises(DeadlineExceeded, match="2 s"):
            await r.wq.noop()


async def test_an_abort_takes_back_what_others_had_in_flight(running: Any, autojump_clock: Any) -> None:
    async with running(wqs=(WqConfig(size=8), WqConfig(size=8))) as r:
        r.engine.stop_before(0)
        mine = r.wq.submit_nowait(descriptors.noop(3))
        other_wq = r.dsa.wq(1).submit_nowait(descriptors.noop(2))
        await r.dsa.abort(r.wq)
        with pytest.raises(OperationAborted, match="abort"):
            await mine.wait()
        assert mine.done
        assert mine.aborted
        assert not other_wq.poll()
        r.engine.resume()
        assert (await other_wq.wait())["status"].tolist() == [1, 1]
        await r.wq.noop()


async def test_a_reset_takes_everything_back_and_configures_again(running: Any, autojump_clock: Any) -> None:
    async with running(wqs=(WqConfig(size=8), WqConfig(size=8, shared=True))) as r:
        r.engine.stop_before(0)
        submissions = [wq.submit_nowait(descriptors.noop(2)) for wq in r.dsa.wqs]
        waiting = []

        async def wait(submission: Any) -> None:
            with pytest.raises(OperationAborted, match="reset"):
                await submission.wait()
            waiting.append(submission)

        async with trio.open_nursery() as nursery:
            for submission in submissions:
                nursery.start_soon(wait, submission)
            await trio.testing.wait_all_tasks_blocked()
            await r.dsa.reset()
        assert len(waiting) == 2
        r.engine.resume()
        for wq in r.dsa.wqs:
            await wq.noop()


async def stuck_command(dsa: DsaDriver, function: Any) -> None:
    """The device's command unit waits for a queue that does not move: it takes no other command any more."""
    function.engine.stop_before(0)
    dsa.wq(0).submit_nowait(descriptors.noop(1))
    registers = dsa.device.region(lib.VFIO_PCI_BAR0_REGION_INDEX)
    await registers.write(lib.IDXD_CMD_OFFSET, lib.IDXD_CMD_DRAIN_ALL << lib.IDXD_CMD_SHIFT, 4)
    await trio.testing.wait_all_tasks_blocked()
    assert await registers.read(lib.IDXD_CMDSTS_OFFSET, 4) & lib.IDXD_CMDSTS_ACTIVE


async def test_no_abort_then_the_function_is_reset(running: Any, autojump_clock: Any) -> None:
    async with running() as r:
        a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
        await stuck_command(r.dsa, r.function)
        with pytest.raises(DeadlineExceeded):
            await r.wq.memmove(b, a, SIZE, deadline=1)
        await check_reusable(r, a, b)


async def test_no_reset_then_the_device_is_closed(autojump_clock: Any) -> None:
    """A broken device: not even a function level reset does anything. It loses its right to DMA."""
    config = MachineConfig(engine="inline", ram=64 << 20)
    async with Machine(config) as machine:
        async with machine.open("dsa0") as device:
            function: Any = machine.devices["dsa0"].function
            async with DsaDriver(device) as dsa:
                wq = dsa.wq(0)
                a, b = await device.container.alloc(SIZE), await device.container.alloc(SIZE)
                iova = b.iova or 0
                await stuck_command(dsa, function)
                function.function_level_reset = lambda: None
                with pytest.raises(DeviceFailed, match="closed and does no DMA"):
                    await wq.memmove(b, a, SIZE, deadline=1)
                a[:], b[:] = 3, 4
                function.engine.resume()
                assert np.all(b == 4)
                with pytest.raises(DmaCancelled):
                    machine.devices["dsa0"].requester.read(iova, 4)
                with pytest.raises(DeviceFailed):
                    await wq.noop()
                with pytest.raises(DeviceFailed):
                    wq.submit_nowait(descriptors.noop(1))
                for action in (dsa.reset, dsa.recover):
                    with pytest.raises(DeviceFailed, match="closed and does no DMA"):
                        await action()


async def test_leaving_the_driver_ends_what_is_in_flight(rig: Any, autojump_clock: Any) -> None:
    async with rig() as r:
        a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
        pins = r.machine.memory.stats().pins
        async with DsaDriver(r.device) as dsa:
            r.engine.stop_before(0)
            submission = dsa.wq(0).memmove_nowait(b, a, SIZE)
        assert submission.done
        assert submission.aborted
        with pytest.raises(OperationAborted):
            await submission.wait()
        a[:], b[:] = 3, 4
        r.engine.resume()
        assert np.all(b == 4)
        assert r.machine.memory.stats().pins == pins
        async with DsaDriver(r.device) as dsa:
            await dsa.wq(0).memmove(b, a, SIZE)
        assert np.all(b == 3)


async def test_cancelled_while_starting_or_leaving_leaves_nothing(rig: Any, autojump_clock: Any) -> None:
    async with rig() as r:
        pins = r.machine.memory.stats().pins

        async def whole_life() -> None:
            async with DsaDriver(r.device, wqs=(WqConfig(), WqConfig())) as dsa:
                await dsa.wq(1).noop()

        for n in itertools.count(1):
            if not await cancelled_at(n, whole_life):
                break
            assert r.machine.memory.stats().pins == pins
            assert r.device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).enabled == 0
        assert n > 10


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_a_device_closed_under_an_operation(running: Any, autojump_clock: Any, completion: Any) -> None:
    async with running() as r:
        r.wq.completion = completion
        a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
        r.engine.stop_before(0)
        submission = r.wq.memmove_nowait(b, a, SIZE)

        async def wait() -> None:
            with pytest.raises((DeviceFailed, OperationAborted)):
                await submission.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await r.device.close()
        assert submission.done
        with pytest.raises(DeviceFailed):
            await r.wq.noop()
