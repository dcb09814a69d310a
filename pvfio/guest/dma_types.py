"""What the DMA API and its callers talk in: directions, attributes, segments of lists, and the hook of its checks.

Numbers are Linux's (include/linux/dma-direction.h, dma-mapping.h). Not modelled: attributes that choose between kinds
of memory or of CPU mapping.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from pvfio.memory import DmaBuffer

__all__ = [
    "DMA_ATTR_SKIP_CPU_SYNC",
    "DMA_ATTR_WEAK_ORDERING",
    "Direction",
    "DmaDebugHook",
    "DmaSegment",
    "segments_of",
    "span",
]

DMA_ATTR_WEAK_ORDERING = 1 << 1
"""Accepted; it says nothing to this machine."""
DMA_ATTR_SKIP_CPU_SYNC = 1 << 5
"""The caller syncs itself: an unmap copies nothing back from a bounce buffer."""

_OFFSET = 4095


class Direction(IntEnum):
    """Whom the data is for (Linux ``enum dma_data_direction``)."""

    BIDIRECTIONAL = 0
    TO_DEVICE = 1
    FROM_DEVICE = 2
    NONE = 3


class DmaSegment(NamedTuple):
    """A piece of a mapped list, as the device sees it: DMA address and bytes."""

    address: int
    length: int


class DmaDebugHook(Protocol):
    """Who is told of every map, unmap and sync. ``device`` is the PCI name; ``kind`` is "single", "page",
    "scatter-gather" or "coherent"; addresses are DMA addresses, sizes bytes, ``cpu`` names the memory, ``entries``
    is the length of the list (of segments; address and size then span them all).

    ``mapped`` comes after a success, ``unmapping`` and ``syncing`` before anything is done, ``unmap_refused`` after
    an ``unmapping`` that came to nothing, ``unbound`` when the driver lets go of its device. What it raises goes to the
    driver.
    """

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
    ) -> None: ...
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
    ) -> None: ...
    def unmap_refused(self) -> None: ...
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
    ) -> None: ...
    def unbound(self, device: str) -> None: ...


def segments_of(entries: Sequence[DmaBuffer], at: int, max_segment: int) -> list[DmaSegment]:
    """What the device sees of entries that lie, in whole pages each, one after the other from ``at`` on."""
    segments: list[DmaSegment] = []
    joins = False
    for buffer in entries:
        offset, size = buffer.vaddr & _OFFSET, buffer.nbytes
        if joins and not offset and segments[-1].length + size <= max_segment:
            segments[-1] = DmaSegment(segments[-1].address, segments[-1].length + size)
        else:
            segments.append(DmaSegment(at + offset, size))
        at += offset + size + _OFFSET & ~_OFFSET
        joins = not (offset + size) & _OFFSET
    return segments


def span(segments: Sequence[DmaSegment]) -> tuple[int, int]:
    """First address, and bytes up to the end of the last segment. Identity's may lie anywhere."""
    start = segments[0].address
    if any(after.address < before.address for before, after in itertools.pairwise(segments)):
        return start, sum(segment.length for segment in segments)
    return start, segments[-1].address + segments[-1].length - start
