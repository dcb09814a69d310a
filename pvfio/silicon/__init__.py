"""What is hardware on the data path: walker, IOTLB, bus masters, engines, MSI-X."""

from pvfio.silicon.bus import READ, WRITE, BusMaster, DmaAborted, DmaCancelled, TableBus, is_eventfd
from pvfio.silicon.engine import Engine, EngineKind, EngineStats
from pvfio.silicon.function import BarInfo, BusFunction
from pvfio.silicon.iommu import (
    BLOCKED,
    IDENTITY,
    MSI_END,
    MSI_START,
    PAGING,
    AtcStats,
    Domain,
    Fault,
    Iommu,
    Requester,
    TlbStats,
    Walk,
    WalkStep,
)
from pvfio.silicon.msix import Msix

__all__ = [
    "BLOCKED",
    "IDENTITY",
    "MSI_END",
    "MSI_START",
    "PAGING",
    "READ",
    "WRITE",
    "AtcStats",
    "BarInfo",
    "BusFunction",
    "BusMaster",
    "DmaAborted",
    "DmaCancelled",
    "Domain",
    "Engine",
    "EngineKind",
    "EngineStats",
    "Fault",
    "Iommu",
    "Msix",
    "Requester",
    "TableBus",
    "TlbStats",
    "Walk",
    "WalkStep",
    "is_eventfd",
]
