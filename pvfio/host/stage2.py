"""The host's second stage: every 2 MiB block of guest RAM, GPA to HPA, in tables in host-private memory.

vtdss on Intel, amdv1 on AMD. Built once at start; only the dirty log changes the size of its leaves (``dirty.py``).
Not modelled: demand paging, and a guest whose memory moves.
"""

from __future__ import annotations

from typing import Final

from pvfio.abi import lib
from pvfio.host.config import IommuConfig
from pvfio.memory import GuestMemory
from pvfio.pagetable import Format, PageTable, Perm

__all__ = ["build_stage2"]

_FORMATS: Final = {"intel": Format.VTDSS, "amd": Format.AMDV1}


def build_stage2(memory: GuestMemory, config: IommuConfig) -> PageTable:
    """The table that maps all guest RAM, readable and writable, following ``memory.gpa_to_hpa``.

    Raises ``MemoryError`` or ``PageTableError`` when host-private memory is too small for it.
    """
    table = PageTable(_FORMATS[config.platform], memory, owner="host", levels=config.stage2_levels)
    block: int = lib.PV_BLOCK_SIZE
    for start, size in memory.ram_ranges():
        for gpa in range(start, start + size, block):
            table.map_range(gpa, memory.gpa_to_hpa(gpa), block, Perm.READ | Perm.WRITE)
    table.release_detached()  # tops that amdv1 has outgrown; nothing walks yet
    return table
