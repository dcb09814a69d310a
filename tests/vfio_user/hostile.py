"""A hostile vfio-user client: random messages, mutated ones, raw bytes, and file descriptors of every kind.

Everything follows from a seed but the time things take. It knows enough of the protocol to get far: maps that last,
interrupts that are armed, NVMe queues that live in its memory, DSA submissions.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import random
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final

import trio

from pvfio.abi import lib
from pvfio.vfio_user import messages
from pvfio.vfio_user.messages import DeviceInfo, DmaMap, DmaUnmap, IrqInfo, RegionInfo
from pvfio.vfio_user.version import Limits, Version
from tests.vfio_user.raw import HEADER, NO_REPLY, REPLY

EDGES: Final = (
    0,
    1,
    2,
    7,
    8,
    64,
    4095,
    4096,
    1 << 16,
    1 << 20,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 63,
    (1 << 64) - 1,
)
RAM: Final = 64
"""Pages the client has at address 0, most of the time."""
DMA_MAP, DMA_UNMAP, SET_IRQS = lib.VFIO_USER_DMA_MAP, lib.VFIO_USER_DMA_UNMAP, lib.VFIO_USER_DEVICE_SET_IRQS
READ, WRITE, MULTI = lib.VFIO_USER_REGION_READ, lib.VFIO_USER_REGION_WRITE, lib.VFIO_USER_REGION_WRITE_MULTI


ADMIN: Final = 0x20000
"""Where the admin submission queue is; its completion queue and the I/O queues follow, a page each."""
ADMIN_OPCODES: Final = (0, 1, 2, 4, 5, 6, 8, 9, 0xA, 0xC, 0xD, 0x10, 0x11, 0x14, 0x15, 0x18, 0x7C, 0x80, 0x84)
IO_OPCODES: Final = (0, 1, 1, 1, 2, 2, 2, 4, 5, 8, 9, 0xC, 0x19)


def _sqe(
    opcode: int, cid: int, nsid: int, prp1: int, prp2: int, dwords: Sequence[int], flags: int = 0
) -> bytes:
    words = [*dwords, 0, 0, 0, 0, 0, 0][:6]
    return struct.pack("<BBHIQQQQ6I", opcode, flags, cid, nsid, 0, 0, prp1, prp2, *words)


class HostileClient:
    """One connection, from the first byte to the last: ``await run(path, messages)``.

    ``kind`` is what it believes to find: "nvme", "dsa" or something else.
    """

    def __init__(self, seed: int, kind: str = "") -> None:
        self.random = random.Random(seed)
        self._recipe = {"nvme": self._nvme_up, "dsa": self._dsa_up}.get(kind, list)
        self.sent = 0
        self._fds: list[int] = []
        self._ram = self._file(RAM)
        self._kinds: list[Callable[[], tuple[int, bytes, list[int]]]] = [
            self._dma_map,
            self._dma_map,
            self._dma_unmap,
            self._region_read,
            self._region_write,
            self._region_write,
            self._config_write,
            self._controller,
            self._submission,
            self._set_irqs,
            self._set_irqs,
            self._write_multi,
            self._question,
            self._nonsense,
            *{"nvme": [self._controller] * 10, "dsa": [self._submission] * 10}.get(kind, []),
        ]

    # One connection.

    async def run(self, path: str, count: int) -> None:
        """Sends ``count`` messages, or fewer where the server has had enough; then goes, in one way or another."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await sock.connect(path)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_replies, sock)
                with contextlib.suppress(OSError):  # The server may close it at any time.
                    await self._talk(sock, count)
                nursery.cancel_scope.cancel()
        finally:
            sock.close()
            for fd in self._fds:
                os.close(fd)
            self._fds.clear()

    async def _talk(self, sock: trio.socket.SocketType, count: int) -> None:
        pick = self.random.random
        if pick() < 0.97:
            await self._send(sock, self._frame(lib.VFIO_USER_VERSION, Version(Limits(16)).pack(), 0), [])
        else:
            await self._send(sock, self._bytes(200), [])
        if pick() < 0.9:
            await self._send(sock, self._frame(DMA_MAP, DmaMap(0, RAM * 4096).pack(), 0), [self._ram])
            await self._send(sock, self._frame(WRITE, messages.region_access(4, 7, 2, b"\6\4"), 0), [])
        for data in self._recipe() if pick() < 0.9 else ():
            await self._send(sock, data, [])
            await trio.lowlevel.checkpoint()
        for _ in range(count):
            command, body, fds = self.random.choice(self._kinds)()
            data = self._frame(command, body, NO_REPLY * (pick() < 0.3))
            luck = pick()
            if luck < 0.10:
                data = self._mutated(data)
            elif luck < 0.103:
                data = self._bytes(300)
            elif luck < 0.115:  # Half a message, and gone.
                await self._send(sock, data[: self.random.randrange(1, len(data))], fds)
                return
            await self._send(sock, data, fds)
            if luck > 0.98:
                self._hurt()
            if luck > 0.9:
                await trio.lowlevel.checkpoint()
        if pick() < 0.5:  # Let it answer what it was asked.
            with trio.move_on_after(0.01):
                await trio.sleep_forever()

    async def _send(self, sock: trio.socket.SocketType, data: bytes, fds: list[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = await sock.sendmsg([data], ancillary)
        while sent < len(data):
            sent += await sock.send(data[sent:])
        self.sent += 1

    async def _read_replies(self, sock: trio.socket.SocketType) -> None:
        """Reads what comes, and answers requests for its memory: rightly, wrongly, or not at all."""
        pending = b""
        while True:
            try:
                part, ancillary, _, _ = await sock.recvmsg(1 << 16, socket.CMSG_SPACE(64 * 4))
            except OSError:
                return
            for _, _, content in ancillary:
                for fd in array.array("i", content[: len(content) // 4 * 4]):
                    os.close(fd)
            if not part:
                return
            pending += part
            while len(pending) >= 16:
                id, command, size, flags, _ = HEADER.unpack_from(pending)
                if len(pending) < size:
                    break
                body, pending = pending[16:size], pending[size:]
                if not flags & REPLY:
                    try:
                        await self._answer(sock, id, command, body)
                    except OSError:
                        return

    async def _answer(self, sock: trio.socket.SocketType, id: int, command: int, body: bytes) -> None:
        luck = self.random.random()
        count = int.from_bytes(body[8:16], "little")
        data = self._bytes(count)[:count] if command == lib.VFIO_USER_DMA_READ else b""
        answer = body[:16] + data.ljust(count * (command == lib.VFIO_USER_DMA_READ), b"\0")
        if luck < 0.1:
            answer = self._bytes(64)
        elif luck < 0.2:
            id ^= self.random.randrange(1 << 16)
        elif luck < 0.3:
            await self._send(sock, HEADER.pack(id, command, 16, REPLY | 0x20, 14), [])
            return
        elif luck < 0.33:
            return
        await self._send(sock, HEADER.pack(id, command, 16 + len(answer), REPLY, 0) + answer, [])

    # Bytes.

    def _frame(self, command: int, body: bytes, flags: int) -> bytes:
        return HEADER.pack(self.random.randrange(1 << 16), command, 16 + len(body), flags, 0) + body

    def _bytes(self, most: int) -> bytes:
        return self.random.randbytes(self.random.randrange(1, most + 1))

    def _mutated(self, data: bytes) -> bytes:
        """Changed in a few places; seldom in the size, after which nothing would be understood."""
        changed = bytearray(data)
        first = 0 if self.random.random() < 0.05 or len(changed) == 16 else 16
        for _ in range(self.random.randrange(1, 5)):
            at = self.random.randrange(first, len(changed))
            if self.random.random() < 0.5:
                changed[at] ^= 1 << self.random.randrange(8)
            else:
                changed[at : at + 8] = (self._word() & (1 << 64) - 1).to_bytes(8, "little")[
                    : len(changed) - at
                ]
        return bytes(changed)

    def _word(self) -> int:
        if self.random.random() < 0.5:
            return self.random.choice(EDGES)
        return self.random.getrandbits(64) >> self.random.randrange(64)

    def _address(self) -> int:
        if self.random.random() < 0.9:
            return self.random.randrange(2 * RAM) * 4096
        return self._word()

    # How a driver brings the devices up.

    def _store(self, offset: int, value: int, size: int = 4) -> bytes:
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return self._frame(WRITE, messages.region_access(offset, 0, size, data), 0)

    def _nvme_up(self) -> list[bytes]:
        """Admin queues, and three I/O queue pairs made through them."""
        queues = b""
        for number in range(1, 4):
            cq, sq = ADMIN + number * 0x2000 + 0x1000, ADMIN + number * 0x2000
            vector = number << 16 | 2 * (number & 1) | 1
            queues += _sqe(lib.NVME_ADMIN_CREATE_CQ, number, 0, cq, 0, (15 << 16 | number, vector))
            queues += _sqe(lib.NVME_ADMIN_CREATE_SQ, number, 0, sq, 0, (15 << 16 | number, number << 16 | 1))
        os.pwrite(self._ram, queues, ADMIN)
        return [
            self._store(lib.NVME_REG_AQA, 0x000F000F),
            self._store(lib.NVME_REG_ASQ, ADMIN, 8),
            self._store(lib.NVME_REG_ACQ, ADMIN + 0x1000, 8),
            self._store(lib.NVME_REG_CC, 0x460001),
            *[self._store(lib.NVME_REG_DBS, tail) for tail in (2, 4, 6)],
        ]

    def _dsa_up(self) -> list[bytes]:
        """A dedicated and a shared queue of one group, enabled."""
        groups, queues = self.dsa_tables
        stores = []
        for number, mode in enumerate((0xA1, 0xA0)):
            words = (16, 8, mode, 0x4F if self.random.random() < 0.9 else self._word(), 0, 0, 0, 0)
            stores += [self._store(queues + 32 * number + 4 * i, word) for i, word in enumerate(words)]
        stores += [self._store(groups, 3, 8), self._store(groups + lib.IDXD_GRPCFG_ENGINES_OFFSET, 3, 8)]
        shift = lib.IDXD_CMD_SHIFT
        for command in (
            lib.IDXD_CMD_ENABLE_DEVICE << shift,
            *(lib.IDXD_CMD_ENABLE_WQ << shift | n for n in (0, 1)),
        ):
            stores.append(self._store(lib.IDXD_CMD_OFFSET, command))
        return stores

    dsa_tables = (0, 0)
    """Offsets of GRPCFG and WQCFG in BAR 0."""

    # File descriptors.

    def _file(self, pages: int, *, sealed: bool = False) -> int:
        fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fds.append(fd)
        os.truncate(fd, pages * 4096)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return fd

    def _descriptor(self) -> int:
        """One of a kind that somebody could send."""
        luck = self.random.random()
        if luck < 0.5:
            return self._ram
        if luck < 0.7:
            return self._file(self.random.choice((0, 1, 3, RAM)), sealed=self.random.random() < 0.5)
        if luck < 0.85:
            fd = os.eventfd(self.random.choice((0, 1, 1 << 31)), self.random.choice((0, os.EFD_NONBLOCK)))
        elif luck < 0.9:
            fd, other = os.pipe()
            self._fds.append(other)
        elif luck < 0.95:
            fd = os.open(
                self.random.choice(("/", "/dev/null", "/dev/zero", "/etc/passwd", "/proc/self/mem")),
                os.O_RDONLY,
            )
        else:
            fd = socket.socket().detach()
        self._fds.append(fd)
        return fd

    def _descriptors(self, most: int) -> list[int]:
        return [self._descriptor() for _ in range(self.random.randrange(most + 1))]

    def _hurt(self) -> None:
        """Its own memory, while it is mapped."""
        fd = self.random.choice(self._fds)
        with contextlib.suppress(OSError):
            os.truncate(fd, self.random.choice((0, 4096, RAM * 4096)))

    # Messages.

    def _dma_map(self) -> tuple[int, bytes, list[int]]:
        pages = self.random.choice((1, 1, 2, 16, self._word() & 0xFFFFF))
        offset = self.random.choice((0, 0, 0, 4096, self._word()))
        flags = self.random.choice((1, 2, 3, 3, 3, self._word() & 0xFFFFFFFF))
        body = struct.pack("<IIQQQ", 32, flags, offset, self._address(), pages * 4096)
        return DMA_MAP, body, self._descriptors(1 if self.random.random() < 0.95 else 20)

    def _dma_unmap(self) -> tuple[int, bytes, list[int]]:
        if self.random.random() < 0.05:
            return DMA_UNMAP, DmaUnmap(0, 0, 2).pack(), []
        return DMA_UNMAP, struct.pack("<IIQQ", 24, 0, self._address(), 4096 * (self._word() & 0xFF)), []

    def _region(self) -> int:
        return self.random.choice((0, 0, 0, 2, 2, 7, 7, 1, 8, 9))

    def _region_read(self) -> tuple[int, bytes, list[int]]:
        count = self.random.choice((1, 2, 4, 8, 64, 256, 4096, self._word() & 0xFFFFF))
        return READ, struct.pack("<QII", self._offset(), self._region(), count), []

    def _offset(self) -> int:
        return self.random.randrange(0x4000) & ~3 if self.random.random() < 0.9 else self._word()

    def _region_write(self) -> tuple[int, bytes, list[int]]:
        data = self.random.randbytes(self.random.choice((1, 2, 4, 4, 4, 8, 8, 64, 300)))
        return WRITE, messages.region_access(self._offset(), self._region(), len(data), data), []

    def _config_write(self) -> tuple[int, bytes, list[int]]:
        """Decoding and bus mastering, mostly on; now and then anything, FLR included."""
        if self.random.random() < 0.7:
            return WRITE, messages.region_access(4, 7, 2, b"\6\4"), []
        data = self.random.randbytes(self.random.choice((1, 2, 4)))
        return WRITE, messages.region_access(self.random.randrange(0x100), 7, len(data), data), []

    def _controller(self) -> tuple[int, bytes, list[int]]:
        """NVMe: queues in its memory, enabled, commands in them and doorbells rung; other devices see stray writes."""
        step = self.random.randrange(30)
        queue = self.random.randrange(4)
        if step < 14:
            with contextlib.suppress(OSError):
                os.pwrite(self._ram, self._commands(admin=not queue), ADMIN + 0x2000 * queue)
        if step < 28:
            bell = lib.NVME_REG_DBS + 8 * queue + 4 * (self.random.random() < 0.4)
            return WRITE, messages.region_access(bell, 0, 4, struct.pack("<I", self.random.randrange(17))), []
        if step == 28:
            queues = struct.pack("<IQQ", 0x001F001F, self._address(), self._address())
            return WRITE, messages.region_access(lib.NVME_REG_AQA, 0, 20, queues), []
        return WRITE, messages.region_access(lib.NVME_REG_CC, 0, 4, struct.pack("<I", 0x460001)), []

    def _commands(self, *, admin: bool) -> bytes:
        opcodes = ADMIN_OPCODES if admin else IO_OPCODES
        return b"".join(
            _sqe(
                self.random.choice(opcodes),
                self.random.randrange(1 << 16),
                self.random.choice((0, 1, 1, 1, 2, 0xFFFFFFFF)),
                self._address(),
                self._address(),
                [
                    (word & 0xFF if self.random.random() < 0.7 else word) & 0xFFFFFFFF
                    for word in (self._word() for _ in range(6))
                ],
                self.random.choice((0, 0, 0, 0x40, 0x80, 1, 2)),
            )
            for _ in range(16)
        )

    def _submission(self) -> tuple[int, bytes, list[int]]:
        """DSA: a descriptor for a portal, as one write or as a part of one."""
        descriptor = bytearray(self.random.randbytes(64))
        if self.random.random() < 0.8:
            struct.pack_into(
                "<II", descriptor, 0, 0, self.random.randrange(0x21) << 24 | self.random.choice((0xC, 0xE, 4))
            )
            struct.pack_into(
                "<QQQI", descriptor, 8, *(self._address() for _ in range(3)), self._word() & 0xFFFF
            )
            descriptor[36:] = bytes(28)
        at, width = self.random.randrange(8) * 4096, self.random.choice((64, 64, 64, 8))
        part = self.random.randrange(64 // width) * width
        data = bytes(descriptor[part : part + width])
        return WRITE, messages.region_access(at + part, 2, width, data), []

    def _set_irqs(self) -> tuple[int, bytes, list[int]]:
        index, count = self.random.choice((0, 2, 2, 2, 1, 3, 4, 5)), self.random.choice((0, 1, 1, 2, 4, 40))
        flags = self.random.choice((1, 2, 4)) | self.random.choice((8, 16, 32))
        if self.random.random() < 0.5:
            flags = 4 | 32
        start = self.random.choice((0, 0, 0, 1, self._word() & 0xFFFFFFFF))
        bools = self.random.randbytes(count) if flags & 2 else b""
        fds = self._descriptors(min(count, 16)) if flags & 4 else []
        return SET_IRQS, struct.pack("<5I", 20 + len(bools), flags, index, start, count) + bools, fds

    def _write_multi(self) -> tuple[int, bytes, list[int]]:
        writes = [
            (self._offset(), self._region(), self.random.randbytes(8))
            for _ in range(self.random.randrange(9))
        ]
        return MULTI, messages.write_multi(writes), []

    def _question(self) -> tuple[int, bytes, list[int]]:
        index = self.random.choice((*range(10), self._word() & 0xFFFFFFFF))
        return self.random.choice(
            (
                (lib.VFIO_USER_DEVICE_GET_INFO, DeviceInfo(0, 0, 0).pack(), []),
                (lib.VFIO_USER_DEVICE_GET_REGION_INFO, RegionInfo.request(index), []),
                (lib.VFIO_USER_DEVICE_GET_IRQ_INFO, IrqInfo.request(index), []),
                (lib.VFIO_USER_DEVICE_GET_REGION_IO_FDS, messages.region_io_fds(index), []),
                (lib.VFIO_USER_DEVICE_FEATURE, messages.device_feature(index), []),
                (lib.VFIO_USER_DEVICE_RESET, b"", []),
            )
        )

    def _nonsense(self) -> tuple[int, bytes, list[int]]:
        return self.random.randrange(24), self._bytes(100), self._descriptors(2)
