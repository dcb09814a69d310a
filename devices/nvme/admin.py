"""Admin commands: their dispatch, data transfers and completions (NVMe Base 2.0c chapter 5).

A handler takes a command and returns the command-specific result, or ``LATER`` for one that somebody completes
afterwards; it raises ``AdminError`` with the status the specification gives. Subjects have modules of their own, which
register their opcodes here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import ffi, lib

if TYPE_CHECKING:
    from pvfio.devices.nvme.device import NvmeDevice

__all__ = ["LATER", "Admin", "AdminError", "Command", "Handler"]

LATER: Final = None
"""What a handler returns whose command is completed by somebody else."""

_DNR: Final[int] = lib.NVME_STATUS_DNR
Handler = Callable[["Command"], int | None]


class AdminError(Exception):
    """A command ends with this status. ``byte`` is the field of the command at fault, for the error log."""

    def __init__(self, status: int, byte: int | None = None, *, result: int = 0, dnr: bool = True) -> None:
        super().__init__(f"status {status:#x}")
        self.status = int(status) | (_DNR if dnr else 0)
        self.byte = byte
        self.result = result


class Command:
    """A fetched admin command: its fields, and the ways its data moves."""

    __slots__ = (
        "_nvme",
        "cdw10",
        "cdw11",
        "cdw12",
        "cdw13",
        "cdw14",
        "cdw15",
        "cid",
        "nsid",
        "opcode",
        "prp1",
        "prp2",
        "raw",
    )

    def __init__(self, nvme: Any, raw: Any) -> None:
        self._nvme = nvme
        self.raw = raw
        self.opcode: int = raw.opcode
        self.cid: int = raw.cid
        self.nsid: int = raw.nsid
        self.prp1: int = raw.prp1
        self.prp2: int = raw.prp2
        self.cdw10: int = raw.cdw10
        self.cdw11: int = raw.cdw11
        self.cdw12: int = raw.cdw12
        self.cdw13: int = raw.cdw13
        self.cdw14: int = raw.cdw14
        self.cdw15: int = raw.cdw15

    def to_host(self, data: bytes) -> None:
        """Moves data to the host. Raises ``AdminError``: what is wrong with the data pointer."""
        self._transfer(ffi.from_buffer(data), len(data), to_host=True)

    def from_host(self, size: int) -> bytes:
        """Data of the host. Raises ``AdminError``."""
        data = bytearray(size)
        self._transfer(ffi.from_buffer(data, require_writable=True), size, to_host=False)
        return bytes(data)

    def _transfer(self, data: Any, size: int, *, to_host: bool) -> None:
        status = lib.pv_nvme_transfer(self._nvme, self.raw, ffi.cast("void *", data), size, to_host)
        if status:
            raise AdminError(status, dnr=False)


class Admin:
    """The admin command set of one controller."""

    def __init__(self, device: NvmeDevice, nvme: Any) -> None:
        self._device = device
        self._nvme = nvme
        self._handlers: dict[int, Handler] = {}
        self._batch = ffi.new("struct nvme_command[]", 32)

    def register(self, handlers: dict[int, Handler]) -> None:
        """A subject's opcodes."""
        self._handlers.update({int(opcode): handler for opcode, handler in handlers.items()})

    @property
    def opcodes(self) -> frozenset[int]:
        """What is implemented."""
        return frozenset(self._handlers)

    def run_waiting(self) -> None:
        """Executes every command that was fetched."""
        while count := lib.pv_nvme_take_admin(self._nvme, self._batch, len(self._batch)):
            for index in range(count):
                raw = ffi.new("struct nvme_command *", self._batch[index])
                self._execute(Command(self._nvme, raw))

    def complete(self, cid: int, status: int = 0, result: int = 0) -> None:
        """Completes a command that a handler left for later."""
        lib.pv_nvme_complete(self._nvme, 0, cid, status, result)

    def _execute(self, command: Command) -> None:
        try:
            handler = self._handlers.get(command.opcode)
            if handler is None:
                raise AdminError(lib.NVME_SC_INVALID_OPCODE, 0)
            if command.raw.flags & lib.NVME_CMD_FUSE_MASK:
                raise AdminError(lib.NVME_SC_INVALID_FIELD, 1)
            result = handler(command)
        except AdminError as error:
            self.note_error(command, error)
            self.complete(command.cid, error.status, error.result)
            return
        if result is not LATER:
            self.complete(command.cid, 0, result)

    def note_error(self, command: Command, error: AdminError) -> None:
        """An entry of the error information log (Base 5.16.1.2)."""
        entry = ffi.new("struct nvme_error_log_entry *")
        entry.cmdid = command.cid
        entry.status_field = error.status << 1
        entry.nsid = command.nsid
        entry.parm_error_location = lib.NVME_ERROR_LOCATION_NONE if error.byte is None else error.byte
        lib.pv_nvme_log_error(self._nvme, entry)
