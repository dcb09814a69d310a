"""An NVMe controller driven raw: registers, an admin queue and one I/O queue, nothing in between.

The same rig stands on the bare function with a table bus, and on a machine through the VFIO library.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import trio
from numpy.typing import NDArray

from pvfio.abi import dtype_of, ffi, lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig, NvmeDevice
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.silicon import EngineKind, TableBus
from pvfio.vfio import Device
from tests.far_memory import FarMemory

Before = Callable[[int, int, bool], int]
Platform = Literal["intel", "amd"]
Place = Literal["table"] | Platform
PLACES: tuple[tuple[Place, EngineKind], ...] = (
    ("table", "inline"),
    ("intel", "inline"),
    ("intel", "thread"),
    ("amd", "inline"),
    ("amd", "thread"),
)
DNR = int(lib.NVME_STATUS_DNR)
MIB = 1 << 20
SIZE = 4 * MIB
ENTRIES = 64
_ASQ, _ACQ, _SQ, _CQ, _DATA = 0, 0x1000, 0x2000, 0x3000, 0x10000
_SMALL = (NamespaceSpec(size=MIB), NamespaceSpec(size=MIB, lba_shift=9))


@dataclass(frozen=True)
class Completion:
    """Status without the phase tag, and the command's result."""

    status: int
    result: int
    cid: int

    @property
    def code(self) -> int:
        """SCT and SC."""
        return self.status & int(lib.NVME_SC_MASK)

    @property
    def dnr(self) -> bool:
        return bool(self.status & DNR)


class Ring:
    """One queue pair."""

    def __init__(self, number: int, sq: NDArray[Any], cq: NDArray[Any]) -> None:
        self.number = number
        self.sq, self.cq = sq, cq
        self.tail = self.head = 0
        self.phase = 1
        self.next_cid = 0
        self.done: dict[int, Completion] = {}

    def collect(self) -> bool:
        """Takes what completed; whether there was anything."""
        found = False
        while self.cq["status"][self.head] & 1 == self.phase:
            entry = self.cq[self.head]
            result = int(entry["result"]) | int(entry["result_hi"]) << 32
            self.done[int(entry["cid"])] = Completion(int(entry["status"]) >> 1, result, int(entry["cid"]))
            self.head += 1
            found = True
            if self.head == len(self.cq):
                self.head, self.phase = 0, self.phase ^ 1
        return found


class Rig:
    """A controller and what a host has: memory at ``iova``, the registers, the queues."""

    far: FarMemory | None = None

    def __init__(
        self,
        device: NvmeDevice,
        memory: NDArray[np.uint8],
        iova: int,
        load: Callable[[int, int], int],
        store: Callable[[int, int, int], None],
        config_write: Callable[[int, int, int], None],
    ) -> None:
        self.device = device
        self.memory = memory
        self.iova = iova
        self.read = load
        self.write = store
        self.config_write = config_write
        self.config = device.nvme_config

    def rings(self) -> None:
        """Fresh queues, as after a reset."""
        self.admin_ring = self._ring(0, _ASQ, _ACQ)
        self.rings_of_io()

    def rings_of_io(self) -> None:
        """Fresh memory for queue pair 1."""
        self.io_ring = self._ring(1, _SQ, _CQ)

    def _ring(self, number: int, sq: int, cq: int) -> Ring:
        entries, completions = (self.memory[at : at + size * ENTRIES] for at, size in ((sq, 64), (cq, 16)))
        entries[:] = 0
        completions[:] = 0
        return Ring(
            number,
            entries.view(dtype_of("struct nvme_command")),
            completions.view(dtype_of("struct nvme_completion")),
        )

    @property
    def csts(self) -> int:
        return self.read(lib.NVME_REG_CSTS, 4)

    def enable(self, *, cc: int = 0, csi: int = lib.NVME_CC_CSS_IO) -> None:
        """CC.EN; the admin queue is empty."""
        self.rings()
        self.write(lib.NVME_REG_AQA, 4, ENTRIES - 1 | (ENTRIES - 1) << lib.NVME_AQA_ACQS_SHIFT)
        self.write(lib.NVME_REG_ASQ, 8, self.iova + _ASQ)
        self.write(lib.NVME_REG_ACQ, 8, self.iova + _ACQ)
        sizes = 6 << lib.NVME_CC_IOSQES_SHIFT | 4 << lib.NVME_CC_IOCQES_SHIFT
        self.write(lib.NVME_REG_CC, 4, lib.NVME_CC_ENABLE | sizes | csi << lib.NVME_CC_CSS_SHIFT | cc)

    def disable(self) -> None:
        self.write(lib.NVME_REG_CC, 4, 0)

    def reset(self) -> None:
        """A reset of the controller."""
        self.disable()
        self.enable()

    def doorbell(self, queue: int, tail: int, *, completion: bool = False) -> None:
        stride = 4 << self.config.dstrd
        self.write(lib.NVME_REG_DBS + (2 * queue + completion) * stride, 4, tail)

    def push(self, ring: Ring, opcode: int, **fields: Any) -> int:
        """A command into a ring, without its doorbell; its identifier."""
        entry = ring.sq[ring.tail : ring.tail + 1]
        entry.view(np.uint8)[:] = 0
        entry["opcode"], entry["cid"] = opcode, ring.next_cid
        for name, value in fields.items():
            entry[name] = value
        cid = int(entry["cid"][0])
        ring.done.pop(cid, None)
        ring.next_cid = (ring.next_cid + 1) % 0x1000
        ring.tail = (ring.tail + 1) % len(ring.sq)
        return cid

    def submit(self, opcode: int, *, ring: Ring | None = None, **fields: Any) -> int:
        ring = ring or self.admin_ring
        cid = self.push(ring, opcode, **fields)
        self.doorbell(ring.number, ring.tail)
        return cid

    async def wait(self, cid: int, *, ring: Ring | None = None) -> Completion:
        ring = ring or self.admin_ring
        with trio.fail_after(30):
            while cid not in ring.done:
                if ring.collect():
                    self.doorbell(ring.number, ring.head, completion=True)
                else:
                    await trio.lowlevel.checkpoint()
        return ring.done.pop(cid)

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits for what the device, or an engine's thread, makes true."""
        with trio.fail_after(30):
            while not condition():
                await trio.lowlevel.checkpoint()

    async def settle(self) -> None:
        """Lets the device do what it has been asked: a command goes around."""
        assert (await self.admin(lib.NVME_ADMIN_IDENTIFY, cdw10=lib.NVME_ID_CNS_CTRL)).status == 0

    @property
    def data(self) -> NDArray[np.uint8]:
        """The data buffer."""
        return self.memory[_DATA:]

    async def admin(self, opcode: int, *, data: bytes | None = None, **fields: Any) -> Completion:
        """An admin command; its data pointer is the data buffer unless it is said otherwise."""
        return await self.wait(self.submit(opcode, **self._buffer(data, fields)))

    async def io(self, opcode: int, *, data: bytes | None = None, **fields: Any) -> Completion:
        """An I/O command on queue 1."""
        fields.setdefault("nsid", 1)
        fields = self._buffer(data, fields)
        return await self.wait(self.submit(opcode, ring=self.io_ring, **fields), ring=self.io_ring)

    def _buffer(self, data: bytes | None, fields: dict[str, Any]) -> dict[str, Any]:
        if data is not None:
            self.data[: len(data)] = np.frombuffer(data, np.uint8)
        return {"prp1": self.iova + _DATA, "prp2": self.iova + _DATA + 4096, **fields}

    async def make_queues(self) -> None:
        """I/O queue pair 1."""
        size = (ENTRIES - 1) << 16
        contiguous = int(lib.NVME_QUEUE_PHYS_CONTIG)
        for opcode, base, cdw11 in (
            (lib.NVME_ADMIN_CREATE_CQ, _CQ, contiguous | lib.NVME_CQ_IRQ_ENABLED | 1 << 16),
            (lib.NVME_ADMIN_CREATE_SQ, _SQ, contiguous | 1 << 16),
        ):
            done = await self.admin(opcode, cdw10=size | 1, cdw11=cdw11, prp1=self.iova + base)
            assert done.status == 0

    async def identify(self, cns: int, nsid: int = 0, *, cdw11: int = 0, kind: str | None = None) -> Any:
        """Identify data: bytes, or a structure."""
        self.data[:4096] = 0xEE
        done = await self.admin(lib.NVME_ADMIN_IDENTIFY, nsid=nsid, cdw10=cns, cdw11=cdw11)
        assert done.status == 0, hex(done.status)
        return self._as(kind, 4096)

    async def log(
        self, lid: int, size: int = 4096, *, kind: str | None = None, offset: int = 0, retain: bool = False
    ) -> Any:
        """A log page: bytes, or a structure."""
        dwords = size // 4 - 1
        cdw10 = lid | (dwords & 0xFFFF) << 16 | lib.NVME_LOG_RAE * retain
        done = await self.admin(lib.NVME_ADMIN_GET_LOG_PAGE, cdw10=cdw10, cdw12=offset)
        assert done.status == 0, hex(done.status)
        return self._as(kind, size)

    def _as(self, kind: str | None, size: int) -> Any:
        raw = self.data[:size].tobytes()
        if kind is None:
            return raw
        made = ffi.new(f"struct {kind} *")
        ffi.memmove(made, raw, ffi.sizeof(f"struct {kind}"))
        return made

    async def set_feature(self, fid: int, value: int = 0, **fields: Any) -> Completion:
        save = lib.NVME_FEAT_SAVE * fields.pop("save", 0)
        return await self.admin(lib.NVME_ADMIN_SET_FEATURES, cdw10=fid | save, cdw11=value, **fields)

    async def get_feature(self, fid: int, *, select: int = 0, **fields: Any) -> Completion:
        return await self.admin(lib.NVME_ADMIN_GET_FEATURES, cdw10=fid | select << 8, **fields)

    async def events(self) -> int:
        """An asynchronous event request; its identifier."""
        cid = self.submit(lib.NVME_ADMIN_ASYNC_EVENT)
        await self.settle()
        return cid


def _on_table(
    config: NvmeConfig | None, specs: Sequence[NamespaceSpec], engine: EngineKind, far: Before | None
) -> Rig:
    bus = TableBus()
    memory = np.zeros(SIZE, np.uint8)
    iova = 0x100000
    far_memory = None if far is None else FarMemory(bus, far)
    (far_memory or bus).map(iova, memory)
    device = NvmeDevice(bus, engine=engine, config=config, namespaces=specs)
    rig = Rig(
        device,
        memory,
        iova,
        lambda offset, size: device.read(0, offset, size),
        lambda offset, size, value: device.write(0, offset, size, value),
        device.config_write,
    )
    rig.far = far_memory
    return rig


@asynccontextmanager
async def on_machine(
    config: NvmeConfig | None, namespaces: Sequence[NamespaceSpec], platform: Platform, engine: EngineKind
) -> AsyncIterator[tuple[Rig, Device]]:
    """A controller that nobody has touched, and its open device."""
    machine_config = MachineConfig(
        iommu=IommuConfig(platform=platform),
        engine=engine,
        ram=64 << 20,
        devices=(DeviceSpec(kind="nvme", options={"config": config, "namespaces": namespaces}),),
    )
    async with Machine(machine_config) as machine, machine.open("nvme0") as device:
        function = machine.devices["nvme0"].function
        assert isinstance(function, NvmeDevice)
        buffer = await device.container.alloc(SIZE)
        region, config_space = device.region(0), device.config
        assert buffer.iova is not None
        rig = Rig(
            function,
            np.asarray(buffer),
            buffer.iova,
            region.read_nowait,
            lambda offset, size, value: region.write_nowait(offset, value, size),
            lambda offset, size, value: config_space.write_nowait(offset, value, size),
        )
        yield rig, device


@asynccontextmanager
async def running(
    config: NvmeConfig | None = None,
    namespaces: Sequence[NamespaceSpec] = _SMALL,
    *,
    place: Place = "table",
    engine: EngineKind = "inline",
    enable: bool = True,
    far: Before | None = None,
) -> AsyncIterator[Rig]:
    """A controller whose task runs, enabled with an admin queue and I/O queue 1.

    ``far``: all of the memory of a table bus is remote, and this is called first whenever somebody asks for it.
    """
    if place == "table":
        rig = _on_table(config, namespaces, engine, far)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(rig.device.run)
                rig.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
                await _start(rig, enable)
                yield rig
                nursery.cancel_scope.cancel()
        finally:
            rig.device.close()
        return
    async with on_machine(config, namespaces, place, engine) as (rig, _):
        rig.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
        await _start(rig, enable)
        yield rig


async def _start(rig: Rig, enable: bool) -> None:
    rig.rings()
    if enable:
        rig.enable()
        assert rig.csts & lib.NVME_CSTS_RDY
        await rig.make_queues()
