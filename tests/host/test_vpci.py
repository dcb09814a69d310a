"""vPCI: buses and logical ids, the guest's channel, interrupt messages, removal."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.devices.testdev import TestDevice
from pvfio.silicon import DmaCancelled

pytestmark = pytest.mark.touches_c

REGISTERS = 0x4000


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def rang(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_logical_ids_come_from_the_guid(guest: Any) -> None:
    b = guest.bus.instance_guid.bytes_le
    prefix = b[5] << 24 | b[4] << 16 | b[7] << 8 | (b[6] & 0xF8)
    assert [guest.bus.logical_id(n) for n in guest.bus.offers()] == [prefix, prefix | 1, prefix | 2]
    assert [d.bus.device_id for d in guest.devices] == [prefix, prefix | 1, prefix | 2]


def test_offers_follow_plugging(guest: Any) -> None:
    guest.bus.plug(7, TestDevice)
    guest.bus.unplug(1)
    assert guest.bus.offers() == [0, 2, 7]
    assert list(guest.bus.functions) == [0, 2, 7]


@pytest.mark.parametrize("function", [-1, 0, 8])
def test_function_numbers_that_cannot_be(guest: Any, function: int) -> None:
    with pytest.raises(ValueError):
        guest.bus.plug(function, TestDevice)


def test_a_device_that_cannot_be_made_leaves_nothing(guest: Any) -> None:
    def broken(bus: Any) -> TestDevice:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        guest.bus.plug(4, broken)
    fields = {"logical_device_id": guest.device_id(4), "code": 10}
    assert guest.call("get_logical_device_property", **fields) == lib.HV_STATUS_INVALID_DEVICE_ID
    guest.bus.plug(4, TestDevice)


def test_buses_do_not_share_segments_or_prefixes(guest: Any) -> None:
    with pytest.raises(ValueError):
        guest.host.add_bus(uuid.uuid4(), 1)
    with pytest.raises(ValueError):
        guest.host.add_bus(guest.bus.instance_guid, 2)
    with pytest.raises(ValueError):
        guest.host.add_bus(uuid.uuid4(), 0x10000)
    other = guest.host.add_bus(uuid.UUID(int=0), 2)
    assert other.prefix == 0
    other.plug(0, TestDevice)
    assert other.device_name(0) == "0002:00:00.0"


def test_the_channel_reaches_the_function(guest: Any) -> None:
    bus = guest.bus
    assert bus.config_read(0, lib.PCI_VENDOR_ID, 4) == 0x11E81234
    assert [(b.index, b.size, b.is_64bit) for b in bus.bars(0)] == [(0, 0x8000, True), (2, 0x1000, False)]
    bus.mmio_write(0, 0, REGISTERS + 4, 4, 0x12345678)
    assert bus.mmio_read(0, 0, REGISTERS + 4, 4) == 0xEDCBA987
    assert bus.mmio_read(1, 0, REGISTERS + 4, 4) == 0
    bus.map_area(0, 0, 0x1000, 8)[:] = b"scratch!"
    assert bus.mmio_read(0, 0, 0x1000, 8) == int.from_bytes(b"scratch!", "little")
    assert bus.mmio(0, 0) is None


BAD_ACCESSES = [(0, 0x8000, 4), (0, 0x7FFE, 4), (0, -4, 4), (1, 0, 4), (5, 0, 4), (0, 0, 3), (0, 0, 16)]


@pytest.mark.parametrize(("bar", "offset", "size"), BAD_ACCESSES)
def test_accesses_no_bar_takes(guest: Any, bar: int, offset: int, size: int) -> None:
    with pytest.raises(OSError) as read:
        guest.bus.mmio_read(0, bar, offset, size)
    with pytest.raises(OSError) as write:
        guest.bus.mmio_write(0, bar, offset, size, 0)
    assert read.value.errno == write.value.errno == errno.EINVAL


def test_a_message_rings_its_eventfd(guest: Any, eventfd: int) -> None:
    address, data = guest.bus.compose_msi(0, 1, eventfd)
    assert address & 0xFFF00000 == 0xFEE00000
    guest.devices[0].bus.write(address, data.to_bytes(4, "little"))
    assert rang(eventfd) == 1
    assert not guest.devices[1].bus.msi(address, data)
    guest.bus.release_msi(0, data)
    assert not guest.devices[0].bus.msi(address, data)
    assert rang(eventfd) == 0
    assert [f.reason for f in guest.host.faults.snapshot()] == ["interrupt not accepted"] * 2


def test_messages_through_the_vector_table(guest: Any, eventfd: int) -> None:
    address, data = guest.bus.compose_msi(0, 2, eventfd)
    entry = 0x5000 + 2 * 16
    for at, value in ((0, address), (4, 0), (8, data), (12, 0)):
        guest.bus.mmio_write(0, 0, entry + at, 4, value)
    cap = guest.devices[0].config.find_capability(lib.PCI_CAP_ID_MSIX)
    guest.bus.config_write(0, cap + lib.PCI_MSIX_FLAGS, 2, lib.PCI_MSIX_FLAGS_ENABLE)
    guest.bus.mmio_write(0, 0, REGISTERS + 0x34, 4, 2)
    assert rang(eventfd) == 1


def test_message_data_is_unique_and_comes_back(guest: Any, eventfd: int) -> None:
    messages = [guest.bus.compose_msi(0, n, eventfd)[1] for n in range(64)]
    assert len(set(messages)) == 64
    guest.bus.release_msi(0, messages[5])
    guest.bus.release_msi(0, messages[5])
    guest.bus.release_msi(0, 0xDEAD)
    again = [guest.bus.compose_msi(0, n, eventfd)[1] for n in range(2)]
    assert again[0] == messages[5]
    assert again[1] not in messages


def test_messages_run_out(guest: Any, eventfd: int) -> None:
    with pytest.raises(OSError) as bad:
        guest.bus.compose_msi(0, 0, 1 << 20)
    assert bad.value.errno == errno.EBADF
    # Each message duplicates its eventfd: fill the space without spending files.
    slot = guest.bus._slots[0]
    slot.free.clear()
    slot.next_data = 0xFFF
    guest.bus.compose_msi(0, 0, eventfd)
    with pytest.raises(OSError) as full:
        guest.bus.compose_msi(0, 0, eventfd)
    assert full.value.errno == errno.ENOSPC


def test_a_removed_function(guest: Any, eventfd: int) -> None:
    bus, device = guest.bus, guest.devices[0]
    guest.attach(guest.make(1, flags=0), 0)
    address, data = bus.compose_msi(0, 0, eventfd)
    bus.unplug(0)
    assert bus.config_read(0, 0, 4) == 0xFFFFFFFF
    assert bus.config_read(0, 0, 1) == 0xFF
    bus.config_write(0, 4, 2, 6)
    assert bus.mmio_read(0, 0, 0, 8) == 2**64 - 1
    bus.mmio_write(0, 0, 0, 4, 1)
    assert bus.bars(0) == ()
    assert bus.mmio(0, 0) is None
    bus.release_msi(0, data)
    assert not device.bus.msi(address, data)
    with pytest.raises(DmaCancelled):
        device.bus.read(guest.page, 4)
    with pytest.raises(OSError) as area:
        bus.map_area(0, 0, 0, 4096)
    with pytest.raises(OSError) as message:
        bus.compose_msi(0, 0, eventfd)
    with pytest.raises(OSError) as pin:
        bus.set_intx(0, None)
    assert area.value.errno == message.value.errno == pin.value.errno == errno.ENODEV


async def test_reset_of_a_removed_function(guest: Any) -> None:
    guest.bus.unplug(2)
    with pytest.raises(OSError) as gone:
        await guest.bus.reset(2)
    assert gone.value.errno == errno.ENODEV


@pytest.mark.parametrize("size", [0, 3, 8])
@pytest.mark.parametrize("function", [0, 6])
def test_configuration_access_sizes(guest: Any, size: int, function: int) -> None:
    with pytest.raises(OSError) as read:
        guest.bus.config_read(function, 0, size)
    with pytest.raises(OSError) as write:
        guest.bus.config_write(function, 0, size, 0)
    assert read.value.errno == write.value.errno == errno.EINVAL


async def test_reset_through_the_bus(guest: Any) -> None:
    guest.bus.mmio_write(0, 0, 0, 4, 0x1234)
    await guest.bus.reset(0)
    assert guest.bus.config_read(0, lib.PCI_COMMAND, 2) == 0
    assert guest.bus.mmio_read(0, 0, 0, 4) == 0xFFFFFFFF


def test_dma_of_one_function_is_not_the_others(guest: Any) -> None:
    guest.attach(guest.make(1, flags=0), 0)
    guest.memory.view_guest(guest.output, 4)[:] = b"mine"
    for function, status in ((0, TestDevice.DONE), (1, TestDevice.ABORTED)):
        for register, size, value in ((8, 8, guest.output), (0x10, 8, 0), (0x18, 4, 4), (0x1C, 4, 2)):
            guest.bus.mmio_write(function, 2, register, size, value)
        assert guest.bus.mmio_read(function, 2, 0x20, 4) == status
    assert bytes(guest.devices[0].scratch[:4]) == b"mine"
    assert bytes(guest.devices[1].scratch[:4]) == bytes(4)
