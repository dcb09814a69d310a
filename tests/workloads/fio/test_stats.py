"""fio's histogram and percentiles, the tables, joining jobs, and numbers as fio prints them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.workloads.fio.histogram import BUCKETS, bucket_of, middle_of, percentiles
from pvfio.workloads.fio.stats import JobStats, Latency, Samples
from pvfio.workloads.fio.units import bytes_text, number_text, rate_text


def bucket(value: int) -> int:
    """The bucket, by the description: 64 buckets a power of two."""
    if value < 128:
        return value
    shift = value.bit_length() - 7
    return min((shift << 6) + (value >> shift), BUCKETS - 1)


@given(st.lists(st.integers(0, 1 << 45), min_size=1, max_size=100))
def test_buckets(values: list[int]) -> None:
    found = bucket_of(np.array(values, dtype=np.int64))
    assert found.tolist() == [bucket(value) for value in values]
    for value, index in zip(values, found.tolist(), strict=True):
        if index < BUCKETS - 1:
            assert abs(middle_of(index) - value) <= max(1, value / 64)


def test_percentiles_are_the_middles_of_buckets() -> None:
    latency = Latency()
    latency.add(np.arange(1, 101, dtype=np.int64))
    assert percentiles(latency.buckets, [1, 50, 99, 100]) == [1, 50, 99, 100]
    assert percentiles(Latency().buckets, [50]) == [0]


@given(st.lists(st.lists(st.integers(0, 10**9), max_size=20), min_size=1, max_size=5))
def test_moments_however_they_come(parts: list[list[int]]) -> None:
    whole, merged = [value for part in parts for value in part], Latency()
    for part in parts:
        one = Latency()
        one.add(np.array(part, dtype=np.int64))
        merged.merge(one)
    assert (merged.count, merged.most) == (len(whole), max(whole, default=0))
    assert merged.least == min(whole, default=0)
    if len(whole) > 1:
        assert merged.mean == pytest.approx(np.mean(whole))
        assert merged.deviation == pytest.approx(np.std(whole, ddof=1), rel=1e-6, abs=1.0)


NUMBERS = [
    (1432125, "1432k"),
    (8000, "8000"),
    (616, "616"),
    (12345, "12.3k"),
    (99999, "100.0k"),
    (31_260_000, "31.3M"),
]


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers(value: int, text: str) -> None:
    assert number_text(value) == text


def test_bytes_and_rates() -> None:
    assert (bytes_text(32768), bytes_text(46928000), bytes_text(8192)) == ("32.0KiB", "44.8MiB", "8192B")
    assert (rate_text(5865984000), rate_text(5865984000, binary=False)) == ("5594MiB/s", "5866MB/s")


def test_depths_and_batches_have_fios_columns() -> None:
    stats = JobStats()
    for depth in (1, 2, 3, 4, 31, 32, 64, 500):
        stats.count_depth(depth, 1)
    assert stats.depths.tolist() == [1, 2, 1, 0, 1, 1, 2]
    for count in (0, 1, 4, 5, 8, 9, 16, 17, 64, 65):
        stats.count_submit(count)
    assert stats.submits.tolist() == [1, 2, 2, 2, 1, 1, 1]


def test_the_table_of_powers_of_ten() -> None:
    stats = JobStats()
    stats.add_coarse(np.array([1, 2, 3, 4, 999, 1000, 2000, 10**6, 2 * 10**9, 10**10], dtype=np.int64))
    assert stats.coarse[:3].tolist() == [1, 2, 1]
    assert stats.coarse[9] == 1  # below 1000 ns
    assert stats.coarse[10] == 1  # below 2 us
    assert stats.coarse[-1] == 2


def test_samples_of_jobs_side_by_side_add_up() -> None:
    one, two = Samples([1.0, 2.0], [500, 1000]), Samples([10.0, 20.0, 30.0], [500, 1000, 1500])
    one.merge(two)
    assert one.values == [11.0, 22.0, 30.0]
