"""Creating and deleting I/O queues, Abort, and the shadow doorbells (NVMe Base 2.0c 5.1, 5.4 to 5.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import lib
from pvfio.devices.nvme.admin import AdminError, Command
from pvfio.devices.nvme.identify_controller import ABORT_LIMIT

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Handler
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.events import AsyncEvents
    from pvfio.devices.nvme.registers import Registers

__all__ = ["QueueCommands"]

_CQE_SHIFT, _SQE_SHIFT = 4, 6
_BYTE_PRP1, _BYTE_PRP2, _BYTE_CDW10, _BYTE_CDW11 = 24, 32, 40, 44
_MOST: Final = 0xFFFF


class QueueCommands:
    """The commands that make and unmake queues. ``granted``: (submission, completion) queues there may be."""

    def __init__(self, config: NvmeConfig, registers: Registers, nvme: Any, events: AsyncEvents) -> None:
        self._config = config
        self._registers = registers
        self._nvme = nvme
        self._events = events
        self.reset()

    def reset(self) -> None:
        """After a reset of the controller: no queue is there."""
        self.granted = (self._config.queues, self._config.queues)
        self._asked = False
        self._live: set[tuple[str, int]] = set()

    @property
    def offered(self) -> int:
        """Feature 07h's value before it was set: both numbers zero-based."""
        return self.granted[0] - 1 | (self.granted[1] - 1) << 16

    def grant(self, asked: int) -> int:
        """Feature 07h (Base 5.27.1.5): before any queue is created; the first answer stands until the next reset."""
        submission, completion = asked & _MOST, asked >> 16
        if _MOST in (submission, completion):
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW11)
        if self._live:
            raise AdminError(lib.NVME_SC_CMD_SEQ_ERROR)
        if not self._asked:
            self._asked = True
            self.granted = (
                min(submission + 1, self._config.queues),
                min(completion + 1, self._config.queues),
            )
        return self.offered

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {
            lib.NVME_ADMIN_CREATE_CQ: self._create_cq,
            lib.NVME_ADMIN_CREATE_SQ: self._create_sq,
            lib.NVME_ADMIN_DELETE_CQ: self._delete_cq,
            lib.NVME_ADMIN_DELETE_SQ: self._delete_sq,
            lib.NVME_ADMIN_ABORT: self._abort,
            lib.NVME_ADMIN_DBBUF: self._doorbell_buffers,
        }

    def _size(self, command: Command) -> int:
        """Entries. Raises Invalid Queue Size and, for memory that is not contiguous, Invalid Field (CAP.CQR)."""
        size = (command.cdw10 >> 16) + 1
        if size < 2 or size > self._config.entries:
            raise AdminError(lib.NVME_SC_QUEUE_SIZE, _BYTE_CDW10 + 2)
        if not command.cdw11 & lib.NVME_QUEUE_PHYS_CONTIG:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW11)
        return size

    def _create_cq(self, command: Command) -> int:
        number, vector = command.cdw10 & 0xFFFF, command.cdw11 >> lib.NVME_CQ_IV_SHIFT
        if not 0 < number <= self.granted[1]:
            raise AdminError(lib.NVME_SC_QID_INVALID, _BYTE_CDW10)
        size = self._size(command)
        if self._registers.queue_entry_sizes[1] != _CQE_SHIFT:
            raise AdminError(lib.NVME_SC_QUEUE_SIZE, _BYTE_CDW10)
        if vector >= self._config.vector_count:
            raise AdminError(lib.NVME_SC_INVALID_VECTOR, _BYTE_CDW11 + 2)
        interrupts = bool(command.cdw11 & lib.NVME_CQ_IRQ_ENABLED)
        self._check(lib.pv_nvme_create_cq(self._nvme, number, command.prp1, size, interrupts, vector))
        self._live.add(("cq", number))
        return 0

    def _create_sq(self, command: Command) -> int:
        number, cq = command.cdw10 & 0xFFFF, command.cdw11 >> lib.NVME_SQ_CQID_SHIFT
        if not 0 < number <= self.granted[0] or not 0 < cq <= self.granted[1]:
            raise AdminError(lib.NVME_SC_QID_INVALID, _BYTE_CDW10)
        size = self._size(command)
        if self._registers.queue_entry_sizes[0] != _SQE_SHIFT:
            raise AdminError(lib.NVME_SC_QUEUE_SIZE, _BYTE_CDW10)
        priority = (command.cdw11 & lib.NVME_SQ_QPRIO_MASK) >> lib.NVME_SQ_QPRIO_SHIFT
        self._check(lib.pv_nvme_create_sq(self._nvme, number, command.prp1, size, cq, priority))
        self._live.add(("sq", number))
        return 0

    def _delete_cq(self, command: Command) -> int:
        number = command.cdw10 & 0xFFFF
        self._check(lib.pv_nvme_delete_cq(self._nvme, number))
        self._live.discard(("cq", number))
        return 0

    def _delete_sq(self, command: Command) -> int:
        number = command.cdw10 & 0xFFFF
        self._check(lib.pv_nvme_delete_sq(self._nvme, number))
        self._live.discard(("sq", number))
        return 0

    def _abort(self, command: Command) -> int:
        """Bit 0 of the result: the command was not aborted (Base 5.1)."""
        if command.at_once >= ABORT_LIMIT:
            raise AdminError(lib.NVME_SC_ABORT_LIMIT)
        queue, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
        aborted = lib.pv_nvme_abort(self._nvme, queue, cid) or (not queue and self._events.abort(cid))
        return 0 if aborted else 1

    async def _doorbell_buffers(self, command: Command) -> int:
        """Invalid Field for pages that are not aligned or not there (Base 5.8)."""
        if not self._config.shadow_doorbells:
            raise AdminError(lib.NVME_SC_INVALID_OPCODE, 0)
        for address, byte in ((command.prp1, _BYTE_PRP1), (command.prp2, _BYTE_PRP2)):
            if not await command.reaches(address, self._config.doorbell_bytes):
                raise AdminError(lib.NVME_SC_INVALID_FIELD, byte)
        if lib.pv_nvme_set_shadow(self._nvme, command.prp1, command.prp2):
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_PRP1)
        return 0

    def _check(self, status: int) -> None:
        if status:
            raise AdminError(status)
