"""Device domains in action: what a device's DMA does before, during and after each hypercall."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.host import IommuConfig, Platform
from pvfio.pagetable import Perm
from pvfio.silicon import DmaAborted

pytestmark = pytest.mark.touches_c

IOVA = 0x10000
TRANSLATE = lib.HV_DOMAIN_TRANSLATION_ENABLED
BLOCKED = lib.HV_DOMAIN_BLOCKED | TRANSLATE
RW = Perm.READ | Perm.WRITE


def reads(guest: Any, function: int, iova: int = IOVA) -> bytes | None:
    """What a device's DMA read finds, None when it is aborted."""
    try:
        data: bytes = guest.devices[function].bus.read(iova, 4)
    except DmaAborted:
        return None
    return data


def put(guest: Any, gpa: int, data: bytes) -> None:
    guest.memory.view_guest(gpa, len(data))[:] = data


def test_a_device_in_no_domain_is_blocked(guest: Any) -> None:
    assert reads(guest, 0, guest.page) is None
    (fault,) = guest.host.faults.snapshot()
    assert (fault.reason, fault.domain, fault.device) == ("blocked", 0, "0001:00:00.0")


def test_identity_reads_gpas(guest: Any) -> None:
    guest.attach(guest.make(1, flags=0), 0)
    put(guest, guest.output, b"here")
    assert reads(guest, 0, guest.output) == b"here"


def test_blocked_blocks(guest: Any) -> None:
    guest.attach(guest.make(1, flags=BLOCKED), 0)
    assert reads(guest, 0, guest.page) is None
    assert guest.host.faults.snapshot()[-1].domain == 1


@pytest.mark.parametrize("platform", ["intel", "amd"])
def test_paging_reads_through_both_stages(make_guest: Callable[..., Any], platform: Platform) -> None:
    guest = make_guest(IommuConfig(platform=platform))
    _, _, gpa = guest.mapped(1, 0)
    put(guest, gpa, b"page")
    assert reads(guest, 0) == b"page"
    assert guest.devices[0].bus.walk(IOVA).hpa == guest.memory.gpa_to_hpa(gpa) != gpa


def test_five_level(make_guest: Callable[..., Any]) -> None:
    guest = make_guest(IommuConfig(five_level=True, max_iova_width=57))
    table, gpa, iova = guest.table(levels=5), guest.memory.guest_page(), 1 << 50
    table.map_range(iova, gpa, 4096, RW)
    flags = TRANSLATE | lib.HV_DOMAIN_FIRST_STAGE_5_LEVEL
    guest.attach(guest.make(1, flags=flags, root=table.root), 0)
    put(guest, gpa, b"high")
    assert reads(guest, 0, iova) == b"high"


def test_without_an_iommu_devices_use_gpas(make_guest: Callable[..., Any]) -> None:
    guest = make_guest(IommuConfig(present=False))
    put(guest, guest.output, b"flat")
    assert reads(guest, 0, guest.output) == b"flat"


def test_attach_replaces(guest: Any) -> None:
    first, _, gpa1 = guest.mapped(1, 0)
    put(guest, gpa1, b"one.")
    assert reads(guest, 0) == b"one."
    _, _, gpa2 = guest.mapped(2, 0)
    put(guest, gpa2, b"two.")
    assert reads(guest, 0) == b"two."
    assert guest.call("delete_device_domain", domain_id=first) == 0
    assert reads(guest, 0) == b"two."


def test_attach_leaves_no_gap(guest: Any) -> None:
    pages = {}
    for number in (1, 2):
        domain, _, gpa = guest.mapped(number, 0)
        put(guest, gpa, number.to_bytes(4, "little"))
        pages[number] = domain
    seen: list[bytes | None] = []
    stop = threading.Event()

    def dma() -> None:
        while not stop.is_set():
            seen.append(reads(guest, 0))

    engine = threading.Thread(target=dma)
    engine.start()
    try:
        rounds = 0
        while engine.is_alive() and (rounds < 400 or len(seen) < 400):
            guest.attach(pages[1 + rounds % 2], 0)
            rounds += 1
    finally:
        stop.set()
        engine.join()
    assert set(seen) <= {b"\1\0\0\0", b"\2\0\0\0"}
    assert guest.host.faults.snapshot() == ()


def test_a_failed_attach_changes_nothing(guest: Any) -> None:
    _, _, gpa = guest.mapped(1, 0)
    put(guest, gpa, b"kept")
    guest.call("create_device_domain", domain_id=guest.domain(2))
    fields = {"domain_id": guest.domain(2), "device_id": guest.device_id(0)}
    assert guest.call("attach_device_domain", **fields) == lib.HV_STATUS_OPERATION_DENIED
    assert reads(guest, 0) == b"kept"


def test_detach_blocks(guest: Any) -> None:
    domain, _, _ = guest.mapped(1, 0)
    assert reads(guest, 0) is not None
    assert guest.call("detach_device_domain", device_id=guest.device_id(0)) == 0
    assert reads(guest, 0) is None
    guest.attach(domain, 0)
    assert reads(guest, 0) is not None


FLUSHES = {
    "nothing": None,
    "domain": ("flush_device_domain", {}),
    "page": ("flush_device_domain_list", {"flags": 1, "entries": [IOVA]}),
    "around": ("flush_device_domain_list", {"flags": 1, "entries": [0x1F000 | 4]}),
    "everything": ("flush_device_domain_list", {"flags": 1, "entries": [52]}),
    "another page": ("flush_device_domain_list", {"flags": 1, "entries": [IOVA + 0x1000]}),
}
STALE = {"nothing", "another page"}


@pytest.mark.parametrize("kind", FLUSHES)
def test_a_missing_flush_is_stale_dma(guest: Any, kind: str) -> None:
    domain, table, old = guest.mapped(1, 0)
    put(guest, old, b"old.")
    assert reads(guest, 0) == b"old."
    new = guest.memory.guest_page()
    put(guest, new, b"new.")
    table.unmap_range(IOVA, 4096)
    table.map_range(IOVA, new, 4096, RW)
    flush = FLUSHES[kind]
    if flush:
        result = guest.call(flush[0], domain_id=domain, **flush[1])
        assert result & 0xFFFF == 0
    assert reads(guest, 0) == (b"old." if kind in STALE else b"new.")


def test_a_flush_reaches_every_device_of_the_domain_and_no_other(guest: Any) -> None:
    domain, table, _ = guest.mapped(1, 0)
    guest.attach(domain, 1)
    guest.mapped(2, 2)
    for function in range(3):
        reads(guest, function)
    before = [d.bus.tlb_stats() for d in guest.devices]
    assert [s.entries for s in before] == [1, 1, 1]
    table.unmap_range(IOVA, 4096)
    assert guest.call("flush_device_domain", domain_id=domain) == 0
    assert [d.bus.tlb_stats().entries for d in guest.devices] == [0, 0, 1]
    assert reads(guest, 0) is None
    assert reads(guest, 1) is None


def test_partial_lists_flush_what_they_say(guest: Any) -> None:
    domain, table, _ = guest.mapped(1, 0)
    second = IOVA + 0x1000
    table.map_range(second, guest.memory.guest_page(), 4096, RW)
    for iova in (IOVA, second):
        reads(guest, 0, iova)
    table.unmap_range(IOVA, 0x2000)
    entries = [IOVA, 53, second]
    result = guest.call("flush_device_domain_list", domain_id=domain, flags=1, entries=entries)
    assert result == 1 << 32 | lib.HV_STATUS_INVALID_PARAMETER
    assert reads(guest, 0) is None
    assert reads(guest, 0, second) is not None


def test_delete_reads_no_table_and_forgets(guest: Any) -> None:
    domain, table, gpa = guest.mapped(1, 0)
    put(guest, gpa, b"gone")
    assert reads(guest, 0) == b"gone"
    assert guest.call("detach_device_domain", device_id=guest.device_id(0)) == 0
    root = table.root
    table.destroy()
    put(guest, root, b"\xff" * 4096)
    assert guest.call("delete_device_domain", domain_id=domain) == 0
    assert guest.host.faults.snapshot() == ()
    again, _, fresh = guest.mapped(1, 0)
    assert again == domain
    put(guest, fresh, b"anew")
    assert reads(guest, 0) == b"anew"


def test_configure_again_forgets(guest: Any) -> None:
    domain, _, gpa = guest.mapped(1, 0)
    put(guest, gpa, b"page")
    assert reads(guest, 0) == b"page"
    guest.call("detach_device_domain", device_id=guest.device_id(0))
    assert guest.call("configure_device_domain", domain_id=domain, flags=0) == 0
    guest.attach(domain, 0)
    put(guest, guest.output, b"flat")
    assert reads(guest, 0, guest.output) == b"flat"


def test_unplug_leaves_the_domain_empty(guest: Any) -> None:
    domain, _, _ = guest.mapped(1, 0)
    guest.bus.unplug(0)
    assert guest.call("delete_device_domain", domain_id=domain) == 0


# Any order of calls, against a model.

OPERATIONS = st.tuples(
    st.sampled_from(["create", "identity", "blocked", "attach", "detach", "delete", "flush"]),
    st.integers(1, 3),
    st.integers(0, 2),
)


class Model:
    """What the status table says, in the fewest words."""

    def __init__(self) -> None:
        self.domains: dict[int, str | None] = {}
        self.devices: dict[int, int | None] = {0: None, 1: None, 2: None}

    def expect(self, operation: str, domain: int, device: int) -> int:
        if operation == "detach":
            if self.devices[device] is None:
                return int(lib.HV_STATUS_INVALID_DEVICE_STATE)
            self.devices[device] = None
            return 0
        if operation == "create":
            if domain in self.domains:
                return int(lib.HV_STATUS_KEY_ALREADY_EXISTS)
            self.domains[domain] = None
            return 0
        if domain not in self.domains:
            return int(lib.HV_STATUS_INVALID_PARAMETER)
        held = domain in self.devices.values()
        if operation == "attach":
            if self.devices[device] == domain:
                return int(lib.HV_STATUS_DEVICE_ALREADY_IN_DOMAIN)
            if self.domains[domain] is None:
                return int(lib.HV_STATUS_OPERATION_DENIED)
            self.devices[device] = domain
        elif operation != "flush":
            if held:
                return int(lib.HV_STATUS_OPERATION_DENIED)
            if operation == "delete":
                del self.domains[domain]
            else:
                self.domains[domain] = operation
        return 0

    def reads(self, device: int) -> bool:
        domain = self.devices[device]
        return domain is not None and self.domains[domain] == "identity"


CALLS = {
    "create": "create_device_domain",
    "identity": "configure_device_domain",
    "blocked": "configure_device_domain",
    "attach": "attach_device_domain",
    "detach": "detach_device_domain",
    "delete": "delete_device_domain",
    "flush": "flush_device_domain",
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(operations=st.lists(OPERATIONS, max_size=40))
def test_any_life(make_guest: Callable[..., Any], operations: list[tuple[str, int, int]]) -> None:
    guest, model = make_guest(ram=4 << 20), Model()
    for operation, domain, device in operations:
        fields: dict[str, Any] = {}
        if operation != "detach":
            fields["domain_id"] = guest.domain(domain)
        if operation in ("attach", "detach"):
            fields["device_id"] = guest.device_id(device)
        if operation in ("identity", "blocked"):
            fields["flags"] = BLOCKED if operation == "blocked" else 0
        assert guest.call(CALLS[operation], **fields) == model.expect(operation, domain, device)
        for function in range(3):
            assert (reads(guest, function, guest.page) is not None) == model.reads(function)
    guest.close()
