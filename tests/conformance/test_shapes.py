"""The generator of shapes: every pair is there, in few rows."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.shapes import AXES, combinations, pairwise, shapes


def missing(axes: dict[str, list[int]], rows: list[dict[str, int]]) -> set[tuple[str, int, str, int]]:
    """By looking for each pair in the rows, one after the other."""
    return {
        (a, x, b, y)
        for a, b in itertools.combinations(axes, 2)
        for x in axes[a]
        for y in axes[b]
        if not any(row[a] == x and row[b] == y for row in rows)
    }


@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=7))
def test_every_pair_occurs(lengths: list[int]) -> None:
    axes = {f"axis{i}": list(range(length)) for i, length in enumerate(lengths)}
    rows = pairwise(axes)
    assert not missing(axes, rows)
    largest, second = sorted(lengths)[-1:-3:-1]
    assert largest * second <= len(rows) <= min(math.prod(lengths), 2 * largest * second + 6)
    assert missing(axes, rows[:-1])


def test_the_shapes_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVFIO_MATRIX", "full")
    every = shapes()
    assert len({str(shape) for shape in every}) == len(every) == math.prod(map(len, AXES.values()))
    assert len(shapes(without=["engine"])) == len(every) // 2
    monkeypatch.delenv("PVFIO_MATRIX")
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "dev")
    few = shapes()
    assert len(few) < len(every) // 10
    assert {shape.engine for shape in shapes(without=["engine"])} == {"inline"}
    assert list(combinations({"a": [1, 2], "b": [3]})) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
