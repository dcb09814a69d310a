"""What the NVMe driver raises, and the names of status codes.

A status is SCT << 8 | SC, with the More and Do Not Retry bits above it, as in a completion after the phase tag (NVMe
Base 2.0c 3.3.3.2.1). Names are those of abi/nvme.h; a code without one there is shown as a number.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from pvfio.abi import lib
from pvfio.errors import PvfioError

__all__ = ["NvmeError", "OperationAborted", "opcode_name", "status_name"]

_MASK: Final[int] = lib.NVME_SC_MASK
_DNR: Final[int] = lib.NVME_STATUS_DNR
_IO_OPCODES: Final = (
    "FLUSH",
    "WRITE",
    "READ",
    "WRITE_UNCOR",
    "COMPARE",
    "WRITE_ZEROES",
    "DSM",
    "VERIFY",
    "COPY",
)


@cache
def _status_names() -> dict[int, str]:
    prefix = "NVME_SC_"
    names = (name for name in dir(lib) if name.startswith(prefix) and name != "NVME_SC_MASK")
    return {int(getattr(lib, name)): name.removeprefix(prefix) for name in names}


@cache
def _opcode_names() -> dict[int, str]:
    return {int(getattr(lib, f"NVME_CMD_{name}")): name.lower() for name in _IO_OPCODES}


def status_name(status: int) -> str:
    """The name of a status code; More and Do Not Retry are left out of it."""
    return _status_names().get(status & _MASK, f"{status & _MASK:#05x}")


def opcode_name(opcode: int) -> str:
    """The name of an opcode of the NVM command set."""
    return _opcode_names().get(opcode, f"opcode {opcode:#04x}")


class NvmeError(PvfioError):
    """A command did not end with success.

    ``status`` is the whole status; ``name`` its name, ``sct`` and ``sc`` its type and code, ``dnr`` whether it says
    that the same command would fail again; ``opcode`` and ``operation`` the command, ``nsid`` and ``lba`` where it was
    for (``None`` where it has none), ``result`` the completion's command-specific dword.
    """

    def __init__(
        self,
        operation: str,
        status: int,
        *,
        opcode: int,
        device: str | None = None,
        nsid: int | None = None,
        lba: int | None = None,
        result: int = 0,
    ) -> None:
        self.operation = operation
        self.device = device
        self.status = status
        self.name = status_name(status)
        self.sct, self.sc = status >> 8 & 7, status & 0xFF
        self.dnr = bool(status & _DNR)
        self.opcode = opcode
        self.nsid = nsid
        self.lba = lba
        self.result = result
        text = f"{operation} {device}" if device else operation
        if nsid:
            text += f" nsid {nsid:#x}" if nsid > 0xFFFF else f" nsid {nsid}"
        if lba is not None:
            text += f" lba {lba:#x}"
        super().__init__(
            f"{text}: {self.name} (sct {self.sct:#x}, sc {self.sc:#04x}{', dnr' if self.dnr else ''})"
        )


class OperationAborted(PvfioError):
    """A command was taken back by a reset of the controller; how much of it was done is unknown."""

    def __init__(self, operation: str, reason: str, *, device: str | None = None) -> None:
        where = f"{operation} {device}" if device else operation
        super().__init__(f"{where}: taken back by {reason}")
        self.operation = operation
        self.reason = reason
        self.device = device
