"""Protection information in numpy: what a device's DIF operations are checked against.

The guard is the CRC of SCSI SBC-3 and T10: polynomial 0x8bb7, high bit first. All blocks are computed at once:
what each byte of a block contributes to its CRC depends on nothing but its place, and is looked up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIELD", "crc16_t10", "fields", "join", "split"]

FIELD = np.dtype([("guard", ">u2"), ("app", ">u2"), ("ref", ">u4")])

_POLYNOMIAL = 0x8BB7
_Bytes = NDArray[np.uint8]


@cache
def _byte_table() -> NDArray[np.uint16]:
    table = np.arange(256, dtype=np.uint32) << 8
    for _ in range(8):
        table = np.where(table & 0x8000, table << 1 ^ _POLYNOMIAL, table << 1) & 0xFFFF
    return table.astype(np.uint16)


@cache
def _contributions(size: int) -> NDArray[np.uint16]:
    """What byte value v at place p of a block adds to the CRC: shape ``(size, 256)``."""
    base = _byte_table()
    table = np.empty((size, 256), np.uint16)
    table[size - 1] = base
    for place in range(size - 2, -1, -1):
        later = table[place + 1]
        table[place] = (later << 8) ^ base[later >> 8]
    return table


def crc16_t10(blocks: _Bytes, seed: int = 0) -> NDArray[np.uint16]:
    """The CRC of each block; ``blocks`` has shape ``(count, bytes)``, at least two bytes a block."""
    count, size = blocks.shape
    table = _contributions(size)
    crc: NDArray[np.uint16] = np.zeros(count, np.uint16)
    for first in range(0, size, 512):  # the looked-up values of some hundred bytes at a time
        places = np.arange(first, min(first + 512, size))
        crc ^= np.bitwise_xor.reduce(table[places, blocks[:, places]], axis=1)
    # A seed is as if the first two bytes were different.
    crc ^= table[0][seed >> 8] ^ table[1][seed & 0xFF]
    return crc


def fields(
    data: _Bytes,
    *,
    ref: int,
    app: int,
    app_mask: int = 0,
    fixed_ref: bool = False,
    incrementing_app: bool = False,
    invert_crc_seed: bool = False,
    invert_crc_result: bool = False,
) -> NDArray[Any]:
    """The field of each block of ``data`` (shape ``(count, bytes)``), as an array of ``FIELD``."""
    number = np.arange(len(data), dtype=np.uint64)
    out = np.zeros(len(data), FIELD)
    guard = crc16_t10(data, 0xFFFF if invert_crc_seed else 0)
    out["guard"] = guard ^ np.uint16(0xFFFF if invert_crc_result else 0)
    out["app"] = (np.uint64(app) + number * np.uint64(incrementing_app)) & np.uint64(0xFFFF & ~app_mask)
    out["ref"] = (np.uint64(ref) + number * np.uint64(not fixed_ref)) & np.uint64(0xFFFFFFFF)
    return out


def join(data: _Bytes, field: NDArray[Any]) -> _Bytes:
    """Blocks with their fields behind them, shape ``(count, bytes + 8)``."""
    return np.hstack([data, field.view(np.uint8).reshape(len(data), FIELD.itemsize)])


def split(protected: _Bytes) -> tuple[_Bytes, NDArray[Any]]:
    """Data and fields of protected blocks."""
    end = protected.shape[1] - FIELD.itemsize
    return protected[:, :end], np.ascontiguousarray(protected[:, end:]).view(FIELD)[:, 0]
