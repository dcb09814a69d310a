"""The dirty log by itself: what starts and stops it, what it reports, what it costs, and who it agrees with."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.host import Hypervisor, IommuConfig, Platform
from pvfio.memory import GuestMemory
from pvfio.silicon import IDENTITY, PAGING, Requester

pytestmark = pytest.mark.touches_c

PAGE, M2, MIB = 4096, 2 << 20, 1 << 20
DEPTHS: list[tuple[Platform, int]] = [("intel", 3), ("intel", 5), ("amd", 1), ("amd", 4), ("amd", 6)]


def requester_of(host: Hypervisor) -> Requester:
    """A bus master that sees guest physical addresses."""
    domain = host.iommu.domain(1)
    domain.configure(IDENTITY)
    requester = host.iommu.requester(7)
    requester.attach(domain)
    return requester


def pages(*gpas: int) -> list[int]:
    return list(gpas)


@pytest.mark.parametrize(("platform", "levels"), DEPTHS)
def test_start_splits_every_leaf_and_stop_gives_them_back(platform: Platform, levels: int) -> None:
    memory = GuestMemory(64 * MIB)
    host = Hypervisor(memory, IommuConfig(platform=platform, stage2_levels=levels))
    before = memory.stats()
    shape = [host.stage2.walk(gpa)[-1].size for gpa in range(0, 64 * MIB, M2)]
    for _ in range(2):
        host.dirty.start()
        assert host.dirty.active
        assert memory.stats().host_pages == before.host_pages + 32
        for gpa in range(0, 64 * MIB, M2 + 5 * PAGE):
            assert host.stage2.walk(gpa)[-1].size == PAGE
            assert host.stage2.iova_to_phys(gpa) == memory.gpa_to_hpa(gpa)
        host.dirty.stop()
        assert not host.dirty.active
        assert [host.stage2.walk(gpa)[-1].size for gpa in range(0, 64 * MIB, M2)] == shape
        assert memory.stats() == before
    host.dirty.stop()
    host.dirty.start()
    host.close()
    assert memory.stats().host_pages == 0


@pytest.mark.parametrize("platform", ["intel", "amd"])
def test_what_was_written_before_the_start_is_clean(platform: Platform) -> None:
    host = Hypervisor(GuestMemory(8 * MIB), IommuConfig(platform=platform))
    requester = requester_of(host)
    requester.write(M2, b"before")
    host.dirty.start()
    assert host.dirty.harvest().tolist() == []
    requester.read(M2, 8)
    assert host.dirty.harvest().tolist() == []
    requester.write(M2, b"after")
    assert host.dirty.harvest().tolist() == pages(M2)
    host.dirty.stop()
    requester.write(M2, b"nobody looks")
    host.dirty.start()
    assert host.dirty.harvest().tolist() == []
    requester.write(0, b"page 0 is a page")
    assert host.dirty.harvest().tolist() == pages(0)
    assert host.dirty.harvest().dtype == np.uint64
    host.close()


@given(depth=st.sampled_from(DEPTHS), ats=st.booleans(), seed=st.integers(0, 1 << 32))
def test_random_dma_of_several_domains_is_the_record(
    depth: tuple[Platform, int], ats: bool, seed: int
) -> None:
    """Reads, writes, moves and fills by GPA and by IOVA, against the pages the arithmetic says; in any portions."""
    rng = random.Random(seed)
    memory = GuestMemory(8 * MIB, seed=seed)
    host = Hypervisor(memory, IommuConfig(platform=depth[0], stage2_levels=depth[1]))
    bare, mapped = requester_of(host), host.iommu.requester(8)
    iova, base = 0x4000_0000, M2  # the second one sees [M2, 2 * M2) elsewhere
    table = _stage1(memory, iova, base)
    domain = host.iommu.domain(2)
    domain.configure(PAGING, table.root, 4)
    mapped.attach(domain)
    for requester in (bare, mapped):
        requester.allow_ats(ats)
        requester.set_ats(ats)
    host.dirty.start()
    expected: set[int] = set()
    for _ in range(60):
        requester, shift = rng.choice(((bare, 0), (mapped, iova - base)))
        size = rng.choice((1, 64, PAGE, 3 * PAGE))
        to, source = (base + rng.randrange(M2 - size) for _ in range(2))
        action = rng.randrange(5)
        written = range(to & ~(PAGE - 1), to + size, PAGE)
        if action == 0:
            requester.read(to + shift, size)
            continue
        if action == 1:
            requester.write(to + shift, bytes(size))
        elif action == 2:
            requester.fill(to + shift, b"8 bytes.", size)
        elif action == 3:
            requester.move(to + shift, source + shift, size)
        else:
            first = base + rng.randrange(512) * PAGE
            span = min(rng.choice((1, 7, 64, 300)) * PAGE, 2 * M2 - first)
            asked = [first + n * PAGE in expected for n in range(span // PAGE)]
            assert host.dirty.peek(first, span).tolist() == asked
            assert host.dirty.read_and_clear(first, span).tolist() == asked
            expected -= set(range(first, first + span, PAGE))
            continue
        expected |= set(written)
    assert host.dirty.harvest().tolist() == sorted(expected)
    host.close()


def _stage1(memory: GuestMemory, iova: int, gpa: int) -> Any:
    from pvfio.pagetable import Format, PageTable, Perm

    table = PageTable(Format.X86_64, memory, owner="guest", levels=4)
    table.map_range(iova, gpa, M2, Perm.READ | Perm.WRITE)
    return table


def test_a_range_may_reach_over_the_hole() -> None:
    memory = GuestMemory(lib.PV_GPA_HOLE_START + 4 * MIB)
    host = Hypervisor(memory)
    requester = requester_of(host)
    host.dirty.start()
    below, above = lib.PV_GPA_HOLE_START - PAGE, lib.PV_GPA_HOLE_END
    requester.write(below, b"x")
    requester.write(above + PAGE, b"x")
    first, size = below - 4 * PAGE, above + 8 * PAGE - (below - 4 * PAGE)
    found = host.dirty.peek(first, size)
    assert found.shape == (size // PAGE,)
    assert (np.flatnonzero(found) * PAGE + first).tolist() == pages(below, above + PAGE)
    assert not host.dirty.read_and_clear(
        lib.PV_GPA_HOLE_START, lib.PV_GPA_HOLE_END - lib.PV_GPA_HOLE_START
    ).any()
    assert not host.dirty.peek(1 << 40, 1 << 20).any()
    assert host.dirty.harvest().tolist() == pages(below, above + PAGE)
    host.close()


@pytest.mark.parametrize(
    ("gpa", "size"), [(0, 0), (0, -PAGE), (-PAGE, PAGE), (1, PAGE), (0, PAGE + 1), (PAGE, 100)]
)
def test_ranges_are_of_whole_pages(gpa: int, size: int) -> None:
    host = Hypervisor(GuestMemory(4 * MIB))
    host.dirty.start()
    for call in (host.dirty.read_and_clear, host.dirty.peek):
        with pytest.raises(ValueError):
            call(gpa, size)
    host.close()


def test_a_log_that_does_not_run_says_so() -> None:
    host = Hypervisor(GuestMemory(4 * MIB))
    calls: list[Callable[[], Any]] = [
        host.dirty.harvest,
        lambda: host.dirty.read_and_clear(0, PAGE),
        lambda: host.dirty.peek(0, PAGE),
    ]
    for call in calls:
        with pytest.raises(RuntimeError):
            call()
    host.dirty.start()
    with pytest.raises(RuntimeError):
        host.dirty.start()
    for call in calls:
        call()
    host.close()


@pytest.mark.parametrize("platform", ["intel", "amd"])
def test_no_memory_for_the_leaves_changes_nothing(platform: Platform) -> None:
    memory = GuestMemory(32 * MIB, host_private=1 * MIB)
    host = Hypervisor(memory, IommuConfig(platform=platform))
    taken = []
    with contextlib.suppress(MemoryError):
        while True:
            taken.append(memory.host_page())
    for page in taken[:9]:
        memory.free_host_page(page)
    before = memory.stats()
    with pytest.raises(MemoryError):
        host.dirty.start()
    assert not host.dirty.active
    assert memory.stats() == before
    assert all(host.stage2.walk(gpa)[-1].size == M2 for gpa in range(0, 32 * MIB, M2))
    for page in taken[9:]:
        memory.free_host_page(page)
    host.dirty.start()
    host.close()


def test_nothing_dirty_costs_no_flush() -> None:
    """Where no leaf was dirty no cached translation lets a write pass."""
    host = Hypervisor(GuestMemory(8 * MIB))
    requester = requester_of(host)
    host.dirty.start()
    requester.read(M2, 8)
    flushes = requester.tlb_stats().invalidations
    assert not host.dirty.harvest().size
    assert not host.dirty.peek(0, M2).any()
    assert (requester.tlb_stats().invalidations, requester.tlb_stats().entries) == (flushes, 1)
    requester.write(M2, b"x")
    assert host.dirty.harvest().tolist() == pages(M2)
    assert (requester.tlb_stats().invalidations, requester.tlb_stats().entries) == (flushes + 1, 0)
    host.close()


def test_the_guest_cannot_see_the_log(make_guest: Callable[..., Any]) -> None:
    """Its mapping works before, while and after, and what its device writes is reported by GPA."""
    guest = make_guest()
    _domain, _table, gpa = guest.mapped(5, 0)
    device = guest.devices[0]
    for log in (False, True, False):
        if log:
            guest.host.dirty.start()
        device.bus.write(0x10000, b"hello")
        assert bytes(guest.memory.view_guest(gpa, 5)) == b"hello"
        if log:
            assert guest.host.dirty.harvest().tolist() == pages(gpa)
            guest.host.dirty.stop()
    assert not guest.host.faults.snapshot()
