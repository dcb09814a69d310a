"""A userspace driver of NVMe controllers, on any backend of ``pvfio.vfio``.

::

    async with NvmeDriver(device) as nvme:
        await nvme.read(1, 0, buffer)
        queue = nvme.queues[0]
        cids = queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas, 1, iovas)
        done = await queue.reap()
"""

from pvfio.drivers.nvme.admin import AdminQueue, AsyncEvent
from pvfio.drivers.nvme.driver import NvmeDriver
from pvfio.drivers.nvme.errors import NvmeError, OperationAborted, opcode_name, status_name
from pvfio.drivers.nvme.identify import IdentifyController, LbaFormat, Namespace
from pvfio.drivers.nvme.logs import (
    EffectsLog,
    ErrorLogEntry,
    FirmwareLog,
    SanitizeLog,
    SelfTestLog,
    SelfTestResult,
    SmartLog,
)
from pvfio.drivers.nvme.operations import QueuePair
from pvfio.drivers.nvme.queue import Completion
from pvfio.drivers.nvme.ring import Completions
from pvfio.drivers.nvme.sqe import Sqe

__all__ = [
    "AdminQueue",
    "AsyncEvent",
    "Completion",
    "Completions",
    "EffectsLog",
    "ErrorLogEntry",
    "FirmwareLog",
    "IdentifyController",
    "LbaFormat",
    "Namespace",
    "NvmeDriver",
    "NvmeError",
    "OperationAborted",
    "QueuePair",
    "SanitizeLog",
    "SelfTestLog",
    "SelfTestResult",
    "SmartLog",
    "Sqe",
    "opcode_name",
    "status_name",
]
