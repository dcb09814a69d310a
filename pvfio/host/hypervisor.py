"""The hypervisor: one guest partition, its IOMMU, its stage 2, its vPCI buses.

Wires the rooms of the host together; what each models is said there. Not modelled: scheduling of virtual
processors, other partitions, the transport of a live migration (``dirty`` is what it reads).
"""

from __future__ import annotations

import uuid

import trio

from pvfio.host.config import IommuConfig
from pvfio.host.dirty import DirtyLog
from pvfio.host.domains import DeviceDomains
from pvfio.host.faults import FaultLog
from pvfio.host.hypercalls import Hypercalls
from pvfio.host.stage2 import build_stage2
from pvfio.host.vpci import VpciBus
from pvfio.memory import GuestMemory
from pvfio.silicon import Iommu

__all__ = ["Hypervisor"]


class Hypervisor:
    """One machine's host. ``memory`` is the guest's RAM, ``vps`` the number of its virtual processors.

    Built ready to answer: stage 2 maps all RAM. Raises ``ValueError`` for no VP at all and ``MemoryError``
    when host-private memory has no room for the tables. ``hypercall(vp, control, input_gpa, output_gpa)``
    is the one door for the guest, see ``Hypercalls.hypercall``; ``inject`` is ``Hypercalls.inject``; ``faults`` is the
    fault log and ``dirty`` the record of the pages that DMA wrote.
    """

    def __init__(self, memory: GuestMemory, config: IommuConfig | None = None, *, vps: int = 2) -> None:
        if vps < 1:
            raise ValueError(f"a machine has at least one virtual processor, not {vps}")
        self.memory = memory
        self.config = config if config is not None else IommuConfig()
        self.vps = vps
        self.stage2 = build_stage2(memory, self.config)
        self.iommu = Iommu(memory, int(self.stage2.format), self.stage2.root, self.stage2.levels)
        self.dirty = DirtyLog(memory, self.stage2, self.iommu)
        self.domains = DeviceDomains(memory, self.iommu, self.config)
        self._calls = Hypercalls(memory, self.config, self.domains, vps=vps)
        self.hypercall = self._calls.hypercall
        self.inject = self._calls.inject
        self.faults = FaultLog(self.iommu, self.domains.name)
        self.buses: list[VpciBus] = []

    def add_bus(self, instance_guid: uuid.UUID, segment: int) -> VpciBus:
        """A new vPCI bus. Raises ``ValueError`` where its segment or its logical ids are taken already."""
        if not 0 <= segment <= 0xFFFF:
            raise ValueError(f"a PCI segment has 16 bits: {segment:#x}")
        bus = VpciBus(instance_guid, segment, self.domains)
        for other in self.buses:
            if other.segment == segment or other.prefix == bus.prefix:
                raise ValueError(f"segment {segment:#x}, prefix {bus.prefix:#x}: another bus has one of them")
        self.buses.append(bus)
        return bus

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The host's task: the fault log, until cancelled."""
        await self.faults.run(task_status=task_status)

    def close(self) -> None:
        """Takes every device away and hands the tables back. The memory stays the caller's. Idempotent."""
        for bus in self.buses:
            bus.close()
        self.buses.clear()
        self.domains.close()
        self.dirty.stop()
        self.stage2.destroy()
