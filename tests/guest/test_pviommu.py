"""The pvIOMMU driver: what it makes of each host, attaching, ATS, domains and their ids."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.errors import HypercallError, IommuError
from pvfio.guest.pviommu import PvIommu, ReservedRegion
from pvfio.host import IommuConfig
from pvfio.silicon import DmaAborted

pytestmark = pytest.mark.touches_c

CREATE, DELETE = lib.HVCALL_CREATE_DEVICE_DOMAIN, lib.HVCALL_DELETE_DEVICE_DOMAIN
CONFIGURE, ATTACH = lib.HVCALL_CONFIGURE_DEVICE_DOMAIN, lib.HVCALL_ATTACH_DEVICE_DOMAIN
DETACH, PROPERTY = lib.HVCALL_DETACH_DEVICE_DOMAIN, lib.HVCALL_GET_LOGICAL_DEVICE_PROPERTY
FLUSHES = (lib.HVCALL_FLUSH_DEVICE_DOMAIN, lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST)
DENIED = lib.HV_STATUS_OPERATION_DENIED
MakeGuest = Callable[..., Any]


@pytest.mark.parametrize("config", [IommuConfig(present=False), IommuConfig(advertised=False)])
def test_no_iommu_is_quiet(
    make_guest: MakeGuest, caplog: pytest.LogCaptureFixture, config: IommuConfig
) -> None:
    guest = make_guest(config)
    assert PvIommu.detect(guest.transport, guest.memory) is None
    assert caplog.records == []
    assert guest.count(CREATE) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IommuConfig(stage1=False), "without stage-1"),
        (IommuConfig(pgsize_bitmap=1 << 21), "without 4 KiB pages"),
    ],
)
def test_an_iommu_nobody_can_drive_is_an_error(
    make_guest: MakeGuest, caplog: pytest.LogCaptureFixture, config: IommuConfig, message: str
) -> None:
    guest = make_guest(config)
    assert PvIommu.detect(guest.transport, guest.memory) is None
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.name.startswith("pvfio.guest")
    assert message in record.getMessage()


@pytest.mark.parametrize(
    ("status", "number"),
    [(lib.HV_STATUS_ACCESS_DENIED, errno.EACCES), (lib.HV_HYPERCALL_UNAVAILABLE, errno.EOPNOTSUPP)],
)
def test_other_refusals_of_detection(guest: Any, status: int, number: int) -> None:
    guest.hypervisor.inject(lib.HVCALL_GET_IOMMU_CAPABILITIES, status)
    with pytest.raises(HypercallError) as raised:
        guest.detect()
    assert raised.value.errno == number


@pytest.mark.parametrize(
    ("width", "five_level", "effective", "levels"),
    [
        (39, False, 39, 4),
        (48, False, 48, 4),
        (57, False, 48, 4),
        (48, True, 48, 4),
        (49, True, 49, 5),
        (57, True, 57, 5),
        (64, True, 57, 5),
    ],
)
def test_width_and_levels(
    make_guest: MakeGuest, width: int, five_level: bool, effective: int, levels: int
) -> None:
    guest = make_guest(IommuConfig(max_iova_width=width, five_level=five_level))
    iommu = guest.detect()
    assert (iommu.width, iommu.levels) == (effective, levels)
    domain = iommu.paging_domain()
    assert domain.aperture == (0, (1 << effective) - 1)
    assert domain.table.levels == levels
    iommu.attach(domain, guest.devices[0])
    top = domain.aperture[1] & ~0xFFF
    domain.map(top, guest.memory.guest_page(), 4096)
    guest.functions[0].bus.write(top, b"far up")
    with pytest.raises(OSError) as raised:
        domain.map(top + 4096, guest.memory.guest_page(), 4096)
    assert raised.value.errno == errno.ERANGE


@pytest.mark.parametrize(
    ("offered", "usable"),
    [(1 << 12, 1 << 12), (1 << 12 | 1 << 21 | 1 << 35, 1 << 12 | 1 << 21), (0xFFFF_F000, 0x4020_1000)],
)
def test_page_sizes_are_what_both_sides_have(make_guest: MakeGuest, offered: int, usable: int) -> None:
    guest = make_guest(IommuConfig(pgsize_bitmap=offered))
    iommu = guest.detect()
    assert iommu.pgsize_bitmap == usable
    domain = iommu.paging_domain()
    assert domain.pgsize_bitmap == usable
    domain.map(1 << 30, 0, 4 << 20)
    assert domain.walk(1 << 30)[-1].size == (1 << 21 if usable & 1 << 21 else 1 << 12)


def test_the_static_domains(guest: Any) -> None:
    iommu = guest.detect()
    assert guest.calls.count(CREATE) == guest.calls.count(CONFIGURE) == 2
    assert {iommu.identity.id, iommu.blocking.id} == {1, 2}
    device, bus = guest.devices[0], guest.functions[0].bus
    page = guest.memory.guest_page()
    iommu.attach(iommu.identity, device)
    bus.write(page, b"by GPA")
    assert bytes(guest.memory.view_guest(page, 6)) == b"by GPA"
    iommu.attach(iommu.blocking, device)
    with pytest.raises(DmaAborted):
        bus.write(page, b"blocked")
    assert iommu.domain_of(device) is iommu.blocking
    assert iommu.reserved_regions == (ReservedRegion(0xFEE00000, 0xFEEFFFFF, "msi"),)


@pytest.mark.parametrize("call", [CREATE, CONFIGURE])
@pytest.mark.parametrize("which", [0, 1])
def test_static_domains_that_are_refused_leave_nothing(guest: Any, call: int, which: int) -> None:
    refusals = [which]

    def before(code: int) -> None:
        if code == call:
            if refusals[0] == 0:
                guest.hypervisor.inject(call, DENIED)
            refusals[0] -= 1

    guest.before = before
    with pytest.raises(HypercallError):
        guest.detect()
    created = guest.count(CREATE) - (call == CREATE)
    assert guest.count(DELETE) == created
    guest.before = lambda code: None
    assert guest.detect().identity.id == 1


def test_close_deletes_the_static_domains(guest: Any) -> None:
    iommu = guest.detect()
    iommu.close()
    assert guest.count(DELETE) == 2
    assert guest.detect().identity.id == 1


def test_probe(guest: Any) -> None:
    iommu = guest.detect()
    iommu.probe(guest.devices[0])
    assert guest.count(PROPERTY) == 1


@pytest.mark.parametrize("case", ["not PCI", "not enabled", "no logical id", "refused"])
def test_probe_refuses(make_guest: MakeGuest, case: str) -> None:
    guest = make_guest(pviommu=case != "not enabled")
    iommu = guest.detect()
    device: object = guest.devices[0]
    if case == "not PCI":
        device = object()
    if case == "no logical id":
        guest.registry.unregister(guest.devices[0].segment)
    if case == "refused":
        guest.hypervisor.inject(PROPERTY, lib.HV_STATUS_UNKNOWN_PROPERTY)
    with pytest.raises(IommuError) as raised:
        iommu.probe(device)
    assert raised.value.errno == errno.ENODEV


def test_attach_replaces_at_once_and_never_detaches(guest: Any) -> None:
    iommu = guest.detect()
    device = guest.devices[0]
    domain = iommu.paging_domain()
    guest.calls.clear()
    for target in (iommu.identity, iommu.blocking, domain, domain, iommu.blocking, iommu.identity):
        iommu.attach(target, device)
        assert iommu.domain_of(device) is target
        assert target.devices == {device.name}
    assert guest.calls == [ATTACH] * 6
    assert domain.devices == set()
    iommu.attach(iommu.blocking, device)
    iommu.release(device)
    assert iommu.domain_of(device) is None
    assert guest.count(DETACH) == 0


def test_already_in_domain_is_success(guest: Any) -> None:
    iommu = guest.detect()
    guest.hypervisor.inject(ATTACH, lib.HV_STATUS_DEVICE_ALREADY_IN_DOMAIN)
    iommu.attach(iommu.identity, guest.devices[0])
    assert iommu.domain_of(guest.devices[0]) is iommu.identity
    assert guest.devices[0].ats_enabled


@pytest.mark.parametrize("kind", ["identity", "paging", "blocking"])
def test_a_refused_attach(guest: Any, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    iommu = guest.detect()
    device = guest.devices[0]
    old = iommu.paging_domain()
    iommu.attach(old, device)
    target = {"identity": iommu.identity, "blocking": iommu.blocking, "paging": iommu.paging_domain()}[kind]
    guest.hypervisor.inject(ATTACH, lib.HV_STATUS_INSUFFICIENT_MEMORY)
    with pytest.raises(HypercallError) as raised:
        iommu.attach(target, device)
    assert raised.value.errno == errno.ENOMEM
    assert iommu.domain_of(device) is old
    assert old.devices == {device.name}
    assert target.devices == set()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (kind == "blocking")
    assert device.ats_enabled == (kind != "blocking")


@pytest.mark.parametrize("iommu_has", [True, False])
@pytest.mark.parametrize("device_has", [True, False])
def test_ats_follows_the_domain(make_guest: MakeGuest, iommu_has: bool, device_has: bool) -> None:
    guest = make_guest(IommuConfig(ats=iommu_has), ats=device_has)
    iommu = guest.detect()
    device = guest.devices[0]
    at_the_call: list[bool] = []
    guest.before = lambda code: at_the_call.append(device.ats_enabled)
    domain = iommu.paging_domain()
    at_the_call.clear()
    both = iommu_has and device_has
    for target, enabled in (
        (iommu.identity, both),
        (iommu.blocking, False),
        (domain, both),
        (iommu.identity, both),
        (iommu.blocking, False),
    ):
        iommu.attach(target, device)
        assert device.ats_enabled == enabled
    # On only after the attach; off before the device is blocked.
    assert at_the_call == [False, False, False, both, False]


def test_attach_needs_a_logical_id_and_a_living_domain(guest: Any) -> None:
    iommu = guest.detect()
    domain = iommu.paging_domain()
    domain.free()
    with pytest.raises(ValueError, match="freed"):
        iommu.attach(domain, guest.devices[0])
    guest.registry.unregister(guest.devices[0].segment)
    with pytest.raises(IommuError) as raised:
        iommu.attach(iommu.identity, guest.devices[0])
    assert raised.value.errno == errno.ENODEV
    assert guest.count(ATTACH) == 0


def test_freeing_a_domain(guest: Any) -> None:
    iommu = guest.detect()
    device = guest.devices[0]
    pages = guest.memory.stats().table_pages
    domain = iommu.paging_domain()
    domain.map(0x100000, 0, 64 << 10)
    iommu.attach(domain, device)
    with pytest.raises(IommuError) as raised:
        domain.free()
    assert raised.value.errno == errno.EBUSY
    iommu.attach(iommu.blocking, device)
    at_delete: list[int] = []
    guest.before = lambda code: at_delete.append(guest.memory.stats().table_pages)
    guest.calls.clear()
    domain.free()
    domain.free()
    # Tables first, then DELETE, and no flush.
    assert guest.calls == [DELETE]
    assert at_delete == [pages]


def test_ids_are_used_again_after_a_delete(guest: Any) -> None:
    iommu = guest.detect()
    first, second = iommu.paging_domain(), iommu.paging_domain()
    assert (first.id, second.id) == (3, 4)
    first.free()
    third, fourth = iommu.paging_domain(), iommu.paging_domain()
    assert (third.id, fourth.id) == (3, 5)


def test_an_id_the_host_did_not_delete_is_not_used_again(
    guest: Any, caplog: pytest.LogCaptureFixture
) -> None:
    iommu = guest.detect()
    domain = iommu.paging_domain()
    guest.hypervisor.inject(DELETE, DENIED)
    domain.free()
    assert "was not deleted" in caplog.text
    assert iommu.paging_domain().id == 4


def test_an_id_that_is_taken_is_left_alone(guest: Any) -> None:
    guest.transport.create_device_domain(3)
    iommu = guest.detect()
    with pytest.raises(HypercallError) as raised:
        iommu.paging_domain()
    assert raised.value.status == lib.HV_STATUS_KEY_ALREADY_EXISTS
    assert iommu.paging_domain().id == 4


@pytest.mark.parametrize("call", [CREATE, CONFIGURE])
def test_a_refused_paging_domain_leaves_nothing(guest: Any, call: int) -> None:
    iommu = guest.detect()
    pages = guest.memory.stats().table_pages
    guest.hypervisor.inject(call, lib.HV_STATUS_INSUFFICIENT_MEMORY)
    with pytest.raises(HypercallError) as raised:
        iommu.paging_domain()
    assert raised.value.errno == errno.ENOMEM
    assert guest.memory.stats().table_pages == pages
    assert guest.count(DELETE) == (call == CONFIGURE)
    assert iommu.paging_domain().id == 3


def test_the_host_has_room_for_so_many_domains(make_guest: MakeGuest) -> None:
    guest = make_guest(IommuConfig(max_domains=3))
    iommu = guest.detect()
    domain = iommu.paging_domain()
    with pytest.raises(HypercallError) as raised:
        iommu.paging_domain()
    assert raised.value.errno == errno.ENOMEM
    domain.free()
    iommu.paging_domain()
