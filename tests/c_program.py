"""Test programs in C: built against the project's own sources under a sanitizer, without Python in the process.

Skips where there is no compiler, or the compiler or its run-time library lacks the sanitizer. Such programs need no
second run under the sanitized extension, so their tests are not marked ``touches_c``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = (
    *("-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fno-strict-aliasing", "-pthread"),
    *(f"-I{ROOT / room}" for room in ("pvfio", "tests")),
)
WARNINGS = ("-Wall", "-Wextra", "-Werror")

# What a sanitizer of Python's own process preloads or leaves out is not for these programs.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")
}


def run(*command: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs a command; its words may be anything that has a text."""
    words = [str(word) for word in command]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False
    )


def compiler() -> str:
    """The C compiler."""
    found = shutil.which("gcc") or shutil.which("cc")
    if not found:
        pytest.skip("no C compiler")
    return found


def build(source: Path, rooms: tuple[str, ...], sanitizer: str, into: Path) -> Path:
    """The program of ``source`` and all C of those rooms of ``pvfio``, with ``-fsanitize=sanitizer``."""
    empty, program = into / "empty.c", into / source.stem
    empty.write_text("int main(void) { return 0; }\n")
    trial = run(compiler(), f"-fsanitize={sanitizer}", empty, "-o", into / "empty")
    if trial.returncode or run(into / "empty").returncode:
        pytest.skip(f"no -fsanitize={sanitizer} here")
    sources = [path for room in rooms for path in sorted((ROOT / "pvfio" / room).glob("*.c"))]
    built = run(
        compiler(),
        *FLAGS,
        *(WARNINGS if sanitizer != "thread" else ()),  # gcc: it follows no atomic_thread_fence
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=undefined",
        source,
        *sources,
        "-o",
        program,
    )
    assert not built.returncode, built.stderr
    return program
