"""CRC-32C (Castagnoli) in numpy: what a device's CRC is checked against.

It shares nothing with any device: bytes are cut into many equal lanes, all lanes advance together through
256-entry tables, eight bytes a step, and the lanes' values are joined by the GF(2) operator that appends a
known number of zero bytes. About 0.3 GB/s; small inputs take the plain table.

The CRC is the one of RFC 3720 (iSCSI) section 12.1 and Intel DSA with no CRC flags: reflected, initial
value and final exclusive-or all ones. It does not offer the bypass variants of DSA's CRC flags.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["crc32c", "crc32c_combine"]

_POLYNOMIAL = 0x82F63B78  # 0x1EDC6F41, bits reversed
_LANES = 2048
_WORD = 8
_BLOCK = 1 << 20  # bytes that go through the lanes at a time: 512 a lane

_U32 = NDArray[np.uint32]


@cache
def _tables() -> tuple[_U32, ...]:
    """Table k gives what a byte contributes after k more zero bytes."""
    first = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = np.where(first & 1, (first >> 1) ^ np.uint32(_POLYNOMIAL), first >> 1).astype(np.uint32)
    tables = [first]
    for _ in range(_WORD - 1):
        last = tables[-1]
        tables.append((last >> 8) ^ first[last & 0xFF])
    return tuple(tables)


@cache
def _byte_table() -> tuple[int, ...]:
    return tuple(int(value) for value in _tables()[0])


def _matrix_times(matrix: tuple[int, ...], value: int) -> int:
    result = 0
    for row in matrix:
        if not value:
            break
        if value & 1:
            result ^= row
        value >>= 1
    return result


@cache
def _append_zeros(power: int) -> tuple[int, ...]:
    """The 32x32 GF(2) matrix that appends ``2 ** power`` zero bits, as the image of each bit."""
    if power == 0:
        return (_POLYNOMIAL, *(1 << bit for bit in range(31)))
    half = _append_zeros(power - 1)
    return tuple(_matrix_times(half, row) for row in half)


def _shift(crc: int, nbytes: int) -> int:
    """``crc`` (a raw register) after ``nbytes`` zero bytes."""
    bits = nbytes * 8
    power = 0
    while bits:
        if bits & 1:
            crc = _matrix_times(_append_zeros(power), crc)
        bits >>= 1
        power += 1
    return crc


@cache
def _shift_tables(nbytes: int) -> tuple[_U32, ...]:
    """The operator that appends ``nbytes`` zero bytes, as one table for each byte of the register."""
    images = [_shift(1 << bit, nbytes) for bit in range(32)]
    tables = []
    for byte in range(4):
        table = np.zeros(256, dtype=np.uint32)
        for bit in range(8):
            table[np.arange(256) >> bit & 1 == 1] ^= np.uint32(images[byte * 8 + bit])
        tables.append(table)
    return tuple(tables)


def _lanes(block: NDArray[np.uint8]) -> int:
    """The raw register (initial value 0) of a block of ``_LANES * k * 8`` bytes."""
    length = block.size // _LANES
    words = np.ascontiguousarray(block.reshape(_LANES, length // _WORD, _WORD).transpose(1, 2, 0))
    tables = _tables()
    crc: _U32 = np.zeros(_LANES, dtype=np.uint32)
    for word in words:
        low = crc.view(np.uint8).reshape(_LANES, 4)
        crc = tables[7].take(word[0] ^ low[:, 0])
        for byte in range(1, 4):
            crc ^= tables[7 - byte].take(word[byte] ^ low[:, byte])
        for byte in range(4, _WORD):
            crc ^= tables[7 - byte].take(word[byte])
    while crc.size > 1:
        left = np.ascontiguousarray(crc[0::2]).view(np.uint8).reshape(-1, 4)
        right = crc[1::2].copy()
        for byte, table in enumerate(_shift_tables(length)):
            right ^= table.take(left[:, byte])
        crc, length = right, length * 2
    return int(crc[0])


def _bytes_of(data: Any) -> NDArray[np.uint8]:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(data, dtype=np.uint8)


def crc32c(data: Any, crc: int = 0) -> int:
    """The CRC-32C of ``data`` (anything with a contiguous buffer), going on from ``crc`` of the bytes
    before it.
    """
    array = _bytes_of(data)
    register = crc ^ 0xFFFFFFFF
    done = 0
    step = _LANES * _WORD
    while array.size - done >= step:
        size = min(_BLOCK, (array.size - done) // step * step)
        register = _shift(register, size) ^ _lanes(array[done : done + size])
        done += size
    table = _byte_table()
    for byte in array[done:].tolist():
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def crc32c_combine(first: int, second: int, second_size: int) -> int:
    """The CRC-32C of two pieces one after the other, from their CRCs and the second one's size in bytes."""
    return _shift(first, second_size) ^ second
