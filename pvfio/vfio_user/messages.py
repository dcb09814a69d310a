"""What is in a vfio-user message: building and checking of bodies, for the server and for the client.

Models every body of the vfio-user specification 0.9.2 (VERSION's is in version.py, descriptions and interrupts in
messages_info.py) but those of device features and migration data, which have no meaning without migration. A message's
header, its file descriptors, its delivery, and replies to DMA_READ and DMA_WRITE are the channel's. A body that cannot
be raises ``WireError`` with the errno its sender is answered with; nothing here trusts a length or a count.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from pvfio.abi import ffi, lib
from pvfio.vfio_user.messages_info import Area, DeviceInfo, IrqInfo, IrqSet, RegionInfo
from pvfio.vfio_user.wire import (
    END,
    PAGE,
    Body,
    WireError,
    check_argsz,
    check_count,
    check_range,
    command_name,
    layout,
    unpack,
    wrong_size,
)

__all__ = [
    "Area",
    "Body",
    "DeviceInfo",
    "DmaMap",
    "DmaUnmap",
    "IrqInfo",
    "IrqSet",
    "RegionInfo",
    "WireError",
    "command_name",
    "device_feature",
    "dma_access",
    "parse_device_feature",
    "parse_dma_read",
    "parse_dma_write",
    "parse_empty",
    "parse_region_io_fds",
    "parse_region_read",
    "parse_region_reply",
    "parse_region_write",
    "parse_write_multi",
    "region_access",
    "region_io_fds",
    "write_multi",
    "write_multi_reply",
]

_DMA_MAP: Final = layout("vfio_user_dma_map")
_DMA_UNMAP: Final = layout("vfio_user_dma_unmap")
_DMA_ACCESS: Final = layout("vfio_user_dma_region_access")
_REGION_ACCESS: Final = layout("vfio_user_region_access")
_REGION_IO_FDS: Final = layout("vfio_user_region_io_fds")
_MULTI: Final = layout("vfio_user_write_multi")
_FEATURE: Final = layout("vfio_user_device_feature")
_ENTRY: Final = struct.Struct("<QII8s")
_ENTRY_SIZE: Final = ffi.sizeof("struct vfio_user_write_multi_entry")
_DMA_FLAGS: Final[int] = lib.VFIO_USER_F_DMA_REGION_READ | lib.VFIO_USER_F_DMA_REGION_WRITE


def parse_empty(body: Body) -> None:
    """A body that must not be there (DEVICE_RESET)."""
    if len(body):
        raise WireError(errno.EINVAL, f"a body of {len(body)} bytes instead of none")


# Memory.


@dataclass(frozen=True, slots=True)
class DmaMap:
    """DMA_MAP: ``flags`` are VFIO_USER_F_DMA_REGION_*, ``offset`` is into the file that comes with it, 0 without."""

    address: int
    size: int
    flags: int = _DMA_FLAGS
    offset: int = 0

    def pack(self) -> bytes:
        """The request's body. The reply has none."""
        return _DMA_MAP.pack(_DMA_MAP.size, self.flags, self.offset, self.address, self.size)

    @classmethod
    def parse(cls, body: Body) -> Self:
        """EINVAL: another length, unknown flags or none, no whole pages (in the file neither), past the end."""
        argsz, flags, offset, address, size = unpack(_DMA_MAP, body, exact=True)
        check_argsz(argsz, _DMA_MAP)
        if not flags or flags & ~_DMA_FLAGS:
            raise WireError(errno.EINVAL, f"flags {flags:#x}")
        check_range(address, size)
        if offset % PAGE or offset + size >= END >> 1:
            raise WireError(errno.EINVAL, f"file offset {offset:#x}")
        return cls(address, size, flags, offset)


@dataclass(frozen=True, slots=True)
class DmaUnmap:
    """DMA_UNMAP, request and reply. ``flags``: 0, or VFIO_DMA_UNMAP_FLAG_ALL with address and size 0."""

    address: int
    size: int
    flags: int = 0

    def pack(self) -> bytes:
        """The body, of the request and of the reply."""
        return _DMA_UNMAP.pack(_DMA_UNMAP.size, self.flags, self.address, self.size)

    @classmethod
    def parse(cls, body: Body) -> Self:
        """EINVAL as ``DmaMap.parse``; ENOTSUP where the dirty bitmap is asked for."""
        argsz, flags, address, size = unpack(_DMA_UNMAP, body)
        check_argsz(argsz, _DMA_UNMAP)
        if flags & lib.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP:
            raise WireError(errno.ENOTSUP, "there is no dirty bitmap")
        if len(body) != _DMA_UNMAP.size or flags & ~lib.VFIO_DMA_UNMAP_FLAG_ALL:
            raise WireError(errno.EINVAL, f"a body of {len(body)} bytes, flags {flags:#x}")
        if not flags:
            check_range(address, size)
        elif address or size:
            raise WireError(errno.EINVAL, "everything, and a range")
        return cls(address, size, flags)


def dma_access(address: int, count: int, data: Body = b"") -> bytes:
    """The body of DMA_READ and DMA_WRITE, request and reply: ``data`` where bytes travel that way."""
    return _DMA_ACCESS.pack(address, count) + data


def parse_dma_read(body: Body, most: int) -> tuple[int, int]:
    """(address, count) of a DMA_READ request. EINVAL for a length, or a count not of 1 to ``most``."""
    address, count = unpack(_DMA_ACCESS, body, exact=True)
    check_count(count, most)
    return address, count


def parse_dma_write(body: Body, most: int) -> tuple[int, memoryview]:
    """(address, data) of a DMA_WRITE request; the data is a view of the body. EINVAL as ``parse_dma_read``."""
    address, count = unpack(_DMA_ACCESS, body)
    data = memoryview(body)[_DMA_ACCESS.size :]
    check_count(count, most)
    if len(data) != count:
        raise WireError(errno.EINVAL, f"{len(data)} bytes follow instead of {count}")
    return address, data


# Regions.


def region_io_fds(index: int, argsz: int = _REGION_IO_FDS.size) -> bytes:
    """The body of a DEVICE_GET_REGION_IO_FDS request."""
    return _REGION_IO_FDS.pack(argsz, 0, index, 0)


def parse_region_io_fds(body: Body) -> int:
    """The region's index of such a request. EINVAL: too short, or fields that must be zero are not."""
    argsz, flags, index, count = unpack(_REGION_IO_FDS, body)
    check_argsz(argsz, _REGION_IO_FDS)
    if flags or count:
        raise WireError(errno.EINVAL, f"flags {flags:#x} count {count}")
    return index


def region_access(offset: int, region: int, count: int, data: Body = b"") -> bytes:
    """The body of REGION_READ and REGION_WRITE, request and reply: ``data`` where bytes travel that way."""
    return _REGION_ACCESS.pack(offset, region, count) + data


def parse_region_read(body: Body, most: int) -> tuple[int, int, int]:
    """(offset, region, count) of a REGION_READ request. EINVAL for a length, or a count not of 1 to ``most``."""
    try:
        offset, region, count = _REGION_ACCESS.unpack(body)
    except struct.error:
        raise wrong_size(_REGION_ACCESS, body) from None
    if not 0 < count <= most:
        check_count(count, most)
    return offset, region, count


def parse_region_write(body: Body, most: int) -> tuple[int, int, memoryview]:
    """(offset, region, data) of a REGION_WRITE request; the data is a view of the body. EINVAL as above."""
    offset, region, count = unpack(_REGION_ACCESS, body)
    data = memoryview(body)[_REGION_ACCESS.size :]
    check_count(count, most)
    if len(data) != count:
        raise WireError(errno.EINVAL, f"{len(data)} bytes follow instead of {count}")
    return offset, region, data


def parse_region_reply(body: Body, offset: int, region: int, count: int, *, read: bool) -> memoryview:
    """The data of a reply (none of a REGION_WRITE's). EPROTO where it is not the answer to that request."""
    found = unpack(_REGION_ACCESS, body)
    data = memoryview(body)[_REGION_ACCESS.size :]
    if found != (offset, region, count) or len(data) != (count if read else 0):
        raise WireError(errno.EPROTO, f"an answer of {len(data)} bytes about region {found[1]} {found[0]:#x}")
    return data


def write_multi(writes: Iterable[tuple[int, int, bytes]]) -> bytes:
    """The body of REGION_WRITE_MULTI: (offset, region, 1 to 8 bytes) each. The reply's is ``write_multi_reply``."""
    entries = [_ENTRY.pack(offset, region, len(data), data) for offset, region, data in writes]
    return _MULTI.pack(len(entries)) + b"".join(entries)


def write_multi_reply(count: int) -> bytes:
    """The body of the reply: how many writes were done."""
    return _MULTI.pack(count)


def parse_write_multi(body: Body) -> list[tuple[int, int, bytes]]:
    """The writes of a request. EINVAL for a count that is not that of the body, or a write of not 1 to 8 bytes."""
    (count,) = unpack(_MULTI, body)
    if len(body) != _MULTI.size + count * _ENTRY_SIZE:
        raise WireError(errno.EINVAL, f"{count} writes in {len(body)} bytes")
    writes = []
    for offset, region, length, data in _ENTRY.iter_unpack(memoryview(body)[_MULTI.size :]):
        check_count(length, lib.VFIO_USER_WRITE_MULTI_DATA)
        writes.append((offset, region, data[:length]))
    return writes


# What no device of pvfio has, for its refusal and for the log.


def device_feature(flags: int, argsz: int = _FEATURE.size, data: Body = b"") -> bytes:
    """The body of a DEVICE_FEATURE request: VFIO_DEVICE_FEATURE_* and the feature's number."""
    return _FEATURE.pack(argsz, flags) + data


def parse_device_feature(body: Body) -> int:
    """The flags of a DEVICE_FEATURE request. EINVAL for a body or an argsz that is too small."""
    argsz, flags = unpack(_FEATURE, body)
    check_argsz(argsz, _FEATURE)
    return flags
