"""Memory of others, mapped: what is refused, and how many mappings many ranges take."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import ffi, lib
from pvfio.memory import PAGE_SIZE, FdMapping, FdMemory, map_fd

pytestmark = pytest.mark.touches_c

HUGE = 2 << 20
SIZE = 16 * PAGE_SIZE


@contextmanager
def memory(size: int = SIZE, seals: int = 0, flags: int = 0) -> Iterator[int]:
    """A memfd."""
    fd = os.memfd_create("somebody's", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def reopened(fd: int, flags: int) -> Iterator[int]:
    again = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    try:
        yield again
    finally:
        os.close(again)


def vmas() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("somebody's")


Take = Callable[[int, int, int, bool], FdMapping]


@pytest.fixture(params=["alone", "shared"])
def take(request: pytest.FixtureRequest) -> Take:
    """Both ways to map a range."""
    files = FdMemory()

    def one(fd: int, offset: int, size: int, write: bool) -> FdMapping:
        if request.param == "alone":
            return map_fd(fd, offset, size, write=write)
        return files.map(fd, offset, size, write=write)

    return one


def store(fd: int, offset: int, data: bytes) -> None:
    os.pwrite(fd, data, offset)


def test_what_is_written_is_there(take: Take) -> None:
    with memory() as fd:
        store(fd, 3 * PAGE_SIZE, b"theirs")
        mapping = take(fd, 3 * PAGE_SIZE, 2 * PAGE_SIZE, True)
        view = mapping.view()
        assert len(view) == mapping.size == 2 * PAGE_SIZE
        assert bytes(view[:6]) == b"theirs"
        assert mapping.address == int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
        view[PAGE_SIZE : PAGE_SIZE + 4] = b"ours"
        assert os.pread(fd, 4, 4 * PAGE_SIZE) == b"ours"
        mapping.close()
        mapping.close()
        assert not mapping.poisoned
        assert bytes(view[:6]) == b"theirs"
        with pytest.raises(ValueError, match="closed"):
            mapping.view()


def test_reading_takes_no_right_to_write(take: Take) -> None:
    with memory() as fd, reopened(fd, os.O_RDONLY) as read_only:
        store(fd, 0, b"theirs")
        mapping = take(read_only, 0, PAGE_SIZE, False)
        view = mapping.view()
        assert bytes(view[:6]) == b"theirs"
        assert view.readonly
        mapping.close()


@contextmanager
def a_pipe() -> Iterator[int]:
    ends = os.pipe()
    yield ends[0]
    for end in ends:
        os.close(end)


@contextmanager
def a_socket() -> Iterator[int]:
    ends = socket.socketpair()
    yield ends[0].fileno()
    for end in ends:
        end.close()


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    yield fd
    os.close(fd)


@contextmanager
def opened_fd(fd: int) -> Iterator[int]:
    yield fd
    os.close(fd)


@contextmanager
def closed() -> Iterator[int]:
    with memory() as fd:
        other = os.dup(fd)
    os.close(other)
    yield other


@contextmanager
def memory_opened(flags: int) -> Iterator[int]:
    with memory() as fd, reopened(fd, flags) as again:
        yield again


REFUSED: list[tuple[str, Callable[[], Any], int, int, bool, int]] = [
    ("a pipe", a_pipe, 0, PAGE_SIZE, False, errno.ENODEV),
    ("a socket", a_socket, 0, PAGE_SIZE, False, errno.ENODEV),
    ("a directory", lambda: opened("/", os.O_RDONLY), 0, PAGE_SIZE, False, errno.ENODEV),
    ("a device", lambda: opened("/dev/zero", os.O_RDWR), 0, PAGE_SIZE, True, errno.ENODEV),
    ("an event", lambda: opened_fd(os.eventfd(0)), 0, PAGE_SIZE, False, errno.ENODEV),
    ("/proc", lambda: opened("/proc/self/maps", os.O_RDONLY), 0, PAGE_SIZE, False, errno.ENXIO),
    ("/sys", lambda: opened("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY), 0, PAGE_SIZE, False,
     errno.ENODEV),
    ("no descriptor", closed, 0, PAGE_SIZE, False, errno.EBADF),
    ("a path", lambda: memory_opened(os.O_PATH), 0, PAGE_SIZE, False, errno.EBADF),
    ("written, read only", lambda: memory_opened(os.O_RDONLY), 0, PAGE_SIZE, True, errno.EACCES),
    ("read, write only", lambda: memory_opened(os.O_WRONLY), 0, PAGE_SIZE, False, errno.EACCES),
    ("written, write only", lambda: memory_opened(os.O_WRONLY), 0, PAGE_SIZE, True, errno.EACCES),
    ("sealed", lambda: memory(seals=fcntl.F_SEAL_WRITE), 0, PAGE_SIZE, True, errno.EPERM),
    ("nothing", memory, 0, 0, True, errno.EINVAL),
    ("less", memory, 0, -PAGE_SIZE, True, errno.EINVAL),
    ("part of a page", memory, 0, PAGE_SIZE + 1, True, errno.EINVAL),
    ("inside a page", memory, 1, PAGE_SIZE, True, errno.EINVAL),
    ("before the file", memory, -PAGE_SIZE, PAGE_SIZE, True, errno.EINVAL),
    ("behind the file", memory, SIZE, PAGE_SIZE, True, errno.ENXIO),
    ("over its end", memory, PAGE_SIZE, SIZE, True, errno.ENXIO),
    ("an empty file", lambda: memory(0), 0, PAGE_SIZE, True, errno.ENXIO),
    ("a sum too large", memory, (1 << 63) - PAGE_SIZE, PAGE_SIZE, True, errno.EOVERFLOW),
    ("an offset too large", memory, 1 << 64, PAGE_SIZE, True, errno.EOVERFLOW),
    ("a size too large", memory, PAGE_SIZE, 1 << 64, True, errno.EOVERFLOW),
    ("a size no process has", lambda: memory(1 << 50), 0, 1 << 50, True, errno.ENOMEM),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "offset", "size", "write", "number"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_what_cannot_be_mapped(
    make: Any, offset: int, size: int, write: bool, number: int, take: Take
) -> None:
    before = vmas()
    with make() as fd:
        with pytest.raises(OSError) as raised:
            take(fd, offset, size, write)
        wanted = (errno.ENOMEM, errno.ENOSPC) if number == errno.ENOMEM else (number,)
        assert raised.value.errno in wanted
    assert vmas() == before


def test_a_file_sealed_against_writing_can_be_read(take: Take) -> None:
    with memory() as fd:
        store(fd, 0, b"theirs")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
        mapping = take(fd, 0, PAGE_SIZE, False)
        assert bytes(mapping.view()[:6]) == b"theirs"
        mapping.close()


def test_a_file_that_ends_inside_a_page(take: Take) -> None:
    with memory(PAGE_SIZE + 5) as fd:
        store(fd, PAGE_SIZE, b"end..")
        mapping = take(fd, PAGE_SIZE, PAGE_SIZE, False)
        assert bytes(mapping.view()[:8]) == b"end..\0\0\0"
        mapping.close()


def test_a_file_on_a_disk(take: Take, tmp_path: Path) -> None:
    path = tmp_path / "somebody's"
    path.write_bytes(bytes(PAGE_SIZE) + b"theirs" + bytes(PAGE_SIZE))
    with path.open("r+b") as file:
        mapping = take(file.fileno(), PAGE_SIZE, PAGE_SIZE, True)
        assert bytes(mapping.view()[:6]) == b"theirs"
        mapping.close()


class TestTruncated:
    def test_it_is_zero_pages_then(self, take: Take) -> None:
        with memory() as fd:
            store(fd, 0, b"\x55" * SIZE)
            mapping = take(fd, PAGE_SIZE, 8 * PAGE_SIZE, True)
            view = mapping.view()
            os.ftruncate(fd, 2 * PAGE_SIZE)
            assert view[0] == 0x55
            assert not mapping.poisoned
            assert view[5 * PAGE_SIZE] == 0
            assert mapping.poisoned
            view[6 * PAGE_SIZE] = 1
            assert view[0] == 0x55
            mapping.close()

    def test_the_owner_of_all_ranges_learns_of_it(self) -> None:
        files = FdMemory()
        with memory() as fd, memory() as other:
            cut, whole = files.map(fd, 0, SIZE, write=False), files.map(other, 0, SIZE, write=True)
            os.ftruncate(fd, 0)
            assert not files.poisoned
            assert not select.select([files.poisoned_fd], [], [], 0)[0]
            assert cut.view()[0] == 0
            assert files.poisoned
            assert select.select([files.poisoned_fd], [], [], 0)[0]
            assert (cut.poisoned, whole.poisoned) == (True, False)
            os.ftruncate(fd, SIZE)
            with pytest.raises(OSError) as raised:
                files.map(fd, 0, PAGE_SIZE, write=False)
            assert raised.value.errno == errno.EIO
            cut.close()
            whole.close()

    def test_a_file_that_cannot_be_is_not_guarded(self, take: Take) -> None:
        with memory(seals=fcntl.F_SEAL_SHRINK) as fd, pytest.raises(PermissionError):
            mapping = take(fd, 0, SIZE, True)
            os.ftruncate(fd, 0)
        mapping.close()

    def test_the_list_of_guards_does_not_grow(self) -> None:
        with memory() as fd:
            for _ in range(lib.PV_GUARDS // 16):
                map_fd(fd, 0, PAGE_SIZE).close()
            mapping = map_fd(fd, 0, PAGE_SIZE)
            os.ftruncate(fd, 0)
            assert mapping.view()[0] == 0
            assert mapping.poisoned


class TestManyRanges:
    def test_of_one_file_take_one_mapping(self) -> None:
        files = FdMemory()
        count = 65535
        with memory(count * PAGE_SIZE) as fd:
            store(fd, 77 * PAGE_SIZE, b"theirs")
            before = vmas()
            ranges = [files.map(fd, page * PAGE_SIZE, PAGE_SIZE, write=True) for page in range(count)]
            assert files.mappings == vmas() - before == 1
            assert bytes(ranges[77].view()[:6]) == b"theirs"
            for one in ranges:
                one.close()
            assert files.mappings == 1
            files.close()
            assert files.mappings == vmas() - before == 0

    def test_each_descriptor_has_its_own_rights(self) -> None:
        files = FdMemory()
        with memory() as fd, reopened(fd, os.O_RDONLY) as read_only:
            first = files.map(read_only, 0, PAGE_SIZE, write=False)
            second = files.map(fd, 0, PAGE_SIZE, write=True)
            assert files.mappings == 2
            with pytest.raises(PermissionError):
                files.map(read_only, 0, PAGE_SIZE, write=True)
            third = files.map(read_only, PAGE_SIZE, PAGE_SIZE, write=False)
            assert files.mappings == 2
            assert not third.writable
            assert third.view().readonly
            for mapping in (first, second, third):
                mapping.close()

    def test_a_file_that_grows(self) -> None:
        files = FdMemory()
        with memory(PAGE_SIZE) as fd:
            ranges = []
            for page in range(500):
                os.ftruncate(fd, (page + 1) * PAGE_SIZE)
                store(fd, page * PAGE_SIZE, page.to_bytes(2, "little"))
                ranges.append(files.map(fd, page * PAGE_SIZE, PAGE_SIZE, write=True))
            assert files.mappings <= 10
            assert [int.from_bytes(one.view()[:2], "little") for one in ranges] == list(range(500))
            for one in ranges:
                one.close()
            assert files.mappings == 1

    def test_what_is_not_used_goes_but_for_the_last(self) -> None:
        files = FdMemory()
        with ExitStack() as stack:
            fds = [stack.enter_context(memory()) for _ in range(4)]
            before = vmas()
            for fd in fds:
                files.map(fd, 0, PAGE_SIZE, write=True).close()
            kept = files.map(fds[0], 0, PAGE_SIZE, write=True)
            assert files.mappings == vmas() - before == 2
            files.map(fds[1], 0, PAGE_SIZE, write=True).close()
            assert files.mappings == vmas() - before == 2
            kept.close()
            assert files.mappings == vmas() - before == 1

    def test_files_in_use_outlive_the_owner(self) -> None:
        files = FdMemory()
        with memory() as fd:
            kept = files.map(fd, 0, PAGE_SIZE, write=True)
            files.close()
            kept.view()[0] = 7
            assert os.pread(fd, 1, 0) == b"\x07"
            kept.close()
            assert files.mappings == 0

    def test_limits(self) -> None:
        files = FdMemory(files=3, room=4 * SIZE)
        with ExitStack() as stack:
            fds = [stack.enter_context(memory()) for _ in range(4)]
            large = stack.enter_context(memory(8 * SIZE))
            ranges = [files.map(fd, 0, PAGE_SIZE, write=True) for fd in fds[:2]]
            ranges.append(files.map(large, SIZE, 2 * SIZE, write=True))
            for fd, size in ((fds[3], PAGE_SIZE), (large, PAGE_SIZE)):
                with pytest.raises(OSError) as raised:
                    files.map(fd, 0, size, write=True)
                assert raised.value.errno == errno.ENOSPC
            for mapping in ranges:
                mapping.close()
            with pytest.raises(OSError) as raised:
                files.map(large, 0, 4 * SIZE, write=True)
            assert raised.value.errno == errno.ENOSPC

    def test_a_file_larger_than_any_process(self) -> None:
        files = FdMemory()
        with memory(1 << 52) as fd:
            far = files.map(fd, 1 << 51, PAGE_SIZE, write=True)
            near = files.map(fd, 0, PAGE_SIZE, write=True)
            far.view()[0] = 9
            assert os.pread(fd, 1, 1 << 51) == b"\x09"
            assert files.mappings == 2
            far.close()
            near.close()
            assert files.mappings == 0

    @given(st.lists(st.tuples(st.sampled_from(["map", "close", "grow"]), st.integers(0, 15), st.booleans())))
    def test_any_order(self, steps: list[tuple[str, int, bool]]) -> None:
        """Ranges come and go while files grow: every one shows its own bytes, and none is left."""
        files = FdMemory()
        before = vmas()
        with memory(4 * PAGE_SIZE) as first, memory(4 * PAGE_SIZE) as second:
            fds, pages = (first, second), [4, 4]
            for fd in fds:
                store(fd, 0, b"".join(bytes([fd & 0xFF, n]).ljust(PAGE_SIZE) for n in range(4)))
            held: list[tuple[FdMapping, int, int]] = []
            for what, number, write in steps:
                which = number & 1
                fd = fds[which]
                if what == "grow" and pages[which] < 64:
                    for page in range(pages[which], pages[which] + number):
                        store(fd, page * PAGE_SIZE, bytes([fd & 0xFF, page]).ljust(PAGE_SIZE))
                    pages[which] += number
                elif what == "map":
                    page = (number * 7) % pages[which]
                    held.append((files.map(fd, page * PAGE_SIZE, PAGE_SIZE, write=write), fd, page))
                elif what == "close" and held:
                    held.pop(number % len(held))[0].close()
                for mapping, owner, page in held:
                    assert bytes(mapping.view()[:2]) == bytes([owner & 0xFF, page])
            assert files.mappings <= 2 * 2 + len(held)
            for mapping, _, _ in held:
                mapping.close()
            assert files.mappings <= 1
            files.close()
            assert files.mappings == 0
        assert vmas() == before


@pytest.fixture
def huge() -> Iterator[int]:
    """A memfd of two huge pages."""
    try:
        with memory(2 * HUGE, flags=os.MFD_HUGETLB | os.MFD_HUGE_2MB) as fd:
            mmap.mmap(fd, 2 * HUGE).close()
            yield fd
    except OSError as error:
        pytest.skip(f"no two huge pages of 2 MiB here: {error}")


class TestHugePages:
    def test_ranges_may_be_smaller_than_their_pages(self, huge: int, take: Take) -> None:
        mapping = take(huge, HUGE + PAGE_SIZE, PAGE_SIZE, True)
        mapping.view()[:4] = b"ours"
        with mmap.mmap(huge, 2 * HUGE) as whole:
            assert whole[HUGE + PAGE_SIZE : HUGE + PAGE_SIZE + 4] == b"ours"
        mapping.close()

    def test_truncated(self, huge: int, take: Take) -> None:
        mapping = take(huge, 0, 2 * HUGE, True)
        view = mapping.view()
        view[0] = 1
        os.ftruncate(huge, HUGE)
        assert view[HUGE + 5 * PAGE_SIZE + 1] == 0
        assert mapping.poisoned
        assert view[0] == 1
        mapping.close()
