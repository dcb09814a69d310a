"""What the guest's kernel warns about, without what this rig's processor, firmware and driver make it say."""

from __future__ import annotations

import re
from typing import Any, Final

__all__ = ["about_devices"]

_OF_THE_RIG: Final = (
    # QEMU's emulated processor and chip set.
    r"tsc: |APIC calibration |mtrr: |ACPI: |clocksource: |hpet: |AMD-Vi: \[Firmware Bug\]|AMD-Vi: Disabling interrupt",
    # The idxd driver that is built for a processor without MOVDIR64B and ENQCMD.
    r"idxd_bus: loading out-of-tree|idxd_bus: module verification|rig: |Platform does not have ENQCMD",
    # sysfs files that are read and should not be.
    r"dsa dsa\d+: attribute deprecated",
)
_USUAL: Final = re.compile("|".join(_OF_THE_RIG))


def about_devices(facts: dict[str, Any]) -> list[str]:
    """The lines of warning level and above that are left."""
    return [line for line in facts["warnings"] if not _USUAL.match(line)]
