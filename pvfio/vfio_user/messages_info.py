"""vfio-user messages that describe: the device, its regions, its interrupts; and the one that sets interrupts up.

Part of messages.py, which says what is modelled.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import Final, Self

from pvfio.abi import lib
from pvfio.vfio_user.wire import END, Body, WireError, check_argsz, layout, unpack

__all__ = ["Area", "DeviceInfo", "IrqInfo", "IrqSet", "RegionInfo"]

Area = tuple[int, int]
"""(offset, size) of a part of a region that can be mapped, in bytes."""

_DEVICE_INFO: Final = layout("vfio_user_device_info")
_REGION_INFO: Final = layout("vfio_region_info")
_IRQ_INFO: Final = layout("vfio_irq_info")
_IRQ_SET: Final = layout("vfio_irq_set")
_CAP: Final = layout("vfio_info_cap_header")
_SPARSE: Final = struct.Struct("<II")
_AREA: Final = layout("vfio_region_sparse_mmap_area")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """DEVICE_GET_INFO's reply: VFIO_DEVICE_FLAGS_*, and how many regions and interrupt indexes there are."""

    flags: int
    num_regions: int
    num_irqs: int

    @staticmethod
    def request() -> bytes:
        """The request's body."""
        return _DEVICE_INFO.pack(_DEVICE_INFO.size, 0, 0, 0)

    @staticmethod
    def parse_request(body: Body) -> None:
        """EINVAL for a body or an argsz that is too small."""
        check_argsz(unpack(_DEVICE_INFO, body)[0], _DEVICE_INFO)

    def pack(self) -> bytes:
        """The reply's body."""
        return _DEVICE_INFO.pack(_DEVICE_INFO.size, self.flags, self.num_regions, self.num_irqs)

    @classmethod
    def parse(cls, body: Body) -> Self:
        """The reply's. EINVAL for one that is too short."""
        return cls(*unpack(_DEVICE_INFO, body)[1:])


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """DEVICE_GET_REGION_INFO's reply.

    ``flags`` are VFIO_REGION_INFO_FLAG_*, ``offset`` is where the region begins in the file that comes with it,
    ``areas`` what of it can be mapped (empty: all of it, if MMAP is set). ``argsz`` is what the whole description
    takes: more than was asked for means that ``areas`` is not complete.
    """

    index: int
    size: int
    flags: int
    offset: int = 0
    areas: tuple[Area, ...] = ()
    argsz: int = _REGION_INFO.size

    @staticmethod
    def request(index: int, argsz: int = _REGION_INFO.size) -> bytes:
        """The request's body; ``argsz``: bytes there are for the reply's."""
        return _REGION_INFO.pack(argsz, 0, index, 0, 0, 0)

    @staticmethod
    def parse_request(body: Body) -> tuple[int, int]:
        """(index, argsz). EINVAL for a body or an argsz that is too small."""
        argsz, _, index, _, _, _ = unpack(_REGION_INFO, body)
        check_argsz(argsz, _REGION_INFO)
        return index, argsz

    def pack(self, argsz: int) -> bytes:
        """The reply's body, as much as ``argsz`` bytes of it."""
        chain, flags, offset = b"", self.flags, 0
        if self.areas:
            chain = _CAP.pack(lib.VFIO_REGION_INFO_CAP_SPARSE_MMAP, 1, 0) + _SPARSE.pack(len(self.areas), 0)
            chain += b"".join(_AREA.pack(*area) for area in self.areas)
            flags |= lib.VFIO_REGION_INFO_FLAG_CAPS
            # Said even where the capability does not fit: QEMU refuses the short reply otherwise.
            offset = _REGION_INFO.size
        whole = _REGION_INFO.size + len(chain)
        return (_REGION_INFO.pack(whole, flags, self.index, offset, self.size, self.offset) + chain)[:argsz]

    @classmethod
    def parse(cls, body: Body) -> Self:
        """The reply's. EINVAL: too short, or areas outside the region; EPROTO: capabilities that lead nowhere."""
        argsz, flags, index, cap, size, offset = unpack(_REGION_INFO, body)
        areas: tuple[Area, ...] = ()
        if flags & lib.VFIO_REGION_INFO_FLAG_CAPS and argsz <= len(body):
            areas = _sparse_areas(body, cap)
        if any(not length or start + length > size for start, length in areas):
            raise WireError(errno.EINVAL, f"region {index} of {size:#x} bytes has areas {areas}")
        return cls(index, size, flags, offset, areas, argsz)


def _sparse_areas(body: Body, at: int) -> tuple[Area, ...]:
    while at:
        if not _REGION_INFO.size <= at <= len(body) - _CAP.size:
            raise WireError(errno.EPROTO, f"a capability at {at:#x}")
        kind, _, following = _CAP.unpack_from(body, at)
        if kind == lib.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
            first = at + _CAP.size + _SPARSE.size
            count = _SPARSE.unpack_from(body, at + _CAP.size)[0] if first <= len(body) else END
            if first + count * _AREA.size > len(body):
                raise WireError(errno.EPROTO, f"{count} areas in {len(body)} bytes")
            return tuple(_AREA.unpack_from(body, first + i * _AREA.size) for i in range(count))
        if following and following <= at:
            raise WireError(errno.EPROTO, "capabilities that lead back")
        at = following
    return ()


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """DEVICE_GET_IRQ_INFO's reply: VFIO_IRQ_INFO_*, and how many interrupts the index has."""

    index: int
    flags: int
    count: int

    @staticmethod
    def request(index: int) -> bytes:
        """The request's body."""
        return _IRQ_INFO.pack(_IRQ_INFO.size, 0, index, 0)

    @staticmethod
    def parse_request(body: Body) -> int:
        """The index. EINVAL for a body or an argsz that is too small."""
        argsz, _, index, _ = unpack(_IRQ_INFO, body)
        check_argsz(argsz, _IRQ_INFO)
        return index

    def pack(self) -> bytes:
        """The reply's body."""
        return _IRQ_INFO.pack(_IRQ_INFO.size, self.flags, self.index, self.count)

    @classmethod
    def parse(cls, body: Body) -> Self:
        """The reply's. EINVAL for one that is too short."""
        _, flags, index, count = unpack(_IRQ_INFO, body)
        return cls(index, flags, count)


_ONE_DATA: Final = (
    lib.VFIO_IRQ_SET_DATA_NONE,
    lib.VFIO_IRQ_SET_DATA_BOOL,
    lib.VFIO_IRQ_SET_DATA_EVENTFD,
)
_ONE_ACTION: Final = (
    lib.VFIO_IRQ_SET_ACTION_MASK,
    lib.VFIO_IRQ_SET_ACTION_UNMASK,
    lib.VFIO_IRQ_SET_ACTION_TRIGGER,
)


@dataclass(frozen=True, slots=True)
class IrqSet:
    """DEVICE_SET_IRQS: ``flags`` are one VFIO_IRQ_SET_DATA_* and one _ACTION_*; ``bools``: a byte an interrupt.

    The eventfds of DATA_EVENTFD travel with the message: ``count`` of them, or none to take eventfds away.
    """

    index: int
    flags: int
    start: int = 0
    count: int = 0
    bools: bytes = b""

    @property
    def data(self) -> int:
        """Which VFIO_IRQ_SET_DATA_*."""
        return int(self.flags & lib.VFIO_IRQ_SET_DATA_TYPE_MASK)

    @property
    def action(self) -> int:
        """Which VFIO_IRQ_SET_ACTION_*."""
        return int(self.flags & lib.VFIO_IRQ_SET_ACTION_TYPE_MASK)

    def pack(self) -> bytes:
        """The request's body. The reply has none."""
        size = _IRQ_SET.size + len(self.bools)
        return _IRQ_SET.pack(size, self.flags, self.index, self.start, self.count) + self.bools

    @classmethod
    def parse(cls, body: Body) -> Self:
        """EINVAL: not one kind of data and one action, a sum past 32 bits, fewer bools than interrupts, too short."""
        argsz, flags, index, start, count = unpack(_IRQ_SET, body)
        check_argsz(argsz, _IRQ_SET)
        data = flags & lib.VFIO_IRQ_SET_DATA_TYPE_MASK
        if data not in _ONE_DATA or flags ^ data not in _ONE_ACTION:
            raise WireError(errno.EINVAL, f"flags {flags:#x}")
        if start + count >= 1 << 32:
            raise WireError(errno.EINVAL, f"interrupts {start}+{count}")
        bools = b""
        if data == lib.VFIO_IRQ_SET_DATA_BOOL:
            bools = bytes(memoryview(body)[_IRQ_SET.size : min(argsz, _IRQ_SET.size + count)])
            if len(bools) != count:
                raise WireError(errno.EINVAL, f"{len(bools)} bools for {count} interrupts")
        return cls(index, flags, start, count, bools)
