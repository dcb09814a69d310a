"""What servers say and offer, the limits they name, and what they ask of the client."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.vfio_user.client import VfioUserVfio
from pvfio.vfio_user.messages import RegionInfo
from pvfio.vfio_user.version import Limits
from tests.vfio_user.client.fake_server import CONFIG, RW, VECTORS, FakeServer, Request, fds, refused

pytestmark = pytest.mark.touches_c

PAGE = 4096
BASE = 0x40_0000
MSIX = lib.VFIO_PCI_MSIX_IRQ_INDEX
READ, WRITE = lib.VFIO_USER_REGION_READ, lib.VFIO_USER_REGION_WRITE
MAP, UNMAP = lib.VFIO_USER_DMA_MAP, lib.VFIO_USER_DMA_UNMAP
DMA_READ, DMA_WRITE = lib.VFIO_USER_DMA_READ, lib.VFIO_USER_DMA_WRITE


# What servers say.


@pytest.mark.parametrize(
    "answer",
    [
        lambda request: request.body,
        lambda request: request.body + bytes(3),
        lambda request: request.body + bytes(5),
        lambda request: struct.pack("<QII", 0, 0, 8) + bytes(8),
        lambda request: struct.pack("<QII", 8, 0, 4) + bytes(4),
        lambda request: b"",
    ],
)
async def test_a_reply_about_something_else(server: FakeServer, device: Any, answer: Any) -> None:
    server.answers[READ] = answer
    with refused(errno.EPROTO):
        await device.region(0).read(0, 4)
    del server.answers[READ]
    assert await device.region(0).read(0, 4) == 0


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ((READ, 1234, 1), "no request"),
        ((MAP, None, 1), "instead of"),
    ],
)
async def test_replies_to_nothing(
    server: FakeServer, device: Any, vfio: VfioUserVfio, message: tuple[int, int | None, int], why: str
) -> None:
    def answer(request: Request) -> None:
        assert server.channel is not None
        command, number, flags = message
        if number is None:
            (number,) = vfio._links[0]._calls
        server.channel.send_nowait(command, number, flags)

    server.answers[READ] = answer
    with refused(errno.ENODEV, why):
        await device.region(0).read(0, 4)


async def test_garbage(server: FakeServer, device: Any) -> None:
    def answer(request: Request) -> None:
        assert server.channel is not None
        os.write(lib.pv_vfu_socket(server.channel.ptr), b"\xff" * 64)

    server.answers[READ] = answer
    with refused(errno.ENODEV, "size"):
        await device.region(0).read(0, 4)


async def test_descriptors_nobody_asked_for_are_closed(server: FakeServer, device: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert server.channel is not None
    for _ in range(3):
        server.channel.send_nowait(DMA_READ, 5, 0, 0, bytes(16), fds=[0, 1, 2])
    await server.answered(3)
    assert len(os.listdir("/proc/self/fd")) == before


# Regions that can be mapped.


def offer(server: FakeServer, size: int, *, area: tuple[int, int], fds: int = 1, offset: int = 0) -> int:
    """BAR 0 with a file of ``size`` bytes; the file."""
    file = os.memfd_create("bar")
    os.ftruncate(file, size)
    info = RegionInfo(0, len(server.bar), RW | lib.VFIO_REGION_INFO_FLAG_MMAP, offset, (area,))
    server.region_infos[0] = info, [file] * fds
    return file


async def test_a_mapped_area_is_the_servers_file(server: FakeServer, vfio: VfioUserVfio) -> None:
    """Without the MSI-X page, and with the offset in the file; the rest of the BAR goes by message."""
    file = offer(server, 3 * PAGE, area=(0, 2 * PAGE), offset=PAGE)
    async with vfio.open_device(vfio.paths[0]) as device:
        bar = device.region(0)
        assert bar.areas == ((0, PAGE),)
        bar.mmap(0, PAGE)[8:12] = b"abcd"
        bar.doorbell(16, 0x1122)
        assert os.pread(file, 12, PAGE + 8) == b"abcd\0\0\0\0\x22\x11\0\0"
        assert server.bar == bytes(len(server.bar))
        with refused(errno.EINVAL):
            bar.doorbell(PAGE, 1)
        with refused(errno.EINVAL):
            bar.mmap(PAGE, PAGE)
    os.close(file)


async def test_a_doorbell_that_is_not_mapped_is_a_message(server: FakeServer, device: Any) -> None:
    bar = device.region(0)
    bar.doorbell(8, 0x11223344)
    bar.doorbell(16, 0x55, 8)
    assert await bar.read(8, 4) == 0x11223344
    assert await bar.read(16, 8) == 0x55
    for bad in ((0xFFE, 0, 4), (0x2000, 0, 4), (0, 0, 3), (0, 1 << 32, 4), (-4, 0, 4)):
        with refused(errno.EINVAL):
            bar.doorbell(*bad)


async def test_submissions_are_messages_and_wrap_in_their_page(server: FakeServer, device: Any) -> None:
    items = np.arange(3 * 64, dtype=np.uint8).reshape(3, 64)
    bar = device.region(0)
    bar.movdir64b(PAGE - 64, items)
    await bar.read(0)
    assert bytes(server.bar[PAGE - 64 : PAGE]) == items[0].tobytes()
    assert bytes(server.bar[:128]) == items[1:].tobytes()
    for offset in (32, PAGE, 2 * PAGE, -64):
        with refused(errno.EINVAL):
            bar.movdir64b(offset, items)


async def test_a_file_that_shrinks_ends_nobody(server: FakeServer, vfio: VfioUserVfio) -> None:
    file = offer(server, PAGE, area=(0, PAGE))
    async with vfio.open_device(vfio.paths[0]) as device:
        bar = device.region(0)
        view = bar.mmap(0, PAGE)
        view[0] = 7
        os.ftruncate(file, 0)
        assert view[0] == 0
        bar.doorbell(0, 1)
    os.close(file)


async def test_a_file_that_is_too_short_is_not_mapped(server: FakeServer, vfio: VfioUserVfio) -> None:
    file = offer(server, 0, area=(0, PAGE))
    async with vfio.open_device(vfio.paths[0]) as device:
        bar = device.region(0)
        with refused(errno.ENXIO):
            bar.mmap(0, PAGE)
        bar.doorbell(0, 3)
        assert await bar.read(0) == 3
    os.close(file)


async def test_files_do_not_pile_up(server: FakeServer, vfio: VfioUserVfio) -> None:
    file = offer(server, PAGE, area=(0, PAGE), fds=5)

    async def once() -> int:
        async with vfio.open_device(vfio.paths[0]) as device:
            device.region(0).doorbell(0, 1)
        return await fds(server)

    before = await once()
    for _ in range(3):
        assert await once() == before
    os.close(file)


# Limits.


async def test_few_descriptors_at_a_time(server: FakeServer, vfio: VfioUserVfio) -> None:
    server.limits = Limits(max_msg_fds=8)
    async with vfio.open_device(vfio.paths[0]) as device:
        irq = device.irq(MSIX)
        await irq.enable(VECTORS)
        said = [
            (*struct.unpack("<IIIII", r.body)[3:], r.fds) for r in server.of(lib.VFIO_USER_DEVICE_SET_IRQS)
        ]
        assert said == [(16, 4, 4), (8, 8, 8), (0, 8, 8)]
        for vector in range(VECTORS):
            os.eventfd_write(server.eventfds[vector], 1)
            assert await irq.wait(vector, deadline=5) == 1


async def test_a_part_of_the_interrupts_is_refused(server: FakeServer, device: Any) -> None:
    def answer(request: Request) -> bytes | int:
        _, _, _, start, count = struct.unpack_from("<IIIII", request.body)
        return errno.ENOMEM if count and start == 8 else b""

    server.answers[lib.VFIO_USER_DEVICE_SET_IRQS] = answer
    with refused(errno.ENOMEM):
        await device.irq(MSIX).enable(VECTORS)
    last = struct.unpack_from("<IIIII", server.requests[-1].body)
    assert last[1:] == (lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_TRIGGER, MSIX, 0, 0)
    del server.answers[lib.VFIO_USER_DEVICE_SET_IRQS]
    await device.irq(lib.VFIO_PCI_INTX_IRQ_INDEX).enable()


async def test_small_transfers(server: FakeServer, vfio: VfioUserVfio) -> None:
    server.limits = Limits(max_msg_fds=8, max_data_xfer_size=48)
    async with vfio.open_device(vfio.paths[0]) as device:
        assert await device.config.read(0, 4) == 0x11111234
    counts = [struct.unpack_from("<QII", r.body)[2] for r in server.of(READ) if r.body[8] == CONFIG]
    assert max(counts) == 48


async def test_few_maps(server: FakeServer, vfio: VfioUserVfio) -> None:
    server.limits = Limits(max_msg_fds=8, max_dma_maps=3)
    async with vfio.open_device(vfio.paths[0]) as device:
        container = device.container
        assert container.info().dma_avail == 3
        with refused(errno.ENOSPC):
            await container.alloc(4 * PAGE, scattered=True)
        assert not server.maps
        assert container.info().dma_avail == 3
        await container.alloc(2 * PAGE, scattered=True)
        await container.alloc(PAGE)
        with refused(errno.ENOSPC):
            await container.alloc(PAGE)


async def test_other_pages(server: FakeServer, vfio: VfioUserVfio) -> None:
    server.answers[lib.VFIO_USER_VERSION] = lambda _: b'\0\0\0\0{"capabilities":{"pgsizes":65536}}\0'
    with refused(errno.EINVAL, "4 KiB"):
        async with vfio.open_device(vfio.paths[0]):
            pass


# What servers ask.


@pytest.fixture
async def mapped(server: FakeServer, device: Any) -> Any:
    """Three pages at BASE: to be read, both, to be written; then nothing."""
    container = device.container
    buffer = await container.alloc(3 * PAGE, map=False)
    for page, rights in enumerate(({"write": False}, {}, {"read": False})):
        await container.map_dma(BASE + page * PAGE, buffer[page * PAGE : (page + 1) * PAGE], **rights)
    buffer[:] = [n % 251 for n in range(3 * PAGE)]
    return buffer


async def test_memory_is_read_and_written(server: FakeServer, mapped: Any) -> None:
    server.ask(DMA_READ, BASE + 5, 100)
    server.ask(DMA_READ, BASE + PAGE - 7, 20)
    server.ask(DMA_WRITE, BASE + 2 * PAGE - 2, 4, b"wxyz")
    first, across, written = await server.answered(3)
    assert first == (0, struct.pack("<QQ", BASE + 5, 100) + mapped[5:105].tobytes())
    assert across == (0, struct.pack("<QQ", BASE + PAGE - 7, 20) + mapped[PAGE - 7 : PAGE + 13].tobytes())
    assert written == (0, struct.pack("<QQ", BASE + 2 * PAGE - 2, 4))
    assert mapped[2 * PAGE - 2 : 2 * PAGE + 2].tobytes() == b"wxyz"


@pytest.mark.parametrize(
    ("command", "address", "count", "number"),
    [
        (DMA_READ, BASE - 1, 1, errno.EFAULT),
        (DMA_READ, BASE - 1, 2, errno.EFAULT),
        (DMA_READ, BASE + 2 * PAGE, 1, errno.EACCES),
        (DMA_READ, BASE + 2 * PAGE - 1, 2, errno.EACCES),
        (DMA_READ, BASE + 3 * PAGE, 1, errno.EFAULT),
        (DMA_READ, (1 << 64) - 1, 4, errno.EFAULT),
        (DMA_READ, BASE, 0, errno.EINVAL),
        (DMA_READ, BASE, (1 << 20) + 1, errno.EINVAL),
        (DMA_READ, BASE, 1 << 63, errno.EINVAL),
        (DMA_WRITE, BASE, 1, errno.EACCES),
        (DMA_WRITE, BASE + PAGE - 1, 2, errno.EACCES),
        (DMA_WRITE, BASE + 3 * PAGE - 1, 2, errno.EFAULT),
        (DMA_WRITE, BASE + PAGE, 1 << 40, errno.EINVAL),
        (lib.VFIO_USER_REGION_READ, BASE, 1, errno.ENOTSUP),
    ],
)
async def test_what_it_may_not(
    server: FakeServer, device: Any, mapped: Any, command: int, address: int, count: int, number: int
) -> None:
    before = mapped.tobytes()
    data = bytes(min(count, 64)) if command == DMA_WRITE else b""
    server.ask(command, address, count, data)
    assert await server.answered() == [(number, b"")]
    assert mapped.tobytes() == before
    assert await device.region(0).read(0) == 0


async def test_it_asks_while_it_is_asked(server: FakeServer, device: Any, mapped: Any) -> None:
    """A call waits for its reply, which comes only after the server has got an answer of its own."""

    def answer(request: Request) -> bytes:
        server.ask(DMA_READ, BASE, 8)
        return request.body + bytes(4)

    server.answers[READ] = answer
    for _ in range(20):
        await device.region(0).read(0, 4)
    assert {error for error, _ in await server.answered(20)} == {0}


async def test_unmapped_memory_is_not_reached_any_more(server: FakeServer, device: Any, mapped: Any) -> None:
    server.ask(DMA_READ, BASE, 8)
    assert (await server.answered())[0][0] == 0
    await device.container.unmap_dma(BASE, PAGE)
    server.ask(DMA_READ, BASE, 8)
    assert (await server.answered())[0][0] == errno.EFAULT
