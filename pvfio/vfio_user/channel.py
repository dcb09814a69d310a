"""One end of a vfio-user connection for trio: messages in and out, with their file descriptors.

Models the framing alone (``channel.h``): what a message means is ``messages``' and the two ends' business. The
requests of data engines (DMA_READ, DMA_WRITE) share the socket, are asked from C and are never seen here.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import struct
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import trio

from pvfio.abi import ffi, lib
from pvfio.errors import DeadlineExceeded, PvfioError

__all__ = ["HEADER_SIZE", "Channel", "ChannelEnded", "Message", "ProtocolError"]

HEADER_SIZE: int = lib.PV_VFU_HEADER
# How long a receive may keep the whole loop for the next message, when the last one is recent.
NAP_NS = 50_000
# Other tasks run at least this often, however fast messages come.
YIELD_NS = 200_000

_HEAD = struct.Struct("=HHIIIII")  # the beginning of struct pv_vfu_message
_unpack_head = _HEAD.unpack_from
_NOTHING = b""
_TYPE_MASK: int = lib.VFIO_USER_F_TYPE_MASK
_REPLY: int = lib.VFIO_USER_F_TYPE_REPLY
_NO_REPLY: int = lib.VFIO_USER_F_NO_REPLY
_ERROR: int = lib.VFIO_USER_F_ERROR


class ProtocolError(PvfioError):
    """The peer sent what no message can begin with; nothing after it can be understood."""


class ChannelEnded(PvfioError, ConnectionError):
    """The peer is gone. ``clean``: it closed between two messages and nothing of it was lost."""

    def __init__(self, reason: str, *, clean: bool = False) -> None:
        super().__init__(errno.ECONNRESET, reason)
        self.clean = clean

    def __str__(self) -> str:
        return str(self.strerror)


class Message:
    """One received message.

    ``command``, ``id``, ``flags`` (VFIO_USER_F_*) and ``error`` are the header's words. ``body`` is what follows it,
    a view that is valid until the next receive: copy what is to live longer. ``fds`` are open file descriptors;
    those that nobody took out of the list are closed by ``close`` or by the next receive. ``fds_lost``: more came
    than the channel takes, or than this process may open, and all of this message were closed.
    """

    __slots__ = ("body", "command", "error", "fds", "fds_lost", "flags", "id")

    def __init__(
        self, command: int, id: int, flags: int, error: int, body: memoryview, fds: list[int], fds_lost: bool
    ) -> None:
        self.command = command
        self.id = id
        self.flags = flags
        self.error = error
        self.body = body
        self.fds = fds
        self.fds_lost = fds_lost

    @property
    def is_reply(self) -> bool:
        """Whether the type in its flags is a reply's."""
        return self.flags & _TYPE_MASK == _REPLY

    @property
    def wants_reply(self) -> bool:
        """Whether it is a command that asks for a reply."""
        return not self.flags & (_TYPE_MASK | _NO_REPLY)

    def take_fds(self) -> list[int]:
        """The descriptors, which are the caller's from now on."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        for fd in self.take_fds():
            os.close(fd)

    def __repr__(self) -> str:
        size, fds = len(self.body), len(self.fds)
        return f"<Message command {self.command} id {self.id} flags {self.flags:#x} body {size} fds {fds}>"


class Channel:
    """Owns a connected stream socket.

    ``max_message`` is the most bytes of one message this end takes, header included (more than 32); ``max_fds`` the
    most descriptors with one (64 at most). ``poll_fd`` is readable when a message may be there, ``socket_fd`` is the
    socket's; both are numbers of nothing, or of others, once the channel is closed. One task at a time receives; any
    task sends.

    Raises ValueError for other limits, OSError where the process has no descriptor left; the socket then is the
    caller's.
    """

    def __init__(self, sock: socket.socket, *, max_message: int, max_fds: int) -> None:
        if not lib.PV_VFU_MIN_MESSAGE < max_message < 1 << 32 or not 0 <= max_fds <= lib.PV_VFU_MAX_FDS:
            raise ValueError(f"a channel of messages of {max_message} bytes with {max_fds} descriptors")
        self.max_message = max_message
        self.max_fds = max_fds
        inbox = ffi.new("uint8_t[]", ffi.sizeof("struct pv_vfu_message") + max_message - HEADER_SIZE)
        self._inbox = ffi.cast("struct pv_vfu_message *", inbox)
        ptr = lib.pv_vfu_create(sock.fileno(), max_message, max_fds, self._inbox)
        if ptr == ffi.NULL:
            raise OSError(ffi.errno, f"vfio-user channel: {os.strerror(ffi.errno)}")
        sock.detach()
        self._ptr = ffi.gc(ptr, partial(_destroy, inbox))
        self.poll_fd: int = lib.pv_vfu_poll_fd(ptr)
        self.socket_fd: int = lib.pv_vfu_socket(ptr)
        self._closed = False
        self._with_fds: Message | None = None
        self._room = trio.Lock()
        self._yield_at = 0
        view = memoryview(ffi.buffer(inbox))
        body = ffi.offsetof("struct pv_vfu_message", "body")
        self._head, self._body = view[: _HEAD.size], view[body:]

    @property
    def ptr(self) -> Any:
        """The ``struct pv_vfu *`` for C. Raises trio.ClosedResourceError after ``close``, which may have freed it."""
        if self._closed:
            raise trio.ClosedResourceError("the vfio-user channel was closed")
        return self._ptr

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def receive_nowait(self, nap_ns: int = 0) -> Message:
        """The next message. The one before it is no longer valid, whatever happens.

        Raises trio.WouldBlock when there is none (where the last one is recent: within ``nap_ns`` more),
        ChannelEnded at the end, ProtocolError, MemoryError, trio.ClosedResourceError after ``close``.
        """
        if self._with_fds is not None:
            self._drop_fds()
        if self._closed:
            raise trio.ClosedResourceError("the vfio-user channel was closed")
        result = lib.pv_vfu_receive(self._ptr, nap_ns)
        if result != 1:
            raise self._why(result)
        id, command, size, flags, error, fd_count, fds_lost = _unpack_head(self._head)
        message = Message(command, id, flags, error, self._body[: size - 16], [], fds_lost != 0)
        if fd_count:
            message.fds = list(self._inbox.fds[0:fd_count])
            self._with_fds = message
        return message

    async def receive(self, deadline: float | None = None) -> Message:
        """The next message, waiting for at most ``deadline`` seconds (None: as long as it takes).

        Raises as ``receive_nowait``, but no trio.WouldBlock, and DeadlineExceeded. Other tasks run while it waits,
        and when messages come fast at least every 200 us. Cancelled: no message is lost.
        """
        if time.monotonic_ns() > self._yield_at:
            await trio.lowlevel.checkpoint()
            self._yield_at = time.monotonic_ns() + YIELD_NS
        try:
            return self.receive_nowait(NAP_NS)
        except trio.WouldBlock:
            pass
        with trio.move_on_after(math.inf if deadline is None else deadline):
            while True:
                await trio.lowlevel.wait_readable(self.poll_fd)
                try:
                    message = self.receive_nowait()
                except trio.WouldBlock:
                    continue
                self._yield_at = time.monotonic_ns() + YIELD_NS
                return message
        raise DeadlineExceeded("receive a vfio-user message", deadline or 0.0)

    def send_nowait(
        self,
        command: int,
        id: int,
        flags: int = 0,
        error: int = 0,
        body: Any = _NOTHING,
        data: Any = _NOTHING,
        fds: Sequence[int] = (),
    ) -> bool:
        """Sends a message whose body is ``body`` and then ``data`` (buffers); the descriptors stay the caller's.

        True: all of it is on the socket. False: a part waits until the socket has room; any later call, or ``receive``,
        sends it. Raises trio.WouldBlock when as much waits as may, and it was not sent; ChannelEnded;
        trio.ClosedResourceError; OSError with another errno that sendmsg gives; ValueError for too many descriptors.
        """
        if self._closed:
            raise trio.ClosedResourceError("the vfio-user channel was closed")
        if type(body) is not bytes:
            body = ffi.from_buffer(body)
        if type(data) is not bytes:
            data = ffi.from_buffer(data)
        count = len(fds)
        result = lib.pv_vfu_send(
            self._ptr,
            id,
            command,
            flags,
            error,
            body,
            len(body),
            data,
            len(data),
            fds if count else ffi.NULL,
            count,
        )
        if result > 0:
            return False
        if result:
            raise self._why(result)
        return True

    async def send(
        self,
        command: int,
        id: int,
        flags: int = 0,
        error: int = 0,
        body: Any = _NOTHING,
        data: Any = _NOTHING,
        fds: Sequence[int] = (),
        *,
        deadline: float | None = None,
    ) -> None:
        """As ``send_nowait``, waiting for room for at most ``deadline`` seconds; returns when all is on the socket.

        Raises DeadlineExceeded. Cancelled or too late: the message was not sent, or is sent whole later; the stream
        stays in order either way.
        """
        await trio.lowlevel.checkpoint()
        try:
            if self.send_nowait(command, id, flags, error, body, data, fds):
                return
            accepted = True
        except trio.WouldBlock:
            accepted = False
        with trio.move_on_after(math.inf if deadline is None else deadline):
            async with self._room:
                while not accepted:
                    await trio.lowlevel.wait_writable(self.socket_fd)
                    try:
                        self.send_nowait(command, id, flags, error, body, data, fds)
                        accepted = True
                    except trio.WouldBlock:
                        continue
                while not self.flush_nowait():
                    await trio.lowlevel.wait_writable(self.socket_fd)
                return
        raise DeadlineExceeded("send a vfio-user message", deadline or 0.0)

    def flush_nowait(self) -> bool:
        """Sends what waits; whether nothing waits any more. Raises ChannelEnded, trio.ClosedResourceError."""
        if self._closed:
            raise trio.ClosedResourceError("the vfio-user channel was closed")
        result = lib.pv_vfu_flush(self._ptr)
        if result not in (0, -errno.EAGAIN):
            raise self._why(result)
        return bool(result == 0)

    def reply_nowait(
        self,
        message: Message,
        body: Any = _NOTHING,
        data: Any = _NOTHING,
        *,
        error: int = 0,
        fds: Sequence[int] = (),
    ) -> bool:
        """Answers a command, with a header alone where ``error`` is an errno. As ``send_nowait``.

        Nothing is sent for a command that wants no reply.
        """
        if message.flags & _NO_REPLY:
            return True
        if error:
            return self.send_nowait(message.command, message.id, _REPLY | _ERROR, error)
        return self.send_nowait(message.command, message.id, _REPLY, 0, body, data, fds)

    def set_transfer_limit(self, size: int) -> None:
        """The most bytes of data in one DMA_READ or DMA_WRITE from C, as the peer said. Raises ValueError for 0,
        trio.ClosedResourceError.
        """
        if size < 1 or lib.pv_vfu_transfer_limit(self.ptr, size):
            raise ValueError(f"transfers of {size} bytes")

    def close(self) -> None:
        """Shuts the connection down and closes it; tasks that wait get trio.ClosedResourceError.

        An engine's thread that waits for an answer finds that the connection ended; what it waits with is freed when it
        has gone. Descriptors of messages that nobody received are closed.
        """
        self._drop_fds()
        if self._closed:
            return
        self._closed = True
        lib.pv_vfu_close(self._ptr)
        for fd in (self.poll_fd, self.socket_fd):
            _notify_closing(fd)
        ffi.release(self._ptr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_fds(self) -> None:
        message, self._with_fds = self._with_fds, None
        if message is not None:
            message.close()

    def _why(self, result: int) -> Exception:
        """The exception for what C said."""
        if result == -errno.EAGAIN:
            return trio.WouldBlock()
        if result == 0:
            return ChannelEnded("the vfio-user peer closed the connection", clean=True)
        if result in (-errno.ECONNRESET, -errno.EPIPE):
            return ChannelEnded("the vfio-user peer is gone")
        if result == -errno.EPROTO:
            return ProtocolError(f"not the size of a vfio-user message (16 to {self.max_message})")
        if result == -errno.ENOTCONN:
            return trio.ClosedResourceError("the vfio-user channel was closed")
        if result == -errno.EINVAL:
            return ValueError("a vfio-user message of that size or with so many descriptors")
        if result == -errno.ENOMEM:
            return MemoryError("no room for a vfio-user message")
        return OSError(-result, f"vfio-user message: {os.strerror(-result)}")


def _destroy(inbox: Any, ptr: Any) -> None:
    """Closes a channel and drops this side's reference; ``inbox`` lives until then."""
    lib.pv_vfu_close(ptr)
    lib.pv_vfu_put(ptr)


def _notify_closing(fd: int) -> None:
    with contextlib.suppress(RuntimeError):  # outside of trio nobody waits
        trio.lowlevel.notify_closing(fd)
