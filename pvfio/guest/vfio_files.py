"""What the VFIO files of a process have in common: their numbers, and reading and answering requests.

A file number of the guest kernel is no file descriptor of this process: the numbers begin high so that a
mix-up fails.
"""

from __future__ import annotations

import errno
from typing import Any

from pvfio.abi import ffi
from pvfio.errors import VfioError

__all__ = ["FileTable", "argument", "write_capabilities"]

_FIRST = 0x10000
_CAP_HEADER = ffi.sizeof("struct vfio_info_cap_header")


class FileTable:
    """Open files by number, for the requests that name another file."""

    def __init__(self) -> None:
        self._files: dict[int, object] = {}
        self._next = _FIRST

    def __len__(self) -> int:
        return len(self._files)

    def install(self, file: object) -> int:
        """A new number for ``file``. Numbers are not used again."""
        fd = self._next
        self._next += 1
        self._files[fd] = file
        return fd

    def get(self, fd: int) -> object:
        """The file of a number. Raises EBADF for one that is not open."""
        file = self._files.get(fd)
        if file is None:
            raise VfioError(errno.EBADF, "file", f"number {fd}")
        return file

    def remove(self, fd: int) -> None:
        """Forgets a number; nothing for one that is not open."""
        self._files.pop(fd, None)


def argument(struct: str, arg: Any, operation: str, minimum: int | None = None) -> Any:
    """``arg`` as ``struct NAME *``.

    Raises EFAULT for a null pointer, EINVAL where its argsz is below ``minimum`` bytes (by default the
    structure's size).
    """
    if isinstance(arg, int) or arg == ffi.NULL:
        raise VfioError(errno.EFAULT, operation, f"no struct {struct}")
    typed = ffi.cast(f"struct {struct} *", arg)
    needed = ffi.sizeof(f"struct {struct}") if minimum is None else minimum
    if typed.argsz < needed:
        raise VfioError(errno.EINVAL, operation, f"argsz {typed.argsz} is below {needed}")
    return typed


def write_capabilities(info: Any, size: int, chain: list[tuple[int, int, bytes]]) -> None:
    """Puts (id, version, body) capabilities behind a structure of ``size`` bytes, or says how much room they
    need.

    With too small an argsz there is no chain, cap_offset is 0 and argsz becomes what is needed, as in Linux.
    """
    whole = b""
    for number, (cap_id, version, body) in enumerate(chain):
        padded = body + bytes(-len(body) % 8)
        following = size + len(whole) + _CAP_HEADER + len(padded)
        following = following if number + 1 < len(chain) else 0
        whole += cap_id.to_bytes(2, "little") + version.to_bytes(2, "little")
        whole += following.to_bytes(4, "little") + padded
    info.cap_offset = 0
    if not whole:
        return
    if info.argsz < size + len(whole):
        info.argsz = size + len(whole)
        return
    ffi.buffer(ffi.cast("uint8_t *", info) + size, len(whole))[:] = whole
    info.cap_offset = size
