"""A client's memory that came without a descriptor: a device's bus reaches it by asking over the channel.

Models the wiring alone: the ranges are the bus's (``TableBus.map_remote``), the asking is C's (``remote.h``), done by
whichever engine's thread needs the bytes. Such a thread waits for the client, so it must not be trio's.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

from pvfio.abi import ffi, lib
from pvfio.vfio_user.channel import Channel

__all__ = ["RemoteMemory"]

# A client that serves DMA answers at once; one that waits for this server gives up after five seconds (QEMU).
PATIENCE = 2.0


class Bus(Protocol):
    """A ``TableBus``: ``ptr`` is its ``struct pv_bus *``."""

    ptr: Any


class RemoteMemory:
    """From now on ``bus`` asks ``channel``'s peer for its remote ranges, each time for at most ``patience`` seconds.

    What is not answered in time, refused, or answered with something else is a DMA fault of the device; cancelling
    the bus (within 5 ms) or closing the channel ends a wait. Raises MemoryError, and
    trio.ClosedResourceError for a closed channel.
    """

    def __init__(self, bus: Bus, channel: Channel, patience: float = PATIENCE) -> None:
        self._ptr = lib.pv_vfu_remote_create(bus.ptr, channel.ptr, int(patience * 1e9))
        if self._ptr == ffi.NULL:
            raise MemoryError("no room for remote memory")

    def close(self) -> None:
        """The bus asks nobody any more. Waits for what is being asked: close the channel or cancel the bus before."""
        ptr, self._ptr = self._ptr, ffi.NULL
        lib.pv_vfu_remote_destroy(ptr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
