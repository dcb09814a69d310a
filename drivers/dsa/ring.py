"""Completion records: a ring of 32-byte records in DMA memory, and the submissions that wait for them.

A piece is a run of consecutive records that one series of submissions uses. Records are handed out in order
and come back in order, so a record is never given to a new descriptor while an old one may still be written
to it. When a piece has completed (or was taken back), its records are copied to the submission that owns
them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from pvfio.abi import dtype_of, ffi, lib

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.drivers.dsa.workqueue import SubmissionQueue
    from pvfio.vfio import DmaBuffer

__all__ = ["Piece", "RecordRing", "Submission"]

_RECORD = dtype_of("struct dsa_completion_record")
_RECORD_WORDS = _RECORD.itemsize // 8


class Submission:
    """Descriptors that were submitted together.

    ``records`` (shape ``(count,)``, dtype of ``struct dsa_completion_record``) is valid where the
    descriptors are done; status 0 in a finished submission means that the descriptor was taken back by an
    abort or a reset, which ``aborted`` (the reason, or ``None``) says for the whole.
    """

    __slots__ = ("aborted", "count", "keep", "operation", "pending", "submitted", "words", "wq")

    def __init__(self, wq: SubmissionQueue, operation: str, count: int, keep: tuple[Any, ...]) -> None:
        self.wq = wq
        self.operation = operation
        self.count = count
        # Copied as plain words: numpy copies structures field by field, which is tens of times slower.
        self.words = np.zeros((count, _RECORD_WORDS), dtype=np.uint64)
        self.submitted = 0
        self.pending: deque[Piece] = deque()
        self.aborted: str | None = None
        self.keep = keep  # the buffers the device may touch: they are not recycled before it is done

    @property
    def records(self) -> NDArray[Any]:
        """The completion records as they are known now, in the order of the descriptors."""
        records: NDArray[Any] = self.words.view(_RECORD)[:, 0]
        return records

    @property
    def done(self) -> bool:
        """Whether everything submitted is known to have ended; looks at what is known, not at the device."""
        return not self.pending

    def truncate(self, count: int) -> None:
        """The device took only the first ``count`` descriptors; the submission is of those."""
        if count < self.count:
            self.count = count
            self.words = self.words[:count]

    def poll(self) -> bool:
        """Looks at the records; true when all of them are complete. Never waits."""
        return self.wq._reap(self)

    async def wait(self, *, deadline: float | None = None) -> NDArray[Any]:
        """Waits for all descriptors and returns the records.

        ``deadline`` is in seconds (default: the driver's). Raises ``DeadlineExceeded`` when it passes and
        ``OperationAborted`` when an abort or a reset took a descriptor back; a descriptor's own failure is
        in its record. In both cases, and when cancelled, the descriptors are finished or taken back on
        return: the buffers may be reused.
        """
        return await self.wq._finish(self, deadline)


class Piece:
    """``count`` records from ``start`` on, for the submission's descriptors from ``offset`` on."""

    __slots__ = ("count", "done", "offset", "start", "submission")

    def __init__(self, submission: Submission, offset: int, start: int, count: int) -> None:
        self.submission = submission
        self.offset = offset
        self.start = start
        self.count = count
        self.done = False


class RecordRing:
    """The records of one work queue: ``capacity`` of them in ``buffer`` (mapped, 32-byte aligned)."""

    def __init__(self, buffer: DmaBuffer, capacity: int) -> None:
        if buffer.iova is None:
            raise ValueError("the ring's memory is not mapped")
        self.buffer = buffer
        self.capacity = capacity
        self.iova = buffer.iova
        size = capacity * int(lib.DSA_COMPLETION_SIZE)
        plain = np.asarray(buffer[:size])
        self._words = plain.view(np.uint64).reshape(capacity, _RECORD_WORDS)
        self.status: NDArray[np.uint8] = plain.view(_RECORD)["status"]
        self.pointer = ffi.cast("struct dsa_completion_record *", ffi.from_buffer(plain))
        self._tail = 0  # where the next piece begins
        self._used = 0  # records between the oldest piece and the tail
        self.pieces: deque[Piece] = deque()

    @property
    def free(self) -> int:
        """Records that no piece has."""
        return self.capacity - self._used

    def contiguous(self) -> int:
        """How many records the next piece can have."""
        return min(self.capacity - self._used, self.capacity - self._tail)

    def take(self, submission: Submission, offset: int, count: int) -> Piece:
        """A piece of ``count`` cleared records; at most ``contiguous()``."""
        start = self._tail
        piece = Piece(submission, offset, start, count)
        if count == 1:
            self.pointer[start].status = 0
        else:
            self.status[start : start + count] = 0
        self._tail = (start + count) % self.capacity
        self._used += count
        self.pieces.append(piece)
        submission.pending.append(piece)
        return piece

    def shrink(self, piece: Piece, count: int) -> None:
        """The newest piece has only its first ``count`` descriptors: the device took no more."""
        surplus = piece.count - count
        self._tail = (self._tail - surplus) % self.capacity
        self._used -= surplus
        piece.count = count
        if not count:
            self.pieces.pop()
            piece.submission.pending.pop()

    def complete(self, piece: Piece) -> bool:
        """Whether the device has written every record of the piece."""
        if piece.count == 1:
            return bool(self.pointer[piece.start].status)
        # The last one is the likeliest to be missing: one look, before all are looked at.
        end = piece.start + piece.count
        return bool(self.status[end - 1]) and bool(self.status[piece.start : end].all())

    def deliver(self, address: int, record: bytes) -> bool:
        """Writes a completion record the device could not, where a descriptor still waits for it; whether one did."""
        index, rest = divmod(address - self.iova, int(lib.DSA_COMPLETION_SIZE))
        waits = any(not p.done and p.start <= index < p.start + p.count for p in self.pieces)
        if rest or not waits or self.status[index]:
            return False
        words = np.frombuffer(record, dtype=np.uint64)
        self._words[index, 1:] = words[1:]
        self._words[index, 0] = words[0]  # the status last: it is polled
        return True

    def retire(self, piece: Piece) -> None:
        """Copies a piece's records to its submission and gives the oldest finished pieces' records back."""
        submission, end = piece.submission, piece.offset + piece.count
        submission.words[piece.offset : end] = self._words[piece.start : piece.start + piece.count]
        submission.pending.remove(piece)
        piece.done = True
        while self.pieces and self.pieces[0].done:
            self._used -= self.pieces.popleft().count
        if not submission.pending and submission.submitted == submission.count:
            submission.keep = ()

    def address(self, piece: Piece) -> int:
        """The IOVA of the piece's first record."""
        return self.iova + piece.start * int(lib.DSA_COMPLETION_SIZE)
