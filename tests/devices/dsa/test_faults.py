"""Page faults: how far an operation came, to the byte, and blocking on them."""

from __future__ import annotations

import select

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import ffi, lib
from pvfio.silicon import READ
from tests.devices.dsa.conftest import MakeRig
from tests.devices.dsa.rig import CRAV_RCR, MEMORY, PAGE, RECORDS, Rig, descriptor

pytestmark = pytest.mark.touches_c

SRC, DST, OTHER = MEMORY + 0x10000, MEMORY + 0x40000, MEMORY + 0x70000
PAGES = 8
BOF = CRAV_RCR | lib.IDXD_OP_FLAG_BOF
FAULT, WRITE = lib.DSA_COMP_PAGE_FAULT_NOBOF, lib.DSA_COMP_STATUS_WRITE
OPERATIONS = {
    "memmove": (lib.DSA_OPCODE_MEMMOVE, {"src_addr": SRC, "dst_addr": DST}),
    "memfill": (lib.DSA_OPCODE_MEMFILL, {"pattern": 0x0706050403020100, "dst_addr": DST}),
    "compare": (lib.DSA_OPCODE_COMPARE, {"src_addr": SRC, "src2_addr": DST}),
    "crcgen": (lib.DSA_OPCODE_CRCGEN, {"src_addr": SRC}),
    "copy_crc": (lib.DSA_OPCODE_COPY_CRC, {"src_addr": SRC, "dst_addr": DST}),
}
READS_DST = {"compare"}
CASES = [
    (name, base) for name, (_, fields) in OPERATIONS.items() for base in (SRC, DST) if base in fields.values()
]


@pytest.mark.parametrize(("name", "base"), CASES)
@given(data=st.data())
def test_partial_completion(name: str, base: int, data: st.DataObject) -> None:
    """Any page may be missing, at any offset: the bytes before it are done, none behind it."""
    opcode, fields = OPERATIONS[name]
    at, size = data.draw(st.integers(0, PAGE - 1)), data.draw(st.integers(1, PAGES * PAGE - PAGE))
    missing = data.draw(st.integers(0, (at + size - 1) // PAGE))
    rig = Rig()
    try:
        shared = {} if name == "memfill" else {"src_addr": SRC + at}
        shifted = {key: value + at for key, value in fields.items() if value in (SRC, DST)}
        rig.at(SRC, PAGES * PAGE)[:] = 0x55
        rig.at(DST, PAGES * PAGE)[:] = 0x55 if name == "compare" else 0xAA
        rig.unmap(base + missing * PAGE)
        record = rig.run(opcode, **fields | shared | shifted, xfer_size=size)
        done = max(missing * PAGE - at, 0)
        written = base == DST and name not in READS_DST
        assert record["status"] == FAULT | WRITE * written
        assert (record["bytes_completed"], record["fault_addr"]) == (done, base + max(missing * PAGE, at))
        changed = rig.at(DST, PAGES * PAGE) != (0x55 if name == "compare" else 0xAA)
        if name in ("memmove", "memfill", "copy_crc"):
            assert np.array_equal(np.flatnonzero(changed), np.arange(at, at + done))
        else:
            assert not changed.any()
    finally:
        rig.close()


def test_backward(rig: Rig) -> None:
    """An overlapping copy upwards runs from the end: Result is 1 and the bytes count from there."""
    size = 3 * PAGE
    rig.at(SRC, size)[:] = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    before = rig.memory.copy()
    rig.unmap(SRC + PAGE)
    record = rig.run(lib.DSA_OPCODE_MEMMOVE, src_addr=SRC, dst_addr=SRC + 16, xfer_size=size)
    assert (record["status"] & lib.DSA_COMP_STATUS_MASK, record["result"]) == (FAULT, 1)
    done = int(record["bytes_completed"])
    # It fails where the source or the destination first needs a byte of the missing page, coming from the end.
    assert done == PAGE
    assert record["fault_addr"] == SRC + 2 * PAGE - 1
    want = before.copy()
    start = SRC - MEMORY
    want[start + 16 + size - done : start + 16 + size] = before[start + size - done : start + size]
    rig.at(RECORDS, 32)[:] = 0
    assert np.array_equal(rig.memory, want)


def test_a_page_that_is_read_only(rig: Rig) -> None:
    rig.unmap(DST)
    rig.map(DST, READ)
    record = rig.run(lib.DSA_OPCODE_MEMMOVE, src_addr=SRC, dst_addr=DST + 8, xfer_size=8)
    assert (record["status"], record["fault_addr"]) == (FAULT | WRITE, DST + 8)


def test_the_seed(rig: Rig) -> None:
    flags = CRAV_RCR | lib.DSA_CRC_FLAG_READ_SEED
    record = rig.run(lib.DSA_OPCODE_CRCGEN, flags, src_addr=SRC, xfer_size=8, seed_addr=0xDEAD004)
    assert (record["status"], record["bytes_completed"], record["fault_addr"]) == (FAULT, 0, 0xDEAD004)


def result_of(rig: Rig, name: str, at: int, size: int) -> bool:
    """Whether the operation has its whole effect, ``at`` bytes behind the beginning of its ranges."""
    data = rig.at(SRC + at, size).tobytes()
    if name == "memfill":
        return bool(np.array_equal(rig.at(DST + at, size), np.resize(np.arange(8, dtype=np.uint8), size)))
    if name in ("crcgen", "copy_crc") and rig.record["crc_val"] != google_crc32c.value(data):
        return False
    if name in ("memmove", "copy_crc"):
        return rig.at(DST + at, size).tobytes() == data
    return int(rig.record["result"]) == (name == "compare")


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(("name", "base"), CASES)
def test_block_on_fault(rig: Rig, name: str, base: int, at: int) -> None:
    """It goes on where it was once the page is there: with ``at`` in the middle of a repetition of the pattern."""
    opcode, fields = OPERATIONS[name]
    fields = {key: value + at if value in (SRC, DST) else value for key, value in fields.items()}
    size = 5 * PAGE - 6
    rig.at(SRC, PAGES * PAGE)[:] = np.random.default_rng(1).integers(0, 256, PAGES * PAGE, np.uint8)
    for missing in (1, 3):
        rig.unmap(base + missing * PAGE)
    if name == "compare":
        rig.at(DST + at, size)[:] = rig.at(SRC + at, size)
        rig.at(DST + at + size - 1, 1)[0] ^= 1
    record = rig.run(opcode, BOF, **fields, xfer_size=size)
    for missing in (1, 3):
        assert record["status"] == 0
        rig.engine.kick()
        assert record["status"] == 0
        rig.map(base + missing * PAGE)
        rig.engine.kick()
    assert record["status"] == lib.DSA_COMP_SUCCESS
    assert result_of(rig, name, at, size)


def test_block_on_fault_backward(rig: Rig) -> None:
    size = 4 * PAGE
    rig.at(SRC, size)[:] = np.random.default_rng(2).integers(0, 256, size, np.uint8)
    want = rig.at(SRC, size).copy()
    rig.unmap(SRC + PAGE)
    record = rig.run(lib.DSA_OPCODE_MEMMOVE, BOF, src_addr=SRC, dst_addr=SRC + 100, xfer_size=size)
    assert record["status"] == 0
    rig.map(SRC + PAGE)
    rig.engine.kick()
    assert (record["status"], record["result"]) == (lib.DSA_COMP_SUCCESS, 0)
    assert np.array_equal(rig.at(SRC + 100, size), want)


def test_the_record_blocks_too(rig: Rig) -> None:
    rig.unmap(OTHER)
    rig.submit(
        descriptor(lib.DSA_OPCODE_MEMFILL, BOF, dst_addr=DST, pattern=1, xfer_size=8, completion_addr=OTHER)
    )
    rig.map(OTHER)
    rig.engine.kick()
    assert rig.at(OTHER, 1)[0] == lib.DSA_COMP_SUCCESS
    assert rig.swerr().status == 0


def test_a_wq_without_block_on_fault(rig: Rig) -> None:
    rig.enable(1, bof=0)
    rig.submit(descriptor(lib.DSA_OPCODE_MEMFILL, BOF, dst_addr=DST, pattern=1, xfer_size=8), 1)
    assert rig.record["status"] == lib.DSA_COMP_INVALID_FLAGS
    assert rig.record["invalid_flags"] == lib.IDXD_OP_FLAG_BOF


def test_one_that_waits_does_not_hold_up_the_others(rig: Rig) -> None:
    """Three of four engines may wait; a drain waits with them."""
    rig.unmap(DST)
    blocked = descriptor(lib.DSA_OPCODE_MEMFILL, BOF, dst_addr=DST, pattern=1, xfer_size=8)
    rig.submit(np.repeat(blocked, 2))
    rig.submit(descriptor(lib.DSA_OPCODE_DRAIN, completion_addr=RECORDS + 32))
    rig.submit(descriptor(lib.DSA_OPCODE_NOOP, completion_addr=RECORDS + 64))
    assert [int(s) for s in rig.records(3)["status"]] == [0, 0, lib.DSA_COMP_SUCCESS]
    rig.map(DST)
    rig.engine.kick()
    assert [int(s) for s in rig.records(3)["status"]] == [lib.DSA_COMP_SUCCESS] * 3


def test_an_abort_ends_the_waiting(rig: Rig) -> None:
    rig.unmap(DST)
    record = rig.run(lib.DSA_OPCODE_MEMFILL, BOF, dst_addr=DST, pattern=1, xfer_size=8)
    mark = lib.pv_dsa_wq_mark(rig.dsa, 0)
    assert not lib.pv_dsa_wq_drained(rig.dsa, 0, mark)
    rig.abort(0)
    assert lib.pv_dsa_wq_drained(rig.dsa, 0, mark)
    rig.map(DST)
    rig.engine.kick()
    assert record["status"] == 0
    assert not rig.at(DST, 8).any()


def test_a_thread_that_waits(make_rig: MakeRig) -> None:
    """It looks again by itself: nobody rings when a page appears."""
    rig = make_rig("thread")
    rig.unmap(DST)
    lib.pv_dsa_watch(rig.dsa, 1)
    rig.submit(descriptor(lib.DSA_OPCODE_MEMFILL, BOF, dst_addr=DST, pattern=1, xfer_size=8))
    fd = lib.pv_dsa_watch_fd(rig.dsa)
    assert select.select([fd], [], [], 0.02)[0] == []
    rig.map(DST)
    assert select.select([fd], [], [], 10)[0] == [fd]
    assert rig.record["status"] == lib.DSA_COMP_SUCCESS
    assert ffi.buffer(ffi.from_buffer(rig.at(DST, 1)))[:] == b"\x01"
