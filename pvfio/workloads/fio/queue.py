"""The queues a job does its I/O on: an NVMe queue pair, or none at all (``ioengine=null``).

Slots are numbers below the queue's depth; slot s has ``stride`` bytes of ``buffer`` from ``s * stride`` on. Trims are
Write Zeroes with the deallocate bit (NVM Command Set 1.0c 3.2.8), which needs no list of ranges in memory. An I/O is
one command: blocks longer than the controller's longest transfer are refused by whoever makes the queue.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pvfio.abi import lib
from pvfio.errors import DeviceFailed
from pvfio.workloads.fio.job import READ, TRIM, WRITE

if TYPE_CHECKING:
    from pvfio.drivers.nvme import QueuePair
    from pvfio.vfio import DmaBuffer
    from pvfio.workloads.fio.plan import Ios

__all__ = ["IoQueue", "NullQueue", "NvmeQueue"]

_OPCODES: Final = {READ: lib.NVME_CMD_READ, WRITE: lib.NVME_CMD_WRITE, TRIM: lib.NVME_CMD_WRITE_ZEROES}
_NONE: Final = np.zeros(0, dtype=np.intp)
_GOOD: Final = np.zeros(1 << 16, dtype=np.uint16)
Done = tuple[NDArray[np.intp], NDArray[np.uint16], int]
"""Slots, their statuses (0: success), and how many are no success."""


class IoQueue(Protocol):
    """What a job needs of a queue. Offsets are from the beginning of the namespace. ``eager``: completions are looked
    for before they are waited for.
    """

    buffer: NDArray[np.uint8]
    stride: int
    block_size: int
    eager: bool

    def submit(self, ios: Ios, slots: NDArray[np.intp]) -> None:
        """Begins I/O; there is a free slot for each."""

    def reap(self, least: int, wait_ns: int, most: int | None = None) -> Done:
        """What is complete, at most ``most``; blocks the thread for up to ``wait_ns`` while there are fewer than
        ``least``.
        """
        ...

    async def wait(self, most: int | None = None) -> Done:
        """What is complete, at least one while any is in flight, at most ``most``; without keeping the processor."""
        ...

    async def flush(self) -> None:
        """Makes durable what was written."""

    def status_name(self, status: int) -> str:
        """What a status is called."""
        ...


class NullQueue:
    """Everything completes when it is looked for, and nothing is moved."""

    eager = True

    def __init__(self, depth: int, stride: int, block_size: int = 1) -> None:
        self.buffer: NDArray[np.uint8] = np.zeros(depth * stride, dtype=np.uint8)
        self.stride = stride
        self.block_size = block_size
        self._pending: list[NDArray[np.intp]] = []

    def submit(self, ios: Ios, slots: NDArray[np.intp]) -> None:
        """Remembers them."""
        self._pending.append(slots)

    def reap(self, least: int, wait_ns: int, most: int | None = None) -> Done:
        """All of them."""
        if not self._pending:
            return _NONE, _GOOD[:0], 0
        slots = self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending)
        self._pending = [slots[most:]] if most is not None and len(slots) > most else []
        slots = slots[:most]
        return slots, _GOOD[: len(slots)], 0

    async def wait(self, most: int | None = None) -> Done:
        """All of them."""
        return self.reap(1, 0, most)

    async def flush(self) -> None:
        """Nothing to do."""

    def status_name(self, status: int) -> str:
        """There is only success."""
        return "SUCCESS"


class NvmeQueue:
    """One queue pair and one buffer (mapped, at least ``depth * stride`` bytes) on one namespace.

    ``sync``: writes are durable when they complete (Force Unit Access). ``timeout``: seconds a command may take. Raises
    what the driver raises.
    """

    def __init__(
        self,
        pair: QueuePair,
        nsid: int,
        block_size: int,
        buffer: DmaBuffer,
        stride: int,
        *,
        sync: bool = False,
        timeout: float = 30.0,
    ) -> None:
        self.buffer = np.asarray(buffer)
        self.stride = stride
        self.block_size = block_size
        self.eager = pair.completion != "interrupt"
        self._pair = pair
        self._nsid = nsid
        self._timeout = timeout
        self._control = {READ: 0, WRITE: lib.NVME_RW_FUA if sync else 0, TRIM: lib.NVME_RW_DEAC}
        self._shift = np.uint64(block_size.bit_length() - 1)
        self._iovas: NDArray[np.uint64] = np.uint64(buffer.iova or 0) + np.arange(
            len(self.buffer) // stride, dtype=np.uint64
        ) * np.uint64(stride)
        self._slot: NDArray[np.intp] = np.zeros(pair.depth, dtype=np.intp)

    def submit(self, ios: Ios, slots: NDArray[np.intp]) -> None:
        """One doorbell for each direction there is."""
        first = int(ios.direction[0])
        if len(ios) == 1 or not np.any(ios.direction != first):
            self._submit(first, ios.offset, ios.length, slots)
            return
        for direction in (READ, WRITE, TRIM):
            chosen = np.flatnonzero(ios.direction == direction)
            if len(chosen):
                self._submit(direction, ios.offset[chosen], ios.length[chosen], slots[chosen])

    def _submit(
        self,
        direction: int,
        offsets: NDArray[np.uint64],
        lengths: NDArray[np.uint64],
        slots: NDArray[np.intp],
    ) -> None:
        blocks: Any = int(lengths[0]) >> int(self._shift)
        control = self._control[direction]
        if len(lengths) == 1:
            lba, iova = int(offsets[0]) >> int(self._shift), int(self._iovas[slots[0]])
            cid = self._pair.submit_one_nowait(
                _OPCODES[direction], self._nsid, lba, blocks, iova, control=control
            )
            self._slot[cid] = slots[0]
            return
        if np.any(lengths != lengths[0]):
            blocks = lengths >> self._shift
        cids = self._pair.submit_nowait(
            _OPCODES[direction],
            self._nsid,
            offsets >> self._shift,
            blocks,
            self._iovas[slots],
            control=control,
        )
        self._slot[cids] = slots

    def reap(self, least: int, wait_ns: int, most: int | None = None) -> Done:
        """See ``IoQueue``."""
        done = self._pair.reap_nowait(most, least=least, wait_ns=wait_ns)
        return self._slot[done.cids], done.status, done.failed

    async def wait(self, most: int | None = None) -> Done:
        """See ``IoQueue``; a command that takes too long is aborted, and comes with that status."""
        done = await self._pair.reap(most, deadline=self._timeout)
        return self._slot[done.cids], done.status, done.failed

    async def flush(self) -> None:
        """One Flush command."""
        await self._pair.flush(self._nsid, deadline=self._timeout)

    async def drain(self) -> None:
        """Until nothing is in flight: commands end, are aborted, or the controller is reset (it has deadlines)."""
        with contextlib.suppress(DeviceFailed):  # given up: it has no right to do DMA any more
            while self._pair.outstanding:
                await self._pair.reap(deadline=self._timeout)

    def status_name(self, status: int) -> str:
        """The specification's."""
        from pvfio.drivers.nvme import status_name

        return status_name(status)
