"""The benchmark: its loops do what they say, and its figures are about work that was done."""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
import pytest

from pvfio.abi import ffi, lib
from pvfio.drivers.dsa import DsaDriver, WqConfig
from pvfio.machine import Machine, MachineConfig
from pvfio.workloads.dsa_bench import ORIENTATION, SIZES, measure

pytestmark = pytest.mark.touches_c

SIZE, DISTINCT = 64, 3


def loop(what: int, a: Any, b: Any, c: Any, count: int) -> int:
    pointers = [ffi.cast("uint8_t *", ffi.from_buffer(array)) for array in (a, b, c)]
    return int(lib.pv_bench_loop(what, *pointers, SIZE, DISTINCT, count))


@pytest.fixture
def arrays() -> list[Any]:
    rng = np.random.default_rng(4)
    return [rng.integers(0, 256, SIZE * (DISTINCT + 1), dtype=np.uint8) for _ in range(3)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_loops(arrays: list[Any], count: int) -> None:
    a, b, c = arrays
    first = {"b": b.copy(), "c": c.copy()}
    end = SIZE * min(count, DISTINCT)
    parts = [a[SIZE * (i % DISTINCT) :][:SIZE].tobytes() for i in range(count)]
    crc = 0
    for part in parts:
        crc ^= google_crc32c.value(part)

    def untouched(array: Any, name: str, start: int) -> bool:
        return bool((array[start:] == first[name][start:]).all())

    assert loop(lib.PV_LOOP_CRC, a, b, c, count) == crc
    differing = sum(a[SIZE * (i % DISTINCT)] != b[SIZE * (i % DISTINCT)] for i in range(count))
    assert loop(lib.PV_LOOP_COMPARE, a, b, c, count) == differing == count
    assert untouched(b, "b", 0)
    assert untouched(c, "c", 0)
    assert loop(lib.PV_LOOP_COPY_CRC, a, b, c, count) == crc
    assert (b[:end] == a[:end]).all()
    assert untouched(b, "b", end)
    assert loop(lib.PV_LOOP_COMPARE, a, b, c, count) == 0
    assert loop(lib.PV_LOOP_FILL, a, b, c, count) == 0
    assert (b[:end] == 0xEF).all()
    assert loop(lib.PV_LOOP_FILL8, a, b, c, count) == 0
    assert (b[:end].view(np.uint64) == 0x0123456789ABCDEF).all()
    assert loop(lib.PV_LOOP_COPY, a, b, c, count) == 0
    assert (b[:end] == a[:end]).all()
    b[:end] = 0
    assert loop(lib.PV_LOOP_DUALCAST, a, b, c, count) == 0
    assert (b[:end] == a[:end]).all()
    assert (c[:end] == a[:end]).all()
    assert untouched(b, "b", end)
    assert untouched(c, "c", end)


@pytest.mark.parametrize("engine", ["inline", "thread"])
async def test_every_figure_is_there(engine: Any) -> None:
    config = MachineConfig(engine=engine, ram=64 << 20)
    steps = 0

    def advance() -> None:
        nonlocal steps
        steps += 1

    async with Machine(config) as machine, machine.open("dsa0") as device:
        async with DsaDriver(device, wqs=[WqConfig(completion="polled")]) as dsa:
            bench = await measure(dsa.wq(0), rounds=1, sizes=(512, SIZES[0]), advance=advance)
            there = {figure.operation for figure in bench.table}
            assert there == set(ORIENTATION) - (
                set() if dsa.capabilities.has_operation(lib.DSA_OPCODE_DUALCAST) else {"dualcast"}
            )
    assert steps == len(bench.table) + 1 == 2 * len(there) + 1
    for figure in bench.table:
        assert figure.rate > 0
        assert figure.ratio is not None
        assert figure.ratio > 0
        assert (figure.orientation is None) == (figure.size == 512)
        assert (figure.target is not None) == (figure.size == 4096 and figure.operation in ("copy", "fill"))
    assert min(bench.noops, bench.noops_without_records, bench.awaited, bench.nowait) > 0


async def test_sizes_that_cannot_be_and_descriptors_that_fail() -> None:
    config = MachineConfig(engine="inline", ram=64 << 20)
    async with Machine(config) as machine, machine.open("dsa0") as device:
        async with DsaDriver(device, wqs=[WqConfig(max_transfer_shift=12)]) as dsa:
            for size in (0, 12, 4 << 20):
                with pytest.raises(ValueError, match="multiples of 8"):
                    await measure(dsa.wq(0), sizes=(size,))
            with pytest.raises(Exception, match="DSA_COMP_BATCH_FAIL"):
                await measure(dsa.wq(0), rounds=1, sizes=(8192,))
        async with DsaDriver(device, wqs=[WqConfig(max_batch_shift=4)]) as dsa:
            with pytest.raises(ValueError, match="batches of 16, not of 32"):
                await measure(dsa.wq(0))
