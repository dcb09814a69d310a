"""abi/dsa.h against the system's own ``<linux/idxd.h>``, and its register structures by the book."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pvfio.abi import dtype_of, ffi, lib

pytestmark = pytest.mark.touches_c

HEADER = Path("/usr/include/linux/idxd.h")

# <linux/idxd.h> has bit fields where dsa.h has a whole word.
WORDS = {"pasid_priv": "pasid", "flags_opcode": "flags"}
# Named by later versions of <linux/idxd.h> and of the specification.
LATER = {"descs_completed", "transl_fetch_addr", "region_size", "transl_fetch_res", "region_stride"}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the compiler says of ``<linux/idxd.h>``: every DSA number, sizes, the offset of every field."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not HEADER.exists() or compiler is None:
        pytest.skip("no <linux/idxd.h> or no C compiler here")
    text = HEADER.read_text()
    names = set(re.findall(r"\b((?:DSA_OPCODE|DSA_COMP|IDXD_OP_FLAG)_\w+)\b", text))
    names -= set(re.findall(r"IDXD_OP_FLAG_(?:RD_SRC2|WR_SRC2|SRC2|CRC_RFC)\w+", text))
    lines = [f'printf("{name} %llu\\n", (unsigned long long){name});' for name in sorted(names)]
    for struct in ("dsa_hw_desc", "dsa_completion_record"):
        lines.append(f'printf("sizeof {struct} %zu\\n", sizeof(struct {struct}));')
        for field in dtype_of(f"struct {struct}").names or ():
            if field in WORDS or field in LATER or field == "invalid_flags":
                continue
            lines.append(f'printf("{struct}.{field} %zu\\n", offsetof(struct {struct}, {field}));')
    folder = tmp_path_factory.mktemp("idxd")
    source = folder / "idxd.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/idxd.h>\n"
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    subprocess.run([compiler, "-o", str(folder / "idxd"), str(source)], check=True)
    output = subprocess.run([str(folder / "idxd")], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in output.splitlines())}


def test_numbers(system: dict[str, int]) -> None:
    numbers = {name: value for name, value in system.items() if name.isupper()}
    assert len(numbers) > 60
    assert {name: getattr(lib, name) for name in numbers} == numbers


@pytest.mark.parametrize("struct", ["dsa_hw_desc", "dsa_completion_record"])
def test_layout(system: dict[str, int], struct: str) -> None:
    dtype = dtype_of(f"struct {struct}")
    assert dtype.itemsize == system[f"sizeof {struct}"]
    assert dtype.fields is not None
    offsets = {name.split(".")[1]: value for name, value in system.items() if name.startswith(f"{struct}.")}
    assert len(offsets) > 15
    assert {name: dtype.fields[name][1] for name in offsets} == offsets


def test_words() -> None:
    """The words that stand for bit fields lie where the bit fields lie (Intel DSA 1.2 8.1)."""
    descriptor = ffi.new("struct dsa_hw_desc *")
    descriptor.pasid_priv = 0x12345 | lib.DSA_DESC_PRIV
    descriptor.flags_opcode = lib.IDXD_OP_FLAG_RCR | lib.DSA_OPCODE_MEMMOVE << lib.DSA_DESC_OPCODE_SHIFT
    assert bytes(ffi.buffer(descriptor))[:8] == bytes.fromhex("45 23 01 80 08 00 00 03")
    assert ffi.offsetof("struct dsa_completion_record", "invalid_flags") == 16


@pytest.mark.parametrize(
    ("name", "size", "offsets"),
    [
        ("dsa_hw_desc", 64, {"completion_addr": 8, "xfer_size": 32, "int_handle": 36, "op_specific": 40}),
        ("dsa_completion_record", 32, {"result": 1, "descs_completed": 4, "fault_addr": 8, "crc_val": 16}),
        ("dsa_grpcfg", 64, {"engines": 32, "flags": 40}),
        ("dsa_wqcfg", 64, {"wq_thresh": 4, "mode": 8, "limits": 12, "state": 24, "op_config": 32}),
        ("dsa_swerr", 32, {"batch_flags": 8, "fault_addr": 16}),
    ],
)
def test_sizes(name: str, size: int, offsets: dict[str, int]) -> None:
    dtype = dtype_of(f"struct {name}")
    assert dtype.itemsize == size
    assert dtype.fields is not None
    assert {field: dtype.fields[field][1] for field in offsets} == offsets


@pytest.mark.parametrize(
    ("mask", "shift", "value"),
    [
        ("IDXD_GENCAP_MAX_XFER_SHIFT_MASK", "IDXD_GENCAP_MAX_XFER_SHIFT_SHIFT", 0x1F),
        ("IDXD_GENCAP_MAX_BATCH_SHIFT_MASK", "IDXD_GENCAP_MAX_BATCH_SHIFT_SHIFT", 0xF),
        ("IDXD_GENCAP_MAX_IMS_MULT_MASK", "IDXD_GENCAP_MAX_IMS_MULT_SHIFT", 0x3F),
        ("IDXD_WQCAP_NUM_WQS_MASK", "IDXD_WQCAP_NUM_WQS_SHIFT", 0xFF),
        ("IDXD_WQCAP_WQCFG_SIZE_MASK", "IDXD_WQCAP_WQCFG_SIZE_SHIFT", 0xF),
        ("IDXD_GRPCAP_TOTAL_RDBUFS_MASK", "IDXD_GRPCAP_TOTAL_RDBUFS_SHIFT", 0xFF),
        ("IDXD_CMD_MASK", "IDXD_CMD_SHIFT", 0x1F),
        ("IDXD_CMDSTS_RES_MASK", "IDXD_CMDSTS_RES_SHIFT", 0xFFFF),
        ("IDXD_WQCFG_PRIORITY_MASK", "IDXD_WQCFG_PRIORITY_SHIFT", 0xF),
        ("IDXD_WQCFG_PASID_MASK", "IDXD_WQCFG_PASID_SHIFT", 0xFFFFF),
        ("IDXD_WQCFG_MAX_BATCH_SHIFT_MASK", "IDXD_WQCFG_MAX_BATCH_SHIFT_SHIFT", 0xF),
    ],
)
def test_masks_fit_their_shifts(mask: str, shift: str, value: int) -> None:
    assert getattr(lib, mask) == value << getattr(lib, shift)


def test_submission_fills_a_numpy_array() -> None:
    """A descriptor is a numpy record: unions overlap, and a batch is an array of them."""
    import numpy as np

    batch = np.zeros(4, dtype_of("struct dsa_hw_desc"))
    batch["src_addr"] = np.arange(4) * 4096
    assert (batch["desc_list_addr"] == np.arange(4) * 4096).all()
    batch["crc_seed"] = 7
    assert (batch["op_specific"][:, 0] == 7).all()
