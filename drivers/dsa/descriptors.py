"""Descriptors, one or many at a time: numpy arrays of ``struct dsa_hw_desc``.

Each helper takes scalars or arrays, broadcast against each other, and returns (or fills, with ``out``) a
one-dimensional array. Addresses are IOVAs: integers, arrays of integers, or a DMA buffer, which means its
first byte. The completion address, the completion flags and the interrupt handle are the work queue's
business and are left zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pvfio.abi import dtype_of, lib

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Address",
    "address_of",
    "compare",
    "copy_crc",
    "crcgen",
    "drain",
    "empty",
    "fill",
    "join",
    "memmove",
    "noop",
    "pattern_of",
    "words_of",
]

Address: TypeAlias = "int | np.ndarray[Any, Any]"
"""An IOVA, or a mapped DMA buffer or a contiguous part of one (its first byte)."""


def empty(count: int) -> NDArray[Any]:
    """``count`` descriptors of zeros (that is: NOOPs without a completion record)."""
    return np.zeros(count, dtype=dtype_of("struct dsa_hw_desc"))


def join(*arrays: NDArray[Any]) -> NDArray[Any]:
    """Descriptor arrays one after the other (``np.concatenate`` would lay the structure out anew)."""
    out = empty(sum(len(array) for array in arrays))
    start = 0
    for array in arrays:
        words_of(out)[start : start + len(array)] = words_of(array)
        start += len(array)
    return out


def words_of(array: NDArray[Any]) -> NDArray[np.uint64]:
    """A structure array as words, one row each: numpy copies words many times faster than structures.

    A view where the array is contiguous, else of a copy.
    """
    rows: NDArray[np.uint64] = np.ascontiguousarray(array).view(np.uint64)
    return rows.reshape(len(array), array.dtype.itemsize // 8)


def address_of(where: Address, size: int = 0) -> int:
    """The IOVA of ``where``: itself, or a mapped buffer's first byte.

    ``ValueError`` for a buffer that is not mapped, not contiguous, or shorter than ``size`` bytes.
    """
    if not isinstance(where, np.ndarray):
        return int(where)
    iova = getattr(where, "iova", None)
    if iova is None:
        raise ValueError("the buffer has no IOVA: map it first (and give a contiguous part of it)")
    if not where.flags.c_contiguous:
        raise ValueError("the buffer is not contiguous")
    if size > where.nbytes:
        raise ValueError(f"the buffer has {where.nbytes} bytes, {size} are asked for")
    return int(iova)


def pattern_of(pattern: int | bytes) -> int:
    """FILL's 8-byte pattern: an integer below 2**64 (little endian), or 1, 2, 4 or 8 bytes, repeated."""
    if isinstance(pattern, int):
        if not 0 <= pattern < 1 << 64:
            raise ValueError(f"a pattern has 64 bits, {pattern:#x} has more or is negative")
        return pattern
    if len(pattern) not in (1, 2, 4, 8):
        raise ValueError(f"a pattern has 1, 2, 4 or 8 bytes, not {len(pattern)}")
    return int.from_bytes(pattern * (8 // len(pattern)), "little")


def _array(value: Any) -> Any:
    return (
        address_of(value) if getattr(value, "iova", None) is not None else np.asarray(value, dtype=np.uint64)
    )


def _build(opcode: int, flags: ArrayLike, out: NDArray[Any] | None, **fields: Any) -> NDArray[Any]:
    values = {name: np.asarray(_array(value), dtype=np.uint64) for name, value in fields.items()}
    words = np.asarray(flags, dtype=np.uint32)
    if np.any(words & ~np.uint32(lib.DSA_DESC_FLAGS_MASK)):
        raise ValueError("flags have 24 bits")
    shape = np.broadcast_shapes(words.shape, *(value.shape for value in values.values()))
    if len(shape) > 1:
        raise ValueError("descriptors are one-dimensional")
    if out is None:
        out = empty(shape[0] if shape else 1)
    else:
        out[:] = np.zeros((), dtype=out.dtype)
    out["flags_opcode"] = words | np.uint32(opcode << lib.DSA_DESC_OPCODE_SHIFT)
    for name, value in values.items():
        out[name] = value
    return out


def noop(count: int = 1, *, flags: ArrayLike = 0, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """NOOP, ``count`` times."""
    return _build(lib.DSA_OPCODE_NOOP, np.broadcast_to(np.asarray(flags), (count,)), out)


def drain(*, flags: ArrayLike = 0, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """DRAIN: completes when every descriptor submitted to the WQ before it has completed. Not allowed in a
    batch.
    """
    return _build(lib.DSA_OPCODE_DRAIN, flags, out)


def memmove(
    dst: Any, src: Any, size: ArrayLike, *, flags: ArrayLike = 0, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """MEMMOVE of ``size`` bytes from ``src`` to ``dst``."""
    return _build(lib.DSA_OPCODE_MEMMOVE, flags, out, src_addr=src, dst_addr=dst, xfer_size=size)


def fill(
    dst: Any, pattern: Any, size: ArrayLike, *, flags: ArrayLike = 0, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """FILL of ``size`` bytes at ``dst`` with an 8-byte pattern (integers; see :func:`pattern_of` for
    bytes).
    """
    if isinstance(pattern, bytes):
        pattern = pattern_of(pattern)
    return _build(lib.DSA_OPCODE_MEMFILL, flags, out, pattern=pattern, dst_addr=dst, xfer_size=size)


def compare(
    first: Any, second: Any, size: ArrayLike, *, flags: ArrayLike = 0, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """COMPARE of ``size`` bytes; the record's result is 1 where they differ, at offset bytes_completed."""
    return _build(lib.DSA_OPCODE_COMPARE, flags, out, src_addr=first, src2_addr=second, xfer_size=size)


def crcgen(
    src: Any, size: ArrayLike, *, seed: ArrayLike = 0, flags: ArrayLike = 0, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """CRCGEN: CRC-32C of ``size`` bytes, going on from ``seed`` (the CRC of the bytes before)."""
    return _build(lib.DSA_OPCODE_CRCGEN, flags, out, src_addr=src, xfer_size=size, crc_seed=seed)


def copy_crc(
    dst: Any,
    src: Any,
    size: ArrayLike,
    *,
    seed: ArrayLike = 0,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """COPY_CRC: copies ``size`` bytes and gives their CRC-32C."""
    fields = {"src_addr": src, "dst_addr": dst, "xfer_size": size, "crc_seed": seed}
    return _build(lib.DSA_OPCODE_COPY_CRC, flags, out, **fields)
