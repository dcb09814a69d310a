"""The commands of the CMD register and every reason to refuse one (Intel DSA 1.2 9.2).

Run by the device's task, one at a time. Draining waits for the data path; a command that waits can be cancelled (by a
function level reset) and then leaves the WQs closed, for the reset to finish. Without PASIDs on the bus a shared
WQ needs no PASID enable, and a WQ that asks for one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from pvfio.abi import ffi, lib
from pvfio.devices.data_path import paused
from pvfio.devices.dsa.config import DsaConfig
from pvfio.devices.dsa.registers import Registers
from pvfio.silicon import BusMaster

__all__ = ["CommandError", "Commands", "Function", "InjectedRefusal"]


class CommandError(Exception):
    """A command is refused; ``code`` goes to CMDSTS."""

    def __init__(self, code: int) -> None:
        super().__init__(f"command refused: {code:#x}")
        self.code = code


@dataclass
class InjectedRefusal:
    """``code`` for the next ``times`` commands of that number, ``None``: of any."""

    code: int
    command: int | None
    times: int


class Function(Protocol):
    """What commands need of the PCI function around them."""

    @property
    def bus(self) -> BusMaster: ...

    @property
    def master_enabled(self) -> bool: ...

    def cancel_dma(self, on: bool) -> None: ...


def _require(condition: object, code: int) -> None:
    if not condition:
        raise CommandError(code)


class Commands:
    """Executes commands on the registers and the data path."""

    def __init__(self, config: DsaConfig, registers: Registers, dsa: Any, function: Function) -> None:
        self._config = config
        self._registers = registers
        self._dsa = dsa
        self._function = function
        self._handles: set[int] = set()
        self.injected: list[InjectedRefusal] = []
        self._table: dict[int, Callable[[int], Awaitable[int]]] = {
            lib.IDXD_CMD_ENABLE_DEVICE: self._enable_device,
            lib.IDXD_CMD_DISABLE_DEVICE: self._disable_device,
            lib.IDXD_CMD_DRAIN_ALL: self._drain_all,
            lib.IDXD_CMD_ABORT_ALL: self._abort_all,
            lib.IDXD_CMD_RESET_DEVICE: self._reset_device,
            lib.IDXD_CMD_ENABLE_WQ: self._enable_wq,
            lib.IDXD_CMD_DISABLE_WQ: self._disable_wq,
            lib.IDXD_CMD_DRAIN_WQ: self._drain_wq,
            lib.IDXD_CMD_ABORT_WQ: self._abort_wq,
            lib.IDXD_CMD_RESET_WQ: self._reset_wq,
            lib.IDXD_CMD_DRAIN_PASID: self._drain_pasid,
            lib.IDXD_CMD_ABORT_PASID: self._abort_pasid,
            lib.IDXD_CMD_REQUEST_INT_HANDLE: self._request_int_handle,
            lib.IDXD_CMD_RELEASE_INT_HANDLE: self._release_int_handle,
        }

    async def execute(self, value: int) -> tuple[int, int]:
        """Runs what was written to CMD; the error code and the result for CMDSTS."""
        command = (value & lib.IDXD_CMD_MASK) >> lib.IDXD_CMD_SHIFT
        try:
            _require(not self._halted(command), lib.IDXD_CMDSTS_HW_ERR)
            _require(command in self._config.commands, lib.IDXD_CMDSTS_INVAL_CMD)
            _require(not value & lib.IDXD_CMD_RSVD_MASK, lib.IDXD_CMDSTS_ERR_RSVD)
            self._fail_as_injected(command)
            return lib.IDXD_CMDSTS_SUCCESS, await self._table[command](value & lib.IDXD_CMD_OPERAND_MASK)
        except CommandError as refused:
            return refused.code, 0

    def _fail_as_injected(self, command: int) -> None:
        for refusal in self.injected:
            if refusal.command in (None, command):
                refusal.times -= 1
                if not refusal.times:
                    self.injected.remove(refusal)
                raise CommandError(refusal.code)

    def _halted(self, command: int) -> bool:
        """A halted device takes no command but, where a software reset is enough, that one."""
        registers = self._registers
        if registers.state != lib.IDXD_DEVICE_STATE_HALT:
            return False
        software = registers.reset_type == lib.IDXD_DEVICE_RESET_SOFTWARE
        return not (software and command == lib.IDXD_CMD_RESET_DEVICE)

    def halt(self, reset_type: int) -> None:
        """The halt state (Intel DSA 1.2 9.2, GENSTS): what was in flight is gone, nothing is taken."""
        lib.pv_dsa_halt(self._dsa, 1)
        self.abort(range(self._config.wqs))
        self._registers.state = lib.IDXD_DEVICE_STATE_HALT
        self._registers.reset_type = reset_type
        if self._registers.genctrl & lib.IDXD_GENCTRL_HALT_INT_EN:
            lib.pv_dsa_cause(self._dsa, lib.IDXD_INTC_HALT_STATE)

    def reset(self) -> None:
        """Everything in flight forgotten, WQs and device disabled, the configuration as after power-on.

        DMA is cancelled meanwhile. Does not wait for anything but the engine's current step.
        """
        wqs = range(self._config.wqs)
        for wq in wqs:
            lib.pv_dsa_wq_close(self._dsa, wq)
        self.abort(wqs)
        for wq in wqs:
            self._wq_disabled(wq)
        self._registers.state = lib.IDXD_DEVICE_STATE_DISABLED
        self._registers.reset_type = lib.IDXD_DEVICE_RESET_SOFTWARE
        lib.pv_dsa_halt(self._dsa, 0)
        self._registers.reset_configuration()
        lib.pv_dsa_set_genctrl(self._dsa, 0)
        lib.pv_dsa_intcause_clear(self._dsa, 0xFFFFFFFF)
        lib.pv_dsa_swerr_clear(self._dsa, lib.IDXD_SWERR_ACK)

    def release_all_handles(self) -> None:
        """As after a function level reset: no handle is out, every vector allowed."""
        self._handles.clear()
        self._registers.reset_permissions()
        for vector in range(1, self._config.vectors):
            self.update_handle(vector)

    def update_handle(self, vector: int) -> None:
        """Tells the data path whether a vector's handle is valid: out, and allowed by MSIX_PERM."""
        out = not self._config.int_handles or vector in self._handles
        valid = vector > 0 and out and self._registers.vector_allowed(vector)
        lib.pv_dsa_set_handle(self._dsa, self._handle(vector), vector if valid else -1)

    def _handle(self, vector: int) -> int:
        # Requested handles differ from the table index, so that who confuses the two finds out.
        return vector + self._config.vectors if self._config.int_handles else vector

    def abort(self, wqs: Iterable[int]) -> None:
        """Forgets the work of WQs; of the others none is lost."""
        chosen = set(wqs)
        self._function.cancel_dma(True)
        lib.pv_dsa_abort(self._dsa, ffi.new("uint8_t[]", [wq in chosen for wq in range(self._config.wqs)]))
        self._function.cancel_dma(False)
        lib.pv_engine_kick(lib.pv_dsa_engine(self._dsa))

    def _paused(self) -> AbstractAsyncContextManager[None]:
        """Between two steps of the engine. A reset that comes meanwhile cancels."""
        return paused(lib.pv_dsa_engine(self._dsa), self._function.bus)

    async def _drain(self, wqs: Iterable[int]) -> None:
        """Waits until everything submitted so far to these WQs is done."""
        marks = [(wq, lib.pv_dsa_wq_mark(self._dsa, wq)) for wq in wqs]
        fd = lib.pv_dsa_watch_fd(self._dsa)
        lib.pv_dsa_watch(self._dsa, 1)
        try:
            while not all(lib.pv_dsa_wq_drained(self._dsa, wq, mark) for wq, mark in marks):
                await trio.lowlevel.wait_readable(fd)
                os.read(fd, 8)
        finally:
            lib.pv_dsa_watch(self._dsa, 0)

    async def _close(self, wqs: Iterable[int]) -> None:
        """Disables WQs once their work is done."""
        wqs = list(wqs)
        for wq in wqs:
            lib.pv_dsa_wq_close(self._dsa, wq)
            self._registers.wq_state[wq] = lib.IDXD_WQ_STATE_BUSY
        await self._drain(wqs)
        async with self._paused():
            for wq in wqs:
                self._wq_disabled(wq)

    def _wq_disabled(self, wq: int) -> None:
        lib.pv_dsa_wq_disable(self._dsa, wq)
        self._registers.wq_state[wq] = lib.IDXD_WQ_STATE_DISABLED
        lib.pv_dsa_occupancy_watch(self._dsa, wq, -1, 0)
        lib.pv_dsa_occupancy_clear(self._dsa, wq)

    def _enabled_wqs(self) -> list[int]:
        states = self._registers.wq_state
        return [wq for wq, state in enumerate(states) if state == lib.IDXD_WQ_STATE_ENABLED]

    def _require_enabled(self) -> None:
        enabled = self._registers.state == lib.IDXD_DEVICE_STATE_ENABLED
        _require(enabled, lib.IDXD_CMDSTS_ERR_DIS_DEV_EN)

    # The device.

    async def _enable_device(self, operand: int) -> int:
        disabled = self._registers.state == lib.IDXD_DEVICE_STATE_DISABLED
        _require(disabled, lib.IDXD_CMDSTS_ERR_DEV_ENABLED)
        _require(self._function.master_enabled, lib.IDXD_CMDSTS_ERR_BUSMASTER_EN)
        sizes = [self._registers.wq_config(wq).wq_size for wq in range(self._config.wqs)]
        _require(sum(sizes) <= self._config.total_wq_size, lib.IDXD_CMDSTS_ERR_WQ_SIZE_ERANGE)
        groups = [self._registers.group(group) for group in range(self._config.groups)]
        self._check_groups(groups, sizes)
        self._check_read_buffers([flags for _, _, flags in groups if flags])
        self._check_event_log()
        self._assign(groups)
        self._registers.state = lib.IDXD_DEVICE_STATE_ENABLED
        return 0

    def _check_groups(self, groups: list[tuple[int, int, int]], sizes: list[int]) -> None:
        paired = all(bool(wqs) == bool(engines) for wqs, engines, _ in groups)
        _require(paired and any(wqs for wqs, _, _ in groups), lib.IDXD_CMDSTS_ERR_GRP_CONFIG)
        _require(_disjoint([wqs for wqs, _, _ in groups], self._config.wqs), lib.IDXD_CMDSTS_ERR_GRP_CONFIG2)
        assigned = sum(wqs for wqs, _, _ in groups)
        homeless = any(size and not assigned >> wq & 1 for wq, size in enumerate(sizes))
        _require(not homeless, lib.IDXD_CMDSTS_ERR_GRP_CONFIG2)
        engines = [engines for _, engines, _ in groups]
        _require(_disjoint(engines, self._config.engines), lib.IDXD_CMDSTS_ERR_GRP_CONFIG3)

    def _check_read_buffers(self, groups: list[int]) -> None:
        """Read buffers: reserved over all groups, and allowed per group, of those there are."""
        mask = lib.IDXD_GRPFLAGS_RDBUFS_MASK
        reserved = [flags >> lib.IDXD_GRPFLAGS_RDBUFS_RESERVED_SHIFT & mask for flags in groups]
        allowed = [flags >> lib.IDXD_GRPFLAGS_RDBUFS_ALLOWED_SHIFT & mask for flags in groups]
        fits = (
            sum(reserved) <= self._config.read_buffers
            and max(allowed, default=0) <= self._config.read_buffers
        )
        fits = fits and all(r <= a for r, a in zip(reserved, allowed, strict=True) if r)
        _require(fits, lib.IDXD_CMDSTS_ERR_GRP_CONFIG4)
        limited = any(flags & lib.IDXD_GRPFLAGS_USE_RDBUF_LIMIT for flags in groups)
        limit = self._registers.gencfg & lib.IDXD_GENCFG_RDBUF_LIMIT_MASK
        _require(not limited or 0 < limit <= self._config.read_buffers, lib.IDXD_CMDSTS_ERR_CONFIG)

    def _check_event_log(self) -> None:
        """At least 64 entries; no PASID to write them with, for there is none on this bus."""
        registers = self._registers
        if registers.gencfg & lib.IDXD_GENCFG_EVL_EN:
            fits = registers.event_log_size >= lib.IDXD_EVL_SIZE_MIN
            _require(fits and not registers.evlcfg & lib.IDXD_EVLCFG_PASID_EN, lib.IDXD_CMDSTS_ERR_CONFIG)

    def _assign(self, groups: list[tuple[int, int, int]]) -> None:
        wqs = ffi.new("int16_t[]", [-1] * self._config.wqs)
        engines = ffi.new("int16_t[]", [-1] * self._config.engines)
        for number, (wq_bits, engine_bits, _) in enumerate(groups):
            for array, bits in ((wqs, wq_bits), (engines, engine_bits)):
                for index in range(len(array)):
                    if bits >> index & 1:
                        array[index] = number
        lib.pv_dsa_assign(self._dsa, wqs, engines)

    async def _disable_device(self, operand: int) -> int:
        self._require_enabled()
        self._registers.state = lib.IDXD_DEVICE_STATE_DRAIN
        await self._close(self._enabled_wqs())
        self._registers.state = lib.IDXD_DEVICE_STATE_DISABLED
        return 0

    async def _drain_all(self, operand: int) -> int:
        self._require_enabled()
        await self._drain(self._enabled_wqs())
        return 0

    async def _abort_all(self, operand: int) -> int:
        self._require_enabled()
        self.abort(range(self._config.wqs))
        return 0

    async def _reset_device(self, operand: int) -> int:
        self.reset()
        return 0

    # Work queues.

    async def _enable_wq(self, wq: int) -> int:
        _require(wq < self._config.wqs, lib.IDXD_CMDSTS_INVAL_WQIDX)
        enabled = self._registers.state == lib.IDXD_DEVICE_STATE_ENABLED
        _require(enabled, lib.IDXD_CMDSTS_ERR_DEV_NOTEN)
        disabled = self._registers.wq_state[wq] == lib.IDXD_WQ_STATE_DISABLED
        _require(disabled, lib.IDXD_CMDSTS_ERR_WQ_ENABLED)
        raw = self._wq_parameters(self._registers.wq_config(wq))
        async with self._paused():
            _require(lib.pv_dsa_wq_enable(self._dsa, wq, raw) == 0, lib.IDXD_CMDSTS_HW_ERR)
        self._registers.wq_state[wq] = lib.IDXD_WQ_STATE_ENABLED
        self.watch_occupancy(wq)
        return 0

    def watch_occupancy(self, wq: int) -> None:
        """Tells the data path what WQCFG says of an enabled WQ's occupancy interrupt."""
        wqcfg = self._registers.wq_config(wq)
        enabled = self._registers.wq_state[wq] == lib.IDXD_WQ_STATE_ENABLED
        vector = self._occupancy_vector(wqcfg.occupancy_inth)
        valid = enabled and vector is not None
        lib.pv_dsa_occupancy_watch(
            self._dsa, wq, vector if valid else -1, wqcfg.occupancy_limit if valid else 0
        )

    def _occupancy_vector(self, handle: int) -> int | None:
        """The vector of an occupancy interrupt handle; handle 0 is the device's own vector."""
        if handle & lib.IDXD_WQCFG_OCCUPANCY_TABLE_IMS:
            return None
        if handle == 0:
            return 0
        vector = handle - self._config.vectors if self._config.int_handles else handle
        out = not self._config.int_handles or vector in self._handles
        valid = 0 < vector < self._config.vectors and out and self._registers.vector_allowed(vector)
        return vector if valid else None

    def _wq_parameters(self, wqcfg: Any) -> Any:
        """A WQCFG checked, as the data path takes it."""
        config = self._config
        _require(wqcfg.wq_size, lib.IDXD_CMDSTS_ERR_WQ_SIZE)
        priority = (wqcfg.mode & lib.IDXD_WQCFG_PRIORITY_MASK) >> lib.IDXD_WQCFG_PRIORITY_SHIFT
        _require(priority or not config.priority, lib.IDXD_CMDSTS_ERR_WQ_PRIOR)
        dedicated = bool(wqcfg.mode & lib.IDXD_WQCFG_MODE_DEDICATED)
        _require(config.dedicated if dedicated else config.shared, lib.IDXD_CMDSTS_ERR_WQ_MODE)
        _require(dedicated or 0 < wqcfg.wq_thresh <= wqcfg.wq_size, lib.IDXD_CMDSTS_ERR_WQ_MODE)
        bof = bool(wqcfg.mode & lib.IDXD_WQCFG_BOF)
        _require(config.block_on_fault or not bof, lib.IDXD_CMDSTS_ERR_BOF_EN)
        _require(not wqcfg.mode & lib.IDXD_WQCFG_PASID_EN, lib.IDXD_CMDSTS_ERR_PASID_EN)
        _require(not wqcfg.mode & lib.IDXD_WQCFG_PRIV, lib.IDXD_CMDSTS_ERR_PRIV_EN)
        ats_disable = wqcfg.mode & lib.IDXD_WQCFG_ATS_DISABLE
        _require(config.wq_ats or not ats_disable, lib.IDXD_CMDSTS_ERR_WQ_ATS)
        interrupt = wqcfg.occupancy_limit & lib.IDXD_WQCFG_OCCUPANCY_INT_EN
        known = self._occupancy_vector(wqcfg.occupancy_inth) is not None
        _require(known or not interrupt, lib.IDXD_CMDSTS_ERR_OCCUPANCY_INT)
        batch = (wqcfg.limits & lib.IDXD_WQCFG_MAX_BATCH_SHIFT_MASK) >> lib.IDXD_WQCFG_MAX_BATCH_SHIFT_SHIFT
        _require(batch <= config.max_batch_shift, lib.IDXD_CMDSTS_ERR_MAX_BATCH_SIZE)
        xfer = wqcfg.limits & lib.IDXD_WQCFG_MAX_XFER_SHIFT_MASK
        _require(xfer <= config.max_xfer_shift, lib.IDXD_CMDSTS_ERR_MAX_XFER_SIZE)
        values = {
            "size": wqcfg.wq_size,
            "threshold": wqcfg.wq_thresh,
            "dedicated": dedicated,
            "priority": priority if config.priority else 1,
            "bof": bof,
            "ats_disable": bool(ats_disable),
            "max_xfer_shift": xfer,
            "max_batch_shift": batch,
            "op_config": list(wqcfg.op_config),
        }
        return ffi.new("struct pv_dsa_wq_config *", values)

    def _wqs(self, operand: int) -> list[int]:
        """The WQs an operand names: 16 bits from 16 times the number in its bits 19:16 on; all must be enabled."""
        wqs = [(operand >> 16) * 16 + bit for bit in range(16) if operand >> bit & 1]
        _require(wqs and max(wqs) < self._config.wqs, lib.IDXD_CMDSTS_INVAL_WQIDX)
        _require(set(wqs) <= set(self._enabled_wqs()), lib.IDXD_CMDSTS_ERR_DEV_NOT_EN)
        return wqs

    async def _disable_wq(self, operand: int) -> int:
        await self._close(self._wqs(operand))
        return 0

    async def _drain_wq(self, operand: int) -> int:
        await self._drain(self._wqs(operand))
        return 0

    async def _abort_wq(self, operand: int) -> int:
        self.abort(self._wqs(operand))
        return 0

    async def _reset_wq(self, operand: int) -> int:
        wqs = self._wqs(operand)
        self.abort(wqs)
        async with self._paused():
            for wq in wqs:
                self._wq_disabled(wq)
                self._registers.reset_wq(wq)
        return 0

    # PASIDs: descriptors carry one in shared WQs only.

    async def _drain_pasid(self, operand: int) -> int:
        self._require_enabled()
        await self._drain(self._enabled_wqs())
        return 0

    async def _abort_pasid(self, operand: int) -> int:
        self._require_enabled()
        self._function.cancel_dma(True)
        lib.pv_dsa_abort_pasid(self._dsa, operand)
        self._function.cancel_dma(False)
        lib.pv_engine_kick(lib.pv_dsa_engine(self._dsa))
        return 0

    # Interrupt handles.

    async def _request_int_handle(self, operand: int) -> int:
        vector = operand & 0xFFFF
        known = operand < lib.CMD_INT_HANDLE_IMS and 0 < vector < self._config.vectors
        _require(known, lib.IDXD_CMDSTS_ERR_INVAL_INT_IDX)
        if vector not in self._handles:
            _require(len(self._handles) < self._config.int_handles, lib.IDXD_CMDSTS_ERR_NO_HANDLE)
            self._handles.add(vector)
            self.update_handle(vector)
        return self._handle(vector)

    async def _release_int_handle(self, operand: int) -> int:
        vector = operand - self._config.vectors
        _require(vector in self._handles, lib.IDXD_CMDSTS_ERR_NO_HANDLE_AT_IDX)
        self._handles.discard(vector)
        self.update_handle(vector)
        return 0


def _disjoint(bitmaps: list[int], count: int) -> bool:
    """No bit in two bitmaps, none at or above ``count``."""
    seen = 0
    for bitmap in bitmaps:
        if bitmap & seen or bitmap >> count:
            return False
        seen |= bitmap
    return True
