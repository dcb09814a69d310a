"""A submission queue and its completion queue in DMA memory: many commands, or many completions, in one call of C.

No more commands are outstanding than the submission queue has room for, whatever of it the controller has fetched, and
a command identifier is given out again only when its completion was seen (NVMe Base 2.0c 3.3.1.2, 3.3.3.1). The loops
over entries are in ring.c; what is rare is done here, by numpy.

Nothing here waits for longer than it is told, and nothing here is trio's. Not here: what is done about commands that do
not complete (queue.py), shadow doorbells.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from pvfio.abi import ffi, lib
from pvfio.errors import DeviceFailed, VfioError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pvfio.vfio import DmaBuffer, Region

__all__ = ["NOTHING", "Completions", "Ring", "Template", "queue_bytes"]

_PAGE: Final = 4096
_SQE: Final[int] = lib.NVME_SQE_SIZE
_CQE: Final[int] = lib.NVME_CQE_SIZE
_UNTOLD: Final[int] = lib.PV_NVME_UNTOLD
_TELL: Final[int] = lib.PV_NVME_TELL
_NONE: Final = -errno.EAGAIN
_U64: Final = np.dtype(np.uint64)
_NO_STATUS: Final = np.zeros(1 << 16, dtype=np.uint16)
_NO_STATUS.flags.writeable = False


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def queue_bytes(entries: int, cq_entries: int) -> int:
    """How much memory a pair of queues takes."""
    return _pages(entries * _SQE) + _pages(cq_entries * _CQE)


def _words(values: NDArray[np.uint64], count: int) -> Any:
    """An array's 64-bit words for C. ``ValueError``: they are not so many."""
    if values.dtype is not _U64 or not values.flags.c_contiguous:
        values = np.ascontiguousarray(values, dtype=np.uint64)
    words = ffi.from_buffer("uint64_t[]", values)
    if len(words) != count:
        raise ValueError(f"{len(words)} values for {count} commands")
    return words


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

    ``depth`` commands can be outstanding, under the identifiers 0 to depth - 1.
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
        self._sq = plain[: entries * _SQE]
        start = _pages(entries * _SQE)
        self._cq = plain[start : start + cq_entries * _CQE]
        self._word: NDArray[np.uint64] = self._sq.view(np.uint64).reshape(entries, 8)
        self._result: NDArray[np.uint32] = self._cq.view(np.uint32).reshape(cq_entries, 4)[:, 0]
        self.since: NDArray[np.int64] = np.zeros(self.depth, dtype=np.int64)
        self._free: NDArray[np.uint16] = np.empty(self.depth, dtype=np.uint16)
        # Where C says which commands it began or ended; reused by every call.
        self._cids: NDArray[np.int64] = np.empty(self.depth, dtype=np.int64)
        self._status: NDArray[np.uint16] = np.empty(self.depth, dtype=np.uint16)
        self._cids_c = ffi.from_buffer("int64_t[]", self._cids)
        self._status_c = ffi.from_buffer("uint16_t[]", self._status)
        # For one at a time: an element by pointer takes half as long as one of an array.
        self._since_c = ffi.from_buffer("int64_t[]", self.since)
        self._cq_c = ffi.from_buffer("uint32_t[]", self._cq)
        self._sq_c = ffi.from_buffer("uint64_t[]", self._sq)
        self._free_c = ffi.from_buffer("uint16_t[]", self._free)
        state = self._state = ffi.new("struct pv_nvme_ring *")
        state.sq, state.cq, state.free, state.since = self._sq_c, self._cq_c, self._free_c, self._since_c
        state.entries, state.cq_entries, state.depth = entries, cq_entries, self.depth
        state.sq_doorbell = self._sq_doorbell
        # The controller needs room for what is outstanding; it is told of the rest now and then.
        state.most_unacknowledged = max(1, cq_entries - 1 - self.depth)
        self.forget()

    @property
    def outstanding(self) -> int:
        """Commands submitted whose completion was not taken yet."""
        count: int = self._state.outstanding
        return count

    @property
    def room(self) -> int:
        """How many commands can be submitted."""
        count: int = self._state.room
        return count

    def forget(self, held: NDArray[np.intp] | None = None) -> None:
        """Both queues are empty and as new: the controller was reset, and no command is in flight any more. The
        identifiers ``held`` are not free before they are released.
        """
        self._sq[:] = 0
        self._cq[:] = 0
        self.since[:] = 0
        free = np.arange(self.depth)[::-1] if held is None else np.setdiff1d(np.arange(self.depth), held)
        self._free[: len(free)] = free
        state = self._state
        state.room, state.outstanding = len(free), 0
        state.tail = state.told = state.head = state.unacknowledged = 0
        state.phase = 1

    # Submission. All of it needs room for what is submitted, and nothing is released before the doorbell rings. Where
    # that cannot be (``VfioError``), nothing was submitted.

    def put(self, command: bytes, now: int) -> int:
        """The next command, whole but for its identifier, in flight since ``now`` (not 0); its identifier. The
        doorbell is not rung. ``DeviceFailed``: there is no room.
        """
        cid: int = lib.pv_nvme_put(self._state, command, now)
        if cid < 0:
            raise DeviceFailed(self._region.device, "a queue is full of commands that do not end")
        return cid

    def post_one(self, template: Template, lba: int, address: int, clock: Callable[[], int]) -> int:
        """``post`` of one command, in numbers; its identifier, or less than 0: there is no room."""
        mmio = self._region.mmio or ffi.NULL
        cid: int = lib.pv_nvme_post_one(self._state, mmio, template.entry, lba, address, 1)
        if cid < 0:
            return cid
        told = cid < _UNTOLD
        cid &= _UNTOLD - 1
        self._since_c[cid] = clock()  # the controller is at work meanwhile
        if not told:
            self.ring()  # another way, or it says what is wrong
        return cid

    def post(
        self, template: Template, lbas: NDArray[np.uint64], addresses: NDArray[np.uint64], now: int
    ) -> NDArray[np.intp] | None:
        """The next ``len(lbas)`` commands, in flight since ``now`` (not 0), and the doorbell; their identifiers. None:
        there is no room for all of them. ``ValueError``: the arrays do not have one length. Nothing happened then.
        """
        count = len(lbas)
        mmio = self._region.mmio or ffi.NULL
        error = self._post(mmio, template, count, lbas, addresses, now)
        if error:
            if error == _NONE:
                return None
            self.ring()  # another way, or it says what is wrong
        return self._cids[:count].copy()

    def fill(
        self, template: Template, lbas: NDArray[np.uint64], addresses: NDArray[np.uint64], now: int
    ) -> NDArray[np.intp] | None:
        """As ``post``, without the doorbell."""
        count = len(lbas)
        if self._post(ffi.NULL, template, count, lbas, addresses, now) == _NONE:
            return None
        return self._cids[:count].copy()

    def _post(
        self,
        mmio: Any,
        template: Template,
        count: int,
        lbas: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        now: int,
    ) -> int:
        first, second = _words(lbas, count), _words(addresses, count)
        error: int = lib.pv_nvme_post(
            self._state, mmio, template.entry, count, first, second, now, self._cids_c
        )
        return error

    def overwrite(self, word: int, values: NDArray[np.uint64]) -> None:
        """Word ``word`` of the last ``len(values)`` commands; before the doorbell rings."""
        end = self._state.tail
        start = end - len(values)
        if start < 0:
            self._word[start:, word] = values[:-start]
            values, start = values[-start:], 0
        self._word[start:end, word] = values

    def ring(self) -> None:
        """Tells the controller of what was filled (the submission queue tail doorbell, NVMe Base 2.0c 3.1.3.12)."""
        state = self._state
        try:
            self._region.doorbell(self._sq_doorbell, state.tail)
        except Exception:
            self._withdraw((state.tail - state.told) % self.entries)
            raise
        state.told = state.tail

    def _withdraw(self, count: int) -> None:
        """The last ``count`` commands, which the controller was not told of, were never there."""
        state = self._state
        taken = self._free[state.room : state.room + count]  # nothing was released since
        self.since[taken] = 0
        state.room += count
        state.outstanding -= count
        state.tail = state.told

    # Completion

    def reap(
        self, most: int | None = None, *, least: int = 1, wait_ns: int = 0, release: bool = False
    ) -> Completions | None:
        """Takes completions from the queue.

        At most ``most``, up to the end of the queue's memory (there may be more after it); None: there are none.
        Their identifiers are given out again after ``release``, or at once: until somebody has seen which command that
        was, no other may have its name. Blocks the thread for up to ``wait_ns`` while there are fewer than ``least``.
        Raises ``DeviceFailed`` for the completion of a command that is not in flight, once it is the next one.
        """
        if most is None or most > self.depth:
            most = self.depth
        done = lib.pv_nvme_reap(self._state, most, least, wait_ns, release, self._cids_c, self._status_c)
        if done <= 0:
            if done:
                self._distrust()
            return None
        if done >= _TELL:
            self._acknowledge()
        count, failed = done & 0xFFFF, done >> 16 & 0xFFFF
        if not count:  # told of those before
            return None
        status = self._status[:count].copy() if failed else _NO_STATUS[:count]
        return Completions(self._cids[:count].copy(), status, failed)

    def reap_one(self, wait_ns: int = 0) -> tuple[int, int] | None:
        """As ``reap`` with ``most`` 1 and ``release``, in numbers."""
        done = lib.pv_nvme_reap_one(self._state, wait_ns)
        if done < 0:
            if done != _NONE:
                self._distrust()
            return None
        if done >= _TELL:
            self._acknowledge()
            done -= _TELL
        return done & 0xFFFF, done >> 16

    def result(self) -> int:
        """The command-specific dword of the completion taken last; before anything is submitted."""
        word: int = self._cq_c[((self._state.head or self.cq_entries) - 1) * (_CQE // 4)]
        return word

    def results(self, count: int) -> list[int]:
        """The command-specific dwords of the ``count`` completions taken last; before anything is submitted."""
        end = self._state.head or self.cq_entries
        words: list[int] = self._result[end - count : end].tolist()
        return words

    def _distrust(self) -> NoReturn:
        raise DeviceFailed(self._region.device, "it completed a command that was not in flight")

    def release(self, cids: NDArray[np.intp]) -> None:
        """Identifiers that ``reap`` returned may be given out again. ``ValueError``: it did not."""
        plain = np.ascontiguousarray(cids, dtype=np.int64)
        if lib.pv_nvme_release(self._state, ffi.from_buffer("int64_t[]", plain), len(plain)):
            raise ValueError("these identifiers are not to be released")

    def _acknowledge(self) -> None:
        """Tells the controller which completions were taken (the head doorbell, NVMe Base 2.0c 3.1.3.13). Where that
        cannot be, it is told at the next look: those that were taken are good.
        """
        try:
            self._region.doorbell(self._cq_doorbell, self._state.head)
        except VfioError:
            return
        self._state.unacknowledged = 0

    def in_flight(self) -> NDArray[np.intp]:
        """The identifiers of what is outstanding."""
        return np.flatnonzero(self.since)
