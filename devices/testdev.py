"""A teaching device: scratch memory, one DMA channel, interrupts. The smallest complete PCI function.

BAR 0 (64-bit, 32 KiB): four pages of scratch memory, which a driver may map; a page of registers; the MSI-X
page; nothing. BAR 2 (32-bit, 4 KiB): the registers again, for drivers that want a small BAR. DMA is done in
the store that orders it, by the device's bus master, or, where that may wait for somebody, in a worker thread of the
device's task: a model for control paths, not for speed. Not modelled: queues.

Registers, from BAR 0 offset 0x4000 (and BAR 2 offset 0), little endian:

| offset | bits | name | |
|---|---|---|---|
| 0x00 | 32 | ID | 0x54534554, read only |
| 0x04 | 32 | INVERT | reads the complement of what was written |
| 0x08 | 64 | SRC | IOVA, or an offset into scratch memory, as CMD says |
| 0x10 | 64 | DST | |
| 0x18 | 32 | COUNT | bytes, at most 16384 |
| 0x1c | 32 | CMD | a write starts: 1 scratch to IOVA, 2 IOVA to scratch, 3 IOVA to IOVA; bit 8: interrupt |
| 0x20 | 32 | STATUS | 0 idle, 1 done, 2 aborted, 3 cancelled, 4 bad command, 5 busy; read only |
| 0x24 | 32 | DONE | bytes moved by the last command; read only |
| 0x28 | 64 | FAULT | IOVA of the last abort; read only |
| 0x30 | 32 | VECTOR | which MSI-X vector CMD bit 8 fires |
| 0x34 | 32 | RAISE | a write fires the vector written, or asserts the pin while MSI-X is off |
| 0x38 | 32 | ACK | a write deasserts the pin; reads its level |
"""

from __future__ import annotations

import fcntl
import os
import threading
import weakref
from typing import Final, NamedTuple

import trio

from pvfio.abi import lib
from pvfio.devices.pci import Bar, MsixLayout, PciFunction, PciIdentity
from pvfio.memory import map_fd
from pvfio.silicon import BusMaster, DmaAborted, DmaCancelled

__all__ = ["TestDevice"]

_SCRATCH: Final = 0x4000
_REGISTERS: Final = 0x4000
_PAGE: Final = 0x1000
_ID: Final = 0x54534554

_INVERT, _SRC, _DST, _COUNT, _VECTOR = 0x04, 0x08, 0x10, 0x18, 0x30
_COMMAND, _STATUS, _DONE, _FAULT, _RAISE, _ACK = 0x1C, 0x20, 0x24, 0x28, 0x34, 0x38
_WIDTHS: Final = {_SRC: 8, _DST: 8, _COUNT: 4, _VECTOR: 4}
_TO_MEMORY, _FROM_MEMORY, _COPY, _INTERRUPT = 1, 2, 3, 0x100


class _Order(NamedTuple):
    """A command as it was written, and after how many resets."""

    command: int
    src: int
    dst: int
    size: int
    resets: int


class _Outcome(NamedTuple):
    """What became of a command: the registers' values, and bytes for scratch memory."""

    status: int
    done: int
    fault: int | None = None
    data: bytes = b""


class TestDevice(PciFunction):
    """PCI 1234:11e8, class 0x00ff00. ``intx=True`` gives it an INTA pin. ``vectors`` MSI-X vectors.

    STATUS values are attributes: IDLE, DONE, ABORTED, CANCELLED, BAD_COMMAND, BUSY (then CMD is dropped).
    """

    __test__ = False

    IDLE, DONE, ABORTED, CANCELLED, BAD_COMMAND, BUSY = range(6)

    def __init__(self, bus: BusMaster, *, vectors: int = 4, intx: bool = False, ats: bool = False) -> None:
        self._make_scratch()
        self._registers = bytearray(_PAGE)
        self._resets = 0
        self._moving = threading.Lock()
        self._waiting: _Order | None = None
        self._ordered = trio.Event()
        super().__init__(
            bus,
            PciIdentity(vendor=0x1234, device=0x11E8, class_code=0x00FF00, revision=0x10),
            bars=(
                Bar(index=0, size=2 * _SCRATCH, prefetchable=True, mmap_areas=((0, _SCRATCH),)),
                Bar(index=2, size=_PAGE, is_64bit=False),
            ),
            msix=MsixLayout(bar=0, offset=_REGISTERS + _PAGE, vectors=vectors),
            intx_pin=1 if intx else 0,
            ats=ats,
        )
        self.on_reset()

    def on_reset(self) -> None:
        """Scratch memory keeps its address (drivers have it mapped) and reads zero. DMA of a worker thread is over."""
        self._resets += 1
        with self._moving:
            self._waiting = None
        self.scratch[:] = bytes(_SCRATCH)
        self._registers[:] = bytes(_PAGE)
        self._put(0, 4, _ID)

    def _make_scratch(self) -> None:
        fd = os.memfd_create("pvfio-testdev", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        close = weakref.finalize(self, os.close, fd)
        try:
            os.ftruncate(fd, _SCRATCH)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.scratch = map_fd(fd, 0, _SCRATCH, write=True).view()
        except OSError:
            close()
            raise
        self._scratch_fd, self._close_scratch = fd, close

    def renew_memory(self) -> None:
        """Other scratch memory."""
        close = self._close_scratch
        self._make_scratch()
        close()

    def bar_fd(self, bar: int) -> int:
        """The scratch memory of BAR 0."""
        return self._scratch_fd if bar == 0 else super().bar_fd(bar)

    def mmio_read(self, bar: int, offset: int, size: int) -> int:
        """Scratch memory or a register; what is neither reads zero."""
        if bar == 0 and offset < _SCRATCH:
            return int.from_bytes(self.scratch[offset : offset + size], "little")
        register = offset - _REGISTERS if bar == 0 else offset
        if not 0 <= register < _PAGE:
            return 0
        return self._get(register, size)

    def mmio_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Scratch memory or a register.

        A register takes writes of its own size, 64-bit ones also as two halves.
        """
        if bar == 0 and offset < _SCRATCH:
            self.scratch[offset : offset + size] = value.to_bytes(size, "little")
            return
        register = offset - _REGISTERS if bar == 0 else offset
        width, low = _WIDTHS.get(register, 0), _WIDTHS.get(register - 4, 0)
        if size >= 4 and (width >= size or low == 8 == 2 * size):
            self._put(register, size, value)
        elif size == 4 and register == _INVERT:
            self._put(_INVERT, 4, value ^ 0xFFFFFFFF)
        elif size == 4 and register == _COMMAND:
            self._command(value)
        elif size == 4 and register == _RAISE:
            self._raise(value)
        elif size == 4 and register == _ACK:
            self._set_pin(False)

    def _get(self, register: int, size: int) -> int:
        return int.from_bytes(self._registers[register : register + size], "little")

    def _put(self, register: int, size: int, value: int) -> None:
        self._registers[register : register + size] = value.to_bytes(size, "little")

    def _set_pin(self, level: bool) -> None:
        self._put(_ACK, 4, int(level))
        self.set_intx(level)

    def _raise(self, vector: int) -> None:
        if self.msix_enabled and self.msix is not None:
            if vector < self.msix.vectors:
                self.msix.fire(vector)
        elif self.config.get(lib.PCI_INTERRUPT_PIN, 1):
            self._set_pin(True)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Executes commands whose DMA may wait for somebody, until cancelled; one in progress ends all the same."""
        task_status.started()
        while True:
            await self._ordered.wait()
            self._ordered = trio.Event()
            order = self._waiting
            if order is None:
                continue
            outcome = await trio.to_thread.run_sync(self._carry_out, order)
            if outcome is not None and order.resets == self._resets:
                self._waiting = None
                self._finish(order, outcome)

    def _command(self, command: int) -> None:
        if self._waiting is not None:
            return
        order = _Order(command, self._get(_SRC, 8), self._get(_DST, 8), self._get(_COUNT, 4), self._resets)
        if self.bus.remote:
            self._waiting = order
            self._put(_STATUS, 4, self.BUSY)
            self._ordered.set()
            return
        outcome = self._carry_out(order)
        assert outcome is not None
        self._finish(order, outcome)

    def _carry_out(self, order: _Order) -> _Outcome | None:
        """Moves what a command orders, in any thread; nothing once there was a reset."""
        with self._moving:
            if order.resets != self._resets:
                return None
            try:
                data = self._transfer(order.command & 0xFF, order.src, order.dst, order.size)
            except DmaAborted as abort:
                return _Outcome(self.ABORTED, abort.done, abort.fault_iova)
            except DmaCancelled as cancelled:
                return _Outcome(self.CANCELLED, cancelled.done)
            if data is None:
                return _Outcome(self.BAD_COMMAND, 0)
            return _Outcome(self.DONE, order.size, data=data)

    def _finish(self, order: _Order, outcome: _Outcome) -> None:
        if outcome.data:
            self.scratch[order.dst : order.dst + len(outcome.data)] = outcome.data
        if outcome.fault is not None:
            self._put(_FAULT, 8, outcome.fault)
        self._put(_STATUS, 4, outcome.status)
        self._put(_DONE, 4, outcome.done)
        if order.command & _INTERRUPT:
            self._raise(self._get(_VECTOR, 4))

    def _transfer(self, kind: int, src: int, dst: int, count: int) -> bytes | None:
        """What goes into scratch memory; ``None`` for a command that cannot be."""
        scratch = {_TO_MEMORY: src, _FROM_MEMORY: dst}.get(kind, 0)
        if scratch + count > _SCRATCH or kind not in (_TO_MEMORY, _FROM_MEMORY, _COPY):
            return None
        if kind == _FROM_MEMORY:
            return self.bus.read(src, count)
        if kind == _TO_MEMORY:
            self.bus.write(dst, bytes(self.scratch[src : src + count]))
        else:
            self.bus.move(dst, src, count)
        return b""
