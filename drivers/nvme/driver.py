"""The driver of one NVMe controller: what a program uses.

It owns the whole function and uses MSI-X vector 0 for the admin queue and one vector for each I/O queue that is not
polled. Not here: fabrics, several controllers of one subsystem, host memory buffers, shadow doorbells, power
management, reservations.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import update_wrapper
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self

import trio

from pvfio.abi import lib
from pvfio.drivers.nvme.management import Management
from pvfio.drivers.nvme.operations import QueuePair
from pvfio.drivers.nvme.queue import COMPLETIONS, Completion
from pvfio.errors import DeviceFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pvfio.vfio import Device

__all__ = ["NvmeDriver"]


P = ParamSpec("P")


def _on_first(
    method: Callable[Concatenate[QueuePair, P], Awaitable[None]],
) -> Callable[Concatenate[NvmeDriver, P], Awaitable[None]]:
    """A command of a queue as one of the driver."""

    def run(self: NvmeDriver, /, *arguments: P.args, **options: P.kwargs) -> Awaitable[None]:
        return method(self.queues[0], *arguments, **options)

    update_wrapper(run, method)
    return run


class NvmeDriver(Management):
    """A controller, ready to work inside ``async with NvmeDriver(device) as nvme``.

    ``device`` is an open VFIO device; it stays the caller's. ``queues``: how many I/O queues to ask for; the
    controller may grant fewer. ``entries`` in each, ``completion`` how they learn that commands are complete, one for
    all or a sequence with one for each. ``deadline`` is how long, in seconds, a command may take unless it says
    otherwise, ``grace`` how long a cancelled one may still take before it is aborted, ``admin_deadline`` how long one
    of the driver's own may take. ``sgl=False``: PRPs, also where the controller takes SGLs.

    ``controller``: what it says of itself; ``namespaces``: those that are active, by number; ``queues``: the I/O
    queues; ``admin``: the admin queue. Entering raises ``ValueError``, ``DeviceFailed`` for a device that is no NVMe
    controller or does not become ready, ``NvmeError`` for a command it refuses. Cancelled while entering or leaving:
    the controller is left disabled.
    """

    def __init__(
        self,
        device: Device,
        *,
        queues: int = 1,
        entries: int = 256,
        completion: Completion | Sequence[Completion] = "hybrid",
        deadline: float = 5.0,
        grace: float = 1.0,
        admin_deadline: float = 2.0,
        sgl: bool = True,
    ) -> None:
        completions = (completion,) * queues if isinstance(completion, str) else tuple(completion)
        if not 1 <= queues <= 0xFFFF or not completions:
            raise ValueError(f"1 to 65535 I/O queues, not {queues}")
        if not set(completions) <= set(COMPLETIONS):
            raise ValueError(f"completion is one of {', '.join(COMPLETIONS)}, not {completion!r}")
        if not 2 <= entries <= 1 << 16:
            raise ValueError(f"a queue has 2 to 65536 entries, not {entries}")
        super().__init__(device, completions, entries, deadline, grace, admin_deadline, sgl)

    async def __aenter__(self) -> Self:
        identity = await self.device.config.read(8, 4)
        if identity >> 8 != lib.NVME_PCI_CLASS:
            raise DeviceFailed(self.name, f"class {identity >> 8:06x} is not an NVMe controller")
        try:
            await self._start()
            await self.rescan()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):
            await self._stop()
        await trio.lowlevel.checkpoint_if_cancelled()

    # On the first I/O queue, as ``QueuePair`` describes them.

    read = _on_first(QueuePair.read)
    write = _on_first(QueuePair.write)
    readv = _on_first(QueuePair.readv)
    writev = _on_first(QueuePair.writev)
    flush = _on_first(QueuePair.flush)
    compare = _on_first(QueuePair.compare)
    compare_and_write = _on_first(QueuePair.compare_and_write)
    write_zeroes = _on_first(QueuePair.write_zeroes)
    write_uncorrectable = _on_first(QueuePair.write_uncorrectable)
    verify = _on_first(QueuePair.verify)
    copy = _on_first(QueuePair.copy)
    deallocate = _on_first(QueuePair.deallocate)
