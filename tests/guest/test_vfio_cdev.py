"""A device's own file: binding it to an iommufd, attaching, replacing, detaching, and the group's file beside it."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.silicon import DmaAborted
from pvfio.vfio import Hwpt, Ioas
from pvfio.vfio.ioas import command_of

pytestmark = pytest.mark.touches_c

PAGE = 4096
IOVA = 0x2000_0000
EBADFD = 77
BIND, ATTACH, DETACH = (
    lib.VFIO_DEVICE_BIND_IOMMUFD,
    lib.VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    lib.VFIO_DEVICE_DETACH_IOMMUFD_PT,
)
Make = Callable[..., Awaitable[Any]]


def refused(number: int) -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: ")


def reads(function: Any, iova: int) -> bytes | None:
    """What a device reads there; None for a fault."""
    try:
        data: bytes = function.bus.read(iova, 4)
    except DmaAborted:
        return None
    return data


def group_of(machine: Any, number: int = 0) -> Any:
    return machine.kernel.devices[number].iommu_group


async def test_an_unbound_file_is_nothing(emulated: Make) -> None:
    machine = await emulated()
    with refused(errno.ENOENT):
        machine.kernel.vfio.open_cdev("ffff:00:00.0")
    file = machine.kernel.vfio.open_cdev(machine.names[0])
    info = ffi.new("struct vfio_device_info *", {"argsz": ffi.sizeof("struct vfio_device_info")})
    for request, arg in (
        (lib.VFIO_DEVICE_GET_INFO, info),
        (lib.VFIO_DEVICE_RESET, 0),
        (ATTACH, command_of("vfio_device_attach_iommufd_pt")),
        (DETACH, command_of("vfio_device_detach_iommufd_pt")),
        (0, 0),
    ):
        with refused(errno.EINVAL):
            await file.ioctl_sleeping(request, arg)
    with refused(errno.EINVAL):
        file.read(0, 4)
    with refused(errno.EINVAL):
        file.write(0, 0, 4)
    with refused(errno.EINVAL):
        file.map(0, PAGE)
    with refused(errno.EINVAL):
        file.mmio(0)
    await file.close()
    await file.close()
    with refused(errno.EBADF):
        await file.ioctl_sleeping(BIND, command_of("vfio_device_bind_iommufd"))


BINDS: list[tuple[str, int, dict[str, int]]] = [
    ("argsz too small", errno.EINVAL, {"argsz": 15}),
    ("flags", errno.EINVAL, {"flags": 1}),
    ("a negative file number", errno.EINVAL, {"iommufd": -1}),
    ("a file that is not open", errno.EBADF, {"iommufd": 5}),
]


@pytest.mark.parametrize(("why", "number", "fields"), BINDS, ids=[row[0] for row in BINDS])
async def test_a_bind_that_is_refused(emulated: Make, why: str, number: int, fields: dict[str, int]) -> None:
    machine = await emulated()
    async with await machine.vfio.open_iommufd() as iommufd:
        file = machine.kernel.vfio.open_cdev(machine.names[0])
        command = command_of("vfio_device_bind_iommufd", **({"iommufd": iommufd.file.fd} | fields))
        with refused(number):
            await file.ioctl_sleeping(BIND, command)
        with refused(errno.EFAULT):
            await file.ioctl_sleeping(BIND, 0)
        with pytest.raises(VfioError) as caught:
            await file.ioctl_sleeping(BIND, command_of("vfio_device_bind_iommufd", iommufd=file.fd))
        assert caught.value.errno == EBADFD
        with pytest.raises(trio.WouldBlock):
            file.ioctl(BIND, command)
        # Nothing stuck: the group's file opens.
        async with await machine.vfio.open_group(0):
            pass
        await file.close()


async def test_bound_once(emulated: Make) -> None:
    machine = await emulated()
    name = machine.names[0]
    async with await machine.vfio.open_iommufd() as iommufd:
        async with await machine.vfio.bind_device(name, iommufd) as device:
            with refused(errno.EINVAL):
                await device.file.ioctl_sleeping(
                    BIND, command_of("vfio_device_bind_iommufd", iommufd=iommufd.file.fd)
                )
            with refused(errno.EINVAL):
                await machine.vfio.bind_device(name, iommufd)
            assert group_of(machine).owner is not None
            with refused(errno.EBUSY):
                machine.kernel.bind(machine.kernel.devices[0], None)
        assert group_of(machine).owner is None
        async with await machine.vfio.bind_device(name, iommufd) as again:
            assert again.id == device.id == 1


async def test_the_group_and_the_cdev_exclude_each_other(emulated: Make) -> None:
    machine = await emulated(buses=(2,), isolated=False)
    first, second = machine.names
    async with await machine.vfio.open_iommufd() as iommufd:
        async with await machine.vfio.open_group(0):
            for name in (first, second):
                with refused(errno.EBUSY):
                    await machine.vfio.bind_device(name, iommufd)
        async with machine.vfio.open_device(first):
            with refused(errno.EBUSY):
                await machine.vfio.bind_device(second, iommufd)
        async with await machine.vfio.bind_device(second, iommufd):
            with refused(errno.EBUSY):
                await machine.vfio.open_group(0)
        async with await machine.vfio.open_group(0):
            pass


async def test_the_group_must_be_viable_and_of_one_iommufd(emulated: Make) -> None:
    machine = await emulated(buses=(2,), isolated=False)
    first, second = machine.names
    async with await machine.vfio.open_iommufd() as one, await machine.vfio.open_iommufd() as other:
        machine.kernel.bind(machine.kernel.devices[1], "e1000")
        with refused(errno.EPERM):
            await machine.vfio.bind_device(first, one)
        machine.kernel.bind(machine.kernel.devices[1], "vfio-pci")
        async with await machine.vfio.bind_device(first, one):
            with refused(errno.EPERM):
                await machine.vfio.bind_device(second, other)
            async with await machine.vfio.bind_device(second, one) as device:
                assert device.id == 2


async def test_attach_replace_detach(emulated: Make) -> None:
    machine = await emulated()
    function = machine.functions[0]
    async with await machine.vfio.open_iommufd() as iommufd:
        async with await machine.vfio.bind_device(machine.names[0], iommufd) as device:
            await device.set_bus_master()
            with refused(errno.EINVAL):
                _ = device.container
            assert reads(function, IOVA) is None
            spaces = []
            for mark in b"AB":
                ioas = iommufd.alloc_ioas()
                buffer = machine.memory.alloc(PAGE)
                buffer[:] = mark
                ioas.map(buffer, IOVA)
                spaces.append(ioas)
            one, two = spaces
            device.detach()
            number = device.attach(one)
            assert reads(function, IOVA) == b"AAAA"
            # The same again changes nothing.
            assert device.attach(one) == number
            device.attach(two)
            assert device.container is two
            assert reads(function, IOVA) == b"BBBB"
            assert (one.iova_ranges(), len(two.iova_ranges())) == (((0, (1 << 64) - 1),), 2)
            one.destroy()
            device.detach()
            assert reads(function, IOVA) is None
            device.detach()
            device.attach(iommufd.alloc_hwpt(device, two))
            assert reads(function, IOVA) == b"BBBB"
    assert group_of(machine).domain is group_of(machine).default_domain
    assert machine.memory.stats().pins == 0


ATTACHES: list[tuple[str, int, int, dict[str, int]]] = [
    ("argsz", errno.EINVAL, ATTACH, {"argsz": 11}),
    ("flags", errno.EINVAL, ATTACH, {"flags": 2}),
    ("a PASID", errno.EOPNOTSUPP, ATTACH, {"flags": lib.VFIO_DEVICE_ATTACH_PASID}),
    ("unknown", errno.ENOENT, ATTACH, {"pt_id": 77}),
    ("a device", errno.EINVAL, ATTACH, {"pt_id": 2}),
    ("detach: argsz", errno.EINVAL, DETACH, {"argsz": 7}),
    ("detach: flags", errno.EINVAL, DETACH, {"flags": 2}),
    ("detach: a PASID", errno.EOPNOTSUPP, DETACH, {"flags": lib.VFIO_DEVICE_DETACH_PASID}),
]


@pytest.mark.parametrize(
    ("why", "number", "request_number", "fields"), ATTACHES, ids=[r[0] for r in ATTACHES]
)
async def test_an_attach_that_is_refused(
    emulated: Make, why: str, number: int, request_number: int, fields: dict[str, int]
) -> None:
    machine = await emulated()
    async with await machine.vfio.open_iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        async with machine.vfio.open_device(machine.names[0], container=ioas) as device:
            await device.set_bus_master()
            await ioas.alloc(PAGE, iova=IOVA)
            struct = (
                "vfio_device_attach_iommufd_pt"
                if request_number == ATTACH
                else "vfio_device_detach_iommufd_pt"
            )
            with refused(number):
                device.file.ioctl(request_number, command_of(struct, **fields))
            with refused(errno.EFAULT):
                device.file.ioctl(request_number, 0)
            assert reads(machine.functions[0], IOVA) == bytes(4)


async def test_a_group_moves_together(emulated: Make) -> None:
    machine = await emulated(buses=(2,), isolated=False)
    async with await machine.vfio.open_iommufd() as iommufd:
        ioas, other = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        async with (
            await machine.vfio.bind_device(machine.names[0], iommufd) as first,
            await machine.vfio.bind_device(machine.names[1], iommufd) as second,
        ):
            for device in (first, second):
                await device.set_bus_master()
            first.attach(ioas)
            buffer = await ioas.alloc(PAGE, iova=IOVA)
            buffer[:] = 65
            assert reads(machine.functions[1], IOVA) == b"AAAA"
            for where in (other, iommufd.alloc_hwpt(second, other)):
                with refused(errno.EINVAL):
                    second.attach(where)
            second.attach(ioas)
            assert reads(machine.functions[1], IOVA) == b"AAAA"
            # A replacement takes the whole group.
            first.attach(other)
            assert reads(machine.functions[1], IOVA) is None
            assert len(ioas.iova_ranges()) == 1
            second.attach(other)
            first.detach()
            other.map(buffer, IOVA)
            assert reads(machine.functions[1], IOVA) == b"AAAA"
            second.detach()
            assert reads(machine.functions[1], IOVA) is None
    assert machine.memory.stats().pins == 0


async def test_two_devices_share_a_page_table(emulated: Make) -> None:
    machine = await emulated(buses=(1, 1))
    async with await machine.vfio.open_iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        async with (
            machine.vfio.open_device(machine.names[0], container=ioas) as first,
            machine.vfio.open_device(machine.names[1], container=ioas) as second,
        ):
            assert group_of(machine, 0).domain is group_of(machine, 1).domain
            assert first.container is second.container is ioas
            assert ioas.users == 2
        # The last one took the page table with it.
        ioas.destroy()


async def test_a_hand_made_page_table_is_never_found_by_an_attach(emulated: Make) -> None:
    machine = await emulated()
    async with await machine.vfio.open_iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        async with await machine.vfio.bind_device(machine.names[0], iommufd) as device:
            hwpt = iommufd.alloc_hwpt(device, ioas)
            assert device.attach(ioas) != hwpt.id
            assert device.attach(hwpt) == hwpt.id
            assert isinstance(hwpt, Hwpt)


async def test_closed_while_it_is_attached(emulated: Make) -> None:
    """Whatever is forgotten, closing the backend leaves nothing pinned, and the group with the kernel."""
    machine = await emulated()
    iommufd = await machine.vfio.open_iommufd()
    device = await machine.vfio.bind_device(machine.names[0], iommufd)
    ioas = iommufd.alloc_ioas()
    device.attach(ioas)
    await ioas.alloc(4 * PAGE)
    await iommufd.close()
    assert machine.memory.stats().pins == 1
    await machine.vfio.close()
    assert machine.memory.stats().pins == 0
    assert group_of(machine).owner is None
    assert group_of(machine).domain is group_of(machine).default_domain


async def test_a_bind_that_is_cancelled(emulated: Make) -> None:
    machine = await emulated()
    async with await machine.vfio.open_iommufd() as iommufd:
        for deadline in (0, 0.0001):
            with trio.move_on_after(deadline) as scope:
                async with await machine.vfio.bind_device(machine.names[0], iommufd):
                    await trio.sleep_forever()
            assert scope.cancelled_caught
            assert group_of(machine).owner is None
        async with await machine.vfio.bind_device(machine.names[0], iommufd):
            pass


async def test_the_space_is_a_container(emulated: Make) -> None:
    """What a driver does with a container works; what belongs to type1 does not."""
    machine = await emulated()
    async with await machine.vfio.open_iommufd() as iommufd, iommufd.alloc_ioas() as ioas:
        early = await ioas.alloc(3 * PAGE)
        assert early.iova == 4 * PAGE  # aligned to a power of two
        async with machine.vfio.open_device(machine.names[0], container=ioas) as device:
            await device.set_bus_master()
            buffers = [await ioas.alloc(2 * PAGE) for _ in range(4)]
            for n, buffer in enumerate(buffers):
                buffer[:] = n + 1
                assert reads(machine.functions[0], buffer.iova) == bytes([n + 1]) * 4
            await ioas.free(buffers[1])
            ioas.map_dma_batch_nowait([IOVA, IOVA + 2 * PAGE], [buffers[1], buffers[1]])
            assert ioas.unmap_dma_batch_nowait([IOVA, IOVA + 2 * PAGE], [2 * PAGE, 2 * PAGE]).tolist() == [
                8192,
                8192,
            ]
            with refused(errno.ENOENT):
                await ioas.try_unmap_dma(IOVA, PAGE)
            assert ioas.info().iova_ranges == ioas.iova_ranges()
            assert not ioas.check_extension(lib.VFIO_TYPE1v2_IOMMU)
            with refused(errno.ENOTTY):
                await ioas.set_iommu()
            assert await ioas.unmap_all() == 9 * PAGE
            assert early.iova is None
    assert isinstance(ioas, Ioas)
    assert not ioas.ready
