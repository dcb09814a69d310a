"""What a job has in flight, and what of it completed, against dictionaries and lists."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from pvfio.workloads.fio import Notes, build, parse_job_text
from pvfio.workloads.fio import record as record_module
from pvfio.workloads.fio.plan import Ios
from pvfio.workloads.fio.record import Recorder
from pvfio.workloads.fio.slots import Slots
from pvfio.workloads.fio.stats import JobStats

pytestmark = pytest.mark.touches_c

FAR = 10**18


def ios_of(rows: list[tuple[int, int, int]]) -> Ios:
    direction, offset, length = np.array(rows, dtype=np.uint64).reshape(-1, 3).T.copy()
    return Ios(direction.astype(np.uint8), offset, length)


def recorder_of(stats: JobStats) -> Recorder:
    (section,) = parse_job_text("[j]\nrw=trimwrite\niodepth=9\nbwavgtime=1000000\niopsavgtime=1000000\n", {})
    return Recorder(build(section, Notes()), stats, 0)


IO = st.tuples(st.integers(0, 2), st.integers(0, 1 << 60), st.integers(1, 1 << 30))
BATCH = st.tuples(
    st.lists(IO, max_size=9), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 1 << 62)
)


@given(batches=st.lists(BATCH, max_size=30))
def test_against_lists(batches: list[Any]) -> None:
    """Batches begin, and random ones of those in flight end; sums and extremes are those of the lists."""
    slots, stats = Slots(9), JobStats("j", 0)
    recorder = recorder_of(stats)
    flying: dict[int, Any] = {}
    ended: list[tuple[int, int, int, int]] = []
    now = 0
    for rows, gap, took, choice in batches:
        rows = rows[: slots.free]
        if rows:
            which = slots.take(len(rows))
            assert not set(which.tolist()) & set(flying)
            slots.begin(which, ios_of(rows), now, now + took)
            flying |= {slot: (*row, now, now + took) for slot, row in zip(which.tolist(), rows, strict=True)}
        assert slots.used == len(flying)
        now += took + gap
        done = [slot for position, slot in enumerate(flying) if choice >> position & 1]
        chosen = np.array(done, dtype=np.intp)
        found = slots.ios(chosen)
        assert list(
            zip(found.direction.tolist(), found.offset.tolist(), found.length.tolist(), strict=True)
        ) == [flying[slot][:3] for slot in done]
        recorder.add(now, slots, chosen)
        slots.give_back(chosen)
        for slot in done:
            direction, _, length, start, submitted = flying.pop(slot)
            ended.append((direction, length, submitted - start, now - submitted))
    recorder.fold()
    for direction, counted in enumerate(stats.directions):
        mine = [row for row in ended if row[0] == direction]
        assert (counted.ios, counted.nbytes) == (len(mine), sum(row[1] for row in mine))
        assert (counted.slat.total, counted.clat.total) == (
            sum(row[2] for row in mine),
            sum(row[3] for row in mine),
        )
        assert counted.clat.most == max((row[3] for row in mine), default=0)


def test_more_at_once_than_the_record_has_room_for() -> None:
    depth = record_module._CAPACITY * 2 + 5
    slots, stats = Slots(depth), JobStats("j", 0)
    recorder = recorder_of(stats)
    which = slots.take(depth)
    slots.begin(which, ios_of([(0, 0, size) for size in range(depth)]), 1, 2)
    recorder.add(5, slots, which)
    recorder.fold()
    assert (stats.directions[0].ios, stats.directions[0].nbytes) == (depth, sum(range(depth)))


@pytest.mark.parametrize("slot", [4, -1, FAR])
def test_a_slot_that_is_not_there(slot: int) -> None:
    slots = Slots(4)
    which = np.array([0, slot], dtype=np.intp)
    with pytest.raises(ValueError, match="no such slot among 4"):
        slots.begin(which, ios_of([(0, 0, 1), (0, 0, 1)]), 0, 0)
    with pytest.raises(ValueError, match="no such slot among 4"):
        recorder_of(JobStats("j", 0)).add(0, slots, which)
