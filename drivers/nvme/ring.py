"""A submission queue and its completion queue in DMA memory, as words that numpy fills and reads many at a time.

No more commands are outstanding than the submission queue has room for, whatever of it the controller has fetched, and
a command identifier is given out again only when its completion was seen (NVMe Base 2.0c 3.3.1.2, 3.3.3.1). A slot
that was filled from a template keeps what is the same in every command of that template; a ring that is filled from
one template only writes identifier, address and LBA.

Nothing here waits for longer than it is told, and nothing here is trio's. Not here: what is done about commands that do
not complete (queue.py), shadow doorbells.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from pvfio.abi import ffi, lib
from pvfio.errors import DeviceFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pvfio.vfio import DmaBuffer, Region

__all__ = ["NOTHING", "Completions", "Ring", "Template", "queue_bytes"]

_PAGE: Final = 4096
_SQE: Final[int] = lib.NVME_SQE_SIZE
_CQE: Final[int] = lib.NVME_CQE_SIZE
_CID16, _STATUS16 = 6, 7  # the halfwords of a completion
_DW0, _DW3 = 0, 3
_PHASE: Final[int] = lib.NVME_CQE_PHASE << 16  # in DW3
_STATUS_SHIFT: Final[int] = lib.NVME_CQE_STATUS_SHIFT + 16
_ADDRESS, _LBA = 3, 5  # the words of a command in which those of a template differ
_ONE: Final = np.uint16(1)
_NO_STATUS: Final = np.zeros(1 << 16, dtype=np.uint16)
_NO_STATUS.flags.writeable = False


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def queue_bytes(entries: int, cq_entries: int) -> int:
    """How much memory a pair of queues takes."""
    return _pages(entries * _SQE) + _pages(cq_entries * _CQE)


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """What commands of one kind have in common: words 0 (without the identifier), 4 and 6 of the command, and all 64
    bytes of it. ``length``: how many bytes such a command moves.
    """

    word0: int
    word4: int
    word6: int
    length: int
    entry: bytes = field(init=False)

    def __post_init__(self) -> None:
        words = struct.pack("=8Q", self.word0, 0, 0, 0, self.word4, 0, self.word6, 0)
        object.__setattr__(self, "entry", words)


class Completions:
    """Completions in the order in which they came: ``cids`` (intp) and ``status`` (uint16, 0 is success), of one
    length; ``failed`` is how many are no success.
    """

    __slots__ = ("cids", "failed", "status")

    def __init__(self, cids: NDArray[np.intp], status: NDArray[np.uint16], failed: int) -> None:
        self.cids = cids
        self.status = status
        self.failed = failed

    def __len__(self) -> int:
        return len(self.cids)


NOTHING: Final = Completions(np.zeros(0, dtype=np.intp), _NO_STATUS[:0], 0)


class Ring:
    """``entries`` of a submission and ``cq_entries`` of a completion queue in ``buffer``, which is mapped.

    ``depth`` commands can be outstanding, under the identifiers 0 to depth - 1. ``outstanding``: how many are.
    ``room``: how many can be submitted.
    ``since`` (int64, shape (depth,)): when each was submitted, 0 for one that is not in flight.
    """

    def __init__(
        self, buffer: DmaBuffer, entries: int, cq_entries: int, region: Region, doorbells: tuple[int, int]
    ):
        if buffer.iova is None:
            raise ValueError("the queue's memory is not mapped")
        self.buffer = buffer
        self.entries, self.cq_entries = entries, cq_entries
        self.depth = entries - 1
        self.sq_iova = buffer.iova
        self.cq_iova = buffer.iova + _pages(entries * _SQE)
        region.check_open("doorbell", doorbells[0], 4)
        self._region = region
        self._sq_doorbell, self._cq_doorbell = doorbells
        plain = np.asarray(buffer)
        submissions = plain[: entries * _SQE]
        start = _pages(entries * _SQE)
        completions = plain[start : start + cq_entries * _CQE]
        self._sq = submissions
        self._sq_cid: NDArray[np.uint16] = submissions.view(np.uint16).reshape(entries, 32)[:, 1]
        words = submissions.view(np.uint64).reshape(entries, 8)
        self._word = [words[:, index] for index in range(8)]
        self._cq = completions
        halves = completions.view(np.uint16).reshape(cq_entries, 8)
        self._cq_cid: NDArray[np.uint16] = halves[:, _CID16]
        self._cq_status: NDArray[np.uint16] = halves[:, _STATUS16]
        self._cq_result: NDArray[np.uint32] = completions.view(np.uint32).reshape(cq_entries, 4)[:, _DW0]
        # The controller needs room for what is outstanding; it is told of the rest now and then.
        self._most_unacknowledged = max(1, cq_entries - 1 - self.depth)
        self._queue = ffi.new("struct pv_mmio_queue *")
        self._queue.entries = ffi.cast("uint64_t *", ffi.from_buffer(submissions))
        self._queue.size, self._queue.doorbell = entries, self._sq_doorbell
        self._queue.word = (_ADDRESS, _LBA)
        self._successes = tuple(np.full(cq_entries, phase, dtype=np.uint16).tobytes() for phase in (0, 1))
        self._phases = ffi.cast("uint8_t *", ffi.from_buffer(completions)) + 2 * _STATUS16
        self._ends = ffi.cast("uint32_t *", ffi.from_buffer(completions)) + _DW3
        self.since: NDArray[np.int64] = np.zeros(self.depth, dtype=np.int64)
        self._free: NDArray[np.intp] = np.empty(self.depth, dtype=np.intp)
        # For one at a time: an element by pointer takes half as long as one of an array.
        self._since_one = ffi.cast("int64_t *", ffi.from_buffer(self.since))
        self._free_one = ffi.cast("intptr_t *", ffi.from_buffer(self._free))
        self.forget()

    def forget(self, held: NDArray[np.intp] | None = None) -> None:
        """Both queues are empty and as new: the controller was reset, and no command is in flight any more. The
        identifiers ``held`` are not free before they are released.
        """
        self._sq[:] = 0
        self._cq[:] = 0
        self.since[:] = 0
        free = np.arange(self.depth)[::-1] if held is None else np.setdiff1d(np.arange(self.depth), held)
        self.room = len(free)
        self._free[: self.room] = free
        self.outstanding = 0
        self._tail = self._head = 0
        self._phase = 1
        self._unacknowledged = 0
        self._painted: Template | None = None
        self._unpainted = 0  # slots to go until all are filled from that template

    # Submission

    def take(self, count: int, now: int) -> NDArray[np.intp]:
        """``count`` identifiers (at most ``room``), in flight since ``now`` (not 0)."""
        top = self.room - count
        cids = self._free[top : self.room].copy()
        self.room = top
        self.outstanding += count
        self.since[cids] = now
        return cids

    def give_back(self, cid: int) -> None:
        """An identifier that was taken, and not submitted."""
        self.since[cid] = 0
        self._free[self.room] = cid
        self.room += 1
        self.outstanding -= 1

    def put(self, command: bytes) -> None:
        """The next command, whole."""
        start = self._tail * _SQE
        self._sq[start : start + _SQE] = np.frombuffer(command, dtype=np.uint8)
        self._painted = None
        self._advance(1)

    def post_one(self, template: Template, lba: int, address: int, clock: Callable[[], int]) -> int:
        """``take``, ``fill`` and ``ring`` of one command, in numbers; its identifier."""
        if template is not self._painted:
            self._painted = None
        top = self.room = self.room - 1
        cid: int = self._free_one[top]
        self.outstanding += 1
        mmio = self._region.mmio or ffi.NULL
        try:
            tail = lib.pv_mmio_post(mmio, self._queue, self._tail, template.entry, cid, address, lba)
        except OverflowError:  # more than 64 bits
            self.give_back(cid)
            raise
        self._since_one[cid] = clock()  # the controller is at work meanwhile
        if tail >= 0:
            self._tail = tail
        else:
            self._advance(1)
            self.ring()  # another way, or it says what is wrong
        return cid

    def fill(
        self,
        template: Template,
        cids: NDArray[np.intp],
        lbas: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
    ) -> None:
        """The next ``len(cids)`` commands. All arrays have that length."""
        count = len(cids)
        if template is not self._painted:
            self._painted, self._unpainted = template, self.entries
        start, end = self._tail, self._tail + count
        if end <= self.entries:
            self._fill(start, end, cids, lbas, addresses)
        else:
            first = self.entries - start
            self._fill(start, self.entries, cids[:first], lbas[:first], addresses[:first])
            self._fill(0, count - first, cids[first:], lbas[first:], addresses[first:])
        self._advance(count)

    def _fill(
        self,
        start: int,
        end: int,
        cids: NDArray[np.intp],
        lbas: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
    ) -> None:
        word = self._word
        if self._unpainted > 0:
            template = self._painted
            assert template is not None
            word[0][start:end] = template.word0
            word[1][start:end] = 0
            word[2][start:end] = 0
            word[4][start:end] = template.word4
            word[6][start:end] = template.word6
            word[7][start:end] = 0
            self._unpainted -= end - start
        self._sq_cid[start:end] = cids
        word[3][start:end] = addresses
        word[5][start:end] = lbas

    def last(self, count: int) -> list[slice]:
        """Where the last ``count`` commands are that were filled: one slice, or two."""
        start = self._tail - count
        if start >= 0:
            return [slice(start, self._tail)]
        return [slice(start + self.entries, self.entries), slice(0, self._tail)]

    def overwrite(self, word: int, values: NDArray[np.uint64]) -> None:
        """Word ``word`` of the last ``len(values)`` commands; before the doorbell rings."""
        self._painted = None
        done = 0
        for piece in self.last(len(values)):
            size = piece.stop - piece.start
            self._word[word][piece] = values[done : done + size]
            done += size

    def _advance(self, count: int) -> None:
        tail = self._tail + count
        self._tail = tail if tail < self.entries else tail - self.entries

    def ring(self) -> None:
        """Tells the controller of what was filled (the submission queue tail doorbell, NVMe Base 2.0c 3.1.3.12)."""
        self._region.doorbell(self._sq_doorbell, self._tail)

    # Completion

    def reap(self, most: int | None = None, *, least: int = 1, wait_ns: int = 0) -> Completions | None:
        """Takes completions from the queue.

        At most ``most``, up to the end of the queue's memory (there may be more after it); None: there are none.
        Their identifiers are not given out again before ``release``: until somebody has seen which command that was,
        no other may have its name. Blocks the thread for up to ``wait_ns`` while there are fewer than ``least``. Raises
        ``DeviceFailed`` for completions of commands that are not in flight.
        """
        head = self._head
        limit = min(self.outstanding, self.cq_entries - head)
        if most is not None and most < limit:
            limit = most
        count = lib.pv_wait_run(self._phases + head * _CQE, _CQE, limit, 1, self._phase, least, wait_ns)
        if not count:
            return None
        end = head + count
        cids = self._cq_cid[head:end].astype(np.intp)
        words = self._cq_status[head:end]
        if words.tobytes() == self._successes[self._phase][: 2 * count]:  # half as long as arithmetic
            taken = Completions(cids, _NO_STATUS[:count], 0)
        else:
            status = words >> _ONE
            taken = Completions(cids, status, int(np.count_nonzero(status)))
        if end == self.cq_entries:
            self._head, self._phase = 0, self._phase ^ 1
        else:
            self._head = end
        self._retire(cids, count)
        return taken

    def reap_one(self, wait_ns: int = 0) -> tuple[int, int] | None:
        """As ``reap`` with ``most`` 1, in numbers."""
        if not self.outstanding:
            return None
        head = self._head
        word = lib.pv_wait_entry(self._ends, _CQE, head, _PHASE, _PHASE if self._phase else 0, wait_ns)
        if word < 0:
            return None
        cid, since = word & 0xFFFF, self._since_one
        if cid >= self.depth or not since[cid]:
            self._distrust()
        since[cid] = 0
        self._free_one[self.room] = cid
        self.room += 1
        self.outstanding -= 1
        if head + 1 == self.cq_entries:
            self._head, self._phase = 0, self._phase ^ 1
        else:
            self._head = head + 1
        self._unacknowledged += 1
        if self._unacknowledged >= self._most_unacknowledged:
            self.acknowledge()
        return cid, word >> _STATUS_SHIFT

    def result(self) -> int:
        """The command-specific dword of the completion taken last; before anything is submitted."""
        word: int = self._ends[((self._head or self.cq_entries) - 1) * (_CQE // 4) + _DW0 - _DW3]
        return word

    def results(self, count: int) -> list[int]:
        """The command-specific dwords of the ``count`` completions taken last; before anything is submitted."""
        end = self._head or self.cq_entries
        words: list[int] = self._cq_result[end - count : end].tolist()
        return words

    def _distrust(self) -> NoReturn:
        raise DeviceFailed(self._region.device, "it completed a command that was not in flight")

    def _retire(self, cids: NDArray[np.intp], count: int) -> None:
        """They are in flight no more. A completion nobody waits for is a controller that is not to be trusted."""
        since = self.since
        try:
            since[cids] = 0
        except IndexError:
            since = since[:0]
        self.outstanding -= count
        if np.count_nonzero(since) != self.outstanding:
            self._distrust()
        self._unacknowledged += count
        if self._unacknowledged >= self._most_unacknowledged:
            self.acknowledge()

    def release(self, cids: NDArray[np.intp]) -> None:
        """Identifiers that ``reap`` returned may be given out again."""
        top = self.room + len(cids)
        self._free[self.room : top] = cids
        self.room = top

    def acknowledge(self) -> None:
        """Tells the controller which completions were taken (the head doorbell, NVMe Base 2.0c 3.1.3.13)."""
        if self._unacknowledged:
            self._unacknowledged = 0
            self._region.doorbell(self._cq_doorbell, self._head)

    def in_flight(self) -> NDArray[np.intp]:
        """The identifiers of what is outstanding."""
        return np.flatnonzero(self.since)
