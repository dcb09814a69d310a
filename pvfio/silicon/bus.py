"""Bus masters from Python: for device control code and for tests. Data engines call the C functions themselves.

Models a device's view of memory (``bus.h``): reads and writes by IOVA that end at the first page that does not
translate. Does not model a data path fit for speed: payloads pass through Python here.
"""

from __future__ import annotations

import errno
from typing import Any

from pvfio.abi import ffi, lib
from pvfio.errors import PvfioError

READ: int = lib.PV_DMA_READ
WRITE: int = lib.PV_DMA_WRITE


class DmaAborted(PvfioError):
    """A bus-master operation met a page that does not translate: a master abort, for the device to report.

    ``fault_iova`` is the first byte that could not be reached, ``done`` the bytes before it, ``perm`` what was
    asked there.
    """

    def __init__(self, operation: str, fault_iova: int, done: int, perm: int) -> None:
        asked = "write" if perm & WRITE else "read"
        super().__init__(f"{operation}: {asked} of iova {fault_iova:#x} aborted after {done} bytes")
        self.operation = operation
        self.fault_iova = fault_iova
        self.done = done
        self.perm = perm


class DmaCancelled(PvfioError):
    """The bus master was told to stop (reset, bus-master enable off); ``done`` bytes were moved before."""

    def __init__(self, operation: str, done: int) -> None:
        super().__init__(f"{operation}: cancelled after {done} bytes")
        self.operation = operation
        self.done = done


class BusMaster:
    """One requester's access to memory. ``ptr`` is its ``struct pv_bus *``."""

    def __init__(self, ptr: Any) -> None:
        if ptr == ffi.NULL:
            raise MemoryError("no room for a bus master")
        self.ptr = ffi.gc(ptr, lib.pv_bus_destroy)

    def _finish(self, operation: str, result: int, dma: Any) -> int:
        if result == -errno.EFAULT:
            raise DmaAborted(operation, dma.fault_iova, dma.done, dma.perm)
        if result == -errno.ECANCELED:
            raise DmaCancelled(operation, dma.done)
        return result

    def read(self, iova: int, size: int) -> bytes:
        """``size`` bytes from ``iova`` on. Raises ``DmaAborted`` or ``DmaCancelled``."""
        dma = ffi.new("struct pv_dma *")
        data = ffi.new("uint8_t[]", size)
        self._finish("read", lib.pv_bus_read(self.ptr, iova, data, size, dma), dma)
        return bytes(ffi.buffer(data, size))

    def write(self, iova: int, data: bytes) -> None:
        """Writes ``data``; four aligned bytes into the interrupt window are an interrupt. Raises as ``read``."""
        dma = ffi.new("struct pv_dma *")
        self._finish("write", lib.pv_bus_write(self.ptr, iova, ffi.from_buffer(data), len(data), dma), dma)

    def move(self, dst: int, src: int, size: int) -> None:
        """Copies between IOVAs; the ranges may overlap. Raises as ``read``."""
        dma = ffi.new("struct pv_dma *")
        self._finish("move", lib.pv_bus_move(self.ptr, dst, src, size, dma), dma)

    def fill(self, dst: int, pattern: bytes, size: int) -> None:
        """Repeats an 8-byte pattern over ``size`` bytes. Raises as ``read``; ``ValueError``: not 8 bytes."""
        if len(pattern) != 8:
            raise ValueError(f"a fill pattern is 8 bytes, not {len(pattern)}")
        dma = ffi.new("struct pv_dma *")
        self._finish("fill", lib.pv_bus_fill(self.ptr, dst, ffi.from_buffer(pattern), size, dma), dma)

    def compare(self, a: int, b: int, size: int) -> int | None:
        """Offset of the first byte that differs, ``None`` when equal. Raises as ``read``."""
        dma = ffi.new("struct pv_dma *")
        differs = self._finish("compare", lib.pv_bus_compare(self.ptr, a, b, size, dma), dma)
        return int(dma.done) if differs else None

    def msi(self, address: int, data: int) -> bool:
        """Sends an interrupt message; false where nothing accepts it."""
        return bool(lib.pv_bus_msi(self.ptr, address, data) == 0)

    def cancel(self, on: bool) -> None:
        """While on, operations end at their next section with ``DmaCancelled``."""
        lib.pv_bus_cancel(self.ptr, on)

    def set_ats(self, on: bool, stu: int = 0) -> None:
        """What the function's ATS control register says: enable, and log2 of its Smallest Translation Unit in 4 KiB.

        A change empties the device's translation cache; when it returns, no DMA uses what was in it. Nothing
        happens on a bus that translates nothing for others.
        """
        lib.pv_bus_ats(self.ptr, on, stu)

    def close(self) -> None:
        """Frees the bus master. Whatever engine used it must be gone."""
        ffi.release(self.ptr)


class TableBus(BusMaster):
    """A bus over a plain table of ranges: no page tables, no IOTLB.

    Interrupts are counted and ring ``eventfd`` (-1: none).
    """

    def __init__(self, eventfd: int = -1) -> None:
        super().__init__(lib.pv_table_bus_create(eventfd))
        self._kept: dict[int, Any] = {}

    def map(self, iova: int, memory: Any, perm: int = READ | WRITE) -> None:
        """Puts a writable buffer at ``iova``. ``OSError``: EINVAL, EEXIST (overlap), ENOMEM."""
        view = ffi.from_buffer(memory, require_writable=True)
        error = lib.pv_table_bus_map(self.ptr, iova, len(view), view, perm)
        if error:
            raise OSError(-error, f"map iova {iova:#x} length {len(view):#x}: {errno.errorcode[-error]}")
        self._kept[iova] = view

    def unmap(self, iova: int, size: int) -> None:
        """Takes out every entry inside the range; when it returns no operation uses them.

        ``OSError`` EINVAL when the range splits one.
        """
        error = lib.pv_table_bus_unmap(self.ptr, iova, size)
        if error:
            raise OSError(-error, f"unmap iova {iova:#x} length {size:#x}: {errno.errorcode[-error]}")
        for start in [start for start in self._kept if iova <= start < iova + size]:
            del self._kept[start]

    def msis(self) -> tuple[int, int, int]:
        """How many messages came, and the last one's address and data."""
        stats = ffi.new("struct pv_table_bus_stats *")
        lib.pv_table_bus_stats(self.ptr, stats)
        return stats.msis, stats.last_msi_addr, stats.last_msi_data
