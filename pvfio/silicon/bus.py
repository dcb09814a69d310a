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

    @property
    def remote(self) -> bool:
        """An operation may wait for somebody outside this process now: not one for the trio thread."""
        return bool(lib.pv_bus_is_remote(self.ptr))

    def cancel(self, on: bool) -> None:
        """While on, operations end at their next section with ``DmaCancelled``."""
        lib.pv_bus_cancel(self.ptr, on)

    @property
    def cancelled(self) -> bool:
        """``cancel`` is on: who is asked for remote bytes had better answer at once."""
        return bool(lib.pv_bus_cancelled(self.ptr))

    def set_ats(self, on: bool, stu: int = 0) -> None:
        """What the function's ATS control register says: enable, and log2 of its Smallest Translation Unit in 4 KiB.

        A change empties the device's translation cache; when it returns, no DMA uses what was in it. Nothing
        happens on a bus that translates nothing for others.
        """
        lib.pv_bus_ats(self.ptr, on, stu)

    def close(self) -> None:
        """Frees the bus master. Whatever engine used it must be gone."""
        ffi.release(self.ptr)


def is_eventfd(descriptor: int) -> bool:
    """Whether an open descriptor is an eventfd's."""
    return bool(lib.pv_is_eventfd(descriptor))


class TableBus(BusMaster):
    """A bus over a plain table of ranges: no page tables, no IOTLB. Cost does not depend on how many there are.

    Interrupts are counted and ring ``eventfd`` (-1: none), or what ``vector`` says.
    """

    def __init__(self, eventfd: int = -1) -> None:
        super().__init__(lib.pv_table_bus_create(eventfd))
        self._kept: dict[int, Any] = {}

    def map(self, iova: int, memory: Any, perm: int = READ | WRITE) -> None:
        """Puts a writable buffer at ``iova``, and keeps it. ``OSError``: EINVAL, EEXIST (overlap), ENOMEM."""
        view = ffi.from_buffer(memory, require_writable=True)
        self.map_address(iova, view, len(view), perm)
        self._kept[iova] = view

    def map_address(self, iova: int, address: Any, size: int, perm: int = READ | WRITE) -> None:
        """Puts ``size`` bytes from ``address`` on (an int or a pointer) at ``iova``.

        They are the caller's until ``unmap`` has returned. Raises as ``map``; EINVAL also for address 0.
        """
        pointer = ffi.cast("void *", address)
        _raise("map", lib.pv_table_bus_map(self.ptr, iova, size, pointer, perm), iova, size)

    def map_remote(self, iova: int, size: int, perm: int = READ | WRITE) -> None:
        """Puts a range there whose bytes are got and set by asking, as ``set_remote`` says. Raises as ``map``."""
        _raise("map", lib.pv_table_bus_map_remote(self.ptr, iova, size, perm), iova, size)

    def unmap(self, iova: int, size: int) -> None:
        """Takes out every range inside; when it returns no operation uses their memory. Finds none: nothing happens.

        ``OSError``: EINVAL when the range splits one, ENOMEM; then nothing happened.
        """
        _raise("unmap", lib.pv_table_bus_unmap(self.ptr, iova, size), iova, size)
        kept = self._kept.pop(iova, None)
        if self._kept and (kept is None or len(kept) != size):
            for start in [start for start in self._kept if iova <= start < iova + size]:
                del self._kept[start]

    def set_remote(self, function: Any, argument: Any = ffi.NULL) -> None:
        """Who is asked for remote ranges: a ``pv_remote_fn`` and its first argument; ``ffi.NULL``: nobody.

        Both stay the caller's. Returns when nobody is inside the function before: end what it waits for first.
        """
        lib.pv_table_bus_remote(self.ptr, function, argument)

    def vectors(self, count: int) -> None:
        """From now on a message of data ``i`` rings the eventfd of vector ``i`` of ``count``; none has one at first.

        It is to go to ``MSI_START``..``MSI_END``; nothing accepts any other. 0: back to the eventfd of the creation.
        ``OSError`` EINVAL: more than 2048.
        """
        _raise_plain("vectors", lib.pv_table_bus_vectors(self.ptr, count), count)

    def vector(self, index: int, descriptor: int) -> None:
        """The eventfd of a vector, of which a duplicate is kept; -1: none, nothing accepts its message.

        ``OSError``: EINVAL for a vector that is not there and a descriptor that is no eventfd, EBADF, EMFILE.
        """
        _raise_plain("vector", lib.pv_table_bus_vector(self.ptr, index, descriptor), index)

    def ring(self, descriptor: int) -> None:
        """One more in the counter of a client's eventfd.

        Once ``vectors`` was called this never waits, whatever the client does with its eventfd, and neither does the
        message of a vector. (Without asynchronous I/O in the system: unless it is made blocking and full just then.)
        """
        lib.pv_table_bus_ring(self.ptr, descriptor)

    @property
    def maps(self) -> int:
        """How many ranges there are."""
        return int(self._stats().maps)

    def msis(self) -> tuple[int, int, int]:
        """How many messages came, and the last one's address and data."""
        stats = self._stats()
        return stats.msis, stats.last_msi_addr, stats.last_msi_data

    def _stats(self) -> Any:
        stats = ffi.new("struct pv_table_bus_stats *")
        lib.pv_table_bus_stats(self.ptr, stats)
        return stats


def _raise(operation: str, error: int, iova: int, size: int) -> None:
    if error:
        raise OSError(-error, f"{operation} iova {iova:#x} length {size:#x}: {errno.errorcode[-error]}")


def _raise_plain(operation: str, error: int, number: int) -> None:
    if error:
        raise OSError(-error, f"{operation} {number}: {errno.errorcode[-error]}")
