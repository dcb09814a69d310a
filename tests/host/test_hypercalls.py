"""Every condition of the hypercall table and its status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.abi.hyperv import CALL_NAMES, STATUS_NAMES, status_name
from pvfio.host import PARTITION_ID, IommuConfig

pytestmark = pytest.mark.touches_c

S_OK = lib.HV_STATUS_SUCCESS
CODE = lib.HV_STATUS_INVALID_HYPERCALL_CODE
INPUT = lib.HV_STATUS_INVALID_HYPERCALL_INPUT
ALIGN = lib.HV_STATUS_INVALID_ALIGNMENT
PARAM = lib.HV_STATUS_INVALID_PARAMETER
DENIED = lib.HV_STATUS_OPERATION_DENIED
TRANSLATE = lib.HV_DOMAIN_TRANSLATION_ENABLED
BLOCKED = lib.HV_DOMAIN_BLOCKED
FIVE = lib.HV_DOMAIN_FIRST_STAGE_5_LEVEL
LIST_CODE = lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST

SIMPLE = (
    "create_device_domain",
    "attach_device_domain",
    "detach_device_domain",
    "delete_device_domain",
    "configure_device_domain",
    "flush_device_domain",
    "get_iommu_capabilities",
    "get_logical_device_property",
)
ALL = (*SIMPLE, "flush_device_domain_list")
WITH_DOMAIN = tuple(n for n in ALL if n not in ("detach_device_domain", *SIMPLE[-2:]))
SIZES = {
    "create_device_domain": 28,
    "attach_device_domain": 32,
    "detach_device_domain": 16,
    "delete_device_domain": 24,
    "configure_device_domain": 40,
    "flush_device_domain": 32,
    "get_iommu_capabilities": 16,
    "get_logical_device_property": 24,
    "flush_device_domain_list": 40,
}


@pytest.fixture
def scene(guest: Any) -> Any:
    """Domain 1: paging, empty. 2: created only. 3: identity, holds device 1."""
    guest.root = guest.memory.guest_page()
    guest.make(1, flags=TRANSLATE, root=guest.root)
    guest.call("create_device_domain", domain_id=guest.domain(2))
    guest.attach(guest.make(3, flags=0), 1)
    return guest


def valid(g: Any, name: str) -> dict[str, Any]:
    """The fields of a call that succeeds in the scene."""
    return {
        "create_device_domain": {"domain_id": g.domain(9)},
        "attach_device_domain": {"domain_id": g.domain(1), "device_id": g.device_id(0)},
        "detach_device_domain": {"device_id": g.device_id(1)},
        "delete_device_domain": {"domain_id": g.domain(1)},
        "configure_device_domain": {
            "domain_id": g.domain(2),
            "flags": TRANSLATE,
            "page_table_root": g.root,
        },
        "flush_device_domain": {"domain_id": g.domain(1)},
        "get_iommu_capabilities": {},
        "get_logical_device_property": {"logical_device_id": g.device_id(0), "code": 10},
        "flush_device_domain_list": {"domain_id": g.domain(1), "flags": 1, "entries": [0x1000]},
    }[name]


def reps(result: int) -> int:
    return int(result >> lib.HV_HYPERCALL_REP_COMP_SHIFT)


def status(result: int) -> str:
    assert result & ~(lib.HV_HYPERCALL_RESULT_MASK | lib.HV_HYPERCALL_REP_COMP_MASK) == 0
    return status_name(result & lib.HV_HYPERCALL_RESULT_MASK)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("partition", [lib.HV_PARTITION_ID_SELF, PARTITION_ID])
def test_the_right_call_succeeds(scene: Any, name: str, partition: int) -> None:
    result = scene.call(name, partition_id=partition, **valid(scene, name))
    assert status(result) == "HV_STATUS_SUCCESS"
    assert reps(result) == (name == "flush_device_domain_list")


# The control word and the pages.

BAD_BITS = [1 << bit for bit in range(64) if lib.HV_HYPERCALL_RESERVED_MASK >> bit & 1]
BAD_BITS += [lib.HV_HYPERCALL_FAST, lib.HV_HYPERCALL_NESTED, 1 << lib.HV_HYPERCALL_VARHEAD_SHIFT]


@pytest.mark.parametrize("name", ALL)
def test_control_word_bits(scene: Any, name: str) -> None:
    code = getattr(lib, f"HVCALL_{name.upper()}")
    right = code | (1 << 32 if code == LIST_CODE else 0)
    for bit in BAD_BITS:
        result = scene.call(name, control=right | bit, **valid(scene, name))
        assert status(result) == "HV_STATUS_INVALID_HYPERCALL_INPUT", hex(bit)


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("field", [1 << 32, 0xFFF << 32, 1 << 48, 2 << 32 | 1 << 48])
def test_rep_fields_of_a_simple_call(scene: Any, name: str, field: int) -> None:
    code = getattr(lib, f"HVCALL_{name.upper()}")
    assert scene.call(name, control=code | field, **valid(scene, name)) == INPUT


@pytest.mark.parametrize(("count", "start"), [(0, 0), (0, 1), (1, 1), (5, 5), (5, 4095)])
def test_rep_counts_that_cannot_be(scene: Any, count: int, start: int) -> None:
    fields = {"domain_id": scene.domain(1), "flags": 1, "entries": [0] * 5}
    control = LIST_CODE | count << 32 | start << 48
    assert scene.call("flush_device_domain_list", control=control, **fields) == INPUT


@pytest.mark.parametrize("code", [0, 1, 0xB0, 0xB3, 0xC3, 0xCF, 0xD2, 0x124, 0x126, 0x128, 0xFFFF])
@pytest.mark.parametrize("rest", [0, 1 << 16, 1 << 63, 3 << 32])
def test_unknown_call_code(scene: Any, code: int, rest: int) -> None:
    assert scene.host.hypercall(0, code | rest, scene.page, scene.output) == CODE


@pytest.mark.parametrize("name", ALL)
def test_input_page(scene: Any, name: str) -> None:
    start, size = scene.memory.ram_ranges()[-1]
    outside = [start + size, 0xFEE00000, 1 << 52, 2**64 - 4096, 2**64 - 8]
    crossing = scene.page + 4096 - SIZES[name] + 8 & ~7
    bad = [scene.page + n for n in range(1, 8)] + [crossing, scene.page + 4088, *outside]
    if SIZES[name] == 16:
        bad.remove(crossing)
        bad.append(scene.page + 4096 - 8)
    for gpa in bad:
        assert scene.call(name, gpa=gpa, **valid(scene, name)) == ALIGN, hex(gpa)


@pytest.mark.parametrize("name", ["get_iommu_capabilities", "get_logical_device_property"])
def test_output_page(scene: Any, name: str) -> None:
    start, size = scene.memory.ram_ranges()[-1]
    for gpa in (scene.page + 1, scene.page + 0xFFC, scene.page + 4088, start + size, 2**64 - 8):
        assert scene.call(name, output=gpa, **valid(scene, name)) == ALIGN, hex(gpa)


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith("get")])
def test_output_page_is_ignored_without_output(scene: Any, name: str) -> None:
    assert status(scene.call(name, output=2**64 - 1, **valid(scene, name))) == "HV_STATUS_SUCCESS"


def test_input_may_end_with_the_page(scene: Any) -> None:
    at = scene.page + 4096 - 32
    fields = scene.pack("flush_device_domain", {"domain_id": scene.domain(1)})
    scene.memory.view_guest(at, 32)[:] = fields
    assert scene.host.hypercall(0, lib.HVCALL_FLUSH_DEVICE_DOMAIN, at, 0) == S_OK


@pytest.mark.parametrize("vp", [-1, 2, 1 << 40])
@pytest.mark.parametrize("name", ["flush_device_domain", "flush_device_domain_list"])
def test_vp_that_is_not_there(scene: Any, vp: int, name: str) -> None:
    assert scene.call(name, vp=vp, **valid(scene, name)) == lib.HV_STATUS_INVALID_VP_INDEX


# What the structures say.


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("partition", [0, 1, 3, 2**64 - 2])
def test_another_partition(scene: Any, name: str, partition: int) -> None:
    result = scene.call(name, partition_id=partition, **valid(scene, name))
    assert result == lib.HV_STATUS_INVALID_PARTITION_ID


BAD_HEADS = [
    {"owner_vtl": 1},
    {"owner_vtl": 0xFF},
    {"padding": b"\x01" + bytes(6)},
    {"padding": bytes(6) + b"\x80"},
    {"domain_id": 1 << 32},
    {"domain_id": 1 << 32 | 2},
    {"domain_id": 1 << 32 | 0xF},
    {"domain_id": 1 << 32 | 0x10 | 1},
    {"domain_id": 1 << 32 | 1 << 31 | 1},
    {"domain_id": 0 << 32 | 1},
    {"domain_id": 0xFFFFFFFF << 32 | 1},
]


@pytest.mark.parametrize("name", WITH_DOMAIN)
@pytest.mark.parametrize("head", BAD_HEADS, ids=str)
def test_bad_device_domain(scene: Any, name: str, head: dict[str, Any]) -> None:
    assert scene.call(name, **{**valid(scene, name), **head}) == PARAM


@pytest.mark.parametrize("name", [n for n in WITH_DOMAIN if n != "create_device_domain"])
def test_unknown_domain(scene: Any, name: str) -> None:
    assert scene.call(name, **{**valid(scene, name), "domain_id": scene.domain(77)}) == PARAM


def test_domain_id_limits(scene: Any) -> None:
    assert scene.call("create_device_domain", domain_id=scene.domain(0xFFFFFFFE)) == S_OK


FIELDS = [
    ("create_device_domain", {"flags": 4}, PARAM),
    ("create_device_domain", {"flags": 1 << 31}, PARAM),
    ("create_device_domain", {"flags": 3}, S_OK),
    ("create_device_domain", {"domain_id": 1 << 32 | 1}, lib.HV_STATUS_KEY_ALREADY_EXISTS),
    ("configure_device_domain", {"flags": BLOCKED}, PARAM),
    ("configure_device_domain", {"flags": 8}, PARAM),
    ("configure_device_domain", {"flags": 1 << 63 | TRANSLATE}, PARAM),
    ("configure_device_domain", {"flags": TRANSLATE | FIVE}, PARAM),
    ("configure_device_domain", {"page_table_root": 8}, PARAM),
    ("configure_device_domain", {"page_table_root": 0xFEE00000}, PARAM),
    ("configure_device_domain", {"page_table_root": 1 << 52}, PARAM),
    ("configure_device_domain", {"page_table_root": 2**64 - 4096}, PARAM),
    ("configure_device_domain", {"flags": BLOCKED | TRANSLATE, "page_table_root": 8}, S_OK),
    ("configure_device_domain", {"flags": 0, "page_table_root": 8}, S_OK),
    ("configure_device_domain", {"domain_id": 3 << 32 | 1}, DENIED),
    ("attach_device_domain", {"device_id": 0}, lib.HV_STATUS_INVALID_DEVICE_ID),
    ("attach_device_domain", {"device_id": 1 << 62}, lib.HV_STATUS_INVALID_DEVICE_ID),
    ("attach_device_domain", {"domain_id": 2 << 32 | 1}, DENIED),
    ("detach_device_domain", {"device_id": 5}, lib.HV_STATUS_INVALID_DEVICE_ID),
    ("delete_device_domain", {"domain_id": 3 << 32 | 1}, DENIED),
    ("flush_device_domain", {"flags": 1}, PARAM),
    ("flush_device_domain", {"reserved": 1}, PARAM),
    ("flush_device_domain_list", {"flags": 0}, PARAM),
    ("flush_device_domain_list", {"flags": 3}, PARAM),
    ("flush_device_domain_list", {"reserved": 1}, PARAM),
    ("flush_device_domain_list", {"entries": [53]}, PARAM),
    ("flush_device_domain_list", {"entries": [0xFFF]}, PARAM),
    ("flush_device_domain_list", {"entries": [52]}, 1 << 32),
    ("get_iommu_capabilities", {"reserved": 1}, PARAM),
    ("get_logical_device_property", {"reserved": 1}, PARAM),
    ("get_logical_device_property", {"code": 0}, lib.HV_STATUS_UNKNOWN_PROPERTY),
    ("get_logical_device_property", {"code": 11}, lib.HV_STATUS_UNKNOWN_PROPERTY),
    ("get_logical_device_property", {"logical_device_id": 1}, lib.HV_STATUS_INVALID_DEVICE_ID),
]


@pytest.mark.parametrize(("name", "fields", "result"), FIELDS, ids=str)
def test_fields(scene: Any, name: str, fields: dict[str, Any], result: int) -> None:
    assert scene.call(name, **{**valid(scene, name), **fields}) == result


def test_root_at_the_end_of_memory(scene: Any) -> None:
    fields = {"domain_id": scene.domain(2), "flags": TRANSLATE}
    for start, size in scene.memory.ram_ranges():
        for root, result in ((start, S_OK), (start + size - 4096, S_OK), (start + size, PARAM)):
            assert scene.call("configure_device_domain", page_table_root=root, **fields) == result


def test_attach_again(scene: Any) -> None:
    again = {"domain_id": scene.domain(3), "device_id": scene.device_id(1)}
    assert scene.call("attach_device_domain", **again) == lib.HV_STATUS_DEVICE_ALREADY_IN_DOMAIN


def test_detach_of_a_device_in_no_domain(scene: Any) -> None:
    fields = {"device_id": scene.device_id(0)}
    assert scene.call("detach_device_domain", **fields) == lib.HV_STATUS_INVALID_DEVICE_STATE


def test_no_room_for_another_domain(make_guest: Callable[..., Any]) -> None:
    guest = make_guest(IommuConfig(max_domains=2))
    results = [guest.call("create_device_domain", domain_id=guest.domain(n)) for n in (1, 2, 3)]
    assert results == [S_OK, S_OK, lib.HV_STATUS_INSUFFICIENT_MEMORY]
    assert guest.call("delete_device_domain", domain_id=guest.domain(1)) == S_OK
    assert guest.call("create_device_domain", domain_id=guest.domain(3)) == S_OK


# Capabilities and properties.

CAPABILITIES = [
    ({}, 0b0100101, 48, 0, 1 << 12 | 1 << 21 | 1 << 30),
    ({"advertised": False}, 0b0100100, 48, 0, 1 << 12 | 1 << 21 | 1 << 30),
    ({"stage1": False, "ats": False}, 0b0000001, 48, 0, 1 << 12 | 1 << 21 | 1 << 30),
    (
        {"five_level": True, "max_iova_width": 57, "pgsize_bitmap": 1 << 21},
        0b0101101,
        57,
        0,
        1 << 21,
    ),
    (
        {"pasid": True, "pri": True, "max_pasid_width": 20, "platform": "amd"},
        0b1110101,
        48,
        20,
        1 << 12 | 1 << 21 | 1 << 30,
    ),
]


@pytest.mark.parametrize(("config", "cap", "width", "pasid", "pgsize"), CAPABILITIES, ids=str)
def test_capabilities(
    make_guest: Callable[..., Any], config: dict[str, Any], cap: int, width: int, pasid: int, pgsize: int
) -> None:
    guest = make_guest(IommuConfig(**config))
    assert guest.call("get_iommu_capabilities") == S_OK
    out = guest.reply("get_iommu_capabilities")
    assert (out.size, out.reserved) == (24, 0)
    assert (out.iommu_cap, out.max_iova_width, out.max_pasid_width) == (cap, width, pasid)
    assert out.pgsize_bitmap == pgsize


def test_a_failed_call_leaves_the_output_alone(scene: Any) -> None:
    scene.memory.view_guest(scene.output, 24)[:] = b"\xa5" * 24
    assert scene.call("get_iommu_capabilities", reserved=1) == PARAM
    assert bytes(scene.memory.view_guest(scene.output, 24)) == b"\xa5" * 24


def test_output_right_behind_the_input(scene: Any) -> None:
    assert scene.call("get_iommu_capabilities", output=scene.page + 16) == S_OK
    assert scene.memory.view_guest(scene.page + 16, 4)[0] == 24


def test_five_level_with_the_capability(make_guest: Callable[..., Any]) -> None:
    guest = make_guest(IommuConfig(five_level=True, max_iova_width=57))
    guest.make(1, flags=TRANSLATE | FIVE, root=guest.memory.guest_page())


def test_paging_without_stage_1(make_guest: Callable[..., Any]) -> None:
    guest = make_guest(IommuConfig(stage1=False))
    guest.make(1, flags=0)
    guest.make(2, flags=TRANSLATE | BLOCKED)
    fields = {"domain_id": guest.domain(1), "page_table_root": guest.memory.guest_page()}
    assert guest.call("configure_device_domain", flags=TRANSLATE, **fields) == PARAM


def test_device_property(scene: Any) -> None:
    scene.bus.plug(5, type(scene.devices[0]), pviommu=False)
    for function, enabled in ((0, 1), (5, 0)):
        fields = {"logical_device_id": scene.device_id(function), "code": 10}
        assert scene.call("get_logical_device_property", **fields) == S_OK
        out = scene.reply("get_logical_device_property")
        assert (out.device_iommu, out.reserved) == (enabled, 0)
    not_ours = {"domain_id": scene.domain(1), "device_id": scene.device_id(5)}
    assert scene.call("attach_device_domain", **not_ours) == lib.HV_STATUS_INVALID_DEVICE_ID


@pytest.mark.parametrize("name", ALL)
def test_machine_without_iommu(make_guest: Callable[..., Any], name: str) -> None:
    guest = make_guest(IommuConfig(present=False))
    guest.root = 0
    assert guest.call(name, **valid(guest, name)) == CODE


BAD_CONFIGS = [
    {"platform": "arm"},
    {"max_iova_width": 12},
    {"max_iova_width": 65},
    {"max_pasid_width": 21},
    {"max_pasid_width": -1},
    {"pgsize_bitmap": 0},
    {"pgsize_bitmap": 1 << 64},
    {"max_domains": 0},
    {"stage2_levels": 2},
    {"stage2_levels": 6},
    {"platform": "amd", "stage2_levels": 7},
]


@pytest.mark.parametrize("config", BAD_CONFIGS, ids=str)
def test_configurations_no_machine_has(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        IommuConfig(**config)


# Injection: every status there is, the ones no rule produces included.


@pytest.mark.parametrize("code", sorted(CALL_NAMES), ids=lambda c: CALL_NAMES[c])
def test_injected_statuses(scene: Any, code: int) -> None:
    name = CALL_NAMES[code].removeprefix("HVCALL_").lower()
    for number in sorted(STATUS_NAMES):
        if number:
            scene.host.inject(code, number)
            assert scene.call(name, **valid(scene, name)) == number
    assert status(scene.call(name, **valid(scene, name))) == "HV_STATUS_SUCCESS"


def test_injections_queue_up_and_run_out(scene: Any) -> None:
    flush = valid(scene, "flush_device_domain")
    scene.host.inject(lib.HVCALL_FLUSH_DEVICE_DOMAIN, lib.HV_STATUS_TIME_OUT, times=2)
    scene.host.inject(lib.HVCALL_FLUSH_DEVICE_DOMAIN, lib.HV_HYPERCALL_UNAVAILABLE)
    results = [scene.call("flush_device_domain", **flush) for _ in range(4)]
    assert results == [lib.HV_STATUS_TIME_OUT, lib.HV_STATUS_TIME_OUT, lib.HV_HYPERCALL_UNAVAILABLE, S_OK]


def test_an_injected_call_does_nothing(scene: Any) -> None:
    scene.host.inject(lib.HVCALL_CREATE_DEVICE_DOMAIN, lib.HV_STATUS_NO_RESOURCES)
    create = valid(scene, "create_device_domain")
    assert scene.call("create_device_domain", **create) == lib.HV_STATUS_NO_RESOURCES
    assert scene.call("create_device_domain", **create) == S_OK


BAD_INJECTIONS = [
    {"status": 0x10000},
    {"status": -1},
    {"status": 5, "times": 0},
    {"status": 5, "completed": -1},
    {"status": 5, "completed": 1},
    {"status": 5, "completed": 4096},
]


@pytest.mark.parametrize("injection", BAD_INJECTIONS, ids=str)
def test_injections_no_host_can_answer(scene: Any, injection: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        scene.host.inject(lib.HVCALL_FLUSH_DEVICE_DOMAIN, **injection)


# Rep calls.


@pytest.mark.parametrize("bad", [0, 1, 3, 4])
def test_a_list_stops_at_the_bad_entry(scene: Any, bad: int) -> None:
    entries = [n << 12 for n in range(5)]
    entries[bad] |= 53
    fields = {"domain_id": scene.domain(1), "flags": 1, "entries": entries}
    result = scene.call("flush_device_domain_list", **fields)
    assert (status(result), reps(result)) == ("HV_STATUS_INVALID_PARAMETER", bad)


def test_a_list_continues_at_rep_start(scene: Any) -> None:
    entries = [53, 53, 0x3000, 0x4000]
    fields = {"domain_id": scene.domain(1), "flags": 1, "entries": entries}
    control = LIST_CODE | 4 << 32 | 2 << 48
    assert scene.call("flush_device_domain_list", control=control, **fields) == 4 << 32


def test_the_longest_list(scene: Any) -> None:
    fields = {"domain_id": scene.domain(1), "flags": 1}
    longest = lib.HV_FLUSH_LIST_MAX_ENTRIES
    result = scene.call("flush_device_domain_list", entries=[0] * longest, **fields)
    assert result == longest << 32
    control = LIST_CODE | longest + 1 << 32
    assert scene.call("flush_device_domain_list", control=control, **fields) == ALIGN


def test_injected_partial_completion(scene: Any) -> None:
    fields = {"domain_id": scene.domain(1), "flags": 1, "entries": [0, 0x1000, 0x2000]}
    scene.host.inject(LIST_CODE, lib.HV_STATUS_TIME_OUT, completed=2)
    scene.host.inject(LIST_CODE, S_OK, completed=0)
    scene.host.inject(LIST_CODE, S_OK, completed=9)
    results = [scene.call("flush_device_domain_list", **dict(fields)) for _ in range(3)]
    assert results == [2 << 32 | lib.HV_STATUS_TIME_OUT, 0, 3 << 32]
