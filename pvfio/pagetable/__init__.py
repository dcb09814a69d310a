"""Radix page tables: x86_64, vtdss and amdv1."""

from pvfio.pagetable.table import Format, PageTable, Perm, TableStats, WalkEntry

__all__ = ["Format", "PageTable", "Perm", "TableStats", "WalkEntry"]
