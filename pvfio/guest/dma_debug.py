"""Checks of how a driver uses the DMA API: every map, unmap and sync, against what the rules allow.

Found: memory unmapped that is not mapped, or twice; with another size, direction, function, number of entries or
(coherent memory) CPU address than it was mapped with; syncs outside a mapping, after its end, in a direction it
has not, or of memory whose owner is not who gives it away; memory a device may write mapped a second time; and
mappings left when the driver lets go of its device. Each report names the place of the offence and that of the
map (and of the first unmap). The rules are those of the kernel's DMA API and its debugging aid (Linux
Documentation/core-api/dma-api.rst part III); who owns memory between syncs is dma-api-howto.rst's "streaming
mappings", and nothing Linux checks.

Not modelled: limits of segments, mappings of stack or read-only memory, unchecked mapping errors (an error is an
exception here), stores of the CPU into memory the device owns.
"""

from __future__ import annotations

import logging
import sys
from bisect import bisect_right, insort
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from pvfio.errors import PvfioError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["CallSite", "DmaDebug", "DmaMisuse", "DmaMisuseError", "LiveMapping", "Rule"]

_log = logging.getLogger("pvfio.guest.dma_debug")

_CACHE_LINE_SHIFT = 6
_DIRECTIONS = ("bidirectional", "to device", "from device", "none")
_BIDIRECTIONAL, _TO_DEVICE, _FROM_DEVICE = range(3)
_COHERENT = "coherent"

CallSite = tuple[str, int, str]
"""File, line and function."""


class Rule(StrEnum):
    """What was broken."""

    UNMAP_UNKNOWN = "unmap of what is not mapped"
    DOUBLE_UNMAP = "unmapped twice"
    WRONG_SIZE = "unmapped with another size"
    WRONG_DIRECTION = "unmapped with another direction"
    WRONG_FUNCTION = "unmapped by another function"
    WRONG_MEMORY = "freed with another CPU address"
    WRONG_COUNT = "another number of entries"
    SYNC_UNKNOWN = "sync of what is not mapped"
    SYNC_AFTER_UNMAP = "sync after unmap"
    SYNC_RANGE = "sync beyond the mapping"
    SYNC_DIRECTION = "sync in another direction"
    SYNC_OWNER = "sync of memory its owner has already"
    OVERLAP = "mapped twice"
    LEAK = "left mapped"


def _place(site: CallSite) -> str:
    return f"{site[0]}:{site[1]} in {site[2]}"


@dataclass(frozen=True)
class DmaMisuse:
    """One report. ``at`` is where it happened, ``mapped_at`` and ``unmapped_at`` where the memory was (un)mapped.

    ``address`` and ``size`` (bytes) are what the driver named; ``detail`` is the difference in words.
    """

    rule: Rule
    device: str
    address: int
    size: int
    detail: str
    at: CallSite
    mapped_at: CallSite | None = None
    unmapped_at: CallSite | None = None

    def __str__(self) -> str:
        text = f"{self.device}: {self.rule}: dma address {self.address:#x} length {self.size:#x}"
        if self.detail:
            text += f": {self.detail}"
        text += f", at {_place(self.at)}"
        if self.mapped_at is not None:
            text += f"; mapped at {_place(self.mapped_at)}"
        if self.unmapped_at is not None:
            text += f"; unmapped at {_place(self.unmapped_at)}"
        return text


class DmaMisuseError(PvfioError):
    """Raised instead of going on, where ``DmaDebug(raises=True)``; ``reports`` are all that one call earned."""

    def __init__(self, reports: Iterable[DmaMisuse]) -> None:
        self.reports = tuple(reports)
        super().__init__("; ".join(str(report) for report in self.reports))


@dataclass(eq=False)
class LiveMapping:
    """A mapping as the driver made it. ``cpu`` names its memory, ``cpu_owned`` are the [start, end) the CPU has;
    ``leaked`` once that was reported.
    """

    device: str
    kind: str
    address: int
    size: int
    direction: int
    cpu: int
    entries: int
    at: CallSite
    leaked: bool = False
    cpu_owned: list[tuple[int, int]] = field(default_factory=list)


class DmaDebug:
    """Remembers the mappings of every device and judges what is done with them.

    A report is logged as a warning and kept in ``reports``; with ``raises`` an unmap or a sync raises
    ``DmaMisuseError`` as well, before anything is done. ``remember``: how many ended mappings are known, to tell a
    second unmap, or a sync that comes too late, from an address that never was. ``keep``: how many reports;
    ``count`` counts all.
    """

    def __init__(self, *, raises: bool = False, remember: int = 4096, keep: int = 1024) -> None:
        self.raises = raises
        self.reports: deque[DmaMisuse] = deque(maxlen=keep)
        self.count = 0
        self._live: dict[tuple[str, int], list[LiveMapping]] = {}
        # The addresses of each device's mappings in order, for syncs of a part.
        self._order: dict[str, list[int]] = {}
        self._lines: Counter[int] = Counter()
        self._remember = remember
        self._ended: dict[tuple[str, int], tuple[LiveMapping, CallSite]] = {}
        self._last: LiveMapping | None = None

    def __len__(self) -> int:
        return sum(len(found) for found in self._live.values())

    def mappings(self, device: str | None = None) -> Iterator[LiveMapping]:
        """What is mapped now, of one device or of all; the oldest of an address first."""
        for (name, _), found in self._live.items():
            if device is None or name == device:
                yield from found

    def mapped(
        self,
        device: str,
        kind: str,
        address: int,
        size: int,
        direction: int,
        *,
        cpu: int = 0,
        entries: int = 1,
    ) -> None:
        """A mapping was made.

        ``kind`` is its function ("single", "page", "scatter-gather", "coherent"), ``cpu`` an address that names its
        memory (0: unknown), ``entries`` the length of the list. A report is only a report here: the mapping exists.
        """
        here = _caller()
        new = LiveMapping(device, kind, address, size, direction, cpu, entries, here)
        line = self._know(new)
        self._ended.pop((device, address), None)
        if line is not None and self._lines[line] > 1:
            other = self._other_writer(new, line)
            detail = f"a device may write this memory through {other.address:#x} of {other.device} already"
            self._record([DmaMisuse(Rule.OVERLAP, device, address, size, detail, here, other.at)])

    def unmapping(
        self,
        device: str,
        kind: str,
        address: int,
        size: int,
        direction: int,
        *,
        cpu: int = 0,
        entries: int = 1,
    ) -> None:
        """A mapping is about to end; the arguments are what the driver says of it, as for ``mapped``.

        Raises ``DmaMisuseError``; the mapping lives on then.
        """
        here = _caller()
        self._last = None
        found = self._live.get((device, address))
        if not found:
            self._report([self._unknown(device, address, size, here, Rule.DOUBLE_UNMAP, Rule.UNMAP_UNKNOWN)])
            return
        # The same memory may be mapped again and again at one address (identity): take what fits best.
        said = (size, kind, direction, entries, cpu)
        mapping = max(found, key=lambda known: sum(map(_same, _facts(known), said)))
        self._report(_differences(mapping, kind, size, direction, cpu, entries, here))
        self._forget(mapping)
        self._ended[device, address] = mapping, here
        self._last = mapping
        if len(self._ended) > self._remember:
            del self._ended[next(iter(self._ended))]

    def unmap_refused(self) -> None:
        """The unmap that was announced last came to nothing: the mapping lives on."""
        mapping, self._last = self._last, None
        if mapping is not None:
            self._ended.pop((mapping.device, mapping.address), None)
            self._know(mapping)

    def syncing(
        self,
        device: str,
        kind: str,
        address: int,
        size: int,
        direction: int,
        *,
        to_cpu: bool,
        entries: int = 1,
    ) -> None:
        """Memory is about to change hands: to the CPU, or to the device. A part of a mapping may.

        Raises ``DmaMisuseError``; the owner is who it was then.
        """
        here = _caller()
        mapping = self._containing(device, address)
        if mapping is None:
            self._report(
                [self._unknown(device, address, size, here, Rule.SYNC_AFTER_UNMAP, Rule.SYNC_UNKNOWN)]
            )
            return
        wrong: list[tuple[Rule, str]] = []
        end = address + size
        if end > mapping.address + mapping.size:
            wrong.append(
                (Rule.SYNC_RANGE, f"the mapping is {mapping.size:#x} bytes from {mapping.address:#x} on")
            )
            end = mapping.address + mapping.size
        if direction != mapping.direction and mapping.direction != _BIDIRECTIONAL:
            wrong.append((Rule.SYNC_DIRECTION, _two(mapping.direction, direction)))
        if kind == "scatter-gather" == mapping.kind and entries != mapping.entries:
            wrong.append((Rule.WRONG_COUNT, f"mapped {mapping.entries}, synced {entries}"))
        owned = mapping.cpu_owned
        has = [(max(start, address), min(stop, end)) for start, stop in owned]
        ours = sum(stop - start for start, stop in has if start < stop)
        if to_cpu and ours:
            wrong.append((Rule.SYNC_OWNER, "the CPU has it"))
        elif not to_cpu and ours < end - address:
            wrong.append((Rule.SYNC_OWNER, "the device has it"))
        self._report(
            DmaMisuse(rule, device, address, size, detail, here, mapping.at) for rule, detail in wrong
        )
        mapping.cpu_owned = list(_without(owned, address, end))
        if to_cpu:
            mapping.cpu_owned.append((address, end))

    def unbound(self, device: str) -> None:
        """A driver let go of its device: what it left mapped is a leak, told in one report with the oldest as example.

        The mappings stay known, as they stay mapped, and are not reported again. Nobody is left to raise to.
        """
        left = [mapping for mapping in self.mappings(device) if not mapping.leaked]
        if not left:
            return
        for mapping in left:
            mapping.leaked = True
        first = left[0]
        detail = f"one of {len(left)}, mapped as {first.kind} {_DIRECTIONS[first.direction]}"
        self._record([DmaMisuse(Rule.LEAK, device, first.address, first.size, detail, _caller(), first.at)])

    def _know(self, mapping: LiveMapping) -> int | None:
        """Keeps a mapping; the number of its cache line where a device may write it."""
        found = self._live.setdefault((mapping.device, mapping.address), [])
        if not found:
            insort(self._order.setdefault(mapping.device, []), mapping.address)
        found.append(mapping)
        line = _written_line(mapping)
        if line is not None:
            self._lines[line] += 1
        return line

    def _forget(self, mapping: LiveMapping) -> None:
        key = mapping.device, mapping.address
        found = self._live[key]
        found.remove(mapping)
        if not found:
            del self._live[key]
            order = self._order[mapping.device]
            del order[bisect_right(order, mapping.address) - 1]
        line = _written_line(mapping)
        if line is not None:
            self._lines[line] -= 1
            if not self._lines[line]:
                del self._lines[line]

    def _containing(self, device: str, address: int) -> LiveMapping | None:
        """The mapping that holds a byte: the nearest that begins at or below it and reaches it."""
        order = self._order.get(device, [])
        for index in range(bisect_right(order, address) - 1, -1, -1):
            for mapping in self._live[device, order[index]]:
                if address < mapping.address + mapping.size:
                    return mapping
        return None

    def _other_writer(self, new: LiveMapping, line: int) -> LiveMapping:
        return next(
            mapping for mapping in self.mappings() if mapping is not new and _written_line(mapping) == line
        )

    def _unknown(
        self, device: str, address: int, size: int, here: CallSite, again: Rule, never: Rule
    ) -> DmaMisuse:
        ended = self._ended.get((device, address))
        if ended is None:
            return DmaMisuse(never, device, address, size, "", here)
        mapping, unmapped_at = ended
        return DmaMisuse(again, device, address, size, "", here, mapping.at, unmapped_at)

    def _record(self, reports: Iterable[DmaMisuse]) -> None:
        for report in reports:
            self.count += 1
            self.reports.append(report)
            _log.warning("%s", report)

    def _report(self, wrong: Iterable[DmaMisuse]) -> None:
        reports = list(wrong)
        self._record(reports)
        if reports and self.raises:
            raise DmaMisuseError(reports)


def _differences(
    mapping: LiveMapping, kind: str, size: int, direction: int, cpu: int, entries: int, here: CallSite
) -> Iterator[DmaMisuse]:
    """How an unmap differs from the map."""
    wrong: list[tuple[Rule, str]] = []
    if size != mapping.size:
        wrong.append((Rule.WRONG_SIZE, f"mapped {mapping.size:#x} bytes, unmapped {size:#x}"))
    if kind != mapping.kind:
        wrong.append((Rule.WRONG_FUNCTION, f"mapped as {mapping.kind}, unmapped as {kind}"))
    elif kind == _COHERENT and cpu != mapping.cpu:
        wrong.append((Rule.WRONG_MEMORY, f"allocated {mapping.cpu:#x}, freed {cpu:#x}"))
    elif entries != mapping.entries:
        wrong.append((Rule.WRONG_COUNT, f"mapped {mapping.entries}, unmapped {entries}"))
    if direction != mapping.direction:
        wrong.append((Rule.WRONG_DIRECTION, _two(mapping.direction, direction)))
    for rule, detail in wrong:
        yield DmaMisuse(rule, mapping.device, mapping.address, size, detail, here, mapping.at)


def _written_line(mapping: LiveMapping) -> int | None:
    """The first cache line of memory that a device may write; None where it may not, or the memory is unknown."""
    return mapping.cpu >> _CACHE_LINE_SHIFT if mapping.cpu and mapping.direction != _TO_DEVICE else None


def _two(mapped: int, said: int) -> str:
    name = _DIRECTIONS[said] if 0 <= said < len(_DIRECTIONS) else str(said)
    return f"mapped {_DIRECTIONS[mapped]}, now {name}"


def _facts(mapping: LiveMapping) -> tuple[int, str, int, int, int]:
    return mapping.size, mapping.kind, mapping.direction, mapping.entries, mapping.cpu


def _same(known: object, said: object) -> bool:
    return known == said


def _without(owned: list[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The intervals without what lies in [start, end)."""
    for first, last in owned:
        if first < min(last, start):
            yield first, min(last, start)
        if max(first, end) < last:
            yield max(first, end), last


def _caller() -> CallSite:
    """Who called the guest kernel: the first frame that is not part of it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pvfio.guest."):
        frame = frame.f_back
    code = frame.f_code
    return code.co_filename, frame.f_lineno, code.co_name
