"""Regions of a served function: its BARs and its configuration space, by message and by mapping.

Accesses of any length are made of the aligned ones a bus would make; 64-byte submissions to a portal stay whole.
Two things are the server's own and virtual, as in Linux's vfio-pci: the MSI-X table (reads give what was written,
and nothing follows from it: interrupts are set up by DEVICE_SET_IRQS), and the enable and mask bits of the MSI-X
capability. All else is the function's: BAR sizing works by its registers, a memory BAR reads as ones while decoding
is off, a function level reset asked for in configuration space has happened when the write returns.

Not modelled: expansion ROMs and VGA (regions of no bytes), I/O BARs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Final

from pvfio.abi import ffi, lib
from pvfio.silicon import BarInfo
from pvfio.vfio_user.messages_info import RegionInfo
from pvfio.vfio_user.server.function import Function
from pvfio.vfio_user.wire import PAGE, WireError, aligned_pieces

__all__ = ["Regions", "find_capability"]

_CONFIG: Final[int] = lib.VFIO_PCI_CONFIG_REGION_INDEX
_CONFIG_SIZE: Final[int] = lib.PCI_CFG_SPACE_EXP_SIZE
_ROM: Final[int] = lib.VFIO_PCI_ROM_REGION_INDEX
_RW: Final[int] = lib.VFIO_REGION_INFO_FLAG_READ | lib.VFIO_REGION_INFO_FLAG_WRITE
_ENTRY: Final[int] = lib.PCI_MSIX_ENTRY_SIZE
_WIDTHS: Final = frozenset((1, 2, 4, 8))
_SUBMISSION: Final = 64
_HEADER: Final = 64
_BARS_END: Final[int] = lib.PCI_BASE_ADDRESS_0 + 4 * lib.PCI_STD_NUM_BARS
_LINE: Final[int] = lib.PCI_INTERRUPT_LINE
_CONTROL: Final = 0xC0
"""Enable and function mask, in the high byte of MSI-X Message Control (PCI Local Bus 3.0 6.8.2.3)."""


def find_capability(function: Function, wanted: int) -> int:
    """The offset of a capability in configuration space, 0 where there is none."""
    at = function.config_read(lib.PCI_CAPABILITY_LIST, 1)
    while at and function.config_read(at, 1) != wanted:
        at = function.config_read(at + lib.PCI_CAP_LIST_NEXT, 1)
    return at


class Regions:
    """The regions of one function, all of its life; ``forget`` between clients.

    ``after_reset`` is called when a function level reset was asked for in configuration space, and has happened.
    """

    def __init__(self, function: Function, after_reset: Callable[[], None]) -> None:
        self._function = function
        self._after_reset = after_reset
        self._bars = {bar.index: bar for bar in function.bars()}
        self._portals: dict[int, Any] = {}
        msix = find_capability(function, lib.PCI_CAP_ID_MSIX)
        self._control_at = msix + lib.PCI_MSIX_FLAGS + 1 if msix else -1
        express = find_capability(function, lib.PCI_CAP_ID_EXP)
        self._devctl = express + lib.PCI_EXP_DEVCTL if express else 0
        self._flr_at = self._devctl + 1 if express else -1
        layout = function.msix_layout
        self._table_bar = layout.bar if layout is not None else -1
        self._table_at = layout.offset if layout is not None else 0
        self._table = bytearray(layout.vectors * _ENTRY if layout is not None else 0)
        self._control = 0
        self.forget()

    def forget(self) -> None:
        """What is virtual is as after a reset."""
        self._control = 0
        entry = bytes(_ENTRY - 4) + int(lib.PCI_MSIX_ENTRY_CTRL_MASKBIT).to_bytes(4, "little")
        self._table[:] = entry * (len(self._table) // _ENTRY)

    def save(self) -> bytes:
        """What a reset of the device leaves as it was in vfio-pci: the header's writable registers, device control."""
        return self._config_read(0, _HEADER) + (self._config_read(self._devctl, 2) if self._devctl else b"")

    def restore(self, state: bytes) -> None:
        """Puts back what ``save`` returned."""
        write = self._function.config_write
        for at in (*range(lib.PCI_BASE_ADDRESS_0, _BARS_END, 4), lib.PCI_CACHE_LINE_SIZE, _LINE):
            width = 4 if at != _LINE else 1
            write(at, width, int.from_bytes(state[at : at + width], "little"))
        if self._devctl:
            write(self._devctl, 2, int.from_bytes(state[_HEADER:], "little"))
        write(lib.PCI_COMMAND, 2, int.from_bytes(state[lib.PCI_COMMAND : lib.PCI_COMMAND + 2], "little"))

    def open(self) -> None:
        """For a new client: memory decoding is on, as Linux's vfio-pci enables a device that is opened."""
        command = self._function.config_read(lib.PCI_COMMAND, 2)
        self._function.config_write(lib.PCI_COMMAND, 2, command | lib.PCI_COMMAND_MEMORY)

    def info(self, index: int) -> tuple[RegionInfo, int | None]:
        """GET_REGION_INFO, and the file of a region that can be mapped (the function's own).

        EINVAL for another index.
        """
        if index == _CONFIG:
            return RegionInfo(index, _CONFIG_SIZE, _RW), None
        if not 0 <= index < lib.VFIO_PCI_NUM_REGIONS:
            raise WireError(errno.EINVAL, f"region {index}")
        bar = self._bars.get(index)
        if bar is None:
            return RegionInfo(index, 0, 0), None
        fd, base, areas = self._mappable(bar)
        if fd is None:
            return RegionInfo(index, bar.size, _RW), None
        return RegionInfo(index, bar.size, _RW | lib.VFIO_REGION_INFO_FLAG_MMAP, base, areas), fd

    def _mappable(self, bar: BarInfo) -> tuple[int | None, int, tuple[tuple[int, int], ...]]:
        """The file, where the region begins in it, and the areas it holds: a region has one file."""
        file: int | None = None
        base = 0
        areas = []
        for offset, size in bar.mmap_areas:
            try:
                fd, place = self._function.map_fd(bar.index, offset, size)
            except OSError:
                continue
            if place < offset or place + size > os.fstat(fd).st_size:
                continue
            if file is None:
                file, base = fd, place - offset
            if (file, base) == (fd, place - offset):
                areas.append((offset, size))
        return file, base, tuple(areas)

    def read(self, index: int, offset: int, size: int) -> bytes:
        """REGION_READ. EINVAL outside the region."""
        if index == _CONFIG:
            return self._config_read(offset, size)
        if size in _WIDTHS and not offset % size:
            return self._read_piece(index, offset, size)
        return b"".join([self._read_piece(index, at, width) for at, width in aligned_pieces(offset, size, 8)])

    def write(self, index: int, offset: int, data: memoryview | bytes) -> None:
        """REGION_WRITE. EINVAL outside the region."""
        if index == _CONFIG:
            self._config_write(offset, bytes(data))
            return
        size = len(data)
        self._check(index, offset, size)
        if size in _WIDTHS and not offset % size:
            self._write_piece(index, offset, data)
            return
        if not (size | offset) % _SUBMISSION and self._submit(index, offset, data):
            return
        for at, width in aligned_pieces(offset, size, 8):
            self._write_piece(index, at, data[at - offset : at - offset + width])

    def _check(self, index: int, offset: int, size: int) -> None:
        bar = self._bars.get(index)
        if bar is None or offset + size > bar.size:
            raise WireError(errno.EINVAL, f"region {index}: {offset:#x}+{size:#x} is outside")

    # BARs

    def _read_piece(self, index: int, offset: int, width: int) -> bytes:
        if index == self._table_bar and 0 <= (at := offset - self._table_at) < len(self._table):
            return bytes(self._table[at : at + width])
        try:
            return self._function.read(index, offset, width).to_bytes(width, "little")
        except OSError as error:
            raise WireError(errno.EINVAL, str(error)) from None

    def _write_piece(self, index: int, offset: int, data: memoryview | bytes) -> None:
        if index == self._table_bar and 0 <= (at := offset - self._table_at) < len(self._table):
            self._table[at : at + len(data)] = data
        else:
            self._function.write(index, offset, len(data), int.from_bytes(data, "little"))

    def _submit(self, index: int, offset: int, data: memoryview | bytes) -> bool:
        """64-byte submissions as posted writes; false where the BAR takes none."""
        if index not in self._portals:
            self._portals[index] = self._function.mmio(index)
        portal = self._portals[index]
        if portal is None or offset // PAGE != (offset + len(data) - 1) // PAGE:
            return False
        source = ffi.from_buffer(data)
        return not lib.pv_mmio_movdir64b(portal, offset, source, len(data) // _SUBMISSION)

    # Configuration space

    def _config_read(self, offset: int, size: int) -> bytes:
        if offset + size > _CONFIG_SIZE:
            raise WireError(errno.EINVAL, f"configuration space {offset:#x}+{size:#x}")
        read = self._function.config_read
        data = bytearray(
            b"".join(
                read(at, width).to_bytes(width, "little") for at, width in aligned_pieces(offset, size, 4)
            )
        )
        at = self._control_at - offset
        if 0 <= at < size:
            data[at] = data[at] & ~_CONTROL | self._control
        return bytes(data)

    def _config_write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > _CONFIG_SIZE:
            raise WireError(errno.EINVAL, f"configuration space {offset:#x}+{len(data):#x}")
        at = self._control_at - offset
        if 0 <= at < len(data):
            self._control = data[at] & _CONTROL
            real = self._function.config_read(self._control_at, 1)
            data = data[:at] + bytes((real,)) + data[at + 1 :]
        for at, width in aligned_pieces(offset, len(data), 4):
            value = int.from_bytes(data[at - offset : at - offset + width], "little")
            self._function.config_write(at, width, value)
        at = self._flr_at - offset
        if 0 <= at < len(data) and data[at] & lib.PCI_EXP_DEVCTL_BCR_FLR >> 8:
            self.forget()
            self._after_reset()
