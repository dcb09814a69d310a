"""The line fio shows while it works: jobs, how far they are, rates, and when they will be done."""

from __future__ import annotations

import sys
import time
from itertools import groupby
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from pvfio.workloads.fio.engine import Engine
    from pvfio.workloads.fio.job import Mode
    from pvfio.workloads.fio.run import Run

__all__ = ["status_line", "status_text"]

_INTERVAL: Final = 1.0
_WIDTH: Final = 110


def _share(engine: Engine) -> float:
    """How much of a job is done, 0 to 1, by bytes or by time."""
    job = engine.job
    by_time = 0.0
    if job.runtime:
        elapsed = time.perf_counter_ns() - engine.recorder.begin
        by_time = min(1.0, elapsed / job.runtime)
    if job.time_based:
        return by_time
    done = sum(direction.nbytes for direction in engine.stats.directions)
    total = (job.io_size or engine.plan.size) * job.loops
    return max(by_time, min(1.0, done / total if total else 0.0))


def _letter(mode: Mode) -> str:
    """fio's for what a job does: a capital where it goes through the file in order."""
    letter = "m" if mode.mixed else "r" if mode.reads else "w" if mode.writes else "d"
    return letter if mode.random else letter.upper()


def status_text(work: Run, rates: dict[str, tuple[float, float]]) -> str:
    """``Jobs: 1 (f=1): [r(1)][42.0%][r=812MiB/s][r=208k IOPS][eta 00m:07s]``; rates by letter: bytes, I/Os a second."""
    from pvfio.workloads.fio.units import number_text, rate_text

    engines = work.engines
    runs = [(letter, len(list(alike))) for letter, alike in groupby(_letter(e.job.mode) for e in engines)]
    letters = ",".join(f"{letter}({count})" for letter, count in runs)
    share = min((_share(engine) for engine in engines), default=1.0)
    elapsed = time.time() - work.began
    left = int(elapsed * (1 - share) / share) if share > 0.01 else 0
    speeds = ",".join(f"{name}={rate_text(nbytes)}" for name, (nbytes, _) in rates.items())
    counts = ",".join(f"{name}={number_text(ios)}" for name, (_, ios) in rates.items())
    eta = f"{left // 60:02d}m:{left % 60:02d}s"
    return f"Jobs: {len(engines)} (f={len(engines)}): [{letters}][{share:.1%}][{speeds}][{counts} IOPS][eta {eta}]"


def _totals(work: Run) -> dict[str, tuple[int, int]]:
    """Bytes and I/Os so far, by letter, of everything that ran or runs."""
    every = [item.stats for item in work.finished] + [engine.stats for engine in work.engines]
    found = {}
    for index, letter in enumerate("rwt"):
        ios = sum(stats.directions[index].ios for stats in every)
        if ios:
            found[letter] = (sum(stats.directions[index].nbytes for stats in every), ios)
    return found


async def status_line(work: Run) -> None:
    """Shows the line on standard error while that is a terminal, until cancelled."""
    if not sys.stderr.isatty():
        return
    before, then = _totals(work), time.perf_counter()
    try:
        while True:
            await trio.sleep(_INTERVAL)
            for engine in work.engines:
                engine.recorder.fold()
            after, now = _totals(work), time.perf_counter()
            rates = {}
            for letter, (nbytes, ios) in after.items():
                old = before.get(letter, (0, 0))
                elapsed = now - then
                rates[letter] = (max(0, nbytes - old[0]) / elapsed, max(0, ios - old[1]) / elapsed)
            print(f"\r{status_text(work, rates):<{_WIDTH}}", end="", file=sys.stderr, flush=True)
            before, then = after, now
    finally:
        print(f"\r{'':<{_WIDTH}}\r", end="", file=sys.stderr, flush=True)
