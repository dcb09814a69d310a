"""DMA_MAP and DMA_UNMAP of a server, and what its devices can then reach."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from pvfio.abi import lib
from pvfio.vfio_user import messages
from pvfio.vfio_user.messages import DmaMap, DmaUnmap
from pvfio.vfio_user.version import Limits
from tests.vfio_user.raw import CONFIG, HEADER, RawClient, Reply, Served, memory, serve

pytestmark = pytest.mark.touches_c

MIB = 1 << 20
PAGE = 4096
REGISTERS, SRC, DST, COUNT, CMD, STATUS, DONE, FAULT = (
    0x4000,
    0x4008,
    0x4010,
    0x4018,
    0x401C,
    0x4020,
    0x4024,
    0x4028,
)
OUT, IN = 1, 2
OK, ABORTED, CANCELLED, BUSY = 1, 2, 3, 5
READABLE, WRITABLE = 1, 2


@pytest.fixture
def fd() -> Iterator[int]:
    """A memfd of 1 MiB."""
    with ExitStack() as stack:
        made = memory()
        stack.callback(os.close, made)
        yield made


async def order(client: RawClient, kind: int, address: int, count: int, scratch: int = 0) -> None:
    """Tells the device to move data."""
    await client.write(0, SRC, scratch if kind == OUT else address, 8)
    await client.write(0, DST, address if kind == OUT else scratch, 8)
    await client.write(0, COUNT, count)
    await client.write(0, CMD, kind)


async def finished(client: RawClient) -> int:
    """The device's status, once it is not busy: at once, but for memory that it asks for."""
    while (status := await client.read(0, STATUS)) == BUSY:
        pass
    return status


async def dma(client: RawClient, kind: int, address: int, count: int, scratch: int = 0) -> int:
    """The device's status after a transfer."""
    await order(client, kind, address, count, scratch)
    return await finished(client)


async def test_to_and_from_memory(client: RawClient, fd: int) -> None:
    assert await client.map(0x10000, 8 * PAGE, fd, offset=2 * PAGE) == 0
    await client.write_bytes(0, 0, b"from the device")
    assert await dma(client, OUT, 0x10000 + PAGE - 4, 15) == OK
    assert os.pread(fd, 15, 3 * PAGE - 4) == b"from the device"
    os.pwrite(fd, b"to the device", 2 * PAGE)
    assert await dma(client, IN, 0x10000, 13, 64) == OK
    assert await client.read_bytes(0, 64, 13) == b"to the device"


async def test_where_maps_end(client: RawClient, fd: int) -> None:
    assert await client.map(0x10000, PAGE, fd) == 0
    assert await dma(client, OUT, 0x10000 + PAGE - 8, 16) == ABORTED
    assert (await client.read(0, DONE), await client.read(0, FAULT, 8)) == (8, 0x11000)
    assert await client.map(0x11000, PAGE, fd, offset=8 * PAGE) == 0
    await client.write_bytes(0, 0, b"0123456789abcdef")
    assert await dma(client, OUT, 0x10000 + PAGE - 8, 16) == OK
    assert os.pread(fd, 8, PAGE - 8) + os.pread(fd, 8, 8 * PAGE) == b"0123456789abcdef"


async def test_permissions(client: RawClient, fd: int) -> None:
    assert await client.map(0, PAGE, fd, flags=READABLE) == 0
    assert await client.map(PAGE, PAGE, fd, flags=WRITABLE) == 0
    assert [await dma(client, kind, 0, 8) for kind in (IN, OUT)] == [OK, ABORTED]
    assert [await dma(client, kind, PAGE, 8) for kind in (IN, OUT)] == [ABORTED, OK]


async def test_read_only_descriptors(client: RawClient, fd: int) -> None:
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert await client.map(0, PAGE, read_only) == errno.EACCES
    assert await client.map(0, PAGE, read_only, flags=READABLE) == 0
    os.close(read_only)
    assert await dma(client, IN, 0, 8) == OK


async def test_unmap(client: RawClient, served: Served, fd: int) -> None:
    for page in range(4):
        assert await client.map(page * PAGE, PAGE, fd, offset=page * PAGE) == 0
    assert await client.unmap(PAGE, PAGE) == 0
    assert [await dma(client, IN, page * PAGE, 8) for page in range(4)] == [OK, ABORTED, OK, OK]
    assert await client.unmap(PAGE, PAGE) == 0, "what is not mapped may be unmapped"
    assert await client.map(PAGE, PAGE, fd) == 0
    assert await client.unmap(0, 3 * PAGE) == 0, "several maps"
    assert [await dma(client, IN, page * PAGE, 8) for page in range(4)] == [ABORTED, ABORTED, ABORTED, OK]
    assert await client.unmap(0, 1 << 63) == 0
    assert served.bus.maps == 0
    assert await client.unmap(1 << 63, 1 << 63) == 0


async def test_unmap_does_not_cut(client: RawClient, served: Served, fd: int) -> None:
    assert await client.map(0x10000, 4 * PAGE, fd) == 0
    assert await client.map(0x20000, PAGE) == 0
    for start, size in ((0x10000, PAGE), (0x11000, PAGE), (0x13000, 0x10000), (0xF000, 2 * PAGE)):
        assert await client.unmap(start, size) == errno.EINVAL
    assert served.bus.maps == 2
    assert await dma(client, IN, 0x10000, 8) == OK


async def test_unmap_all(client: RawClient, served: Served, fd: int) -> None:
    for page in range(100):
        assert await client.map(page * 2 * PAGE, PAGE, fd if page % 3 else -1) == 0
    assert served.bus.maps == 100
    assert await client.unmap(0, 0, flags=lib.VFIO_DMA_UNMAP_FLAG_ALL) == 0
    assert served.bus.maps == 0
    assert await client.unmap(0, 0, flags=lib.VFIO_DMA_UNMAP_FLAG_ALL) == 0


@pytest.mark.parametrize(
    ("address", "size"),
    [(0x10000, PAGE), (0x13000, PAGE), (0xF000, 2 * PAGE), (0xF000, 16 * PAGE), (0x10000, 4 * PAGE)],
)
@pytest.mark.parametrize("remote", [False, True])
async def test_overlap(client: RawClient, fd: int, address: int, size: int, remote: bool) -> None:
    assert await client.map(0x10000, 4 * PAGE, -1 if remote else fd) == 0
    for other in (fd, -1):
        assert await client.map(address, size, other) == errno.EEXIST
    assert await client.map(0xF000, PAGE, fd) == 0
    assert await client.map(0x14000, PAGE, fd) == 0


async def test_the_last_page(client: RawClient, fd: int) -> None:
    last = (1 << 64) - PAGE
    assert await client.map(last, PAGE, fd) == 0
    assert await dma(client, OUT, last, PAGE) == OK
    assert await client.unmap(last, PAGE) == 0


async def test_files_that_are_no_memory(client: RawClient, fd: int) -> None:
    reader, writer = os.pipe()
    event, folder, null = os.eventfd(0), os.open("/", os.O_RDONLY), os.open("/dev/null", os.O_RDWR)
    bad = {reader: errno.ENODEV, event: errno.ENODEV, folder: errno.ENODEV, null: errno.ENODEV}
    for descriptor, number in bad.items():
        assert await client.map(0, PAGE, descriptor) == number
        os.close(descriptor)
    os.close(writer)
    assert await client.map(0, 2 * MIB, fd) == errno.ENXIO
    assert await client.map(0, PAGE, fd, offset=MIB) == errno.ENXIO
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        assert await client.map(0, PAGE, file.fileno()) == 0
    assert await client.map(PAGE, PAGE, fd) == 0


async def test_a_file_that_is_truncated(served: Served, client: RawClient, fd: int) -> None:
    """What its owner truncated does not end the server; the connection ends, and the next client is served."""
    assert await client.map(0, MIB, fd) == 0
    os.truncate(fd, 0)
    await client.write(0, SRC, 0, 8)
    await client.write(0, DST, 0, 8)
    await client.write(0, COUNT, 64)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        for _ in range(1000):
            await client.write(0, CMD, IN)
    again = await served.connect()
    await again.enable()
    assert await again.read(0, REGISTERS) == 0x54534554


async def test_a_sealed_file_is_taken_as_it_is(client: RawClient, fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert await client.map(0, MIB, fd) == 0
    assert await dma(client, OUT, 0, 64) == OK


async def test_the_most_maps(served: Served, client: RawClient, fd: int) -> None:
    """65,535, sent without waiting, as QEMU does behind a guest's IOMMU; one more is refused."""
    most = 65535

    async def send() -> None:
        for start in range(0, most, 500):
            pages = range(start, min(most, start + 500))
            bodies = [DmaMap(page * PAGE, PAGE).pack() for page in pages]
            await client.send(b"".join(HEADER.pack(5, lib.VFIO_USER_DMA_MAP, 48, 0, 0) + b for b in bodies))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for _ in range(most):
            assert (await client.receive()).error == 0
    assert served.bus.maps == most
    assert await client.map(most * PAGE, PAGE) == errno.ENOSPC
    assert await client.unmap(0, PAGE) == 0
    assert await client.map(most * PAGE, PAGE, fd) == 0
    assert await dma(client, OUT, most * PAGE, 8) == OK
    assert await client.unmap(0, 0, flags=lib.VFIO_DMA_UNMAP_FLAG_ALL) == 0
    assert served.bus.maps == 0


async def test_bus_mastering_off(client: RawClient, fd: int) -> None:
    assert await client.map(0, PAGE, fd) == 0
    await client.write(CONFIG, 4, 2, 2)
    assert await dma(client, OUT, 0, 8) == CANCELLED
    await client.enable()
    assert await dma(client, OUT, 0, 8) == OK


async def test_maps_outlive_a_reset(client: RawClient, fd: int) -> None:
    assert await client.map(0, PAGE, fd) == 0
    assert (await client.call(lib.VFIO_USER_DEVICE_RESET)).error == 0
    assert await dma(client, OUT, 0, 8) == OK


async def test_posted(served: Served, client: RawClient, fd: int) -> None:
    await client.post(lib.VFIO_USER_DMA_MAP, DmaMap(0, PAGE).pack(), [fd])
    assert await dma(client, OUT, 0, 8) == OK
    await client.post(lib.VFIO_USER_DMA_UNMAP, DmaUnmap(0, PAGE).pack())
    assert await dma(client, OUT, 0, 8) == ABORTED


# A device that writes all the time, from a thread of its own.


def is_written(fd: int) -> bool:
    """Whether the first page changes."""
    os.pwrite(fd, bytes(PAGE), 0)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if any(os.pread(fd, PAGE, 0)):
            return True
    return False


@pytest.mark.parametrize("how", ["unmap", "unmap all", "bus mastering off", "gone"])
async def test_when_it_is_answered_no_dma_lands(tmp_path: Path, fd: int, how: str) -> None:
    async with serve(tmp_path, "rogue") as served:
        client = await served.connect()
        await client.enable()
        for _ in range(20):
            await client.write(0, 0, 0x100000, 8)
            await client.write(0, 8, PAGE, 8)
            assert await client.map(0x100000, PAGE, fd) == 0
            assert is_written(fd)
            if how == "unmap":
                assert await client.unmap(0x100000, PAGE) == 0
            elif how == "unmap all":
                assert await client.unmap(0, 0, flags=lib.VFIO_DMA_UNMAP_FLAG_ALL) == 0
            elif how == "bus mastering off":
                await client.write(CONFIG, 4, 2, 2)
                # Not asked of a device: that its last write before has landed when the register is written.
                assert await client.unmap(0x100000, PAGE) == 0
                await client.enable()
            else:
                client.close()
                client = await served.connect()
                await client.enable()
            os.pwrite(fd, bytes(PAGE), 0)
            for _ in range(50):
                assert not any(os.pread(fd, PAGE, 0))
            assert served.bus.maps == 0


# Maps without a file: the device asks the client.


async def test_remote(client: RawClient) -> None:
    client.memory, client.base = bytearray(os.urandom(MIB)), 0x10000000
    assert await client.map(client.base, MIB) == 0
    assert await dma(client, IN, client.base + 0x123, 0x3000) == OK
    assert await client.read_bytes(0, 0, 0x3000) == client.memory[0x123:0x3123]
    await client.write_bytes(0, 0, b"written")
    assert await dma(client, OUT, client.base + 0x800, 7) == OK
    assert client.memory[0x800:0x807] == b"written"
    assert client.asked == 2


async def test_remote_is_split_at_the_clients_limit(served: Served) -> None:
    client = await served.connect(version=False)
    await client.version(Limits(max_data_xfer_size=1000))
    await client.enable()
    client.memory = bytearray(os.urandom(MIB))
    assert await client.map(0, MIB) == 0
    assert await dma(client, IN, 0, 0x4000) == OK
    assert await client.read_bytes(0, 0, 0x4000) == client.memory[:0x4000]
    assert client.asked == 17


async def ask(client: RawClient) -> Reply:
    """The device asks for 8 bytes; the question."""
    assert await client.map(0, MIB) == 0
    await order(client, IN, 64, 8)
    asked = await client.request()
    assert asked.command == lib.VFIO_USER_DMA_READ
    assert messages.parse_dma_read(asked.body, MIB) == (64, 8)
    return asked


async def answer(client: RawClient, asked: Reply, body: bytes, flags: int = 1, error: int = 0) -> None:
    await client.send(HEADER.pack(asked.id, asked.command, 16 + len(body), flags, error) + body)


async def test_region_accesses_are_answered_meanwhile(client: RawClient) -> None:
    asked = await ask(client)
    for _ in range(20):
        assert await client.read(CONFIG, 0) == 0x11E81234
    assert await client.read(0, STATUS) == BUSY
    await answer(client, asked, messages.dma_access(64, 8, b"meanwhil"))
    assert await finished(client) == OK
    assert await client.read_bytes(0, 0, 8) == b"meanwhil"


@pytest.mark.parametrize(
    ("body", "flags", "error"),
    [
        (b"", 0x21, errno.EFAULT),
        (messages.dma_access(64, 8, bytes(4)), 1, 0),
        (messages.dma_access(64, 4, bytes(4)), 1, 0),
        (messages.dma_access(0, 8, bytes(8)), 1, 0),
        (b"", 1, 0),
    ],
    ids=["refused", "cut", "shorter", "another address", "empty"],
)
async def test_bad_answers_are_aborts(client: RawClient, body: bytes, flags: int, error: int) -> None:
    await answer(client, await ask(client), body, flags, error)
    assert await finished(client) == ABORTED


@pytest.mark.parametrize("how", ["reset", "flr", "bus mastering off"])
async def test_a_reset_ends_what_is_asked(client: RawClient, how: str) -> None:
    asked = await ask(client)
    if how == "reset":
        assert (await client.call(lib.VFIO_USER_DEVICE_RESET)).error == 0
    elif how == "flr":
        await client.flr()
    else:
        await client.write(CONFIG, 4, 2, 2)
    await answer(client, asked, messages.dma_access(64, 8, b"too late"))
    await client.enable()
    assert await client.read_bytes(0, 0, 8) == bytes(8)
    client.memory = bytearray(b"in time!" * 512)
    assert await dma(client, IN, 64, 8) == OK


async def test_gone_while_it_is_asked(served: Served) -> None:
    for _ in range(3):
        client = await served.connect()
        await client.enable()
        await ask(client)
        client.close()
    again = await served.connect()
    assert served.bus.maps == 0
    await again.enable()
    assert await again.read(0, REGISTERS) == 0x54534554


async def test_nvme_over_remote_memory(tmp_path: Path) -> None:
    """Queues, Identify and the completion are all reached by messages; commands that send data to the device too."""
    async with serve(tmp_path, "nvme") as served:
        client = await served.connect()
        await client.enable()
        client.memory = queues = bytearray(MIB)
        assert await client.map(0, MIB) == 0
        await client.write(0, lib.NVME_REG_AQA, 7 << 16 | 7)
        await client.write(0, lib.NVME_REG_ASQ, 0x1000, 8)
        await client.write(0, lib.NVME_REG_ACQ, 0x2000, 8)
        await client.write(0, lib.NVME_REG_CC, 4 << 20 | 6 << 16 | 1)
        while not await client.read(0, lib.NVME_REG_CSTS) & 1:
            pass
        # Identify Controller; Get Log Page, error information; Set Features, host behaviour support.
        commands = [(6, 0, 1), (2, 0xFFFFFFFF, 1 | 15 << 16), (9, 0, 0x16)]
        for number, (opcode, nsid, cdw10) in enumerate(commands):
            entry = struct.pack("<II16xQQ6I", opcode | number << 16, nsid, 0x8000, 0, cdw10, 0, 0, 0, 0, 0)
            queues[0x1000 + 64 * number : 0x1040 + 64 * number] = entry
            await client.write(0, 0x1000, number + 1)
            while not queues[0x2000 + 16 * number + 14] & 1:
                assert await client.read(0, lib.NVME_REG_CSTS) == 1
            _, _, cid, status = struct.unpack_from("<II4xHH", queues, 0x2000 + 16 * number)
            assert (cid, status >> 1 & 0x7FF) == (number, 0)
            if opcode == 6:
                assert queues[0x8000 + 24 :].startswith(b"pvfio NVMe Controller")
                queues[0x8000:0x9000] = bytes(0x1000)
