"""What a container may map: the number of its mappings, and the process's account of locked memory.

Not modelled: the account as an rlimit of a real process; CAP_IPC_LOCK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pvfio.abi import ffi, lib

__all__ = ["LockedMemory", "Type1Limits"]

_NO_LIMIT: int = lib.PV_TYPE1_NO_LIMIT


@dataclass(frozen=True)
class Type1Limits:
    """``dma_entry_limit``: mappings per container. ``memlock``: RLIMIT_MEMLOCK in bytes, None for no limit."""

    dma_entry_limit: int = 65535
    memlock: int | None = None

    def __post_init__(self) -> None:
        if self.dma_entry_limit < 0 or (self.memlock is not None and self.memlock < 0):
            raise ValueError("limits are not negative")


class LockedMemory:
    """A process's account of pinned memory, in bytes; its containers may share one. ``limit``: None for no limit."""

    def __init__(self, limit: int | None = None) -> None:
        self.ptr: Any = ffi.new("struct pv_locked *", {"limit": _NO_LIMIT if limit is None else limit})

    @property
    def limit(self) -> int | None:
        """The most that may be locked."""
        limit: int = self.ptr.limit
        return None if limit == _NO_LIMIT else limit

    @property
    def locked(self) -> int:
        """What is locked now."""
        return int(self.ptr.locked)

    def charge(self, size: int) -> bool:
        """Counts ``size`` bytes more, or (negative) fewer; false, and nothing counted, where that is beyond the
        limit.
        """
        if size > 0 and self.ptr.locked + size > self.ptr.limit:
            return False
        self.ptr.locked += size
        return True
