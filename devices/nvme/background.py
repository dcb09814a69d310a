"""What a controller does on the side: operations of the device's task that go on while commands are executed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import trio

from pvfio.abi import ffi, lib

if TYPE_CHECKING:
    from pvfio.devices.nvme.namespaces import Namespace

__all__ = ["Background", "erase", "fill", "pieces", "read_piece"]

_PIECE: Final = 16 << 20


class Background:
    """The operations of one controller; ``nursery`` is its task's."""

    nursery: trio.Nursery

    def start(self, operation: Callable[[], Awaitable[None]]) -> trio.CancelScope:
        """Begins one; cancelling the scope ends it."""
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await operation()

        self.nursery.start_soon(run)
        return scope


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what is done between two looks at the clock."""
    for offset in range(0, size, _PIECE):
        yield offset, min(_PIECE, size - offset)


async def erase(namespace: Namespace, offset: int, size: int, *, deallocate: bool = True) -> None:
    """Bytes become zeroes, and with ``deallocate`` take no room where that can be. Raises ``OSError``."""
    await _media(namespace, lib.pv_nvme_backing_zero, offset, size, deallocate)


async def fill(namespace: Namespace, offset: int, data: bytes) -> None:
    """Bytes are stored. Raises ``OSError``."""
    await _media(namespace, lib.pv_nvme_backing_write, offset, ffi.from_buffer(data), len(data))


async def read_piece(namespace: Namespace, offset: int, size: int) -> None:
    """Bytes are read, for whether they can be. Raises ``OSError``."""
    await _media(namespace, lib.pv_nvme_backing_read, offset, ffi.new("uint8_t[]", size), size)


async def _media(namespace: Namespace, function: Callable[..., int], *args: Any) -> None:
    """Memory at once, files in a worker thread. Cancelled: what was begun ends all the same."""
    if namespace.spec.image is None:
        await trio.lowlevel.checkpoint()
        error = function(namespace.backing, *args)
    else:
        error = await trio.to_thread.run_sync(function, namespace.backing, *args)
    if error:
        raise OSError(-error, f"namespace {namespace.nsid}")
