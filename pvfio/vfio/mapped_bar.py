"""A BAR that is mapped into this process: stores that reach the device without anybody in between.

Models plain loads and stores of 1, 2, 4 and 8 bytes, and 64-byte posted writes. Does not model write combining, or
telling anyone: a device of another process must look at its memory by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pvfio.abi import ffi, lib

__all__ = ["mapped_bar"]


def mapped_bar(size: int, areas: Sequence[tuple[int, Any]]) -> Any:
    """The ``struct pv_mmio *`` (``Region.mmio``) over a BAR of ``size`` bytes.

    ``areas``: (offset in the BAR, writable buffer) of what is mapped: a memoryview, an mmap. They are kept as long as
    the result is. Accesses outside them are refused (EINVAL), ``enqcmd`` everywhere (ENOTTY). Raises ``ValueError`` for
    an area outside the BAR or not aligned as its offset is (64 bytes), ``BufferError`` for one that cannot be written.
    """
    views = [ffi.from_buffer(buffer, require_writable=True) for _, buffer in areas]
    raw = [
        {"offset": offset, "size": len(view), "ptr": ffi.cast("uint8_t *", view)}
        for (offset, _), view in zip(areas, views, strict=True)
    ]
    mmio = lib.pv_mapped_bar_create(size, ffi.new("struct pv_mmio_area[]", raw), len(raw))
    if mmio == ffi.NULL:
        raise ValueError(f"a BAR of {size:#x} bytes with {[(a['offset'], a['size']) for a in raw]} mapped")
    return ffi.gc(mmio, _Destroy(views))


class _Destroy:
    """Holds the areas until nobody can store to them any more."""

    __slots__ = ("_views",)

    def __init__(self, views: list[Any]) -> None:
        self._views = views

    def __call__(self, mmio: Any) -> None:
        lib.pv_mapped_bar_destroy(mmio)
