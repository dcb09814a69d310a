"""PRP entries for controllers without SGLs (NVMe Base 2.0c 4.1.1).

Every command identifier has room for a list, which is written again only when the command begins at another page or
is longer than the one before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.drivers.nvme.ring import Ring
    from pvfio.vfio import DmaBuffer

__all__ = ["PrpLists", "list_bytes"]

PAGE: Final = 4096
_OFFSET: Final = np.uint64(PAGE - 1)


def list_entries(max_transfer: int) -> int:
    """Entries of the list of the longest transfer, a power of two: a list then lies in one page or fills it."""
    pages = max_transfer // PAGE  # one more for a transfer that begins inside a page, one less for PRP1
    return 1 << max(0, pages - 1).bit_length()


def list_bytes(depth: int, max_transfer: int) -> int:
    """Bytes the lists of a queue take."""
    return depth * list_entries(max_transfer) * 8


class PrpLists:
    """The lists of one queue in ``buffer``, which is mapped. ``max_transfer`` (at most 2 MiB) is the longest one."""

    def __init__(self, buffer: DmaBuffer, depth: int, max_transfer: int) -> None:
        if buffer.iova is None:
            raise ValueError("the lists' memory is not mapped")
        entries = list_entries(max_transfer)
        self.buffer = buffer
        plain = np.asarray(buffer)[: depth * entries * 8]
        self._lists: NDArray[np.uint64] = plain.view(np.uint64).reshape(depth, entries)
        self._addresses = np.uint64(buffer.iova) + np.arange(depth, dtype=np.uint64) * np.uint64(entries * 8)
        self._first = np.zeros(depth, dtype=np.uint64)  # the second page of what each list was made for
        self._count = np.zeros(depth, dtype=np.intp)
        self._steps = np.arange(entries, dtype=np.uint64) * np.uint64(PAGE)

    def point(
        self,
        ring: Ring,
        cids: NDArray[np.intp],
        iovas: NDArray[np.uint64],
        length: int | NDArray[np.uint64],
    ) -> None:
        """Writes PRP2 of the last ``len(cids)`` commands of a ring: zero, the second page, or a list."""
        iovas = np.asarray(iovas, dtype=np.uint64)
        if isinstance(length, int) and length <= PAGE and not np.bitwise_or.reduce(iovas) & _OFFSET:
            return  # one page each, and the template's zero is in PRP2
        offsets = iovas & _OFFSET
        pages = (
            (offsets + np.uint64(length) if isinstance(length, int) else offsets + length) + _OFFSET
        ) // np.uint64(PAGE)
        most = int(pages.max())
        second = iovas - offsets + np.uint64(PAGE)
        if most <= 2:
            second[pages < 2] = 0
            ring.overwrite(4, second)
            return
        self._lay_out(cids, second, pages, most - 1)
        listed = pages > 2
        prp2 = np.where(listed, self._addresses[cids], np.where(pages == 2, second, np.uint64(0)))
        ring.overwrite(4, prp2)

    def _lay_out(
        self, cids: NDArray[np.intp], second: NDArray[np.uint64], pages: NDArray[np.uint64], count: int
    ) -> None:
        stale = (self._first[cids] != second) | (self._count[cids] < count)
        stale &= pages > 2
        if not stale.any():
            return
        again = cids[stale]
        self._lists[again, :count] = second[stale, None] + self._steps[:count]
        self._first[again] = second[stale]
        self._count[again] = count
