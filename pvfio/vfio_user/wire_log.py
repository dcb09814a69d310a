"""vfio-user messages as lines to read: ``pvfio serve --log wire``.

A line is direction, id, command, what is in it. Models every body that messages.py does; of what cannot be
understood the bytes are shown. Not shown: DMA_READ and DMA_WRITE, which engines ask without Python, and more than a
few bytes of data.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from pvfio.abi import lib
from pvfio.vfio_user import messages
from pvfio.vfio_user.messages import Body, DeviceInfo, DmaMap, DmaUnmap, IrqInfo, IrqSet, RegionInfo
from pvfio.vfio_user.version import Version
from pvfio.vfio_user.wire import END, WireError, layout

__all__ = ["line"]

_SHOWN: Final = 32
_ACCESS: Final = layout("vfio_user_region_access")
_REGIONS: Final = ("BAR0", "BAR1", "BAR2", "BAR3", "BAR4", "BAR5", "ROM", "config", "VGA")
_IRQS: Final = ("INTx", "MSI", "MSI-X", "ERR", "REQ")
_IRQ_FLAGS: Final = ("NONE", "BOOL", "EVENTFD", "MASK", "UNMASK", "TRIGGER")


def line(direction: str, command: int, id: int, flags: int, error: int, body: Body, fds: int) -> str:
    """One message, without a line feed. ``direction``: what stands in front. Never raises for what it is given."""
    words = [f"{direction} {id}", messages.command_name(command)]
    if flags & lib.VFIO_USER_F_NO_REPLY:
        words.append("posted")
    reply = flags & lib.VFIO_USER_F_TYPE_MASK == lib.VFIO_USER_F_TYPE_REPLY
    if reply and (error or flags & lib.VFIO_USER_F_ERROR):
        words.append(f"error {errno.errorcode.get(error, error)}")
    elif len(body):
        words.append(_describe(command, bytes(body), reply))
    if fds:
        words.append(f"[{fds} fd{'s' * (fds > 1)}]")
    return " ".join(words)


def _describe(command: int, body: bytes, reply: bool) -> str:
    describe = (_REPLIES if reply else _REQUESTS).get(command)
    if describe is not None:
        with suppress(WireError):
            return describe(body)
    return _hex(body)


def _hex(data: Body) -> str:
    shown = bytes(data[:_SHOWN]).hex(" ", 4)
    return f"{shown} ... ({len(data)} bytes)" if len(data) > _SHOWN else shown


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if index < len(names) else str(index)


def _version(body: bytes) -> str:
    said = Version.parse(body)
    text = body[4:].rstrip(b"\0").decode(errors="replace")
    with suppress(ValueError, RecursionError):
        text = json.dumps(json.loads(text).get("capabilities"))
    return f"{said.major}.{said.minor} {text}".rstrip()


def _permissions(flags: int) -> str:
    return "r" * bool(flags & lib.VFIO_USER_F_DMA_REGION_READ) + "w" * bool(
        flags & lib.VFIO_USER_F_DMA_REGION_WRITE
    )


def _map(body: bytes) -> str:
    request = DmaMap.parse(body)
    place = f"{request.address:#x}+{request.size:#x} {_permissions(request.flags)}"
    return f"{place} offset {request.offset:#x}"


def _unmap(body: bytes) -> str:
    request = DmaUnmap.parse(body)
    return "all" if request.flags else f"{request.address:#x}+{request.size:#x}"


def _device(body: bytes) -> str:
    info = DeviceInfo.parse(body)
    return f"flags {info.flags:#x} regions {info.num_regions} irqs {info.num_irqs}"


def _region_request(body: bytes) -> str:
    index, argsz = RegionInfo.parse_request(body)
    return f"{_name(_REGIONS, index)} argsz {argsz}"


def _region(body: bytes) -> str:
    info = RegionInfo.parse(body)
    areas = "".join(f" area {offset:#x}+{size:#x}" for offset, size in info.areas)
    return (
        f"{_name(_REGIONS, info.index)} size {info.size:#x} flags {info.flags:#x} argsz {info.argsz}{areas}"
    )


def _irq(body: bytes) -> str:
    info = IrqInfo.parse(body)
    return f"{_name(_IRQS, info.index)} flags {info.flags:#x} count {info.count}"


def _irq_set(body: bytes) -> str:
    request = IrqSet.parse(body)
    flags = " ".join(name for bit, name in enumerate(_IRQ_FLAGS) if request.flags >> bit & 1)
    bools = f" {request.bools.hex()}" if request.bools else ""
    return f"{_name(_IRQS, request.index)} {flags} {request.start}+{request.count}{bools}"


def _region_access(body: bytes) -> str:
    if len(body) < _ACCESS.size:
        raise WireError(errno.EINVAL)
    offset, region, count = _ACCESS.unpack_from(body)
    data = f" = {_hex(body[_ACCESS.size :])}" if len(body) > _ACCESS.size else ""
    return f"{_name(_REGIONS, region)} {offset:#x}+{count:#x}{data}"


def _dma_access(body: bytes) -> str:
    if len(body) <= _ACCESS.size:
        address, count = messages.parse_dma_read(body, END - 1)
        return f"{address:#x}+{count:#x}"
    address, data = messages.parse_dma_write(body, END - 1)
    return f"{address:#x}+{len(data):#x} = {_hex(data)}"


def _multi(body: bytes) -> str:
    return "; ".join(
        f"{_name(_REGIONS, region)} {offset:#x}+{len(data):#x} = {_hex(data)}"
        for offset, region, data in messages.parse_write_multi(body)[:8]
    )


_REQUESTS: Final[dict[int, Callable[[bytes], str]]] = {
    lib.VFIO_USER_VERSION: _version,
    lib.VFIO_USER_DMA_MAP: _map,
    lib.VFIO_USER_DMA_UNMAP: _unmap,
    lib.VFIO_USER_DEVICE_GET_INFO: lambda _: "",
    lib.VFIO_USER_DEVICE_GET_REGION_INFO: _region_request,
    lib.VFIO_USER_DEVICE_GET_IRQ_INFO: lambda body: _name(_IRQS, IrqInfo.parse_request(body)),
    lib.VFIO_USER_DEVICE_SET_IRQS: _irq_set,
    lib.VFIO_USER_REGION_READ: _region_access,
    lib.VFIO_USER_REGION_WRITE: _region_access,
    lib.VFIO_USER_DMA_READ: _dma_access,
    lib.VFIO_USER_DMA_WRITE: _dma_access,
    lib.VFIO_USER_REGION_WRITE_MULTI: _multi,
}
_REPLIES: Final[dict[int, Callable[[bytes], str]]] = {
    lib.VFIO_USER_VERSION: _version,
    lib.VFIO_USER_DMA_UNMAP: _unmap,
    lib.VFIO_USER_DEVICE_GET_INFO: _device,
    lib.VFIO_USER_DEVICE_GET_REGION_INFO: _region,
    lib.VFIO_USER_DEVICE_GET_IRQ_INFO: _irq,
    lib.VFIO_USER_REGION_READ: _region_access,
    lib.VFIO_USER_REGION_WRITE: _region_access,
    lib.VFIO_USER_DMA_READ: _dma_access,
    lib.VFIO_USER_DMA_WRITE: _dma_access,
}
