"""The IOVA allocator: against brute force over every page, at its limits, and after a million operations."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.guest.iova_domain import IovaDomain
from pvfio.guest.transport import on_vp
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

PAGE = 4096
SPACE = 1024


def last_of(pages: int) -> int:
    return (pages << 12) - 1


def rounded(pages: int) -> int:
    """What a range of that many pages occupies."""
    return 1 << (pages - 1).bit_length() if pages <= 32 else pages


def highest(free: list[bool], pages: int, limit: int) -> int | None:
    """The highest free aligned block below a limit (pages), else the highest place, by looking at all of them."""
    align = 1 << (pages - 1).bit_length()
    for size in (align, rounded(pages)):
        for start in range(len(free) - 1, 0, -1):
            end = start + size
            if start % align == 0 and end - 1 <= limit and end <= len(free) and all(free[start:end]):
                return start
    return None


OPERATION = st.tuples(
    st.integers(0, 3), st.one_of(st.integers(1, 40), st.integers(33, 600)), st.integers(0, SPACE + 100)
)


@given(
    st.lists(OPERATION, max_size=120),
    st.lists(st.tuples(st.integers(0, SPACE), st.integers(0, 80)), max_size=3),
)
def test_every_range_is_where_it_may_be(
    operations: list[tuple[int, int, int]], reserved: list[tuple[int, int]]
) -> None:
    domain = IovaDomain(0, last_of(SPACE), vps=2)
    free = [False] + [True] * (SPACE - 1)
    for start, size in reserved:
        domain.reserve(start << 12, (start + size) << 12)
        free[start : start + size + 1] = [False] * len(free[start : start + size + 1])
    live: dict[int, int] = {}
    for kind, pages, limit in operations:
        with on_vp(kind & 1):
            if kind >= 2 and live:
                start = list(live)[pages % len(live)]
                domain.free(start << 12)
                size = live.pop(start)
                free[start : start + size] = [True] * size
                with pytest.raises(KeyError):
                    domain.free(start << 12)
                continue
            if highest(free, pages, limit - 1) is None:
                with pytest.raises(OSError, match="no IOVAs"):
                    domain.alloc(pages << 12, last_of(limit))
                continue
            start = domain.alloc(pages << 12, last_of(limit)) >> 12
        size = rounded(pages)
        assert all(free[start : start + size])
        assert start % (1 << (pages - 1).bit_length()) == 0
        assert start + size <= limit
        live[start] = size
        free[start : start + size] = [False] * size
        domain.check()
    assert {iova >> 12 for iova, _, _ in domain.ranges()} == set(live)
    for start in live:
        domain.free(start << 12)
    domain.purge()
    domain.check()
    assert domain.stats()[:4] == (0, 0, 0, 0)


@given(st.lists(st.tuples(st.booleans(), st.integers(33, 300), st.integers(1, SPACE)), max_size=80))
def test_large_ranges_lie_as_high_as_they_can(operations: list[tuple[bool, int, int]]) -> None:
    domain = IovaDomain(0, last_of(SPACE))
    free = [False] + [True] * (SPACE - 1)
    live: list[tuple[int, int]] = []
    for allocate, pages, limit in operations:
        if not allocate and live:
            start, size = live.pop(limit % len(live))
            domain.free(start << 12)
            free[start : start + size] = [True] * size
            continue
        wanted = highest(free, pages, limit - 1)
        if wanted is None:
            with pytest.raises(OSError, match="no IOVAs"):
                domain.alloc(pages << 12, last_of(limit))
            continue
        assert domain.alloc(pages << 12, last_of(limit)) == wanted << 12
        live.append((wanted, pages))
        free[wanted : wanted + pages] = [False] * pages
        domain.check()


def test_top_down_below_the_limit_and_around_what_is_reserved() -> None:
    domain = IovaDomain(0, (1 << 48) - 1, reserved=((0xFEE0_0000, 0xFEEF_FFFF),))
    assert domain.alloc(PAGE) == (1 << 48) - PAGE
    assert domain.alloc(PAGE, (1 << 32) - 1) == (1 << 32) - PAGE
    assert domain.alloc(3 * PAGE, (1 << 32) - 1) == (1 << 32) - 8 * PAGE
    assert domain.alloc(1 << 24, (1 << 32) - 1) == 0xFD00_0000
    # The 14 MiB above the window, less what lies at the top.
    assert domain.alloc(1 << 20, 0xFEFF_FFFF) == 0xFEF0_0000


def test_a_magazine_gives_back_the_newest_that_fits() -> None:
    domain = IovaDomain(0, (1 << 48) - 1)
    low = domain.alloc(PAGE, (1 << 32) - 1)
    high = domain.alloc(PAGE)
    domain.free(low)
    domain.free(high)
    assert domain.stats().cached == 2
    assert domain.alloc(PAGE, (1 << 32) - 1) == low
    assert domain.alloc(PAGE) == high
    assert domain.stats().cached == 0


def test_a_magazine_gives_nothing_that_reaches_above_the_limit() -> None:
    domain = IovaDomain(0, last_of(1 << 20))
    iova = domain.alloc(8 * PAGE)
    domain.free(iova)
    assert domain.alloc(8 * PAGE, iova + 7 * PAGE - 1) == iova - 8 * PAGE
    assert domain.alloc(8 * PAGE, iova + 8 * PAGE - 2) == iova - 16 * PAGE
    assert domain.alloc(8 * PAGE, iova + 8 * PAGE - 1) == iova


def test_magazines_belong_to_a_vp_and_the_depot_to_all() -> None:
    domain = IovaDomain(0, (1 << 40) - 1, vps=2)
    magazine = lib.PV_IOVA_MAGAZINE
    ranges = [domain.alloc(PAGE) for _ in range(3 * magazine)]
    for iova in ranges:
        domain.free(iova)
    with on_vp(1):
        # VP 0 has the first magazine and the one it fills; the second was full when a third was needed.
        others = [domain.alloc(PAGE) for _ in range(magazine)]
        assert set(others) == set(ranges[magazine : 2 * magazine])
        assert domain.alloc(PAGE) not in ranges
    assert domain.stats().cached == 2 * magazine


def test_a_full_depot_gives_back_to_the_tree() -> None:
    domain = IovaDomain(0, (1 << 40) - 1)
    most = (lib.PV_IOVA_DEPOT + 2) * lib.PV_IOVA_MAGAZINE
    ranges = [domain.alloc(2 * PAGE) for _ in range(most + 1000)]
    for iova in ranges:
        domain.free(iova)
    domain.check()
    assert most - lib.PV_IOVA_MAGAZINE <= domain.stats().cached <= most


def test_exhaustion_empties_the_magazines_of_every_vp_first() -> None:
    domain = IovaDomain(0, last_of(257), vps=4)
    ranges = []
    for vp in range(4):
        with on_vp(vp):
            ranges += [domain.alloc(PAGE) for _ in range(64)]
    with pytest.raises(OSError, match="no IOVAs") as raised:
        domain.alloc(PAGE)
    assert raised.value.errno == errno.ENOMEM
    for vp in range(4):
        with on_vp(vp):
            for iova in ranges[vp * 64 : vp * 64 + 64]:
                domain.free(iova)
    with pytest.raises(OSError):
        domain.alloc(128 * PAGE, purge=False)
    assert domain.alloc(128 * PAGE) == 128 * PAGE
    domain.check()


def test_alternating_pages_hold_no_pair() -> None:
    domain = IovaDomain(0, last_of(4097))
    pages = [domain.alloc(PAGE) for _ in range(4096)]
    for iova in pages[::2]:
        domain.free(iova)
    with pytest.raises(OSError, match="no IOVAs"):
        domain.alloc(2 * PAGE)
    assert domain.stats().gaps == 2048
    domain.check()


def test_a_million_random_operations_leave_one_gap() -> None:
    """Live ranges of 1 to 256 pages, up to 4096 of them, by four VPs: no place is lost and none is found twice."""
    domain = IovaDomain(0, (1 << 32) - 1, vps=4)
    rng = random.Random(5)
    alloc, free, ptr = lib.pv_iova_alloc, lib.pv_iova_free, domain.ptr
    live: list[int] = []
    most_gaps = 0
    for step in range(1_000_000):
        vp = step & 3
        if len(live) < 4096 and (not live or rng.random() < 0.52):
            pfn = alloc(
                ptr, vp, 1 << int(rng.random() * 6) if step % 50 else rng.randrange(33, 257), 0xFFFFF, 1
            )
            assert pfn != lib.PV_IOVA_NONE
            live.append(pfn)
        else:
            at = int(rng.random() * len(live))
            live[at], live[-1] = live[-1], live[at]
            assert free(ptr, vp, live.pop()) == 0
        if step % 50_000 == 0:
            domain.check()
            stats = domain.stats()
            most_gaps = max(most_gaps, stats.gaps)
            assert stats.bytes < 2 << 20
            # A quarter of the space is one piece still.
            lib.pv_iova_free(ptr, 0, domain.alloc(1 << 30) >> 12)
    assert most_gaps > 10
    for pfn in live:
        free(ptr, 0, pfn)
    domain.purge()
    domain.check()
    stats = domain.stats()
    assert (stats.live, stats.cached, stats.gaps, stats.gap_pages) == (0, 0, 1, (1 << 20) - 1)


def test_a_search_looks_at_few_gaps_however_many_there_are() -> None:
    """Odd sizes among small ones leave thousands of gaps that almost fit."""
    domain = IovaDomain(0, (1 << 48) - 1)
    rng = random.Random(6)
    sizes = [1, 2, 4, 8, 33, 40, 64, 100]
    live = [domain.alloc(rng.choice(sizes) << 12, (1 << 36) - 1) for _ in range(20_000)]
    for _ in range(10_000):
        at = rng.randrange(len(live))
        domain.free(live[at])
        live[at] = domain.alloc(rng.choice(sizes) << 12, (1 << 36) - 1)
    before = domain.stats()
    assert before.gaps > 5000
    searches = 1000
    for _ in range(searches):
        at = rng.randrange(len(live))
        domain.free(live[at])
        live[at] = domain.alloc(40 << 12, (1 << 36) - 1)
    # A path down the tree, and one back up where the limit cuts it; not thousands.
    assert (domain.stats().visited - before.visited) / searches < 100


@pytest.mark.parametrize(
    ("first", "last", "vps"),
    [
        (0, 0, 1),
        (0, PAGE - 1, 1),
        (8 * PAGE, PAGE, 1),
        (0, 1 << 65, 1),
        (0, PAGE * 9, 0),
        (0, PAGE * 9, 5000),
    ],
)
def test_spaces_that_cannot_be(first: int, last: int, vps: int) -> None:
    with pytest.raises(ValueError):
        IovaDomain(first, last, vps=vps)


@pytest.mark.parametrize(
    ("size", "limit", "number"),
    [
        (0, (1 << 48) - 1, errno.EINVAL),
        (-PAGE, (1 << 48) - 1, errno.EINVAL),
        (PAGE, 0, errno.ENOMEM),
        (PAGE, PAGE - 1, errno.ENOMEM),
        (PAGE, 2 * PAGE - 2, errno.ENOMEM),
        (1 << 48, (1 << 48) - 1, errno.ENOMEM),
        (1 << 60, (1 << 64) - 1, errno.ENOMEM),
    ],
)
def test_what_alloc_refuses(size: int, limit: int, number: int) -> None:
    domain = IovaDomain(0, (1 << 48) - 1)
    with pytest.raises(OSError) as raised:
        domain.alloc(size, limit)
    assert raised.value.errno == number
    domain.check()


@pytest.mark.parametrize("iova", [0, PAGE, PAGE + 1, -PAGE, 1 << 64, 1 << 70])
def test_what_free_refuses(iova: int) -> None:
    domain = IovaDomain(0, (1 << 48) - 1)
    domain.alloc(PAGE)
    with pytest.raises(KeyError):
        domain.free(iova)


def test_a_reservation_that_cannot_be() -> None:
    domain = IovaDomain(0, last_of(16))
    with pytest.raises(OSError, match="EINVAL"):
        domain.reserve(4 * PAGE, PAGE)
    assert domain.reserve(0, last_of(8)) == 7 * PAGE
    assert domain.reserve(0, last_of(10)) == 2 * PAGE


@settings(max_examples=tries(20))
@given(st.integers(0, 1 << 30))
def test_the_table_of_ranges_survives_collisions(seed: int) -> None:
    domain = IovaDomain(0, (1 << 57) - 1)
    rng = random.Random(seed)
    live: set[int] = set()
    for _ in range(400):
        if live and rng.random() < 0.45:
            domain.free(live.pop())
        else:
            live.add(domain.alloc(PAGE << rng.randrange(20), last_of(1 << rng.randrange(21, 45))))
    assert {iova for iova, _, _ in domain.ranges()} == live
    domain.check()
