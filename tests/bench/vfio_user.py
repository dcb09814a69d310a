"""Print what a device behind vfio-user costs, each figure beside one that is taken in turn with it.

Three parts: round trips of an 8-byte region read (NVMe's CAP), by a client in C (what QEMU is) and by pvfio's, beside
a plain C server that echoes messages of those lengths over a socket of that kind; 4 KiB random reads of an NVMe
controller in memory, with its doorbells mapped and by message, beside the same driver and controller in one process;
DMA_MAP and DMA_UNMAP.

Whoever serves (the server of pvfio, the echo, the engine's thread of the machine in this process) has one core, and
whoever asks has another. Figures are medians over the turns, ratios medians of the ratios within a turn. Run by hand on
a machine that has nothing else to do: it states figures and judges nothing. Needs gcc and two cores.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import trio

import pvfio
from pvfio.abi import lib
from pvfio.drivers.nvme import NvmeDriver
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.vfio import Device, DmaBuffer
from pvfio.vfio_user.messages import DmaMap, DmaUnmap, region_access
from pvfio.vfio_user.version import Version
from pvfio.workloads.fio.bench import DEPTHS, SIZE, fill, turn, turn_of_one

HEADER: Final = 16
BAR: Final = 0
IOVA: Final = 0x40_0000_0000
PAGE: Final = 4096

Work = Callable[[], Awaitable[float]]
"""Does something for a while; how often a second."""


@dataclass(frozen=True)
class Sizes:
    """How much is done: ``rounds`` turns of ``trips`` round trips, ``reads`` reads at every depth and ``maps`` maps."""

    rounds: int
    trips: int
    reads: int
    maps: int
    memory: int


class Message(ctypes.Structure):
    """``struct message`` of echo.c."""

    _fields_ = (
        ("bytes", ctypes.c_char_p),
        ("size", ctypes.c_uint32),
        ("reply_size", ctypes.c_uint32),
        ("file", ctypes.c_int32),
    )


class PlainClient:
    """A connection that C uses, and blocks on."""

    def __init__(self, library: Path, path: Path) -> None:
        self._round_trips = ctypes.CDLL(str(library)).round_trips
        self._round_trips.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64]
        self._round_trips.restype = ctypes.c_int64
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(os.fspath(path))

    def close(self) -> None:
        self.socket.close()

    def negotiate(self) -> None:
        """VERSION."""
        body = Version().pack()
        self.socket.sendall(header(lib.VFIO_USER_VERSION, len(body)) + body)
        self.socket.recv(PAGE)

    def per_second(self, messages: Sequence[Message], times: int, each: int = 1) -> float:
        """Sends all ``messages`` that many times, ``each`` of what is counted. Raises ``RuntimeError`` for an error."""
        took: int = self._round_trips(
            self.socket.fileno(), (Message * len(messages))(*messages), len(messages), times
        )
        if took < 0:
            raise RuntimeError("a reply is an error, or none")
        return each * times / (took / 1e9)


def header(command: int, size: int) -> bytes:
    """Of a request with a body of that size."""
    return array.array("H", (1, command)).tobytes() + array.array("I", (HEADER + size, 0, 0)).tobytes()


def message(command: int, body: bytes, reply: int, file: int = -1) -> Message:
    """``reply``: bytes of the body of what comes back."""
    whole = header(command, len(body)) + body
    return Message(whole, len(whole), HEADER + reply, file)


REGION_READ: Final = message(lib.VFIO_USER_REGION_READ, region_access(lib.NVME_REG_CAP, BAR, 8), 24)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """What is started inside, processes and threads, stays on a core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def process(*command: str | Path, ready: str) -> Iterator[None]:
    """Another process, once it has printed that it is ready."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            if not any(line.strip() == ready for line in running.stdout):
                raise RuntimeError(f"{command[0]} did not start")
            yield
        finally:
            running.terminate()


@dataclass(frozen=True)
class Served:
    """Clients of what runs in other processes: the echo, and two controllers of one server."""

    echo: PlainClient
    plain: PlainClient
    device: Device


def compile_echo(directory: Path) -> tuple[Path, Path]:
    """The program and the library."""
    source, program, library = Path(__file__).with_name("echo.c"), directory / "echo", directory / "echo.so"
    command = ("gcc", "-O2", "-D_GNU_SOURCE", "-Wall", "-Wextra", source, "-o")
    subprocess.run((*command, program), check=True)
    subprocess.run((*command, library, "-shared", "-fPIC"), check=True)
    return program, library


@asynccontextmanager
async def served(directory: Path, server_core: int, sizes: Sizes) -> AsyncIterator[Served]:
    """Starts both servers."""
    program, library = compile_echo(directory)
    echo, one, two = (directory / name for name in ("echo.sock", "one.sock", "two.sock"))
    devices = (f"--device=nvme,socket={one},size=1M", f"--device=nvme,socket={two},size={sizes.memory}")
    with ExitStack() as stack:
        with on_core(server_core):
            stack.enter_context(process(program, echo, ready="ready"))
            stack.enter_context(
                process(sys.executable, "-P", "-m", "pvfio", "serve", *devices, ready="pvfio: ready")
            )
        beside = stack.enter_context(closing(PlainClient(library, echo)))
        plain = stack.enter_context(closing(PlainClient(library, one)))
        plain.negotiate()
        async with pvfio.open_device(f"vfio-user:{two}") as device:
            yield Served(beside, plain, device)


@asynccontextmanager
async def embedded(server_core: int, sizes: Sizes) -> AsyncIterator[Device]:
    """The controller of a machine in this process; its engine's thread is on the server's core."""
    from pvfio.devices.nvme import NamespaceSpec

    spec = DeviceSpec(kind="nvme", options={"namespaces": (NamespaceSpec(size=sizes.memory),)})
    with ExitStack() as stack:
        stack.enter_context(on_core(server_core))
        async with (
            Machine(MachineConfig(engine="thread", devices=(spec,))) as machine,
            machine.open("nvme0") as device,
        ):
            stack.close()
            yield device


async def table(title: str, rounds: int, columns: Mapping[str, Work], unit: float, digits: int = 1) -> None:
    """One line: the median of each column, and of every one's ratio to the first."""
    taken: dict[str, list[float]] = {name: [] for name in columns}
    for number in range(rounds + 1):
        for name, work in columns.items():
            rate = await work()
            if number:  # the first one warms up
                taken[name].append(rate)
            await trio.lowlevel.checkpoint()
    first, *others = columns
    cells = [f"{first} {statistics.median(taken[first]) / unit:.{digits}f}"]
    for name in others:
        ratio = statistics.median(a / b for a, b in zip(taken[name], taken[first], strict=True))
        cells.append(f"{name} {statistics.median(taken[name]) / unit:.{digits}f} ({ratio:.2f})")
    print(f"{title:<38}{',  '.join(cells)}")


# Round trips


async def print_trips(served: Served, sizes: Sizes) -> None:
    region = served.device.region(BAR)

    async def plain(client: PlainClient) -> float:
        return client.per_second((REGION_READ,), sizes.trips)

    async def ours() -> float:
        start = time.perf_counter()
        for _ in range(sizes.trips):
            await region.read(lib.NVME_REG_CAP, 8)
        return sizes.trips / (time.perf_counter() - start)

    columns: dict[str, Work] = {
        "echo": partial(plain, served.echo),
        "client in C": partial(plain, served.plain),
        "pvfio's": ours,
    }
    await table("8-byte region reads, k/s", sizes.rounds, columns, 1e3)


# 4 KiB random reads


@dataclass(frozen=True)
class Reader:
    """A driver that reads random blocks, and where to."""

    nvme: NvmeDriver
    buffer: DmaBuffer
    count: int

    async def per_second(self, depth: int, *, mapped: bool = True) -> float:
        """Reads a second. ``mapped``: doorbells are stores where they can be."""
        pair = self.nvme.queues[0]
        nsid = min(self.nvme.namespaces)
        namespace = self.nvme.namespaces[nsid]
        each = SIZE // namespace.block_size
        count = self.count if depth > 1 else self.count // 8
        lbas = np.random.default_rng(depth).integers(0, namespace.size // SIZE, count, dtype=np.uint64)
        lbas *= np.uint64(each)
        slots = np.tile(np.arange(depth, dtype=np.uint64), 2) * np.uint64(SIZE)
        iovas = np.uint64(self.buffer.iova or 0) + slots
        region = self.nvme.device.region(BAR)
        stores = region.mmio
        region.mmio = stores if mapped else None
        try:
            if depth == 1:
                took = turn_of_one(pair, lib.NVME_CMD_READ, nsid, each, lbas.tolist(), int(iovas[0]))
            else:
                took = turn(pair, lib.NVME_CMD_READ, nsid, each, lbas, iovas, depth)
        finally:
            region.mmio = stores
        return count / took


@asynccontextmanager
async def reader(device: Device, sizes: Sizes) -> AsyncIterator[Reader]:
    """A driver; every page of its namespace has been written."""
    async with NvmeDriver(device, entries=256, completion="polled") as nvme:
        buffer = await device.container.alloc(max(DEPTHS) * SIZE)
        nsid = min(nvme.namespaces)
        await fill(nvme.queues[0], nsid, nvme.namespaces[nsid].block_size, buffer, sizes.memory)
        yield Reader(nvme, buffer, sizes.reads)


async def print_reads(device: Device, server_core: int, sizes: Sizes) -> None:
    async with (
        embedded(server_core, sizes) as near,
        reader(near, sizes) as inside,
        reader(device, sizes) as outside,
    ):
        for depth in DEPTHS:
            columns = {
                "in process": partial(inside.per_second, depth),
                "mapped doorbells": partial(outside.per_second, depth),
                "by message": partial(outside.per_second, depth, mapped=False),
            }
            await table(f"4 KiB random reads, depth {depth}, k/s", sizes.rounds, columns, 1e3)


# Maps


async def print_maps(served: Served, sizes: Sizes) -> None:
    """Pairs of a map and an unmap. A client behind a guest's IOMMU maps every page alone."""
    container, count = served.device.container, sizes.maps
    buffer = await container.alloc(count * PAGE, map=False)
    iovas = IOVA + np.arange(count, dtype=np.uint64) * np.uint64(PAGE)
    pages = [buffer[at : at + PAGE] for at in range(0, buffer.nbytes, PAGE)]
    file = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.truncate(file, max(2 << 20, count * PAGE))

    async def plain(size: int) -> float:
        pair = []
        for at in range(0, count * PAGE, PAGE):
            offset = at if size == PAGE else 0
            pair += [
                message(lib.VFIO_USER_DMA_MAP, DmaMap(IOVA + at, size, offset=offset).pack(), 0, file),
                message(lib.VFIO_USER_DMA_UNMAP, DmaUnmap(IOVA + at, size).pack(), 24),
            ]
        return served.plain.per_second(pair, 1, count)

    async def one_by_one() -> float:
        start = time.perf_counter()
        for iova, page in zip(iovas.tolist(), pages, strict=True):
            await container.map_dma(iova, page)
            await container.unmap_dma(iova, PAGE)
        return count / (time.perf_counter() - start)

    async def batch() -> float:
        lengths = np.full(count, PAGE, dtype=np.uint64)
        start = time.perf_counter()
        await container.map_dma_batch(iovas, np.uint64(buffer.vaddr) + iovas - np.uint64(IOVA), lengths)
        await container.unmap_dma_batch(iovas, lengths)
        return count / (time.perf_counter() - start)

    columns: dict[str, Work] = {
        "client in C": partial(plain, PAGE),
        "2 MiB each": partial(plain, 2 << 20),
        "pvfio's": one_by_one,
        "in a batch": batch,
    }
    try:
        await table("4 KiB maps and unmaps, k pairs/s", sizes.rounds, columns, 1e3)
    finally:
        os.close(file)


async def run(sizes: Sizes, cores: tuple[int, int]) -> None:
    """Prints everything. ``cores``: the server's and the client's, which this thread stays on meanwhile."""
    server_core, client_core = cores
    with tempfile.TemporaryDirectory() as directory, on_core(client_core):
        async with served(Path(directory), server_core, sizes) as clients:
            print(f"servers and engines on core {server_core}, clients on core {client_core}")
            print("a second, the median; in brackets the ratio to the first")
            await print_trips(clients, sizes)
            await print_reads(clients.device, server_core, sizes)
            await print_maps(clients, sizes)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each figure (default: %(default)s)")
    arguments = parser.parse_args()
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        raise SystemExit("two cores are needed")
    sizes = Sizes(arguments.rounds, trips=2000, reads=1 << 13, maps=512, memory=256 << 20)
    trio.run(run, sizes, (found[1], found[0]))


if __name__ == "__main__":
    main()
