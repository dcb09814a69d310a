"""Groups and containers: who may open what, in which order, and what each mistake returns."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.errors import VfioError
from pvfio.vfio import GroupStatus

pytestmark = pytest.mark.touches_c


@pytest.fixture
async def opened(backend: Any) -> AsyncIterator[tuple[Any, Any, str]]:
    """A container, the first device's group, and the device's name; nothing is connected yet."""
    name = backend.names[0]
    async with await backend.vfio.open_container() as container:
        async with await backend.vfio.open_group(backend.vfio.group_of(name)) as group:
            yield container, group, name


def _refused(number: int) -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: ")


async def test_the_way_through_the_states(opened: Any) -> None:
    container, group, name = opened
    assert group.status() == GroupStatus(viable=True, container_set=False)
    assert not container.ready
    group.set_container(container)
    assert group.status() == GroupStatus(viable=True, container_set=True)
    await container.set_iommu()
    assert container.ready
    async with await group.open_device(name) as device:
        assert device.name == name
        assert device.container is container
    group.unset_container()
    assert group.status() == GroupStatus(viable=True, container_set=False)
    assert not container.ready


async def test_a_group_is_opened_once(backend: Any, opened: Any) -> None:
    _, group, _ = opened
    with _refused(errno.EBUSY):
        await backend.vfio.open_group(group.id)
    await group.close()
    await (await backend.vfio.open_group(group.id)).close()


async def test_a_group_that_does_not_exist(backend: Any) -> None:
    for number in (-1, 4711):
        with _refused(errno.ENOENT):
            await backend.vfio.open_group(number)


async def test_a_device_that_does_not_exist(backend: Any) -> None:
    with _refused(errno.ENODEV):
        backend.vfio.group_of("ffff:1f:1f.7")
    with _refused(errno.ENODEV):
        async with backend.vfio.open_device("nonsense"):
            pass


async def test_set_container(backend: Any, opened: Any) -> None:
    container, group, _ = opened
    with _refused(errno.EINVAL):
        group.unset_container()
    group.set_container(container)
    with _refused(errno.EINVAL):
        group.set_container(container)
    async with await backend.vfio.open_container() as other:
        with _refused(errno.EINVAL):
            group.set_container(other)
    group.unset_container()
    with _refused(errno.EINVAL):
        group.unset_container()


async def test_a_closed_container_is_no_container(backend: Any, opened: Any) -> None:
    _, group, _ = opened
    container = await backend.vfio.open_container()
    await container.close()
    with _refused(errno.EBADF):
        group.set_container(container)


async def test_set_iommu(opened: Any) -> None:
    container, group, _ = opened
    with _refused(errno.EINVAL):
        await container.set_iommu()
    group.set_container(container)
    for unknown in (0, lib.VFIO_SPAPR_TCE_IOMMU, lib.VFIO_UNMAP_ALL, 99):
        with _refused(errno.ENODEV):
            await container.set_iommu(unknown)
    await container.set_iommu(lib.VFIO_TYPE1_IOMMU)
    for kind in (lib.VFIO_TYPE1_IOMMU, lib.VFIO_TYPE1v2_IOMMU, 99):
        with _refused(errno.EINVAL):
            await container.set_iommu(kind)


async def test_nothing_works_before_the_iommu_type(opened: Any) -> None:
    container, group, name = opened
    buffer = await container.alloc(4096, map=False)
    for step in range(2):
        with _refused(errno.EINVAL):
            await container.map_dma(0x10000, buffer)
        with _refused(errno.EINVAL):
            await container.try_unmap_dma(0x10000, 4096)
        with _refused(errno.EINVAL):
            container.info()
        with _refused(errno.EINVAL):
            await group.open_device(name)
        if not step:
            group.set_container(container)


async def test_an_unknown_device_of_the_group(backend: Any, opened: Any) -> None:
    container, group, _ = opened
    group.set_container(container)
    await container.set_iommu()
    for name in ("", "0001", backend.names[1], "x" * 5000):
        with pytest.raises(VfioError) as error:
            await group.open_device(name)
        assert error.value.errno in (errno.ENODEV, errno.EINVAL)


async def test_a_container_keeps_its_group_while_a_device_is_open(backend: Any, opened: Any) -> None:
    container, group, name = opened
    group.set_container(container)
    await container.set_iommu()
    device = await group.open_device(name)
    with _refused(errno.EBUSY):
        group.unset_container()
    await device.close()
    group.unset_container()


async def test_the_last_group_takes_the_mappings_with_it(backend: Any, opened: Any) -> None:
    container, group, _ = opened
    before = backend.pins()
    group.set_container(container)
    await container.set_iommu()
    buffer = await container.alloc(4096)
    assert backend.pins() == before + 1
    group.unset_container()
    assert backend.pins() == before
    assert buffer.iova is None
    group.set_container(container)
    await container.set_iommu()
    await container.alloc(4096)


async def test_mappings_stay_while_a_group_stays(backend: Any) -> None:
    first, second = backend.names
    async with backend.vfio.open_device(first) as one:
        buffer = await one.container.alloc(4096)
        async with backend.vfio.open_device(second, container=one.container):
            pass
        assert one.container.ready
        assert await one.container.unmap_dma(buffer.iova, 4096) == 4096
