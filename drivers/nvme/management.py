"""What a controller is asked besides I/O: logs, features, formats, namespaces, firmware, self-tests, sanitize, events.

All awaitables raise ``NvmeError`` for a command that is refused, ``DeadlineExceeded``, ``OperationAborted`` and
``DeviceFailed``. Cancelled: a command that was submitted has ended or was taken back, whatever it had done by then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Final

from pvfio.abi import ffi, lib
from pvfio.drivers.nvme.admin import PAGE, AsyncEvent
from pvfio.drivers.nvme.identify import Namespace, parse_list, parse_namespace
from pvfio.drivers.nvme.logs import (
    EffectsLog,
    ErrorLogEntry,
    FirmwareLog,
    SanitizeLog,
    SelfTestLog,
    SmartLog,
)
from pvfio.drivers.nvme.recovery import Controller
from pvfio.drivers.nvme.sqe import Sqe
from pvfio.errors import DeviceFailed

if TYPE_CHECKING:
    from pvfio.drivers.nvme.admin import AdminQueue
    from pvfio.drivers.nvme.operations import QueuePair

__all__ = ["Management"]

_LIST_LENGTH: Final = 1024
_LOG_512: Final = 512
_SELF_TEST_BYTES: Final = int(ffi.sizeof("struct nvme_self_test_log"))


class _Events:
    """The events of an admin queue: nothing to close, as an asynchronous generator has."""

    def __init__(self, admin: AdminQueue) -> None:
        self._admin = admin

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> AsyncEvent:
        return await self._admin.next_event()


class Management(Controller):
    """The commands for managing one controller. ``deadline``, in seconds, is the driver's by default."""

    # Namespaces

    async def rescan(self) -> dict[int, Namespace]:
        """Looks for active namespaces again (NVMe Base 2.0c 5.17.2.3); they are in ``namespaces`` afterwards.

        Cancelled: what was known before stays.
        """
        found: dict[int, Namespace] = {}
        for nsid in await self.namespace_list():
            namespace = parse_namespace(nsid, await self.admin.identify(lib.NVME_ID_CNS_NS, nsid))
            if namespace is not None:
                found[nsid] = namespace
        self.namespaces = found
        for queue in self.queues:
            queue.forget_templates()
        return found

    async def namespace_list(self, *, present: bool = False) -> list[int]:
        """Numbers of the active namespaces, or of all that are there, attached or not."""
        cns = lib.NVME_ID_CNS_NS_PRESENT_LIST if present else lib.NVME_ID_CNS_NS_ACTIVE_LIST
        numbers: list[int] = []
        while True:
            last = numbers[-1] if numbers else 0
            some = parse_list(await self.admin.identify(cns, last))
            if some and (some[0] <= last or some != sorted(some)):  # else it would never end
                raise DeviceFailed(self.name, "its list of namespaces is in no order")
            numbers += some
            if len(some) < _LIST_LENGTH:
                return numbers

    async def create_namespace(
        self, blocks: int, *, format: int = 0, capacity: int | None = None, protection: int = 0
    ) -> int:
        """Makes a namespace of ``blocks``, which is not attached; its number (5.23)."""
        page = ffi.new("struct nvme_id_ns *")
        page.nsze, page.ncap = blocks, blocks if capacity is None else capacity
        page.flbas, page.dps = format, protection
        sqe = Sqe(lib.NVME_ADMIN_NS_MGMT, cdw10=lib.NVME_NS_MGMT_CREATE)
        return await self.admin.write_page(sqe, "create namespace", bytes(ffi.buffer(page)))

    async def delete_namespace(self, nsid: int) -> None:
        """Deletes a namespace and what is in it (5.23)."""
        sqe = Sqe(lib.NVME_ADMIN_NS_MGMT, nsid, cdw10=lib.NVME_NS_MGMT_DELETE)
        await self.admin.command(sqe, "delete namespace")
        await self.rescan()

    async def attach_namespace(self, nsid: int) -> None:
        """Attaches a namespace to this controller (5.22)."""
        await self._attachment(nsid, int(lib.NVME_NS_ATTACH_ATTACH), "attach namespace")

    async def detach_namespace(self, nsid: int) -> None:
        """Detaches a namespace from this controller (5.22)."""
        await self._attachment(nsid, int(lib.NVME_NS_ATTACH_DETACH), "detach namespace")

    async def _attachment(self, nsid: int, what: int, operation: str) -> None:
        """The data is a list of controllers: how many, and their numbers (4.4.1)."""
        controllers = (1).to_bytes(2, "little") + self.controller.cntlid.to_bytes(2, "little")
        sqe = Sqe(lib.NVME_ADMIN_NS_ATTACH, nsid, cdw10=what)
        await self.admin.write_page(sqe, operation, controllers.ljust(PAGE, b"\0"))
        await self.rescan()

    async def format(
        self,
        nsid: int,
        format: int,
        *,
        extended: bool = False,
        protection: int = 0,
        protection_first: bool = False,
        secure_erase: int = 0,
        deadline: float | None = None,
    ) -> None:
        """Formats a namespace: ``format`` is an index into its ``formats`` (5.14). What was in it is gone."""
        cdw10 = (
            format & int(lib.NVME_FORMAT_LBAF_MASK)
            | (format >> 4 & 3) << 12
            | int(lib.NVME_FORMAT_MSET) * extended
            | protection << int(lib.NVME_FORMAT_PI_SHIFT)
            | int(lib.NVME_FORMAT_PIL) * protection_first
            | secure_erase << int(lib.NVME_FORMAT_SES_SHIFT)
        )
        await self.admin.command(Sqe(lib.NVME_ADMIN_FORMAT_NVM, nsid, cdw10=cdw10), "format", deadline)
        await self.rescan()

    # Logs

    async def smart_log(self, nsid: int = int(lib.NVME_NSID_ALL)) -> SmartLog:
        """SMART / health information."""
        return SmartLog.parse(await self.admin.log_page(lib.NVME_LOG_SMART, _LOG_512, nsid))

    async def error_log(self, entries: int | None = None) -> list[ErrorLogEntry]:
        """The newest errors, at most ``entries``, all the controller keeps by default."""
        most = self.controller.elpe + 1
        count = most if entries is None else min(entries, most)
        size = count * int(ffi.sizeof("struct nvme_error_log_entry"))
        return ErrorLogEntry.parse(await self.admin.log_page(lib.NVME_LOG_ERROR, size))

    async def firmware_log(self) -> FirmwareLog:
        """Firmware slots."""
        return FirmwareLog.parse(await self.admin.log_page(lib.NVME_LOG_FW_SLOT, _LOG_512))

    async def changed_namespaces(self) -> list[int]:
        """Namespaces that changed since this was last asked."""
        return parse_list(await self.admin.log_page(lib.NVME_LOG_CHANGED_NS, PAGE))

    async def effects_log(self) -> EffectsLog:
        """Which commands there are."""
        return EffectsLog.parse(await self.admin.log_page(lib.NVME_LOG_CMD_EFFECTS, PAGE))

    async def self_test_log(self) -> SelfTestLog:
        """Device self-tests."""
        return SelfTestLog.parse(await self.admin.log_page(lib.NVME_LOG_SELF_TEST, _SELF_TEST_BYTES))

    async def sanitize_log(self) -> SanitizeLog:
        """How the last sanitize operation fares."""
        return SanitizeLog.parse(await self.admin.log_page(lib.NVME_LOG_SANITIZE, _LOG_512))

    async def supported_logs(self) -> list[int]:
        """The identifiers of the log pages there are (5.16.1.1)."""
        page = await self.admin.log_page(lib.NVME_LOG_SUPPORTED, 1024)
        return [lid for lid, word in enumerate(memoryview(page).cast("I").tolist()) if word & 1]

    # Features

    async def get_features(self, feature: int, nsid: int = 0, *, select: int = 0, cdw11: int = 0) -> int:
        """A feature's value: the current one, or the one ``select`` says, ``lib.NVME_FEAT_SEL_*`` (5.15)."""
        return await self.admin.get_features(feature, nsid, select=select, cdw11=cdw11)

    async def set_features(
        self, feature: int, value: int = 0, nsid: int = 0, *, save: bool = False, data: bytes = b""
    ) -> int:
        """Sets a feature; ``save``: also for after the next reset (5.27)."""
        return await self.admin.set_features(feature, value, nsid, save=save, data=data)

    # Firmware, self-test, sanitize

    async def firmware_download(self, image: bytes) -> None:
        """Gives the controller an image, whole dwords (5.13)."""
        if not image or len(image) % 4:
            raise ValueError(f"an image is whole dwords, not {len(image)} bytes")
        for offset in range(0, len(image), PAGE):
            piece = image[offset : offset + PAGE]
            sqe = Sqe(lib.NVME_ADMIN_FW_DOWNLOAD, cdw10=len(piece) // 4 - 1, cdw11=offset // 4)
            await self.admin.write_page(sqe, "firmware download", piece)

    async def firmware_commit(
        self, slot: int, action: int = int(lib.NVME_FW_COMMIT_REPLACE_ACTIVATE)
    ) -> None:
        """Puts what was downloaded into a slot, or activates a slot: ``lib.NVME_FW_COMMIT_*`` (5.12)."""
        cdw10 = slot | action << int(lib.NVME_FW_COMMIT_ACTION_SHIFT)
        await self.admin.command(Sqe(lib.NVME_ADMIN_FW_COMMIT, cdw10=cdw10), "firmware commit")

    async def self_test(
        self, code: int = int(lib.NVME_SELF_TEST_SHORT), nsid: int = int(lib.NVME_NSID_ALL)
    ) -> None:
        """Starts a self-test, or ends it: ``lib.NVME_SELF_TEST_*`` (5.9). ``self_test_log`` has its result."""
        await self.admin.command(Sqe(lib.NVME_ADMIN_SELF_TEST, nsid, cdw10=code), "self-test")

    async def sanitize(self, action: int = int(lib.NVME_SANITIZE_BLOCK), *, pattern: int = 0) -> None:
        """Starts a sanitize operation: ``lib.NVME_SANITIZE_*`` (5.24). ``sanitize_log`` says how far it is."""
        once = 1 << 4 if action == lib.NVME_SANITIZE_OVERWRITE else 0
        sqe = Sqe(lib.NVME_ADMIN_SANITIZE, cdw10=action | once, cdw11=pattern)
        await self.admin.command(sqe, "sanitize")

    # Events, abort

    def events(self) -> AsyncIterator[AsyncEvent]:
        """Asynchronous events as they come. An event of a type comes again only after its log page was read.

        Ends with ``DeviceFailed`` when the controller is given up. Cancelled, or left: no event is lost.
        """
        return _Events(self.admin)

    async def abort(self, queue: QueuePair, cids: Sequence[int]) -> int:
        """Asks the controller to end commands that were submitted by the array; how many it says it ended (5.1).

        They complete with status ABORT_REQ, and the others as they would have.
        """
        ended = 0
        for cid in cids:
            ended += await self.admin.abort(queue.id, int(cid))
        return ended
