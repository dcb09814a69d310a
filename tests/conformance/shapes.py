"""The shapes of machine that mapping has to be right on, and which of them a run takes.

An axis is something mapping or translation depends on; a shape has one value of each. Every combination is run
where ``HYPOTHESIS_PROFILE`` is ``nightly`` or ``PVFIO_MATRIX`` is ``full``; else enough shapes that any two values
of two axes meet in one of them (pairwise), which is where most faults that need a combination show.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from pvfio.host.config import IommuConfig, Platform

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30


@dataclass(frozen=True)
class Shape:
    """``stage2``: platform and levels of the host's tables. ``width``: what the host says; the driver may use less."""

    five_level: bool = False
    width: int = 48
    pgsizes: int = K4 | M2 | G1
    stage2: tuple[Platform, int] = ("intel", 4)
    ats: bool = True
    engine: Literal["inline", "thread"] = "inline"

    @property
    def bits(self) -> int:
        """Of an IOVA, as the driver has it."""
        return min(self.width, 57 if self.five_level else 48)

    @property
    def levels(self) -> int:
        """Of stage 1."""
        return 5 if self.bits > 48 else 4

    def iommu(self) -> IommuConfig:
        platform, levels = self.stage2
        return IommuConfig(
            platform=platform,
            stage2_levels=levels,
            five_level=self.five_level,
            max_iova_width=self.width,
            pgsize_bitmap=self.pgsizes,
            ats=self.ats,
        )

    def __str__(self) -> str:
        sizes = "+".join(name for size, name in ((K4, "4K"), (M2, "2M"), (G1, "1G")) if self.pgsizes & size)
        platform, levels = self.stage2
        s1 = "s1_5lvl" if self.five_level else "s1_4lvl"
        ats = "ats" if self.ats else "noats"
        return f"{platform}-{levels}-{s1}-{self.width}bit-{sizes}-{ats}-{self.engine}"


AXES: dict[str, Sequence[Any]] = {
    "five_level": (False, True),
    "width": (39, 48, 57),
    "pgsizes": (K4, K4 | M2, K4 | M2 | G1),
    # amdv1 begins with as many levels as it is told and grows to what guest memory needs.
    "stage2": (("intel", 3), ("intel", 4), ("intel", 5), ("amd", 1), ("amd", 3), ("amd", 4), ("amd", 6)),
    "ats": (False, True),
    "engine": ("inline", "thread"),
}
assert list(AXES) == [field.name for field in fields(Shape)]


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows, one value of each axis each, in which every two values of two axes occur together.

    Greedy: each row begins with a pair that is missing, and gives every other axis the value that brings most of the
    missing ones. Near the smallest number of rows, which is at least the product of the two longest axes.
    """
    names = list(axes)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(axes[names[a]]))
        for y in range(len(axes[names[b]]))
    }
    rows = []
    while missing:
        row = dict(min(missing))
        for axis, values in enumerate(axes.values()):
            if axis not in row:
                candidates = [row | {axis: value} for value in range(len(values))]
                row = max(candidates, key=lambda candidate: len(_pairs(candidate) & missing))
        missing -= _pairs(row)
        rows.append({name: axes[name][row[axis]] for axis, name in enumerate(names)})
    return rows


def _pairs(row: Mapping[int, int]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    return set(itertools.combinations(sorted(row.items()), 2))


def full() -> bool:
    """Whether this run takes every combination."""
    return os.environ.get("PVFIO_MATRIX") == "full" or os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def combinations(axes: Mapping[str, Sequence[Any]]) -> Iterable[dict[str, Any]]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def shapes(*, without: Sequence[str] = ()) -> list[Shape]:
    """The shapes of this run; the axes in ``without`` stay at their default."""
    axes = {name: values for name, values in AXES.items() if name not in without}
    return [Shape(**row) for row in (combinations(axes) if full() else pairwise(axes))]
