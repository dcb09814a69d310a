"""Interrupts of a vfio-pci device: what VFIO_DEVICE_SET_IRQS does, index by index.

INTx is level-triggered: when it fires it masks itself, and unmasking with the line still up fires again.
MSI-X vectors are programmed into the device's table and deliver to the user's eventfds without passing here.
ERR and REQ are the kernel's own messages. One of INTx and MSI-X at a time. Rules and errnos: Linux
vfio_pci_intrs.c.

Not modelled: MSI without X, irqfds for masking (Linux answers ENOTTY), interrupt remapping, affinity.
"""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError

if TYPE_CHECKING:
    from pvfio.guest.pci import PciDevice

__all__ = ["EventFd", "Spawn", "VfioIrqs"]

Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], trio.CancelScope]

_HEADER = ffi.sizeof("struct vfio_irq_set")
_U32_MAX = 0xFFFF_FFFF
_NONE = -1
_DATA_SIZE = {
    lib.VFIO_IRQ_SET_DATA_NONE: 0,
    lib.VFIO_IRQ_SET_DATA_BOOL: 1,
    lib.VFIO_IRQ_SET_DATA_EVENTFD: 4,
}


class EventFd:
    """The kernel's own reference to a user's eventfd: it works on after the user closed the number.

    Raises ``VfioError`` EBADF for no open file, EINVAL for a file that is no eventfd.
    """

    def __init__(self, fd: int) -> None:
        try:
            kind = os.readlink(f"/proc/self/fd/{fd}")
            self.fd = os.dup(fd)
        except OSError:
            raise VfioError(errno.EBADF, "SET_IRQS", f"file descriptor {fd}") from None
        if kind != "anon_inode:[eventfd]":
            self.close()
            raise VfioError(errno.EINVAL, "SET_IRQS", f"file descriptor {fd} is no eventfd")

    def signal(self) -> None:
        """Adds one; a counter that is full stays full."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        if poll.poll(0):
            os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Drops the reference."""
        os.close(self.fd)


class _Vector:
    """An MSI-X vector with an eventfd: the reference to it, and the message that rings it."""

    def __init__(self, trigger: EventFd, data: int) -> None:
        self.trigger = trigger
        self.data = data


class VfioIrqs:
    """The interrupts of one open device. ``spawn`` starts a task of the kernel (for irqfds)."""

    def __init__(self, pci: PciDevice, spawn: Spawn) -> None:
        self._pci = pci
        self._spawn = spawn
        self._type = _NONE
        self._vectors: list[_Vector | None] = []
        self._intx: EventFd | None = None
        self._masked = False
        self._line = False
        self._disabled = False
        self._unmask: tuple[EventFd, trio.CancelScope] | None = None
        self._single: dict[int, EventFd] = {}
        self._is_express = pci.find_capability(lib.PCI_CAP_ID_EXP) is not None
        if pci.interrupt_pin:
            pci.channel.set_intx(pci.function, self._on_line)

    def count(self, index: int) -> int:
        """How many interrupts an index has."""
        if index == lib.VFIO_PCI_INTX_IRQ_INDEX:
            return 1 if self._pci.interrupt_pin else 0
        if index == lib.VFIO_PCI_MSIX_IRQ_INDEX:
            return self._pci.msix.vectors if self._pci.msix else 0
        if index == lib.VFIO_PCI_ERR_IRQ_INDEX:
            return 1 if self._is_express else 0
        return 1 if index == lib.VFIO_PCI_REQ_IRQ_INDEX else 0

    def info(self, index: int) -> tuple[int, int]:
        """(VFIO_IRQ_INFO_* flags, count). Raises EINVAL for an index the device cannot have."""
        known = 0 <= index < lib.VFIO_PCI_NUM_IRQS
        if not known or (index == lib.VFIO_PCI_ERR_IRQ_INDEX and not self._is_express):
            raise self._error(errno.EINVAL, f"interrupt index {index}", "GET_IRQ_INFO")
        flags: int = lib.VFIO_IRQ_INFO_EVENTFD
        if index == lib.VFIO_PCI_INTX_IRQ_INDEX:
            flags |= lib.VFIO_IRQ_INFO_MASKABLE | lib.VFIO_IRQ_INFO_AUTOMASKED
        else:
            flags |= lib.VFIO_IRQ_INFO_NORESIZE
        return flags, self.count(index)

    def set_irqs(self, arg: Any) -> None:
        """VFIO_DEVICE_SET_IRQS with a ``struct vfio_irq_set *``. Checks first, then acts."""
        header = ffi.cast("struct vfio_irq_set *", arg)
        flags, index, start, count = header.flags, header.index, header.start, header.count
        data_type = flags & lib.VFIO_IRQ_SET_DATA_TYPE_MASK
        known = lib.VFIO_IRQ_SET_DATA_TYPE_MASK | lib.VFIO_IRQ_SET_ACTION_TYPE_MASK
        if (
            header.argsz < _HEADER
            or index >= lib.VFIO_PCI_NUM_IRQS
            or count >= _U32_MAX - start
            or flags & ~known
            or start >= self.count(index)
            or start + count > self.count(index)
            or data_type not in _DATA_SIZE
            or header.argsz - _HEADER < count * _DATA_SIZE[data_type]
        ):
            raise self._error(errno.EINVAL, f"index {index} vectors {start}+{count} flags {flags:#x}")
        handler = self._handler(index, flags & lib.VFIO_IRQ_SET_ACTION_TYPE_MASK)
        if handler is None:
            raise self._error(errno.ENOTTY, f"index {index} flags {flags:#x}")
        raw = ffi.buffer(ffi.cast("uint8_t *", arg) + _HEADER, count * _DATA_SIZE[data_type])[:]
        handler(data_type, index, start, count, raw)

    def _handler(self, index: int, action: int) -> Callable[[int, int, int, int, bytes], None] | None:
        if index == lib.VFIO_PCI_INTX_IRQ_INDEX:
            return {
                lib.VFIO_IRQ_SET_ACTION_MASK: self._set_intx_mask,
                lib.VFIO_IRQ_SET_ACTION_UNMASK: self._set_intx_unmask,
                lib.VFIO_IRQ_SET_ACTION_TRIGGER: self._set_intx_trigger,
            }.get(action)
        if action != lib.VFIO_IRQ_SET_ACTION_TRIGGER:
            return None
        return self._set_msix_trigger if index == lib.VFIO_PCI_MSIX_IRQ_INDEX else self._set_single

    def tear_down(self) -> None:
        """Everything off and every eventfd let go: the device is being closed."""
        self._disable_intx()
        self._disable_msix()
        for trigger in self._single.values():
            trigger.close()
        self._single.clear()
        if self._pci.interrupt_pin:
            # A function that was taken away has no pin.
            with suppress(OSError):
                self._pci.channel.set_intx(self._pci.function, None)

    def signal(self, index: int) -> bool:
        """The kernel's own message (ERR: the device reported an error, REQ: give it back); false if unheard."""
        trigger = self._single.get(index)
        if trigger is None:
            return False
        trigger.signal()
        return True

    def set_intx_disabled(self, disabled: bool) -> None:
        """The user changed INTx disable in the command register."""
        self._disabled = disabled
        if self._type != lib.VFIO_PCI_INTX_IRQ_INDEX:
            return
        if disabled:
            self._masked = True
        else:
            self._unmask_intx()

    # INTx

    def _on_line(self, level: bool) -> None:
        self._line = level
        if level and self._type == lib.VFIO_PCI_INTX_IRQ_INDEX and not self._masked:
            self._masked = True
            self._send_intx()

    def _send_intx(self) -> None:
        if self._intx is not None and self._type == lib.VFIO_PCI_INTX_IRQ_INDEX and not self._disabled:
            self._intx.signal()

    def _unmask_intx(self) -> None:
        if self._masked and not self._disabled:
            self._masked = self._line
            if self._line:
                self._send_intx()

    def _set_intx_mask(self, data_type: int, index: int, start: int, count: int, raw: bytes) -> None:
        self._need_one_intx(start, count)
        if data_type == lib.VFIO_IRQ_SET_DATA_EVENTFD:
            raise self._error(errno.ENOTTY, "masking by eventfd")
        if data_type == lib.VFIO_IRQ_SET_DATA_NONE or raw[0]:
            self._masked = True

    def _set_intx_unmask(self, data_type: int, index: int, start: int, count: int, raw: bytes) -> None:
        self._need_one_intx(start, count)
        if data_type != lib.VFIO_IRQ_SET_DATA_EVENTFD:
            if data_type == lib.VFIO_IRQ_SET_DATA_NONE or raw[0]:
                self._unmask_intx()
            return
        (fd,) = struct.unpack("=i", raw)
        if fd < 0:
            self._drop_unmask()
        elif self._unmask is not None:
            raise self._error(errno.EBUSY, "there is an eventfd for unmasking")
        else:
            trigger = EventFd(fd)
            try:
                self._unmask = (trigger, self._spawn(lambda: self._listen(trigger)))
            except BaseException:
                trigger.close()
                raise

    async def _listen(self, trigger: EventFd) -> None:
        """An irqfd: whoever writes the eventfd unmasks INTx."""
        while True:
            await trio.lowlevel.wait_readable(trigger.fd)
            try:
                os.preadv(trigger.fd, [bytearray(8)], -1, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            self._unmask_intx()

    def _drop_unmask(self) -> None:
        if self._unmask is not None:
            trigger, scope = self._unmask
            self._unmask = None
            scope.cancel()
            trio.lowlevel.notify_closing(trigger.fd)
            trigger.close()

    def _set_intx_trigger(self, data_type: int, index: int, start: int, count: int, raw: bytes) -> None:
        enabled = self._type == lib.VFIO_PCI_INTX_IRQ_INDEX
        if enabled and not count and data_type == lib.VFIO_IRQ_SET_DATA_NONE:
            self._disable_intx()
            return
        if not (enabled or self._type == _NONE) or start != 0 or count != 1:
            raise self._error(errno.EINVAL, "INTx is one interrupt, and no other index may be enabled")
        if data_type == lib.VFIO_IRQ_SET_DATA_EVENTFD:
            (fd,) = struct.unpack("=i", raw)
            trigger = EventFd(fd) if fd >= 0 else None
            if self._intx is not None:
                self._intx.close()
            self._intx = trigger
            if not enabled:
                self._type = lib.VFIO_PCI_INTX_IRQ_INDEX
                self._masked = self._disabled
                self._on_line(self._line)
            return
        if not enabled:
            raise self._error(errno.EINVAL, "INTx is not enabled")
        if data_type == lib.VFIO_IRQ_SET_DATA_NONE or raw[0]:
            self._send_intx()

    def _disable_intx(self) -> None:
        if self._type != lib.VFIO_PCI_INTX_IRQ_INDEX:
            return
        self._drop_unmask()
        if self._intx is not None:
            self._intx.close()
            self._intx = None
        self._type = _NONE
        self._masked = False

    def _need_one_intx(self, start: int, count: int) -> None:
        if self._type != lib.VFIO_PCI_INTX_IRQ_INDEX or start != 0 or count != 1:
            raise self._error(errno.EINVAL, "INTx is one interrupt, and must be enabled")

    # MSI-X

    def _set_msix_trigger(self, data_type: int, index: int, start: int, count: int, raw: bytes) -> None:
        enabled = self._type == index
        if enabled and not count and data_type == lib.VFIO_IRQ_SET_DATA_NONE:
            self._disable_msix()
            return
        if not (enabled or self._type == _NONE):
            raise self._error(errno.EINVAL, "another index is enabled")
        if data_type == lib.VFIO_IRQ_SET_DATA_EVENTFD:
            fds = struct.unpack(f"={count}i", raw)
            if enabled:
                self._set_block(start, fds)
            else:
                self._enable_msix(start, fds)
            return
        if not enabled or start + count > len(self._vectors):
            raise self._error(errno.EINVAL, f"vectors {start}+{count} are not enabled")
        for i, vector in enumerate(self._vectors[start : start + count]):
            if vector is not None and (data_type == lib.VFIO_IRQ_SET_DATA_NONE or raw[i]):
                vector.trigger.signal()

    def _enable_msix(self, start: int, fds: tuple[int, ...]) -> None:
        if not start + len(fds):
            raise self._error(errno.EINVAL, "no vectors")
        self._vectors = [None] * (start + len(fds))
        self._type = lib.VFIO_PCI_MSIX_IRQ_INDEX
        try:
            self._pci.msix_enable()
            self._set_block(start, fds)
        except BaseException:
            self._disable_msix()
            raise

    def _set_block(self, start: int, fds: tuple[int, ...]) -> None:
        if start >= len(self._vectors) or start + len(fds) > len(self._vectors):
            raise self._error(
                errno.EINVAL, f"only {len(self._vectors)} vectors were enabled: disable them all first"
            )
        for number, fd in enumerate(fds, start):
            try:
                self._set_vector(number, fd)
            except BaseException:
                for undone in range(start, number + 1):
                    self._clear_vector(undone)
                raise

    def _set_vector(self, number: int, fd: int) -> None:
        self._clear_vector(number)
        if fd < 0:
            return
        trigger = EventFd(fd)
        channel, function = self._pci.channel, self._pci.function
        try:
            address, data = channel.compose_msi(function, number, trigger.fd)
            self._pci.msix_write(number, address, data)
        except BaseException:
            trigger.close()
            raise
        self._vectors[number] = _Vector(trigger, data)

    def _clear_vector(self, number: int) -> None:
        vector = self._vectors[number]
        if vector is None:
            return
        self._pci.msix_mask(number, True)
        self._pci.channel.release_msi(self._pci.function, vector.data)
        vector.trigger.close()
        self._vectors[number] = None

    def _disable_msix(self) -> None:
        if self._type != lib.VFIO_PCI_MSIX_IRQ_INDEX:
            return
        for number in range(len(self._vectors)):
            self._clear_vector(number)
        self._pci.msix_disable()
        self._vectors = []
        self._type = _NONE

    # ERR and REQ

    def _set_single(self, data_type: int, index: int, start: int, count: int, raw: bytes) -> None:
        if start != 0 or count > 1:
            raise self._error(errno.EINVAL, "one interrupt")
        trigger = self._single.get(index)
        if data_type == lib.VFIO_IRQ_SET_DATA_NONE:
            if trigger is None:
                raise self._error(errno.EINVAL, "no eventfd")
            if count:
                trigger.signal()
            else:
                del self._single[index]
                trigger.close()
            return
        if not count:
            raise self._error(errno.EINVAL, "no data")
        if data_type == lib.VFIO_IRQ_SET_DATA_BOOL:
            if raw[0] and trigger is not None:
                trigger.signal()
            return
        (fd,) = struct.unpack("=i", raw)
        fresh = EventFd(fd) if fd >= 0 else None
        if trigger is not None and fd >= -1:
            self._single.pop(index).close()
        if fresh is not None:
            self._single[index] = fresh

    def _error(self, number: int, reason: str, operation: str = "SET_IRQS") -> VfioError:
        return VfioError(number, operation, reason, device=self._pci.name)
