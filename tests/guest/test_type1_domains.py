"""Groups that come and go: shared domains, replay, conflicts, and what a refusing host leaves behind."""

from __future__ import annotations

import errno
import logging
from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.errors import VfioBatchError, VfioError
from pvfio.guest.pviommu import ReservedRegion
from pvfio.guest.type1 import Type1
from pvfio.guest.type1_iova import gaps, usable_ranges
from pvfio.silicon import DmaAborted

pytestmark = pytest.mark.touches_c

PAGE = 0x1000
TOP = (1 << 64) - 1
DENIED: int = lib.HV_STATUS_OPERATION_DENIED
MANY = 32


def fill(machine: Any, type1: Type1) -> Any:
    """Three mappings, one of them of scattered pages; their first bytes are 1, 2 and 3."""
    memory = machine.memory
    buffers = [memory.alloc(PAGE), memory.alloc(100 * PAGE, scattered=True), memory.alloc(2 << 20)]
    for number, (buffer, iova) in enumerate(zip(buffers, (0x1000, 0x10_0000, 0x4000_0000), strict=True)):
        buffer[::PAGE] = number + 1
        type1.map(iova, buffer.vaddr, buffer.nbytes, 3)
    return buffers


def seen(bus: Any) -> list[int]:
    return [bus.read(iova, 1)[0] for iova in (0x1000, 0x10_0000, 0x10_0000 + 99 * PAGE, 0x401F_F000)]


def test_a_second_group_shares_the_domain(type1_machine: Any) -> None:
    type1 = type1_machine.type1()
    buffers = fill(type1_machine, type1)
    type1.attach_group(type1_machine.groups[1])
    assert len(type1.domains) == 1
    assert type1.groups == tuple(type1_machine.groups)
    assert seen(type1_machine.buses[1]) == [1, 2, 2, 3]
    type1.detach_group(type1_machine.groups[0])
    assert seen(type1_machine.buses[1]) == [1, 2, 2, 3]
    assert type1_machine.groups[0].domain is type1_machine.iommu.identity
    assert type1_machine.buses[0].read(0x1000, 1) != b"\1"
    assert len(buffers) == len(type1)


def own_domains(machine: Any) -> Type1:
    """A container whose second group the host did not let share: it got a domain, and a replay, of its own."""
    type1: Type1 = machine.type1()
    fill(machine, type1)
    machine.hypervisor.inject(lib.HVCALL_ATTACH_DEVICE_DOMAIN, lib.HV_STATUS_SUCCESS)  # to blocking
    machine.hypervisor.inject(lib.HVCALL_ATTACH_DEVICE_DOMAIN, DENIED)
    type1.attach_group(machine.groups[1])
    assert len(type1.domains) == 2
    return type1


def test_a_domain_of_its_own_gets_every_mapping(type1_machine: Any) -> None:
    type1 = own_domains(type1_machine)
    pins = type1_machine.memory.stats().pins
    assert seen(type1_machine.buses[1]) == [1, 2, 2, 3]
    buffer = type1_machine.memory.alloc(PAGE)
    type1.map(0x5000, buffer.vaddr, PAGE, 3)
    for bus in type1_machine.buses:
        assert bus.read(0x5000, 1) == b"\0"
    flushes = type1_machine.flushes()
    assert type1.unmap(0x5000, PAGE) == PAGE
    assert type1_machine.flushes() == flushes + 2
    for bus in type1_machine.buses:
        with pytest.raises(DmaAborted):
            bus.read(0x5000, 1)
    type1.detach_group(type1_machine.groups[0])
    assert len(type1.domains) == 1
    assert seen(type1_machine.buses[1]) == [1, 2, 2, 3]
    assert type1_machine.memory.stats().pins == pins


def test_a_domain_that_has_no_room_undoes_the_mapping_in_the_others(type1_machine: Any) -> None:
    type1 = own_domains(type1_machine)
    before = type1_machine.held()[0]
    # What only the second domain has: an entry in the way.
    stray = type1_machine.memory.guest_page()
    type1.domains[1].map(0x7000, stray, PAGE, 3)
    buffer = type1_machine.memory.alloc(4 * PAGE)
    with pytest.raises(VfioError):
        type1.map(0x6000, buffer.vaddr, 2 * PAGE, 3)
    assert type1.domains[0].iova_to_phys(0x6000) is None
    assert type1.find(0x6000) is None
    assert type1_machine.held()[0] == before


def test_the_last_group_takes_the_mappings_along(type1_machine: Any) -> None:
    empty = type1_machine.held()
    type1 = type1_machine.type1(groups=2)
    buffers = fill(type1_machine, type1)
    type1.detach_group(type1_machine.groups[1])
    assert len(type1) == 3
    type1.detach_group(type1_machine.groups[0])
    assert (len(type1), type1.domains, type1.iova_ranges) == (0, (), ())
    assert type1.dma_avail == 65535
    buffers.clear()
    assert type1_machine.held() == empty
    for group in type1_machine.groups:
        assert group.owner is None
        assert group.domain is group.default_domain
    type1.attach_group(type1_machine.groups[0])
    assert type1.iova_ranges != ()


def test_close_gives_everything_back(type1_machine: Any) -> None:
    empty = type1_machine.held()
    type1 = own_domains(type1_machine)
    type1.close()
    assert type1_machine.held() == empty
    type1.close()


def test_a_group_is_attached_once_and_detached_once(type1_machine: Any) -> None:
    type1 = type1_machine.type1()
    group = type1_machine.groups[0]
    with pytest.raises(VfioError) as caught:
        type1.attach_group(group)
    assert caught.value.errno == errno.EINVAL
    type1.detach_group(group)
    with pytest.raises(VfioError) as caught:
        type1.detach_group(group)
    assert caught.value.errno == errno.EINVAL


def test_a_group_of_a_kernel_driver_is_not_claimed(type1_machine: Any) -> None:
    group = type1_machine.groups[1]
    group.bind(group.devices[0], "idxd")
    type1 = type1_machine.type1()
    with pytest.raises(VfioError) as caught:
        type1.attach_group(group)
    assert caught.value.errno == errno.EPERM
    assert type1.groups == (type1_machine.groups[0],)


def test_a_claim_somebody_else_made_stays(type1_machine: Any) -> None:
    group = type1_machine.groups[0]
    group.claim_dma_owner("container")
    type1 = type1_machine.type1()
    type1.detach_group(group)
    assert group.owner == "container"
    assert group.domain is type1_machine.iommu.blocking


def refuse_attach(machine: Any, type1: Type1) -> None:
    before, ranges = machine.held(), type1.iova_ranges
    with pytest.raises(VfioError) as caught:
        type1.attach_group(machine.groups[1])
    assert caught.value.errno == errno.EINVAL
    assert machine.held() == before
    assert type1.iova_ranges == ranges
    assert machine.groups[1].owner is None


# Mapped by the first group, outside the aperture of the second's IOMMU.
@pytest.mark.parametrize("iova", [1 << 39, (1 << 39) - PAGE])
def test_an_aperture_that_conflicts_with_a_mapping(
    type1_machine: Any, monkeypatch: pytest.MonkeyPatch, iova: int
) -> None:
    type1 = type1_machine.type1()
    buffer = type1_machine.memory.alloc(2 * PAGE)
    type1.map(iova, buffer.vaddr, 2 * PAGE, 3)
    monkeypatch.setattr(type1_machine.iommu, "width", 39)
    refuse_attach(type1_machine, type1)
    type1.unmap(iova, 2 * PAGE)
    type1.map((1 << 39) - PAGE, buffer.vaddr, PAGE, 3)
    type1.attach_group(type1_machine.groups[1])
    assert len(type1.domains) == 2
    assert type1.iova_ranges[-1] == (0xFEF0_0000, (1 << 39) - 1)
    with pytest.raises(VfioError):
        type1.map(1 << 39, buffer.vaddr, PAGE, 3)
    assert type1_machine.buses[1].read((1 << 39) - 1, 1) == b"\0"
    type1.detach_group(type1_machine.groups[1])
    type1.map(1 << 39, buffer.vaddr, PAGE, 3)


def test_a_reserved_region_that_conflicts_with_a_mapping(
    type1_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    type1 = type1_machine.type1()
    buffer = type1_machine.memory.alloc(PAGE)
    type1.map(0x9000_0000, buffer.vaddr, PAGE, 3)
    regions = (*type1_machine.iommu.reserved_regions, ReservedRegion(0x9000_0000, 0x9000_0FFF, "direct"))
    monkeypatch.setattr(type1_machine.iommu, "reserved_regions", regions)
    refuse_attach(type1_machine, type1)
    type1.unmap(0x9000_0000, PAGE)
    type1.attach_group(type1_machine.groups[1])
    with pytest.raises(VfioError) as caught:
        type1.map(0x9000_0000, buffer.vaddr, PAGE, 3)
    assert caught.value.errno == errno.EINVAL


def test_a_group_whose_reserved_regions_leave_nothing(
    type1_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    type1 = Type1(type1_machine.memory, type1_machine.iommu)
    monkeypatch.setattr(type1_machine.iommu, "reserved_regions", (ReservedRegion(0, TOP, "direct"),))
    refuse_attach(type1_machine, type1)


# Which call fails while the second group comes, and the errno: it must leave no trace.
@pytest.mark.parametrize(
    ("call", "status", "expected"),
    [
        (lib.HVCALL_CREATE_DEVICE_DOMAIN, lib.HV_STATUS_INSUFFICIENT_MEMORY, errno.ENOMEM),
        (lib.HVCALL_CONFIGURE_DEVICE_DOMAIN, lib.HV_STATUS_INVALID_PARAMETER, errno.EINVAL),
        (lib.HVCALL_ATTACH_DEVICE_DOMAIN, DENIED, errno.EACCES),
    ],
)
def test_a_host_that_refuses_the_attach(type1_machine: Any, call: int, status: int, expected: int) -> None:
    type1 = type1_machine.type1()
    buffers = fill(type1_machine, type1)
    before = type1_machine.held()
    type1_machine.hypervisor.inject(call, status)
    with pytest.raises(VfioError) as caught:
        type1.attach_group(type1_machine.groups[1])
    assert caught.value.errno == expected
    assert type1_machine.held() == before
    assert type1_machine.groups[1].owner is None
    assert seen(type1_machine.buses[0]) == [1, 2, 2, 3]
    type1.attach_group(type1_machine.groups[1])
    assert seen(type1_machine.buses[1]) == [1, 2, 2, 3]
    assert len(buffers) == 3


def test_a_replay_that_runs_out_of_table_pages(make_type1_machine: Any) -> None:
    machine = make_type1_machine(ram=4 << 20)
    type1 = machine.type1()
    buffer = machine.memory.alloc(PAGE)
    for i in range(8):
        type1.map(i << 30, buffer.vaddr, PAGE, 3)
    hoard = []
    while machine.memory.stats().free_frames > 5:
        hoard.append(machine.memory.guest_page())
    before = machine.held()
    machine.hypervisor.inject(lib.HVCALL_ATTACH_DEVICE_DOMAIN, lib.HV_STATUS_SUCCESS)
    machine.hypervisor.inject(lib.HVCALL_ATTACH_DEVICE_DOMAIN, DENIED)
    with pytest.raises(VfioError) as caught:
        type1.attach_group(machine.groups[1])
    assert caught.value.errno == errno.ENOMEM
    assert machine.held() == before
    assert (len(type1), len(type1.domains)) == (8, 1)


def test_a_device_that_cannot_be_blocked_stays_attached(
    type1_machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    type1 = type1_machine.type1()
    buffers = fill(type1_machine, type1)
    type1_machine.hypervisor.inject(lib.HVCALL_ATTACH_DEVICE_DOMAIN, DENIED, 2)
    with caplog.at_level(logging.WARNING), pytest.raises(VfioError) as caught:
        type1.detach_group(type1_machine.groups[0])
    assert caught.value.errno == errno.EACCES
    assert len(type1) == len(buffers)
    assert seen(type1_machine.buses[0]) == [1, 2, 2, 3]
    with caplog.at_level(logging.WARNING):
        type1.close()
    # Still attached, to a table with nothing in it.
    assert (len(type1), len(type1.groups)) == (0, 1)
    assert type1_machine.memory.stats().pins == 0
    with pytest.raises(DmaAborted):
        type1_machine.buses[0].read(0x1000, 1)
    type1.close()
    assert type1.groups == ()


def test_a_device_stuck_in_a_domain_finds_it_empty(
    make_type1_machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    machine = make_type1_machine(devices=3)
    type1 = machine.type1()
    buffers = fill(machine, type1)
    _, group, other = machine.groups
    second = other.devices[0]
    other.remove_device(second)
    group.add_device(second)
    group.claim_dma_owner("container")
    # Not into the shared domain. Into its own: the first device goes in (so the guest thinks), the second
    # does not, and the first does not come back.
    inject, attach = machine.hypervisor.inject, lib.HVCALL_ATTACH_DEVICE_DOMAIN
    inject(attach, DENIED)
    inject(attach, lib.HV_STATUS_SUCCESS)
    inject(attach, DENIED, 2)
    with caplog.at_level(logging.WARNING), pytest.raises(VfioError) as caught:
        type1.attach_group(group)
    assert caught.value.errno == errno.EACCES
    stuck = machine.iommu.domain_of(group.devices[0])
    assert stuck.kind == "paging"
    assert stuck.table.stats().tables == 1
    assert any("is not freed" in record.message for record in caplog.records)
    assert (len(type1), len(type1.domains)) == (len(buffers), 1)
    type1.attach_group(group)
    assert seen(machine.buses[2]) == [1, 2, 2, 3]


@pytest.mark.parametrize("refusals", [1, 2])
def test_a_flush_that_is_refused(type1_machine: Any, refusals: int, caplog: pytest.LogCaptureFixture) -> None:
    """One refusal: the whole domain is flushed instead. Two: a warning, as in Linux, and the unmap stands."""
    type1 = type1_machine.type1()
    buffer = type1_machine.memory.alloc(PAGE)
    type1.map(0, buffer.vaddr, PAGE, 3)
    type1_machine.buses[0].read(0, 1)
    type1_machine.hypervisor.inject(lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST, DENIED)
    if refusals == 2:
        type1_machine.hypervisor.inject(lib.HVCALL_FLUSH_DEVICE_DOMAIN, DENIED)
    with caplog.at_level(logging.WARNING):
        assert type1.unmap(0, PAGE) == PAGE
    assert len(caplog.records) == refusals
    assert (len(type1), type1.account.locked, type1_machine.memory.stats().pins) == (0, 0, 0)
    if refusals == 1:
        with pytest.raises(DmaAborted):
            type1_machine.buses[0].read(0, 1)


@pytest.mark.parametrize("mappings", [1, 3])
def test_an_interrupted_flush_keeps_the_memory_until_a_flush_has_been_made(
    type1_machine: Any, mappings: int
) -> None:
    type1 = type1_machine.type1()
    buffer = type1_machine.memory.alloc(PAGE)
    for i in range(mappings):
        type1.map(2 * i * PAGE, buffer.vaddr, PAGE, 3)
        type1_machine.buses[0].read(2 * i * PAGE, 1)
    type1_machine.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        type1.unmap(0, 2 * mappings * PAGE - PAGE)
    assert (len(type1), type1_machine.memory.stats().pins) == (mappings, mappings)
    type1_machine.hypervisor.inject(lib.HVCALL_FLUSH_DEVICE_DOMAIN, DENIED)
    with pytest.raises(VfioError) as caught:
        type1.unmap(0, PAGE)
    assert caught.value.errno == errno.EACCES
    assert type1_machine.memory.stats().pins == mappings
    assert type1.unmap(0, 2 * mappings * PAGE - PAGE) == mappings * PAGE
    assert (len(type1), type1_machine.memory.stats().pins) == (0, 0)
    with pytest.raises(DmaAborted):
        type1_machine.buses[0].read(0, 1)
    type1.map(0, buffer.vaddr, PAGE, 3)
    assert type1.unmap(0, PAGE) == PAGE


def test_an_interrupted_flush_of_a_batch_keeps_the_memory(type1_machine: Any) -> None:
    type1 = type1_machine.type1()
    buffer = type1_machine.memory.alloc(PAGE)
    iovas, sizes = 3 * PAGE * np.arange(5, dtype=np.uint64), np.full(5, PAGE, np.uint64)
    type1.map_batch(iovas, np.full(5, buffer.vaddr, np.uint64), sizes, 3)
    type1_machine.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        type1.unmap_batch(iovas[1:4], sizes[1:4])
    assert (len(type1), type1_machine.memory.stats().pins) == (5, 5)
    flushes = type1_machine.flushes()
    assert type1.unmap_batch(iovas, sizes).tolist() == sizes.tolist()
    assert type1_machine.flushes() == flushes + 2
    assert (len(type1), type1_machine.memory.stats().pins) == (0, 0)


def test_a_batch_that_a_second_domain_refuses_is_undone_in_both(type1_machine: Any) -> None:
    type1 = own_domains(type1_machine)
    before = type1_machine.memory.stats().pins, type1.dma_avail, type1.account.locked
    type1.domains[1].map(0x9000, type1_machine.memory.guest_page(), PAGE, 3)
    buffer = type1_machine.memory.alloc(PAGE)
    iovas = np.array([0x7000, 0x8000, 0x9000, 0xA000], np.uint64)
    with pytest.raises(VfioBatchError) as caught:
        type1.map_batch(iovas, np.full(4, buffer.vaddr, np.uint64), np.full(4, PAGE, np.uint64), 3)
    assert (caught.value.errno, caught.value.index) == (errno.EADDRINUSE, 2)
    assert (type1_machine.memory.stats().pins, type1.dma_avail, type1.account.locked) == before
    for domain in type1.domains:
        assert [domain.iova_to_phys(int(iova)) for iova in iovas] == [None] * 4


RANGES: dict[str, tuple[list[tuple[int, int]], list[tuple[int, int]], tuple[tuple[int, int], ...]]] = {
    "no aperture": ([], [(0, 1)], ()),
    "whole": ([(0, TOP)], [], ((0, TOP),)),
    "smallest of several": ([(0, TOP), (5, 90), (2, 99)], [], ((5, 90),)),
    "disjoint": ([(0, 9), (20, 29)], [], ()),
    "a hole": ([(0, 99)], [(10, 19)], ((0, 9), (20, 99))),
    "at the edges": ([(0, 99)], [(90, TOP), (0, 9)], ((10, 89),)),
    "overlapping, in any order": ([(0, 99)], [(30, 49), (10, 39), (35, 36)], ((0, 9), (50, 99))),
    "everything": ([(0, TOP)], [(0, TOP)], ()),
    "outside": ([(50, 60)], [(0, 49), (61, TOP)], ((50, 60),)),
}


@pytest.mark.parametrize("case", RANGES)
def test_usable_ranges(case: str) -> None:
    apertures, reserved, expected = RANGES[case]
    assert usable_ranges(apertures, reserved) == expected
    inside = sum(last - first + 1 for first, last in expected)
    assert sum(last - first + 1 for first, last in gaps(expected)) == TOP + 1 - inside
