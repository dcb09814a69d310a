"""The client against servers that refuse, lie, hang and die."""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import pvfio
from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded
from pvfio.vfio_user.client import VfioUserVfio
from pvfio.vfio_user.client.link import OWN_LIMITS, Link
from tests.drivers.rig import cancelled_at
from tests.vfio_user.client.fake_server import FakeServer, Request, fds, pins, refused

pytestmark = pytest.mark.touches_c

PAGE = 4096
BASE = 0x40_0000
MSIX = lib.VFIO_PCI_MSIX_IRQ_INDEX
READ, WRITE = lib.VFIO_USER_REGION_READ, lib.VFIO_USER_REGION_WRITE
MAP, UNMAP = lib.VFIO_USER_DMA_MAP, lib.VFIO_USER_DMA_UNMAP
DMA_READ, DMA_WRITE = lib.VFIO_USER_DMA_READ, lib.VFIO_USER_DMA_WRITE


# No server, or none to agree with.


async def test_there_is_no_server(tmp_path: Path) -> None:
    for path, number in ((tmp_path / "none", errno.ENOENT), (tmp_path / "dead", errno.ECONNREFUSED)):
        if number == errno.ECONNREFUSED:
            with trio.socket.socket(trio.socket.AF_UNIX) as sock:
                await sock.bind(str(path))
        with refused(number):
            async with pvfio.open_device(f"vfio-user:{path}"):
                pass


class HangsUp(trio.abc.Instrument):
    """A server that ends every connection before its client has said anything."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen()
        self.socket.setblocking(False)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        with suppress(BlockingIOError):
            self.socket.accept()[0].close()


async def test_a_server_that_hangs_up_at_once(tmp_path: Path, nursery: trio.Nursery) -> None:
    """The task that listens may not have begun when the connection ends, or the other way round."""
    path = tmp_path / "socket"
    server = HangsUp(path)
    link = Link(str(path), "server", deadline=5, grace=0.2, offer=OWN_LIMITS)
    trio.lowlevel.add_instrument(server)
    try:
        for _ in range(20):
            with refused(errno.ENODEV):
                await link.connect(nursery)
    finally:
        trio.lowlevel.remove_instrument(server)
        server.socket.close()


async def test_connecting_is_cancelled_at_every_await(server: FakeServer, nursery: trio.Nursery) -> None:
    link = Link(str(server.path), "server", deadline=5, grace=0.2, offer=OWN_LIMITS)

    async def connects() -> None:
        await link.connect(nursery)
        link.disconnect()

    n = 1
    while any([await cancelled_at(n, connects) for _ in range(8)]):
        assert not link.connected
        n += 1
    assert n > 2
    await link.connect(nursery)
    assert link.connected
    link.disconnect()


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


async def test_a_server_that_goes_ends_every_wait(
    server: FakeServer, device: Any, vfio: VfioUserVfio
) -> None:
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
    assert pins(vfio) == 1
    await device.container.free(buffer)
    assert pins(vfio) == 0


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
        return await fds(server)

    before = await once()
    for _ in range(5):
        assert await once() == before


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
        assert pins(vfio) == 1
        with refused(errno.ENODEV, "no answer"):
            await device.region(0).read(0)
        with pytest.raises(DeadlineExceeded):
            await device.close()
        del server.answers[MAP]
        again = await vfio._groups[-1].open_device(vfio.paths[0])
        assert pins(vfio) == 0
        await again.close()


async def test_an_unmap_that_is_not_answered(server: FakeServer, vfio: VfioUserVfio) -> None:
    async with vfio.open_device(vfio.paths[0]) as device:
        await device.container.alloc(PAGE, iova=BASE)
        server.answers[UNMAP] = lambda _: None
        vfio._links[0].deadline = 0.05
        with pytest.raises(DeadlineExceeded, match="unmap"):
            await device.container.unmap_dma(BASE, PAGE)
        with pytest.raises(DeadlineExceeded, match="close"):
            await device.close()
        assert pins(vfio) == 1
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


# Two servers.


async def test_two_devices_of_a_container_have_the_same_maps(
    two: tuple[FakeServer, FakeServer, VfioUserVfio],
) -> None:
    first, second, vfio = two
    async with vfio.open_device(vfio.paths[0]) as one:
        container = one.container
        await container.alloc(PAGE, iova=BASE)
        async with vfio.open_device(vfio.paths[1], container=container):
            assert second.maps == first.maps == {BASE: PAGE}
            await container.alloc(2 * PAGE, iova=2 * BASE, scattered=True)
            assert second.maps == first.maps == {BASE: PAGE, 2 * BASE: PAGE, 2 * BASE + PAGE: PAGE}
            second.answers[MAP] = lambda _: errno.ENOSPC
            with refused(errno.ENOSPC):
                await container.alloc(PAGE)
            assert second.maps == first.maps
            assert await container.unmap_all() == 3 * PAGE
            assert second.maps == first.maps == {}


async def test_one_of_two_servers_goes(two: tuple[FakeServer, FakeServer, VfioUserVfio]) -> None:
    first, second, vfio = two
    async with vfio.open_device(vfio.paths[0]) as one:
        async with vfio.open_device(vfio.paths[1], container=one.container) as other:
            buffer = await one.container.alloc(PAGE)
            assert second.channel is not None
            second.channel.close()
            with refused(errno.ENODEV):
                await other.region(0).read(0)
            await one.container.free(buffer)
            await one.container.alloc(PAGE, iova=BASE)
            assert first.maps == {BASE: PAGE}
        assert await one.region(0).read(0) == 0


async def test_what_is_mapped_while_a_server_joins_reaches_it(
    two: tuple[FakeServer, FakeServer, VfioUserVfio],
) -> None:
    first, second, vfio = two
    async with vfio.open_device(vfio.paths[0]) as one, trio.open_nursery() as nursery:
        buffer = await one.container.alloc(PAGE, map=False)
        first.answers[MAP] = lambda _: None
        nursery.start_soon(one.container.map_dma, BASE, buffer)
        await first.until(lambda: bool(first.of(MAP)))
        opened: list[Any] = []

        async def join() -> None:
            async with vfio.open_device(vfio.paths[1], container=one.container) as device:
                opened.append(device)
                assert second.maps == {BASE: PAGE}

        async with trio.open_nursery() as joining:
            joining.start_soon(join)
            await second.until(lambda: len(second.of(lib.VFIO_USER_DEVICE_RESET)) == 1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not opened
            assert first.channel is not None
            (number,) = vfio._links[0]._calls
            first.channel.send_nowait(MAP, number, 1)
