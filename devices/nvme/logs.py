"""Get Log Page (NVMe Base 2.0c 5.16): which part of which page, and the pages themselves.

Reading a page without Retain Asynchronous Event lets its events be sent again. Not modelled: pages of namespaces,
offsets by index, telemetry, the persistent event log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.admin import AdminError, Command
from pvfio.devices.nvme.effects import command_effects, feature_effects

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Admin, Handler
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.events import AsyncEvents
    from pvfio.devices.nvme.features import Features

__all__ = ["Logs"]

_ALL: Final[int] = lib.NVME_NSID_ALL
_LIST_ENTRIES: Final = 1024
_OFFSET_IS_INDEX: Final = 1 << 23
_BYTE_NSID, _BYTE_LID, _BYTE_OFFSET, _BYTE_CDW14 = 4, 40, 48, 56

Page = Callable[[Command], bytes]


class Logs:
    """The log pages of one controller. Other modules add theirs (``add``)."""

    def __init__(
        self,
        config: NvmeConfig,
        nvme: Any,
        admin: Admin,
        events: AsyncEvents,
        features: Features,
    ) -> None:
        self._longest = config.longest_transfer
        self._nvme = nvme
        self._admin = admin
        self._events = events
        self._features = features
        self._changed: set[int] = set()
        self._pages: dict[int, Page] = {}
        self.hides_blocks: Callable[[], bool] = lambda: False
        """Whether the error log does not say which blocks its errors were of."""
        self.add(
            {
                lib.NVME_LOG_SUPPORTED: self._supported,
                lib.NVME_LOG_ERROR: self._errors,
                lib.NVME_LOG_CHANGED_NS: self._changed_namespaces,
                lib.NVME_LOG_CMD_EFFECTS: self._command_effects,
                lib.NVME_LOG_FEATURE_EFFECTS: lambda _: feature_effects(self._features.table),
                lib.NVME_LOG_MI_EFFECTS: lambda _: bytes(4096),
            }
        )

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_GET_LOG_PAGE: self._get}

    def add(self, pages: dict[int, Page]) -> None:
        """Pages by their identifiers."""
        self._pages.update({int(lid): page for lid, page in pages.items()})

    def namespace_changed(self, nsid: int) -> None:
        """A namespace appeared, went away, or is another now: the list of changed ones, and the event."""
        self._changed.add(nsid)
        if self._events.enabled & lib.NVME_OAES_NS_ATTR:
            self._events.post(lib.NVME_AER_NOTICE, lib.NVME_AER_NOTICE_NS_CHANGED, lib.NVME_LOG_CHANGED_NS)

    def reset(self) -> None:
        """After a reset of the controller: a driver looks at all namespaces anyway."""
        self._changed.clear()

    async def _get(self, command: Command) -> int:
        lid = command.cdw10 & 0xFF
        page = self._pages.get(lid)
        if page is None:
            raise AdminError(lib.NVME_SC_INVALID_LOG_PAGE, _BYTE_LID)
        if command.nsid not in (0, _ALL):
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_NSID)
        offset = command.cdw13 << 32 | command.cdw12
        if offset % 4 or command.cdw14 & _OFFSET_IS_INDEX:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_OFFSET if offset % 4 else _BYTE_CDW14 + 2)
        dwords = (command.cdw10 >> 16 | (command.cdw11 & 0xFFFF) << 16) + 1
        if 4 * dwords > self._longest:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_LID + 2)
        data = page(command)
        if offset > len(data):
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_OFFSET)
        await command.to_host(data[offset : offset + 4 * dwords].ljust(4 * dwords, b"\0"))
        if not command.cdw10 & lib.NVME_LOG_RAE:
            self._read(lid)
        return 0

    def _read(self, lid: int) -> None:
        if lid == lib.NVME_LOG_CHANGED_NS:
            self._changed.clear()
        self._events.clear(lid)

    def _supported(self, _command: Command) -> bytes:
        """Base 5.16.1.1: bit 0 of a word a page."""
        return b"".join((lid in self._pages).to_bytes(4, "little") for lid in range(256)).ljust(1024, b"\0")

    def _errors(self, _command: Command) -> bytes:
        entries = ffi.new("struct nvme_error_log_entry[]", lib.PV_NVME_ERRORS)
        lib.pv_nvme_errors(self._nvme, entries, lib.PV_NVME_ERRORS, ffi.new("uint64_t *"))
        if self.hides_blocks():
            for entry in entries:
                entry.lba = 0
        return bytes(ffi.buffer(entries))

    def _changed_namespaces(self, _command: Command) -> bytes:
        """Base 5.16.1.5: numbers in order, or FFFFFFFFh for more than fit."""
        numbers = sorted(self._changed) if len(self._changed) <= _LIST_ENTRIES else [_ALL]
        return b"".join(number.to_bytes(4, "little") for number in numbers).ljust(4096, b"\0")

    def _command_effects(self, command: Command) -> bytes:
        if command.cdw14 >> 24 != lib.NVME_CSI_NVM:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW14 + 3)
        return command_effects(self._admin.opcodes)
