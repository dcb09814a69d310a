"""Descriptor helpers: numpy arrays of the wire structure, checked field by field and byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvfio.abi import dtype_of, lib
from pvfio.drivers.dsa import DsaError, SoftwareError, command_name, completion_name, descriptors

pytestmark = pytest.mark.touches_c


def test_arrays_and_scalars_broadcast() -> None:
    sources = np.arange(5) * 4096
    moves = descriptors.memmove(0x9000, sources, [1, 2, 3, 4, 5], flags=lib.IDXD_OP_FLAG_FENCE)
    assert moves.dtype == dtype_of("struct dsa_hw_desc")
    assert moves["src_addr"].tolist() == sources.tolist()
    assert moves["dst_addr"].tolist() == [0x9000] * 5
    assert moves["xfer_size"].tolist() == [1, 2, 3, 4, 5]
    assert set(moves["flags_opcode"].tolist()) == {lib.DSA_OPCODE_MEMMOVE << 24 | 1}
    assert not moves["completion_addr"].any()


def test_the_bytes_are_those_of_the_specification() -> None:
    one = descriptors.copy_crc(
        0x1122334455667788, 0x99AABBCCDDEEFF00, 0x12345678, seed=0xCAFEBABE, flags=0x70000
    )
    expected = bytearray(64)
    expected[4:8] = (0x11 << 24 | 0x70000).to_bytes(4, "little")
    expected[16:24] = 0x99AABBCCDDEEFF00.to_bytes(8, "little")
    expected[24:32] = 0x1122334455667788.to_bytes(8, "little")
    expected[32:36] = 0x12345678.to_bytes(4, "little")
    expected[40:44] = 0xCAFEBABE.to_bytes(4, "little")
    assert one.tobytes() == bytes(expected)


# Operation code, then little-endian fields at their byte offsets.
LAYOUTS: list[tuple[Any, int, dict[int, tuple[int, int]]]] = [
    (
        descriptors.compval(0x1111, 0x2222, 0x33, expected_result=1),
        0x06,
        {16: (0x1111, 8), 24: (0x2222, 8), 32: (0x33, 4), 40: (1, 1)},
    ),
    (
        descriptors.create_delta(0x1111, 0x2222, 0x3333, 0x44, 0x55, expected_results=6),
        0x07,
        {16: (0x1111, 8), 24: (0x2222, 8), 32: (0x44, 4), 40: (0x3333, 8), 48: (0x55, 4), 56: (6, 1)},
    ),
    (
        descriptors.apply_delta(0x1111, 0x2222, 0x33, 0x44),
        0x08,
        {16: (0x2222, 8), 24: (0x1111, 8), 32: (0x44, 4), 40: (0x33, 4)},
    ),
    (
        descriptors.dualcast(0x1111, 0x2222, 0x3333, 0x44),
        0x09,
        {16: (0x3333, 8), 24: (0x1111, 8), 32: (0x44, 4), 40: (0x2222, 8)},
    ),
    (
        descriptors.transl_fetch(0x1111, 0x22, stride=0x33),
        0x0A,
        {16: (0x1111, 8), 32: (0x22, 4), 48: (0x33, 4)},
    ),
    (descriptors.cflush(0x1111, 0x22), 0x20, {24: (0x1111, 8), 32: (0x22, 4)}),
]


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_each_byte_is_where_the_specification_has_it(number: int) -> None:
    array, opcode, fields = LAYOUTS[number]
    expected = bytearray(64)
    expected[7] = opcode
    for offset, (value, size) in fields.items():
        expected[offset : offset + size] = value.to_bytes(size, "little")
    assert array.tobytes() == bytes(expected)


CASES: list[tuple[Any, int, dict[str, int]]] = [
    (descriptors.noop(), 0x00, {}),
    (descriptors.drain(), 0x02, {}),
    (descriptors.memmove(1, 2, 3), 0x03, {"dst_addr": 1, "src_addr": 2, "xfer_size": 3}),
    (
        descriptors.fill(1, b"\x01\x02", 3),
        0x04,
        {"dst_addr": 1, "pattern": 0x0201020102010201, "xfer_size": 3},
    ),
    (descriptors.fill(1, 77, 3), 0x04, {"dst_addr": 1, "pattern": 77, "xfer_size": 3}),
    (descriptors.compare(1, 2, 3), 0x05, {"src_addr": 1, "src2_addr": 2, "xfer_size": 3}),
    (descriptors.crcgen(1, 2, seed=3), 0x10, {"src_addr": 1, "xfer_size": 2, "crc_seed": 3}),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_each_helper_fills_its_fields(number: int) -> None:
    array, opcode, fields = CASES[number]
    assert len(array) == 1
    assert array["flags_opcode"][0] >> 24 == opcode
    for name, value in fields.items():
        assert int(array[name][0]) == value


def test_out_is_filled_and_cleared_first() -> None:
    array = descriptors.crcgen(1, np.arange(4), seed=9)
    assert descriptors.memmove(5, 6, np.arange(4), out=array) is array
    assert not array["crc_seed"].any()
    assert array["xfer_size"].tolist() == [0, 1, 2, 3]


def test_join_keeps_the_layout() -> None:
    joined = descriptors.join(descriptors.noop(2), descriptors.memmove(1, 2, [3, 4])[::-1])
    assert joined.dtype == dtype_of("struct dsa_hw_desc")
    assert (joined["flags_opcode"] >> 24).tolist() == [0, 0, 3, 3]
    assert joined["xfer_size"].tolist() == [0, 0, 4, 3]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="24 bits"):
        descriptors.memmove(1, 2, 3, flags=1 << 24)
    with pytest.raises(ValueError, match="one-dimensional"):
        descriptors.memmove(np.zeros((2, 2)), 2, 3)
    with pytest.raises(ValueError, match="shape"):
        descriptors.memmove([1, 2], [1, 2, 3], 3)
    with pytest.raises(ValueError, match="pattern"):
        descriptors.pattern_of(b"abc")


def test_codes_have_names() -> None:
    assert completion_name(0x01) == "DSA_COMP_SUCCESS"
    assert completion_name(0x83) == "DSA_COMP_PAGE_FAULT_NOBOF"
    assert completion_name(0x7F) == "0x7f"
    assert command_name(5) == "RESET_DEVICE"
    assert command_name(29) == "command 29"


def test_an_error_carries_its_record() -> None:
    record = np.zeros(1, dtype_of("struct dsa_completion_record"))
    record["status"], record["result"] = lib.DSA_COMP_INVALID_FLAGS, 3
    record["invalid_flags"], record["bytes_completed"], record["fault_addr"] = 0x000100, 5, 0x1234
    error = DsaError("noop", record[0])
    assert (error.name, error.invalid_flags, error.fault_addr, error.write) == (
        "DSA_COMP_INVALID_FLAGS",
        0x100,
        None,
        False,
    )
    assert (error.result, error.bytes_completed) == (3, 5)
    assert str(error) == "noop: DSA_COMP_INVALID_FLAGS (0x11) flags 0x100, 0x5 bytes completed"


def test_a_software_error_knows_what_the_device_knew() -> None:
    known = lib.IDXD_SWERR_VALID | lib.IDXD_SWERR_WQ_IDX_VALID | lib.IDXD_SWERR_DESC_VALID
    words = (known | 0x1A << 8 | 5 << 16 | 3 << 32, 0, 0xABC000, 0)
    error = SoftwareError(words, device="x")
    assert (error.name, error.wq, error.operation, error.batch_index) == ("DSA_COMP_CRA_XLAT", 5, 3, None)
    assert (error.fault_addr, error.overflow, error.write) == (0xABC000, False, False)
    assert str(error) == "x: software error DSA_COMP_CRA_XLAT (0x1a) wq 5 address 0xabc000"
    vague = SoftwareError((lib.IDXD_SWERR_VALID | lib.IDXD_SWERR_OVERFLOW | 0x51 << 8, 0, 0, 0))
    assert (vague.name, vague.wq, vague.operation, vague.overflow) == ("DSA_SWERR_WQ_FULL", None, None, True)
