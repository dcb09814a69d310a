"""An IOMMU over real stage-2 tables, with domains whose stage 1 the tests write."""

from __future__ import annotations

import pytest

from pvfio.memory import BLOCK_SIZE, GuestMemory
from pvfio.pagetable import Format, PageTable, Perm
from pvfio.silicon import PAGING, Domain, Iommu, Requester

RW = Perm.READ | Perm.WRITE
MIB = 1 << 20


class Rig:
    """Guest memory, stage 2 of a platform, and the IOMMU over both."""

    def __init__(self, platform: str, size: int = 64 * MIB) -> None:
        self.memory = GuestMemory(size)
        fmt, levels = (Format.VTDSS, 4) if platform == "intel" else (Format.AMDV1, 4)
        self.stage2 = PageTable(fmt, self.memory, owner="host", levels=levels)
        for start, length in self.memory.ram_ranges():
            for gpa in range(start, start + length, BLOCK_SIZE):
                self.stage2.map_range(gpa, self.memory.gpa_to_hpa(gpa), BLOCK_SIZE, RW)
        self.iommu = Iommu(self.memory, self.stage2.format, self.stage2.root, self.stage2.levels)
        self._ids = 0

    def paging(self, levels: int = 4) -> tuple[Domain, PageTable]:
        """A paging domain and its stage-1 table."""
        self._ids += 1
        table = PageTable(Format.X86_64, self.memory, owner="guest", levels=levels)
        domain = self.iommu.domain(self._ids)
        domain.configure(PAGING, table.root, levels)
        return domain, table

    def requester(self, domain: Domain | None, device_id: int = 0xD5A) -> Requester:
        """A bus master in a domain."""
        requester = self.iommu.requester(device_id)
        requester.attach(domain)
        return requester


@pytest.fixture(scope="session")
def make_rig() -> type[Rig]:
    """For tests that need one of their own: ``make_rig(platform, bytes)``."""
    return Rig


@pytest.fixture(params=["intel", "amd"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)
