"""A vfio-user client of bytes: what the tests of the server send, good and bad, over real sockets."""

from __future__ import annotations

import array
import itertools
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NvmeConfig, NvmeDevice
from pvfio.devices.rogue import RogueDevice
from pvfio.devices.testdev import TestDevice
from pvfio.silicon import TableBus
from pvfio.vfio_user import messages
from pvfio.vfio_user.messages import DmaMap, DmaUnmap, IrqSet
from pvfio.vfio_user.server import DeviceServer
from pvfio.vfio_user.version import Limits, Version

HEADER = struct.Struct("<HHIII")
REPLY, NO_REPLY, ERROR = 1, 0x10, 0x20
CONFIG = lib.VFIO_PCI_CONFIG_REGION_INDEX
NONE, BOOL, EVENTFD = (
    lib.VFIO_IRQ_SET_DATA_NONE,
    lib.VFIO_IRQ_SET_DATA_BOOL,
    lib.VFIO_IRQ_SET_DATA_EVENTFD,
)
MASK, UNMASK, TRIGGER = (
    lib.VFIO_IRQ_SET_ACTION_MASK,
    lib.VFIO_IRQ_SET_ACTION_UNMASK,
    lib.VFIO_IRQ_SET_ACTION_TRIGGER,
)
INTX, MSI, MSIX, ERR, REQ = range(5)


@dataclass
class Reply:
    """What came back. ``error`` is 0 or an errno; ``fds`` are the test's to close."""

    command: int
    id: int
    flags: int
    error: int
    body: bytes
    fds: list[int] = field(default_factory=list)


class RawClient:
    """One connection. Every await has a deadline of 5 seconds, so that a server that hangs fails the test."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.ids = itertools.count(1)
        # Memory without a file: what the device asks for by DMA_READ and DMA_WRITE, while a reply is waited for.
        self.memory = bytearray()
        self.base = 0
        self.asked = 0
        self.requests: list[Reply] = []

    @classmethod
    async def connect(cls, path: str | Path) -> RawClient:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(os.fspath(path))
        return cls(sock)

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes as they are."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with trio.fail_after(5):
            sent = await self.sock.sendmsg([data], ancillary)
            while sent < len(data):
                sent += await self.sock.send(data[sent:])

    async def _exactly(self, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            part, ancillary, _, _ = await self.sock.recvmsg(size - len(data), socket.CMSG_SPACE(64 * 4))
            for _, _, content in ancillary:
                fds.extend(array.array("i", content))
            if not part:
                raise ConnectionResetError(f"the end after {len(data)} bytes")
            data += part
        return data

    async def receive(self) -> Reply:
        """The next reply. Requests are answered if there is memory, and kept for ``request`` if not."""
        while True:
            reply = await self._next()
            if reply.flags & REPLY:
                return reply
            if self.memory:
                await self._serve_memory(reply)
            else:
                self.requests.append(reply)

    async def request(self) -> Reply:
        """The next request of the server."""
        return self.requests.pop(0) if self.requests else await self._next()

    async def _serve_memory(self, request: Reply) -> None:
        self.asked += 1
        address, count = struct.unpack_from("<QQ", request.body)
        at = slice(address - self.base, address - self.base + count)
        body = request.body[:16]
        if request.command == lib.VFIO_USER_DMA_READ:
            body += self.memory[at]
        else:
            self.memory[at] = request.body[16:]
        await self.send(HEADER.pack(request.id, request.command, 16 + len(body), REPLY, 0) + body)

    async def _next(self) -> Reply:
        fds: list[int] = []
        with trio.fail_after(5):
            id, command, size, flags, error = HEADER.unpack(await self._exactly(16, fds))
            body = await self._exactly(size - 16, fds)
        assert bool(flags & ERROR) == bool(error)
        assert not error or not body
        return Reply(command, id, flags, error, body, fds)

    async def call(
        self, command: int, body: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0
    ) -> Reply:
        """A command and its reply."""
        id = next(self.ids) & 0xFFFF
        await self.send(HEADER.pack(id, command, 16 + len(body), flags, 0) + body, fds)
        reply = await self.receive()
        assert (reply.command, reply.id, reply.flags & ~ERROR) == (command, id, REPLY)
        return reply

    async def post(self, command: int, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A command without a reply."""
        await self.send(
            HEADER.pack(next(self.ids) & 0xFFFF, command, 16 + len(body), NO_REPLY, 0) + body, fds
        )

    async def is_closed(self) -> bool:
        """Waits for the server to close the connection."""
        with trio.fail_after(5):
            try:
                return bool(await self.sock.recv(1) == b"")
            except ConnectionResetError:
                return True

    def close(self) -> None:
        self.sock.close()

    # Commands that are expected to succeed.

    async def version(self, limits: Limits | None = None) -> Version:
        asked = Version(limits or Limits(16, write_multiple=True))
        reply = await self.call(lib.VFIO_USER_VERSION, asked.pack())
        assert reply.error == 0
        return Version.parse(reply.body)

    async def read(self, region: int, offset: int, count: int = 4) -> int:
        return int.from_bytes(await self.read_bytes(region, offset, count), "little")

    async def read_bytes(self, region: int, offset: int, count: int) -> bytes:
        reply = await self.call(lib.VFIO_USER_REGION_READ, messages.region_access(offset, region, count))
        assert reply.error == 0
        return bytes(messages.parse_region_reply(reply.body, offset, region, count, read=True))

    async def read_config_replies(self, count: int) -> bytes:
        """The data of that many replies to reads of one byte."""
        return b"".join([(await self.receive()).body[16:] for _ in range(count)])

    async def write(self, region: int, offset: int, value: int, count: int = 4) -> None:
        await self.write_bytes(region, offset, value.to_bytes(count, "little"))

    async def write_bytes(self, region: int, offset: int, data: bytes) -> None:
        body = messages.region_access(offset, region, len(data), data)
        reply = await self.call(lib.VFIO_USER_REGION_WRITE, body)
        assert reply.error == 0
        assert reply.body == messages.region_access(offset, region, len(data))

    async def enable(self) -> None:
        """Memory decoding and bus mastering on."""
        await self.write(CONFIG, 4, 6, 2)

    async def find_capability(self, wanted: int) -> int:
        """Its offset in configuration space."""
        at = await self.read(CONFIG, lib.PCI_CAPABILITY_LIST, 1)
        while await self.read(CONFIG, at, 1) != wanted:
            at = await self.read(CONFIG, at + 1, 1)
            assert at
        return at

    async def flr(self) -> None:
        """A function level reset, as a guest asks for it."""
        at = await self.find_capability(lib.PCI_CAP_ID_EXP) + lib.PCI_EXP_DEVCTL
        await self.write(CONFIG, at, await self.read(CONFIG, at, 2) | lib.PCI_EXP_DEVCTL_BCR_FLR, 2)

    async def map(self, address: int, size: int, fd: int = -1, *, flags: int = 3, offset: int = 0) -> int:
        """Returns the errno."""
        body = DmaMap(address, size, flags, offset).pack()
        return (await self.call(lib.VFIO_USER_DMA_MAP, body, () if fd < 0 else (fd,))).error

    async def unmap(self, address: int, size: int, *, flags: int = 0) -> int:
        """Returns the errno."""
        body = DmaUnmap(address, size, flags).pack()
        reply = await self.call(lib.VFIO_USER_DMA_UNMAP, body)
        assert reply.error or reply.body == body
        return reply.error

    async def set_irqs(
        self,
        index: int,
        flags: int,
        start: int = 0,
        count: int = 1,
        *,
        fds: Sequence[int] = (),
        bools: bytes = b"",
    ) -> int:
        """Returns the errno."""
        body = IrqSet(index, flags, start, count, bools).pack()
        return (await self.call(lib.VFIO_USER_DEVICE_SET_IRQS, body, fds)).error


@dataclass
class Served:
    """A server in a nursery of the test, its device and bus."""

    server: DeviceServer
    device: Any
    bus: TableBus
    lines: list[str]
    clients: list[RawClient] = field(default_factory=list)

    async def connect(self, *, version: bool = True) -> RawClient:
        """A client, that has negotiated; closed at the end of the test."""
        client = await RawClient.connect(self.server.path)
        self.clients.append(client)
        if version:
            await client.version()
        return client


@asynccontextmanager
async def serve(path: Path, kind: str = "testdev", **options: Any) -> AsyncIterator[Served]:
    """Serves a new device at a socket in the folder ``path``."""
    bus = TableBus()
    device: Any
    if kind == "nvme":
        options.setdefault("config", NvmeConfig(poll_doorbells=True))
        device = NvmeDevice(bus, engine="thread", **options)
    elif kind == "dsa":
        from pvfio.devices.dsa import DsaDevice

        device = DsaDevice(bus, engine="thread", **options)
    elif kind == "rogue":
        device = RogueDevice(bus, **options)
    else:
        device = TestDevice(bus, **options)
    lines: list[str] = []
    server = DeviceServer(device, bus, path=path / "socket", log=lines.append)
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(server.run)
            served = Served(server, device, bus, lines)
            yield served
            for client in served.clients:
                client.close()
        finally:
            nursery.cancel_scope.cancel()
    device.close()


def memory(size: int = 1 << 20) -> int:
    """A memfd."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, size)
    return fd
