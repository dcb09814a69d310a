"""An I/O queue: commands by the array, one doorbell for all of them, completions by the array.

Every array operation here is for all commands of a call; there is no loop over commands. Data pointers are one SGL
data block where the controller takes SGLs, else PRPs: the second entry is computed, lists are laid out beforehand in a
page of each command identifier (NVMe Base 2.0c 4.1.1, 4.1.2).

Not here: the awaited commands by name (operations.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from pvfio.abi import lib
from pvfio.drivers.nvme.prp import PAGE, PrpLists
from pvfio.drivers.nvme.queue import COMPLETIONS, CommandQueue, Completion
from pvfio.drivers.nvme.ring import NOTHING, Completions, Template
from pvfio.errors import DeadlineExceeded, DeviceFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.drivers.nvme.recovery import Controller
    from pvfio.drivers.nvme.ring import Ring

__all__ = ["VectorQueue"]

_SGL: Final[int] = lib.NVME_CMD_SGL_METABUF
_TRANSFERS: Final = frozenset((lib.NVME_CMD_WRITE, lib.NVME_CMD_READ, lib.NVME_CMD_COMPARE))


class VectorQueue(CommandQueue):
    """An I/O queue of an enabled controller.

    ``submit_nowait`` gives commands to the controller and returns their identifiers; ``reap`` and ``reap_nowait``
    return the identifiers and statuses of those that completed. Between the two, an identifier and the memory the
    command names are the controller's.
    """

    def __init__(
        self, controller: Controller, number: int, ring: Ring, completion: Completion, lists: PrpLists | None
    ) -> None:
        super().__init__(controller, number, ring, completion)
        self._lists = lists  # None: the controller takes SGLs
        self._templates: dict[tuple[int, int, int, int], Template] = {}

    @property
    def completion(self) -> Completion:
        """How completion is learned of; setting it holds from now on. ``ValueError`` for an interrupt the queue was
        created without.
        """
        return self._completion

    @completion.setter
    def completion(self, how: Completion) -> None:
        if how not in COMPLETIONS:
            raise ValueError(f"completion is one of {', '.join(COMPLETIONS)}, not {how!r}")
        if how != "polled" and self._irq is None:
            raise ValueError(f"queue {self.id} was created without an interrupt")
        self._completion = how

    # Submission

    def submit_nowait(
        self,
        opcode: int,
        nsid: int,
        lbas: NDArray[np.uint64],
        blocks: int | NDArray[np.uint16],
        iovas: NDArray[np.uint64],
        *,
        control: int = 0,
        metadata: NDArray[np.uint64] | None = None,
    ) -> NDArray[np.intp]:
        """Submits ``len(lbas)`` commands of one opcode (read, write, compare, write zeroes, verify, write
        uncorrectable) and rings the doorbell once; returns their identifiers.

        ``lbas`` and ``iovas`` have shape (n,) (``iovas`` is of no use to commands without data), ``blocks`` is 1 to
        65536 for all or of shape (n,); ``control`` goes into CDW12 (``lib.NVME_RW_FUA``, ...). ``metadata``: IOVAs of
        the metadata, where it is separate. Raises ``trio.WouldBlock`` when there is no room for all of them,
        ``DeviceFailed`` when the queue is not there, ``VfioError`` where the doorbell cannot be rung, ``ValueError``
        for a transfer that is longer than the controller allows and for arrays of other shapes. Nothing was submitted
        then.
        """
        if self._closed is not None or self._paused:
            self._check()
            raise trio.WouldBlock
        ring = self._ring
        if metadata is not None and metadata.shape != (len(lbas),):
            raise ValueError("every command has its metadata")
        if not isinstance(blocks, int):
            cids = self._uneven(opcode, nsid, lbas, blocks, iovas, control)
        else:
            template = self._template(opcode, nsid, blocks, control)
            pointed = self._lists is not None and template.length
            if metadata is None and not pointed:
                begun = ring.post(template, lbas, iovas, self._now())
                if begun is None:
                    raise trio.WouldBlock
                return begun
            cids = self._filled(template, lbas, iovas)
            if self._lists is not None and pointed:
                self._lists.point(ring, cids, iovas, template.length)
        if metadata is not None:
            ring.overwrite(2, metadata)
        ring.ring()
        return cids

    def _filled(
        self, template: Template, lbas: NDArray[np.uint64], iovas: NDArray[np.uint64]
    ) -> NDArray[np.intp]:
        cids = self._ring.fill(template, lbas, iovas, self._now())
        if cids is None:
            raise trio.WouldBlock
        return cids

    def submit_one_nowait(
        self, opcode: int, nsid: int, lba: int, blocks: int, iova: int, *, control: int = 0
    ) -> int:
        """``submit_nowait`` of a single command in plain numbers, which is faster for one; its identifier."""
        if self._closed is not None or self._paused:
            self._check()
            raise trio.WouldBlock
        template = self._template(opcode, nsid, blocks, control)
        if self._lists is not None and template.length > PAGE - iova % PAGE:
            where = np.array([lba, iova], dtype=np.uint64)
            return int(self.submit_nowait(opcode, nsid, where[:1], blocks, where[1:], control=control)[0])
        cid = self._ring.post_one(template, lba, iova, self._now)
        if cid < 0:
            raise trio.WouldBlock
        return cid

    def reap_one_nowait(self, wait_ns: int = 0) -> tuple[int, int] | None:
        """``reap_nowait`` of a single command: identifier and status, None where none completed.

        Blocks the thread for up to ``wait_ns``. Not while tasks await commands of this queue: ``RuntimeError``.
        """
        if self._waiters:
            raise RuntimeError("a task awaits a command of this queue")
        if self._ready:
            done = self._taken(1)
            return int(done.cids[0]), int(done.status[0])
        return self._ring.reap_one(wait_ns)

    def forget_templates(self) -> None:
        """The namespaces may be others now, or other formats."""
        self._templates.clear()

    def _template(self, opcode: int, nsid: int, blocks: int, control: int) -> Template:
        """What commands of a kind have in common."""
        key = (opcode, nsid, blocks, control)
        known = self._templates.get(key)
        if known is None:
            if len(self._templates) >= 1024:
                self._templates.clear()
            known = self._templates[key] = self._new_template(opcode, nsid, blocks, control)
        return known

    def _new_template(self, opcode: int, nsid: int, blocks: int, control: int) -> Template:
        if not 1 <= blocks <= 1 << 16:
            raise ValueError(f"a command has 1 to 65536 blocks, not {blocks}")
        length = blocks * self._controller.transfer_size(nsid) if opcode in _TRANSFERS else 0
        if length > self._controller.max_transfer:
            raise ValueError(
                f"{length} bytes are more than the {self._controller.max_transfer} of one command"
            )
        sgl = self._lists is None and length
        word0 = opcode | (_SGL if sgl else 0) << 8 | nsid << 32
        return Template(word0, length if sgl else 0, blocks - 1 | control, length)

    def _uneven(
        self,
        opcode: int,
        nsid: int,
        lbas: NDArray[np.uint64],
        blocks: NDArray[np.uint16],
        iovas: NDArray[np.uint64],
        control: int,
    ) -> NDArray[np.intp]:
        """Commands of different lengths."""
        sizes = np.asarray(blocks, dtype=np.uint64)
        if sizes.shape != lbas.shape or not sizes.all():
            raise ValueError("every command has its number of blocks, at least one")
        template = self._template(opcode, nsid, int(sizes.max()), control)
        longest = template.length
        lengths = sizes * np.uint64(self._controller.transfer_size(nsid) if longest else 0)
        cids = self._filled(template, lbas, iovas)
        self._ring.overwrite(6, sizes - np.uint64(1) | np.uint64(control))
        if longest and self._lists is None:
            self._ring.overwrite(4, lengths)
        elif longest and self._lists is not None:
            self._lists.point(self._ring, cids, iovas, lengths)
        return cids

    async def submit(
        self,
        opcode: int,
        nsid: int,
        lbas: NDArray[np.uint64],
        blocks: int | NDArray[np.uint16],
        iovas: NDArray[np.uint64],
        *,
        control: int = 0,
        metadata: NDArray[np.uint64] | None = None,
        deadline: float | None = None,
    ) -> NDArray[np.intp]:
        """As ``submit_nowait``, but waits for room.

        ``deadline`` in seconds bounds the wait: ``DeadlineExceeded``. ``ValueError`` for more commands than ``depth``.
        Cancelled: nothing was submitted.
        """
        if len(lbas) > self.depth:
            raise ValueError(f"{len(lbas)} commands for a queue of {self.depth}")
        self._check()
        await trio.lowlevel.checkpoint()
        seconds = self._controller.deadline if deadline is None else deadline
        await self._wait_for_room(len(lbas), seconds, "submission")
        return self.submit_nowait(opcode, nsid, lbas, blocks, iovas, control=control, metadata=metadata)

    # Completion

    def reap_nowait(self, most: int | None = None, *, least: int = 1, wait_ns: int = 0) -> Completions:
        """What completed of that which ``submit`` and ``submit_nowait`` submitted, in order, at most ``most``.

        Blocks the thread for up to ``wait_ns`` while there are fewer than ``least`` to be had at once; may return
        fewer than there are. Looks neither at deadlines nor at whether the controller is still there: ``reap`` does.
        ``DeviceFailed`` for a controller that completes what is not in flight: what is belongs to it until ``reap``
        says that it was taken back, or the driver is left.
        """
        if self._ready:
            return self._taken(most)
        mixed = bool(self._waiters)
        done = self._collect(most, least=least, wait_ns=wait_ns, release=not mixed)
        if done is None:
            return NOTHING
        if mixed:
            self._ring.release(done.cids)
        return done

    def _taken(self, most: int | None) -> Completions:
        """Of what was seen while looking for something else."""
        first = self._ready[0]
        self._ring.release(first.cids[:most])
        if most is None or len(first) <= most:
            return self._ready.pop(0)
        rest = Completions(first.cids[most:], first.status[most:], int(np.count_nonzero(first.status[most:])))
        self._ready[0] = rest
        return Completions(first.cids[:most], first.status[:most], first.failed - rest.failed)

    async def reap(self, most: int | None = None, *, deadline: float | None = None) -> Completions:
        """As ``reap_nowait``, but waits until something completed.

        A command is in flight for at most ``deadline`` seconds (the driver's): then it is aborted, and comes with
        status ABORT_REQ; where that does not help the controller is reset, and what was in flight comes with status
        HOST_ABORTED_CMD. Nothing in flight but what tasks await: returns at once, nothing. Raises ``DeviceFailed`` once
        the device is given up or gone, and everything was returned. Cancelled: nothing is lost.
        """
        seconds = self._controller.deadline if deadline is None else deadline
        try:
            if not self._ready and not self._look():
                await self._wait_for_some(seconds)
            else:
                await trio.lowlevel.checkpoint()
        except DeviceFailed:  # it completes nonsense: what is in flight is taken back
            await self._make_safe(self._idle, list, grace=0)
        if self._ready:
            return self._taken(most)
        self._check()
        return NOTHING

    async def _wait_for_some(self, seconds: float) -> None:
        while not self._something():
            oldest = int(self._ring.since[self._unawaited()].min())
            left = seconds - (self._now() - oldest) / 1e9
            if not await self._until(self._something, left):
                await self._make_safe(
                    lambda: not self._overdue(seconds), lambda: self._overdue(seconds), grace=0
                )

    def _something(self) -> bool:
        """Whether nothing has to be waited for: something is here, or nothing more will come."""
        return bool(self._ready) or self._closed is not None or self._idle()

    def _idle(self) -> bool:
        """Whether tasks await all that is in flight."""
        return self.outstanding == len(self._waiters)

    def _overdue(self, seconds: float) -> list[int]:
        """Identifiers of the commands nobody awaits that are in flight for so long."""
        cids = self._unawaited()
        late: list[int] = cids[self._ring.since[cids] <= self._now() - int(seconds * 1e9)].tolist()
        return late

    # All of an array

    async def transfer(
        self,
        opcode: int,
        nsid: int,
        lbas: NDArray[np.uint64],
        blocks: int | NDArray[np.uint16],
        iovas: NDArray[np.uint64],
        *,
        control: int = 0,
        deadline: float | None = None,
    ) -> NDArray[np.uint16]:
        """Any number of commands, from their submission to the completion of all; their statuses in order.

        The queue must have no other user meanwhile that reaps. ``deadline`` (the driver's) is for each of them.
        Raises as ``reap``. Cancelled: none is in flight any more.
        """
        count = len(lbas)
        status = np.zeros(count, dtype=np.uint16)
        place = np.zeros(self.depth, dtype=np.intp)
        seconds = self._controller.deadline if deadline is None else deadline
        begun = ended = 0
        try:
            while ended < count:
                if begun == ended:
                    await self._wait_for_room(1, seconds, "transfer")
                some = min(self.room, count - begun)
                if some:
                    part = slice(begun, begun + some)
                    sizes = blocks if isinstance(blocks, int) else blocks[part]
                    cids = self.submit_nowait(opcode, nsid, lbas[part], sizes, iovas[part], control=control)
                    place[cids] = np.arange(begun, begun + some)
                    begun += some
                done = await self.reap(deadline=seconds)
                status[place[done.cids]] = done.status
                ended += len(done)
                if not len(done) and self._idle():
                    raise DeadlineExceeded("transfer", seconds, device=self.device)
        except BaseException:
            await self._make_safe(self._idle, lambda: self._overdue(0))
            while self._ready:
                self._taken(None)
            raise
        return status
