"""A vfio-user server over real sockets: negotiation, every message good and bad, what ends a connection."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from pvfio.abi import lib
from pvfio.vfio_user import messages
from pvfio.vfio_user.messages import DeviceInfo, IrqInfo, RegionInfo
from pvfio.vfio_user.server import session
from pvfio.vfio_user.version import Limits, Version
from tests.vfio_user.raw import (
    CONFIG,
    ERROR,
    HEADER,
    NO_REPLY,
    RawClient,
    Served,
    memory,
    serve,
)

pytestmark = pytest.mark.touches_c

VERSION, DMA_MAP, DMA_UNMAP = lib.VFIO_USER_VERSION, lib.VFIO_USER_DMA_MAP, lib.VFIO_USER_DMA_UNMAP
GET_INFO, GET_REGION_INFO = lib.VFIO_USER_DEVICE_GET_INFO, lib.VFIO_USER_DEVICE_GET_REGION_INFO
IO_FDS, GET_IRQ_INFO = lib.VFIO_USER_DEVICE_GET_REGION_IO_FDS, lib.VFIO_USER_DEVICE_GET_IRQ_INFO
SET_IRQS, READ, WRITE = (
    lib.VFIO_USER_DEVICE_SET_IRQS,
    lib.VFIO_USER_REGION_READ,
    lib.VFIO_USER_REGION_WRITE,
)
DMA_READ, DMA_WRITE, RESET = lib.VFIO_USER_DMA_READ, lib.VFIO_USER_DMA_WRITE, lib.VFIO_USER_DEVICE_RESET
MULTI, FEATURE = lib.VFIO_USER_REGION_WRITE_MULTI, lib.VFIO_USER_DEVICE_FEATURE
MIG_READ, MIG_WRITE = lib.VFIO_USER_MIG_DATA_READ, lib.VFIO_USER_MIG_DATA_WRITE

MIB = 1 << 20
SCRATCH = 0x4000
EINVAL, ENOTSUP, ENOTTY = errno.EINVAL, errno.ENOTSUP, errno.ENOTTY


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path, intx=True) as server:
        yield server


@pytest.fixture
async def client(served: Served) -> RawClient:
    return await served.connect()


# What has a reply without an error: command, body, the reply's body.
GOOD: list[tuple[str, int, bytes, bytes]] = [
    ("info", GET_INFO, struct.pack("<4I", 16, 0, 0, 0), struct.pack("<4I", 16, 3, 9, 5)),
    (
        "info, with room",
        GET_INFO,
        struct.pack("<4I", 64, 0, 0, 0) + bytes(48),
        struct.pack("<4I", 16, 3, 9, 5),
    ),
    ("no ROM", GET_REGION_INFO, RegionInfo.request(6), RegionInfo(6, 0, 0).pack(32)),
    ("no VGA", GET_REGION_INFO, RegionInfo.request(8), RegionInfo(8, 0, 0).pack(32)),
    ("config", GET_REGION_INFO, RegionInfo.request(7), RegionInfo(7, 4096, 3).pack(32)),
    ("BAR 1", GET_REGION_INFO, RegionInfo.request(1), RegionInfo(1, 0, 0).pack(32)),
    ("BAR 2", GET_REGION_INFO, RegionInfo.request(2, 4096) + bytes(64), RegionInfo(2, 4096, 3).pack(32)),
    ("INTx", GET_IRQ_INFO, IrqInfo.request(0), IrqInfo(0, 7, 1).pack()),
    ("MSI", GET_IRQ_INFO, IrqInfo.request(1), IrqInfo(1, 9, 0).pack()),
    ("MSI-X", GET_IRQ_INFO, IrqInfo.request(2), IrqInfo(2, 1, 4).pack()),
    ("ERR", GET_IRQ_INFO, IrqInfo.request(3), IrqInfo(3, 9, 1).pack()),
    ("REQ", GET_IRQ_INFO, IrqInfo.request(4), IrqInfo(4, 9, 1).pack()),
    ("unmap nothing", DMA_UNMAP, messages.DmaUnmap(0, 4096).pack(), messages.DmaUnmap(0, 4096).pack()),
    ("unmap all", DMA_UNMAP, messages.DmaUnmap(0, 0, 2).pack(), messages.DmaUnmap(0, 0, 2).pack()),
    ("map without a file", DMA_MAP, messages.DmaMap(0, 4096).pack(), b""),
    ("read", READ, messages.region_access(0, 7, 4), messages.region_access(0, 7, 4, b"\x34\x12\xe8\x11")),
    ("write", WRITE, messages.region_access(0, 0, 1, b"x"), messages.region_access(0, 0, 1)),
    ("no writes", MULTI, messages.write_multi(()), messages.write_multi_reply(0)),
    (
        "writes",
        MULTI,
        messages.write_multi([(0, 0, b"x"), (8, 0, b"12345678")]),
        messages.write_multi_reply(2),
    ),
    ("reset", RESET, b"", b""),
]


@pytest.mark.parametrize(("command", "body", "reply"), [c[1:] for c in GOOD], ids=[c[0] for c in GOOD])
async def test_answered(client: RawClient, command: int, body: bytes, reply: bytes) -> None:
    found = await client.call(command, body)
    assert (found.error, found.body, found.fds) == (0, reply, [])


def access(offset: int, region: int, count: int, data: bytes = b"") -> bytes:
    return messages.region_access(offset, region, count, data)


# What is refused: command, body, errno.
BAD: list[tuple[str, int, bytes, int]] = [
    ("command 0", 0, b"", EINVAL),
    ("command 14", 14, b"", EINVAL),
    ("command 19", 19, b"", EINVAL),
    ("command 65535", 65535, bytes(64), EINVAL),
    ("a second version", VERSION, Version().pack(), EINVAL),
    ("DMA_READ to a server", DMA_READ, messages.dma_access(0, 8), EINVAL),
    ("DMA_WRITE to a server", DMA_WRITE, messages.dma_access(0, 8, bytes(8)), EINVAL),
    ("feature", FEATURE, messages.device_feature(1 << 18 | 1), ENOTTY),
    ("short feature", FEATURE, bytes(4), EINVAL),
    ("migration data", MIG_READ, struct.pack("<II", 4096, 4096), ENOTSUP),
    ("migration data in", MIG_WRITE, struct.pack("<II", 16, 8) + bytes(8), ENOTSUP),
    ("info: empty", GET_INFO, b"", EINVAL),
    ("info: argsz", GET_INFO, struct.pack("<4I", 15, 0, 0, 0), EINVAL),
    ("region 9", GET_REGION_INFO, RegionInfo.request(9), EINVAL),
    ("region -1", GET_REGION_INFO, RegionInfo.request(0xFFFFFFFF), EINVAL),
    ("region: argsz", GET_REGION_INFO, RegionInfo.request(0, 16), EINVAL),
    ("region: short", GET_REGION_INFO, RegionInfo.request(0)[:-1], EINVAL),
    ("fds", IO_FDS, messages.region_io_fds(0), ENOTSUP),
    ("fds of region 9", IO_FDS, messages.region_io_fds(9), EINVAL),
    ("fds: short", IO_FDS, bytes(8), EINVAL),
    ("irq 5", GET_IRQ_INFO, IrqInfo.request(5), EINVAL),
    ("irq -1", GET_IRQ_INFO, IrqInfo.request(0xFFFFFFFF), EINVAL),
    ("irq: short", GET_IRQ_INFO, bytes(4), EINVAL),
    ("set: short", SET_IRQS, bytes(16), EINVAL),
    ("map: short", DMA_MAP, bytes(16), EINVAL),
    ("map: offset into nothing", DMA_MAP, messages.DmaMap(0, 4096, 3, 4096).pack(), EINVAL),
    ("unmap: bitmap", DMA_UNMAP, struct.pack("<IIQQQQ", 40, 1, 0, 4096, 4096, 8), ENOTSUP),
    ("read: region 9", READ, access(0, 9, 4), EINVAL),
    ("read: region -1", READ, access(0, 0xFFFFFFFF, 4), EINVAL),
    ("read: no BAR", READ, access(0, 1, 4), EINVAL),
    ("read: the ROM", READ, access(0, 6, 4), EINVAL),
    ("read: past the end", READ, access(0x8000, 0, 1), EINVAL),
    ("read: across the end", READ, access(0x7FFC, 0, 8), EINVAL),
    ("read: far away", READ, access((1 << 64) - 4, 0, 8), EINVAL),
    ("read: config's end", READ, access(4095, 7, 2), EINVAL),
    ("read: far from config", READ, access(1 << 63, 7, 4), EINVAL),
    ("read: nothing", READ, access(0, 0, 0), EINVAL),
    ("read: more than may be", READ, access(0, 0, MIB + 1), EINVAL),
    ("read: 4 GiB", READ, access(0, 0, 0xFFFFFFFF), EINVAL),
    ("read: with data", READ, access(0, 0, 4, bytes(4)), EINVAL),
    ("read: short", READ, bytes(15), EINVAL),
    ("write: region 9", WRITE, access(0, 9, 4, bytes(4)), EINVAL),
    ("write: across the end", WRITE, access(0x7FFC, 0, 8, bytes(8)), EINVAL),
    ("write: config's end", WRITE, access(4094, 7, 4, bytes(4)), EINVAL),
    ("write: less data", WRITE, access(0, 0, 8, bytes(4)), EINVAL),
    ("write: more data", WRITE, access(0, 0, 4, bytes(8)), EINVAL),
    ("write: nothing", WRITE, access(0, 0, 0), EINVAL),
    ("multi: a count", MULTI, struct.pack("<Q", 3), EINVAL),
    ("multi: outside", MULTI, messages.write_multi([(0, 0, b"y"), (0x8000, 0, b"x")]), EINVAL),
    ("reset: a body", RESET, bytes(4), EINVAL),
]


@pytest.mark.parametrize(("command", "body", "number"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
async def test_refused(client: RawClient, command: int, body: bytes, number: int) -> None:
    """A header with the errno and nothing else; and the connection goes on."""
    assert (await client.call(command, body)).error == number
    assert await client.read(CONFIG, 0) == 0x11E81234
    await client.post(command, body)  # without a reply: not even of the error
    assert await client.read(CONFIG, 0) == 0x11E81234


async def test_posted(client: RawClient) -> None:
    for i in range(50):
        await client.post(WRITE, access(4 * i, 0, 4, struct.pack("<I", i)))
    assert await client.read_bytes(0, 0, 200) == struct.pack("<50I", *range(50))


async def test_pipelined(client: RawClient) -> None:
    """Many requests in one write: a reply to each, in order; ids may be the same."""
    burst = b"".join(HEADER.pack(7, READ, 32, 0, 0) + access(i % 64, 7, 1) for i in range(500))
    await client.send(burst)
    data = await client.read_config_replies(500)
    whole = await client.read_bytes(CONFIG, 0, 64)
    assert data == (whole * 8)[:500]


async def test_in_pieces(client: RawClient) -> None:
    """A byte at a time is a message too."""
    message = HEADER.pack(9, READ, 32, 0, 0) + access(0, 7, 4)
    for i in range(len(message)):
        await client.send(message[i : i + 1])
    assert (await client.receive()).body[16:] == b"\x34\x12\xe8\x11"


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(1, READ, 15, 0, 0),
        HEADER.pack(1, READ, 0, 0, 0),
        HEADER.pack(1, WRITE, MIB + 4096, 0, 0),
        HEADER.pack(1, WRITE, 0xFFFFFFFF, 0, 0),
        HEADER.pack(1, READ, 16, 2, 0),
        HEADER.pack(1, READ, 16, 15, 0),
        b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
    ],
    ids=["15 bytes", "0 bytes", "too long", "4 GiB", "type 2", "type 15", "another protocol"],
)
async def test_ends_the_connection(served: Served, client: RawClient, data: bytes) -> None:
    await client.send(data)
    assert await client.is_closed()
    again = await served.connect()
    assert await again.read(CONFIG, 0) == 0x11E81234


async def test_replies_nobody_waits_for(client: RawClient) -> None:
    await client.send(HEADER.pack(1, READ, 16, 1, 0) + HEADER.pack(0x8001, DMA_READ, 16, 1 | ERROR, 14))
    assert await client.read(CONFIG, 0) == 0x11E81234


# Negotiation.


async def negotiate(served: Served, body: bytes, command: int = VERSION, flags: int = 0) -> RawClient:
    client = await served.connect(version=False)
    await client.send(HEADER.pack(1, command, 16 + len(body), flags, 0) + body)
    return client


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (struct.pack("<HH", 0, 1), struct.pack("<HH", 0, 1)),
        (struct.pack("<HH", 0, 0), struct.pack("<HH", 0, 0)),
        (struct.pack("<HH", 0, 77), struct.pack("<HH", 0, 1)),
        (
            bytes(4) + b'{"capabilities":{"max_msg_fds":8}}\0',
            bytes(4) + b'{"capabilities":{"max_msg_fds":16}}\0',
        ),
    ],
)
async def test_version(served: Served, body: bytes, reply: bytes) -> None:
    client = await negotiate(served, body)
    assert (await client.receive()).body == reply
    assert await client.read(CONFIG, 0) == 0x11E81234


@pytest.mark.parametrize(
    ("body", "command"),
    [
        (struct.pack("<HH", 1, 0), VERSION),
        (b"", VERSION),
        (bytes(4) + b"{}", VERSION),
        (bytes(4) + b'{"capabilities":{"max_msg_fds":0}}\0', VERSION),
        (bytes(4) + b'{"capabilities":{"pgsizes":2097152}}\0', VERSION),
        (RegionInfo.request(0), GET_REGION_INFO),
        (access(0, 7, 4), READ),
    ],
)
async def test_version_refused(served: Served, body: bytes, command: int) -> None:
    client = await negotiate(served, body, command)
    assert (await client.receive()).error == EINVAL
    assert await client.is_closed()
    await served.connect()


async def test_posted_version_ends_the_connection(served: Served) -> None:
    client = await negotiate(served, Version().pack(), flags=NO_REPLY)
    assert await client.is_closed()


async def test_every_limit(served: Served) -> None:
    client = await served.connect(version=False)
    await client.call(VERSION, Version(Limits(16, 8192, 9, 4096, True)).pack())
    assert (await client.call(READ, access(0, 0, SCRATCH))).error == 0, (
        "a client's limit is for what it gets by DMA"
    )
    for index in range(9):
        assert (await client.map(index << 20, 4096)) == 0


# One client at a time.


async def test_second_client_is_turned_away(served: Served, client: RawClient) -> None:
    second = await served.connect(version=False)
    assert await second.is_closed()
    assert await client.read(CONFIG, 0) == 0x11E81234
    client.close()
    third = await served.connect()
    assert await third.read(CONFIG, 0) == 0x11E81234
    assert served.server.clients == 2


async def test_everything_of_a_client_goes(served: Served, client: RawClient) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fd, event = memory(), os.eventfd(0)
    await client.enable()
    assert await client.map(0, MIB, fd) == 0
    assert await client.map(MIB, MIB) == 0
    assert await client.set_irqs(2, 4 | 32, 0, 1, fds=[event]) == 0
    assert await client.set_irqs(4, 4 | 32, 0, 1, fds=[event]) == 0
    await client.write_bytes(0, 0, b"secret")
    assert served.bus.maps == 2
    client.close()
    again = await served.connect()
    assert served.bus.maps == 0
    assert await again.read(CONFIG, 4, 2) & 6 == 2
    assert await again.read_bytes(0, 0, 6) == bytes(6)
    await again.write(0, 0x4034, 0)  # raises the pin or vector 0: nobody hears it
    os.set_blocking(event, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(event)
    os.close(fd)
    os.close(event)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_half_a_message_and_gone(served: Served) -> None:
    for cut in (1, 15, 16, 31):
        client = await served.connect()
        await client.send((HEADER.pack(1, READ, 32, 0, 0) + access(0, 7, 4))[:cut])
        client.close()
    assert await (await served.connect()).read(CONFIG, 0) == 0x11E81234


async def test_client_that_does_not_read_its_replies(served: Served, client: RawClient) -> None:
    """The server stops reading rather than keep what cannot be sent, and goes on when the client does."""
    burst = HEADER.pack(7, READ, 32, 0, 0) + access(0, 0, SCRATCH)
    sent = 0
    with trio.move_on_after(0.5):
        while sent < 4000:
            await client.sock.send(burst)
            sent += 1
    assert sent < 4000
    for _ in range(sent):
        assert len((await client.receive()).body) == 16 + SCRATCH


async def test_descriptors_nobody_asked_for(served: Served, client: RawClient) -> None:
    """They are closed. More than are taken with one message: refused."""
    before = len(os.listdir("/proc/self/fd"))
    fd = memory()
    assert (await client.call(DMA_UNMAP, messages.DmaUnmap(0, 4096).pack(), [fd])).error == 0
    assert (await client.call(GET_INFO, DeviceInfo.request(), [fd] * 16)).error == 0
    assert (await client.call(GET_INFO, DeviceInfo.request(), [fd] * 17)).error == EINVAL
    assert (await client.call(DMA_MAP, messages.DmaMap(0, 4096).pack(), [fd] * 2)).error == EINVAL
    os.close(fd)
    assert await client.read(CONFIG, 0) == 0x11E81234
    assert len(os.listdir("/proc/self/fd")) == before


async def test_log(served: Served, client: RawClient) -> None:
    await client.read(CONFIG, 0)
    assert served.lines[-2:] == [
        "< 2 REGION_READ config 0x0+0x4",
        "> 2 REGION_READ config 0x0+0x4 = 3412e811",
    ]
    assert json.loads(served.lines[0].split(" ", 4)[4])["max_msg_fds"] == 16


async def test_clients_that_are_silent(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing at first does not keep the device; nor one that takes no replies."""
    monkeypatch.setattr(session, "_FIRST_SECONDS", 0.01)
    silent = await served.connect(version=False)
    assert await silent.is_closed()
    monkeypatch.setattr(session, "_FIRST_SECONDS", 10.0)
    monkeypatch.setattr(session, "_SEND_SECONDS", 0.01)
    deaf = await served.connect()
    burst = HEADER.pack(7, READ, 32, 0, 0) + access(0, 0, SCRATCH)
    with pytest.raises((ConnectionResetError, BrokenPipeError)), trio.fail_after(20):
        while True:
            await deaf.sock.send(burst)
    again = await served.connect()
    assert await again.read(CONFIG, 0) == 0x11E81234
