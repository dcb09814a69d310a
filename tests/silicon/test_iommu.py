"""Device contexts, the two-stage walk, the IOTLB's honesty, faults and messages."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.memory import BLOCK_SIZE, PAGE_SIZE
from pvfio.pagetable import Format, PageTable, Perm
from pvfio.silicon import BLOCKED, IDENTITY, PAGING, READ, WRITE, DmaAborted, Iommu
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

RW = Perm.READ | Perm.WRITE
IOVA = 0x7_4000_0000
P, RW_BIT, US, PS = 1, 2, 4, 0x80


def poke(rig: Any, gpa: int, index: int, entry: int) -> None:
    rig.memory.view_guest(gpa, PAGE_SIZE)[8 * index : 8 * index + 8] = struct.pack("<Q", entry)


def test_no_domain_and_blocked_domain_stop_everything(rig: Any) -> None:
    blocked = rig.iommu.domain(9)
    for domain, id in ((None, 0), (blocked, 9)):
        requester = rig.requester(domain, 0x77)
        with pytest.raises(DmaAborted):
            requester.read(0x1000, 4)
        with pytest.raises(DmaAborted):
            requester.write(0x1000, b"1234")
        faults = rig.iommu.faults()
        assert [(f.device_id, f.domain, f.stage, f.level, f.access, f.reason_name) for f in faults] == [
            (0x77, id, 0, 0, "read", "blocked"),
            (0x77, id, 0, 0, "write", "blocked"),
        ]


def test_identity_is_gpa_still_through_stage_2(rig: Any) -> None:
    domain = rig.iommu.domain(1)
    domain.configure(IDENTITY)
    requester = rig.requester(domain)
    requester.write(0x20_0010, b"gpa")
    assert bytes(rig.memory.view_guest(0x20_0010, 3)) == b"gpa"
    walk = requester.walk(0x20_0010)
    assert walk.hpa == rig.memory.gpa_to_hpa(0x20_0010)
    assert {step.stage for step in walk.steps} == {2}
    with pytest.raises(DmaAborted) as caught:
        requester.read(rig.memory.size - 2, 4)
    assert caught.value.done == 2
    assert rig.iommu.faults()[0].gpa == rig.memory.size


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("size", [PAGE_SIZE, BLOCK_SIZE])
def test_paging_walks_both_stages(rig: Any, levels: int, size: int) -> None:
    domain, table = rig.paging(levels)
    buffer = rig.memory.alloc(size, align=size)
    gpa = rig.memory.runs(buffer.vaddr, 1)[0][0]
    iova = (1 << 56) + IOVA if levels == 5 else IOVA
    table.map_range(iova, gpa, size, RW)
    requester = rig.requester(domain)
    requester.write(iova + size - 3, b"end")
    assert buffer[-3:].tobytes() == b"end"
    walk = requester.walk(iova + size - 3)
    assert walk.hpa == rig.memory.gpa_to_hpa(gpa + size - 3)
    own = [step for step in walk.steps if step.stage == 1]
    leaf_level = 1 if size == PAGE_SIZE else 2
    assert [step.level for step in own] == list(range(levels, leaf_level - 1, -1))
    assert own[-1].leaf
    assert own[-1].output == gpa
    # Every table page of stage 1 was itself found through stage 2.
    assert sum(step.stage == 2 and step.depth == 1 and step.leaf for step in walk.steps) == len(own)
    assert sum(step.stage == 2 and step.depth == 0 and step.leaf for step in walk.steps) == 1


def test_stale_dma_without_the_flush_and_none_with_it(rig: Any) -> None:
    domain, table = rig.paging()
    buffer = rig.memory.alloc(PAGE_SIZE)
    gpa = rig.memory.runs(buffer.vaddr, 1)[0][0]
    table.map_range(IOVA, gpa, PAGE_SIZE, RW)
    requester = rig.requester(domain)
    requester.write(IOVA, b"before")
    assert table.unmap_range(IOVA, PAGE_SIZE) == PAGE_SIZE
    requester.write(IOVA, b"stale!")
    assert buffer[:6].tobytes() == b"stale!"
    domain.invalidate_pages(IOVA >> 12, 0)
    with pytest.raises(DmaAborted) as caught:
        requester.write(IOVA, b"after!")
    assert (caught.value.fault_iova, caught.value.done) == (IOVA, 0)
    assert buffer[:6].tobytes() == b"stale!"


@settings(max_examples=tries(60), deadline=None)
@given(
    pages=st.lists(st.integers(0, 63), min_size=1, max_size=40, unique=True),
    large=st.booleans(),
    page=st.integers(0, 64 * 512),
    shift=st.integers(0, 16),
)
def test_invalidate_pages_drops_what_it_covers(
    make_rig: Any, pages: list[int], large: bool, page: int, shift: int
) -> None:
    """What meets the flushed range is gone, and nothing else is."""
    rig = make_rig("intel", 8 << 20)
    domain, table = rig.paging()
    requester = rig.requester(domain)
    unit = BLOCK_SIZE if large else PAGE_SIZE
    for number in pages:
        table.map_range(number * unit, BLOCK_SIZE, unit, RW)
        requester.read(number * unit, 1)
    for number in pages:
        table.unmap_range(number * unit, unit)
    domain.invalidate_pages(page, shift)
    first = (page >> shift << shift) * PAGE_SIZE
    last = first + (PAGE_SIZE << shift) - 1
    for number in pages:
        met = number * unit <= last and number * unit + unit - 1 >= first
        if met:
            with pytest.raises(DmaAborted):
                requester.read(number * unit, 1)
        else:
            assert requester.read(number * unit, 1) == b"\0"


def test_iotlb_caches_by_domain(rig: Any) -> None:
    one, table_one = rig.paging()
    other, table_other = rig.paging()
    first, second = rig.memory.alloc(PAGE_SIZE), rig.memory.alloc(PAGE_SIZE)
    first[:], second[:] = 1, 2
    table_one.map_range(IOVA, rig.memory.runs(first.vaddr, 1)[0][0], PAGE_SIZE, RW)
    table_other.map_range(IOVA, rig.memory.runs(second.vaddr, 1)[0][0], PAGE_SIZE, RW)
    requester, neighbour = rig.requester(one), rig.requester(other)
    for _ in range(3):
        assert requester.read(IOVA, 1) == b"\1"
        assert neighbour.read(IOVA, 1) == b"\2"
    assert (requester.tlb_stats().hits, requester.tlb_stats().misses) == (2, 1)
    one.invalidate()
    assert (requester.tlb_stats().entries, neighbour.tlb_stats().entries) == (0, 1)
    requester.attach(other)
    assert requester.read(IOVA, 1) == b"\2"


def test_iotlb_forgets_the_oldest_when_full_and_stays_right(rig: Any) -> None:
    domain, table = rig.paging()
    buffer = rig.memory.alloc(PAGE_SIZE)
    gpa = rig.memory.runs(buffer.vaddr, 1)[0][0]
    count = 20_000
    for page in range(count):
        table.map_range(IOVA + page * PAGE_SIZE, gpa, PAGE_SIZE, RW)
    requester = rig.requester(domain)
    for round in range(2):
        for page in range(count):
            requester.write(IOVA + page * PAGE_SIZE, bytes([round + page & 0xFF]))
            assert buffer[0] == round + page & 0xFF
    assert 12_000 <= requester.tlb_stats().entries <= 16_384


@pytest.mark.parametrize("entries", [3, 40, 700])
@pytest.mark.parametrize("lg2", [12, 13, 16, 18, 20, 21, 22, 30])
def test_a_flush_drops_what_it_covers_and_nothing_else(rig: Any, entries: int, lg2: int) -> None:
    domain, table = rig.paging()
    buffer = rig.memory.alloc(PAGE_SIZE)
    gpa = rig.memory.runs(buffer.vaddr, 1)[0][0]
    middle = (IOVA >> 30 << 30) + (1 << 30)
    pages = [middle + (page - entries // 2) * PAGE_SIZE for page in range(entries)]
    large = middle + (1 << 22)  # a page of 2 MiB that the flush may be inside of, or cover
    for page in pages:
        table.map_range(page, gpa, PAGE_SIZE, RW)
    table.map_range(large, gpa >> 21 << 21, 1 << 21, RW)
    for first in (middle, large):
        requester = rig.requester(domain)
        for page in [*pages, large]:
            requester.read(page, 1)
        assert requester.tlb_stats().entries == entries + 1
        domain.invalidate_pages(first >> 12, lg2 - 12)
        start = first >> lg2 << lg2
        kept = [page for page in pages if not start <= page < start + (1 << lg2)]
        meets = start < large + (1 << 21) and large < start + (1 << lg2)
        assert requester.tlb_stats().entries == len(kept) + (not meets)
        before = requester.tlb_stats().misses
        for page in kept + ([] if meets else [large]):
            requester.read(page, 1)
        assert requester.tlb_stats().misses == before
        requester.close()


def test_permission_of_either_stage_is_enough_to_refuse(rig: Any) -> None:
    domain, table = rig.paging()
    buffer = rig.memory.alloc(PAGE_SIZE)
    gpa = rig.memory.runs(buffer.vaddr, 1)[0][0]
    table.map_range(IOVA, gpa, PAGE_SIZE, Perm.READ)
    requester = rig.requester(domain)
    requester.read(IOVA, 4)
    with pytest.raises(DmaAborted):
        requester.write(IOVA, b"no")
    fault = rig.iommu.faults()[-1]
    assert (fault.stage, fault.level, fault.access, fault.reason_name) == (1, 1, "write", "permission")

    block = gpa // BLOCK_SIZE * BLOCK_SIZE
    rig.stage2.unmap_range(block, BLOCK_SIZE)
    rig.stage2.map_range(block, rig.memory.gpa_to_hpa(block), BLOCK_SIZE, Perm.READ)
    table.map_range(IOVA + PAGE_SIZE, gpa, PAGE_SIZE, RW)
    domain.invalidate()
    with pytest.raises(DmaAborted):
        requester.write(IOVA + PAGE_SIZE, b"no")
    fault = rig.iommu.faults()[-1]
    assert (fault.stage, fault.gpa, fault.access, fault.reason_name) == (2, gpa, "write", "permission")
    assert not buffer.any()


def test_a_cached_read_only_page_that_became_writable_is_walked_again(rig: Any) -> None:
    domain, table = rig.paging()
    buffer = rig.memory.alloc(PAGE_SIZE)
    gpa = rig.memory.runs(buffer.vaddr, 1)[0][0]
    table.map_range(IOVA, gpa, PAGE_SIZE, Perm.READ)
    requester = rig.requester(domain)
    requester.read(IOVA, 1)
    table.unmap_range(IOVA, PAGE_SIZE)
    table.map_range(IOVA, gpa, PAGE_SIZE, RW)
    requester.write(IOVA, b"ok")
    assert buffer[:2].tobytes() == b"ok"


def root_entry(rig: Any, table: PageTable, iova: int) -> tuple[int, int]:
    return table.root, iova >> 39 & 511


def leaf_entry(rig: Any, table: PageTable, iova: int) -> tuple[int, int]:
    last = table.walk(iova)[-1]
    return last.table, last.index


@pytest.mark.parametrize(
    ("where", "entry", "stage", "level", "reason"),
    [
        (root_entry, 0, 1, 4, "not present"),
        (root_entry, 0x1000 | P | RW_BIT | US | PS, 1, 4, "reserved bits"),
        (root_entry, 0x1000 | P | RW_BIT, 1, 4, "permission"),  # a supervisor page
        (root_entry, 0xF_FFFF_FFFF_F000 | P | RW_BIT | US, 2, 0, "address too wide"),
        (root_entry, 0x7F_0000_0000 | P | RW_BIT | US, 2, None, "not present"),  # a table in no memory
        (leaf_entry, 0, 1, 1, "not present"),
        (leaf_entry, 0x7F_0000_0000 | P | RW_BIT | US, 2, None, "not present"),
    ],
)
def test_entries_a_guest_may_write_wrongly(
    rig: Any, where: Any, entry: int, stage: int, level: int | None, reason: str
) -> None:
    domain, table = rig.paging()
    table.map_range(IOVA, BLOCK_SIZE, PAGE_SIZE, RW)
    page, index = where(rig, table, IOVA)
    poke(rig, page, index, entry)
    requester = rig.requester(domain)
    with pytest.raises(DmaAborted):
        requester.write(IOVA, b"x")
    (fault,) = rig.iommu.faults()
    assert (fault.iova, fault.stage, fault.reason_name) == (IOVA, stage, reason)
    assert level is None or fault.level == level
    walked = requester.walk(IOVA, WRITE)
    assert walked.hpa is None
    assert walked.fault == fault


@pytest.mark.parametrize("iova", [1 << 48, 1 << 57, 1 << 63, (1 << 64) - 4096])
def test_iova_wider_than_the_table(rig: Any, iova: int) -> None:
    domain, _table = rig.paging(4)
    requester = rig.requester(domain)
    with pytest.raises(DmaAborted):
        requester.read(iova, 1)
    assert rig.iommu.faults()[0].reason_name == "address too wide"


@settings(max_examples=tries(50), deadline=None)
@given(
    words=st.lists(st.integers(0, (1 << 64) - 1), min_size=8, max_size=8), iova=st.integers(0, (1 << 57) - 1)
)
def test_any_table_the_guest_writes_is_survived(make_rig: Any, words: list[int], iova: int) -> None:
    rig = make_rig("amd", 4 << 20)
    root = rig.memory.guest_page()
    for index in range(512):
        # Entries that lead somewhere more often than not: present, user, inside RAM or back into this table.
        word = words[index % 8]
        poke(
            rig,
            root,
            index,
            (word & ~0xFFFFFFFF) | (root if word & 1 else word & 0x3FFFFF) | word & 0xFFF | P | US,
        )
    domain = rig.iommu.domain(1)
    domain.configure(PAGING, root, 5)
    requester = rig.requester(domain)
    for iova_of in (iova, iova & 0xFFFF_FFFF_F000):
        try:
            requester.read(iova_of, 8)
        except DmaAborted:
            assert rig.iommu.faults()


def test_configure_and_destroy_only_when_nobody_is_attached(rig: Any) -> None:
    domain, table = rig.paging()
    requester = rig.requester(domain)
    for refused in (lambda: domain.configure(BLOCKED), domain.destroy):
        with pytest.raises(OSError) as caught:
            refused()
        assert caught.value.errno == errno.EBUSY
    requester.attach(None)
    domain.configure(BLOCKED)
    for bad in ((PAGING, table.root + 8, 4), (PAGING, table.root, 3), (PAGING, table.root, 6), (7, 0, 0)):
        with pytest.raises(OSError) as caught:
            domain.configure(*bad)
        assert caught.value.errno == errno.EINVAL
    domain.destroy()


def test_a_domain_of_another_iommu_is_refused(rig: Any) -> None:
    other = Iommu(rig.memory, Format.VTDSS, rig.stage2.root, 4)
    with pytest.raises(OSError) as caught:
        rig.requester(None).attach(other.domain(1))
    assert caught.value.errno == errno.EINVAL


def test_domain_tags_are_reused_and_end() -> None:
    from pvfio.memory import GuestMemory

    memory = GuestMemory(2 << 20)
    iommu = Iommu(memory, Format.VTDSS, memory.host_page(), 4)
    domains = [iommu.domain(number) for number in range(65535)]
    with pytest.raises(MemoryError):
        iommu.domain(0)
    domains[1234].destroy()
    again = iommu.domain(0)
    with pytest.raises(MemoryError):
        iommu.domain(1)
    again.destroy()


def is_same_eventfd(fd: int, other: int) -> bool:
    try:
        texts = [Path(f"/proc/self/fdinfo/{number}").read_text() for number in (fd, other)]
    except FileNotFoundError:
        return False
    ids = [[line for line in text.splitlines() if line.startswith("eventfd-id")] for text in texts]
    return ids[0] == ids[1] != []


def test_messages_ring_what_the_host_registered(rig: Any) -> None:
    requester = rig.requester(None, 0x42)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    requester.set_msi(33, fd)
    assert requester.msi(0xFEE0_0000, 33)
    assert os.eventfd_read(fd) == 1
    for address, data in ((0xFEE0_0000, 34), (0xFEE0_0000, 1 << 31), (0xFED0_0000, 33)):
        assert not requester.msi(address, data)
    assert [fault.reason_name for fault in rig.iommu.faults()] == ["interrupt not accepted"] * 3
    (own,) = [
        int(name)
        for name in os.listdir("/proc/self/fd")
        if int(name) != fd and is_same_eventfd(fd, int(name))
    ]
    assert not os.get_inheritable(own), "a child process would hold the eventfd open"
    os.close(fd)  # the message still finds the eventfd it was given
    assert requester.msi(0xFEE0_0000, 33)
    requester.set_msi(33, -1)
    assert not requester.msi(0xFEE0_0000, 33)
    with pytest.raises(OSError):
        requester.set_msi(4096, 0)


def test_interrupt_window_cuts_into_a_large_page(rig: Any) -> None:
    domain, table = rig.paging()
    # 1 GiB at 3 GiB: the leaf covers the window, the device may use only what is around it.
    for block in range(0xFEC0_0000, 0xFF20_0000, BLOCK_SIZE):
        table.map_range(block, BLOCK_SIZE, BLOCK_SIZE, RW)
    requester = rig.requester(domain)
    requester.write(0xFEDF_FFF0, bytes(16))
    with pytest.raises(DmaAborted) as caught:
        requester.write(0xFEDF_FFF0, bytes(32))
    assert caught.value.done == 16
    assert rig.iommu.faults()[-1].reason_name == "interrupt range"
    with pytest.raises(DmaAborted):
        requester.read(0xFEE0_0000, 4)
    requester.read(0xFEF0_0000, 4)


def test_fault_log_is_bounded_and_counts_what_it_lost(rig: Any) -> None:
    requester = rig.requester(None)
    for number in range(600):
        with pytest.raises(DmaAborted):
            requester.read(number, 1)
    faults = rig.iommu.faults()
    assert [fault.iova for fault in faults] == list(range(512))
    assert rig.iommu.lost_faults == 88
    with pytest.raises(DmaAborted):
        requester.read(7, 1)
    assert os.eventfd_read(rig.iommu.fault_fd) == 1
    assert [fault.iova for fault in rig.iommu.faults()] == [7]


def test_walk_leaves_no_trace(rig: Any) -> None:
    domain, table = rig.paging()
    table.map_range(IOVA, BLOCK_SIZE, PAGE_SIZE, RW)
    requester = rig.requester(domain)
    requester.walk(IOVA, READ)
    requester.walk(IOVA + PAGE_SIZE, READ)
    assert requester.tlb_stats().entries == 0
    assert rig.iommu.faults() == []
