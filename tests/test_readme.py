"""The README keeps its word: its program is the example that the tests run, its commands are the two that CI runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_program_is_the_example() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert blocks == [(ROOT / "examples" / "hello_dsa.py").read_text()]


def test_the_two_commands_are_there() -> None:
    reader = [sys.executable, str(ROOT / ".ci" / "readme_commands.py")]
    first = subprocess.run([*reader, "1"], capture_output=True, text=True, check=True).stdout
    second = subprocess.run([*reader, "2"], capture_output=True, text=True, check=True).stdout
    assert "pip install" in first
    assert "pvfio dmatest --input" in first
    assert "pip install" in second
    assert "pytest" in second


def test_files_it_names_exist() -> None:
    named = re.findall(r"`((?:pvfio|drivers|devices|examples|tests|\.ci)/[\w./*-]*)`", README)
    assert named
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_qemu_is_started_as_the_example_does_it() -> None:
    example = (ROOT / "examples" / "linux_guest.sh").read_text()
    (block,) = re.findall(r"^qemu-system-x86_64 .*?^```$", README, re.DOTALL | re.MULTILINE)
    options = [line.rstrip(" \\").strip() for line in block.splitlines()[:-2]]
    assert len(options) == 4
    for option in options:
        assert option.replace("/tmp/", """'"$folder"'/""") in example
