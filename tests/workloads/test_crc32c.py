"""CRC-32C against published values and an independent library."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.workloads.crc32c import crc32c, crc32c_combine
from tests.profiles import tries

# RFC 3720 appendix B.4, and the check value of the CRC catalogue.
VECTORS = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
]


@pytest.mark.parametrize(("data", "value"), VECTORS)
def test_published_vectors(data: bytes, value: int) -> None:
    assert crc32c(data) == value


SIZES = st.one_of(
    st.integers(0, 100), st.integers(16_000, 17_000), st.integers(1 << 19, (1 << 21) + 40), st.just(1 << 20)
)


@settings(max_examples=tries(60), deadline=None)
@given(SIZES, st.integers(0, 2**32 - 1), st.data())
def test_agrees_with_a_library_whole_chained_and_combined(size: int, seed: int, data: st.DataObject) -> None:
    block = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    cut = data.draw(st.integers(0, size))
    expected = google_crc32c.value(block.tobytes())
    assert crc32c(block) == expected
    assert crc32c(block[cut:], crc32c(block[:cut])) == expected
    assert crc32c_combine(crc32c(block[:cut]), crc32c(block[cut:]), size - cut) == expected


def test_takes_any_buffer_and_a_strided_view() -> None:
    block = np.arange(200, dtype=np.uint8)
    assert crc32c(memoryview(block.tobytes())) == crc32c(block.tobytes()) == crc32c(bytearray(block))
    assert crc32c(block[::2]) == google_crc32c.value(block[::2].tobytes())
