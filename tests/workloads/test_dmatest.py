"""dmatest and the file copy on a machine: what they print, and that they find what goes wrong."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import trio

from pvfio.drivers.dsa import DsaDriver, WqConfig
from pvfio.host.config import IommuConfig
from pvfio.machine import Machine, MachineConfig
from pvfio.workloads.dmatest import GUARD, DmatestParams, Summary, dmatest, memory_needed
from pvfio.workloads.filecopy import copy_file

pytestmark = pytest.mark.touches_c

SUMMARY = re.compile(
    r"^dmatest: dma0chan(\d+)-(copy|set)(\d+): summary (\d+) tests, (\d+) failures "
    r"\d+\.\d\d iops \d+ KB/s \((-?\d+)\)$"
)

ONE = (WqConfig(),)


@asynccontextmanager
async def driver(
    platform: Any = "intel", engine: Any = "inline", wqs: Any = ONE, **options: Any
) -> AsyncIterator[tuple[Machine, DsaDriver]]:
    config = MachineConfig(iommu=IommuConfig(platform=platform), engine=engine, ram=64 << 20)
    async with Machine(config) as machine, machine.open("dsa0") as device:
        async with DsaDriver(device, wqs=wqs, **options) as dsa:
            yield machine, dsa


@pytest.mark.parametrize("platform", ["intel", "amd"])
@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize("memset", [False, True])
async def test_all_is_well(platform: str, engine: str, memset: bool) -> None:
    lines: list[str] = []
    counts: list[int] = []
    started: list[int] = []
    params = DmatestParams(iterations=50, threads_per_chan=2, memset=memset, seed=5)
    async with driver(platform, engine, (WqConfig(), WqConfig(completion="polled"))) as (machine, dsa):
        summaries = await dmatest(
            dsa.wqs, params, emit=lines.append, advance=counts.append, started=started.append
        )
        assert dsa.device.container.iova_allocator.allocated.keys() >= set()
        pins = machine.memory.stats().pins
        assert pins == 2  # the two rings: every test buffer was given back
    assert sum(counts) == 200
    assert len(started) == 1
    found = [SUMMARY.match(line) for line in lines]
    assert all(found)
    names = {(m[1], m[2], m[3], m[4], m[5], m[6]) for m in found if m}
    op = "set" if memset else "copy"
    assert names == {(chan, op, thread, "50", "0", "0") for chan in "01" for thread in "01"}
    assert [s.failures for s in summaries] == [0] * 4
    assert all(50 <= s.nbytes <= 50 * params.test_buf_size for s in summaries)


async def test_verbose_names_every_test() -> None:
    lines: list[str] = []
    params = DmatestParams(iterations=3, verbose=True, norandom=True, test_buf_size=4096)
    async with driver() as (_, dsa):
        await dmatest(dsa.wqs, params, emit=lines.append)
    expected = [
        f"dmatest: dma0chan0-copy0: result #{n}: 'test passed' with src_off=0x0 dst_off=0x0 len=0x1000 (0)"
        for n in (1, 2, 3)
    ]
    assert lines[:3] == expected


@pytest.mark.parametrize(
    ("parameters", "check"),
    [
        ({"transfer_size": 100}, lambda src, dst, n: n == 100),
        ({"alignment": 6}, lambda src, dst, n: not (src | dst | n) & 63),
        ({"norandom": True}, lambda src, dst, n: (src, dst, n) == (0, 0, 8192)),
        ({"transfer_size": 4096, "norandom": True}, lambda src, dst, n: (src, dst, n) == (0, 0, 4096)),
        ({}, lambda src, dst, n: 0 < n <= 8192 and max(src, dst) + n <= 8192),
    ],
)
async def test_parameters_decide_where_and_how_much(parameters: dict[str, Any], check: Any) -> None:
    lines: list[str] = []
    params = DmatestParams(iterations=40, verbose=True, test_buf_size=8192, seed=1, **parameters)
    async with driver() as (_, dsa):
        await dmatest(dsa.wqs, params, emit=lines.append)
    where = re.compile(r"src_off=(0x[0-9a-f]+) dst_off=(0x[0-9a-f]+) len=(0x[0-9a-f]+)")
    found = [where.search(line) for line in lines[:-1]]
    assert len(found) == 40
    for match in found:
        assert match
        assert check(*(int(text, 16) for text in match.groups()))


BROKEN_BYTES = [
    ("source", 10, "srcbuf[0xa] overwritten!"),
    ("destination", 0, "not copied!"),
    ("before", 1, "guard before dstbuf"),
    ("after", 1, "guard after dstbuf"),
]


@pytest.mark.parametrize(("where", "index", "words"), BROKEN_BYTES)
async def test_a_wrong_byte_anywhere_is_a_failure(where: str, index: int, words: str) -> None:
    """A device that writes one byte too many, somewhere: here the test's own hand, right after the transfer."""
    lines: list[str] = []
    params = DmatestParams(iterations=4, norandom=True)
    async with driver() as (_, dsa):
        wq = dsa.wq(0)
        honest = wq.memmove

        async def spoiling(dst: Any, src: Any, size: int, **options: Any) -> None:
            await honest(dst, src, size, **options)
            spot = {"source": src, "destination": dst, "before": dst - 100, "after": dst + size}[
                where
            ] + index
            await wq.fill(spot, b"\x2a", 1)

        wq.memmove = spoiling  # type: ignore[method-assign]
        (summary,) = await dmatest(dsa.wqs, params, emit=lines.append)
    assert summary.failures == 4
    assert any(words in line for line in lines)
    assert "'data error' with src_off=0x0 dst_off=0x0 len=0x4000 (1)" in "\n".join(lines)
    assert lines[-1].startswith("dmatest: dma0chan0-copy0: summary 4 tests, 4 failures")


async def test_noverify_looks_at_nothing() -> None:
    async def nothing(*_: Any, **__: Any) -> None:
        await trio.lowlevel.checkpoint()

    async with driver() as (_, dsa):
        dsa.wq(0).memmove = nothing  # type: ignore[method-assign]
        params = DmatestParams(iterations=3, noverify=True)
        (summary,) = await dmatest(dsa.wqs, params, emit=lambda _: None)
        assert summary.failures == 0
        (summary,) = await dmatest(dsa.wqs, DmatestParams(iterations=3), emit=lambda _: None)
        assert summary.failures == 3


async def test_faults_timeouts_and_a_dead_device(autojump_clock: Any) -> None:
    lines: list[str] = []
    async with driver() as (machine, dsa):
        container = dsa.device.container
        params = DmatestParams(iterations=2, timeout=50, norandom=True)

        def forbid_writes(_: int) -> None:
            size = params.test_buf_size + 2 * GUARD
            (iova,) = (iova for iova, n in container.iova_allocator.allocated.items() if n == size)
            container.unmap_dma_nowait(iova, size)
            container.map_dma_nowait(iova, machine.memory.alloc(size), write=False)

        (summary,) = await dmatest(dsa.wqs, params, emit=lines.append, started=forbid_writes)
        assert summary.failures == 2
        assert "'completion error status DSA_COMP_PAGE_FAULT_NOBOF'" in lines[0]

        function: Any = machine.devices["dsa0"].function
        function.engine.stop_before(0)
        lines.clear()
        (summary,) = await dmatest(dsa.wqs, params, emit=lines.append)
        assert summary.failures == 2
        assert "'test timed out'" in lines[0]

        for wq in dsa.wqs:
            wq._close("failed")
        (summary,) = await dmatest(dsa.wqs, params, emit=lines.append)
        assert (summary.failures, summary.status) == (1, -19)
        assert lines[-1].endswith("(-19)")


async def test_endless_until_cancelled() -> None:
    done = 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        if done == 30:
            scope.cancel()

    lines: list[str] = []
    async with driver() as (machine, dsa):
        with trio.CancelScope() as scope:
            await dmatest(dsa.wqs, DmatestParams(iterations=0), emit=lines.append, advance=advance)
        assert done == 30
        assert "summary 30 tests, 0 failures" in lines[-1]
        assert machine.memory.stats().pins == 1


BAD_PARAMETERS: list[dict[str, Any]] = [
    {"test_buf_size": 0},
    {"threads_per_chan": 0},
    {"iterations": -1},
    {"timeout": 0},
    {"timeout": -2},
    {"alignment": 32},
    {"alignment": -2},
    {"alignment": 15},
    {"transfer_size": -1},
    {"transfer_size": 16384},
]


@pytest.mark.parametrize("parameters", BAD_PARAMETERS, ids=str)
def test_parameters_that_cannot_be(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        DmatestParams(**parameters)


async def test_a_buffer_larger_than_a_transfer_or_than_memory() -> None:
    async with driver(wqs=(WqConfig(max_transfer_shift=13),)) as (_, dsa):
        with pytest.raises(ValueError, match="largest transfer"):
            await dmatest(dsa.wqs, DmatestParams(), emit=lambda _: None)
    params = DmatestParams(test_buf_size=60 << 20)
    assert memory_needed(params, 1) > 64 << 20
    async with driver() as (machine, dsa):
        with pytest.raises(MemoryError):
            await dmatest(dsa.wqs, params, emit=lambda _: None)
        assert machine.memory.stats().pins == 1


def test_the_summary_line_is_the_module_s() -> None:
    line = Summary("dma0chan0-copy0", 1000, 3, 8192 * 1000, 0.5, 0).line()
    assert line == "dmatest: dma0chan0-copy0: summary 1000 tests, 3 failures 2000.00 iops 16000 KB/s (0)"
    assert Summary("x").line() == "dmatest: x: summary 0 tests, 0 failures 0.00 iops 0 KB/s (0)"
    assert "7.50 iops" in Summary("x", 15, 0, 0, 2.0).line()


@pytest.mark.parametrize("platform", ["intel", "amd"])
@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize("copy_crc", [False, True])
@pytest.mark.parametrize("size", [0, 1, 4095, 65536, 200_001])
async def test_a_file_goes_through(
    tmp_path: Path, platform: str, engine: str, copy_crc: bool, size: int
) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    lines: list[str] = []
    counts: list[int] = []
    async with driver(platform, engine) as (_, dsa):
        copy = await copy_file(
            dsa.wq(0),
            source,
            DmatestParams(test_buf_size=65536, seed=3),
            copy_crc=copy_crc,
            output=target,
            emit=lines.append,
            advance=counts.append,
        )
    assert target.read_bytes() == content
    assert copy.device_crc == copy.expected_crc == google_crc32c.value(content)
    assert (copy.nbytes, copy.chunks, sum(counts)) == (size, -(-size // 65536), size)
    assert copy.guard_bytes == copy.chunks * (65536 + 2 * 4096) - size
    assert copy.summary.failures == 0
    (line,) = lines
    assert SUMMARY.match(line)


async def test_a_file_copy_that_goes_wrong(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 64)
    lines: list[str] = []
    async with driver() as (_, dsa):
        wq = dsa.wq(0)
        honest = wq.memmove

        async def spoiling(dst: Any, src: Any, size: int, **options: Any) -> None:
            await honest(dst, src, size, **options)
            await wq.fill(dst[5:], b"\0", 2)

        wq.memmove = spoiling  # type: ignore[method-assign]
        copy = await copy_file(wq, source, DmatestParams(test_buf_size=4096), emit=lines.append)
    assert copy.summary.failures == 5  # four chunks, and the CRC
    assert copy.device_crc != copy.expected_crc
    assert "'data error'" in lines[0]
    assert "CRC-32C of the file is" in lines[-2]
    assert "4 tests, 5 failures" in lines[-1]


async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    async with driver() as (machine, dsa):
        with pytest.raises(FileNotFoundError):
            await copy_file(dsa.wq(0), tmp_path / "nothing", DmatestParams())
        with pytest.raises(OSError, match="directory"):
            await copy_file(dsa.wq(0), tmp_path, DmatestParams())
        assert machine.memory.stats().pins == 1
