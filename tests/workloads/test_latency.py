"""Records of latencies: exact where they say so, and right within their buckets, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.workloads.latency import Latencies

pytestmark = pytest.mark.touches_c

VALUES = st.lists(st.integers(0, 200) | st.integers(0, 1 << 40) | st.integers(0, (1 << 64) - 1), max_size=60)


def recorded(values: list[int]) -> Latencies:
    latencies = Latencies()
    latencies.add(np.array(values, np.uint64))
    return latencies


def test_nothing() -> None:
    empty = Latencies()
    assert (empty.count, empty.least, empty.most, empty.average, empty.deviation) == (0, 0, 0, 0, 0)
    assert empty.quantile(0.5) == 0
    edges, counts = empty.histogram()
    assert (edges.shape, counts.shape) == ((1,), (0,))


def test_the_floors_of_the_buckets() -> None:
    floors = [lib.pv_latency_floor(bucket) for bucket in range(lib.PV_LATENCY_BUCKETS + 1)]
    assert floors[:65] == list(range(65))
    widths = np.diff(np.array(floors, np.float64))
    assert (widths[64:] / np.array(floors[64:-1]) <= 1 / 32).all()
    assert floors[-1] == 1 << 40
    for bucket in (0, 1, 63, 64, 65, 500, lib.PV_LATENCY_BUCKETS - 1):
        for value in (floors[bucket], floors[bucket + 1] - 1):
            edges, counts = recorded([value]).histogram()
            assert ([int(edge) for edge in edges], list(counts)) == (
                [floors[bucket], floors[bucket + 1]], [1],
            )  # fmt: skip


@given(VALUES, VALUES)
def test_against_numpy(first: list[int], second: list[int]) -> None:
    latencies, other = recorded(first), recorded(second)
    latencies.merge(other)
    values = first + second
    assert latencies.count == len(values)
    if not values:
        return
    floats = np.array(values, np.float64)
    assert (latencies.least, latencies.most) == (min(values), max(values))
    assert latencies.average == pytest.approx(floats.mean())
    # The sum of squares loses what is 2^-26 of the largest.
    assert latencies.deviation == pytest.approx(floats.std(), rel=1e-6, abs=max(values) * 1e-6)
    edges, counts = latencies.histogram()
    assert counts.sum() == len(values)
    inside = np.clip(np.array(values, np.uint64), 0, (1 << 40) - 1)
    assert (np.histogram(inside, edges)[0] == counts).all()


@given(st.lists(st.integers(0, 1 << 39), min_size=1, max_size=60), st.floats(0, 1))
def test_quantiles(values: list[int], share: float) -> None:
    exact = np.quantile(np.array(values), share, method="inverted_cdf")
    assert recorded(values).quantile(share) == pytest.approx(float(exact), rel=0.03)
