"""Sanitize (NVMe Base 2.0c 5.24 and 8.21): the operation, its states, its log, and what is refused meanwhile.

The operation goes on over resets. Of several overwrite passes only the last is stored: what is kept here has no traces
of what it held. Not modelled: sanitizing without deallocation as a matter of configuration (feature 17h), media
verification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.admin import AdminError, Command
from pvfio.devices.nvme.background import erase, fill, pieces

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Admin, Handler
    from pvfio.devices.nvme.background import Background
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.events import AsyncEvents
    from pvfio.devices.nvme.firmware import Firmware
    from pvfio.devices.nvme.namespaces import Namespace, Namespaces

__all__ = ["Sanitize"]

_BYTE_CDW10: Final = 40
_UNRESTRICTED, _NO_DEALLOCATE = 0x008, 0x200
_PASSES_SHIFT, _DONE_SHIFT = 4, 3
_NO_ESTIMATE: Final = 0xFFFFFFFF
_STEPS: Final = 16
_ALLOWED: Final = frozenset(
    (
        lib.NVME_ADMIN_DELETE_SQ,
        lib.NVME_ADMIN_CREATE_SQ,
        lib.NVME_ADMIN_DELETE_CQ,
        lib.NVME_ADMIN_CREATE_CQ,
        lib.NVME_ADMIN_IDENTIFY,
        lib.NVME_ADMIN_ABORT,
        lib.NVME_ADMIN_SET_FEATURES,
        lib.NVME_ADMIN_GET_FEATURES,
        lib.NVME_ADMIN_ASYNC_EVENT,
        lib.NVME_ADMIN_KEEP_ALIVE,
    )
)
_ALLOWED_LOGS: Final = frozenset(
    (lib.NVME_LOG_ERROR, lib.NVME_LOG_SMART, lib.NVME_LOG_CHANGED_NS, lib.NVME_LOG_SANITIZE)
)


class Sanitize:
    """The state of sanitizing of one controller. ``begins`` is told before anything is erased."""

    def __init__(
        self,
        config: NvmeConfig,
        nvme: Any,
        *,
        namespaces: Namespaces,
        events: AsyncEvents,
        firmware: Firmware,
        admin: Admin,
        background: Background,
        begins: Callable[[], None],
    ) -> None:
        self._seconds = config.sanitize_seconds
        self._nvme = nvme
        self._namespaces = namespaces
        self._events = events
        self._firmware = firmware
        self._admin = admin
        self._background = background
        self._begins = begins
        self._state = int(lib.NVME_SSTAT_NEVER)
        self._failure = False
        self._progress = 0xFFFF
        self._passes = 0
        self._word = 0
        self._pattern = 0
        # As manufactured nothing was written, but images bring what they hold.
        fresh = all(n.spec.image is None for n in namespaces.by_nsid.values())
        self._writes_then = 0 if fresh else -1
        self.media_fails = False
        """The host's side: the next operation finds media that cannot be sanitized."""

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_SANITIZE: self._sanitize}

    @property
    def _refusal(self) -> int:
        """What other commands are refused with, 0: they are not."""
        if self._state == lib.NVME_SSTAT_PROGRESS:
            return int(lib.NVME_SC_SANITIZE_IN_PROGRESS)
        return int(lib.NVME_SC_SANITIZE_FAILED) if self._failure else 0

    @property
    def hides_blocks(self) -> bool:
        """Logs name no blocks now (Base figure 281)."""
        return self._state == int(lib.NVME_SSTAT_PROGRESS)

    def guard(self, command: Command) -> None:
        """Raises Sanitize in Progress or Sanitize Failed for what is not allowed then (Base figure 281)."""
        refusal = self._refusal
        if not refusal or command.opcode in _ALLOWED:
            return
        if command.opcode == lib.NVME_ADMIN_GET_LOG_PAGE and command.cdw10 & 0xFF in _ALLOWED_LOGS:
            return
        if command.opcode == lib.NVME_ADMIN_SANITIZE and refusal == lib.NVME_SC_SANITIZE_FAILED:
            return
        raise AdminError(refusal, dnr=False)

    def _sanitize(self, command: Command) -> int:
        action = command.cdw10 & 7
        if not lib.NVME_SANITIZE_EXIT_FAILURE <= action <= lib.NVME_SANITIZE_CRYPTO:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW10)
        unrestricted = bool(self._word & _UNRESTRICTED)
        if action == lib.NVME_SANITIZE_EXIT_FAILURE:
            self._exit_failure(unrestricted)
            return 0
        if self._failure and not unrestricted and command.cdw10 & _UNRESTRICTED:
            raise AdminError(lib.NVME_SC_SANITIZE_FAILED, _BYTE_CDW10)
        if self._firmware.waits_for_reset:
            raise AdminError(lib.NVME_SC_FW_NEEDS_RESET)
        if any(n.write_protected for n in self._namespaces.by_nsid.values()):
            raise AdminError(lib.NVME_SC_NS_WRITE_PROTECTED)
        if any(n.formatting for n in self._namespaces.by_nsid.values()):
            raise AdminError(lib.NVME_SC_FORMAT_IN_PROGRESS, dnr=False)
        self._begin(command.cdw10, command.cdw11)
        return 0

    def _exit_failure(self, unrestricted: bool) -> None:
        """Only out of a failure in unrestricted completion mode (Base 5.24). SSTAT says that the last one failed."""
        if self._failure and not unrestricted:
            raise AdminError(lib.NVME_SC_SANITIZE_FAILED, _BYTE_CDW10)
        self._become(self._state, failure=False)

    def _become(self, state: int, *, failure: bool) -> None:
        self._state, self._failure = int(state), failure
        lib.pv_nvme_refuse_io(self._nvme, self._refusal)

    def _begin(self, word: int, pattern: int) -> None:
        self._begins()
        self._events.clear(lib.NVME_LOG_SANITIZE)  # of the operation before (Base 8.21.1)
        self._word, self._pattern = word, pattern
        self._progress = self._passes = 0
        self._become(lib.NVME_SSTAT_PROGRESS, failure=False)
        self._background.start(self._run)

    async def _run(self) -> None:
        """Base 8.21.1: progress, then success or failure, and the event."""
        try:
            for step in range(_STEPS):
                await trio.sleep(self._seconds / _STEPS)
                self._progress = 0x10000 * step // _STEPS
            if self.media_fails:
                raise OSError("the media cannot be sanitized")
            for namespace in list(self._namespaces.by_nsid.values()):
                await self._one(namespace)
            done = lib.NVME_SSTAT_OK
        except (OSError, MemoryError):
            done = lib.NVME_SSTAT_FAILED
        async with self._admin.paused():
            self._progress = 0xFFFF
            if done == lib.NVME_SSTAT_OK:
                self._writes_then = self._writes()
            self._become(done, failure=done == lib.NVME_SSTAT_FAILED)
        self._events.post(lib.NVME_AER_IO, lib.NVME_AER_IO_SANITIZE_COMPLETED, lib.NVME_LOG_SANITIZE)

    async def _one(self, namespace: Namespace) -> None:
        overwrite = self._word & 7 == lib.NVME_SANITIZE_OVERWRITE
        passes = (self._word >> _PASSES_SHIFT & 0xF or 16) if overwrite else 0
        keep = bool(self._word & _NO_DEALLOCATE)
        # The last pass stores the pattern itself, inverted between passes or not: an even count begins with the inverse
        # (Base 2.1 figure 647).
        pattern = self._pattern.to_bytes(4, "little")
        for offset, size in pieces(namespace.size):
            if overwrite and keep:
                await fill(namespace, offset, pattern * (size // 4))
            else:
                await erase(namespace, offset, size, deallocate=not keep)
        self._passes = passes
        if not await self._namespaces.sync(namespace.nsid):
            raise OSError(f"namespace {namespace.nsid}")
        async with self._admin.paused():
            self._namespaces.reformat(namespace.nsid)

    def _writes(self) -> int:
        stats = ffi.new("struct pv_nvme_stats *")
        lib.pv_nvme_get_stats(self._nvme, stats)
        return int(stats.writes)

    def log(self) -> bytes:
        """The sanitize status log (Base 5.16.1.19)."""
        page = ffi.new("struct nvme_sanitize_log *")
        page.sprog = self._progress
        page.sstat = self._state | self._passes << _DONE_SHIFT
        if self._writes() == self._writes_then:
            page.sstat |= lib.NVME_SSTAT_GLOBAL_ERASED
        page.scdw10 = self._word
        for name in ("eto", "etbe", "etce", "etond", "etbend", "etcend"):
            setattr(page, name, _NO_ESTIMATE)
        return bytes(ffi.buffer(page))
