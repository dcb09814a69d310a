"""A BAR that is mapped: accesses inside its areas, and only there."""

from __future__ import annotations

import errno
import gc
import mmap
import weakref
from typing import Any

import pytest

from pvfio.abi import ffi, lib
from pvfio.vfio.mapped_bar import mapped_bar

pytestmark = pytest.mark.touches_c

PAGE = 4096
SIZE = 8 * PAGE


@pytest.fixture
def areas() -> list[tuple[int, mmap.mmap]]:
    return [(PAGE, mmap.mmap(-1, 2 * PAGE)), (6 * PAGE, mmap.mmap(-1, PAGE))]


def load(bar: Any, offset: int, size: int) -> int:
    value = ffi.new("uint64_t *")
    rc = lib.pv_mmio_load(bar, offset, size, value)
    return int(value[0]) if rc == 0 else int(rc)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_size_at_every_place(areas: list[tuple[int, mmap.mmap]], size: int) -> None:
    bar = mapped_bar(SIZE, areas)
    for start, memory in areas:
        for at in (0, size, 64, len(memory) - size):
            memory[:] = b"\xee" * len(memory)
            value = 0x8796A5B4C3D2E1F0 & (1 << 8 * size) - 1
            assert lib.pv_mmio_store(bar, start + at, size, 0x8796A5B4C3D2E1F0) == 0
            expected = b"\xee" * at + value.to_bytes(size, "little") + b"\xee" * (len(memory) - at - size)
            assert memory[:] == expected
            assert load(bar, start + at, size) == value


def test_submissions(areas: list[tuple[int, mmap.mmap]]) -> None:
    """They wrap inside their page, as on a portal."""
    bar = mapped_bar(SIZE, areas)
    items = bytes(range(1, 193))
    assert lib.pv_mmio_movdir64b(bar, PAGE + 64, items, 3) == 0
    assert areas[0][1][:320] == bytes(64) + items + bytes(64)
    assert lib.pv_mmio_movdir64b(bar, 7 * PAGE - 64, items, 2) == 0
    assert areas[1][1][:64] == items[64:128]
    assert areas[1][1][-64:] == items[:64]
    assert lib.pv_mmio_enqcmd(bar, PAGE, items[:64]) == -errno.ENOTTY


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 4), (PAGE - 8, 8), (3 * PAGE, 1), (5 * PAGE, 8), (7 * PAGE, 4), (SIZE, 4), (1 << 63, 8), (PAGE + 1, 2),
     (PAGE, 3), (PAGE, 0), (PAGE, 16)],
)  # fmt: skip
def test_places_that_are_not_mapped(areas: list[tuple[int, mmap.mmap]], offset: int, size: int) -> None:
    bar = mapped_bar(SIZE, areas)
    assert lib.pv_mmio_store(bar, offset, size, 1) == -errno.EINVAL
    assert load(bar, offset, size) == -errno.EINVAL
    assert all(memory[:] == bytes(len(memory)) for _, memory in areas)


@pytest.mark.parametrize("offset", [0, PAGE + 32, 3 * PAGE, SIZE, 1 << 63])
def test_places_that_take_no_submission(areas: list[tuple[int, mmap.mmap]], offset: int) -> None:
    bar = mapped_bar(SIZE, areas)
    assert lib.pv_mmio_movdir64b(bar, offset, bytes(64), 1) == -errno.EINVAL


@pytest.mark.parametrize("offset", [8 * PAGE, 7 * PAGE + 64, 1 << 63, 8])
def test_areas_that_cannot_be(offset: int) -> None:
    with pytest.raises(ValueError, match="a BAR of"):
        mapped_bar(SIZE, [(offset, mmap.mmap(-1, PAGE))])


def test_what_cannot_be_written() -> None:
    with pytest.raises(BufferError):
        mapped_bar(SIZE, [(0, memoryview(mmap.mmap(-1, PAGE)).toreadonly())])


def test_areas_live_as_long_as_the_bar() -> None:
    memory = mmap.mmap(-1, PAGE)
    gone = weakref.ref(memory)
    bar = mapped_bar(SIZE, [(0, memory)])
    del memory
    gc.collect()
    assert gone() is not None
    assert lib.pv_mmio_store(bar, 0, 4, 1) == 0
    del bar
    gc.collect()
    assert gone() is None
