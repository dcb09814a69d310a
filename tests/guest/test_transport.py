"""Hypercalls as the guest makes them: what lies in the page, what comes of each answer, who may use the page."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any

import pytest
import trio

from pvfio.abi import lib
from pvfio.errors import HypercallError
from pvfio.guest.transport import HypercallTransport, current_vp, on_vp
from pvfio.memory import GuestMemory

pytestmark = pytest.mark.touches_c

SELF = 0xFFFF_FFFF_FFFF_FFFF
DOMAIN = struct.pack("<QQII", SELF, 0, 1, 5)
ONE_REP = 1 << 32

STATUS_ROWS = [
    *((status, errno.EINVAL) for status in (2, 3, 5, 9, 0xA, 0xD, 0xE, 0x11, 0x12, 0x41, 0x50)),
    *((status, errno.EACCES) for status in (6, 8)),
    *((status, errno.ENOMEM) for status in (0xB, 0x73, 0x75, 0x83)),
    (0x20, errno.EOPNOTSUPP),
    *((status, errno.EIO) for status in (4, 7, 0x13, 0x1D, 0x57, 0x58, 0x65, 0x66, 0x71, 0x78, 0xFFFF)),
]

# Each call: how it is made, its code, its input as bytes, how many bytes it answers.
CALLS: dict[str, tuple[Callable[[HypercallTransport], object], int, bytes, int]] = {
    "create": (lambda t: t.create_device_domain(5), 0xB1, DOMAIN + bytes(4), 0),
    "delete": (lambda t: t.delete_device_domain(5), 0xC5, DOMAIN, 0),
    "identity": (
        lambda t: t.configure_device_domain(5, translation_enabled=False),
        0xCE,
        DOMAIN + struct.pack("<QQ", 0, 0),
        0,
    ),
    "blocking": (
        lambda t: t.configure_device_domain(5, translation_enabled=True, blocked=True),
        0xCE,
        DOMAIN + struct.pack("<QQ", 3, 0),
        0,
    ),
    "paging": (
        lambda t: t.configure_device_domain(5, translation_enabled=True, five_level=True, root=0x7000),
        0xCE,
        DOMAIN + struct.pack("<QQ", 5, 0x7000),
        0,
    ),
    "attach": (lambda t: t.attach_device_domain(5, 0x99), 0xB2, DOMAIN + struct.pack("<Q", 0x99), 0),
    "detach": (lambda t: t.detach_device_domain(0x99), 0xC4, struct.pack("<QQ", SELF, 0x99), 0),
    "flush": (lambda t: t.flush_device_domain(5), 0xD0, DOMAIN + bytes(8), 0),
    "flush list": (
        lambda t: t.flush_device_domain_list(5, [0x1001]),
        0xD1 | ONE_REP,
        DOMAIN + struct.pack("<IIQ", 1, 0, 0x1001),
        0,
    ),
    "flush pages": (
        lambda t: t.flush_pages(5, 0x1001),
        0xD1 | ONE_REP,
        DOMAIN + struct.pack("<IIQ", 1, 0, 0x1001),
        0,
    ),
    "capabilities": (lambda t: t.get_iommu_capabilities(), 0x125, struct.pack("<QQ", SELF, 0), 24),
    "property": (
        lambda t: t.get_logical_device_property(0x99, 10),
        0x127,
        struct.pack("<QQII", SELF, 0x99, 10, 0),
        16,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_lies_in_the_page(name: str) -> None:
    make, control, wanted, answered = CALLS[name]
    memory = GuestMemory(4 << 20)
    seen: list[tuple[int, int, int, int, bytes]] = []

    def entry(vp: int, control: int, input_gpa: int, output_gpa: int) -> int:
        seen.append((vp, control, input_gpa, output_gpa, bytes(memory.view_guest(input_gpa, 4096))))
        return control & 0xFFF_0000_0000

    transport = HypercallTransport(memory, entry, 2)
    page = transport.page_of(1)
    memory.view_guest(page, 4096)[:] = b"\xff" * 4096
    with on_vp(1):
        make(transport)
    ((vp, sent, input_gpa, output_gpa, content),) = seen
    assert (vp, sent, input_gpa) == (1, control, page)
    assert content[: len(wanted)] == wanted
    # The driver touches nothing behind its input, its output least of all.
    assert content[len(wanted) :] == b"\xff" * (4096 - len(wanted))
    assert output_gpa == (page + (len(wanted) + 7) // 8 * 8 if answered else 0)


def test_answers_are_read_from_behind_the_input() -> None:
    memory = GuestMemory(4 << 20)

    def entry(_vp: int, control: int, _input_gpa: int, output_gpa: int) -> int:
        if control == lib.HVCALL_GET_IOMMU_CAPABILITIES:
            memory.view_guest(output_gpa, 24)[:] = struct.pack("<IHBBQQ", 24, 0, 39, 20, 0x7F, 0x1000)
        else:
            memory.view_guest(output_gpa, 16)[:] = struct.pack("<QQ", 0x1_0000_0001, 0)
        return 0

    transport = HypercallTransport(memory, entry, 1)
    assert transport.get_iommu_capabilities() == (24, 39, 20, 0x7F, 0x1000)
    assert transport.get_logical_device_property(1, 10) == 0x1_0000_0001


@pytest.mark.parametrize(("status", "number"), STATUS_ROWS)
def test_status_to_errno(guest: Any, status: int, number: int) -> None:
    guest.hypervisor.inject(lib.HVCALL_DELETE_DEVICE_DOMAIN, status)
    with pytest.raises(HypercallError) as raised:
        guest.transport.delete_device_domain(1)
    assert (raised.value.errno, raised.value.status) == (number, status)
    assert "DELETE_DEVICE_DOMAIN" in str(raised.value)
    if status == 5:
        assert raised.value.status_name == "HV_STATUS_INVALID_PARAMETER"


@pytest.mark.parametrize("name", CALLS)
def test_no_hypercall_page(name: str) -> None:
    transport = HypercallTransport(GuestMemory(4 << 20), lambda *_: (1 << 64) - 1, 1)
    if name == "flush pages":
        refused, again = transport.flush_pages(5, 0)
        assert refused is not None
        assert again is not None
        assert (refused.errno, again.errno) == (errno.EOPNOTSUPP, errno.EOPNOTSUPP)
        return
    with pytest.raises(HypercallError, match="no hypercall page") as raised:
        CALLS[name][0](transport)
    assert raised.value.errno == errno.EOPNOTSUPP


def test_nested_use_of_a_page_is_an_error() -> None:
    memory = GuestMemory(4 << 20)
    errors: list[str] = []

    def entry(_vp: int, control: int, _input_gpa: int, _output_gpa: int) -> int:
        if control == lib.HVCALL_FLUSH_DEVICE_DOMAIN:
            try:
                transport.create_device_domain(9)
            except RuntimeError as error:
                errors.append(str(error))
            with on_vp(1):
                transport.create_device_domain(9)
            before.append(bytes(memory.view_guest(transport.page_of(0), 32)))
        return 0

    before: list[bytes] = []
    transport = HypercallTransport(memory, entry, 2)
    transport.flush_device_domain(5)
    assert len(errors) == 1
    assert "VP 0 is in use by FLUSH_DEVICE_DOMAIN" in errors[0]
    assert before == [DOMAIN + bytes(8)]
    transport.create_device_domain(9)


def test_the_page_is_free_again_after_a_refusal(guest: Any) -> None:
    for _ in range(2):
        with pytest.raises(HypercallError):
            guest.transport.delete_device_domain(77)
        with pytest.raises(ValueError):
            guest.transport.flush_device_domain_list(77, [])


async def test_tasks_carry_their_vp() -> None:
    seen: list[tuple[str, int]] = []

    async def child(name: str) -> None:
        await trio.lowlevel.checkpoint()
        seen.append((name, current_vp()))

    async def parent(vp: int) -> None:
        with on_vp(vp):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child, f"child of {vp}")
                await trio.lowlevel.checkpoint()
                seen.append((f"parent {vp}", current_vp()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(parent, 1)
        nursery.start_soon(parent, 0)
    assert sorted(seen) == [("child of 0", 0), ("child of 1", 1), ("parent 0", 0), ("parent 1", 1)]
    assert current_vp() == 0


def test_vps_that_are_not_there(guest: Any) -> None:
    with on_vp(2), pytest.raises(RuntimeError, match="VP 2"):
        guest.transport.get_iommu_capabilities()
    with pytest.raises(ValueError), on_vp(-1):
        pass
    with pytest.raises(ValueError):
        HypercallTransport(guest.memory, guest.entry, 0)
    assert guest.calls == []


def test_a_rep_call_goes_on_where_the_host_stopped(guest: Any) -> None:
    transport = guest.transport
    transport.create_device_domain(5)
    transport.configure_device_domain(5, translation_enabled=False)
    starts: list[int] = []
    entry = guest.entry

    def watch(vp: int, control: int, input_gpa: int, output_gpa: int) -> int:
        starts.append(control >> 48 & 0xFFF)
        result: int = entry(vp, control, input_gpa, output_gpa)
        return result

    own = HypercallTransport(guest.memory, watch, 1)
    list_code = lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST
    guest.hypervisor.inject(list_code, 0, completed=3)
    guest.hypervisor.inject(list_code, 0)
    guest.hypervisor.inject(list_code, 0, completed=4)
    own.flush_device_domain_list(5, [page << 12 for page in range(10)])
    assert starts == [0, 3, 3, 7]
    starts.clear()
    own.flush_device_domain_list(5, [page << 12 for page in range(508)])
    assert starts == [0]


@pytest.mark.parametrize("count", [0, 509])
def test_entries_that_do_not_fit(guest: Any, count: int) -> None:
    with pytest.raises(ValueError, match="1 to 508"):
        guest.transport.flush_device_domain_list(5, [0] * count)


def test_success_without_progress_is_bounded(guest: Any) -> None:
    guest.transport.create_device_domain(5)
    guest.hypervisor.inject(lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST, 0, completed=2)
    guest.hypervisor.inject(lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST, 0, times=1000)
    with pytest.raises(HypercallError, match="without progress") as raised:
        guest.transport.flush_device_domain_list(5, [0] * 5)
    assert (raised.value.errno, raised.value.completed) == (errno.EIO, 2)
    assert guest.count(lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST) < 10


def test_a_refused_rep_says_how_far_it_came(guest: Any) -> None:
    guest.transport.create_device_domain(5)
    with pytest.raises(HypercallError) as raised:
        guest.transport.flush_device_domain_list(5, [0, 0, 53, 0])
    assert (raised.value.status, raised.value.completed) == (lib.HV_STATUS_INVALID_PARAMETER, 2)


def test_a_single_flush_falls_back_inside_the_same_page(guest: Any) -> None:
    flush, full = lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST, lib.HVCALL_FLUSH_DEVICE_DOMAIN
    transport = guest.transport
    transport.create_device_domain(5)
    guest.calls.clear()
    assert transport.flush_pages(5, 0x1000) == (None, None)
    assert guest.calls == [flush]

    in_use: list[str] = []

    def before(code: int) -> None:
        if code == full:
            with pytest.raises(RuntimeError, match="in use"):
                transport.get_iommu_capabilities()
            in_use.append("held")

    guest.before = before
    guest.calls.clear()
    guest.hypervisor.inject(flush, lib.HV_STATUS_INVALID_PARAMETER)
    refused, again = transport.flush_pages(5, 0x1000)
    assert refused.status == lib.HV_STATUS_INVALID_PARAMETER
    assert again is None
    assert guest.calls == [flush, full]
    assert in_use == ["held"]

    guest.calls.clear()
    guest.hypervisor.inject(flush, 0, times=2)
    assert transport.flush_pages(5, 0x1000) == (None, None)
    assert guest.calls == [flush] * 3


def test_close_hands_the_pages_back() -> None:
    memory = GuestMemory(4 << 20)
    transport = HypercallTransport(memory, lambda *_: 0, 4)
    assert transport.vps == memory.stats().table_pages == 4
    transport.close()
    assert memory.stats().table_pages == 0
