"""Checksums of many blocks of a buffer: CRC-32C at once, the others by hashlib and zlib block by block.

Names and numbers are fio's (``verify=``). CRC-32C, MD5 and SHA-3 are where and what fio has, so that each checks
what the other wrote; of CRC-32, SHA-1 and SHA-2 fio keeps unfinished values, pvfio the standard's.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pvfio.abi import ffi, lib

__all__ = ["CHECKSUMS", "Checksum", "crc32c_of", "fill_random"]

_U64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Checksum:
    """``number`` in the header, ``size`` of the digest in bytes, and ``of(buffer, starts, lengths)``: the digests of
    blocks in a buffer of bytes, uint8 of shape (n, size).
    """

    number: int
    size: int
    of: Callable[[NDArray[np.uint8], _U64, _U64], NDArray[np.uint8]]


def _pointer(kind: str, array: NDArray[Any]) -> Any:
    return ffi.cast(kind, ffi.from_buffer(array))


def crc32c_of(buffer: NDArray[np.uint8], starts: _U64, lengths: _U64) -> NDArray[np.uint32]:
    """The CRC-32C register after each block, begun with all ones and not inverted, as fio keeps it."""
    starts, lengths = np.ascontiguousarray(starts), np.ascontiguousarray(lengths)
    crc = np.zeros(len(starts), dtype=np.uint32)
    lib.pv_fio_crc32c(
        _pointer("uint8_t *", buffer),
        _pointer("uint64_t *", starts),
        _pointer("uint64_t *", lengths),
        len(starts),
        _pointer("uint32_t *", crc),
    )
    return crc


def fill_random(buffer: NDArray[np.uint8], starts: _U64, lengths: _U64, seeds: _U64) -> None:
    """Fills each block with bytes that its seed decides."""
    starts, lengths, seeds = (np.ascontiguousarray(array) for array in (starts, lengths, seeds))
    lib.pv_fio_fill(
        _pointer("uint8_t *", buffer),
        _pointer("uint64_t *", starts),
        _pointer("uint64_t *", lengths),
        _pointer("uint64_t *", seeds),
        len(starts),
    )


def _crc32c(buffer: NDArray[np.uint8], starts: _U64, lengths: _U64) -> NDArray[np.uint8]:
    return crc32c_of(buffer, starts, lengths).view(np.uint8).reshape(-1, 4)


def _each(size: int, digest: Callable[[memoryview], bytes]) -> Callable[..., NDArray[np.uint8]]:
    def of(buffer: NDArray[np.uint8], starts: _U64, lengths: _U64) -> NDArray[np.uint8]:
        view = memoryview(np.asarray(buffer).data)
        parts = [digest(view[s : s + n]) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
        return np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(-1, size)

    return of


def _hash(name: str, number: int) -> Checksum:
    size = hashlib.new(name, usedforsecurity=False).digest_size
    return Checksum(
        number, size, _each(size, lambda data: hashlib.new(name, data, usedforsecurity=False).digest())
    )


CHECKSUMS: Final[dict[str, Checksum]] = {
    "crc32c": Checksum(5, 4, _crc32c),
    "crc32": Checksum(4, 4, _each(4, lambda data: zlib.crc32(data).to_bytes(4, "little"))),
    "md5": _hash("md5", 2),
    "sha256": _hash("sha256", 9),
    "sha512": _hash("sha512", 10),
    "sha3-224": _hash("sha3_224", 11),
    "sha3-256": _hash("sha3_256", 12),
    "sha3-384": _hash("sha3_384", 13),
    "sha3-512": _hash("sha3_512", 14),
    "sha1": _hash("sha1", 16),
}
"""The checksums by fio's names; "meta" has a header only, "pattern" not even that."""
