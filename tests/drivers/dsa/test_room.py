"""Waiting for room in a work queue, and what may happen meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import dtype_of, lib
from pvfio.drivers.dsa import DsaDriver, OperationAborted, WqConfig, descriptors
from pvfio.errors import DeadlineExceeded, DeviceFailed

pytestmark = pytest.mark.touches_c

SMALL = (WqConfig(size=4),)
MANY = 50


async def fill_from_elsewhere(r: Any, wq: int) -> int:
    """Submissions of another client of a shared WQ, as many as it takes."""
    noop = np.zeros(1, dtype_of("struct dsa_hw_desc"))
    page = lib.IDXD_PORTAL_LIMITED * lib.IDXD_PORTAL_SIZE
    portals, count = r.device.region(lib.VFIO_PCI_BAR2_REGION_INDEX), 0
    while portals.enqcmd(wq * lib.IDXD_WQ_PORTAL_STRIDE + page, noop):
        count += 1
    return count


async def test_a_reset_ends_a_wait_for_room(running: Any, autojump_clock: Any) -> None:
    """What was submitted in part is aborted; what had not begun to be goes on behind the reset."""
    async with running(wqs=SMALL) as r:
        r.engine.stop_before(0)
        outcomes: list[str] = []

        async def submit() -> None:
            try:
                await (await r.wq.submit(descriptors.noop(MANY))).wait()
                outcomes.append("done")
            except OperationAborted:
                outcomes.append("aborted")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(submit)
            await trio.sleep(0.1)
            assert r.wq.room == 0
            nursery.start_soon(submit)
            await trio.sleep(0.1)
            assert not outcomes
            began = trio.current_time()
            await r.dsa.reset()
            r.engine.resume()
        assert outcomes == ["aborted", "done"]
        assert trio.current_time() - began < 1, "it waited for an interrupt that cannot come"


async def test_the_driver_s_end_ends_a_wait_for_room(rig: Any, autojump_clock: Any) -> None:
    async with rig() as r, trio.open_nursery() as nursery:
        r.engine.stop_before(0)
        raised: list[Exception] = []

        async def submit(dsa: DsaDriver) -> None:
            try:
                await dsa.wq(0).submit(descriptors.noop(MANY))
            except (DeviceFailed, OperationAborted) as error:
                raised.append(error)

        async with DsaDriver(r.device, wqs=SMALL) as dsa:
            for _ in range(3):
                nursery.start_soon(submit, dsa)
            await trio.sleep(0.1)
        await trio.sleep(0.1)
        assert len(raised) == 3


async def test_a_shared_queue_full_of_others_work_is_waited_for(running: Any, autojump_clock: Any) -> None:
    async with running(wqs=(WqConfig(size=8, shared=True),)) as r:
        r.engine.stop_before(0)
        assert await fill_from_elsewhere(r, 0) > 0
        with pytest.raises(trio.WouldBlock):
            r.wq.submit_nowait(descriptors.noop(1))
        with pytest.raises(DeadlineExceeded):
            await r.wq.submit(descriptors.noop(1), deadline=1)
        results: list[Any] = []

        async def submit() -> None:
            results.append(await (await r.wq.submit(descriptors.noop(MANY))).wait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(submit)
            await trio.sleep(1)
            assert not results
            r.engine.resume()
        assert results[0]["status"].tolist() == [lib.DSA_COMP_SUCCESS] * MANY
