"""Admin commands: their dispatch, data transfers and completions (NVMe Base 2.0c chapter 5).

A handler takes a command and returns the command-specific result, or ``LATER`` for one that somebody completes
afterwards; it raises ``AdminError`` with the status the specification gives. One that moves data is a coroutine
function. Subjects have modules of their own, which register their opcodes here.

Commands are executed one after the other: at once, or, where the bus has remote ranges, in a task of their own, for
then moving data may wait for somebody whom the trio thread has to answer, and so may the engine.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final

import trio

from pvfio.abi import ffi, lib
from pvfio.devices.data_path import paused
from pvfio.silicon import BusMaster

__all__ = ["LATER", "Admin", "AdminError", "Command", "Handler"]

LATER: Final = None
"""What a handler returns whose command is completed by somebody else."""

_DNR: Final[int] = lib.NVME_STATUS_DNR
_NO_COMMAND: Final = 0xFFFF
Result = int | None
Handler = Callable[["Command"], Result | Awaitable[Result]]


class AdminError(Exception):
    """A command ends with this status. ``byte`` is the field of the command at fault, for the error log."""

    def __init__(self, status: int, byte: int | None = None, *, result: int = 0, dnr: bool = True) -> None:
        super().__init__(f"status {status:#x}")
        self.status = int(status) | (_DNR if dnr else 0)
        self.byte = byte
        self.result = result


class _Forgotten(Exception):
    """A reset came while the command was executed: nothing follows of it."""


class Command:
    """A fetched admin command: its fields, and the ways its data moves.

    ``resets`` counts those before it; ``at_once``: how many of its opcode were fetched with it, before it. ``apart``:
    its data moves in a worker thread.
    """

    __slots__ = (
        "_nvme",
        "apart",
        "at_once",
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
        "resets",
    )

    def __init__(self, nvme: Any, raw: Any, *, resets: int, at_once: int, apart: bool) -> None:
        self._nvme = nvme
        self.raw = raw
        self.resets = resets
        self.at_once = at_once
        self.apart = apart
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

    @property
    def forgotten(self) -> bool:
        """There was a reset since."""
        return bool(lib.pv_nvme_resets(self._nvme) != self.resets)

    async def to_host(self, data: bytes) -> None:
        """Moves data to the host. Raises ``AdminError``: what is wrong with the data pointer.

        A reset ends the handler here. Cancelled: the data moves all the same.
        """
        await self._transfer(self.raw, ffi.from_buffer(data), len(data), to_host=True)

    async def from_host(self, size: int) -> bytes:
        """Data of the host. As ``to_host``."""
        data = bytearray(size)
        await self._transfer(self.raw, ffi.from_buffer(data, require_writable=True), size, to_host=False)
        return bytes(data)

    async def reaches(self, address: int, size: int) -> bool:
        """Whether bytes of a page can be read. As ``to_host``."""
        raw = ffi.new("struct nvme_command *", {"prp1": address})
        try:
            await self._transfer(raw, ffi.new("uint8_t[]", size), size, to_host=False)
        except AdminError:
            return False
        return True

    async def _transfer(self, raw: Any, data: Any, size: int, *, to_host: bool) -> None:
        pointer = ffi.cast("void *", data)
        transfer = partial(lib.pv_nvme_transfer, self._nvme, raw, pointer, size, to_host, self.resets)
        status = await trio.to_thread.run_sync(transfer) if self.apart else transfer()
        if status == -errno.ECANCELED or self.forgotten:
            raise _Forgotten
        if status:
            raise AdminError(status, dnr=False)


class Admin:
    """The admin command set of one controller. ``guard`` refuses commands (by raising) whatever they are.

    ``start`` begins a task of the device.
    """

    def __init__(
        self, nvme: Any, bus: BusMaster, start: Callable[[Callable[[], Awaitable[None]]], object]
    ) -> None:
        self._nvme = nvme
        self._bus = bus
        self._start = start
        self._apart = False
        self._handlers: dict[int, Handler] = {}
        self._batch = ffi.new("struct nvme_command[]", 32)
        self.guard: Callable[[Command], None] = _allow

    def register(self, handlers: dict[int, Handler]) -> None:
        """A subject's opcodes."""
        self._handlers.update({int(opcode): handler for opcode, handler in handlers.items()})

    @property
    def opcodes(self) -> frozenset[int]:
        """What is implemented."""
        return frozenset(self._handlers)

    def run_waiting(self) -> None:
        """Executes every command that was fetched, or has it done."""
        if self._apart:
            return
        if self._bus.remote:
            self._apart = True
            self._start(self._run_apart)
            return
        while commands := self._take():
            for command in commands:
                _at_once(self._execute(command))

    async def _run_apart(self) -> None:
        """Commands find the engine paused: what they ask of it never makes the trio thread wait."""
        try:
            while commands := self._take():
                for command in commands:
                    async with self.paused():
                        await self._execute(command)
        finally:
            self._apart = False

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Between two steps of the engine, for what a task asks of the data path beside commands."""
        return paused(lib.pv_nvme_engine(self._nvme), self._bus)

    def _take(self) -> list[Command]:
        count = lib.pv_nvme_take_admin(self._nvme, self._batch, len(self._batch))
        resets, seen, commands = lib.pv_nvme_resets(self._nvme), Counter[int](), []
        for index in range(count):
            raw = ffi.new("struct nvme_command *", self._batch[index])
            commands.append(
                Command(self._nvme, raw, resets=resets, at_once=seen[raw.opcode], apart=self._apart)
            )
            seen[raw.opcode] += 1
        return commands

    def complete(self, command: Command, status: int = 0, result: int = 0) -> None:
        """Completes a command; nothing where a reset came first."""
        if not command.forgotten:
            lib.pv_nvme_complete(self._nvme, command.cid, status, result)

    def fail(self, command: Command, error: AdminError) -> None:
        """Completes a command with an error, which goes into the error log."""
        if not command.forgotten:
            self.log_error(error.status, error.byte, sq=0, cid=command.cid, nsid=command.nsid)
            self.complete(command, error.status, error.result)

    async def _execute(self, command: Command) -> None:
        if command.forgotten:
            return
        try:
            handler = self._handlers.get(command.opcode)
            if handler is None:
                raise AdminError(lib.NVME_SC_INVALID_OPCODE, 0)
            # No fused admin commands, and no SGLs in them over PCI Express (Base 3.3.3.1, figure 87).
            if command.raw.flags & (lib.NVME_CMD_FUSE_MASK | lib.NVME_CMD_PSDT_MASK):
                raise AdminError(lib.NVME_SC_INVALID_FIELD, 1)
            self.guard(command)
            answer = handler(command)
            result = await answer if isinstance(answer, Awaitable) else answer
        except _Forgotten:
            return
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


def _at_once(execution: Coroutine[Any, Any, None]) -> None:
    """Runs what has nothing to wait for."""
    try:
        execution.send(None)
    except StopIteration:
        return
    raise RuntimeError("an admin command waits outside its task")
