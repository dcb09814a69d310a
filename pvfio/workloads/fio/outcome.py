"""What goes wrong with a job, and what of it ends the job: commands that fail, blocks that do not verify, limits."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pvfio.workloads.fio.job import DIRECTIONS, Job
from pvfio.workloads.fio.stats import JobStats
from pvfio.workloads.fio.verify import Failure

__all__ = ["Outcome", "Place"]

_MOST_FAILURES: Final = 1000  # lines kept
_GOES_ON: Final = {"read": ("read", "io", "all"), "write": ("write", "io", "all"), "trim": ("io", "all")}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job's file is: ``base`` and ``size`` in bytes of the namespace, and what it is called."""

    name: str
    base: int
    size: int


class Outcome:
    """The errors of a job, in its statistics; ``said`` is called with each line about one."""

    def __init__(
        self, job: Job, place: Place, stats: JobStats, block_size: int, said: Callable[[str], None] | None
    ) -> None:
        self._job, self._place, self._stats = job, place, stats
        self._block_size = block_size
        self._said = said or (lambda line: None)
        self._unverified = ""

    def fail(self, number: int, reason: str) -> None:
        """The job ends with this error, unless it has one."""
        if not self._stats.error:
            self._stats.error, self._stats.reason = number, f"{os.strerror(number)}; {reason}"

    def line(self, text: str) -> None:
        """Something to be said, of which some are kept."""
        if len(self._stats.failures) < _MOST_FAILURES:
            self._stats.failures.append(text)
            self._said(text)

    def limit(self, number: int, reason: str) -> None:
        """A limit was not kept: that is said, and the job ends."""
        if not self._stats.error:
            self._said(f"{self._job.name}: {reason}")
        self.fail(number, reason)

    def command(self, direction: int, offset: int, status: str) -> None:
        """A command failed. ``offset`` is of the job's file."""
        self._stats.failed += 1
        what = DIRECTIONS[direction]
        lba = (offset + self._place.base) // self._block_size
        self.line(f"{what} failed at file {self._place.name} offset {offset} (LBA {lba}): {status}")
        if self._job.continue_on_error not in _GOES_ON[what]:
            self.fail(errno.EIO, f"{what} LBA {lba}: {status}")

    def verified(self, looked: int, failures: Sequence[Failure]) -> None:
        """So many blocks were looked at, and these are not what was written."""
        self._stats.verified += looked
        self._stats.failed += len(failures)
        for failure in failures:
            self.line(
                f"{self._job.verify}: verify failed at file {self._place.name} "
                f"offset {failure.offset - self._place.base}, length {failure.length} "
                f"(LBA {failure.offset // self._block_size}): {failure.why}"
            )
        if not failures:
            return
        first = f"verify: LBA {failures[0].offset // self._block_size}"
        if self._job.verify_fatal and self._job.continue_on_error not in ("verify", "all"):
            self.fail(errno.EILSEQ, first)
        elif not self._stats.error:
            self._unverified = first

    def finish(self) -> None:
        """A job with blocks that did not verify has failed, though it went on."""
        if self._unverified and self._job.continue_on_error not in ("verify", "all"):
            self.fail(errno.EILSEQ, self._unverified)
