"""abi/pci.h by the book, and against the system's own ``<linux/pci_regs.h>``."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pvfio.abi
from pvfio.abi import dtype_of, ffi, lib

HEADER = (Path(pvfio.abi.__file__).parent / "pci.h").read_text()
MACROS = set(re.findall(r"^#define (\w+) ", HEADER, re.MULTILINE))
SYSTEM = Path("/usr/include/linux/pci_regs.h")
# Offsets of the type 0 header (PCI Local Bus 3.0 6.1).
TYPE0 = {
    "vendor_id": 0x00,
    "device_id": 0x02,
    "command": 0x04,
    "status": 0x06,
    "revision_id": 0x08,
    "prog_if": 0x09,
    "sub_class": 0x0A,
    "base_class": 0x0B,
    "cache_line_size": 0x0C,
    "latency_timer": 0x0D,
    "header_type": 0x0E,
    "bist": 0x0F,
    "bar": 0x10,
    "cardbus_cis": 0x28,
    "subsystem_vendor_id": 0x2C,
    "subsystem_id": 0x2E,
    "expansion_rom": 0x30,
    "capabilities": 0x34,
    "reserved": 0x35,
    "interrupt_line": 0x3C,
    "interrupt_pin": 0x3D,
    "min_gnt": 0x3E,
    "max_lat": 0x3F,
}
# An entry of the MSI-X table (PCI Local Bus 3.0 6.8.2).
MSIX_ENTRY = {"lower_addr": 0, "upper_addr": 4, "data": 8, "vector_ctrl": 12}


@pytest.mark.parametrize(
    ("name", "size", "offsets"), [("pci_type0_header", 64, TYPE0), ("pci_msix_entry", 16, MSIX_ENTRY)]
)
def test_layout(name: str, size: int, offsets: dict[str, int]) -> None:
    fields = ffi.typeof(f"struct {name}").fields
    assert ffi.sizeof(f"struct {name}") == size
    assert {field: where.offset for field, where in fields} == offsets
    dtype = dtype_of(f"struct {name}")
    assert dtype.itemsize == size
    assert dtype.fields is not None
    assert {field: dtype.fields[field][1] for field in offsets} == offsets


def test_numbers_of_registers_are_the_header_s_offsets() -> None:
    named = {
        "PCI_VENDOR_ID": "vendor_id",
        "PCI_COMMAND": "command",
        "PCI_STATUS": "status",
        "PCI_CLASS_PROG": "prog_if",
        "PCI_BASE_ADDRESS_0": "bar",
        "PCI_SUBSYSTEM_VENDOR_ID": "subsystem_vendor_id",
        "PCI_ROM_ADDRESS": "expansion_rom",
        "PCI_CAPABILITY_LIST": "capabilities",
        "PCI_INTERRUPT_LINE": "interrupt_line",
        "PCI_INTERRUPT_PIN": "interrupt_pin",
    }
    assert {macro: getattr(lib, macro) for macro in named} == {m: TYPE0[f] for m, f in named.items()}
    assert ffi.sizeof("struct pci_msix_entry") == lib.PCI_MSIX_ENTRY_SIZE


def test_numbers_agree_with_the_system_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not SYSTEM.exists() or compiler is None:
        pytest.skip("no <linux/pci_regs.h> or no C compiler here")
    known = set(re.findall(r"^#define\s+(PCI_\w+)\s+\S", SYSTEM.read_text(), re.MULTILINE))
    shared = sorted(MACROS & known)
    source = tmp_path / "pci.c"
    lines = [f'printf("{macro} %llu\\n", (unsigned long long)(uint32_t)({macro}));' for macro in shared]
    source.write_text(
        "#include <stdint.h>\n#include <stdio.h>\n#include <linux/pci_regs.h>\n"
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    subprocess.run([compiler, "-o", str(tmp_path / "pci"), str(source)], check=True)
    output = subprocess.run([str(tmp_path / "pci")], check=True, capture_output=True, text=True).stdout
    theirs = {name: int(value) for name, value in (line.split() for line in output.splitlines())}
    assert len(shared) > 40
    assert {macro: getattr(lib, macro) for macro in shared} == theirs
