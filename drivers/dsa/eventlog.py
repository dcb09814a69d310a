"""The event log: a ring in memory where the device tells what no completion record can (Intel DSA 2.0 5.9; the
layout is Linux's).

Entries whose code is 0x1a, 0x26 or 0x27 carry a completion record that the device could not write, or had to hold
back behind one; ``EventLog.read`` gives them to whoever can write them, as an operating system does. Not here: PASIDs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pvfio.abi import dtype_of, lib
from pvfio.drivers.dsa.errors import completion_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.vfio import DmaBuffer, Region

__all__ = ["Event", "EventLog"]

_ENTRY = dtype_of("struct dsa_evl_entry")
_SIZE = int(lib.DSA_EVL_ENTRY_SIZE)
_RECORD_AT = _SIZE - int(lib.DSA_COMPLETION_SIZE)
_WITH_RECORD = (lib.DSA_COMP_CRA_XLAT, lib.DSA_COMP_DRAIN_EVL, lib.DSA_COMP_BATCH_EVL_ERR)


@dataclass(frozen=True, slots=True)
class Event:
    """One entry.

    ``code`` and ``name`` are a completion code; ``wq``, ``operation`` and ``batch_index`` are ``None`` where the
    device did not know them or there was no batch; ``batch_id`` tells batches apart, ``first_in_batch`` marks the
    first of a batch's. ``fault_addr`` is an IOVA (0: the code has none), ``write`` whether it was written to.
    ``invalid_flags`` belongs to code 0x11. ``record`` is the completion record, 32 bytes, that belongs at
    ``fault_addr``, else ``None``; ``interrupt_handle`` is where its interrupt was to go (``None``: none was asked
    for, or the code has none), which was not sent.
    """

    code: int
    name: str
    wq: int | None
    operation: int | None
    batch_index: int | None
    batch_id: int | None
    first_in_batch: bool
    write: bool
    fault_addr: int
    invalid_flags: int
    interrupt_handle: int | None
    record: bytes | None

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """From the 64 bytes of an entry. Raises ``ValueError`` for another size."""
        entry = np.frombuffer(raw, dtype=_ENTRY)[0] if len(raw) == _SIZE else None
        if entry is None:
            raise ValueError(f"an event is {_SIZE} bytes, not {len(raw)}")
        status, info = int(entry["status"]), int(entry["error_info"])
        code = status >> lib.IDXD_SWERR_ERROR_SHIFT & lib.DSA_COMP_STATUS_MASK
        known = bool(status & lib.DSA_EVL_ERR_INFO_VALID)
        in_batch = bool(status & lib.IDXD_SWERR_BATCH)
        carries = code in _WITH_RECORD
        asked = carries and known and bool(info & lib.DSA_EVL_RCI)
        return cls(
            code=code,
            name=completion_name(code),
            wq=status >> lib.IDXD_SWERR_WQ_IDX_SHIFT & 0xFF if status & lib.IDXD_SWERR_WQ_IDX_VALID else None,
            operation=(
                status >> lib.IDXD_SWERR_OPERATION_SHIFT & 0xFF
                if status & lib.IDXD_SWERR_DESC_VALID
                else None
            ),
            batch_index=int(entry["batch_idx"]) if in_batch else None,
            batch_id=status >> lib.DSA_EVL_BATCH_ID_SHIFT & 0xFF if in_batch else None,
            first_in_batch=carries and bool(info & lib.DSA_EVL_FIRST_ERR_IN_BATCH),
            write=bool(status & lib.IDXD_SWERR_FAULT_RW),
            fault_addr=int(entry["fault_addr"]),
            invalid_flags=info & lib.DSA_EVL_INVALID_FLAGS_MASK if code == lib.DSA_COMP_INVALID_FLAGS else 0,
            interrupt_handle=info & lib.DSA_EVL_INT_HANDLE_MASK if asked else None,
            record=raw[_RECORD_AT:] if carries else None,
        )


class EventLog:
    """The ring: ``entries`` of them in ``buffer``, which is mapped and page aligned."""

    def __init__(self, buffer: DmaBuffer, entries: int) -> None:
        if buffer.iova is None:
            raise ValueError("the event log's memory is not mapped")
        self.buffer = buffer
        self.entries = entries
        self.iova: int = buffer.iova
        self._bytes: NDArray[Any] = np.asarray(buffer[: entries * _SIZE]).reshape(entries, _SIZE)

    @staticmethod
    def nbytes(entries: int) -> int:
        """How much memory that many entries take."""
        return entries * _SIZE

    async def enable(self, registers: Region) -> None:
        """Tells a disabled device of the ring, and turns the log on; it is empty then."""
        await registers.write(lib.IDXD_EVLCFG_OFFSET, self.iova, 8)
        await registers.write(lib.IDXD_EVLCFG_OFFSET + 8, self.entries, 8)
        gencfg = await registers.read(lib.IDXD_GENCFG_OFFSET, 4)
        await registers.write(lib.IDXD_GENCFG_OFFSET, gencfg | int(lib.IDXD_GENCFG_EVL_EN), 4)

    async def read(self, registers: Region) -> list[Event]:
        """The entries that are new, in order; the device may use their places again. When cancelled: none is lost."""
        pending = int(lib.IDXD_EVLSTATUS_INT_PENDING) >> 32
        await registers.write(lib.IDXD_EVLSTATUS_OFFSET + 4, pending, 4)
        status = await registers.read(lib.IDXD_EVLSTATUS_OFFSET, 8)
        head = status & int(lib.IDXD_EVLSTATUS_HEAD_MASK)
        tail = status >> int(lib.IDXD_EVLSTATUS_TAIL_SHIFT) & int(lib.IDXD_EVLSTATUS_HEAD_MASK)
        if head >= self.entries or tail >= self.entries:  # no device: it reads as ones
            return []
        places = [(head + i) % self.entries for i in range((tail - head) % self.entries)]
        if places:
            events = [Event.decode(self._bytes[place].tobytes()) for place in places]
            await registers.write(lib.IDXD_EVLSTATUS_OFFSET, tail, 4)
            return events
        return []
