"""What a job writes that nobody verifies: zeroes, a pattern, or bytes made of the job's seed, new ones with
``refill_buffers``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pvfio.workloads.fio.checksums import fill_random
from pvfio.workloads.fio.job import Job

__all__ = ["fill", "refill"]


def fill(job: Job, buffer: NDArray[np.uint8], seed: int) -> None:
    """The whole buffer, before the job begins."""
    if job.zero_buffers:
        buffer[:] = 0
    elif job.buffer_pattern is not None:
        data = job.buffer_pattern.data
        buffer[:] = np.frombuffer(data * (-(-len(buffer) // len(data))), dtype=np.uint8)[: len(buffer)]
    else:
        size = np.array([len(buffer)], dtype=np.uint64)
        fill_random(buffer, np.zeros(1, dtype=np.uint64), size, np.array([seed], dtype=np.uint64))


def refill(
    buffer: NDArray[np.uint8],
    starts: NDArray[np.uint64],
    lengths: NDArray[np.uint64],
    seed: tuple[int, int],
) -> None:
    """Parts of the buffer anew; what they become depends on the seed alone."""
    seeds = np.random.default_rng(seed).integers(1, 1 << 63, len(starts), dtype=np.uint64)
    fill_random(buffer, starts, lengths, seeds)
