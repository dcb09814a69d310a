"""The library userspace drivers see: Container, Group, Device, Region, Irq, and the IOVA allocator.

Abstract: a backend (``pvfio.backends``) gives the objects, a driver uses nothing else, so an unchanged driver
runs on every backend. Every coroutine checkpoints and can be cancelled; a ``_nowait`` twin never checkpoints.
Errors are ``VfioError`` with the errno that Linux gives for the same mistake.
"""

from pvfio.memory import DmaBuffer
from pvfio.vfio.backend import Backend
from pvfio.vfio.container import Container, IommuInfo, MigrationInfo, UnmapMismatch
from pvfio.vfio.device import Device, DeviceInfo
from pvfio.vfio.group import Group, GroupStatus
from pvfio.vfio.iommufd import HwInfo, Hwpt, Ioas, Iommufd, IommufdDevice
from pvfio.vfio.iova import IovaAllocator
from pvfio.vfio.irq import Irq
from pvfio.vfio.region import Region
from pvfio.vfio.wait import Records, Word, wait_records, wait_word

__all__ = [
    "Backend",
    "Container",
    "Device",
    "DeviceInfo",
    "DmaBuffer",
    "Group",
    "GroupStatus",
    "HwInfo",
    "Hwpt",
    "Ioas",
    "IommuInfo",
    "Iommufd",
    "IommufdDevice",
    "IovaAllocator",
    "Irq",
    "MigrationInfo",
    "Records",
    "Region",
    "UnmapMismatch",
    "Word",
    "wait_records",
    "wait_word",
]
