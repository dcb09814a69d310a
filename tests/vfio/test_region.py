"""The stores that go straight to a BAR in C, on the DSA's portals."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from pvfio.abi import dtype_of
from pvfio.errors import VfioError
from pvfio.machine import Machine, MachineConfig

pytestmark = pytest.mark.touches_c

PORTALS = 2


@pytest.fixture
async def device() -> AsyncIterator[Any]:
    async with (
        Machine(MachineConfig(engine="inline", ram=64 << 20)) as machine,
        machine.open("dsa0") as device,
    ):
        yield device


def refused(number: int) -> Any:
    return pytest.raises(VfioError, match=f": {errno.errorcode[number]}: ")


@pytest.mark.parametrize("shape", ["one", "bytes", "records"])
async def test_submissions_of_every_shape(device: Any, shape: str) -> None:
    items = {
        "one": np.zeros(64, np.uint8),
        "bytes": np.zeros((3, 64), np.uint8),
        "records": np.zeros(5, dtype_of("struct dsa_hw_desc")),
    }[shape]
    assert device.region(PORTALS).mmio is not None
    device.region(PORTALS).movdir64b(0, items)


async def test_a_queue_that_is_off_says_retry(device: Any) -> None:
    assert device.region(PORTALS).enqcmd(0x1000, np.zeros(64, np.uint8)) is False


@pytest.mark.parametrize("offset", [1, 32, 1 << 30, 1 << 63])
async def test_places_that_take_no_submission(device: Any, offset: int) -> None:
    portals = device.region(PORTALS)
    for submit in (portals.movdir64b, portals.enqcmd):
        with refused(errno.EINVAL):
            submit(offset, np.zeros(64, np.uint8))


@pytest.mark.parametrize(("offset", "size"), [(0, 3), (0, 0), (1, 4), (1 << 30, 4), (1 << 63, 8)])
async def test_places_that_take_no_store(device: Any, offset: int, size: int) -> None:
    with refused(errno.EINVAL):
        device.region(PORTALS).doorbell(offset, 0, size)


@pytest.mark.parametrize(
    "items", [np.zeros(63, np.uint8), np.zeros(0, np.uint8), np.zeros((2, 64), np.uint8)[:, ::2]]
)
async def test_what_is_no_array_of_submissions(device: Any, items: Any) -> None:
    with pytest.raises((ValueError, BufferError)):
        device.region(PORTALS).movdir64b(0, items)


async def test_a_negative_offset(device: Any) -> None:
    portals = device.region(PORTALS)
    with refused(errno.EINVAL):
        portals.doorbell(-4, 0)
    with refused(errno.EINVAL):
        portals.movdir64b(-64, np.zeros(64, np.uint8))
    with refused(errno.EINVAL):
        portals.enqcmd(-64, np.zeros(64, np.uint8))
    with refused(errno.EINVAL):
        portals.doorbell(0, 1 << 64, 8)


async def test_a_closed_device_takes_nothing(device: Any) -> None:
    portals = device.region(PORTALS)
    await device.close()
    with refused(errno.EBADF):
        portals.doorbell(0, 0)
    with refused(errno.ENOTTY):
        portals.movdir64b(0, np.zeros(64, np.uint8))


async def test_the_kernels_pages_are_closed_to_stores(device: Any) -> None:
    bar = device.region(0)
    assert bar.closed_areas
    for start, size in bar.closed_areas:
        for first, length in bar.areas:
            assert first + length <= start or start + size <= first
