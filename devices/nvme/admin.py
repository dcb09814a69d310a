"""Admin commands: their dispatch, data transfers and completions (NVMe Base 2.0c chapter 5).

A handler takes a command and returns the command-specific result, or ``LATER`` for one that somebody completes
afterwards; it raises ``AdminError`` with the status the specification gives. Subjects have modules of their own, which
register their opcodes here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from pvfio.abi import ffi, lib

__all__ = ["LATER", "Admin", "AdminError", "Command", "Handler"]

LATER: Final = None
"""What a handler returns whose command is completed by somebody else."""

_DNR: Final[int] = lib.NVME_STATUS_DNR
_NO_COMMAND: Final = 0xFFFF
Handler = Callable[["Command"], int | None]


class AdminError(Exception):
    """A command ends with this status. ``byte`` is the field of the command at fault, for the error log."""

    def __init__(self, status: int, byte: int | None = None, *, result: int = 0, dnr: bool = True) -> None:
        super().__init__(f"status {status:#x}")
        self.status = int(status) | (_DNR if dnr else 0)
        self.byte = byte
        self.result = result


class Command:
    """A fetched admin command: its fields, and the ways its data moves.

    ``epoch`` counts the resets before it; ``at_once``: how many of its opcode were fetched with it, before it.
    """

    __slots__ = (
        "_nvme",
        "at_once",
        "cdw10",
        "cdw11",
        "cdw12",
        "cdw13",
        "cdw14",
        "cdw15",
        "cid",
        "epoch",
        "nsid",
        "opcode",
        "prp1",
        "prp2",
        "raw",
    )

    def __init__(self, nvme: Any, raw: Any, epoch: int, at_once: int) -> None:
        self._nvme = nvme
        self.raw = raw
        self.epoch = epoch
        self.at_once = at_once
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
    """The admin command set of one controller. ``guard`` refuses commands (by raising) whatever they are."""

    def __init__(self, nvme: Any) -> None:
        self._nvme = nvme
        self._handlers: dict[int, Handler] = {}
        self._batch = ffi.new("struct nvme_command[]", 32)
        self._epoch = 0
        self.guard: Callable[[Command], None] = _allow

    def register(self, handlers: dict[int, Handler]) -> None:
        """A subject's opcodes."""
        self._handlers.update({int(opcode): handler for opcode, handler in handlers.items()})

    @property
    def opcodes(self) -> frozenset[int]:
        """What is implemented."""
        return frozenset(self._handlers)

    def reset(self) -> None:
        """After a reset of the controller: what is in progress is not completed any more."""
        self._epoch += 1

    def run_waiting(self) -> None:
        """Executes every command that was fetched."""
        while count := lib.pv_nvme_take_admin(self._nvme, self._batch, len(self._batch)):
            seen: Counter[int] = Counter()
            for index in range(count):
                raw = ffi.new("struct nvme_command *", self._batch[index])
                self._execute(Command(self._nvme, raw, self._epoch, seen[raw.opcode]))
                seen[raw.opcode] += 1

    def complete(self, command: Command, status: int = 0, result: int = 0) -> None:
        """Completes a command; nothing where a reset came first."""
        if command.epoch == self._epoch:
            lib.pv_nvme_complete(self._nvme, 0, command.cid, status, result)

    def fail(self, command: Command, error: AdminError) -> None:
        """Completes a command with an error, which goes into the error log."""
        if command.epoch == self._epoch:
            self.log_error(error.status, error.byte, sq=0, cid=command.cid, nsid=command.nsid)
            self.complete(command, error.status, error.result)

    def _execute(self, command: Command) -> None:
        try:
            handler = self._handlers.get(command.opcode)
            if handler is None:
                raise AdminError(lib.NVME_SC_INVALID_OPCODE, 0)
            # No fused admin commands, and no SGLs in them over PCI Express (Base 3.3.3.1, figure 87).
            if command.raw.flags & (lib.NVME_CMD_FUSE_MASK | lib.NVME_CMD_PSDT_MASK):
                raise AdminError(lib.NVME_SC_INVALID_FIELD, 1)
            self.guard(command)
            result = handler(command)
        except AdminError as error:
            self.fail(command, error)
            return
        if result is not LATER:
            self.complete(command, 0, result)

    def log_error(
        self,
        status: int,
        byte: int | None = None,
        *,
        sq: int = _NO_COMMAND,
        cid: int = _NO_COMMAND,
        nsid: int = 0,
        lba: int = 0,
    ) -> None:
        """An entry of the error information log (Base 5.16.1.2), of no command unless ``sq`` and ``cid`` say which;
        ``status`` is then the most applicable one.
        """
        entry = ffi.new("struct nvme_error_log_entry *")
        entry.sqid = sq
        entry.cmdid = cid
        entry.status_field = status << 1 & 0xFFFF
        entry.nsid, entry.lba = nsid, lba
        entry.parm_error_location = lib.NVME_ERROR_LOCATION_NONE if byte is None else byte
        lib.pv_nvme_log_error(self._nvme, entry)


def _allow(command: Command) -> None:
    pass
