"""Where a group's devices make DMA for the kernel: identity, or an IOVA space with strict or lazy flushing.

Identity: a DMA address is a GPA and nothing is mapped. Strict: every mapping has IOVAs of its own, and an unmap
returns when no device can reach the memory any more. Lazy: an unmap clears the entries and returns, and a
flush of the whole domain follows later; until then a device may still reach the memory through its IOTLB.

Not modelled: the choice per machine policy (untrusted devices, kernel command line); whoever makes a group says.
"""

from __future__ import annotations

import errno
import typing
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Literal

from pvfio.errors import DmaMappingError, PageTableError

if TYPE_CHECKING:
    import trio

    from pvfio.guest.paging_domain import PagingDomain
    from pvfio.guest.pviommu import PvIommu
    from pvfio.memory import GuestMemory

__all__ = ["DmaDomain", "DomainKind", "Spawn", "check_kind"]

DomainKind = Literal["identity", "strict", "lazy"]
Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], "trio.CancelScope"]

_PAGE = 4096


def check_kind(kind: str) -> DomainKind:
    """The kind, if it is one. Raises ``ValueError``."""
    if kind not in typing.get_args(DomainKind):
        raise ValueError(f"a default domain is identity, strict or lazy, not {kind!r}")
    return typing.cast("DomainKind", kind)


class DmaDomain:
    """The IOVA space of one group's devices. ``domain`` is the paging domain, None for identity.

    Sizes are bytes; ``limit`` is the highest address a device can put on the bus.
    """

    def __init__(
        self, memory: GuestMemory, iommu: PvIommu | None, kind: DomainKind, *, spawn: Spawn | None = None
    ) -> None:
        self.memory = memory
        self.kind: DomainKind = kind
        self.domain: PagingDomain | None = None
        self._spawn = spawn
        if kind != "identity":
            if iommu is None:
                raise DmaMappingError(errno.ENODEV, "make a DMA domain", "no IOMMU")
            self.domain = iommu.paging_domain()
        self._live: dict[int, tuple[int, list[int]]] = {}
        self._next = 0xFEE0_0000

    def make_lazy(self) -> None:
        """From strict to lazy, with all its mappings."""
        self.kind = "lazy"

    def map_buffer(self, vaddr: int, size: int, perm: int, limit: int) -> int:
        """Maps process memory of one allocation; it stays pinned while it is mapped. Raises ``OSError``."""
        offset = vaddr % _PAGE
        whole = -(-(offset + size) // _PAGE) * _PAGE
        runs = self.memory.runs(vaddr - offset, whole)
        if self.domain is None:
            if len(runs) != 1 or runs[0][0] + whole - 1 > limit:
                raise OSError(errno.EIO, "not contiguous, or out of reach")
            return runs[0][0] + offset
        pin = self.memory.pin(vaddr - offset, whole)
        self._next -= whole
        iova = self._next
        try:
            self.domain.map_runs(iova, runs, perm)
        except PageTableError:
            self.memory.unpin(pin)
            raise
        self._live[iova] = whole, [pin]
        return iova + offset

    def unmap(self, address: int, size: int) -> None:
        """Ends a mapping. Raises ``OSError`` EINVAL for what is not mapped so; nothing has changed then."""
        if self.domain is None:
            return
        offset = address % _PAGE
        whole, pins = self._live.get(address - offset, (0, []))
        if whole != -(-(offset + size) // _PAGE) * _PAGE:
            raise OSError(errno.EINVAL, "no such mapping")
        del self._live[address - offset]
        self.domain.unmap(address - offset, whole)
        for pin in pins:
            self.memory.unpin(pin)

    def close(self) -> None:
        """Frees it. Raises ``IommuError`` EBUSY while a device is in it."""
        if self.domain is not None:
            self.domain.free()
            for _, pins in self._live.values():
                for pin in pins:
                    self.memory.unpin(pin)
            self._live.clear()
