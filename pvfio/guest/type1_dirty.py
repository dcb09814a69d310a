"""Type1's dirty bitmaps: one bit for each page of the smallest page size, in little-endian 64-bit words.

An IOMMU-backed group can write to everything that is mapped and reports nothing, so every pinned, mapped page is dirty,
each time it is asked. Not modelled: the pin interface of mediated devices, which narrows that down.
"""

from __future__ import annotations

from collections.abc import Iterable

from pvfio.guest.type1_info import DIRTY_BITMAP_SIZE_MAX
from pvfio.guest.user_copy import copy_from_user, copy_to_user

__all__ = ["bitmap_size_fits", "write_bitmap"]

_WORD_BITS = 64
_WORD_BYTES = 8


def bitmap_size_fits(pages: int, size: int) -> bool:
    """Whether a bitmap of ``size`` bytes holds ``pages`` bits, both more than 0, and is none too large."""
    words = -(-pages // _WORD_BITS)
    return pages > 0 and words * _WORD_BYTES <= size <= DIRTY_BITMAP_SIZE_MAX


def write_bitmap(address: int, base: int, shift: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Reports the pages of ``ranges`` ((IOVA, bytes), in order) in the bitmap at a process address.

    Bit 0 is the page at IOVA ``base``; a page has ``1 << shift`` bytes. As Linux: whole words are written, the bits of
    earlier pages in the first word of a range are kept. Raises OSError (EFAULT).
    """
    for iova, size in ranges:
        word, lead = divmod((iova - base) >> shift, _WORD_BITS)
        pages = size >> shift
        bits = ((1 << pages) - 1) << lead
        at = address + word * _WORD_BYTES
        if lead:
            bits |= int.from_bytes(copy_from_user(at, _WORD_BYTES), "little") & ((1 << lead) - 1)
        words = -(-(pages + lead) // _WORD_BITS)
        copy_to_user(at, bits.to_bytes(words * _WORD_BYTES, "little"))
