"""Each operation's result against plain Python, and CRC-32C against google-crc32c."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import ffi, lib
from tests.devices.dsa.rig import CRAV_RCR, MEMORY, Rig

pytestmark = pytest.mark.touches_c

AREA = 0x40000  # bytes from MEMORY on that the tests play with
sizes = st.one_of(st.integers(1, 200), st.integers(4000, 4200), st.integers(1, 0x18000))
offsets = st.one_of(st.integers(0, 64), st.integers(4090, 4100), st.integers(0, AREA - 0x18000))


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def scramble(rig: Rig, seed: int) -> np.ndarray[Any, Any]:
    """Random bytes in the area, and a copy of them to compute with."""
    area = rig.at(MEMORY, AREA)
    area[:] = np.random.default_rng(seed).integers(0, 256, AREA, np.uint8)
    return area.copy()


def crc(data: bytes, seed: int = 0) -> int:
    return int(google_crc32c.extend(seed, data))


@given(src=offsets, dst=offsets, size=sizes, seed=st.integers(0, 3))
def test_memmove(shared: Rig, src: int, dst: int, size: int, seed: int) -> None:
    """Any overlap gives what copying through a buffer gives, and no byte beside it changes."""
    want = scramble(shared, seed)
    record = shared.run(lib.DSA_OPCODE_MEMMOVE, src_addr=MEMORY + src, dst_addr=MEMORY + dst, xfer_size=size)
    want[dst : dst + size] = want[src : src + size].copy()
    assert (record["status"], record["result"], record["bytes_completed"]) == (lib.DSA_COMP_SUCCESS, 0, size)
    assert np.array_equal(shared.at(MEMORY, AREA), want)


@given(dst=offsets, size=sizes, pattern=st.binary(min_size=8, max_size=8))
def test_memfill(shared: Rig, dst: int, size: int, pattern: bytes) -> None:
    want = scramble(shared, 1)
    record = shared.run(
        lib.DSA_OPCODE_MEMFILL,
        pattern=int.from_bytes(pattern, "little"),
        dst_addr=MEMORY + dst,
        xfer_size=size,
    )
    want[dst : dst + size] = np.frombuffer((pattern * (size // 8 + 1))[:size], np.uint8)
    assert record["status"] == lib.DSA_COMP_SUCCESS
    assert np.array_equal(shared.at(MEMORY, AREA), want)


@given(size=sizes, src=offsets, data=st.data())
def test_compare(shared: Rig, size: int, src: int, data: st.DataObject) -> None:
    """Equal, and then different in one byte: its offset is the bytes completed."""
    scramble(shared, 2)
    other = MEMORY + 0x80000 + src % 7
    shared.at(other, size)[:] = shared.at(MEMORY + src, size)
    fields = {"src_addr": MEMORY + src, "src2_addr": other, "xfer_size": size}
    record = shared.run(lib.DSA_OPCODE_COMPARE, **fields)
    assert (record["status"], record["result"], record["bytes_completed"]) == (lib.DSA_COMP_SUCCESS, 0, size)
    at = data.draw(st.integers(0, size - 1))
    shared.at(other + at, 1)[0] ^= 1 + at % 255
    record = shared.run(lib.DSA_OPCODE_COMPARE, **fields)
    assert (record["status"], record["result"], record["bytes_completed"]) == (lib.DSA_COMP_SUCCESS, 1, at)


@pytest.mark.parametrize("different", [0, 1])
@pytest.mark.parametrize("expected", [0, 1])
def test_compare_checks_its_result(rig: Rig, different: int, expected: int) -> None:
    """Check Result: another result than the expected one is success with a false predicate."""
    rig.at(MEMORY + 5, 1)[0] = different
    record = rig.run(
        lib.DSA_OPCODE_COMPARE,
        CRAV_RCR | lib.IDXD_OP_FLAG_CR,
        src_addr=MEMORY,
        src2_addr=MEMORY + 0x1000,
        xfer_size=64,
        expected_res=expected,
    )
    want = lib.DSA_COMP_SUCCESS if different == expected else lib.DSA_COMP_SUCCESS_PRED
    assert (record["status"], record["result"]) == (want, different)


@given(src=offsets, size=sizes, seed=st.integers(0, 2**32 - 1), from_memory=st.booleans(), copy=st.booleans())
def test_crc(shared: Rig, src: int, size: int, seed: int, from_memory: bool, copy: bool) -> None:
    """The CRC of a part continues the one given as its seed; a copy arrives."""
    scramble(shared, 3)
    data = shared.at(MEMORY + src, size).tobytes()
    fields = {"src_addr": MEMORY + src, "xfer_size": size, "crc_seed": seed}
    flags = CRAV_RCR
    if from_memory:
        shared.at(MEMORY + 0xA0004, 4)[:] = np.frombuffer(seed.to_bytes(4, "little"), np.uint8)
        fields |= {"crc_seed": 0, "seed_addr": MEMORY + 0xA0004}
        flags |= lib.DSA_CRC_FLAG_READ_SEED
    if copy:
        fields["dst_addr"] = MEMORY + 0x80003
    record = shared.run(lib.DSA_OPCODE_COPY_CRC if copy else lib.DSA_OPCODE_CRCGEN, flags, **fields)
    assert (record["status"], record["crc_val"]) == (lib.DSA_COMP_SUCCESS, crc(data, seed))
    if copy:
        assert shared.at(MEMORY + 0x80003, size).tobytes() == data


@pytest.mark.parametrize("opcode", [lib.DSA_OPCODE_CRCGEN, lib.DSA_OPCODE_COPY_CRC])
@pytest.mark.parametrize("offset", range(5))
def test_the_seed_in_memory_is_aligned(rig: Rig, opcode: int, offset: int) -> None:
    """To 4 bytes, where it is read at all."""
    copy = {"dst_addr": MEMORY + 0x1000} if opcode == lib.DSA_OPCODE_COPY_CRC else {}
    fields = copy | {"src_addr": MEMORY, "xfer_size": 8, "seed_addr": MEMORY + 0x2000 + offset}
    wanted = lib.DSA_COMP_ADDR_ALIGN if offset % 4 else lib.DSA_COMP_SUCCESS
    assert rig.run(opcode, CRAV_RCR | lib.DSA_CRC_FLAG_READ_SEED, **fields)["status"] == wanted
    assert rig.run(opcode, **fields)["status"] == lib.DSA_COMP_SUCCESS


def reverse(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2)


@pytest.mark.parametrize("size", [1, 8, 1023, 1024, 1025, 10000])
def test_crc_without_inversion_and_reflection(rig: Rig, size: int) -> None:
    """Flag bits 17 and 18, against the plain definition: a shift register fed from the high end."""
    data = scramble(rig, 4)[:size]

    def by_definition(seed: int, reflect_data: bool) -> int:
        register = seed
        for byte in data.tolist():
            register ^= (reverse(byte, 8) if reflect_data else byte) << 24
            for _ in range(8):
                register = (register << 1 ^ 0x11EDC6F41 * (register >> 31)) & 0xFFFFFFFF
        return register

    fields = {"src_addr": MEMORY, "xfer_size": size, "crc_seed": 0x12345678}
    no_inversion, no_reflection = lib.DSA_CRC_FLAG_BYPASS_INV_REF, lib.DSA_CRC_FLAG_BYPASS_DATA_REF
    record = rig.run(lib.DSA_OPCODE_CRCGEN, CRAV_RCR | no_inversion, **fields)
    assert record["crc_val"] == by_definition(0x12345678, reflect_data=True)
    record = rig.run(lib.DSA_OPCODE_CRCGEN, CRAV_RCR | no_inversion | no_reflection, **fields)
    assert record["crc_val"] == by_definition(0x12345678, reflect_data=False)
    record = rig.run(lib.DSA_OPCODE_CRCGEN, CRAV_RCR | no_reflection, **fields)
    inverted = reverse(0x12345678 ^ 0xFFFFFFFF, 32)
    assert record["crc_val"] == reverse(by_definition(inverted, reflect_data=False), 32) ^ 0xFFFFFFFF


@given(
    size=st.one_of(st.integers(0, 400), st.integers(0, 20000)),
    start=st.integers(0, 7),
    seed=st.integers(0, 99),
)
def test_crc32c_with_and_without_the_instruction(size: int, start: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, start + size, np.uint8)
    pointer = ffi.from_buffer("uint8_t[]", data)
    ways = (lib.dsa_crc32c, lib.dsa_crc32c_portable)
    got = {way(0xFFFFFFFF, pointer + start, size) ^ 0xFFFFFFFF for way in ways}
    assert got == {crc(data[start:].tobytes())}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"123456789", 0xE3069283),  # the check value of CRC-32/ISCSI
        (bytes(32), 0x8A9136AA),  # RFC 3720 B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc_vectors(rig: Rig, text: bytes, value: int) -> None:
    rig.at(MEMORY, len(text))[:] = np.frombuffer(text, np.uint8)
    assert rig.run(lib.DSA_OPCODE_CRCGEN, src_addr=MEMORY, xfer_size=len(text))["crc_val"] == value


def test_a_transfer_longer_than_a_turn(rig: Rig) -> None:
    """Several megabytes, over the same source page by page, in one descriptor each."""
    big = np.zeros(8 << 20, np.uint8)
    rig.bus.map(1 << 32, big)
    big[: 4 << 20] = np.random.default_rng(5).integers(0, 256, 4 << 20, np.uint8)
    size = (3 << 20) + 5
    for shift in (-3, 0x123457):  # overlapping downwards, and upwards
        want = big[0x1000 : 0x1000 + size].copy()
        record = rig.run(
            lib.DSA_OPCODE_MEMMOVE,
            src_addr=(1 << 32) + 0x1000,
            dst_addr=(1 << 32) + 0x1000 + shift,
            xfer_size=size,
        )
        assert record["status"] == lib.DSA_COMP_SUCCESS
        assert np.array_equal(big[0x1000 + shift : 0x1000 + shift + size], want)
    record = rig.run(lib.DSA_OPCODE_CRCGEN, src_addr=1 << 32, xfer_size=size)
    assert record["crc_val"] == crc(big[:size].tobytes())
    rig.run(lib.DSA_OPCODE_MEMFILL, pattern=0x0807060504030201, dst_addr=1 << 32, xfer_size=size)
    assert np.array_equal(big[:size], np.resize(np.arange(1, 9, dtype=np.uint8), size))
