"""abi/vfio_user.h by the specification: sizes, offsets, numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pvfio.abi
from pvfio.abi import ffi, lib

HEADER = (Path(pvfio.abi.__file__).parent / "vfio_user.h").read_text()
STRUCTS = re.findall(r"^struct (\w+) \{", HEADER, re.MULTILINE)

# Bytes of the fixed part, offsets of the fields (vfio-user 0.9.2, "Header" and each command's tables).
LAYOUT = {
    "vfio_user_header": (16, {"msg_id": 0, "cmd": 2, "msg_size": 4, "flags": 8, "error_no": 12}),
    "vfio_user_version": (4, {"major": 0, "minor": 2, "data": 4}),
    "vfio_user_dma_map": (32, {"argsz": 0, "flags": 4, "offset": 8, "addr": 16, "size": 24}),
    "vfio_user_dma_unmap": (24, {"argsz": 0, "flags": 4, "addr": 8, "size": 16}),
    "vfio_user_bitmap": (16, {"pgsize": 0, "size": 8, "data": 16}),
    "vfio_user_dma_region_access": (16, {"addr": 0, "count": 8, "data": 16}),
    "vfio_user_device_info": (16, {"argsz": 0, "flags": 4, "num_regions": 8, "num_irqs": 12}),
    "vfio_user_region_access": (16, {"offset": 0, "region": 8, "count": 12, "data": 16}),
    "vfio_user_write_multi_entry": (24, {"offset": 0, "region": 8, "count": 12, "data": 16}),
    "vfio_user_write_multi": (8, {"wr_cnt": 0, "wrs": 8}),
    "vfio_user_region_io_fds": (16, {"argsz": 0, "flags": 4, "index": 8, "count": 12}),
    "vfio_user_device_feature": (8, {"argsz": 0, "flags": 4, "data": 8}),
    "vfio_user_mig_data": (8, {"argsz": 0, "size": 4, "data": 8}),
}


def test_every_structure_is_covered() -> None:
    assert set(STRUCTS) == set(LAYOUT)


@pytest.mark.parametrize("struct", sorted(LAYOUT))
def test_layout(struct: str) -> None:
    size, offsets = LAYOUT[struct]
    assert ffi.sizeof(f"struct {struct}") == size
    assert {name: field.offset for name, field in ffi.typeof(f"struct {struct}").fields} == offsets


COMMANDS = {
    1: "VERSION",
    2: "DMA_MAP",
    3: "DMA_UNMAP",
    4: "DEVICE_GET_INFO",
    5: "DEVICE_GET_REGION_INFO",
    6: "DEVICE_GET_REGION_IO_FDS",
    7: "DEVICE_GET_IRQ_INFO",
    8: "DEVICE_SET_IRQS",
    9: "REGION_READ",
    10: "REGION_WRITE",
    11: "DMA_READ",
    12: "DMA_WRITE",
    13: "DEVICE_RESET",
    15: "REGION_WRITE_MULTI",
    16: "DEVICE_FEATURE",
    17: "MIG_DATA_READ",
    18: "MIG_DATA_WRITE",
}


def test_commands() -> None:
    assert {getattr(lib, f"VFIO_USER_{name}"): name for name in COMMANDS.values()} == COMMANDS


def test_flags() -> None:
    assert lib.VFIO_USER_F_TYPE_MASK == 15
    assert (lib.VFIO_USER_F_TYPE_COMMAND, lib.VFIO_USER_F_TYPE_REPLY) == (0, 1)
    assert (lib.VFIO_USER_F_NO_REPLY, lib.VFIO_USER_F_ERROR) == (1 << 4, 1 << 5)
    assert (lib.VFIO_USER_F_DMA_REGION_READ, lib.VFIO_USER_F_DMA_REGION_WRITE) == (1, 2)
