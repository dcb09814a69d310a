"""How a function describes itself: its identity, BARs, MSI-X pages, and the capabilities that say so.

Each function here writes one structure into a ``ConfigSpace`` that is being laid out, and returns its
offset. What the registers then do is in pci.py. Not modelled: the same as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pvfio.abi import lib
from pvfio.devices.config_space import ConfigSpace

__all__ = ["Bar", "MsixLayout", "PciIdentity", "ats", "bars", "express", "header", "msix", "power_management"]

_PAGE = 4096


@dataclass(frozen=True, kw_only=True)
class PciIdentity:
    """What the first registers say.

    ``class_code`` has 24 bits: base class, sub-class, programming interface.
    """

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One memory BAR. ``mmap_areas``: (offset, size) of its pages a driver may map, in bytes, page aligned.

    Raises ``ValueError`` for a size that is not a power of two of at least a page, or an area outside.
    """

    index: int
    size: int
    is_64bit: bool = True
    prefetchable: bool = False
    mmap_areas: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.size < _PAGE or self.size & (self.size - 1):
            raise ValueError(f"BAR {self.index}: size {self.size:#x} is not a power of two of at least 4096")
        if not 0 <= self.index < lib.PCI_STD_NUM_BARS - self.is_64bit:
            raise ValueError(f"BAR {self.index}: no such BAR{' for 64 bits' * self.is_64bit}")
        for offset, size in self.mmap_areas:
            if size <= 0 or (offset | size) % _PAGE or not 0 <= offset <= self.size - size:
                raise ValueError(
                    f"BAR {self.index}: area {offset:#x}+{size:#x} is not whole pages of the BAR"
                )


@dataclass(frozen=True, kw_only=True)
class MsixLayout:
    """Where the MSI-X table and the PBA are: whole pages of a BAR from ``offset`` on, nothing else in them."""

    bar: int
    offset: int
    vectors: int

    @property
    def pba(self) -> int:
        """Offset of the PBA in the BAR: right behind the table."""
        return int(self.offset + lib.PCI_MSIX_ENTRY_SIZE * self.vectors)

    @property
    def size(self) -> int:
        """Bytes of the whole pages that table and PBA take."""
        end = self.pba + 8 * ((self.vectors + 63) // 64)
        return (end - self.offset + _PAGE - 1) // _PAGE * _PAGE


def header(config: ConfigSpace, identity: PciIdentity, intx_pin: int) -> None:
    """The type 0 header. ``intx_pin``: 0 none, 1 to 4 INTA to INTD, else ``ValueError``."""
    if not 0 <= intx_pin <= 4:
        raise ValueError(f"INTx pin is 0 (none) to 4, not {intx_pin}")
    config.set(lib.PCI_VENDOR_ID, 2, identity.vendor)
    config.set(lib.PCI_DEVICE_ID, 2, identity.device)
    command = lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER | lib.PCI_COMMAND_PARITY | lib.PCI_COMMAND_SERR
    if intx_pin:
        command |= lib.PCI_COMMAND_INTX_DISABLE
    config.set(lib.PCI_COMMAND, 2, 0, writable=command)
    config.set(lib.PCI_STATUS, 2, 0, clear=lib.PCI_STATUS_ERRORS)
    config.set(lib.PCI_REVISION_ID, 4, identity.class_code << 8 | identity.revision)
    config.set(lib.PCI_CACHE_LINE_SIZE, 1, 0, writable=0xFF)
    config.set(lib.PCI_SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor)
    config.set(lib.PCI_SUBSYSTEM_ID, 2, identity.subsystem)
    config.set(lib.PCI_INTERRUPT_LINE, 1, 0, writable=0xFF)
    config.set(lib.PCI_INTERRUPT_PIN, 1, intx_pin)


def bars(config: ConfigSpace, layout: Sequence[Bar]) -> None:
    """The BAR registers. ``ValueError`` where two share one."""
    taken: set[int] = set()
    for bar in layout:
        slots = {bar.index, bar.index + bar.is_64bit}
        if slots & taken:
            raise ValueError(f"BAR {bar.index} overlaps another")
        taken |= slots
        kind = lib.PCI_BASE_ADDRESS_MEM_TYPE_64 * bar.is_64bit
        kind |= lib.PCI_BASE_ADDRESS_MEM_PREFETCH * bar.prefetchable
        width = 8 if bar.is_64bit else 4
        register = lib.PCI_BASE_ADDRESS_0 + 4 * bar.index
        config.set(register, width, kind, writable=(1 << 8 * width) - bar.size)


def power_management(config: ConfigSpace) -> int:
    """PCI power management, version 3: D0 and D3hot, no reset on the way back to D0."""
    cap = config.add_capability(lib.PCI_CAP_ID_PM, lib.PCI_PM_SIZEOF)
    config.set(cap + lib.PCI_PM_PMC, 2, 3)
    state = lib.PCI_PM_CTRL_STATE_MASK
    config.set(cap + lib.PCI_PM_CTRL, 2, lib.PCI_PM_CTRL_NO_SOFT_RESET, writable=state)
    return cap


def express(config: ConfigSpace) -> int:
    """PCI Express, version 2, with function level reset.

    Device Control as after power-on (PCIe 4.0 7.5.3.4).
    """
    cap = config.add_capability(lib.PCI_CAP_ID_EXP, lib.PCI_CAP_EXP_SIZEOF)
    flags = lib.PCI_EXP_FLAGS_VERSION_2 | lib.PCI_EXP_TYPE_RC_END << lib.PCI_EXP_TYPE_SHIFT
    config.set(cap + lib.PCI_EXP_FLAGS, 2, flags)
    config.set(cap + lib.PCI_EXP_DEVCAP, 4, lib.PCI_EXP_DEVCAP_RBER | lib.PCI_EXP_DEVCAP_FLR)
    reset, writable = lib.PCI_EXP_DEVCTL_AFTER_RESET, lib.PCI_EXP_DEVCTL_WRITABLE
    config.set(cap + lib.PCI_EXP_DEVCTL, 2, reset, writable=writable)
    config.set(cap + lib.PCI_EXP_DEVSTA, 2, 0, clear=lib.PCI_EXP_DEVSTA_ERRORS)
    return cap


def msix(config: ConfigSpace, layout: MsixLayout, bar: Bar | None) -> int:
    """MSI-X.

    ``ValueError`` for pages outside the BAR or inside one of its mmap areas, or a wrong vector count.
    """
    if not 1 <= layout.vectors <= lib.PCI_MSIX_FLAGS_QSIZE + 1:
        raise ValueError(f"MSI-X has 1 to 2048 vectors, not {layout.vectors}")
    if bar is None or layout.offset % _PAGE or not 0 <= layout.offset <= bar.size - layout.size:
        raise ValueError(
            f"MSI-X at {layout.offset:#x}+{layout.size:#x} is not whole pages of BAR {layout.bar}"
        )
    if any(o < layout.offset + layout.size and layout.offset < o + s for o, s in bar.mmap_areas):
        raise ValueError(f"BAR {bar.index}: an mmap area holds MSI-X pages")
    cap = config.add_capability(lib.PCI_CAP_ID_MSIX, lib.PCI_CAP_MSIX_SIZEOF)
    writable = lib.PCI_MSIX_FLAGS_ENABLE | lib.PCI_MSIX_FLAGS_MASKALL
    config.set(cap + lib.PCI_MSIX_FLAGS, 2, layout.vectors - 1, writable=writable)
    config.set(cap + lib.PCI_MSIX_TABLE, 4, layout.offset | layout.bar)
    config.set(cap + lib.PCI_MSIX_PBA, 4, layout.pba | layout.bar)
    return cap


def ats(config: ConfigSpace) -> int:
    """Address Translation Services (PCIe 4.0 10.5.1); an invalidate queue depth of 0 means 32 requests."""
    cap = config.add_extended(lib.PCI_EXT_CAP_ID_ATS, 1, lib.PCI_EXT_CAP_ATS_SIZEOF)
    config.set(cap + lib.PCI_ATS_CAP, 2, lib.PCI_ATS_CAP_PAGE_ALIGNED)
    writable = lib.PCI_ATS_CTRL_ENABLE | lib.PCI_ATS_CTRL_STU_MASK
    config.set(cap + lib.PCI_ATS_CTRL, 2, 0, writable=writable)
    return cap
