"""IOMMU_GET_HW_INFO: what nesting can use, told in the terms of VT-d's capability registers.

The format of a nested page table is VT-d's first stage, on both platforms: the guest shadows it (hwpt.py), so what
can be is what the pvIOMMU's own stage 1 can be. Bits of VT-d 11.4.2 and 11.4.3 that say nothing about that are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvfio.abi import ffi

if TYPE_CHECKING:
    from pvfio.guest.pviommu import PvIommu

__all__ = ["hw_info"]

_CAP_MGAW_SHIFT = 16  # maximum guest address width - 1
_CAP_FS1GP = 1 << 56  # first stage: 1 GiB pages
_CAP_FS5LP = 1 << 60  # first stage: five levels
_ECAP_NEST = 1 << 26
_ECAP_FSTS = 1 << 47  # first-stage translation


def hw_info(iommu: PvIommu) -> bytes:
    """``struct iommu_hw_info_vtd`` of an IOMMU."""
    info = ffi.new("struct iommu_hw_info_vtd *")
    info.cap_reg = (iommu.width - 1) << _CAP_MGAW_SHIFT | _CAP_FS1GP
    if iommu.levels == 5:
        info.cap_reg |= _CAP_FS5LP
    info.ecap_reg = _ECAP_NEST | _ECAP_FSTS
    return bytes(ffi.buffer(info))
