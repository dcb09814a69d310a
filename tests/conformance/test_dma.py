"""Mapping: every mistake has its errno, all is undone, and what is mapped is what the device sees."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.errors import VfioError
from pvfio.vfio import UnmapMismatch

pytestmark = [pytest.mark.touches_c, pytest.mark.every_shape]

PAGE = 4096
BASE = 0x40_0000
SRC, DST, COUNT, CMD, STATUS, FAULT = 0x08, 0x10, 0x18, 0x1C, 0x20, 0x28
DONE, ABORTED, BUSY = 1, 2, 5


async def _dma(device: Any, command: int, src: int, dst: int, count: int) -> int:
    registers = device.region(2)
    await registers.write(SRC, src, 8)
    await registers.write(DST, dst, 8)
    await registers.write(COUNT, count)
    await registers.write(CMD, command)
    while (status := int(await registers.read(STATUS))) == BUSY:  # where its DMA may wait for somebody
        pass
    return status


MAP_ERRORS = [
    ("size 0", BASE, slice(0, 0), {}, errno.EINVAL),
    ("iova + size wraps", (1 << 64) - PAGE, slice(0, 2 * PAGE), {}, errno.EOVERFLOW),
    ("iova not aligned", BASE + 1, slice(0, PAGE), {}, errno.EINVAL),
    ("vaddr not aligned", BASE, slice(8, PAGE + 8), {}, errno.EINVAL),
    ("size not aligned", BASE, slice(0, PAGE + 8), {}, errno.EINVAL),
    ("neither read nor write", BASE, slice(0, PAGE), {"read": False, "write": False}, errno.EINVAL),
    ("overlaps a mapping", 0x80_0000 + PAGE, slice(0, PAGE), {}, errno.EEXIST),
    ("beyond the aperture", 1 << 60, slice(0, PAGE), {}, errno.EINVAL),
    ("touches the MSI window", 0xFEE0_0000 - PAGE, slice(0, 2 * PAGE), {}, errno.EINVAL),
    ("negative iova", -PAGE, slice(0, PAGE), {}, errno.EINVAL),
    ("iova of 65 bits", 1 << 64, slice(0, PAGE), {}, errno.EINVAL),
]


@pytest.mark.parametrize(
    ("name", "iova", "part", "rights", "number"), MAP_ERRORS, ids=[e[0] for e in MAP_ERRORS]
)
async def test_a_bad_map_has_its_errno_and_changes_nothing(
    backend: Any, name: str, iova: int, part: slice, rights: dict[str, bool], number: int
) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        buffer = await container.alloc(4 * PAGE, map=False)
        standing = await container.alloc(4 * PAGE, iova=0x80_0000)
        before = container.info(), backend.pins()
        with pytest.raises(VfioError) as error:
            await container.map_dma(iova, buffer[part], **rights)
        assert error.value.errno == number
        with pytest.raises(VfioError) as error:
            container.map_dma_nowait(iova, buffer[part], **rights)
        assert error.value.errno == number
        assert (container.info(), backend.pins()) == before
        assert buffer.iova is None
        assert standing.iova == 0x80_0000


UNMAP_ERRORS = [
    ("size 0", BASE, 0, errno.EINVAL),
    ("iova not aligned", BASE + 1, PAGE, errno.EINVAL),
    ("size not aligned", BASE, PAGE - 1, errno.EINVAL),
    ("iova + size wraps", (1 << 64) - PAGE, 2 * PAGE, errno.EOVERFLOW),
    ("splits the front", BASE, PAGE, errno.EINVAL),
    ("splits the back", BASE + PAGE, PAGE, errno.EINVAL),
    ("negative", -PAGE, PAGE, errno.EINVAL),
]


@pytest.mark.parametrize(("name", "iova", "size", "number"), UNMAP_ERRORS, ids=[e[0] for e in UNMAP_ERRORS])
async def test_a_bad_unmap_has_its_errno(backend: Any, name: str, iova: int, size: int, number: int) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        await container.alloc(2 * PAGE, iova=BASE)
        for unmap in (container.unmap_dma_nowait, container.try_unmap_dma_nowait):
            with pytest.raises(VfioError) as error:
                unmap(iova, size)
            assert error.value.errno == number
            assert not isinstance(error.value, UnmapMismatch)
        assert await container.unmap_dma(BASE, 2 * PAGE) == 2 * PAGE


async def test_only_memory_that_can_be_pinned(backend: Any) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        spare = np.zeros(3 * PAGE, np.uint8)
        skip = -spare.ctypes.data % PAGE
        copy = (await device.container.alloc(PAGE, map=False)).copy()
        for foreign in (spare[skip : skip + PAGE], spare.data[skip : skip + PAGE]):
            with pytest.raises(VfioError) as error:
                await device.container.map_dma(BASE, foreign)
            assert error.value.errno == errno.EFAULT
        with pytest.raises(VfioError) as error:
            await device.container.map_dma(BASE, copy)
        assert error.value.errno in (errno.EFAULT, errno.EINVAL)
        with pytest.raises(TypeError):
            await device.container.map_dma(BASE, object())


async def test_unmapping_another_number_of_bytes_is_noticed(backend: Any) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        await container.alloc(PAGE, iova=BASE)
        with pytest.raises(UnmapMismatch) as error:
            await container.unmap_dma(BASE, 2 * PAGE)
        assert (error.value.length, error.value.unmapped) == (2 * PAGE, PAGE)
        assert await container.try_unmap_dma(BASE, PAGE) == 0
        with pytest.raises(UnmapMismatch) as error:
            container.unmap_dma_nowait(BASE, PAGE)
        assert error.value.unmapped == 0


async def test_limits(backend: Any) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        if backend.memlock:
            with pytest.raises(VfioError) as error:
                await container.alloc(16 << 20)
            assert error.value.errno == errno.ENOMEM
        assert not container.iova_allocator.allocated
        buffer = await container.alloc(PAGE, map=False)
        for i in range(backend.dma_entry_limit):
            assert container.info().dma_avail == backend.dma_entry_limit - i
            await container.map_dma(BASE + i * PAGE, buffer)
        with pytest.raises(VfioError) as error:
            await container.map_dma(BASE - PAGE, buffer)
        assert error.value.errno == errno.ENOSPC
        assert await container.unmap_all() == backend.dma_entry_limit * PAGE


async def test_alloc_and_free(backend: Any) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        ranges = container.info().iova_ranges
        sizes = [1, PAGE, PAGE + 1, 100_000, 2 << 20]
        buffers = [await container.alloc(size, scattered=i % 2 == 1) for i, size in enumerate(sizes)]
        for size, buffer in zip(sizes, buffers, strict=True):
            whole = -(-size // PAGE) * PAGE
            assert buffer.shape == (size,)
            assert not buffer.any()
            assert any(first <= buffer.iova and buffer.iova + whole - 1 <= last for first, last in ranges)
            assert buffer.iova % min(1 << (whole - 1).bit_length(), 2 << 20) == 0
        assert buffers[3][PAGE:].iova == buffers[3].iova + PAGE
        for buffer in buffers:
            iova = buffer.iova
            await container.free(buffer)
            assert buffer.iova is None
            assert await container.try_unmap_dma(iova, PAGE) == 0
            with pytest.raises(VfioError) as error:
                await container.free(buffer)
            assert error.value.errno == errno.EINVAL
        assert not container.iova_allocator.allocated
        whole = await container.alloc(2 * PAGE)
        with pytest.raises(VfioError) as error:
            await container.free(whole[PAGE:])
        assert error.value.errno == errno.EINVAL
        for bad in (0, -1):
            with pytest.raises(ValueError):
                await container.alloc(bad)


async def test_alloc_goes_round_what_was_mapped_by_hand(backend: Any) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        hand = await container.alloc(PAGE, map=False)
        taken = []
        for _ in range(3):
            buffer = await container.alloc(PAGE)
            taken.append(buffer.iova)
            await container.free(buffer)
            await container.map_dma(taken[-1], hand)
        buffer = await container.alloc(PAGE)
        assert buffer.iova not in taken
        assert len(set(taken)) == 3
        for iova in taken:
            assert await container.unmap_dma(iova, PAGE) == PAGE
        await container.free(buffer)


async def test_alloc_gets_past_a_large_range_mapped_by_hand(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        top = await container.alloc(PAGE)
        end = top.iova + PAGE
        await container.free(top)
        hand = await container.alloc(1024 * PAGE, map=False)
        await container.map_dma(end - hand.nbytes, hand)
        attempts = []
        map_dma = container.map_dma

        async def counted(iova: int, *arguments: Any, **options: Any) -> None:
            attempts.append(iova)
            await map_dma(iova, *arguments, **options)

        monkeypatch.setattr(container, "map_dma", counted)
        buffer = await container.alloc(PAGE)
        assert buffer.iova + PAGE <= end - hand.nbytes
        assert len(attempts) < 15


async def test_what_was_put_aside_is_found_when_all_else_is_used_up(backend: Any) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        container.iova_allocator.set_ranges(((BASE, BASE + 8 * PAGE - 1),))
        hand = await container.alloc(PAGE, map=False)
        taken = {BASE + page * PAGE for page in (1, 4, 6, 7)}
        for iova in taken:
            await container.map_dma(iova, hand)
        buffers = [await container.alloc(PAGE) for _ in range(4)]
        assert {buffer.iova for buffer in buffers} == {BASE + page * PAGE for page in range(8)} - taken
        with pytest.raises(VfioError) as error:
            await container.alloc(PAGE)
        assert error.value.errno == errno.ENOSPC


async def test_a_forgotten_buffer_stays_pinned_until_it_is_unmapped(backend: Any) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        before = backend.pins()
        buffer = await container.alloc(PAGE)
        iova = buffer.iova
        buffer[:4] = list(b"kept")
        del buffer
        assert backend.pins() == before + 1
        await device.set_bus_master()
        assert await _dma(device, 2, iova, 0, 4) == DONE
        assert bytes(device.region(0).mmap(0, PAGE)[:4]) == b"kept"
        await container.unmap_dma(iova, PAGE)
        assert backend.pins() == before


async def test_unmap_all_forgets_every_buffer(backend: Any) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        buffers = [await container.alloc(PAGE) for _ in range(3)]
        assert await container.unmap_all() == 3 * PAGE
        assert [buffer.iova for buffer in buffers] == [None] * 3
        assert not container.iova_allocator.allocated
        assert await container.unmap_all() == 0


async def test_the_device_sees_what_is_mapped_and_no_more(backend: Any) -> None:
    async with backend.vfio.open_device(backend.names[0]) as device:
        container = device.container
        await device.set_bus_master()
        source = await container.alloc(2 * PAGE, write=False, scattered=True)
        target = await container.alloc(2 * PAGE)
        source[:] = np.arange(2 * PAGE) % 251
        assert await _dma(device, 3, source.iova + 5, target.iova, PAGE + 100) == DONE
        assert np.array_equal(target[: PAGE + 100], source[5 : PAGE + 105])
        assert await _dma(device, 3, target.iova, source.iova, 16) == ABORTED
        assert await device.region(2).read(FAULT, 8) == source.iova
        await container.unmap_dma(target.iova, 2 * PAGE)
        assert await _dma(device, 3, source.iova, target.iova, 16) == ABORTED
        await device.set_bus_master(False)
        assert await _dma(device, 3, source.iova, source.iova, 16) != DONE


async def test_devices_of_one_container_share_its_address_space(backend: Any) -> None:
    first, second = backend.names
    async with (
        backend.vfio.open_device(first) as one,
        backend.vfio.open_device(second, container=one.container) as two,
    ):
        assert two.container is one.container
        buffer = await one.container.alloc(PAGE)
        for device, value in ((one, 1), (two, 2)):
            await device.set_bus_master()
            await device.region(0).write(0, value)
            assert await _dma(device, 1, 0, buffer.iova + 4 * value, 4) == DONE
        assert list(buffer[4:12]) == [1, 0, 0, 0, 2, 0, 0, 0]


async def test_containers_are_apart(backend: Any) -> None:
    first, second = backend.names
    async with backend.vfio.open_device(first) as one, backend.vfio.open_device(second) as two:
        buffers = []
        for device in (one, two):
            await device.set_bus_master()
            buffers.append(await device.container.alloc(PAGE, iova=BASE))
        await one.region(0).write(0, 0x11)
        assert await _dma(one, 1, 0, BASE, 4) == DONE
        assert (buffers[0][0], buffers[1][0]) == (0x11, 0)
        await two.container.free(buffers[1])
        assert await _dma(two, 1, 0, BASE, 4) == ABORTED
        assert await _dma(one, 1, 0, BASE, 4) == DONE


async def test_extensions(backend: Any) -> None:
    async with await backend.vfio.open_container() as container:
        supported = {kind for kind in range(12) if container.check_extension(kind)}
        assert supported >= {lib.VFIO_TYPE1_IOMMU, lib.VFIO_TYPE1v2_IOMMU, lib.VFIO_UNMAP_ALL}
        assert not supported & {0, lib.VFIO_SPAPR_TCE_IOMMU, lib.VFIO_NOIOMMU_IOMMU}
