"""Requests on a connection: one of the client's that waits for its reply, and how one of the server's is answered."""

from __future__ import annotations

import errno
import os
from typing import Any, Final, Protocol

import trio

from pvfio.abi import lib
from pvfio.vfio_user.channel import Message
from pvfio.vfio_user.messages import WireError, command_name, dma_access, parse_dma_read, parse_dma_write

__all__ = ["Call", "Reach", "answer"]

_TYPE_MASK: Final[int] = lib.VFIO_USER_F_TYPE_MASK


class Reach(Protocol):
    """The memory a server may ask for. Both raise WireError: EFAULT, EACCES."""

    def read(self, address: int, count: int) -> Any: ...
    def write(self, address: int, data: memoryview) -> None: ...


class Call:
    """A request that was sent. ``body`` and ``fds`` are the reply's once it is ``done``; ``error`` is its errno, or 0.

    ``abandoned``: nobody waits for it any more.
    """

    __slots__ = ("abandoned", "body", "command", "done", "error", "event", "fds", "operation")

    def __init__(self, command: int, operation: str) -> None:
        self.command = command
        self.operation = operation
        self.done = False
        self.abandoned = False
        self.error = 0
        self.body = b""
        self.fds: list[int] = []
        self.event: trio.Event | None = None

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self.abandoned = True
        while self.fds:
            os.close(self.fds.pop())


def answer(message: Message, reach: Reach | None, most: int) -> tuple[int, bytes, Any]:
    """(errno or 0, body, data) of the reply to a request of the server's, which may transfer ``most`` bytes."""
    data: Any = b""
    try:
        if message.flags & _TYPE_MASK:
            raise WireError(errno.EINVAL, "neither a command nor a reply")
        if message.command == lib.VFIO_USER_DMA_READ:
            address, count = parse_dma_read(message.body, most)
            data = _reached(reach).read(address, count)
        elif message.command == lib.VFIO_USER_DMA_WRITE:
            address, given = parse_dma_write(message.body, most)
            count = len(given)
            _reached(reach).write(address, given)
        else:
            raise WireError(errno.ENOTSUP, command_name(message.command))
    except WireError as refused:
        return refused.errno, b"", b""
    return 0, dma_access(address, count), data


def _reached(reach: Reach | None) -> Reach:
    if reach is None:
        raise WireError(errno.EFAULT, "nothing is mapped")
    return reach
