"""What every vfio-user message has: words in a fixed order, a refusal, a name.

Models the fixed parts of structures as ``struct.Struct``, derived from ``abi/*.h``, the error a body that cannot be is
answered with, and what an access of a region becomes on a bus. Not here: what is in the bodies (messages.py,
messages_info.py, version.py).
"""

from __future__ import annotations

import errno
import os
import struct
from functools import cache
from typing import Final

from pvfio.abi import ffi, lib
from pvfio.errors import PvfioError

__all__ = [
    "END",
    "PAGE",
    "Body",
    "WireError",
    "aligned_pieces",
    "check_argsz",
    "check_count",
    "check_range",
    "command_name",
    "layout",
    "unpack",
    "wrong_size",
]

Body = bytes | bytearray | memoryview

PAGE: Final = 4096
END: Final = 1 << 64
_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
_NAMES: Final = {
    getattr(lib, f"VFIO_USER_{name}"): name
    for name in (
        "VERSION",
        "DMA_MAP",
        "DMA_UNMAP",
        "DEVICE_GET_INFO",
        "DEVICE_GET_REGION_INFO",
        "DEVICE_GET_REGION_IO_FDS",
        "DEVICE_GET_IRQ_INFO",
        "DEVICE_SET_IRQS",
        "REGION_READ",
        "REGION_WRITE",
        "DMA_READ",
        "DMA_WRITE",
        "DEVICE_RESET",
        "REGION_WRITE_MULTI",
        "DEVICE_FEATURE",
        "MIG_DATA_READ",
        "MIG_DATA_WRITE",
    )
}


class WireError(PvfioError):
    """A message that cannot be, or a request that is refused: ``errno`` is what its sender is told."""

    def __init__(self, number: int, reason: str = "") -> None:
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"{name}: {reason or os.strerror(number)}")
        self.errno = number
        self.reason = reason


@cache
def layout(structure: str) -> struct.Struct:
    """The fixed part of a structure of ``abi/*.h``, e.g. ``layout("vfio_user_dma_map")``, as a ``struct.Struct``."""
    fields = ffi.typeof(f"struct {structure}").fields
    found = struct.Struct(
        "<" + "".join(_CODES[ffi.sizeof(f.type)] for _, f in fields if f.type.kind == "primitive")
    )
    if found.size != ffi.sizeof(f"struct {structure}"):
        raise TypeError(f"struct {structure} is not words alone")
    return found


def command_name(command: int) -> str:
    """The specification's name of a command, without ``VFIO_USER_``."""
    return _NAMES.get(command, f"command {command}")


def unpack(form: struct.Struct, body: Body, *, exact: bool = False) -> tuple[int, ...]:
    """The fixed part of a body. EINVAL for one that is too short, or with ``exact`` too long."""
    if len(body) < form.size or (exact and len(body) != form.size):
        raise wrong_size(form, body)
    return form.unpack_from(body)


def wrong_size(form: struct.Struct, body: Body) -> WireError:
    return WireError(errno.EINVAL, f"a body of {len(body)} bytes instead of {form.size}")


def aligned_pieces(offset: int, size: int, widest: int) -> list[tuple[int, int]]:
    """Naturally aligned pieces of an access, as (offset, width), in ascending order."""
    pieces, end = [], offset + size
    while offset < end:
        width = widest
        while offset % width or offset + width > end:
            width //= 2
        pieces.append((offset, width))
        offset += width
    return pieces


def check_argsz(argsz: int, form: struct.Struct) -> None:
    if argsz < form.size:
        raise WireError(errno.EINVAL, f"argsz {argsz} is less than {form.size}")


def check_range(address: int, size: int) -> None:
    if not size or address + size > END or (address | size) % PAGE:
        raise WireError(errno.EINVAL, f"address {address:#x} size {size:#x} is not whole pages")


def check_count(count: int, most: int) -> None:
    if not 0 < count <= most:
        raise WireError(errno.EINVAL, f"{count} bytes; 1 to {most} can be transferred")
