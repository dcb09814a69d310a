"""What a DSA is capable of, and where its tables lie.

Models the capability registers (Intel DSA 1.2 9.2); the defaults are those of the first server parts, except
that command capabilities are reported. Not modelled: batch continuation, interrupt message storage,
performance monitoring: their bits read zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Self

from pvfio.abi import ffi, lib

__all__ = ["DsaConfig", "implemented_opcodes"]

# What users of Sapphire Rapids report of dsa0: version 0x100, gencap 0x40915f0107, 4 groups, 8 WQs of 128 entries
# together, 4 engines, 96 read buffers, opcap 0x1003f027d. Here the opcap has BATCH and the delta operations too; of
# gencap, the interrupt message storage multiple (bits 30:25) and the undocumented bit 38 stay 0.
_DSA_1_OPCODES: Final = 0x1003F03FF
# The second generation adds what Linux reads of it: event log, operation configuration, translation fetch, DIX.
_DSA_2_OPCODES: Final = _DSA_1_OPCODES | 1 << lib.DSA_OPCODE_TRANSL_FETCH | 1 << lib.DSA_OPCODE_DIX_GEN
_PRESETS: Final[dict[str, dict[str, Any]]] = {
    "dsa1.0": {"command_capabilities": False, "opcodes": _DSA_1_OPCODES},
    "dsa2.0": {
        "version": lib.IDXD_VERSION_2,
        "event_log": True,
        "op_config": True,
        "drain_readback": True,
        "int_handles": 8,
        "opcodes": _DSA_2_OPCODES,
    },
}

_GRPCFG: Final = 0x400
_PAGE: Final = 0x1000
_COMMANDS: Final = range(lib.IDXD_CMD_ENABLE_DEVICE, lib.IDXD_CMD_ABORT_PASID + 1)
_HANDLE_COMMANDS: Final = (lib.IDXD_CMD_REQUEST_INT_HANDLE, lib.IDXD_CMD_RELEASE_INT_HANDLE)


def implemented_opcodes() -> frozenset[int]:
    """The opcodes the engine has code for."""
    words = ffi.new("uint64_t[4]")
    lib.pv_dsa_opcodes(words)
    return frozenset(code for code in range(256) if words[code // 64] >> code % 64 & 1)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True, kw_only=True)
class DsaConfig:
    """Capabilities of one device.

    ``total_wq_size``: entries over all WQs. ``max_xfer_shift``, ``max_batch_shift``: powers of two, in bytes and
    descriptors. ``config_en`` false: the configuration is fixed, one dedicated WQ of the whole size in
    group 0 with all engines. ``vectors``: MSI-X, number 0 for the device itself. ``int_handles``: how
    many interrupt handles can be requested; 0: a handle is the MSI-X table index and the two commands are not
    there. ``opcodes``: fewer than are implemented. ``event_log``: entries of 64 bytes; ``occupancy_interrupt``,
    ``wq_ats``: the bits of WQCAP (a WQ with ATS disabled uses no device TLB). Raises ``ValueError`` for what no
    device can be.
    """

    wqs: int = 8
    groups: int = 4
    engines: int = 4
    total_wq_size: int = 128
    max_xfer_shift: int = 31
    max_batch_shift: int = 10
    config_en: bool = True
    block_on_fault: bool = True
    overlap_copy: bool = True
    cache_control: bool = True
    cache_control_flush: bool = False
    dest_readback: bool = True
    drain_readback: bool = False
    shared: bool = True
    dedicated: bool = True
    priority: bool = True
    occupancy: bool = True
    occupancy_interrupt: bool = False
    wq_ats: bool = False
    event_log: bool = False
    op_config: bool = False
    command_capabilities: bool = True
    int_handles: int = 0
    read_buffers: int = 96
    read_buffer_control: bool = True
    vectors: int = 9
    opcodes: frozenset[int] | None = None
    version: int = lib.IDXD_VERSION_1

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A part's values, as far as they are public: ``"dsa1.0"`` or ``"dsa2.0"``, of the operations those that
        are implemented; ``changes`` are fields that shall differ. Raises ``ValueError``.
        """
        if name not in _PRESETS:
            raise ValueError(f"a preset is one of {', '.join(_PRESETS)}, not {name!r}")
        values = dict(_PRESETS[name])
        values["opcodes"] = frozenset(code for code in implemented_opcodes() if values["opcodes"] >> code & 1)
        return cls(**values | changes)

    def __post_init__(self) -> None:
        limits = {
            "wqs": (1, 255),
            "groups": (1, 255),
            "engines": (1, 64),
            "total_wq_size": (1, 0xFFFF),
            "max_xfer_shift": (0, 31),
            "max_batch_shift": (1, 15),
            "read_buffers": (0, 255),
            "vectors": (2, 2048),
            "int_handles": (0, self.vectors - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {low} to {high}, not {value}")
        if not (self.shared or self.dedicated):
            raise ValueError("a WQ is shared or dedicated: at least one of the two")
        if self.occupancy_interrupt and not self.occupancy:
            raise ValueError("the occupancy interrupt needs the occupancy")
        if not (self.config_en or self.dedicated):
            raise ValueError("the fixed configuration has a dedicated WQ")
        if self.int_handles and not self.command_capabilities:
            raise ValueError("CMDCAP says that there are interrupt handles: it needs command_capabilities")
        unknown = (self.opcodes or frozenset()) - implemented_opcodes()
        if unknown:
            raise ValueError(f"no such operations: {', '.join(hex(code) for code in sorted(unknown))}")

    @cached_property
    def gencap(self) -> int:
        """GENCAP."""
        return int(
            lib.IDXD_GENCAP_BLOCK_ON_FAULT * self.block_on_fault
            | lib.IDXD_GENCAP_OVERLAP_COPY * self.overlap_copy
            | lib.IDXD_GENCAP_CACHE_CONTROL_MEM * self.cache_control
            | lib.IDXD_GENCAP_CACHE_CONTROL_CACHE * self.cache_control_flush
            | lib.IDXD_GENCAP_CMD_CAP * self.command_capabilities
            | lib.IDXD_GENCAP_DEST_READBACK * self.dest_readback
            | lib.IDXD_GENCAP_DRAIN_READBACK * self.drain_readback
            | int(self.event_log) << lib.IDXD_GENCAP_EVL_SUPPORT_SHIFT
            | self.max_xfer_shift << lib.IDXD_GENCAP_MAX_XFER_SHIFT_SHIFT
            | self.max_batch_shift << lib.IDXD_GENCAP_MAX_BATCH_SHIFT_SHIFT
            | lib.IDXD_GENCAP_CONFIG_EN * self.config_en
        )

    @cached_property
    def wqcap(self) -> int:
        """WQCAP."""
        return int(
            self.total_wq_size
            | self.wqs << lib.IDXD_WQCAP_NUM_WQS_SHIFT
            | int(self.op_config) << lib.IDXD_WQCAP_WQCFG_SIZE_SHIFT
            | lib.IDXD_WQCAP_SHARED_MODE * self.shared
            | lib.IDXD_WQCAP_DEDICATED_MODE * self.dedicated
            | lib.IDXD_WQCAP_PRIORITY * self.priority
            | lib.IDXD_WQCAP_WQ_ATS_SUPPORT * self.wq_ats
            | lib.IDXD_WQCAP_OCCUPANCY * self.occupancy
            | lib.IDXD_WQCAP_OCCUPANCY_INT * self.occupancy_interrupt
            | lib.IDXD_WQCAP_OP_CONFIG * self.op_config
        )

    @cached_property
    def grpcap(self) -> int:
        """GRPCAP."""
        return int(
            self.groups
            | self.read_buffers << lib.IDXD_GRPCAP_TOTAL_RDBUFS_SHIFT
            | (lib.IDXD_GRPCAP_RDBUF_CTRL | lib.IDXD_GRPCAP_RDBUF_LIMIT) * self.read_buffer_control
        )

    @cached_property
    def cmdcap(self) -> int:
        """CMDCAP, 0 where GENCAP does not announce it: a bit for every command."""
        return self._bits(self.commands) if self.command_capabilities else 0

    @cached_property
    def commands(self) -> frozenset[int]:
        """The commands this device knows."""
        return frozenset((*_COMMANDS, *(_HANDLE_COMMANDS if self.int_handles else ())))

    @cached_property
    def opcap(self) -> tuple[int, int, int, int]:
        """OPCAP, four words."""
        bits = self._bits(implemented_opcodes() if self.opcodes is None else self.opcodes)
        return tuple(bits >> 64 * word & (1 << 64) - 1 for word in range(4))  # type: ignore[return-value]

    @staticmethod
    def _bits(numbers: Iterable[int]) -> int:
        return sum(1 << number for number in numbers)

    # Where things lie in BAR0. Tables stand at multiples of 256 bytes, the MSI-X pages behind them.

    @property
    def wqcfg_stride(self) -> int:
        """Bytes of one WQCFG."""
        return int(1 << lib.IDXD_WQCFG_MIN + self.op_config)

    @property
    def grpcfg_offset(self) -> int:
        """GRPCFG's offset in bytes."""
        return _GRPCFG

    @property
    def wqcfg_offset(self) -> int:
        """WQCFG's offset in bytes."""
        return _up(self.grpcfg_offset + self.groups * lib.IDXD_GRPCFG_SIZE, lib.IDXD_TABLE_MULT)

    @property
    def msix_perm_offset(self) -> int:
        """MSIX_PERM's offset in bytes."""
        return _up(self.wqcfg_offset + self.wqs * self.wqcfg_stride, lib.IDXD_TABLE_MULT)

    @property
    def msix_offset(self) -> int:
        """The MSI-X pages' offset in bytes."""
        return _up(self.msix_perm_offset + self.vectors * int(lib.IDXD_MSIX_PERM_STRIDE), _PAGE)

    @property
    def tables(self) -> int:
        """TABLE_OFFSET, 128 bits."""
        places = (
            (self.grpcfg_offset, lib.IDXD_TABLE_GRPCFG_SHIFT),
            (self.wqcfg_offset, lib.IDXD_TABLE_WQCFG_SHIFT),
            (self.msix_perm_offset, lib.IDXD_TABLE_MSIX_PERM_SHIFT),
        )
        return sum(offset // int(lib.IDXD_TABLE_MULT) << int(shift) for offset, shift in places)
