"""A pair of queues with tasks that wait for its commands: one command at a time, waiting, taking back.

What the admin queue (admin.py) and the I/O queues (qpair.py) have in common. Completion is learned of by looking at
the completion queue (polled), by its interrupt, or by looking for some microseconds and then by interrupt (hybrid).
One task that waits for the interrupt does so for all.

While anything is waited for, the controller's status is looked at now and then: a removed or failed controller does
not have to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Final, Literal, NoReturn, TypeAlias

import numpy as np
import trio

from pvfio.abi import lib
from pvfio.drivers.nvme.errors import NvmeError, OperationAborted
from pvfio.drivers.nvme.ring import NOTHING, Completions, Ring
from pvfio.drivers.nvme.sqe import Sqe
from pvfio.errors import DeadlineExceeded, DeviceFailed, VfioError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.drivers.nvme.recovery import Controller
    from pvfio.vfio import Irq

__all__ = ["COMPLETIONS", "Command", "CommandQueue", "Completion"]

COMPLETIONS: Final = ("polled", "interrupt", "hybrid")
_SPIN_NS: Final = 20_000
_NAPS: Final = 2  # the first may be over an interrupt whose completions were taken before
_EAGER_ROUNDS: Final = 32  # polls between which other tasks run, before sleeping between them
_FIRST_NAP: Final = 20e-6
_LONGEST_NAP: Final = 1e-3
_LIVENESS: Final = 0.05  # seconds between looks at the controller's status, while something is waited for
_ABORTED: Final[int] = lib.NVME_SC_HOST_ABORTED_CMD

Completion: TypeAlias = Literal["polled", "interrupt", "hybrid"]
"""How a queue learns that commands are complete."""


class Command:
    """A command that a task waits for. ``status`` and ``result`` are valid when ``done``; ``aborted``: why the
    controller will not complete it any more.
    """

    __slots__ = ("aborted", "cid", "done", "operation", "result", "status")

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.cid = -1
        self.done = False
        self.status = 0
        self.result = 0
        self.aborted: str | None = None


class CommandQueue:
    """One pair of queues of an enabled controller. Its coroutines may be used by any number of tasks at once.

    Attributes: ``id``; ``depth``, the most commands in flight; ``outstanding``, how many are.
    """

    admin = False
    _reserve = 0  # commands there is always room for, in spite of all others

    def __init__(self, controller: Controller, number: int, ring: Ring, completion: Completion) -> None:
        self.id = number
        self.depth = ring.depth
        self.device = controller.name
        self._controller = controller
        self._ring = ring
        self._completion: Completion = completion
        self._irq: tuple[Irq, int] | None = None
        self._waiters: dict[int, Command] = {}
        self._ready: list[Completions] = []  # seen while looking for somebody else's
        self._listener: trio.CancelScope | None = None  # of the task that waits for the interrupt, for all
        self._clock = trio.lowlevel.current_clock().current_time
        self._lot = trio.lowlevel.ParkingLot()
        self._turn = trio.Lock()  # who may wait for room
        self._closed: str | None = "not there yet"
        self._paused = False  # during a reset: there is no room

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.device} {self.id} {self.outstanding}/{self.depth}>"

    @property
    def outstanding(self) -> int:
        """Commands submitted whose completion was not seen yet."""
        return self._ring.outstanding

    @property
    def room(self) -> int:
        """How many commands can be submitted now, as far as is known without looking for completions."""
        return 0 if self._paused else self._ring.room - self._reserve

    @property
    def completion(self) -> Completion:
        """How completion is learned of. Without an interrupt it is polled, whatever this says."""
        return self._completion

    def _now(self) -> int:
        """trio's time in nanoseconds, never 0."""
        return int(self._clock() * 1e9) + 1

    # One command

    def _check(self) -> None:
        if self._closed is not None:
            raise DeviceFailed(self.device, f"queue {self.id} is {self._closed}")

    def _start(self, *commands: tuple[Command, Sqe]) -> None:
        """Submits commands, for which there is room. None was submitted when it raises."""
        packed = [sqe.pack() for _, sqe in commands]
        cids = [self._ring.put(entry, self._now()) for entry in packed]
        self._ring.ring()
        for (command, _), cid in zip(commands, cids, strict=True):
            command.cid = cid
            self._waiters[cid] = command

    async def _run(
        self,
        start: Callable[[Command], None],
        operation: str,
        deadline: float | None = None,
        *,
        count: int = 1,
        privileged: bool = False,
    ) -> Command:
        """One command from submission, which ``start`` does, to its completion, whatever its status.

        ``start`` submits ``count`` commands. ``privileged``: of the reset itself, which the queue is paused for, and
        which takes nothing back. Raises ``DeadlineExceeded``, ``OperationAborted``, ``DeviceFailed``, and ``VfioError``
        where the doorbell cannot be rung; then, on return, and when cancelled, the controller does not touch any more
        what the command named.
        """
        self._check()
        await trio.lowlevel.checkpoint_if_cancelled()
        seconds = self._controller.deadline if deadline is None else deadline
        command = Command(operation)
        if privileged:
            self._check()
        elif self._closed is not None or self.room < count:
            await self._wait_for_room(count, seconds, operation)
        start(command)
        try:
            await self._until(lambda: command.done, seconds)
        except BaseException:
            if not privileged:
                await self._make_safe(lambda: command.done, lambda: [command.cid])
            raise
        if not command.done or command.aborted is not None:
            await self._failed(command, seconds, privileged)
        return command

    async def _failed(self, command: Command, seconds: float, privileged: bool) -> NoReturn:
        """Raises what a command deserves that did not complete, or that a reset took back."""
        if not command.done:
            if not privileged:
                await self._make_safe(lambda: command.done, lambda: [command.cid], grace=0)
            raise DeadlineExceeded(command.operation, seconds, device=self.device)
        self._controller.check()
        raise OperationAborted(command.operation, command.aborted or "", device=self.device)

    async def _done(
        self,
        sqe: Sqe,
        operation: str,
        deadline: float | None = None,
        *,
        lba: int | None = None,
        privileged: bool = False,
    ) -> int:
        """A command's result where it succeeds, ``NvmeError`` otherwise; else as ``_run``."""
        command = await self._run(lambda c: self._start((c, sqe)), operation, deadline, privileged=privileged)
        self._judge(command, sqe.opcode, sqe.nsid, lba)
        return command.result

    def _judge(self, command: Command, opcode: int, nsid: int, lba: int | None) -> None:
        """Raises the ``NvmeError`` of a command that did not succeed."""
        if command.status:
            raise NvmeError(
                command.operation,
                command.status,
                opcode=opcode,
                device=self.device,
                nsid=nsid or None,
                lba=lba,
                result=command.result,
            )

    async def _wait_for_room(self, count: int, seconds: float, operation: str) -> None:
        """Until ``count`` commands can be submitted. Nothing was submitted when it raises."""
        if self._closed is None and self.room >= count:
            return
        with trio.move_on_after(seconds):
            async with self._turn:
                await self._until(lambda: self._closed is not None or self.room >= count)
                self._check()
                return
        raise DeadlineExceeded(operation, seconds, device=self.device)

    # Completion

    def _collect(
        self, most: int | None = None, *, least: int = 1, wait_ns: int = 0, release: bool = False
    ) -> Completions | None:
        """Takes completions: awaited commands get theirs, the rest is returned; None: there was nothing to take.

        What is returned may be empty: all of it was awaited. Its identifiers are released by whoever hands it out, or,
        where nothing is awaited, at once.
        """
        try:
            taken = self._ring.reap(most, least=least, wait_ns=wait_ns, release=release)
        except DeviceFailed as error:
            self._controller.condemn(error.reason)
            raise
        if taken is None:
            return None
        return self._hand_out(taken) if self._waiters else taken

    def _hand_out(self, taken: Completions) -> Completions:
        cids = taken.cids.tolist()
        if self._waiters.keys().isdisjoint(cids):
            return taken
        results, others = self._ring.results(len(cids)), []
        for index, (cid, status) in enumerate(zip(cids, taken.status.tolist(), strict=True)):
            command = self._waiters.pop(cid, None)
            if command is None:
                others.append(index)
                continue
            command.status, command.result = status, results[index]
            command.done = True
        if self._lot:
            self._lot.unpark_all()
        self._ring.release(np.delete(taken.cids, others) if others else taken.cids)
        if not others:
            return NOTHING
        left = taken.status[others]
        return Completions(taken.cids[others], left, int(np.count_nonzero(left)))

    def _look(self, wait_ns: int = 0) -> bool:
        """Takes everything that is complete; whether there was anything."""
        if len(self._waiters) == 1 and self._ring.outstanding == 1 and not self.admin:
            return self._look_for_one(wait_ns)
        found = False
        while self.outstanding and (taken := self._collect(wait_ns=wait_ns)) is not None:
            found, wait_ns = True, 0
            if len(taken):
                self._keep(taken)
        return found

    def _look_for_one(self, wait_ns: int) -> bool:
        """``_look`` where the only command is one that a task waits for, in numbers; nothing is handed out."""
        try:
            taken = self._ring.reap_one(wait_ns)
        except DeviceFailed as error:
            self._controller.condemn(error.reason)
            raise
        if taken is None:
            return False
        command = self._waiters.pop(taken[0])
        command.status, command.result, command.done = taken[1], self._ring.result(), True
        if self._lot:
            self._lot.unpark_all()
        return True

    def _unawaited(self) -> NDArray[np.intp]:
        """The identifiers in flight that no task waits for by name."""
        cids = self._ring.in_flight()
        if not self._waiters:
            return cids
        return cids[[cid not in self._waiters for cid in cids.tolist()]]

    def _keep(self, taken: Completions) -> None:
        """Completions that nobody waits for by name."""
        self._ready.append(taken)

    async def _until(self, wanted: Callable[[], bool], seconds: float = inf) -> bool:
        """Looks at the queue until something is so, for up to that long; whether it is. Checkpoints."""
        if self._completion == "polled" or self._irq is None:
            return await self._until_polled(wanted, seconds)
        end = self._clock() + seconds
        spin = _SPIN_NS if self._completion == "hybrid" and not self._paused else 0
        naps = 0 if self.admin or self._paused else _NAPS
        await trio.lowlevel.checkpoint()  # the controller is at work meanwhile
        while True:
            self._look(spin)
            if wanted():
                return True
            if self._clock() >= end:
                return False
            spin = 0
            if self._listener is not None:
                self._listener.deadline = min(self._listener.deadline, end)
                await self._lot.park()
            elif naps and self.outstanding == 1 and self._irq[0].soon(self._irq[1]):
                naps -= 1
            else:
                naps = 0
                await self._listen(end)

    async def _listen(self, end: float) -> None:
        """Waits for the interrupt, on behalf of every task that waits for a command of this queue, and not beyond
        ``end``. One scope has the deadlines of them all.
        """
        assert self._irq is not None
        irq, vector = self._irq
        due = self._clock() + _LIVENESS
        try:
            with trio.CancelScope(deadline=min(end, due)) as self._listener:
                try:
                    await irq.fired(vector)
                except (trio.ClosedResourceError, VfioError):  # torn down: whoever did it wakes us
                    await trio.sleep(_LIVENESS)
                return
        finally:
            self._listener = None
            self._lot.unpark_all()
        if self._clock() >= due:
            await self._controller.look_after()

    async def _until_polled(self, wanted: Callable[[], bool], seconds: float = inf) -> bool:
        """As ``_until``, without the interrupt."""
        end = self._clock() + seconds
        rounds, nap, slept = 0, _FIRST_NAP, 0.0
        while True:
            await trio.lowlevel.checkpoint()  # the controller is at work meanwhile
            if wanted():
                return True
            found = self._look(_SPIN_NS)
            if wanted():
                return True
            now = self._clock()
            if now >= end:
                return False
            if found:
                rounds, nap = 0, _FIRST_NAP
                continue
            rounds += 1
            if rounds < _EAGER_ROUNDS:
                continue
            await trio.sleep(min(nap, end - now))
            slept += nap
            nap = min(2 * nap, _LONGEST_NAP)
            if slept >= _LIVENESS:
                slept = 0.0
                await self._controller.look_after()

    # Taking back

    async def _make_safe(
        self, done: Callable[[], bool], cids: Callable[[], list[int]], grace: float | None = None
    ) -> None:
        """Returns only when the controller can no longer touch what the commands named.

        First they get ``grace`` seconds (the driver's) to end by themselves, then they are aborted, then the
        controller is reset, then the function, and at last the device is closed, which takes its right to do DMA
        away. Shielded from cancellation; every step has a deadline.
        """
        with trio.CancelScope(shield=True):
            seconds = self._controller.grace if grace is None else grace
            with suppress(DeviceFailed):  # a controller that completes nonsense is given up
                if await self._until_polled(done, seconds):
                    return
            await self._controller.take_back(self, done, cids)

    def _sweep(self, reason: str) -> None:
        """The controller was reset: what it has not completed by now, it never will."""
        with suppress(DeviceFailed):  # nonsense in the queue: that is over now
            self._look()
        others = self._unawaited()
        for command in self._waiters.values():
            command.aborted, command.done = reason, True
        self._waiters.clear()
        if len(others):
            self._keep(Completions(others, np.full(len(others), _ABORTED, dtype=np.uint16), len(others)))
        self._ring.forget(np.concatenate([kept.cids for kept in self._ready]) if self._ready else None)
        self._wake()

    def _open(self, irq: tuple[Irq, int] | None) -> None:
        self._irq = irq
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
