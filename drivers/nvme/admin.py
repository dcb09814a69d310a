"""The admin queue: identify, features, log pages, I/O queues, abort; and the requests for asynchronous events.

Data of a command is at most a page; longer log pages and images go page by page. Numbers of the specification are
arguments here as they are; what has a nicer form is in management.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from pvfio.abi import lib
from pvfio.drivers.nvme.queue import Command, CommandQueue
from pvfio.drivers.nvme.sqe import Sqe

if TYPE_CHECKING:
    from pvfio.drivers.nvme.recovery import Controller
    from pvfio.drivers.nvme.ring import Completions, Ring
    from pvfio.vfio import Container, DmaBuffer

__all__ = ["AdminQueue", "AsyncEvent", "Pages"]

PAGE: Final = 4096
_MOST_EVENTS: Final = 256  # that nobody took: then no more are asked for
_EVENT_TYPES: Final = {0: "error", 1: "smart", 2: "notice", 6: "io", 7: "vendor"}


class Pages:
    """Pages of DMA memory for data of admin commands and for lists; borrowed, and given back."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._idle: list[DmaBuffer] = []
        self.all: list[DmaBuffer] = []

    @asynccontextmanager
    async def borrow(self) -> AsyncIterator[DmaBuffer]:
        """A zeroed page. Give it back only when nothing can write to it."""
        if self._idle:
            page = self._idle.pop()
            page[:] = 0
        else:
            page = await self._container.alloc(PAGE)
            self.all.append(page)
        try:
            yield page
        finally:
            self._idle.append(page)


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    """An asynchronous event (NVMe Base 2.0c 5.2): its type, its information, the log page that has more.

    The controller does not report another of this type before that page was read.
    """

    type: int
    information: int
    log: int

    @property
    def name(self) -> str:
        """The type as a word."""
        return _EVENT_TYPES.get(self.type, f"type {self.type}")

    @classmethod
    def parse(cls, result: int) -> AsyncEvent:
        """The completion's dword."""
        return cls(
            result & 7,
            result >> int(lib.NVME_AER_INFO_SHIFT) & 0xFF,
            result >> int(lib.NVME_AER_LOG_SHIFT) & 0xFF,
        )


class AdminQueue(CommandQueue):
    """The admin queue of a controller. Awaitables raise ``NvmeError``, and as ``CommandQueue`` says."""

    admin = True
    _reserve = 4  # for aborts, while a full queue waits

    def __init__(self, controller: Controller, ring: Ring) -> None:
        super().__init__(controller, 0, ring, "hybrid")
        self.events: deque[AsyncEvent] = deque()
        self._requests: list[Command] = []
        self._wanted = 0

    # Queues

    async def create_queues(self, number: int, ring: Ring, vector: int | None, *, deadline: float) -> None:
        """Creates a completion queue and its submission queue (NVMe Base 2.0c 5.4, 5.5). ``vector`` None: without
        interrupts.
        """
        interrupt = (
            0 if vector is None else int(lib.NVME_CQ_IRQ_ENABLED) | vector << int(lib.NVME_CQ_IV_SHIFT)
        )
        contiguous = int(lib.NVME_QUEUE_PHYS_CONTIG)
        completions = Sqe(
            lib.NVME_ADMIN_CREATE_CQ,
            prp1=ring.cq_iova,
            cdw10=number | ring.cq_entries - 1 << 16,
            cdw11=contiguous | interrupt,
        )
        submissions = Sqe(
            lib.NVME_ADMIN_CREATE_SQ,
            prp1=ring.sq_iova,
            cdw10=number | ring.entries - 1 << 16,
            cdw11=contiguous | number << int(lib.NVME_SQ_CQID_SHIFT),
        )
        await self._done(completions, f"create completion queue {number}", deadline, privileged=True)
        await self._done(submissions, f"create submission queue {number}", deadline, privileged=True)

    async def delete_queues(self, number: int, *, deadline: float) -> None:
        """Deletes a submission queue, and then its completion queue (NVMe Base 2.0c 5.6, 5.7)."""
        for opcode in (lib.NVME_ADMIN_DELETE_SQ, lib.NVME_ADMIN_DELETE_CQ):
            await self._done(Sqe(opcode, cdw10=number), f"delete queue {number}", deadline, privileged=True)

    async def set_queue_count(self, count: int, *, deadline: float) -> int:
        """Asks for that many pairs of I/O queues; how many there may be (NVMe Base 2.0c 5.27.1.5)."""
        wanted = count - 1 | count - 1 << 16
        result = await self.set_features(lib.NVME_FEAT_NUM_QUEUES, wanted, deadline=deadline, privileged=True)
        return min(count, (result & 0xFFFF) + 1, (result >> 16) + 1)

    async def abort(
        self, queue: int, cid: int, *, deadline: float | None = None, privileged: bool = False
    ) -> bool:
        """Asks for the end of a command; whether the controller says that it did that (NVMe Base 2.0c 5.1)."""
        sqe = Sqe(lib.NVME_ADMIN_ABORT, cdw10=queue | cid << 16)
        return not await self._done(sqe, "abort", deadline, privileged=privileged) & 1

    # Identify, features, logs

    async def identify(
        self,
        cns: int,
        nsid: int = 0,
        *,
        csi: int = 0,
        cntid: int = 0,
        deadline: float | None = None,
        privileged: bool = False,
    ) -> bytes:
        """An Identify page (NVMe Base 2.0c 5.17)."""
        sqe = Sqe(lib.NVME_ADMIN_IDENTIFY, nsid=nsid, cdw10=cns | cntid << 16, cdw11=csi << 24)
        return await self.read_page(sqe, f"identify {cns:#04x}", PAGE, deadline, privileged=privileged)

    async def get_features(
        self, feature: int, nsid: int = 0, *, select: int = 0, cdw11: int = 0, deadline: float | None = None
    ) -> int:
        """A feature's dword; ``select``: ``lib.NVME_FEAT_SEL_*`` (NVMe Base 2.0c 5.15)."""
        cdw10 = feature | select << int(lib.NVME_FEAT_SEL_SHIFT)
        sqe = Sqe(lib.NVME_ADMIN_GET_FEATURES, nsid=nsid, cdw10=cdw10, cdw11=cdw11)
        return await self._done(sqe, f"get feature {feature:#04x}", deadline)

    async def get_feature_data(
        self, feature: int, size: int, nsid: int = 0, *, select: int = 0, deadline: float | None = None
    ) -> bytes:
        """A feature's data structure."""
        cdw10 = feature | select << int(lib.NVME_FEAT_SEL_SHIFT)
        sqe = Sqe(lib.NVME_ADMIN_GET_FEATURES, nsid=nsid, cdw10=cdw10)
        return await self.read_page(sqe, f"get feature {feature:#04x}", size, deadline)

    async def set_features(
        self,
        feature: int,
        value: int = 0,
        nsid: int = 0,
        *,
        save: bool = False,
        data: bytes = b"",
        deadline: float | None = None,
        privileged: bool = False,
    ) -> int:
        """Sets a feature to a dword and, where it has one, a data structure (NVMe Base 2.0c 5.27)."""
        cdw10 = feature | (int(lib.NVME_FEAT_SAVE) if save else 0)
        sqe = Sqe(lib.NVME_ADMIN_SET_FEATURES, nsid=nsid, cdw10=cdw10, cdw11=value)
        operation = f"set feature {feature:#04x}"
        if data:
            return await self.write_page(sqe, operation, data, deadline)
        return await self._done(sqe, operation, deadline, privileged=privileged)

    async def log_page(
        self,
        log: int,
        size: int,
        nsid: int = int(lib.NVME_NSID_ALL),
        *,
        offset: int = 0,
        retain: bool = False,
        specific: int = 0,
        deadline: float | None = None,
    ) -> bytes:
        """``size`` bytes (a multiple of 4) of a log page from ``offset`` on, page by page (NVMe Base 2.0c 5.16).

        ``retain``: the asynchronous event that pointed at it stays as it was.
        """
        if size % 4 or offset % 4 or size <= 0:
            raise ValueError(f"{size} bytes at {offset} of a log page are not whole dwords")
        parts = []
        for start in range(offset, offset + size, PAGE):
            part = min(PAGE, offset + size - start)
            dwords = part // 4 - 1
            more = start + part < offset + size
            flags = int(lib.NVME_LOG_RAE) if retain or more else 0
            sqe = Sqe(
                lib.NVME_ADMIN_GET_LOG_PAGE,
                nsid=nsid,
                cdw10=log | specific << 8 | flags | (dwords & 0xFFFF) << 16,
                cdw11=dwords >> 16,
                cdw12=start & 0xFFFFFFFF,
                cdw13=start >> 32,
            )
            parts.append(await self.read_page(sqe, f"log page {log:#04x}", part, deadline))
        return b"".join(parts)

    # Data

    async def read_page(
        self, sqe: Sqe, operation: str, size: int, deadline: float | None = None, *, privileged: bool = False
    ) -> bytes:
        """A command whose data, at most a page, comes from the controller."""
        async with self._controller.pages.borrow() as page:
            sqe.prp1 = page.iova or 0
            await self._done(sqe, operation, deadline, privileged=privileged)
            return bytes(page[:size])

    async def write_page(self, sqe: Sqe, operation: str, data: bytes, deadline: float | None = None) -> int:
        """A command whose data, at most a page, goes to the controller."""
        if len(data) > PAGE:
            raise ValueError(f"{len(data)} bytes of data are more than a page")
        async with self._controller.pages.borrow() as page:
            page[: len(data)] = np.frombuffer(data, dtype=np.uint8)
            sqe.prp1 = page.iova or 0
            return await self._done(sqe, operation, deadline)

    async def command(self, sqe: Sqe, operation: str, deadline: float | None = None) -> int:
        """A command without data; its result."""
        return await self._done(sqe, operation, deadline)

    # Asynchronous events

    def request_events(self, count: int) -> None:
        """Keeps that many requests with the controller (NVMe Base 2.0c 5.2)."""
        self._requests = [command for command in self._requests if not command.done]
        self._wanted = count
        self._request()

    def _request(self) -> None:
        """Makes up the requests, unless nobody takes the events."""
        while len(self._requests) < self._wanted and len(self.events) < _MOST_EVENTS:
            if self._closed is not None or self.room < 1:
                return
            command = Command("asynchronous event")
            self._start((command, Sqe(lib.NVME_ADMIN_ASYNC_EVENT)))
            self._requests.append(command)

    def _hand_out(self, taken: Completions) -> Completions:
        others = super()._hand_out(taken)
        for command in [command for command in self._requests if command.done]:
            self._requests.remove(command)
            if command.status:
                self._wanted -= 1  # it takes no more
            elif command.aborted is None:
                self.events.append(AsyncEvent.parse(command.result))
        self._request()
        return others

    async def next_event(self) -> AsyncEvent:
        """Waits for an event, however long that takes. Cancelled: none is lost."""
        await self._until(lambda: bool(self.events) or self._closed is not None)
        self._check()
        self._request()
        return self.events.popleft()
