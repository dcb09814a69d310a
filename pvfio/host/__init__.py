"""The hypervisor: hypercalls, device domains, stage 2, vPCI, interrupt delivery, the fault log, the dirty log."""

from pvfio.host.config import IommuConfig, Platform
from pvfio.host.dirty import DirtyLog
from pvfio.host.faults import Fault, FaultLog
from pvfio.host.hypercalls import PARTITION_ID
from pvfio.host.hypervisor import Hypervisor
from pvfio.host.vpci import VpciBus, VpciFunction

__all__ = [
    "PARTITION_ID",
    "DirtyLog",
    "Fault",
    "FaultLog",
    "Hypervisor",
    "IommuConfig",
    "Platform",
    "VpciBus",
    "VpciFunction",
]
