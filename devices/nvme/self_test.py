"""Device Self-test and its log (NVMe Base 2.0c 5.9, 8.6 and 5.16.1.7).

A test reads a part of each chosen namespace in every step: four steps a short one, 64 an extended one. Not modelled:
segments of a vendor, parts that find anything but unreadable media.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import trio

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.admin import AdminError, Command
from pvfio.devices.nvme.background import read_piece

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Handler
    from pvfio.devices.nvme.background import Background
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.events import AsyncEvents
    from pvfio.devices.nvme.health import Health
    from pvfio.devices.nvme.namespaces import Namespace, Namespaces

__all__ = ["SelfTest"]

_ALL: Final[int] = lib.NVME_NSID_ALL
_RESULTS: Final = 20
_BYTE_CDW10: Final = 40
_STEPS: Final = {lib.NVME_SELF_TEST_SHORT: 4, lib.NVME_SELF_TEST_EXTENDED: 64}
_SAMPLE: Final = 65536
_SEGMENT_FAILED: Final = 0x7
_MEDIA_SEGMENT: Final = 2
_NSID_VALID, _FLBA_VALID, _SCT_VALID, _SC_VALID = 1, 2, 4, 8


class SelfTest:
    """The test that runs, and the results of those that ran."""

    def __init__(
        self,
        config: NvmeConfig,
        *,
        namespaces: Namespaces,
        events: AsyncEvents,
        health: Health,
        background: Background,
    ) -> None:
        self._seconds = {
            lib.NVME_SELF_TEST_SHORT: config.short_test_seconds,
            lib.NVME_SELF_TEST_EXTENDED: config.extended_test_seconds,
        }
        self._namespaces = namespaces
        self._events = events
        self._health = health
        self._background = background
        self._results: deque[Any] = deque(maxlen=_RESULTS)
        self._running = int(lib.NVME_SELF_TEST_NONE)
        self._nsid = 0
        self._percent = 0
        self._scope = trio.CancelScope()

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_SELF_TEST: self._self_test}

    def reset(self) -> None:
        """A reset of the controller ends a short test; an extended one goes on (Base 8.6.1 and 8.6.2)."""
        if self._running == lib.NVME_SELF_TEST_SHORT:
            self.abort(lib.NVME_SELF_TEST_RESULT_RESET)

    def namespace_gone(self, nsid: int) -> None:
        """A namespace under test was deleted or detached."""
        if self._nsid in (nsid, _ALL):
            self.abort(lib.NVME_SELF_TEST_RESULT_NS_GONE)

    def abort(self, result: int) -> None:
        """Ends the test that runs, if one does, with this result."""
        if self._running:
            self._scope.cancel()
            self._end(result)

    def _self_test(self, command: Command) -> int:
        code = command.cdw10 & 0xF
        if code == lib.NVME_SELF_TEST_ABORT:
            self.abort(lib.NVME_SELF_TEST_RESULT_ABORTED)
            return 0
        if code not in _STEPS:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW10)
        chosen = self._namespaces.chosen(command.nsid) if command.nsid else []
        if self._running:
            raise AdminError(lib.NVME_SC_SELF_TEST_IN_PROGRESS)
        self._running, self._nsid, self._percent = code, command.nsid, 0
        self._scope = self._background.start(lambda: self._run(code, chosen))
        return 0

    async def _run(self, code: int, namespaces: list[Namespace]) -> None:
        steps = _STEPS[code]
        for step in range(steps):
            await trio.sleep(self._seconds[code] / steps)
            for namespace in namespaces:
                size = min(_SAMPLE, namespace.size)
                offset = (namespace.size - size) * step // (steps - 1) // size * size
                try:
                    await read_piece(namespace, offset, size)
                except OSError:
                    self._end(_SEGMENT_FAILED, namespace, offset)
                    return
            self._percent = 100 * (step + 1) // steps
        self._end(lib.NVME_SELF_TEST_RESULT_OK)

    def _end(self, result: int, failed: Namespace | None = None, offset: int = 0) -> None:
        """Files a result, newest first."""
        entry = ffi.new("struct nvme_self_test_result *")
        entry.dsts = result | self._running << 4
        entry.poh = self._health.power_on_hours
        if self._nsid:
            entry.vdi, entry.nsid = _NSID_VALID, failed.nsid if failed else self._nsid
        if failed is not None:
            entry.vdi |= _FLBA_VALID | _SCT_VALID | _SC_VALID
            entry.seg, entry.flba = _MEDIA_SEGMENT, offset >> failed.spec.lba_shift
            entry.sct, entry.sc = lib.NVME_SC_READ_ERROR >> 8, lib.NVME_SC_READ_ERROR & 0xFF
            self._events.post_error(
                lib.NVME_AER_ERROR_DIAG_FAILURE, lib.NVME_SC_READ_ERROR, nsid=failed.nsid, lba=entry.flba
            )
        self._results.appendleft(entry)
        self._running, self._nsid = int(lib.NVME_SELF_TEST_NONE), 0

    def log(self) -> bytes:
        """The device self-test log."""
        page = ffi.new("struct nvme_self_test_log *")
        page.current_operation = self._running
        page.completion = self._percent if self._running else 0
        for index in range(_RESULTS):
            if index < len(self._results):
                page.result[index] = self._results[index][0]
            else:
                page.result[index].dsts = lib.NVME_SELF_TEST_RESULT_UNUSED
        return bytes(ffi.buffer(page))
