"""DMA_READ and DMA_WRITE asked from C, by threads that wait as a device's engine does."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.vfio_user.channel import Channel, ChannelEnded
from tests.vfio_user.channel_peer import ACCESS, ERROR, REPLY, message
from tests.vfio_user.conftest import MAX_MESSAGE, PeerFactory

pytestmark = pytest.mark.touches_c

READ: int = lib.VFIO_USER_DMA_READ
WRITE: int = lib.VFIO_USER_DMA_WRITE
SECONDS = 1_000_000_000
IOVA = 0x1_0000_0000


class Engine:
    """A thread that does one DMA and holds a reference of its own, as a device would. ``result`` waits for it."""

    def __init__(
        self,
        channel: Channel,
        size: int,
        *,
        data: bytes | None = None,
        timeout: int = 20 * SECONDS,
        iova: int = IOVA,
    ) -> None:
        self.buf = ffi.new("uint8_t[]", data or size)
        self.cancel = ffi.new("uint32_t *")
        self._ptr = lib.pv_vfu_get(channel.ptr)
        self._result: int | None = None
        arguments = (iova, self.buf, size, data is not None, timeout, self.cancel, ffi.NULL)
        self._thread = threading.Thread(target=self._run, args=arguments)
        self._thread.start()

    def _run(self, *arguments: Any) -> None:
        self._result = lib.pv_vfu_dma(self._ptr, *arguments)
        lib.pv_vfu_put(self._ptr)

    def result(self) -> int:
        self._thread.join(30)
        assert self._result is not None, "the engine waits for ever"
        return -self._result

    @property
    def data(self) -> bytes:
        return bytes(ffi.buffer(self.buf))


def read_reply(id: int, body: bytes, data: bytes) -> bytes:
    return message(READ, id, body + data, flags=REPLY)


def test_a_read(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    engine = Engine(channel, 100)
    command, id, flags, error, body = peer.receive()
    assert (command, flags, error, body) == (READ, 0, 0, ACCESS.pack(IOVA, 100))
    assert id & 0x8000
    data = os.urandom(100)
    peer.send(read_reply(id, body, data))
    assert engine.result() == 0
    assert engine.data == data


def test_a_write(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    data = os.urandom(100)
    engine = Engine(channel, 100, data=data)
    command, id, _, _, body = peer.receive()
    assert (command, body) == (WRITE, ACCESS.pack(IOVA, 100) + data)
    peer.send(message(WRITE, id, body[:16], flags=REPLY))
    assert engine.result() == 0


@pytest.mark.parametrize("limit", [1, 7, 1000, None])
def test_transfers_are_split_at_the_limit(with_peer: PeerFactory, limit: int | None) -> None:
    channel, peer = with_peer()
    if limit is not None:
        channel.set_transfer_limit(limit)
    most = limit or MAX_MESSAGE - 32
    size = 3 * most + most // 2
    data = os.urandom(size)
    engine = Engine(channel, size)
    done = 0
    while done < size:
        _, id, _, _, body = peer.receive()
        count = min(most, size - done)
        assert body == ACCESS.pack(IOVA + done, count)
        peer.send(read_reply(id, body, data[done : done + count]))
        done += count
    assert engine.result() == 0
    assert engine.data == data


def test_no_more_than_a_message_holds(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    channel.set_transfer_limit(1 << 30)
    with pytest.raises(ValueError):
        channel.set_transfer_limit(0)
    engine = Engine(channel, MAX_MESSAGE)
    assert peer.receive()[4] == ACCESS.pack(IOVA, MAX_MESSAGE - 32)
    channel.close()
    assert engine.result() == errno.ENOTCONN


REPLIES: dict[str, Callable[[int, bytes], bytes]] = {
    "an error": lambda id, body: message(READ, id, flags=REPLY | ERROR, error=14),
    "an error with a body": lambda id, body: message(
        READ, id, body + bytes(64), flags=REPLY | ERROR, error=14
    ),
    "a header": lambda id, body: message(READ, id, flags=REPLY),
    "no data": lambda id, body: message(READ, id, body, flags=REPLY),
    "a byte too few": lambda id, body: read_reply(id, body, bytes(63)),
    "a byte too many": lambda id, body: read_reply(id, body, bytes(65)),
    "half an access": lambda id, body: message(READ, id, body[:8], flags=REPLY),
    "another address": lambda id, body: read_reply(id, ACCESS.pack(IOVA + 64, 64), bytes(64)),
    "another count": lambda id, body: read_reply(id, ACCESS.pack(IOVA, 63), bytes(64)),
    "a count beyond": lambda id, body: read_reply(id, ACCESS.pack(IOVA, 1 << 63), bytes(64)),
    "another command": lambda id, body: message(WRITE, id, body + bytes(64), flags=REPLY),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_that_does_not_answer(with_peer: PeerFactory, name: str) -> None:
    channel, peer = with_peer()
    engine = Engine(channel, 64)
    _, id, _, _, body = peer.receive()
    peer.send(REPLIES[name](id, body))
    assert engine.result() == errno.EFAULT
    assert engine.data == bytes(64)
    again = Engine(channel, 64)
    _, id, _, _, body = peer.receive()
    peer.send(read_reply(id, body, b"x" * 64))
    assert again.result() == 0


@pytest.mark.parametrize("body", [b"", bytes(8), ACCESS.pack(IOVA, 63), ACCESS.pack(0, 64), bytes(17)])
def test_a_write_reply_that_does_not_answer(with_peer: PeerFactory, body: bytes) -> None:
    channel, peer = with_peer()
    engine = Engine(channel, 64, data=bytes(64))
    peer.send(message(WRITE, peer.receive()[1], body, flags=REPLY))
    assert engine.result() == errno.EFAULT


def test_replies_to_nobody_are_dropped(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    peer.send(message(READ, 0xFFFE, bytes(80), flags=REPLY), [peer.sock.fileno()])
    engine = Engine(channel, 64)
    _, id, _, _, body = peer.receive()
    for other in (id + 1, 0xFFFF):
        peer.send(read_reply(other, body, b"-" * 64))
    peer.send(read_reply(id, body, b"x" * 64))
    peer.send(read_reply(id, body, b"-" * 64))
    assert engine.result() == 0
    assert engine.data == b"x" * 64
    peer.send(message(9, 1))
    assert channel.receive_nowait().id == 1


def test_the_deadline_and_a_late_reply(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    engine = Engine(channel, 64, timeout=1_000_000)
    assert engine.result() == errno.ETIMEDOUT
    _, id, _, _, body = peer.receive()
    peer.send(read_reply(id, body, b"x" * 64) + message(9, 1))
    assert channel.receive_nowait().id == 1
    assert engine.data == bytes(64)


def test_a_flood_of_replies_to_nobody_keeps_neither_python_nor_an_engine(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    flood = read_reply(0xFFFE, ACCESS.pack(IOVA, 64), bytes(64)) * 20
    given_up = threading.Event()

    def client() -> None:
        while not given_up.is_set():
            peer.send(flood)
        peer.send(message(9, 1))

    thread = threading.Thread(target=client)
    thread.start()
    assert Engine(channel, 64, timeout=1_000_000).result() == errno.ETIMEDOUT
    for _ in range(10):
        with pytest.raises(trio.WouldBlock):
            channel.receive_nowait()
    given_up.set()
    received = None
    while received is None:
        with contextlib.suppress(trio.WouldBlock):
            received = channel.receive_nowait()
    assert received.id == 1
    thread.join()


def test_cancel(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    engine = Engine(channel, 64)
    _, id, _, _, body = peer.receive()
    engine.cancel[0] = 1
    assert engine.result() == errno.ECANCELED
    late = read_reply(id, body, b"x" * 64)
    peer.send(late[:40])
    other = Engine(channel, 64, data=bytes(64))
    _, other_id, _, _, body = peer.receive()
    peer.send(late[40:] + message(WRITE, other_id, body[:16], flags=REPLY))
    assert other.result() == 0
    assert engine.data == bytes(64)


@pytest.mark.parametrize(
    "sent", [b"", b"half a header"[:7], message(9, 1, b"body")[:18], message(1, 1, size=3)]
)
def test_the_end_wakes_whoever_waits(with_peer: PeerFactory, sent: bytes) -> None:
    channel, peer = with_peer()
    engines = [Engine(channel, 64) for _ in range(3)]
    for _ in engines:
        peer.receive()
    peer.send(sent)
    peer.close()
    assert [engine.result() for engine in engines] == [errno.ENOTCONN] * 3
    assert Engine(channel, 64).result() == errno.ENOTCONN


def test_close_wakes_whoever_waits(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    engines = [Engine(channel, 64) for _ in range(3)]
    for _ in engines:
        peer.receive()
    channel.close()
    assert [engine.result() for engine in engines] == [errno.ENOTCONN] * 3


def test_several_wait_and_are_answered_out_of_order(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    engines = {IOVA + i * 64: Engine(channel, 64, iova=IOVA + i * 64) for i in range(8)}
    asked = [peer.receive() for _ in engines]
    for _, id, _, _, body in reversed(asked):
        peer.send(read_reply(id, body, body * 4))
    for iova, engine in engines.items():
        assert engine.result() == 0
        assert engine.data == ACCESS.pack(iova, 64) * 4


async def test_the_peer_is_served_while_an_engine_waits(with_peer: PeerFactory) -> None:
    """The peer answers no DMA before its own requests were: QEMU waits so."""
    channel, peer = with_peer()
    engine = Engine(channel, 64)
    body = b""

    def client() -> None:
        nonlocal body
        _, id, _, _, body = peer.receive()
        for number in range(50):
            peer.send(message(9, number, number.to_bytes(8, "little")))
            assert peer.receive() == (9, number, REPLY, 0, number.to_bytes(8, "little"))
        peer.send(read_reply(id, body, b"x" * 64))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, client)
        for number in range(50):
            got = await channel.receive(20)
            assert got.id == number
            channel.reply_nowait(got, got.body)
    assert engine.result() == 0


@pytest.mark.parametrize("size", [0, 2000])
async def test_a_flood_while_an_engine_waits_is_bounded_and_in_order(
    with_peer: PeerFactory, size: int
) -> None:
    channel, peer = with_peer()
    engine = Engine(channel, 64)
    _, id, _, _, body = peer.receive()
    flood = 1000

    def client() -> None:
        for number in range(flood):
            peer.send(message(10, number, bytes(size), flags=0x10))
        peer.send(read_reply(id, body, b"x" * 64))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, client)
        assert [(await channel.receive(20)).id for _ in range(flood)] == list(range(flood))
    with pytest.raises(trio.WouldBlock):
        channel.receive_nowait()
    assert engine.result() == 0


def test_what_an_engine_read_before_the_end_is_not_lost(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    with pytest.raises(trio.WouldBlock):
        peer.send(message(2, 1, b"begun by Python")[:20])
        channel.receive_nowait()
    engine = Engine(channel, 64)
    peer.receive()
    peer.send(message(2, 1, b"begun by Python")[20:])
    with os.fdopen(os.memfd_create("file")) as file:
        peer.send(message(2, 2), [file.fileno()])
    peer.close()
    assert engine.result() == errno.ENOTCONN
    assert bytes(channel.receive_nowait().body) == b"begun by Python"
    assert len(channel.receive_nowait().fds) == 1
    with pytest.raises(ChannelEnded) as ended:
        channel.receive_nowait()
    assert ended.value.clean


def test_python_reads_the_answer_of_an_engine(with_peer: PeerFactory) -> None:
    channel, peer = with_peer()
    for _ in range(50):
        engine = Engine(channel, 64)
        _, id, _, _, body = peer.receive()
        peer.send(read_reply(id, body, b"x" * 64))
        with pytest.raises(trio.WouldBlock):
            channel.receive_nowait()
        assert engine.result() == 0


def test_a_request_waits_for_room(with_peer: PeerFactory) -> None:
    channel, peer = with_peer(max_message=(1 << 20) + 32)
    with pytest.raises(trio.WouldBlock):
        while True:
            channel.send_nowait(10, 1, body=bytes(1000))
    engine = Engine(channel, 1 << 20, data=b"z" * (1 << 20))
    command = 10
    while command == 10:
        command, id, _, _, body = peer.receive()
    assert body[16:] == b"z" * (1 << 20)
    peer.send(message(command, id, body[:16], flags=REPLY))
    assert engine.result() == 0
