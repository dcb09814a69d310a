"""Guest RAM, DMA buffers, pinning."""

from pvfio.memory.buffer import DmaBuffer
from pvfio.memory.guest import BLOCK_SIZE, PAGE_SIZE, GuestMemory, MemoryStats

__all__ = ["BLOCK_SIZE", "PAGE_SIZE", "DmaBuffer", "GuestMemory", "MemoryStats"]
