"""dmatest --operation: every operation is right on every machine, and a wrong result is found."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.drivers.dsa import DsaDriver, WqConfig
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.workloads.dmatest import GUARD, DmatestParams, Summary, dmatest
from pvfio.workloads.operations import OPERATIONS, area_bytes, operation_thread
from pvfio.workloads.trial import AREAS, Trial

pytestmark = pytest.mark.touches_c

WITHOUT_DATA = ("noop",)
ONE = (WqConfig(),)
UNCHANGED = ("noop", "transl-fetch", "cflush")


@asynccontextmanager
async def driver(
    platform: Any = "intel", engine: Any = "inline", wqs: Any = ONE, **options: Any
) -> AsyncIterator[tuple[Machine, DsaDriver]]:
    config = MachineConfig(
        iommu=IommuConfig(platform=platform),
        engine=engine,
        ram=64 << 20,
        devices=(DeviceSpec(kind="dsa", options=options),),
    )
    async with Machine(config) as machine, machine.open("dsa0") as device:
        async with DsaDriver(device, wqs=wqs) as dsa:
            yield machine, dsa


async def run(dsa: DsaDriver, name: str, lines: list[str], **parameters: Any) -> list[Summary]:
    params = DmatestParams(**{"iterations": 10, "seed": 7} | parameters)
    make = partial(operation_thread, name)
    return await dmatest(dsa.wqs, params, emit=lines.append, operation=name, make=make)


def test_every_operation_of_the_architecture_is_there() -> None:
    assert sorted(operation.opcode for operation in OPERATIONS.values()) == sorted(
        {getattr(lib, name) for name in dir(lib) if name.startswith("DSA_OPCODE_")}
    )


@pytest.mark.parametrize("platform", ["intel", "amd"])
@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize("name", OPERATIONS)
async def test_all_is_well(platform: str, engine: str, name: str) -> None:
    lines: list[str] = []
    async with driver(platform, engine) as (machine, dsa):
        before = machine.memory.stats().pins
        (summary,) = await run(dsa, name, lines)
        assert machine.memory.stats().pins - before <= 1  # areas were given back; a batch's memory is kept
        assert not machine.hypervisor.faults.snapshot()
    assert lines == [summary.line()], lines
    assert (summary.tests, summary.failures) == (10, 0)
    assert summary.name == f"dma0chan0-{name}0"
    assert (summary.nbytes > 0) == (name not in WITHOUT_DATA)


SHAPES: list[dict[str, Any]] = [
    {"norandom": True},
    {"alignment": 6},
    {"alignment": 12, "test_buf_size": 8192},
    {"transfer_size": 1000},
    {"test_buf_size": 520},
    {"test_buf_size": 100_000, "iterations": 5},
    {"threads_per_chan": 3, "iterations": 4},
]


@pytest.mark.parametrize("parameters", SHAPES, ids=str)
async def test_parameters(parameters: dict[str, Any]) -> None:
    async with driver(wqs=(WqConfig(completion="polled"), WqConfig(shared=True))) as (_, dsa):
        for name in OPERATIONS:
            lines: list[str] = []
            summaries = await run(dsa, name, lines, **parameters)
            assert len(lines) == len(summaries), lines
            assert not any(summary.failures for summary in summaries)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("area", range(AREAS))
@pytest.mark.parametrize("index", [0, GUARD, GUARD + 700, -1])
async def test_a_wrong_byte_anywhere_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, area: int, index: int
) -> None:
    """The device's work is spoilt after it is done: in a guard, in the data, in memory it had no business with."""
    honest = Trial.verdict

    def spoilt(trial: Trial) -> Any:
        trial.areas[area].real[index] ^= 0x40
        return honest(trial)

    monkeypatch.setattr(Trial, "verdict", spoilt)
    lines: list[str] = []
    async with driver() as (_, dsa):
        (summary,) = await run(dsa, name, lines, iterations=3)
    assert summary.failures == 3
    where = index % (16384 * OPERATIONS[name].room // 1024 + 2 * GUARD) - GUARD
    assert lines[0].startswith(f"dmatest: dma0chan0-{name}0: ")
    assert f"buf[{where:#x}] mismatch! Expected" in lines[0]
    assert "'data error'" in lines[1]


def _wrong(value: Any) -> Any:
    if value is None:
        return 0
    if isinstance(value, int):
        return value ^ 1
    return type(value)(value.size + 10, value.fits, value.bytes_compared)


@pytest.mark.parametrize("name", ["compare", "compval", "create-delta", "crcgen", "copy-crc"])
async def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    lines: list[str] = []
    async with driver() as (_, dsa):
        wq = dsa.wq(0)
        honest: Callable[..., Any] = getattr(wq, name.replace("-", "_"))

        async def lying(*arguments: Any, **options: Any) -> Any:
            return _wrong(await honest(*arguments, **options))

        monkeypatch.setattr(wq, name.replace("-", "_"), lying)
        (summary,) = await run(dsa, name, lines, iterations=5)
    assert summary.failures == 5
    assert "mismatch! Expected" in lines[0]


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in (*UNCHANGED, "batch", "drain")])
async def test_work_that_was_not_done_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A device that completes everything and does nothing."""
    lines: list[str] = []
    async with driver(wqs=(WqConfig(completion="polled"),)) as (_, dsa):
        wq = dsa.wq(0)
        honest = wq._fill

        def idle(operation: Any, flags: int) -> None:
            honest(operation, flags)
            wq._staging_bytes[16:] = bytes(48)
            wq._descriptor.flags_opcode &= 0xFFFFFF  # NOOP

        monkeypatch.setattr(wq, "_fill", idle)
        (summary,) = await run(dsa, name, lines, iterations=20)
    assert summary.failures > 0
    assert "'data error'" in "\n".join(lines)


async def test_noverify_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(trial: Trial) -> Any:
        raise AssertionError("looked at the data")

    monkeypatch.setattr(Trial, "verdict", never)
    async with driver() as (_, dsa):
        (summary,) = await run(dsa, "memmove", [], noverify=True)
    assert (summary.tests, summary.failures) == (10, 0)


async def test_what_cannot_be() -> None:
    async with driver() as (machine, dsa):
        with pytest.raises(ValueError, match="an operation is one of"):
            await run(dsa, "juggle", [])
        with pytest.raises(ValueError, match="dif-check needs a test buffer of 520 bytes, not 519"):
            await run(dsa, "dif-check", [], test_buf_size=519)
        assert machine.memory.stats().pins == 1
    opcodes = frozenset({lib.DSA_OPCODE_NOOP, lib.DSA_OPCODE_BATCH, lib.DSA_OPCODE_DRAIN})
    async with driver(config=_config(opcodes)) as (_, dsa):
        with pytest.raises(ValueError, match="does not have memmove"):
            await run(dsa, "memmove", [])
        (summary,) = await run(dsa, "noop", [])
        assert summary.failures == 0


def _config(opcodes: frozenset[int]) -> Any:
    from pvfio.devices.dsa import DsaConfig

    return DsaConfig(opcodes=opcodes)


async def test_memory_is_what_area_bytes_says() -> None:
    async with driver() as (machine, dsa):
        for name in OPERATIONS:
            params = DmatestParams(iterations=1)
            summary = Summary("x")
            thread = operation_thread(
                name, dsa.wq(0), params, print, lambda _: None, np.random.default_rng(1), summary
            )
            await thread.allocate()
            taken = sum(area.buffer.nbytes_mapped for area in thread.areas)
            await thread.free()
            assert taken <= area_bytes(name, params) <= taken + AREAS * 4096
        assert machine.memory.stats().pins == 1


async def test_faults_are_failures() -> None:
    lines: list[str] = []
    async with driver() as (_, dsa):
        container = dsa.device.container

        def pull(iova: int) -> None:
            container.unmap_dma_nowait(iova, container.iova_allocator.allocated[iova])

        params = DmatestParams(iterations=2, test_buf_size=16384, norandom=True)
        make = partial(operation_thread, "crcgen")
        with pytest.raises(Exception, match=r"unmap|IOVA|iova"):  # giving the buffer back finds it gone
            await dmatest(dsa.wqs, params, emit=lines.append, started=pull, operation="crcgen", make=make)
    assert "completion error status DSA_COMP_PAGE_FAULT_NOBOF" in lines[0]
    assert "summary 2 tests, 2 failures" in lines[-1]
