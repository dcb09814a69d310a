"""Descriptors of COMPVAL, delta records, DUALCAST, TRANSL_FETCH and CFLUSH, one or many at a time.

As in ``descriptors``: scalars or arrays, broadcast against each other; addresses are IOVAs or DMA buffers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvfio.abi import lib
from pvfio.drivers.dsa.descriptors_build import build, pattern_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["apply_delta", "cflush", "compval", "create_delta", "dualcast", "transl_fetch"]


def compval(
    src: Any,
    pattern: Any,
    size: ArrayLike,
    *,
    expected_result: ArrayLike = 0,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """COMPVAL of ``size`` bytes with an 8-byte pattern (integers, or bytes as ``pattern_of`` has them); the
    record's result is 1 where they differ, at offset bytes_completed.

    ``expected_result`` counts with the flag IDXD_OP_FLAG_CR: another result is DSA_COMP_SUCCESS_PRED.
    """
    if isinstance(pattern, bytes):
        pattern = pattern_of(pattern)
    fields = {"src_addr": src, "comp_pattern": pattern, "xfer_size": size, "expected_res": expected_result}
    return build(lib.DSA_OPCODE_COMPVAL, flags, out, **fields)


def create_delta(
    first: Any,
    second: Any,
    delta: Any,
    size: ArrayLike,
    max_delta_size: ArrayLike,
    *,
    expected_results: ArrayLike = 0,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """CR_DELTA: what makes ``second`` out of ``first``, at ``delta``; the record's ``delta_rec_size`` is its size
    in bytes, its result 0: equal, 1: complete, 2: no room after bytes_completed.

    ``expected_results`` has a bit for each result and counts with the flag IDXD_OP_FLAG_CR.
    """
    fields = {"src_addr": first, "src2_addr": second, "delta_addr": delta, "xfer_size": size}
    fields |= {"max_delta_size": max_delta_size, "expected_res_mask": expected_results}
    return build(lib.DSA_OPCODE_CR_DELTA, flags, out, **fields)


def apply_delta(
    dst: Any,
    delta: Any,
    delta_size: ArrayLike,
    size: ArrayLike,
    *,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """AP_DELTA: applies ``delta_size`` bytes of a delta record to the ``size`` bytes at ``dst``."""
    fields = {"src_addr": delta, "dst_addr": dst, "delta_rec_size": delta_size, "xfer_size": size}
    return build(lib.DSA_OPCODE_AP_DELTA, flags, out, **fields)


def dualcast(
    dst1: Any,
    dst2: Any,
    src: Any,
    size: ArrayLike,
    *,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """DUALCAST: copies ``size`` bytes to two places, whose addresses have bits 11:0 in common."""
    fields = {"src_addr": src, "dst_addr": dst1, "dest2": dst2, "xfer_size": size}
    return build(lib.DSA_OPCODE_DUALCAST, flags, out, **fields)


def transl_fetch(
    addr: Any,
    size: ArrayLike,
    *,
    stride: ArrayLike = 0,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """TRANSL_FETCH: fetches the translations of ``size`` bytes. ``stride`` (bytes between the addresses asked for)
    counts with the flag DSA_TRANSL_FETCH_FLAG_STRIDE; without it each page is asked for.
    """
    fields = {"transl_fetch_addr": addr, "region_size": size, "region_stride": stride}
    return build(lib.DSA_OPCODE_TRANSL_FETCH, flags, out, **fields)


def cflush(
    dst: Any, size: ArrayLike, *, flags: ArrayLike = 0, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """CFLUSH: writes the cache lines of ``size`` bytes back."""
    return build(lib.DSA_OPCODE_CFLUSH, flags, out, dst_addr=dst, xfer_size=size)
