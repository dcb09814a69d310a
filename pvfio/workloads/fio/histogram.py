"""fio's histogram of latencies: 29 groups of 64 buckets, each group twice as coarse as the one before it.

Values below 128 ns have a bucket each; from there on a value is right within 1/128. A percentile is the middle of the
bucket in which it falls, as fio reports it. Many values are taken in at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["BUCKETS", "bucket_of", "middle_of", "percentiles"]

_BITS: Final = 6
_GROUP: Final = 1 << _BITS
BUCKETS: Final = 29 * _GROUP


def bucket_of(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bucket of each value in nanoseconds; what exceeds the last bucket is in it."""
    # The exponent of a float is the position of the highest bit; values are far below 2**53.
    _, top = np.frexp(values.astype(np.float64))
    shift = np.maximum(top.astype(np.int64) - 1 - _BITS, 0)
    return np.minimum((shift << _BITS) + (values >> shift), BUCKETS - 1)


def _middles() -> NDArray[np.int64]:
    index = np.arange(BUCKETS, dtype=np.int64)
    shift = np.maximum((index >> _BITS) - 1, 0)
    base = np.int64(1) << (shift + _BITS)
    half = (np.int64(1) << shift) >> 1
    return np.where(index < 2 * _GROUP, index, base + ((index % _GROUP) << shift) + half)


_MIDDLE: Final = _middles()


def middle_of(bucket: int) -> int:
    """The value in nanoseconds that stands for a bucket."""
    return int(_MIDDLE[bucket])


def percentiles(counts: NDArray[np.int64], shares: Sequence[float]) -> list[int]:
    """What each share (in percent) of the values does not exceed; 0 where there are no values."""
    total = int(counts.sum())
    if not total:
        return [0] * len(shares)
    running = np.cumsum(counts)
    wanted = np.array([share / 100 * total for share in shares])
    found = np.searchsorted(running, wanted, side="left")
    # An empty beginning holds no value, whatever the share.
    found = np.clip(np.maximum(found, int(np.flatnonzero(counts)[0])), 0, BUCKETS - 1)
    return [int(value) for value in _MIDDLE[found]]
