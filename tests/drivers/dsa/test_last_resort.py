"""A device that does not do what it is told: what the driver falls back to, one step after the other."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.drivers.dsa import DsaDriver, OperationAborted, WqConfig, descriptors
from pvfio.errors import DeadlineExceeded, DeviceFailed
from pvfio.machine import Machine, MachineConfig

pytestmark = pytest.mark.touches_c

SIZE = 8192


def deaf_to(function: Any, *commands: int) -> None:
    """From now on the device never ends these commands."""
    table = function._commands._table

    async def never(operand: int) -> int:
        await trio.sleep_forever()
        raise AssertionError

    for command in commands:
        assert command in table
        table[command] = never


async def test_a_device_that_does_not_reset_is_reset_as_a_function(rig: Any, autojump_clock: Any) -> None:
    """At the start and at the end alike."""
    async with rig() as r:
        deaf_to(r.function, lib.IDXD_CMD_RESET_DEVICE)
        a, b = await r.container.alloc(SIZE), await r.container.alloc(SIZE)
        a[:] = 7
        pins = r.machine.memory.stats().pins
        for _ in range(2):
            async with DsaDriver(r.device) as dsa:
                await dsa.wq(0).memmove(b, a, SIZE)
                await dsa.reset()
                await dsa.wq(0).memmove(b, a, SIZE)
            assert r.machine.memory.stats().pins == pins
        assert np.all(b == 7)


async def test_a_function_reset_that_never_ends_has_a_deadline(
    rig: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig() as r:
        deaf_to(r.function, lib.IDXD_CMD_RESET_DEVICE)
        monkeypatch.setattr(r.device, "reset", trio.sleep_forever)
        with pytest.raises(DeadlineExceeded, match="reset"):
            async with DsaDriver(r.device):
                pass


async def test_what_cannot_be_stopped_keeps_its_buffers(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No abort, no reset, not even a close: what was named to the device is held and stays mapped until it is."""
    config = MachineConfig(engine="inline", ram=64 << 20)
    async with Machine(config) as machine, machine.open("dsa0") as device:
        function: Any = machine.devices["dsa0"].function
        source, target = await device.container.alloc(SIZE), await device.container.alloc(SIZE)
        iova, pins = target.iova or 0, machine.memory.stats().pins
        async with DsaDriver(device) as dsa:
            deaf_to(function, lib.IDXD_CMD_ABORT_WQ, lib.IDXD_CMD_RESET_DEVICE)
            monkeypatch.setattr(device, "reset", trio.sleep_forever)
            monkeypatch.setattr(device, "close", trio.sleep_forever)
            function.engine.stop_before(0)
            with pytest.raises(DeviceFailed, match="may still do DMA: its buffers are held"):
                await dsa.wq(0).memmove(target, source, SIZE, deadline=1)
            held = weakref.ref(target)
            del target
            gc.collect()
            assert held() is not None
            assert machine.devices["dsa0"].requester.walk(iova).hpa is not None
            with pytest.raises(DeviceFailed):
                await dsa.wq(0).noop()
            monkeypatch.undo()
        assert machine.memory.stats().pins == pins
        gc.collect()
        assert held() is None


async def test_an_abort_that_fails_closes_the_queue_until_a_recovery(
    running: Any, autojump_clock: Any
) -> None:
    async with running(wqs=(WqConfig(), WqConfig())) as r:
        deaf_to(r.function, lib.IDXD_CMD_ABORT_WQ)
        r.engine.stop_before(0)
        submission = r.wq.submit_nowait(descriptors.noop(2))
        with pytest.raises(DeadlineExceeded):
            await r.dsa.abort(r.wq)
        with pytest.raises(DeviceFailed, match="not aborted"):
            r.wq.submit_nowait(descriptors.noop(1))
        await r.dsa.reset()
        assert submission.done
        assert submission.aborted
        r.engine.resume()
        for wq in r.dsa.wqs:
            await wq.noop()


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_who_waits_when_the_device_is_given_up_hears_of_it(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch, completion: Any
) -> None:
    """One operation runs into its deadline, nothing stops the device, it is closed; others had time left."""
    config = MachineConfig(engine="inline", ram=64 << 20)
    outcomes: list[Exception] = []

    async def patient(wq: Any, descriptors_: Any) -> None:
        try:
            await (await wq.submit(descriptors_, deadline=1000)).wait(deadline=1000)
        except (OperationAborted, DeviceFailed) as error:
            outcomes.append(error)

    async with Machine(config) as machine, machine.open("dsa0") as device, trio.open_nursery() as nursery:
        function: Any = machine.devices["dsa0"].function
        wqs = [WqConfig(size=8, completion=completion)]
        async with DsaDriver(device, wqs=wqs, command_deadline=0.2) as dsa:
            deaf_to(function, lib.IDXD_CMD_ABORT_WQ, lib.IDXD_CMD_RESET_DEVICE)
            monkeypatch.setattr(function, "function_level_reset", lambda: None)
            function.engine.stop_before(0)
            impatient = dsa.wq(0).submit_nowait(descriptors.noop(1))
            for count in (2, 2, 20):
                nursery.start_soon(patient, dsa.wq(0), descriptors.noop(count))
            await trio.sleep(0.1)
            with pytest.raises(DeviceFailed, match="closed and does no DMA"):
                await impatient.wait(deadline=1)
            await trio.sleep(0.1)
            assert len(outcomes) == 3
