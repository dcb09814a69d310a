"""DmaBuffer: a numpy array over guest frames that devices may be given.

Models memory a driver allocated and may map. It does not map anything: a container does, and writes the IOVA it
chose into ``iova``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class _Origin:
    """What every view of one allocation shares: where it is, and its primary IOVA."""

    __slots__ = ("iova", "size", "vaddr")

    def __init__(self, vaddr: int, size: int) -> None:
        self.vaddr = vaddr
        self.size = size
        self.iova: int | None = None


class DmaBuffer(np.ndarray[Any, np.dtype[Any]]):
    """An array of guest memory: shape ``(size,)`` and dtype ``uint8`` at birth; views may have any shape and dtype.

    The frames are recycled when neither a view nor a pin (a mapping) of them lives. A copy (``buf.copy()``,
    ``buf + 1``) is ordinary memory: its ``iova`` is ``None``.
    """

    _origin: _Origin | None
    _address: int | None

    def __array_finalize__(self, obj: Any) -> None:
        self._origin = getattr(obj, "_origin", None)
        self._address = None

    @property
    def vaddr(self) -> int:
        """Process address of the first byte of this view."""
        address = self._address
        if address is None:
            address = self._address = int(self.__array_interface__["data"][0])
        return address

    def _offset(self) -> int | None:
        """Bytes from the allocation's start to this view's first byte; ``None`` for memory that is not of it."""
        origin = self._origin
        if origin is None:
            return None
        offset = self.vaddr - origin.vaddr
        return offset if 0 <= offset and offset + self.nbytes <= origin.size else None

    @property
    def iova(self) -> int | None:
        """IOVA of the first byte of this view; ``None`` while the buffer has none.

        Setting it (containers do) sets the allocation's, so that every view agrees.
        """
        offset = self._offset()
        if offset is None or self._origin is None or self._origin.iova is None:
            return None
        return self._origin.iova + offset

    @iova.setter
    def iova(self, value: int | None) -> None:
        offset = self._offset()
        if offset is None or self._origin is None:
            raise ValueError("this array is a copy, not memory a device can be given")
        self._origin.iova = None if value is None else value - offset

    @property
    def nbytes_mapped(self) -> int:
        """Bytes of the whole allocation in whole pages: what mapping it from its start maps. 0 for a copy."""
        return self._origin.size if self._offset() is not None and self._origin is not None else 0


def wrap(memory: Any, vaddr: int, size: int, whole: int) -> DmaBuffer:
    """The array over ``size`` bytes at ``vaddr``; ``memory`` is the object that keeps them (a buffer exporter)."""
    array: npt.NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8, count=size)
    buffer = array.view(DmaBuffer)
    buffer._origin = _Origin(vaddr, whole)
    return buffer
