"""Programs in C that race the IOMMU's flushes and the engines' doorbells from several threads, under sanitizers.

Each compiles against the project's own sources, without Python in the process. Skipped where the compiler or
its run-time library lacks the sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("silicon", "memory", "pagetable")
MILLISECONDS = "1500"
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fno-strict-aliasing", "-pthread", f"-I{ROOT / 'pvfio'}")
SANITIZERS = ("thread", "address,undefined")

# What another sanitizer's run preloads into Python would break these programs.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)


def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if not found:
        pytest.skip("no C compiler")
    return found


@pytest.fixture(params=SANITIZERS)
def sanitizer(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A sanitizer that works here: an empty program builds and runs with it."""
    name: str = request.param
    source, program = tmp_path / "empty.c", tmp_path / "empty"
    source.write_text("int main(void) { return 0; }\n")
    built = run(compiler(), f"-fsanitize={name}", source, "-o", program)
    if built.returncode or run(program).returncode:
        pytest.skip(f"no -fsanitize={name} here")
    return name


@pytest.mark.parametrize("name", ["dma_race", "engine_race"])
def test_no_race(name: str, sanitizer: str, tmp_path: Path) -> None:
    sources = [path for room in ROOMS for path in sorted((ROOT / "pvfio" / room).glob("*.c"))]
    program = tmp_path / name
    built = run(
        compiler(),
        *FLAGS,
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=undefined",
        Path(__file__).with_name(f"{name}.c"),
        *sources,
        "-o",
        program,
    )
    assert not built.returncode, built.stderr
    raced = run(program, MILLISECONDS)
    assert not raced.returncode, raced.stdout + raced.stderr
