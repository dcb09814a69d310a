"""What I/O a job issues, in order: direction, offset and length of each, some thousands at a time as vectors.

Models ``rw=`` with its modifiers, block sizes (``bs``, ``bsrange``, ``bssplit``), the random map, distributions,
``percentage_random``, ``rwmixread``, ``number_ios``, ``io_size`` and ``loops``. A pass ends after ``io_size`` bytes, or
``number_ios``. With the random map and blocks of several sizes, the file is cut into pieces of those sizes, and the
pieces come in random order, so that every byte is touched once a pass; fio shortens blocks instead that would overlap.
Offsets are relative to the beginning of the job's file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.distribution import Blocks, Shuffle, make_blocks
from pvfio.workloads.fio.job import READ, TRIM, WRITE, Job

__all__ = ["Ios", "Known", "Plan", "Source"]

_CHUNK: Final = 8192
_MOST_PIECES: Final = 1 << 26


@dataclass(slots=True)
class Ios:
    """``direction`` (uint8), ``offset`` (uint64) and ``length`` (uint64) in bytes, all of one length."""

    direction: NDArray[np.uint8]
    offset: NDArray[np.uint64]
    length: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.direction)

    def part(self, start: int, end: int | None = None) -> Ios:
        """Some of them."""
        return Ios(self.direction[start:end], self.offset[start:end], self.length[start:end])


class Source(Protocol):
    """Something that has I/O to do."""

    def take(self, count: int) -> Ios:
        """The next ones, at most ``count``, none at the end."""
        ...

    def untake(self, count: int) -> None:
        """The last ``count`` that ``take`` gave come again."""


class Known:
    """Reads that are known beforehand: of what was written, and its ``numbers``. ``position``: how many were taken."""

    def __init__(self, ios: Ios, numbers: NDArray[np.int64]) -> None:
        self._ios = Ios(np.full(len(ios), READ, dtype=np.uint8), ios.offset, ios.length)
        self.numbers = numbers
        self.position = 0

    def take(self, count: int) -> Ios:
        """See ``Source``."""
        found = self._ios.part(self.position, self.position + count)
        self.position += len(found)
        return found

    def untake(self, count: int) -> None:
        """See ``Source``."""
        self.position -= count


class Plan:
    """The I/O of one job on ``size`` bytes of which it may use all.

    ``take(n)`` gives the next ones, at most n, none when the passes are over; ``passes`` None: they never are. All
    begin and end at multiples of ``unit`` bytes. Raises ``ValueError`` for a job that has no block in so few bytes, or
    none of whole units.
    """

    def __init__(self, job: Job, size: int, seed: int, *, unit: int = 1, passes: int | None = 1) -> None:
        self.job = job
        self._rng = np.random.default_rng(seed)
        self._passes = passes
        self._smallest = min(job.least_block(direction) for direction in job.directions)
        if job.grain % unit:
            raise ValueError(f"I/O at multiples of {job.grain} bytes is not of whole blocks of {unit}")
        self.size = size // self._smallest * self._smallest
        largest = max(job.most_block(direction) for direction in job.directions)
        if self.size < largest:
            raise ValueError(f"blocks of {largest} bytes do not fit into {size}")
        # A block that is trimmed and written counts twice.
        self._target = (job.io_size or self.size) * (2 if job.mode.trim_then_write else 1)
        self._left = self._target
        self._ios_left = job.number_ios or None
        self._chunk = Ios(*_nothing())
        self._position = 0
        self._sequential = dict.fromkeys((READ, WRITE, TRIM), 0)
        self._since_jump = 0
        self._covers = self._uses_map()
        self._pieces: Ios | None = None
        self._sources: dict[int, Blocks] = {}

    def _uses_map(self) -> bool:
        job = self.job
        plain = all(
            job.distributions[d].kind == "random" and job.percentage_random[d] == 100 for d in job.directions
        )
        return job.mode.random and not job.norandommap and plain and job.mode.modifier < 2

    # What is handed out

    def take(self, count: int) -> Ios:
        """The next I/O: at most ``count``, none at the end."""
        if self._position == len(self._chunk):
            self._refill()
        end = min(self._position + count, len(self._chunk))
        found = self._chunk.part(self._position, end)
        self._position = end
        return found

    def untake(self, count: int) -> None:
        """The last ``count`` that ``take`` gave come again."""
        self._position -= count

    def _refill(self) -> None:
        if self._left <= 0 and not self._next_pass():
            self._chunk, self._position = Ios(*_nothing()), 0
            return
        # No more than the pass may have left; a block that is trimmed and written is two.
        count = min(_CHUNK, self._most_in(self._left), self._ios_left or _CHUNK)
        chunk = self._make(max(2, count))
        # The pass ends with the I/O that reaches its size.
        done = np.cumsum(chunk.length, dtype=np.uint64)
        enough = int(np.searchsorted(done, self._left, side="left")) + 1
        if enough < len(chunk):
            chunk = chunk.part(0, enough)
        if self._ios_left is not None:
            chunk = chunk.part(0, self._ios_left)
            self._ios_left -= len(chunk)
        if len(chunk):
            self._left -= int(done[len(chunk) - 1])
        if self._ios_left == 0:
            self._left = 0
        self._chunk, self._position = chunk, 0

    def _most_in(self, size: int) -> int:
        """How many blocks may begin in so many bytes."""
        return -(-size // self._smallest)

    def _next_pass(self) -> bool:
        if self._passes is not None:
            self._passes -= 1
            if self._passes <= 0:
                return False
        self._left = self._target
        self._ios_left = self.job.number_ios or None
        self._sequential = dict.fromkeys(self._sequential, 0)
        self._pieces = None
        return True

    # How it is made

    def _make(self, count: int) -> Ios:
        if self.job.mode.trim_then_write:
            return self._trim_and_write(count)
        if not self.job.mode.random:
            return self._stream(count)
        if not self._covers:
            return self._scatter(count)
        if self._uniform_length() is not None:
            return self._mapped(count)
        return self._cut(count)

    def _uniform_length(self) -> int | None:
        lengths = {self.job.least_block(d) for d in self.job.directions}
        lengths |= {self.job.most_block(d) for d in self.job.directions}
        return lengths.pop() if len(lengths) == 1 else None

    def _directions(self, count: int) -> NDArray[np.uint8]:
        if not self.job.mode.mixed:
            return np.full(count, self.job.directions[0], dtype=np.uint8)
        reads = self._rng.random(count) * 100 < self.job.rwmixread
        return np.where(reads, READ, WRITE).astype(np.uint8)

    def _lengths(self, directions: NDArray[np.uint8]) -> NDArray[np.uint64]:
        lengths = np.empty(len(directions), dtype=np.uint64)
        for direction in self.job.directions:
            chosen = np.flatnonzero(directions == direction)
            lengths[chosen] = self._lengths_of(direction, len(chosen))
        return lengths

    def _lengths_of(self, direction: int, count: int) -> NDArray[np.uint64]:
        split = self.job.bssplit[direction]
        low, high = self.job.bs[direction]
        if split:
            shares = np.array([share for _, share in split])
            sizes = np.array([size for size, _ in split], dtype=np.uint64)
            return self._rng.choice(sizes, count, p=shares / shares.sum())
        if low == high:
            return np.full(count, low, dtype=np.uint64)
        return self._rng.integers(1, high // low + 1, count, dtype=np.uint64) * np.uint64(low)

    def _mapped(self, count: int) -> Ios:
        """Blocks of one size, each once."""
        length = self._uniform_length()
        assert length is not None
        source = self._sources.get(READ)
        if source is None:
            source = self._sources[READ] = Shuffle(max(1, self.size // length), self._rng)
        count = min(count, -(-self._left // length))
        offsets = source.draw(count) * np.uint64(length)
        return Ios(self._directions(count), offsets, np.full(count, length, dtype=np.uint64))

    def _cut(self, count: int) -> Ios:
        """Pieces of several sizes that cover the file, in random order."""
        if self._pieces is None or not len(self._pieces):
            self._pieces = self._cut_all()
        found, self._pieces = self._pieces.part(0, count), self._pieces.part(count)
        return found

    def _cut_all(self) -> Ios:
        parts, done, pieces = [], 0, 0
        while done < self.size:
            directions = self._directions(min(1 << 16, self._most_in(self.size - done)))
            lengths = self._lengths(directions)
            parts.append((directions, lengths))
            done += int(lengths.sum())
            pieces += len(lengths)
            if pieces > _MOST_PIECES:
                raise ValueError("too many blocks of several sizes for a random map: say norandommap")
        directions = np.concatenate([part[0] for part in parts])
        lengths = np.concatenate([part[1] for part in parts])
        ends = np.cumsum(lengths, dtype=np.uint64)
        count = int(np.searchsorted(ends, self.size, side="left")) + 1
        directions, lengths, ends = directions[:count], lengths[:count], ends[:count]
        offsets = ends - lengths
        lengths[-1] -= np.uint64(int(ends[-1]) - self.size)
        order = self._rng.permutation(count)
        return Ios(directions[order], offsets[order], lengths[order])

    def _random_offsets(self, direction: int, count: int) -> NDArray[np.uint64]:
        align = self.job.blockalign[direction] or self.job.least_block(direction)
        source = self._sources.get(direction)
        if source is None:
            blocks = max(1, (self.size - self.job.most_block(direction)) // align + 1)
            distribution = self.job.distributions[direction]
            source = make_blocks(distribution, blocks, align, self._rng)
            self._sources[direction] = source
        return source.draw(count) * np.uint64(align)

    def _scatter(self, count: int) -> Ios:
        """Without a map: random offsets, between which some may go on where the one before ended."""
        directions = self._directions(count)
        lengths = self._lengths(directions)
        offsets = np.empty(count, dtype=np.uint64)
        for direction in self.job.directions:
            chosen = np.flatnonzero(directions == direction)
            if len(chosen):
                offsets[chosen] = self._jumps(direction, lengths[chosen])
        return Ios(directions, offsets, lengths)

    def _jumps(self, direction: int, lengths: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Offsets of one direction: a random one wherever the I/O jumps, the end of the one before elsewhere."""
        count = len(lengths)
        fresh = self._random_offsets(direction, count)
        every, share = self.job.mode.modifier, self.job.percentage_random[direction]
        if every > 1:
            jump = (np.arange(count) + self._since_jump) % every == 0
            self._since_jump = (self._since_jump + count) % every
        elif share < 100:
            jump = self._rng.random(count) * 100 < share
        else:
            return fresh
        if self.job.rw_sequencer == "identical" and every > 1:
            lengths = np.zeros_like(lengths)  # the same offset until the next jump
        offsets = _chain(fresh, jump, lengths, self._sequential[direction])
        room = np.uint64(self.size - self.job.most_block(direction))
        offsets = np.where(offsets > room, offsets % np.uint64(self.job.least_block(direction)), offsets)
        self._sequential[direction] = int(offsets[-1] + lengths[-1])
        return offsets

    def _stream(self, count: int) -> Ios:
        """One after the other, each direction by itself, with a hole after each where ``rw=`` asks for one."""
        directions = self._directions(count)
        lengths = self._lengths(directions)
        offsets = np.empty(count, dtype=np.uint64)
        for direction in self.job.directions:
            chosen = np.flatnonzero(directions == direction)
            if len(chosen):
                offsets[chosen], lengths[chosen] = self._run(direction, lengths[chosen])
        return Ios(directions, offsets, lengths)

    def _run(
        self, direction: int, lengths: NDArray[np.uint64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Offsets in a row, from the beginning again after the end; what would go over the end is shortened."""
        steps = lengths.astype(np.int64) + self.job.hole
        position = self._sequential[direction]
        offsets = np.empty(len(steps), dtype=np.int64)
        done = 0
        while done < len(steps):
            if position >= self.size:
                position = 0
            likely = steps[done : done + self._most_in(self.size - position)]
            ends = np.cumsum(likely) + position
            fit = int(np.searchsorted(ends - likely, self.size, side="left"))
            part = slice(done, done + fit)
            offsets[part] = ends[:fit] - steps[part]
            position = int(ends[fit - 1])
            done += fit
        self._sequential[direction] = position
        shortened = np.minimum(lengths.astype(np.int64), self.size - offsets)
        return offsets.astype(np.uint64), shortened.astype(np.uint64)

    def _trim_and_write(self, count: int) -> Ios:
        """Every block is trimmed, then written."""
        pairs = count // 2
        length = np.uint64(self.job.least_block(WRITE))
        if self.job.mode.random:
            source = self._sources.setdefault(WRITE, Shuffle(int(self.size // int(length)), self._rng))
            offsets = source.draw(pairs) * length
        else:
            offsets, _ = self._run(WRITE, np.full(pairs, length, dtype=np.uint64))
        directions = np.tile(np.array([TRIM, WRITE], dtype=np.uint8), pairs)
        return Ios(directions, np.repeat(offsets, 2), np.full(2 * pairs, length, dtype=np.uint64))


def _nothing() -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint64]]:
    return np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint64)


def _chain(
    fresh: NDArray[np.uint64], jump: NDArray[np.bool_], lengths: NDArray[np.uint64], position: int
) -> NDArray[np.uint64]:
    """``fresh`` where it jumps, else where the one before ended (the first: at ``position``)."""
    before = np.concatenate(([0], np.cumsum(lengths[:-1], dtype=np.uint64))).astype(np.uint64)
    last = np.maximum.accumulate(np.where(jump, np.arange(len(fresh)), -1))
    start = np.where(last >= 0, fresh[np.maximum(last, 0)], np.uint64(position))
    passed = before - np.where(last >= 0, before[np.maximum(last, 0)], np.uint64(0))
    return np.asarray(start + passed, dtype=np.uint64)
