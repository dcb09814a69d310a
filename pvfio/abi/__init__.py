"""What crosses a boundary: the wire structures, once, for cffi, C and numpy.

Each ``*.h`` beside this file is packed cdef text and C at once. ``ffi`` and ``lib`` are the extension's.
"""

from __future__ import annotations

from pvfio._native import ffi, lib
from pvfio.abi.dtypes import dtype_of

__all__ = ["dtype_of", "ffi", "lib"]
