"""Descriptors of the DIF operations, one or many at a time.

Sizes are bytes of the source. One format holds for all of an array; ``ref_tag`` (an array, as the rest) gives every
descriptor a reference tag of its own in place of the format's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvfio.abi import lib
from pvfio.drivers.dsa.descriptors_build import build
from pvfio.drivers.dsa.dif import DifFormat

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["dif_check", "dif_insert", "dif_strip", "dif_update", "dix_generate"]


def _fields(fields: dict[str, int], **ref_tags: ArrayLike | None) -> dict[str, Any]:
    return fields | {name: value for name, value in ref_tags.items() if value is not None}


def dif_check(
    src: Any,
    size: ArrayLike,
    fmt: DifFormat,
    *,
    ref_tag: ArrayLike | None = None,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """DIF_CHECK of ``size`` bytes of protected blocks."""
    fields = _fields(fmt.check_fields(), chk_ref_tag_seed=ref_tag)
    return build(lib.DSA_OPCODE_DIF_CHECK, flags, out, src_addr=src, xfer_size=size, **fields)


def dif_strip(
    dst: Any,
    src: Any,
    size: ArrayLike,
    fmt: DifFormat,
    *,
    ref_tag: ArrayLike | None = None,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """DIF_STRP: checks ``size`` bytes of protected blocks and copies their data."""
    fields = _fields(fmt.check_fields(), chk_ref_tag_seed=ref_tag)
    return build(lib.DSA_OPCODE_DIF_STRP, flags, out, src_addr=src, dst_addr=dst, xfer_size=size, **fields)


def dif_insert(
    dst: Any,
    src: Any,
    size: ArrayLike,
    fmt: DifFormat,
    *,
    ref_tag: ArrayLike | None = None,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """DIF_INS: copies ``size`` bytes of data and adds a field to every block."""
    fields = _fields(fmt.insert_fields(), ins_ref_tag_seed=ref_tag)
    return build(lib.DSA_OPCODE_DIF_INS, flags, out, src_addr=src, dst_addr=dst, xfer_size=size, **fields)


def dif_update(
    dst: Any,
    src: Any,
    size: ArrayLike,
    src_fmt: DifFormat,
    dst_fmt: DifFormat,
    *,
    src_ref_tag: ArrayLike | None = None,
    dst_ref_tag: ArrayLike | None = None,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """DIF_UPDT: checks ``size`` bytes of protected blocks and copies them with new fields."""
    fields = _fields(
        src_fmt.update_fields(dst_fmt), src_ref_tag_seed=src_ref_tag, dest_ref_tag_seed=dst_ref_tag
    )
    return build(lib.DSA_OPCODE_DIF_UPDT, flags, out, src_addr=src, dst_addr=dst, xfer_size=size, **fields)


def dix_generate(
    dst: Any,
    src: Any,
    size: ArrayLike,
    fmt: DifFormat,
    *,
    ref_tag: ArrayLike | None = None,
    flags: ArrayLike = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """DIX_GEN: writes the fields of ``size`` bytes of data, 8 bytes a block, and nothing else."""
    fields = _fields(fmt.insert_fields(), ins_ref_tag_seed=ref_tag)
    return build(lib.DSA_OPCODE_DIX_GEN, flags, out, src_addr=src, dst_addr=dst, xfer_size=size, **fields)
