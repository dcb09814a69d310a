"""The walker marks stage 2: what is accessed, what is dirty, what a cached translation lets pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvfio.memory import BLOCK_SIZE, PAGE_SIZE
from pvfio.pagetable import Format, Perm
from pvfio.silicon import IDENTITY, READ, WRITE, DmaAborted

pytestmark = pytest.mark.touches_c

RW = Perm.READ | Perm.WRITE
IOVA = 0x7_4000_0000
BITS = {Format.VTDSS: (1 << 8, 1 << 9), Format.AMDV1: (1 << 5, 1 << 6)}
PAGES = BLOCK_SIZE // PAGE_SIZE


@pytest.fixture
def identity(rig: Any) -> Any:
    domain = rig.iommu.domain(1)
    domain.configure(IDENTITY)
    return domain


def marks(rig: Any, gpa: int) -> tuple[bool, bool]:
    """Accessed and dirty, from the entry's bits."""
    entry = rig.stage2.walk(gpa)[-1].entry
    accessed, dirty = BITS[rig.stage2.format]
    return bool(entry & accessed), bool(entry & dirty)


def test_a_read_marks_accessed_a_write_dirty_and_a_look_nothing(rig: Any, identity: Any) -> None:
    requester = rig.requester(identity)
    assert requester.walk(BLOCK_SIZE, WRITE).hpa is not None
    assert marks(rig, BLOCK_SIZE) == (False, False)
    requester.read(BLOCK_SIZE, 8)
    assert marks(rig, BLOCK_SIZE) == (True, False)
    requester.write(BLOCK_SIZE, b"dirty")
    assert marks(rig, BLOCK_SIZE) == (True, True)
    assert marks(rig, 2 * BLOCK_SIZE) == (False, False)


def test_a_write_behind_a_cached_read_is_marked(rig: Any, identity: Any) -> None:
    requester = rig.requester(identity)
    requester.read(BLOCK_SIZE, 8)
    requester.read(BLOCK_SIZE, 8)
    assert (requester.tlb_stats().hits, requester.tlb_stats().misses) == (1, 1)
    requester.write(BLOCK_SIZE, b"1")
    assert marks(rig, BLOCK_SIZE) == (True, True)
    requester.write(BLOCK_SIZE, b"2")
    requester.read(BLOCK_SIZE, 1)
    assert (requester.tlb_stats().hits, requester.tlb_stats().misses) == (3, 2)


def test_a_nested_walk_marks_the_tables_it_reads_accessed_and_no_more(rig: Any) -> None:
    domain, table = rig.paging()
    rig.stage2.split_range(0, rig.memory.size)
    gpa = rig.memory.guest_page()
    table.map_range(IOVA, gpa, PAGE_SIZE, RW)
    rig.requester(domain).write(IOVA, b"x")
    accessed = np.flatnonzero(rig.stage2.read_clear_accessed(0, rig.memory.size)) * PAGE_SIZE
    dirty = np.flatnonzero(rig.stage2.read_clear_dirty(0, rig.memory.size)) * PAGE_SIZE
    assert set(accessed.tolist()) == {gpa, *(step.table for step in table.walk(IOVA))}
    assert dirty.tolist() == [gpa]


def test_what_is_refused_is_not_marked(rig: Any) -> None:
    domain, table = rig.paging()
    rig.stage2.split_range(0, rig.memory.size)
    gpa = rig.memory.guest_page()
    table.map_range(IOVA, gpa, PAGE_SIZE, Perm.READ)
    rig.stage2.unmap_range(2 * BLOCK_SIZE, PAGE_SIZE)
    rig.stage2.map_range(2 * BLOCK_SIZE, rig.memory.gpa_to_hpa(2 * BLOCK_SIZE), PAGE_SIZE, Perm.READ)
    table.map_range(IOVA + PAGE_SIZE, 2 * BLOCK_SIZE, PAGE_SIZE, RW)
    requester = rig.requester(domain)
    for page in (0, 1):
        with pytest.raises(DmaAborted):
            requester.write(IOVA + page * PAGE_SIZE, b"x")
    assert marks(rig, gpa) == (False, False)
    assert marks(rig, 2 * BLOCK_SIZE) == (False, False)


def test_without_the_flush_a_cached_write_is_lost_and_with_it_none(rig: Any, identity: Any) -> None:
    """The IOTLB is honest: this is why every reader of the marks flushes."""
    requester = rig.requester(identity)
    requester.write(BLOCK_SIZE, b"1")
    assert rig.stage2.read_clear_dirty(BLOCK_SIZE, BLOCK_SIZE).all()
    requester.write(BLOCK_SIZE, b"2")
    assert not rig.stage2.read_clear_dirty(BLOCK_SIZE, BLOCK_SIZE).any()
    rig.iommu.invalidate_stage2()
    requester.write(BLOCK_SIZE, b"3")
    assert rig.stage2.read_clear_dirty(BLOCK_SIZE, BLOCK_SIZE).all()


def test_the_flush_reaches_every_domain_and_requester(rig: Any, identity: Any) -> None:
    domain, table = rig.paging()
    gpa = rig.memory.guest_page()
    table.map_range(IOVA, gpa, PAGE_SIZE, RW)
    pairs = [(rig.requester(identity), gpa), (rig.requester(identity), gpa), (rig.requester(domain), IOVA)]
    gone = rig.requester(domain)
    gone.write(IOVA, b"x")
    del gone
    idle = rig.requester(None)
    for requester, at in pairs:
        requester.write(at, b"x")
    rig.iommu.invalidate_stage2()
    assert [requester.tlb_stats().entries for requester, _at in pairs] == [0, 0, 0]
    for requester, at in pairs:
        rig.stage2.read_clear_dirty(0, rig.memory.size)
        rig.iommu.invalidate_stage2()
        requester.write(at, b"y")
        assert marks(rig, gpa) == (True, True)
    assert idle.tlb_stats().invalidations == 1 + len(pairs)


def test_split_leaves_are_marked_alone(rig: Any, identity: Any) -> None:
    requester = rig.requester(identity)
    requester.write(BLOCK_SIZE, b"whole")
    rig.stage2.split_range(BLOCK_SIZE, BLOCK_SIZE)
    rig.iommu.invalidate_stage2()
    assert rig.stage2.read_clear_dirty(BLOCK_SIZE, BLOCK_SIZE).sum() == PAGES
    rig.iommu.invalidate_stage2()
    requester.move(BLOCK_SIZE + 5 * PAGE_SIZE - 1, 2 * BLOCK_SIZE, PAGE_SIZE)
    assert np.flatnonzero(rig.stage2.read_clear_dirty(BLOCK_SIZE, BLOCK_SIZE)).tolist() == [4, 5]
    assert rig.stage2.merge_range(0, rig.memory.size) == 1
    rig.iommu.invalidate_stage2()
    assert rig.stage2.release_detached() == 1
    assert requester.walk(BLOCK_SIZE, READ).hpa == rig.memory.gpa_to_hpa(BLOCK_SIZE)


def test_a_device_tlb_lets_no_write_pass_unmarked_either(rig: Any, identity: Any) -> None:
    rig.stage2.split_range(0, rig.memory.size)
    requester = rig.requester(identity)
    requester.allow_ats(True)
    requester.set_ats(True)
    requester.read(BLOCK_SIZE, 8)
    assert marks(rig, BLOCK_SIZE) == (True, False)
    for _ in range(3):
        requester.write(BLOCK_SIZE, b"x")
        requester.write(BLOCK_SIZE, b"y")
        assert np.flatnonzero(rig.stage2.read_clear_dirty(0, rig.memory.size)).tolist() == [PAGES]
        rig.iommu.invalidate_stage2()
        assert requester.atc_stats().entries == 0
    assert requester.atc_stats().hits > 0
