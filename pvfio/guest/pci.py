"""PCI as the guest kernel sees it: the functions offered over a vPCI channel, and what it does to them.

Enumeration, BAR sizing through configuration space, capabilities, ATS, MSI-X programming, enabling and
function level reset. A channel is one PCI domain (segment) with one bus 00 and one device 00, so a function
is "SSSS:00:00.F". References are to PCI Express Base 4.0 and PCI Local Bus 3.0.

Not modelled: bridges, I/O BARs, expansion ROMs, MSI without X, BAR addresses (an access names its BAR), power
states, hot-plug.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, DeviceFailed, IommuError

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator, Sequence

    from pvfio.guest.iommu_group import IommuGroup
    from pvfio.guest.logical_id import LogicalIdRegistry

__all__ = ["MsixCapability", "PciBar", "PciDevice", "VpciBar", "VpciChannel", "enumerate_bus"]

_ABSENT = 0xFFFF
# A list of capabilities cannot have more entries than aligned places; a longer one is a loop.
_MAX_CAPABILITIES = 48
_MAX_EXTENDED_CAPABILITIES = 480
_FLR_DEADLINE = 1.0


class VpciBar(Protocol):
    """What a channel says of a BAR: ``size`` in bytes, the (offset, size) areas a process may map."""

    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_64bit(self) -> bool: ...
    @property
    def prefetchable(self) -> bool: ...
    @property
    def mmap_areas(self) -> tuple[tuple[int, int], ...]: ...


class VpciChannel(Protocol):
    """The vPCI channel the guest is handed: one PCI domain's functions and everything they answer to.

    ``fn`` is a function number of ``offers``; offsets and sizes are bytes. Configuration accesses have 1, 2 or 4
    bytes. MMIO accesses of 1, 2, 4 or 8 bytes raise ``OSError`` EINVAL outside the BAR; so does ``map_area`` for
    what is not memory. ``mmio`` is a BAR's ``struct pv_mmio *`` or None. ``compose_msi`` gives the (address, data)
    that rings ``eventfd``, until ``release_msi``. ``set_intx`` says who is told the level of the pin. ``reset`` is a
    function level reset, done even when it is cancelled.
    """

    @property
    def instance_guid(self) -> uuid.UUID: ...
    @property
    def segment(self) -> int: ...
    def offers(self) -> list[int]: ...
    def config_read(self, fn: int, offset: int, size: int) -> int: ...
    def config_write(self, fn: int, offset: int, size: int, value: int) -> None: ...
    def bars(self, fn: int) -> Sequence[VpciBar]: ...
    def mmio_read(self, fn: int, bar: int, offset: int, size: int) -> int: ...
    def mmio_write(self, fn: int, bar: int, offset: int, size: int, value: int) -> None: ...
    def mmio(self, fn: int, bar: int) -> Any: ...
    def map_area(self, fn: int, bar: int, offset: int, size: int) -> memoryview: ...
    def compose_msi(self, fn: int, vector: int, eventfd: int) -> tuple[int, int]: ...
    def release_msi(self, fn: int, data: int) -> None: ...
    def set_intx(self, fn: int, callback: Callable[[bool], None] | None) -> None: ...
    async def reset(self, fn: int) -> None: ...


@dataclass(frozen=True)
class PciBar:
    """A memory BAR as sized: ``size`` in bytes."""

    index: int
    size: int
    is_64bit: bool
    prefetchable: bool


@dataclass(frozen=True)
class MsixCapability:
    """Where a function's MSI-X is: BAR and offset of table and PBA, and how many vectors."""

    capability: int
    vectors: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int


class PciDevice:
    """One PCI function. ``driver`` is the kernel driver bound to it, ``iommu_group`` its group."""

    def __init__(self, channel: VpciChannel, function: int, registry: LogicalIdRegistry) -> None:
        self.channel = channel
        self.segment = channel.segment
        self.function = function
        self.name = f"{self.segment:04x}:00:00.{function:x}"
        self.driver: str | None = None
        self.iommu_group: IommuGroup | None = None
        self._registry = registry
        self._vectors: dict[int, tuple[int, int, bool]] = {}
        self.vendor = self.config_read(lib.PCI_VENDOR_ID, 2)
        self.device = self.config_read(lib.PCI_DEVICE_ID, 2)
        self.revision = self.config_read(lib.PCI_REVISION_ID, 1)
        self.class_code = self.config_read(lib.PCI_REVISION_ID, 4) >> 8
        self.subsystem_vendor = self.config_read(lib.PCI_SUBSYSTEM_VENDOR_ID, 2)
        self.subsystem = self.config_read(lib.PCI_SUBSYSTEM_ID, 2)
        self.interrupt_pin = self.config_read(lib.PCI_INTERRUPT_PIN, 1)
        self._express = self.find_capability(lib.PCI_CAP_ID_EXP)
        self._ats = self.find_extended_capability(lib.PCI_EXT_CAP_ID_ATS)
        self.msix = self._find_msix()
        self.bars = self._size_bars()

    def __repr__(self) -> str:
        return f"<PCI {self.name} {self.vendor:04x}:{self.device:04x}>"

    @property
    def logical_id(self) -> int:
        """How hypercalls name the function. Raises ``IommuError`` ENODEV: its channel is not registered."""
        return self._registry.device_id(self.segment, self.function)

    def config_read(self, offset: int, size: int = 4) -> int:
        """Reads 1, 2 or 4 bytes of configuration space. ``ValueError`` for a place that cannot be."""
        _check_config(offset, size)
        return self.channel.config_read(self.function, offset, size)

    def config_write(self, offset: int, value: int, size: int = 4) -> None:
        """Writes 1, 2 or 4 bytes of configuration space. ``ValueError`` for a place that cannot be."""
        _check_config(offset, size)
        self.channel.config_write(self.function, offset, size, value)

    def find_capability(self, capability: int) -> int | None:
        """Offset of a capability in the list (PCI Local Bus 3.0 6.7), or ``None``; a looping list ends."""
        if not self.config_read(lib.PCI_STATUS, 2) & lib.PCI_STATUS_CAP_LIST:
            return None
        offset = self.config_read(lib.PCI_CAPABILITY_LIST, 1) & ~3
        for _ in range(_MAX_CAPABILITIES):
            if offset < lib.PCI_CAPABILITY_LIST:
                return None
            if self.config_read(offset, 1) == capability:
                return offset
            offset = self.config_read(offset + lib.PCI_CAP_LIST_NEXT, 1) & ~3
        return None

    def find_extended_capability(self, capability: int) -> int | None:
        """Offset of an extended capability (PCI Express 4.0 7.6.3), or ``None``; a looping list ends."""
        offset: int = lib.PCI_EXT_CAP_BASE
        for _ in range(_MAX_EXTENDED_CAPABILITIES):
            header = self.config_read(offset, 4)
            if header in (0, 0xFFFF_FFFF):
                return None
            if header & lib.PCI_EXT_CAP_ID_MASK == capability:
                return offset
            offset = header >> lib.PCI_EXT_CAP_NEXT_SHIFT & ~3
            if offset < lib.PCI_EXT_CAP_BASE:
                return None
        return None

    def set_command(self, *, on: int = 0, off: int = 0) -> int:
        """Sets and clears bits of the command register; returns what it was."""
        command = self.config_read(lib.PCI_COMMAND, 2)
        wanted = command & ~off | on
        if wanted != command:
            self.config_write(lib.PCI_COMMAND, wanted, 2)
        return command

    def enable(self) -> None:
        """Lets the function answer MMIO and make DMA."""
        self.set_command(on=lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)

    def disable(self) -> None:
        """Stops its DMA; MMIO stays."""
        self.set_command(off=lib.PCI_COMMAND_MASTER)

    @property
    def ats_supported(self) -> bool:
        """Whether the function has the ATS capability."""
        return self._ats is not None

    @property
    def ats_enabled(self) -> bool:
        """The enable bit of ATS control (PCI Express 4.0 10.5.1.3); False without the capability."""
        return bool(self._ats_control() & lib.PCI_ATS_CTRL_ENABLE)

    def enable_ats(self) -> None:
        """Turns ATS on, smallest translation unit 4 KiB. Raises ``IommuError`` EINVAL: no capability."""
        self._set_ats_control(lib.PCI_ATS_CTRL_ENABLE)

    def disable_ats(self) -> None:
        """Turns ATS off. Raises ``IommuError`` EINVAL without the capability."""
        self._set_ats_control(0)

    def msix_enable(self, *, masked: bool = False) -> None:
        """Sets MSI-X enable; ``masked`` is the function mask. Raises ``IommuError`` ENODEV without MSI-X."""
        flags = lib.PCI_MSIX_FLAGS_ENABLE | (lib.PCI_MSIX_FLAGS_MASKALL if masked else 0)
        self._set_msix_flags(flags)

    def msix_disable(self) -> None:
        """Clears MSI-X enable and function mask. Raises ``IommuError`` ENODEV without MSI-X."""
        self._set_msix_flags(0)
        self._vectors.clear()

    def msix_write(self, vector: int, address: int, data: int, *, masked: bool = False) -> None:
        """Programs one vector; it is masked while its fields change.

        Raises ``IommuError`` ENODEV without MSI-X, ``ValueError`` for a vector the table does not have.
        """
        msix = self._need_msix()
        if not 0 <= vector < msix.vectors:
            raise ValueError(f"{self.name} has {msix.vectors} MSI-X vectors, not {vector}")
        base = msix.table_offset + vector * lib.PCI_MSIX_ENTRY_SIZE
        control = lib.PCI_MSIX_ENTRY_CTRL_MASKBIT if masked else 0
        with self._memory_decoding():
            for offset, value in (
                (12, lib.PCI_MSIX_ENTRY_CTRL_MASKBIT),
                (0, address & 0xFFFF_FFFF),
                (4, address >> 32),
                (8, data),
                (12, control),
            ):
                self.channel.mmio_write(self.function, msix.table_bar, base + offset, 4, value)
        self._vectors[vector] = (address, data, masked)

    def msix_mask(self, vector: int, masked: bool) -> None:
        """Masks or unmasks a vector. Raises as ``msix_write``, ``ValueError`` if it is not programmed."""
        if vector not in self._vectors:
            raise ValueError(f"{self.name}: MSI-X vector {vector} is not programmed")
        msix = self._need_msix()
        address, data, _ = self._vectors[vector]
        offset = msix.table_offset + vector * lib.PCI_MSIX_ENTRY_SIZE + 12
        control = lib.PCI_MSIX_ENTRY_CTRL_MASKBIT if masked else 0
        with self._memory_decoding():
            self.channel.mmio_write(self.function, msix.table_bar, offset, 4, control)
        self._vectors[vector] = (address, data, masked)

    @property
    def has_flr(self) -> bool:
        """Whether the function can be reset alone (PCI Express 4.0 7.5.3.3)."""
        if self._express is None:
            return False
        return bool(self.config_read(self._express + lib.PCI_EXP_DEVCAP, 4) & lib.PCI_EXP_DEVCAP_FLR)

    async def reset(self, *, deadline: float = _FLR_DEADLINE) -> None:
        """Function level reset, then command register, BARs, ATS and MSI-X as they were before.

        ``deadline`` in seconds. Raises ``IommuError`` ENOTTY where the function cannot be reset,
        ``DeadlineExceeded``, ``DeviceFailed`` where it does not come back. Then, and when cancelled, the
        function is left unable to make DMA.
        """
        if not self.has_flr:
            raise IommuError(errno.ENOTTY, "reset", "no function level reset", device=self.name)
        command = self.config_read(lib.PCI_COMMAND, 2)
        bars = [self.config_read(lib.PCI_BASE_ADDRESS_0 + 4 * i, 4) for i in range(lib.PCI_STD_NUM_BARS)]
        ats = self._ats_control()
        flags = self._msix_flags()
        self.config_write(lib.PCI_COMMAND, lib.PCI_COMMAND_INTX_DISABLE, 2)
        try:
            with trio.fail_after(deadline):
                await self.channel.reset(self.function)
        except trio.TooSlowError:
            raise DeadlineExceeded("reset", deadline, device=self.name) from None
        if self.config_read(lib.PCI_VENDOR_ID, 2) == _ABSENT:
            raise DeviceFailed(self.name, "does not answer after a reset")
        for i, value in enumerate(bars):
            self.config_write(lib.PCI_BASE_ADDRESS_0 + 4 * i, value, 4)
        if ats & lib.PCI_ATS_CTRL_ENABLE:
            self._set_ats_control(ats)
        for vector, (address, data, masked) in self._vectors.items():
            self.msix_write(vector, address, data, masked=masked)
        if flags & lib.PCI_MSIX_FLAGS_ENABLE:
            self._set_msix_flags(flags)
        self.config_write(lib.PCI_COMMAND, command, 2)

    def _ats_control(self) -> int:
        return 0 if self._ats is None else self.config_read(self._ats + lib.PCI_ATS_CTRL, 2)

    def _set_ats_control(self, value: int) -> None:
        if self._ats is None:
            raise IommuError(errno.EINVAL, "ATS", "no ATS capability", device=self.name)
        self.config_write(self._ats + lib.PCI_ATS_CTRL, value, 2)

    def _need_msix(self) -> MsixCapability:
        if self.msix is None:
            raise IommuError(errno.ENODEV, "MSI-X", "no MSI-X capability", device=self.name)
        return self.msix

    def _msix_flags(self) -> int:
        if self.msix is None:
            return 0
        return self.config_read(self.msix.capability + lib.PCI_MSIX_FLAGS, 2)

    def _set_msix_flags(self, flags: int) -> None:
        offset = self._need_msix().capability + lib.PCI_MSIX_FLAGS
        keep = self.config_read(offset, 2) & ~(lib.PCI_MSIX_FLAGS_ENABLE | lib.PCI_MSIX_FLAGS_MASKALL)
        changed = flags & (lib.PCI_MSIX_FLAGS_ENABLE | lib.PCI_MSIX_FLAGS_MASKALL)
        self.config_write(offset, keep | changed, 2)

    @contextmanager
    def _memory_decoding(self) -> Iterator[None]:
        command = self.set_command(on=lib.PCI_COMMAND_MEMORY)
        try:
            yield
        finally:
            if not command & lib.PCI_COMMAND_MEMORY:
                self.set_command(off=lib.PCI_COMMAND_MEMORY)

    def _find_msix(self) -> MsixCapability | None:
        at = self.find_capability(lib.PCI_CAP_ID_MSIX)
        if at is None:
            return None
        vectors = (self.config_read(at + lib.PCI_MSIX_FLAGS, 2) & lib.PCI_MSIX_FLAGS_QSIZE) + 1
        table = self.config_read(at + lib.PCI_MSIX_TABLE, 4)
        pba = self.config_read(at + lib.PCI_MSIX_PBA, 4)
        return MsixCapability(
            at,
            vectors,
            table & lib.PCI_MSIX_BIR_MASK,
            table & lib.PCI_MSIX_OFFSET_MASK,
            pba & lib.PCI_MSIX_BIR_MASK,
            pba & lib.PCI_MSIX_OFFSET_MASK,
        )

    def _size_bars(self) -> tuple[PciBar, ...]:
        """Sizes by writing ones with decoding off (PCI Local Bus 3.0 6.2.5.1), and puts the values back."""
        command = self.set_command(off=lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_IO)
        bars: list[PciBar] = []
        index = 0
        while index < lib.PCI_STD_NUM_BARS:
            low = self._size_register(index)
            width = 1
            if low and not low & 1:
                is_64bit = bool(low & lib.PCI_BASE_ADDRESS_MEM_TYPE_64)
                high = self._size_register(index + 1) if is_64bit and index < 5 else 0xFFFF_FFFF
                size = (~((high << 32 | low) & ~0xF) + 1) & (1 << 64) - 1
                prefetchable = bool(low & lib.PCI_BASE_ADDRESS_MEM_PREFETCH)
                bars.append(PciBar(index, size, is_64bit, prefetchable))
                width = 2 if is_64bit else 1
            index += width
        self.set_command(on=command & (lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_IO))
        return tuple(bars)

    def _size_register(self, index: int) -> int:
        offset = lib.PCI_BASE_ADDRESS_0 + 4 * index
        value = self.config_read(offset, 4)
        self.config_write(offset, 0xFFFF_FFFF, 4)
        mask = self.config_read(offset, 4)
        self.config_write(offset, value, 4)
        return mask


def enumerate_bus(channel: VpciChannel, registry: LogicalIdRegistry) -> list[PciDevice]:
    """The functions a channel offers that answer, lowest number first."""
    found = sorted(channel.offers())
    present = (fn for fn in found if channel.config_read(fn, lib.PCI_VENDOR_ID, 2) != _ABSENT)
    return [PciDevice(channel, fn, registry) for fn in present]


def _check_config(offset: int, size: int) -> None:
    if size not in (1, 2, 4) or offset % size or not 0 <= offset <= lib.PCI_CFG_SPACE_EXP_SIZE - size:
        raise ValueError(f"configuration space access of {size} bytes at {offset:#x}")
