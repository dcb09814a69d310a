"""Devices: regions, configuration space, reset, interrupts."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, VfioError

pytestmark = pytest.mark.touches_c

INVERT, VECTOR, RAISE, ACK = 0x04, 0x30, 0x34, 0x38
CONFIG = lib.VFIO_PCI_CONFIG_REGION_INDEX
INTX, MSIX = lib.VFIO_PCI_INTX_IRQ_INDEX, lib.VFIO_PCI_MSIX_IRQ_INDEX
RW = lib.VFIO_REGION_INFO_FLAG_READ | lib.VFIO_REGION_INFO_FLAG_WRITE
MAPPABLE = RW | lib.VFIO_REGION_INFO_FLAG_MMAP


@pytest.fixture
async def device(backend: Any) -> AsyncIterator[Any]:
    async with backend.vfio.open_device(backend.names[0]) as device:
        yield device


def _refused(number: int) -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: ")


async def test_what_it_says_of_itself(device: Any) -> None:
    assert device.info.flags == lib.VFIO_DEVICE_FLAGS_PCI | lib.VFIO_DEVICE_FLAGS_RESET
    assert (device.info.num_regions, device.info.num_irqs) == (9, 5)
    regions = [(r.size, r.flags & ~lib.VFIO_REGION_INFO_FLAG_CAPS) for r in map(device.region, range(8))]
    empty = (0, 0)
    assert regions == [(0x8000, MAPPABLE), empty, (0x1000, RW), empty, empty, empty, empty, (4096, RW)]
    assert device.region(0).areas == ((0, 0x4000),)
    irqs = [(irq.count, irq.flags & ~lib.VFIO_IRQ_INFO_NORESIZE) for irq in map(device.irq, range(5))]
    assert irqs == [(1, 7), (0, 1), (4, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("index", [-1, lib.VFIO_PCI_VGA_REGION_INDEX, 9, 1 << 31, 1 << 32])
async def test_regions_and_irqs_that_cannot_be(device: Any, index: int) -> None:
    with _refused(errno.EINVAL):
        device.region(index)
    with _refused(errno.EINVAL):
        device.irq(index)


async def test_every_access_size(device: Any, backend: Any) -> None:
    bar = device.region(0)
    for size in (1, 2, 4, 8):
        value = 0x1122334455667788 & (1 << 8 * size) - 1
        await bar.write(0x100, value, size)
        assert await bar.read(0x100, size) == value
        if backend.nowait:
            assert bar.read_nowait(0x100, size) == value
        else:
            with pytest.raises(trio.WouldBlock):
                bar.read_nowait(0x100, size)
        assert bytes(bar.mmap(0, 4096)[0x100 : 0x100 + size]) == value.to_bytes(size, "little")
    await bar.write(0x103, 0xAABBCCDD, 4)
    assert await bar.read(0x103, 4) == 0xAABBCCDD
    await device.region(2).write(INVERT, 0xF0F0)
    assert await device.region(2).read(INVERT) == 0xFFFF0F0F


BAD_ACCESSES = [
    (0, 0, 3, errno.EINVAL),
    (0, 0, 0, errno.EINVAL),
    (0, 0, 16, errno.EINVAL),
    (0, 0x8000, 1, errno.EINVAL),
    (0, 0x7FFD, 4, errno.EINVAL),
    (0, -4, 4, errno.EINVAL),
    (0, 1 << 40, 4, errno.EINVAL),
    (1, 0, 4, errno.EINVAL),
    (6, 0, 4, errno.EINVAL),
    (CONFIG, 4096, 4, errno.EFAULT),
    (CONFIG, 4094, 4, errno.EFAULT),
    (CONFIG, -4, 4, errno.EINVAL),
]


@pytest.mark.parametrize(("index", "offset", "size", "number"), BAD_ACCESSES)
async def test_accesses_that_cannot_be(device: Any, index: int, offset: int, size: int, number: int) -> None:
    region = device.region(index)
    with _refused(number):
        await region.read(offset, size)
    with _refused(number):
        await region.write(offset, 0, size)


async def test_a_value_wider_than_the_access(device: Any) -> None:
    for value in (-1, 0x100):
        with _refused(errno.EINVAL):
            await device.region(0).write(0, value, 1)


BAD_MAPPINGS = [
    (0, 0, 0),
    (0, 0, 100),
    (0, 8, 4096),
    (0, 0x4000, 0x1000),
    (0, 0x3000, 0x2000),
    (0, -4096, 4096),
]


@pytest.mark.parametrize(
    ("index", "offset", "size"), [*BAD_MAPPINGS, (2, 0, 4096), (CONFIG, 0, 4096), (6, 0, 4096)]
)
async def test_mappings_that_cannot_be(device: Any, index: int, offset: int, size: int) -> None:
    with _refused(errno.EINVAL):
        device.region(index).mmap(offset, size)


async def test_memory_decoding_off(device: Any) -> None:
    await device.config.write(4, 0, 2)
    for access in (device.region(2).read(0), device.region(2).write(INVERT, 0)):
        with _refused(errno.EIO):
            await access
    await device.set_bus_master()
    assert await device.config.read(4, 2) & 6 == 6
    assert await device.region(2).read(0) == 0x54534554


async def test_configuration_space(device: Any) -> None:
    config = device.config
    assert await config.read(0, 4) == 0x11E81234
    assert await config.read(0, 8) & 0xFFFFFFFF == 0x11E81234
    await config.write(0, 0xDEADBEEF, 4)
    assert await config.read(0, 4) == 0x11E81234
    await config.write(0x3C, 0x5A, 1)
    assert await config.read(0x3C, 1) == 0x5A
    assert await config.read(0x3D, 1) == 1
    for name, wanted in ((0x11, True), (0x10, True), (0x01, True), (0x05, False)):
        assert (await device.find_capability(name) is not None) == wanted


async def test_sizing_a_bar_moves_nothing(device: Any) -> None:
    config = device.config
    for bar, mask in ((0x10, 0xFFFF8000), (0x14, 0xFFFFFFFF), (0x18, 0xFFFFF000), (0x1C, 0)):
        await config.write(bar, 0xFFFFFFFF, 4)
        assert await config.read(bar, 4) & ~0xF == mask & ~0xF
    assert await config.read(0x10, 4) & 0xF == 0xC
    await config.write(0x10, 0x12340000, 4)
    assert await config.read(0x10, 4) == 0x1234000C
    assert await device.region(2).read(0) == 0x54534554


async def test_the_msix_table_is_the_kernels(device: Any) -> None:
    at = await device.find_capability(0x11)
    before = await device.config.read(at + 2, 2)
    await device.config.write(at + 2, 0xC000, 2)
    assert await device.config.read(at + 2, 2) == before
    table = await device.config.read(at + 4, 4)
    bar = device.region(table & 7)
    base = table & ~7
    assert await bar.read(base, 4) == 0xFFFFFFFF
    assert await bar.read(base, 8) == (1 << 64) - 1
    await bar.write(base, 0, 4)
    await device.irq(MSIX).enable(1)
    await device.irq(MSIX).trigger(0)
    assert await device.irq(MSIX).wait(0, deadline=1) == 1
    assert not any(start <= base < start + size for start, size in bar.areas)


async def test_msix_vectors_fire(device: Any) -> None:
    irq = device.irq(MSIX)
    await device.set_bus_master()
    await irq.enable(3)
    assert irq.enabled == 3
    for vector in (2, 0, 2):
        await device.region(2).write(RAISE, vector)
    assert await irq.wait(2, deadline=1) == 2
    assert irq.wait_nowait(0) == 1
    with pytest.raises(trio.WouldBlock):
        irq.wait_nowait(1)
    with _refused(errno.EINVAL):
        irq.fd(3)
    await irq.disable()
    await irq.disable()
    with _refused(errno.EINVAL):
        await irq.wait(0, deadline=1)
    await irq.enable(4)
    await device.region(2).write(RAISE, 3)
    assert await irq.wait(3, deadline=1) == 1


async def test_loopback(device: Any) -> None:
    irq = device.irq(MSIX)
    await irq.enable(2)
    await irq.trigger(1)
    assert await irq.wait(1, deadline=1) == 1
    with _refused(errno.EINVAL):
        await irq.trigger(2)
    for action in (irq.mask, irq.unmask):
        with _refused(errno.ENOTTY):
            await action(0)


@pytest.mark.parametrize("n", [-1, 0, 5, 1000])
async def test_enabling_too_much_or_nothing(device: Any, n: int) -> None:
    with _refused(errno.EINVAL):
        await device.irq(MSIX).enable(n)
    assert device.irq(MSIX).enabled == 0
    await device.irq(MSIX).enable(4)
    with _refused(errno.EINVAL):
        await device.irq(MSIX).enable(4)


async def test_one_index_at_a_time(device: Any) -> None:
    await device.irq(MSIX).enable(1)
    with _refused(errno.EINVAL):
        await device.irq(INTX).enable()
    await device.irq(MSIX).disable()
    await device.irq(INTX).enable()
    with _refused(errno.EINVAL):
        await device.irq(MSIX).enable(1)


async def test_intx_masks_itself(device: Any) -> None:
    irq, registers = device.irq(INTX), device.region(2)
    await irq.enable()
    await registers.write(RAISE, 0)
    assert await irq.wait(deadline=1) == 1
    with pytest.raises(trio.WouldBlock):
        irq.wait_nowait()
    await irq.unmask()
    assert await irq.wait(deadline=1) == 1
    await registers.write(ACK, 0)
    await irq.unmask()
    with pytest.raises(trio.WouldBlock):
        irq.wait_nowait()
    await irq.mask()
    await registers.write(RAISE, 0)
    with pytest.raises(trio.WouldBlock):
        irq.wait_nowait()
    await irq.unmask()
    assert irq.wait_nowait() == 1


async def test_intx_disable_in_the_command_register(device: Any) -> None:
    irq, registers, config = device.irq(INTX), device.region(2), device.config
    await irq.enable()
    command = await config.read(4, 2)
    await config.write(4, command | 0x400, 2)
    assert await config.read(4, 2) == command | 0x400
    await registers.write(RAISE, 0)
    await irq.trigger()
    with pytest.raises(trio.WouldBlock):
        irq.wait_nowait()
    await config.write(4, command, 2)
    assert await irq.wait(deadline=1) == 1


async def test_waiting_has_a_deadline(device: Any, autojump_clock: trio.testing.MockClock) -> None:
    irq = device.irq(MSIX)
    await irq.enable(1)
    start = trio.current_time()
    with pytest.raises(DeadlineExceeded):
        await irq.wait(0, deadline=2.5)
    assert trio.current_time() - start == pytest.approx(2.5)


async def test_a_wait_ends_when_the_irq_is_disabled(device: Any) -> None:
    irq = device.irq(MSIX)
    await irq.enable(1)
    ended = trio.Event()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await irq.wait(0, deadline=60)
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await irq.disable()
        await ended.wait()


async def test_reset(device: Any) -> None:
    await device.set_bus_master()
    await device.irq(MSIX).enable(2)
    await device.region(0).write(0, 0x77)
    await device.region(2).write(INVERT, 0)
    command = await device.config.read(4, 2)
    await device.reset()
    assert await device.region(0).read(0) == 0
    assert await device.region(2).read(INVERT) == 0
    assert await device.config.read(4, 2) == command
    await device.region(2).write(RAISE, 1)
    assert await device.irq(MSIX).wait(1, deadline=1) == 1


async def test_reset_through_device_control(device: Any) -> None:
    control = await device.find_capability(0x10) + 8
    await device.region(0).write(0, 0x77)
    with pytest.raises(trio.WouldBlock):
        device.config.write_nowait(control, 0x8000, 2)
    assert await device.region(0).read(0) == 0x77
    await device.config.write(control, 0x8000, 2)
    assert await device.region(0).read(0) == 0
    assert not await device.config.read(control, 2) & 0x8000


async def test_closing_resets_and_opening_finds_it_reset(backend: Any) -> None:
    name = backend.names[0]
    async with backend.vfio.open_device(name) as device:
        await device.set_bus_master()
        await device.region(0).write(0, 0x77)
        region, config = device.region(0), device.config
    for access in (region.read(0), config.read(0), device.reset()):
        with _refused(errno.EBADF):
            await access
    await device.close()
    async with backend.vfio.open_device(name) as device:
        assert await device.region(0).read(0) == 0
        assert await device.config.read(4, 2) & 6 == 2


async def test_submissions_need_a_bar_that_takes_them(device: Any, backend: Any) -> None:
    bar = device.region(2)
    bar.doorbell(INVERT, 0xFFFF0000)
    assert await bar.read(INVERT) == 0xFFFF
    item = np.zeros(64, np.uint8)
    for submit in (bar.movdir64b, bar.enqcmd):
        if backend.refuses_submissions or submit == bar.enqcmd:
            with _refused(errno.ENOTTY):
                submit(0, item)
        with pytest.raises(ValueError):
            submit(0, item[:63])
        with pytest.raises(ValueError):
            submit(0, item[:0])
