"""The Identify command (NVMe Base 2.0c 5.17): which structure or list, and what may be asked of which number.

Answers what a modern driver asks for: controller, namespaces (attached, and allocated), descriptors, lists, the forms
for an I/O command set, lists of controllers, combinations of command sets. The structures are in
identify_controller.py and identify_namespace.py. Not modelled: NVM sets, domains, secondary controllers, UUID lists,
namespace granularity: Invalid Field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import lib
from pvfio.devices.nvme.admin import AdminError, Command
from pvfio.devices.nvme.identify_controller import CONTROLLER_ID, controller_page
from pvfio.devices.nvme.identify_namespace import (
    common_page,
    descriptors,
    independent_page,
    namespace_page,
    nvm_namespace_page,
)

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Handler
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.firmware import Firmware
    from pvfio.devices.nvme.namespaces import Namespace, Namespaces

__all__ = ["Identify"]

_PAGE: Final[int] = lib.NVME_IDENTIFY_SIZE
_ALL: Final[int] = lib.NVME_NSID_ALL
_ENTRIES: Final = 1024  # of a namespace list
_BYTE_NSID, _BYTE_CNS, _BYTE_CNTID, _BYTE_CSI = 4, 40, 42, 47
_ANY_CONTROLLER: Final = 0xFFFF

Answer = Callable[[Command], bytes]


class Identify:
    """The Identify command of one controller."""

    def __init__(self, config: NvmeConfig, namespaces: Namespaces, firmware: Firmware) -> None:
        self._config = config
        self._namespaces = namespaces
        self._firmware = firmware
        of = self._about
        self._answers: dict[int, Answer] = {
            lib.NVME_ID_CNS_NS: self._namespace,
            lib.NVME_ID_CNS_CTRL: lambda _: self.controller(),
            lib.NVME_ID_CNS_NS_ACTIVE_LIST: lambda c: self._list(c, active=True),
            lib.NVME_ID_CNS_NS_DESC_LIST: self._descriptors,
            lib.NVME_ID_CNS_CS_NS: _nvm(of(nvm_namespace_page)),
            # No limit but MDTS: every field is zero (NVM figure 101).
            lib.NVME_ID_CNS_CS_CTRL: _nvm(lambda _: b""),
            lib.NVME_ID_CNS_CS_NS_ACTIVE_LIST: _nvm(lambda c: self._list(c, active=True)),
            lib.NVME_ID_CNS_CS_INDEP_NS: of(independent_page),
            lib.NVME_ID_CNS_NS_PRESENT_LIST: lambda c: self._list(c, active=False),
            lib.NVME_ID_CNS_NS_PRESENT: of(namespace_page, allocated=True),
            lib.NVME_ID_CNS_CTRL_NS_LIST: self._controllers_of,
            lib.NVME_ID_CNS_CTRL_LIST: self._controllers,
            lib.NVME_ID_CNS_CS_NS_PRESENT_LIST: _nvm(lambda c: self._list(c, active=False)),
            lib.NVME_ID_CNS_CS_NS_PRESENT: _nvm(of(nvm_namespace_page, allocated=True)),
            lib.NVME_ID_CNS_CS_LIST: self._combinations,
        }

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_IDENTIFY: self._identify}

    async def _identify(self, command: Command) -> int:
        answer = self._answers.get(command.cdw10 & 0xFF)
        if answer is None:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CNS)
        await command.to_host(answer(command).ljust(_PAGE, b"\0"))
        return 0

    def controller(self) -> bytes:
        """Identify Controller."""
        return controller_page(self._config, self._namespaces, self._firmware.revision)

    def _find(self, command: Command, *, allocated: bool = False) -> Namespace | None:
        """An attached namespace, or an allocated one; None for a number that has none. Raises Invalid Namespace."""
        self._namespaces.check(command.nsid)
        found = self._namespaces.by_nsid.get(command.nsid)
        return found if found is not None and (allocated or found.attached) else None

    def _about(self, page: Callable[[Namespace], bytes], *, allocated: bool = False) -> Answer:
        """Zeroes for a number that has none (Base 5.17.2.1)."""

        def answer(command: Command) -> bytes:
            found = self._find(command, allocated=allocated)
            return page(found) if found else b""

        return answer

    def _namespace(self, command: Command) -> bytes:
        """FFFFFFFFh: what all namespaces have in common, for who is about to create one (NVM 4.1.5.1)."""
        if command.nsid == _ALL:
            return common_page()
        return self._about(namespace_page)(command)

    def _list(self, command: Command, *, active: bool) -> bytes:
        """Numbers above the command's, in order (Base 5.17.2.2)."""
        if command.nsid >= _ALL - 1:
            raise AdminError(lib.NVME_SC_INVALID_NS, _BYTE_NSID)
        known = self._namespaces.by_nsid.values()
        numbers = sorted(n.nsid for n in known if n.nsid > command.nsid and (n.attached or not active))
        return _words(numbers[:_ENTRIES], 4)

    def _descriptors(self, command: Command) -> bytes:
        found = self._find(command)
        if found is None:
            raise AdminError(lib.NVME_SC_INVALID_NS, _BYTE_NSID)
        return descriptors(found)

    def _controllers(self, command: Command) -> bytes:
        """A count, and identifiers from the command's on (Base 5.17.2.13)."""
        numbers = [CONTROLLER_ID] if command.cdw10 >> 16 <= CONTROLLER_ID else []
        return _words([len(numbers), *numbers], 2)

    def _controllers_of(self, command: Command) -> bytes:
        """Those that a namespace is attached to (Base 5.17.2.12)."""
        found = self._find(command, allocated=True)
        if found is None:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_NSID)
        return self._controllers(command) if found.attached else b""

    def _combinations(self, command: Command) -> bytes:
        """Base 5.17.2.21: one combination of command sets, the NVM command set alone."""
        if command.cdw10 >> 16 not in (CONTROLLER_ID, _ANY_CONTROLLER):
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CNTID)
        return _words([1 << lib.NVME_CSI_NVM], 8)


def _nvm(answer: Answer) -> Answer:
    """Only for the NVM command set (CDW11 31:24)."""

    def checked(command: Command) -> bytes:
        if command.cdw11 >> 24 != lib.NVME_CSI_NVM:
            raise AdminError(lib.NVME_SC_INVALID_IO_CMD_SET, _BYTE_CSI)
        return answer(command)

    return checked


def _words(numbers: Iterable[Any], size: int) -> bytes:
    return b"".join(int(number).to_bytes(size, "little") for number in numbers)
