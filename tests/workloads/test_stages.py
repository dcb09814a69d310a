"""Timers around functions: each stage gets its own time, the rest is the caller's, and nothing stays behind."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from pvfio.abi import ffi, lib
from pvfio.workloads.stages import Probe, Stages

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
        self.outer()
        self.second()
        return argument + 1

    def outer(self) -> None:
        self.clock.now += 300
        self.inner()

    def inner(self) -> None:
        self.clock.now += 400

    def second(self) -> None:
        self.clock.now += 6000

    def seldom(self, _argument: int) -> None:
        self.calls += 1
        self.clock.now += 1000
        if self.calls % 4 == 0:
            self.second()

    def fail(self) -> None:
        self.outer()
        raise RuntimeError("so it is")


def run_turns(stages: Stages, name: str, operation: Any, times: int) -> None:
    for _ in range(2):
        for _ in stages.turns():
            for i in range(times):
                stages.run(name, operation, i)


def test_each_stage_has_its_own_time(clock: Clock) -> None:
    work = Work(clock)
    probes = [Probe("a", work, "outer"), Probe("b", work, "inner", within="a"), Probe("c", work, "second")]
    stages = Stages(probes, rest="rest")
    turns = 0
    for _ in stages.turns():
        turns += 1
        assert [stages.run("op", work.run, i) for i in range(5)] == [1, 2, 3, 4, 5]
    assert turns == 4
    assert (stages.count("op"), stages.count("none")) == (5, 0)
    # The timers cost nothing, though the clock does.
    assert stages.typical("op") == about({"rest": 2000, "a": 600, "b": 800, "c": 6000})
    assert stages.typical("none") == {}


def test_two_functions_of_one_stage(clock: Clock) -> None:
    work = Work(clock)
    stages = Stages([Probe("a", work, "outer"), Probe("a", work, "second")], rest="rest")
    run_turns(stages, "op", work.run, 3)
    assert stages.typical("op") == about({"rest": 2000, "a": 7400})


def test_what_is_rare_counts_with_its_part(clock: Clock) -> None:
    work = Work(clock)
    stages = Stages([Probe("rare", work, "second")], rest="rest")
    run_turns(stages, "op", work.seldom, 8)
    assert stages.typical("op") == about({"rest": 1000, "rare": 1500})


def test_an_interruption_does_not_count(clock: Clock) -> None:
    work = Work(clock)
    stages = Stages([Probe("a", work, "outer")], rest="rest")

    def operation(number: int) -> None:
        work.run(number)
        clock.now += 1_000_000 * (number == 3)

    run_turns(stages, "op", operation, 7)
    assert stages.typical("op") == about({"rest": 8000, "a": 1400})


def test_attributes_are_as_before(clock: Clock) -> None:
    work = Work(clock)
    own, before = work.own, set(vars(work))
    stages = Stages([Probe("a", work, "outer"), Probe("b", work, "own")], rest="rest")
    seen = [(set(vars(work)) - before, work.own == own) for _ in stages.turns()]
    assert seen == [(set(), True), ({"outer"}, True), (set(), False)]
    assert (set(vars(work)), work.own == own) == (before, True)
    with pytest.raises(RuntimeError, match="so it is"), closing(stages.turns()) as turns:
        for _ in turns:
            stages.run("op", work.outer)
            if "outer" in vars(work):
                stages.run("op", work.fail)
    assert "outer" not in vars(work)
    with pytest.raises(AttributeError):
        list(Stages([Probe("b", work, "none")], rest="rest").turns())


def test_laps_of_c_are_stages_and_begin_at_zero(clock: Clock) -> None:
    laps = ffi.new("struct pv_laps *")
    names = ["check", "iova", "pin", "index", "table"]
    carried: list[Any] = []
    stages = Stages([], rest="rest", laps=laps, lap_stages=names, lap_clock=100.0, carry=carried.append)

    def operation() -> None:
        clock.now += 5000
        if carried and carried[-1] is not None:
            assert list(laps.ns) == list(laps.laps) == [0] * lib.PV_LAPS
            laps.ns[lib.PV_LAP_PIN], laps.laps[lib.PV_LAP_PIN] = 1000, 2
            laps.ns[lib.PV_LAP_TABLE], laps.laps[lib.PV_LAP_TABLE] = 50, 1

    for _ in stages.turns():
        for _ in range(3):
            stages.run("op", operation)
    assert carried == [laps, None]
    # Nothing is left of the lap that was shorter than the reading of the clock.
    assert stages.typical("op") == about({"rest": 4200, "pin": 800})
