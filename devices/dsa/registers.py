"""The DSA's registers as a driver sees them (Intel DSA 1.2 9.2): values, and which bits take writes when.

Capabilities are constants; GRPCFG, WQCFG and MSIX_PERM are tables in memory with a mask per word; SWERR and INTCAUSE
live in C, where engines report into them, as do the event log's head and tail. Registers take writes of 4 and 8
bytes, others are dropped. The event log can be configured while it is off, and turned on and off while the device is
disabled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from pvfio.abi import ffi, lib
from pvfio.devices.dsa.config import DsaConfig

__all__ = ["Registers"]

_MODE_ALWAYS: Final = lib.IDXD_WQCFG_PASID_MASK | lib.IDXD_WQCFG_PASID_EN | lib.IDXD_WQCFG_PRIV
_MODE: Final = (
    _MODE_ALWAYS
    | lib.IDXD_WQCFG_MODE_DEDICATED
    | lib.IDXD_WQCFG_BOF
    | lib.IDXD_WQCFG_ATS_DISABLE
    | lib.IDXD_WQCFG_PRIORITY_MASK
)
_LIMITS: Final = lib.IDXD_WQCFG_MAX_XFER_SHIFT_MASK | lib.IDXD_WQCFG_MAX_BATCH_SHIFT_MASK
_PERM: Final = (
    lib.IDXD_MSIX_PERM_IGNORE | lib.IDXD_MSIX_PERM_PASID_EN | 0xFFFFF << lib.IDXD_MSIX_PERM_PASID_SHIFT
)
_GROUP_FLAGS_LOW: Final = (
    lib.IDXD_GRPFLAGS_TC_A_MASK
    | lib.IDXD_GRPFLAGS_TC_B_MASK
    | lib.IDXD_GRPFLAGS_USE_RDBUF_LIMIT
    | lib.IDXD_GRPFLAGS_RDBUFS_MASK << lib.IDXD_GRPFLAGS_RDBUFS_RESERVED_SHIFT
    | lib.IDXD_GRPFLAGS_RDBUFS_MASK << lib.IDXD_GRPFLAGS_RDBUFS_ALLOWED_SHIFT
)
_SIZE, _THRESHOLD, _MODE_WORD, _LIMITS_WORD = 0, 1, 2, 3
_OCCUPANCY_HANDLE, _OCCUPANCY_LIMIT, _STATE_WORD, _OP_CONFIG = 4, 5, 6, 8
_OCCUPANCY: Final = 0x1FFFF
_EVLCFG_LOW: Final = lib.IDXD_EVLCFG_PASID_EN | lib.IDXD_EVLCFG_PRIV | 0xFFFFF000


class Registers:
    """BAR0, the MSI-X pages excepted.

    ``command`` is called with a value written to CMD; ``permissions`` with a vector whose MSIX_PERM changed. After
    the occupancy limit of an enabled WQ has changed, ``occupancy`` is called with its number.
    """

    def __init__(
        self,
        config: DsaConfig,
        dsa: Any,
        command: Callable[[int], None],
        permissions: Callable[[int], None],
        occupancy: Callable[[int], None],
    ) -> None:
        self.config = config
        self._dsa = dsa
        self._command = command
        self._permissions = permissions
        self._occupancy = occupancy
        self._swerr = ffi.new("struct dsa_swerr *")
        self.state: int = lib.IDXD_DEVICE_STATE_DISABLED
        self.reset_type: int = lib.IDXD_DEVICE_RESET_SOFTWARE
        self.cmdsts = 0
        self.gencfg = 0
        self.genctrl = 0
        self.evlcfg = 0
        self.wq_state = [lib.IDXD_WQ_STATE_DISABLED] * config.wqs
        self._wqcfg = bytearray(config.wqs * config.wqcfg_stride)
        self._grpcfg = bytearray(config.groups * lib.IDXD_GRPCFG_SIZE)
        self._perm = bytearray(config.vectors * lib.IDXD_MSIX_PERM_STRIDE)
        words = (config.gencap, config.wqcap, config.grpcap, config.engines)
        places = (
            lib.IDXD_GENCAP_OFFSET,
            lib.IDXD_WQCAP_OFFSET,
            lib.IDXD_GRPCAP_OFFSET,
            lib.IDXD_ENGCAP_OFFSET,
        )
        self._constants: dict[int, int] = dict(zip(places, words, strict=True))
        self._constants[lib.IDXD_VER_OFFSET] = config.version
        self._constants[lib.IDXD_CMDCAP_OFFSET] = config.cmdcap
        self._constants[lib.IDXD_TABLE_OFFSET] = config.tables & (1 << 64) - 1
        self._constants |= {lib.IDXD_OPCAP_OFFSET + 8 * i: word for i, word in enumerate(config.opcap)}
        self.reset_configuration()

    def reset_configuration(self) -> None:
        """GENCFG, GENCTRL, EVLCFG, GRPCFG and WQCFG as after power-on. WQs are disabled by now."""
        self.gencfg = 0
        self.genctrl = 0
        self.evlcfg = 0
        lib.pv_dsa_log_enable(self._dsa, 0, 0)
        if self.config.config_en:
            self._grpcfg[:] = bytes(len(self._grpcfg))
            for wq in range(self.config.wqs):
                self.reset_wq(wq, keep_size=False)
        else:
            self._fix_configuration()

    def reset_wq(self, wq: int, *, keep_size: bool = True) -> None:
        """A WQCFG as RESET_WQ leaves it: everything but the size is gone (Intel DSA 1.2 9.2)."""
        if not self.config.config_en:
            self._set_wq(wq, _MODE_WORD, self.wq_word(wq, _MODE_WORD) & ~_MODE_ALWAYS)
            return
        size = self.wq_word(wq, _SIZE) if keep_size else 0
        base = wq * self.config.wqcfg_stride
        self._wqcfg[base : base + self.config.wqcfg_stride] = bytes(self.config.wqcfg_stride)
        self._set_wq(wq, _SIZE, size)
        if self.config.op_config:
            struct.pack_into("<4Q", self._wqcfg, base + 4 * _OP_CONFIG, *self.config.opcap)

    def reset_permissions(self) -> None:
        """MSIX_PERM as after power-on."""
        self._perm[:] = bytes(len(self._perm))

    def _fix_configuration(self) -> None:
        """What a device without configuration support has: one dedicated WQ, all engines in group 0."""
        config = self.config
        struct.pack_into("<5Q", self._grpcfg, 0, 1, 0, 0, 0, (1 << config.engines) - 1)
        self._set_wq(0, _SIZE, config.total_wq_size)
        mode = lib.IDXD_WQCFG_MODE_DEDICATED | lib.IDXD_WQCFG_BOF * config.block_on_fault
        self._set_wq(0, _MODE_WORD, mode | 1 << lib.IDXD_WQCFG_PRIORITY_SHIFT)
        limits = config.max_batch_shift << lib.IDXD_WQCFG_MAX_BATCH_SHIFT_SHIFT | config.max_xfer_shift
        self._set_wq(0, _LIMITS_WORD, limits)
        if config.op_config:
            struct.pack_into("<4Q", self._wqcfg, 4 * _OP_CONFIG, *config.opcap)

    # What commands look at.

    def wq_word(self, wq: int, word: int) -> int:
        """A 32-bit word of a WQCFG, the state word as it was stored."""
        return int.from_bytes(
            self._wqcfg[(at := wq * self.config.wqcfg_stride + 4 * word) : at + 4], "little"
        )

    def _set_wq(self, wq: int, word: int, value: int) -> None:
        struct.pack_into("<I", self._wqcfg, wq * self.config.wqcfg_stride + 4 * word, value)

    def wq_config(self, wq: int) -> Any:
        """The WQCFG as ``struct dsa_wqcfg``; without op_config, all operations."""
        raw = ffi.new("struct dsa_wqcfg *")
        stride = self.config.wqcfg_stride
        ffi.memmove(raw, self._wqcfg[wq * stride : (wq + 1) * stride], stride)
        if not self.config.op_config:
            raw.op_config[0:4] = [(1 << 64) - 1] * 4
        return raw

    def group(self, group: int) -> tuple[int, int, int]:
        """WQ bitmap, engine bitmap and flags of a GRPCFG."""
        words = struct.unpack_from("<6Q", self._grpcfg, group * lib.IDXD_GRPCFG_SIZE)
        return sum(word << 64 * i for i, word in enumerate(words[:4])), words[4], words[5]

    def vector_allowed(self, vector: int) -> bool:
        """Whether descriptors, which carry no PASID, may use a vector (Intel DSA 1.2 9.2)."""
        word = int.from_bytes(self._perm[(at := vector * lib.IDXD_MSIX_PERM_STRIDE) : at + 4], "little")
        return bool(word & lib.IDXD_MSIX_PERM_IGNORE or not word & lib.IDXD_MSIX_PERM_PASID_EN)

    # What the bus does.

    def read(self, offset: int, size: int) -> int:
        """A naturally aligned load of 1, 2, 4 or 8 bytes; what is not there reads zero."""
        word = self._word(offset & ~7)
        return int(word >> 8 * (offset & 7) & (1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """A naturally aligned store of 4 or 8 bytes; shorter ones are dropped."""
        if size == 4:
            self._write32(offset, value)
        elif size == 8:
            self._write32(offset, value & 0xFFFFFFFF)
            self._write32(offset + 4, value >> 32)

    def _table(self, offset: int) -> tuple[bytearray, int] | None:
        config = self.config
        for table, start in (
            (self._grpcfg, config.grpcfg_offset),
            (self._wqcfg, config.wqcfg_offset),
            (self._perm, config.msix_perm_offset),
        ):
            if 0 <= offset - start < len(table):
                return table, offset - start
        return None

    def _word(self, offset: int) -> int:
        if offset in self._constants:
            return self._constants[offset]
        found = self._table(offset)
        if found is not None:
            table, at = found
            word = int.from_bytes(table[at : at + 8], "little")
            return self._with_state(word, at) if table is self._wqcfg else word
        match offset:
            case lib.IDXD_GENCFG_OFFSET:
                return self.gencfg
            case lib.IDXD_GENCTRL_OFFSET:
                return self.genctrl
            case lib.IDXD_GENSTATS_OFFSET:
                return self.state | self.reset_type << int(lib.IDXD_GENSTATS_RESET_TYPE_SHIFT)
            case lib.IDXD_EVLCFG_OFFSET:
                return self.evlcfg & (1 << 64) - 1
            case offset if offset == lib.IDXD_EVLCFG_OFFSET + 8:
                return self.evlcfg >> 64
            case lib.IDXD_EVLSTATUS_OFFSET:
                return int(lib.pv_dsa_log_status(self._dsa))
            case lib.IDXD_INTCAUSE_OFFSET:
                return int(lib.pv_dsa_intcause(self._dsa))
            case lib.IDXD_CMDSTS_OFFSET:
                return self.cmdsts
        if 0 <= offset - lib.IDXD_SWERR_OFFSET < 32:
            lib.pv_dsa_swerr(self._dsa, self._swerr)
            at = offset - lib.IDXD_SWERR_OFFSET
            return int.from_bytes(ffi.buffer(self._swerr)[at : at + 8], "little")
        return 0

    def _with_state(self, word: int, at: int) -> int:
        wq, at = divmod(at, self.config.wqcfg_stride)
        if at != 4 * _STATE_WORD:
            return word
        word |= self.wq_state[wq] << lib.IDXD_WQCFG_STATE_SHIFT
        if self.config.config_en and self.config.shared and self.config.dedicated:
            word |= lib.IDXD_WQCFG_MODE_SUPPORT
        if self.config.occupancy:
            word |= lib.pv_dsa_wq_occupancy(self._dsa, wq)
        if lib.pv_dsa_occupancy_pending(self._dsa, wq):
            word |= lib.IDXD_WQCFG_OCCUPANCY_INT
        return word

    def _write32(self, offset: int, value: int) -> None:
        match offset:
            case lib.IDXD_GENCFG_OFFSET:
                self._write_gencfg(value)
            case lib.IDXD_GENCTRL_OFFSET:
                self.genctrl = value & (
                    lib.IDXD_GENCTRL_SOFTERR_INT_EN
                    | lib.IDXD_GENCTRL_HALT_INT_EN
                    | lib.IDXD_GENCTRL_EVL_INT_EN * self.config.event_log
                )
                lib.pv_dsa_set_genctrl(self._dsa, self.genctrl)
            case lib.IDXD_INTCAUSE_OFFSET:
                lib.pv_dsa_intcause_clear(self._dsa, value)
            case lib.IDXD_CMD_OFFSET:
                self._command(value)
            case lib.IDXD_SWERR_OFFSET:
                lib.pv_dsa_swerr_clear(self._dsa, value)
            case _ if 0 <= offset - lib.IDXD_EVLCFG_OFFSET < 24:
                self._write_event_log(offset - lib.IDXD_EVLCFG_OFFSET, value)
            case _:
                self._write_table(offset, value)

    def _write_gencfg(self, value: int) -> None:
        # User-mode interrupts need the PASID this device does not have; the bit can be written nevertheless.
        keep = lib.IDXD_GENCFG_USER_INT_EN
        if self.config.config_en and self.config.read_buffer_control and self._disabled():
            keep |= lib.IDXD_GENCFG_RDBUF_LIMIT_MASK
        if self.config.event_log and self._disabled():
            keep |= lib.IDXD_GENCFG_EVL_EN
        was_on = self.gencfg & lib.IDXD_GENCFG_EVL_EN
        self.gencfg = self.gencfg & ~keep | value & keep
        if self.gencfg & lib.IDXD_GENCFG_EVL_EN != was_on:
            size = 0 if was_on else self.event_log_size
            lib.pv_dsa_log_enable(self._dsa, self.evlcfg & lib.IDXD_EVLCFG_BASE_MASK, size)

    @property
    def event_log_size(self) -> int:
        """EVLCFG's size, in entries."""
        return self.evlcfg >> 64 & int(lib.IDXD_EVLCFG_SIZE_MASK)

    def _write_event_log(self, at: int, value: int) -> None:
        """A word of EVLCFG (four words) or EVLSTATUS (two)."""
        if not self.config.event_log:
            return
        if at < 16:
            if not self.gencfg & lib.IDXD_GENCFG_EVL_EN:
                mask = (_EVLCFG_LOW, 0xFFFFFFFF, 0xFFFFFFFF, 0xF)[at // 4]  # size 15:0, PASID 35:16
                self.evlcfg = self.evlcfg & ~(0xFFFFFFFF << 8 * at) | (value & mask) << 8 * at
        elif at == 16:
            lib.pv_dsa_log_head(self._dsa, value & lib.IDXD_EVLSTATUS_HEAD_MASK)
        elif value << 32 & lib.IDXD_EVLSTATUS_INT_PENDING:
            lib.pv_dsa_log_clear_pending(self._dsa)

    def _disabled(self) -> bool:
        return bool(self.state == lib.IDXD_DEVICE_STATE_DISABLED)

    def _write_table(self, offset: int, value: int) -> None:
        found = self._table(offset)
        if found is None:
            return
        table, at = found
        if table is self._wqcfg:
            wq, inside = divmod(at, self.config.wqcfg_stride)
            if inside == 4 * _STATE_WORD and value & lib.IDXD_WQCFG_OCCUPANCY_INT:
                lib.pv_dsa_occupancy_clear(self._dsa, wq)
            mask = self._wq_mask(wq, inside)
        elif table is self._grpcfg:
            mask = self._group_mask(at % lib.IDXD_GRPCFG_SIZE)
        else:
            mask = _PERM if at % lib.IDXD_MSIX_PERM_STRIDE == 0 else 0
        old = int.from_bytes(table[at : at + 4], "little")
        struct.pack_into("<I", table, at, old & ~mask | value & mask)
        if table is self._perm:
            self._permissions(at // lib.IDXD_MSIX_PERM_STRIDE)
        elif table is self._wqcfg and inside == 4 * _OCCUPANCY_LIMIT:
            self._occupancy(wq)

    def _wq_mask(self, wq: int, at: int) -> int:
        """The writable bits: the size while the device is disabled, the occupancy limit always, the rest while the WQ
        is disabled.
        """
        word = at // 4
        if word == _OCCUPANCY_LIMIT:
            return int(_OCCUPANCY) if self.config.occupancy_interrupt else 0
        if self.wq_state[wq] != lib.IDXD_WQ_STATE_DISABLED:
            return 0
        if not self.config.config_en:
            return int(_MODE_ALWAYS) if word == _MODE_WORD else 0
        if word == _SIZE:
            return 0xFFFF if self._disabled() else 0
        if word >= _OP_CONFIG:
            return 0xFFFFFFFF
        if word == _OCCUPANCY_HANDLE:
            return int(_OCCUPANCY) if self.config.occupancy_interrupt else 0
        return int({_THRESHOLD: 0xFFFF, _MODE_WORD: _MODE, _LIMITS_WORD: _LIMITS}.get(word, 0))

    def _group_mask(self, at: int) -> int:
        if not self.config.config_en or not self._disabled():
            return 0
        if at < lib.IDXD_GRPCFG_FLAGS_OFFSET:
            return 0xFFFFFFFF
        return int(_GROUP_FLAGS_LOW) if at == lib.IDXD_GRPCFG_FLAGS_OFFSET else 0
