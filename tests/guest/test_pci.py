"""PCI as the guest sees it: real functions over a real vPCI channel, and broken configuration spaces."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from typing import Any

import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.testdev import TestDevice
from pvfio.errors import DeadlineExceeded, DeviceFailed, IommuError
from pvfio.guest.logical_id import LogicalIdRegistry
from pvfio.guest.pci import PciBar, PciDevice, enumerate_bus
from pvfio.silicon import DmaCancelled

pytestmark = pytest.mark.touches_c

MakeGuest = Callable[..., Any]
RAISE = 0x4034


def test_enumeration(make_guest: MakeGuest) -> None:
    guest = make_guest(functions=3)
    assert [device.name for device in guest.devices] == [f"0012:00:00.{i}" for i in range(3)]
    device = guest.devices[2]
    assert (device.segment, device.function) == (0x12, 2)
    assert (device.vendor, device.device, device.class_code, device.revision) == (
        0x1234,
        0x11E8,
        0x00FF00,
        0x10,
    )
    assert device.driver is None
    assert device.iommu_group is None
    assert device.logical_id == guest.bus.logical_id(2)
    guest.registry.unregister(0x12)
    with pytest.raises(IommuError) as raised:
        _ = device.logical_id
    assert raised.value.errno == errno.ENODEV


def test_a_function_that_does_not_answer_is_not_there(make_guest: MakeGuest) -> None:
    guest = make_guest(functions=2)
    guest.bus.unplug(0)
    assert [device.function for device in enumerate_bus(guest.bus, guest.registry)] == [1]
    assert guest.devices[0].config_read(lib.PCI_VENDOR_ID, 2) == 0xFFFF


def test_bars_are_sized_and_put_back(guest: Any) -> None:
    device = guest.devices[0]
    assert device.bars == (PciBar(0, 0x8000, True, True), PciBar(2, 0x1000, False, False))
    assert [(bar.index, bar.size, bar.is_64bit, bar.prefetchable) for bar in guest.bus.bars(0)] == [
        (bar.index, bar.size, bar.is_64bit, bar.prefetchable) for bar in device.bars
    ]
    device.config_write(lib.PCI_BASE_ADDRESS_0, 0xC010_0000)
    before = [device.config_read(0x10 + 4 * i) for i in range(6)]
    command = device.config_read(lib.PCI_COMMAND, 2)
    again = PciDevice(guest.bus, 0, guest.registry)
    assert again.bars == device.bars
    assert [device.config_read(0x10 + 4 * i) for i in range(6)] == before
    assert before[0] & ~0xF == 0xC010_0000
    assert device.config_read(lib.PCI_COMMAND, 2) == command


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 3), (0, 8), (1, 2), (2, 4), (-4, 4), (4096, 4), (4094, 4), (4096, 1)]
)
def test_configuration_accesses_that_cannot_be(guest: Any, offset: int, size: int) -> None:
    with pytest.raises(ValueError):
        guest.devices[0].config_read(offset, size)
    with pytest.raises(ValueError):
        guest.devices[0].config_write(offset, 0, size)


def test_capabilities(make_guest: MakeGuest) -> None:
    device = make_guest(ats=True).devices[0]
    for capability in (lib.PCI_CAP_ID_PM, lib.PCI_CAP_ID_EXP, lib.PCI_CAP_ID_MSIX):
        assert device.config_read(device.find_capability(capability), 1) == capability
    assert device.find_capability(0x55) is None
    assert device.find_extended_capability(lib.PCI_EXT_CAP_ID_ATS) >= 0x100
    assert device.find_extended_capability(0x55) is None
    assert make_guest(ats=False).devices[0].find_extended_capability(lib.PCI_EXT_CAP_ID_ATS) is None


class Space:
    """A channel with nothing but a configuration space, for layouts no device of ours has."""

    segment = 0

    def __init__(self, words: dict[int, int]) -> None:
        self.bytes = bytearray(4096)
        for offset, value in words.items():
            self.bytes[offset : offset + 4] = value.to_bytes(4, "little")

    def config_read(self, _fn: int, offset: int, size: int) -> int:
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def config_write(self, _fn: int, offset: int, size: int, value: int) -> None:
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")


HEADER = {0x00: 0x11E8_1234, 0x04: 0x0010_0000}


@pytest.mark.parametrize(
    "words",
    [
        {0x34: 0x40, 0x40: 0x4001},
        {0x34: 0x40, 0x40: 0x5001, 0x50: 0x4009},
        {0x34: 0x10, 0x10: 0x1011},
        {0x34: 0xFC, 0xFC: 0xFCFF},
        {0x34: 0},
        {0x34: 0x40, 0x40: 0x0411},
        {0x100: 0x1001_0001},
        {0x100: 0x2001_0001, 0x200: 0x1001_0002},
        {0x100: 0xFFFF_FFFF},
        {0x100: 0x0401_0001},
    ],
)
def test_lists_of_capabilities_that_loop_or_lead_nowhere_end(words: dict[int, int]) -> None:
    channel: Any = Space(HEADER | words)
    device = PciDevice(channel, 0, LogicalIdRegistry())
    assert device.find_capability(0x77) is None
    assert device.find_extended_capability(0x77) is None


def test_enable_and_disable(guest: Any) -> None:
    device, function = guest.devices[0], guest.functions[0]
    assert function.memory_enabled
    assert function.master_enabled
    device.disable()
    assert function.memory_enabled
    with pytest.raises(DmaCancelled):
        function.bus.read(0, 4)
    device.enable()
    assert function.master_enabled


def test_ats(make_guest: MakeGuest) -> None:
    guest = make_guest(ats=True)
    device, function = guest.devices[0], guest.functions[0]
    assert device.ats_supported
    assert not device.ats_enabled
    device.enable_ats()
    assert device.ats_enabled
    assert function.ats_enabled
    device.disable_ats()
    assert not function.ats_enabled


def test_no_ats(make_guest: MakeGuest) -> None:
    device = make_guest(ats=False).devices[0]
    assert not device.ats_supported
    assert not device.ats_enabled
    for operation in (device.enable_ats, device.disable_ats):
        with pytest.raises(IommuError) as raised:
            operation()
        assert raised.value.errno == errno.EINVAL


def rings(eventfd: int) -> bool:
    """Whether the eventfd rang; takes the ring."""
    if not select.select([eventfd], [], [], 0)[0]:
        return False
    os.eventfd_read(eventfd)
    return True


@pytest.fixture
def eventfd() -> Any:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_msix(guest: Any, eventfd: int) -> None:
    device = guest.devices[0]
    assert device.msix.vectors == 4
    address, data = guest.bus.compose_msi(0, 3, eventfd)
    device.msix_write(3, address, data)
    device.msix_enable()
    guest.bus.mmio_write(0, 0, RAISE, 4, 3)
    assert rings(eventfd)
    device.msix_mask(3, True)
    guest.bus.mmio_write(0, 0, RAISE, 4, 3)
    assert not rings(eventfd)
    device.msix_mask(3, False)
    assert rings(eventfd)
    device.msix_enable(masked=True)
    guest.bus.mmio_write(0, 0, RAISE, 4, 3)
    assert not rings(eventfd)
    device.msix_enable()
    assert rings(eventfd)
    device.msix_disable()
    guest.bus.mmio_write(0, 0, RAISE, 4, 3)
    assert not rings(eventfd)


def test_msix_is_programmed_while_memory_decoding_is_off(guest: Any, eventfd: int) -> None:
    device = guest.devices[0]
    device.set_command(off=lib.PCI_COMMAND_MEMORY)
    address, data = guest.bus.compose_msi(0, 0, eventfd)
    device.msix_write(0, address, data)
    assert not guest.functions[0].memory_enabled
    device.enable()
    device.msix_enable()
    guest.bus.mmio_write(0, 0, RAISE, 4, 0)
    assert rings(eventfd)


def test_msix_mistakes(guest: Any) -> None:
    device = guest.devices[0]
    for vector in (-1, 4):
        with pytest.raises(ValueError):
            device.msix_write(vector, 0xFEE00000, 0)
    with pytest.raises(ValueError, match="not programmed"):
        device.msix_mask(0, True)
    channel: Any = Space(HEADER)
    without = PciDevice(channel, 0, LogicalIdRegistry())
    for operation in (without.msix_enable, without.msix_disable):
        with pytest.raises(IommuError) as raised:
            operation()
        assert raised.value.errno == errno.ENODEV


async def test_reset_keeps_what_the_kernel_set(guest: Any, eventfd: int) -> None:
    device, function = guest.devices[0], guest.functions[0]
    device.config_write(lib.PCI_BASE_ADDRESS_0, 0xC010_0000)
    device.enable_ats()
    address, data = guest.bus.compose_msi(0, 1, eventfd)
    device.msix_write(1, address, data)
    device.msix_enable()
    guest.bus.mmio_write(0, 0, 0, 4, 0xDEAD)
    await device.reset()
    assert guest.bus.mmio_read(0, 0, 0, 4) == 0
    assert device.config_read(lib.PCI_BASE_ADDRESS_0) & ~0xF == 0xC010_0000
    assert function.master_enabled
    assert device.ats_enabled
    guest.bus.mmio_write(0, 0, RAISE, 4, 1)
    assert rings(eventfd)


async def test_reset_of_what_has_none() -> None:
    channel: Any = Space(HEADER)
    device = PciDevice(channel, 0, LogicalIdRegistry())
    assert not device.has_flr
    with pytest.raises(IommuError) as raised:
        await device.reset()
    assert raised.value.errno == errno.ENOTTY


class Stuck(TestDevice):
    """Never finishes a reset."""

    async def reset(self) -> None:
        await trio.sleep_forever()


async def test_a_reset_that_takes_too_long(guest: Any, autojump_clock: trio.testing.MockClock) -> None:
    function = guest.bus.plug(5, Stuck)
    device = PciDevice(guest.bus, 5, guest.registry)
    device.enable()
    with pytest.raises(DeadlineExceeded) as raised:
        await device.reset(deadline=2.5)
    assert (raised.value.seconds, raised.value.device) == (2.5, device.name)
    assert not function.master_enabled
    device.enable()
    with trio.move_on_after(1) as scope:
        await device.reset(deadline=60)
    assert scope.cancelled_caught
    assert not function.master_enabled


class Vanishing(TestDevice):
    """Is gone after a reset."""

    async def reset(self) -> None:
        await super().reset()
        self.config.poke(lib.PCI_VENDOR_ID, 2, 0xFFFF)


async def test_a_device_that_does_not_come_back(guest: Any) -> None:
    guest.bus.plug(5, Vanishing)
    device = PciDevice(guest.bus, 5, guest.registry)
    with pytest.raises(DeviceFailed, match="does not answer"):
        await device.reset()
