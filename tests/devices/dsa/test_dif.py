"""DIF operations and DIX Generate against the plain definition; the guard against published vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import ffi, lib
from tests.devices.dsa.dif_cases import Case, cases, sources
from tests.devices.dsa.dif_reference import (
    CHECK,
    CHECKING,
    DIX,
    INSERT,
    OPCODES,
    STRIP,
    UPDATE,
    WRITING,
    Dif,
    Tags,
    crc16,
)
from tests.devices.dsa.rig import CRAV_RCR, MEMORY, RECORDS, Rig, descriptor, descriptors

pytestmark = pytest.mark.touches_c

SRC, DST = MEMORY + 0x10000, MEMORY + 0x50000
WAYS = (lib.pv_crc16_t10, lib.pv_crc16_t10_narrow, lib.pv_crc16_t10_portable)
AREA = 0x40000  # bytes from DST on that are compared


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def run(rig: Rig, dif: Dif, source: bytes, src: int = SRC, dst: int = DST, flags: int = CRAV_RCR) -> Any:
    """Puts the source where it belongs and runs the operation; gives the completion record."""
    rig.at(src, len(source))[:] = np.frombuffer(source, np.uint8)
    fields = dif.fields() | {"src_addr": src, "xfer_size": len(source)}
    if dif.opcode != CHECK:
        fields["dst_addr"] = dst
    return rig.run(dif.opcode, flags, **fields)


def src_tags(record: Any) -> Tags:
    names = ("dif_upd_src_ref_tag", "dif_upd_src_app_tag", "dif_upd_src_app_tag_mask")
    return Tags(*(int(record[name]) for name in names))


def dest_tags(record: Any) -> Tags:
    names = ("dif_upd_dest_ref_tag", "dif_upd_dest_app_tag", "dif_upd_dest_app_tag_mask")
    return Tags(*(int(record[name]) for name in names))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"123456789", 0xD0DB),  # the check value of CRC-16/T10-DIF
        (bytes(32), 0x0000),  # SCSI SBC, CRC test cases
        (b"\xff" * 32, 0xA293),
        (bytes(range(32)), 0x0224),
        (b"\xff\xff" + bytes(30), 0x21B8),
        (bytes(range(0xFF, 0xDF, -1)), 0xA0B7),
    ],
)
def test_crc16_vectors(data: bytes, value: int, way: Callable[..., int]) -> None:
    assert way(0, ffi.from_buffer(data), len(data)) == value == crc16(data)


@given(
    size=st.one_of(st.integers(0, 400), st.sampled_from([512, 520, 4096, 4104]), st.integers(0, 9000)),
    start=st.integers(0, 15),
    seed=st.integers(0, 0xFFFF),
)
def test_crc16_with_and_without_its_instructions(size: int, start: int, seed: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, start + size, np.uint8)
    pointer = ffi.from_buffer("uint8_t[]", data)
    want = crc16(data[start:].tobytes(), seed)
    assert [way(seed, pointer + start, size) for way in WAYS] == [want] * len(WAYS)


@pytest.mark.parametrize("opcode", OPCODES)
@given(data=st.data(), at=st.integers(0, 4095), to=st.integers(0, 4095))
def test_operation(shared: Rig, opcode: int, data: st.DataObject, at: int, to: int) -> None:
    """Any flags, tags, blocks, good and bad fields: the record, the destination, and no byte beside it."""
    case: Case = data.draw(cases((opcode,)))
    dif = case.dif
    done, status, out = dif.run(case.source)
    shared.at(DST, AREA)[:] = 0x5A
    record = run(shared, dif, case.source, SRC + at, DST + to)
    want = np.full(AREA, 0x5A, np.uint8)
    want[to : to + len(out)] = np.frombuffer(out, np.uint8)
    assert record["status"] == (lib.DSA_COMP_DIF_ERR if status else lib.DSA_COMP_SUCCESS)
    assert (record["dif_status"], record["bytes_completed"]) == (status, done * dif.step)
    assert np.array_equal(shared.at(DST, AREA), want)
    assert shared.at(SRC + at, len(case.source)).tobytes() == case.source
    assert src_tags(record) == (dif.src_at(done) if opcode in CHECKING else Tags())
    assert dest_tags(record) == (dif.dest_at(done) if opcode in WRITING else Tags())


def block_with(dif: Dif, field: str) -> bytes:
    """Three good blocks, and the second one's field replaced."""
    source = bytearray(sources(dif, 3, 1))
    at = dif.step + dif.block
    if field == "guard":
        source[at] ^= 1
    elif field == "app":
        source[at + 2] ^= 1
    elif field == "ref":
        source[at + 7] ^= 1
    elif field == "all three":
        for place in (at, at + 3, at + 4):
            source[place] ^= 0x80
    else:
        source[at : at + 8] = bytes.fromhex(field)
    return bytes(source)


ALL_F = "ff" * 8
TAGS_F = "0000" + "ff" * 6
APP_F = "0000ffff00000000"
GUARD, APP, REF, ALL = (
    lib.DSA_DIF_STATUS_GUARD,
    lib.DSA_DIF_STATUS_APP_TAG,
    lib.DSA_DIF_STATUS_REF_TAG,
    lib.DSA_DIF_STATUS_ALL_F,
)
NO_GUARD, NO_REF = lib.DSA_DIF_SRC_FLAG_GUARD_DISABLE, lib.DSA_DIF_SRC_FLAG_REF_TAG_DISABLE
DETECT_ALL, ALL_ERR = lib.DSA_DIF_SRC_FLAG_ALL_F, lib.DSA_DIF_SRC_FLAG_ALL_F_ERR
DETECT_APP, DETECT_TAGS = lib.DSA_DIF_SRC_FLAG_APP_TAG_F, lib.DSA_DIF_SRC_FLAG_APP_REF_TAG_F


@pytest.mark.parametrize("opcode", CHECKING)
@pytest.mark.parametrize(
    ("field", "flags", "mask", "status"),
    [
        ("guard", 0, 0, GUARD),
        ("app", 0, 0, APP),
        ("ref", 0, 0, REF),
        ("all three", 0, 0, GUARD | APP | REF),
        ("guard", NO_GUARD, 0, 0),
        ("ref", NO_REF, 0, 0),
        ("app", 0, 0xFFFF, 0),
        ("app", 0, 0x0100, 0),
        ("app", 0, 0xFEFF, APP),
        ("all three", NO_GUARD | NO_REF, 0xFFFF, 0),
        (ALL_F, 0, 0, GUARD | APP | REF),
        (ALL_F, ALL_ERR, 0, GUARD | APP | REF),
        (ALL_F, DETECT_ALL, 0, 0),
        (ALL_F, DETECT_ALL | ALL_ERR, 0, ALL),
        (ALL_F, DETECT_ALL | ALL_ERR | DETECT_APP | DETECT_TAGS, 0, ALL),
        (ALL_F, DETECT_TAGS, 0, 0),
        (ALL_F, DETECT_APP, 0, 0),
        (TAGS_F, DETECT_ALL | ALL_ERR, 0, GUARD | APP | REF),
        (TAGS_F, DETECT_TAGS, 0, 0),
        (TAGS_F, DETECT_APP, 0, 0),
        (APP_F, DETECT_TAGS, 0, GUARD | APP | REF),
        (APP_F, DETECT_APP, 0, 0),
    ],
)
def test_status_of_a_bad_block(rig: Rig, opcode: int, field: str, flags: int, mask: int, status: int) -> None:
    """The second of three blocks is bad: it is named by the bytes completed, and nothing of it is written."""
    dif = Dif(opcode, src_flags=flags, src=Tags(0x12345678, 0x2345, mask), dest=Tags())
    rig.at(DST, 4096)[:] = 0x5A
    record = run(rig, dif, block_with(dif, field))
    assert (record["status"], record["dif_status"]) == ((lib.DSA_COMP_DIF_ERR, status) if status else (1, 0))
    assert record["bytes_completed"] == (dif.step if status else 3 * dif.step)
    assert np.all(rig.at(DST, 4096)[dif.out * (1 if status else 3) :] == 0x5A)


EXACT = [(opcode, size) for opcode in OPCODES for size in range(4)]


@pytest.mark.parametrize(("opcode", "size"), EXACT)
def test_transfer_sizes(rig: Rig, opcode: int, size: int) -> None:
    """Whole blocks, at least one; a WQ's limit counts bytes of the source."""
    dif = Dif(opcode, size)
    fields = dif.fields() | {"src_addr": SRC} | ({} if opcode == CHECK else {"dst_addr": DST})
    good = sources(dif, 3, 0)
    rig.at(SRC, len(good))[:] = np.frombuffer(good, np.uint8)
    other = dif.block + 8 * (opcode not in CHECKING)
    for wrong in (0, 1, 8, dif.step - 1, dif.step + 1, 2 * dif.step - 8, other, 3 * other, 0xFFFFFFFF):
        record = rig.run(opcode, xfer_size=wrong, **fields)
        assert (record["status"], record["bytes_completed"]) == (lib.DSA_COMP_XFER_ERANGE, 0)
    for blocks in (1, 2, 3):
        assert rig.run(opcode, xfer_size=blocks * dif.step, **fields)["status"] == lib.DSA_COMP_SUCCESS
    rig.enable(1, max_xfer_shift=12)
    for blocks in range(1, 10):
        rig.at(RECORDS, 32)[:] = 0
        rig.submit(descriptor(opcode, xfer_size=blocks * dif.step, **fields), 1)
        if blocks * dif.step > 4096:
            assert rig.record["status"] == lib.DSA_COMP_XFER_ERANGE
        elif blocks <= 3:
            assert rig.record["status"] == lib.DSA_COMP_SUCCESS


@pytest.mark.parametrize(("opcode", "size"), [(o, s) for o, s in EXACT if o != CHECK])
def test_overlap(rig: Rig, opcode: int, size: int) -> None:
    """Source and destination, each with its own size, share no byte."""
    dif = Dif(opcode, size)
    source = sources(dif, 3, 0)
    out = 3 * dif.out
    for distance in (-out + 1, -1, 0, 1, len(source) - 1):
        before = rig.memory[:0xF0000].copy()
        record = run(rig, dif, source, dst=SRC + distance)
        assert (record["status"], record["bytes_completed"]) == (lib.DSA_COMP_OVERLAP_BUFFERS, 0)
        before[SRC - MEMORY : SRC - MEMORY + len(source)] = np.frombuffer(source, np.uint8)
        assert np.array_equal(rig.memory[:0xF0000], before)
    for distance in (-out, len(source)):
        assert run(rig, dif, source, dst=SRC + distance)["status"] == lib.DSA_COMP_SUCCESS
        assert rig.at(SRC + distance, out).tobytes() == dif.run(source)[2]


@pytest.mark.parametrize("opcode", OPCODES)
def test_a_transfer_longer_than_a_turn(rig: Rig, opcode: int) -> None:
    """Megabytes in one descriptor: tags run on over all of them."""
    src, dest = Tags(0xFFFFFFF0, 7), Tags(0xFFFFFF00, 9)
    dif = Dif(
        opcode, 2, src=src if opcode in CHECKING else Tags(), dest=dest if opcode in WRITING else Tags()
    )
    big = np.zeros(4 << 20, np.uint8)
    rig.bus.map(1 << 32, big)
    source = sources(dif, 300, 3)
    big[: len(source)] = np.frombuffer(source, np.uint8)
    fields = dif.fields() | {"src_addr": 1 << 32, "xfer_size": len(source)}
    if opcode != CHECK:
        fields["dst_addr"] = (1 << 32) + (2 << 20)
    record = rig.run(opcode, **fields)
    assert (record["status"], record["bytes_completed"]) == (lib.DSA_COMP_SUCCESS, len(source))
    out = dif.run(source)[2]
    assert big[2 << 20 : (2 << 20) + len(out)].tobytes() == out


def test_in_a_batch(rig: Rig) -> None:
    """Insert, check, update and strip, each on what the one before wrote; a bad block fails its member alone."""
    tags, other = Tags(5, 6, 0), Tags(50, 60, 0)
    data = sources(Dif(INSERT), 4, 2)
    rig.at(SRC, len(data))[:] = np.frombuffer(data, np.uint8)
    protected, updated, stripped, tuples = DST, DST + 0x2000, DST + 0x4000, DST + 0x6000
    size = 4 * 520
    plan = [
        (Dif(INSERT, dest=tags), SRC, protected, len(data), lib.DSA_COMP_SUCCESS),
        (Dif(CHECK, src=tags), protected, 0, size, lib.DSA_COMP_SUCCESS),
        (Dif(CHECK, src=other), protected, 0, size, lib.DSA_COMP_DIF_ERR),
        (Dif(UPDATE, src=tags, dest=other), protected, updated, size, lib.DSA_COMP_SUCCESS),
        (Dif(STRIP, src=other), updated, stripped, size, lib.DSA_COMP_SUCCESS),
        (Dif(DIX, dest=tags), SRC, tuples, len(data), lib.DSA_COMP_SUCCESS),
    ]
    members = [
        descriptor(
            dif.opcode,
            src_addr=src,
            dst_addr=dst,
            xfer_size=length,
            completion_addr=RECORDS + 32 * (1 + number),
            **dif.fields(),
        )
        for number, (dif, src, dst, length, _) in enumerate(plan)
    ]
    record = rig.batch(descriptors(*members))
    assert (record["status"], record["descs_completed"]) == (lib.DSA_COMP_BATCH_FAIL, len(plan))
    assert rig.records(len(plan) + 1)["status"].tolist()[1:] == [status for *_, status in plan]
    assert rig.records(4)["dif_status"][3] == lib.DSA_DIF_STATUS_APP_TAG | lib.DSA_DIF_STATUS_REF_TAG
    assert rig.at(stripped, len(data)).tobytes() == data
    fields = [rig.at(protected + 520 * block + 512, 8).tobytes() for block in range(4)]
    assert rig.at(tuples, 32).tobytes() == b"".join(fields)


def test_without_a_record(rig: Rig) -> None:
    """A record is written when one is asked for, or when there is something to report; else SWERR has it."""
    dif = Dif(CHECK)
    assert run(rig, dif, sources(dif, 2, 0), flags=lib.IDXD_OP_FLAG_CRAV)["status"] == 0
    bad = block_with(dif, "guard")
    assert run(rig, dif, bad, flags=lib.IDXD_OP_FLAG_CRAV)["status"] == lib.DSA_COMP_DIF_ERR
    run(rig, dif, bad, flags=0)
    assert rig.swerr().status >> lib.IDXD_SWERR_ERROR_SHIFT & 0xFF == lib.DSA_COMP_DIF_ERR
