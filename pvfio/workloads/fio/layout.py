"""Which bytes of a namespace a job's file is.

A name below ``/dev/`` means the whole namespace (``/dev/nvme0n2`` the second one). Every other file, and the files fio
would make for jobs without ``filename`` ("job.0.0"), get ranges of the first namespace one after the other, of the size
the job asks for; the same name is the same range. A file without a size is the whole namespace, as is every file where
ranges of their own do not fit and nothing is verified.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pvfio.workloads.fio.job import Job
from pvfio.workloads.fio.options import Notes
from pvfio.workloads.fio.outcome import Place

__all__ = ["Clone", "Layout", "clones", "space_needed"]

_DEVICE: Final = re.compile(r"/dev/nvme\d+n(\d+)")
_ALIGN: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Clone:
    """One of a job's ``numjobs``: ``number`` from 0 within the job, ``thread`` from 1 among all, its own ``seed``."""

    job: Job
    number: int
    thread: int
    group: int
    wave: int
    seed: int

    @property
    def file(self) -> str:
        """What its file is called."""
        name = self.job.filename or f"{self.job.name}.{self.number}.0"
        return (
            name.replace("$jobname", self.job.name)
            .replace("$jobnum", str(self.number))
            .replace("$filenum", "0")
        )


def clones(jobs: Sequence[Job], *, entropy: int) -> list[Clone]:
    """Every job as often as it says, with groups and waves: a wave begins when the one before it ended
    (``stonewall``), a group is reported together (``new_group``, ``stonewall``).
    """
    found: list[Clone] = []
    group = wave = 0
    for index, job in enumerate(jobs):
        if index and (job.stonewall or job.new_group):
            group += 1
        if index and job.stonewall:
            wave += 1
        base = job.randseed or (0x5EED if job.randrepeat else entropy)
        for number in range(job.numjobs):
            thread = len(found) + 1
            found.append(Clone(job, number, thread, group, wave, (base * 1_000_003 + thread) & (1 << 63) - 1))
    return found


def _extent(clone: Clone) -> int:
    """Bytes its file needs; 0: all there are."""
    job = clone.job
    if not job.size:
        return 0
    end = job.offset + job.offset_increment * (job.numjobs - 1) + job.size
    return -(-end // _ALIGN) * _ALIGN


def _is_device(name: str) -> bool:
    return name.startswith("/dev/")


def _sizes(found: Sequence[Clone]) -> dict[str, int]:
    """Bytes each file needs."""
    sizes: dict[str, int] = {}
    for clone in found:
        sizes[clone.file] = max(sizes.get(clone.file, 0), _extent(clone))
    return sizes


def space_needed(found: Sequence[Clone]) -> int:
    """Bytes a namespace needs for all files to have ranges of their own, where jobs name sizes."""
    sizes = _sizes(found)
    devices = max((size for name, size in sizes.items() if _is_device(name)), default=0)
    return max(devices, sum(size for name, size in sizes.items() if not _is_device(name)))


@dataclass
class Layout:
    """Ranges of namespaces whose sizes are ``capacities`` by number."""

    capacities: dict[int, int]
    notes: Notes
    _files: dict[str, tuple[int, int]] = field(default_factory=dict)
    _next: int = 0

    def plan(self, found: Sequence[Clone]) -> None:
        """Gives every file its range. ``ValueError`` where there is not room enough."""
        sizes = {name: size for name, size in _sizes(found).items() if not _is_device(name)}
        whole = self.capacities[min(self.capacities)]
        apart = sum(sizes.values()) <= whole
        verified = any(clone.job.verify for clone in found)
        if not apart and len(sizes) > 1 and not verified:
            self.notes.add("the files of all jobs do not fit beside each other: they share the namespace")
        for name, size in sizes.items():
            if size > whole or (not apart and verified):
                raise ValueError(
                    f"{name} needs {size} bytes of a namespace of {whole}: use --size or a smaller size="
                )
            if not size or not apart:
                self._files[name] = (0, whole)
            else:
                self._files[name] = (self._next, size)
                self._next += size

    def place(self, clone: Clone) -> tuple[int, Place]:
        """Namespace and range of a job. ``ValueError`` for what is outside."""
        name, job = clone.file, clone.job
        nsid = min(self.capacities)
        if _is_device(name):
            match = _DEVICE.fullmatch(name)
            if match is not None and int(match[1]) in self.capacities:
                nsid = int(match[1])
            else:
                self.notes.add(f"filename={name} is namespace {nsid}")
            begin, extent = 0, self.capacities[nsid]
        else:
            begin, extent = self._files[name]
        offset = job.offset
        if job.offset_percent is not None:
            offset = int(extent * job.offset_percent / 100) // 4096 * 4096
        offset += job.offset_increment * clone.number
        size = job.size or extent - offset
        if job.size_percent is not None:
            size = int(extent * job.size_percent / 100)
        if offset + size > extent and offset < extent:
            size = extent - offset
        if offset >= extent or size <= 0:
            raise ValueError(f"job {job.name}: offset {offset} is outside of the {extent} bytes of {name}")
        return nsid, Place(name, begin + offset, size)
