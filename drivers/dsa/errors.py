"""What the DSA driver raises, with the names of the specification.

Completion codes and command codes are named after ``<linux/idxd.h>`` and Linux's idxd (abi/dsa.h); a code
without a name there is shown as a number.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pvfio.abi import lib
from pvfio.errors import PvfioError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "BatchError",
    "CommandError",
    "DifError",
    "DsaError",
    "OperationAborted",
    "SoftwareError",
    "command_name",
    "completion_name",
]

_NOT_CODES = ("DSA_COMP_STATUS_MASK", "DSA_COMP_STATUS_WRITE")
_NOT_RESULTS = ("IDXD_CMDSTS_ACTIVE", "IDXD_CMDSTS_ERR_MASK", "IDXD_CMDSTS_RES_SHIFT", "IDXD_CMDSTS_RES_MASK")
_NOT_COMMANDS = (
    "IDXD_CMD_OPERAND_MASK",
    "IDXD_CMD_SHIFT",
    "IDXD_CMD_MASK",
    "IDXD_CMD_RSVD_MASK",
    "IDXD_CMD_INT_REQ",
)


@cache
def _names(prefix: str, without: tuple[str, ...]) -> dict[int, str]:
    return {getattr(lib, name): name for name in dir(lib) if name.startswith(prefix) and name not in without}


def completion_name(code: int) -> str:
    """The name of a completion code (the low seven bits of a record's status, or SWERR's error)."""
    code &= lib.DSA_COMP_STATUS_MASK
    name = _names("DSA_COMP_", _NOT_CODES).get(code) or _names("DSA_SWERR_", ()).get(code)
    return name or f"{code:#04x}"


def command_name(command: int) -> str:
    """The name of an administrative command."""
    return _names("IDXD_CMD_", _NOT_COMMANDS).get(command, f"command {command}").removeprefix("IDXD_CMD_")


class DsaError(PvfioError):
    """A descriptor did not end with success.

    ``code`` and ``name`` are the completion code; ``fault_addr`` the IOVA that did not translate (``None``
    where the code is no page fault), ``write`` whether the device wanted to write there;
    ``bytes_completed`` how far the operation came; ``result`` the record's result byte, ``invalid_flags``
    the flags the device refused.
    """

    def __init__(self, operation: str, record: NDArray[Any], *, device: str | None = None) -> None:
        status = int(record["status"])
        self.operation = operation
        self.device = device
        self.code = status & lib.DSA_COMP_STATUS_MASK
        self.name = completion_name(self.code)
        self.write = bool(status & lib.DSA_COMP_STATUS_WRITE)
        self.bytes_completed = int(record["bytes_completed"])
        self.result = int(record["result"])
        faults = (lib.DSA_COMP_PAGE_FAULT_NOBOF, lib.DSA_COMP_PAGE_FAULT_IR, lib.DSA_COMP_BATCH_PAGE_FAULT)
        self.fault_addr = int(record["fault_addr"]) if self.code in faults else None
        refused = self.code == lib.DSA_COMP_INVALID_FLAGS
        self.invalid_flags = int(record["invalid_flags"]) & lib.DSA_DESC_FLAGS_MASK if refused else 0
        super().__init__(self._message())

    def _message(self) -> str:
        where = f"{self.operation} {self.device}" if self.device else self.operation
        text = f"{where}: {self.name} ({self.code:#04x})"
        if self.fault_addr is not None:
            text += f" {'writing' if self.write else 'reading'} iova {self.fault_addr:#x}"
        if self.invalid_flags:
            text += f" flags {self.invalid_flags:#x}"
        return f"{text}, {self.bytes_completed:#x} bytes completed"


class DifError(DsaError):
    """A block's Data Integrity Field is not as it should be; the block begins at ``bytes_completed``.

    ``guard``, ``app_tag``, ``ref_tag``: which part is wrong, any number of them; ``all_ones``: it is all ones, where
    that is an error.
    """

    def __init__(self, operation: str, record: NDArray[Any], *, device: str | None = None) -> None:
        status = int(record["dif_status"])
        self.guard = bool(status & lib.DSA_DIF_STATUS_GUARD)
        self.app_tag = bool(status & lib.DSA_DIF_STATUS_APP_TAG)
        self.ref_tag = bool(status & lib.DSA_DIF_STATUS_REF_TAG)
        self.all_ones = bool(status & lib.DSA_DIF_STATUS_ALL_F)
        super().__init__(operation, record, device=device)

    def _message(self) -> str:
        parts = {
            "guard": self.guard,
            "application tag": self.app_tag,
            "reference tag": self.ref_tag,
            "all ones": self.all_ones,
        }
        return f"{super()._message()}: {', '.join(name for name, wrong in parts.items() if wrong)}"


class BatchError(DsaError):
    """A batch did not end with success.

    ``records`` are the members' completion records (status 0: never begun), ``failed`` the indices of those
    that ended with another status than success, ``descs_completed`` how many members were begun and ended.
    """

    def __init__(
        self, record: NDArray[Any], records: NDArray[Any], failed: list[int], *, device: str | None = None
    ) -> None:
        self.records = records
        self.failed = failed
        self.descs_completed = int(record["descs_completed"])
        super().__init__("batch", record, device=device)

    def _message(self) -> str:
        where = f"{self.operation} {self.device}" if self.device else self.operation
        text = f"{where}: {self.name} ({self.code:#04x}), {self.descs_completed} of {len(self.records)} completed"
        if self.fault_addr is not None:
            text += f", fault at iova {self.fault_addr:#x}"
        if self.failed:
            first = self.failed[0]
            text += f", member {first}: {completion_name(int(self.records[first]['status']))}"
        return text


class OperationAborted(PvfioError):
    """An operation was taken back by an abort or a reset; how much of it was done is unknown."""

    def __init__(self, operation: str, reason: str, *, device: str | None = None) -> None:
        where = f"{operation} {device}" if device else operation
        super().__init__(f"{where}: taken back by {reason}")
        self.operation = operation
        self.reason = reason
        self.device = device


class CommandError(PvfioError):
    """The device refused an administrative command; ``code`` and ``name`` are CMDSTS's error field."""

    def __init__(self, command: int, operand: int, code: int, *, device: str | None = None) -> None:
        self.command = command_name(command)
        self.operand = operand
        self.code = code
        name = _names("IDXD_CMDSTS_", _NOT_RESULTS).get(code, f"{code:#04x}")
        self.name = name
        self.device = device
        where = f"{self.command} {device}" if device else self.command
        super().__init__(f"{where} operand {operand:#x}: {name} ({code:#04x})")


class SoftwareError(PvfioError):
    """What the device reported in SWERR because it had no completion record to report it in.

    ``wq`` is ``None`` and ``operation`` is ``None`` where the device did not know them; ``overflow`` means
    that more errors followed this one and are lost.
    """

    def __init__(self, words: tuple[int, int, int, int], *, device: str | None = None) -> None:
        status, batch, fault, _ = words
        self.device = device
        self.code = status >> lib.IDXD_SWERR_ERROR_SHIFT & lib.DSA_COMP_STATUS_MASK
        self.name = completion_name(self.code)
        self.overflow = bool(status & lib.IDXD_SWERR_OVERFLOW)
        self.wq = (
            status >> lib.IDXD_SWERR_WQ_IDX_SHIFT & 0xFF if status & lib.IDXD_SWERR_WQ_IDX_VALID else None
        )
        known = bool(status & lib.IDXD_SWERR_DESC_VALID)
        self.operation = status >> lib.IDXD_SWERR_OPERATION_SHIFT & 0xFF if known else None
        in_batch = bool(status & lib.IDXD_SWERR_BATCH)
        self.batch_index = batch & lib.IDXD_SWERR_BATCH_IDX_MASK if in_batch else None
        self.write = bool(status & lib.IDXD_SWERR_FAULT_RW)
        self.fault_addr = fault
        where = f"{device}: " if device else ""
        wq = f" wq {self.wq}" if self.wq is not None else ""
        super().__init__(f"{where}software error {self.name} ({self.code:#04x}){wq} address {fault:#x}")
