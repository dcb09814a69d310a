"""Two NVMe controllers and a DSA, wherever they are plugged, all working at once: ``pair.py ITERATIONS``."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import idxd, nvme
from .report import Report

_FUNCTIONS = Path("/sys/bus/pci/devices")
_NVME = "0x010802"


def main(iterations: str) -> None:
    """fio with crc32c on both disks, dmatest on two channels; where their DMA goes."""
    with Report() as facts:
        found = sorted(_FUNCTIONS.iterdir())
        disks = [nvme.Disk(path) for path in found if (path / "class").read_text().strip() == _NVME]
        dsa = idxd.Accelerator()
        idxd.configure(dsa, facts, "2")
        with ThreadPoolExecutor(len(disks)) as threads:
            work = [threads.submit(nvme.verified, disk, "16m") for disk in disks]
            idxd.dmatest(dsa, facts, iterations, "1")
            facts["fio"] = [each.result() for each in work]
        facts["iommu"] = {
            function.name: _iommu_group(function)
            for function in (*(disk.function for disk in disks), dsa.function)
        }
        facts["identifiers"] = [
            {name: (disk.queue.parent / name).read_text().strip() for name in ("nguid", "uuid", "wwid")}
            for disk in disks
        ]


def _iommu_group(function: Path) -> dict[str, Any] | None:
    group = function / "iommu_group"
    if not group.exists():
        return None
    return {
        "type": (group / "type").read_text().strip(),
        "members": sorted(path.name for path in (group / "devices").iterdir()),
    }


if __name__ == "__main__":
    main(sys.argv[1])
