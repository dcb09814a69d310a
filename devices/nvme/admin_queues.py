"""Creating and deleting I/O queues, Abort, and the shadow doorbells (NVMe Base 2.0c 5.1, 5.4 to 5.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvfio.abi import lib
from pvfio.devices.nvme.admin import AdminError, Command

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Handler
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.registers import Registers

__all__ = ["QueueCommands"]

_CQE_SHIFT, _SQE_SHIFT = 4, 6
_BYTE_CDW10, _BYTE_CDW11 = 40, 44


class QueueCommands:
    """The commands that make and unmake queues. ``granted``: (submission, completion) queues of Set Features."""

    def __init__(self, config: NvmeConfig, registers: Registers, nvme: Any) -> None:
        self._config = config
        self._registers = registers
        self._nvme = nvme
        self.granted = (config.queues, config.queues)

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
        return self._done(lib.pv_nvme_create_cq(self._nvme, number, command.prp1, size, interrupts, vector))

    def _create_sq(self, command: Command) -> int:
        number, cq = command.cdw10 & 0xFFFF, command.cdw11 >> lib.NVME_SQ_CQID_SHIFT
        if not 0 < number <= self.granted[0] or not 0 < cq <= self.granted[1]:
            raise AdminError(lib.NVME_SC_QID_INVALID, _BYTE_CDW10)
        size = self._size(command)
        if self._registers.queue_entry_sizes[0] != _SQE_SHIFT:
            raise AdminError(lib.NVME_SC_QUEUE_SIZE, _BYTE_CDW10)
        priority = (command.cdw11 & lib.NVME_SQ_QPRIO_MASK) >> lib.NVME_SQ_QPRIO_SHIFT
        return self._done(lib.pv_nvme_create_sq(self._nvme, number, command.prp1, size, cq, priority))

    def _delete_cq(self, command: Command) -> int:
        return self._done(lib.pv_nvme_delete_cq(self._nvme, command.cdw10 & 0xFFFF))

    def _delete_sq(self, command: Command) -> int:
        return self._done(lib.pv_nvme_delete_sq(self._nvme, command.cdw10 & 0xFFFF))

    def _abort(self, command: Command) -> int:
        """Bit 0 of the result: the command was not aborted (Base 5.1)."""
        queue, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
        return 0 if lib.pv_nvme_abort(self._nvme, queue, cid) else 1

    def _doorbell_buffers(self, command: Command) -> int:
        if lib.pv_nvme_set_shadow(self._nvme, command.prp1, command.prp2):
            raise AdminError(lib.NVME_SC_INVALID_FIELD)
        return 0

    def _done(self, status: int) -> int:
        if status:
            raise AdminError(status)
        return 0
