"""Opening and closing: nothing is left behind, whenever it ends."""

from __future__ import annotations

import gc
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from pvfio.abi import lib

pytestmark = pytest.mark.touches_c


class _CancelAtStep(trio.abc.Instrument):
    """Cancels a scope before a task's n-th step: at the n-th place where it can be cancelled, n = 0 the
    first.
    """

    def __init__(self, scope: trio.CancelScope, n: int) -> None:
        self._task = trio.lowlevel.current_task()
        self._scope = scope
        self._left = n
        self.reached = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            if self._left == 0:
                self.reached = True
                self._scope.cancel()
            self._left -= 1


async def _cancelled_everywhere(run: Callable[[], Awaitable[None]], check: Callable[[], None]) -> int:
    """Runs it again and again, cancelled one step later each time; ``check`` after each. How many steps it
    has.
    """
    for n in range(10_000):
        with trio.CancelScope() as scope:
            instrument = _CancelAtStep(scope, n)
            if n == 0:
                scope.cancel()
            trio.lowlevel.add_instrument(instrument)
            try:
                await run()
            finally:
                trio.lowlevel.remove_instrument(instrument)
        # Until the task goes on, trio holds the exception, its frames and the arrays in them.
        await trio.lowlevel.checkpoint()
        check()
        if n and not instrument.reached:
            return n
    raise AssertionError("it does not end")


def _fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


async def _use(backend: Any, name: str) -> None:
    async with backend.vfio.open_device(name) as device:
        await device.set_bus_master()
        buffer = await device.container.alloc(10_000)
        await device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).enable(3)
        await device.irq(lib.VFIO_PCI_REQ_IRQ_INDEX).enable(1)
        await device.region(2).write(0x34, 1)
        await device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).wait(1, deadline=60)
        await device.reset()
        await device.container.free(buffer)
        await device.container.alloc(4096)
        await device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).disable()
        await device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).enable(1)


async def test_cycles_leave_nothing_behind(backend: Any) -> None:
    name = backend.names[0]
    await _use(backend, name)
    pins, fds = backend.pins(), _fds()
    for _ in range(20):
        await _use(backend, name)
    assert (backend.pins(), _fds()) == (pins, fds)


async def test_cancelled_at_every_step(backend: Any) -> None:
    name = backend.names[0]
    await _use(backend, name)
    pins, fds = backend.pins(), _fds()

    def clean() -> None:
        assert (backend.pins(), _fds()) == (pins, fds)

    steps = await _cancelled_everywhere(lambda: _use(backend, name), clean)
    assert steps > 15
    await _use(backend, name)


async def test_closing_in_the_wrong_order(backend: Any) -> None:
    name = backend.names[0]
    container = await backend.vfio.open_container()
    group = await backend.vfio.open_group(backend.vfio.group_of(name))
    group.set_container(container)
    await container.set_iommu()
    device = await group.open_device(name)
    await container.alloc(4096)
    pins = backend.pins()
    await container.close()
    await group.close()
    await device.close()
    assert backend.pins() == pins - 1
    await _use(backend, name)


async def test_a_cancelled_close_still_closes(backend: Any) -> None:
    name = backend.names[0]
    container = await backend.vfio.open_container()
    group = await backend.vfio.open_group(backend.vfio.group_of(name))
    group.set_container(container)
    await container.set_iommu()
    device = await group.open_device(name)
    for close in (device.close, group.close, container.close):
        with trio.CancelScope() as scope:
            scope.cancel()
            await close()
        assert scope.cancelled_caught
        await close()
    await _use(backend, name)


async def test_what_is_left_open_is_closed_with_the_backend(backend: Any) -> None:
    fds = _fds()
    container = await backend.vfio.open_container()
    group = await backend.vfio.open_group(backend.vfio.group_of(backend.names[0]))
    group.set_container(container)
    await container.set_iommu()
    device = await group.open_device(backend.names[0])
    await device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).enable(2)
    await container.alloc(4096)
    pins = backend.pins()
    await backend.vfio.close()
    assert (backend.pins(), _fds()) == (pins - 1, fds)
    await backend.vfio.close()
    await _use(backend, backend.names[0])


async def test_two_tasks_open_one_device(backend: Any) -> None:
    name = backend.names[0]
    async with backend.vfio.open_device(name) as first:
        group = await _group_of(backend, name)
        second = await group.open_device(name)
        await first.region(0).write(0, 5)
        assert await second.region(0).read(0) == 5
        await second.close()
        assert await first.region(0).read(0) == 5


async def _group_of(backend: Any, name: str) -> Any:
    number = backend.vfio.group_of(name)
    return next(group for group in backend.vfio._groups if group.id == number and not group.closed)
