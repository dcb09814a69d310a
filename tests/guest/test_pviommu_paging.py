"""Paging domains: mapping without hypercalls, one flush an unmap, and nothing freed before it."""

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.errors import PageTableError
from pvfio.guest.pviommu import IotlbGather, PagingDomain, flush_entry
from pvfio.silicon import DmaAborted

pytestmark = pytest.mark.touches_c

LIST, FULL = lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST, lib.HVCALL_FLUSH_DEVICE_DOMAIN
READ, READ_WRITE = 1, 3
PAGE = 4096
BLOCK = 2 << 20
ADDRESS = st.integers(0, (1 << 64) - 1)


@pytest.fixture
def domain(guest: Any) -> PagingDomain:
    iommu = guest.detect()
    paging: PagingDomain = iommu.paging_domain()
    iommu.attach(paging, guest.devices[0])
    guest.calls.clear()
    return paging


def spans(entry: int) -> tuple[int, int]:
    """First and last byte a list entry covers, as the host reads it."""
    size = PAGE << (entry & 0xFFF)
    start = (entry >> 12 << 12) & ~(size - 1)
    return start, start + size - 1


@given(ADDRESS, ADDRESS)
def test_the_span_is_the_smallest_that_covers(a: int, b: int) -> None:
    start, last = min(a, b), max(a, b)
    first, end = spans(flush_entry(start, last))
    assert first <= start
    assert last <= end
    size = end - first + 1
    assert first % size == 0
    if size > PAGE:
        half = first + size // 2
        assert start < half <= last


@given(st.integers(0, (1 << 52) - 1), st.integers(1, 2000))
def test_page_ranges_brute_force(page: int, count: int) -> None:
    start, last = page << 12, min((page + count << 12) - 1, (1 << 64) - 1)
    wanted = next(shift for shift in range(53) if start >> 12 + shift == last >> 12 + shift)
    assert flush_entry(start, last) & 0xFFF == wanted
    assert flush_entry(start, last) >> 12 == start >> 12 + wanted << wanted


def test_a_span_to_bit_63_covers_everything_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    assert flush_entry(0, (1 << 63) - 1) == 51
    assert caplog.records == []
    assert flush_entry((1 << 63) - PAGE, (1 << 63) + PAGE - 1) == 52
    assert spans(52) == (0, (1 << 64) - 1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING


def test_mapping_makes_no_hypercall_and_unmapping_one(guest: Any, domain: PagingDomain) -> None:
    page = guest.memory.guest_page()
    bus = guest.functions[0].bus
    domain.map(0x10000, page, PAGE)
    assert guest.calls == []
    assert domain.iova_to_phys(0x10123) == page + 0x123
    bus.write(0x10000, b"through both stages")
    assert bytes(guest.memory.view_guest(page, 19)) == b"through both stages"
    assert domain.unmap(0x10000, PAGE) == PAGE
    assert guest.calls == [LIST]
    assert domain.iova_to_phys(0x10000) is None
    with pytest.raises(DmaAborted) as raised:
        bus.write(0x10000, b"late")
    assert raised.value.fault_iova == 0x10000


def test_permissions(guest: Any, domain: PagingDomain) -> None:
    bus = guest.functions[0].bus
    domain.map(0x10000, guest.memory.guest_page(), PAGE, READ)
    assert bus.read(0x10000, 4) == bytes(4)
    with pytest.raises(DmaAborted):
        bus.write(0x10000, b"no")


def test_without_its_flush_an_unmapped_page_is_still_written(guest: Any, domain: PagingDomain) -> None:
    page = guest.memory.guest_page()
    bus = guest.functions[0].bus
    domain.map(0x10000, page, PAGE)
    bus.write(0x10000, b"fresh")
    guest.swallowed = {LIST}
    assert domain.unmap(0x10000, PAGE) == PAGE
    bus.write(0x10000, b"stale")
    assert bytes(guest.memory.view_guest(page, 5)) == b"stale"
    guest.swallowed = set()
    domain.flush_all()
    with pytest.raises(DmaAborted):
        bus.write(0x10000, b"gone!")
    assert bytes(guest.memory.view_guest(page, 5)) == b"stale"


def test_nothing_unmapped_flushes_nothing(guest: Any, domain: PagingDomain) -> None:
    assert domain.unmap(0x10000, 16 * PAGE) == 0
    assert domain.unmap_ranges([(0x10000, PAGE), (0x20000, PAGE)]) == 0
    assert guest.calls == []


@pytest.mark.parametrize(
    ("iova", "size", "number"),
    [
        (0x10000, 0, errno.EINVAL),
        (0x10001, PAGE, errno.ENXIO),
        (1 << 48, PAGE, errno.ERANGE),
        ((1 << 64) - PAGE, 2 * PAGE, errno.EOVERFLOW),
    ],
)
def test_what_the_table_refuses(guest: Any, domain: PagingDomain, iova: int, size: int, number: int) -> None:
    with pytest.raises(PageTableError) as raised:
        domain.map(iova, 0, size)
    assert raised.value.errno == number
    with pytest.raises(PageTableError) as raised:
        domain.unmap(iova, size)
    assert raised.value.errno == number
    assert guest.calls == []


def test_the_interrupt_window_is_the_callers_to_avoid(domain: PagingDomain) -> None:
    domain.map(0xFEE0_0000, 0, PAGE)
    (region,) = domain.reserved_regions
    assert (region.start, region.last, region.type) == (0xFEE0_0000, 0xFEEF_FFFF, "msi")


def test_a_large_page_goes_whole_and_is_flushed_whole(guest: Any, domain: PagingDomain) -> None:
    bus = guest.functions[0].bus
    gib = 1 << 30
    domain.map(gib, 0, gib)
    assert domain.walk(gib)[-1].size == gib
    # Cached in pieces of the size of stage 2's blocks: a flush of the first page alone would leave this one.
    far = gib + 8 * BLOCK
    bus.read(far, 4)
    assert domain.unmap(gib, PAGE) == gib
    assert guest.calls == [LIST]
    with pytest.raises(DmaAborted):
        bus.read(far, 4)


def test_several_ranges_and_one_flush(guest: Any, domain: PagingDomain) -> None:
    bus = guest.functions[0].bus
    iovas = [0x40_0000, 0x1000, 0x80_0000_0000]
    for iova in iovas:
        domain.map(iova, guest.memory.guest_page(), PAGE)
        bus.write(iova, b"cached")
    assert domain.unmap_ranges([(iova, PAGE) for iova in iovas]) == 3 * PAGE
    assert guest.calls == [LIST]
    for iova in iovas:
        with pytest.raises(DmaAborted):
            bus.write(iova, b"late")


def test_a_refused_range_still_flushes_those_before_it(guest: Any, domain: PagingDomain) -> None:
    bus = guest.functions[0].bus
    domain.map(0x1000, guest.memory.guest_page(), PAGE)
    bus.write(0x1000, b"cached")
    with pytest.raises(PageTableError):
        domain.unmap_ranges([(0x1000, PAGE), (0x2001, PAGE)])
    assert guest.calls == [LIST]
    with pytest.raises(DmaAborted):
        bus.write(0x1000, b"late")


def test_gather_grows_and_syncs_once(guest: Any, domain: PagingDomain) -> None:
    gather = IotlbGather()
    assert gather.empty
    domain.iotlb_sync(gather)
    assert guest.calls == []
    for iova in (0x5000, 0x3000):
        domain.map(iova, 0, PAGE)
        assert domain.unmap_fast(iova, PAGE, gather) == PAGE
    assert (gather.start, gather.last) == (0x3000, 0x5FFF)
    assert guest.calls == []
    domain.iotlb_sync(gather)
    assert gather.empty
    domain.iotlb_sync(gather)
    assert guest.calls == [LIST]


def test_scattered_runs(guest: Any, domain: PagingDomain) -> None:
    buffer = guest.memory.alloc(8 * PAGE, scattered=True)
    runs = guest.memory.runs(buffer.vaddr, 8 * PAGE)
    assert len(runs) == 8
    assert domain.map_runs(0x10000, runs) == 8 * PAGE
    guest.functions[0].bus.write(0x10000, bytes(range(256)) * (8 * PAGE // 256))
    assert bytes(buffer) == bytes(range(256)) * (8 * PAGE // 256)
    guest.calls.clear()
    assert domain.unmap(0x10000, 8 * PAGE) == 8 * PAGE
    assert guest.calls == [LIST]


def test_scattered_runs_unwind(guest: Any, domain: PagingDomain) -> None:
    bus = guest.functions[0].bus
    in_the_way = guest.memory.guest_page()
    domain.map(0x12000, in_the_way, PAGE)
    pages = guest.memory.stats().table_pages
    runs = [(guest.memory.guest_page(), PAGE) for _ in range(4)]
    with pytest.raises(PageTableError) as raised:
        domain.map_runs(0x10000, runs)
    assert raised.value.errno == errno.EADDRINUSE
    assert guest.calls == [LIST]
    for iova in (0x10000, 0x11000, 0x13000):
        assert domain.iova_to_phys(iova) is None
        with pytest.raises(DmaAborted):
            bus.write(iova, b"no")
    assert domain.iova_to_phys(0x12000) == in_the_way
    assert guest.memory.stats().table_pages == pages + len(runs)
    guest.calls.clear()
    with pytest.raises(PageTableError):
        domain.map_runs(0x12000, runs)
    assert guest.calls == []


def test_table_pages_wait_for_the_flush(guest: Any, domain: PagingDomain) -> None:
    stats = guest.memory.stats
    root_only = stats().table_pages
    domain.map(0x10000, 0, PAGE)
    assert stats().table_pages == root_only + 3
    during: list[int] = []
    guest.before = lambda code: during.append(stats().table_pages)
    domain.unmap(0x10000, PAGE)
    assert during == [root_only + 3]
    assert stats().table_pages == root_only


def test_a_refused_flush_falls_back_to_the_domain(
    guest: Any, domain: PagingDomain, caplog: pytest.LogCaptureFixture
) -> None:
    bus = guest.functions[0].bus
    root_only = guest.memory.stats().table_pages
    domain.map(0x10000, 0, PAGE)
    bus.read(0x10000, 4)
    guest.hypervisor.inject(LIST, lib.HV_STATUS_INVALID_PARAMETER)
    assert domain.unmap(0x10000, PAGE) == PAGE
    assert guest.calls == [LIST, FULL]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0x10000-0x10fff failed" in record.getMessage()
    with pytest.raises(DmaAborted):
        bus.read(0x10000, 4)
    assert guest.memory.stats().table_pages == root_only


def test_two_refused_flushes_warn_twice_and_keep_the_table_pages(
    guest: Any, domain: PagingDomain, caplog: pytest.LogCaptureFixture
) -> None:
    bus = guest.functions[0].bus
    root_only = guest.memory.stats().table_pages
    domain.map(0x10000, 0, PAGE)
    bus.read(0x10000, 4)
    guest.hypervisor.inject(LIST, lib.HV_STATUS_INVALID_PARAMETER)
    guest.hypervisor.inject(FULL, lib.HV_STATUS_OPERATION_DENIED)
    assert domain.unmap(0x10000, PAGE) == PAGE
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "whole domain failed" in caplog.records[1].getMessage()
    assert guest.memory.stats().table_pages == root_only + 3
    # The next flush covers what this one did not.
    domain.map(0x4000_0000, 0, PAGE)
    bus.read(0x10000, 4)
    domain.unmap(0x4000_0000, PAGE)
    with pytest.raises(DmaAborted):
        bus.read(0x10000, 4)
    assert guest.memory.stats().table_pages == root_only


def test_a_domain_leaves_no_table_page_and_no_translation(guest: Any, domain: PagingDomain) -> None:
    iommu, device, bus = domain.iommu, guest.devices[0], guest.functions[0].bus
    page = guest.memory.guest_page()
    with_root = guest.memory.stats().table_pages
    for iova in range(0, 64 << 30, 1 << 30):
        domain.map(iova, page, PAGE)
    bus.read(0, 4)
    iommu.attach(iommu.blocking, device)
    domain.free()
    assert guest.memory.stats().table_pages == with_root - 1
    again = iommu.paging_domain()
    assert again.id == domain.id
    iommu.attach(again, device)
    # The same id, and nothing of the old domain is cached under it.
    with pytest.raises(DmaAborted):
        bus.read(0, 4)
