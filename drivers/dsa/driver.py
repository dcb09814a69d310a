"""The driver of one DSA function: bringing it up, taking work back, recovery, shutting down.

It owns the whole function (no PASIDs) and uses MSI-X vectors 1 and up for its WQs; vector 0 is enabled and
left to whoever wants to listen for errors. Where a device cannot be made to stop by an abort, the driver
resets the device, then the function, and at last closes it, which takes its right to do DMA away; leaving
its group, it is then behind the blocking domain. Only when one of these has worked is memory that was named
to it free.

Not here: performance counters, power management.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio

from pvfio.abi import lib
from pvfio.drivers.dsa.batch import Batch, batch_bytes
from pvfio.drivers.dsa.capabilities import Capabilities, read_capabilities
from pvfio.drivers.dsa.commands import CommandPort, wq_operand
from pvfio.drivers.dsa.configuration import WqConfig, read_configuration, resolve, write_configuration
from pvfio.drivers.dsa.errors import CommandError, SoftwareError
from pvfio.drivers.dsa.eventlog import Event, EventLog
from pvfio.drivers.dsa.operations import WorkQueue
from pvfio.drivers.dsa.recovery import Recovery, Reports
from pvfio.drivers.dsa.ring import RecordRing, Submission
from pvfio.drivers.dsa.workqueue import SubmissionQueue
from pvfio.errors import DeadlineExceeded, DeviceFailed, VfioError

if TYPE_CHECKING:
    from pvfio.vfio import Device, DmaBuffer, Irq

__all__ = ["DsaDriver"]

_REFUSED = (CommandError, DeadlineExceeded, VfioError)


class DsaDriver:
    """A DSA, ready to work inside ``async with DsaDriver(device) as dsa``.

    ``device`` is an open VFIO device; it stays the caller's. ``wqs`` are the work queues to make (default:
    one dedicated WQ of all entries). ``deadline`` is how long, in seconds, an operation may take unless it
    says otherwise, ``grace`` how long a cancelled one may still take before it is aborted,
    ``command_deadline`` how long a command may take. ``event_log``: its entries, 64 to 65535, where the device has
    one; 0: it is left off. Entering raises ``ValueError`` for a configuration the
    device has no room for, ``CommandError`` for one it refuses, ``DeviceFailed`` for a device that is no
    DSA. Cancelled while entering or leaving: the device is left reset.
    """

    def __init__(
        self,
        device: Device,
        *,
        wqs: Sequence[WqConfig] = (WqConfig(),),
        deadline: float = 5.0,
        grace: float = 1.0,
        command_deadline: float = 2.0,
        event_log: int = int(lib.IDXD_EVL_SIZE_MIN),
    ) -> None:
        if event_log and not lib.IDXD_EVL_SIZE_MIN <= event_log <= lib.IDXD_EVL_SIZE_MAX:
            raise ValueError(f"an event log has {lib.IDXD_EVL_SIZE_MIN} to {lib.IDXD_EVL_SIZE_MAX} entries")
        self.device = device
        self.deadline = deadline
        self.grace = grace
        self.command_deadline = command_deadline
        self.wqs: tuple[WorkQueue, ...] = ()
        self._wanted = tuple(wqs)
        self._configs: list[WqConfig] = []
        self._registers = device.region(lib.VFIO_PCI_BAR0_REGION_INDEX)
        self._portals = device.region(lib.VFIO_PCI_BAR2_REGION_INDEX)
        self._commands = CommandPort(self._registers, device.name)
        self._irq: Irq = device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX)
        self._handles: dict[int, int] = {}
        self._capabilities: Capabilities | None = None
        self._buffers: list[DmaBuffer] = []
        self._idle_batches: list[Batch] = []
        self._batches: list[Batch] = []
        self._log_entries = event_log
        self._reports = Reports(self._registers, device.name)
        self._taking_back = trio.Lock()
        self._failed: str | None = None  # why the device was given up
        self._quarantine: list[Any] = []  # what a device that could not be stopped may still touch

    @property
    def capabilities(self) -> Capabilities:
        """What the device can do. ``RuntimeError`` before the driver was entered."""
        if self._capabilities is None:
            raise RuntimeError("the driver has not been entered")
        return self._capabilities

    def wq(self, number: int) -> WorkQueue:
        """A work queue by number. ``IndexError`` for one that was not configured."""
        if not 0 <= number < len(self.wqs):
            raise IndexError(f"{len(self.wqs)} work queues are configured, not one of number {number}")
        return self.wqs[number]

    async def __aenter__(self) -> Self:
        identity = await self.device.config.read(0, 4)
        if identity != lib.DSA_PCI_VENDOR_ID | lib.DSA_PCI_DEVICE_ID << 16:
            raise DeviceFailed(self.device.name, f"{identity & 0xFFFF:04x}:{identity >> 16:04x} is not a DSA")
        try:
            await self._start()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):
            await self._stop()
        await trio.lowlevel.checkpoint_if_cancelled()

    # Up

    async def _start(self) -> None:
        await self.device.set_bus_master()
        await self._reset_device()
        self._capabilities = await read_capabilities(self._registers)
        if self._capabilities.configurable:
            self._configs = resolve(self._wanted, self._capabilities)
        else:
            completion = (*self._wanted, WqConfig())[0].completion
            self._configs = await read_configuration(self._registers, self._capabilities, completion)
        vectors = min(self._irq.count, 1 + len(self._configs))
        if vectors > 1:
            await self._irq.enable(vectors)
        queues = []
        for number, config in enumerate(self._configs):
            ring = await self._alloc_ring(config)
            queues.append(WorkQueue(self, number, config, self._portals, ring))
        self.wqs = tuple(queues)
        if self._capabilities.event_log and self._log_entries:
            buffer = await self.device.container.alloc(EventLog.nbytes(self._log_entries))
            self._buffers.append(buffer)
            self._reports.log = EventLog(buffer, self._log_entries)
        await self._enable()

    async def _alloc_ring(self, config: WqConfig) -> RecordRing:
        """Twice the WQ's size, so that one slow descriptor does not hold back the ones after it."""
        capacity = 2 * (config.size or 1)
        buffer = await self.device.container.alloc(capacity * int(lib.DSA_COMPLETION_SIZE))
        self._buffers.append(buffer)
        return RecordRing(buffer, capacity)

    async def _enable(self) -> None:
        """From a device that was just reset to one that takes work."""
        capabilities = self.capabilities
        if capabilities.configurable:
            await write_configuration(self._registers, self._configs, capabilities)
        if capabilities.msix_perm_offset:
            for vector in range(self._irq.enabled):
                entry = capabilities.msix_perm_offset + vector * int(lib.IDXD_MSIX_PERM_STRIDE)
                await self._registers.write(entry, 0, 8)
        errors = int(lib.IDXD_GENCTRL_SOFTERR_INT_EN | lib.IDXD_GENCTRL_HALT_INT_EN)
        if self._reports.log is not None:
            await self._reports.log.enable(self._registers)
            errors |= int(lib.IDXD_GENCTRL_EVL_INT_EN)
        await self._registers.write(lib.IDXD_GENCTRL_OFFSET, errors, 4)
        await self._command(lib.IDXD_CMD_ENABLE_DEVICE)
        self._handles = await self._interrupt_handles()
        for wq in self.wqs:
            await self._command(lib.IDXD_CMD_ENABLE_WQ, wq.id)
            self._open(wq)

    def _open(self, wq: WorkQueue) -> None:
        vector = 1 + wq.id
        irq = (self._irq, vector) if vector < self._irq.enabled else None
        wq._open(irq, self._handles.get(vector, 0))

    async def _interrupt_handles(self) -> dict[int, int]:
        """By vector: a handle the device gives, or the number itself where it has no such command."""
        handles = {vector: vector for vector in range(1, self._irq.enabled)}
        if self.capabilities.has_command(lib.IDXD_CMD_REQUEST_INT_HANDLE):
            for vector in handles:
                handles[vector] = await self._command(lib.IDXD_CMD_REQUEST_INT_HANDLE, vector)
        return handles

    async def _command(self, command: int, operand: int = 0) -> int:
        return await self._commands.run(command, operand, deadline=self.command_deadline)

    async def _reset_device(self) -> None:
        """RESET_DEVICE, or, when the device does not do it, a reset of the function."""
        try:
            await self._command(lib.IDXD_CMD_RESET_DEVICE)
        except (CommandError, DeadlineExceeded):
            await self._reset_function()

    async def _reset_function(self) -> None:
        try:
            with trio.fail_after(self.command_deadline):
                await self.device.reset()
        except trio.TooSlowError:
            error = DeadlineExceeded("reset", self.command_deadline, device=self.device.name)
            raise error from None
        await self.device.set_bus_master()

    # Down

    async def _stop(self) -> None:
        """Stops the device and gives its memory back; every step has a deadline."""
        for wq in self.wqs:
            wq._close("shut down")
        if await self._first_that_works(self._reset_device, self._close_device):
            self._quarantine.clear()
        else:
            self._hold()
        self._sweep("the driver's end")
        await self._first_that_works(self._irq.disable)
        while self._buffers:  # unmapping flushes: not even a device that still runs reaches them afterwards
            try:
                await self.device.container.free(self._buffers.pop())
            except VfioError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):  # the container was closed first
                    raise

    async def _close_device(self) -> None:
        try:
            with trio.fail_after(2 * self.command_deadline):
                await self.device.close()
        except trio.TooSlowError:
            raise DeadlineExceeded("close", 2 * self.command_deadline, device=self.device.name) from None

    def _hold(self) -> None:
        """The device may still touch what was named to it: these arrays are held, and what is mapped stays
        pinned.
        """
        for wq in self.wqs:
            self._quarantine += [piece.submission.keep for piece in wq._ring.pieces]

    async def reset(self) -> None:
        """Resets the device and enables it again as configured; whatever was in flight ends with
        ``OperationAborted``.

        Raises ``DeviceFailed`` when the device cannot be reset any more. Finishes when cancelled.
        """
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            async with self._taking_back:
                self._check()
                await self._reset_all("a reset")

    async def _reset_all(self, reason: str) -> None:
        for wq in self.wqs:
            wq._pause()
        if await self._first_that_works(*await self._ways_back()):
            return
        self._failed = f"it cannot be reset; {await self._give_up(reason)}"
        raise DeviceFailed(self.device.name, self._failed)

    async def _ways_back(self) -> list[Callable[[], Awaitable[Any]]]:
        """The resets to try: where the device halted and says what it takes, none that is less."""
        try:
            state, reset = await self._reports.state()
        except VfioError:
            return [self._revive, self._revive_function]
        if state != lib.IDXD_DEVICE_STATE_HALT or reset == lib.IDXD_DEVICE_RESET_SOFTWARE:
            return [self._revive, self._revive_function]
        return [self._revive_function] if reset == lib.IDXD_DEVICE_RESET_FLR else []

    def _check(self) -> None:
        if self._failed is not None:
            raise DeviceFailed(self.device.name, self._failed)

    async def _revive(self) -> None:
        await self._command(lib.IDXD_CMD_RESET_DEVICE)
        self._sweep("a device reset")
        await self._enable()

    async def _revive_function(self) -> None:
        await self._reset_function()
        self._sweep("a function reset")
        await self._enable()

    async def _first_that_works(self, *steps: Callable[[], Awaitable[Any]]) -> bool:
        for step in steps:
            try:
                await step()
            except _REFUSED:
                continue
            return True
        return False

    async def _give_up(self, reason: str) -> str:
        """The last resort: closing takes the right to do DMA away. Where even that fails, arrays are held.
        What was done.
        """
        for wq in self.wqs:
            wq._close("failed")
        closed = await self._first_that_works(self._close_device)
        if not closed:
            self._hold()
        self._sweep(reason)
        return "it was closed and does no DMA" if closed else "it may still do DMA: its buffers are held"

    def _sweep(self, reason: str) -> None:
        for wq in self.wqs:
            wq._sweep(reason)

    # Taking work back

    async def abort(self, wq: WorkQueue) -> None:
        """Takes back everything in flight on a WQ (ABORT_WQ); its operations end with ``OperationAborted``,
        the WQ stays enabled.

        Raises ``CommandError`` or ``DeadlineExceeded``; then the WQ takes nothing until ``recover`` or
        ``reset``. Finishes when cancelled.
        """
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            async with self._taking_back:
                try:
                    await self._abort_wq(wq)
                except BaseException:
                    wq._close("not aborted as it should be")
                    raise

    async def _abort_wq(self, wq: SubmissionQueue) -> None:
        wq._pause()
        await self._command(lib.IDXD_CMD_ABORT_WQ, wq_operand(wq.id))
        await self._read_events()  # none may be left that speaks of a record whose place is used again
        wq._sweep("an abort of its work queue")
        if not await self._wq_enabled(wq):
            await self._command(lib.IDXD_CMD_ENABLE_WQ, wq.id)
        self._open(self.wqs[wq.id])

    async def _wq_enabled(self, wq: SubmissionQueue) -> bool:
        base = self.capabilities.wqcfg_offset + wq.id * self.capabilities.wqcfg_stride
        state = await self._registers.read(base + 24, 4) >> int(lib.IDXD_WQCFG_STATE_SHIFT)
        return bool(state == lib.IDXD_WQ_STATE_ENABLED)

    async def _take_back(self, wq: SubmissionQueue, submission: Submission) -> None:
        """Called under a shield: returns when the device can no longer touch what the submission named, by
        whatever means it takes.
        """
        async with self._taking_back:
            await self._first_that_works(self._reports.software_error)
            await self._first_that_works(self._read_events)
            if not submission.done and not await self._first_that_works(partial(self._abort_wq, wq)):
                await self._reset_all("the driver, which gave the device up")

    # Recovery

    @property
    def last_software_error(self) -> SoftwareError | None:
        """What SWERR held when it was last found to hold something."""
        return self._reports.last_software_error

    async def events(self) -> tuple[Event, ...]:
        """What is new in the event log, in order; completion records that the device could not write are now where
        their descriptors wait for them.

        Only ``recover`` and an operation that is being taken back look there by themselves: whoever expects events
        waits for interrupt 0. Empty without an event log. Raises ``VfioError`` EIO when somebody resets the function
        meanwhile. Finishes when cancelled.
        """
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            async with self._taking_back:
                events = await self._read_events()
        return events

    async def _read_events(self) -> tuple[Event, ...]:
        events = await self._reports.events((*(wq._ring for wq in self.wqs), *self._batches))
        for event in events:  # the device left it to the driver to say that the record is there
            for vector, handle in self._handles.items():
                if handle == event.interrupt_handle:
                    await self._irq.trigger(vector)
        for wq in self.wqs:
            wq._reap_all()
        return events

    async def recover(self) -> Recovery:
        """After a fault: reads what the device has to say, enables what it disabled, resets it where it
        halted: the device, or the function where GENSTS says that it takes that.

        A page fault without block-on-fault disables nothing, and then this only collects SWERR and
        INTCAUSE. Raises ``DeviceFailed`` when the device cannot be brought back. Finishes when cancelled.
        """
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            async with self._taking_back:
                self._check()
                found = await self._recover()
        return found

    async def _recover(self) -> Recovery:
        error = await self._reports.software_error()
        events = await self._read_events()
        causes = await self._reports.causes()
        state, _ = await self._reports.state()
        if state != lib.IDXD_DEVICE_STATE_ENABLED:
            await self._reset_all("a recovery")
            halted = state == lib.IDXD_DEVICE_STATE_HALT
            return Recovery(error, causes, reset=True, halted=halted, events=events)
        reenabled = []
        for wq in self.wqs:
            if not await self._wq_enabled(wq):
                wq._sweep("its work queue's being disabled")
                try:
                    await self._command(lib.IDXD_CMD_ENABLE_WQ, wq.id)
                except _REFUSED:
                    await self._reset_all("a recovery")
                    return Recovery(error, causes, reset=True, events=events)
                reenabled.append(wq.id)
            self._open(wq)
        return Recovery(error, causes, tuple(reenabled), events=events)

    # Batch memory

    async def _alloc_batch(self, capacity: int) -> Batch:
        buffer = await self.device.container.alloc(batch_bytes(capacity))
        self._buffers.append(buffer)
        self._batches.append(Batch(buffer, capacity))
        return self._batches[-1]

    async def _borrow_batch(self, count: int) -> Batch:
        for batch in self._idle_batches:
            if batch.capacity >= count:
                self._idle_batches.remove(batch)
                return batch
        return await self._alloc_batch(1 << max(count - 1, 15).bit_length())

    def _return_batch(self, batch: Batch) -> None:
        self._idle_batches.append(batch)
