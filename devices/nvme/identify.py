"""Identify (NVMe Base 2.0c 5.17): what the controller and its namespaces say of themselves.

Answers what a modern driver asks for: controller, namespaces, lists of active and present namespaces, descriptors, the
I/O command set forms, controller lists. Not modelled: NVM sets, endurance groups, secondary controllers (their lists
are empty or refused).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.admin import AdminError, Command
from pvfio.devices.nvme.config import FORMATS

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Handler
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.namespaces import Namespace, Namespaces

__all__ = ["Identify"]

_PAGE: Final[int] = lib.NVME_IDENTIFY_SIZE
_NSID_ALL: Final[int] = lib.NVME_NSID_ALL
_ENTRIES: Final = 1024  # of a namespace list


class Identify:
    """The Identify command of one controller."""

    def __init__(self, config: NvmeConfig, namespaces: Namespaces) -> None:
        self._config = config
        self._namespaces = namespaces
        self._answers = {
            lib.NVME_ID_CNS_NS: self._namespace,
            lib.NVME_ID_CNS_CTRL: lambda _: bytes(self.controller()),
            lib.NVME_ID_CNS_NS_ACTIVE_LIST: lambda c: self._list(c, active=True),
            lib.NVME_ID_CNS_NS_DESC_LIST: self._descriptors,
        }

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_IDENTIFY: self._identify}

    def _identify(self, command: Command) -> int:
        answer = self._answers.get(command.cdw10 & 0xFF)
        if answer is None:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, 40)
        command.to_host(answer(command).ljust(_PAGE, b"\0"))
        return 0

    def controller(self) -> Any:
        """Identify Controller, as ``ffi.buffer``."""
        config = self._config
        page = ffi.new("struct nvme_id_ctrl *")
        page.vid = page.ssvid = config.vendor
        for name, length in (("sn", 20), ("mn", 40), ("fr", 8)):
            value = {"sn": config.serial, "mn": config.model, "fr": config.firmware}[name]
            setattr(page, name, value.ljust(length).encode("ascii"))
        page.mdts = config.mdts_shift
        page.ver = lib.NVME_VS_2_0
        page.cntrltype = lib.NVME_CNTRLTYPE_IO
        page.sqes, page.cqes = 0x66, 0x44
        page.nn = config.max_namespaces
        return ffi.buffer(page)

    def _find(self, nsid: int) -> Namespace | None:
        """An attached namespace; None for a number that has none. Raises Invalid Namespace for one that cannot be."""
        if not 0 < nsid <= self._config.max_namespaces:
            raise AdminError(lib.NVME_SC_INVALID_NS, 4)
        found = self._namespaces.by_nsid.get(nsid)
        return found if found is not None and found.attached else None

    def _namespace(self, command: Command) -> bytes:
        """Zeroes for an inactive number (Base 5.17.2.1)."""
        found = self._find(command.nsid)
        return bytes(self.namespace(found)) if found else b""

    def namespace(self, namespace: Namespace) -> Any:
        """Identify Namespace, as ``ffi.buffer``."""
        page = ffi.new("struct nvme_id_ns *")
        page.nsze = page.ncap = page.nuse = namespace.blocks
        page.nlbaf = len(FORMATS) - 1
        page.flbas = namespace.format_index
        for index, (shift, metadata) in enumerate(FORMATS):
            page.lbaf[index].ds, page.lbaf[index].ms = shift, metadata
        return ffi.buffer(page)

    def _list(self, command: Command, *, active: bool) -> bytes:
        """Numbers above the command's, in order."""
        if command.nsid >= _NSID_ALL - 1:
            raise AdminError(lib.NVME_SC_INVALID_NS, 4)
        known = self._namespaces.by_nsid.values()
        numbers = sorted(n.nsid for n in known if n.nsid > command.nsid and (n.attached or not active))
        return _words(numbers[:_ENTRIES])

    def _descriptors(self, command: Command) -> bytes:
        found = self._find(command.nsid)
        if found is None:
            raise AdminError(lib.NVME_SC_INVALID_NS, 4)
        kinds = (
            (lib.NVME_NIDT_EUI64, found.eui64),
            (lib.NVME_NIDT_NGUID, found.nguid),
            (lib.NVME_NIDT_CSI, bytes([lib.NVME_CSI_NVM])),
        )
        return b"".join(bytes([kind, len(value), 0, 0]) + value for kind, value in kinds if value)


def _words(numbers: Iterable[int]) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)
