"""A batch's memory: descriptors and their completion records, side by side, where the device can read and
write them.

The descriptor list is 64-byte aligned, a record 32-byte aligned (Intel DSA 1.2 sections 3.8 and 5.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pvfio.abi import dtype_of, lib

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.vfio import DmaBuffer

__all__ = ["Batch", "batch_bytes"]


def batch_bytes(capacity: int) -> int:
    """How many bytes a batch of ``capacity`` descriptors needs."""
    return capacity * (int(lib.DSA_DESC_SIZE) + int(lib.DSA_COMPLETION_SIZE))


class Batch:
    """``descriptors`` and ``records``: arrays of shape ``(capacity,)`` in mapped memory. Made by
    ``WorkQueue.alloc_batch``.

    Fill ``descriptors`` with the helpers of ``pvfio.drivers.dsa.descriptors``
    (``out=batch.descriptors[a:b]``); completion addresses and flags are written when the batch is
    submitted.
    """

    def __init__(self, buffer: DmaBuffer, capacity: int) -> None:
        if buffer.iova is None:
            raise ValueError("the batch's memory is not mapped")
        self.buffer = buffer
        self.capacity = capacity
        self.iova: int = buffer.iova
        plain = np.asarray(buffer)
        middle, end = capacity * int(lib.DSA_DESC_SIZE), batch_bytes(capacity)
        self.descriptors: NDArray[Any] = plain[:middle].view(dtype_of("struct dsa_hw_desc"))
        self.records: NDArray[Any] = plain[middle:end].view(dtype_of("struct dsa_completion_record"))
        step = int(lib.DSA_COMPLETION_SIZE)
        first = self.iova + middle
        self._addresses = np.arange(first, first + capacity * step, step, dtype=np.uint64)

    def deliver(self, address: int, record: bytes) -> bool:
        """Writes a member's completion record the device could not; whether the address is one of this batch's."""
        index, rest = divmod(address - int(self._addresses[0]), int(lib.DSA_COMPLETION_SIZE))
        if rest or not 0 <= index < self.capacity:
            return False
        size = int(lib.DSA_COMPLETION_SIZE)
        self.records.view(np.uint8)[index * size : (index + 1) * size] = np.frombuffer(record, dtype=np.uint8)
        return True

    def prepare(self, count: int, *, records: bool) -> None:
        """Makes the first ``count`` descriptors ready to be read by the device."""
        members = self.descriptors[:count]
        own = np.uint32(lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR | lib.IDXD_OP_FLAG_RCI)
        members["flags_opcode"] &= ~own
        self.records["status"][:count] = 0
        if records:
            members["flags_opcode"] |= own & ~np.uint32(lib.IDXD_OP_FLAG_RCI)
            members["completion_addr"] = self._addresses[:count]
        else:
            members["completion_addr"] = 0
