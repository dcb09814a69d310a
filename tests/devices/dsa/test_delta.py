"""Delta records: results, limits, page faults to the byte, and translations that end inside a word."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.silicon import READ, WRITE
from tests.devices.dsa.rig import CRAV_RCR, MEMORY, PAGE, Rig

pytestmark = pytest.mark.touches_c

FIRST, SECOND, DELTA = MEMORY + 0x10000, MEMORY + 0x40000, MEMORY + 0x70000
FAR = 1 << 32
FAULT, STATUS_WRITE = lib.DSA_COMP_PAGE_FAULT_NOBOF, lib.DSA_COMP_STATUS_WRITE
BOF = CRAV_RCR | lib.IDXD_OP_FLAG_BOF
CHECK = CRAV_RCR | lib.IDXD_OP_FLAG_CR


def by_definition(first: bytes, second: bytes) -> bytes:
    """Every difference, word by word."""
    words = range(0, len(first), 8)
    return b"".join(
        struct.pack("<H8s", at // 8, second[at : at + 8])
        for at in words
        if first[at : at + 8] != second[at : at + 8]
    )


def create(rig: Rig, size: int, room: int = 0x10000 // 10 * 10, flags: int = CRAV_RCR, **fields: int) -> Any:
    given = {
        "src_addr": FIRST,
        "src2_addr": SECOND,
        "delta_addr": DELTA,
        "xfer_size": size,
        "max_delta_size": room,
    }
    return rig.run(lib.DSA_OPCODE_CR_DELTA, flags, **given | fields)


def apply(rig: Rig, record: bytes, size: int, flags: int = CRAV_RCR, **fields: int) -> Any:
    rig.at(DELTA, len(record))[:] = np.frombuffer(record, np.uint8)
    given = {"src_addr": DELTA, "dst_addr": FIRST, "xfer_size": size, "delta_rec_size": len(record)}
    return rig.run(lib.DSA_OPCODE_AP_DELTA, flags, **given | fields)


def deltas(*offsets: int) -> bytes:
    return b"".join(struct.pack("<HQ", offset, 0x0101010101010101 * (1 + offset % 255)) for offset in offsets)


def fill(rig: Rig, size: int, different: range | list[int]) -> bytes:
    """Two ranges that differ in these words, and their delta record by definition."""
    rig.at(FIRST, size)[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    rig.at(SECOND, size)[:] = rig.at(FIRST, size)
    for word in different:
        rig.at(SECOND + 8 * word, 8)[word % 8] ^= 0xFF
    return by_definition(rig.at(FIRST, size).tobytes(), rig.at(SECOND, size).tobytes())


@pytest.mark.parametrize("mask", range(8))
@pytest.mark.parametrize(("result", "words"), [(0, 0), (1, 8), (2, 9)])
def test_create_checks_its_result(rig: Rig, result: int, words: int, mask: int) -> None:
    """Expected Result Mask has a bit for every result."""
    fill(rig, 4096, range(words))
    record = create(rig, 4096, 80, CHECK, expected_res_mask=mask)
    wanted = lib.DSA_COMP_SUCCESS if mask >> result & 1 else lib.DSA_COMP_SUCCESS_PRED
    assert (record["status"], record["result"]) == (wanted, result)
    assert record["delta_rec_size"] == min(10 * words, 80)
    assert record["bytes_completed"] == (64 if result == 2 else 4096)


@pytest.mark.parametrize("words", [0, 1, 8, 15, 16, 17, 511, 512, 513, 1024, 1025, 2000])
def test_create_at_the_limits_of_its_pieces(rig: Rig, words: int) -> None:
    """A record that just fits is complete, one with room for a delta less is not."""
    size = 2048 * 8
    expected = fill(rig, size, range(7, 7 + words))
    record = create(rig, size, max(len(expected), 80))
    assert (record["result"], record["delta_rec_size"], record["bytes_completed"]) == (
        words > 0,
        len(expected),
        size,
    )
    assert rig.at(DELTA, len(expected)).tobytes() == expected
    if words > 8:
        rig.at(DELTA, len(expected))[:] = 0xEE
        record = create(rig, size, len(expected) - 10)
        assert (record["result"], record["delta_rec_size"]) == (2, len(expected) - 10)
        assert record["bytes_completed"] == 8 * (7 + words - 1)
        assert rig.at(DELTA, len(expected)).tobytes() == expected[:-10] + b"\xee" * 10


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE),
        ({"xfer_size": 0x80008}, lib.DSA_COMP_XFER_ERANGE),
        ({"xfer_size": 12}, lib.DSA_COMP_ADDR_ALIGN),
        ({"src_addr": FIRST + 4}, lib.DSA_COMP_ADDR_ALIGN),
        ({"src2_addr": SECOND + 1}, lib.DSA_COMP_ADDR_ALIGN),
        ({"delta_addr": DELTA + 1}, lib.DSA_COMP_SUCCESS),
        ({"max_delta_size": 0}, lib.DSA_COMP_DR_ERANGE),
        ({"max_delta_size": 70}, lib.DSA_COMP_DR_ERANGE),
        ({"max_delta_size": 81}, lib.DSA_COMP_DR_ERANGE),
        ({"delta_addr": FIRST + 63}, lib.DSA_COMP_OVERLAP_BUFFERS),
        ({"delta_addr": FIRST - 79}, lib.DSA_COMP_OVERLAP_BUFFERS),
        ({"delta_addr": SECOND + 63}, lib.DSA_COMP_OVERLAP_BUFFERS),
        ({"delta_addr": SECOND - 79}, lib.DSA_COMP_OVERLAP_BUFFERS),
        ({"delta_addr": FIRST + 64}, lib.DSA_COMP_SUCCESS),
        ({"delta_addr": SECOND - 80}, lib.DSA_COMP_SUCCESS),
        ({"src2_addr": FIRST + 8}, lib.DSA_COMP_SUCCESS),
        ({"src2_addr": FIRST}, lib.DSA_COMP_SUCCESS),
        ({"src_addr": 0xDEAD000}, FAULT),
        ({"src2_addr": 0xDEAD000}, FAULT),
        ({"delta_addr": 0xDEAD000}, FAULT | STATUS_WRITE),
    ],
)
def test_status_of_create(rig: Rig, fields: dict[str, int], status: int) -> None:
    fill(rig, 64, [0, 3])
    assert create(rig, 64, 80, **fields)["status"] == status


@pytest.mark.parametrize(
    ("record", "fields", "status", "done"),
    [
        (deltas(0), {"xfer_size": 0}, lib.DSA_COMP_XFER_ERANGE, 0),
        (deltas(0), {"xfer_size": 0x80008}, lib.DSA_COMP_XFER_ERANGE, 0),
        (deltas(0), {"xfer_size": 63}, lib.DSA_COMP_ADDR_ALIGN, 0),
        (deltas(0), {"dst_addr": FIRST + 4}, lib.DSA_COMP_ADDR_ALIGN, 0),
        (deltas(0), {"delta_rec_size": 0}, lib.DSA_COMP_DR_ERANGE, 0),
        (deltas(0), {"delta_rec_size": 9}, lib.DSA_COMP_DR_ERANGE, 0),
        (deltas(0), {"delta_rec_size": 15}, lib.DSA_COMP_DR_ERANGE, 0),
        (deltas(0), {"dst_addr": DELTA + 8}, lib.DSA_COMP_OVERLAP_BUFFERS, 0),
        (deltas(0), {"dst_addr": DELTA - 56}, lib.DSA_COMP_OVERLAP_BUFFERS, 0),
        (deltas(0), {"dst_addr": DELTA + 16}, lib.DSA_COMP_SUCCESS, 10),
        (deltas(0), {"dst_addr": DELTA - 64}, lib.DSA_COMP_SUCCESS, 10),
        (deltas(1, 3, 3), {}, lib.DSA_COMP_DR_OFFSET_NOINC, 20),
        (deltas(1, 3, 2), {}, lib.DSA_COMP_DR_OFFSET_NOINC, 20),
        (deltas(8), {}, lib.DSA_COMP_DR_OFFSET_ERANGE, 0),
        (deltas(1, 7, 65535), {}, lib.DSA_COMP_DR_OFFSET_ERANGE, 20),
        (deltas(1, 7), {"src_addr": 0xDEAD000}, FAULT, 0),
        (deltas(1, 7), {"dst_addr": 0xDEAD000}, FAULT | STATUS_WRITE, 0),
    ],
)
def test_status_of_apply(rig: Rig, record: bytes, fields: dict[str, int], status: int, done: int) -> None:
    result = apply(rig, record, 64, **fields)
    assert (result["status"], result["bytes_completed"]) == (status, done)


def test_apply_writes_its_words_and_no_others(rig: Rig) -> None:
    offsets = [0, 1, 5, 510, 511, 512, 513, 1000, 2047]
    expected = np.full(16384, 0xEE, np.uint8)
    rig.at(FIRST, expected.size)[:] = expected
    for offset in offsets:
        expected[8 * offset : 8 * offset + 8] = 1 + offset % 255
    assert apply(rig, deltas(*offsets), 16384)["status"] == lib.DSA_COMP_SUCCESS
    assert (rig.at(FIRST, expected.size) == expected).all()


def test_apply_stops_at_the_first_wrong_offset_of_many(rig: Rig) -> None:
    """Also where it is the first of those read at once."""
    for wrong in (511, 512, 513, 1024):
        offsets = list(range(1100))
        offsets[wrong] = offsets[wrong - 1]
        rig.at(FIRST, 8800)[:] = 0
        record = apply(rig, deltas(*offsets), 8800)
        assert (record["status"], record["bytes_completed"]) == (lib.DSA_COMP_DR_OFFSET_NOINC, 10 * wrong)
        assert rig.at(FIRST, 8 * wrong).reshape(-1, 8).any(axis=1).all()
        assert not rig.at(FIRST + 8 * wrong, 8800 - 8 * wrong).any()


@pytest.mark.parametrize("base", [FIRST, SECOND, DELTA])
@given(
    different=st.one_of(st.sets(st.integers(0, 2047), max_size=60), st.just(set(range(0, 2048, 3)))),
    gap=st.integers(0, 700).map(lambda words: words * 8),
    page=st.integers(0, 4),
)
def test_create_ends_at_a_fault_and_a_driver_goes_on(
    base: int, different: set[int], gap: int, page: int
) -> None:
    """Record and bytes completed belong together: what is left is created behind them, to the same whole."""
    size = 2048 * 8 - gap
    rig = Rig()
    try:
        fill(rig, size, [word for word in different if word < size // 8])
        starts = {"src_addr": FIRST + gap, "src2_addr": SECOND + gap, "delta_addr": DELTA + gap}
        for address, source in ((FIRST, FIRST), (SECOND, SECOND)):
            rig.at(address + gap, size)[:] = rig.at(source, size).copy()
        expected = by_definition(rig.at(FIRST + gap, size).tobytes(), rig.at(SECOND + gap, size).tobytes())
        rig.unmap(base + page * PAGE)
        record = create(rig, size, **starts)
        done, written = int(record["bytes_completed"]), int(record["delta_rec_size"])
        prefix = by_definition(rig.at(FIRST + gap, done).tobytes(), rig.at(SECOND + gap, done).tobytes())
        assert rig.at(DELTA + gap, written).tobytes() == prefix == expected[:written]
        if record["status"] != lib.DSA_COMP_SUCCESS:
            assert record["status"] == FAULT | (STATUS_WRITE if base == DELTA else 0)
            missing = base + page * PAGE
            assert record["fault_addr"] == max(missing, base + gap)
            if base != DELTA:
                assert done == max(missing - base - gap, 0)
            else:
                assert written == max(missing - base - gap, 0) // 10 * 10
        rig.map(base + page * PAGE)
        if done < size:
            rest = create(
                rig,
                size - done,
                src_addr=FIRST + gap + done,
                src2_addr=SECOND + gap + done,
                delta_addr=DELTA + gap + written,
            )
            assert rest["status"] == lib.DSA_COMP_SUCCESS
            assert written + int(rest["delta_rec_size"]) == len(expected)
        else:
            assert written == len(expected)
    finally:
        rig.close()


@given(
    offsets=st.sets(st.integers(0, 4095), min_size=1, max_size=80),
    page=st.integers(0, 7),
    in_record=st.booleans(),
)
def test_apply_ends_at_a_fault(offsets: set[int], page: int, in_record: bool) -> None:
    """The bytes completed are those of the deltas before it; a page that no delta names may be missing."""
    rig = Rig()
    try:
        ordered = sorted(offsets)
        record = deltas(*ordered)
        rig.at(FIRST, 0x8000)[:] = 0
        start = 4096 - 5 * len(ordered) // 8 * 8
        at = DELTA + start
        rig.at(at, len(record))[:] = np.frombuffer(record, np.uint8)
        missing = DELTA + PAGE if in_record else FIRST + page * PAGE
        rig.unmap(missing)
        fields = {"src_addr": at, "dst_addr": FIRST, "xfer_size": 0x8000, "delta_rec_size": len(record)}
        result = rig.run(lib.DSA_OPCODE_AP_DELTA, **fields)
        if in_record:
            good = min(len(ordered), (missing - at) // 10)
            fault = (FAULT, missing)
        else:
            good = next((i for i, o in enumerate(ordered) if o // 512 == page), len(ordered))
            fault = (FAULT | STATUS_WRITE, FIRST + 8 * ordered[good] if good < len(ordered) else 0)
        rig.map(missing)
        applied = np.zeros(0x8000, np.uint8)
        for offset in ordered[:good]:
            applied[8 * offset : 8 * offset + 8] = 1 + offset % 255
        assert np.array_equal(rig.at(FIRST, 0x8000), applied)
        assert result["bytes_completed"] == 10 * good
        if good < len(ordered):
            assert (result["status"], result["fault_addr"]) == fault
        else:
            assert result["status"] == lib.DSA_COMP_SUCCESS
    finally:
        rig.close()


@pytest.mark.parametrize("base", [FIRST, SECOND, DELTA])
def test_create_blocks_on_faults(rig: Rig, base: int) -> None:
    size = 2048 * 8
    expected = fill(rig, size, range(1, 2048, 2))
    for missing in (0, 2):
        rig.unmap(base + missing * PAGE)
    record = create(rig, size, flags=BOF)
    for missing in (0, 2):
        assert record["status"] == 0
        rig.engine.kick()
        assert record["status"] == 0
        rig.map(base + missing * PAGE)
        rig.engine.kick()
    assert (record["status"], record["result"], record["delta_rec_size"]) == (1, 1, len(expected))
    assert record["bytes_completed"] == size
    assert rig.at(DELTA, len(expected)).tobytes() == expected


@pytest.mark.parametrize("base", [FIRST, DELTA])
def test_apply_blocks_on_faults(rig: Rig, base: int) -> None:
    """The order of the offsets is looked at across the pause too."""
    size, offsets = 2048 * 8, list(range(1, 2048, 2))
    for wrong in (False, True):
        rig.at(FIRST, size)[:] = 0
        if wrong:
            offsets[-1] = offsets[-2]
        rig.at(DELTA, 10 * len(offsets))[:] = np.frombuffer(deltas(*offsets), np.uint8)
        for missing in (0, 2):
            rig.unmap(base + missing * PAGE)
        fields = {
            "src_addr": DELTA,
            "dst_addr": FIRST,
            "xfer_size": size,
            "delta_rec_size": 10 * len(offsets),
        }
        record = rig.run(lib.DSA_OPCODE_AP_DELTA, BOF, **fields)
        for missing in (0, 2):
            assert record["status"] == 0
            rig.map(base + missing * PAGE)
            rig.engine.kick()
        assert record["status"] == (lib.DSA_COMP_DR_OFFSET_NOINC if wrong else lib.DSA_COMP_SUCCESS)
        written = rig.at(FIRST, size).reshape(-1, 8)
        assert not written[::2].any()
        assert written[1 : 2 * len(offsets) - 2 * wrong : 2].all()


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def map_in_pieces(rig: Rig, iova: int, array: np.ndarray[Any, Any], cuts: list[int]) -> list[tuple[int, int]]:
    """The array behind a row of translations that end anywhere."""
    pieces = []
    edges = sorted({0, len(array), *(cut % len(array) for cut in cuts)})
    for start, end in pairwise(edges):
        rig.bus.map(iova + start, array[start:end], READ | WRITE)
        pieces.append((iova + start, end - start))
    return pieces


CUTS = st.lists(st.integers(0, 1023), max_size=30)


@given(cuts=st.tuples(CUTS, CUTS, CUTS), different=st.sets(st.integers(0, 127)))
def test_words_across_translations(
    shared: Rig, cuts: tuple[list[int], list[int], list[int]], different: set[int]
) -> None:
    """A table bus may have ranges that end inside a word: nothing changes; a hole matters only where a word is."""
    first = np.random.default_rng(len(different)).integers(0, 256, 1024, np.uint8)
    second, delta = first.copy(), np.zeros(1280, np.uint8)
    for word in different:
        second[8 * word + word % 8] ^= 0x10
    places = (FAR, FAR + 0x1000, FAR + 0x2000)
    pieces = [
        piece
        for place, array, cut in zip(places, (first, second, delta), cuts, strict=True)
        for piece in map_in_pieces(shared, place, array, cut)
    ]
    try:
        expected = by_definition(first.tobytes(), second.tobytes())
        fields = {"src_addr": FAR, "src2_addr": FAR + 0x1000, "delta_addr": FAR + 0x2000}
        record = shared.run(lib.DSA_OPCODE_CR_DELTA, **fields, xfer_size=1024, max_delta_size=1280)
        assert (record["status"], record["delta_rec_size"]) == (lib.DSA_COMP_SUCCESS, len(expected))
        assert delta[: len(expected)].tobytes() == expected
        if not expected:
            return
        fields = {"src_addr": FAR + 0x2000, "dst_addr": FAR, "xfer_size": 1024}
        record = shared.run(lib.DSA_OPCODE_AP_DELTA, **fields, delta_rec_size=len(expected))
        assert (record["status"], record["bytes_completed"]) == (lib.DSA_COMP_SUCCESS, len(expected))
        assert first.tobytes() == second.tobytes()
    finally:
        for iova, size in pieces:
            shared.bus.unmap(iova, size)


def test_a_hole_between_the_words_of_a_page(rig: Rig) -> None:
    target = np.zeros(1024, np.uint8)
    rig.bus.map(FAR, target[:512])
    rig.bus.map(FAR + 520, target[520:])
    record = apply(rig, deltas(0, 63, 65, 127), 1024, dst_addr=FAR)
    assert (record["status"], record["bytes_completed"]) == (lib.DSA_COMP_SUCCESS, 40)
    assert np.flatnonzero(target.reshape(-1, 8).all(axis=1)).tolist() == [0, 63, 65, 127]
    record = apply(rig, deltas(0, 64, 127), 1024, dst_addr=FAR)
    assert (record["status"], record["bytes_completed"]) == (FAULT | STATUS_WRITE, 10)
    assert record["fault_addr"] == FAR + 512
