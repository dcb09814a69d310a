"""A bus whose far ranges are a vfio-user client's: read, written, refused, cancelled, and the client gone."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.silicon import READ, WRITE, DmaAborted, DmaCancelled, TableBus
from pvfio.vfio_user.channel import Channel, ChannelEnded
from pvfio.vfio_user.remote import RemoteMemory
from tests.vfio_user.channel_peer import ACCESS, REPLY, Peer, message
from tests.vfio_user.conftest import PeerFactory

pytestmark = pytest.mark.touches_c

BASE = 0x1000_0000
PAGE = 4096
SIZE = 64 * PAGE
LOCAL = BASE + SIZE


class Client(Peer):
    """Answers DMA from ``memory``, where ``refuse`` does not say an errno, until the channel closes."""

    def __init__(self, peer: Peer, refuse: Callable[[int, int], int] = lambda iova, size: 0) -> None:
        super().__init__(peer.sock)
        self.memory = bytearray(os.urandom(SIZE))
        self.refuse = refuse
        self.asked = 0

    async def run(self) -> None:
        channel = Channel(self.sock, max_message=1 << 20, max_fds=0)
        with channel, pytest.raises(ChannelEnded):
            while True:
                message = await channel.receive()
                iova, count = ACCESS.unpack_from(message.body)
                at = slice(iova - BASE, iova - BASE + count)
                error, data = self.refuse(iova, count), b""
                self.asked += 1
                if not error and message.command == lib.VFIO_USER_DMA_WRITE:
                    self.memory[at] = message.body[16:]
                elif not error:
                    data = bytes(self.memory[at])
                channel.reply_nowait(message, message.body[:16], data, error=error)


async def test_a_device_reads_and_writes_its_clients_memory(with_peer: PeerFactory) -> None:
    channel, peer = with_peer(max_message=1 << 20)
    channel.set_transfer_limit(10_000)
    client, bus, local = Client(peer), TableBus(), np.zeros(SIZE, np.uint8)
    bus.map_remote(BASE, SIZE)
    bus.map(LOCAL, local)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        with RemoteMemory(bus, channel):
            assert await trio.to_thread.run_sync(bus.read, BASE, SIZE) == client.memory
            data = os.urandom(100_001)
            await trio.to_thread.run_sync(bus.write, BASE + 1, data)
            assert client.memory[1 : 1 + len(data)] == data
            await trio.to_thread.run_sync(bus.move, LOCAL, BASE, SIZE)
            assert local.tobytes() == client.memory
            assert client.asked > (2 * SIZE + len(data)) // 10_000
            channel.close()
    with pytest.raises(DmaAborted):
        bus.read(BASE, 1)


async def test_what_the_client_refuses_is_a_fault_there(with_peer: PeerFactory) -> None:
    channel, peer = with_peer(max_message=1 << 20)
    client, bus = Client(peer, lambda iova, size: 14 if iova + size > BASE + 3 * PAGE else 0), TableBus()
    bus.map_remote(BASE, SIZE, READ)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        with RemoteMemory(bus, channel):
            with pytest.raises(DmaAborted) as aborted:
                await trio.to_thread.run_sync(bus.read, BASE + 5, SIZE - 5)
            assert aborted.value.fault_iova == BASE + 3 * PAGE
            assert aborted.value.done == 3 * PAGE - 5
            channel.close()


@pytest.mark.parametrize("how", ["the channel closed", "the client gone", "no patience", "the bus cancelled"])
async def test_a_wait_ends(with_peer: PeerFactory, how: str) -> None:
    channel, peer = with_peer()
    bus = TableBus()
    bus.map_remote(BASE, PAGE)

    async def device() -> None:
        expected = DmaCancelled if how == "the bus cancelled" else DmaAborted
        with pytest.raises(expected):
            await trio.to_thread.run_sync(bus.read, BASE, 64)

    with RemoteMemory(bus, channel, 0.001 if how == "no patience" else 20.0):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device)
            await trio.to_thread.run_sync(peer.receive)
            if how == "the channel closed":
                channel.close()
            elif how == "the client gone":
                peer.close()
            elif how == "the bus cancelled":
                bus.cancel(True)


@pytest.mark.parametrize("becomes", ["gone", "for reading only", "elsewhere"])
async def test_a_range_that_changes_before_it_is_written(with_peer: PeerFactory, becomes: str) -> None:
    """What comes from one range goes to another: which is looked at again when the request is sent."""
    channel, peer = with_peer()
    bus, far = TableBus(), BASE + 2 * PAGE
    bus.map_remote(BASE, PAGE)
    bus.map_remote(far, 2 * PAGE)

    async def device() -> None:
        if becomes == "elsewhere":
            await trio.to_thread.run_sync(bus.move, far, BASE, 64)
            return
        with pytest.raises(DmaAborted) as aborted:
            await trio.to_thread.run_sync(bus.move, far, BASE, 64)
        found = aborted.value
        assert (found.fault_iova, found.perm, found.done) == (far, WRITE, 0)

    with RemoteMemory(bus, channel, 20.0):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device)
            command, id, _, _, body = await trio.to_thread.run_sync(peer.receive)
            assert (command, body) == (lib.VFIO_USER_DMA_READ, ACCESS.pack(BASE, 64))
            bus.unmap(far, 2 * PAGE)
            if becomes != "gone":
                bus.map_remote(far, PAGE, READ if becomes == "for reading only" else READ | WRITE)
            peer.send(message(command, id, body + b"x" * 64, flags=REPLY))
            if becomes == "elsewhere":
                command, id, _, _, body = await trio.to_thread.run_sync(peer.receive)
                assert (command, body) == (lib.VFIO_USER_DMA_WRITE, ACCESS.pack(far, 64) + b"x" * 64)
                peer.send(message(command, id, body[:16], flags=REPLY))
        channel.close()
    with pytest.raises(EOFError, match="0 of 16"):
        peer.receive()
