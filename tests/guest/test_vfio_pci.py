"""vfio-pci's device file: structures, sizes, capability chains, and what is the kernel's of the device."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError

pytestmark = pytest.mark.touches_c


@pytest.fixture
async def machine(emulated: Any) -> Any:
    return await emulated(intx=False, ats=True)


@pytest.fixture
async def device(machine: Any) -> AsyncIterator[Any]:
    async with machine.vfio.open_device(machine.names[0]) as device:
        yield device


def refused(number: int) -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: ")


STRUCTURES = [
    (lib.VFIO_DEVICE_GET_INFO, "vfio_device_info", 16),
    (lib.VFIO_DEVICE_GET_REGION_INFO, "vfio_region_info", 32),
    (lib.VFIO_DEVICE_GET_IRQ_INFO, "vfio_irq_info", 16),
]


@pytest.mark.parametrize(("request_number", "name", "minimum"), STRUCTURES)
async def test_argsz(device: Any, request_number: int, name: str, minimum: int) -> None:
    arg = ffi.new(f"struct {name} *")
    for argsz in (0, 4, minimum - 1):
        arg.argsz = argsz
        with refused(errno.EINVAL):
            device.file.ioctl(request_number, arg)
    arg.argsz = minimum
    assert device.file.ioctl(request_number, arg) == 0
    for null in (0, ffi.NULL):
        with refused(errno.EFAULT):
            device.file.ioctl(request_number, null)


async def test_an_old_user_without_capabilities(device: Any) -> None:
    info = ffi.new("struct vfio_device_info *")
    info.argsz, info.cap_offset = 16, 0x77
    device.file.ioctl(lib.VFIO_DEVICE_GET_INFO, info)
    assert (info.num_regions, info.cap_offset) == (9, 0x77)


async def test_a_chain_that_does_not_fit_says_how_much_it_needs(device: Any) -> None:
    memory = ffi.new("uint8_t[]", 256)
    info = ffi.cast("struct vfio_region_info *", memory)
    info.argsz = 32
    device.file.ioctl(lib.VFIO_DEVICE_GET_REGION_INFO, info)
    needed = 32 + ffi.sizeof("struct vfio_region_info_cap_sparse_mmap") + 16
    assert (info.argsz, info.cap_offset) == (needed, 0)
    assert info.flags & lib.VFIO_REGION_INFO_FLAG_CAPS
    assert bytes(ffi.buffer(memory)[32:]) == bytes(224)
    device.file.ioctl(lib.VFIO_DEVICE_GET_REGION_INFO, info)
    assert (info.argsz, info.cap_offset, info.offset) == (needed, 32, 0)
    cap = ffi.cast("struct vfio_region_info_cap_sparse_mmap *", memory + 32)
    assert (cap.header.id, cap.header.version, cap.header.next) == (
        lib.VFIO_REGION_INFO_CAP_SPARSE_MMAP,
        1,
        0,
    )
    assert (cap.nr_areas, cap.areas[0].offset, cap.areas[0].size) == (1, 0, 0x4000)


async def test_region_offsets_are_linuxs(device: Any) -> None:
    info = ffi.new("struct vfio_region_info *")
    for index in range(8):
        info.argsz, info.index = 32, index
        device.file.ioctl(lib.VFIO_DEVICE_GET_REGION_INFO, info)
        assert info.offset == index << 40


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (lib.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, errno.ENODEV),
        (lib.VFIO_DEVICE_PCI_HOT_RESET, errno.ENODEV),
        (lib.VFIO_DEVICE_IOEVENTFD, errno.ENOTTY),
        (lib.VFIO_DEVICE_FEATURE, errno.ENOTTY),
        (lib.VFIO_GET_API_VERSION, errno.ENOTTY),
        (0, errno.ENOTTY),
    ],
)
async def test_requests_it_does_not_have(device: Any, number: int, wanted: int) -> None:
    with refused(wanted):
        device.file.ioctl(number, ffi.NULL)
    with refused(wanted):
        await device.file.ioctl_sleeping(number, ffi.NULL)


async def test_a_reset_sleeps(device: Any) -> None:
    with pytest.raises(trio.WouldBlock):
        device.file.ioctl(lib.VFIO_DEVICE_RESET, 0)
    assert await device.file.ioctl_sleeping(lib.VFIO_DEVICE_RESET, 0) == 0


async def test_without_a_pin_there_is_no_intx(device: Any) -> None:
    irq = device.irq(lib.VFIO_PCI_INTX_IRQ_INDEX)
    assert irq.count == 0
    with refused(errno.EINVAL):
        await irq.enable()


async def test_what_a_user_may_write_in_configuration_space(device: Any, machine: Any) -> None:
    pci = machine.kernel.devices[0]
    config = device.config
    express = pci.find_capability(0x10)
    power = pci.find_capability(0x01)
    ats = pci.find_extended_capability(lib.PCI_EXT_CAP_ID_ATS)
    readonly = [
        0x0,
        0x8,
        0x2C,
        0x34,
        express,
        express + 4,
        express + 0xC,
        power,
        ats,
        ats + 4,
        pci.msix.capability,
    ]
    before = [pci.config_read(at, 4) for at in readonly]
    for at in readonly:
        await config.write(at, 0xFFFFFFFF, 4)
    assert [pci.config_read(at, 4) for at in readonly] == before
    await config.write(0xC, 0x10, 1)
    assert pci.config_read(0xC, 1) == 0x10
    await config.write(0x30, 0xFFFFFFFF, 4)
    assert await config.read(0x30, 4) == 0
    await config.write(4, 0xFFFF, 2)
    assert not pci.config_read(4, 2) & lib.PCI_COMMAND_INTX_DISABLE
    assert await config.read(4, 2) & lib.PCI_COMMAND_INTX_DISABLE


async def test_odd_accesses_to_configuration_space(device: Any, machine: Any) -> None:
    pci, config = machine.kernel.devices[0], device.config
    for offset in range(12):
        for size in (1, 2, 4, 8):
            whole = b"".join(
                pci.config_read(at, 1).to_bytes(1, "little") for at in range(offset, offset + size)
            )
            assert await config.read(offset, size) == int.from_bytes(whole, "little")
    await config.write(0x13, 0x11223344, 4)
    assert await config.read(0x13, 4) == 0x11223344


async def test_ats_follows_the_domain(machine: Any) -> None:
    pci = machine.kernel.devices[0]
    assert pci.ats_enabled
    async with machine.vfio.open_device(pci.name):
        assert pci.ats_enabled
        domain = pci.iommu_group.domain
        assert domain.kind == "paging"
    assert pci.iommu_group.domain.kind == "identity"


async def test_the_msix_table_survives_a_reset(device: Any, machine: Any) -> None:
    await device.set_bus_master()
    irq = device.irq(lib.VFIO_PCI_MSIX_IRQ_INDEX)
    await irq.enable(4)
    for _ in range(2):
        await device.reset()
        await device.region(2).write(0x34, 3)
        assert await irq.wait(3, deadline=1) == 1
    await irq.disable()
    pci = machine.kernel.devices[0]
    assert not pci.config_read(pci.msix.capability + 2, 2) & 0x8000


async def test_a_mapping_outlives_the_device_file(machine: Any) -> None:
    async with machine.vfio.open_device(machine.names[0]) as device:
        view = device.region(0).mmap(0x1000, 0x1000)
        view[:4] = b"abcd"
        assert await device.region(0).read(0x1000) == int.from_bytes(b"abcd", "little")
    assert bytes(view[:4]) == bytes(4)
