"""WQ occupancy: what WQCFG reports, the interrupt, and its refusals."""

from __future__ import annotations

import pytest

from pvfio.abi import lib
from pvfio.devices.dsa import DsaConfig
from tests.devices.dsa.function import Function, running

pytestmark = pytest.mark.touches_c

ENABLED = lib.IDXD_WQCFG_OCCUPANCY_INT_EN
CONFIG = DsaConfig(occupancy_interrupt=True)


async def prepare(f: Function, handle: int, limit: int, queued: int) -> None:
    """A WQ with ``queued`` descriptors before which the engine stands."""
    f.write(f.wqcfg(0, 4), handle)
    f.write(f.wqcfg(0, 5), limit)
    await f.configure(0)
    f.device.engine.stop_before(0)
    for record in range(queued):
        f.noop(record=record)


def step(f: Function, count: int = 1) -> tuple[int, bool]:
    """Runs that many; the occupancy, and whether the interrupt is pending."""
    f.device.engine.stop_before(count)
    f.device.engine.resume()
    word = f.read(f.wqcfg(0, 6), 4)
    return word & lib.IDXD_WQCFG_OCCUPANCY_MASK, bool(word & lib.IDXD_WQCFG_OCCUPANCY_INT)


@pytest.mark.parametrize(("handle", "vector"), [(0, 0), (2, 2)])
async def test_at_the_limit(handle: int, vector: int) -> None:
    """Once, when the queue has shrunk to the limit; again after the bit was cleared."""
    async with running(CONFIG) as f:
        await prepare(f, handle, ENABLED | 3, 6)
        assert step(f, 2) == (4, False)
        assert f.interrupts()[0] == 0
        assert step(f) == (3, True)
        assert f.interrupts() == (1, vector)
        assert f.read(lib.IDXD_INTCAUSE_OFFSET, 4) == lib.IDXD_INTC_OCCUPY
        assert step(f) == (2, True)
        assert f.interrupts()[0] == 1
        f.write(f.wqcfg(0, 6), lib.IDXD_WQCFG_OCCUPANCY_INT)
        assert not f.read(f.wqcfg(0, 6), 4) & lib.IDXD_WQCFG_OCCUPANCY_INT
        assert step(f) == (1, True)
        assert f.interrupts()[0] == 2


async def test_not_unless_enabled() -> None:
    """The limit can be changed while the WQ is enabled, the handle cannot."""
    async with running(CONFIG) as f:
        await prepare(f, 1, 3, 6)
        assert step(f, 4) == (2, False)
        f.write(f.wqcfg(0, 5), ENABLED | 1)
        f.write(f.wqcfg(0, 4), 2)
        assert f.read(f.wqcfg(0, 4), 4) == 1
        assert step(f) == (1, True)
        assert f.interrupts() == (1, 1)


async def test_a_reset_forgets_it() -> None:
    async with running(CONFIG) as f:
        await prepare(f, 0, ENABLED | 9, 2)
        assert step(f) == (1, True)
        assert await f.command(lib.IDXD_CMD_RESET_WQ, 1) == 0
        assert [f.read(f.wqcfg(0, word), 4) for word in (4, 5)] == [0, 0]
        assert not f.read(f.wqcfg(0, 6), 4) & lib.IDXD_WQCFG_OCCUPANCY_INT


@pytest.mark.parametrize(
    ("handle", "limit", "error"),
    [
        (9, ENABLED, lib.IDXD_CMDSTS_ERR_OCCUPANCY_INT),
        (lib.IDXD_WQCFG_OCCUPANCY_TABLE_IMS | 1, ENABLED, lib.IDXD_CMDSTS_ERR_OCCUPANCY_INT),
        (9, 0, 0),
        (8, ENABLED, 0),
    ],
)
async def test_refusals(handle: int, limit: int, error: int) -> None:
    async with running(CONFIG) as f:
        f.wq(0)
        f.write(f.wqcfg(0, 4), handle)
        f.write(f.wqcfg(0, 5), limit)
        f.group(0, 1, 1)
        assert await f.command(lib.IDXD_CMD_ENABLE_DEVICE) == 0
        assert await f.command(lib.IDXD_CMD_ENABLE_WQ, 0) == error


async def test_requested_handles() -> None:
    """Where handles are requested, the table index is none."""
    async with running(DsaConfig(occupancy_interrupt=True, int_handles=2)) as f:
        f.wq(0)
        f.group(0, 1, 1)
        assert await f.command(lib.IDXD_CMD_ENABLE_DEVICE) == 0
        f.write(f.wqcfg(0, 4), 1)
        f.write(f.wqcfg(0, 5), ENABLED)
        assert await f.command(lib.IDXD_CMD_ENABLE_WQ, 0) == lib.IDXD_CMDSTS_ERR_OCCUPANCY_INT
        status = await f.command(lib.IDXD_CMD_REQUEST_INT_HANDLE, 1)
        f.write(f.wqcfg(0, 4), status >> lib.IDXD_CMDSTS_RES_SHIFT)
        assert await f.command(lib.IDXD_CMD_ENABLE_WQ, 0) == 0
        f.noop()
        assert f.interrupts() == (1, 1)


async def test_without_the_capability() -> None:
    async with running(DsaConfig(occupancy=False)) as f:
        await prepare(f, 1, ENABLED | 3, 2)
        assert [f.read(f.wqcfg(0, word), 4) for word in (4, 5)] == [0, 0]
        assert f.read(f.wqcfg(0, 6), 4) & lib.IDXD_WQCFG_OCCUPANCY_MASK == 0


async def test_four_weights_share_an_engine() -> None:
    """Of any round of sixteen descriptors, WQs of priorities 1, 2, 5 and 8 get just that many each."""
    weights = (1, 2, 5, 8)
    async with running(DsaConfig(engines=1)) as f:
        for wq, weight in enumerate(weights):
            mode = lib.IDXD_WQCFG_MODE_DEDICATED | weight << lib.IDXD_WQCFG_PRIORITY_SHIFT
            f.wq(wq, size=32, mode=mode)
        f.group(0, 0xF, 1)
        assert await f.command(lib.IDXD_CMD_ENABLE_DEVICE) == 0
        for wq in range(4):
            assert await f.command(lib.IDXD_CMD_ENABLE_WQ, wq) == 0
        f.device.engine.stop_before(0)
        for wq in range(4):
            for number in range(32):
                f.noop(wq, record=32 * wq + number)
        for rounds in (1, 2, 3, 4):
            f.device.engine.stop_before(sum(weights))
            f.device.engine.resume()
            done = f.statuses(128)
            served = [sum(map(bool, done[32 * wq : 32 * wq + 32])) for wq in range(4)]
            assert served == [weight * rounds for weight in weights]
