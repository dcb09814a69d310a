"""The checker of ownership moves: reads a rogue device's log and memory, and knows nothing of the IOMMU."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pvfio.devices.rogue import RogueDevice

MORE = 2000

Words = npt.NDArray[np.uint64]


class Watch:
    """Where the words of a device that never stops may be, and where they are.

    ``places`` are the memory its window may lead to and memory it must not lead to, all of the window's size; ``at``
    is where it leads now, None: nowhere.
    """

    def __init__(self, rogue: RogueDevice, places: dict[str, Words], at: str | None) -> None:
        self.rogue = rogue
        self.places = places
        self.at = at
        self.aborted = 0
        self.landed = 0

    def run(self) -> None:
        """Until some more writes have ended."""
        until = self.rogue.stats().next + MORE
        while self.rogue.stats().next < until:
            os.sched_yield()

    def step(self, action: Callable[[], object], to: str | None) -> None:
        """Does what makes the window lead to ``to``, and checks every write from before it until after it."""
        since = self.begin()
        action()
        self.end(since, to)

    def begin(self) -> int:
        """Where ``end`` begins to check. What the window does not lead to has stayed empty since the last check."""
        # Held for a moment, so that no write is half counted.
        self.rogue.engine.pause()
        try:
            for name, place in self.places.items():
                assert name == self.at or not place.any(), f"a write landed in {name}, which is out of reach"
            since = self.rogue.stats().next
        finally:
            self.rogue.engine.unpause()
        self.run()
        return since

    def end(self, since: int, to: str | None) -> None:
        """What made the window lead to ``to`` has returned. Raises ``AssertionError``.

        Writes land in the old memory, then nowhere, then in the new, each for one stretch of time; from the return on
        all of them where they should.
        """
        returned = self.rogue.stats().next
        self.run()
        self.rogue.engine.pause()
        try:
            log = self.rogue.log(since)
            # What a reset cancels the device has never sent.
            sent = np.flatnonzero(log != RogueDevice.CANCELLED)
            numbers, landed = since + sent, log[sent] == RogueDevice.LANDED
            # One may have been on its way when it returned.
            settled = landed[numbers > returned]
            assert settled.all() if to else not settled.any(), f"not every write ends as it should ({to})"
            self._places(since, numbers, landed, to)
            self.aborted += int(np.count_nonzero(log == RogueDevice.ABORTED))
            self.landed += int(np.count_nonzero(landed))
            self.at = to
            for name, place in self.places.items():
                if name != to:
                    place[:] = 0
        finally:
            self.rogue.engine.unpause()

    def _places(
        self, since: int, numbers: npt.NDArray[np.int64], landed: npt.NDArray[np.bool_], to: str | None
    ) -> None:
        lost = np.flatnonzero(~landed)
        if len(lost):
            first, last = int(lost[0]), int(lost[-1]) + 1
            assert not landed[first:last].any(), "it was let in, kept out, and let in again"
            early, late = numbers[:first], numbers[last:]
        else:
            # In one step, or not at all: the old memory says when.
            border = int(self.places[self.at].max()) if self.at and self.at != to else since
            early, late = numbers[numbers < border], numbers[numbers >= border]
        assert self.at or not len(early), "a write landed in front of the move"
        for name, place in self.places.items():
            wanted = np.zeros(len(place), np.uint64)
            for where, some in ((self.at, early), (to, late)):
                if where == name:
                    np.maximum.at(wanted, some % len(place), (some + 1).astype(np.uint64))
            written = wanted > 0
            assert (place[written] == wanted[written]).all(), f"writes are missing in {name}"
            limit = since if name == self.at else 0
            assert (place[~written] <= limit).all(), f"writes in {name} that should not be there"
