"""The protection information that DIF operations are verified against, itself against published values and
plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.workloads import dif_reference
from pvfio.workloads.dif_reference import crc16_t10, fields, join, split
from tests.profiles import tries


def bit_by_bit(data: bytes, crc: int = 0) -> int:
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x8BB7 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


# The check value of the CRC catalogue, and SBC-3 table "CRC test cases".
VECTORS = [
    (b"123456789", 0xD0DB),
    (bytes(32), 0x0000),
    (b"\xff" * 32, 0xA293),
    (bytes(range(32)), 0x0224),
    (b"\xff\xff" + bytes(30), 0x21B8),
    (bytes(range(0xFF, 0xDF, -1)), 0xA0B7),
]


@pytest.mark.parametrize(("data", "value"), VECTORS)
def test_published_vectors(data: bytes, value: int) -> None:
    assert bit_by_bit(data) == value
    assert crc16_t10(np.frombuffer(data, np.uint8)[None])[0] == value


@settings(max_examples=tries(30), deadline=None)
@given(
    st.sampled_from([2, 3, 511, 512, 513, 520]),
    st.integers(1, 4),
    st.integers(0, 0xFFFF),
    st.integers(0, 999),
)
def test_many_blocks_and_seeds(size: int, count: int, seed: int, number: int) -> None:
    blocks = np.random.default_rng(number).integers(0, 256, (count, size), dtype=np.uint8)
    assert crc16_t10(blocks, seed).tolist() == [bit_by_bit(block.tobytes(), seed) for block in blocks]


def test_fields() -> None:
    data = np.zeros((3, 512), np.uint8)
    plain = fields(data, ref=0xFFFFFFFF, app=0xFFFF)
    assert plain.tolist() == [(0, 0xFFFF, 0xFFFFFFFF), (0, 0xFFFF, 0), (0, 0xFFFF, 1)]
    assert plain.tobytes()[:8] == b"\0\0\xff\xff\xff\xff\xff\xff"
    other = fields(
        data,
        ref=7,
        app=0xFFFF,
        app_mask=0x00FF,
        fixed_ref=True,
        incrementing_app=True,
        invert_crc_result=True,
    )
    assert other.tolist() == [(0xFFFF, 0xFF00, 7), (0xFFFF, 0, 7), (0xFFFF, 0, 7)]
    seeded = fields(data, ref=0, app=0, invert_crc_seed=True)
    assert seeded["guard"].tolist() == [bit_by_bit(bytes(512), 0xFFFF)] * 3
    again, found = split(join(data, other))
    assert (again == data).all()
    assert (found == other).all()
    assert dif_reference.FIELD.itemsize == 8
