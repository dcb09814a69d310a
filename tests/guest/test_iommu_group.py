"""IOMMU groups: who owns their DMA, and the way of all their devices from domain to domain."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.errors import HypercallError, VfioError
from pvfio.guest.iommu_group import IommuGroup
from pvfio.guest.pviommu import PagingDomain, PvIommu
from pvfio.silicon import DmaAborted

pytestmark = pytest.mark.touches_c

ATTACH = lib.HVCALL_ATTACH_DEVICE_DOMAIN
MakeGuest = Callable[..., Any]


class Grouped:
    """A guest with ``functions`` devices in one group."""

    def __init__(self, guest: Any) -> None:
        self.guest = guest
        self.iommu: PvIommu = guest.detect()
        self.group = IommuGroup(7, self.iommu, guest.devices)
        self.page: int = guest.memory.guest_page()
        guest.calls.clear()

    def refuse(self, *numbers: int) -> None:
        """The attaches with these numbers, counted from the next one, are refused."""
        count = -1

        def before(code: int) -> None:
            nonlocal count
            if code == ATTACH:
                count += 1
                if count in numbers:
                    self.guest.hypervisor.inject(ATTACH, lib.HV_STATUS_OPERATION_DENIED)

        self.guest.before = before

    def kinds(self) -> list[str | None]:
        """What every device is attached to, as its DMA shows."""
        found: list[str | None] = []
        for function in self.guest.functions:
            try:
                function.bus.write(self.page, b"identity")
                found.append("identity")
            except DmaAborted:
                try:
                    function.bus.write(0x5000, b"paging")
                    found.append("paging")
                except DmaAborted:
                    found.append("blocking")
        return found

    def paging(self) -> PagingDomain:
        domain = self.iommu.paging_domain()
        domain.map(0x5000, self.page, 4096)
        return domain


@pytest.fixture
def pair(make_guest: MakeGuest) -> Grouped:
    return Grouped(make_guest(functions=2))


@pytest.fixture
def trio_of_devices(make_guest: MakeGuest) -> Grouped:
    return Grouped(make_guest(functions=3))


def test_a_group_begins_in_the_default_domain(pair: Grouped) -> None:
    assert pair.group.domain is pair.iommu.identity
    assert pair.kinds() == ["identity"] * 2
    assert all(device.iommu_group is pair.group for device in pair.group.devices)
    assert "0012:00:00.1" in repr(pair.group)
    with pytest.raises(ValueError):
        pair.group.add_device(pair.group.devices[0])


def test_claim_attach_release(pair: Grouped) -> None:
    group, owner = pair.group, object()
    group.claim_dma_owner(owner)
    assert group.owner is owner
    assert pair.kinds() == ["blocking"] * 2
    domain = pair.paging()
    group.attach(domain)
    group.attach(domain)
    assert pair.kinds() == ["paging"] * 2
    group.detach()
    group.detach()
    assert pair.kinds() == ["blocking"] * 2
    group.attach(domain)
    seen: list[list[str | None]] = []
    pair.guest.before = lambda code: seen.append(pair.kinds())
    group.release_dma_owner()
    pair.guest.before = lambda code: None
    # Both devices are blocked before the first of them sees guest memory again.
    assert seen == [
        ["paging", "paging"],
        ["blocking", "paging"],
        ["blocking", "blocking"],
        ["identity", "blocking"],
    ]
    assert pair.kinds() == ["identity"] * 2
    assert group.owner is None
    domain.free()


@pytest.mark.parametrize(("driver", "viable"), [(None, True), ("vfio-pci", True), ("idxd", False)])
def test_kernel_drivers_and_claims(pair: Grouped, driver: str | None, viable: bool) -> None:
    group = pair.group
    group.bind(group.devices[1], driver)
    assert group.viable == viable
    if viable:
        group.claim_dma_owner()
        assert pair.kinds() == ["blocking"] * 2
    else:
        assert group.kernel_users == [group.devices[1]]
        with pytest.raises(VfioError, match="idxd") as raised:
            group.claim_dma_owner()
        assert raised.value.errno == errno.EPERM
        assert pair.kinds() == ["identity"] * 2
        group.bind(group.devices[1], None)
        group.claim_dma_owner()


def test_claimed_twice(pair: Grouped) -> None:
    pair.group.claim_dma_owner("one")
    with pytest.raises(VfioError, match="one") as raised:
        pair.group.claim_dma_owner("two")
    assert raised.value.errno == errno.EPERM
    assert pair.group.owner == "one"
    assert pair.group.viable


@pytest.mark.parametrize("driver", ["idxd", None])
def test_a_claimed_group_takes_no_kernel_driver(pair: Grouped, driver: str | None) -> None:
    group = pair.group
    group.bind(group.devices[0], "vfio-pci")
    group.claim_dma_owner()
    with pytest.raises(VfioError) as raised:
        group.bind(group.devices[0], driver)
    assert raised.value.errno == errno.EBUSY
    group.bind(group.devices[1], "vfio-pci")
    assert [device.driver for device in group.devices] == ["vfio-pci"] * 2


def test_attach_needs_a_claim_and_a_blocked_group(pair: Grouped) -> None:
    group, domain = pair.group, pair.paging()
    for operation in (group.detach, lambda: group.attach(domain)):
        with pytest.raises(VfioError) as raised:
            operation()
        assert raised.value.errno == errno.EPERM
    group.claim_dma_owner()
    group.attach(domain)
    with pytest.raises(VfioError) as raised:
        group.attach(pair.paging())
    assert raised.value.errno == errno.EBUSY
    assert pair.kinds() == ["paging"] * 2


def test_release_needs_a_claim(pair: Grouped) -> None:
    with pytest.raises(VfioError) as raised:
        pair.group.release_dma_owner()
    assert raised.value.errno == errno.EINVAL
    with pytest.raises(ValueError):
        pair.group.claim_dma_owner(None)


def test_a_claim_fails_where_blocking_fails(
    trio_of_devices: Grouped, caplog: pytest.LogCaptureFixture
) -> None:
    rig = trio_of_devices
    rig.refuse(2)
    with pytest.raises(HypercallError) as raised:
        rig.group.claim_dma_owner()
    assert raised.value.errno == errno.EACCES
    assert rig.group.owner is None
    assert rig.group.domain is rig.iommu.identity
    assert rig.kinds() == ["identity"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "0012:00:00.2: not blocked: ATTACH_DEVICE_DOMAIN: EACCES: HV_STATUS_OPERATION_DENIED (0x8)"
    ]


def test_a_half_attached_group_goes_back_to_blocking(trio_of_devices: Grouped) -> None:
    rig = trio_of_devices
    rig.group.claim_dma_owner()
    domain = rig.paging()
    rig.refuse(1)
    with pytest.raises(HypercallError):
        rig.group.attach(domain)
    assert rig.kinds() == ["blocking"] * 3
    assert rig.group.domain is rig.iommu.blocking
    domain.free()
    rig.group.attach(rig.paging())
    assert rig.kinds() == ["paging"] * 3


def test_a_roll_back_that_fails_is_logged(trio_of_devices: Grouped, caplog: pytest.LogCaptureFixture) -> None:
    rig = trio_of_devices
    rig.group.claim_dma_owner()
    rig.refuse(2, 3)
    with pytest.raises(HypercallError):
        rig.group.attach(rig.paging())
    assert "cannot go back to <blocking domain 2>" in caplog.text
    assert rig.kinds() == ["blocking", "paging", "blocking"]
    rig.group.detach()
    assert rig.kinds() == ["blocking"] * 3


def test_a_release_that_cannot_block_keeps_the_claim(pair: Grouped) -> None:
    group = pair.group
    group.claim_dma_owner("owner")
    domain = pair.paging()
    group.attach(domain)
    pair.refuse(1)
    with pytest.raises(HypercallError):
        group.release_dma_owner()
    assert group.owner == "owner"
    assert pair.kinds() == ["paging"] * 2
    group.release_dma_owner()
    assert pair.kinds() == ["identity"] * 2


def test_devices_come_and_go(pair: Grouped, make_guest: MakeGuest) -> None:
    group = pair.group
    first, second = group.devices
    group.bind(first, "vfio-pci")
    group.remove_device(first)
    assert pair.kinds() == ["blocking", "identity"]
    assert (first.iommu_group, first.driver, group.devices) == (None, None, [second])
    for operation in (group.remove_device, lambda device: group.bind(device, "idxd")):
        with pytest.raises(ValueError):
            operation(first)
    group.claim_dma_owner()
    group.attach(pair.paging())
    group.add_device(first)
    assert pair.kinds() == ["paging"] * 2


def test_a_device_that_cannot_be_attached_is_not_in_the_group(pair: Grouped) -> None:
    group = pair.group
    device = group.devices[1]
    group.remove_device(device)
    pair.refuse(0)
    with pytest.raises(HypercallError):
        group.add_device(device)
    assert device.iommu_group is None
    assert device not in group.devices
