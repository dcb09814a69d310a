"""CRC-32C: each of the ways to compute it against a library, whatever this processor would choose."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import ffi, lib

pytestmark = pytest.mark.touches_c

WAYS = [
    pytest.param("dsa_crc32c", 1),
    pytest.param("dsa_crc32c_portable", 1),
    pytest.param(
        "dsa_crc32c_streams",
        1,
        marks=pytest.mark.skipif(not lib.dsa_crc32c_has_streams(), reason="no SSE4.2 and PCLMULQDQ"),
    ),
    pytest.param(
        "dsa_crc32c_fold",
        256,
        marks=pytest.mark.skipif(not lib.dsa_crc32c_can_fold(), reason="no AVX-512 and VPCLMULQDQ"),
    ),
]
NOISE = np.random.default_rng(5).integers(0, 256, 40_000, dtype=np.uint8)


@pytest.mark.parametrize(("way", "unit"), WAYS)
@given(start=st.integers(0, 300), size=st.integers(1, 39_000), seed=st.binary(max_size=40))
def test_against_a_library(way: str, unit: int, start: int, size: int, seed: bytes) -> None:
    """``seed`` is data that came before; the functions neither begin nor end with an inversion."""
    data = NOISE[start : start + max(unit, size // unit * unit)]
    before = google_crc32c.value(seed)
    crc = getattr(lib, way)(before ^ 0xFFFF_FFFF, ffi.from_buffer("uint8_t[]", data), len(data))
    assert crc ^ 0xFFFF_FFFF == google_crc32c.extend(before, data.tobytes())


@pytest.mark.parametrize(("way", "unit"), WAYS)
@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_published_vectors(way: str, unit: int, data: bytes, crc: int) -> None:
    """RFC 3720 B.4, and the catalogue's check value. Where the way needs more bytes, zeros ahead of a zero state."""
    if unit == 1:
        assert getattr(lib, way)(0xFFFF_FFFF, data, len(data)) ^ 0xFFFF_FFFF == crc
        return
    # Leading zeros change nothing in a state of zero, so the inverted seed is put into the data instead.
    seeded = bytes(a ^ b for a, b in zip(data, b"\xff" * 4 + bytes(len(data)), strict=False))
    padded = bytes(unit - len(seeded)) + seeded
    assert getattr(lib, way)(0, padded, unit) ^ 0xFFFF_FFFF == crc
