"""MSI-X from Python: for a function's register code (``msix.h``)."""

from __future__ import annotations

import errno

from pvfio.abi import ffi, lib
from pvfio.silicon.bus import BusMaster


class Msix:
    """A function's MSI-X table and pending bits; messages go out through ``bus``.

    ``ptr`` (``struct pv_msix *``) is for the device's engine.
    """

    def __init__(self, bus: BusMaster, vectors: int) -> None:
        ptr = lib.pv_msix_create(bus.ptr, vectors)
        if ptr == ffi.NULL:
            raise ValueError(f"{vectors} MSI-X vectors")
        self.ptr = ffi.gc(ptr, lib.pv_msix_destroy)
        self.vectors = vectors
        self._bus = bus
        self._value = ffi.new("uint64_t *")

    def control(self, enable: bool, function_mask: bool) -> None:
        """Message Control bits 15 and 14; pending vectors that this unmasks are sent."""
        lib.pv_msix_control(self.ptr, enable, function_mask)

    def _checked(self, error: int, offset: int, size: int) -> int:
        if error:
            raise OSError(errno.EINVAL, f"MSI-X access of {size} bytes at {offset:#x}")
        return int(self._value[0])

    def table_read(self, offset: int, size: int) -> int:
        """4 or 8 aligned bytes of the table. ``OSError`` EINVAL for anything else."""
        return self._checked(lib.pv_msix_table_read(self.ptr, offset, size, self._value), offset, size)

    def table_write(self, offset: int, size: int, value: int) -> None:
        """As ``table_read``; a vector that this unmasks is sent if it was pending."""
        self._checked(lib.pv_msix_table_write(self.ptr, offset, size, value), offset, size)

    def pba_read(self, offset: int, size: int) -> int:
        """4 or 8 aligned bytes of the pending-bit array. ``OSError`` EINVAL for anything else."""
        return self._checked(lib.pv_msix_pba_read(self.ptr, offset, size, self._value), offset, size)

    def fire(self, vector: int) -> bool:
        """Sends a vector; false where it is masked (it becomes pending), disabled or refused.

        ``ValueError`` for a vector that does not exist.
        """
        result = lib.pv_msix_fire(self.ptr, vector)
        if result == -errno.EINVAL:
            raise ValueError(f"vector {vector} of {self.vectors}")
        return bool(result == 0)

    def reset(self) -> None:
        """Everything masked, nothing pending, disabled."""
        lib.pv_msix_reset(self.ptr)
