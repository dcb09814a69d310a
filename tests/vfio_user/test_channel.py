"""A channel's framing: what arrives in which pieces, with which descriptors, and what cannot be."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from pvfio.errors import DeadlineExceeded
from pvfio.silicon import TableBus
from pvfio.vfio_user.channel import HEADER_SIZE, Channel, ChannelEnded, ProtocolError
from pvfio.vfio_user.remote import RemoteMemory
from tests.vfio_user.channel_peer import ERROR, REPLY, Peer, message, open_fds
from tests.vfio_user.conftest import MAX_FDS, MAX_MESSAGE, PeerFactory

pytestmark = pytest.mark.touches_c

DEADLINE = 20.0


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


@pytest.fixture
def files(no_leaked_fds: None) -> Iterator[list[int]]:
    """Six descriptors of six different files."""
    fds = [os.memfd_create(f"file {i}") for i in range(6)]
    yield fds
    for fd in fds:
        os.close(fd)


def test_a_message_that_comes_byte_by_byte(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    sent = message(9, 7, b"0123456789abcdef", flags=0x10, error=5)
    for byte in sent[:-1]:
        peer.send(bytes([byte]))
        with pytest.raises(trio.WouldBlock):
            channel.receive_nowait()
    peer.send(sent[-1:])
    got = channel.receive_nowait()
    assert (got.command, got.id, got.flags, got.error) == (9, 7, 0x10, 5)
    assert bytes(got.body) == b"0123456789abcdef"
    assert not got.is_reply
    assert not got.wants_reply
    assert got.fds == []


def test_pipelined_messages_stay_apart(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    bodies = [b"", b"a", b"bb" * 8, b"c" * 100]
    peer.send(b"".join(message(10, i, body) for i, body in enumerate(bodies)) + message(9, 99)[:7])
    for i, body in enumerate(bodies):
        got = channel.receive_nowait()
        assert (got.id, bytes(got.body)) == (i, body)
    with pytest.raises(trio.WouldBlock):
        channel.receive_nowait()


@pytest.mark.parametrize("nap_ns", [0, 50_000])
def test_replies_and_commands_are_told_apart(with_peer: PeerFactory, nap_ns: int) -> None:
    channel, peer = with_peer()
    peer.send(message(9, 1) + message(9, 2, flags=REPLY) + message(9, 0x8003))
    commands = [channel.receive_nowait(nap_ns) for _ in range(3)]
    assert [(m.id, m.is_reply, m.wants_reply) for m in commands] == [
        (1, False, True),
        (2, True, False),
        (0x8003, False, True),
    ]


def test_fds_belong_to_the_message_that_carried_them(with_peer: PeerFactory, files: list[int]) -> None:
    channel, peer = with_peer()
    peer.send(message(2, 0))
    peer.send(message(2, 1, b"x" * 40), files[:2])
    peer.send(message(2, 2))
    peer.send(message(2, 3, b"y" * 40), files[2:3])
    for id, expected in enumerate((files[:0], files[:2], files[:0], files[2:3])):
        got = channel.receive_nowait()
        assert got.id == id
        assert [inode(fd) for fd in got.fds] == [inode(fd) for fd in expected]
        assert not got.fds_lost
        assert not any(os.get_inheritable(fd) for fd in got.fds)


def test_fds_may_come_with_any_part_of_a_message(with_peer: PeerFactory, files: list[int]) -> None:
    channel, peer = with_peer()
    sent = message(2, 1, b"x" * 32)
    for part, fd in zip((sent[:5], sent[5:20], sent[20:]), files, strict=False):
        peer.send(part, [fd])
    got = channel.receive_nowait()
    assert [inode(fd) for fd in got.fds] == [inode(fd) for fd in files[:3]]


def test_fds_that_nobody_took_are_closed_by_the_next_receive(
    with_peer: PeerFactory, files: list[int]
) -> None:
    channel, peer = with_peer()
    peer.send(message(2, 0), files[:3])
    got = channel.receive_nowait()
    kept = got.fds.pop(0)
    left = list(got.fds)
    with pytest.raises(trio.WouldBlock):
        channel.receive_nowait()
    assert inode(kept) == inode(files[0])
    for fd in left:
        with pytest.raises(OSError):
            os.fstat(fd)
    os.close(kept)
    peer.send(message(2, 0), files[:2])
    taken = channel.receive_nowait().take_fds()
    with pytest.raises(trio.WouldBlock):
        channel.receive_nowait()
    assert [inode(fd) for fd in taken] == [inode(fd) for fd in files[:2]]
    for fd in taken:
        os.close(fd)


@pytest.mark.parametrize("pieces", [[MAX_FDS + 1], [MAX_FDS, 1], [1, MAX_FDS, 1]])
def test_too_many_fds_are_all_closed(with_peer: PeerFactory, files: list[int], pieces: list[int]) -> None:
    channel, peer = with_peer()
    before = open_fds()
    sent = message(8, 1, b"x" * 32)
    for i, count in enumerate(pieces):
        last = i == len(pieces) - 1
        peer.send(sent[i * 8 :] if last else sent[i * 8 : i * 8 + 8], files[:count])
    peer.send(message(8, 2), files[:MAX_FDS])
    got = channel.receive_nowait()
    assert got.fds_lost
    assert got.fds == []
    assert open_fds() == before
    got = channel.receive_nowait()
    assert not got.fds_lost
    assert len(got.fds) == MAX_FDS


def test_no_fds_at_all(with_peer: PeerFactory, files: list[int]) -> None:
    channel, peer = with_peer(max_fds=0)
    peer.send(message(8, 1), files[:1])
    assert channel.receive_nowait().fds_lost


@pytest.mark.parametrize("size", [HEADER_SIZE, HEADER_SIZE + 1, MAX_MESSAGE - 1, MAX_MESSAGE])
def test_sizes_that_can_be(with_peer: PeerFactory, size: int) -> None:
    channel, peer = with_peer()
    body = os.urandom(size - HEADER_SIZE)
    peer.send(message(1, 1, body) * 2)
    for _ in range(2):
        assert channel.receive_nowait().body == body


@pytest.mark.parametrize("size", [0, 1, 15, MAX_MESSAGE + 1, 1 << 31, 0xFFFFFFFF])
def test_sizes_that_cannot_be(with_peer: PeerFactory, files: list[int], size: int) -> None:
    channel, peer = with_peer()
    peer.send(message(1, 1))
    peer.send(message(1, 2, b"more", size=size), files[:2])
    assert channel.receive_nowait().id == 1
    for _ in range(2):
        with pytest.raises(ProtocolError):
            channel.receive_nowait()


@pytest.mark.parametrize("sent", [1, 15, 16, 20, 31])
def test_half_a_message_and_the_end(with_peer: PeerFactory, files: list[int], sent: int) -> None:
    channel, peer = with_peer()
    peer.send(message(9, 1, b"0123456789abcdef")[:sent], files[:2])
    peer.close()
    with pytest.raises(ChannelEnded) as ended:
        channel.receive_nowait()
    assert not ended.value.clean


def test_the_end_between_messages_is_clean(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    peer.send(message(9, 1))
    peer.close()
    assert channel.receive_nowait().id == 1
    for _ in range(2):
        with pytest.raises(ChannelEnded) as ended:
            channel.receive_nowait()
        assert ended.value.clean
    with pytest.raises(ChannelEnded):
        channel.send_nowait(9, 1)


@pytest.mark.parametrize(
    ("body", "data"),
    [
        (b"", b""),
        (b"abc", b""),
        (b"", b"xyz"),
        (b"abc", bytearray(b"xyz")),
        (memoryview(b"-abc-")[1:4], memoryview(b"xyz")),
    ],
)
def test_what_is_sent(with_peer: PeerFactory, files: list[int], body: bytes, data: bytes) -> None:
    channel, peer = with_peer()
    assert channel.send_nowait(3, 0x7FFF, 0x31, 22, body, data, files[:2])
    got, fds, _, _ = socket.recv_fds(peer.sock, 100, 8)
    assert got == message(3, 0x7FFF, bytes(body) + bytes(data), flags=0x31, error=22)
    assert [inode(fd) for fd in fds] == [inode(fd) for fd in files[:2]]
    for fd in fds:
        os.close(fd)


def test_replies(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    peer.send(message(9, 3) + message(10, 4, flags=0x10) + message(2, 5))
    channel.reply_nowait(channel.receive_nowait(), b"body", b"data")
    channel.reply_nowait(channel.receive_nowait(), b"not wanted")
    channel.reply_nowait(channel.receive_nowait(), b"not with an error", error=17)
    assert peer.receive() == (9, 3, REPLY, 0, b"bodydata")
    assert peer.receive() == (2, 5, REPLY | ERROR, 17, b"")


def test_a_full_socket_and_a_full_backlog(with_peer: PeerFactory, files: list[int]) -> None:
    channel, peer = with_peer()
    sent, waited = 0, False
    with pytest.raises(trio.WouldBlock):
        while True:
            waited = (
                not channel.send_nowait(10, sent & 0x7FFF, body=sent.to_bytes(4, "little") * 64) or waited
            )
            sent += 1
    assert waited
    with pytest.raises(trio.WouldBlock):
        channel.send_nowait(8, 1, fds=files[:1])
    for number in range(sent):
        assert peer.receive() == (10, number & 0x7FFF, 0, 0, number.to_bytes(4, "little") * 64)
        channel.flush_nowait()
    assert channel.send_nowait(10, 1)
    assert peer.receive()[1] == 1


async def test_whoever_receives_sends_the_backlog(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    body = os.urandom(4 << 20)
    assert not channel.send_nowait(9, 1, data=body)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.receive, DEADLINE)
        assert (await trio.to_thread.run_sync(peer.receive))[4] == body
        peer.send(message(1, 1))


async def test_send_waits_for_room_and_keeps_the_order(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    bodies = [os.urandom(1 << 20) for _ in range(4)]

    async def send_all() -> None:
        for i, body in enumerate(bodies):
            await channel.send(10, i, body=body, deadline=DEADLINE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all)
        for i, body in enumerate(bodies):
            assert await trio.to_thread.run_sync(peer.receive) == (10, i, 0, 0, body)


async def test_a_send_that_was_given_up_leaves_the_stream_in_order(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    body = os.urandom(4 << 20)
    with pytest.raises(DeadlineExceeded):
        await channel.send(10, 1, body=body, deadline=0.01)
    with pytest.raises(DeadlineExceeded):
        await channel.send(10, 2, body=body, deadline=0.01)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, peer.read, 16 + len(body))
        await channel.send(10, 3, deadline=DEADLINE)
    assert peer.receive()[1] == 3


async def test_receive_waits(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    with pytest.raises(DeadlineExceeded):
        await channel.receive(0.01)
    with trio.move_on_after(0.01) as scope:
        await channel.receive()
    assert scope.cancelled_caught
    sent = message(9, 1, b"body")
    async with trio.open_nursery() as nursery:

        async def piecemeal() -> None:
            for byte in sent:
                peer.send(bytes([byte]))
                await trio.lowlevel.checkpoint()

        nursery.start_soon(piecemeal)
        assert bytes((await channel.receive(DEADLINE)).body) == b"body"


async def test_receive_lets_others_run(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        while turns < 3:
            peer.send(message(9, 1))
            await channel.receive()
        nursery.cancel_scope.cancel()


async def test_close_ends_every_wait(with_peer: PeerFactory, files: list[int]) -> None:
    channel, peer = with_peer()
    assert not channel.send_nowait(9, 1, data=bytes(4 << 20))

    async def receives() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await channel.receive()

    async def sends() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await channel.send(9, 2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receives)
        nursery.start_soon(sends)
        await trio.testing.wait_all_tasks_blocked()
        channel.close()
    channel.close()
    for call in (
        channel.receive_nowait,
        channel.flush_nowait,
        lambda: channel.send_nowait(9, 1),
        lambda: channel.set_transfer_limit(1),
        lambda: channel.ptr,
        lambda: RemoteMemory(TableBus(), channel),
    ):
        with pytest.raises(trio.ClosedResourceError):
            call()
    with pytest.raises(EOFError):
        peer.read(16 + (4 << 20))


def test_close_drops_what_was_not_received(with_peer: PeerFactory, files: list[int]) -> None:
    channel, peer = with_peer()
    peer.send(message(2, 1), files[:2])
    peer.send(message(2, 2), files[:2])
    peer.send(message(2, 3, b"body")[:18], files[:2])
    channel.receive_nowait()
    channel.close()


@pytest.mark.parametrize(
    ("max_message", "max_fds"), [(0, 1), (32, 1), (-1, 1), (1 << 32, 1), (4096, 65), (4096, -1)]
)
def test_limits_that_cannot_be(no_leaked_fds: None, max_message: int, max_fds: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="a channel of messages"):
        Channel(ours, max_message=max_message, max_fds=max_fds)
    assert ours.fileno() == -1


def test_a_message_that_cannot_be_sent(with_peer: PeerFactory, files: list[int]) -> None:
    channel, peer = with_peer()
    with pytest.raises(ValueError):
        channel.send_nowait(8, 1, fds=files[:1] * 65)
    with pytest.raises(OSError):
        channel.send_nowait(8, 1, fds=[1 << 20])
    assert channel.send_nowait(8, 2)
    assert peer.receive()[1] == 2


def test_a_channel_nobody_closed(no_leaked_fds: None) -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    channel = Channel(ours, max_message=MAX_MESSAGE, max_fds=1)
    body = None
    peer.send(message(9, 1, b"still here"))
    body = channel.receive_nowait().body
    del channel
    assert bytes(body) == b"still here"
    with pytest.raises(EOFError):
        peer.read(1)
    peer.close()
