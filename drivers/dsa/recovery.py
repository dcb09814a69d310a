"""What a DSA has to say after something went wrong: SWERR, INTCAUSE, GENSTS, the event log; and what recovery did.

Not here: acting on it (driver.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pvfio.abi import lib
from pvfio.drivers.dsa.errors import SoftwareError
from pvfio.drivers.dsa.eventlog import Event, EventLog

if TYPE_CHECKING:
    from pvfio.vfio import Region

__all__ = ["RecordHolder", "Recovery", "Reports"]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What ``DsaDriver.recover`` found and did.

    ``software_error``: what SWERR held (acknowledged now), ``causes``: INTCAUSE, ``reenabled``: the WQs
    that had been disabled, ``reset``: whether the device had to be reset, ``halted``: whether that was because it
    had halted, ``events``: what was new in the event log.
    """

    software_error: SoftwareError | None
    causes: int
    reenabled: tuple[int, ...] = ()
    reset: bool = False
    halted: bool = False
    events: tuple[Event, ...] = ()


class RecordHolder(Protocol):
    """Memory with completion records somebody waits for."""

    def deliver(self, address: int, record: bytes) -> bool: ...


class Reports:
    """Reads a device's reports. ``log`` is its event log, once there is one."""

    def __init__(self, registers: Region, device: str) -> None:
        self._registers = registers
        self._device = device
        self.log: EventLog | None = None
        self.last_software_error: SoftwareError | None = None

    async def software_error(self) -> SoftwareError | None:
        """Reads and acknowledges SWERR."""
        words = [await self._registers.read(lib.IDXD_SWERR_OFFSET + 8 * i, 8) for i in range(4)]
        if not words[0] & lib.IDXD_SWERR_VALID or words[0] == (1 << 64) - 1:
            return None
        await self._registers.write(lib.IDXD_SWERR_OFFSET, int(lib.IDXD_SWERR_ACK), 8)
        self.last_software_error = SoftwareError(
            (words[0], words[1], words[2], words[3]), device=self._device
        )
        return self.last_software_error

    async def causes(self) -> int:
        """Reads and clears INTCAUSE."""
        causes = await self._registers.read(lib.IDXD_INTCAUSE_OFFSET, 4)
        await self._registers.write(lib.IDXD_INTCAUSE_OFFSET, causes, 4)
        return causes

    async def state(self) -> tuple[int, int]:
        """The device's state and, where it halted, the reset it takes: GENSTS's two fields."""
        word = await self._registers.read(lib.IDXD_GENSTATS_OFFSET, 4)
        reset = (word & int(lib.IDXD_GENSTATS_RESET_TYPE_MASK)) >> int(lib.IDXD_GENSTATS_RESET_TYPE_SHIFT)
        return word & int(lib.IDXD_GENSTATS_STATE_MASK), reset

    async def events(self, holders: Iterable[RecordHolder]) -> tuple[Event, ...]:
        """What is new in the event log. Completion records in it go to the holder that waits for them."""
        if self.log is None:
            return ()
        holders = tuple(holders)
        events = tuple(await self.log.read(self._registers))
        for event in events:
            if event.record is not None:
                any(holder.deliver(event.fault_addr, event.record) for holder in holders)
        return events
