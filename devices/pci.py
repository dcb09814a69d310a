"""The PCI side of an emulated function: configuration space, BARs, MSI-X, INTx, power and reset.

A device subclasses ``PciFunction``, describes itself in the constructor and fills in the hooks; whoever
owns the bus (vPCI, a vfio-user server) calls the rest. A function is handed its bus master and knows
nothing of what is behind it. Not modelled: I/O BARs, expansion ROMs, MSI, PME, D1 and D2, link registers
(the function says it is a root complex integrated endpoint, which has none), the address written to a BAR
(the bus routes by BAR number).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

import trio

from pvfio.abi import lib
from pvfio.devices import pci_layout
from pvfio.devices.config_space import ConfigSpace
from pvfio.devices.pci_layout import Bar, MsixLayout, PciIdentity
from pvfio.memory import PAGE_SIZE, map_fd
from pvfio.silicon import BusMaster, Msix

__all__ = ["Bar", "MsixLayout", "PciFunction", "PciIdentity"]

_ACCESS_SIZES = frozenset((1, 2, 4, 8))
_CONFIG_SIZES = frozenset((1, 2, 4))


class PciFunction:
    """Base of every emulated PCI function.

    Out of reset memory decoding and bus mastering are off: BARs read as ones and drop writes, and every DMA
    ends as cancelled (``BusMaster.cancel``), until the driver sets PCI_COMMAND_MEMORY and
    PCI_COMMAND_MASTER. D3hot turns both off as well. Hooks for subclasses: ``mmio_read``, ``mmio_write``,
    ``on_reset``, ``on_enable``, ``mmio``, ``bar_fd``, ``run``. Raises ``ValueError`` for BARs that
    overlap or an MSI-X layout outside them.
    """

    def __init__(
        self,
        bus: BusMaster,
        identity: PciIdentity,
        *,
        bars: Sequence[Bar],
        msix: MsixLayout | None = None,
        intx_pin: int = 0,
        ats: bool = False,
    ) -> None:
        self.bus = bus
        self.config = ConfigSpace()
        self.msix: Msix | None = None
        self.msix_layout = msix
        self._bars = {bar.index: bar for bar in bars}
        self._intx: Callable[[bool], None] | None = None
        self._intx_level = False
        self._intx_seen = False
        self._dma_cancelled = False
        self._memory = False
        self._master = False
        self._closed = False
        self._ats = 0
        self._ats_control = 0
        pci_layout.header(self.config, identity, intx_pin)
        pci_layout.bars(self.config, bars)
        self._pm = pci_layout.power_management(self.config)
        self._exp = pci_layout.express(self.config)
        self._msix_cap = 0
        self._msix_bar, self._msix_pages = -1, range(0)
        if msix is not None:
            self._msix_cap = pci_layout.msix(self.config, msix, self._bars.get(msix.bar))
            self.msix = Msix(bus, msix.vectors)
            self._msix_bar, self._msix_pages = msix.bar, range(msix.offset, msix.offset + msix.size)
        if ats:
            self._ats = pci_layout.ats(self.config)
        self.config.seal()
        bus.cancel(True)

    # What the bus calls.

    def config_read(self, offset: int, size: int) -> int:
        """Reads 1, 2 or 4 bytes of configuration space. Raises ``OSError`` (EINVAL) for another size."""
        if size not in _CONFIG_SIZES:
            raise _bad_size(size)
        return self.config.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Writes 1, 2 or 4 bytes and does what they order: enables, MSI-X control, power state, function
        reset.

        A set Initiate FLR bit resets before the call returns. Raises ``OSError`` (EINVAL) for another size.
        """
        if size not in _CONFIG_SIZES:
            raise _bad_size(size)
        power = self.config.get(self._pm + lib.PCI_PM_CTRL, 1)
        self.config.write(offset, size, value)
        state = self.config.get(self._pm + lib.PCI_PM_CTRL, 1) & lib.PCI_PM_CTRL_STATE_MASK
        if state not in (lib.PCI_PM_D0, lib.PCI_PM_D3HOT):
            self.config.poke(self._pm + lib.PCI_PM_CTRL, 1, power)
        byte = self._exp + lib.PCI_EXP_DEVCTL + 1 - offset
        if 0 <= byte < size and value >> 8 * byte & lib.PCI_EXP_DEVCTL_BCR_FLR >> 8:
            self.function_level_reset()
        else:
            self._apply()

    def bars(self) -> tuple[Bar, ...]:
        """The BARs, lowest index first."""
        return tuple(self._bars[index] for index in sorted(self._bars))

    def read(self, bar: int, offset: int, size: int) -> int:
        """Reads 1, 2, 4 or 8 bytes of a BAR; an unaligned access is made of aligned ones.

        Raises ``OSError`` (EINVAL) for another size, outside the BAR, or where there is no such BAR.
        """
        self._check(bar, offset, size)
        if not self._memory:
            return (1 << 8 * size) - 1
        if offset % size == 0:
            return self._read_aligned(bar, offset, size)
        step = offset & -offset
        value = 0
        for at in range(0, size, step):
            value |= self._read_aligned(bar, offset + at, step) << 8 * at
        return value

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Writes 1, 2, 4 or 8 bytes of a BAR; unaligned accesses and errors as ``read``."""
        self._check(bar, offset, size)
        if not self._memory:
            return
        step = size if offset % size == 0 else offset & -offset
        mask = (1 << 8 * step) - 1
        for at in range(0, size, step):
            self._write_aligned(bar, offset + at, step, value >> 8 * at & mask)

    def map_area(self, bar: int, offset: int, size: int) -> memoryview:
        """A view of ``size`` bytes of a BAR's memory. Raises ``OSError`` (EINVAL) outside its mmap areas."""
        fd, at = self.map_fd(bar, offset, size)
        inside = at % PAGE_SIZE
        pages = map_fd(fd, at - inside, -(-(inside + size) // PAGE_SIZE) * PAGE_SIZE, write=True)
        return pages.view()[inside : inside + size]

    def map_fd(self, bar: int, offset: int, size: int) -> tuple[int, int]:
        """For another process to map a BAR's memory: a descriptor, which stays the device's, and where in its file.

        The file cannot be truncated; it reaches to the end of what was asked for at least. Raises as ``map_area``.
        """
        found = self._bars.get(bar)
        for start, length in found.mmap_areas if found else ():
            if size > 0 and start <= offset and offset + size <= start + length:
                return self.bar_fd(bar), offset
        raise OSError(errno.EINVAL, f"BAR {bar}: {offset:#x}+{size:#x} is not memory that can be mapped")

    def renew_memory(self) -> None:
        """The memory of the mmap areas is other memory from now on, and reads zero; who mapped it before has no part in
        it any more. For a function nobody uses, after a reset. Raises ``OSError``, and nothing has changed then.

        The base has none.
        """

    def connect_intx(self, callback: Callable[[bool], None] | None) -> None:
        """Where the pin's level goes: called with every change, and now if the pin is asserted."""
        self._intx = callback
        self._intx_seen = False
        self._apply_intx()

    def recheck_intx(self) -> bool:
        """The bus unmasks the asserted pin: whether the device looks again if it is to be, and then tells the level.

        The base: no, what the pin says is so.
        """
        return False

    def function_level_reset(self) -> None:
        """FLR (PCI Express 4.0 6.6.2): aborts DMA, then everything is as after power-on. Returns when done."""
        self.bus.cancel(True)
        self.on_reset()
        if self.msix is not None:
            self.msix.reset()
        self.config.reset()
        self._dma_cancelled = False
        self._intx_level = False
        self._apply()

    async def reset(self) -> None:
        """``function_level_reset`` for tasks.

        A checkpoint follows the reset: cancelled or not, it is done.
        """
        self.function_level_reset()
        await trio.lowlevel.checkpoint()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The device's task, until it is cancelled. The base has nothing to do in it, and leaves nothing behind."""
        task_status.started()
        await trio.sleep_forever()

    def close(self) -> None:
        """Ends DMA for good. Subclasses stop their engine, then call this. May be called again."""
        self._closed = True
        self.bus.cancel(True)

    # What the device asks.

    @property
    def memory_enabled(self) -> bool:
        """BARs decode: PCI_COMMAND_MEMORY is set, in D0."""
        return self._memory

    @property
    def master_enabled(self) -> bool:
        """DMA is allowed: PCI_COMMAND_MASTER is set, in D0."""
        return self._master

    @property
    def ats_enabled(self) -> bool:
        """The driver enabled ATS."""
        return bool(self._ats and self.config.get(self._ats + lib.PCI_ATS_CTRL, 2) & lib.PCI_ATS_CTRL_ENABLE)

    @property
    def msix_enabled(self) -> bool:
        """The driver enabled MSI-X: interrupts are messages, the pin is silent."""
        if not self._msix_cap:
            return False
        return bool(self.config.get(self._msix_cap + lib.PCI_MSIX_FLAGS, 2) & lib.PCI_MSIX_FLAGS_ENABLE)

    def stop_decoding(self) -> None:
        """BARs read as ones and drop writes, and DMA ends as cancelled, until configuration space is written."""
        self._memory = self._master = False
        self._gate_dma()

    def cancel_dma(self, on: bool) -> None:
        """The device's own abort: DMA ends as cancelled until it is switched off again, or by reset.

        Use this, not ``bus.cancel``: bus mastering may be off at the same time.
        """
        self._dma_cancelled = on
        self._gate_dma()

    def set_intx(self, level: bool, *, tell: bool = False) -> None:
        """Asserts or deasserts the pin. The bus sees it unless INTx is disabled or MSI-X is in use.

        ``tell``: it is told the level even if that is the same.
        """
        self._intx_level = level
        self._apply_intx(tell)

    # Hooks.

    def mmio_read(self, bar: int, offset: int, size: int) -> int:
        """A naturally aligned load of 1, 2, 4 or 8 bytes.

        The base: a register that is not there reads zero.
        """
        return 0

    def mmio_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """A naturally aligned store. The base drops it."""

    def on_reset(self) -> None:
        """Back to power-on.

        DMA is cancelled already; must not wait for anything but the device's own engine.
        """

    def on_enable(self, memory: bool, master: bool) -> None:
        """Memory decoding or bus mastering changed: for devices whose BARs have a path in C."""

    def mmio(self, bar: int) -> Any:
        """The ``struct pv_mmio *`` of a BAR that has a path in C, else None."""
        return None

    def bar_fd(self, bar: int) -> int:
        """A file with the mmap areas of a BAR in it, each at its offset in the BAR."""
        raise OSError(errno.EINVAL, f"BAR {bar} is not memory")

    # Behaviour.

    def _apply(self) -> None:
        """Makes the function behave as its registers say."""
        command = self.config.get(lib.PCI_COMMAND, 2)
        awake = self.config.get(self._pm + lib.PCI_PM_CTRL, 1) & lib.PCI_PM_CTRL_STATE_MASK == lib.PCI_PM_D0
        memory = bool(command & lib.PCI_COMMAND_MEMORY) and awake
        master = bool(command & lib.PCI_COMMAND_MASTER) and awake
        changed = (memory, master) != (self._memory, self._master)
        self._memory, self._master = memory, master
        self._gate_dma()
        if self.msix is not None:
            flags = self.config.get(self._msix_cap + lib.PCI_MSIX_FLAGS, 2)
            self.msix.control(
                bool(flags & lib.PCI_MSIX_FLAGS_ENABLE), bool(flags & lib.PCI_MSIX_FLAGS_MASKALL)
            )
        if self._ats:
            control = self.config.get(self._ats + lib.PCI_ATS_CTRL, 2)
            if control != self._ats_control:
                self._ats_control = control
                self.bus.set_ats(bool(control & lib.PCI_ATS_CTRL_ENABLE), control & lib.PCI_ATS_CTRL_STU_MASK)
        self._apply_intx()
        if changed:
            self.on_enable(memory, master)

    def _gate_dma(self) -> None:
        self.bus.cancel(self._closed or self._dma_cancelled or not self._master)

    def _apply_intx(self, tell: bool = False) -> None:
        status = self.config.get(lib.PCI_STATUS, 2) & ~lib.PCI_STATUS_INTERRUPT
        self.config.poke(lib.PCI_STATUS, 2, status | lib.PCI_STATUS_INTERRUPT * self._intx_level)
        disabled = self.config.get(lib.PCI_COMMAND, 2) & lib.PCI_COMMAND_INTX_DISABLE
        level = self._intx_level and not disabled and not self.msix_enabled
        if (tell or level != self._intx_seen) and self._intx is not None:
            self._intx_seen = level
            self._intx(level)

    def _check(self, bar: int, offset: int, size: int) -> None:
        if size not in _ACCESS_SIZES:
            raise _bad_size(size)
        found = self._bars.get(bar)
        if found is None or not 0 <= offset <= found.size - size:
            raise OSError(errno.EINVAL, f"BAR {bar}: {offset:#x}+{size} is outside")

    def _read_aligned(self, bar: int, offset: int, size: int) -> int:
        if offset not in self._msix_pages or bar != self._msix_bar:
            return self.mmio_read(bar, offset, size)
        at = offset - self._msix_pages.start
        # Loads of 1 and 2 bytes are not defined for MSI-X structures; they read as a part of the word.
        width = max(size, 4)
        word = self._msix_word(at // width * width, width)
        return word >> 8 * (at % width) & (1 << 8 * size) - 1

    def _msix_word(self, at: int, width: int) -> int:
        assert self.msix is not None
        assert self.msix_layout is not None
        pba = self.msix_layout.pba - self.msix_layout.offset
        pba_size = 8 * ((self.msix_layout.vectors + 63) // 64)
        if at < pba:
            return self.msix.table_read(at, width)
        if at < pba + pba_size:
            return self.msix.pba_read(at - pba, width)
        return 0

    def _write_aligned(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset not in self._msix_pages or bar != self._msix_bar:
            self.mmio_write(bar, offset, size, value)
            return
        assert self.msix is not None
        assert self.msix_layout is not None
        if size >= 4 and offset < self.msix_layout.pba:
            self.msix.table_write(offset - self._msix_pages.start, size, value)


def _bad_size(size: int) -> OSError:
    return OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: an access of {size} bytes")
