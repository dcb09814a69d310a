"""What little work costs: the reads it says, at their pace, and nothing left behind. The share is not judged."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.drivers.nvme import NvmeDriver
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.workloads.fio.share import RATE, measure_shares, trio_timer


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Machine, NvmeDriver]]:
    config = MachineConfig(engine="inline", devices=(DeviceSpec(kind="nvme"),))
    async with Machine(config) as machine, machine.open("nvme0") as device:
        async with NvmeDriver(device, completion="interrupt") as driver:
            yield machine, driver


async def test_the_reads_of_the_time_at_their_pace(autojump_clock: Any) -> None:
    async with running() as (_, driver):
        times: list[float] = []

        async def pause(until: float) -> None:
            await trio_timer(until)
            times.append(trio.current_time())

        before = (await driver.smart_log()).host_reads
        found = await measure_shares(driver, seconds=0.5, pause=pause)
        assert (await driver.smart_log()).host_reads - before == RATE // 2
        assert len(times) == RATE  # as many again, without reads
        for turn in np.reshape(times, (-1, RATE // 20)):  # ten of each
            assert turn == pytest.approx(turn[0] + np.arange(len(turn)) / RATE)
        assert found.reads > 0 < found.pace


async def test_cancelled_it_leaves_nothing(autojump_clock: Any) -> None:
    async with running() as (machine, driver):
        pins = machine.memory.stats().pins
        with trio.move_on_after(0.1) as scope:
            await measure_shares(driver, seconds=10, pause=trio_timer)
        assert scope.cancelled_caught
        assert driver.queues[0].outstanding == 0
        assert machine.memory.stats().pins == pins
