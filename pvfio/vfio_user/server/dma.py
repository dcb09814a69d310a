"""The client's memory on a served function's bus: what DMA_MAP and DMA_UNMAP do.

A map that comes with a file is mapped into this process and copied to and from directly; one without is *remote*,
reached by messages (the channel's). When an unmap returns, no DMA lands in the old pages. Ranges that were never
mapped may be unmapped, and ranges that cover several maps; a range that cuts a map may not.

Not modelled: dirty tracking, maps that change their place.
"""

from __future__ import annotations

import errno
from typing import Final

from pvfio.abi import lib
from pvfio.memory import FdMapping, FdMemory
from pvfio.silicon import READ, WRITE, TableBus
from pvfio.vfio_user.messages import DmaMap, DmaUnmap
from pvfio.vfio_user.wire import PAGE, WireError

__all__ = ["DmaMaps"]

_READABLE: Final[int] = lib.VFIO_USER_F_DMA_REGION_READ
_WRITABLE: Final[int] = lib.VFIO_USER_F_DMA_REGION_WRITE


class DmaMaps:
    """The maps of one connection, at most ``most`` at a time. ``close`` it."""

    def __init__(self, bus: TableBus, most: int) -> None:
        self._bus = bus
        self._most = most
        self._memory = FdMemory()
        self._maps: dict[int, tuple[int, FdMapping | None]] = {}

    def __len__(self) -> int:
        return len(self._maps)

    @property
    def poisoned_fd(self) -> int:
        """Readable once a file in use was found to be truncated. Not the caller's to close."""
        return self._memory.poisoned_fd

    def map(self, request: DmaMap, fd: int | None) -> None:
        """Maps; ``fd`` stays the caller's.

        ``WireError``: EEXIST, ENOSPC at the limit, and what is wrong with the file.
        """
        if len(self._maps) >= self._most:
            raise WireError(errno.ENOSPC, f"{self._most} maps")
        if fd is None and request.offset:
            raise WireError(errno.EINVAL, f"offset {request.offset:#x} into no file")
        address, size, perm = request.address, request.size, _permissions(request.flags)
        mapping: FdMapping | None = None
        try:
            if fd is None:
                self._bus.map_remote(address, size, perm)
            else:
                mapping = self._memory.map(fd, request.offset, size, write=bool(perm & WRITE))
                self._bus.map_address(address, mapping.ptr, size, perm)
        except OSError as error:
            if mapping is not None:
                mapping.close()
            raise WireError(error.errno or errno.EINVAL, f"map {address:#x}+{size:#x}: {error}") from None
        self._maps[address] = (size, mapping)

    def unmap(self, request: DmaUnmap) -> None:
        """Unmaps. ``WireError`` EINVAL for a range that cuts a map; then nothing happened."""
        if request.flags & lib.VFIO_DMA_UNMAP_FLAG_ALL:
            self.clear()
            return
        try:
            self._bus.unmap(request.address, request.size)
        except OSError as error:
            raise WireError(error.errno or errno.EINVAL, str(error)) from None
        for address in self._inside(request.address, request.size):
            _, mapping = self._maps.pop(address)
            if mapping is not None:
                mapping.close()

    def clear(self) -> None:
        """Unmaps everything."""
        while self._maps:
            address, (size, mapping) = self._maps.popitem()
            self._bus.unmap(address, size)
            if mapping is not None:
                mapping.close()

    def close(self) -> None:
        """As ``clear``, for good."""
        self.clear()
        self._memory.close()

    def _inside(self, start: int, size: int) -> list[int]:
        """The maps in a range, none of which it cuts. Costs as much as the smaller of the two has pages and maps."""
        found = self._maps.get(start)
        if found is not None and found[0] == size:
            return [start]
        if size // PAGE < len(self._maps):
            return [at for at in range(start, start + size, PAGE) if at in self._maps]
        return [at for at in self._maps if start <= at < start + size]


def _permissions(flags: int) -> int:
    return READ * bool(flags & _READABLE) | WRITE * bool(flags & _WRITABLE)
