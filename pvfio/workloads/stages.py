"""Where the time of an operation goes: timers around the functions it runs through, one set of figures an operation.

``Stages`` puts a timer around functions of Python, by replacing attributes while it is measuring, and takes over what
lap timers in C (guest/laps.h) counted inside. A stage's time is its own: that of timed functions it calls is not in it.
What the timers themselves take is measured beforehand and taken off: the reading of the clock from the stage, the rest
from whoever called it.

Not modelled: threads; concurrent operations (one runs at a time); what the timers do to caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["Stages", "Timer"]

_ROUNDS, _CALLS = 9, 500
_clock = time.perf_counter_ns


class Timer:
    """Times calls of functions by stage; ``inner`` and ``outer`` are what a timer costs, ns: in its own stage, and
    beyond that in its caller.
    """

    def __init__(self) -> None:
        self.ns: dict[str, float] = {}
        self._below = 0.0
        self.inner = 0.0
        self.outer = 0.0
        self._calibrate()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time counts for ``stage``."""
        clock = _clock
        self.ns.setdefault(stage, 0.0)

        def call(*args: Any, **kwargs: Any) -> Any:
            outside, self._below = self._below, 0.0
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                took = clock() - start - self.inner
                self.ns[stage] += took - self._below
                self._below = outside + took + self.inner + self.outer

        return call

    def charge(self, stage: str, ns: float, whole: float) -> None:
        """Counts ``ns`` for ``stage`` that lie within the timed call that is running, or has just ended; they and
        what their timers took are ``whole``.
        """
        self.ns[stage] = self.ns.get(stage, 0.0) + ns
        self._below += whole

    def begin(self) -> None:
        """A new operation: everything is zero."""
        for stage in self.ns:
            self.ns[stage] = 0.0
        self._below = 0.0

    @property
    def below(self) -> float:
        """The time of this operation that stages have claimed, and their timers with it."""
        return self._below

    def _calibrate(self) -> None:
        def nothing() -> None:
            return None

        def series(function: Callable[[], None]) -> float:
            start = clock()
            for _ in range(_CALLS):
                function()
            return (clock() - start) / _CALLS

        clock = _clock
        timed = self.timed("", nothing)
        plain, whole, own = [], [], []
        for _ in range(_ROUNDS):
            plain.append(series(nothing))
            self.begin()
            whole.append(series(timed))
            own.append(self.ns[""] / _CALLS)
        bare = float(np.median(plain))
        # The function itself is in the stage; all else of it is the timer.
        self.inner = max(0.0, float(np.median(own)) - bare)
        self.outer = max(0.0, float(np.median(whole)) - bare - self.inner)
        self.ns.clear()
        self._below = 0.0


class Stages:
    """Timers around one operation's functions: (stage, object, attribute) each, and a lap timer for what is in C.

    ``laps`` is a ``struct pv_laps *`` or None, ``lap_stages`` names its stages by number, ``lap_clock`` is what one of
    its readings costs in ns. ``rest`` is the stage of all that no timer sees.
    """

    def __init__(
        self,
        probes: Sequence[tuple[str, Any, str]],
        *,
        rest: str,
        laps: Any = None,
        lap_stages: Sequence[str] = (),
        lap_clock: float = 0.0,
    ) -> None:
        self._timer = Timer()
        self._probes = probes
        self._rest = rest
        self._laps = laps
        self._lap_stages = lap_stages
        self._lap_clock = lap_clock
        self._samples: dict[str, list[dict[str, float]]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """With the timers in place. Objects get an attribute of their own where they had their class's."""
        undo: list[tuple[Any, str, bool, Any]] = []
        try:
            for stage, owner, attribute in self._probes:
                own = attribute in getattr(owner, "__dict__", {})
                function = getattr(owner, attribute)
                undo.append((owner, attribute, own, function))
                setattr(owner, attribute, self._timer.timed(stage, function))
            yield
        finally:
            for owner, attribute, own, function in reversed(undo):
                if own:
                    setattr(owner, attribute, function)
                else:
                    delattr(owner, attribute)

    def run(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        """Runs ``operation`` once and records what its stages took, among the operations of that name."""
        timer, laps = self._timer, self._laps
        timer.begin()
        if laps is not None:
            for number in range(len(self._lap_stages)):
                laps.ns[number] = laps.laps[number] = 0
        start = _clock()
        result = operation(*args)
        took = _clock() - start
        if laps is not None:
            for number, stage in enumerate(self._lap_stages):
                if laps.laps[number]:
                    spent = laps.ns[number]
                    timer.charge(stage, max(0.0, spent - self._lap_clock * laps.laps[number]), spent)
        sample = {stage: ns for stage, ns in timer.ns.items() if ns}
        sample[self._rest] = max(0.0, took - timer.below - timer.inner)
        self._samples.setdefault(name, []).append(sample)
        return result

    def count(self, name: str) -> int:
        """How many operations of that name were recorded."""
        return len(self._samples.get(name, ()))

    def typical(self, name: str) -> dict[str, float]:
        """What each stage takes of an operation, ns: the median of those that have it, times the share of those.

        So what happens in one operation of many counts with its part of each, and an interruption does not count.
        """
        samples = self._samples.get(name, [])
        found: dict[str, list[float]] = {}
        for sample in samples:
            for stage, ns in sample.items():
                found.setdefault(stage, []).append(ns)
        return {stage: float(np.median(each)) * len(each) / len(samples) for stage, each in found.items()}
