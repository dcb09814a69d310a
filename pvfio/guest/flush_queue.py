"""The flush queue of a lazy DMA domain: IOVAs that are unmapped and wait for one flush of the whole domain.

Each VP queues up to 256 ranges. The domain is flushed when a queue is full, or 10 ms after the first range was queued;
then every queued range's IOVAs are free again, and the table pages that unmaps have emptied go back (Linux
dma-iommu: IOVA_FQ_SIZE, IOVA_FQ_TIMEOUT). Until then a device may reach the old memory through its IOTLB.

One flush here frees the queues of all VPs; Linux leaves the other CPUs' for later. Not modelled: the sizes
of a single-queue domain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import trio

from pvfio.abi import ffi, lib
from pvfio.errors import HypercallError, VfioError

if TYPE_CHECKING:
    from pvfio.guest.paging_domain import PagingDomain

__all__ = ["FLUSH_SECONDS", "QUEUE_SIZE", "FlushQueue", "Spawn"]

_log = logging.getLogger("pvfio.guest.dma")

Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], trio.CancelScope]

QUEUE_SIZE: int = lib.PV_DMA_QUEUE
FLUSH_SECONDS = 0.010
_FULL: int = lib.PV_DMA_QUEUE_FULL


class FlushQueue:
    """The queues of one domain's VPs; ``ptr`` is its ``struct pv_dma *``, ``spawn`` starts the timer's task,
    ``flushed`` is called after each flush.

    Without ``spawn``, and while the kernel's tasks do not run, only a full queue is flushed. ``flushes`` counts.
    """

    def __init__(
        self, ptr: Any, domain: PagingDomain, spawn: Spawn | None, flushed: Callable[[], None]
    ) -> None:
        self._ptr = ptr
        self._flushed = flushed
        self._domain = domain
        self._spawn = spawn
        self._timer: trio.CancelScope | None = None
        self._stats = ffi.new("struct pv_dma_stats *")
        self.flushes = 0

    def __len__(self) -> int:
        lib.pv_dma_get_stats(self._ptr, self._stats)
        return int(self._stats.queued)

    def added(self, flags: int) -> None:
        """A range was queued, with what ``PV_DMA_QUEUE_*`` says of it: flushes a full queue, or starts the timer."""
        if flags & _FULL:
            self.flush()
        elif self._timer is None and self._spawn is not None:
            try:
                self._timer = self._spawn(self._expire)
            except VfioError:
                _log.debug("domain %d: no timer: the kernel's tasks do not run", self._domain.id)

    def flush(self) -> bool:
        """Flushes the domain and frees what was queued. False, with a warning, where the host refuses."""
        try:
            self._domain.flush_all()
        except HypercallError as error:
            _log.warning("domain %d: flush of the queue failed: %s", self._domain.id, error)
            return False
        self.flushes += 1
        lib.pv_dma_drain(self._ptr)
        self._flushed()
        return True

    def close(self) -> None:
        """Stops the timer; what is queued stays queued."""
        if self._timer is not None:
            self._timer.cancel()

    async def _expire(self) -> None:
        try:
            while True:
                await trio.sleep(FLUSH_SECONDS)
                if not len(self) or self.flush():
                    return
        finally:
            self._timer = None
