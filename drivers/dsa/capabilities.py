"""What a DSA says about itself in its capability registers (Intel DSA 1.2 chapter 9; offsets in abi/dsa.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvfio.abi import lib

if TYPE_CHECKING:
    from pvfio.vfio import Region

__all__ = ["Capabilities", "read_capabilities"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capability registers, decoded. Sizes are in bytes and descriptors, table places are offsets in
    BAR0.
    """

    version: int
    gencap: int
    wqcap: int
    grpcap: int
    engcap: int
    opcap: int
    cmdcap: int
    tables: int

    @property
    def configurable(self) -> bool:
        """GENCAP.config_en: software writes the configuration; otherwise it is fixed and is read."""
        return bool(self.gencap & lib.IDXD_GENCAP_CONFIG_EN)

    @property
    def block_on_fault(self) -> bool:
        return bool(self.gencap & lib.IDXD_GENCAP_BLOCK_ON_FAULT)

    @property
    def max_transfer_shift(self) -> int:
        mask: int = lib.IDXD_GENCAP_MAX_XFER_SHIFT_MASK
        return (self.gencap & mask) >> int(lib.IDXD_GENCAP_MAX_XFER_SHIFT_SHIFT)

    @property
    def max_batch_shift(self) -> int:
        mask: int = lib.IDXD_GENCAP_MAX_BATCH_SHIFT_MASK
        return (self.gencap & mask) >> int(lib.IDXD_GENCAP_MAX_BATCH_SHIFT_SHIFT)

    @property
    def total_wq_size(self) -> int:
        return self.wqcap & int(lib.IDXD_WQCAP_TOTAL_WQ_SIZE_MASK)

    @property
    def num_wqs(self) -> int:
        return (self.wqcap & int(lib.IDXD_WQCAP_NUM_WQS_MASK)) >> int(lib.IDXD_WQCAP_NUM_WQS_SHIFT)

    @property
    def wqcfg_stride(self) -> int:
        mask: int = lib.IDXD_WQCAP_WQCFG_SIZE_MASK
        return 1 << (((self.wqcap & mask) >> int(lib.IDXD_WQCAP_WQCFG_SIZE_SHIFT)) + int(lib.IDXD_WQCFG_MIN))

    @property
    def shared_mode(self) -> bool:
        return bool(self.wqcap & lib.IDXD_WQCAP_SHARED_MODE)

    @property
    def dedicated_mode(self) -> bool:
        return bool(self.wqcap & lib.IDXD_WQCAP_DEDICATED_MODE)

    @property
    def wq_ats(self) -> bool:
        """Whether ATS can be disabled for a work queue."""
        return bool(self.wqcap & lib.IDXD_WQCAP_WQ_ATS_SUPPORT)

    @property
    def op_config(self) -> bool:
        """WQCFG has a bit map of permitted operations."""
        return bool(self.wqcap & lib.IDXD_WQCAP_OP_CONFIG)

    @property
    def event_log(self) -> bool:
        """GENCAP says that there is one, with entries of 64 bytes."""
        mask: int = lib.IDXD_GENCAP_EVL_SUPPORT_MASK
        return (self.gencap & mask) >> int(lib.IDXD_GENCAP_EVL_SUPPORT_SHIFT) == 1

    @property
    def num_groups(self) -> int:
        return self.grpcap & int(lib.IDXD_GRPCAP_NUM_GROUPS_MASK)

    @property
    def num_engines(self) -> int:
        return self.engcap & int(lib.IDXD_ENGCAP_NUM_ENGINES_MASK)

    def has_operation(self, opcode: int) -> bool:
        """OPCAP: the device implements that opcode."""
        return bool(self.opcap >> opcode & 1)

    def has_command(self, command: int) -> bool:
        """CMDCAP, or, where the device has none, the commands every DSA has (1 to 10)."""
        if self.gencap & lib.IDXD_GENCAP_CMD_CAP:
            return bool(self.cmdcap >> command & 1)
        return 0 < command <= int(lib.IDXD_CMD_RESET_WQ)

    def _table(self, shift: int) -> int:
        return (self.tables >> shift & int(lib.IDXD_TABLE_FIELD_MASK)) * int(lib.IDXD_TABLE_MULT)

    @property
    def grpcfg_offset(self) -> int:
        return self._table(lib.IDXD_TABLE_GRPCFG_SHIFT)

    @property
    def wqcfg_offset(self) -> int:
        return self._table(lib.IDXD_TABLE_WQCFG_SHIFT)

    @property
    def msix_perm_offset(self) -> int:
        """0: absent."""
        return self._table(lib.IDXD_TABLE_MSIX_PERM_SHIFT)


async def read_capabilities(registers: Region) -> Capabilities:
    """Reads them all from BAR0; CMDCAP only where GENCAP says it is there. Cancelling leaves nothing behind."""
    gencap = await registers.read(lib.IDXD_GENCAP_OFFSET, 8)
    has_cmdcap = gencap & lib.IDXD_GENCAP_CMD_CAP
    opcap = [await registers.read(lib.IDXD_OPCAP_OFFSET + 8 * word, 8) for word in range(4)]
    tables = [await registers.read(lib.IDXD_TABLE_OFFSET + 8 * word, 8) for word in range(2)]
    return Capabilities(
        version=await registers.read(lib.IDXD_VER_OFFSET, 4),
        gencap=gencap,
        wqcap=await registers.read(lib.IDXD_WQCAP_OFFSET, 8),
        grpcap=await registers.read(lib.IDXD_GRPCAP_OFFSET, 8),
        engcap=await registers.read(lib.IDXD_ENGCAP_OFFSET, 8),
        opcap=sum(word << 64 * i for i, word in enumerate(opcap)),
        cmdcap=await registers.read(lib.IDXD_CMDCAP_OFFSET, 4) if has_cmdcap else 0,
        tables=tables[0] | tables[1] << 64,
    )
