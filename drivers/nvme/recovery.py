"""A controller and its queues: bringing it up, taking commands back, resets, the last resort.

A command that does not end in time is aborted; where that does not help the controller is reset (CC.EN), then the
function, and at last the device is closed, which takes its right to do DMA away. Only when one of these has worked is
memory that was named to it free. After a reset the queues are created again, and what was in flight ends with
``OperationAborted``, or with status HOST_ABORTED_CMD where it was submitted by the array.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import trio

from pvfio.abi import lib
from pvfio.drivers.nvme.admin import AdminQueue, Pages
from pvfio.drivers.nvme.errors import NvmeError, OperationAborted
from pvfio.drivers.nvme.identify import IdentifyController, parse_controller
from pvfio.drivers.nvme.operations import QueuePair
from pvfio.drivers.nvme.prp import PrpLists, list_bytes
from pvfio.drivers.nvme.queue import CommandQueue, Completion
from pvfio.drivers.nvme.registers import Capabilities, Registers
from pvfio.drivers.nvme.ring import Ring, queue_bytes
from pvfio.errors import DeadlineExceeded, DeviceFailed, VfioError

if TYPE_CHECKING:
    from pvfio.drivers.nvme.identify import Namespace
    from pvfio.vfio import Device, DmaBuffer, Irq

__all__ = ["Controller"]

_REFUSED: Final = (NvmeError, OperationAborted, DeadlineExceeded, DeviceFailed, VfioError)
_ADMIN_ENTRIES: Final = 32
_PAGE_SHIFT: Final = 12  # of PRPs (prp.py)
_LONGEST_SHUTDOWN: Final = 60.0  # seconds; RTD3E can say more than an hour
_LONGEST_LIST: Final = 2 << 20  # what a PRP list of one page describes
_EVENT_REQUESTS: Final = 4
_WARNINGS: Final[int] = (
    lib.NVME_SMART_SPARE
    | lib.NVME_SMART_TEMPERATURE
    | lib.NVME_SMART_DEGRADED
    | lib.NVME_SMART_READ_ONLY
    | lib.NVME_SMART_VOLATILE_MEMORY
)


class Controller:
    """What the queues need of the driver, and the driver of the queues."""

    def __init__(
        self,
        device: Device,
        completions: Sequence[Completion],
        entries: int,
        deadline: float,
        grace: float,
        admin_deadline: float,
        sgl: bool,
    ) -> None:
        self.device = device
        self.name = device.name
        self.deadline = deadline
        self.grace = grace
        self.admin_deadline = admin_deadline
        self.max_transfer = 4096
        self.namespaces: dict[int, Namespace] = {}
        self.queues: list[QueuePair] = []
        self.admin: AdminQueue
        self.capabilities: Capabilities
        self.controller: IdentifyController
        self._completions = tuple(completions)
        self._entries = entries
        self._sgl = sgl
        self._registers = Registers(device.region(lib.VFIO_PCI_BAR0_REGION_INDEX), device.name)
        self._irq: Irq = device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX)
        self._buffers: list[DmaBuffer] = []
        self.pages = Pages(device.container)
        self._taking_back = trio.Lock()
        self._lost: str | None = None  # why no reset can help
        self._failed: str | None = None  # why the device was given up
        self._quarantine: list[Any] = []

    def transfer_size(self, nsid: int) -> int:
        """Bytes that a block of a namespace takes in a transfer. ``ValueError`` for one that is not known."""
        namespace = self.namespaces.get(nsid)
        if namespace is None:
            raise ValueError(f"no namespace {nsid} was found on {self.name}")
        return namespace.transfer_size

    def check(self) -> None:
        """Raises ``DeviceFailed`` when the device was given up."""
        if self._failed is not None:
            raise DeviceFailed(self.name, self._failed)

    @property
    def _everything(self) -> list[CommandQueue]:
        return [self.admin, *self.queues] if hasattr(self, "admin") else []

    # Up

    async def _start(self) -> None:
        await self.device.set_bus_master()
        self.capabilities = await self._registers.capabilities()
        if not self.capabilities.nvm:
            raise DeviceFailed(self.name, "it has no NVM command set")
        if self.capabilities.page_shift > _PAGE_SHIFT:
            raise DeviceFailed(self.name, f"its pages have {1 << self.capabilities.page_shift} bytes or more")
        vectors = min(self._irq.count, 1 + len(self._completions))
        if vectors:
            await self._irq.enable(vectors)
        self.admin = AdminQueue(self, await self._new_ring(0, _ADMIN_ENTRIES))
        await self._registers.disable(self.capabilities.timeout)
        await self._enable_admin()
        page = await self.admin.identify(lib.NVME_ID_CNS_CTRL, deadline=self.admin_deadline, privileged=True)
        self.controller = parse_controller(page, 1 << self.capabilities.page_shift)
        self._sgl = self._sgl and self.controller.sgls
        longest = self.controller.max_transfer
        self.max_transfer = longest if self._sgl else min(longest, _LONGEST_LIST)
        count = await self.admin.set_queue_count(len(self._completions), deadline=self.admin_deadline)
        for number, completion in enumerate(self._completions[:count], 1):
            self.queues.append(await self._new_queue(number, completion))
        await self._enable_queues()

    async def _alloc(self, size: int) -> DmaBuffer:
        buffer = await self.device.container.alloc(size)
        self._buffers.append(buffer)
        return buffer

    async def _new_ring(self, number: int, entries: int) -> Ring:
        """A completion queue of twice the entries or a page, where there may be so many, has to be acknowledged less
        often.
        """
        most = max(2 * entries, 4096 // int(lib.NVME_CQE_SIZE))
        completions = entries if not number else min(most, self.capabilities.entries)
        buffer = await self._alloc(queue_bytes(entries, completions))
        doorbells = self.capabilities.doorbells(number)
        return Ring(buffer, entries, completions, self._registers.region, doorbells)

    async def _new_queue(self, number: int, completion: Completion) -> QueuePair:
        ring = await self._new_ring(number, min(self._entries, self.capabilities.entries))
        lists = None
        if not self._sgl:
            buffer = await self._alloc(list_bytes(ring.depth, self.max_transfer))
            lists = PrpLists(buffer, ring.depth, self.max_transfer)
        return QueuePair(self, number, ring, completion, lists)

    async def _enable_admin(self) -> None:
        """From disabled to a controller that takes admin commands."""
        ring = self.admin._ring
        await self._registers.enable(self.capabilities, (ring.sq_iova, ring.cq_iova, ring.entries))
        self.admin._open((self._irq, 0) if self._irq.enabled else None)

    async def _enable_queues(self) -> None:
        for queue in self.queues:
            interrupts = self._completions[queue.id - 1] != "polled" and queue.id < self._irq.enabled
            vector = queue.id if interrupts else None
            await self.admin.create_queues(queue.id, queue._ring, vector, deadline=self.admin_deadline)
            queue._open((self._irq, vector) if vector is not None else None)
        await self._listen_to_events()

    async def _listen_to_events(self) -> None:
        """Every event the controller knows is wanted (feature 0Bh, NVMe Base 2.0c 5.27.1.8)."""
        await self.admin.set_features(
            lib.NVME_FEAT_ASYNC_EVENT,
            self.controller.oaes | _WARNINGS,
            deadline=self.admin_deadline,
            privileged=True,
        )
        self.admin.request_events(min(self.controller.aerl + 1, _EVENT_REQUESTS))

    # Down

    async def _stop(self) -> None:
        """Stops the controller and gives its memory back; every step has a deadline."""
        if self._failed is None and hasattr(self, "controller"):
            await self._works(self._retire)
        for queue in self._everything:
            queue._close("shut down")
        timeout = self.capabilities.timeout if hasattr(self, "capabilities") else self.admin_deadline
        if not await self._first_that_works(
            lambda: self._registers.disable(timeout), self._reset_function, self._close_device
        ):
            self._hold()
        self._sweep("the driver's end")
        await self._works(self._irq.disable)
        for buffer in (*self._buffers, *self.pages.all):  # unmapping flushes: nothing reaches them afterwards
            try:
                await self.device.container.free(buffer)
            except VfioError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):  # the container was closed first
                    raise
        self._buffers.clear()
        self.pages.all.clear()

    async def _retire(self) -> None:
        """Deletes the queues and shuts the controller down (NVMe Base 2.0c 3.6.1)."""
        for queue in self.queues:
            queue._pause()
            await self.admin.delete_queues(queue.id, deadline=self.admin_deadline)
        rtd3e = min(self.controller.rtd3e, _LONGEST_SHUTDOWN)
        await self._registers.shut_down(max(rtd3e, self.admin_deadline))

    async def _reset_function(self) -> None:
        try:
            with trio.fail_after(self.admin_deadline):
                await self.device.reset()
        except trio.TooSlowError:
            raise DeadlineExceeded("reset", self.admin_deadline, device=self.name) from None
        await self.device.set_bus_master()

    async def _close_device(self) -> None:
        try:
            with trio.fail_after(2 * self.admin_deadline):
                await self.device.close()
        except trio.TooSlowError:
            raise DeadlineExceeded("close", 2 * self.admin_deadline, device=self.name) from None

    def _hold(self) -> None:
        """The device may still touch what was named to it: that memory is not recycled."""
        self._quarantine += [*self._buffers, *self.pages.all]

    async def _works(self, step: Callable[[], Awaitable[Any]]) -> bool:
        try:
            await step()
        except _REFUSED:
            return False
        return True

    async def _first_that_works(self, *steps: Callable[[], Awaitable[Any]]) -> bool:
        for step in steps:
            if await self._works(step):
                return True
        return False

    def _sweep(self, reason: str) -> None:
        for queue in self._everything:
            queue._sweep(reason)

    # Recovery

    async def reset(self) -> None:
        """Resets the controller and brings its queues back; whatever was in flight ends with ``OperationAborted``, or
        with status HOST_ABORTED_CMD where it was submitted by the array.

        Raises ``DeviceFailed`` when it cannot be reset any more. Finishes when cancelled.
        """
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            async with self._taking_back:
                self.check()
                await self._reset_all("a reset")

    async def _reset_all(self, reason: str) -> None:
        for queue in self._everything:
            queue._pause()
        steps = (lambda: self._revive(reason)), (lambda: self._revive_function(reason))
        if self._lost is None and await self._first_that_works(*steps) and self._lost is None:
            return
        await self._give_up(self._lost or "it cannot be reset")
        self.check()

    async def _revive(self, reason: str) -> None:
        await self._registers.disable(self.capabilities.timeout)
        self._sweep(reason)
        await self._enable_admin()
        await self._enable_queues()

    async def _revive_function(self, reason: str) -> None:
        await self._reset_function()
        await self._revive(reason)

    async def _give_up(self, reason: str) -> None:
        """The last resort: closing takes the right to do DMA away. Where even that fails, memory is held."""
        for queue in self._everything:
            queue._close("failed")
        closed = await self._works(self._close_device)
        if not closed:
            self._hold()
        after = "it was closed and does no DMA" if closed else "it may still do DMA: its memory is held"
        self._failed = f"{reason}; {after}"
        self._sweep(self._failed)

    def condemn(self, reason: str) -> None:
        """The controller did what no controller does. Nothing is submitted any more, and whoever waits, or comes next,
        gives it up.
        """
        self._lost = reason
        for queue in self._everything:
            queue._close(reason)

    async def take_back(
        self, queue: CommandQueue, done: Callable[[], bool], cids: Callable[[], list[int]]
    ) -> None:
        """Called under a shield: returns when ``done``, by whatever means it takes."""
        async with self._taking_back:
            if not queue.admin and not done():
                await self._works(lambda: self._abort(queue, done, cids))
            if not done() and self._failed is None:
                with suppress(DeviceFailed):  # then it was given up
                    await self._reset_all("the driver, which reset the controller")

    async def _abort(
        self, queue: CommandQueue, done: Callable[[], bool], cids: Callable[[], list[int]]
    ) -> None:
        for cid in cids():
            await self.admin.abort(queue.id, cid, deadline=self.admin_deadline, privileged=True)
        await queue._until_polled(done, self.admin_deadline)

    async def look_after(self) -> None:
        """Whether the controller is still there and well; a lost one fails everything, a failed one is reset."""
        if self._failed is not None or self._taking_back.locked() or await self._well():
            return
        with trio.CancelScope(shield=True):
            async with self._taking_back:
                if self._failed is None:
                    with suppress(DeviceFailed):  # every queue says so
                        await self._reset_all("a reset after a fatal status")

    async def _well(self) -> bool:
        if self._lost is not None:
            return False
        try:
            return not await self._registers.status() & lib.NVME_CSTS_CFS
        except DeviceFailed:
            self._lost = "removed"
            return False
        except (VfioError, DeadlineExceeded):  # somebody resets the function, or a server does not say
            return True
