"""The event log: what goes there, in which order, what an entry says, and what happens when there is no room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from pvfio.abi import dtype_of, ffi, lib
from pvfio.devices.dsa import DsaConfig
from pvfio.silicon import EngineKind
from tests.devices.dsa.function import IOVA, Function, running

pytestmark = pytest.mark.touches_c

LOG = IOVA + 0x8000
SIZE = 64
NOWHERE = 0xDEAD000
ENABLE_DEVICE = lib.IDXD_CMD_ENABLE_DEVICE
EVL_EN = lib.IDXD_GENCFG_EVL_EN


def set_up(f: Function, base: int = LOG, size: int = SIZE) -> None:
    f.write(lib.IDXD_EVLCFG_OFFSET, base, 8)
    f.write(lib.IDXD_EVLCFG_OFFSET + 8, size, 8)
    f.write(lib.IDXD_GENCFG_OFFSET, EVL_EN)
    f.write(lib.IDXD_GENCTRL_OFFSET, lib.IDXD_GENCTRL_EVL_INT_EN | lib.IDXD_GENCTRL_SOFTERR_INT_EN)


@asynccontextmanager
async def logging(engine: EngineKind = "inline", **options: int) -> AsyncIterator[Function]:
    async with running(DsaConfig(event_log=True), engine) as f:
        set_up(f, **options)
        await f.configure(0)
        yield f


def status(f: Function) -> tuple[int, int, bool]:
    """Head, tail, interrupt pending."""
    word = f.read(lib.IDXD_EVLSTATUS_OFFSET)
    pending = bool(word & lib.IDXD_EVLSTATUS_INT_PENDING)
    return word & 0xFFFF, word >> lib.IDXD_EVLSTATUS_TAIL_SHIFT & 0xFFFF, pending


def entry(f: Function, index: int) -> Any:
    """``struct dsa_evl_entry``."""
    at = LOG - IOVA + 64 * index
    return ffi.from_buffer("struct dsa_evl_entry *", f.memory[at : at + 64])[0]


def code(e: Any) -> int:
    return int(e.status >> lib.IDXD_SWERR_ERROR_SHIFT & 0xFF)


def test_an_entry_is_64_bytes() -> None:
    assert ffi.sizeof("struct dsa_evl_entry") == lib.DSA_EVL_ENTRY_SIZE == 64
    assert dtype_of("struct dsa_evl_entry").itemsize == 64


@pytest.mark.parametrize("engine", ["inline", "thread"])
async def test_a_record_that_cannot_be_written(engine: EngineKind) -> None:
    """The entry has the record, and says that the interrupt was not sent."""
    async with logging(engine) as f:
        f.submit(
            lib.DSA_OPCODE_MEMFILL,
            flags=lib.IDXD_OP_FLAG_RCI,
            completion_addr=NOWHERE + 0x40,
            int_handle=3,
            dst_addr=IOVA + 0x4000,
            xfer_size=48,
        )
        assert await f.command(lib.IDXD_CMD_DRAIN_ALL) == 0
        e = entry(f, 0)
        known = lib.IDXD_SWERR_DESC_VALID | lib.IDXD_SWERR_WQ_IDX_VALID | lib.IDXD_SWERR_FAULT_RW
        assert e.status & 0xFF == known | lib.DSA_EVL_ERR_INFO_VALID
        assert (code(e), e.fault_addr) == (lib.DSA_COMP_CRA_XLAT, NOWHERE + 0x40)
        assert e.status >> lib.IDXD_SWERR_OPERATION_SHIFT & 0xFF == lib.DSA_OPCODE_MEMFILL
        assert e.error_info == 3 | lib.DSA_EVL_RCI | lib.DSA_EVL_RCR
        assert (e.cr.status, e.cr.bytes_completed) == (lib.DSA_COMP_SUCCESS, 48)
        assert status(f) == (0, 1, True)
        assert f.read(lib.IDXD_INTCAUSE_OFFSET, 4) == lib.IDXD_INTC_EVL
        assert f.interrupts() == (1, 0)
        assert f.errors() == 0


async def test_errors_without_a_record() -> None:
    async with logging() as f:
        desc = np.zeros(1, dtype_of("struct dsa_hw_desc"))
        portal = f.device.mmio(lib.IDXD_WQ_BAR)
        cases = [
            (lib.DSA_OPCODE_NOOP, lib.IDXD_OP_FLAG_RCR, lib.DSA_COMP_INVALID_FLAGS, lib.IDXD_OP_FLAG_RCR),
            (0x7F, 0, lib.DSA_COMP_BAD_OPCODE, 0),
            (lib.DSA_OPCODE_NOOP, lib.IDXD_OP_FLAG_RCI, lib.DSA_COMP_INT_HANDLE_INVAL, 99 | lib.DSA_EVL_RCI),
        ]
        for index, (opcode, flags, error, info) in enumerate(cases):
            desc["flags_opcode"] = flags | opcode << lib.DSA_DESC_OPCODE_SHIFT
            desc["int_handle"] = 99
            assert lib.pv_mmio_movdir64b(portal, 0, ffi.from_buffer(desc), 1) == 0
            e = entry(f, index)
            assert (code(e), e.error_info) == (error, info)
            assert bool(e.status & lib.DSA_EVL_ERR_INFO_VALID) == bool(info)
        assert status(f)[:2] == (0, 3)
        assert f.interrupts() == (1, 0)  # one until the pending bit is cleared
        f.write(lib.IDXD_EVLSTATUS_OFFSET + 4, lib.IDXD_EVLSTATUS_INT_PENDING >> 32)
        assert status(f) == (0, 3, False)
        assert lib.pv_mmio_movdir64b(portal, 0, ffi.from_buffer(desc), 1) == 0
        assert (status(f), f.interrupts()) == ((0, 4, True), (2, 0))


async def test_submissions_that_never_were_descriptors_go_to_swerr() -> None:
    async with logging() as f:
        f.noop(wq=5)
        assert f.errors() == lib.DSA_SWERR_WQ_NOT_ENABLED
        assert status(f)[:2] == (0, 0)


async def test_the_ring() -> None:
    """It holds one less than its size; what has no room goes to SWERR; the head makes room; the tail wraps."""
    async with logging() as f:
        for _ in range(SIZE - 1):
            f.submit(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE)
        assert (status(f)[:2], f.errors()) == ((0, SIZE - 1), 0)
        f.submit(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE)
        assert (status(f)[:2], f.errors()) == ((0, SIZE - 1), lib.DSA_COMP_CRA_XLAT)
        assert not f.read(lib.IDXD_SWERR_OFFSET) & lib.IDXD_SWERR_OVERFLOW
        f.submit(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE)
        assert f.read(lib.IDXD_SWERR_OFFSET) & lib.IDXD_SWERR_OVERFLOW
        f.write(lib.IDXD_EVLSTATUS_OFFSET, SIZE)  # no such entry
        assert status(f)[0] == 0
        f.write(lib.IDXD_EVLSTATUS_OFFSET, 1)
        f.submit(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE)
        assert status(f)[:2] == (1, 0)


async def test_a_log_that_cannot_be_written() -> None:
    async with logging(base=NOWHERE) as f:
        f.submit(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE)
        assert (status(f)[:2], f.errors()) == ((0, 0), lib.DSA_COMP_CRA_XLAT)
        assert f.read(lib.IDXD_INTCAUSE_OFFSET, 4) == lib.IDXD_INTC_ERR


async def test_a_batch_and_a_drain_follow_their_members() -> None:
    """What comes after a logged record is logged too, so that software sees them in order."""
    async with logging() as f:
        members = np.zeros(3, dtype_of("struct dsa_hw_desc"))
        members["flags_opcode"] = lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR
        members["completion_addr"] = [IOVA + 0x200, NOWHERE, NOWHERE + 0x20]
        f.memory[0x1000 : 0x1000 + members.nbytes] = members.view(np.uint8)
        f.submit(lib.DSA_OPCODE_BATCH, record=2, desc_list_addr=IOVA + 0x1000, desc_count=3)
        f.submit(lib.DSA_OPCODE_DRAIN, record=3)
        f.submit(lib.DSA_OPCODE_DRAIN, record=4)
        codes = [lib.DSA_COMP_CRA_XLAT] * 2 + [lib.DSA_COMP_BATCH_EVL_ERR, lib.DSA_COMP_DRAIN_EVL]
        entries = [entry(f, index) for index in range(4)]
        assert status(f)[:2] == (0, 4)
        assert [code(e) for e in entries] == codes
        assert [e.batch_idx for e in entries] == [1, 2, 0, 0]
        first = lib.DSA_EVL_FIRST_ERR_IN_BATCH
        assert [bool(e.error_info & first) for e in entries] == [True, False, False, False]
        batch = lib.IDXD_SWERR_BATCH
        assert [bool(e.status & batch) for e in entries] == [True, True, False, False]
        assert entries[2].cr.status == lib.DSA_COMP_BATCH_FAIL
        assert [e.fault_addr for e in entries[2:]] == [IOVA + 64, IOVA + 96]
        assert f.statuses(5) == [0, 0, 0, 0, lib.DSA_COMP_SUCCESS]
        for record in range(5, 5 + f.config.engines):  # batches that never ran, on every engine
            f.submit(lib.DSA_OPCODE_BATCH, record=record, desc_list_addr=IOVA + 0x1000, desc_count=1)
        assert set(f.statuses(5 + f.config.engines)[5:]) == {lib.DSA_COMP_DESC_CNT_ERANGE}


@pytest.mark.parametrize(("size", "pasid"), [(0, 0), (63, 0), (64, lib.IDXD_EVLCFG_PASID_EN)])
async def test_a_bad_configuration(size: int, pasid: int) -> None:
    async with running(DsaConfig(event_log=True)) as f:
        f.wq(0)
        f.group(0, 1, 1)
        set_up(f, base=LOG | pasid, size=size)
        assert await f.command(ENABLE_DEVICE) == lib.IDXD_CMDSTS_ERR_CONFIG


async def test_the_registers() -> None:
    async with running(DsaConfig(event_log=True)) as f:
        assert f.read(lib.IDXD_GENCAP_OFFSET) & lib.IDXD_GENCAP_EVL_SUPPORT_MASK == 1 << 13
        for word in range(2):
            f.write(lib.IDXD_EVLCFG_OFFSET + 8 * word, 2**64 - 1, 8)
        assert f.read(lib.IDXD_EVLCFG_OFFSET) == 0xFFFFFFFFFFFFF003
        assert f.read(lib.IDXD_EVLCFG_OFFSET + 8) == 0xFFFFFFFFF
        f.write(lib.IDXD_GENCFG_OFFSET, EVL_EN)
        f.write(lib.IDXD_EVLCFG_OFFSET, 0, 8)
        assert f.read(lib.IDXD_EVLCFG_OFFSET) == 0xFFFFFFFFFFFFF003
        f.write(lib.IDXD_GENCFG_OFFSET, 0)
        set_up(f)
        await f.configure(0)
        f.write(lib.IDXD_GENCFG_OFFSET, 0)
        assert f.read(lib.IDXD_GENCFG_OFFSET, 4) == EVL_EN  # locked while the device is enabled
        f.submit(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE)
        assert status(f) == (0, 1, True)
        assert await f.command(lib.IDXD_CMD_RESET_DEVICE) == 0
        assert status(f) == (0, 0, False)
        assert f.read(lib.IDXD_EVLCFG_OFFSET) == f.read(lib.IDXD_GENCFG_OFFSET) == 0


async def test_a_device_without() -> None:
    async with running() as f:
        set_up(f)
        assert f.read(lib.IDXD_GENCFG_OFFSET, 4) == f.read(lib.IDXD_EVLCFG_OFFSET) == 0
        assert f.read(lib.IDXD_GENCTRL_OFFSET, 4) == lib.IDXD_GENCTRL_SOFTERR_INT_EN
        await f.configure(0)
        f.submit(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE)
        assert f.errors() == lib.DSA_COMP_CRA_XLAT


async def test_an_entry_that_is_cancelled_comes_later() -> None:
    async with logging() as f:
        f.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY)
        f.submit(lib.DSA_OPCODE_NOOP, completion_addr=NOWHERE)
        assert status(f)[:2] == (0, 0)
        f.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
        assert (status(f)[:2], f.errors()) == ((0, 1), 0)


async def test_a_batch_refused_before_it_began_follows_nothing() -> None:
    """Whatever the batch before it in the same engine had to log."""
    async with logging() as f:
        members = np.zeros(2, dtype_of("struct dsa_hw_desc"))
        members["flags_opcode"] = lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR
        members["completion_addr"] = NOWHERE
        f.memory[0x1000 : 0x1000 + members.nbytes] = members.view(np.uint8)
        f.submit(lib.DSA_OPCODE_BATCH, record=0, desc_list_addr=IOVA + 0x1000, desc_count=2)
        logged = status(f)[:2]
        count = f.config.engines
        for record in range(1, 1 + count):
            f.submit(lib.DSA_OPCODE_BATCH, record=record, desc_list_addr=IOVA + 0x1000, desc_count=1)
        assert f.statuses(1 + count) == [0] + [lib.DSA_COMP_DESC_CNT_ERANGE] * count
        assert status(f)[:2] == logged
