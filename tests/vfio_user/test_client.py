"""The client against servers that refuse, lie, hang and die."""

from __future__ import annotations

import errno
import gc
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import pvfio
from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, VfioError
from pvfio.vfio_user.client import VfioUserVfio
from pvfio.vfio_user.version import Limits
from tests.vfio_user.fake_server import CONFIG, VECTORS, FakeServer, Request

pytestmark = pytest.mark.touches_c

PAGE = 4096
BASE = 0x40_0000
MSIX = lib.VFIO_PCI_MSIX_IRQ_INDEX
READ, WRITE = lib.VFIO_USER_REGION_READ, lib.VFIO_USER_REGION_WRITE
MAP, UNMAP = lib.VFIO_USER_DMA_MAP, lib.VFIO_USER_DMA_UNMAP
DMA_READ, DMA_WRITE = lib.VFIO_USER_DMA_READ, lib.VFIO_USER_DMA_WRITE


@pytest.fixture
async def server(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[FakeServer]:
    fake = FakeServer(tmp_path / "socket")
    await nursery.start(fake.run)
    yield fake
    nursery.cancel_scope.cancel()


@pytest.fixture
async def vfio(server: FakeServer) -> AsyncIterator[VfioUserVfio]:
    async with VfioUserVfio([str(server.path)], ram=16 << 20, deadline=5, grace=0.2) as vfio:
        yield vfio


@pytest.fixture
async def device(vfio: VfioUserVfio) -> AsyncIterator[Any]:
    async with vfio.open_device(vfio.paths[0]) as device:
        yield device


def refused(number: int, match: str = "") -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: .*{match}")


# No server, or none to agree with.


async def test_there_is_no_server(tmp_path: Path) -> None:
    for path, number in ((tmp_path / "none", errno.ENOENT), (tmp_path / "dead", errno.ECONNREFUSED)):
        if number == errno.ECONNREFUSED:
            with trio.socket.socket(trio.socket.AF_UNIX) as sock:
                await sock.bind(str(path))
        with refused(number):
            async with pvfio.open_device(f"vfio-user:{path}"):
                pass


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (errno.EPERM, errno.EPERM),
        (b"", errno.EINVAL),
        (b"\1\0\0\0", errno.EPROTO),
        (b"\0\0\2\0", errno.EPROTO),
        (b"\0\0\0\0{", errno.EINVAL),
        (b'\0\0\0\0{"capabilities":{"max_msg_fds":-1}}\0', errno.EINVAL),
        (b'\0\0\0\0{"capabilities":{"pgsizes":65536}}\0', errno.EINVAL),
    ],
)
async def test_no_agreement(server: FakeServer, answer: bytes | int, number: int) -> None:
    server.answers[lib.VFIO_USER_VERSION] = lambda _: answer
    with refused(number):
        async with pvfio.open_device(f"vfio-user:{server.path}"):
            pass


async def test_a_server_that_never_answers(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(tmp_path / "socket"))
        sock.listen(1)
        start = trio.current_time()
        with pytest.raises(DeadlineExceeded):
            async with pvfio.open_device(f"vfio-user:{tmp_path / 'socket'}?deadline=3"):
                pass
        assert trio.current_time() - start == pytest.approx(3)


@pytest.mark.parametrize(
    "uri",
    [
        "vfio-user:",
        "vfio-user:x?ram=1&ram",
        "vfio-user:x?nonsense=1",
        "vfio-user:x?share=maybe",
        "vfio-user:x?deadline=0",
    ],
)
async def test_uris_that_name_nothing(uri: str) -> None:
    with pytest.raises(ValueError):
        async with pvfio.open_device(uri):
            pass


async def test_there_is_no_iommufd(vfio: VfioUserVfio) -> None:
    with refused(errno.ENOENT):
        await vfio.open_iommufd()


# Servers that go.


async def test_a_server_that_goes_ends_every_wait(server: FakeServer, device: Any) -> None:
    await device.irq(MSIX).enable(2)
    buffer = await device.container.alloc(PAGE)
    server.answers[READ] = server.answers[MAP] = lambda _: None
    ended = []

    async def ends(what: Any) -> None:
        with refused(errno.ENODEV, "gone"):
            await what
        ended.append(what)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends, device.region(0).read(0))
        nursery.start_soon(ends, device.irq(MSIX).wait(0, deadline=60))
        nursery.start_soon(ends, device.container.alloc(PAGE))
        await server.until(lambda: bool(server.of(READ) and server.of(MAP)[1:]))
        assert server.channel is not None
        server.channel.close()
    assert len(ended) == 3
    for again in (
        device.region(0).read(0),
        device.reset(),
        device.irq(MSIX).trigger(0),
        device.container.alloc(PAGE),
    ):
        with refused(errno.ENODEV, "gone"):
            await again
    with refused(errno.ENODEV, "gone"):
        device.region(0).doorbell(0, 1)
    await device.container.free(buffer)


async def test_the_device_is_there_again_with_its_server(server: FakeServer, vfio: VfioUserVfio) -> None:
    path = vfio.paths[0]
    async with vfio.open_device(path) as device:
        await device.container.alloc(PAGE, iova=BASE)
        assert server.channel is not None
        server.channel.close()
        with refused(errno.ENODEV):
            await device.region(0).read(0)
        await device.close()
        group = vfio._groups[-1]
        again = await group.open_device(path)
        assert await again.region(0).read(0) == 0
        assert server.maps == {BASE: PAGE}
        assert server.connections == 2
        await device.container.unmap_dma(BASE, PAGE)
        assert not server.maps
        await again.close()


async def test_nothing_is_left_of_many_lost_connections(server: FakeServer, vfio: VfioUserVfio) -> None:
    async def once() -> int:
        async with vfio.open_device(vfio.paths[0]) as device:
            await device.irq(MSIX).enable(3)
            await device.container.alloc(PAGE)
            assert server.channel is not None
            server.channel.close()
            with refused(errno.ENODEV):
                await device.region(0).read(0)
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = await once()
    for _ in range(5):
        after = await once()
    assert after == before


# Deadlines and cancellation.


async def test_a_late_reply_is_dropped(server: FakeServer, vfio: VfioUserVfio) -> None:
    vfio._links[0].deadline = 0.05
    async with vfio.open_device(vfio.paths[0]) as device:
        region = device.region(0)
        held: list[Request] = []
        server.answers[READ] = held.append
        with pytest.raises(DeadlineExceeded, match="read"):
            await region.read(0)
        with trio.move_on_after(0.02) as scope:
            await region.read(8)
        assert scope.cancelled_caught
        del server.answers[READ]
        assert server.channel is not None
        vfio._links[0].deadline = 5
        server.bar[0:4] = b"abcd"
        for number, request in enumerate(held):
            server.channel.send_nowait(READ, _id_of(vfio, number), 1, 0, request.body + b"late")
        assert await region.read(0) == int.from_bytes(b"abcd", "little")
        assert not vfio._links[0]._calls


def _id_of(vfio: VfioUserVfio, number: int) -> int:
    """The id of a request that nobody waits for any more."""
    return sorted(vfio._links[0]._calls)[number]


async def test_a_cancelled_map_is_undone(server: FakeServer, device: Any, vfio: VfioUserVfio) -> None:
    reached = trio.Event()

    def answer(request: Request) -> None:
        reached.set()

    server.answers[MAP] = answer
    buffer = await device.container.alloc(3 * PAGE, map=False, scattered=True)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.container.map_dma, BASE, buffer)
            await reached.wait()
            scope.cancel()
            with trio.CancelScope(shield=True):
                await server.until(lambda: len(server.of(MAP)) == 3)
                del server.answers[MAP]
                for request in server.of(MAP):
                    _, _, _, address, size = struct.unpack("<IIQQQ", request.body)
                    server.maps[address] = size
                assert server.channel is not None
                for number in sorted(vfio._links[0]._calls):
                    server.channel.send_nowait(MAP, number, 1, 0)
    assert not server.maps
    assert len(server.of(UNMAP)) == 3
    assert device.container.info().dma_avail == 65535
    assert buffer.iova is None
    await device.container.map_dma(BASE, buffer)
    assert len(server.maps) == 3


async def test_a_cancelled_map_that_is_never_answered(server: FakeServer, vfio: VfioUserVfio) -> None:
    """The server is given up; what it may reach stays where it is until it serves again."""
    async with vfio.open_device(vfio.paths[0]) as device:
        container = device.container
        server.answers[MAP] = lambda _: None
        buffer = await container.alloc(PAGE, map=False)
        with trio.move_on_after(0.01):
            await container.map_dma(BASE, buffer)
        pins = sum(memory.stats().pins for memory in vfio.memories.values())
        assert pins == 1
        with refused(errno.ENODEV, "no answer"):
            await device.region(0).read(0)
        with pytest.raises(DeadlineExceeded):
            await device.close()
        del server.answers[MAP]
        again = await vfio._groups[-1].open_device(vfio.paths[0])
        assert sum(memory.stats().pins for memory in vfio.memories.values()) == 0
        await again.close()


async def test_an_unmap_that_is_not_answered(server: FakeServer, vfio: VfioUserVfio) -> None:
    with pytest.raises(DeadlineExceeded, match="close"):
        async with vfio.open_device(vfio.paths[0]) as device:
            await device.container.alloc(PAGE, iova=BASE)
            server.answers[UNMAP] = lambda _: None
            vfio._links[0].deadline = 0.05
            with pytest.raises(DeadlineExceeded, match="unmap"):
                await device.container.unmap_dma(BASE, PAGE)
            assert sum(memory.stats().pins for memory in vfio.memories.values()) == 1
            assert await device.container.try_unmap_dma(BASE, PAGE) == 0


# Refusals.


async def test_a_map_that_is_refused_in_part_is_nowhere(server: FakeServer, device: Any) -> None:
    buffer = await device.container.alloc(4 * PAGE, map=False, scattered=True)

    def answer(request: Request) -> bytes | int:
        _, _, _, address, size = struct.unpack("<IIQQQ", request.body)
        if address == BASE + 2 * PAGE:
            return errno.ENOMEM
        server.maps[address] = size
        return b""

    server.answers[MAP] = answer
    with refused(errno.ENOMEM) as caught:
        await device.container.map_dma(BASE, buffer)
    assert (caught.value.operation, caught.value.iova, caught.value.length) == ("map_dma", BASE, 4 * PAGE)
    assert not server.maps
    assert device.container.info().dma_avail == 65535
    batch = [BASE + PAGE * n for n in (8, 2, 9)]
    with refused(errno.ENOMEM) as caught:
        await device.container.map_dma_batch(batch, [buffer.vaddr] * 3, PAGE)
    assert caught.value.index == 1
    assert not server.maps
    assert await device.container.try_unmap_dma(0, 1 << 30) == 0


async def test_a_server_that_refuses_an_unmap_is_given_up(server: FakeServer, device: Any) -> None:
    await device.container.alloc(PAGE, iova=BASE)
    server.answers[UNMAP] = lambda _: errno.ENOENT
    assert await device.container.unmap_dma(BASE, PAGE) == PAGE
    with refused(errno.ENODEV, "refused an unmap"):
        await device.region(0).read(0)


async def test_maps_carry_the_file_and_where_in_it(server: FakeServer, device: Any) -> None:
    buffer = await device.container.alloc(3 * PAGE, scattered=True, write=False)
    requests = server.of(MAP)
    assert [request.fds for request in requests] == [1, 1, 1]
    said = [struct.unpack("<IIQQQ", request.body) for request in requests]
    assert [(argsz, flags, address, size) for argsz, flags, _, address, size in said] == [
        (32, lib.VFIO_USER_F_DMA_REGION_READ, buffer.iova + n * PAGE, PAGE) for n in range(3)
    ]
    assert len({offset for _, _, offset, _, _ in said}) == 3
    await device.container.free(buffer)
    assert [struct.unpack("<IIQQ", request.body)[1:] for request in server.of(UNMAP)] == [
        (0, said[n][3], PAGE) for n in range(3)
    ]


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
