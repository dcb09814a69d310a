"""What type1's C half refuses, as errors: the errno it decided, and a sentence.

Not here: the rules and their order (``type1_map.c``).
"""

from __future__ import annotations

import errno
from typing import Any

from pvfio.abi import lib
from pvfio.errors import VfioError

__all__ = ["map_refusal", "no_64_bits", "unmap_refusal"]

_SPACE = 1 << 64
_PERMISSIONS: int = lib.VFIO_DMA_MAP_FLAG_READ | lib.VFIO_DMA_MAP_FLAG_WRITE

_REASONS: dict[int, str] = {
    lib.PV_TYPE1_BAD_REQUEST: "argsz or flags",
    lib.PV_TYPE1_BAD_SIZE: "size 0",
    lib.PV_TYPE1_WRAPS: "iova or vaddr wraps",
    lib.PV_TYPE1_NO_PERMISSION: "neither read nor write",
    lib.PV_TYPE1_UNALIGNED: "iova, vaddr or size is not page-aligned",
    lib.PV_TYPE1_NO_ENTRY: "no DMA entry is left",
    lib.PV_TYPE1_OUTSIDE: "outside the aperture or in a reserved range",
    lib.PV_TYPE1_NOT_PINNABLE: "vaddr is not pinnable memory",
    lib.PV_TYPE1_MEMLOCK: "RLIMIT_MEMLOCK exceeded",
    lib.PV_TYPE1_NO_MEMORY: "no memory for the kernel's records",
    lib.PV_TYPE1_PAGE_TABLE: "",
}


def _sentence(state: Any) -> str:
    if state.reason == lib.PV_TYPE1_OVERLAPS:
        return f"overlaps the mapping at {state.where:#x}"
    if state.reason == lib.PV_TYPE1_SPLITS:
        return f"would split the mapping at {state.where:#x}"
    return _REASONS[state.reason]


def map_refusal(state: Any, number: int, iova: int, size: int) -> VfioError:
    """The error of a map that ``state`` (``struct pv_type1 *``) has just refused."""
    return VfioError(number, "map_dma", _sentence(state), iova=iova, length=size)


def unmap_refusal(state: Any, number: int, iova: int, size: int) -> VfioError:
    """The error of an unmap that ``state`` has just refused."""
    return VfioError(number, "unmap_dma", _sentence(state), iova=iova, length=size)


def no_64_bits(operation: str, iova: int, size: int, vaddr: int = 0, flags: int = 0) -> VfioError:
    """The error of a request whose numbers no structure of the ABI could hold, by the same order of checks."""
    number, reason = errno.EOVERFLOW, "iova or vaddr wraps"
    if not 0 <= flags <= _PERMISSIONS:
        number, reason = errno.EINVAL, f"unknown flags {flags:#x}"
    elif iova < 0 or size < 0 or vaddr < 0:
        number, reason = errno.EINVAL, "a negative address or size"
    elif not size:
        number, reason = errno.EINVAL, "size 0"
    return VfioError(number, operation, reason, iova=iova, length=size)
