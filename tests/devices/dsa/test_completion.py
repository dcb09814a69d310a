"""Completion codes, completion records, interrupts and SWERR of single descriptors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.devices.dsa.config import implemented_opcodes
from tests.devices.dsa.conftest import MakeRig
from tests.devices.dsa.rig import CRAV_RCR, GENCAP, LIST, MEMORY, RECORDS, Rig, descriptor

pytestmark = pytest.mark.touches_c

MOVE = {"src_addr": MEMORY, "dst_addr": MEMORY + 0x4000, "xfer_size": 64}
NOOP, BATCH, DRAIN, MEMMOVE, MEMFILL, COMPARE, CRCGEN, COPY_CRC = (
    lib.DSA_OPCODE_NOOP,
    lib.DSA_OPCODE_BATCH,
    lib.DSA_OPCODE_DRAIN,
    lib.DSA_OPCODE_MEMMOVE,
    lib.DSA_OPCODE_MEMFILL,
    lib.DSA_OPCODE_COMPARE,
    lib.DSA_OPCODE_CRCGEN,
    lib.DSA_OPCODE_COPY_CRC,
)
COMPVAL, CR_DELTA, AP_DELTA, DUALCAST, TRANSL_FETCH, CFLUSH = (
    lib.DSA_OPCODE_COMPVAL,
    lib.DSA_OPCODE_CR_DELTA,
    lib.DSA_OPCODE_AP_DELTA,
    lib.DSA_OPCODE_DUALCAST,
    lib.DSA_OPCODE_TRANSL_FETCH,
    lib.DSA_OPCODE_CFLUSH,
)
ALL = (
    *(NOOP, BATCH, DRAIN, MEMMOVE, MEMFILL, COMPARE, CRCGEN, COPY_CRC),
    *(COMPVAL, CR_DELTA, AP_DELTA, DUALCAST, TRANSL_FETCH, CFLUSH),
)
VALID: dict[int, dict[str, int]] = {
    NOOP: {},
    BATCH: {"desc_list_addr": LIST, "desc_count": 2},
    DRAIN: {},
    MEMMOVE: MOVE,
    MEMFILL: {"pattern": 1, "dst_addr": MEMORY, "xfer_size": 64},
    COMPARE: {"src_addr": MEMORY, "src2_addr": MEMORY, "xfer_size": 64},
    CRCGEN: {"src_addr": MEMORY, "xfer_size": 64},
    COPY_CRC: MOVE,
    COMPVAL: {"src_addr": MEMORY, "xfer_size": 64},
    CR_DELTA: MOVE | {"delta_addr": MEMORY + 0x8000, "max_delta_size": 80},
    AP_DELTA: MOVE | {"delta_rec_size": 10},
    DUALCAST: MOVE | {"dest2": MEMORY + 0x8000},
    TRANSL_FETCH: {"src_addr": MEMORY, "xfer_size": 64},
    CFLUSH: {"dst_addr": MEMORY, "xfer_size": 64},
}


@pytest.mark.parametrize("opcode", ALL)
def test_success(rig: Rig, opcode: int) -> None:
    assert rig.run(opcode, **VALID[opcode])["status"] == lib.DSA_COMP_SUCCESS


@pytest.mark.parametrize("opcode", sorted(set(range(256)) - implemented_opcodes()))
def test_other_opcodes(rig: Rig, opcode: int) -> None:
    assert rig.run(opcode)["status"] == lib.DSA_COMP_BAD_OPCODE


@pytest.mark.parametrize(
    ("opcode", "fields", "status"),
    [
        (NOOP, {"xfer_size": 1}, lib.DSA_COMP_NOZERO_RESERVE),
        (NOOP, {"src_addr": 1}, lib.DSA_COMP_NOZERO_RESERVE),
        (NOOP, {"rsvd1": 1}, lib.DSA_COMP_NOZERO_RESERVE),
        (NOOP, {"pasid_priv": 1 << 20}, lib.DSA_COMP_NOZERO_RESERVE),
        (DRAIN, {"rdback_addr": MEMORY}, lib.DSA_COMP_NOZERO_RESERVE),
        (DRAIN, {"xfer_size": 1}, lib.DSA_COMP_NOZERO_RESERVE),
        (BATCH, VALID[BATCH] | {"dst_addr": 1}, lib.DSA_COMP_NOZERO_RESERVE),
        (MEMMOVE, MOVE | {"dest2": 1}, lib.DSA_COMP_NOZERO_RESERVE),
        (MEMFILL, VALID[MEMFILL] | {"seed_addr": 1}, lib.DSA_COMP_NOZERO_RESERVE),
        (COMPARE, VALID[COMPARE] | {"expected_res": 2}, lib.DSA_COMP_NOZERO_RESERVE),
        (CRCGEN, VALID[CRCGEN] | {"dst_addr": MEMORY}, lib.DSA_COMP_NOZERO_RESERVE),
        (CRCGEN, VALID[CRCGEN] | {"crc_rsvd": 1}, lib.DSA_COMP_NOZERO_RESERVE),
        (COPY_CRC, MOVE | {"crc_rsvd": 1}, lib.DSA_COMP_NOZERO_RESERVE),
        (MEMMOVE, MOVE | {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
        (MEMMOVE, MOVE | {"xfer_size": 0x80000001}, lib.DSA_COMP_XFER_ERANGE),
        (MEMFILL, VALID[MEMFILL] | {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
        (COMPARE, VALID[COMPARE] | {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
        (CRCGEN, VALID[CRCGEN] | {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
        (COPY_CRC, MOVE | {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
        (BATCH, VALID[BATCH] | {"desc_count": 0}, lib.DSA_COMP_DESC_CNT_ERANGE),
        (BATCH, VALID[BATCH] | {"desc_count": 1}, lib.DSA_COMP_DESC_CNT_ERANGE),
        (BATCH, VALID[BATCH] | {"desc_count": 1025}, lib.DSA_COMP_DESC_CNT_ERANGE),
        (BATCH, VALID[BATCH] | {"desc_list_addr": LIST + 32}, lib.DSA_COMP_DESCLIST_ALIGN),
        (COPY_CRC, MOVE | {"dst_addr": MEMORY + 63}, lib.DSA_COMP_OVERLAP_BUFFERS),
        (COPY_CRC, MOVE | {"dst_addr": MEMORY - 63}, lib.DSA_COMP_OVERLAP_BUFFERS),
        (MEMMOVE, MOVE | {"src_addr": 0xDEAD000}, lib.DSA_COMP_PAGE_FAULT_NOBOF),
        (
            MEMMOVE,
            MOVE | {"dst_addr": 0xDEAD000},
            lib.DSA_COMP_PAGE_FAULT_NOBOF | lib.DSA_COMP_STATUS_WRITE,
        ),
        (BATCH, VALID[BATCH] | {"desc_list_addr": 0xDEAD000}, lib.DSA_COMP_BATCH_PAGE_FAULT),
    ],
)
def test_status(rig: Rig, opcode: int, fields: dict[str, int], status: int) -> None:
    before = rig.memory.copy()
    record = rig.run(opcode, **fields)
    assert record["status"] == status
    assert record["bytes_completed"] == 0
    rig.at(RECORDS, 32)[:] = 0
    assert np.array_equal(rig.memory, before)


def test_ignored_fields(rig: Rig) -> None:
    """A dedicated WQ does not look at PASID and Priv; an interrupt handle means nothing without RCI."""
    record = rig.run(NOOP, pasid_priv=0x12345 | lib.DSA_DESC_PRIV, int_handle=999)
    assert record["status"] == lib.DSA_COMP_SUCCESS


def test_privilege_in_a_shared_wq(rig: Rig) -> None:
    rig.enable(1, dedicated=0, threshold=4)
    assert rig.enqcmd(descriptor(NOOP, pasid_priv=lib.DSA_DESC_PRIV), 1) == 0
    assert rig.record["status"] == lib.DSA_COMP_PRIV_BAD


FENCE, BOF, CRAV, RCR, RCI = (
    lib.IDXD_OP_FLAG_FENCE,
    lib.IDXD_OP_FLAG_BOF,
    lib.IDXD_OP_FLAG_CRAV,
    lib.IDXD_OP_FLAG_RCR,
    lib.IDXD_OP_FLAG_RCI,
)


@pytest.mark.parametrize(
    ("opcode", "flags", "invalid"),
    [
        *((opcode, CRAV_RCR | FENCE, FENCE) for opcode in ALL),
        *((opcode, CRAV_RCR | 0x40, 0x40) for opcode in ALL),
        *((opcode, CRAV_RCR | 0x800000, 0x800000) for opcode in ALL),
        (NOOP, CRAV_RCR | BOF, BOF),
        (DRAIN, CRAV_RCR | BOF, BOF),
        (DRAIN, CRAV_RCR | lib.DSA_DRAIN_FLAG_READBACK1_VALID, lib.DSA_DRAIN_FLAG_READBACK1_VALID),
        (MEMMOVE, CRAV_RCR | lib.IDXD_OP_FLAG_CR, lib.IDXD_OP_FLAG_CR),
        (MEMMOVE, CRAV_RCR | lib.DSA_CRC_FLAG_READ_SEED, lib.DSA_CRC_FLAG_READ_SEED),
        (COMPARE, CRAV_RCR | lib.IDXD_OP_FLAG_CC, lib.IDXD_OP_FLAG_CC),
        (CRCGEN, CRAV_RCR | lib.IDXD_OP_FLAG_STORD, lib.IDXD_OP_FLAG_STORD),
        (COMPARE, CRAV, RCR),
        (CRCGEN, CRAV, RCR),
        (COPY_CRC, CRAV, RCR),
    ],
)
def test_invalid_flags(rig: Rig, opcode: int, flags: int, invalid: int) -> None:
    record = rig.run(opcode, flags, **VALID[opcode])
    assert (record["status"], record["invalid_flags"]) == (lib.DSA_COMP_INVALID_FLAGS, invalid)


@pytest.mark.parametrize(
    ("capability", "flag"),
    [
        (lib.IDXD_GENCAP_CACHE_CONTROL_MEM, lib.IDXD_OP_FLAG_CC),
        (lib.IDXD_GENCAP_DEST_READBACK, lib.IDXD_OP_FLAG_DRDBK),
        (lib.IDXD_GENCAP_BLOCK_ON_FAULT, lib.IDXD_OP_FLAG_BOF),
    ],
)
def test_flags_need_their_capability(make_rig: MakeRig, capability: int, flag: int) -> None:
    record = make_rig().run(MEMMOVE, CRAV_RCR | flag, **MOVE)
    assert record["status"] == lib.DSA_COMP_SUCCESS
    record = make_rig(gencap=GENCAP & ~capability).run(MEMMOVE, CRAV_RCR | flag, **MOVE)
    assert (record["status"], record["invalid_flags"]) == (lib.DSA_COMP_INVALID_FLAGS, flag)


def test_overlap_needs_its_capability(make_rig: MakeRig) -> None:
    rig = make_rig(gencap=GENCAP & ~lib.IDXD_GENCAP_OVERLAP_COPY)
    assert rig.run(MEMMOVE, **MOVE | {"dst_addr": MEMORY + 63})["status"] == lib.DSA_COMP_OVERLAP_BUFFERS
    assert rig.run(MEMMOVE, **MOVE | {"dst_addr": MEMORY + 64})["status"] == lib.DSA_COMP_SUCCESS


def test_drain_readback(make_rig: MakeRig) -> None:
    rig = make_rig(gencap=GENCAP | lib.IDXD_GENCAP_DRAIN_READBACK)
    flags = CRAV_RCR | lib.DSA_DRAIN_FLAG_READBACK1_VALID | lib.DSA_DRAIN_FLAG_READBACK2_VALID
    assert rig.run(DRAIN, flags, rdback_addr=MEMORY, rdback_addr2=MEMORY)["status"] == lib.DSA_COMP_SUCCESS
    record = rig.run(DRAIN, flags, rdback_addr=MEMORY, rdback_addr2=0xDEAD123)
    assert (record["status"], record["fault_addr"]) == (lib.DSA_COMP_PFAULT_RDBA, 0xDEAD123)


def test_limits_of_the_wq(rig: Rig) -> None:
    rig.enable(1, max_xfer_shift=12, max_batch_shift=2)
    rig.submit(descriptor(MEMFILL, pattern=0, dst_addr=MEMORY, xfer_size=4096), 1)
    assert rig.record["status"] == lib.DSA_COMP_SUCCESS
    rig.submit(descriptor(MEMFILL, pattern=0, dst_addr=MEMORY, xfer_size=4097), 1)
    assert rig.record["status"] == lib.DSA_COMP_XFER_ERANGE
    rig.submit(descriptor(BATCH, desc_list_addr=LIST, desc_count=5), 1)
    assert rig.record["status"] == lib.DSA_COMP_DESC_CNT_ERANGE
    rig.submit(descriptor(BATCH, desc_list_addr=LIST, desc_count=4), 1)
    assert rig.record["status"] == lib.DSA_COMP_SUCCESS


def test_a_record_only_when_asked_or_in_error(rig: Rig) -> None:
    rig.at(RECORDS, 32)[:] = 0xAA
    rig.submit(descriptor(NOOP, CRAV))
    assert set(rig.at(RECORDS, 32).tolist()) == {0xAA}
    rig.submit(descriptor(NOOP, CRAV, rsvd1=1))
    assert rig.record["status"] == lib.DSA_COMP_NOZERO_RESERVE
    assert not rig.at(RECORDS + 1, 31).any()


@pytest.mark.parametrize("handle", [1, 2, 3])
def test_interrupt(rig: Rig, handle: int) -> None:
    """The vector of the handle, after the record; also when the descriptor fails."""
    rig.run(NOOP, CRAV_RCR | RCI, int_handle=handle)
    assert rig.bus.msis() == (1, 0xFEE00000, 0x40 + handle)
    rig.run(NOOP, CRAV_RCR | RCI, int_handle=handle, rsvd1=1)
    assert rig.record["status"] == lib.DSA_COMP_NOZERO_RESERVE
    assert rig.interrupts() == 2
    rig.submit(descriptor(NOOP, RCI, int_handle=handle))
    assert rig.interrupts() == 3


@pytest.mark.parametrize("handle", [0, 4, 0xFFFF])
def test_invalid_interrupt_handle(rig: Rig, handle: int) -> None:
    record = rig.run(MEMMOVE, CRAV_RCR | RCI, int_handle=handle, **MOVE)
    assert record["status"] == lib.DSA_COMP_INT_HANDLE_INVAL
    assert rig.interrupts() == 0


@pytest.mark.parametrize("page", [lib.IDXD_PORTAL_IMS_UNLIMITED, lib.IDXD_PORTAL_IMS_LIMITED])
def test_ims_portals_have_no_handles(rig: Rig, page: int) -> None:
    """They take work, but there is no interrupt message storage."""
    rig.submit(descriptor(NOOP), page=page)
    assert rig.record["status"] == lib.DSA_COMP_SUCCESS
    rig.submit(descriptor(NOOP, CRAV_RCR | RCI, int_handle=1), page=page)
    assert rig.record["status"] == lib.DSA_COMP_INT_HANDLE_INVAL


def swerr(rig: Rig) -> dict[str, Any]:
    raw = rig.swerr()
    return {
        "flags": raw.status & 0xFF,
        "error": raw.status >> lib.IDXD_SWERR_ERROR_SHIFT & 0xFF,
        "wq": raw.status >> lib.IDXD_SWERR_WQ_IDX_SHIFT & 0xFF,
        "operation": raw.status >> lib.IDXD_SWERR_OPERATION_SHIFT & 0xFF,
        "invalid_flags": raw.batch_flags >> lib.IDXD_SWERR_INVALID_FLAGS_SHIFT,
        "address": raw.fault_addr,
    }


KNOWN = lib.IDXD_SWERR_VALID | lib.IDXD_SWERR_DESC_VALID | lib.IDXD_SWERR_WQ_IDX_VALID


@pytest.mark.parametrize(
    ("opcode", "flags", "fields", "error", "extra"),
    [
        (0x7F, 0, {}, lib.DSA_COMP_BAD_OPCODE, {}),
        (MEMMOVE, 0, MOVE | {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE, {}),
        (COMPARE, 0, VALID[COMPARE], lib.DSA_COMP_INVALID_FLAGS, {"invalid_flags": CRAV_RCR}),
        (NOOP, RCR, {}, lib.DSA_COMP_INVALID_FLAGS, {"invalid_flags": RCR}),
        (NOOP, CRAV_RCR, {"completion_addr": RECORDS + 16}, lib.DSA_COMP_CRA_ALIGN, {}),
        (
            NOOP,
            CRAV_RCR,
            {"completion_addr": 0xDEAD020},
            lib.DSA_COMP_CRA_XLAT,
            {"flags": KNOWN | lib.IDXD_SWERR_FAULT_RW, "address": 0xDEAD020},
        ),
        (
            MEMMOVE,
            0,
            MOVE | {"src_addr": 0xDEAD123},
            lib.DSA_COMP_PAGE_FAULT_NOBOF,
            {"address": 0xDEAD123},
        ),
        (
            MEMMOVE,
            0,
            MOVE | {"dst_addr": 0xDEAD123},
            lib.DSA_COMP_PAGE_FAULT_NOBOF,
            {"address": 0xDEAD123, "flags": KNOWN | lib.IDXD_SWERR_FAULT_RW},
        ),
    ],
)
def test_swerr(
    rig: Rig, opcode: int, flags: int, fields: dict[str, int], error: int, extra: dict[str, int]
) -> None:
    """What no completion record can say."""
    rig.submit(descriptor(opcode, flags, **fields))
    want = {"flags": KNOWN, "error": error, "wq": 0, "operation": opcode, "invalid_flags": 0, "address": 0}
    assert swerr(rig) == want | extra


def test_swerr_keeps_the_first_and_interrupts_once(rig: Rig) -> None:
    lib.pv_dsa_set_genctrl(rig.dsa, lib.IDXD_GENCTRL_SOFTERR_INT_EN)
    for opcode in (0x7F, 0x7E):
        rig.submit(descriptor(opcode, 0))
    first = swerr(rig)
    assert (first["operation"], first["flags"]) == (0x7F, KNOWN | lib.IDXD_SWERR_OVERFLOW)
    assert rig.bus.msis() == (1, 0xFEE00000, 0x40)
    assert lib.pv_dsa_intcause(rig.dsa) == lib.IDXD_INTC_ERR
    lib.pv_dsa_swerr_clear(rig.dsa, lib.IDXD_SWERR_ACK)
    assert swerr(rig)["flags"] == 0
    rig.submit(descriptor(0x7E, 0))
    assert swerr(rig)["operation"] == 0x7E
    assert rig.interrupts() == 2


def test_swerr_without_interrupt(rig: Rig) -> None:
    rig.submit(descriptor(0x7F, 0))
    assert swerr(rig)["flags"] == KNOWN
    assert (rig.interrupts(), lib.pv_dsa_intcause(rig.dsa)) == (0, 0)


@pytest.mark.parametrize("piece", [1, 8, 13, 24, 31])
def test_record_in_memory_given_in_odd_pieces(rig: Rig, piece: int) -> None:
    """A record is written where the bus says, not beyond the end of a range that ends inside it."""
    first, second = np.full(3 * 32, 0xEE, np.uint8), np.full(3 * 32, 0xEE, np.uint8)
    rig.bus.map(0x80_0000, first[32 : 32 + piece])
    rig.bus.map(0x80_0000 + piece, second[32 : 64 - piece])
    rig.submit(descriptor(NOOP, completion_addr=0x80_0000))
    record = np.concatenate([first[32 : 32 + piece], second[32 : 64 - piece]])
    assert record[0] == lib.DSA_COMP_SUCCESS
    assert not record[1:].any()
    assert (first[32 + piece :] == 0xEE).all()
    assert (second[64 - piece :] == 0xEE).all()
