"""The index of a container's mappings: Python's hold on the B+tree of ``mappings.c``.

Modelled: ordered, non-overlapping entries {iova, size, vaddr, flags, cookie}. Not modelled: locking and what
the entries mean; the owner decides both.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, NamedTuple

from pvfio.abi import ffi, lib

__all__ = ["Mapping", "MappingIndex"]

TOP = (1 << 64) - 1
_CHUNK = 256


class Mapping(NamedTuple):
    """One mapping: byte addresses, a size in bytes; ``flags`` (8 bits) and ``cookie`` (56) are the owner's."""

    iova: int
    size: int
    vaddr: int
    flags: int
    cookie: int

    @property
    def last(self) -> int:
        """The IOVA of the last byte."""
        return self.iova + self.size - 1


def _mapping(entry: Any) -> Mapping:
    return Mapping(entry.iova, entry.size, entry.vaddr, entry.flags, entry.cookie)


class MappingIndex:
    """Mappings ordered by IOVA.

    ``max_bytes`` limits what the index may take for its nodes (0: no limit). Raises MemoryError. ``ptr`` is
    the ``struct pv_mappings *`` for callers that make the C calls themselves.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        ptr = lib.pv_mappings_create(max_bytes)
        if ptr == ffi.NULL:
            raise MemoryError("no memory for an index of mappings")
        self.ptr: Any = ffi.gc(ptr, lib.pv_mappings_destroy)
        self._out: Any = ffi.new("struct pv_mapping[]", _CHUNK)

    def __len__(self) -> int:
        return int(lib.pv_mappings_count(self.ptr))

    @property
    def nbytes(self) -> int:
        """Bytes the index has taken from the system."""
        return int(lib.pv_mappings_bytes(self.ptr))

    def insert(self, iova: int, size: int, vaddr: int = 0, flags: int = 0, cookie: int = 0) -> None:
        """Adds a mapping of [iova, iova + size) bytes.

        Raises OSError, and changes nothing: EINVAL (size 0, flags or cookie too wide), EOVERFLOW (the range
        wraps), EEXIST (it overlaps a mapping), ENOMEM.
        """
        error = lib.pv_mappings_insert(self.ptr, iova, size, vaddr, flags, cookie)
        if error:
            raise OSError(-error, f"insert {iova:#x} + {size:#x}: {errno.errorcode[-error]}")

    def find(self, iova: int) -> Mapping | None:
        """The mapping that contains a byte."""
        out = self._out
        return _mapping(out[0]) if lib.pv_mappings_find(self.ptr, iova, out) else None

    def first(self, start: int = 0, last: int = TOP) -> Mapping | None:
        """The first mapping with a byte in [start, last]."""
        out = self._out
        return _mapping(out[0]) if lib.pv_mappings_range(self.ptr, start, last, out, 1) else None

    def remove(self, iova: int) -> Mapping:
        """Takes out the mapping that begins at ``iova``. Raises KeyError."""
        out = self._out
        if not lib.pv_mappings_remove(self.ptr, iova, out):
            raise KeyError(iova)
        return _mapping(out[0])

    def range(self, start: int = 0, last: int = TOP) -> Iterator[Mapping]:
        """The mappings with a byte in [start, last], in order; the index may change between two of them."""
        while True:
            out = self._out
            n = lib.pv_mappings_range(self.ptr, start, last, out, _CHUNK)
            found = [_mapping(out[i]) for i in range(n)]
            yield from found
            if n < _CHUNK or found[-1].last >= last:
                return
            start = found[-1].last + 1

    def __iter__(self) -> Iterator[Mapping]:
        return self.range()

    def clear(self) -> None:
        """Takes out every mapping."""
        lib.pv_mappings_clear(self.ptr)

    def check(self) -> None:
        """Checks the tree's invariants. Raises AssertionError."""
        wrong = lib.pv_mappings_check(self.ptr)
        if wrong:
            raise AssertionError(f"the index of mappings is broken: invariant {wrong}")
