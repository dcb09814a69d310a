"""A vfio-user server that does what a test says: by default a small device that behaves, every command of which a test
may answer otherwise, or not at all.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pvfio.abi import lib
from pvfio.errors import VfioError
from pvfio.vfio_user.channel import Channel, ChannelEnded, Message
from pvfio.vfio_user.messages import DeviceInfo, IrqInfo, RegionInfo, dma_access
from pvfio.vfio_user.version import Limits, Version

if TYPE_CHECKING:
    from pvfio.vfio_user.client import VfioUserVfio

CONFIG = lib.VFIO_PCI_CONFIG_REGION_INDEX
RW = lib.VFIO_REGION_INFO_FLAG_READ | lib.VFIO_REGION_INFO_FLAG_WRITE
MSIX_AT = 0x40
VECTORS = 20


@dataclass
class Request:
    """A message of the client's: ``fds`` how many descriptors came with it."""

    command: int
    body: bytes
    fds: int


@dataclass
class FakeServer:
    """``answers``: by command, what is done instead; it returns the reply's body, an errno, or None for no reply.

    ``requests`` are all that came. ``maps``: the maps there are, address to size.
    """

    path: Path
    limits: Limits = field(default_factory=lambda: Limits(max_msg_fds=8))
    bar: bytearray = field(default_factory=lambda: bytearray(0x2000))
    config: bytearray = field(default_factory=lambda: make_config())
    region_infos: dict[int, tuple[RegionInfo, list[int]]] = field(default_factory=dict)
    answers: dict[int, Callable[[Request], bytes | int | None]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    maps: dict[int, int] = field(default_factory=dict)
    eventfds: dict[int, int] = field(default_factory=dict)
    replies: list[tuple[int, bytes]] = field(default_factory=list)
    connections: int = 0
    channel: Channel | None = None
    came: trio.Event = field(default_factory=trio.Event)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listener:
            await listener.bind(str(self.path))
            listener.listen(4)
            task_status.started()
            while True:
                stream, _ = await listener.accept()
                self.connections += 1
                sock = socket.socket(fileno=stream.detach())
                await self._serve(Channel(sock, max_message=1 << 21, max_fds=16))

    async def _serve(self, channel: Channel) -> None:
        self.channel = channel
        self.maps.clear()
        try:
            while True:
                self._one(channel, await channel.receive())
                self._tell()
        except (ChannelEnded, trio.ClosedResourceError):
            pass
        finally:
            channel.close()
            self.channel = None
            for fd in self.eventfds.values():
                os.close(fd)
            self.eventfds.clear()
            self._tell()

    def _tell(self) -> None:
        came, self.came = self.came, trio.Event()
        came.set()

    def _one(self, channel: Channel, message: Message) -> None:
        if message.is_reply:
            self.replies.append((message.error, bytes(message.body)))
            return
        request = Request(message.command, bytes(message.body), len(message.fds))
        self.requests.append(request)
        answer = self.answers.get(message.command)
        fds: list[int] = []
        if answer is not None:
            body = answer(request)
        else:
            body, fds = self._behave(request, message)
        message.close()
        if body is None:
            return
        if isinstance(body, int):
            channel.reply_nowait(message, error=body)
        else:
            channel.reply_nowait(message, body, fds=fds)

    def _behave(self, request: Request, message: Message) -> tuple[bytes | int, list[int]]:
        command, body = request.command, request.body
        if command == lib.VFIO_USER_VERSION:
            return Version.parse(body).answer(self.limits).pack(), []
        if command == lib.VFIO_USER_DEVICE_GET_INFO:
            return DeviceInfo(lib.VFIO_DEVICE_FLAGS_PCI | lib.VFIO_DEVICE_FLAGS_RESET, 9, 5).pack(), []
        if command == lib.VFIO_USER_DEVICE_GET_REGION_INFO:
            index, argsz = RegionInfo.parse_request(body)
            plain = {0: len(self.bar), CONFIG: len(self.config)}.get(index, 0)
            info, fds = self.region_infos.get(index, (RegionInfo(index, plain, RW if plain else 0), []))
            return info.pack(argsz), fds
        if command == lib.VFIO_USER_DEVICE_GET_IRQ_INFO:
            index = IrqInfo.parse_request(body)
            count = {lib.VFIO_PCI_INTX_IRQ_INDEX: 1, lib.VFIO_PCI_MSIX_IRQ_INDEX: VECTORS}.get(index, 0)
            flags = lib.VFIO_IRQ_INFO_EVENTFD | (0 if index else lib.VFIO_IRQ_INFO_MASKABLE)
            return IrqInfo(index, flags, count).pack(), []
        if command == lib.VFIO_USER_DEVICE_SET_IRQS:
            return self._set_irqs(body, message), []
        if command in (lib.VFIO_USER_REGION_READ, lib.VFIO_USER_REGION_WRITE):
            return self._access(command, body), []
        if command == lib.VFIO_USER_DMA_MAP:
            _, _, _, address, size = struct.unpack("<IIQQQ", body)
            self.maps[address] = size
            return b"", []
        if command == lib.VFIO_USER_DMA_UNMAP:
            _, _, address, size = struct.unpack("<IIQQ", body)
            assert self.maps.pop(address) == size
            return body, []
        assert command == lib.VFIO_USER_DEVICE_RESET
        return b"", []

    def _set_irqs(self, body: bytes, message: Message) -> bytes:
        _, _, _, start, _ = struct.unpack_from("<IIIII", body)
        for number, fd in enumerate(message.take_fds(), start):
            self.eventfds[number] = fd
        return b""

    def _access(self, command: int, body: bytes) -> bytes:
        offset, region, count = struct.unpack_from("<QII", body)
        assert count <= self.limits.max_data_xfer_size
        memory = self.config if region == CONFIG else self.bar
        if command == lib.VFIO_USER_REGION_READ:
            return body + bytes(memory[offset : offset + count])
        memory[offset : offset + count] = body[16:]
        return body[:16]

    # What the server begins.

    def ask(self, command: int, address: int, count: int, data: bytes = b"") -> None:
        """DMA_READ or DMA_WRITE; the answer comes into ``replies`` as (errno, body)."""
        assert self.channel is not None
        self.channel.send_nowait(command, 77, 0, 0, dma_access(address, count, data))

    async def answered(self, count: int = 1) -> list[tuple[int, bytes]]:
        """Waits for so many replies, and takes them."""
        await self.until(lambda: len(self.replies) >= count)
        taken, self.replies = self.replies, []
        return taken

    async def until(self, true: Callable[[], bool]) -> None:
        """Waits until messages have come that make it true."""
        with trio.fail_after(10):
            while not true():
                await self.came.wait()

    def of(self, command: int) -> list[Request]:
        """The requests of one kind."""
        return [request for request in self.requests if request.command == command]


def make_config() -> bytearray:
    """A PCI function with one BAR and an MSI-X capability whose table is in its second page."""
    config = bytearray(256)
    config[0:4] = bytes.fromhex("34121111")
    config[0x06], config[0x34] = 0x10, MSIX_AT
    struct.pack_into("<BBHII", config, MSIX_AT, lib.PCI_CAP_ID_MSIX, 0, VECTORS - 1, 0x1000, 0x1800)
    return config


def refused(number: int, match: str = "") -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: .*{match}")


async def fds(server: FakeServer) -> int:
    """How many descriptors the process has, once the server has seen its client go."""
    await server.until(lambda: server.channel is None)
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def pins(vfio: VfioUserVfio) -> int:
    return sum(memory.stats().pins for memory in vfio.memories.values())
