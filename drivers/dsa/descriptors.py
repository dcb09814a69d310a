"""Descriptors, one or many at a time: numpy arrays of ``struct dsa_hw_desc``.

Each helper takes scalars or arrays, broadcast against each other, and returns (or fills, with ``out``) a
one-dimensional array. Addresses are IOVAs: integers, arrays of integers, or a DMA buffer, which means its
first byte. The completion address, the completion flags and the interrupt handle are the work queue's
business and are left zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pvfio.abi import lib
from pvfio.drivers.dsa.descriptors_build import (
    Address,
    address_of,
    build,
    empty,
    join,
    pattern_of,
    words_of,
)
from pvfio.drivers.dsa.descriptors_delta import (
    apply_delta,
    cflush,
    compval,
    create_delta,
    dualcast,
    transl_fetch,
)
from pvfio.drivers.dsa.descriptors_dif import dif_check, dif_insert, dif_strip, dif_update, dix_generate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Address",
    "address_of",
    "apply_delta",
    "cflush",
    "compare",
    "compval",
    "copy_crc",
    "crcgen",
    "create_delta",
    "dif_check",
    "dif_insert",
    "dif_strip",
    "dif_update",
    "dix_generate",
    "drain",
    "dualcast",
    "empty",
    "fill",
    "join",
    "memmove",
    "noop",
    "pattern_of",
    "transl_fetch",
    "words_of",
]


def noop(count: int = 1, *, flags: ArrayLike = 0, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """NOOP, ``count`` times."""
    return build(lib.DSA_OPCODE_NOOP, np.broadcast_to(np.asarray(flags), (count,)), out)


def drain(*, flags: ArrayLike = 0, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """DRAIN: completes when every descriptor submitted to the WQ before it has completed. Not allowed in a
    batch.
    """
    return build(lib.DSA_OPCODE_DRAIN, flags, out)


def memmove(
    dst: Any, src: Any, size: ArrayLike, *, flags: ArrayLike = 0, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """MEMMOVE of ``size`` bytes from ``src`` to ``dst``."""
    return build(lib.DSA_OPCODE_MEMMOVE, flags, out, src_addr=src, dst_addr=dst, xfer_size=size)


def fill(
    dst: Any, pattern: Any, size: ArrayLike, *, flags: ArrayLike = 0, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """FILL of ``size`` bytes at ``dst`` with an 8-byte pattern (integers; see :func:`pattern_of` for
    bytes).
    """
    if isinstance(pattern, bytes):
        pattern = pattern_of(pattern)
    return build(lib.DSA_OPCODE_MEMFILL, flags, out, pattern=pattern, dst_addr=dst, xfer_size=size)


def compare(
    first: Any, second: Any, size: ArrayLike, *, flags: ArrayLike = 0, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """COMPARE of ``size`` bytes; the record's result is 1 where they differ, at offset bytes_completed."""
    return build(lib.DSA_OPCODE_COMPARE, flags, out, src_addr=first, src2_addr=second, xfer_size=size)


def crcgen(
    src: Any, size: ArrayLike, *, seed: ArrayLike = 0, flags: ArrayLike = 0, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """CRCGEN: CRC-32C of ``size`` bytes, going on from ``seed`` (the CRC of the bytes before)."""
    return build(lib.DSA_OPCODE_CRCGEN, flags, out, src_addr=src, xfer_size=size, crc_seed=seed)


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
    return build(lib.DSA_OPCODE_COPY_CRC, flags, out, **fields)
