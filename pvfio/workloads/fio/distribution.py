"""Where random I/O goes: every block once in random order, or zipf, pareto, normal and zoned distributions.

All are vectors: ``draw(n)`` gives the next n block numbers. The formulas of zipf (Gray et al., "Quickly generating
billion-record synthetic databases") and pareto, and the multiplicative hash that scatters their ranks over the file,
are fio's, so that the share of I/O that the most popular blocks get is fio's for the same parameter; the sequence is
numpy's generator's, not fio's.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.job import Distribution

__all__ = ["Blocks", "Normal", "Pareto", "Shuffle", "Uniform", "Zipf", "Zoned", "make_blocks"]

_MOST_RANKS: Final = 10_000_000  # terms of zeta(n); fio's limit
_GOLDEN: Final = np.uint64(0x61C8864680B583EB)
_LARGEST_SHUFFLE: Final = 1 << 22  # blocks whose order is kept in memory

_U64 = NDArray[np.uint64]


class Blocks(Protocol):
    """A source of block numbers below ``count``."""

    count: int

    def draw(self, n: int) -> _U64:
        """The next ``n``."""
        ...


class Uniform:
    """Every block as likely as any other, again and again."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self.count = count
        self._rng = rng

    def draw(self, n: int) -> _U64:
        """Independent ones."""
        return self._rng.integers(0, self.count, n, dtype=np.uint64)


class Shuffle:
    """Every block once before any comes again, in an order that is random and another one each time.

    Of many blocks no order is kept: a keyed permutation of the numbers (six rounds of a Feistel network on the next
    even number of bits; what falls outside is permuted again) says which block is next.
    """

    def __init__(self, count: int, rng: np.random.Generator, *, largest: int = _LARGEST_SHUFFLE) -> None:
        self.count = count
        self._rng = rng
        self._position = 0
        self._in_memory = count <= largest
        self._half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._begin()

    def _begin(self) -> None:
        if self._in_memory:
            self._order: _U64 = self._rng.permutation(self.count).astype(np.uint64)
        else:
            self._keys = self._rng.integers(0, 1 << 63, 6, dtype=np.uint64) | np.uint64(1)
        self._position = 0

    def draw(self, n: int) -> _U64:
        """The next ones; a new order begins where the last one ends."""
        parts = []
        while n:
            if self._position == self.count:
                self._begin()
            size = min(n, self.count - self._position)
            parts.append(self._part(self._position, size))
            self._position += size
            n -= size
        return (
            parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)
        )

    def _part(self, start: int, size: int) -> _U64:
        if self._in_memory:
            return self._order[start : start + size]
        values = self._permute(np.arange(start, start + size, dtype=np.uint64))
        while len(outside := np.flatnonzero(values >= self.count)):
            values[outside] = self._permute(values[outside])
        return values

    def _permute(self, values: _U64) -> _U64:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            mixed = (right + key) * _GOLDEN
            left, right = right, left ^ ((mixed ^ mixed >> np.uint64(29)) * key >> np.uint64(24)) & self._mask
        return left << self._half | right


class _Ranked:
    """Ranks scattered over the file: by fio's hash, or around a centre."""

    def __init__(self, count: int, rng: np.random.Generator, center: float | None) -> None:
        self.count = count
        self._rng = rng
        self._hashed = center is None
        self._offset = np.uint64(
            int(rng.integers(0, count, dtype=np.uint64)) if center is None else int(count * center) % count
        )

    def _place(self, ranks: _U64) -> _U64:
        if self._hashed:
            ranks = ranks * _GOLDEN
        placed: _U64 = (ranks % np.uint64(self.count) + self._offset) % np.uint64(self.count)
        return placed


class Zipf(_Ranked):
    """Rank k is as likely as ``1 / k ** theta``."""

    def __init__(
        self, count: int, rng: np.random.Generator, theta: float, center: float | None = None
    ) -> None:
        super().__init__(count, rng, center)
        ranks = np.arange(1, min(count, _MOST_RANKS) + 1, dtype=np.float64)
        self._theta = theta
        self._zetan = float(np.power(ranks, -theta).sum())
        self._alpha = 1.0 / (1.0 - theta)
        zeta2 = 1.0 + 0.5**theta
        self._eta = (1.0 - (2.0 / count) ** (1.0 - theta)) / (1.0 - zeta2 / self._zetan) if count > 2 else 1.0

    def ranks(self, n: int) -> _U64:
        """Ranks from 0, the most popular."""
        uniform = self._rng.random(n)
        scaled = uniform * self._zetan
        with np.errstate(all="ignore"):
            far = self.count * np.power(self._eta * uniform - self._eta + 1.0, self._alpha)
        value = np.where(scaled < 1.0, 0.0, np.where(scaled < 1.0 + 0.5**self._theta, 1.0, far))
        ranks: _U64 = np.minimum(np.nan_to_num(value), self.count - 1).astype(np.uint64)
        return ranks

    def draw(self, n: int) -> _U64:
        """Independent ones."""
        return self._place(self.ranks(n))


class Pareto(_Ranked):
    """The self-similar distribution: a share ``h`` of the blocks gets 1 - h of the I/O, and within them again."""

    def __init__(self, count: int, rng: np.random.Generator, h: float, center: float | None = None) -> None:
        super().__init__(count, rng, center)
        self._power = math.log(h) / math.log(1.0 - h)

    def ranks(self, n: int) -> _U64:
        """Ranks from 0, the most popular."""
        return ((self.count - 1) * np.power(self._rng.random(n), self._power)).astype(np.uint64)

    def draw(self, n: int) -> _U64:
        """Independent ones."""
        return self._place(self.ranks(n))


class Normal:
    """Normally distributed around the centre; ``deviation`` in percent of the file. What falls outside wraps."""

    def __init__(
        self, count: int, rng: np.random.Generator, deviation: float, center: float | None = None
    ) -> None:
        self.count = count
        self._rng = rng
        self._mean = count * (0.5 if center is None else center)
        self._deviation = max(1.0, count * deviation / 100)

    def draw(self, n: int) -> _U64:
        """Independent ones."""
        values = np.floor(self._rng.normal(self._mean, self._deviation, n))
        wrapped: _U64 = np.mod(values, self.count).astype(np.uint64)
        return wrapped


class Zoned:
    """A share of the I/O in each of the zones that follow each other; what no zone has is in the last one."""

    def __init__(self, count: int, rng: np.random.Generator, zones: tuple[tuple[float, int], ...]) -> None:
        self.count = count
        self._rng = rng
        ends = np.minimum(np.cumsum([blocks for _, blocks in zones]), count).astype(np.int64)
        ends[-1] = count
        self._starts = np.concatenate(([0], ends[:-1])).astype(np.int64)
        self._sizes = np.maximum(ends - self._starts, 1)
        shares = np.cumsum([share for share, _ in zones])
        self._shares = shares / shares[-1]

    def draw(self, n: int) -> _U64:
        """Independent ones."""
        zone = np.minimum(
            np.searchsorted(self._shares, self._rng.random(n), side="right"), len(self._shares) - 1
        )
        inside = np.floor(self._rng.random(n) * self._sizes[zone]).astype(np.int64)
        found: _U64 = np.minimum(self._starts[zone] + inside, self.count - 1).astype(np.uint64)
        return found


def make_blocks(distribution: Distribution, count: int, block: int, rng: np.random.Generator) -> Blocks:
    """The source for ``count`` blocks of ``block`` bytes, each of which may come again at any time."""
    kind = distribution.kind
    if count < 2:
        return Uniform(max(count, 1), rng)
    if kind == "zipf":
        return Zipf(count, rng, distribution.theta, distribution.center)
    if kind == "pareto":
        return Pareto(count, rng, distribution.theta, distribution.center)
    if kind == "normal":
        return Normal(count, rng, distribution.theta, distribution.center)
    if kind in ("zoned", "zoned_abs"):
        whole = count / 100 if kind == "zoned" else 1 / block
        return Zoned(
            count, rng, tuple((share, max(1, round(size * whole))) for share, size in distribution.zones)
        )
    return Uniform(count, rng)
