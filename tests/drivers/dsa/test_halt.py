"""The driver and a device that halts."""

from __future__ import annotations

from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.drivers.dsa import CommandError, OperationAborted, descriptors
from pvfio.errors import DeviceFailed

pytestmark = pytest.mark.touches_c

Kind = tuple[str, str]


@pytest.mark.parametrize("reset", ["software", "flr"])
async def test_recover(running: Any, kind: Kind, reset: Any) -> None:
    """The device comes back by the reset it names; what was in flight was taken back."""
    async with running(*kind) as r:
        r.engine.stop_before(0)
        submission = await r.wq.submit(descriptors.noop(4))
        r.function.inject_halt("a test", reset=reset)
        r.engine.stop_before(-1)
        r.engine.resume()
        await r.device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).wait(0, deadline=10)
        recovery = await r.dsa.recover()
        assert (recovery.halted, recovery.reset) == (True, True)
        assert recovery.causes & lib.IDXD_INTC_HALT_STATE
        with pytest.raises(OperationAborted, match="reset"):
            await submission.wait(deadline=10)
        await r.wq.noop()
        assert not (await r.dsa.recover()).halted


async def test_an_operation_brings_it_back(running: Any, kind: Kind) -> None:
    """Its deadline passes, its abort is refused: the device is reset, and the next operation works."""
    async with running(*kind, deadline=0.2) as r:
        r.function.inject_halt("a test")
        with pytest.raises(TimeoutError):
            await r.wq.noop()
        await r.wq.noop()


@pytest.mark.parametrize("reset", ["warm", "cold"])
async def test_a_system_reset_is_beyond_the_driver(running: Any, kind: Kind, reset: Any) -> None:
    async with running(*kind) as r:
        r.function.inject_halt("a test", reset=reset)
        with pytest.raises(DeviceFailed, match="cannot be reset"):
            await r.dsa.recover()
        with pytest.raises(DeviceFailed):
            await r.wq.noop()


async def test_commands_are_refused(running: Any) -> None:
    async with running() as r:
        r.function.inject_halt("a test")
        with pytest.raises(CommandError) as caught:
            await r.dsa.abort(r.wq)
        assert caught.value.name == "IDXD_CMDSTS_HW_ERR"
        assert (await r.dsa.recover()).halted
        await r.wq.noop()
