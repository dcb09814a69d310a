"""The benchmark of vfio-user runs and prints every figure; how high they are is for those who read them."""

from __future__ import annotations

import os
import re

import pytest

from tests.bench.vfio_user import Sizes, run
from tests.c_program import compiler

pytestmark = pytest.mark.touches_c


async def test_every_figure_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    compiler()
    cores = sorted(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    await run(Sizes(rounds=1, trips=4, reads=256, maps=4, memory=2 << 20), (cores[-1], cores[0]))
    assert os.sched_getaffinity(0) == before
    rows = [line for line in capsys.readouterr().out.splitlines() if "k/s" in line or "k pairs/s" in line]
    assert [len(re.findall(r" \d+\.\d", row)) for row in rows] == [3, 3, 3, 3, 4]
