"""The path a server listens at: bound with its mode, taken over from a server that died, removed at the end.

Not handled: two servers that are started with one path in the same moment; the later one wins.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Self

__all__ = ["Listener", "has_hung_up"]

_BACKLOG = 8
_LONGEST = 107
"""Bytes of a path in sockaddr_un, without its NUL."""


def has_hung_up(descriptor: int) -> bool:
    """Whether the other end of a socket has closed, or said that nothing more comes."""
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    return bool(poll.poll(0))


class Listener:
    """A Unix socket that listens at ``path``; ``mode`` are its permissions. ``socket`` does not block.

    A socket nobody listens at is replaced. Raises ``OSError``: EADDRINUSE where somebody does, EEXIST for a path
    that is no socket, ENAMETOOLONG, and what the file system says.
    """

    def __init__(self, path: str | os.PathLike[str], mode: int = 0o600) -> None:
        self.path = Path(path)
        if len(os.fsencode(self.path)) > _LONGEST:
            raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {_LONGEST} bytes", str(path))
        _remove_stale(self.path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.setblocking(False)
            os.fchmod(self.socket.fileno(), mode)  # the mode it is bound with, so that it never has another
            self.socket.bind(os.fspath(self.path))
            os.chmod(self.path, mode)
            self._identity = _identity(self.path)
            self.socket.listen(_BACKLOG)
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        """Removes the path, if it still is this socket's, and closes. May be called again."""
        with suppress(OSError):
            if self.socket.fileno() >= 0 and _identity(self.path) == self._identity:
                os.unlink(self.path)
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(path: Path) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _remove_stale(path: Path) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, "is there already, and no socket", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # So many wait there that somebody will come for them.
    raise OSError(errno.EADDRINUSE, "somebody listens there", str(path))
