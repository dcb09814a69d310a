"""A device's own translation cache: what fills it, what empties it, and what happens when nothing does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.memory import BLOCK_SIZE, PAGE_SIZE
from pvfio.pagetable import PageTable, Perm
from pvfio.silicon import IDENTITY, AtcStats, DmaAborted, Domain, Requester, TableBus
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

RW = Perm.READ | Perm.WRITE
IOVA = 0x7_4000_0000
STU_2M = 9


class Mapped:
    """A page (or a 2 MiB block) mapped for a device that has ATS on."""

    def __init__(self, rig: Any, *, size: int = PAGE_SIZE, perm: Perm = RW, stu: int = 0) -> None:
        self.rig = rig
        self.domain: Domain
        self.table: PageTable
        self.domain, self.table = rig.paging()
        self.buffer = rig.memory.alloc(size, align=size)
        self.gpa: int = rig.memory.runs(self.buffer.vaddr, 1)[0][0]
        self.size = size
        self.table.map_range(IOVA, self.gpa, size, perm)
        self.device: Requester = rig.requester(self.domain)
        self.device.allow_ats(True)
        self.device.set_ats(True, stu)

    def unmap(self) -> None:
        assert self.table.unmap_range(IOVA, self.size) == self.size

    def lands(self, data: bytes, iova: int = IOVA) -> bool:
        """Whether a write gets through to the buffer."""
        at = iova - IOVA
        try:
            self.device.write(iova, data)
            landed = True
        except DmaAborted:
            landed = False
        assert landed == (self.buffer[at : at + len(data)].tobytes() == data)
        return landed

    def counts(self) -> tuple[int, int, int]:
        stats = self.device.atc_stats()
        return stats.hits, stats.requests, stats.entries


@pytest.fixture
def mapped(rig: Any) -> Mapped:
    return Mapped(rig)


def test_one_translation_request_serves_many_accesses(mapped: Mapped) -> None:
    for _ in range(5):
        assert mapped.device.read(IOVA, 4) == bytes(4)
    assert mapped.counts() == (4, 1, 1)
    # The IOMMU saw the Translation Request and nothing of the Translated Requests.
    tlb = mapped.device.tlb_stats()
    assert (tlb.hits, tlb.misses) == (0, 1)


def test_without_ats_nothing_is_there(rig: Any) -> None:
    domain, table = rig.paging()
    table.map_range(IOVA, rig.memory.guest_page(), PAGE_SIZE, RW)
    device = rig.requester(domain)
    for allow in (False, True):
        device.allow_ats(allow)
        device.write(IOVA, b"plain")
    domain.invalidate()
    assert device.atc_stats() == AtcStats(0, 0, 0, 0, 0, 0)


def test_a_flush_reaches_the_device(mapped: Mapped) -> None:
    assert mapped.lands(b"before")
    mapped.unmap()
    assert mapped.lands(b"stale!")
    mapped.domain.invalidate_pages(IOVA >> 12, 0)
    assert not mapped.lands(b"after!")
    assert mapped.device.atc_stats().invalidations == 1


def test_a_lost_invalidate_request_means_stale_dma(mapped: Mapped) -> None:
    """The IOTLB forgot, the device did not."""
    assert mapped.lands(b"before")
    mapped.device.lose_invalidations(2)
    mapped.unmap()
    mapped.domain.invalidate_pages(IOVA >> 12, 0)
    assert mapped.device.tlb_stats().entries == 0
    assert mapped.lands(b"stale!")
    mapped.domain.invalidate()
    assert mapped.lands(b"again!")
    stats = mapped.device.atc_stats()
    assert (stats.lost, stats.invalidations, stats.entries) == (2, 0, 1)
    mapped.domain.invalidate()
    assert not mapped.lands(b"after!")
    assert mapped.device.atc_stats().entries == 0


def test_turning_ats_off_drops_everything(mapped: Mapped) -> None:
    assert mapped.lands(b"before")
    mapped.device.lose_invalidations(1)
    mapped.unmap()
    mapped.domain.invalidate()
    mapped.device.set_ats(False)
    assert not mapped.lands(b"off")
    mapped.device.set_ats(True)
    assert not mapped.lands(b"on")
    assert mapped.device.atc_stats().entries == 0


def test_the_iommu_can_forbid_it(mapped: Mapped) -> None:
    assert mapped.lands(b"one")
    mapped.device.allow_ats(False)
    assert mapped.device.atc_stats().entries == 0
    assert mapped.lands(b"two")
    stats = mapped.device.atc_stats()
    assert (stats.requests, stats.untranslated, stats.entries) == (2, 1, 0)
    assert mapped.device.tlb_stats().hits == 1


def test_another_domain_starts_with_an_empty_cache(mapped: Mapped) -> None:
    rig = mapped.rig
    other, table = rig.paging()
    page = rig.memory.alloc(PAGE_SIZE)
    table.map_range(IOVA, rig.memory.runs(page.vaddr, 1)[0][0], PAGE_SIZE, RW)
    assert mapped.lands(b"first")
    mapped.device.attach(other)
    mapped.device.write(IOVA, b"other")
    assert mapped.buffer[:5].tobytes() == b"first"
    assert page[:5].tobytes() == b"other"
    mapped.device.attach(None)
    assert not mapped.lands(b"none!")


def test_identity(rig: Any) -> None:
    domain = rig.iommu.domain(1)
    domain.configure(IDENTITY)
    device = rig.requester(domain)
    device.allow_ats(True)
    device.set_ats(True)
    for data in (b"gpa", b"hit"):
        device.write(0x20_0010, data)
        assert bytes(rig.memory.view_guest(0x20_0010, 3)) == data
    assert (device.atc_stats().hits, device.atc_stats().requests) == (1, 1)


def test_a_refused_request_is_one_fault_as_without_ats(rig: Any) -> None:
    mapped = Mapped(rig, perm=Perm.READ)
    mapped.device.read(IOVA, 4)
    assert not mapped.lands(b"no")
    with pytest.raises(DmaAborted):
        mapped.device.read(IOVA + PAGE_SIZE, 1)
    with_ats = rig.iommu.faults()
    assert mapped.device.atc_stats().untranslated == 2
    mapped.device.set_ats(False)
    assert not mapped.lands(b"no")
    with pytest.raises(DmaAborted):
        mapped.device.read(IOVA + PAGE_SIZE, 1)
    assert rig.iommu.faults() == with_ats
    assert [(f.access, f.reason_name) for f in with_ats] == [("write", "permission"), ("read", "not present")]


def test_a_page_that_became_writable_is_asked_for_again(rig: Any) -> None:
    mapped = Mapped(rig, perm=Perm.READ)
    mapped.device.read(IOVA, 1)
    mapped.unmap()
    mapped.table.map_range(IOVA, mapped.gpa, PAGE_SIZE, RW)
    assert mapped.lands(b"ok")
    assert mapped.counts() == (0, 2, 1)


def test_the_interrupt_window_is_never_translated(rig: Any) -> None:
    """A 1 GiB page around it: the device may keep it, but neither looks there nor runs into it."""
    domain, table = rig.paging()
    block = rig.memory.alloc(BLOCK_SIZE, align=BLOCK_SIZE)
    gpa = rig.memory.runs(block.vaddr, 1)[0][0]
    window = 0xFEE0_0000
    table.map_range(window - BLOCK_SIZE, gpa, BLOCK_SIZE, RW)
    table.map_range(window, gpa, BLOCK_SIZE, RW)
    device = rig.requester(domain)
    device.allow_ats(True)
    device.set_ats(True)
    device.write(window + (1 << 20), b"behind")
    assert block[1 << 20 : (1 << 20) + 6].tobytes() == b"behind"
    with pytest.raises(DmaAborted) as caught:
        device.write(window - 4, b"in front")
    assert (caught.value.fault_iova, caught.value.done) == (window, 4)
    with pytest.raises(DmaAborted):
        device.read(window, 1)
    assert {fault.reason_name for fault in rig.iommu.faults()} == {"interrupt range"}


def test_what_is_smaller_than_the_unit_is_not_kept(rig: Any) -> None:
    mapped = Mapped(rig, stu=STU_2M)
    for data in (b"one", b"two"):
        assert mapped.lands(data)
    assert mapped.counts() == (0, 2, 0)
    assert mapped.device.atc_stats().untranslated == 2
    mapped.device.set_ats(True, 0)
    for data in (b"three", b"four"):
        assert mapped.lands(data)
    assert mapped.counts() == (1, 3, 1)


def test_an_invalidate_request_smaller_than_the_unit_drops_the_unit(rig: Any) -> None:
    mapped = Mapped(rig, size=BLOCK_SIZE, stu=STU_2M)
    last = IOVA + BLOCK_SIZE - 8
    assert mapped.lands(b"kept", last)
    assert mapped.counts() == (0, 1, 1)
    mapped.domain.invalidate_pages((IOVA >> 12) + 5, 0)
    assert mapped.device.atc_stats().entries == 0


def test_clearing_dirty_marks_reaches_the_device(mapped: Mapped) -> None:
    """A device that still may write by its own cache would write unrecorded."""
    stage2, iommu = mapped.rig.stage2, mapped.rig.iommu
    block = mapped.gpa // BLOCK_SIZE * BLOCK_SIZE

    def dirty() -> bool:
        return bool(stage2.read_clear_dirty(block, BLOCK_SIZE).any())

    mapped.device.read(IOVA, 4)
    assert not dirty()
    assert mapped.lands(b"first")
    assert dirty()
    mapped.device.lose_invalidations(1)
    iommu.invalidate_stage2()
    assert mapped.lands(b"stale")
    assert not dirty()
    iommu.invalidate_stage2()
    mapped.device.read(IOVA, 4)
    assert not dirty()
    assert mapped.lands(b"third")
    assert dirty()


@settings(max_examples=tries(60))
@given(
    pages=st.lists(st.integers(0, 63), min_size=1, max_size=40, unique=True),
    large=st.booleans(),
    page=st.integers(0, 64 * 512),
    shift=st.one_of(st.integers(0, 20), st.integers(43, 52)),
    high=st.booleans(),
)
def test_an_invalidate_request_drops_what_it_covers(
    make_rig: Any, pages: list[int], large: bool, page: int, shift: int, high: bool
) -> None:
    """The range is an address and the S field on the way: what meets it is gone, and nothing else is."""
    rig = make_rig("intel", 8 << 20)
    domain, table = rig.paging()
    device = rig.requester(domain)
    device.allow_ats(True)
    device.set_ats(True)
    unit = BLOCK_SIZE if large else PAGE_SIZE
    base = 0x7FFF_C000_0000 if high else 0
    for number in pages:
        table.map_range(base + number * unit, BLOCK_SIZE, unit, RW)
        device.read(base + number * unit, 1)
    for number in pages:
        table.unmap_range(base + number * unit, unit)
    flushed = (base >> 12) + page
    domain.invalidate_pages(flushed, shift)
    first = (flushed >> shift << shift) * PAGE_SIZE
    last = first + (PAGE_SIZE << shift) - 1
    for number in pages:
        at = base + number * unit
        if at <= last and at + unit - 1 >= first:
            with pytest.raises(DmaAborted):
                device.read(at, 1)
        else:
            assert device.read(at, 1) == b"\0"


def test_it_forgets_the_oldest_when_full_and_stays_right(rig: Any) -> None:
    domain, table = rig.paging()
    buffer = rig.memory.alloc(PAGE_SIZE)
    gpa = rig.memory.runs(buffer.vaddr, 1)[0][0]
    count = 20_000
    for page in range(count):
        table.map_range(IOVA + page * PAGE_SIZE, gpa, PAGE_SIZE, RW)
    device = rig.requester(domain)
    device.allow_ats(True)
    device.set_ats(True)
    for page in range(count):
        device.write(IOVA + page * PAGE_SIZE, bytes([page & 0xFF]))
        assert buffer[0] == page & 0xFF
    assert 0 < device.atc_stats().entries < count


def test_a_bus_without_translation_takes_no_notice() -> None:
    memory = bytearray(PAGE_SIZE)
    bus = TableBus()
    bus.map(IOVA, memory)
    bus.set_ats(True, 5)
    bus.write(IOVA, b"plain")
    assert memory[:5] == b"plain"
