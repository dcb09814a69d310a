"""Timers around functions: each gets its own time, the rest is the caller's, and nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest

from pvfio.abi import ffi, lib
from pvfio.workloads.stages import Stages

pytestmark = pytest.mark.touches_c

READING = 10


def about(wanted: Any) -> Any:
    """Calibration reads the clock itself, a little."""
    return pytest.approx(wanted, abs=1)


class Clock:
    """A clock that moves only when read, by what that costs, or told to."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += READING
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pvfio.workloads.stages._clock", clock)
    return clock


class Work:
    """An operation of three parts, one inside another, some of it in nobody's."""

    def __init__(self, clock: Clock) -> None:
        self.calls = 0
        self.clock = clock
        self.own = self.outer

    def run(self, argument: int) -> int:
        self.calls += 1
        self.clock.now += 2000
        self.outer()
        self.second()
        return argument + 1

    def outer(self) -> None:
        self.clock.now += 3000
        self.inner()

    def inner(self) -> None:
        self.clock.now += 4000

    def second(self) -> None:
        if self.calls % 2:
            self.clock.now += 6000

    def fail(self) -> None:
        self.outer()
        raise RuntimeError("so it is")


def test_each_stage_has_its_own_time(clock: Clock) -> None:
    work = Work(clock)
    probes: list[tuple[str, Any, str]] = [("a", work, "outer"), ("b", work, "inner"), ("a", work, "second")]
    stages = Stages(probes, rest="rest")
    with stages.installed():
        assert [stages.run("op", work.run, i) for i in range(6)] == [1, 2, 3, 4, 5, 6]
        stages.run("other", work.inner)
    assert (stages.count("op"), stages.count("other"), stages.count("none")) == (6, 1, 0)
    # The timers cost nothing, though the clock does.
    assert stages.typical("op") == about({"a": 6000, "b": 4000, "rest": 2000})
    assert stages.typical("other") == about({"b": 4000, "rest": 0})
    assert stages.typical("none") == {}


def test_what_is_rare_counts_with_its_part(clock: Clock) -> None:
    work = Work(clock)
    stages = Stages([("rare", work, "inner")], rest="rest")
    with stages.installed():
        for i in range(8):
            stages.run("op", work.inner if i == 3 else work.second)
    assert stages.typical("op")["rare"] == about(4000 / 8)


def test_attributes_are_as_before(clock: Clock) -> None:
    work = Work(clock)
    own = work.own
    stages = Stages([("a", work, "outer"), ("b", work, "own")], rest="rest")
    with stages.installed():
        assert {"outer", "own"} <= set(vars(work))
    assert "outer" not in vars(work)
    assert work.own == own
    with pytest.raises(RuntimeError, match="so it is"), stages.installed():
        stages.run("op", work.fail)
    assert "outer" not in vars(work)
    assert stages.count("op") == 0
    with (
        pytest.raises(AttributeError),
        Stages([("a", work, "outer"), ("b", work, "none")], rest="").installed(),
    ):
        pass
    assert "outer" not in vars(work)


def test_laps_of_c_are_stages_and_begin_at_zero(clock: Clock) -> None:
    laps = ffi.new("struct pv_laps *")
    names = ["check", "iova", "pin", "index", "table"]
    stages = Stages([], rest="rest", laps=laps, lap_stages=names, lap_clock=100.0)

    def operation() -> None:
        assert list(laps.ns) == list(laps.laps) == [0] * lib.PV_LAPS
        laps.ns[lib.PV_LAP_PIN], laps.laps[lib.PV_LAP_PIN] = 1000, 2
        laps.ns[lib.PV_LAP_TABLE], laps.laps[lib.PV_LAP_TABLE] = 50, 1
        clock.now += 5000

    with stages.installed():
        for _ in range(3):
            stages.run("op", operation)
    # Nothing is left of the lap that was shorter than the reading of the clock.
    assert stages.typical("op") == about({"pin": 800, "rest": 5000 - 1050})
