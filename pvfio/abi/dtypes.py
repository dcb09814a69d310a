"""numpy dtypes derived from cffi types, so that a wire structure is written once.

Unions become overlapping fields (an anonymous one's members are the structure's own). A flexible array member
is left out: the dtype is the fixed part. Bit fields are refused: a field that numpy must see is a whole word
plus masks. Words are little-endian, as every wire format here is.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pvfio._native import ffi

if TYPE_CHECKING:
    import numpy as np

_PRIMITIVE = {
    "uint8_t": "u1",
    "uint16_t": "<u2",
    "uint32_t": "<u4",
    "uint64_t": "<u8",
    "int8_t": "i1",
    "int16_t": "<i2",
    "int32_t": "<i4",
    "int64_t": "<i8",
    "char": "S1",
}


@cache
def dtype_of(ctype: Any) -> np.dtype[Any]:
    """The numpy dtype of a C type, e.g. ``dtype_of("struct dsa_hw_desc")``.

    ``ctype`` is the name of a type that the extension knows, or a cffi type. Offsets, padding and size are
    the C compiler's. Raises ``TypeError`` for a bit field, a pointer, an opaque structure or any other type
    that has no numpy form, and ``ffi.error`` for an unknown name.
    """
    return _dtype(ffi.typeof(ctype) if isinstance(ctype, str) else ctype)


def _dtype(ctype: Any) -> np.dtype[Any]:
    import numpy as np

    if ctype.kind == "primitive" and ctype.cname in _PRIMITIVE:
        return np.dtype(_PRIMITIVE[ctype.cname])
    if ctype.kind == "array" and ctype.length is not None:
        item = _dtype(ctype.item)
        return np.dtype((item.base, (ctype.length, *item.shape)))
    if ctype.kind not in ("struct", "union") or ctype.fields is None:
        raise TypeError(f"no numpy form of {ctype.cname}")
    names: list[str] = []
    formats: list[Any] = []
    offsets: list[int] = []
    _collect(ctype, 0, names, formats, offsets)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": ffi.sizeof(ctype)})


def _collect(ctype: Any, base: int, names: list[str], formats: list[Any], offsets: list[int]) -> None:
    for name, field in ctype.fields:
        if field.bitsize >= 0:
            raise TypeError(f"{ctype.cname}.{name} is a bit field")
        if field.type.kind == "array" and field.type.length is None:
            continue
        if not name:
            _collect(field.type, base + field.offset, names, formats, offsets)
            continue
        names.append(name)
        formats.append(_dtype(field.type))
        offsets.append(base + field.offset)
