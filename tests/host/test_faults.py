"""The fault log: every stage and reason under its name, iterators, bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from pvfio.abi import lib
from pvfio.host import Fault, IommuConfig, Platform
from pvfio.pagetable import Perm
from pvfio.silicon import DmaAborted

pytestmark = pytest.mark.touches_c

IOVA = 0x10000
ENTRY_PRESENT = 3


def abort(guest: Any, iova: int, *, write: bool = False, function: int = 0) -> None:
    bus = guest.devices[function].bus
    with pytest.raises(DmaAborted):
        bus.write(iova, b"1234") if write else bus.read(iova, 4)


def last(guest: Any) -> Fault:
    fault: Fault = guest.host.faults.snapshot()[-1]
    return fault


def test_not_present(guest: Any) -> None:
    guest.mapped(7, 1)
    abort(guest, IOVA + 0x1234, function=1)
    fault = last(guest)
    assert fault == Fault(
        device="0001:00:00.1",
        device_id=guest.device_id(1),
        iova=IOVA + 0x1234,
        gpa=0,
        domain=7,
        stage=1,
        level=1,
        permission="read",
        reason="not present",
    )
    assert str(fault) == "0001:00:00.1: read of iova 0x11234: not present (stage 1 level 1)"


def test_upper_level_not_present(guest: Any) -> None:
    guest.mapped(1, 0)
    abort(guest, 1 << 40, write=True)
    assert (last(guest).level, last(guest).permission) == (4, "write")


def test_permission(guest: Any) -> None:
    _, table, _ = guest.mapped(1, 0)
    table.map_range(0x20000, guest.memory.guest_page(), 4096, Perm.READ)
    abort(guest, 0x20000, write=True)
    assert (last(guest).reason, last(guest).permission) == ("permission", "write")


def test_blocked(guest: Any) -> None:
    abort(guest, 0x5000)
    fault = last(guest)
    assert (fault.reason, fault.stage, fault.level) == ("blocked", 0, 0)
    assert str(fault) == "0001:00:00.0: read of iova 0x5000: blocked (stage 0)"


@pytest.mark.parametrize("platform", ["intel", "amd"])
def test_stage_2(make_guest: Callable[..., Any], platform: Platform) -> None:
    guest = make_guest(IommuConfig(platform=platform))
    _, table, _ = guest.mapped(1, 0)
    outside = lib.PV_GPA_HOLE_START
    table.map_range(0x30000, outside, 4096, Perm.READ)
    abort(guest, 0x30010)
    fault = last(guest)
    assert (fault.stage, fault.gpa, fault.iova) == (2, outside + 0x10, 0x30010)


def test_interrupt_nothing_accepts(guest: Any) -> None:
    assert not guest.devices[0].bus.msi(lib.PV_MSI_START, 0x33)
    assert last(guest).reason == "interrupt not accepted"


def test_bounded(guest: Any) -> None:
    rounds, each = 5, 300
    for _ in range(rounds):
        for n in range(each):
            abort(guest, n << 12)
        guest.host.faults.drain()
    kept = guest.host.faults.snapshot()
    assert len(kept) == 1024
    assert guest.host.faults.lost == rounds * each - 1024
    assert kept[-1].iova == (each - 1) << 12
    guest.host.faults.clear()
    assert guest.host.faults.snapshot() == ()
    assert guest.host.faults.lost == rounds * each - 1024


def test_what_the_iommu_had_no_room_for_is_counted(guest: Any) -> None:
    for n in range(600):
        abort(guest, n << 12)
    kept = guest.host.faults.snapshot()
    assert guest.host.faults.lost == 600 - len(kept) > 0


async def test_iterators_see_everything_each(guest: Any) -> None:
    seen: dict[str, list[int]] = {"early": [], "late": []}

    async def collect(name: str, count: int) -> None:
        async for fault in guest.host.faults:
            seen[name].append(fault.iova)
            if len(seen[name]) == count:
                return

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(guest.host.run)
            abort(guest, 0x1000)
            async with trio.open_nursery() as collectors:
                collectors.start_soon(collect, "early", 3)
                await trio.testing.wait_all_tasks_blocked()
                abort(guest, 0x2000)
                await trio.testing.wait_all_tasks_blocked()
                collectors.start_soon(collect, "late", 3)
                abort(guest, 0x3000)
            nursery.cancel_scope.cancel()
    assert seen == {"early": [0x1000, 0x2000, 0x3000], "late": [0x1000, 0x2000, 0x3000]}


async def test_an_iterator_that_falls_behind_goes_on_with_the_oldest(guest: Any) -> None:
    log = aiter(guest.host.faults)
    abort(guest, 0)
    assert (await anext(log)).iova == 0
    for n in range(1, 1301):
        abort(guest, n << 12)
        if n % 100 == 0:
            guest.host.faults.drain()
    assert (await anext(log)).iova == (1301 - 1024) << 12


async def test_a_cancelled_wait_loses_nothing(guest: Any) -> None:
    log = aiter(guest.host.faults)
    with trio.move_on_after(0) as scope:
        await anext(log)
    assert scope.cancelled_caught
    abort(guest, 0x9000)
    assert (await anext(log)).iova == 0x9000


async def test_an_iterator_sees_what_comes_after_a_clear(guest: Any) -> None:
    log = aiter(guest.host.faults)
    for n in range(3):
        abort(guest, n << 12)
    assert (await anext(log)).iova == 0
    assert (await anext(log)).iova == 0x1000
    guest.host.faults.clear()
    abort(guest, 0x9000)
    with trio.fail_after(5):
        assert (await anext(log)).iova == 0x9000
    assert guest.host.faults.lost == 0
