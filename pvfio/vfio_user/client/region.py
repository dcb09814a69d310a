"""A region of a served device: accesses by message, or by mapping where the server offers that.

An access is checked as vfio-pci checks it; one of a BAR becomes naturally aligned messages of at most 8 bytes, one of
configuration space of at most 4. ``doorbell`` and ``movdir64b`` never wait: they store where the BAR is mapped, and are
posted messages everywhere else, which the server carries out in order with whatever is asked after them.

Not modelled: non-posted submissions (ENOTTY), REGION_WRITE_MULTI.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import trio

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.memory.mapped import FdMapping, map_fd
from pvfio.vfio.mapped_bar import mapped_bar
from pvfio.vfio.region import Region
from pvfio.vfio_user.messages import Area, RegionInfo, region_access
from pvfio.vfio_user.wire import PAGE, aligned_pieces

if TYPE_CHECKING:
    from pvfio.vfio_user.client.device import UserDevice
    from pvfio.vfio_user.client.function import UserFunction

__all__ = ["UserRegion"]

_log = logging.getLogger("pvfio.vfio_user.client")

_SIZES: Final = frozenset((1, 2, 4, 8))
_ITEM: Final = 64
_CONFIG: Final[int] = lib.VFIO_PCI_CONFIG_REGION_INDEX
_ROM: Final[int] = lib.VFIO_PCI_ROM_REGION_INDEX
_READ: Final[int] = lib.VFIO_USER_REGION_READ
_WRITE: Final[int] = lib.VFIO_USER_REGION_WRITE
_MMAP: Final[int] = lib.VFIO_REGION_INFO_FLAG_MMAP
_KNOWN: Final[int] = lib.VFIO_REGION_INFO_FLAG_READ | lib.VFIO_REGION_INFO_FLAG_WRITE | _MMAP


class UserRegion(Region):
    """Made by ``UserDevice.region``."""

    def __init__(self, device: UserDevice, function: UserFunction, info: RegionInfo) -> None:
        closed = tuple(function.closed_areas.get(info.index, ())) if info.index < _ROM else ()
        areas = _areas(info, closed) if info.index in function.region_fds else ()
        flags = info.flags & _KNOWN & ~(0 if areas else _MMAP)
        super().__init__(function.name, info.index, info.size, flags, areas)
        self.closed_areas = closed
        self._device = device
        self._function = function
        self._link = function.link
        self._file_offset = info.offset
        self._maps: dict[Area, FdMapping] = {}
        self._hidden: Area = (0, 0)
        table = function.msix_table
        if table is not None and table[0] == info.index:
            self._hidden = table[1], table[1] + table[2]
        if info.index == _CONFIG:
            self.size = function.config_size
        if areas:
            self.mmio = self._map_all()

    def read_nowait(self, offset: int, size: int = 4) -> int:
        self._check("read", offset, size)
        raise trio.WouldBlock

    def write_nowait(self, offset: int, value: int, size: int = 4) -> None:
        self._check("write", offset, size, value)
        raise trio.WouldBlock

    async def read(self, offset: int, size: int = 4) -> int:
        try:
            self._check("read", offset, size)
        except VfioError:
            await trio.lowlevel.checkpoint()
            raise
        pieces = self._pieces(offset, size)
        if pieces == [(offset, size, False)]:
            return await self._read_piece(offset, size)
        value = 0
        await trio.lowlevel.checkpoint()
        for at, width, hidden in pieces:
            piece = (1 << 8 * width) - 1 if hidden else await self._read_piece(at, width)
            value |= piece << 8 * (at - offset)
        return value

    async def write(self, offset: int, value: int, size: int = 4) -> None:
        """As the base class says. One that resets the function and is cancelled may leave it unconfigured."""
        try:
            self._check("write", offset, size, value)
        except VfioError:
            await trio.lowlevel.checkpoint()
            raise
        data = value.to_bytes(size, "little")
        if self.index == _CONFIG:
            await self._write_config(offset, data)
            return
        pieces = self._pieces(offset, size)
        if pieces == [(offset, size, False)]:
            await self._write_piece(offset, data)
            return
        await trio.lowlevel.checkpoint()
        for at, width, hidden in pieces:
            if not hidden:
                await self._write_piece(at, data[at - offset : at - offset + width])

    def mmap(self, offset: int, size: int) -> memoryview:
        """As the base class says. What the server truncates afterwards reads as zero, and stores to it go nowhere."""
        self._device.check_open("mmap")
        inside = any(start <= offset and offset + size <= start + length for start, length in self.areas)
        if not inside or size <= 0 or offset % PAGE or size % PAGE:
            raise self._error(errno.EINVAL, "mmap", offset, size)
        return self._map(offset, size).view()

    def doorbell(self, offset: int, value: int, size: int = 4) -> None:
        """As the base class says. Raises EAGAIN where the server is so far behind that it is not told."""
        if self.mmio is not None and self._stored(lib.pv_mmio_store, offset, size, value):
            return
        self._check("doorbell", offset, size, value)
        if self.closed_areas:
            self.check_open("doorbell", offset, size)
        body = region_access(offset, self.index, size)
        self._link.post(_WRITE, body, value.to_bytes(size, "little"), operation="doorbell")

    def movdir64b(self, offset: int, items: np.ndarray[Any, Any]) -> None:
        """As the base class says, to slots that wrap within their page. Where the region takes no submissions the
        server drops them. Raises EAGAIN where the server is so far behind that it is not told of all of them.
        """
        data = ffi.buffer(ffi.from_buffer(items))
        size = len(data)
        if size % _ITEM or not size:
            raise ValueError(f"{size} bytes are not a number of 64-byte items")
        if offset % _ITEM or not 0 <= offset <= self.size - _ITEM or self.index >= _ROM:
            raise self._error(errno.EINVAL, "movdir64b", offset, size)
        if self.closed_areas:
            self.check_open("movdir64b", offset & -PAGE, PAGE)
        self._device.check_open("movdir64b")
        if self.mmio is not None and self._stored(
            lib.pv_mmio_movdir64b, offset, ffi.from_buffer(items), size // _ITEM
        ):
            return
        page, slot = offset & -PAGE, offset % PAGE
        for at in range(0, size, _ITEM):
            body = region_access(page + (slot + at) % PAGE, self.index, _ITEM)
            self._link.post(_WRITE, body, data[at : at + _ITEM], operation="movdir64b")

    def enqcmd(self, offset: int, item: np.ndarray[Any, Any]) -> bool:
        """Raises ENOTTY: no message carries a non-posted write of 64 bytes."""
        size = len(ffi.from_buffer(item))
        if size != _ITEM:
            raise ValueError(f"{size} bytes are not one 64-byte item")
        raise self._error(errno.ENOTTY, "enqcmd", offset, size)

    def close(self) -> None:
        """The device was closed: no store reaches the BAR any more."""
        self.mmio = None
        maps, self._maps = self._maps, {}
        for mapping in maps.values():
            mapping.close()

    def _map_all(self) -> Any:
        """The BAR for stores that ask nobody, None where it cannot be mapped after all."""
        try:
            views = [(start, self._map(start, size).view()) for start, size in self.areas]
            return mapped_bar(self.size, views)
        except (VfioError, ValueError) as error:
            _log.warning("%s: region %d is not mapped: %s", self.device, self.index, error)
            return None

    def _stored(self, store: Callable[..., int], *arguments: Any) -> bool:
        """Whether what is stored to is mapped."""
        try:
            return store(self.mmio, *arguments) == 0
        except OverflowError:
            return False

    def _map(self, offset: int, size: int) -> FdMapping:
        found = self._maps.get((offset, size))
        if found is None:
            fd = self._function.region_fds[self.index]
            try:
                found = map_fd(fd, self._file_offset + offset, size, write=True)
            except OSError as error:
                raise self._error(
                    error.errno or errno.EIO, "mmap", offset, size, error.strerror or ""
                ) from None
            self._maps[offset, size] = found
        return found

    async def _read_piece(self, offset: int, size: int) -> int:
        asked = region_access(offset, self.index, size)
        call = await self._link.call(_READ, asked, operation="read")
        body = call.body
        if len(body) != 16 + size or body[:16] != asked:
            raise self._error(errno.EPROTO, "read", offset, size, "the reply is not about that")
        return int.from_bytes(body[16:], "little")

    async def _write_piece(self, offset: int, data: bytes) -> None:
        body = region_access(offset, self.index, len(data), data)
        await self._link.call(_WRITE, body, operation="write")

    async def _write_config(self, offset: int, data: bytes) -> None:
        function, end = self._function, offset + len(data)
        at = function.flr_at
        if at is not None and offset <= at < end and data[at - offset] & 0x80:
            await function.reset_by_write(offset, data)
            return
        await trio.lowlevel.checkpoint()
        for start, width, _ in self._pieces(offset, len(data)):
            if start not in function.read_only:
                await self._write_piece(start, data[start - offset : start - offset + width])
        command = int(lib.PCI_COMMAND)
        if offset <= command < end:
            function.decodes = bool(data[command - offset] & lib.PCI_COMMAND_MEMORY)

    def _check(self, operation: str, offset: int, size: int, value: int = 0) -> None:
        self._device.check_open(operation)
        if size not in _SIZES or not 0 <= offset < 1 << 40:
            raise self._error(errno.EINVAL, operation, offset, size)
        if offset + size > self.size:
            number = errno.EFAULT if self.index == _CONFIG else errno.EINVAL
            raise self._error(number, operation, offset, size)
        if not 0 <= value < 1 << 8 * size:
            raise self._error(errno.EINVAL, operation, offset, size, f"value {value:#x} is too wide")
        if self.index < _ROM and not self._function.decodes:
            raise self._error(errno.EIO, operation, offset, size, "memory decoding is off")

    def _pieces(self, offset: int, size: int) -> list[tuple[int, int, bool]]:
        """An access as aligned (offset, width, in the MSI-X table) pieces."""
        start, end = self._hidden
        pieces = aligned_pieces(offset, size, 4 if self.index == _CONFIG else 8)
        return [(at, width, start <= at < end) for at, width in pieces]


def _areas(info: RegionInfo, closed: tuple[Area, ...]) -> tuple[Area, ...]:
    """What may be mapped: whole pages of what the server offers, without the MSI-X pages."""
    if not info.flags & _MMAP:
        return ()
    areas = list(info.areas or ((0, info.size),))
    areas = [(-(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE) for start, size in areas]
    for first, length in closed:
        areas = [
            piece
            for start, end in areas
            for piece in ((start, min(end, first)), (max(start, first + length), end))
        ]
    return tuple(sorted((start, end - start) for start, end in areas if start < end))
