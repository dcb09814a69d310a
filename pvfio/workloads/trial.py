"""One trial of one operation: memory the device works on, a model of what that memory must become, and the
comparison of both.

A thread owns four areas of DMA memory, each between two guards. For a trial all are filled with random bytes;
the operation's test changes the *model*, ordinary memory, by means of its own (numpy, Python), and lets the
device change the areas. Then every byte of every area, guards too, must be the model's, and every value the
device returned the expected one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import trio

from pvfio.workloads.dmatest import GUARD, TestThread, attempt
from pvfio.workloads.pattern import MAX_REPORTED, Mismatches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.drivers.dsa import WorkQueue
    from pvfio.vfio import DmaBuffer
    from pvfio.workloads.dmatest import DmatestParams

__all__ = ["AREAS", "Area", "Operation", "OperationThread", "Trial"]

AREAS = 4

Result = TypeVar("Result")


@dataclass(slots=True)
class Area:
    """DMA memory, what it must contain, and where a device finds the first byte after the guard."""

    name: str
    real: NDArray[np.uint8]
    model: NDArray[np.uint8]
    iova: int
    buffer: DmaBuffer


class Trial:
    """What the test of an operation works with: ``wq``, ``rng``, sizes and places, and what it expects."""

    def __init__(self, thread: OperationThread) -> None:
        self.wq: WorkQueue = thread.wq
        self.rng = thread.rng
        self.params: DmatestParams = thread.params
        self.areas = thread.areas
        self.where = (0, 0, 0)
        self.device_seconds = 0.0
        self.problems: list[str] = []

    @property
    def deadline(self) -> float:
        """Of one operation, in seconds."""
        return self.params.deadline

    def length(self, multiple: int = 1, most: int | None = None) -> int:
        """A length in bytes as the parameters want it, a multiple of ``multiple``, not above ``most``."""
        params = self.params
        limit = min(params.test_buf_size, most or params.test_buf_size)
        unit = math.lcm(multiple, 1 << max(params.alignment, 0))
        if unit > limit:  # nothing is both aligned and whole blocks
            unit = multiple
        top = limit // unit
        if params.transfer_size:
            units = min(params.transfer_size // unit, top)
        else:
            units = top if params.norandom else int(self.rng.integers(1, max(top, 1) + 1))
        return max(units, 1) * unit

    def place(self, length: int, multiple: int = 1) -> int:
        """An offset at which ``length`` bytes fit into the test buffer."""
        if self.params.norandom:
            return 0
        unit = max(multiple, 1 << max(self.params.alignment, 0))
        free = max(self.params.test_buf_size - length, 0)
        return int(self.rng.integers(0, free + 1)) // unit * unit

    def at(self, area: int, offset: int = 0) -> int:
        """The IOVA of a byte of an area."""
        return self.areas[area].iova + offset

    def data(self, area: int, offset: int, size: int) -> NDArray[np.uint8]:
        """Bytes of an area's model: read them, or say here what they become."""
        return self.areas[area].model[GUARD + offset :][:size]

    def real(self, area: int, offset: int, size: int) -> NDArray[np.uint8]:
        """Bytes of an area as the device has left them."""
        return self.areas[area].real[GUARD + offset :][:size]

    def set(self, area: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Puts input of the operation into an area and its model."""
        self.data(area, offset, data.size)[:] = data
        self.real(area, offset, data.size)[:] = data

    def chance(self, share: float) -> bool:
        """True in ``share`` of all cases."""
        return bool(self.rng.random() < share)

    async def device(self, work: Awaitable[Result]) -> Result:
        """Awaits the device; only this time counts as the test's."""
        began = time.perf_counter()
        try:
            return await work
        finally:
            self.device_seconds += time.perf_counter() - began

    def expect(self, what: str, got: object, expected: object) -> None:
        """A value the device has returned, and the right one."""
        if got != expected:
            self.problems.append(f"{what} mismatch! Expected {_show(expected)}, got {_show(got)}")

    def verdict(self) -> Mismatches:
        """Wrong values and wrong bytes."""
        found = Mismatches(len(self.problems), self.problems[:MAX_REPORTED])
        for area in self.areas:
            found.add(_compare(area))
        return found


def _show(value: object) -> str:
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _compare(area: Area) -> Mismatches:
    if np.array_equal(area.real, area.model):
        return Mismatches()
    wrong = np.flatnonzero(area.real != area.model)
    lines = [
        f"{area.name}[{int(i) - GUARD:#x}] mismatch! "
        f"Expected {int(area.model[i]):02x}, got {int(area.real[i]):02x}"
        for i in wrong[:MAX_REPORTED]
    ]
    return Mismatches(int(wrong.size), lines)


Test = Callable[[Trial], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Operation:
    """A test, the opcode the device must have, the smallest test buffer, and how many bytes its areas have for
    each 1,024 of the test buffer.
    """

    test: Test
    opcode: int
    smallest: int = 1
    room: int = 1024


@dataclass(slots=True)
class OperationThread(TestThread):
    """A thread of dmatest that tries one operation. ``room`` is how many bytes an area has for each 1,024
    of the test buffer.
    """

    trial: Test | None = None
    room: int = 1024
    areas: list[Area] = field(default_factory=list)

    async def allocate(self) -> None:
        """The areas."""
        container = self.wq.driver.device.container
        size = -(-self.params.test_buf_size * self.room // 1024) + 2 * GUARD
        try:
            for number in range(AREAS):
                buffer = await container.alloc(size)
                assert buffer.iova is not None
                name = ("src", "dst", "src2", "dst2")[number] + "buf"
                real = np.asarray(buffer)[:size]
                self.areas.append(Area(name, real, np.zeros_like(real), buffer.iova + GUARD, buffer))
        except BaseException:
            await self.free()
            raise
        if self.started is not None:
            self.started(self.areas[0].iova - GUARD)

    async def free(self) -> None:
        """Gives the areas back. Finishes when cancelled."""
        with trio.CancelScope(shield=True):
            for area in self.areas:
                await self.wq.driver.device.container.free(area.buffer)
        self.areas = []

    async def test(self) -> None:
        """One trial."""
        assert self.trial is not None
        summary = self.summary
        began = time.perf_counter()
        trial = Trial(self)
        try:
            for area in self.areas:
                area.model[:] = np.frombuffer(self.rng.bytes(area.model.size), np.uint8)
                area.real[:] = area.model
            failure = await attempt(self.trial, trial)
            found = Mismatches() if failure or self.params.noverify else trial.verdict()
        finally:
            self.excluded += time.perf_counter() - began - trial.device_seconds
        summary.tests += 1
        summary.nbytes += trial.where[2]
        self.conclude(failure, trial.where, found)
