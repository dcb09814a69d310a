"""The fourteen commands: what each does, what each refuses and with which code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from pvfio.abi import ffi, lib
from pvfio.devices.dsa import DsaConfig
from pvfio.silicon import EngineKind
from tests.devices.dsa.function import ACTIVE, DEDICATED, IOVA, LIMITS, PRIORITY_1, Function, running

pytestmark = pytest.mark.touches_c

ENABLE_DEVICE, DISABLE_DEVICE, DRAIN_ALL, ABORT_ALL, RESET_DEVICE = range(1, 6)
ENABLE_WQ, DISABLE_WQ, DRAIN_WQ, ABORT_WQ, RESET_WQ = range(6, 11)
DRAIN_PASID, ABORT_PASID, REQUEST, RELEASE = range(11, 15)
SUCCESS = lib.DSA_COMP_SUCCESS
DISABLED, ENABLED, BUSY = lib.IDXD_WQ_STATE_DISABLED, lib.IDXD_WQ_STATE_ENABLED, lib.IDXD_WQ_STATE_BUSY

Setup = Callable[[Function], None]


def one_group(f: Function) -> None:
    f.wq(0)
    f.group(0, 1, 1)


async def test_bring_up() -> None:
    async with running() as f:
        one_group(f)
        assert await f.command(ENABLE_DEVICE) == 0
        assert (f.state(), f.wq_state()) == (lib.IDXD_DEVICE_STATE_ENABLED, DISABLED)
        assert await f.command(ENABLE_WQ, 0) == 0
        assert f.wq_state() == ENABLED
        f.noop()
        assert f.statuses(1) == [SUCCESS]
        assert await f.command(DISABLE_WQ, 1) == 0
        assert f.wq_state() == DISABLED
        assert await f.command(DISABLE_DEVICE) == 0
        assert f.state() == lib.IDXD_DEVICE_STATE_DISABLED
        assert f.read(f.wqcfg(0, 0), 4) == 16
        assert await f.command(ENABLE_DEVICE) == 0


@pytest.mark.parametrize("command", [0, 13, 14, 15, 16, 31])
async def test_unknown_commands(command: int) -> None:
    """13 and 14 are unknown too where handles are not requested."""
    async with running() as f:
        assert await f.command(command) == lib.IDXD_CMDSTS_INVAL_CMD


async def test_reserved_bits_of_a_command() -> None:
    async with running() as f:
        assert await f.command(RESET_DEVICE, flags=1 << 25) == lib.IDXD_CMDSTS_ERR_RSVD


def no_bus_master(f: Function) -> None:
    f.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY)


def groups(*rows: tuple[int, int], flags: tuple[int, ...] = (), sizes: tuple[int, ...] = (16,)) -> Setup:
    """Sizes of the first WQs, and WQ bitmap and engine bitmap of the first groups."""

    def setup(f: Function) -> None:
        for wq, size in enumerate(sizes):
            f.wq(wq, size=size)
        for group, (wqs, engines) in enumerate(rows):
            f.group(group, wqs, engines, flags[group] if group < len(flags) else 0)

    return setup


def buffers(reserved: int, allowed: int) -> int:
    low, high = lib.IDXD_GRPFLAGS_RDBUFS_RESERVED_SHIFT, lib.IDXD_GRPFLAGS_RDBUFS_ALLOWED_SHIFT
    return reserved << int(low) | allowed << int(high)


def read_buffer_limit(limit: int) -> Setup:
    def setup(f: Function) -> None:
        groups((1, 1), flags=(lib.IDXD_GRPFLAGS_USE_RDBUF_LIMIT,))(f)
        f.write(lib.IDXD_GENCFG_OFFSET, limit)

    return setup


def beyond_64(f: Function) -> None:
    f.wq(0)
    f.group(0, 1, 1)
    f.write(0x408, 1, 8)


@pytest.mark.parametrize(
    ("setup", "code"),
    [
        (lambda f: None, lib.IDXD_CMDSTS_ERR_GRP_CONFIG),
        (groups((1, 0)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG),
        (groups((0, 1)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG),
        (groups((1, 1), (0, 2)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG),
        (no_bus_master, lib.IDXD_CMDSTS_ERR_BUSMASTER_EN),
        (groups((3, 1), sizes=(64, 65)), lib.IDXD_CMDSTS_ERR_WQ_SIZE_ERANGE),
        (groups((3, 1), sizes=(64, 64)), 0),
        (groups((1, 1), (1, 2)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG2),
        (groups((1, 1), sizes=(16, 16)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG2),
        (groups((0x101, 1)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG2),
        (beyond_64, lib.IDXD_CMDSTS_ERR_GRP_CONFIG2),
        (groups((1, 1), (2, 1), sizes=(16, 16)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG3),
        (groups((1, 0x11)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG3),
        (groups((1, 1), flags=(buffers(9, 8),)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG4),
        (groups((1, 1), flags=(buffers(0, 97),)), lib.IDXD_CMDSTS_ERR_GRP_CONFIG4),
        (
            groups((1, 1), (2, 2), flags=(buffers(48, 96), buffers(49, 96)), sizes=(16, 16)),
            lib.IDXD_CMDSTS_ERR_GRP_CONFIG4,
        ),
        (groups((1, 1), flags=(buffers(96, 96),)), 0),
        (read_buffer_limit(0), lib.IDXD_CMDSTS_ERR_CONFIG),
        (read_buffer_limit(97), lib.IDXD_CMDSTS_ERR_CONFIG),
        (read_buffer_limit(96), 0),
    ],
)
async def test_enable_device(setup: Setup, code: int) -> None:
    async with running() as f:
        setup(f)
        assert await f.command(ENABLE_DEVICE) == code
        assert f.state() == (lib.IDXD_DEVICE_STATE_DISABLED if code else lib.IDXD_DEVICE_STATE_ENABLED)
        if not code:
            assert await f.command(ENABLE_DEVICE) == lib.IDXD_CMDSTS_ERR_DEV_ENABLED


BATCH_SHIFT = lib.IDXD_WQCFG_MAX_BATCH_SHIFT_SHIFT


@pytest.mark.parametrize(
    ("config", "fields", "code"),
    [
        ({}, {"size": 0}, lib.IDXD_CMDSTS_ERR_WQ_SIZE),
        ({}, {"mode": DEDICATED}, lib.IDXD_CMDSTS_ERR_WQ_PRIOR),
        ({"priority": False}, {"mode": DEDICATED}, 0),
        ({"dedicated": False}, {}, lib.IDXD_CMDSTS_ERR_WQ_MODE),
        ({"shared": False}, {"mode": PRIORITY_1, "threshold": 1}, lib.IDXD_CMDSTS_ERR_WQ_MODE),
        ({}, {"mode": PRIORITY_1, "threshold": 0}, lib.IDXD_CMDSTS_ERR_WQ_MODE),
        ({}, {"mode": PRIORITY_1, "threshold": 17}, lib.IDXD_CMDSTS_ERR_WQ_MODE),
        ({}, {"mode": PRIORITY_1, "threshold": 16}, 0),
        (
            {"block_on_fault": False},
            {"mode": DEDICATED | PRIORITY_1 | lib.IDXD_WQCFG_BOF},
            lib.IDXD_CMDSTS_ERR_BOF_EN,
        ),
        ({}, {"mode": DEDICATED | PRIORITY_1 | lib.IDXD_WQCFG_BOF}, 0),
        ({}, {"mode": DEDICATED | PRIORITY_1 | lib.IDXD_WQCFG_PASID_EN}, lib.IDXD_CMDSTS_ERR_PASID_EN),
        ({}, {"mode": DEDICATED | PRIORITY_1 | lib.IDXD_WQCFG_PRIV}, lib.IDXD_CMDSTS_ERR_PRIV_EN),
        ({}, {"mode": DEDICATED | PRIORITY_1 | lib.IDXD_WQCFG_ATS_DISABLE}, lib.IDXD_CMDSTS_ERR_WQ_ATS),
        ({"wq_ats": True}, {"mode": DEDICATED | PRIORITY_1 | lib.IDXD_WQCFG_ATS_DISABLE}, 0),
        ({}, {"limits": 11 << BATCH_SHIFT | 31}, lib.IDXD_CMDSTS_ERR_MAX_BATCH_SIZE),
        ({"max_xfer_shift": 20}, {"limits": 10 << BATCH_SHIFT | 21}, lib.IDXD_CMDSTS_ERR_MAX_XFER_SIZE),
        ({"max_xfer_shift": 20}, {"limits": 10 << BATCH_SHIFT | 20}, 0),
    ],
)
async def test_enable_wq(config: dict[str, Any], fields: dict[str, int], code: int) -> None:
    async with running(DsaConfig(**config)) as f:
        f.wq(0, **fields)
        f.group(0, 1, 1)
        assert await f.command(ENABLE_DEVICE) == 0
        assert await f.command(ENABLE_WQ, 0) == code
        assert f.wq_state() == (DISABLED if code else ENABLED)
        if not code:
            assert await f.command(ENABLE_WQ, 0) == lib.IDXD_CMDSTS_ERR_WQ_ENABLED


async def test_enable_wq_where_it_cannot_be() -> None:
    async with running() as f:
        one_group(f)
        assert await f.command(ENABLE_WQ, 0) == lib.IDXD_CMDSTS_ERR_DEV_NOTEN
        assert await f.command(ENABLE_WQ, 8) == lib.IDXD_CMDSTS_INVAL_WQIDX
        assert await f.command(ENABLE_WQ, 0xFFFFF) == lib.IDXD_CMDSTS_INVAL_WQIDX


@pytest.mark.parametrize("command", [DISABLE_DEVICE, DRAIN_ALL, ABORT_ALL, DRAIN_PASID, ABORT_PASID])
async def test_the_device_must_be_enabled(command: int) -> None:
    async with running() as f:
        assert await f.command(command) == lib.IDXD_CMDSTS_ERR_DIS_DEV_EN


@pytest.mark.parametrize("command", [DISABLE_WQ, DRAIN_WQ, ABORT_WQ, RESET_WQ])
@pytest.mark.parametrize(
    ("operand", "code"),
    [
        (0, lib.IDXD_CMDSTS_INVAL_WQIDX),
        (1 << 8, lib.IDXD_CMDSTS_INVAL_WQIDX),
        (1 | 1 << 16, lib.IDXD_CMDSTS_INVAL_WQIDX),
        (1 << 16, lib.IDXD_CMDSTS_INVAL_WQIDX),
        (1 << 1, lib.IDXD_CMDSTS_ERR_DEV_NOT_EN),
        (1 << 1 | 1, lib.IDXD_CMDSTS_ERR_DEV_NOT_EN),
        (1 | 1 << 2, 0),
    ],
)
async def test_operands_that_name_wqs(command: int, operand: int, code: int) -> None:
    async with running() as f:
        await f.configure(0, 2)
        assert await f.command(command, operand) == code
        left = DISABLED if command in (DISABLE_WQ, RESET_WQ) and not code else ENABLED
        assert (f.wq_state(0), f.wq_state(1), f.wq_state(2)) == (left, DISABLED, left)


async def test_operands_beyond_the_first_sixteen() -> None:
    async with running(DsaConfig(wqs=40, total_wq_size=128)) as f:
        await f.configure(17, 33)
        assert await f.command(DISABLE_WQ, 1 << 1 | 2 << 16) == 0
        assert (f.wq_state(17), f.wq_state(33)) == (ENABLED, DISABLED)
        assert await f.command(RESET_WQ, 1 << 1 | 1 << 16) == 0
        assert f.wq_state(17) == DISABLED


@pytest.mark.parametrize(
    ("command", "operand", "during"),
    [
        (DRAIN_ALL, 0, (ENABLED, lib.IDXD_DEVICE_STATE_ENABLED)),
        (DRAIN_WQ, 1, (ENABLED, lib.IDXD_DEVICE_STATE_ENABLED)),
        (DRAIN_PASID, 0, (ENABLED, lib.IDXD_DEVICE_STATE_ENABLED)),
        (DISABLE_WQ, 1, (BUSY, lib.IDXD_DEVICE_STATE_ENABLED)),
        (DISABLE_DEVICE, 0, (BUSY, lib.IDXD_DEVICE_STATE_DRAIN)),
    ],
)
@pytest.mark.parametrize("engine", ["inline", "thread"])
async def test_draining_waits(
    command: int, operand: int, during: tuple[int, int], engine: EngineKind
) -> None:
    """The command is active until what was submitted is done, and only then."""
    async with running(engine=engine) as f:
        await f.configure(0, 1)
        f.device.engine.stop_before(0)
        for record in range(3):
            f.noop(record=record)
        await trio.lowlevel.wait_readable(f.device.engine.stop_fd)
        f.order(command, operand)
        await trio.testing.wait_all_tasks_blocked()
        assert f.read(lib.IDXD_CMDSTS_OFFSET, 4) == ACTIVE
        assert (f.wq_state(), f.state()) == during
        assert f.statuses(3) == [0, 0, 0]
        f.device.engine.resume()
        assert await f.finish() == 0
        assert f.statuses(3) == [SUCCESS] * 3


async def test_a_closing_wq_takes_no_more() -> None:
    async with running() as f:
        await f.configure(0)
        f.device.engine.stop_before(0)
        f.noop(record=0)
        f.order(DISABLE_WQ, 1)
        await trio.testing.wait_all_tasks_blocked()
        f.noop(record=1)
        assert f.errors() == lib.DSA_SWERR_WQ_NOT_ENABLED
        f.device.engine.resume()
        assert await f.finish() == 0
        assert f.statuses(2) == [SUCCESS, 0]


@pytest.mark.parametrize(
    ("command", "operand", "gone", "state"),
    [
        (ABORT_ALL, 0, (0, 1), ENABLED),
        (ABORT_WQ, 1, (0,), ENABLED),
        (RESET_WQ, 2, (1,), DISABLED),
        (RESET_DEVICE, 0, (0, 1), DISABLED),
    ],
)
@pytest.mark.parametrize("engine", ["inline", "thread"])
async def test_aborting(
    command: int, operand: int, gone: tuple[int, ...], state: int, engine: EngineKind
) -> None:
    """Queued and waiting descriptors go without a record; other WQs keep theirs."""
    async with running(engine=engine) as f:
        for wq in (0, 1):
            f.wq(wq, mode=DEDICATED | PRIORITY_1 | lib.IDXD_WQCFG_BOF)
            f.group(wq, 1 << wq, 1 << wq)
        assert await f.command(ENABLE_DEVICE) == 0
        for wq in (0, 1):
            assert await f.command(ENABLE_WQ, wq) == 0
            f.block(wq, record=2 * wq)
            f.noop(wq, record=2 * wq + 1)
        assert await f.command(command, operand) == 0
        f.bus.map(0xDEAD000, bytearray(4096))
        f.device.engine.kick()
        for wq in set(range(2)) - set(gone):
            assert await f.command(DRAIN_WQ, 1 << wq) == 0
        assert f.statuses(4) == [0 if wq in gone else SUCCESS for wq in (0, 0, 1, 1)]
        assert [f.wq_state(wq) for wq in gone] == [state] * len(gone)
        if state == ENABLED:
            f.noop(gone[0], record=7)
            assert await f.command(DRAIN_ALL) == 0
            assert f.statuses(8)[7] == SUCCESS


async def test_abort_pasid() -> None:
    async with running() as f:
        f.wq(0, mode=PRIORITY_1, threshold=8)
        f.group(0, 1, 1)
        assert await f.command(ENABLE_DEVICE) == await f.command(ENABLE_WQ, 0) == 0
        f.device.engine.stop_before(0)
        portal = f.device.mmio(lib.IDXD_WQ_BAR)
        for record, pasid in enumerate((5, 6)):
            desc = ffi.new("struct dsa_hw_desc *")
            desc.pasid_priv = pasid
            desc.flags_opcode = lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR
            desc.completion_addr = IOVA + 32 * record
            assert lib.pv_mmio_enqcmd(portal, 0, desc) == 0
        assert await f.command(ABORT_PASID, 5) == 0
        f.device.engine.resume()
        assert f.statuses(2) == [0, SUCCESS]


async def test_reset_wq_keeps_the_size() -> None:
    async with running() as f:
        await f.configure(0)
        assert await f.command(RESET_WQ, 1) == 0
        assert [f.read(f.wqcfg(0, word), 4) for word in range(4)] == [16, 0, 0, 0]
        f.wq(0, size=99)
        assert f.read(f.wqcfg(0, 0), 4) == 16
        assert await f.command(ENABLE_WQ, 0) == 0


def power_on(f: Function) -> list[int]:
    """All a reset must bring back."""
    tables = [f.read(at) for at in range(0x400, f.config.msix_perm_offset, 8)]
    names = ("GENCFG", "GENCTRL", "GENSTATS", "INTCAUSE", "SWERR")
    return tables + [f.read(getattr(lib, f"IDXD_{name}_OFFSET")) for name in names]


@pytest.mark.parametrize("flr", [False, True])
async def test_reset_from_every_state(flr: bool) -> None:
    """RESET_DEVICE and function level reset end where power-on does, with work queued and waiting."""
    async with running() as f:
        fresh = power_on(f)
        await f.configure(0, 3)
        f.write(lib.IDXD_GENCTRL_OFFSET, 3)
        f.write(lib.IDXD_GENCFG_OFFSET, lib.IDXD_GENCFG_USER_INT_EN)
        f.noop(wq=5)
        f.device.engine.stop_before(0)
        f.noop()
        assert power_on(f) != fresh
        if flr:
            await f.device.reset()
            assert f.read(0) == 2**64 - 1
            f.start()
        else:
            assert await f.command(RESET_DEVICE) == 0
        assert power_on(f) == fresh
        f.device.engine.resume()
        assert f.statuses(1) == [0]
        await f.configure(0)
        f.noop()
        assert f.statuses(1) == [SUCCESS]


@pytest.mark.parametrize("engine", ["inline", "thread"])
async def test_function_level_reset_ends_a_command(engine: EngineKind) -> None:
    """A drain that would wait for ever; the next command works."""
    async with running(engine=engine) as f:
        f.wq(0, mode=DEDICATED | PRIORITY_1 | lib.IDXD_WQCFG_BOF)
        f.group(0, 1, 1)
        assert await f.command(ENABLE_DEVICE) == await f.command(ENABLE_WQ, 0) == 0
        f.block()
        f.order(DISABLE_DEVICE)
        await trio.testing.wait_all_tasks_blocked()
        assert f.state() == lib.IDXD_DEVICE_STATE_DRAIN
        await f.device.reset()
        f.start()
        assert f.read(lib.IDXD_CMDSTS_OFFSET, 4) == 0
        assert f.state() == lib.IDXD_DEVICE_STATE_DISABLED
        await f.configure(0)
        f.order(ENABLE_WQ, 0)
        await f.device.reset()  # before the task has seen it
        f.start()
        await trio.testing.wait_all_tasks_blocked()
        assert f.read(lib.IDXD_CMDSTS_OFFSET, 4) == 0
        assert f.wq_state() == DISABLED


async def test_one_command_at_a_time() -> None:
    """A command written while another is active is dropped."""
    async with running() as f:
        f.order(RESET_DEVICE)
        f.write(lib.IDXD_CMD_OFFSET, 0)
        assert await f.finish() == 0
        await trio.testing.wait_all_tasks_blocked()
        assert f.read(lib.IDXD_CMDSTS_OFFSET, 4) == 0


@pytest.mark.parametrize("code", [0, lib.IDXD_CMDSTS_ERR_DIS_DEV_EN])
async def test_completion_interrupt(code: int) -> None:
    """Asked for by bit 31, for refused commands too; INTCAUSE says why, until it is cleared."""
    async with running() as f:
        command = DRAIN_ALL if code else RESET_DEVICE
        assert await f.command(command) == code
        assert (f.interrupts()[0], f.read(lib.IDXD_INTCAUSE_OFFSET, 4)) == (0, 0)
        assert await f.command(command, flags=lib.IDXD_CMD_INT_REQ) == code
        assert (f.interrupts(), f.read(lib.IDXD_INTCAUSE_OFFSET, 4)) == ((1, 0), lib.IDXD_INTC_CMD)
        f.write(lib.IDXD_INTCAUSE_OFFSET, lib.IDXD_INTC_ERR)
        assert f.read(lib.IDXD_INTCAUSE_OFFSET, 4) == lib.IDXD_INTC_CMD
        f.write(lib.IDXD_INTCAUSE_OFFSET, lib.IDXD_INTC_CMD)
        assert f.read(lib.IDXD_INTCAUSE_OFFSET, 4) == 0


async def test_interrupt_handles() -> None:
    """Requested, used, released; the handle is not the table index."""
    async with running(DsaConfig(int_handles=2)) as f:
        assert f.read(lib.IDXD_CMDCAP_OFFSET, 4) == 0x7FFE
        await f.configure(0)

        def use(handle: int) -> int:
            f.submit(lib.DSA_OPCODE_NOOP, flags=lib.IDXD_OP_FLAG_RCI, int_handle=handle)
            return f.statuses(1)[0]

        assert use(3) == lib.DSA_COMP_INT_HANDLE_INVAL
        status = await f.command(REQUEST, 3)
        handle = status >> lib.IDXD_CMDSTS_RES_SHIFT
        assert (status & lib.IDXD_CMDSTS_ERR_MASK, handle == 3) == (0, False)
        assert (use(handle), f.interrupts()) == (SUCCESS, (1, 3))
        assert use(3) == lib.DSA_COMP_INT_HANDLE_INVAL
        assert await f.command(REQUEST, 3) == status
        assert await f.command(REQUEST, 1) & lib.IDXD_CMDSTS_ERR_MASK == 0
        assert await f.command(REQUEST, 2) == lib.IDXD_CMDSTS_ERR_NO_HANDLE
        assert await f.command(RELEASE, handle) == 0
        assert use(handle) == lib.DSA_COMP_INT_HANDLE_INVAL
        assert await f.command(RELEASE, handle) == lib.IDXD_CMDSTS_ERR_NO_HANDLE_AT_IDX
        assert await f.command(REQUEST, 2) & lib.IDXD_CMDSTS_ERR_MASK == 0


@pytest.mark.parametrize("operand", [0, 9, 0xFFFF, lib.CMD_INT_HANDLE_IMS | 1])
async def test_no_such_table_entry(operand: int) -> None:
    async with running(DsaConfig(int_handles=8)) as f:
        assert await f.command(REQUEST, operand) == lib.IDXD_CMDSTS_ERR_INVAL_INT_IDX
        assert await f.command(RELEASE, operand) == lib.IDXD_CMDSTS_ERR_NO_HANDLE_AT_IDX


async def test_bus_mastering_off_and_on_again() -> None:
    """Work submitted meanwhile waits; nothing fails."""
    async with running() as f:
        await f.configure(0)
        f.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY)
        f.noop()
        assert f.statuses(1) == [0]
        f.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
        assert f.statuses(1) == [SUCCESS]


async def test_abort_while_bus_mastering_is_off() -> None:
    """The abort does not turn DMA on behind the driver's back."""
    async with running() as f:
        await f.configure(0, 1)
        f.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY)
        f.noop(0)
        f.noop(1, record=1)
        assert await f.command(ABORT_WQ, 1) == 0
        assert f.statuses(2) == [0, 0]
        f.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
        assert f.statuses(2) == [0, SUCCESS]


async def test_limits_hold_after_they_are_set() -> None:
    """What ENABLE_WQ accepted is what descriptors are checked against."""
    async with running() as f:
        f.wq(0, limits=1 << BATCH_SHIFT | 4)
        f.group(0, 1, 1)
        assert await f.command(ENABLE_DEVICE) == await f.command(ENABLE_WQ, 0) == 0
        for record, size in enumerate((16, 17)):
            f.submit(lib.DSA_OPCODE_MEMFILL, record=record, dst_addr=IOVA + 4096, xfer_size=size)
        assert f.statuses(2) == [SUCCESS, lib.DSA_COMP_XFER_ERANGE]
        assert LIMITS != f.read(f.wqcfg(0, 3), 4)
