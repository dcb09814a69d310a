"""Guest RAM, DMA buffers, pinning."""

from pvfio.memory.buffer import DmaBuffer
from pvfio.memory.guest import BLOCK_SIZE, PAGE_SIZE, GuestMemory, MemoryStats
from pvfio.memory.mapped import FdMapping, FdMemory, map_fd

__all__ = [
    "BLOCK_SIZE",
    "PAGE_SIZE",
    "DmaBuffer",
    "FdMapping",
    "FdMemory",
    "GuestMemory",
    "MemoryStats",
    "map_fd",
]
