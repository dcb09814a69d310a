"""COMPVAL, DUALCAST, TRANSL_FETCH and CFLUSH: results, limits, and page faults to the byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.silicon import READ, WRITE
from tests.devices.dsa.conftest import MakeRig
from tests.devices.dsa.rig import CRAV_RCR, GENCAP, MEMORY, PAGE, Rig

pytestmark = pytest.mark.touches_c

SRC, ONE, TWO = MEMORY + 0x10000, MEMORY + 0x40000, MEMORY + 0x70000
PAGES = 8
BOF = CRAV_RCR | lib.IDXD_OP_FLAG_BOF
STRIDE = CRAV_RCR | lib.DSA_TRANSL_FETCH_FLAG_STRIDE
FAULT, STATUS_WRITE = lib.DSA_COMP_PAGE_FAULT_NOBOF, lib.DSA_COMP_STATUS_WRITE
COMPVAL, DUALCAST, TRANSL_FETCH, CFLUSH = (
    lib.DSA_OPCODE_COMPVAL,
    lib.DSA_OPCODE_DUALCAST,
    lib.DSA_OPCODE_TRANSL_FETCH,
    lib.DSA_OPCODE_CFLUSH,
)
PATTERN = 0x8877665544332211
PERIOD = np.frombuffer(PATTERN.to_bytes(8, "little"), np.uint8)
# What each operation touches: field, address, whether it writes there.
TOUCHED: dict[int, list[tuple[str, int, bool]]] = {
    COMPVAL: [("src_addr", SRC, False)],
    DUALCAST: [("src_addr", SRC, False), ("dst_addr", ONE, True), ("dest2", TWO, True)],
    TRANSL_FETCH: [("transl_fetch_addr", SRC, False)],
    CFLUSH: [("dst_addr", ONE, False)],
}
CASES = [(opcode, number) for opcode, touched in TOUCHED.items() for number in range(len(touched))]


def fields_of(opcode: int, at: int) -> dict[str, int]:
    fields = {name: address + at for name, address, _ in TOUCHED[opcode]}
    return fields | ({"comp_pattern": PATTERN} if opcode == COMPVAL else {})


def prepare(rig: Rig, at: int) -> None:
    """The pattern from ``at`` on in the source, other bytes in the destinations."""
    rig.at(SRC + at, PAGES * PAGE - at)[:] = np.resize(PERIOD, PAGES * PAGE - at)
    for address in (ONE, TWO):
        rig.at(address, PAGES * PAGE)[:] = 0


@pytest.mark.parametrize(("opcode", "number"), CASES)
@given(at=st.integers(0, PAGE - 1), size=st.integers(1, PAGES * PAGE - PAGE), data=st.data())
def test_partial_completion(opcode: int, number: int, at: int, size: int, data: st.DataObject) -> None:
    """Any page may be missing: the bytes before it are done, none behind it."""
    missing = data.draw(st.integers(0, (at + size - 1) // PAGE))
    _, base, writes = TOUCHED[opcode][number]
    rig = Rig()
    try:
        prepare(rig, at)
        rig.unmap(base + missing * PAGE)
        record = rig.run(opcode, **fields_of(opcode, at), xfer_size=size)
        done = max(missing * PAGE - at, 0)
        assert record["status"] == FAULT | STATUS_WRITE * writes
        assert (record["bytes_completed"], record["fault_addr"]) == (done, base + max(missing * PAGE, at))
        copied = rig.at(SRC + at, done) if opcode == DUALCAST else np.zeros(done, np.uint8)
        for address in (ONE, TWO):
            assert np.array_equal(rig.at(address + at, done), copied)
            assert not rig.at(address + at + done, PAGES * PAGE - at - done).any()
    finally:
        rig.close()


@pytest.mark.parametrize(("opcode", "number"), CASES)
def test_block_on_fault(rig: Rig, opcode: int, number: int) -> None:
    """It goes on where it was, in the middle of a repetition of the pattern too."""
    at, size = 3, 5 * PAGE - 3
    prepare(rig, at)
    base = TOUCHED[opcode][number][1]
    for missing in (1, 3):
        rig.unmap(base + missing * PAGE)
    if opcode == COMPVAL:
        rig.at(SRC + at + size - 1, 1)[0] ^= 1
    record = rig.run(opcode, BOF, **fields_of(opcode, at), xfer_size=size)
    for missing in (1, 3):
        assert record["status"] == 0
        rig.engine.kick()
        assert record["status"] == 0
        rig.map(base + missing * PAGE)
        rig.engine.kick()
    assert record["status"] == lib.DSA_COMP_SUCCESS
    assert (record["result"], record["bytes_completed"]) == (
        (1, size - 1) if opcode == COMPVAL else (0, size)
    )
    for address in (ONE, TWO):
        assert np.array_equal(rig.at(address + at, size), rig.at(SRC + at, size)) == (opcode == DUALCAST)


@pytest.mark.parametrize("different", [0, 1])
@pytest.mark.parametrize("expected", [0, 1])
def test_compval_checks_its_result(rig: Rig, different: int, expected: int) -> None:
    prepare(rig, 0)
    rig.at(SRC + 70, 1)[0] ^= different
    flags = CRAV_RCR | lib.IDXD_OP_FLAG_CR
    record = rig.run(COMPVAL, flags, **fields_of(COMPVAL, 0), xfer_size=99, expected_res=expected)
    wanted = lib.DSA_COMP_SUCCESS if different == expected else lib.DSA_COMP_SUCCESS_PRED
    assert (record["status"], record["result"]) == (wanted, different)
    assert record["bytes_completed"] == (70 if different else 99)


@given(at=st.integers(0, 200), size=st.integers(1, 300), place=st.integers(0, 299), bit=st.integers(0, 7))
def test_compval_sees_every_bit(at: int, size: int, place: int, bit: int) -> None:
    """The first different byte; none of what lies before and behind the range."""
    rig = Rig()
    try:
        prepare(rig, at)
        rig.at(SRC, at)[:] = 0xEE
        rig.at(SRC + at + size, 64)[:] = 0xEE
        assert rig.run(COMPVAL, **fields_of(COMPVAL, at), xfer_size=size)["result"] == 0
        first = place % size
        rig.at(SRC + at + first, 1)[0] ^= 1 << bit
        rig.at(SRC + at + size - 1, 1)[0] ^= (first < size - 1) << bit
        record = rig.run(COMPVAL, **fields_of(COMPVAL, at), xfer_size=size)
        assert (record["result"], record["bytes_completed"]) == (1, first)
    finally:
        rig.close()


@pytest.mark.parametrize(
    ("opcode", "fields", "status"),
    [
        (COMPVAL, {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
        (COMPVAL, {"xfer_size": 0x80000001}, lib.DSA_COMP_XFER_ERANGE),
        (DUALCAST, {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
        *((DUALCAST, {"dest2": TWO + (1 << bit)}, lib.DSA_COMP_DCAST_ERR) for bit in range(12)),
        (DUALCAST, {"dest2": TWO + 0x1000}, lib.DSA_COMP_SUCCESS),
        (DUALCAST, {"dest2": ONE}, lib.DSA_COMP_OVERLAP_BUFFERS),
        (DUALCAST, {"dest2": ONE + 0x1000, "xfer_size": 0x1001}, lib.DSA_COMP_OVERLAP_BUFFERS),
        (DUALCAST, {"dest2": ONE - 0x1000, "xfer_size": 0x1001}, lib.DSA_COMP_OVERLAP_BUFFERS),
        (DUALCAST, {"dest2": ONE + 0x1000, "xfer_size": 0x1000}, lib.DSA_COMP_SUCCESS),
        (DUALCAST, {"src_addr": ONE + 63}, lib.DSA_COMP_OVERLAP_BUFFERS),
        (DUALCAST, {"src_addr": TWO - 63}, lib.DSA_COMP_OVERLAP_BUFFERS),
        (DUALCAST, {"src_addr": TWO - 64}, lib.DSA_COMP_SUCCESS),
        (TRANSL_FETCH, {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
        (CFLUSH, {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
    ],
)
def test_status(rig: Rig, opcode: int, fields: dict[str, int], status: int) -> None:
    before = rig.at(ONE, 0x10000).copy()
    assert rig.run(opcode, **{"xfer_size": 64} | fields_of(opcode, 0) | fields)["status"] == status
    if status != lib.DSA_COMP_SUCCESS:
        assert np.array_equal(rig.at(ONE, 0x10000), before)


def test_dualcast_writes_neither_destination_of_a_piece_that_one_lacks(rig: Rig) -> None:
    prepare(rig, 0)
    rig.unmap(TWO)
    rig.map(TWO, READ)
    record = rig.run(DUALCAST, **fields_of(DUALCAST, 0), xfer_size=64)
    assert (record["status"], record["fault_addr"]) == (FAULT | STATUS_WRITE, TWO)
    assert not rig.at(ONE, 64).any()


@pytest.mark.parametrize(
    ("start", "size", "stride", "asked"),
    [
        (0, 1, 0, [0]),
        (100, 4096, 0, [0, 1]),
        (0, 5 * PAGE, 0, [0, 1, 2, 3, 4]),
        (4095, 2, 0, [0, 1]),
        (0, 5 * PAGE, 2 * PAGE, [0, 2, 4]),
        (4000, 2 * PAGE, 100, [0, 1, 2]),
        (0, 8 * PAGE, 0xFFFFFFFF, [0]),
    ],
)
def test_which_translations_are_fetched(
    rig: Rig, start: int, size: int, stride: int, asked: list[int]
) -> None:
    """Exactly those pages: each of them is missed where it is not there, and no other."""
    fields = {"transl_fetch_addr": SRC + start, "region_size": size, "region_stride": stride}
    for page in range(PAGES):
        rig.unmap(SRC + page * PAGE)
        record = rig.run(TRANSL_FETCH, STRIDE if stride else CRAV_RCR, **fields)
        assert record["status"] == (FAULT if page in asked else lib.DSA_COMP_SUCCESS), page
        if page in asked:
            assert record["fault_addr"] // PAGE == SRC // PAGE + page
            assert record["bytes_completed"] == record["fault_addr"] - SRC - start
        rig.map(SRC + page * PAGE)


def test_a_stride_of_nothing(rig: Rig) -> None:
    record = rig.run(TRANSL_FETCH, STRIDE, transl_fetch_addr=SRC, region_size=64)
    assert record["status"] == lib.DSA_COMP_XFER_ERANGE


def test_a_region_of_more_translations_than_a_turn(rig: Rig) -> None:
    record = rig.run(TRANSL_FETCH, STRIDE, transl_fetch_addr=SRC, region_size=9999, region_stride=1)
    assert (record["status"], record["bytes_completed"]) == (lib.DSA_COMP_SUCCESS, 9999)
    rig.unmap(SRC + 2 * PAGE)
    record = rig.run(TRANSL_FETCH, STRIDE, transl_fetch_addr=SRC, region_size=9999, region_stride=1)
    assert (record["status"], record["bytes_completed"]) == (FAULT, 2 * PAGE)


@pytest.mark.parametrize("opcode", [TRANSL_FETCH, CFLUSH])
@pytest.mark.parametrize(("permission", "status"), [(READ, lib.DSA_COMP_SUCCESS), (WRITE, FAULT)])
def test_reading_is_enough(rig: Rig, opcode: int, permission: int, status: int) -> None:
    for address in (SRC, ONE):
        rig.unmap(address)
        rig.map(address, permission)
    assert rig.run(opcode, **fields_of(opcode, 0), xfer_size=64)["status"] == status


@pytest.mark.parametrize("memory", [0, lib.IDXD_GENCAP_CACHE_CONTROL_MEM])
@pytest.mark.parametrize("flush", [0, lib.IDXD_GENCAP_CACHE_CONTROL_CACHE])
def test_cache_control_has_two_capabilities(make_rig: MakeRig, memory: int, flush: int) -> None:
    """One for operations that write, one for CFLUSH (GENCAP bits 2 and 3)."""
    rig = make_rig(gencap=GENCAP & ~lib.IDXD_GENCAP_CACHE_CONTROL_MEM | memory | flush)
    flags = CRAV_RCR | lib.IDXD_OP_FLAG_CC
    for opcode, capability in ((CFLUSH, flush), (DUALCAST, memory)):
        record = rig.run(opcode, flags, **fields_of(opcode, 0), xfer_size=64)
        assert record["status"] == (lib.DSA_COMP_SUCCESS if capability else lib.DSA_COMP_INVALID_FLAGS)
