"""Interrupts of a served function: what DEVICE_SET_IRQS does, index by index.

The client's eventfds are rung from where the interrupt happens: the server programs the function's MSI-X table
itself, as Linux's vfio-pci does, and the bus turns each vector's message into its eventfd. INTx is level-triggered:
when it fires it masks itself, and unmasking with the line still up fires again. ERR and REQ are the server's own
messages. One of INTx and MSI-X at a time; MSI-X vectors may be added while it is enabled. Rules and errnos: Linux
vfio_pci_intrs.c (6.5 and later).

Not modelled: MSI without X, masking of single MSI-X vectors and an eventfd that masks (ENOTTY, as Linux answers).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import trio

from pvfio.abi import lib
from pvfio.silicon import MSI_START, TableBus, is_eventfd
from pvfio.vfio_user.messages_info import IrqInfo, IrqSet
from pvfio.vfio_user.server.function import Function
from pvfio.vfio_user.wire import WireError

__all__ = ["ServerIrqs"]

_NONE: Final = -1
_INTX: Final[int] = lib.VFIO_PCI_INTX_IRQ_INDEX
_MSIX: Final[int] = lib.VFIO_PCI_MSIX_IRQ_INDEX
_ENTRY: Final[int] = lib.PCI_MSIX_ENTRY_SIZE
_ENABLE: Final[int] = lib.PCI_MSIX_FLAGS_ENABLE
_DATA_NONE: Final[int] = lib.VFIO_IRQ_SET_DATA_NONE
_DATA_EVENTFD: Final[int] = lib.VFIO_IRQ_SET_DATA_EVENTFD

_Handler = Callable[[IrqSet, Sequence[int]], None]


class _EventFd:
    """The server's own reference to a client's eventfd. EINVAL for a descriptor that is no eventfd's."""

    def __init__(self, fd: int, bus: TableBus) -> None:
        self._bus = bus
        if not is_eventfd(fd):
            raise WireError(errno.EINVAL, "a file descriptor that is no eventfd")
        try:
            self.fd = os.dup(fd)
        except OSError as error:
            raise WireError(error.errno or errno.EMFILE, "an eventfd") from None

    def signal(self) -> None:
        """Adds one. Never waits, though the counter be full."""
        self._bus.ring(self.fd)

    def drain(self) -> bool:
        """Takes what is in it; false where there is nothing (any more)."""
        try:
            return os.preadv(self.fd, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Drops the reference."""
        os.close(self.fd)


class ServerIrqs:
    """The interrupts of one function, all of its life; ``off`` between clients.

    ``msix_at`` is the offset of its MSI-X capability, 0 without. Tasks run in ``nursery`` while a client is there.
    """

    nursery: trio.Nursery

    def __init__(self, function: Function, bus: TableBus, msix_at: int) -> None:
        self._function = function
        self._bus = bus
        self._flags_at = msix_at + lib.PCI_MSIX_FLAGS
        self._vectors = function.msix.vectors if function.msix is not None else 0
        self._pin = function.config_read(lib.PCI_INTERRUPT_PIN, 1) != 0
        self._type = _NONE
        self._triggers: dict[int, _EventFd] = {}
        self._intx: _EventFd | None = None
        self._masked = False
        self._line = False
        self._unmask: tuple[_EventFd, trio.CancelScope] | None = None
        self._single: dict[int, _EventFd] = {}
        bus.vectors(max(self._vectors, 1))
        function.connect_intx(self._on_line)

    def info(self, index: int) -> IrqInfo:
        """GET_IRQ_INFO. EINVAL for an index there is not."""
        flags = int(lib.VFIO_IRQ_INFO_EVENTFD)
        if index == _INTX:
            flags |= lib.VFIO_IRQ_INFO_MASKABLE | lib.VFIO_IRQ_INFO_AUTOMASKED
        elif index != _MSIX:
            flags |= lib.VFIO_IRQ_INFO_NORESIZE
        return IrqInfo(index, flags, self._count(index))

    def _count(self, index: int) -> int:
        if not 0 <= index < lib.VFIO_PCI_NUM_IRQS:
            raise WireError(errno.EINVAL, f"interrupt index {index}")
        counts = {
            _INTX: int(self._pin),
            _MSIX: self._vectors,
            lib.VFIO_PCI_MSI_IRQ_INDEX: 0,
        }
        return counts.get(index, 1)

    def set_irqs(self, request: IrqSet, fds: Sequence[int]) -> None:
        """DEVICE_SET_IRQS. ``fds`` stay the caller's. Checks first, then acts; raises ``WireError``."""
        count = self._count(request.index)
        if request.start >= count or request.start + request.count > count:
            raise WireError(errno.EINVAL, f"interrupts {request.start}+{request.count} of {count}")
        wanted = request.count if request.data == _DATA_EVENTFD else 0
        if len(fds) not in (0, wanted):
            raise WireError(errno.EINVAL, f"{len(fds)} file descriptors for {request.count} interrupts")
        handler = self._handler(request)
        if handler is None:
            raise WireError(errno.ENOTTY, f"index {request.index} flags {request.flags:#x}")
        handler(request, fds or (-1,) * wanted)

    def _handler(self, request: IrqSet) -> _Handler | None:
        if request.index == _INTX:
            return {
                lib.VFIO_IRQ_SET_ACTION_MASK: self._set_intx_mask,
                lib.VFIO_IRQ_SET_ACTION_UNMASK: self._set_intx_unmask,
                lib.VFIO_IRQ_SET_ACTION_TRIGGER: self._set_intx_trigger,
            }[request.action]
        if request.action != lib.VFIO_IRQ_SET_ACTION_TRIGGER:
            return None
        return self._set_msix_trigger if request.index == _MSIX else self._set_single

    def off(self) -> None:
        """Everything off and every eventfd let go: the client has gone."""
        self._disable_intx()
        self._disable_msix()
        for trigger in self._single.values():
            trigger.close()
        self._single.clear()

    def restore(self) -> None:
        """After a reset of the function: the client's vectors are set up again, as vfio-pci does."""
        if self._type == _MSIX:
            for vector in self._triggers:
                self._program(vector)
            self._enable_msix()

    # INTx

    def _on_line(self, level: bool) -> None:
        self._line = level
        if level and self._type == _INTX and not self._masked:
            self._masked = True
            self._send_intx()

    def _send_intx(self) -> None:
        disabled = self._function.config_read(lib.PCI_COMMAND, 2) & lib.PCI_COMMAND_INTX_DISABLE
        if self._intx is not None and self._type == _INTX and not disabled:
            self._intx.signal()

    def _unmask_intx(self) -> None:
        if self._masked:
            self._masked = False
            if self._line and not self._function.recheck_intx():
                self._on_line(True)

    def _set_intx_mask(self, request: IrqSet, fds: Sequence[int]) -> None:
        self._need_one_intx(request)
        if request.data == _DATA_EVENTFD:
            raise WireError(errno.ENOTTY, "masking by eventfd")
        if request.data == _DATA_NONE or request.bools[0]:
            self._masked = True

    def _set_intx_unmask(self, request: IrqSet, fds: Sequence[int]) -> None:
        self._need_one_intx(request)
        if request.data != _DATA_EVENTFD:
            if request.data == _DATA_NONE or request.bools[0]:
                self._unmask_intx()
            return
        # Linux answers EBUSY while there is one, and forgets it when its file is closed. Here nobody sees that, so a
        # new one takes its place: QEMU sends one every time it hands INTx to KVM.
        new = _EventFd(fds[0], self._bus) if fds[0] >= 0 else None
        self._drop_unmask()
        if new is not None:
            scope = trio.CancelScope()
            self._unmask = (new, scope)
            self.nursery.start_soon(self._listen, new, scope)

    async def _listen(self, trigger: _EventFd, scope: trio.CancelScope) -> None:
        """Whoever writes the eventfd unmasks INTx.

        Ends with its scope, which is cancelled before the file is closed.
        """
        with scope:
            while True:
                await trio.lowlevel.wait_readable(trigger.fd)
                if trigger.drain():
                    self._unmask_intx()

    def _drop_unmask(self) -> None:
        if self._unmask is not None:
            trigger, scope = self._unmask
            self._unmask = None
            scope.cancel()
            trio.lowlevel.notify_closing(trigger.fd)
            trigger.close()

    def _set_intx_trigger(self, request: IrqSet, fds: Sequence[int]) -> None:
        enabled = self._type == _INTX
        if enabled and not request.count and request.data == _DATA_NONE:
            self._disable_intx()
            return
        if not (enabled or self._type == _NONE) or request.start != 0 or request.count != 1:
            raise WireError(errno.EINVAL, "INTx is one interrupt, and no other index may be enabled")
        if request.data == _DATA_EVENTFD:
            trigger = _EventFd(fds[0], self._bus) if fds[0] >= 0 else None
            if self._intx is not None:
                self._intx.close()
            self._intx = trigger
            if not enabled:
                self._type = _INTX
                self._masked = False
                self._on_line(self._line)
            return
        if not enabled:
            raise WireError(errno.EINVAL, "INTx is not enabled")
        if request.data == _DATA_NONE or request.bools[0]:
            self._send_intx()

    def _disable_intx(self) -> None:
        if self._type != _INTX:
            return
        self._drop_unmask()
        if self._intx is not None:
            self._intx.close()
            self._intx = None
        self._type = _NONE
        self._masked = False

    def _need_one_intx(self, request: IrqSet) -> None:
        if self._type != _INTX or request.start != 0 or request.count != 1:
            raise WireError(errno.EINVAL, "INTx is one interrupt, and must be enabled")

    # MSI-X

    def _set_msix_trigger(self, request: IrqSet, fds: Sequence[int]) -> None:
        enabled = self._type == _MSIX
        if enabled and not request.count and request.data == _DATA_NONE:
            self._disable_msix()
            return
        if not (enabled or self._type == _NONE) or not request.count:
            raise WireError(errno.EINVAL, "no vectors, or another index is enabled")
        if request.data == _DATA_EVENTFD:
            self._set_vectors(request.start, fds)
            self._type = _MSIX
            self._enable_msix()
            return
        if not enabled:
            raise WireError(errno.EINVAL, "MSI-X is not enabled")
        for i in range(request.count):
            trigger = self._triggers.get(request.start + i)
            if trigger is not None and (request.data == _DATA_NONE or request.bools[i]):
                trigger.signal()

    def _set_vectors(self, start: int, fds: Sequence[int]) -> None:
        """The block's eventfds. Where one cannot be, none of the block has one."""
        for number, fd in enumerate(fds, start):
            self._clear_vector(number)
            if fd < 0:
                continue
            try:
                self._set_vector(number, _EventFd(fd, self._bus))
            except BaseException:
                for undone in range(start, number):
                    self._clear_vector(undone)
                raise

    def _set_vector(self, number: int, trigger: _EventFd) -> None:
        try:
            self._bus.vector(number, trigger.fd)
        except OSError as error:
            trigger.close()
            raise WireError(error.errno or errno.EINVAL, f"the eventfd of vector {number}") from None
        self._triggers[number] = trigger
        self._program(number)

    def _program(self, number: int) -> None:
        """Address, data, unmasked: what was pending is sent."""
        assert self._function.msix is not None
        self._function.msix.table_write(number * _ENTRY, 8, MSI_START)
        self._function.msix.table_write(number * _ENTRY + 8, 8, number)

    def _clear_vector(self, number: int) -> None:
        trigger = self._triggers.pop(number, None)
        if trigger is not None:
            assert self._function.msix is not None
            self._function.msix.table_write(number * _ENTRY + 12, 4, lib.PCI_MSIX_ENTRY_CTRL_MASKBIT)
            self._bus.vector(number, -1)
            trigger.close()

    def _enable_msix(self) -> None:
        self._function.config_write(self._flags_at, 2, _ENABLE)

    def _disable_msix(self) -> None:
        if self._type == _MSIX:
            self._function.config_write(self._flags_at, 2, 0)
            for number in tuple(self._triggers):
                self._clear_vector(number)
            self._type = _NONE

    # ERR and REQ

    def _set_single(self, request: IrqSet, fds: Sequence[int]) -> None:
        trigger = self._single.get(request.index)
        if request.data == _DATA_NONE:
            if trigger is None:
                raise WireError(errno.EINVAL, "no eventfd")
            if request.count:
                trigger.signal()
            else:
                self._single.pop(request.index).close()
            return
        if not request.count:
            raise WireError(errno.EINVAL, "no data")
        if request.data == _DATA_EVENTFD:
            fresh = _EventFd(fds[0], self._bus) if fds[0] >= 0 else None
            if trigger is not None:
                self._single.pop(request.index).close()
            if fresh is not None:
                self._single[request.index] = fresh
        elif request.bools[0] and trigger is not None:
            trigger.signal()

    def close(self) -> None:
        """The function is not served any more."""
        self.off()
        with suppress(OSError):
            self._function.connect_intx(None)
