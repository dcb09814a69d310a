"""Every example runs, and says what it is meant to say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pvfio

pytestmark = pytest.mark.touches_c

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

WORDS = {
    "batch.py": ["4096 pages gathered"],
    "by_hand.py": ["viable=True", "status 0x1, equal: True"],
    "copy_file.py": ["500000 bytes", "CRC-32C"],
    "hello_dsa.py": ["moved 1048576 bytes", "CRC 0x"],
    "page_fault.py": [
        "DSA_COMP_BATCH_FAIL",
        "member 2: DSA_COMP_PAGE_FAULT_NOBOF",
        "the fault log: 0001:00:00.0: write of iova",
        "mapped again: ['DSA_COMP_SUCCESS']",
    ],
    "walk.py": ["b'Hello'", "unmapped: not present"],
}


def test_the_table_names_every_example() -> None:
    assert sorted(WORDS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", WORDS)
def test_example(name: str, tmp_path: Path) -> None:
    arguments: list[str] = []
    source, target = tmp_path / "source", tmp_path / "target"
    if name == "copy_file.py":
        source.write_bytes(bytes(range(250)) * 2000)
        arguments = [str(source), str(target)]
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    # The pvfio that is tested, installed or not.
    environment = os.environ | {"PYTHONPATH": str(Path(pvfio.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    for words in WORDS[name]:
        assert words in done.stdout
    if target.exists():
        assert target.read_bytes() == source.read_bytes()
