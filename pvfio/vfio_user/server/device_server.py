"""A vfio-user server: one PCI function behind one Unix socket, for one client after the other.

The function is built over a ``TableBus``, which holds what the client maps; its engine copies to and from the
client's memory in C. When a client goes, whatever it was doing, DMA is cancelled, its maps and interrupts go, and
the function is reset before the next one is let in; memory of the function that it had mapped is not the function's
any more. Models a server of the specification 0.9.2 that serves QEMU,
SPDK and cloud-hypervisor; what a connection does is in session.py.

Not modelled: several clients at a time (the second is turned away), a device whose state outlives its client.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable

import trio

from pvfio.abi import lib
from pvfio.silicon import TableBus
from pvfio.vfio_user.channel import Channel
from pvfio.vfio_user.server.function import Function
from pvfio.vfio_user.server.irqs import ServerIrqs
from pvfio.vfio_user.server.listener import Listener, has_hung_up
from pvfio.vfio_user.server.regions import Regions, find_capability
from pvfio.vfio_user.server.session import LIMITS, MAX_MESSAGE, Session

__all__ = ["DeviceServer"]

_logger = logging.getLogger("pvfio.vfio_user.server")
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RETRY_SECONDS = 0.1


class DeviceServer:
    """Serves ``function``, which was built over ``bus``, at ``path``. Both stay the caller's to close.

    ``mode``: the socket's permissions. ``log``: gets a line for every message.
    """

    def __init__(
        self,
        function: Function,
        bus: TableBus,
        *,
        path: str | os.PathLike[str],
        mode: int = 0o600,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._function = function
        self._bus = bus
        self._mode = mode
        self._log = log
        self._irqs = ServerIrqs(function, bus, find_capability(function, lib.PCI_CAP_ID_MSIX))
        self._regions = Regions(function, self._irqs.restore)
        self._session: Session | None = None
        self._idle = trio.Event()
        self.clients = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs the function's task, listens and serves until cancelled; started when clients can connect.

        Raises ``OSError`` where it cannot listen (``Listener``), and what the function's task raises. In
        the end, cancelled too, the client is gone, the function reset and the socket's path removed.
        """
        with Listener(self.path, self._mode) as listener:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._function.run)
                    task_status.started()
                    while True:
                        connection = await self._accept(listener.socket)
                        session = await self._admit(connection)
                        if session is not None:
                            nursery.start_soon(self._serve, session)
            finally:
                self._irqs.close()

    async def _accept(self, listening: socket.socket) -> socket.socket:
        while True:
            await trio.lowlevel.wait_readable(listening)
            try:
                return listening.accept()[0]
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                _logger.warning("%s: a client cannot be accepted: %s", self.path, error)
                await trio.sleep(_RETRY_SECONDS)

    async def _admit(self, connection: socket.socket) -> Session | None:
        """Makes a session of a connection, when the one before it is over. None: it was turned away."""
        if self._session is not None:
            channel = self._session.channel
            if not channel.closed and not has_hung_up(channel.socket_fd):
                _logger.warning("%s: a second client was turned away", self.path)
                connection.close()
                return None
            await self._idle.wait()
        try:
            if self.clients:
                self._function.renew_memory()
            channel = Channel(connection, max_message=MAX_MESSAGE, max_fds=LIMITS.max_msg_fds)
        except OSError as error:
            _logger.warning("%s: a client cannot be served: %s", self.path, error)
            connection.close()
            return None
        self._regions.open()
        self._idle = trio.Event()
        self._session = Session(channel, self._function, self._bus, self._regions, self._irqs, self._log)
        self.clients += 1
        return self._session

    async def _serve(self, session: Session) -> None:
        try:
            reason = await session.run()
            _logger.info("%s: the client has gone: %s", self.path, reason)
        finally:
            with trio.CancelScope(shield=True):
                await self._clean_up(session)
            self._session = None
            self._idle.set()

    async def _clean_up(self, session: Session) -> None:
        """DMA first, so that nothing waits for the client or writes its memory; then everything of it."""
        self._function.cancel_dma(True)
        self._irqs.off()
        session.close()
        await self._function.reset()
        self._regions.forget()
