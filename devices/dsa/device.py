"""The DSA as a PCI function: BAR0 registers, BAR2 portals, the task that executes commands.

Portals go straight to C; everything else is here. See dsa_engine.h for what the data path does not model. Beyond
that: no PASID capability. It halts only when told to (faults.py).
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import trio

from pvfio.abi import ffi, lib
from pvfio.devices.data_path import DataPath
from pvfio.devices.dsa.commands import Commands
from pvfio.devices.dsa.config import DsaConfig
from pvfio.devices.dsa.faults import FaultHooks
from pvfio.devices.dsa.registers import Registers
from pvfio.devices.pci import Bar, MsixLayout, PciFunction, PciIdentity
from pvfio.silicon import BusMaster, Engine, EngineKind
from pvfio.silicon.engine import KINDS

__all__ = ["DsaDevice"]

_REGISTERS: Final = lib.IDXD_MMIO_BAR
_PORTALS: Final = lib.IDXD_WQ_BAR


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _raw(config: DsaConfig) -> Any:
    values = {
        "wqs": config.wqs,
        "groups": config.groups,
        "engines": config.engines,
        "handles": 2 * config.vectors,
        "gencap": config.gencap,
        "opcap": list(config.opcap),
    }
    return ffi.new("struct pv_dsa_config *", values)


class DsaDevice(FaultHooks, PciFunction):
    """An Intel DSA, 8086:0b25.

    ``engine``: ``"inline"`` runs descriptors in whoever submits them, ``"thread"`` in a thread of the device's own;
    the attribute ``engine`` is its handle, for stop points. ``config``: capabilities. Commands are executed by
    ``run``; without it CMDSTS stays active. Raises ``MemoryError``.
    """

    def __init__(
        self,
        bus: BusMaster,
        *,
        engine: EngineKind = "inline",
        config: DsaConfig | None = None,
        ats: bool = True,
    ) -> None:
        self.dsa_config = config = config or DsaConfig()
        msix = MsixLayout(bar=_REGISTERS, offset=config.msix_offset, vectors=config.vectors)
        super().__init__(
            bus,
            PciIdentity(
                vendor=lib.DSA_PCI_VENDOR_ID,
                device=lib.DSA_PCI_DEVICE_ID,
                class_code=lib.DSA_PCI_CLASS,
                subsystem_vendor=lib.DSA_PCI_VENDOR_ID,
            ),
            bars=(
                Bar(index=_REGISTERS, size=_power_of_two(config.msix_offset + msix.size), prefetchable=True),
                Bar(
                    index=_PORTALS,
                    size=_power_of_two(config.wqs * lib.IDXD_WQ_PORTAL_STRIDE),
                    prefetchable=True,
                ),
            ),
            msix=msix,
            ats=ats,
        )
        assert self.msix is not None
        made = lib.pv_dsa_create(_raw(config), bus.ptr, self.msix.ptr, KINDS[engine])
        path = DataPath(made, lib.pv_dsa_engine, lib.pv_dsa_destroy, name="a DSA")
        self._dsa = path.ptr
        self._portals = path.keeps(lib.pv_dsa_portals(self._dsa))
        self.engine = Engine(lib.pv_dsa_engine(self._dsa), path, engine)
        self._value = ffi.new("uint64_t *")
        self._registers = Registers(config, self._dsa, self._command, self._permissions, self._occupancy)
        self._commands = Commands(config, self._registers, self._dsa, self)
        self._commands.release_all_handles()
        # Commands on their way to the task, each with the number of resets before it.
        self._send, self._receive = trio.open_memory_channel[tuple[int, int]](1)
        self._resets = 0
        self._running: trio.CancelScope | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Executes commands until cancelled. A reset ends the command it finds, not the task."""
        task_status.started()
        async for resets, value in self._receive:
            if resets != self._resets:
                continue
            with trio.CancelScope() as self._running:
                error, result = await self._commands.execute(value)
                if resets == self._resets:
                    self._complete(value, error, result)
            if self._running.cancelled_caught and resets == self._resets:
                self._complete(value, lib.IDXD_CMDSTS_HW_ERR, 0)
            self._running = None

    def _complete(self, value: int, error: int, result: int) -> None:
        self._registers.cmdsts = error | result << lib.IDXD_CMDSTS_RES_SHIFT
        if value & lib.IDXD_CMD_INT_REQ:
            lib.pv_dsa_cause(self._dsa, lib.IDXD_INTC_CMD)

    def _command(self, value: int) -> None:
        """A store to CMD. While a command is active it is dropped (Intel DSA 1.2 9.2)."""
        if not self._registers.cmdsts & lib.IDXD_CMDSTS_ACTIVE:
            self._registers.cmdsts = lib.IDXD_CMDSTS_ACTIVE
            self._send.send_nowait((self._resets, value))

    def _permissions(self, vector: int) -> None:
        self._commands.update_handle(vector)

    def _occupancy(self, wq: int) -> None:
        self._commands.watch_occupancy(wq)

    # Hooks of the PCI function.

    def mmio_read(self, bar: int, offset: int, size: int) -> int:
        """A register, or ones from a portal."""
        if bar == _REGISTERS:
            return self._registers.read(offset, size)
        if lib.pv_mmio_load(self._portals, offset, size, self._value):
            return (1 << 8 * size) - 1
        return int(self._value[0])

    def mmio_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """A register, or 8 bytes of a submission; a portal drops stores of other sizes."""
        if bar == _REGISTERS:
            self._registers.write(offset, size, value)
        else:
            lib.pv_mmio_store(self._portals, offset, size, value)

    def mmio(self, bar: int) -> Any:
        """The portals' path in C."""
        return self._portals if bar == _PORTALS else None

    def on_enable(self, memory: bool, master: bool) -> None:
        """Portals answer only while memory decodes; work that waited for bus mastering goes on."""
        lib.pv_dsa_decode(self._dsa, memory)
        if master:
            self.engine.kick()

    def on_reset(self) -> None:
        """Everything as after power-on; a command in progress is forgotten. One that needs more stays halted."""
        halted, reset_type = self.needs_system_reset, self._registers.reset_type
        self._resets += 1
        if self._running is not None:
            self._running.cancel()
        with contextlib.suppress(trio.WouldBlock):
            self._receive.receive_nowait()
        self._commands.reset()
        self._commands.release_all_handles()
        self._registers.cmdsts = 0
        if halted:
            self._commands.halt(reset_type)

    async def system_reset(self) -> None:
        """The reset of the whole system, seen from here: the device comes back from every halt. As ``reset``."""
        self._registers.reset_type = lib.IDXD_DEVICE_RESET_SOFTWARE
        await self.reset()

    def close(self) -> None:
        """Ends DMA and the engine's work for good; portals answer as with memory decoding off."""
        if not self._closed:
            super().close()
            lib.pv_dsa_decode(self._dsa, 0)
            self.engine.pause()
