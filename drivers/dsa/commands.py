"""Administrative commands: CMD and CMDSTS, one command at a time (Intel DSA 1.2 section 9.2.12 on).

A command that was written is waited for, whoever is cancelled meanwhile: the register takes no second one
before. Completion is polled; the command-completion interrupt is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from pvfio.abi import lib
from pvfio.drivers.dsa.errors import CommandError, command_name
from pvfio.errors import DeadlineExceeded

if TYPE_CHECKING:
    from pvfio.vfio import Region

__all__ = ["CommandPort", "wq_operand"]

_FIRST_NAP = 20e-6
_LONGEST_NAP = 1e-3


def wq_operand(number: int) -> int:
    """The operand that names one WQ in DISABLE_WQ, DRAIN_WQ, ABORT_WQ and RESET_WQ: a bit in a block of 16."""
    return 1 << number % 16 | number // 16 << 16


class CommandPort:
    """The command register of one device."""

    def __init__(self, registers: Region, device: str) -> None:
        self._registers = registers
        self._device = device
        self._lock = trio.Lock()

    async def run(self, command: int, operand: int = 0, *, deadline: float) -> int:
        """Runs a command and returns its result field (CMDSTS 23:8).

        Raises ``CommandError`` when the device refuses it, ``DeadlineExceeded`` when the device does not
        finish it (or one before) in ``deadline`` seconds. When cancelled: the command finishes first, or
        was not begun.
        """
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            try:
                with trio.fail_after(deadline):
                    async with self._lock:
                        await self._idle()
                        await self._registers.write(
                            lib.IDXD_CMD_OFFSET, command << int(lib.IDXD_CMD_SHIFT) | operand, 4
                        )
                        status = await self._idle()
            except trio.TooSlowError:
                raise DeadlineExceeded(command_name(command), deadline, device=self._device) from None
        error = status & int(lib.IDXD_CMDSTS_ERR_MASK)
        if error:
            raise CommandError(command, operand, error, device=self._device)
        return (status & int(lib.IDXD_CMDSTS_RES_MASK)) >> int(lib.IDXD_CMDSTS_RES_SHIFT)

    async def _idle(self) -> int:
        nap = _FIRST_NAP
        while (status := await self._registers.read(lib.IDXD_CMDSTS_OFFSET, 4)) & lib.IDXD_CMDSTS_ACTIVE:
            await trio.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        return status
