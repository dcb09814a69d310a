"""What a machine's IOMMU is and says it can do.

Every capability the guest driver looks at can be switched, so every refusal of the driver can be provoked.
The platform decides only the format of stage 2; the guest cannot see it. Not modelled: what PASID and PRI
promise beyond the capability bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["IommuConfig", "Platform"]

Platform = Literal["intel", "amd"]

_STAGE2_LEVELS = {"intel": range(3, 6), "amd": range(1, 7)}


@dataclass(frozen=True, kw_only=True)
class IommuConfig:
    """One machine's IOMMU. Raises ``ValueError`` for what no machine can be.

    ``present=False``: the machine has none, all nine hypercalls answer INVALID_HYPERCALL_CODE and devices
    reach guest memory by GPA. ``advertised=False``: the calls exist, the PRESENT bit is clear. ``stage1``,
    ``five_level``, ``ats``, ``pasid``, ``pri``: capability bits of the same names (S1, S1_5LVL, ...).
    ``max_iova_width`` and ``max_pasid_width`` are in bits, ``pgsize_bitmap`` has a bit per page size in
    bytes. ``max_domains``: how many device domains fit before INSUFFICIENT_MEMORY. ``stage2_levels``:
    levels of the host's tables (vtdss 3 to 5; amdv1 begins with 1 to 6 and grows).
    """

    platform: Platform = "intel"
    present: bool = True
    advertised: bool = True
    stage1: bool = True
    five_level: bool = False
    ats: bool = True
    pasid: bool = False
    pri: bool = False
    max_iova_width: int = 48
    max_pasid_width: int = 0
    pgsize_bitmap: int = 1 << 12 | 1 << 21 | 1 << 30
    max_domains: int = 1024
    stage2_levels: int = 4

    def __post_init__(self) -> None:
        if self.platform not in _STAGE2_LEVELS:
            raise ValueError(f"platform is intel or amd, not {self.platform!r}")
        if not 13 <= self.max_iova_width <= 64:
            raise ValueError(f"max_iova_width is 13 to 64 bits, not {self.max_iova_width}")
        if not 0 <= self.max_pasid_width <= 20:
            raise ValueError(f"max_pasid_width is 0 to 20 bits, not {self.max_pasid_width}")
        if not 0 < self.pgsize_bitmap < 1 << 64:
            raise ValueError(f"pgsize_bitmap is a non-zero 64-bit word, not {self.pgsize_bitmap:#x}")
        if self.max_domains < 1:
            raise ValueError(f"max_domains is at least 1, not {self.max_domains}")
        levels = _STAGE2_LEVELS[self.platform]
        if self.stage2_levels not in levels:
            raise ValueError(
                f"stage2_levels on {self.platform} is {levels.start} to {levels.stop - 1}, "
                f"not {self.stage2_levels}"
            )
