"""Where the time of an operation goes: a timer around one of the functions it runs through, one after the other.

A timer slows down whoever calls the timed function, and what the interpreter does around it. So there is one at a
time: the operation runs without any, then with one around the first function, and so on, in turns, for as long as
wanted. A stage's time is what its function takes less the timed functions within it; what no timer sees, ``rest``, is
the operation's own time, taken without timers, less all stages. C paths have lap timers (guest/laps.h), which take a
turn too.

Not modelled: threads; operations that overlap (one runs at a time); what a lap timer does to the processor's pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Probe", "Stages"]

_ROUNDS, _CALLS = 9, 500
_RARE = 0.5  # what happens in fewer operations than this is no part of a usual one
_clock = time.perf_counter_ns


@dataclass(frozen=True, slots=True)
class Probe:
    """A function that is (part of) a stage: an attribute of an object. ``within``: the stage that calls it, if any."""

    stage: str
    owner: Any
    attribute: str
    within: str | None = None


@dataclass(slots=True)
class _Turn:
    """What one turn found, by the operation's name: nanoseconds of each stage in every operation (0: not at all)."""

    probe: Probe | None = None
    found: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, name: str, stage: str, ns: float) -> None:
        self.found.setdefault(name, {}).setdefault(stage, []).append(ns)


class _Cell:
    """What the timer counts into."""

    __slots__ = ("ns",)

    def __init__(self) -> None:
        self.ns = 0


class Stages:
    """Timers for the stages of operations, each run by ``run`` inside ``turn()``, over and over.

    ``laps`` is a ``struct pv_laps *`` or None, ``lap_stages`` names its stages by number, ``lap_clock`` is what one of
    its readings costs in ns, ``carry(laps)`` gives it to the code that carries it and ``carry(None)`` takes it away.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        *,
        rest: str,
        laps: Any = None,
        lap_stages: Sequence[str] = (),
        lap_clock: float = 0.0,
        carry: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._rest = rest
        self._laps = laps
        self._lap_stages = lap_stages
        self._lap_clock = lap_clock
        self._carry = carry
        self._cell = _Cell()
        self._timer_cost, self._clock_cost = _calibrate()
        self._plain = _Turn()
        self._lapped = _Turn()
        self._probed = [_Turn(probe) for probe in probes]
        self._turn = self._plain

    def turns(self) -> Generator[None, None, None]:
        """One turn after the other: without timers, with the lap timer, with each probe. A turn's timer is in place
        until the next one is asked for, or the generator closed.
        """
        yield
        try:
            if self._laps is not None:
                self._turn = self._lapped
                self._carry(self._laps)
                try:
                    yield
                finally:
                    self._carry(None)
            for turn in self._probed:
                self._turn = turn
                with self._installed(turn.probe):
                    yield
        finally:
            self._turn = self._plain

    def run(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        """Runs ``operation`` once and records what this turn's stage took, among the operations of that name."""
        turn, cell, laps = self._turn, self._cell, self._laps
        cell.ns = 0
        lapped = turn is self._lapped
        if lapped:
            for number in range(len(self._lap_stages)):
                laps.ns[number] = laps.laps[number] = 0
        start = _clock()
        result = operation(*args)
        took = _clock() - start
        if lapped:
            for number, stage in enumerate(self._lap_stages):
                turn.add(name, stage, max(0.0, laps.ns[number] - self._lap_clock * laps.laps[number]))
        elif turn.probe is not None:
            turn.add(name, turn.probe.stage, max(0.0, cell.ns))
        else:
            turn.add(name, self._rest, max(0.0, took - self._clock_cost))
        return result

    def count(self, name: str) -> int:
        """How many operations of that name were recorded without timers."""
        return len(self._plain.found.get(name, {}).get(self._rest, ()))

    def typical(self, name: str) -> dict[str, float]:
        """What each stage takes of an operation, ns: the median of those that have it, times the share of those.

        So an interruption does not count, and what happens in one operation of many counts with its part of each. All
        together is the median of the operations without timers, and those parts.
        """
        if not self.count(name):
            return {}
        inclusive: dict[str, float] = {}
        inside: dict[str, float] = {}
        rest = _median(self._plain.found.get(name, {}).get(self._rest, []))[0]
        for turn in (self._lapped, *self._probed):
            within = turn.probe.within if turn.probe is not None else None
            for stage, values in turn.found.get(name, {}).items():
                median, share = _median(values)
                inclusive[stage] = inclusive.get(stage, 0.0) + median * share
                if within is not None:
                    inside[within] = inside.get(within, 0.0) + median * share
                elif share >= _RARE:
                    rest -= median * share
        own = {stage: max(0.0, ns - inside.get(stage, 0.0)) for stage, ns in inclusive.items()}
        return {self._rest: max(0.0, rest)} | {stage: ns for stage, ns in own.items() if ns}

    @contextmanager
    def _installed(self, probe: Probe | None) -> Iterator[None]:
        """With the timer in place: the object has an attribute of its own for the while."""
        assert probe is not None
        owner, attribute = probe.owner, probe.attribute
        own = attribute in getattr(owner, "__dict__", {})
        function = getattr(owner, attribute)
        setattr(owner, attribute, _timed(function, self._cell, self._timer_cost))
        try:
            yield
        finally:
            if own:
                setattr(owner, attribute, function)
            else:
                delattr(owner, attribute)


def _median(values: Sequence[float]) -> tuple[float, float]:
    """The median of those that are not 0, and their share."""
    some = [value for value in values if value]
    return (float(np.median(some)), len(some) / len(values)) if some else (0.0, 0.0)


def _timed(function: Callable[..., Any], cell: Any, cost: float) -> Callable[..., Any]:
    clock = _clock

    def call(*args: Any) -> Any:
        start = clock()
        try:
            return function(*args)
        finally:
            cell.ns += clock() - start - cost

    return call


def _calibrate() -> tuple[float, float]:
    """What a timer adds to the function it is around, and one reading of the clock, both in ns: medians."""

    def nothing(_first: int, _second: int) -> None:
        return None

    clock, cell = _clock, _Cell()
    timed = _timed(nothing, cell, 0)
    added, readings = [], []
    for _ in range(_ROUNDS):
        start = clock()
        for _ in range(_CALLS):
            nothing(1, 2)
        bare = clock() - start
        cell.ns = 0
        for _ in range(_CALLS):
            timed(1, 2)
        added.append((cell.ns - bare) / _CALLS)
        start = clock()
        for _ in range(_CALLS):
            clock()
        readings.append((clock() - start) / _CALLS)
    return max(0.0, float(np.median(added))), float(np.median(readings))
