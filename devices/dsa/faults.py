"""Host-side hooks that make a DSA fail: completion codes, refused commands, the halt state.

They are no part of the device a driver sees; they exist so that its author can exercise every branch, the codes too
that no rule of this model produces (page requests, hardware errors, traffic classes). An injected end is reported as
any other: completion record, interrupt, event log, SWERR.
"""

from __future__ import annotations

import logging
from typing import Any, Final, Literal, TypeAlias

import trio

from pvfio.abi import ffi, lib
from pvfio.devices.dsa.commands import Commands, InjectedRefusal
from pvfio.devices.dsa.registers import Registers

__all__ = ["FaultHooks", "ResetType"]

ResetType: TypeAlias = Literal["software", "flr", "warm", "cold"]
"""What brings a halted device back: RESET_DEVICE or more, a function level reset or more, a system reset."""

_RESETS: Final[dict[str, int]] = {
    "software": lib.IDXD_DEVICE_RESET_SOFTWARE,
    "flr": lib.IDXD_DEVICE_RESET_FLR,
    "warm": lib.IDXD_DEVICE_RESET_WARM,
    "cold": lib.IDXD_DEVICE_RESET_COLD,
}
_log = logging.getLogger(__name__)


class FaultHooks:
    """Mixed into the device. All of it is called from the thread of the device's task."""

    _dsa: Any
    _commands: Commands
    _registers: Registers
    _running: trio.CancelScope | None

    def inject_completion(
        self,
        status: int,
        *,
        opcode: int | None = None,
        wq: int | None = None,
        skip: int = 0,
        times: int = 1,
        bytes_completed: int = 0,
        fault_addr: int = 0,
    ) -> None:
        """The next ``times`` descriptors of that operation and WQ (``None``: of any), ``skip`` of them left alone
        before, end with ``status`` (bit 7: the fault was on a write) without running.

        Only descriptors that pass their checks count; members of a batch do too. What was named stays named over
        resets, until it has happened or ``clear_injections`` is called. Raises ``ValueError`` for numbers out of
        range, ``BlockingIOError`` when sixteen are waiting.
        """
        any_of = int(lib.PV_DSA_ANY)
        if not (0 < status < 256 and times > 0 and skip >= 0):
            raise ValueError(f"status {status:#x}, skip {skip}, times {times}: not an injection")
        values = {
            "status": status,
            "opcode": any_of if opcode is None else opcode,
            "wq": any_of if wq is None else wq,
            "skip": skip,
            "times": times,
            "bytes_completed": bytes_completed,
            "fault_addr": fault_addr,
        }
        if lib.pv_dsa_inject(self._dsa, ffi.new("struct pv_dsa_injection *", values)):
            raise BlockingIOError("too many injections wait")

    def inject_command_error(self, code: int, *, command: int | None = None, times: int = 1) -> None:
        """The next ``times`` commands of that number (``None``: of any) are refused with ``code`` in CMDSTS, unless
        the device does not know them anyway. Raises ``ValueError`` for numbers out of range.
        """
        if not (0 < code < 256 and times > 0):
            raise ValueError(f"code {code:#x}, times {times}: not an injection")
        self._commands.injected.append(InjectedRefusal(code, command, times))

    def clear_injections(self) -> None:
        """Forgets completions and refusals that have not happened."""
        lib.pv_dsa_inject_clear(self._dsa)
        self._commands.injected.clear()

    def inject_halt(self, reason: str, *, reset: ResetType = "software") -> None:
        """A fatal error: the device halts (Intel DSA 1.2 9.2, GENSTS).

        What was in flight is gone without completion records, a command in progress ends with a hardware error,
        portals take nothing, commands are refused, INTCAUSE says so where GENCTRL asks for it. ``reset`` is what
        GENSTS names as the way back; a function level reset is enough for ``"software"`` too. ``reason`` is logged.
        Raises ``ValueError`` for an unknown reset.
        """
        if reset not in _RESETS:
            raise ValueError(f"a reset is one of {', '.join(_RESETS)}, not {reset!r}")
        _log.info("the DSA halts: %s", reason)
        self._commands.halt(_RESETS[reset])
        if self._running is not None:
            self._running.cancel()

    @property
    def needs_system_reset(self) -> bool:
        """Halted such that not even a function level reset brings it back."""
        halted = self._registers.state == lib.IDXD_DEVICE_STATE_HALT
        return bool(halted and self._registers.reset_type > lib.IDXD_DEVICE_RESET_FLR)
