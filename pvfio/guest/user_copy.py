"""Copies between the kernel and a process's memory that answer EFAULT where an address is not the process's.

The machine's guest process is this process, so the copy is made by the host kernel, which checks every page: through
a memfd, one copy each way. Not modelled: page-in delays, partial copies (a copy that cannot be completed is EFAULT).
"""

from __future__ import annotations

import errno
import os
from typing import Any

from pvfio.abi import ffi

__all__ = ["USER_TOP", "copy_from_user", "copy_to_user"]

USER_TOP = 0x7FFF_FFFF_F000
"""The first byte above a process's addresses (x86-64, 4-level tables)."""


def _window(address: int, size: int) -> Any:
    return ffi.buffer(ffi.cast("char *", address), size)


def copy_to_user(address: int, data: bytes) -> None:
    """Writes ``data`` at a process address. Raises OSError (EFAULT); some bytes may have been written then."""
    if not data:
        return
    fd = os.memfd_create("pvfio-copy", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, data, 0)
        done = os.preadv(fd, [_window(address, len(data))], 0)
    finally:
        os.close(fd)
    if done != len(data):
        raise OSError(errno.EFAULT, f"process address {address:#x} length {len(data):#x}")


def copy_from_user(address: int, size: int) -> bytes:
    """``size`` bytes from a process address. Raises OSError (EFAULT)."""
    if not size:
        return b""
    fd = os.memfd_create("pvfio-copy", os.MFD_CLOEXEC)
    try:
        if os.pwrite(fd, _window(address, size), 0) != size:
            raise OSError(errno.EFAULT, f"process address {address:#x} length {size:#x}")
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)
