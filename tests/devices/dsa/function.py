"""A whole DSA function on a table bus, driven by its registers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import trio

from pvfio.abi import dtype_of, ffi, lib
from pvfio.devices.dsa import DsaConfig, DsaDevice
from pvfio.silicon import EngineKind, TableBus

IOVA = 0x100000
SIZE = 1 << 16
ACTIVE = lib.IDXD_CMDSTS_ACTIVE
DEDICATED = lib.IDXD_WQCFG_MODE_DEDICATED
PRIORITY_1 = 1 << lib.IDXD_WQCFG_PRIORITY_SHIFT
LIMITS = 10 << lib.IDXD_WQCFG_MAX_BATCH_SHIFT_SHIFT | 31


class Function:
    """A DSA and what a driver does with it; memory is at ``IOVA``."""

    def __init__(self, config: DsaConfig | None = None, engine: EngineKind = "inline") -> None:
        self.bus = TableBus()
        self.memory = np.zeros(SIZE, np.uint8)
        self.bus.map(IOVA, self.memory)
        self.device = DsaDevice(self.bus, engine=engine, config=config)
        self.config = self.device.dsa_config
        self.start()

    def start(self) -> None:
        """What a driver does before anything else: memory, bus master, MSI-X."""
        self.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
        assert self.device.msix is not None
        self.device.msix.control(True, False)
        for vector in range(self.config.vectors):
            base = self.config.msix_offset + 16 * vector
            self.write(base, 0xFEE00000, 8)
            self.write(base + 8, vector, 8)

    def read(self, offset: int, size: int = 8) -> int:
        return self.device.read(lib.IDXD_MMIO_BAR, offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.device.write(lib.IDXD_MMIO_BAR, offset, size, value)

    def order(self, command: int, operand: int = 0, flags: int = 0) -> None:
        """Writes CMD; nothing happens before the device's task runs."""
        self.write(lib.IDXD_CMD_OFFSET, command << lib.IDXD_CMD_SHIFT | operand | flags)
        assert self.read(lib.IDXD_CMDSTS_OFFSET, 4) == ACTIVE

    async def finish(self) -> int:
        """CMDSTS once it is not active any more."""
        while (status := self.read(lib.IDXD_CMDSTS_OFFSET, 4)) & ACTIVE:
            await trio.lowlevel.checkpoint()
        return status

    async def command(self, command: int, operand: int = 0, flags: int = 0) -> int:
        self.order(command, operand, flags)
        return await self.finish()

    def group(self, group: int, wqs: int, engines: int, flags: int = 0) -> None:
        base = self.config.grpcfg_offset + group * lib.IDXD_GRPCFG_SIZE
        self.write(base, wqs & 2**64 - 1, 8)
        self.write(base + lib.IDXD_GRPCFG_ENGINES_OFFSET, engines, 8)
        self.write(base + lib.IDXD_GRPCFG_FLAGS_OFFSET, flags, 8)

    def wq(
        self,
        wq: int,
        *,
        size: int = 16,
        threshold: int = 0,
        mode: int = DEDICATED | PRIORITY_1,
        limits: int = LIMITS,
    ) -> None:
        for word, value in enumerate((size, threshold, mode, limits)):
            self.write(self.wqcfg(wq, word), value)

    def wqcfg(self, wq: int, word: int) -> int:
        return self.config.wqcfg_offset + wq * self.config.wqcfg_stride + 4 * word

    def wq_state(self, wq: int = 0) -> int:
        return int(self.read(self.wqcfg(wq, 6), 4) >> lib.IDXD_WQCFG_STATE_SHIFT)

    def state(self) -> int:
        return int(self.read(lib.IDXD_GENSTATS_OFFSET, 4) & lib.IDXD_GENSTATS_STATE_MASK)

    def errors(self) -> int:
        return int(self.read(lib.IDXD_SWERR_OFFSET) >> lib.IDXD_SWERR_ERROR_SHIFT & 0xFF)

    async def configure(self, *wqs: int) -> None:
        """All engines and these WQs in group 0, everything enabled."""
        for wq in wqs or (0,):
            self.wq(wq)
        self.group(0, sum(1 << wq for wq in wqs or (0,)), (1 << self.config.engines) - 1)
        assert await self.command(lib.IDXD_CMD_ENABLE_DEVICE) == 0
        for wq in wqs or (0,):
            assert await self.command(lib.IDXD_CMD_ENABLE_WQ, wq) == 0

    def submit(self, opcode: int, wq: int = 0, *, record: int = 0, flags: int = 0, **fields: int) -> None:
        """One posted descriptor whose record is at ``IOVA`` plus 32 times ``record``."""
        desc = np.zeros(1, dtype_of("struct dsa_hw_desc"))
        flags |= lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR
        desc["flags_opcode"] = flags | opcode << lib.DSA_DESC_OPCODE_SHIFT
        desc["completion_addr"] = IOVA + 32 * record
        for name, value in fields.items():
            desc[name] = value
        portal = self.device.mmio(lib.IDXD_WQ_BAR)
        assert lib.pv_mmio_movdir64b(portal, wq * lib.IDXD_WQ_PORTAL_STRIDE, ffi.from_buffer(desc), 1) == 0

    def noop(self, wq: int = 0, record: int = 0) -> None:
        self.submit(lib.DSA_OPCODE_NOOP, wq, record=record)

    def block(self, wq: int = 0, record: int = 0) -> None:
        """A descriptor that waits for a page which is not there."""
        fields = {"dst_addr": 0xDEAD000, "xfer_size": 8}
        self.submit(lib.DSA_OPCODE_MEMFILL, wq, record=record, flags=lib.IDXD_OP_FLAG_BOF, **fields)

    def statuses(self, count: int) -> list[int]:
        return [int(status) for status in self.memory[: 32 * count : 32]]

    def interrupts(self) -> tuple[int, int]:
        """How many messages were sent, and the vector of the last."""
        count, _, data = self.bus.msis()
        return count, data


@asynccontextmanager
async def running(config: DsaConfig | None = None, engine: EngineKind = "inline") -> AsyncIterator[Function]:
    """A function whose task runs."""
    function = Function(config, engine)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(function.device.run)
            yield function
            nursery.cancel_scope.cancel()
    finally:
        function.device.close()
