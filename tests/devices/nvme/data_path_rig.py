"""The NVMe data path in C on a plain table bus: queues, commands and namespaces without registers or admin commands."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pvfio.abi import dtype_of, ffi, lib
from pvfio.silicon import READ, WRITE, Engine, Msix, TableBus
from pvfio.silicon.engine import KINDS, EngineKind

MEMORY = 0x100000  # IOVA of the rig's memory
SIZE = 0x400000
DATA = MEMORY + 0x100000  # for tests
LISTS = MEMORY + 0xE0000  # for PRP lists and SGL segments
PAGE = 4096
ENTRIES = 64  # of every I/O queue
VECTORS = 8
DNR = lib.NVME_STATUS_DNR

Bytes = NDArray[np.uint8]
Backing = Any


def command(opcode: int, nsid: int = 1, *, lba: int = 0, blocks: int = 1, **fields: int) -> Any:
    """One command; ``blocks`` of ``lba``, data at ``DATA`` unless ``prp1`` says otherwise."""
    out = np.zeros(1, dtype_of("struct nvme_command"))
    out["opcode"] = opcode
    out["nsid"] = nsid
    out["prp1"] = DATA
    out["cdw10"] = lba & 0xFFFFFFFF
    out["cdw11"] = lba >> 32
    out["cdw12"] = (blocks - 1) | fields.pop("control", 0)
    for name, value in fields.items():
        out[name] = value
    return out[0]


def wait_for(condition: Callable[[], Any]) -> Any:
    """What the condition gives as soon as it is true; the engine is a thread, and has two seconds."""
    stop = threading.Event()
    for _ in range(2000):
        if found := condition():
            return found
        stop.wait(0.001)
    raise AssertionError("nothing happened")


class Rig:
    """A controller with ``queues`` I/O queue pairs, pair N of vector N; its memory is mapped page by page."""

    def __init__(
        self,
        kind: EngineKind = "inline",
        *,
        queues: int = 1,
        ams: int = 0,
        dstrd: int = 0,
        poll: bool = False,
    ) -> None:
        self.bus = TableBus()
        self._raw = np.zeros(SIZE + PAGE, np.uint8)
        start = -self._raw.ctypes.data % PAGE
        self.memory: Bytes = self._raw[start : start + SIZE]
        for page in range(0, SIZE, PAGE):
            self.map(MEMORY + page)
        self.msix = Msix(self.bus, VECTORS)
        self.msix.control(True, False)
        for vector in range(VECTORS):
            self.msix.table_write(16 * vector, 4, 0xFEE00000)
            self.msix.table_write(16 * vector + 8, 4, vector)
            self.msix.table_write(16 * vector + 12, 4, 0)
        config = {"dstrd": dstrd, "mdts_shift": 5, "poll_doorbells": poll, "namespaces": 16}
        self.nvme = lib.pv_nvme_create(
            ffi.new("struct pv_nvme_config *", config), self.bus.ptr, self.msix.ptr, KINDS[kind]
        )
        assert self.nvme != ffi.NULL
        self.engine = Engine(lib.pv_nvme_engine(self.nvme), self, kind)
        self.mmio = lib.pv_nvme_mmio(self.nvme)
        self.stride = 4 << dstrd
        lib.pv_nvme_decode(self.nvme, 1)
        self._backings: list[Backing] = []
        self.enable(queues, ams)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.pause()
        lib.pv_nvme_destroy(self.nvme)
        for backing in self._backings:
            lib.pv_nvme_backing_put(backing)

    # Memory.

    def map(self, iova: int, perm: int = READ | WRITE) -> None:
        """Maps a page of the memory (again)."""
        self.bus.map(iova, self.memory[iova - MEMORY : iova - MEMORY + PAGE], perm)

    def unmap(self, iova: int) -> None:
        self.bus.unmap(iova, PAGE)

    def at(self, iova: int, size: int) -> Bytes:
        """The bytes at an IOVA, to look at and to change."""
        return self.memory[iova - MEMORY : iova - MEMORY + size]

    def put(self, iova: int, data: Any) -> None:
        """Stores an array, or bytes."""
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
        self.at(iova, len(raw))[:] = raw

    # Queues.

    def enable(self, queues: int = 1, ams: int = 0) -> None:
        """Enables with an admin queue and those I/O queue pairs."""
        assert lib.pv_nvme_enable(self.nvme, MEMORY, ENTRIES, MEMORY + 0x1000, ENTRIES, 12, ams) == 0
        self.memory[:0xA0000] = 0
        self.tail = [0] * (queues + 1)
        self.head = [0] * (queues + 1)
        self.cids = [0] * (queues + 1)
        for queue in range(1, queues + 1):
            self.create(queue)

    def create(self, queue: int, priority: int = 0, cq: int | None = None) -> None:
        """An I/O queue pair, or a submission queue for a completion queue that there is."""
        if cq is None:
            self.at(self.cq_base(queue), PAGE)[:] = 0
            args = (self.cq_base(queue), ENTRIES, 1, queue % VECTORS)
            assert lib.pv_nvme_create_cq(self.nvme, queue, *args) == 0
        args = (self.sq_base(queue), ENTRIES, cq or queue, priority)
        assert lib.pv_nvme_create_sq(self.nvme, queue, *args) == 0
        self.tail[queue] = self.head[queue] = 0

    @staticmethod
    def sq_base(queue: int) -> int:
        return MEMORY + 0x2000 * queue

    @staticmethod
    def cq_base(queue: int) -> int:
        return MEMORY + (0x1000 if queue == 0 else 0x80000 + 0x1000 * queue)

    def doorbell(self, index: int, value: int) -> None:
        """Stores to the doorbell with that index: twice the queue, and one more for a completion queue."""
        assert lib.pv_mmio_store(self.mmio, lib.NVME_REG_DBS + self.stride * index, 4, value) == 0

    def fill(self, *commands: Any, queue: int = 1) -> list[int]:
        """Puts commands into a submission queue and gives their command identifiers."""
        ring = self.at(self.sq_base(queue), 64 * ENTRIES).view(dtype_of("struct nvme_command"))
        cids = []
        for one in commands:
            cids.append(self.cids[queue])
            one["cid"] = self.cids[queue]
            self.cids[queue] = (self.cids[queue] + 1) % 65536
            ring[self.tail[queue]] = one
            self.tail[queue] = (self.tail[queue] + 1) % ENTRIES
        return cids

    def submit(self, *commands: Any, queue: int = 1) -> list[int]:
        """Puts commands into a submission queue, rings, and gives their command identifiers."""
        cids = self.fill(*commands, queue=queue)
        self.doorbell(2 * queue, self.tail[queue])
        return cids

    def peek(self, queue: int = 1) -> list[Any]:
        """The completions that are there, copied; the queue keeps them."""
        ring = self.at(self.cq_base(queue), 16 * ENTRIES).view(dtype_of("struct nvme_completion"))
        found = []
        for at in range(self.head[queue], self.head[queue] + ENTRIES - 1):
            entry = ring[at % ENTRIES]
            if (int(entry["status"]) & 1) != 1 - at // ENTRIES % 2:
                break
            found.append(entry.copy())
        return found

    def reap(self, queue: int = 1) -> list[tuple[int, int]]:
        """Takes all completions: (command identifier, status) of each."""
        found = self.peek(queue)
        self.head[queue] = (self.head[queue] + len(found)) % (2 * ENTRIES)
        if found:
            self.doorbell(2 * queue + 1, self.head[queue] % ENTRIES)
        return [(int(entry["cid"]), int(entry["status"]) >> 1) for entry in found]

    def run(self, one: Any, queue: int = 1) -> int:
        """The status of one command, on an inline engine."""
        [cid] = self.submit(one, queue=queue)
        [(done, status)] = self.reap(queue)
        assert done == cid
        return status

    def interrupts(self) -> int:
        """Messages sent so far."""
        return self.bus.msis()[0]

    def events(self) -> int:
        """What the data path had to say since the last call."""
        return int(lib.pv_nvme_events(self.nvme))

    def inject(self, action: int, **fields: int) -> int:
        """A rule's number or an error: ``opcode`` and ``cdw10`` match, the other fields are the rule's."""
        rule = ffi.new("struct pv_nvme_rule *", {"sq": -1, "action": action, "per_mille": 1000})
        for name, offset, size in (("opcode", 0, 1), ("cdw10", 40, 4)):
            if name in fields:
                for place, byte in enumerate(fields.pop(name).to_bytes(size, "little")):
                    rule.match[offset + place], rule.mask[offset + place] = byte, 0xFF
        for name, value in fields.items():
            setattr(rule, name, value)
        return int(lib.pv_nvme_inject(self.nvme, rule))

    # Namespaces.

    def memory_namespace(self, nsid: int = 1, size: int = 1 << 20, **format: int) -> Backing:
        """A namespace in memory."""
        backing = lib.pv_nvme_memory(size)
        assert backing != ffi.NULL
        return self.attach(nsid, backing, size, **format)

    def file_namespace(
        self, path: Any, nsid: int = 1, *, size: int = 0, read_only: bool = False, cache: bool = False
    ) -> Backing:
        """A namespace in an image file."""
        fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        try:
            size = size or os.fstat(fd).st_size
            backing = lib.pv_nvme_file(fd, size, read_only, cache)
        finally:
            os.close(fd)
        assert backing != ffi.NULL
        return self.attach(nsid, backing, size)

    def attach(self, nsid: int, backing: Backing, size: int, **format: int) -> Backing:
        shift = format.setdefault("lba_shift", 12)
        values = {"blocks": size >> shift} | format
        assert (
            lib.pv_nvme_set_namespace(self.nvme, nsid, backing, ffi.new("struct pv_nvme_format *", values))
            == 0
        )
        self._backings.append(backing)
        return backing

    def media(self, backing: Backing, offset: int, size: int) -> Bytes:
        """What a backing holds."""
        out = np.zeros(size, np.uint8)
        assert lib.pv_nvme_backing_read(backing, offset, ffi.from_buffer(out), size) == 0
        return out

    def set_media(self, backing: Backing, offset: int, data: Bytes) -> None:
        data = np.ascontiguousarray(data)
        assert lib.pv_nvme_backing_write(backing, offset, ffi.from_buffer(data), data.nbytes) == 0


def noise(size: int, seed: int = 1) -> Bytes:
    """Bytes that are the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)
