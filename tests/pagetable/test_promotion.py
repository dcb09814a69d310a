"""Which leaves a range gets: 4 KiB, 2 MiB and 1 GiB where IOVA, address and length allow it, and only there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from pvfio.pagetable import Format, PageTable, Perm
from tests.pagetable.reference import G1, K4, M2, best_page_size

pytestmark = pytest.mark.touches_c

RW = Perm.READ | Perm.WRITE
ALL = K4 | M2 | G1
FAR = 5 * G1

# iova, address, bytes, page sizes allowed: leaves of each size
CASES: dict[str, tuple[int, int, int, int, dict[int, int]]] = {
    "2M": (M2, 3 * M2, M2, ALL, {M2: 1}),
    "1G": (G1, FAR, G1, ALL, {G1: 1}),
    "3G": (G1, FAR, 3 * G1, ALL, {G1: 3}),
    "1G less a page": (G1, FAR, G1 - K4, ALL, {M2: 511, K4: 511}),
    "1G at an address that is only 2M-aligned": (G1, FAR + M2, G1, ALL, {M2: 512}),
    "1G at an IOVA that is only 2M-aligned": (G1 + M2, FAR, G1, ALL, {M2: 512}),
    "both off by the same 2M": (G1 + M2, FAR + M2, 2 * G1, ALL, {M2: 512, G1: 1}),
    "2M at an address that is only 4K-aligned": (M2, 3 * M2 + K4, M2, ALL, {K4: 512}),
    "both off by the same page": (M2 + K4, 3 * M2 + K4, 2 * M2, ALL, {K4: 512, M2: 1}),
    "a page on either side": (M2 - K4, 3 * M2 - K4, M2 + 2 * K4, ALL, {K4: 2, M2: 1}),
    "1G without 1G pages": (G1, FAR, G1, K4 | M2, {M2: 512}),
    "1G without 2M pages": (G1, FAR, G1, K4 | G1, {G1: 1}),
    "4M without 2M pages": (M2, 3 * M2, 2 * M2, K4 | G1, {K4: 1024}),
    "2M pages only": (M2, 3 * M2, 3 * M2, M2, {M2: 3}),
}


def leaves(table: PageTable, iova: int, size: int) -> Counter[int]:
    found: Counter[int] = Counter()
    at = iova
    while at < iova + size:
        leaf = table.walk(at)[-1]
        assert leaf.leaf
        assert at % leaf.size == 0
        found[leaf.size] += 1
        at += leaf.size
    assert at == iova + size
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_range_gets_the_largest_pages_that_fit(make: Callable[..., PageTable], case: str) -> None:
    iova, phys, size, sizes, expected = CASES[case]
    table = make(pgsize_bitmap=sizes)
    table.map_range(iova, phys, size, RW)
    assert leaves(table, iova, size) == expected
    assert table.iova_to_phys(iova + size - 1) == phys + size - 1
    at = iova
    while at < iova + size:
        page = best_page_size(sizes, at, phys + at - iova, iova + size - at)
        assert table.walk(at)[-1].size == page
        at += page
    assert table.unmap_range(iova, size) == size
    assert table.iova_to_phys(iova) is None


@pytest.mark.parametrize("large", [M2, G1])
def test_pieces_are_promoted_when_asked_and_not_before(
    make: Callable[..., PageTable], shape: tuple[Format, int], large: int
) -> None:
    """What was mapped in pieces stays in pieces until ``merge_range``; a translation is the same throughout."""
    table = make(pgsize_bitmap=ALL)
    small = K4 if large == M2 else M2
    for at in range(0, large, small):
        table.map_range(large + at, FAR + at, small, RW)
    assert leaves(table, large, large) == {small: 512}
    assert table.merge_range(large, large) == 1
    assert leaves(table, large, large) == {large: 1}
    assert table.iova_to_phys(2 * large - 1) == FAR + large - 1
    assert table.unmap_range(large, small) == large, "it goes whole now"
