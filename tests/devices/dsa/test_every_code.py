"""Every completion code and every command error code, each provoked once: by its rule, or, where no rule of this
device produces it, by injection. A code that is added to abi/dsa.h without a row here fails.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from pvfio.abi import dtype_of, ffi, lib
from pvfio.devices.dsa import DsaConfig
from tests.devices.dsa.conftest import MakeRig
from tests.devices.dsa.function import DEDICATED, LIMITS, PRIORITY_1, Function, running
from tests.devices.dsa.rig import CRAV_RCR, GENCAP, MEMORY, RECORDS, Rig, descriptor, descriptors

pytestmark = pytest.mark.touches_c

A, B, C = MEMORY, MEMORY + 0x10000, MEMORY + 0x20000
NOWHERE = 0xDEAD000
LOG = MEMORY + 0x50000

Provoke = Callable[[Rig], int]


def record(opcode: int, flags: int = CRAV_RCR, **fields: int) -> Provoke:
    """The status in the completion record of one descriptor."""

    def provoke(rig: Rig) -> int:
        return int(rig.run(opcode, flags, **fields)["status"])

    return provoke


def swerr(opcode: int, flags: int = CRAV_RCR, **fields: int) -> Provoke:
    """SWERR's error after one descriptor."""

    def provoke(rig: Rig) -> int:
        rig.submit(descriptor(opcode, flags, **fields))
        return int(rig.swerr().status >> lib.IDXD_SWERR_ERROR_SHIFT & 0xFF)

    return provoke


def injected(status: int) -> Provoke:
    """The status a hook asked for, on a write, with all that belongs to it."""

    def provoke(rig: Rig) -> int:
        values = {"status": status | lib.DSA_COMP_STATUS_WRITE, "opcode": lib.DSA_OPCODE_MEMFILL}
        values |= {"wq": 0, "times": 1, "bytes_completed": 9, "fault_addr": NOWHERE}
        assert lib.pv_dsa_inject(rig.dsa, ffi.new("struct pv_dsa_injection *", values)) == 0
        fill = record(lib.DSA_OPCODE_MEMFILL, pattern=1, dst_addr=A, xfer_size=64)
        assert record(lib.DSA_OPCODE_NOOP)(rig) == lib.DSA_COMP_SUCCESS
        found = fill(rig)
        assert found & lib.DSA_COMP_STATUS_WRITE
        assert (rig.record["bytes_completed"], rig.record["fault_addr"]) == (9, NOWHERE)
        assert not rig.at(A, 64).any()
        assert fill(rig) == lib.DSA_COMP_SUCCESS
        return int(found & lib.DSA_COMP_STATUS_MASK)

    return provoke


def batch_with(*members: np.ndarray[Any, Any]) -> Provoke:
    return lambda rig: int(rig.batch(descriptors(*members))["status"])


def without_record(rig: Rig) -> int:
    rig.submit(GOOD)
    assert rig.handed == 1
    return int(rig.record["status"])


def privileged(rig: Rig) -> int:
    rig.enable(1, dedicated=0, threshold=4)
    assert rig.enqcmd(descriptor(lib.DSA_OPCODE_NOOP, pasid_priv=lib.DSA_DESC_PRIV), 1) == 0
    return int(rig.record["status"])


def delta(*offsets: int) -> Provoke:
    """Applies a delta record with these offsets to 64 bytes."""

    def provoke(rig: Rig) -> int:
        words = b"".join(offset.to_bytes(2, "little") + bytes(8) for offset in offsets)
        rig.at(B, len(words))[:] = np.frombuffer(words, np.uint8)
        fields = {"src_addr": B, "dst_addr": A, "xfer_size": 64, "delta_rec_size": len(words)}
        return int(rig.run(lib.DSA_OPCODE_AP_DELTA, **fields)["status"])

    return provoke


def bad_dif(rig: Rig) -> int:
    rig.at(B, 520)[:] = 1
    return int(rig.run(lib.DSA_OPCODE_DIF_CHECK, src_addr=B, xfer_size=520)["status"])


def logged(number: int, *work: np.ndarray[Any, Any], count: int = 0) -> Provoke:
    """The code of an entry of the event log."""

    def provoke(rig: Rig) -> int:
        lib.pv_dsa_log_enable(rig.dsa, LOG, 64)
        if count:
            rig.batch(descriptors(*work))
        else:
            rig.submit(descriptors(*work))
        entry = rig.at(LOG + 64 * number, 64).view(dtype_of("struct dsa_evl_entry"))[0]
        return int(entry["status"]) >> int(lib.IDXD_SWERR_ERROR_SHIFT) & 0xFF

    return provoke


FILL = {"pattern": 0, "dst_addr": A, "xfer_size": 64}
LOST = descriptor(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE)
GOOD = descriptor(lib.DSA_OPCODE_NOOP, 0)
BAD = descriptor(0x7F, CRAV_RCR, completion_addr=RECORDS + 32)
COMPLETIONS: dict[str, Provoke] = {
    "NONE": without_record,
    "SUCCESS": record(lib.DSA_OPCODE_NOOP),
    "SUCCESS_PRED": record(
        lib.DSA_OPCODE_COMPARE,
        CRAV_RCR | lib.IDXD_OP_FLAG_CR,
        src_addr=A,
        src2_addr=B,
        xfer_size=64,
        expected_res=1,
    ),
    "PAGE_FAULT_NOBOF": record(lib.DSA_OPCODE_CRCGEN, src_addr=NOWHERE, xfer_size=8),
    "PAGE_FAULT_IR": injected(lib.DSA_COMP_PAGE_FAULT_IR),
    "BATCH_FAIL": batch_with(GOOD, BAD),
    "BATCH_PAGE_FAULT": record(lib.DSA_OPCODE_BATCH, desc_list_addr=NOWHERE, desc_count=2),
    "DR_OFFSET_NOINC": delta(3, 3),
    "DR_OFFSET_ERANGE": delta(8),
    "DIF_ERR": bad_dif,
    "BAD_OPCODE": record(0x7F),
    "INVALID_FLAGS": record(lib.DSA_OPCODE_NOOP, CRAV_RCR | lib.IDXD_OP_FLAG_FENCE),
    "NOZERO_RESERVE": record(lib.DSA_OPCODE_NOOP, rsvd1=1),
    "XFER_ERANGE": record(lib.DSA_OPCODE_MEMFILL, **FILL | {"xfer_size": 0}),
    "DESC_CNT_ERANGE": record(lib.DSA_OPCODE_BATCH, desc_list_addr=A, desc_count=1),
    "DR_ERANGE": record(lib.DSA_OPCODE_AP_DELTA, src_addr=B, dst_addr=A, xfer_size=64, delta_rec_size=9),
    "OVERLAP_BUFFERS": record(lib.DSA_OPCODE_COPY_CRC, src_addr=A, dst_addr=A + 8, xfer_size=64),
    "DCAST_ERR": record(lib.DSA_OPCODE_DUALCAST, src_addr=A, dst_addr=B, dest2=C + 8, xfer_size=64),
    "DESCLIST_ALIGN": record(lib.DSA_OPCODE_BATCH, desc_list_addr=A + 32, desc_count=2),
    "INT_HANDLE_INVAL": record(lib.DSA_OPCODE_NOOP, CRAV_RCR | lib.IDXD_OP_FLAG_RCI, int_handle=99),
    "CRA_XLAT": swerr(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE),
    "CRA_ALIGN": swerr(lib.DSA_OPCODE_NOOP, completion_addr=RECORDS + 16),
    "ADDR_ALIGN": record(
        lib.DSA_OPCODE_CR_DELTA, src_addr=A + 4, src2_addr=B, xfer_size=64, delta_addr=C, max_delta_size=80
    ),
    "PRIV_BAD": privileged,
    "TRAFFIC_CLASS_CONF": injected(lib.DSA_COMP_TRAFFIC_CLASS_CONF),
    "PFAULT_RDBA": record(
        lib.DSA_OPCODE_DRAIN, CRAV_RCR | lib.DSA_DRAIN_FLAG_READBACK1_VALID, rdback_addr=NOWHERE
    ),
    "HW_ERR1": injected(lib.DSA_COMP_HW_ERR1),
    "HW_ERR_DRB": injected(lib.DSA_COMP_HW_ERR_DRB),
    "TRANSLATION_FAIL": injected(lib.DSA_COMP_TRANSLATION_FAIL),
    "DRAIN_EVL": logged(1, LOST, descriptor(lib.DSA_OPCODE_DRAIN)),
    "BATCH_EVL_ERR": logged(1, LOST, GOOD, count=2),
}


def names(prefix: str, *without: str) -> set[str]:
    """What abi/dsa.h has by that prefix."""
    found = {name.removeprefix(prefix) for name in dir(lib) if name.startswith(prefix)}
    return found - set(without)


def test_every_completion_code_has_a_row() -> None:
    assert set(COMPLETIONS) == names("DSA_COMP_", "STATUS_MASK", "STATUS_WRITE")


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completion_code(make_rig: MakeRig, name: str) -> None:
    rig = make_rig(gencap=GENCAP | lib.IDXD_GENCAP_DRAIN_READBACK)
    assert COMPLETIONS[name](rig) == getattr(lib, f"DSA_COMP_{name}")


# Commands: how the device is configured, what is done to it before, the command, its operand.

Prepare = Callable[[Function], Awaitable[None]]
Row = tuple[dict[str, Any], Prepare, int, int]
ENABLE_DEVICE, DISABLE_DEVICE, RESET = (
    lib.IDXD_CMD_ENABLE_DEVICE,
    lib.IDXD_CMD_DISABLE_DEVICE,
    lib.IDXD_CMD_RESET_DEVICE,
)
ENABLE_WQ, DRAIN_WQ = lib.IDXD_CMD_ENABLE_WQ, lib.IDXD_CMD_DRAIN_WQ
REQUEST, RELEASE = lib.IDXD_CMD_REQUEST_INT_HANDLE, lib.IDXD_CMD_RELEASE_INT_HANDLE
MODE = DEDICATED | PRIORITY_1


async def nothing(f: Function) -> None:
    """As after power-on."""


async def ready(f: Function) -> None:
    await f.configure(0)


async def halted(f: Function) -> None:
    f.device.inject_halt("a test")


async def no_master(f: Function) -> None:
    f.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY)


async def request_one(f: Function) -> None:
    await f.command(REQUEST, 1)


def refused(code: int) -> Prepare:
    async def prepare(f: Function) -> None:
        f.device.inject_command_error(code, command=RESET)
        assert await f.command(31) == lib.IDXD_CMDSTS_INVAL_CMD

    return prepare


def grouped(*rows: tuple[int, int, int], sizes: tuple[int, ...] = (16,), gencfg: int = 0) -> Prepare:
    """WQs, engines and flags of the first groups; the sizes of the first WQs."""

    async def prepare(f: Function) -> None:
        for wq, size in enumerate(sizes):
            f.wq(wq, size=size)
        for group, (wqs, engines, flags) in enumerate(rows):
            f.group(group, wqs, engines, flags)
        f.write(lib.IDXD_GENCFG_OFFSET, gencfg)

    return prepare


def with_wq(*, occupancy: int = 0, **fields: int) -> Prepare:
    """The device enabled, one WQ configured so."""

    async def prepare(f: Function) -> None:
        f.wq(0, **fields)
        f.write(f.wqcfg(0, 4), occupancy)
        f.write(f.wqcfg(0, 5), lib.IDXD_WQCFG_OCCUPANCY_INT_EN)
        f.group(0, 1, 1)
        assert await f.command(ENABLE_DEVICE) == 0

    return prepare


LIMIT = lib.IDXD_GRPFLAGS_USE_RDBUF_LIMIT
RESERVED = 97 << lib.IDXD_GRPFLAGS_RDBUFS_RESERVED_SHIFT
BATCH_SHIFT = lib.IDXD_WQCFG_MAX_BATCH_SHIFT_SHIFT
COMMANDS: dict[str, Row] = {
    "SUCCESS": ({}, nothing, RESET, 0),
    "INVAL_CMD": ({}, nothing, 31, 0),
    "INVAL_WQIDX": ({}, ready, ENABLE_WQ, 8),
    "HW_ERR": ({}, halted, ENABLE_DEVICE, 0),
    "ERR_RSVD": ({}, nothing, RESET | 1 << 5, 0),
    "ERR_DEV_ENABLED": ({}, ready, ENABLE_DEVICE, 0),
    "ERR_CONFIG": ({}, grouped((1, 1, LIMIT)), ENABLE_DEVICE, 0),
    "ERR_BUSMASTER_EN": ({}, no_master, ENABLE_DEVICE, 0),
    "ERR_PASID_INVAL": ({}, refused(lib.IDXD_CMDSTS_ERR_PASID_INVAL), RESET, 0),
    "ERR_WQ_SIZE_ERANGE": ({}, grouped((1, 1, 0), sizes=(129,)), ENABLE_DEVICE, 0),
    "ERR_GRP_CONFIG": ({}, grouped((1, 0, 0)), ENABLE_DEVICE, 0),
    "ERR_GRP_CONFIG2": ({}, grouped((1, 1, 0), (1, 2, 0)), ENABLE_DEVICE, 0),
    "ERR_GRP_CONFIG3": ({}, grouped((1, 1, 0), (2, 1, 0), sizes=(8, 8)), ENABLE_DEVICE, 0),
    "ERR_GRP_CONFIG4": ({}, grouped((1, 1, RESERVED)), ENABLE_DEVICE, 0),
    "ERR_DEV_NOTEN": ({}, nothing, ENABLE_WQ, 0),
    "ERR_WQ_ENABLED": ({}, ready, ENABLE_WQ, 0),
    "ERR_WQ_SIZE": ({}, with_wq(size=0), ENABLE_WQ, 0),
    "ERR_WQ_PRIOR": ({}, with_wq(mode=DEDICATED), ENABLE_WQ, 0),
    "ERR_WQ_MODE": ({"shared": False}, with_wq(mode=PRIORITY_1, threshold=1), ENABLE_WQ, 0),
    "ERR_BOF_EN": ({"block_on_fault": False}, with_wq(mode=MODE | lib.IDXD_WQCFG_BOF), ENABLE_WQ, 0),
    "ERR_PASID_EN": ({}, with_wq(mode=MODE | lib.IDXD_WQCFG_PASID_EN), ENABLE_WQ, 0),
    "ERR_MAX_BATCH_SIZE": ({}, with_wq(limits=11 << BATCH_SHIFT | 31), ENABLE_WQ, 0),
    "ERR_MAX_XFER_SIZE": ({"max_xfer_shift": 30}, with_wq(limits=LIMITS), ENABLE_WQ, 0),
    "ERR_PRIV_EN": ({}, with_wq(mode=MODE | lib.IDXD_WQCFG_PRIV), ENABLE_WQ, 0),
    "ERR_OCCUPANCY_INT": ({"occupancy_interrupt": True}, with_wq(occupancy=99), ENABLE_WQ, 0),
    "ERR_WQ_ATS": ({}, with_wq(mode=MODE | lib.IDXD_WQCFG_ATS_DISABLE), ENABLE_WQ, 0),
    "ERR_DIS_DEV_EN": ({}, nothing, DISABLE_DEVICE, 0),
    "ERR_DEV_NOT_EN": ({}, ready, DRAIN_WQ, 2),
    "ERR_INVAL_INT_IDX": ({"int_handles": 1}, nothing, REQUEST, 99),
    "ERR_NO_HANDLE": ({"int_handles": 1}, request_one, REQUEST, 2),
    "ERR_NO_HANDLE_AT_IDX": ({"int_handles": 1}, nothing, RELEASE, 1),
    "ERR_NO_REVOKED_AT_IDX": ({}, refused(lib.IDXD_CMDSTS_ERR_NO_REVOKED_AT_IDX), RESET, 0),
}


def test_every_command_error_has_a_row() -> None:
    assert set(COMMANDS) == names("IDXD_CMDSTS_", "OFFSET", "ACTIVE", "ERR_MASK", "RES_SHIFT", "RES_MASK")


@pytest.mark.parametrize("name", COMMANDS)
async def test_command_error(name: str) -> None:
    """The refusal, and that it is over with: the device can be reset and used."""
    config, prepare, command, operand = COMMANDS[name]
    async with running(DsaConfig(**config)) as f:
        await prepare(f)
        assert await f.command(command, operand) == getattr(lib, f"IDXD_CMDSTS_{name}")
        f.start()
        assert await f.command(RESET) == 0
        f.wq(0, limits=10 << BATCH_SHIFT | 20)
        f.group(0, 1, 1)
        assert await f.command(ENABLE_DEVICE) == await f.command(ENABLE_WQ, 0) == 0
        f.noop()
        assert f.statuses(1) == [lib.DSA_COMP_SUCCESS]


# The hooks themselves.


@pytest.mark.parametrize(
    ("fields", "statuses"),
    [
        ({}, [0x22, 1, 1, 1]),
        ({"times": 3}, [0x22, 0x22, 0x22, 1]),
        ({"skip": 2}, [1, 1, 0x22, 1]),
        ({"opcode": 0, "times": 9}, [0x22] * 4),
        ({"opcode": 3}, [1] * 4),
        ({"wq": 0}, [0x22, 1, 1, 1]),
        ({"wq": 1}, [1] * 4),
    ],
)
async def test_which_descriptors_are_meant(fields: dict[str, int], statuses: list[int]) -> None:
    async with running() as f:
        await f.configure(0)
        f.device.inject_completion(0x22, **fields)
        for number in range(4):
            f.noop(record=number)
        assert f.statuses(4) == statuses
        f.device.clear_injections()
        f.noop()
        assert f.statuses(1) == [1]


async def test_members_of_batches_are_descriptors_too(make_rig: MakeRig) -> None:
    rig = make_rig()
    values = {"status": 0x20, "opcode": 0, "wq": lib.PV_DSA_ANY, "skip": 1, "times": 1}
    assert lib.pv_dsa_inject(rig.dsa, ffi.new("struct pv_dsa_injection *", values)) == 0
    members = np.repeat(descriptor(lib.DSA_OPCODE_NOOP), 3)
    members["completion_addr"] = RECORDS + 32 * np.arange(1, 4, dtype=np.uint64)
    assert rig.batch(members)["status"] == lib.DSA_COMP_BATCH_FAIL
    assert rig.records(4)["status"].tolist() == [lib.DSA_COMP_BATCH_FAIL, 1, 0x20, 1]


@pytest.mark.parametrize("fields", [{"status": 0}, {"status": 256}, {"times": 0}, {"skip": -1}])
async def test_injections_that_cannot_be(fields: dict[str, int]) -> None:
    async with running() as f:
        with pytest.raises(ValueError, match="not an injection"):
            f.device.inject_completion(**{"status": 1} | fields)
        with pytest.raises(ValueError, match="not an injection"):
            f.device.inject_command_error(0)


async def test_sixteen_wait_at_most() -> None:
    async with running() as f:
        for _ in range(16):
            f.device.inject_completion(0x22)
        with pytest.raises(BlockingIOError):
            f.device.inject_completion(0x22)
        f.device.clear_injections()
        f.device.inject_completion(0x22)


async def test_refusals_of_any_command() -> None:
    async with running() as f:
        f.device.inject_command_error(0x44, times=2)
        assert [await f.command(RESET) for _ in range(3)] == [0x44, 0x44, 0]
