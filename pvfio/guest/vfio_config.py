"""A vfio-pci device's configuration space: what its user sees and may change.

BARs, the expansion ROM, the interrupt line and INTx disable are the kernel's, and virtual: sizing a BAR
works, moving it moves nothing. The user may write the command register (without INTx disable), cache line
size, latency timer and BIST, power state, and device control (without payload sizes); asking for a function
level reset there resets through the kernel. Everything else, the MSI-X and ATS capabilities included, can be
read only. Rules: Linux vfio_pci_config.c.

Not modelled: hiding of capabilities, VPD, the advanced features capability, the user's PME enable.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from pvfio.abi import lib
from pvfio.errors import VfioError

if TYPE_CHECKING:
    from pvfio.guest.pci import PciDevice

__all__ = ["VirtualConfig"]

_PM_CTRL = 4
_EXP_DEVCTL = 8
_EXP_DEVCTL2 = 0x28
_FLR_BYTE = 0x80
_BARS = range(0x10, 0x28)
_ROM = range(0x30, 0x34)
_LINE = 0x3C
_CAP_PM = 1
_CAP_EXP = 0x10
_STATIC_WRITABLE = {0x4: 0xFF, 0x5: 0xFF & ~0x04, 0xC: 0xFF, 0xD: 0xFF, 0xF: 0xFF}


class VirtualConfig:
    """Configuration space of an open device; made when it is opened, after its reset.

    ``intx_disabled`` is the user's INTx disable bit; ``on_intx`` is called when it changes.
    """

    def __init__(self, pci: PciDevice, on_intx: Callable[[bool], None]) -> None:
        self._pci = pci
        self._on_intx = on_intx
        self.intx_disabled = False
        self._line = pci.config_read(_LINE, 1)
        express = pci.find_capability(_CAP_EXP)
        self.size = 4096 if express is not None else 256
        self._bars = bytearray(pci.config_read(a, 1) for a in _BARS)
        self._bar_masks = self._masks()
        self._writable = dict(_STATIC_WRITABLE)
        self._flr_at = None if express is None or not pci.has_flr else express + _EXP_DEVCTL + 1
        power = pci.find_capability(_CAP_PM)
        if power is not None:
            self._writable[power + _PM_CTRL] = 0x03
        if express is not None:
            self._writable |= {express + _EXP_DEVCTL: 0x1F, express + _EXP_DEVCTL + 1: 0x0D}
            self._writable |= {express + _EXP_DEVCTL2: 0xDF, express + _EXP_DEVCTL2 + 1: 0xFF}

    def _masks(self) -> bytes:
        """Which bits of the BAR registers hold an address, from the sizes."""
        masks = bytearray(len(_BARS))
        for bar in self._pci.bars:
            wide = bar.is_64bit and bar.index < lib.PCI_STD_NUM_BARS - 1
            mask = ~(bar.size - 1) & ((1 << 64) - 1 if wide else 0xFFFF_FFFF)
            width = 8 if wide else 4
            masks[4 * bar.index : 4 * bar.index + width] = mask.to_bytes(width, "little")
        return bytes(masks)

    def memory_enabled(self) -> bool:
        """Whether the function decodes memory accesses (command bit 1)."""
        return bool(self._pci.config_read(lib.PCI_COMMAND, 2) & lib.PCI_COMMAND_MEMORY)

    def read(self, offset: int, size: int) -> int:
        """``size`` bytes, little-endian. Raises EFAULT outside configuration space."""
        self._check(offset, size)
        value = 0
        for at, width in _pieces(offset, size, 4):
            data = bytearray(self._pci.config_read(at, width).to_bytes(width, "little"))
            for i in range(width):
                data[i] = self._seen(at + i, data[i])
            value |= int.from_bytes(data, "little") << 8 * (at - offset)
        return value

    def asks_for_reset(self, offset: int, value: int, size: int) -> bool:
        """Whether a write sets Initiate Function Level Reset (PCI Express 4.0 7.5.3.4)."""
        at = self._flr_at
        return (
            at is not None and offset <= at < offset + size and bool(value >> 8 * (at - offset) & _FLR_BYTE)
        )

    def write(self, offset: int, value: int, size: int) -> None:
        """Writes what the user may write and drops the rest. Raises EFAULT outside configuration space."""
        self._check(offset, size)
        for at, width in _pieces(offset, size, 2):
            self._write_piece(at, (value >> 8 * (at - offset)).to_bytes(size, "little")[:width])

    def _write_piece(self, at: int, data: bytes) -> None:
        for i, byte in enumerate(data):
            if at + i in _BARS:
                self._bars[at + i - _BARS.start] = byte
            elif at + i == _LINE:
                self._line = byte
        mask = bytes(self._writable.get(at + i, 0) for i in range(len(data)))
        if any(mask):
            old = self._pci.config_read(at, len(data)).to_bytes(len(data), "little")
            merged = bytes(o & ~m | d & m for o, d, m in zip(old, data, mask, strict=True))
            self._pci.config_write(at, int.from_bytes(merged, "little"), len(data))
        if at <= lib.PCI_COMMAND + 1 < at + len(data):
            disabled = bool(data[lib.PCI_COMMAND + 1 - at] & 0x04)
            if disabled != self.intx_disabled:
                self.intx_disabled = disabled
                self._on_intx(disabled)

    def _seen(self, at: int, byte: int) -> int:
        if at in _BARS:
            i = at - _BARS.start
            fixed = byte & 0xF if i % 4 == 0 and self._bar_masks[i : i + 4] != bytes(4) else 0
            return self._bars[i] & self._bar_masks[i] & (0xF0 if fixed else 0xFF) | fixed
        if at in _ROM:
            return 0
        if at == _LINE:
            return self._line
        if at == lib.PCI_COMMAND + 1:
            return byte & ~0x04 | (0x04 if self.intx_disabled else 0)
        return byte

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or offset + size > self.size:
            raise VfioError(
                errno.EFAULT,
                "configuration space access",
                f"offset {offset:#x}",
                device=self._pci.name,
                length=size,
            )


def _pieces(offset: int, size: int, widest: int) -> list[tuple[int, int]]:
    """Naturally aligned pieces of an access, as (offset, width)."""
    found = []
    end = offset + size
    while offset < end:
        width = widest
        while offset % width or offset + width > end:
            width //= 2
        found.append((offset, width))
        offset += width
    return found
