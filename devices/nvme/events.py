"""Asynchronous events (NVMe Base 2.0c 5.2): requests that wait, and events that wait for a request.

An event of a type is not sent again before its log page was read (``clear``). Not modelled: vendor events.
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
        self._masked: set[tuple[int, int]] = set()

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_ASYNC_EVENT: self._request}

    def post(self, kind: int, information: int, log: int) -> None:
        """An event: sent now, or with the next request. One that waits already, or is masked, is not repeated."""
        event = (kind, information, log)
        if (kind, log) in self._masked or event in self._waiting:
            return
        self._waiting.append(event)
        self._send()

    def clear(self, log: int) -> None:
        """A log page was read without Retain Asynchronous Event: its events may be sent again."""
        self._masked = {(kind, page) for kind, page in self._masked if page != log}
        self._waiting = deque(event for event in self._waiting if event[2] != log)

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
        while self._requests and self._waiting:
            kind, information, log = self._waiting.popleft()
            self._masked.add((kind, log))
            result = kind | information << lib.NVME_AER_INFO_SHIFT | log << lib.NVME_AER_LOG_SHIFT
            self._admin.complete(self._requests.popleft(), 0, result)
