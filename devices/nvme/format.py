"""Format NVM (NVMe Base 2.0c 5.14, NVM 4.1.1): another LBA format, and erasing.

Every format erases: blocks read as zeroes afterwards, whatever Secure Erase Settings says. Meanwhile the namespace
refuses commands with Format in Progress, and Identify says how much is to come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from pvfio.abi import lib
from pvfio.devices.nvme.admin import LATER, AdminError, Command
from pvfio.devices.nvme.admin_namespaces import check_format
from pvfio.devices.nvme.background import erase, pieces

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Admin, Handler
    from pvfio.devices.nvme.background import Background
    from pvfio.devices.nvme.namespaces import Namespace, Namespaces

__all__ = ["Format"]

_BYTE_NSID, _BYTE_CDW10 = 4, 40
_LBAFU: Final = 0x3000
_CRYPTO_ERASE: Final = 2


class Format:
    """The command. ``begins`` is told before anything is erased, ``changed`` of each namespace that is another now."""

    def __init__(
        self,
        namespaces: Namespaces,
        admin: Admin,
        background: Background,
        begins: Callable[[], None],
        changed: Callable[[int], None],
    ) -> None:
        self._namespaces = namespaces
        self._admin = admin
        self._background = background
        self._begins = begins
        self._changed = changed

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_FORMAT_NVM: self._format}

    def _format(self, command: Command) -> int | None:
        word = command.cdw10
        index, protection = word & lib.NVME_FORMAT_LBAF_MASK, word >> lib.NVME_FORMAT_PI_SHIFT & 7
        if word >> lib.NVME_FORMAT_SES_SHIFT & 7 > _CRYPTO_ERASE or protection > 3:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW10)
        found = self._namespaces.chosen(command.nsid)
        for namespace in found:
            self._check(namespace, index | (word & _LBAFU) >> 8, protection)
        self._begins()
        for namespace in found:
            namespace.formatting = 100
            self._namespaces.refresh(namespace.nsid)
        self._background.start(lambda: self._run(command, found))
        return LATER

    def _check(self, namespace: Namespace, index: int, protection: int) -> None:
        check_format(index, protection, namespace.formats)
        if not namespace.size >> namespace.formats[index][0]:
            raise AdminError(lib.NVME_SC_INVALID_FORMAT, _BYTE_CDW10)
        if namespace.write_protected:
            raise AdminError(lib.NVME_SC_NS_WRITE_PROTECTED, _BYTE_NSID)
        if namespace.formatting:
            raise AdminError(lib.NVME_SC_FORMAT_IN_PROGRESS, _BYTE_NSID, dnr=False)

    async def _run(self, command: Command, namespaces: list[Namespace]) -> None:
        failed = False
        try:
            for namespace in namespaces:
                await self._one(command.cdw10, namespace)
        except (OSError, MemoryError):
            failed = True
        finally:
            with trio.CancelScope(shield=True):
                await self._end(namespaces)
        if failed:
            self._admin.fail(command, AdminError(lib.NVME_SC_INTERNAL, dnr=False))
        else:
            self._admin.complete(command)

    async def _end(self, namespaces: list[Namespace]) -> None:
        async with self._admin.paused():
            for namespace in namespaces:
                namespace.formatting = 0
                self._namespaces.refresh(namespace.nsid)

    async def _one(self, word: int, namespace: Namespace) -> None:
        """Erases, then changes the format."""
        for offset, size in pieces(namespace.size):
            await erase(namespace, offset, size)
            namespace.formatting = max(1, 100 - 100 * (offset + size) // namespace.size)
        await self._namespaces.sync(namespace.nsid)
        shift, metadata = namespace.formats[word & lib.NVME_FORMAT_LBAF_MASK]
        protection = word >> lib.NVME_FORMAT_PI_SHIFT & 7
        async with self._admin.paused():
            self._namespaces.reformat(
                namespace.nsid,
                lba_shift=shift,
                metadata=metadata,
                extended=bool(metadata and word & lib.NVME_FORMAT_MSET),
                protection=protection,
                protection_first=bool(protection and word & lib.NVME_FORMAT_PIL),
            )
        self._changed(namespace.nsid)
