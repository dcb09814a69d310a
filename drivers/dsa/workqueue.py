"""A work queue's core: submission, occupancy, completion, taking back. The operations are in operations.py.

The driver never has more descriptors outstanding than the WQ holds, so a dedicated WQ never drops one
(Intel DSA 1.2 section 3.2.1). Submissions to a shared WQ use ENQCMD and may be told to retry. A descriptor
counts as outstanding from its submission until its completion record was seen.

Not here: configuration (driver.py), and several processes sharing one WQ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import trio

from pvfio.abi import dtype_of, ffi, lib
from pvfio.drivers.dsa.descriptors import words_of
from pvfio.drivers.dsa.errors import OperationAborted
from pvfio.drivers.dsa.ring import Piece, RecordRing, Submission
from pvfio.errors import DeadlineExceeded, DeviceFailed, VfioError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.drivers.dsa.configuration import WqConfig
    from pvfio.drivers.dsa.driver import DsaDriver
    from pvfio.vfio import Irq, Region

__all__ = ["COMPLETIONS", "Completion", "SubmissionQueue"]

COMPLETIONS = ("polled", "interrupt", "hybrid")

_SPIN_NS = 20_000
_NAPS = 2  # the first may be over an interrupt whose records were taken before
_EAGER_ROUNDS = 32  # polls between which other tasks run, before sleeping between them
_FIRST_NAP = 20e-6
_LONGEST_NAP = 1e-3


Completion: TypeAlias = Literal["polled", "interrupt", "hybrid"]
"""How a WQ learns that descriptors are complete: by looking at the records; by an interrupt, which every
descriptor asks for; or by looking for some microseconds, then by interrupt."""


class SubmissionQueue:
    """One WQ of an enabled device. Its coroutines may be used by any number of tasks at once.

    Attributes: ``id``; ``size`` in descriptors; ``shared``; ``max_transfer`` in bytes; ``max_batch`` in
    descriptors; ``completion``, which may be changed at any time and holds for what is submitted
    afterwards.
    """

    def __init__(
        self, driver: DsaDriver, number: int, config: WqConfig, portals: Region, ring: RecordRing
    ) -> None:
        self.driver = driver
        self.id = number
        self.size = config.size or 0
        self.shared = config.shared
        self.max_transfer = 1 << (config.max_transfer_shift or 0)
        self.max_batch = 1 << (config.max_batch_shift or 0)
        self._completion: Completion = config.completion
        self.device = driver.device.name
        self._portals = portals
        page = int(lib.IDXD_PORTAL_LIMITED) * int(lib.IDXD_PORTAL_SIZE)
        self._portal = number * int(lib.IDXD_WQ_PORTAL_STRIDE) + page
        self._slot = 0
        self._ring = ring
        self._outstanding = 0
        self._irq: tuple[Irq, int] | None = None
        self._handle = 0
        self._flags = int(lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR)
        self._listener: trio.CancelScope | None = None  # of the task that waits for the interrupt, for all
        self._lot = trio.lowlevel.ParkingLot()
        self._turn = trio.Lock()  # who may wait for room
        self._closed: str | None = "not enabled"
        self._paused = False  # during an abort or a reset: there is no room
        self._staging: NDArray[Any] = np.zeros(self.size, dtype=dtype_of("struct dsa_hw_desc"))
        self._staging_words = words_of(self._staging)
        self._first = self._staging[:1]
        self._descriptor = ffi.cast("struct dsa_hw_desc *", ffi.from_buffer(self._staging))
        self._staging_bytes = ffi.buffer(self._descriptor, int(lib.DSA_DESC_SIZE))

    def __repr__(self) -> str:
        mode = "shared" if self.shared else "dedicated"
        return f"<WorkQueue {self.device} wq{self.id} {mode} {self._outstanding}/{self.size}>"

    @property
    def outstanding(self) -> int:
        """Descriptors submitted whose completion was not seen yet."""
        return self._outstanding

    @property
    def room(self) -> int:
        """How many descriptors ``submit_nowait`` takes now, as far as is known without looking at the
        records.
        """
        return 0 if self._paused else min(self.size - self._outstanding, self._ring.free)

    @property
    def completion(self) -> Completion:
        """How completion is learned of; setting it holds for what is submitted afterwards (``ValueError``:
        not one).
        """
        return self._completion

    @completion.setter
    def completion(self, how: Completion) -> None:
        if how not in COMPLETIONS:
            raise ValueError(f"completion is one of {', '.join(COMPLETIONS)}, not {how!r}")
        self._completion = how

    # Submission

    def submit_nowait(
        self, descriptors: NDArray[Any], *, keep: tuple[Any, ...] = (), operation: str = "submission"
    ) -> Submission:
        """Submits all of a one-dimensional array of ``struct dsa_hw_desc``, in order.

        The array is copied; completion address, completion flags and interrupt handle are the queue's.
        ``keep`` is held until the descriptors are done: pass the buffers they use, so that their memory is
        not recycled before. Raises ``trio.WouldBlock`` when there is no room for all of them now,
        ``ValueError`` for another dtype or shape, or more than ``size``, ``DeviceFailed`` when the WQ is
        not enabled. A shared WQ may take only the first ones: the submission's ``count`` says how many
        (none: ``trio.WouldBlock``). ``VfioError`` where the portal cannot be written: some of several may have been
        submitted, which ``keep`` is held for.
        """
        self._check(descriptors)
        count = len(descriptors)
        if count > self.size:
            raise ValueError(f"{count} descriptors for a work queue of {self.size}")
        if self.room < count:
            self._reap_all()
            if self.room < count:
                raise trio.WouldBlock
        submission = Submission(self, operation, count, keep)
        pushed = self._push(submission, descriptors)
        if not pushed:
            raise trio.WouldBlock
        submission.truncate(pushed)
        return submission

    async def submit(
        self,
        descriptors: NDArray[Any],
        *,
        keep: tuple[Any, ...] = (),
        deadline: float | None = None,
        operation: str = "submission",
    ) -> Submission:
        """As ``submit_nowait``, but waits for room; the array may be longer than the WQ.

        Returns when the last descriptor is submitted. ``deadline`` in seconds bounds the wait:
        ``DeadlineExceeded``; ``VfioError`` where the portal cannot be written. When that is raised, or the task is
        cancelled, what was submitted is finished or taken back.
        """
        self._check(descriptors)
        await trio.lowlevel.checkpoint()
        submission = Submission(self, operation, len(descriptors), keep)
        seconds = self.driver.deadline if deadline is None else deadline
        try:
            if self.room >= len(descriptors) and self._push(submission, descriptors) == len(descriptors):
                return submission
            with trio.fail_after(seconds):
                async with self._turn:
                    await self._push_all(submission, descriptors)
        except trio.TooSlowError:
            await self._make_safe(submission, grace=0)
            raise DeadlineExceeded(operation, seconds, device=self.device) from None
        except BaseException:
            await self._make_safe(submission)
            raise
        return submission

    def _check(self, descriptors: NDArray[Any]) -> None:
        if self._closed is not None:
            raise DeviceFailed(self.device, f"wq{self.id} is {self._closed}")
        if descriptors.dtype != self._staging.dtype or descriptors.ndim != 1 or not len(descriptors):
            raise ValueError("descriptors are a one-dimensional, not empty array of struct dsa_hw_desc")

    async def _push_all(self, submission: Submission, descriptors: NDArray[Any]) -> None:
        nap = _FIRST_NAP
        while True:
            if self._closed is not None:
                raise DeviceFailed(self.device, f"wq{self.id} is {self._closed}")
            if submission.aborted is not None:
                raise OperationAborted(submission.operation, submission.aborted, device=self.device)
            if self._paused:
                await self._lot.park()
                continue
            self._reap_all()
            before = submission.submitted
            self._push(submission, descriptors[before:])
            if submission.submitted == submission.count:
                return
            if submission.submitted > before:
                nap = _FIRST_NAP
            if self._ring.pieces and not self.room:
                await self._arrival(self._ring.pieces[0])
            else:  # a shared WQ is full of others' descriptors
                await trio.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP)

    def _push(self, submission: Submission, descriptors: NDArray[Any]) -> int:
        """Submits as many as there is room for; how many that were."""
        pushed = 0
        while pushed < len(descriptors):
            count = min(len(descriptors) - pushed, self.room, self._ring.contiguous())
            if count <= 0:
                break
            piece = self._ring.take(submission, submission.submitted, count)
            staging = self._staging[:count]
            self._staging_words[:count] = words_of(descriptors[pushed : pushed + count])
            step = int(lib.DSA_COMPLETION_SIZE)
            first = self._ring.address(piece)
            staging["completion_addr"] = np.arange(first, first + count * step, step, dtype=np.uint64)
            staging["flags_opcode"] |= np.uint32(self._completion_flags())
            staging["int_handle"] = self._handle
            pushed += self._ring_portal(piece)
            if piece.count < count:
                break
        return pushed

    def _completion_flags(self) -> int:
        wanted = self._irq is not None and self._completion != "polled"
        return self._flags | (int(lib.IDXD_OP_FLAG_RCI) if wanted else 0)

    def _ring_portal(self, piece: Piece) -> int:
        """Writes the staged descriptors to the portal; a shared WQ may take fewer, and the piece shrinks. So it does on
        ``VfioError``; but of several for a dedicated WQ some may have arrived then, and all of them count.
        """
        count, taken = piece.count, 0
        offset = self._portal + self._slot
        try:
            if self.shared:
                while taken < count and self._portals.enqcmd(offset, self._staging[taken : taken + 1]):
                    taken += 1
            else:
                taken = count
                self._portals.movdir64b(offset, self._first if count == 1 else self._staging[:count])
                self._slot = (self._slot + count * int(lib.DSA_DESC_SIZE)) % int(lib.IDXD_PORTAL_SIZE)
        except VfioError:
            if not self.shared and count == 1:
                taken = 0
            raise
        finally:
            if taken < count:
                self._ring.shrink(piece, taken)
            piece.submission.submitted += taken
            self._outstanding += taken
        return taken

    # Completion

    def _retire(self, piece: Piece) -> None:
        self._ring.retire(piece)
        self._outstanding -= piece.count

    def _reap(self, submission: Submission) -> bool:
        pending = submission.pending
        while pending and self._ring.complete(pending[0]):
            self._retire(pending[0])
        return not pending

    def _reap_all(self) -> None:
        for piece in [piece for piece in self._ring.pieces if not piece.done]:
            if self._ring.complete(piece):
                self._retire(piece)

    def poll(self) -> list[Submission]:
        """Looks at all records and returns the submissions that this call found to have ended. Never waits."""
        waiting = {id(piece.submission): piece.submission for piece in self._ring.pieces if not piece.done}
        self._reap_all()
        return [submission for submission in waiting.values() if submission.done]

    async def _finish(self, submission: Submission, deadline: float | None) -> NDArray[Any]:
        """What ``Submission.wait`` says."""
        if self._reap(submission) and submission.aborted is None:
            await trio.lowlevel.checkpoint()
            return submission.records
        return await self._outcome(submission, deadline)

    async def _outcome(self, submission: Submission, deadline: float | None) -> NDArray[Any]:
        seconds = self.driver.deadline if deadline is None else deadline
        try:
            with trio.move_on_after(seconds):
                while submission.pending:
                    await self._arrival(submission.pending[0])
                    self._reap(submission)
        except BaseException:
            await self._make_safe(submission)
            raise
        if not self._reap(submission):
            await self._make_safe(submission, grace=0)
            error = DeadlineExceeded(submission.operation, seconds, device=self.device)
            raise error from self.driver.last_software_error
        if submission.aborted is not None:
            raise OperationAborted(submission.operation, submission.aborted, device=self.device)
        return submission.records

    async def _arrival(self, piece: Piece) -> None:
        """Until the piece is complete or was taken back."""
        polled = self._completion == "polled" or self._irq is None
        if polled:
            await self._arrival_polled(piece)
            return
        if self._completion == "hybrid" and self._spin(piece):
            await trio.lowlevel.checkpoint()
            return
        naps = _NAPS
        await trio.lowlevel.checkpoint()  # the device is at work meanwhile
        while not piece.done and not self._ring.complete(piece):
            if self._listener is not None:
                await self._lot.park()
            elif naps and self._outstanding == piece.count and self._interrupted_soon():
                naps -= 1
            else:
                naps = 0
                await self._listen()

    def _interrupted_soon(self) -> bool:
        """Whether the WQ's interrupt came soon."""
        assert self._irq is not None
        irq, vector = self._irq
        return irq.soon(vector) > 0

    async def _listen(self) -> None:
        """Waits for the WQ's interrupt, on behalf of every task that waits for a record of this WQ."""
        assert self._irq is not None
        irq, vector = self._irq
        end = (
            trio.current_time() + self.driver.deadline
        )  # then all look again; each has a deadline of its own
        try:
            with trio.CancelScope(deadline=end) as self._listener:
                try:
                    await irq.fired(vector)
                except (trio.ClosedResourceError, VfioError):  # torn down: a sweep follows, and wakes
                    await self._lot.park()
        finally:
            self._listener = None
            self._reap_all()
            self._lot.unpark_all()

    def _spin(self, piece: Piece) -> bool:
        """Looks at the piece's records for some microseconds, without the GIL."""
        start = self._ring.pointer + piece.start
        size = int(lib.DSA_COMPLETION_SIZE)
        ready: int = lib.pv_wait_bytes(start, size, piece.count, 0xFF, _SPIN_NS)
        return ready == piece.count

    async def _arrival_polled(self, piece: Piece) -> None:
        rounds, nap = 0, _FIRST_NAP
        while not piece.done and not self._spin(piece):
            rounds += 1
            if rounds < _EAGER_ROUNDS:
                await trio.lowlevel.checkpoint()
            else:
                await trio.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP)
        await trio.lowlevel.checkpoint()

    # Taking back

    async def _make_safe(self, submission: Submission, grace: float | None = None) -> None:
        """Returns only when the device can no longer touch what the submission named.

        First the descriptors get ``grace`` seconds (the driver's) to end by themselves, then the WQ is
        aborted, then the device reset, then the function, and at last the device is closed, which takes its
        right to do DMA away: then, and when not even that works, ``DeviceFailed``. Shielded from
        cancellation; every step has a deadline.
        """
        with trio.CancelScope(shield=True):
            seconds = self.driver.grace if grace is None else grace
            with trio.move_on_after(seconds):
                while not self._reap(submission):
                    await self._arrival_polled(submission.pending[0])
            if not self._reap(submission):
                await self.driver._take_back(self, submission)

    def _sweep(self, reason: str) -> None:
        """After an abort or a reset: whatever has no completion record by now was taken back."""
        self._reap_all()
        for piece in [piece for piece in self._ring.pieces if not piece.done]:
            piece.submission.aborted = reason
            self._retire(piece)
        self._wake()

    def _open(self, irq: tuple[Irq, int] | None, handle: int) -> None:
        self._irq, self._handle = irq, handle
        self._closed, self._paused = None, False
        self._wake()

    def _pause(self) -> None:
        self._paused = True

    def _close(self, reason: str) -> None:
        self._closed, self._paused = reason, False
        self._wake()

    def _wake(self) -> None:
        """Lets every waiting task look again, the one that waits for the interrupt too."""
        if self._listener is not None:
            self._listener.cancel()
        self._lot.unpark_all()
