"""IovaAllocator: properties over random histories, and the tables of what is refused."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.errors import VfioError
from pvfio.vfio import IovaAllocator
from tests.profiles import tries

PAGE = 4096
MIB2 = 2 << 20


def _overlap(ranges: dict[int, int]) -> bool:
    end = 0
    for iova, size in sorted(ranges.items()):
        if iova < end:
            return True
        end = iova + size
    return False


def _inside(iova: int, size: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= iova and iova + size - 1 <= last for first, last in ranges)


RANGES = ((0, 0x3FFF_FFFF), (0x8000_0000, 0xFEDF_FFFF), (0xFEF0_0000, 0x1_3FFF_FFFF))
STEP = st.tuples(
    st.sampled_from(["alloc", "free", "reserve"]), st.integers(1, 5 << 20), st.integers(0, 1 << 30)
)


@settings(max_examples=tries(150), deadline=None)
@given(st.lists(STEP, max_size=80))
def test_ranges_never_overlap_and_come_back_whole(steps: list[tuple[str, int, int]]) -> None:
    allocator = IovaAllocator(RANGES)
    whole = allocator.free_bytes
    mine: dict[int, int] = {}
    for action, size, where in steps:
        if action == "alloc":
            iova = allocator.alloc(size)
            rounded = -(-size // PAGE) * PAGE
            assert iova % min(1 << (rounded - 1).bit_length(), MIB2) == 0
            assert _inside(iova, rounded, RANGES)
            assert iova > 0
            mine[iova] = rounded
        elif action == "reserve":
            iova = where // PAGE * PAGE
            rounded = -(-size // PAGE) * PAGE
            if allocator.reserve(iova, size):
                mine[iova] = rounded
            else:
                taken = any(a < iova + rounded and iova < a + n for a, n in mine.items())
                assert iova == 0 or taken or not _inside(iova, rounded, RANGES)
        elif mine:
            iova = sorted(mine)[where % len(mine)]
            assert allocator.free(iova) == mine.pop(iova)
        assert allocator.allocated == mine
        assert not _overlap(mine)
        assert allocator.free_bytes == whole - sum(mine.values())
    for iova in list(mine):
        allocator.free(iova)
    assert allocator.free_bytes == whole
    assert allocator.alloc(0x3FC0_0000) % MIB2 == 0


@settings(max_examples=tries(50), deadline=None)
@given(st.integers(1, 64), st.randoms(use_true_random=False))
def test_every_page_of_a_range_can_be_handed_out(pages: int, random: object) -> None:
    allocator = IovaAllocator(((PAGE, PAGE + pages * PAGE - 1),))
    got = {allocator.alloc(PAGE) for _ in range(pages)}
    assert got == {PAGE * (i + 1) for i in range(pages)}
    with pytest.raises(VfioError) as error:
        allocator.alloc(1)
    assert error.value.errno == errno.ENOSPC
    order = sorted(got)
    random.shuffle(order)  # type: ignore[attr-defined]
    for iova in order:
        allocator.free(iova)
    assert allocator.free_bytes == pages * PAGE


def test_fragments_that_cannot_be_seen_from_the_top_are_found() -> None:
    allocator = IovaAllocator(((0, (64 << 20) - 1),))
    pages = [allocator.alloc(PAGE) for _ in range((64 << 20) // PAGE - 1)]
    for iova in sorted(pages)[1::2]:
        allocator.free(iova)
    low = sorted(pages)[100]
    for iova in (low, low + PAGE):
        if allocator.owns(iova):
            allocator.free(iova)
    hole = allocator.alloc(2 * PAGE)
    assert hole % (2 * PAGE) == 0
    assert low - PAGE <= hole <= low + PAGE


def test_narrower_ranges_keep_what_is_handed_out() -> None:
    allocator = IovaAllocator(((0, (1 << 32) - 1),))
    top = allocator.alloc(PAGE)
    allocator.set_ranges(((0, (1 << 30) - 1),))
    assert allocator.owns(top)
    assert allocator.alloc(PAGE) < 1 << 30
    allocator.free(top)
    assert allocator.free_bytes == (1 << 30) - 2 * PAGE


@pytest.mark.parametrize(("size", "align"), [(0, 0), (-1, 0), (PAGE, 3), (PAGE, -4096), (PAGE, 3 * PAGE)])
def test_bad_sizes_and_alignments(size: int, align: int) -> None:
    with pytest.raises(ValueError):
        IovaAllocator(RANGES).alloc(size, align)


@pytest.mark.parametrize(
    ("iova", "size"), [(0, PAGE), (1, PAGE), (PAGE, 0), (0x3FFF_F000, 2 * PAGE), (0x7000_0000, PAGE)]
)
def test_ranges_that_cannot_be_reserved(iova: int, size: int) -> None:
    assert not IovaAllocator(RANGES).reserve(iova, size)


def test_freeing_what_is_not_handed_out() -> None:
    with pytest.raises(KeyError):
        IovaAllocator(RANGES).free(PAGE)
