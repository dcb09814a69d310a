"""Namespace Management and Namespace Attachment (NVMe Base 2.0c 5.22 and 5.23, NVM 4.1.6).

Namespaces that a driver creates are of memory, out of ``NvmeConfig.capacity`` and what deleted ones gave back.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.admin import AdminError, Command
from pvfio.devices.nvme.config import FORMATS, NamespaceSpec
from pvfio.devices.nvme.identify_controller import CONTROLLER_ID

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Handler
    from pvfio.devices.nvme.namespaces import Namespace, Namespaces

__all__ = ["NamespaceCommands", "check_format"]

_ALL: Final[int] = lib.NVME_NSID_ALL
_PAGE: Final = 4096
_LONGEST_LIST: Final = 2047
_BYTE_NSID, _BYTE_CDW10, _BYTE_CSI = 4, 40, 47


def check_format(index: int, protection: int, formats: tuple[tuple[int, int], ...]) -> None:
    """Raises Invalid Format: no such LBA format, or protection that it cannot have (NVM 5.2)."""
    if index >= len(formats) or protection > 1 or (protection and formats[index][1] < 8):
        raise AdminError(lib.NVME_SC_INVALID_FORMAT, _BYTE_CDW10)


class NamespaceCommands:
    """The two commands. ``changed`` hears of namespaces that are attached or go, ``gone`` of deleted ones."""

    def __init__(
        self, namespaces: Namespaces, changed: Callable[[int], None], gone: Callable[[int], None]
    ) -> None:
        self._namespaces = namespaces
        self._changed = changed
        self._gone = gone

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_NS_MGMT: self._manage, lib.NVME_ADMIN_NS_ATTACH: self._attachment}

    async def _manage(self, command: Command) -> int:
        select = command.cdw10 & 0xF
        if select == lib.NVME_NS_MGMT_CREATE:
            return await self._create(command)
        if select != lib.NVME_NS_MGMT_DELETE:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW10)
        every = command.nsid == _ALL
        doomed = list(self._namespaces.by_nsid.values()) if every else [self._allocated(command.nsid)]
        for found in doomed:
            self._check_free(found)
        for found in doomed:
            self._namespaces.delete(found.nsid)
            self._gone(found.nsid)
            if found.attached:
                self._changed(found.nsid)
        return 0

    def _allocated(self, nsid: int) -> Namespace:
        """A namespace, attached or not. Raises Invalid Namespace or Format, Invalid Field."""
        self._namespaces.check(nsid)
        found = self._namespaces.by_nsid.get(nsid)
        if found is None:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_NSID)
        return found

    def _check_free(self, namespace: Namespace) -> None:
        """Neither write protected (Base 8.12) nor being formatted."""
        if namespace.write_protected:
            raise AdminError(lib.NVME_SC_NS_WRITE_PROTECTED, _BYTE_NSID)
        if namespace.formatting:
            raise AdminError(lib.NVME_SC_FORMAT_IN_PROGRESS, _BYTE_NSID, dnr=False)

    async def _create(self, command: Command) -> int:
        """Base 5.23.1. The result is the number of the namespace."""
        if command.cdw11 >> 24 != lib.NVME_CSI_NVM:
            raise AdminError(lib.NVME_SC_IOCS_NOT_SUPPORTED, _BYTE_CSI)
        wanted = ffi.from_buffer("struct nvme_id_ns *", await command.from_host(_PAGE))
        index, protection = wanted.flbas & lib.NVME_FLBAS_INDEX_MASK, wanted.dps & lib.NVME_DPS_TYPE_MASK
        check_format(index, protection, FORMATS)
        self._check_wanted(wanted)
        shift, metadata = FORMATS[index]
        if wanted.nsze << shift > self._namespaces.unallocated:
            raise AdminError(lib.NVME_SC_NS_INSUFFICIENT_CAP)
        spec = NamespaceSpec(
            size=-(-(wanted.nsze << shift) // _PAGE) * _PAGE,
            lba_shift=shift,
            metadata=metadata,
            extended=bool(metadata and wanted.flbas & lib.NVME_FLBAS_EXTENDED),
            protection=protection,
            protection_first=bool(protection and wanted.dps & lib.NVME_DPS_FIRST),
            attached=False,
        )
        try:
            return self._namespaces.create(spec, size=wanted.nsze << shift).nsid
        except ValueError as error:
            raise AdminError(lib.NVME_SC_NS_ID_UNAVAILABLE) from error
        except MemoryError as error:
            raise AdminError(lib.NVME_SC_NS_INSUFFICIENT_CAP) from error

    def _check_wanted(self, wanted: Any) -> None:
        """Sizes, and what nobody here can share."""
        if wanted.ncap < wanted.nsze:
            raise AdminError(lib.NVME_SC_THIN_PROV_NOT_SUPP)
        shared = wanted.nmic or wanted.anagrpid or wanted.nvmsetid or wanted.endgid
        if not wanted.nsze or wanted.ncap > wanted.nsze or shared:
            raise AdminError(lib.NVME_SC_INVALID_FIELD)

    async def _attachment(self, command: Command) -> int:
        """Base 5.22."""
        select = command.cdw10 & 0xF
        if select not in (lib.NVME_NS_ATTACH_ATTACH, lib.NVME_NS_ATTACH_DETACH):
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW10)
        found = self._allocated(command.nsid)
        _check_controllers(await command.from_host(_PAGE))
        if found.formatting:
            raise AdminError(lib.NVME_SC_FORMAT_IN_PROGRESS, _BYTE_NSID, dnr=False)
        if select == lib.NVME_NS_ATTACH_ATTACH:
            if found.attached:
                raise AdminError(lib.NVME_SC_NS_ALREADY_ATTACHED, _BYTE_NSID)
            self._namespaces.attach(found.nsid)
        else:
            if not found.attached:
                raise AdminError(lib.NVME_SC_NS_NOT_ATTACHED, _BYTE_NSID)
            self._namespaces.detach(found.nsid)
        self._changed(found.nsid)
        return 0


def _check_controllers(page: bytes) -> None:
    """A controller list (Base 4.4.1) of this one controller. Raises Controller List Invalid."""
    (count,) = struct.unpack_from("<H", page)
    if not 0 < count <= _LONGEST_LIST or struct.unpack_from(f"<{count}H", page, 2) != (CONTROLLER_ID,):
        raise AdminError(lib.NVME_SC_CTRL_LIST_INVALID)
