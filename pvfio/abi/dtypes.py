"""numpy dtypes derived from cffi types, so that a wire structure is written once.

Unions become overlapping fields (an anonymous one's members are the structure's own). A flexible array
member is left out: the dtype is the fixed part. Bit fields are refused: a field that numpy must see is a whole
word plus masks.
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
def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy dtype of a C type, e.g. ``dtype_of("struct dsa_hw_desc")``.

    Offsets, padding and size are the C compiler's. Raises ``TypeError`` for a bit field, a pointer or any type
    that has no numpy form.
    """
    return _dtype(ffi.typeof(name))


def _dtype(ctype: Any) -> np.dtype[Any]:
    import numpy as np

    if ctype.kind == "primitive":
        if ctype.cname not in _PRIMITIVE:
            raise TypeError(f"no numpy form of {ctype.cname}")
        return np.dtype(_PRIMITIVE[ctype.cname])
    if ctype.kind == "array" and ctype.length is not None:
        return np.dtype((_dtype(ctype.item), (ctype.length,)))
    if ctype.kind not in ("struct", "union"):
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
