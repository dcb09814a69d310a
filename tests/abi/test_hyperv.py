"""The hypercall structures against the sizes, offsets and errnos of the specification."""

from __future__ import annotations

import errno
import uuid

import pytest

from pvfio.abi import dtype_of, ffi, lib
from pvfio.abi.hyperv import (
    CALL_NAMES,
    STATUS_NAMES,
    call_name,
    logical_id_prefix,
    status_errno,
    status_name,
)

SIZES = {
    "hv_input_device_domain": 24,
    "hv_input_create_device_domain": 28,
    "hv_input_attach_device_domain": 32,
    "hv_input_detach_device_domain": 16,
    "hv_input_delete_device_domain": 24,
    "hv_input_configure_device_domain": 40,
    "hv_input_flush_device_domain": 32,
    "hv_input_flush_device_domain_list": 32,
    "hv_input_get_iommu_capabilities": 16,
    "hv_output_get_iommu_capabilities": 24,
    "hv_input_get_logical_device_property": 24,
    "hv_output_get_logical_device_property": 16,
    "pci_type0_header": 64,
    "pci_msix_entry": 16,
}

OFFSETS = [
    ("hv_input_device_domain", "owner_vtl", 8),
    ("hv_input_device_domain", "padding", 9),
    ("hv_input_device_domain", "domain_id", 16),
    ("hv_input_create_device_domain", "flags", 24),
    ("hv_input_attach_device_domain", "device_id", 24),
    ("hv_input_detach_device_domain", "device_id", 8),
    ("hv_input_configure_device_domain", "flags", 24),
    ("hv_input_configure_device_domain", "page_table_root", 32),
    ("hv_input_flush_device_domain", "flags", 24),
    ("hv_input_flush_device_domain", "reserved", 28),
    ("hv_input_flush_device_domain_list", "list", 32),
    ("hv_output_get_iommu_capabilities", "reserved", 4),
    ("hv_output_get_iommu_capabilities", "max_iova_width", 6),
    ("hv_output_get_iommu_capabilities", "max_pasid_width", 7),
    ("hv_output_get_iommu_capabilities", "iommu_cap", 8),
    ("hv_output_get_iommu_capabilities", "pgsize_bitmap", 16),
    ("hv_input_get_logical_device_property", "logical_device_id", 8),
    ("hv_input_get_logical_device_property", "code", 16),
    ("hv_output_get_logical_device_property", "reserved", 8),
    ("pci_type0_header", "bar", 0x10),
    ("pci_type0_header", "capabilities", 0x34),
    ("pci_type0_header", "interrupt_pin", 0x3D),
]

CALLS = {
    "CREATE_DEVICE_DOMAIN": 0xB1,
    "ATTACH_DEVICE_DOMAIN": 0xB2,
    "DETACH_DEVICE_DOMAIN": 0xC4,
    "DELETE_DEVICE_DOMAIN": 0xC5,
    "CONFIGURE_DEVICE_DOMAIN": 0xCE,
    "FLUSH_DEVICE_DOMAIN": 0xD0,
    "FLUSH_DEVICE_DOMAIN_LIST": 0xD1,
    "GET_IOMMU_CAPABILITIES": 0x125,
    "GET_LOGICAL_DEVICE_PROPERTY": 0x127,
}

ERRNOS = {
    errno.EINVAL: (0x2, 0x3, 0x5, 0x9, 0xA, 0xD, 0xE, 0x11, 0x12, 0x41, 0x50),
    errno.EACCES: (0x6, 0x8),
    errno.ENOMEM: (0xB, 0x73, 0x75, 0x83),
    errno.EOPNOTSUPP: (0x20, 0xFFFFFFFFFFFFFFFF),
    errno.EIO: (0x4, 0x57, 0x58, 0x65, 0x66, 0x7FFF),
    0: (0,),
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_size(name: str, size: int) -> None:
    assert ffi.sizeof(f"struct {name}") == size
    assert dtype_of(f"struct {name}").itemsize == size


@pytest.mark.parametrize(("name", "field", "offset"), OFFSETS)
def test_offset(name: str, field: str, offset: int) -> None:
    assert ffi.offsetof(f"struct {name}", field) == offset


def test_a_page_holds_the_longest_flush_list() -> None:
    fixed = ffi.sizeof("struct hv_input_flush_device_domain_list")
    assert fixed + 8 * lib.HV_FLUSH_LIST_MAX_ENTRIES == 4096


def test_control_word_fields_cover_the_word_once() -> None:
    fields = [
        lib.HV_HYPERCALL_CODE_MASK,
        lib.HV_HYPERCALL_FAST,
        lib.HV_HYPERCALL_VARHEAD_MASK,
        lib.HV_HYPERCALL_NESTED,
        lib.HV_HYPERCALL_REP_COUNT_MASK,
        lib.HV_HYPERCALL_REP_START_MASK,
        lib.HV_HYPERCALL_RESERVED_MASK,
    ]
    assert sum(fields) == 2**64 - 1
    covered = 0
    for field in fields:
        assert covered & field == 0
        covered |= field
    reserved = [bit for bit in range(64) if lib.HV_HYPERCALL_RESERVED_MASK >> bit & 1]
    assert reserved == [*range(27, 31), *range(44, 48), *range(60, 64)]


def test_call_codes() -> None:
    assert {f"HVCALL_{name}": code for name, code in CALLS.items()} == {n: c for c, n in CALL_NAMES.items()}
    assert call_name(0xD0) == "HVCALL_FLUSH_DEVICE_DOMAIN"
    assert call_name(0x9999) == "0x9999"


@pytest.mark.parametrize(("number", "statuses"), ERRNOS.items())
def test_status_to_errno(number: int, statuses: tuple[int, ...]) -> None:
    assert {status_errno(status) for status in statuses} == {number}


def test_status_names() -> None:
    assert STATUS_NAMES[0x66] == "HV_STATUS_DEVICE_ALREADY_IN_DOMAIN"
    assert status_name(0x57) == "HV_STATUS_INVALID_DEVICE_ID"
    assert status_name(0x4321) == "0x4321"


def test_logical_id_prefix() -> None:
    guid = bytes([0, 0, 0, 0, 0x34, 0x12, 0xFF, 0x56, 0, 0, 0, 0, 0, 0, 0, 0])
    assert logical_id_prefix(guid) == 0x123456F8
    assert logical_id_prefix(uuid.UUID(bytes_le=guid).bytes_le) & 7 == 0
