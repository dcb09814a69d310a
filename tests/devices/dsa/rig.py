"""The DSA's data path in C on a plain table bus, driven without registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from pvfio.abi import dtype_of, ffi, lib
from pvfio.silicon import READ, WRITE, Engine, Msix, TableBus
from pvfio.silicon.engine import KINDS, EngineKind

MEMORY = 0x100000  # IOVA of the rig's memory
SIZE = 1 << 20
RECORDS = MEMORY + 0xF0000  # completion records, by index
LIST = MEMORY + 0xE0000  # descriptor lists
PAGE = 4096
CRAV_RCR = lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR
GENCAP = (
    lib.IDXD_GENCAP_BLOCK_ON_FAULT
    | lib.IDXD_GENCAP_OVERLAP_COPY
    | lib.IDXD_GENCAP_CACHE_CONTROL_MEM
    | lib.IDXD_GENCAP_DEST_READBACK
)


def descriptor(opcode: int, flags: int = CRAV_RCR, **fields: int) -> np.ndarray[Any, Any]:
    """One descriptor; the completion record is number 0 unless ``completion_addr`` says otherwise."""
    desc = np.zeros(1, dtype_of("struct dsa_hw_desc"))
    desc["flags_opcode"] = flags | opcode << lib.DSA_DESC_OPCODE_SHIFT
    if flags & lib.IDXD_OP_FLAG_CRAV:
        desc["completion_addr"] = RECORDS
    for name, value in fields.items():
        desc[name] = value
    return desc


def descriptors(*descs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One array of them (``np.concatenate`` would give a dtype without the unions)."""
    return np.frombuffer(b"".join(d.tobytes() for d in descs), dtype_of("struct dsa_hw_desc")).copy()


class Rig:
    """A DSA with one enabled dedicated WQ of 16 entries, and a megabyte of memory at ``MEMORY``."""

    def __init__(self, kind: EngineKind = "inline", *, gencap: int = GENCAP, wqs: int = 4) -> None:
        self.bus = TableBus()
        self.memory = np.zeros(SIZE, np.uint8)
        for page in range(0, SIZE, PAGE):
            self.map(MEMORY + page)
        self.msix = Msix(self.bus, 4)
        self.msix.control(True, False)
        for vector in range(4):
            self.msix.table_write(16 * vector, 8, 0xFEE00000)
            self.msix.table_write(16 * vector + 8, 8, 0x40 + vector)
        opcap = ffi.new("uint64_t[4]")
        lib.pv_dsa_opcodes(opcap)
        config = {"wqs": wqs, "groups": 4, "engines": 4, "handles": 4, "gencap": gencap, "opcap": list(opcap)}
        self.dsa = lib.pv_dsa_create(
            ffi.new("struct pv_dsa_config *", config), self.bus.ptr, self.msix.ptr, KINDS[kind]
        )
        assert self.dsa != ffi.NULL
        self.engine = Engine(lib.pv_dsa_engine(self.dsa), self, kind)
        self.portals = lib.pv_dsa_portals(self.dsa)
        for vector in range(1, 4):
            lib.pv_dsa_set_handle(self.dsa, vector, vector)
        lib.pv_dsa_decode(self.dsa, 1)
        self.assign([0] * wqs, [0] * 4)
        self.enable(0)

    def map(self, iova: int, perm: int = READ | WRITE) -> None:
        """Maps a page of the memory (again)."""
        self.bus.map(iova, self.memory[iova - MEMORY : iova - MEMORY + PAGE], perm)

    def unmap(self, iova: int) -> None:
        self.bus.unmap(iova, PAGE)

    def assign(self, wqs: list[int], engines: list[int]) -> None:
        lib.pv_dsa_assign(self.dsa, ffi.new("int16_t[]", wqs), ffi.new("int16_t[]", engines))

    def enable(self, wq: int, **fields: int) -> None:
        config = {"size": 16, "threshold": 0, "dedicated": 1, "priority": 1, "bof": 1} | fields
        config = {"max_xfer_shift": 31, "max_batch_shift": 10} | config
        raw = ffi.new("struct pv_dsa_wq_config *", config)
        raw.op_config[0:4] = [2**64 - 1] * 4
        assert lib.pv_dsa_wq_enable(self.dsa, wq, raw) == 0

    def submit(self, descs: np.ndarray[Any, Any], wq: int = 0, page: int = lib.IDXD_PORTAL_LIMITED) -> None:
        """Posted writes of descriptors, one after the other."""
        offset = wq * lib.IDXD_WQ_PORTAL_STRIDE + page * lib.IDXD_PORTAL_SIZE
        assert lib.pv_mmio_movdir64b(self.portals, offset, ffi.from_buffer(descs), len(descs)) == 0

    def enqcmd(self, desc: np.ndarray[Any, Any], wq: int = 0, page: int = lib.IDXD_PORTAL_LIMITED) -> int:
        offset = wq * lib.IDXD_WQ_PORTAL_STRIDE + page * lib.IDXD_PORTAL_SIZE
        return int(lib.pv_mmio_enqcmd(self.portals, offset, ffi.from_buffer(desc)))

    def at(self, iova: int, size: int) -> np.ndarray[Any, Any]:
        """The bytes at an IOVA, to look at and to change."""
        return self.memory[iova - MEMORY : iova - MEMORY + size]

    def records(self, count: int = 1) -> np.ndarray[Any, Any]:
        return self.at(RECORDS, 32 * count).view(dtype_of("struct dsa_completion_record"))

    @property
    def record(self) -> Any:
        return self.records()[0]

    def run(self, opcode: int, flags: int = CRAV_RCR, **fields: int) -> Any:
        """Submits one descriptor to WQ 0 of an inline engine and gives its completion record."""
        self.at(RECORDS, 32)[:] = 0
        self.submit(descriptor(opcode, flags, **fields))
        return self.record

    def batch(self, members: np.ndarray[Any, Any], flags: int = CRAV_RCR, **fields: int) -> Any:
        """Runs a batch; its own record is number 0, the members' follow where they say so."""
        self.at(LIST, members.nbytes)[:] = members.view(np.uint8)
        return self.run(lib.DSA_OPCODE_BATCH, flags, desc_list_addr=LIST, desc_count=len(members), **fields)

    @property
    def handed(self) -> int:
        """Descriptors begun."""
        return self.engine.stats().gates

    def interrupts(self) -> int:
        """Messages sent so far."""
        return self.bus.msis()[0]

    def abort(self, *wqs: int) -> None:
        self.bus.cancel(True)
        lib.pv_dsa_abort(self.dsa, ffi.new("uint8_t[]", [i in wqs for i in range(4)]))
        self.bus.cancel(False)
        self.engine.kick()

    def swerr(self) -> Any:
        out = ffi.new("struct dsa_swerr *")
        lib.pv_dsa_swerr(self.dsa, out)
        return out

    def close(self) -> None:
        lib.pv_dsa_destroy(self.dsa)
