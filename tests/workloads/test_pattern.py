"""The patterns find every kind of wrong byte, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from pvfio.workloads import pattern
from pvfio.workloads.pattern import fill_destination, fill_source, verify_destination, verify_source

SIZE, SRC, DST, LENGTH = 4096, 100, 333, 1000


def copied(memset: bool) -> tuple[np.ndarray, np.ndarray]:
    source, destination = np.empty(SIZE, np.uint8), np.empty(SIZE, np.uint8)
    fill_source(source, SRC, LENGTH, memset=memset)
    fill_destination(destination, DST, LENGTH, memset=memset)
    destination[DST : DST + LENGTH] = source[SRC] if memset else source[SRC : SRC + LENGTH]
    return source, destination


@pytest.mark.parametrize("memset", [False, True])
def test_a_right_copy_has_no_mismatch(memset: bool) -> None:
    source, destination = copied(memset)
    assert verify_source(source, SRC, LENGTH, memset=memset).count == 0
    assert verify_destination(destination, DST, LENGTH, SRC, memset=memset).count == 0


@pytest.mark.parametrize("memset", [False, True])
def test_every_single_wrong_byte_is_found(memset: bool) -> None:
    source, destination = copied(memset)
    for index in range(0, SIZE, 7):
        for buffer in (source, destination):
            buffer[index] ^= 0x10
        assert verify_source(source, SRC, LENGTH, memset=memset).count == 1
        assert verify_destination(destination, DST, LENGTH, SRC, memset=memset).count == 1
        for buffer in (source, destination):
            buffer[index] ^= 0x10


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (DST, 0x20, "not copied!"),
        (DST - 1, 0xC0, "was copied!"),
        (DST + LENGTH, 0xFF, "was copied!"),
        (DST + 1, 0xC0 | (~(SRC + 2) & 0x1F), "mismatch!"),
    ],
)
def test_a_wrong_byte_says_how_it_is_wrong(index: int, value: int, words: str) -> None:
    _, destination = copied(False)
    destination[index] = value
    found = verify_destination(destination, DST, LENGTH, SRC)
    assert found.count == 1
    assert f"dstbuf[{index:#x}] {words} Expected" in found.lines[0]
    assert found.lines[0].endswith(f"got {value:02x}")


def test_an_untouched_destination_is_all_not_copied_and_only_the_first_are_described() -> None:
    destination = np.empty(SIZE, np.uint8)
    fill_destination(destination, DST, LENGTH)
    found = verify_destination(destination, DST, LENGTH, SRC)
    assert found.count == LENGTH
    assert len(found.lines) == pattern.MAX_REPORTED
    assert all("not copied!" in line for line in found.lines)


def test_a_source_that_was_written_is_reported() -> None:
    source, _ = copied(False)
    source[5] = 0
    assert verify_source(source, SRC, LENGTH).lines == [
        f"srcbuf[0x5] overwritten! Expected {0x80 | 0x1A:02x}, got 00"
    ]
