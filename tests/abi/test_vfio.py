"""The VFIO structures and numbers against the system's own <linux/vfio.h>, compiled on the spot."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pvfio.abi
from pvfio.abi import ffi, lib

HEADER = (Path(pvfio.abi.__file__).parent / "vfio.h").read_text()
MACROS = re.findall(r"^#define (\w+) ", HEADER, re.MULTILINE)
STRUCTS = re.findall(r"^struct (\w+) \{", HEADER, re.MULTILINE)


def _fields(struct: str) -> list[tuple[str, int]]:
    """Field names and offsets as cffi has them, without the padding that only has a name here."""
    return [(name, field.offset) for name, field in ffi.typeof(f"struct {struct}").fields if name != "pad"]


def _program() -> str:
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <linux/vfio.h>", "int main(void) {"]
    lines += [f'printf("{macro} %lld\\n", (long long)({macro}));' for macro in MACROS]
    for struct in STRUCTS:
        lines.append(f'printf("sizeof {struct} %zu\\n", sizeof(struct {struct}));')
        lines += [
            f'printf("{struct}.{f} %zu\\n", offsetof(struct {struct}, {f}));' for f, _ in _fields(struct)
        ]
    return "\n".join([*lines, "return 0; }"])


def _measured(tmp_path: Path) -> dict[str, int]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    probe = subprocess.run(
        [compiler, "-E", "-x", "c", "-"], input="#include <linux/vfio.h>\n", capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip("no <linux/vfio.h>")
    source = tmp_path / "probe.c"
    source.write_text(_program())
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "probe")], check=True)
    output = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in (line.rsplit(" ", 1) for line in output.splitlines())}


def test_agrees_with_the_system_header(tmp_path: Path) -> None:
    measured = _measured(tmp_path)
    ours: dict[str, int] = {macro: getattr(lib, macro) for macro in MACROS}
    for struct in STRUCTS:
        ours[f"sizeof {struct}"] = ffi.sizeof(f"struct {struct}")
        ours |= {f"{struct}.{field}": offset for field, offset in _fields(struct)}
    assert ours == measured


def test_every_macro_and_structure_is_covered() -> None:
    assert len(MACROS) > 80
    assert len(STRUCTS) > 15
