"""Bringing a DSA up: capabilities, configurations, refusals, interrupt handles, recovery from being disabled."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.devices.dsa import DsaConfig
from pvfio.drivers.dsa import CommandError, DsaDriver, WqConfig, descriptors
from pvfio.drivers.dsa.commands import wq_operand
from pvfio.errors import DeviceFailed
from pvfio.machine import DeviceSpec, Machine, MachineConfig

pytestmark = pytest.mark.touches_c


async def test_capabilities_are_the_device_s(running: Any) -> None:
    config = DsaConfig(wqs=3, groups=2, engines=5, total_wq_size=24, max_xfer_shift=20, max_batch_shift=6)
    async with running(config=config) as r:
        found = r.dsa.capabilities
        assert (found.num_wqs, found.num_groups, found.num_engines) == (3, 2, 5)
        assert (found.total_wq_size, found.max_transfer_shift, found.max_batch_shift) == (24, 20, 6)
        assert found.configurable
        assert found.shared_mode
        assert found.dedicated_mode
        assert found.block_on_fault
        assert found.has_operation(lib.DSA_OPCODE_MEMMOVE)
        assert not found.has_operation(0x40)
        assert found.has_command(lib.IDXD_CMD_ABORT_WQ)
        assert not found.has_command(lib.IDXD_CMD_REQUEST_INT_HANDLE)
        assert (r.wq.size, r.wq.max_transfer, r.wq.max_batch, r.wq.shared) == (24, 1 << 20, 64, False)
        assert len(r.dsa.wqs) == 1
        with pytest.raises(IndexError, match="1 work queues"):
            r.dsa.wq(1)


def test_capabilities_before_the_driver_was_entered() -> None:
    class Stranger:
        name = "none"

        def region(self, index: int) -> None: ...
        def irq(self, index: int) -> None: ...

    with pytest.raises(RuntimeError):
        _ = DsaDriver(Stranger()).capabilities  # type: ignore[arg-type]


DEVICES: dict[str, DsaConfig] = {
    "default": DsaConfig(),
    "operation lists": DsaConfig(op_config=True),
    "interrupt handles": DsaConfig(int_handles=8),
    "no command capabilities": DsaConfig(command_capabilities=False),
    "one of everything": DsaConfig(wqs=1, groups=1, engines=1, total_wq_size=1),
    "fixed": DsaConfig(config_en=False),
    "one interrupt": DsaConfig(vectors=2),
    "dedicated only": DsaConfig(shared=False),
    "no block on fault": DsaConfig(block_on_fault=False),
}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
@pytest.mark.parametrize("engine", ["inline", "thread"])
async def test_every_kind_of_device_works(running: Any, name: str, completion: Any, engine: Any) -> None:
    wanted = (WqConfig(completion=completion),)
    async with running("intel", engine, DEVICES[name], wqs=wanted) as r:
        a, b = await r.container.alloc(4096), await r.container.alloc(4096)
        a[:] = 6
        await r.wq.memmove(b, a, 4096)
        assert (b == 6).all()
        assert (await (await r.wq.submit(descriptors.noop(50))).wait())["status"].tolist() == [1] * 50
        await r.dsa.reset()
        await r.wq.memmove(a, b, 4096)
        assert r.wq.completion == completion


async def test_several_queues_in_several_groups(running: Any, kind: tuple[str, str]) -> None:
    wqs = (
        WqConfig(size=16),
        WqConfig(size=16, shared=True, threshold=8, group=1),
        WqConfig(group=1, priority=1),
        WqConfig(block_on_fault=True, group=2, priority=15, max_transfer_shift=12, max_batch_shift=2),
    )
    async with running(*kind, wqs=wqs) as r:
        assert [wq.size for wq in r.dsa.wqs] == [16, 16, 48, 48]
        assert [wq.shared for wq in r.dsa.wqs] == [False, True, False, False]
        a, b = await r.container.alloc(4096), await r.container.alloc(4096)
        for number, wq in enumerate(r.dsa.wqs):
            await wq.fill(a, bytes([number]), 4096)
            await wq.memmove(b, a, 4096)
            assert (b == number).all()
        with pytest.raises(ValueError, match="4096"):
            await r.dsa.wq(3).memmove(0, 0, 4097)
        with pytest.raises(ValueError, match="4"):
            await r.dsa.wq(3).batch(descriptors.noop(5))


REFUSED: list[tuple[Any, type[Exception], str]] = [
    ((), ValueError, "8 work queues"),
    ((WqConfig(),) * 9, ValueError, "8 work queues"),
    ((WqConfig(size=129),), ValueError, "128"),
    ((WqConfig(size=128), WqConfig()), ValueError, "128"),
    ((WqConfig(group=4),), ValueError, "4 groups"),
    ((WqConfig(priority=0),), CommandError, "IDXD_CMDSTS_ERR_WQ_PRIOR"),
    ((WqConfig(shared=True, threshold=0),), CommandError, "IDXD_CMDSTS_ERR_WQ_MODE"),
    ((WqConfig(size=0),), CommandError, "IDXD_CMDSTS_ERR"),
    ((WqConfig(max_batch_shift=11),), CommandError, "IDXD_CMDSTS_ERR_MAX_BATCH_SIZE"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
async def test_a_configuration_the_device_refuses(rig: Any, number: int) -> None:
    wqs, error, words = REFUSED[number]
    async with rig() as r:
        pins = r.machine.memory.stats().pins
        with pytest.raises(error, match=words):
            async with DsaDriver(r.device, wqs=wqs):
                pass
        assert r.machine.memory.stats().pins == pins
        async with DsaDriver(r.device) as dsa:
            await dsa.wq(0).noop()


def test_a_completion_that_is_none() -> None:
    with pytest.raises(ValueError, match="completion"):
        WqConfig(completion="now and then")  # type: ignore[arg-type]


async def test_command_errors_have_names(running: Any) -> None:
    async with running() as r:
        with pytest.raises(CommandError) as caught:
            await r.dsa._command(lib.IDXD_CMD_ENABLE_WQ, 0)
        error = caught.value
        assert (error.command, error.operand, error.code) == ("ENABLE_WQ", 0, lib.IDXD_CMDSTS_ERR_WQ_ENABLED)
        assert error.name == "IDXD_CMDSTS_ERR_WQ_ENABLED"
        assert str(error) == f"ENABLE_WQ {r.device.name} operand 0x0: IDXD_CMDSTS_ERR_WQ_ENABLED (0x21)"
        with pytest.raises(CommandError, match="IDXD_CMDSTS_INVAL_CMD"):
            await r.dsa._command(31)


def test_operands_name_a_bit_in_a_block_of_sixteen() -> None:
    assert [wq_operand(number) for number in (0, 1, 15, 16, 37)] == [1, 2, 0x8000, 0x10001, 0x20020]


async def test_another_device_is_refused_and_not_touched() -> None:
    config = MachineConfig(devices=(DeviceSpec(kind="testdev"),), engine="inline", ram=64 << 20)
    async with Machine(config) as machine, machine.open("testdev0") as device:
        command = await device.config.read(4, 2)
        with pytest.raises(DeviceFailed, match="not a DSA"):
            async with DsaDriver(device):
                pass
        assert await device.config.read(4, 2) == command


async def test_recovery_enables_what_was_disabled(running: Any, autojump_clock: Any) -> None:
    async with running(wqs=(WqConfig(), WqConfig())) as r:
        await r.dsa._command(lib.IDXD_CMD_RESET_WQ, wq_operand(1))
        recovery = await r.dsa.recover()
        assert recovery.reenabled == (1,) or recovery.reset
        await r.dsa.wq(1).noop()
        await r.dsa._command(lib.IDXD_CMD_RESET_DEVICE)
        assert (await r.dsa.recover()).reset
        for wq in r.dsa.wqs:
            await wq.noop()
        await r.device.reset()
        assert (await r.dsa.recover()).reset
        for wq in r.dsa.wqs:
            await wq.noop()


async def test_the_driver_can_be_used_again_and_leaves_nothing_mapped(rig: Any) -> None:
    async with rig() as r:
        before = r.machine.memory.stats()
        for _ in range(3):
            async with DsaDriver(r.device, wqs=(WqConfig(), WqConfig())) as dsa:
                await dsa.wq(1).batch(descriptors.noop(30))
                await dsa.wq(0).alloc_batch(100)
        del dsa
        gc.collect()
        after = r.machine.memory.stats()
        assert (after.pins, after.extents) == (before.pins, before.extents)
        assert r.container.iova_allocator.allocated == {}


async def test_what_a_driver_does_after_its_end(rig: Any) -> None:
    async with rig() as r:
        async with DsaDriver(r.device) as dsa:
            wq = dsa.wq(0)
        with pytest.raises(DeviceFailed, match="shut down"):
            await wq.noop()
        with pytest.raises(DeviceFailed, match="shut down"):
            await wq.submit(descriptors.noop())
        with pytest.raises(DeviceFailed, match="shut down"):
            wq.memmove_nowait(0, 0, 1)
        assert "dedicated 0/128" in repr(wq)


@pytest.mark.parametrize("order", ["device first", "driver first"])
async def test_a_device_that_was_closed_under_the_driver(rig: Any, autojump_clock: Any, order: str) -> None:
    async with rig() as r:
        async with DsaDriver(r.device) as dsa:
            await dsa.wq(0).noop()
            if order == "device first":
                await r.device.close()
