"""The guest kernel: booting, buses, groups, drivers, and giving a device back."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.errors import IommuError, VfioError
from pvfio.guest.kernel import GuestKernel
from pvfio.host import Hypervisor, IommuConfig
from pvfio.memory import GuestMemory

pytestmark = pytest.mark.touches_c


def refused(number: int) -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: ")


async def test_each_function_of_an_isolated_bus_has_its_group(emulated: Any) -> None:
    machine = await emulated(buses=(2, 1))
    assert machine.vfio.devices == {"0001:00:00.0": 0, "0001:00:00.1": 1, "0002:00:00.0": 2}


async def test_a_bus_that_is_not_isolated_is_one_group(emulated: Any) -> None:
    machine = await emulated(buses=(3, 1), isolated=False)
    assert set(machine.vfio.devices.values()) == {0, 1}
    async with machine.vfio.open_device("0001:00:00.0") as first:
        with refused(errno.EBUSY):
            await machine.vfio.open_group(0)
        group = machine.vfio._groups[-1]
        async with await group.open_device("0001:00:00.1") as second:
            assert second.container is first.container
            domains = {device.iommu_group.domain for device in machine.kernel.devices[:3]}
            assert len(domains) == 1
            with refused(errno.EBUSY):
                group.unset_container()


async def test_a_group_is_viable_when_no_kernel_driver_has_a_device_of_it(emulated: Any) -> None:
    machine = await emulated(buses=(2,), isolated=False)
    kernel = machine.kernel
    one, other = kernel.devices
    kernel.bind(other, "idxd")
    async with await machine.vfio.open_group(0) as group, await machine.vfio.open_container() as container:
        assert not group.status().viable
        with refused(errno.EPERM):
            group.set_container(container)
        assert one.iommu_group.domain.kind == "identity"
        for driver in (None, "pci-stub", "vfio-pci"):
            kernel.bind(other, driver)
            assert group.status().viable
        group.set_container(container)
        assert group.status().container_set
        assert one.iommu_group.domain.kind == other.iommu_group.domain.kind == "blocking"
        await container.set_iommu()
        assert other.iommu_group.domain.kind == "paging"
        with refused(errno.EBUSY):
            kernel.bind(other, "idxd")
    assert other.iommu_group.domain.kind == "identity"
    kernel.bind(other, "idxd")
    with refused(errno.EPERM):
        async with machine.vfio.open_device(other.name):
            pass


async def test_no_file_for_a_group_without_vfio_devices(emulated: Any) -> None:
    machine = await emulated(driver=None)
    with refused(errno.ENOENT):
        await machine.vfio.open_group(0)
    machine.kernel.bind(machine.kernel.devices[0], "vfio-pci")
    group = await machine.vfio.open_group(0)
    await group.close()
    machine.kernel.bind(machine.kernel.devices[0], None)
    with refused(errno.ENOENT):
        await machine.vfio.open_group(0)


async def test_an_open_device_cannot_be_bound_or_removed(emulated: Any) -> None:
    machine = await emulated()
    device = machine.kernel.devices[0]
    async with machine.vfio.open_device(device.name):
        for driver in (None, "idxd"):
            with refused(errno.EBUSY):
                machine.kernel.bind(device, driver)
        with refused(errno.EBUSY):
            machine.kernel.remove_bus(machine.buses[0])
        with refused(errno.EBUSY):
            machine.kernel.close()
    machine.kernel.remove_bus(machine.buses[0])
    assert not machine.kernel.devices
    assert not machine.kernel.groups
    assert machine.vfio.devices == {}


async def test_asking_for_a_device_back(emulated: Any) -> None:
    machine = await emulated()
    device = machine.kernel.devices[0]

    async def use(*, task_status: trio.TaskStatus[None]) -> None:
        async with machine.vfio.open_device(device.name) as opened:
            request = opened.irq(lib.VFIO_PCI_REQ_IRQ_INDEX)
            await request.enable()
            task_status.started()
            await request.wait(deadline=60)
        seen.append("closed")

    seen: list[str] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(use)
        with trio.fail_after(5):
            await machine.kernel.unbind(device)
        seen.append("unbound")
    assert device.driver is None
    assert sorted(seen) == ["closed", "unbound"]


async def test_a_bus_comes_and_goes(emulated: Any) -> None:
    machine = await emulated(buses=(2,))
    kernel, bus = machine.kernel, machine.buses[0]
    with pytest.raises(IommuError, match="EEXIST"):
        kernel.add_bus(bus)
    before = machine.memory.stats()
    for _ in range(3):
        kernel.remove_bus(bus)
        assert not kernel.devices
        assert len(kernel.add_bus(bus)) == 2
    assert machine.memory.stats() == before
    kernel.remove_bus(bus)
    with refused(errno.ENODEV):
        kernel.device("0001:00:00.0")


@pytest.mark.parametrize("config", [IommuConfig(present=False), IommuConfig(stage1=False)])
async def test_without_an_iommu_there_is_no_vfio(emulated: Any, config: IommuConfig) -> None:
    machine = await emulated(config=config, driver=None)
    kernel = machine.kernel
    assert kernel.iommu is None
    assert not kernel.groups
    assert kernel.devices[0].iommu_group is None
    with refused(errno.EINVAL):
        kernel.bind(kernel.devices[0], "vfio-pci")
    kernel.bind(kernel.devices[0], "idxd")
    with refused(errno.ENOENT):
        await machine.vfio.open_group(0)


async def test_closing_hands_everything_back() -> None:
    memory = GuestMemory(16 << 20)
    free = memory.stats().free_frames
    hypervisor = Hypervisor(memory)
    kernel = GuestKernel(memory, hypervisor.hypercall)
    kernel.close()
    hypervisor.close()
    stats = memory.stats()
    assert (stats.free_frames, stats.host_pages) == (free, 0)


async def test_files_are_numbers(emulated: Any) -> None:
    machine = await emulated()
    vfio = machine.kernel.vfio
    container, group = vfio.open_container(), vfio.open_group(0)
    assert len(vfio.files) == 2
    fd = ffi.new("int32_t *", 7)
    with refused(errno.EBADF):
        group.ioctl(lib.VFIO_GROUP_SET_CONTAINER, fd)
    fd[0] = group.fd
    with refused(errno.EINVAL):
        group.ioctl(lib.VFIO_GROUP_SET_CONTAINER, fd)
    for request in (lib.VFIO_GROUP_SET_CONTAINER, lib.VFIO_GROUP_GET_STATUS):
        for null in (0, ffi.NULL):
            with refused(errno.EFAULT):
                group.ioctl(request, null)
    status = ffi.new("struct vfio_group_status *", [7, 0])
    with refused(errno.EINVAL):
        group.ioctl(lib.VFIO_GROUP_GET_STATUS, status)
    for file in (group, container):
        with pytest.raises(VfioError) as error:
            file.ioctl(0x3BFF, 0)
        assert error.value.errno == (errno.ENOTTY if file is group else errno.EINVAL)
    with pytest.raises(trio.WouldBlock):
        group.ioctl(lib.VFIO_GROUP_GET_DEVICE_FD, 0)
    with refused(errno.EFAULT):
        await group.ioctl_sleeping(lib.VFIO_GROUP_GET_DEVICE_FD, 0)
    assert container.ioctl(lib.VFIO_GET_API_VERSION) == 0
    for file in (group, container):
        file.close()
        file.close()
        with refused(errno.EBADF):
            file.ioctl(lib.VFIO_GET_API_VERSION)
    assert len(vfio.files) == 0
    with refused(errno.EBADF):
        vfio.device_file(container.fd)


async def test_an_unknown_request_of_type1(emulated: Any) -> None:
    machine = await emulated()
    async with machine.vfio.open_device(machine.names[0]) as device:
        with refused(errno.ENOTTY):
            device.container.file.ioctl(0x3BFF, 0)
        assert device.container.check_extension(lib.VFIO_UNMAP_ALL)


async def test_a_group_the_host_does_not_let_go_stays_claimed(emulated: Any) -> None:
    machine = await emulated()
    kernel, device = machine.kernel, machine.kernel.devices[0]
    attach = lib.HVCALL_ATTACH_DEVICE_DOMAIN
    async with await machine.vfio.open_container() as container:
        group = await machine.vfio.open_group(0)
        machine.hypervisor.inject(attach, lib.HV_STATUS_INSUFFICIENT_MEMORY)
        with refused(errno.ENOMEM):
            group.set_container(container)
        assert not group.status().container_set
        assert device.iommu_group.domain.kind == "identity"
        group.set_container(container)
        machine.hypervisor.inject(attach, lib.HV_STATUS_INSUFFICIENT_MEMORY)
        with refused(errno.ENOMEM):
            await container.set_iommu()
        await container.set_iommu()
        await container.alloc(4096)
        machine.hypervisor.inject(attach, lib.HV_STATUS_INSUFFICIENT_MEMORY)
        with refused(errno.ENOMEM):
            group.unset_container()
        assert group.status().container_set
        assert machine.memory.stats().pins == 1
        machine.hypervisor.inject(attach, lib.HV_STATUS_INSUFFICIENT_MEMORY, times=2)
        await group.close()
        with refused(errno.ENOMEM):
            await machine.vfio.open_group(0)
        with refused(errno.EBUSY):
            kernel.bind(device, "idxd")
        group = await machine.vfio.open_group(0)
        assert machine.memory.stats().pins == 0
        assert not group.status().container_set
        await group.close()


async def test_a_device_that_is_taken_away_can_be_closed(
    emulated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    machine = await emulated(intx=True)
    async with machine.vfio.open_device(machine.names[0]) as device:
        await device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX).enable(2)
        await device.container.alloc(4096)
        machine.buses[0].unplug(0)
        assert await device.region(2).read(0) == 0xFFFFFFFF
    assert "not reset when it was closed" in caplog.text
