"""Every bit of a descriptor that an operation has no use for: each of them alone has its completion code."""

from __future__ import annotations

import numpy as np
import pytest

from pvfio.abi import lib
from tests.devices.dsa.rig import CRAV_RCR, LIST, MEMORY, Rig, descriptor

pytestmark = pytest.mark.touches_c

COMPVAL, CR_DELTA, AP_DELTA, DUALCAST, TRANSL_FETCH, CFLUSH = (
    lib.DSA_OPCODE_COMPVAL,
    lib.DSA_OPCODE_CR_DELTA,
    lib.DSA_OPCODE_AP_DELTA,
    lib.DSA_OPCODE_DUALCAST,
    lib.DSA_OPCODE_TRANSL_FETCH,
    lib.DSA_OPCODE_CFLUSH,
)
DIF_CHECK, DIF_INS, DIF_STRP, DIF_UPDT, DIX_GEN = (
    lib.DSA_OPCODE_DIF_CHECK,
    lib.DSA_OPCODE_DIF_INS,
    lib.DSA_OPCODE_DIF_STRP,
    lib.DSA_OPCODE_DIF_UPDT,
    lib.DSA_OPCODE_DIX_GEN,
)
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
MOVE = {"src_addr": MEMORY, "dst_addr": MEMORY + 0x4000, "xfer_size": 64}
VALID: dict[int, dict[str, int]] = {
    NOOP: {},
    BATCH: {"desc_list_addr": LIST, "desc_count": 2},
    DRAIN: {},
    MEMMOVE: MOVE,
    MEMFILL: {"dst_addr": MEMORY, "xfer_size": 64},
    COMPARE: {"src_addr": MEMORY, "src2_addr": MEMORY, "xfer_size": 64},
    CRCGEN: {"src_addr": MEMORY, "xfer_size": 64},
    COPY_CRC: MOVE,
    COMPVAL: {"src_addr": MEMORY, "xfer_size": 64},
    CR_DELTA: MOVE | {"delta_addr": MEMORY + 0x8000, "max_delta_size": 80},
    AP_DELTA: MOVE | {"delta_rec_size": 10},
    DUALCAST: MOVE | {"dest2": MEMORY + 0x8000},
    TRANSL_FETCH: {"src_addr": MEMORY, "xfer_size": 64},
    CFLUSH: {"dst_addr": MEMORY, "xfer_size": 64},
    # Zeros are a protected block of zeros.
    DIF_CHECK: {"src_addr": MEMORY, "xfer_size": 520},
    DIF_INS: MOVE | {"xfer_size": 512},
    DIF_STRP: MOVE | {"xfer_size": 520},
    DIF_UPDT: MOVE | {"xfer_size": 520},
    DIX_GEN: MOVE | {"xfer_size": 512},
}
# What an operation reads beyond PASID, flags, completion address and interrupt handle: (first byte, bytes), 8.3.
ADDRESS1, ADDRESS2, SIZE = (16, 8), (24, 8), (32, 4)
FIELDS: dict[int, tuple[tuple[int, int], ...]] = {
    NOOP: (),
    BATCH: (ADDRESS1, SIZE),
    DRAIN: (),
    MEMMOVE: (ADDRESS1, ADDRESS2, SIZE),
    MEMFILL: (ADDRESS1, ADDRESS2, SIZE),
    COMPARE: (ADDRESS1, ADDRESS2, SIZE),
    CRCGEN: (ADDRESS1, SIZE, (40, 4), (48, 8)),
    COPY_CRC: (ADDRESS1, ADDRESS2, SIZE, (40, 4), (48, 8)),
    COMPVAL: (ADDRESS1, ADDRESS2, SIZE),
    CR_DELTA: (ADDRESS1, ADDRESS2, SIZE, (40, 8), (48, 4)),
    AP_DELTA: (ADDRESS1, ADDRESS2, SIZE, (40, 4)),
    DUALCAST: (ADDRESS1, ADDRESS2, SIZE, (40, 8)),
    TRANSL_FETCH: (ADDRESS1, SIZE, (48, 4)),
    CFLUSH: (ADDRESS2, SIZE),
    DIF_CHECK: (ADDRESS1, SIZE, (40, 1), (48, 8)),
    DIF_INS: (ADDRESS1, ADDRESS2, SIZE, (56, 8)),
    DIF_STRP: (ADDRESS1, ADDRESS2, SIZE, (40, 1), (48, 8)),
    DIF_UPDT: (ADDRESS1, ADDRESS2, SIZE, (40, 1), (48, 16)),
    DIX_GEN: (ADDRESS1, ADDRESS2, SIZE, (56, 8)),
}
DIF_FLAGS = {42 * 8 + bit for bit in range(4)}
TAG_TYPES = {41 * 8 + 4, 41 * 8 + 7}
PASS_THROUGH = {41 * 8 + 3, 41 * 8 + 5, 41 * 8 + 6}
# Single bits that it reads: expected results, flags of DIF operations.
BITS: dict[int, set[int]] = {
    COMPARE: {40 * 8},
    COMPVAL: {40 * 8},
    CR_DELTA: {56 * 8, 56 * 8 + 1, 56 * 8 + 2},
    DIF_CHECK: DIF_FLAGS,
    DIF_INS: DIF_FLAGS | TAG_TYPES,
    DIF_STRP: DIF_FLAGS,
    DIF_UPDT: DIF_FLAGS | TAG_TYPES | PASS_THROUGH,
    DIX_GEN: DIF_FLAGS | TAG_TYPES,
}
PASID_RESERVED = range(20, 31)
INTERRUPT_HANDLE = range(36 * 8, 38 * 8)

# Which flags it may have outside a batch, beyond those every one may have.
COMMON = CRAV_RCR | lib.IDXD_OP_FLAG_RCI | lib.IDXD_OP_FLAG_CRSTS | lib.IDXD_OP_FLAG_CR_TCS
BOF, TC1, TC2, TC3 = (
    lib.IDXD_OP_FLAG_BOF,
    lib.IDXD_OP_FLAG_ADDR1_TCS,
    lib.IDXD_OP_FLAG_ADDR2_TCS,
    lib.IDXD_OP_FLAG_ADDR3_TCS,
)
WRITES = lib.IDXD_OP_FLAG_CC | lib.IDXD_OP_FLAG_STORD | lib.IDXD_OP_FLAG_DRDBK | lib.IDXD_OP_FLAG_DSTS
CRC = lib.DSA_CRC_FLAG_READ_SEED | lib.DSA_CRC_FLAG_BYPASS_INV_REF | lib.DSA_CRC_FLAG_BYPASS_DATA_REF
FLAGS: dict[int, int] = {
    NOOP: 0,
    BATCH: BOF | TC1,
    DRAIN: TC1 | TC2,
    MEMMOVE: BOF | TC1 | TC2 | WRITES,
    MEMFILL: BOF | TC2 | WRITES,
    COMPARE: BOF | TC1 | TC2 | lib.IDXD_OP_FLAG_CR,
    CRCGEN: BOF | TC1 | TC3 | CRC,
    COPY_CRC: BOF | TC1 | TC2 | TC3 | WRITES | CRC,
    COMPVAL: BOF | TC1 | lib.IDXD_OP_FLAG_CR,
    CR_DELTA: BOF | TC1 | TC2 | TC3 | WRITES | lib.IDXD_OP_FLAG_CR,
    AP_DELTA: BOF | TC1 | TC2 | WRITES,
    DUALCAST: BOF | TC1 | TC2 | TC3 | WRITES,
    TRANSL_FETCH: BOF | TC1 | lib.IDXD_OP_FLAG_CC | lib.DSA_TRANSL_FETCH_FLAG_STRIDE,
    CFLUSH: BOF | TC2 | WRITES & ~lib.IDXD_OP_FLAG_CC,
    DIF_CHECK: BOF | TC1,
    DIF_INS: BOF | TC1 | TC2 | WRITES,
    DIF_STRP: BOF | TC1 | TC2 | WRITES,
    DIF_UPDT: BOF | TC1 | TC2 | WRITES,
    DIX_GEN: BOF | TC1 | TC2 | WRITES,
}


def reserved_bits(opcode: int) -> set[int]:
    """Bit numbers in the descriptor that must be 0."""
    bits = set(PASID_RESERVED) | set(range(16 * 8, 64 * 8)) - set(INTERRUPT_HANDLE)
    for first, size in FIELDS[opcode]:
        bits -= set(range(8 * first, 8 * (first + size)))
    return bits - BITS.get(opcode, set())


def status_with_bit(rig: Rig, opcode: int, bit: int) -> int:
    """Flips one bit of a descriptor that is in order and runs it."""
    desc = descriptor(opcode, CRAV_RCR, **VALID[opcode])
    desc.view(np.uint8)[bit // 8] ^= 1 << bit % 8
    rig.record["status"] = 0
    rig.submit(desc)
    return int(rig.record["status"])


@pytest.mark.parametrize("opcode", VALID)
def test_reserved_bits(rig: Rig, opcode: int) -> None:
    assert rig.run(opcode, **VALID[opcode])["status"] == lib.DSA_COMP_SUCCESS
    before = rig.memory.copy()
    for bit in sorted(reserved_bits(opcode)):
        assert status_with_bit(rig, opcode, bit) == lib.DSA_COMP_NOZERO_RESERVE, bit
    assert np.array_equal(rig.memory[: LIST - MEMORY], before[: LIST - MEMORY])


@pytest.mark.parametrize("opcode", sorted(set(VALID) - {BATCH}))
def test_other_bits_are_not_reserved(rig: Rig, opcode: int) -> None:
    for bit in sorted(set(range(16 * 8, 64 * 8)) - reserved_bits(opcode)):
        assert status_with_bit(rig, opcode, bit) not in (0, lib.DSA_COMP_NOZERO_RESERVE), bit


@pytest.mark.parametrize("opcode", VALID)
def test_every_flag(rig: Rig, opcode: int) -> None:
    """A flag that is not the operation's is named in the record; one that is, is taken."""
    for flag in (1 << bit for bit in range(24)):
        record = rig.run(opcode, CRAV_RCR | flag, **VALID[opcode])
        allowed = bool((FLAGS[opcode] | COMMON) & flag)
        if allowed:
            assert record["status"] != lib.DSA_COMP_INVALID_FLAGS, hex(flag)
        else:
            assert record["status"] == lib.DSA_COMP_INVALID_FLAGS, hex(flag)
            assert record["invalid_flags"] == flag
