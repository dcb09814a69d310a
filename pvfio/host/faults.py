"""The fault log: aborted DMA as people want to see it, in order, with the device's name.

The IOMMU keeps faults in a small ring in C; this log empties it, keeps the latest ones and hands them to
whoever iterates. Not modelled: fault interrupts to the guest, fault rate limits of real parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import trio

from pvfio.silicon import Fault as RawFault
from pvfio.silicon import Iommu

__all__ = ["Fault", "FaultLog"]


@dataclass(frozen=True)
class Fault:
    """One aborted transaction.

    ``device`` is the name, ``device_id`` the logical id; ``domain`` the device domain's id (0: none).
    ``stage`` 0 is the device context or an interrupt message, 1 and 2 the tables; ``level`` is that of the
    entry at fault (1: the lowest; 0: no entry). ``gpa`` is what stage 2 was asked for, in stage 2 faults.
    ``permission`` is what the device wanted, ``reason`` why it could not, in words.
    """

    device: str
    device_id: int
    iova: int
    gpa: int
    domain: int
    stage: int
    level: int
    permission: Literal["read", "write"]
    reason: str

    def __str__(self) -> str:
        where = f"stage {self.stage} level {self.level}" if self.level else f"stage {self.stage}"
        return f"{self.device}: {self.permission} of iova {self.iova:#x}: {self.reason} ({where})"


class FaultLog:
    """The latest ``capacity`` faults.

    Iterate asynchronously, in any number of tasks: each iterator sees every kept fault from the oldest on,
    then waits for new ones, which arrive while ``run`` runs or somebody drains; one that falls behind goes
    on with the oldest kept.
    """

    def __init__(self, iommu: Iommu, name: Callable[[int], str], *, capacity: int = 1024) -> None:
        self._iommu = iommu
        self._name = name
        self._kept: deque[Fault] = deque(maxlen=capacity)
        self._total = 0
        self._cleared = 0
        self._arrived = trio.lowlevel.ParkingLot()

    @property
    def fd(self) -> int:
        """The eventfd that rings when the IOMMU logs a fault; the IOMMU's own."""
        return self._iommu.fault_fd

    @property
    def lost(self) -> int:
        """Faults that cannot be read any more: no room in the IOMMU's ring, or pushed out by later ones."""
        self.drain()
        return self._iommu.lost_faults + self._total - self._cleared - len(self._kept)

    def snapshot(self) -> tuple[Fault, ...]:
        """The kept faults, oldest first, up to this moment."""
        self.drain()
        return tuple(self._kept)

    def clear(self) -> None:
        """Forgets the kept faults without counting them as lost. Iterators go on with the next one."""
        self.drain()
        self._cleared += len(self._kept)
        self._kept.clear()

    def drain(self) -> None:
        """Takes what the IOMMU logged and wakes the iterators. The log's task does this by itself."""
        raw = self._iommu.faults()
        if raw:
            self._kept.extend(self._named(fault) for fault in raw)
            self._total += len(raw)
            self._arrived.unpark_all()

    def _named(self, raw: RawFault) -> Fault:
        return Fault(
            device=self._name(raw.device_id),
            device_id=raw.device_id,
            iova=raw.iova,
            gpa=raw.gpa,
            domain=raw.domain,
            stage=raw.stage,
            level=raw.level,
            permission="write" if raw.access == "write" else "read",
            reason=raw.reason_name,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drains whenever the IOMMU rings, until cancelled; nothing is lost by cancelling it."""
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(self.fd)
            self.drain()

    def __aiter__(self) -> _FaultIterator:
        return _FaultIterator(self)

    async def _next(self, seen: int) -> tuple[Fault, int]:
        """The first fault after the ``seen`` first ones, and how many there are up to it."""
        await trio.lowlevel.checkpoint()
        self.drain()
        while self._total <= seen:
            await self._arrived.park()
        seen = max(seen, self._total - len(self._kept))
        index = seen - (self._total - len(self._kept))
        return next(islice(self._kept, index, None)), seen + 1


class _FaultIterator:
    """Never ends; cancelling a wait loses nothing."""

    def __init__(self, log: FaultLog) -> None:
        self._log = log
        self._seen = 0

    def __aiter__(self) -> _FaultIterator:
        return self

    async def __anext__(self) -> Fault:
        fault, self._seen = await self._log._next(self._seen)
        return fault
