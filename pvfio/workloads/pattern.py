"""The test patterns of Linux's dmatest, made and verified with numpy.

Bit 7 marks source bytes, bit 6 those to be copied, bit 5 destination bytes to be overwritten; the low five
bits are the inverse of the byte's index. A byte that is wrong therefore says how: not copied, copied where
nothing should be, or garbled. Nothing here looks at a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_REPORTED",
    "Mismatches",
    "fill_destination",
    "fill_source",
    "verify_destination",
    "verify_source",
]

SOURCE = 0x80
COPY = 0x40
OVERWRITE = 0x20
COUNT_MASK = 0x1F
MEMSET_INDEX = 0x01
MAX_REPORTED = 32  # mismatches described one by one, as dmatest does

_Bytes = NDArray[np.uint8]


@dataclass
class Mismatches:
    """Wrong bytes: how many, and the first ones in words."""

    count: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, other: Mismatches) -> None:
        """Takes another area's mismatches in."""
        self.count += other.count
        self.lines += other.lines[: MAX_REPORTED - len(self.lines)]


def _counter(start: int, size: int, memset: bool) -> _Bytes:
    """The low five bits for bytes ``start`` to ``start + size``."""
    if memset:
        return np.full(size, ~MEMSET_INDEX & COUNT_MASK, dtype=np.uint8)
    ramp = np.arange(start, start + 32, dtype=np.int64)
    period = (~ramp & COUNT_MASK).astype(np.uint8)
    return np.resize(period, size)


def fill_source(buffer: _Bytes, offset: int, length: int, *, memset: bool = False) -> None:
    """Writes the source pattern; bytes ``[offset, offset + length)`` are marked to be copied."""
    buffer[:] = _counter(0, buffer.size, memset)
    buffer |= SOURCE
    buffer[offset : offset + length] |= COPY


def fill_destination(buffer: _Bytes, offset: int, length: int, *, memset: bool = False) -> None:
    """Writes the destination pattern; bytes ``[offset, offset + length)`` are marked to be overwritten."""
    buffer[:] = _counter(0, buffer.size, memset)
    buffer[offset : offset + length] |= OVERWRITE


def _describe(index: int, actual: int, expected: int, *, source: bool) -> str:
    difference = actual ^ expected
    if source:
        what = "overwritten!"
    elif expected & COPY and difference & (COPY | OVERWRITE):
        what = "not copied!"
    elif difference & SOURCE:
        what = "was copied!"
    else:
        what = "mismatch!"
    name = "srcbuf" if source else "dstbuf"
    return f"{name}[{index:#x}] {what} Expected {expected:02x}, got {actual:02x}"


def _compare(actual: _Bytes, expected: _Bytes, start: int, *, source: bool) -> Mismatches:
    if np.array_equal(actual, expected):
        return Mismatches()
    wrong = np.flatnonzero(actual != expected)
    lines = [
        _describe(start + int(i), int(actual[i]), int(expected[i]), source=source)
        for i in wrong[:MAX_REPORTED]
    ]
    return Mismatches(int(wrong.size), lines)


def verify_source(buffer: _Bytes, offset: int, length: int, *, memset: bool = False) -> Mismatches:
    """Checks that every byte of a source is as ``fill_source`` left it."""
    expected = np.empty(buffer.size, dtype=np.uint8)
    fill_source(expected, offset, length, memset=memset)
    return _compare(buffer, expected, 0, source=True)


def verify_destination(
    buffer: _Bytes, offset: int, length: int, source_offset: int, *, memset: bool = False
) -> Mismatches:
    """Checks every byte of a destination: the source's bytes inside the copied range, the old pattern
    around it.
    """
    expected = _counter(0, buffer.size, memset)
    expected[offset : offset + length] = _counter(source_offset, length, memset) | (SOURCE | COPY)
    return _compare(buffer, expected, 0, source=False)
