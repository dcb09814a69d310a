"""PCI configuration space: 4096 bytes, write masks, chains of capabilities.

A byte has read-only bits, writable bits and write-1-to-clear bits, nothing else; what a write *does* is
decided by the function that owns the space (pci.py). BAR sizing needs no rule of its own: the bits below a
BAR's size are read-only. Not modelled: bridges (type 1 headers), expansion ROMs, I/O BARs.
"""

from __future__ import annotations

from pvfio.abi import lib

__all__ = ["ConfigSpace"]

_SIZE: int = lib.PCI_CFG_SPACE_EXP_SIZE


class ConfigSpace:
    """The configuration space of one function, little endian, reset values remembered.

    ``set`` and ``add_*`` lay it out; ``seal`` ends the layout and makes it the state after reset; ``read``
    and ``write`` are what the bus does. Source: PCI Local Bus 3.0 6.1-6.2, 6.7; PCI Express Base 4.0 7.5,
    7.6.
    """

    def __init__(self) -> None:
        self.data = bytearray(_SIZE)
        self._writable = bytearray(_SIZE)
        self._clear = bytearray(_SIZE)
        self._after_reset = b""
        self._next_cap: int = 0x40
        self._cap_link: int = lib.PCI_CAPABILITY_LIST
        self._next_ext: int = lib.PCI_EXT_CAP_BASE
        self._ext_link = 0

    def get(self, offset: int, size: int) -> int:
        """The stored value, no side effects."""
        return int.from_bytes(self.data[offset : offset + size], "little")

    def set(self, offset: int, size: int, value: int, *, writable: int = 0, clear: int = 0) -> None:
        """Lays out one register: its value, the bits a write changes, the bits a written 1 clears."""
        end = offset + size
        self.data[offset:end] = value.to_bytes(size, "little")
        self._writable[offset:end] = writable.to_bytes(size, "little")
        self._clear[offset:end] = clear.to_bytes(size, "little")

    def poke(self, offset: int, size: int, value: int) -> None:
        """The device's own store: changes the value whatever the masks say."""
        self.data[offset : offset + size] = value.to_bytes(size, "little")

    def add_capability(self, cap_id: int, size: int) -> int:
        """Appends a capability of ``size`` bytes, header included, zeroed. Returns its offset.

        Raises ``ValueError`` when the 256 bytes are full.
        """
        offset = self._next_cap
        if offset + size > lib.PCI_CFG_SPACE_SIZE:
            raise ValueError(f"capability {cap_id:#x} does not fit into {lib.PCI_CFG_SPACE_SIZE} bytes")
        self.data[self._cap_link] = offset
        self.data[offset] = cap_id
        self._cap_link = offset + lib.PCI_CAP_LIST_NEXT
        self._next_cap = (offset + size + 3) & ~3
        self.data[lib.PCI_STATUS] |= lib.PCI_STATUS_CAP_LIST
        return offset

    def add_extended(self, cap_id: int, version: int, size: int) -> int:
        """Appends an extended capability of ``size`` bytes, header included. Returns its offset.

        Raises ``ValueError`` when the 4096 bytes are full.
        """
        offset = self._next_ext
        if offset + size > _SIZE:
            raise ValueError(f"extended capability {cap_id:#x} does not fit into {_SIZE} bytes")
        self.poke(offset, 4, cap_id | version << lib.PCI_EXT_CAP_VERSION_SHIFT)
        if self._ext_link:
            link = self.get(self._ext_link, 4) | offset << lib.PCI_EXT_CAP_NEXT_SHIFT
            self.poke(self._ext_link, 4, link)
        self._ext_link = offset
        self._next_ext = (offset + size + 3) & ~3
        return offset

    def find_capability(self, cap_id: int) -> int:
        """The offset of a capability, 0 where there is none."""
        offset: int = self.data[lib.PCI_CAPABILITY_LIST]
        while offset and self.data[offset] != cap_id:
            offset = self.data[offset + lib.PCI_CAP_LIST_NEXT]
        return offset

    def seal(self) -> None:
        """Remembers the present state as the state after reset."""
        self._after_reset = bytes(self.data)

    def reset(self) -> None:
        """Back to what ``seal`` remembered."""
        self.data[:] = self._after_reset

    def read(self, offset: int, size: int) -> int:
        """A bus read of 1, 2 or 4 bytes at any offset; bytes beyond the space read as ones."""
        end = offset + size
        if offset < 0 or end > _SIZE:
            return int((1 << 8 * size) - 1)
        return int.from_bytes(self.data[offset:end], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A bus write of 1, 2 or 4 bytes at any offset; beyond the space it is dropped."""
        end = offset + size
        if offset < 0 or end > _SIZE:
            return
        old = int.from_bytes(self.data[offset:end], "little")
        writable = int.from_bytes(self._writable[offset:end], "little")
        clear = int.from_bytes(self._clear[offset:end], "little")
        new = (old & ~writable | value & writable) & ~(value & clear)
        self.data[offset:end] = new.to_bytes(size, "little")
