"""Clients that mean harm, or have gone: what is left of them, and how long they can keep the server."""

from __future__ import annotations

import errno
import mmap
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import trio

from pvfio.abi import lib
from pvfio.vfio_user import messages
from pvfio.vfio_user.messages import DmaMap, RegionInfo
from pvfio.vfio_user.remote import RemoteMemory
from pvfio.vfio_user.server import session
from tests.vfio_user.raw import (
    CONFIG,
    EVENTFD,
    HEADER,
    MSIX,
    TRIGGER,
    RawClient,
    Reply,
    Served,
    memory,
    serve,
)

pytestmark = pytest.mark.touches_c

PAGE = 0x1000
FAR = 0x10_0000
LONGEST = 60.0


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines wait for a client far longer than the test's client does for the server."""
    monkeypatch.setattr(session, "RemoteMemory", partial(RemoteMemory, patience=LONGEST))


async def area(client: RawClient, offset: int, size: int) -> mmap.mmap:
    """Pages of BAR 0, mapped."""
    reply = await client.call(lib.VFIO_USER_DEVICE_GET_REGION_INFO, RegionInfo.request(0, 4096))
    info = RegionInfo.parse(reply.body)
    with_file = mmap.mmap(reply.fds[0], size, offset=info.offset + offset)
    os.close(reply.fds[0])
    return with_file


async def next_client(served: Served, client: RawClient) -> RawClient:
    """Once the one before has gone."""
    client.close()
    other = await served.connect()
    await other.enable()
    return other


async def begin_far_queues(client: RawClient, requests: int = 1) -> list[Reply]:
    """An NVMe controller whose admin queues are in memory without a file, asked to fetch a command; what it asks."""
    await client.enable()
    assert await client.map(FAR, 16 * PAGE) == 0
    await client.write(0, lib.NVME_REG_AQA, 0x000F_000F)
    await client.write(0, lib.NVME_REG_ASQ, FAR, 8)
    await client.write(0, lib.NVME_REG_ACQ, FAR + PAGE, 8)
    await client.write(0, lib.NVME_REG_CC, lib.NVME_CC_ENABLE | 0x46_0000)
    await client.write(0, lib.NVME_REG_DBS, 1)
    return [await client.request() for _ in range(requests)]


# Memory of a BAR.


async def test_scratch_memory_of_an_earlier_client(tmp_path: Path) -> None:
    """It keeps its mapping, of memory that is nobody's any more, and the next one finds none of its bytes."""
    async with serve(tmp_path) as served:
        first = await served.connect()
        await first.enable()
        with await area(first, 0, PAGE) as old:
            old[:8] = b"written!"
            second = await next_client(served, first)
            assert await second.read(0, 0, 8) == 0
            old[:8] = b"spoiled!"
            assert await second.read(0, 0, 8) == 0
            with await area(second, 0, PAGE) as new:
                new[:4] = b"mine"
                assert await second.read(0, 0) == int.from_bytes(b"mine", "little")
                assert old[:8] == b"spoiled!"


async def test_doorbells_of_an_earlier_client(tmp_path: Path) -> None:
    """They ring nothing; the new client's do."""
    async with serve(tmp_path, "nvme") as served:
        first = await served.connect()
        with await area(first, PAGE, PAGE) as old:
            second = await next_client(served, first)
            fd = memory(1 << 20)
            assert await second.map(FAR, 1 << 20, fd) == 0
            ring = mmap.mmap(fd, 1 << 20)
            os.close(fd)
            ring[:64] = bytes((lib.NVME_ADMIN_IDENTIFY,)) + bytes(63)
            await second.write(0, lib.NVME_REG_AQA, 0x000F_000F)
            await second.write(0, lib.NVME_REG_ASQ, FAR, 8)
            await second.write(0, lib.NVME_REG_ACQ, FAR + PAGE, 8)
            await second.write(0, lib.NVME_REG_CC, lib.NVME_CC_ENABLE | 0x46_0000)
            gates = served.device.engine.stats().gates
            old[:4] = (5).to_bytes(4, "little")
            with await area(second, PAGE, PAGE) as new:
                assert new[:4] == bytes(4)
                new[:4] = (1).to_bytes(4, "little")
                with trio.fail_after(10):
                    while not ring[PAGE + 14]:
                        await trio.lowlevel.checkpoint()
            assert served.device.engine.stats().gates - gates <= 1
            ring.close()


async def test_no_memory_for_a_next_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is turned away rather than given what an earlier one has mapped; the one after it is served."""
    async with serve(tmp_path) as served:
        first = await served.connect()
        first.close()
        with monkeypatch.context() as broken:
            broken.setattr(os, "memfd_create", _no_descriptor)
            second = await served.connect(version=False)
            assert await second.is_closed()
        third = await served.connect()
        await third.enable()
        assert await third.read(0, 0x4000) == 0x54534554


def _no_descriptor(*_: object) -> int:
    raise OSError(errno.EMFILE, "no descriptor")


# Clients that do not answer.


async def test_the_server_ends_while_a_client_is_asked(tmp_path: Path, patient: None) -> None:
    with trio.fail_after(LONGEST / 2):
        async with serve(tmp_path, "nvme") as served:
            client = await served.connect()
            [request] = await begin_far_queues(client)
            assert request.command == lib.VFIO_USER_DMA_READ


async def test_a_client_that_is_asked_is_answered(tmp_path: Path, patient: None) -> None:
    """It asks for what it needs before it answers: registers, resets, and it may unmap what it is asked for."""
    async with serve(tmp_path, "nvme") as served:
        client = await served.connect()
        await begin_far_queues(client)
        assert await client.read(0, lib.NVME_REG_CSTS) & lib.NVME_CSTS_RDY
        eventfd = os.eventfd(0)
        assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, fds=[eventfd]) == 0
        os.close(eventfd)
        assert await client.unmap(FAR, 16 * PAGE) == 0
        assert await client.map(FAR, 16 * PAGE) == 0
        await client.write(0, lib.NVME_REG_CC, 0)
        assert not await client.read(0, lib.NVME_REG_CSTS) & lib.NVME_CSTS_RDY
        await begin_far_queues_again(client)
        assert (await client.call(lib.VFIO_USER_DEVICE_RESET)).error == 0
        await begin_far_queues_again(client)
        await client.flr()
        assert await client.read(CONFIG, 4, 2) & 7 == 0


async def begin_far_queues_again(client: RawClient) -> None:
    client.requests.clear()
    assert await client.unmap(FAR, 16 * PAGE) == 0
    [request] = await begin_far_queues(client)
    assert request.command == lib.VFIO_USER_DMA_READ


async def test_the_next_client_need_not_wait_for_one_that_was_asked(tmp_path: Path, patient: None) -> None:
    async with serve(tmp_path, "nvme") as served:
        client = await served.connect()
        await begin_far_queues(client)
        second = await next_client(served, client)
        assert await second.read(0, lib.NVME_REG_CSTS) == 0
        await begin_far_queues(second)


# Sizes and counts.


@pytest.mark.parametrize("argsz", [0, 31, 32, 0x7FFF_FFFF, 0xFFFF_FFFF])
async def test_argsz_of_a_region(tmp_path: Path, argsz: int) -> None:
    """Whatever room a client claims to have, a reply is as long as the region's information."""
    async with serve(tmp_path) as served:
        client = await served.connect()
        reply = await client.call(lib.VFIO_USER_DEVICE_GET_REGION_INFO, RegionInfo.request(0, argsz))
        for fd in reply.fds:
            os.close(fd)
        assert len(reply.body) < 256
        assert reply.error == (errno.EINVAL if argsz < 32 else 0)


@pytest.mark.parametrize(
    ("address", "size"),
    [((1 << 64) - PAGE, PAGE), ((1 << 64) - PAGE, 2 * PAGE), (0, (1 << 64) - PAGE), (PAGE, (1 << 64) - PAGE)],
)
async def test_the_end_of_the_address_space(tmp_path: Path, address: int, size: int) -> None:
    """The last page is like any other; what goes beyond it is refused, and changes nothing."""
    async with serve(tmp_path) as served:
        client = await served.connect()
        fd = memory(PAGE)
        assert await client.map((1 << 64) - PAGE, PAGE, fd) == 0
        os.close(fd)
        error = await client.unmap(address, size)
        beyond = address + size > 1 << 64
        assert error == (errno.EINVAL if beyond else 0)
        assert served.bus.maps == (beyond or address + size <= (1 << 64) - PAGE)


async def test_a_client_that_goes_amid_its_maps(tmp_path: Path) -> None:
    """Thousands are sent, and no reply is read: the next client finds none of them."""
    async with serve(tmp_path) as served:
        client = await served.connect()
        fd = memory(PAGE)
        for number in range(3000):
            await client.post(lib.VFIO_USER_DMA_MAP, DmaMap(number * PAGE, PAGE, 3, 0).pack(), (fd,))
        os.close(fd)
        await client.send(b"\1\0\2\0")
        second = await next_client(served, client)
        assert served.bus.maps == 0
        assert await second.read(0, 0x4000) == 0x54534554


async def test_a_map_that_may_only_be_read(tmp_path: Path) -> None:
    """With a file and without one: what the device writes is refused, and nothing is asked of the client."""
    async with serve(tmp_path) as served:
        client = await served.connect()
        await client.enable()
        fd = memory(PAGE)
        assert await client.map(FAR, PAGE, fd, flags=1) == 0
        assert await client.map(FAR + PAGE, PAGE, flags=1) == 0
        for target in (FAR, FAR + PAGE):
            for at, value, width in ((0x08, 0, 8), (0x10, target, 8), (0x18, 64, 4), (0x1C, 1, 4)):
                await client.write(0, 0x4000 + at, value, width)
            with trio.fail_after(10):
                while (status := await client.read(0, 0x4020)) == served.device.BUSY:
                    pass
            assert status == served.device.ABORTED
            assert await client.read(0, 0x4028, 8) == target
        assert not client.requests
        assert os.pread(fd, 64, 0) == bytes(64)
        os.close(fd)


# Interrupts that are set up in pieces.


async def test_a_reset_amid_the_pieces_of_a_set_up(tmp_path: Path) -> None:
    """Vectors that came before it stay, those that come after it join them; the table is the client's alone."""
    async with serve(tmp_path, vectors=40) as served:
        client = await served.connect()
        await client.enable()
        fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(40)]
        assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 16, fds=fds[:16]) == 0
        await client.write_bytes(0, 0x5000, bytes(640))
        await client.flr()
        await client.enable()
        assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 16, 16, fds=fds[16:32]) == 0
        await client.write_bytes(0, 0x5000, b"\xff" * 640)
        assert (await client.call(lib.VFIO_USER_DEVICE_RESET)).error == 0
        assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 32, 8, fds=fds[32:]) == 0
        for vector in range(40):
            await client.write(0, 0x4034, vector)
        assert [os.eventfd_read(fd) for fd in fds] == [1] * 40
        for fd in fds:
            os.close(fd)


async def test_a_client_that_says_it_is_done(tmp_path: Path) -> None:
    """Half closed: what it asked before is answered, and the next one need not wait for it to go."""
    async with serve(tmp_path) as served:
        client = await served.connect()
        await client.enable()
        for _ in range(3):
            await client.send(
                HEADER.pack(7, lib.VFIO_USER_REGION_READ, 32, 0, 0) + messages.region_access(0x4000, 0, 4)
            )
        client.sock.shutdown(socket.SHUT_WR)
        for _ in range(3):
            assert (await client.receive()).body[16:] == (0x54534554).to_bytes(4, "little")
        second = await served.connect()
        assert await second.read(0, 0x4000) == 0x54534554
        assert await client.is_closed()
