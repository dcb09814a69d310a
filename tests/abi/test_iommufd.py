"""The iommufd structures and numbers: as the public ABI has them, and against the system's headers that know them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pvfio.abi
from pvfio.abi import ffi, lib

HEADER = (Path(pvfio.abi.__file__).parent / "iommufd.h").read_text()
MACROS = re.findall(r"^#define (\w+) ", HEADER, re.MULTILINE)
STRUCTS = re.findall(r"^struct (\w+) \{", HEADER, re.MULTILINE)

# Linux 6.2 to 6.8 (uapi/linux/iommufd.h, uapi/linux/vfio.h): bytes of each structure.
SIZES = {
    "iommu_destroy": 8,
    "iommu_ioas_alloc": 12,
    "iommu_iova_range": 16,
    "iommu_ioas_iova_ranges": 32,
    "iommu_ioas_allow_iovas": 24,
    "iommu_ioas_map": 40,
    "iommu_ioas_copy": 40,
    "iommu_ioas_unmap": 24,
    "iommu_option": 24,
    "iommu_hwpt_vtd_s1": 24,
    "iommu_hwpt_alloc": 48,
    "iommu_hw_info_vtd": 24,
    "iommu_hw_info": 40,
    "iommu_hwpt_set_dirty_tracking": 16,
    "iommu_hwpt_get_dirty_bitmap": 48,
    "iommu_hwpt_vtd_s1_invalidate": 24,
    "iommu_hwpt_invalidate": 32,
    "vfio_device_bind_iommufd": 16,
    "vfio_device_attach_iommufd_pt": 16,
    "vfio_device_detach_iommufd_pt": 12,
}


def test_sizes() -> None:
    assert {struct: ffi.sizeof(f"struct {struct}") for struct in STRUCTS} == SIZES


def test_numbers() -> None:
    """Requests of iommufd count from 0x80, those of VFIO from 100, both of type ';'."""
    requests = [
        name for name in MACROS if re.match(r"#define \w+ 0x3b\w\w$", f"#define {name} {_text(name)}")
    ]
    assert len(requests) == 16
    assert [getattr(lib, name) & 0xFF for name in requests if name.startswith("IOMMU_")] == [
        *range(0x80, 0x88),
        *range(0x89, 0x8E),
    ]
    assert [getattr(lib, name) & 0xFF for name in requests if name.startswith("VFIO_")] == [118, 119, 120]


def _text(macro: str) -> str:
    found = re.search(rf"^#define {macro} (\S+)", HEADER, re.MULTILINE)
    assert found is not None
    return found[1]


def _preprocessed(header: str) -> tuple[str, str] | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    probe = subprocess.run(
        [compiler, "-E", "-dD", "-x", "c", "-"],
        input=f"#include <linux/{header}.h>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    return None if probe.returncode else (compiler, probe.stdout)


@pytest.mark.parametrize("header", ["iommufd", "vfio"])
def test_agrees_with_the_system_header(header: str, tmp_path: Path) -> None:
    """What the header of this machine's kernel knows; an older one knows less."""
    found = _preprocessed(header)
    if found is None:
        pytest.skip(f"no <linux/{header}.h>, or no compiler")
    compiler, text = found
    prefix = "IOMMU" if header == "iommufd" else "VFIO"
    ours: dict[str, int] = {}
    lines = ["#include <stdio.h>", "#include <stddef.h>", f"#include <linux/{header}.h>", "int main(void) {"]
    for macro in MACROS:
        if macro.startswith(prefix) and re.search(rf"\b{macro}\b", text):
            ours[macro] = getattr(lib, macro)
            lines.append(f'printf("{macro} %lld\\n", (long long)({macro}));')
    for struct in STRUCTS:
        body = re.search(rf"struct {struct} \{{(.*?)^\}};", text, re.DOTALL | re.MULTILINE)
        for field, where in ffi.typeof(f"struct {struct}").fields if body else ():
            if body and re.search(rf"\b{field};", body[1]):
                ours[f"{struct}.{field}"] = where.offset
                lines.append(f'printf("{struct}.{field} %zu\\n", offsetof(struct {struct}, {field}));')
    if not ours:
        pytest.skip(f"<linux/{header}.h> is older than iommufd")
    source = tmp_path / "probe.c"
    source.write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "probe")], check=True)
    output = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True).stdout
    assert ours == {key: int(value) for key, value in (line.rsplit(" ", 1) for line in output.splitlines())}
