"""A region: a BAR or the configuration space of a device, and the stores that ring a device's bell.

Registers are read and written through the backend; ``doorbell``, ``movdir64b`` and ``enqcmd`` go straight to
the BAR in C where the backend has it mapped.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError

__all__ = ["Region"]


class Region(ABC):
    """Part of an open device.

    ``size`` in bytes (0: the device has no such region), ``flags`` VFIO_REGION_INFO_FLAG_*, ``areas``
    (offset, size) of what can be mapped. ``mmio`` is the BAR's ``struct pv_mmio *`` where it can be reached
    in C, else None, and ``closed_areas`` (offset, size) of what a mapping leaves out: the pages of the MSI-X
    table and PBA.
    """

    def __init__(
        self, device: str, index: int, size: int, flags: int, areas: tuple[tuple[int, int], ...]
    ) -> None:
        self.device = device
        self.index = index
        self.size = size
        self.flags = flags
        self.areas = areas
        self.mmio: Any = None
        self.closed_areas: tuple[tuple[int, int], ...] = ()

    @abstractmethod
    def read_nowait(self, offset: int, size: int = 4) -> int:
        """``size`` (1, 2, 4, 8) bytes at ``offset``, little-endian.

        Raises VfioError EINVAL (size, outside a BAR), EFAULT (outside config space), EIO (memory decoding is
        off); trio.WouldBlock where the backend must wait.
        """

    @abstractmethod
    def write_nowait(self, offset: int, value: int, size: int = 4) -> None:
        """The counterpart of ``read_nowait``. Bits above ``size`` bytes: VfioError EINVAL."""

    @abstractmethod
    async def read(self, offset: int, size: int = 4) -> int:
        """As ``read_nowait``. Cancelled: registers that change when read may have been read."""

    @abstractmethod
    async def write(self, offset: int, value: int, size: int = 4) -> None:
        """As ``write_nowait``. Cancelled: not written, unless it had begun to wait for the device."""

    @abstractmethod
    def mmap(self, offset: int, size: int) -> memoryview:
        """Maps part of one of ``areas``. Raises VfioError EINVAL for anything else."""

    def doorbell(self, offset: int, value: int, size: int = 4) -> None:
        """One store, and the device is told. Never waits. Raises VfioError EINVAL for a bad offset or size."""
        mmio = self.mmio
        if mmio is None:
            self.write_nowait(offset, value, size)
            return
        if self.closed_areas:
            self.check_open("doorbell", offset, size)
        try:
            rc = lib.pv_mmio_store(mmio, offset, size, value)
        except OverflowError:  # not a number of 64 bits
            rc = -errno.EINVAL
        if rc < 0:
            raise self._error(-rc, "doorbell", offset, size)

    def movdir64b(self, offset: int, items: np.ndarray[Any, Any]) -> None:
        """64-byte posted submissions, one or an array of them, to consecutive slots from ``offset`` on.

        ``items`` is C-contiguous and a multiple of 64 bytes long: shape (n,) of a 64-byte dtype, or (n, 64)
        uint8. A full queue drops what is too much, as hardware does. Raises ValueError for another shape,
        VfioError EINVAL for a bad offset, ENOTTY where the region takes no submissions.
        """
        data = ffi.from_buffer(items)
        size = len(data)
        if size & 63 or not size:
            raise ValueError(f"{size} bytes are not a number of 64-byte items")
        if self.mmio is None:
            raise self._error(errno.ENOTTY, "movdir64b", offset, size)
        if self.closed_areas:
            self.check_open("movdir64b", offset & ~0xFFF, 4096)
        try:
            rc = lib.pv_mmio_movdir64b(self.mmio, offset, data, size >> 6)
        except OverflowError:
            rc = -errno.EINVAL
        if rc < 0:
            raise self._error(-rc, "movdir64b", offset, size)

    def enqcmd(self, offset: int, item: np.ndarray[Any, Any]) -> bool:
        """One 64-byte non-posted submission: true when the device took it, false when it says retry.

        Raises as ``movdir64b``.
        """
        data = ffi.from_buffer(item)
        if len(data) != 64:
            raise ValueError(f"{len(data)} bytes are not one 64-byte item")
        if self.mmio is None:
            raise self._error(errno.ENOTTY, "enqcmd", offset, 64)
        if self.closed_areas:
            self.check_open("enqcmd", offset, 64)
        try:
            rc = lib.pv_mmio_enqcmd(self.mmio, offset, data)
        except OverflowError:
            rc = -errno.EINVAL
        if rc == -errno.EAGAIN:
            return False
        if rc < 0:
            raise self._error(-rc, "enqcmd", offset, 64)
        return True

    def check_open(self, operation: str, offset: int, size: int) -> None:
        """Raises VfioError EINVAL where a store would touch the pages of the MSI-X table or PBA."""
        for start, length in self.closed_areas:
            if offset < start + length and start < offset + size:
                raise self._error(
                    errno.EINVAL, operation, offset, size, "the MSI-X pages belong to the kernel"
                )

    def _error(self, number: int, operation: str, offset: int, size: int, reason: str = "") -> VfioError:
        where = f"region {self.index} offset {offset:#x}"
        return VfioError(
            number, operation, f"{where}: {reason}" if reason else where, device=self.device, length=size
        )
