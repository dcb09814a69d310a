"""Asynchronous events (NVMe Base 2.0c 5.2): requests that wait, and events that wait for a request.

A type that was sent is masked until the log page of its event was read (``clear``): what else that page tells needs no
event, what another one tells waits. Not modelled: vendor events.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from pvfio.abi import lib
from pvfio.devices.nvme.admin import LATER, AdminError, Command

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Admin, Handler

__all__ = ["LIMIT", "AsyncEvents"]

LIMIT: Final = 4
"""Requests that may wait: Identify's AERL plus one."""


class AsyncEvents:
    """The events of one controller. ``enabled`` is the value of feature 0Bh."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self.reset()

    def reset(self) -> None:
        """After a reset of the controller: nothing waits, nothing is masked."""
        self.enabled = 0
        self._requests: deque[Command] = deque()
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._masked: dict[int, int] = {}

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_ASYNC_EVENT: self._request}

    def post(self, kind: int, information: int, log: int) -> None:
        """An event: sent now, or with the next request. One that waits already, or is about to be read, is not
        repeated.
        """
        event = (kind, information, log)
        if self._masked.get(kind) == log or event in self._waiting:
            return
        self._waiting.append(event)
        self._send()

    def post_error(self, information: int, status: int, *, nsid: int = 0, lba: int = 0) -> None:
        """An error of no command: an entry in the error information log, and the event that says so. ``status`` is the
        one that fits best (Base 5.16.1.2).
        """
        self._admin.log_error(status, nsid=nsid, lba=lba)
        self.post(lib.NVME_AER_ERROR, information, lib.NVME_LOG_ERROR)

    def clear(self, log: int) -> None:
        """A log page was read without Retain Asynchronous Event: its events may be sent again."""
        self._masked = {kind: page for kind, page in self._masked.items() if page != log}
        self._waiting = deque(event for event in self._waiting if event[2] != log)
        self._send()

    def abort(self, cid: int) -> bool:
        """Ends a request that waits, with Abort Requested; whether there was one."""
        for request in self._requests:
            if request.cid == cid:
                self._requests.remove(request)
                self._admin.complete(request, lib.NVME_SC_ABORT_REQ)
                return True
        return False

    def _request(self, command: Command) -> int | None:
        if len(self._requests) >= LIMIT:
            raise AdminError(lib.NVME_SC_ASYNC_LIMIT)
        self._requests.append(command)
        self._send()
        return LATER

    def _send(self) -> None:
        for event in list(self._waiting):
            kind, information, log = event
            if kind in self._masked or not self._requests:
                continue
            self._waiting.remove(event)
            self._masked[kind] = log
            result = kind | information << lib.NVME_AER_INFO_SHIFT | log << lib.NVME_AER_LOG_SHIFT
            self._admin.complete(self._requests.popleft(), 0, result)
