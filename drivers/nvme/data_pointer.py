"""The data pointer of one command over several buffers: an SGL segment, or a PRP list (NVMe Base 2.0c 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from pvfio.abi import dtype_of, lib

if TYPE_CHECKING:
    from pvfio.vfio import DmaBuffer

__all__ = ["scattered"]

_PAGE: Final = 4096
_SGL_ENTRIES: Final = _PAGE // 16
_PRP_ENTRIES: Final = _PAGE // 8


def scattered(buffers: Sequence[DmaBuffer], page: DmaBuffer, *, sgl: bool) -> tuple[int, int, int]:
    """The command's flags and its two data words; ``page`` (mapped, 4 KiB) takes the list.

    Raises ``ValueError`` for too many buffers and, without SGLs, for buffers that do not meet at page boundaries.
    """
    return _segment(buffers, page) if sgl else _prp_list(buffers, page)


def _segment(buffers: Sequence[DmaBuffer], page: DmaBuffer) -> tuple[int, int, int]:
    flags = int(lib.NVME_CMD_SGL_METABUF)
    if len(buffers) == 1:
        return flags, buffers[0].iova or 0, buffers[0].nbytes
    if len(buffers) > _SGL_ENTRIES:
        raise ValueError(f"{len(buffers)} buffers are more than the {_SGL_ENTRIES} of one command")
    entries = np.asarray(page).view(dtype_of("struct nvme_sgl_desc"))[: len(buffers)]
    entries["addr"] = [buffer.iova for buffer in buffers]
    entries["length"] = [buffer.nbytes for buffer in buffers]
    last = int(lib.NVME_SGL_LAST_SEGMENT) << int(lib.NVME_SGL_TYPE_SHIFT) << 56
    return flags, page.iova or 0, 16 * len(buffers) | last


def _prp_list(buffers: Sequence[DmaBuffer], page: DmaBuffer) -> tuple[int, int, int]:
    pages: list[int] = []
    for index, buffer in enumerate(buffers):
        first = buffer.iova or 0
        end = first + buffer.nbytes
        if (index and first % _PAGE) or (index + 1 < len(buffers) and end % _PAGE):
            raise ValueError("without SGLs, buffers meet at page boundaries")
        pages += [first, *range(first - first % _PAGE + _PAGE, end, _PAGE)]
    if len(pages) <= 2:
        return 0, pages[0], pages[1] if len(pages) == 2 else 0
    if len(pages) - 1 > _PRP_ENTRIES:
        raise ValueError(f"{len(pages)} pages are more than one list describes")
    np.asarray(page).view(np.uint64)[: len(pages) - 1] = pages[1:]
    return 0, pages[0], page.iova or 0
