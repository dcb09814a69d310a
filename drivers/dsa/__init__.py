"""A userspace driver of the Intel Data Streaming Accelerator, on any backend of ``pvfio.vfio``.

::

    async with DsaDriver(device) as dsa:
        wq = dsa.wq(0)
        await wq.memmove(destination, source, size)
        crc = await wq.crcgen(source, size)
        records = await wq.batch(descriptors.memmove(destinations, sources, 4096))
"""

from pvfio.drivers.dsa import descriptors
from pvfio.drivers.dsa.batch import Batch
from pvfio.drivers.dsa.capabilities import Capabilities
from pvfio.drivers.dsa.configuration import WqConfig
from pvfio.drivers.dsa.dif import DifFormat, DifTags
from pvfio.drivers.dsa.driver import DsaDriver
from pvfio.drivers.dsa.errors import (
    BatchError,
    CommandError,
    DifError,
    DsaError,
    OperationAborted,
    SoftwareError,
    command_name,
    completion_name,
)
from pvfio.drivers.dsa.eventlog import Event
from pvfio.drivers.dsa.operations import WorkQueue
from pvfio.drivers.dsa.operations_delta import Delta
from pvfio.drivers.dsa.recovery import Recovery
from pvfio.drivers.dsa.ring import Submission
from pvfio.drivers.dsa.workqueue import Completion

__all__ = [
    "Batch",
    "BatchError",
    "Capabilities",
    "CommandError",
    "Completion",
    "Delta",
    "DifError",
    "DifFormat",
    "DifTags",
    "DsaDriver",
    "DsaError",
    "Event",
    "OperationAborted",
    "Recovery",
    "SoftwareError",
    "Submission",
    "WorkQueue",
    "WqConfig",
    "command_name",
    "completion_name",
    "descriptors",
]
