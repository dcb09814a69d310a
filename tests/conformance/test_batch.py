"""Batches: as many single requests in order, all or nothing for maps, whether the backend takes them whole or not."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.errors import VfioBatchError, VfioError
from pvfio.vfio import Container, UnmapMismatch

pytestmark = pytest.mark.touches_c

PAGE = 4096
BASE = 0x40_0000
STANDING = 0x80_0000
WRAPPING = (1 << 64) - PAGE


@pytest.fixture(params=["whole", "loop"])
def opened(request: pytest.FixtureRequest, backend: Any) -> Any:
    """Opens the first device's container; ``loop``: one whose backend takes single requests only."""

    @asynccontextmanager
    async def open_container() -> AsyncIterator[Container]:
        async with backend.vfio.open_device(backend.names[0]) as device:
            if request.param == "loop":
                device.container._batch_file = None
            yield device.container

    return open_container


def pages(*numbers: int) -> Any:
    return BASE + PAGE * np.array(numbers, np.uint64)


async def test_a_batch_is_mapped_and_unmapped(opened: Any, backend: Any) -> None:
    async with opened() as container:
        buffer = await container.alloc(4 * PAGE, map=False)
        before = container.info(), backend.pins()
        iovas, vaddrs = pages(7, 0, 3, 9), buffer.vaddr + PAGE * np.arange(4, dtype=np.uint64)
        await container.map_dma_batch(iovas, vaddrs, PAGE)
        assert backend.pins() == before[1] + 4
        assert container.info().dma_avail == backend.dma_entry_limit - 4
        done = await container.unmap_dma_batch(iovas, [PAGE] * 4)
        assert (done.dtype, done.tolist()) == (np.uint64, [PAGE] * 4)
        assert (container.info(), backend.pins()) == before


async def test_buffers_are_mapped_whole_and_know_it(opened: Any, backend: Any) -> None:
    async with opened() as container:
        buffers = [await container.alloc(size, map=False) for size in (PAGE, 3 * PAGE, 100)]
        await container.map_dma_batch(pages(8, 2, 0), buffers)
        assert [buffer.iova for buffer in buffers] == pages(8, 2, 0).tolist()
        assert await container.unmap_dma_batch(pages(0, 2, 8), [PAGE, 3 * PAGE, PAGE]) is not None
        assert backend.pins() == 0


async def test_an_empty_batch_does_nothing(opened: Any) -> None:
    async with opened() as container:
        container.map_dma_batch_nowait([], [], [])
        await container.map_dma_batch([], [], [])
        assert (await container.unmap_dma_batch([], PAGE)).shape == (0,)


# iova, pages of the buffer from its first on, read and write, errno
MISTAKES = {
    "size 0": (BASE, 0, True, errno.EINVAL),
    "wraps": (WRAPPING, 2, True, errno.EOVERFLOW),
    "not aligned": (BASE + 8, 1, True, errno.EINVAL),
    "neither read nor write": (BASE, 1, False, errno.EINVAL),
    "overlaps what stood": (STANDING, 1, True, errno.EEXIST),
    "overlaps the batch's own": (BASE + 9 * PAGE, 1, True, errno.EEXIST),
    "beyond the aperture": (1 << 60, 1, True, errno.EINVAL),
    "the MSI window": (0xFEE0_0000, 1, True, errno.EINVAL),
    "past the buffer": (BASE, 5, True, errno.EFAULT),
    "over memlock": (0x1000_0000, 2048, True, errno.ENOMEM),
}


LOCKED = {"over memlock": [pytest.mark.needs("memlock")]}


@pytest.mark.parametrize(
    ("mistake", "index"),
    [
        pytest.param(name, index, marks=LOCKED.get(name, []))
        for name in MISTAKES
        for index in (0, 2)
        if index or name != "overlaps the batch's own"
    ],
)
async def test_a_refused_element_undoes_the_batch(
    opened: Any, backend: Any, mistake: str, index: int
) -> None:
    iova, count, permitted, number = MISTAKES[mistake]
    async with opened() as container:
        await container.alloc(PAGE, iova=STANDING)
        buffer = await container.alloc((2048 if number == errno.ENOMEM else 4) * PAGE, map=False)
        before = container.info(), backend.pins()
        iovas, sizes = [BASE + 9 * PAGE, BASE + 11 * PAGE, BASE + 13 * PAGE], [PAGE] * 3
        iovas.insert(index, iova)
        sizes.insert(index, count * PAGE)
        if not permitted:
            index = 0  # the permissions are the whole batch's
        with pytest.raises(VfioBatchError) as caught:
            await container.map_dma_batch(
                np.array(iovas, np.uint64), [buffer.vaddr] * 4, sizes, read=permitted, write=permitted
            )
        assert (caught.value.errno, caught.value.index) == (number, index)
        assert (container.info(), backend.pins()) == before
        assert (await container.try_unmap_dma_batch(pages(9, 11, 13), PAGE)).tolist() == [0, 0, 0]


async def test_the_entry_limit_counts_within_a_batch(opened: Any, backend: Any) -> None:
    async with opened() as container:
        buffer = await container.alloc(PAGE, map=False)
        limit = backend.dma_entry_limit
        iovas = pages(*range(limit + 1))
        with pytest.raises(VfioBatchError) as caught:
            await container.map_dma_batch(iovas, [buffer.vaddr] * (limit + 1), PAGE)
        assert (caught.value.errno, caught.value.index) == (errno.ENOSPC, limit)
        await container.map_dma_batch(iovas[:limit], [buffer.vaddr] * limit, PAGE)
        assert container.info().dma_avail == 0


async def test_unmaps_go_in_order_and_stop_where_one_is_refused(opened: Any) -> None:
    async with opened() as container:
        buffer = await container.alloc(4 * PAGE, map=False)
        await container.map_dma_batch(pages(0, 1, 10), [buffer.vaddr] * 3, [PAGE, PAGE, 4 * PAGE])
        # Both at once; the second again and nothing; half of one; never reached.
        with pytest.raises(VfioBatchError) as caught:
            await container.unmap_dma_batch(pages(0, 1, 12, 10), [2 * PAGE, PAGE, PAGE, 4 * PAGE])
        assert (caught.value.errno, caught.value.index) == (errno.EINVAL, 2)
        assert caught.value.unmapped.tolist() == [2 * PAGE, 0]
        rest = await container.try_unmap_dma_batch(pages(0, 10), [2 * PAGE, 8 * PAGE])
        assert rest.tolist() == [0, 4 * PAGE]


async def test_what_a_batch_has_unmapped_is_gone_for_what_follows(opened: Any) -> None:
    async with opened() as container:
        buffer = await container.alloc(4 * PAGE, map=False)
        await container.map_dma_batch(pages(0, 8), [buffer.vaddr] * 2, [4 * PAGE, PAGE])
        done = await container.try_unmap_dma_batch(pages(0, 2, 0), [4 * PAGE, PAGE, 9 * PAGE])
        assert done.tolist() == [4 * PAGE, 0, PAGE]


async def test_without_waiting(opened: Any, backend: Any) -> None:
    """The same without a checkpoint, where the backend can."""
    async with opened() as container:
        buffer = await container.alloc(2 * PAGE, map=False)
        if not backend.nowait:
            with pytest.raises(trio.WouldBlock):
                container.map_dma_batch_nowait(pages(0, 4), [buffer.vaddr] * 2, PAGE)
            assert backend.pins() == 0
            await container.map_dma_batch(pages(0, 4), [buffer.vaddr] * 2, PAGE)
            with pytest.raises(trio.WouldBlock):
                container.unmap_dma_batch_nowait(pages(0, 4), PAGE)
            return
        container.map_dma_batch_nowait(pages(0, 4), [buffer.vaddr] * 2, PAGE)
        assert container.unmap_dma_batch_nowait(pages(0, 4), PAGE).tolist() == [PAGE, PAGE]
        assert container.try_unmap_dma_batch_nowait(pages(0, 4), PAGE).tolist() == [0, 0]


async def test_an_unmap_that_finds_something_else_is_noticed(opened: Any) -> None:
    async with opened() as container:
        buffer = await container.alloc(2 * PAGE, map=False)
        await container.map_dma_batch(pages(0, 4), [buffer.vaddr] * 2, PAGE)
        with pytest.raises(UnmapMismatch) as caught:
            await container.unmap_dma_batch(pages(0, 4, 8), [PAGE, 2 * PAGE, PAGE])
        assert (caught.value.iova, caught.value.length, caught.value.unmapped) == (
            BASE + 4 * PAGE,
            2 * PAGE,
            PAGE,
        )


@pytest.mark.parametrize(
    ("iovas", "memory", "sizes", "kind"),
    [
        ([BASE], [BASE, BASE], PAGE, ValueError),
        ([BASE], [BASE], [PAGE, PAGE], ValueError),
        ([[BASE]], [BASE], PAGE, ValueError),
        (BASE, BASE, PAGE, ValueError),
        ([BASE], [BASE], None, ValueError),
        ([1.5], [BASE], PAGE, TypeError),
        ([BASE], np.zeros(1, np.uint8), PAGE, TypeError),
        ([1 << 64], [BASE], PAGE, TypeError),
        ([BASE, -PAGE], [BASE, BASE], PAGE, VfioError),
    ],
)
async def test_what_is_no_batch(opened: Any, iovas: Any, memory: Any, sizes: Any, kind: Any) -> None:
    async with opened() as container:
        with pytest.raises(kind):
            container.map_dma_batch_nowait(iovas, memory, sizes)


async def test_a_container_that_is_not_ready_takes_no_batch(backend: Any) -> None:
    container = await backend.vfio.open_container()
    for number in (errno.EINVAL, errno.EBADF):
        with pytest.raises(VfioError) as caught:
            container.map_dma_batch_nowait([BASE], [BASE], PAGE)
        assert caught.value.errno == number
        with pytest.raises(VfioError) as caught:
            container.unmap_dma_batch_nowait([BASE], PAGE)
        assert caught.value.errno == number
        await container.close()


@pytest.mark.parametrize("call", ["map", "unmap"])
async def test_a_cancelled_batch_has_done_nothing(opened: Any, backend: Any, call: str) -> None:
    async with opened() as container:
        buffer = await container.alloc(PAGE, map=False)
        if call == "unmap":
            await container.map_dma_batch([BASE], [buffer])
        before = backend.pins()
        with trio.CancelScope() as scope:
            scope.cancel()
            if call == "map":
                await container.map_dma_batch([BASE], [buffer])
            else:
                await container.unmap_dma_batch([BASE], PAGE)
        assert scope.cancelled_caught
        assert backend.pins() == before


@pytest.mark.parametrize("pages_apart", [1, 3, 1000])
async def test_a_batch_of_unmaps_is_one_flush(emulated: Any, pages_apart: int) -> None:
    machine = await emulated()
    async with machine.vfio.open_device(machine.names[0]) as device:
        buffer = await device.container.alloc(PAGE, map=False)
        iovas = pages(*range(0, 40 * pages_apart, pages_apart))
        device.container.map_dma_batch_nowait(iovas, [buffer.vaddr] * 40, PAGE)
        calls = machine.kernel.transport.calls
        device.container.unmap_dma_batch_nowait(iovas, PAGE)
        assert machine.kernel.transport.calls == calls + 1
