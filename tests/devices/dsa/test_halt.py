"""The halt state: what is gone, what is refused, what brings the device back."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from pvfio.abi import ffi, lib
from pvfio.silicon import EngineKind
from tests.devices.dsa.function import ACTIVE, Function, running

pytestmark = pytest.mark.touches_c

HALT = lib.IDXD_DEVICE_STATE_HALT
HW_ERR = lib.IDXD_CMDSTS_HW_ERR
RESETS = {"software": 0, "flr": 1, "warm": 2, "cold": 3}


def reset_type(f: Function) -> int:
    word = f.read(lib.IDXD_GENSTATS_OFFSET, 4)
    return int((word & lib.IDXD_GENSTATS_RESET_TYPE_MASK) >> lib.IDXD_GENSTATS_RESET_TYPE_SHIFT)


async def works(f: Function) -> None:
    await f.configure(0)
    f.memory[:32] = 0
    f.noop()
    assert f.statuses(1) == [lib.DSA_COMP_SUCCESS]


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("engine", ["inline", "thread"])
async def test_halting(reset: Any, engine: EngineKind) -> None:
    async with running(engine=engine) as f:
        await f.configure(0)
        f.write(lib.IDXD_GENCTRL_OFFSET, lib.IDXD_GENCTRL_HALT_INT_EN)
        f.device.engine.stop_before(0)
        f.noop()
        f.device.inject_halt("a test", reset=reset)
        assert (f.state(), reset_type(f)) == (HALT, RESETS[reset])
        assert f.read(lib.IDXD_INTCAUSE_OFFSET, 4) == lib.IDXD_INTC_HALT_STATE
        assert f.interrupts() == (1, 0)
        f.device.engine.resume()
        f.noop()
        assert (f.statuses(1), f.errors()) == ([0], 0)
        for command in range(1, 15):
            if command != lib.IDXD_CMD_RESET_DEVICE:
                assert await f.command(command) == HW_ERR
        assert await f.command(lib.IDXD_CMD_RESET_DEVICE) == (0 if reset == "software" else HW_ERR)
        if reset == "flr":
            await f.device.reset()
            f.start()
        elif reset != "software":
            await f.device.reset()
            f.start()
            assert (f.state(), reset_type(f)) == (HALT, RESETS[reset])
            assert f.device.needs_system_reset
            await f.device.system_reset()
            f.start()
        assert (f.state(), reset_type(f)) == (lib.IDXD_DEVICE_STATE_DISABLED, 0)
        await works(f) if engine == "inline" else await f.configure(0)


async def test_no_interrupt_unless_asked_for() -> None:
    async with running() as f:
        await f.configure(0)
        f.device.inject_halt("a test")
        assert (f.read(lib.IDXD_INTCAUSE_OFFSET, 4), f.interrupts()[0]) == (0, 0)
        await f.device.reset()
        f.start()
        await works(f)


async def test_a_halted_device_tells_enqcmd_to_retry() -> None:
    async with running() as f:
        f.wq(0, mode=1 << lib.IDXD_WQCFG_PRIORITY_SHIFT, threshold=8)
        f.group(0, 1, 1)
        assert await f.command(lib.IDXD_CMD_ENABLE_DEVICE) == 0
        assert await f.command(lib.IDXD_CMD_ENABLE_WQ, 0) == 0
        f.device.inject_halt("a test")
        desc = ffi.new("struct dsa_hw_desc *")
        assert lib.pv_mmio_enqcmd(f.device.mmio(lib.IDXD_WQ_BAR), 0, desc) != 0


@pytest.mark.parametrize("begun", [True, False])
async def test_a_command_in_progress_fails(begun: bool) -> None:
    async with running() as f:
        await f.configure(0)
        f.device.engine.stop_before(0)
        f.noop()
        f.order(lib.IDXD_CMD_DRAIN_ALL)
        if begun:
            await trio.testing.wait_all_tasks_blocked()
        assert f.read(lib.IDXD_CMDSTS_OFFSET, 4) == ACTIVE
        f.device.inject_halt("a test")
        assert await f.finish() == HW_ERR
        f.device.engine.stop_before(-1)
        f.device.engine.resume()
        assert await f.command(lib.IDXD_CMD_RESET_DEVICE) == 0
        await works(f)


async def test_no_such_reset() -> None:
    async with running() as f:
        unknown: Any = "hot"
        with pytest.raises(ValueError, match="hot"):
            f.device.inject_halt("a test", reset=unknown)
