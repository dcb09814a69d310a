"""A PCI function's behaviour: enables, BAR accesses, MSI-X, INTx, power states, function level reset."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.devices.testdev import TestDevice
from pvfio.silicon import DmaAborted, DmaCancelled, TableBus

pytestmark = pytest.mark.touches_c

MEMORY, MASTER = lib.PCI_COMMAND_MEMORY, lib.PCI_COMMAND_MASTER
REGISTERS, TABLE = 0x4000, 0x5000
PBA = TABLE + 16 * 66
MSI = 0xFEE00000
IOVA = 0x100000


@pytest.fixture
def memory() -> bytearray:
    return bytearray(8192)


@pytest.fixture
def device(memory: bytearray) -> Iterator[TestDevice]:
    bus = TableBus()
    bus.map(IOVA, memory)
    made = TestDevice(bus, vectors=66, intx=True)
    made.config_write(lib.PCI_COMMAND, 2, MEMORY | MASTER)
    yield made
    made.close()
    made.close()


def capability(device: TestDevice, cap: int, register: int) -> int:
    offset: int = device.config.find_capability(cap)
    assert offset
    return offset + register


def enable_msix(device: TestDevice, *, vector: int = 0, masked: bool = False, data: int = 0x40) -> None:
    entry = TABLE + 16 * vector
    for at, value in ((0, MSI), (4, 0), (8, data), (12, int(masked))):
        device.write(0, entry + at, 4, value)
    flags = capability(device, lib.PCI_CAP_ID_MSIX, lib.PCI_MSIX_FLAGS)
    device.config_write(flags, 2, lib.PCI_MSIX_FLAGS_ENABLE)


def messages(device: TestDevice) -> int:
    assert isinstance(device.bus, TableBus)
    return device.bus.msis()[0]


def command(device: TestDevice, kind: int, *, src: int = 0, dst: int = 0, count: int = 0) -> int:
    for register, size, value in ((8, 8, src), (0x10, 8, dst), (0x18, 4, count), (0x1C, 4, kind)):
        device.write(2, register, size, value)
    return device.read(2, 0x20, 4)


# Enables.


def test_memory_enable_clear(device: TestDevice) -> None:
    device.write(0, 0, 4, 0x11223344)
    device.config_write(lib.PCI_COMMAND, 2, MASTER)
    assert not device.memory_enabled
    for size in (1, 2, 4, 8):
        assert device.read(0, 0, size) == (1 << 8 * size) - 1
    device.write(0, 0, 4, 0)
    device.config_write(lib.PCI_COMMAND, 2, MASTER | MEMORY)
    assert device.read(0, 0, 4) == 0x11223344


def test_bus_master_clear_cancels_dma(device: TestDevice) -> None:
    device.bus.write(IOVA, b"data")
    device.config_write(lib.PCI_COMMAND, 2, MEMORY)
    assert not device.master_enabled
    with pytest.raises(DmaCancelled):
        device.bus.read(IOVA, 4)
    assert not device.bus.msi(MSI, 1)
    assert command(device, 2, src=IOVA, count=4) == TestDevice.CANCELLED
    device.config_write(lib.PCI_COMMAND, 2, MEMORY | MASTER)
    assert device.bus.read(IOVA, 4) == b"data"


def test_out_of_reset_nothing_is_enabled() -> None:
    fresh = TestDevice(TableBus())
    assert not fresh.memory_enabled
    assert not fresh.master_enabled
    assert fresh.read(0, 0, 4) == 0xFFFFFFFF
    with pytest.raises(DmaCancelled):
        fresh.bus.read(0, 1)


def test_the_devices_own_abort_and_bus_mastering(device: TestDevice) -> None:
    device.cancel_dma(True)
    device.config_write(lib.PCI_COMMAND, 2, MEMORY | MASTER)
    with pytest.raises(DmaCancelled):
        device.bus.read(IOVA, 4)
    device.config_write(lib.PCI_COMMAND, 2, MEMORY)
    device.cancel_dma(False)
    with pytest.raises(DmaCancelled):
        device.bus.read(IOVA, 4)
    device.config_write(lib.PCI_COMMAND, 2, MEMORY | MASTER)
    device.bus.read(IOVA, 4)


def test_closing_ends_dma_for_good(device: TestDevice) -> None:
    device.close()
    device.config_write(lib.PCI_COMMAND, 2, MEMORY | MASTER)
    device.cancel_dma(False)
    with pytest.raises(DmaCancelled):
        device.bus.read(IOVA, 4)


def test_hooks_hear_of_enables() -> None:
    heard: list[tuple[bool, bool]] = []

    class Listener(TestDevice):
        __test__ = False

        def on_enable(self, memory: bool, master: bool) -> None:
            heard.append((memory, master))

    device = Listener(TableBus())
    device.config_write(lib.PCI_COMMAND, 2, MEMORY)
    device.config_write(lib.PCI_COMMAND, 2, MEMORY)
    device.config_write(lib.PCI_COMMAND, 2, MEMORY | MASTER)
    device.function_level_reset()
    assert heard == [(True, False), (True, True), (False, False)]


# BAR accesses.


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", range(8))
def test_unaligned_accesses(device: TestDevice, size: int, offset: int) -> None:
    pattern = bytes(range(1, 17))
    device.scratch[:16] = pattern
    assert device.read(0, offset, size) == int.from_bytes(pattern[offset : offset + size], "little")
    value = 0xF1F2F3F4F5F6F7F8 & (1 << 8 * size) - 1
    device.write(0, offset, size, value)
    expected = bytearray(pattern)
    expected[offset : offset + size] = value.to_bytes(size, "little")
    assert device.scratch[:16] == expected


def test_memory_for_another_process(device: TestDevice) -> None:
    fd, at = device.map_fd(0, 0x1000, 0x2000)
    device.scratch[0x1000:0x1004] = b"ours"
    with mmap.mmap(fd, 0x2000, offset=at) as theirs:
        assert theirs[:4] == b"ours"
        theirs[:6] = b"theirs"
    assert bytes(device.map_area(0, 0x1002, 4)) == b"eirs"
    for size in (0, 0x10000):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)


@pytest.mark.parametrize(
    ("bar", "offset", "size"),
    [
        (0, 0x4000, 0x1000),
        (0, 0x3000, 0x2000),
        (0, 0, 0),
        (0, -0x1000, 0x1000),
        (1, 0, 0x1000),
        (2, 0, 0x1000),
    ],
)
def test_what_is_not_memory(device: TestDevice, bar: int, offset: int, size: int) -> None:
    for ask in (device.map_fd, device.map_area):
        with pytest.raises(OSError) as refused:
            ask(bar, offset, size)
        assert refused.value.errno == errno.EINVAL


BAD_ACCESSES = [(0, 0x8000, 1), (0, 0x7FFD, 4), (0, -1, 1), (1, 0, 4), (6, 0, 4), (0, 0, 0), (0, 0, 5)]


@pytest.mark.parametrize(("bar", "offset", "size"), BAD_ACCESSES)
@pytest.mark.parametrize("enabled", [0, MEMORY])
def test_accesses_that_are_refused(
    device: TestDevice, bar: int, offset: int, size: int, enabled: int
) -> None:
    device.config_write(lib.PCI_COMMAND, 2, enabled)
    with pytest.raises(OSError) as read:
        device.read(bar, offset, size)
    with pytest.raises(OSError) as write:
        device.write(bar, offset, size, 0)
    assert read.value.errno == write.value.errno == errno.EINVAL


def test_mapped_areas(device: TestDevice) -> None:
    view = device.map_area(0, 0x1000, 0x2000)
    view[0:4] = b"live"
    assert device.read(0, 0x1000, 4) == int.from_bytes(b"live", "little")
    assert len(device.map_area(0, 0, 0x4000)) == 0x4000


BAD_AREAS = [(0, 0, 0x4001), (0, 0x4000, 1), (0, TABLE, 4096), (0, 0, 0), (0, -1, 4), (2, 0, 4096), (1, 0, 1)]


@pytest.mark.parametrize(("bar", "offset", "size"), BAD_AREAS)
def test_areas_nobody_may_map(device: TestDevice, bar: int, offset: int, size: int) -> None:
    with pytest.raises(OSError) as refused:
        device.map_area(bar, offset, size)
    assert refused.value.errno == errno.EINVAL


# MSI-X.


def test_msix_message(device: TestDevice) -> None:
    enable_msix(device, vector=65, data=0x1234)
    device.write(2, 0x34, 4, 65)
    assert isinstance(device.bus, TableBus)
    assert device.bus.msis() == (1, MSI, 0x1234)


def test_msix_vector_mask_and_pba(device: TestDevice) -> None:
    enable_msix(device, vector=65, masked=True)
    device.write(2, 0x34, 4, 65)
    assert messages(device) == 0
    assert device.read(0, PBA + 8, 8) == 2
    assert device.read(0, PBA + 8, 1) == 2
    device.write(0, PBA + 8, 8, 0)
    assert device.read(0, PBA + 8, 4) == 2
    device.write(0, TABLE + 65 * 16 + 12, 4, 0)
    assert messages(device) == 1
    assert device.read(0, PBA + 8, 8) == 0


def test_msix_function_mask(device: TestDevice) -> None:
    enable_msix(device)
    flags = capability(device, lib.PCI_CAP_ID_MSIX, lib.PCI_MSIX_FLAGS)
    device.config_write(flags, 2, lib.PCI_MSIX_FLAGS_ENABLE | lib.PCI_MSIX_FLAGS_MASKALL)
    device.write(2, 0x34, 4, 0)
    assert messages(device) == 0
    device.config_write(flags + 1, 1, lib.PCI_MSIX_FLAGS_ENABLE >> 8)
    assert messages(device) == 1


def test_msix_table_accesses(device: TestDevice) -> None:
    assert device.read(0, TABLE + 12, 4) == 1
    device.write(0, TABLE, 8, 0xAABBCCDD_FEE01000)
    assert device.read(0, TABLE + 4, 4) == 0xAABBCCDD
    assert device.read(0, TABLE + 1, 2) == 0xE010
    assert device.read(0, TABLE + 2, 4) == 0xCCDDFEE0
    device.write(0, TABLE, 1, 0xFF)
    device.write(0, TABLE + 2, 2, 0xFFFF)
    assert device.read(0, TABLE, 8) == 0xAABBCCDD_FEE01000
    assert device.read(0, PBA + 16, 8) == 0
    device.write(0, PBA + 16, 8, 1)
    assert device.read(0, TABLE + 0x1000 - 8, 8) == 0


# INTx.


def test_intx_level(device: TestDevice) -> None:
    levels: list[bool] = []
    device.write(2, 0x34, 4, 0)
    device.connect_intx(levels.append)
    assert levels == [True]
    assert device.config_read(lib.PCI_STATUS, 2) & lib.PCI_STATUS_INTERRUPT
    device.write(2, 0x34, 4, 0)
    device.write(2, 0x38, 4, 1)
    assert levels == [True, False]
    assert not device.config_read(lib.PCI_STATUS, 2) & lib.PCI_STATUS_INTERRUPT


def test_intx_disable(device: TestDevice) -> None:
    levels: list[bool] = []
    device.connect_intx(levels.append)
    device.config_write(lib.PCI_COMMAND, 2, MEMORY | lib.PCI_COMMAND_INTX_DISABLE)
    device.write(2, 0x34, 4, 0)
    assert levels == []
    assert device.config_read(lib.PCI_STATUS, 2) & lib.PCI_STATUS_INTERRUPT
    device.config_write(lib.PCI_COMMAND, 2, MEMORY)
    assert levels == [True]


def test_msix_silences_the_pin(device: TestDevice) -> None:
    levels: list[bool] = []
    device.connect_intx(levels.append)
    device.write(2, 0x34, 4, 0)
    enable_msix(device)
    assert levels == [True, False]
    device.write(2, 0x34, 4, 0)
    assert (levels, messages(device)) == ([True, False], 1)


def test_a_function_without_a_pin() -> None:
    device = TestDevice(TableBus())
    device.config_write(lib.PCI_COMMAND, 2, MEMORY | lib.PCI_COMMAND_INTX_DISABLE)
    assert device.config_read(lib.PCI_COMMAND, 2) == MEMORY
    device.write(2, 0x34, 4, 0)
    assert device.read(2, 0x38, 4) == 0


# Power states.


def test_d3hot_and_back(device: TestDevice) -> None:
    control = capability(device, lib.PCI_CAP_ID_PM, lib.PCI_PM_CTRL)
    device.write(0, 0, 4, 0x77)
    device.config_write(control, 2, lib.PCI_PM_D3HOT)
    assert device.config_read(control, 2) & 3 == 3
    assert device.read(0, 0, 4) == 0xFFFFFFFF
    with pytest.raises(DmaCancelled):
        device.bus.read(IOVA, 1)
    assert device.config_read(0, 2) == 0x1234
    device.config_write(control, 2, lib.PCI_PM_D0)
    assert device.read(0, 0, 4) == 0x77
    device.bus.read(IOVA, 1)


@pytest.mark.parametrize("state", [1, 2])
@pytest.mark.parametrize("before", [lib.PCI_PM_D0, lib.PCI_PM_D3HOT])
def test_states_the_function_does_not_have(device: TestDevice, state: int, before: int) -> None:
    control = capability(device, lib.PCI_CAP_ID_PM, lib.PCI_PM_CTRL)
    device.config_write(control, 2, before)
    device.config_write(control, 2, state)
    assert device.config_read(control, 2) == lib.PCI_PM_CTRL_NO_SOFT_RESET | before


# Function level reset.

FLR = lib.PCI_EXP_DEVCTL_BCR_FLR
FLR_WRITES = [(0, 2, FLR), (1, 1, FLR >> 8), (0, 4, FLR), (-1, 4, FLR << 8), (-2, 4, FLR << 16)]


@pytest.mark.parametrize(("at", "size", "value"), FLR_WRITES)
def test_flr_by_device_control(device: TestDevice, at: int, size: int, value: int) -> None:
    levels: list[bool] = []
    device.connect_intx(levels.append)
    enable_msix(device, vector=3)
    device.write(0, 0x100, 4, 5)
    device.config_write(lib.PCI_CACHE_LINE_SIZE, 1, 16)
    before = bytes(TestDevice(TableBus(), vectors=66, intx=True).config.data)
    control = capability(device, lib.PCI_CAP_ID_EXP, lib.PCI_EXP_DEVCTL)
    device.config_write(control + at, size, value)
    assert bytes(device.config.data) == before
    assert not device.memory_enabled
    with pytest.raises(DmaCancelled):
        device.bus.read(IOVA, 1)
    device.config_write(lib.PCI_COMMAND, 2, MEMORY | MASTER)
    assert device.read(0, 0x100, 4) == 0
    assert device.read(0, TABLE + 3 * 16 + 12, 4) == 1
    assert device.read(0, TABLE + 3 * 16, 8) == 0


def test_other_device_control_bits_do_not_reset(device: TestDevice) -> None:
    control = capability(device, lib.PCI_CAP_ID_EXP, lib.PCI_EXP_DEVCTL)
    device.config_write(control, 2, 0x7FFF)
    device.config_write(control + 2, 2, 0x8000)
    assert device.memory_enabled
    assert device.config_read(control, 2) == 0x78FF


async def test_reset_deasserts_the_pin_and_ends_the_devices_abort(device: TestDevice) -> None:
    levels: list[bool] = []
    device.connect_intx(levels.append)
    device.write(2, 0x34, 4, 0)
    device.cancel_dma(True)
    await device.reset()
    assert levels == [True, False]
    device.config_write(lib.PCI_COMMAND, 2, MEMORY | MASTER)
    device.bus.read(IOVA, 1)


# The teaching device's own registers.


def test_dma_both_ways(device: TestDevice, memory: bytearray) -> None:
    memory[:8] = b"to learn"
    assert command(device, 2, src=IOVA, dst=0x10, count=8) == TestDevice.DONE
    assert device.read(0, 0x10, 8) == int.from_bytes(b"to learn", "little")
    assert command(device, 1, src=0x10, dst=IOVA + 4096, count=8) == TestDevice.DONE
    assert memory[4096:4104] == b"to learn"
    assert command(device, 3, src=IOVA, dst=IOVA + 100, count=8) == TestDevice.DONE
    assert memory[100:108] == b"to learn"
    assert device.read(2, 0x24, 4) == 8


def test_dma_that_is_aborted(device: TestDevice) -> None:
    assert command(device, 1, src=0, dst=IOVA + 8190, count=8) == TestDevice.ABORTED
    assert device.read(2, 0x28, 8) == IOVA + 8192
    assert device.read(2, 0x24, 4) == 2
    with pytest.raises(DmaAborted):
        device.bus.read(IOVA + 8192, 1)


BAD_COMMANDS = [
    (0, 0, 0, 4),
    (4, 0, 0, 4),
    (0xFF, 0, 0, 4),
    (1, 0x3FFD, IOVA, 4),
    (2, IOVA, 0x4000, 1),
    (3, IOVA, IOVA, 0x4001),
    (1, 2**64 - 1, IOVA, 1),
]


@pytest.mark.parametrize(("kind", "src", "dst", "count"), BAD_COMMANDS)
def test_bad_commands(device: TestDevice, kind: int, src: int, dst: int, count: int) -> None:
    assert command(device, kind, src=src, dst=dst, count=count) == TestDevice.BAD_COMMAND
    assert device.read(2, 0x24, 4) == 0


def test_dma_then_interrupt(device: TestDevice) -> None:
    enable_msix(device, vector=7)
    device.write(2, 0x30, 4, 7)
    assert command(device, 0x102, src=IOVA, count=4) == TestDevice.DONE
    assert messages(device) == 1
    device.write(2, 0x34, 4, 66)
    assert messages(device) == 1


def test_registers(device: TestDevice) -> None:
    assert device.read(0, REGISTERS, 4) == 0x54534554
    device.write(0, REGISTERS, 4, 0)
    assert device.read(2, 0, 4) == 0x54534554
    device.write(0, REGISTERS + 4, 4, 0x0000FFFF)
    assert device.read(2, 4, 4) == 0xFFFF0000
    device.write(2, 8, 4, 0x11111111)
    device.write(2, 12, 4, 0x22222222)
    assert device.read(2, 8, 8) == 0x22222222_11111111
    device.write(2, 0x18, 8, 2**64 - 1)
    device.write(2, 0x18, 2, 0xFFFF)
    assert device.read(2, 0x18, 8) == 0
    assert device.read(0, 0x7000, 4) == 0
    device.write(0, 0x7000, 4, 1)


ACCESS = st.tuples(
    st.sampled_from(["config", "bar"]),
    st.booleans(),
    st.integers(0, 3),
    st.one_of(st.integers(-8, 0x100), st.integers(0x3FF0, 0x5480), st.integers(0x7FF0, 0x8010)),
    st.sampled_from([0, 1, 2, 3, 4, 8]),
    st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2, 3, 6, 0x101, 0xC000, IOVA])),
)


@given(accesses=st.lists(ACCESS, max_size=60))
def test_any_access_is_answered(accesses: list[tuple[str, bool, int, int, int, int]]) -> None:
    bus, memory = TableBus(), bytearray(4096)
    bus.map(IOVA, memory)
    device = TestDevice(bus, vectors=66, intx=True, ats=True)
    device.connect_intx(lambda level: None)
    identity = device.config_read(0, 4)
    for space, is_write, bar, offset, size, value in accesses:
        bound = 1 << 8 * size
        refused = size in ((0, 3, 8) if space == "config" else (0, 3))
        if space == "bar":
            refused = refused or not 0 <= offset <= {0: 0x8000, 2: 0x1000}.get(bar, -1) - size
        with pytest.raises(OSError, match=r"BAR|access") if refused else contextlib.nullcontext():
            if space == "config" and is_write:
                device.config_write(offset, size, value % bound)
            elif space == "config":
                assert 0 <= device.config_read(offset, size) < bound
            elif is_write:
                device.write(bar, offset, size, value % bound)
            else:
                assert 0 <= device.read(bar, offset, size) < bound
    assert device.config_read(0, 4) == identity
    device.close()
