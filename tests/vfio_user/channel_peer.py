"""The other end of a channel under test: a plain socket, so that every byte and descriptor is the test's choice."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence

from pvfio.abi import lib

HEADER = struct.Struct("<HHIII")
ACCESS = struct.Struct("<QQ")
REPLY: int = lib.VFIO_USER_F_TYPE_REPLY
ERROR: int = lib.VFIO_USER_F_ERROR


def message(
    command: int, id: int, body: bytes = b"", *, flags: int = 0, error: int = 0, size: int | None = None
) -> bytes:
    """A message's bytes; ``size`` where the header is to say something else than the truth."""
    return HEADER.pack(id, command, 16 + len(body) if size is None else size, flags, error) + body


def open_fds() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


class Peer:
    """One end of a socket pair; blocking, with a time limit so that a mistake fails and does not hang."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(20)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.sock.sendmsg([data], control) == len(data)

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError(f"{len(data)} of {size} bytes")
            data += more
        return bytes(data)

    def receive(self) -> tuple[int, int, int, int, bytes]:
        """(command, id, flags, error, body)."""
        id, command, size, flags, error = HEADER.unpack(self.read(16))
        return command, id, flags, error, self.read(size - 16)

    def close(self) -> None:
        self.sock.close()
