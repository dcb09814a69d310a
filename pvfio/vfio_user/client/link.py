"""A client's connection to a vfio-user server: calls and their replies, posted messages, the server's own requests.

Whoever waits, reads: a call looks at the socket itself for as long as most replies take. A listener reads when nobody
does: replies that take longer, and the server's DMA_READ and DMA_WRITE, which are answered from what is mapped
(``Reach``). A reply that nobody waits for any more is matched by its id and dropped.

A connection that ends, breaks the protocol or does not answer what must be answered is lost: every call ends at
once with a VfioError ENODEV that says why, and whoever uses the device is told. ``connect`` makes a new one.

Not here: what calls mean (device.py, container.py). Not modelled: twin sockets.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, VfioError
from pvfio.vfio_user.channel import HEADER_SIZE, Channel, ChannelEnded, Message, ProtocolError
from pvfio.vfio_user.client.call import Call, Reach, answer
from pvfio.vfio_user.messages import WireError, command_name
from pvfio.vfio_user.version import Limits, Version

__all__ = ["OWN_LIMITS", "SPIN_NS", "Call", "Link"]

# How long a call may keep the whole loop for its reply, on a busy connection: the way through the loop costs more.
SPIN_NS: Final = 100_000
# Ids from here on are those of requests that a channel's C side makes.
IDS: Final[int] = lib.PV_VFU_OWN_ID
# Replies that nobody waits for any more, before the server counts as gone.
MOST_UNANSWERED: Final = 4096
# A posted message may hold the thread up as long as this, where a server is thousands of messages behind.
POST_SECONDS: Final = 0.1
# Messages the listener takes before others run.
_AT_ONCE: Final = 32

_TYPE_MASK: Final[int] = lib.VFIO_USER_F_TYPE_MASK
_REPLY: Final[int] = lib.VFIO_USER_F_TYPE_REPLY
_NO_REPLY: Final[int] = lib.VFIO_USER_F_NO_REPLY
_ERROR: Final[int] = lib.VFIO_USER_F_ERROR

OWN_LIMITS: Final = Limits(
    max_msg_fds=int(lib.VFIO_USER_MAX_MSG_FDS),
    max_data_xfer_size=int(lib.VFIO_USER_DEFAULT_MAX_DATA_XFER_SIZE),
    max_dma_maps=int(lib.VFIO_USER_DEFAULT_MAX_DMA_MAPS),
    pgsizes=int(lib.VFIO_USER_DEFAULT_PGSIZES),
)
_LARGEST: Final = HEADER_SIZE + 256 + OWN_LIMITS.max_data_xfer_size


class Link:
    """A connection to the server at ``path``, or none: ``connected`` says.

    ``name`` is how errors name the device. ``deadline``: seconds a reply may take; ``grace``: seconds it may take
    after its caller was cancelled, where its outcome must be known. ``limits`` are the server's. ``lost`` says why
    the last connection ended, if not by ``disconnect``; ``silent``: it ended because the server did not answer, so
    that what it still does is not known. ``fed``: the container's mappings are the server's.
    """

    def __init__(self, path: str, name: str, *, deadline: float, grace: float, offer: Limits) -> None:
        self.path = path
        self.name = name
        self.deadline = deadline
        self.grace = grace
        self.limits = Limits()
        self.fed = False
        self.silent = False
        self.lost: str | None = None
        self.reach: Reach | None = None
        self.on_lost: Callable[[], None] | None = None
        self._offer = offer
        self._channel: Channel | None = None
        self._calls: dict[int, Call] = {}
        self._next = 0
        self._listener: trio.CancelScope | None = None
        self._connecting = trio.Lock()

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._channel is not None

    def error(self, operation: str) -> VfioError:
        """What a call without a connection raises."""
        why = self.lost or "there is no connection"
        return VfioError(errno.ENODEV, operation, why, device=self.name)

    # Up and down.

    async def connect(self, nursery: trio.Nursery) -> None:
        """Connects and negotiates, where there is no connection; the listener runs in ``nursery``.

        Raises VfioError (ENOENT, ECONNREFUSED, EACCES, ...: no server; EPROTO, EINVAL: no agreement), DeadlineExceeded.
        Cancelled: not connected.
        """
        await trio.lowlevel.checkpoint()
        async with self._connecting:
            if self._channel is not None:
                return
            with trio.move_on_after(self.deadline) as scope:
                await self._connect(nursery)
            if scope.cancelled_caught:
                raise DeadlineExceeded("connect", self.deadline, device=self.name)

    async def _connect(self, nursery: trio.Nursery) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            while True:
                try:
                    sock.connect(self.path)
                    break
                except BlockingIOError:  # many others wait to be served
                    await trio.sleep(0.01)
            channel = Channel(sock, max_message=_LARGEST, max_fds=OWN_LIMITS.max_msg_fds)
        except OSError as error:
            sock.close()
            raise VfioError(
                error.errno or errno.EIO, "connect", error.strerror or "", device=self.name
            ) from None
        except BaseException:
            sock.close()
            raise
        self._channel, self._listener = channel, trio.CancelScope(shield=True)
        nursery.start_soon(self._listen, channel, self._listener)
        asked = Version(self._offer)
        try:
            call = await self.call(lib.VFIO_USER_VERSION, asked.pack(), operation="negotiate")
            answer = Version.parse(call.body)
            asked.check_answer(answer)
        except WireError as error:
            self.disconnect()
            raise VfioError(error.errno, "negotiate", error.reason, device=self.name) from None
        except BaseException:
            self.disconnect()
            raise
        theirs = answer.limits
        self.limits = replace(theirs, max_dma_maps=min(theirs.max_dma_maps, self._offer.max_dma_maps))
        self.lost, self.silent = None, False

    def disconnect(self) -> None:
        """Ends the connection: a server then forgets the mappings and interrupts. Calls that wait fail."""
        self._drop("it was closed")

    def lose(self, why: str, *, silent: bool = False) -> None:
        """The connection is of no use any more. ``silent``: see there."""
        if self._channel is not None:
            self.lost, self.silent = why, silent
            self._drop(why)
            if self.on_lost is not None:
                self.on_lost()

    def _drop(self, why: str) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            return
        channel.close()
        self.fed = False
        if self._listener is not None:
            self._listener.cancel()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.error, call.done = errno.ENODEV, True
            call.body = why.encode()
            if call.event is not None:
                call.event.set()

    # Calls.

    async def call(
        self,
        command: int,
        body: bytes = b"",
        *,
        operation: str,
        fds: Sequence[int] = (),
        deadline: float | None = None,
    ) -> Call:
        """Sends a request and returns it with its reply; the descriptors that came with it are the caller's.

        Raises VfioError with the errno of the reply, or ENODEV where the connection is lost; DeadlineExceeded.
        Cancelled: the server may have done it; its reply is dropped.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        call = await self.begin(command, body, operation=operation, fds=fds)
        # The server works while other tasks run; where it was faster than that, they need not be told of its reply.
        self.look(call)
        await trio.lowlevel.cancel_shielded_checkpoint()
        await self.end(call, deadline)
        return call

    def look(self, call: Call, spin_ns: int = 0) -> bool:
        """Whether the reply is there; looks for as long as that. Where it is, no other task is woken for it."""
        if not call.done:
            self._read(spin_ns, call)
        return call.done

    async def begin(
        self,
        command: int,
        body: bytes = b"",
        *,
        operation: str,
        fds: Sequence[int] = (),
        shield: bool = False,
    ) -> Call:
        """Sends a request. It must be ended; no checkpoint where the socket has room. Cancelled, which ``shield`` rules
        out: not sent.
        """
        channel = self._channel
        if channel is None:
            raise self.error(operation)
        number = self._number(operation)
        call = Call(command, operation)
        self._calls[number] = call
        try:
            try:
                channel.send_nowait(command, number, 0, 0, body, fds=fds)
            except trio.WouldBlock:
                with trio.CancelScope(shield=shield):
                    await self._send(channel, command, number, body, fds, operation)
        except DeadlineExceeded:
            raise
        except OSError as error:
            self._calls.pop(number, None)
            self._ended(error)
            raise self.error(operation) from None
        except trio.ClosedResourceError:
            raise self.error(operation) from None
        except BaseException:
            call.abandon()  # where it was sent nevertheless, its reply will be dropped
            raise
        return call

    async def end(self, call: Call, deadline: float | None = None) -> None:
        """Waits for the reply. Raises as ``call``. A checkpoint only where it has to wait."""
        if not self.look(call, SPIN_NS):
            await self._wait(call, self.deadline if deadline is None else deadline)
        if call.error:
            reason = call.body.decode() if call.error == errno.ENODEV else ""
            raise VfioError(call.error, call.operation, reason, device=self.name)

    async def settle(self, call: Call) -> bool:
        """Waits, for the grace and whoever is cancelled, for what became of a request; whether it was done.

        A server that does not say is lost, and silent.
        """
        call.abandoned = False
        with trio.CancelScope(shield=True):
            try:
                await self.end(call, self.grace)
            except DeadlineExceeded:
                self.lose(f"no answer to {call.operation} within {self.grace:g} s", silent=True)
                return False
            except VfioError:
                return False
        return True

    def post(self, command: int, body: Any, data: Any = b"", *, operation: str) -> None:
        """Sends a message that has no reply, without a checkpoint.

        Raises VfioError: EAGAIN where the server has not read for too long, ENODEV where the connection is lost.
        """
        channel = self._channel
        if channel is None:
            raise self.error(operation)
        try:
            try:
                channel.send_nowait(command, self._number(operation), _NO_REPLY, 0, body, data)
                return
            except trio.WouldBlock:
                pass
            poll = select.poll()
            poll.register(channel.socket_fd, select.POLLOUT)
            end = time.monotonic() + POST_SECONDS
            while (left := end - time.monotonic()) > 0:
                poll.poll(1000 * left)
                try:
                    channel.send_nowait(command, self._number(operation), _NO_REPLY, 0, body, data)
                    return
                except trio.WouldBlock:
                    continue
        except OSError as error:
            self._ended(error)
            raise self.error(operation) from None
        raise VfioError(errno.EAGAIN, operation, "the server does not read", device=self.name)

    async def _send(
        self, channel: Channel, command: int, number: int, body: bytes, fds: Sequence[int], operation: str
    ) -> None:
        try:
            await channel.send(command, number, 0, 0, body, fds=fds, deadline=self.deadline)
        except DeadlineExceeded:
            self.lose(f"it has not read for {self.deadline:g} s", silent=True)
            raise DeadlineExceeded(operation, self.deadline, device=self.name) from None

    async def _wait(self, call: Call, deadline: float) -> None:
        call.event = trio.Event()
        try:
            with trio.move_on_after(deadline):
                await call.event.wait()
        except BaseException:
            call.abandon()
            raise
        if not call.done:
            call.abandon()
            raise DeadlineExceeded(call.operation, deadline, device=self.name)

    def _number(self, operation: str) -> int:
        number = self._next
        if number in self._calls:
            if len(self._calls) > MOST_UNANSWERED:
                self.lose(f"{len(self._calls)} requests were not answered", silent=True)
                raise self.error(operation)
            while number in self._calls:
                number = (number + 1) % IDS
        self._next = (number + 1) % IDS
        return number

    # What arrives.

    async def _listen(self, channel: Channel, scope: trio.CancelScope) -> None:
        with scope:
            while not channel.closed:  # perhaps before this began
                try:
                    await trio.lowlevel.wait_readable(channel.poll_fd)
                except trio.ClosedResourceError:
                    return
                for _ in range(_AT_ONCE):
                    if not self._take_one(channel, 0):
                        break

    def _read(self, spin_ns: int, until: Call) -> None:
        """Takes what has arrived, until a call is done or nothing is there, for which it looks ``spin_ns``."""
        channel = self._channel
        while channel is not None and not until.done:
            if not self._take_one(channel, spin_ns):
                return

    def _take_one(self, channel: Channel, spin_ns: int) -> bool:
        """Takes a message if there is one; false where there was none, or nothing comes any more."""
        try:
            message = channel.receive_nowait(spin_ns)
        except trio.WouldBlock:
            return False
        except (OSError, ProtocolError, MemoryError, trio.ClosedResourceError) as error:
            self._ended(error)
            return False
        self._take(message)
        return not channel.closed

    def _ended(self, error: Exception) -> None:
        if isinstance(error, ChannelEnded):
            self.lose("the server is gone")
        elif not isinstance(error, trio.ClosedResourceError):
            self.lose(str(error))

    def _take(self, message: Message) -> None:
        if message.flags & _TYPE_MASK != _REPLY:
            self._serve(message)
            return
        try:
            call = self._calls.pop(message.id)
        except KeyError:
            self.lose(f"a reply to no request: id {message.id}")
            return
        if message.command != call.command:
            self._calls[message.id] = call
            asked, answered = command_name(call.command), command_name(message.command)
            self.lose(f"a reply to {answered} instead of {asked}")
            return
        if message.flags & _ERROR:
            call.error = message.error or errno.EIO
        else:
            call.body = bytes(message.body)
            if not call.abandoned:
                call.fds = message.take_fds()
        call.done = True
        if call.event is not None:
            call.event.set()

    def _serve(self, message: Message) -> None:
        """Answers a request of the server's."""
        assert self._channel is not None
        error, body, data = answer(message, self.reach, OWN_LIMITS.max_data_xfer_size)
        try:
            self._channel.reply_nowait(message, body, data, error=error)
        except trio.WouldBlock:
            self.lose("it asks and does not read the answers")
        except (OSError, trio.ClosedResourceError) as ended:
            self._ended(ended)
