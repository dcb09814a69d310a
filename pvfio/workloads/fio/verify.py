"""Verification: headers and checksums in what is written, and checking what is read against them.

A block (``verify_interval`` bytes, or one whole I/O) begins with fio's header: magic, checksum's number, length, seed,
offset, time, thread and running number, and the CRC-32C of those; a digest of the rest of the block follows. What one
of pvfio and fio wrote with crc32c, md5, sha3-* or meta, the other verifies. ``pattern`` has no header. Blocks are
handled as vectors; hashes other than CRC-32C cost a call of hashlib each.

``Written`` remembers what a job wrote last, and where. Not modelled:
``verify_offset`` (headers anywhere but at the beginning), state files.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.checksums import CHECKSUMS, crc32c_of, fill_random
from pvfio.workloads.fio.job import Job
from pvfio.workloads.fio.overlap import units_of
from pvfio.workloads.fio.plan import Ios

__all__ = ["HEADER", "Failure", "Verifier", "Written"]

HEADER: Final = np.dtype(
    [
        ("magic", "<u2"),
        ("verify_type", "<u2"),
        ("len", "<u4"),
        ("rand_seed", "<u8"),
        ("offset", "<u8"),
        ("time_sec", "<u4"),
        ("time_nsec", "<u4"),
        ("thread", "<u2"),
        ("numberio", "<u2"),
        ("crc32", "<u4"),
    ]
)
_MAGIC: Final = 0xACCA
_CRC_AT: Final = 36  # of the header's own CRC, which covers what is before it
_META: Final = 1

_U64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Failure:
    """A block that is not what was written: ``offset`` and ``length`` in bytes, from the beginning of the namespace."""

    offset: int
    length: int
    why: str


@dataclass(slots=True)
class _Blocks:
    """Where blocks are in the buffer and on the device; ``owner``: the I/O each is of."""

    start: _U64
    length: _U64
    offset: _U64
    owner: NDArray[np.intp]


def _pieces(starts: _U64, ios: Ios, interval: int) -> _Blocks:
    """The blocks of I/Os whose data are at ``starts`` in the buffer."""
    if not interval:
        return _Blocks(starts, ios.length, ios.offset, np.arange(len(ios)))
    counts = (ios.length // np.uint64(interval)).astype(np.int64)
    owner = np.repeat(np.arange(len(ios)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    inside = (np.arange(len(owner)) - first).astype(np.uint64) * np.uint64(interval)
    length = np.full(len(owner), interval, dtype=np.uint64)
    return _Blocks(starts[owner] + inside, length, ios.offset[owner] + inside, owner)


class Verifier:
    """Stamps and checks blocks in a buffer of bytes. ``base`` is where the job's file begins on the device.

    Raises ``ValueError`` for blocks that have no room for header and digest.
    """

    def __init__(self, job: Job, buffer: NDArray[np.uint8], base: int, thread: int, seed: int) -> None:
        self.job = job
        self._buffer = buffer
        self._base = np.uint64(base)
        self._thread = thread
        self._rng = np.random.default_rng(seed)
        self._checksum = CHECKSUMS.get(job.verify)
        self._number = self._checksum.number if self._checksum else _META
        self._head = HEADER.itemsize + (self._checksum.size if self._checksum else 0)
        self._plain = job.verify == "pattern"
        smallest = job.verify_interval or min(job.least_block(direction) for direction in job.directions)
        if not self._plain and smallest < self._head:
            raise ValueError(f"blocks of {smallest} bytes have no room for the {self._head} of {job.verify}")

    # What is written

    def stamp(self, starts: _U64, ios: Ios, numbers: NDArray[np.int64]) -> None:
        """Fills the buffer with what the I/Os write; ``numbers`` counts the job's writes."""
        blocks = _pieces(starts, ios, self.job.verify_interval)
        offsets = blocks.offset + self._base
        seeds = self._rng.integers(1, 1 << 63, len(offsets), dtype=np.uint64)
        if self.job.verify_pattern is not None:
            self._fill_pattern(blocks, offsets)
        else:
            fill_random(self._buffer, blocks.start, blocks.length, seeds)
        if not self._plain:
            self._write_headers(blocks, offsets, seeds, numbers)

    def _fill_pattern(self, blocks: _Blocks, offsets: _U64) -> None:
        pattern = self.job.verify_pattern
        assert pattern is not None
        for length in np.unique(blocks.length).tolist():
            chosen = np.flatnonzero(blocks.length == length)
            contents = pattern.fill(int(length), offsets[chosen])
            self._buffer[_spread(blocks.start[chosen], int(length))] = contents

    def _write_headers(self, blocks: _Blocks, offsets: _U64, seeds: _U64, numbers: NDArray[np.int64]) -> None:
        headers = np.zeros(len(offsets), dtype=HEADER)
        now = time.monotonic_ns()
        headers["magic"], headers["verify_type"] = _MAGIC, self._number
        headers["len"], headers["offset"] = blocks.length, offsets
        headers["rand_seed"] = seeds if self.job.verify_pattern is None else 0
        headers["time_sec"], headers["time_nsec"] = now // 10**9 & 0xFFFFFFFF, now % 10**9
        headers["thread"], headers["numberio"] = self._thread, numbers[blocks.owner] & 0xFFFF
        headers["crc32"] = _header_crc(headers)
        raw = headers.view(np.uint8).reshape(-1, HEADER.itemsize)
        self._buffer[_spread(blocks.start, HEADER.itemsize)] = raw
        if self._checksum is not None:
            at = _spread(blocks.start + np.uint64(HEADER.itemsize), self._checksum.size)
            self._buffer[at] = self._digest(blocks)

    def _digest(self, blocks: _Blocks) -> NDArray[np.uint8]:
        assert self._checksum is not None
        head = np.uint64(self._head)
        return self._checksum.of(self._buffer, blocks.start + head, blocks.length - head)

    # What is read

    def check(
        self, starts: _U64, ios: Ios, numbers: NDArray[np.int64] | None = None
    ) -> tuple[int, list[Failure]]:
        """How many blocks were looked at, and those that are wrong; ``numbers``: those the I/Os were written with."""
        blocks = _pieces(starts, ios, self.job.verify_interval)
        if self._plain:
            return len(blocks.start), self._check_pattern(blocks)
        raw = self._buffer[_spread(blocks.start, HEADER.itemsize)]
        headers = np.ascontiguousarray(raw).view(HEADER)[:, 0]
        wrong = self._wrong_headers(headers, blocks, numbers)
        failures = {index: why for why, indexes in wrong for index in reversed(indexes.tolist())}
        good = np.setdiff1d(np.arange(len(headers)), list(failures))
        if self._checksum is not None and len(good):
            failures |= self._wrong_digests(blocks, good)
        return len(headers), [self._failure(blocks, index, failures[index]) for index in sorted(failures)]

    def _wrong_headers(
        self, headers: NDArray[Any], blocks: _Blocks, numbers: NDArray[np.int64] | None
    ) -> list[tuple[str, NDArray[np.intp]]]:
        """Reasons and blocks; of several reasons for a block the last one counts: the most basic one."""
        offsets = blocks.offset + self._base
        kind, length = headers["verify_type"], headers["len"]
        found = [
            ("it is of another write, not the last one", _different(headers["numberio"], numbers, blocks)),
            ("its header has another offset", np.flatnonzero(headers["offset"] != offsets)),
            (f"its header has another length, not {self.job.verify_interval or 'the block size'}",
             np.flatnonzero(length != blocks.length)),
            (f"its header is of another checksum, not {self.job.verify}", np.flatnonzero(kind != self._number)),
            ("its header's CRC is wrong", np.flatnonzero(headers["crc32"] != _header_crc(headers))),
            ("it has no header", np.flatnonzero(headers["magic"] != _MAGIC)),
        ]  # fmt: skip
        return [(why, indexes) for why, indexes in found if len(indexes)]

    def _wrong_digests(self, blocks: _Blocks, good: NDArray[np.intp]) -> dict[int, str]:
        assert self._checksum is not None
        some = _Blocks(blocks.start[good], blocks.length[good], blocks.offset[good], blocks.owner[good])
        received = self._digest(some)
        at = _spread(some.start + np.uint64(HEADER.itemsize), self._checksum.size)
        expected = self._buffer[at]
        bad = np.flatnonzero((received != expected).any(axis=1))
        return {
            int(good[i]): f"expected {self.job.verify} {expected[i].tobytes().hex()}, "
            f"received {received[i].tobytes().hex()}"
            for i in bad.tolist()
        }

    def _check_pattern(self, blocks: _Blocks) -> list[Failure]:
        pattern = self.job.verify_pattern
        assert pattern is not None
        failures = []
        for length in np.unique(blocks.length).tolist():
            chosen = np.flatnonzero(blocks.length == length)
            wanted = pattern.fill(int(length), blocks.offset[chosen] + self._base)
            differs = self._buffer[_spread(blocks.start[chosen], int(length))] != wanted
            for row in np.flatnonzero(differs.any(axis=1)).tolist():
                at = int(np.argmax(differs[row]))
                index = int(chosen[row])
                got = int(self._buffer[int(blocks.start[index]) + at])
                why = f"byte {at} is {got:02x}, wanted {int(wanted[row, at]):02x}"
                failures.append(self._failure(blocks, index, why))
        return failures

    def _failure(self, blocks: _Blocks, index: int, why: str) -> Failure:
        return Failure(int(blocks.offset[index] + self._base), int(blocks.length[index]), why)


def _header_crc(headers: NDArray[Any]) -> NDArray[np.uint32]:
    """What each header's own CRC should be."""
    raw = np.ascontiguousarray(headers).view(np.uint8).reshape(-1)
    starts = np.arange(len(headers), dtype=np.uint64) * np.uint64(HEADER.itemsize)
    lengths = np.full(len(headers), _CRC_AT, dtype=np.uint64)
    return crc32c_of(raw, starts, lengths)


def _different(
    found: NDArray[np.uint16], numbers: NDArray[np.int64] | None, blocks: _Blocks
) -> NDArray[np.intp]:
    if numbers is None:
        return np.zeros(0, dtype=np.intp)
    return np.flatnonzero(found != (numbers[blocks.owner] & 0xFFFF))


def _spread(starts: _U64, length: int) -> NDArray[np.intp]:
    """Indexes of ``length`` bytes at each start, shape (n, length)."""
    return starts.astype(np.intp)[:, None] + np.arange(length, dtype=np.intp)


class Written:
    """What a job wrote, in units of which its blocks are whole ones: the last write to each unit is what counts."""

    def __init__(self, size: int, unit: int) -> None:
        self._unit = unit
        self._last = np.full(-(-size // unit), -1, dtype=np.int64)
        self._parts: list[Ios] = []
        self.count = 0

    def add(self, ios: Ios) -> NDArray[np.int64]:
        """Remembers writes, which must not overlap each other; their numbers."""
        numbers = np.arange(self.count, self.count + len(ios))
        units, owner = units_of(ios, self._unit)
        self._last[units] = numbers[owner]
        self._parts.append(ios)
        self.count += len(ios)
        return numbers

    def remaining(self, *, ordered: bool) -> tuple[Ios, NDArray[np.int64]]:
        """The writes nothing of which was written again, and their numbers; by offset, or in the order written."""
        if not self._parts:
            nothing = np.zeros(0, dtype=np.uint64)
            return Ios(np.zeros(0, dtype=np.uint8), nothing, nothing), np.zeros(0, dtype=np.int64)
        whole = Ios(*(np.concatenate([getattr(p, name) for p in self._parts]) for name in Ios.__slots__))
        units, owner = units_of(whole, self._unit)
        over = np.zeros(len(whole), dtype=bool)
        over[owner[self._last[units] != owner]] = True
        numbers = np.flatnonzero(~over)
        if ordered:
            numbers = numbers[np.argsort(whole.offset[numbers], kind="stable")]
        return Ios(whole.direction[numbers], whole.offset[numbers], whole.length[numbers]), numbers.astype(
            np.int64
        )
