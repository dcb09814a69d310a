"""Guest RAM: the Python face of memory.h.

Models one guest's RAM in a shared memfd, its GPA layout and the permutation to HPA, single pages for tables, and
DMA buffers. Does not model NUMA, ballooning or hot-plug, and knows nothing of IOVAs.
"""

from __future__ import annotations

import errno
import weakref
from dataclasses import dataclass
from typing import Any

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.memory.buffer import DmaBuffer, wrap

PAGE_SIZE: int = lib.PV_PAGE_SIZE
BLOCK_SIZE: int = lib.PV_BLOCK_SIZE
_NONE: int = lib.PV_PHYS_NONE
_RAM_BASE: int = lib.PV_HPA_RAM_BASE


@dataclass(frozen=True)
class MemoryStats:
    """Counts of pages, extents and pins; see ``struct pv_memory_stats``."""

    frames: int
    free_frames: int
    table_pages: int
    host_pages: int
    extents: int
    pins: int


class GuestMemory:
    """Guest RAM of ``size`` bytes (a multiple of 2 MiB), and ``host_private`` bytes for the host's own tables.

    ``seed`` decides the permutation between GPA and HPA; None: there is none, both are in the order of the memfd, which
    keeps buffers in one piece there. Raises ``ValueError`` for sizes that cannot be, ``OSError`` where the system has
    no room. The memory lives as long as any ``DmaBuffer`` of it.
    """

    def __init__(self, size: int, *, host_private: int = 64 << 20, seed: int | None = 0) -> None:
        error = ffi.new("int *")
        number = lib.PV_SEED_STRAIGHT if seed is None else seed & _NONE
        ptr = lib.pv_memory_create(size, host_private, number, error)
        if ptr == ffi.NULL:
            if error[0] == -errno.EINVAL:
                raise ValueError(f"guest RAM of {size} bytes: not a multiple of 2 MiB, or out of range")
            raise OSError(-error[0], f"no room for {size} bytes of guest RAM")
        self.ptr = ffi.gc(ptr, lib.pv_memory_destroy)
        self.size = size
        self._straight = seed is None
        self.fd: int = lib.pv_memory_fd(self.ptr)
        self.guest_space = lib.pv_memory_guest_space(self.ptr)
        self.host_space = lib.pv_memory_host_space(self.ptr)
        self._vaddr = ffi.new("uint64_t *")
        self._runs = ffi.new("struct pv_run[16]")

    def stats(self) -> MemoryStats:
        """Counts as they are now."""
        raw = ffi.new("struct pv_memory_stats *")
        lib.pv_memory_stats(self.ptr, raw)
        return MemoryStats(
            raw.frames, raw.free_frames, raw.table_pages, raw.host_pages, raw.extents, raw.pins
        )

    def ram_ranges(self) -> tuple[tuple[int, int], ...]:
        """The guest's RAM as (first GPA, bytes), lowest first; between them is the MMIO hole."""
        windows = (self.guest_space.window[i] for i in range(2))
        return tuple((window.start, window.size) for window in windows if window.size)

    def gpa_to_hpa(self, gpa: int) -> int:
        """Where the host keeps a guest byte. ``ValueError`` outside RAM."""
        hpa: int = lib.pv_memory_gpa_to_hpa(self.ptr, gpa)
        if hpa == _NONE:
            raise ValueError(f"GPA {gpa:#x} is not RAM")
        return hpa

    def guest_page(self) -> int:
        """GPA of a zeroed page of guest RAM for the guest kernel itself. ``MemoryError`` when there is none."""
        return self._page(lib.pv_memory_guest_page(self.ptr), "guest RAM")

    def free_guest_page(self, gpa: int) -> None:
        """Hands a page of ``guest_page`` back."""
        lib.pv_memory_guest_page_free(self.ptr, gpa)

    def host_page(self) -> int:
        """HPA of a zeroed page of host-private memory. ``MemoryError`` when there is none."""
        return self._page(lib.pv_memory_host_page(self.ptr), "host-private memory")

    def free_host_page(self, hpa: int) -> None:
        """Hands a page of ``host_page`` back."""
        lib.pv_memory_host_page_free(self.ptr, hpa)

    @staticmethod
    def _page(address: int, what: str) -> int:
        if address == _NONE:
            raise MemoryError(f"{what} is exhausted")
        return address

    def guest_ptr(self, gpa: int, size: int) -> Any:
        """``uint8_t *`` for guest bytes, NULL where [gpa, gpa + size) is not all RAM."""
        return ffi.cast("uint8_t *", lib.pv_space_at(self.guest_space, gpa, size))

    def view_guest(self, gpa: int, size: int) -> memoryview:
        """Guest bytes, writable. ``ValueError`` outside RAM. Valid while this object lives."""
        return self._view(self.guest_space, gpa, size, "GPA")

    def view_host(self, hpa: int, size: int) -> memoryview:
        """The same memory, and the host's private pages, by HPA."""
        return self._view(self.host_space, hpa, size, "HPA")

    def _view(self, space: Any, address: int, size: int, what: str) -> memoryview:
        pointer = lib.pv_space_at(space, address, size)
        if pointer == ffi.NULL:
            raise ValueError(f"{what} {address:#x} length {size:#x} is not memory")
        owner = ffi.gc(ffi.cast("uint8_t *", pointer), _KeepAlive(lib.pv_memory_get(self.ptr)))
        return memoryview(ffi.buffer(owner, size))

    def alloc(self, size: int, *, align: int = PAGE_SIZE, scattered: bool = False) -> DmaBuffer:
        """Zeroed guest memory of ``size`` bytes as a ``DmaBuffer`` of shape ``(size,)``, dtype ``uint8``.

        It occupies whole pages, physically contiguous where possible; ``align`` (a power of two, bytes) aligns its GPA
        and rules pieces out; ``scattered`` takes every page from another place. Raises ``ValueError`` for a size or
        alignment that cannot be and ``MemoryError`` when guest RAM (or the address space) has no room.
        """
        if size <= 0:
            raise ValueError(f"a buffer of {size} bytes")
        flags = lib.PV_ALLOC_SCATTERED if scattered else 0
        if size > self.size:
            raise MemoryError(f"a buffer of {size} bytes is larger than guest RAM ({self.size} bytes)")
        extent: int = lib.pv_memory_alloc(self.ptr, size, align, flags, self._vaddr)
        if extent == -errno.EINVAL:
            raise ValueError(f"a buffer of {size} bytes aligned to {align}")
        if extent < 0:
            raise MemoryError(f"guest RAM has no room for {size} bytes")
        vaddr = self._vaddr[0]
        owner = ffi.cast("uint8_t *", vaddr)
        # Not a cffi destructor: in a reference cycle the memory could be destroyed before its extent. A finalizer
        # holds the memory from outside the cycle.
        weakref.finalize(owner, _release, self.ptr, extent)
        whole = -(-size // PAGE_SIZE) * PAGE_SIZE
        return wrap(ffi.buffer(owner, whole), vaddr, size, whole)

    def pin(self, vaddr: int, size: int) -> int:
        """Pins the extent that holds [vaddr, vaddr + size) and returns its number for ``unpin``.

        Raises ``VfioError`` (EFAULT) for memory that no live ``DmaBuffer`` or mapping holds as one piece.
        """
        extent: int = lib.pv_memory_pin(self.ptr, vaddr, size)
        if extent < 0:
            raise VfioError(errno.EFAULT, "pin", f"vaddr {vaddr:#x} is not DMA memory", length=size)
        return extent

    def unpin(self, extent: int) -> None:
        """Undoes one ``pin``. ``ValueError`` for an extent that has none."""
        if lib.pv_memory_unpin(self.ptr, extent):
            raise ValueError(f"extent {extent} is not pinned")

    def runs(self, vaddr: int, size: int) -> list[tuple[int, int]]:
        """The guest memory behind [vaddr, vaddr + size) as (GPA, bytes), in order. Raises as ``pin``."""
        runs = self._runs
        count: int = lib.pv_memory_runs(self.ptr, vaddr, size, runs, len(runs))
        if count < 0:
            raise VfioError(errno.EFAULT, "pin", f"vaddr {vaddr:#x} is not DMA memory", length=size)
        if count > len(runs):
            runs = ffi.new("struct pv_run[]", count)
            lib.pv_memory_runs(self.ptr, vaddr, size, runs, count)
        return [(runs[i].gpa, runs[i].size) for i in range(count)]

    def file_pieces(self, vaddr: int, size: int) -> list[tuple[int, int]]:
        """Where [vaddr, vaddr + size) is in the memfd ``fd``: (offset, bytes), in order, as few as there can be.

        Raises as ``pin``.
        """
        runs = self.runs(vaddr, size)
        if self._straight and len(runs) == 1:
            return [(lib.pv_memory_gpa_to_hpa(self.ptr, runs[0][0]) - _RAM_BASE, size)]
        pieces: list[tuple[int, int]] = []
        for gpa, length in runs:
            while length:
                offset = lib.pv_memory_gpa_to_hpa(self.ptr, gpa) - _RAM_BASE
                step = min(length, BLOCK_SIZE - gpa % BLOCK_SIZE)
                if pieces and sum(pieces[-1]) == offset:
                    pieces[-1] = pieces[-1][0], pieces[-1][1] + step
                else:
                    pieces.append((offset, step))
                gpa += step
                length -= step
        return pieces


class _KeepAlive:
    """Holds the memory until the view is gone."""

    __slots__ = ("_memory",)

    def __init__(self, memory: Any) -> None:
        self._memory = memory

    def __call__(self, _pointer: Any) -> None:
        lib.pv_memory_destroy(self._memory)


def _release(memory: Any, extent: int) -> None:
    lib.pv_memory_release(memory, extent)
