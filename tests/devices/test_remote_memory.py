"""Devices whose memory is reached by asking: the trio thread stays free, resets end what waits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.devices.testdev import TestDevice
from pvfio.silicon import TableBus
from tests.devices.dsa.function import DEDICATED, PRIORITY_1, Function
from tests.devices.far_end import LONGEST, Attentive, Held
from tests.devices.nvme.rig import MIB, Rig, running
from tests.far_memory import FarMemory

pytestmark = pytest.mark.touches_c

IOVA = 0x100000
PAGE = 4096
MASTER = lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER
NAMESPACES = (NamespaceSpec(size=MIB),)


# NVMe.


async def test_nvme_leaves_the_trio_thread_free() -> None:
    """Queues and all data are remote; every request is answered by the trio thread, which reads a register first."""
    rigs: list[Rig] = []
    far = Attentive(lambda: [rig.csts for rig in rigs])
    async with running(namespaces=NAMESPACES, engine="thread", far=far) as rig:
        rigs.append(rig)
        page = await rig.identify(lib.NVME_ID_CNS_CTRL, kind="nvme_id_ctrl")
        assert page.vid == rig.config.vendor
        data = bytes(range(256)) * 16
        assert (await rig.io(lib.NVME_CMD_WRITE, nsid=1, data=data)).status == 0
        rig.data[: len(data)] = 0
        assert (await rig.io(lib.NVME_CMD_READ, nsid=1)).status == 0
        assert rig.data[: len(data)].tobytes() == data
        assert (await rig.log(lib.NVME_LOG_SMART)) is not None
        stamp = (1234567).to_bytes(6, "little").ljust(8, b"\0")
        done = await rig.admin(lib.NVME_ADMIN_SET_FEATURES, cdw10=lib.NVME_FEAT_TIMESTAMP, data=stamp)
        assert done.status == 0
        for download in range(2):
            done = await rig.admin(
                lib.NVME_ADMIN_FW_DOWNLOAD, cdw10=PAGE // 4 - 1, cdw11=download * PAGE // 4, data=bytes(PAGE)
            )
            assert done.status == 0
    assert far.answers > 20


async def test_nvme_shadow_doorbells_leave_the_trio_thread_free() -> None:
    """The engine reads and writes them, whoever configures them or makes a queue."""
    far = Attentive(lambda: None)
    async with running(namespaces=NAMESPACES, engine="thread", far=far) as rig:
        shadow, index = rig.iova + 0x80000, rig.iova + 0x81000
        with trio.fail_after(30):
            assert (await rig.admin(lib.NVME_ADMIN_DBBUF, prp1=shadow, prp2=index)).status == 0
            assert (await rig.admin(lib.NVME_ADMIN_DELETE_SQ, cdw10=1)).status == 0
            assert (await rig.admin(lib.NVME_ADMIN_DELETE_CQ, cdw10=1)).status == 0
            rig.memory[0x80008:0x80010] = 0xEE
            rig.rings_of_io()
            await rig.make_queues()
            assert not rig.memory[0x80008:0x80010].any()
            assert (await rig.admin(lib.NVME_ADMIN_DBBUF, prp1=shadow, prp2=1 << 40)).code == (
                lib.NVME_SC_INVALID_FIELD
            )


async def test_admin_commands_that_change_queues_wait_elsewhere() -> None:
    """A read is kept waiting in the engine while an admin command wants the engine to pause."""
    rigs: list[Rig] = []
    held = Held(IOVA + 0x200000, PAGE, lambda: rigs[0].device.bus)  # type: ignore[arg-type, return-value]
    async with running(namespaces=NAMESPACES, engine="thread", far=held) as rig:
        rigs.append(rig)
        assert rig.far is not None
        flags = rig.device._msix_cap + lib.PCI_MSIX_FLAGS  # the pin's level needs the engine too
        rig.config_write(flags, 2, lib.PCI_MSIX_FLAGS_ENABLE)
        await rig.settle()
        seen = len(rig.far.requests)
        creates = rig.submit(
            lib.NVME_ADMIN_CREATE_CQ,
            cdw10=2 | 15 << 16,
            cdw11=lib.NVME_QUEUE_PHYS_CONTIG,
            prp1=IOVA + 0x300000,
        )
        # No checkpoint before the read is kept waiting: the command is fetched, its execution begins only then.
        until = time.monotonic() + LONGEST
        while not any(iova < IOVA + PAGE for iova, _, _ in rig.far.requests[seen:]):
            assert time.monotonic() < until
        waits = rig.submit(lib.NVME_CMD_READ, ring=rig.io_ring, nsid=1, prp1=IOVA + 0x200000)
        assert held.inside.wait(LONGEST)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
            assert rig.csts & lib.NVME_CSTS_RDY
        held.let_go.set()
        assert (await rig.wait(waits, ring=rig.io_ring)).status == 0
        assert (await rig.wait(creates)).status == 0


async def a_worker_waits() -> None:
    """Until some task waits for a worker thread; the trio thread must be free for that."""
    limiter = trio.to_thread.current_default_thread_limiter()
    with trio.fail_after(LONGEST / 2):
        while not limiter.borrowed_tokens:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("subject", ["format", "sanitize"])
async def test_what_ends_in_the_background_waits_elsewhere(
    subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O command is being fetched when all is erased, and the namespace is to be another."""
    rigs: list[Rig] = []
    held = Held(IOVA + 0x2000, PAGE, lambda: rigs[0].device.bus)  # type: ignore[arg-type, return-value]
    begun, may_end = trio.Event(), trio.Event()

    async def erase(*_: object, **__: object) -> None:
        begun.set()
        await may_end.wait()

    monkeypatch.setattr(f"pvfio.devices.nvme.{subject}.erase", erase)
    config = NvmeConfig(sanitize_seconds=0)
    async with running(config, namespaces=NAMESPACES, engine="thread", far=held) as rig:
        rigs.append(rig)
        flags = rig.device._msix_cap + lib.PCI_MSIX_FLAGS  # the pin's level needs the engine too
        rig.config_write(flags, 2, lib.PCI_MSIX_FLAGS_ENABLE)
        await rig.settle()
        if subject == "format":
            cid = rig.submit(lib.NVME_ADMIN_FORMAT_NVM, nsid=1)
        else:
            assert (await rig.admin(lib.NVME_ADMIN_SANITIZE, cdw10=lib.NVME_SANITIZE_BLOCK)).status == 0
        with trio.fail_after(LONGEST):
            await begun.wait()
        waits = rig.submit(lib.NVME_CMD_READ, ring=rig.io_ring, nsid=1, prp1=IOVA + 0x200000)
        await held.arrived()
        may_end.set()
        await a_worker_waits()
        assert rig.csts & lib.NVME_CSTS_RDY
        held.let_go.set()
        await rig.wait(waits, ring=rig.io_ring)
        if subject == "format":
            assert (await rig.wait(cid)).status == 0
        with trio.fail_after(LONGEST):
            while (await rig.io(lib.NVME_CMD_READ)).status:
                pass


@pytest.mark.parametrize("how", ["disable", "flr", "keep alive"])
async def test_a_reset_ends_an_admin_transfer(how: str) -> None:
    """Nothing of it moves and nothing completes afterwards; the next ones work."""
    rigs: list[Rig] = []
    held = Held(IOVA + 0x200000, PAGE, lambda: rigs[0].device.bus)  # type: ignore[arg-type, return-value]
    async with running(namespaces=NAMESPACES, engine="thread", far=held) as rig:
        rigs.append(rig)
        rig.submit(lib.NVME_ADMIN_IDENTIFY, cdw10=lib.NVME_ID_CNS_CTRL, prp1=IOVA + 0x200000)
        await held.arrived()
        if how == "flr":
            rig.device.function_level_reset()
            rig.config_write(lib.PCI_COMMAND, 2, MASTER)
        elif how == "keep alive":
            rig.device._silent_host()
            assert rig.csts & lib.NVME_CSTS_CFS
            rig.disable()
        else:
            rig.disable()
        assert held.cancelled == 1
        assert rig.far is not None
        seen = len(rig.far.requests)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert rig.far.requests[seen:] == []
        rig.enable()
        rig.rings_of_io()
        page = await rig.identify(lib.NVME_ID_CNS_CTRL, kind="nvme_id_ctrl")
        assert page.vid == rig.config.vendor
        assert list(rig.admin_ring.done) == []
        assert not rig.memory[0x200000 : 0x200000 + PAGE].any()


# The teaching device.


@asynccontextmanager
async def teaching(
    held: Held | Attentive,
) -> AsyncIterator[tuple[TestDevice, np.ndarray[Any, Any], FarMemory]]:
    bus = TableBus()
    memory = np.arange(4 * PAGE, dtype=np.uint32).astype(np.uint8)
    far = FarMemory(bus, held)
    far.map(IOVA, memory)
    device = TestDevice(bus)
    async with trio.open_nursery() as nursery:
        await nursery.start(device.run)
        device.config_write(lib.PCI_COMMAND, 2, MASTER)
        yield device, memory, far
        nursery.cancel_scope.cancel()
    device.close()


def order(device: TestDevice, command: int, src: int, dst: int, count: int) -> None:
    for register, size, value in ((0x08, 8, src), (0x10, 8, dst), (0x18, 4, count), (0x1C, 4, command)):
        device.write(2, register, size, value)


async def finish(device: TestDevice) -> int:
    with trio.fail_after(LONGEST):
        while (status := device.read(2, 0x20, 4)) == TestDevice.BUSY:
            await trio.lowlevel.checkpoint()
    return status


async def test_teaching_device_leaves_the_trio_thread_free() -> None:
    async with teaching(Attentive()) as (device, memory, _):
        order(device, 2, IOVA + 8, 0, 2 * PAGE)
        assert device.read(2, 0x20, 4) == TestDevice.BUSY
        order(device, 1, 0, IOVA, 16)  # dropped, but for the registers: they count for the next one
        assert await finish(device) == TestDevice.DONE
        assert device.read(2, 0x24, 4) == 2 * PAGE
        assert device.scratch[: 2 * PAGE] == memory[8 : 8 + 2 * PAGE].tobytes()
        assert not any(device.scratch[2 * PAGE :])
        order(device, 1, 0, IOVA, 16)
        assert await finish(device) == TestDevice.DONE
        assert memory[:16].tobytes() == device.scratch[:16]
        order(device, 3, IOVA, IOVA + 4 * PAGE - 8, 16)
        assert await finish(device) == TestDevice.ABORTED
        assert (device.read(2, 0x24, 4), device.read(2, 0x28, 8)) == (8, IOVA + 4 * PAGE)


async def test_a_reset_ends_the_teaching_devices_dma() -> None:
    devices: list[TestDevice] = []
    held = Held(IOVA, PAGE, lambda: devices[0].bus)  # type: ignore[arg-type, return-value]
    async with teaching(held) as (device, memory, far):
        devices.append(device)
        order(device, 2, IOVA, 0, 64)
        await held.arrived()
        device.function_level_reset()
        assert held.cancelled == 1
        assert device.read(2, 0x20, 4) == (1 << 32) - 1
        device.config_write(lib.PCI_COMMAND, 2, MASTER)
        assert device.read(2, 0x20, 4) == TestDevice.IDLE
        order(device, 2, IOVA + PAGE, 64, 64)
        assert await finish(device) == TestDevice.DONE
        assert not any(device.scratch[:64])
        assert device.scratch[64:128] == memory[PAGE : PAGE + 64].tobytes()
        assert [request[0] for request in far.requests] == [IOVA, IOVA + PAGE]


# DSA.


@asynccontextmanager
async def held_move(*enabled: int) -> AsyncIterator[Function]:
    """A DSA with two WQs, one of whose operations is kept waiting in the engine; in the end it has succeeded."""
    function = Function(engine="thread")
    held = Held(IOVA + 0x100000, PAGE, lambda: function.bus)
    far, there = FarMemory(function.bus, held), np.full(PAGE, 0x77, np.uint8)
    far.map(IOVA + 0x100000, there)
    async with trio.open_nursery() as nursery:
        await nursery.start(function.device.run)
        function.group(0, 3, 1)
        for wq in (0, 1):
            function.wq(wq, size=4, mode=DEDICATED | PRIORITY_1)
        assert await function.command(lib.IDXD_CMD_ENABLE_DEVICE) == 0
        for wq in enabled:
            assert await function.command(lib.IDXD_CMD_ENABLE_WQ, wq) == 0
        function.submit(
            lib.DSA_OPCODE_MEMMOVE, src_addr=IOVA + 0x100000, dst_addr=IOVA + PAGE, xfer_size=PAGE
        )
        await held.arrived()
        yield function
        assert not function.memory[0]
        held.let_go.set()
        with trio.fail_after(LONGEST):
            assert await function.finish() == 0
            while not function.memory[0]:
                await trio.lowlevel.checkpoint()
        assert function.memory[0] == lib.DSA_COMP_SUCCESS
        assert (function.memory[PAGE : 2 * PAGE] == 0x77).all()
        nursery.cancel_scope.cancel()
    function.device.close()


async def test_dsa_commands_leave_the_trio_thread_free() -> None:
    """An operation is kept waiting in the engine while a command wants the engine to pause."""
    async with held_move(0) as function:
        function.order(lib.IDXD_CMD_ENABLE_WQ, 1)
        for _ in range(20):
            await trio.lowlevel.checkpoint()


async def test_dsa_resets_a_wq_beside_another() -> None:
    """The operation of one is kept waiting in the engine, and begins once more, while the other is reset."""
    async with held_move(0, 1) as function:
        function.order(lib.IDXD_CMD_RESET_WQ, 2)
        await a_worker_waits()
