"""VFIO_DEVICE_SET_IRQS: data types by actions by indexes, and what each mistake returns."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError

pytestmark = pytest.mark.touches_c

NONE, BOOL, EVENTFD = 1, 2, 4
MASK, UNMASK, TRIGGER = 8, 16, 32
INTX, MSI, MSIX, ERR, REQ = range(5)
RAISE, ACK = 0x34, 0x38
VECTORS = 4


class Bench:
    """An open device file, raw requests to it, and eventfds."""

    def __init__(self, machine: Any, device: Any) -> None:
        self.machine = machine
        self.device = device
        self.file = device.file
        self.fds: list[int] = []

    def eventfd(self) -> int:
        self.fds.append(os.eventfd(0, os.EFD_NONBLOCK))
        return self.fds[-1]

    def set(
        self, index: int, flags: int, start: int, count: int, data: bytes = b"", argsz: int | None = None
    ) -> None:
        memory = ffi.new("uint8_t[]", 20 + len(data) + 64)
        request = ffi.cast("struct vfio_irq_set *", memory)
        request.argsz = 20 + len(data) if argsz is None else argsz
        request.flags, request.index, request.start, request.count = flags, index, start, count
        ffi.buffer(memory)[20 : 20 + len(data)] = data
        self.file.ioctl(lib.VFIO_DEVICE_SET_IRQS, memory)

    def enable(self, index: int, *fds: int, start: int = 0) -> None:
        self.set(index, EVENTFD | TRIGGER, start, len(fds), struct.pack(f"={len(fds)}i", *fds))

    def fired(self, fd: int) -> int:
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def poke(self, register: int, value: int) -> None:
        self.device.region(2).write_nowait(register, value)


@pytest.fixture
async def bench(emulated: Any) -> AsyncIterator[Bench]:
    machine = await emulated(intx=True, vectors=VECTORS)
    async with machine.vfio.open_device(machine.names[0]) as device:
        await device.set_bus_master()
        bench = Bench(machine, device)
        yield bench
        for fd in bench.fds:
            os.close(fd)


def refused(number: int) -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: ")


BAD = errno.EINVAL
REQUESTS = [
    ("argsz below the header", MSIX, NONE | TRIGGER, 0, 1, b"", 19, BAD),
    ("unknown index", 5, NONE | TRIGGER, 0, 1, b"", None, BAD),
    ("unknown flag", MSIX, NONE | TRIGGER | 0x40, 0, 1, b"", None, BAD),
    ("no data type", MSIX, TRIGGER, 0, 1, b"", None, BAD),
    ("two data types", MSIX, NONE | BOOL | TRIGGER, 0, 1, b"\1", None, BAD),
    ("no action", MSIX, NONE, 0, 1, b"", None, errno.ENOTTY),
    ("two actions", MSIX, NONE | TRIGGER | MASK, 0, 1, b"", None, errno.ENOTTY),
    ("start beyond the vectors", MSIX, NONE | TRIGGER, VECTORS, 0, b"", None, BAD),
    ("too many vectors", MSIX, NONE | TRIGGER, 1, VECTORS, b"", None, BAD),
    ("start + count wraps", MSIX, NONE | TRIGGER, 2, 0xFFFFFFFE, b"", None, BAD),
    ("bools missing", MSIX, BOOL | TRIGGER, 0, 2, b"\1", None, BAD),
    ("eventfds missing", MSIX, EVENTFD | TRIGGER, 0, 2, bytes(7), None, BAD),
    ("no MSI", MSI, NONE | TRIGGER, 0, 0, b"", None, BAD),
    ("MSI-X is not enabled: fire", MSIX, NONE | TRIGGER, 0, 1, b"", None, BAD),
    ("MSI-X is not enabled: tear down", MSIX, NONE | TRIGGER, 0, 0, b"", None, BAD),
    ("MSI-X cannot be masked", MSIX, NONE | MASK, 0, 1, b"", None, errno.ENOTTY),
    ("MSI-X cannot be unmasked", MSIX, BOOL | UNMASK, 0, 1, b"\1", None, errno.ENOTTY),
    ("MSI-X, no vectors", MSIX, EVENTFD | TRIGGER, 0, 0, b"", None, BAD),
    ("INTx is not enabled: fire", INTX, NONE | TRIGGER, 0, 1, b"", None, BAD),
    ("INTx is not enabled: mask", INTX, NONE | MASK, 0, 1, b"", None, BAD),
    ("INTx is not enabled: unmask", INTX, NONE | UNMASK, 0, 1, b"", None, BAD),
    ("INTx has one interrupt", INTX, NONE | MASK, 0, 2, b"", None, BAD),
    ("INTx, not an open file", INTX, EVENTFD | TRIGGER, 0, 1, struct.pack("=i", 9999), None, errno.EBADF),
    ("MSI-X, not an open file", MSIX, EVENTFD | TRIGGER, 0, 1, struct.pack("=i", 9999), None, errno.EBADF),
    ("ERR cannot be masked", ERR, NONE | MASK, 0, 1, b"", None, errno.ENOTTY),
    ("REQ cannot be unmasked", REQ, NONE | UNMASK, 0, 1, b"", None, errno.ENOTTY),
    ("ERR without an eventfd: fire", ERR, NONE | TRIGGER, 0, 1, b"", None, BAD),
    ("REQ without an eventfd: tear down", REQ, NONE | TRIGGER, 0, 0, b"", None, BAD),
    ("REQ, no data", REQ, EVENTFD | TRIGGER, 0, 0, b"", None, BAD),
    ("REQ, no bool", REQ, BOOL | TRIGGER, 0, 0, b"", None, BAD),
    ("REQ, not an open file", REQ, EVENTFD | TRIGGER, 0, 1, struct.pack("=i", 9999), None, errno.EBADF),
]


@pytest.mark.parametrize(
    ("name", "index", "flags", "start", "count", "data", "argsz", "number"),
    REQUESTS,
    ids=[r[0] for r in REQUESTS],
)
async def test_requests_that_are_refused(
    bench: Bench,
    name: str,
    index: int,
    flags: int,
    start: int,
    count: int,
    data: bytes,
    argsz: Any,
    number: int,
) -> None:
    with refused(number):
        bench.set(index, flags, start, count, data, argsz)
    fd = bench.eventfd()
    bench.enable(MSIX, fd)
    bench.poke(RAISE, 0)
    assert bench.fired(fd) == 1


async def test_a_null_pointer(bench: Bench) -> None:
    for arg in (0, ffi.NULL):
        with refused(errno.EFAULT):
            bench.file.ioctl(lib.VFIO_DEVICE_SET_IRQS, arg)


async def test_only_eventfds(bench: Bench) -> None:
    read, write = os.pipe()
    try:
        for index in (INTX, MSIX, ERR, REQ):
            with refused(errno.EINVAL):
                bench.enable(index, read)
    finally:
        os.close(read)
        os.close(write)


async def test_vectors_cannot_be_added(bench: Bench) -> None:
    first, second = bench.eventfd(), bench.eventfd()
    bench.enable(MSIX, first, second)
    with refused(errno.EINVAL):
        bench.enable(MSIX, second, start=2)
    with refused(errno.EINVAL):
        bench.enable(MSIX, first, second, start=1)
    bench.enable(MSIX, second, start=0)
    bench.poke(RAISE, 0)
    assert (bench.fired(first), bench.fired(second)) == (0, 1)
    bench.set(MSIX, NONE | TRIGGER, 0, 0)
    bench.enable(MSIX, *[first] * 4)
    bench.poke(RAISE, 3)
    assert bench.fired(first) == 1


async def test_minus_one_takes_a_vector_out(bench: Bench) -> None:
    fds = [bench.eventfd() for _ in range(3)]
    bench.enable(MSIX, fds[0], -1, fds[2])
    for vector in range(3):
        bench.poke(RAISE, vector)
    assert [bench.fired(fd) for fd in fds] == [1, 0, 1]
    bench.enable(MSIX, -1, start=2)
    bench.poke(RAISE, 2)
    assert bench.fired(fds[2]) == 0
    bench.enable(MSIX, fds[1], start=1)
    bench.poke(RAISE, 1)
    # The first was pending while the vector was masked (PCI 3.0 6.8.2.9).
    assert bench.fired(fds[1]) == 2


async def test_a_failure_in_the_middle_takes_the_vectors_out(bench: Bench) -> None:
    fds = [bench.eventfd() for _ in range(2)]
    with refused(errno.EBADF):
        bench.enable(MSIX, fds[0], 9999, fds[1])
    with refused(errno.EINVAL):
        bench.set(MSIX, NONE | TRIGGER, 0, 1)
    bench.enable(MSIX, *fds)
    with refused(errno.EBADF):
        bench.enable(MSIX, fds[1], 9999)
    for vector in range(2):
        bench.poke(RAISE, vector)
    assert [bench.fired(fd) for fd in fds] == [0, 0]


async def test_loopback_by_none_and_by_bool(bench: Bench) -> None:
    fds = [bench.eventfd() for _ in range(4)]
    bench.enable(MSIX, *fds)
    bench.set(MSIX, NONE | TRIGGER, 1, 2)
    assert [bench.fired(fd) for fd in fds] == [0, 1, 1, 0]
    bench.set(MSIX, BOOL | TRIGGER, 0, 4, b"\1\0\0\1")
    assert [bench.fired(fd) for fd in fds] == [1, 0, 0, 1]


async def test_an_eventfd_works_after_its_number_was_closed(bench: Bench) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    kept = os.dup(fd)
    bench.enable(MSIX, fd)
    os.close(fd)
    bench.poke(RAISE, 0)
    assert bench.fired(kept) == 1
    os.close(kept)


async def test_a_full_counter_does_not_stop_the_kernel(bench: Bench) -> None:
    fd = os.eventfd(0)
    bench.fds.append(fd)
    os.eventfd_write(fd, (1 << 64) - 2)
    for index in (MSIX, REQ):
        bench.enable(index, fd)
        bench.set(index, NONE | TRIGGER, 0, 1)
    bench.poke(RAISE, 0)
    assert os.eventfd_read(fd) == (1 << 64) - 2


async def test_intx_mask_by_none_and_by_bool(bench: Bench) -> None:
    fd = bench.eventfd()
    bench.enable(INTX, fd)
    for mask, unmask in (((NONE, b""), (NONE, b"")), ((BOOL, b"\1"), (BOOL, b"\1"))):
        bench.set(INTX, mask[0] | MASK, 0, 1, mask[1])
        bench.poke(RAISE, 0)
        assert bench.fired(fd) == 0
        bench.set(INTX, BOOL | UNMASK, 0, 1, b"\0")
        assert bench.fired(fd) == 0
        bench.set(INTX, unmask[0] | UNMASK, 0, 1, unmask[1])
        assert bench.fired(fd) == 1
        bench.poke(ACK, 0)
        bench.set(INTX, NONE | UNMASK, 0, 1)
    bench.set(INTX, BOOL | MASK, 0, 1, b"\0")
    bench.poke(RAISE, 0)
    assert bench.fired(fd) == 1
    with refused(errno.ENOTTY):
        bench.set(INTX, EVENTFD | MASK, 0, 1, struct.pack("=i", fd))


async def test_intx_eventfd_is_replaced_and_taken_out(bench: Bench) -> None:
    first, second = bench.eventfd(), bench.eventfd()
    bench.enable(INTX, first)
    bench.enable(INTX, second)
    bench.set(INTX, NONE | TRIGGER, 0, 1)
    assert (bench.fired(first), bench.fired(second)) == (0, 1)
    bench.enable(INTX, -1)
    bench.set(INTX, BOOL | TRIGGER, 0, 1, b"\1")
    assert bench.fired(second) == 0
    bench.set(INTX, NONE | TRIGGER, 0, 0)
    bench.enable(MSIX, first)


async def test_intx_that_is_up_fires_when_it_is_enabled(bench: Bench) -> None:
    bench.poke(RAISE, 0)
    fd = bench.eventfd()
    bench.enable(INTX, fd)
    assert bench.fired(fd) == 1


async def test_unmasking_by_eventfd(bench: Bench) -> None:
    fd, unmask = bench.eventfd(), bench.eventfd()
    bench.enable(INTX, fd)
    bench.set(INTX, EVENTFD | UNMASK, 0, 1, struct.pack("=i", unmask))
    with refused(errno.EBUSY):
        bench.set(INTX, EVENTFD | UNMASK, 0, 1, struct.pack("=i", unmask))
    bench.poke(RAISE, 0)
    assert bench.fired(fd) == 1
    os.eventfd_write(unmask, 1)
    await trio.testing.wait_all_tasks_blocked()
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(fd)
    assert bench.fired(fd) == 1
    bench.set(INTX, EVENTFD | UNMASK, 0, 1, struct.pack("=i", -1))
    os.eventfd_write(unmask, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert bench.fired(fd) == 0


async def test_the_kernels_own_messages(bench: Bench) -> None:
    kernel = bench.machine.kernel
    device = kernel.devices[0]
    for index in (ERR, REQ):
        assert not kernel.vfio.signal(device, index)
        fd = bench.eventfd()
        bench.enable(index, fd)
        assert kernel.vfio.signal(device, index)
        assert bench.fired(fd) == 1
        bench.set(index, NONE | TRIGGER, 0, 1)
        bench.set(index, BOOL | TRIGGER, 0, 1, b"\1")
        bench.set(index, BOOL | TRIGGER, 0, 1, b"\0")
        assert bench.fired(fd) == 2
        bench.enable(index, -1)
        assert not kernel.vfio.signal(device, index)
        bench.enable(index, fd)
        bench.set(index, NONE | TRIGGER, 0, 0)
        assert not kernel.vfio.signal(device, index)
    with refused(errno.EINVAL):
        bench.set(ERR, NONE | TRIGGER, 1, 1)
