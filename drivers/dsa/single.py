"""One descriptor at a time: filled in place, submitted, awaited, its record judged.

What the awaitable operations (operations.py and the files of further operations) are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from pvfio.abi import lib
from pvfio.drivers.dsa.descriptors_build import join
from pvfio.drivers.dsa.errors import DifError, DsaError
from pvfio.drivers.dsa.ring import Submission
from pvfio.drivers.dsa.workqueue import SubmissionQueue
from pvfio.errors import DeviceFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Operation", "SingleQueue"]

_ZEROS = bytes(int(lib.DSA_DESC_SIZE))


@dataclass(slots=True)
class Operation:
    """One descriptor to be: its fields by their names in ``struct dsa_hw_desc``, and the buffers it keeps
    alive.
    """

    name: str
    opcode: int
    fields: dict[str, int]
    keep: tuple[Any, ...] = ()


class SingleQueue(SubmissionQueue):
    """A work queue that takes single operations."""

    def _start(self, operation: Operation, flags: int) -> Submission:
        """Fills one descriptor in place and submits it."""
        if self._closed is not None:
            raise DeviceFailed(self.device, f"wq{self.id} is {self._closed}")
        if flags & ~int(lib.DSA_DESC_FLAGS_MASK):
            raise ValueError(f"flags {flags:#x} have more than 24 bits")
        if self.room < 1:
            self._reap_all()
            if self.room < 1:
                raise trio.WouldBlock
        submission = Submission(self, operation.name, 1, operation.keep)
        self._fill(operation, flags)
        piece = self._ring.take(submission, 0, 1)
        self._descriptor.completion_addr = self._ring.address(piece)
        if not self._ring_portal(piece):
            raise trio.WouldBlock
        return submission

    def _fill(self, operation: Operation, flags: int) -> None:
        descriptor = self._descriptor
        self._staging_bytes[:] = _ZEROS
        flags |= self._completion_flags()
        descriptor.flags_opcode = operation.opcode << int(lib.DSA_DESC_OPCODE_SHIFT) | flags
        descriptor.int_handle = self._handle
        for name, value in operation.fields.items():
            setattr(descriptor, name, value)

    async def _run(self, operation: Operation, flags: int, deadline: float | None) -> NDArray[Any]:
        """One descriptor from submission to its record, whatever its status."""
        await trio.lowlevel.checkpoint()
        try:
            submission = self._start(operation, flags)
        except trio.WouldBlock:
            self._fill(operation, flags)
            one = join(self._first)
            submission = await self.submit(
                one, keep=operation.keep, deadline=deadline, operation=operation.name
            )
        if not self._reap(submission) or submission.aborted is not None:
            await self._outcome(submission, deadline)
        record: NDArray[Any] = submission.records[0]
        return record

    def check(self, record: NDArray[Any], operation: str = "submission") -> NDArray[Any]:
        """The record, if it reports success; raises its ``DsaError`` otherwise (``DifError`` for a bad block)."""
        if record["status"] == lib.DSA_COMP_DIF_ERR:
            raise DifError(operation, record, device=self.device)
        if record["status"] != lib.DSA_COMP_SUCCESS:
            raise DsaError(operation, record, device=self.device)
        return record

    async def _done(self, operation: Operation, flags: int, deadline: float | None) -> NDArray[Any]:
        return self.check(await self._run(operation, flags, deadline), operation.name)

    def _size(self, size: int) -> int:
        if not 0 < size <= self.max_transfer:
            raise ValueError(f"a transfer has 1 to {self.max_transfer} bytes, not {size}")
        return size
