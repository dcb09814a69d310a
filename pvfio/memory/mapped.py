"""Memory of somebody else's file descriptor, mapped: a client's RAM in a server, a server's BAR in a client.

Models what mmap of a memfd, a hugetlbfs file or a file on a local disk gives, checked first, and guarded (guard.h)
where its owner could truncate it. Does not model device memory (a dma-buf, /dev/dax), files that a network or another
program stands behind (a fault in them may take for ever), or what its owner does with the content: that may change at
any time.

Nothing here is for several threads at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import weakref
from collections.abc import Callable
from typing import Any, Final

from pvfio.abi import ffi, lib
from pvfio.memory.guest import PAGE_SIZE

__all__ = ["FdMapping", "FdMemory", "map_fd"]

_LARGEST_OFFSET: Final = (1 << 63) - 1
_LARGEST_WHOLE: Final = 1 << 40
"""Files beyond this size are mapped range by range."""


_Key = tuple[int, int, bool]
"""Device, inode, writable."""


class _Bell:
    """An eventfd that lives as long as a mapping that may ring it."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self.fd)


class _Unmap:
    """What is called when nobody holds the pointer any more."""

    __slots__ = ("_bell", "_raw")

    def __init__(self, raw: Any, bell: _Bell | None) -> None:
        self._raw = raw
        self._bell = bell

    def __call__(self, _pointer: Any) -> None:
        lib.pv_mapped_destroy(self._raw)


class _Mapped:
    """One mmap: bytes [``start``, ``end``) of a file. Unmapped when nobody holds it or its ``ptr``."""

    def __init__(
        self, fd: int, start: int, end: int, *, page: int, key: _Key, guarded: bool, bell: _Bell | None
    ) -> None:
        flags = lib.PV_MAP_WRITE * key[2] | lib.PV_MAP_GUARD * guarded
        raw = ffi.new("struct pv_mapped *")
        rc = lib.pv_mapped_create(raw, fd, start, end - start, page, flags, bell.fd if bell else -1)
        if rc:
            raise OSError(-rc, f"mmap of {end - start:#x} bytes: {os.strerror(-rc)}")
        self.start = start
        self.end = end
        self.key = key
        self.users = 0
        self._guard: int = raw.guard
        self.ptr = ffi.gc(raw.ptr, _Unmap(raw, bell))

    @property
    def poisoned(self) -> bool:
        return bool(lib.pv_guard_poisoned(self._guard))


class FdMapping:
    """A range of a file that is mapped: ``size`` bytes at ``ptr`` (``uint8_t *``).

    ``close`` it; the pointer is for use until then. Memory that cannot be written faults (SIGSEGV) when it is.
    """

    __slots__ = ("_mapped", "_release", "ptr", "size", "writable")

    def __init__(
        self, mapped: _Mapped, offset: int, size: int, writable: bool, release: Callable[[_Mapped], None]
    ) -> None:
        self.ptr = mapped.ptr + offset
        self.size = size
        self.writable = writable
        self._mapped: _Mapped | None = mapped
        self._release = release

    @property
    def address(self) -> int:
        """The process address of the first byte."""
        return int(ffi.cast("uintptr_t", self.ptr))

    @property
    def poisoned(self) -> bool:
        """The file was truncated, or failed to give a page, and an access found out: part of what is mapped is zero
        pages of our own. So it stays. False once closed.
        """
        return self._mapped is not None and self._mapped.poisoned

    def view(self) -> memoryview:
        """The bytes. The mapping lives as long as a view of it. ``ValueError`` once closed."""
        if self._mapped is None:
            raise ValueError("the mapping is closed")
        start = self.address - int(ffi.cast("uintptr_t", self._mapped.ptr))
        whole = memoryview(ffi.buffer(self._mapped.ptr, start + self.size))[start:]
        return whole if self.writable else whole.toreadonly()

    def close(self) -> None:
        """Unmaps, unless somebody else uses the same pages. May be called again."""
        mapped, self._mapped = self._mapped, None
        self.ptr = ffi.NULL
        if mapped is not None:
            self._release(mapped)


class FdMemory:
    """Files of one owner, each mapped once however many of its ranges are in use.

    A file is known by its inode; at most two mappings of it are current, one of them for reading only, for ranges that
    are not to be written. A file that has grown beyond its mapping is mapped anew, twice as large as before (the ranges
    in use keep what they have), so a file that grows and grows takes few mappings too. The one that was used last stays
    when its last range goes.

    ``files``: the most mappings at a time, and ``room``: the most bytes they may have together; a process has 65,530
    and 2**47.
    """

    def __init__(self, *, files: int = 1024, room: int = 1 << 44) -> None:
        self._files = files
        self._room = room
        self._bell = _Bell()
        self._current: dict[_Key, _Mapped] = {}
        self._all: weakref.WeakSet[_Mapped] = weakref.WeakSet()
        self._idle: _Key | None = None

    def map(self, fd: int, offset: int, size: int, *, write: bool) -> FdMapping:
        """Maps ``size`` bytes at ``offset``, both multiples of 4096, to be read, or read and written.

        The descriptor stays the caller's, and may be closed at once. Raises ``OSError``: EBADF, ENODEV (a pipe, a
        socket, a directory, a device, a file system that is not local), EACCES (the descriptor does not allow it),
        EINVAL (no size, not aligned), EOVERFLOW, ENXIO (beyond the end of the file), EPERM (sealed against writing),
        EIO (the file was truncated while it was mapped), ENOSPC (``files``, ``room``), ENOMEM.
        """
        info = _check(fd, offset, size, write)
        inode = (info.st_dev, info.st_ino)
        found = self._find(inode, offset + size, write)
        if found is None:
            found = self._add(fd, (*inode, write), info.st_size, offset, size)
        if found.poisoned:
            raise OSError(errno.EIO, "the file was truncated while it was mapped")
        found.users += 1
        return FdMapping(found, offset - found.start, size, write, self._release)

    @property
    def poisoned(self) -> bool:
        """A file in use was truncated, and an access found out (``FdMapping.poisoned``)."""
        return any(mapped.poisoned for mapped in self._all)

    @property
    def poisoned_fd(self) -> int:
        """An eventfd, readable once ``poisoned`` is true. Not the caller's to close."""
        return self._bell.fd

    @property
    def mappings(self) -> int:
        """How many mmaps there are now."""
        return len(self._all)

    def close(self) -> None:
        """Forgets what is not in use. Ranges in use stay until they are closed."""
        self._current.clear()
        self._idle = None

    def _find(self, inode: tuple[int, int], end: int, write: bool) -> _Mapped | None:
        for writable in (True,) if write else (True, False):
            found = self._current.get((*inode, writable))
            if found is not None and end <= found.end:
                return found
        return None

    def _add(self, fd: int, key: _Key, file_size: int, offset: int, size: int) -> _Mapped:
        page = _page_size(fd)
        before = self._current.get(key)
        start, end = 0, _round_up(file_size, page)
        if before is not None and page == PAGE_SIZE:  # hugetlbfs would reserve what is not there yet
            end = max(end, min(2 * before.end, _LARGEST_WHOLE))
        taken = self._taken()
        whole = end <= _LARGEST_WHOLE and taken + end <= self._room
        if not whole:
            start, end = offset // page * page, _round_up(offset + size, page)
        if len(self._all) >= self._files or taken + end - start > self._room:
            raise OSError(errno.ENOSPC, f"{len(self._all)} mappings of {taken:#x} bytes: no room for more")
        made = _map(fd, start, end, page, key, self._bell)
        self._all.add(made)
        if whole:
            self._current[key] = made
            if self._idle == key:
                self._idle = None
        return made

    def _taken(self) -> int:
        return sum(mapped.end - mapped.start for mapped in self._all)

    def _release(self, mapped: _Mapped) -> None:
        mapped.users -= 1
        if mapped.users:
            return
        key = mapped.key
        if self._current.get(key) is not mapped or key == self._idle:
            return
        if self._idle is not None and not self._current[self._idle].users:
            del self._current[self._idle]
        self._idle = key


def map_fd(fd: int, offset: int, size: int, *, write: bool = False) -> FdMapping:
    """Maps a range on its own; arguments and errors as ``FdMemory.map``, but for its limits."""
    info = _check(fd, offset, size, write)
    page = _page_size(fd)
    start, end = offset // page * page, _round_up(offset + size, page)
    mapped = _map(fd, start, end, page, (info.st_dev, info.st_ino, write), None)
    return FdMapping(mapped, offset - start, size, write, lambda _: None)


def _map(fd: int, start: int, end: int, page: int, key: _Key, bell: _Bell | None) -> _Mapped:
    # A huge page may be missing although its file has the size.
    guarded = page != PAGE_SIZE or not _cannot_shrink(fd)
    return _Mapped(fd, start, end, page=page, key=key, guarded=guarded, bell=bell)


def _check(fd: int, offset: int, size: int, write: bool) -> os.stat_result:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.ENODEV, "not a file of memory")
    mode = fcntl.fcntl(fd, fcntl.F_GETFL)
    if mode & os.O_PATH:
        raise OSError(errno.EBADF, "the descriptor is only a path")
    access = mode & os.O_ACCMODE
    if access == os.O_WRONLY or (write and access != os.O_RDWR):
        raise OSError(errno.EACCES, f"the descriptor cannot be {'written' if write else 'read'}")
    if size <= 0 or offset < 0 or size % PAGE_SIZE or offset % PAGE_SIZE:
        raise OSError(errno.EINVAL, f"{offset:#x}+{size:#x} are not whole pages")
    if offset + size > _LARGEST_OFFSET:
        raise OSError(errno.EOVERFLOW, f"{offset:#x}+{size:#x} is beyond what a file can be")
    if offset + size > _round_up(info.st_size, PAGE_SIZE):
        raise OSError(errno.ENXIO, f"{offset:#x}+{size:#x} is beyond the file's {info.st_size:#x} bytes")
    return info


def _page_size(fd: int) -> int:
    page: int = lib.pv_file_page_size(fd)
    if page < 0:
        raise OSError(-page, "not a file of memory, or of a disk of this machine")
    return page


def _cannot_shrink(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
