"""Every example runs, and says what it is meant to say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pvfio

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

WORDS = {
    "batch.py": ["4096 pages gathered"],
    "by_hand.py": ["viable=True", "status 0x1, equal: True"],
    "copy_crc.py": ["1000000 bytes copied, CRC-32C 0x", "by numpy"],
    "copy_file.py": ["500000 bytes", "CRC-32C"],
    "crc_pipeline.py": ["500000 bytes, CRC-32C 0x"],
    "delta.py": ["32 blocks, 1 rewritten, 15 unchanged", "restored: True"],
    "dma_api.py": [
        "equal: True; and once more: False",
        "the fault log: 0001:00:00.0: write of iova",
        "3 mistakes: sync in another direction, unmapped with another direction, left mapped",
        "in mistakes; mapped at",
    ],
    "dirty_log.py": [
        "round 0: 16384 pages, all there are",
        "pages written by DMA meanwhile",
        "the device's buffer arrived whole: True",
    ],
    "dualcast.py": ["64 entries of 768 bytes in both mirrors", "64 bytes out of step: DSA_COMP_DCAST_ERR"],
    "hello_dsa.py": ["moved 1048576 bytes", "CRC 0x"],
    "lazy_window.py": [
        "strict: after the unmap the device is kept out; kept=True",
        "lazy  : after the unmap the device still writes; kept=False",
        "lazy  : after the flush the device is kept out",
    ],
    "iommufd.py": ["first space: 1, second space: 2", "through a table of our own: 3"],
    "nvme_hello.py": [
        "65536 blocks of 4096 bytes",
        "block 100 came back: True",
        "beyond the end: LBA_RANGE",
        "1024 random blocks: 0 errors, equal: True",
    ],
    "nvme_image.py": ["SHA-256", "through the driver, equal: True"],
    "page_fault.py": [
        "DSA_COMP_BATCH_FAIL",
        "member 2: DSA_COMP_PAGE_FAULT_NOBOF",
        "the fault log: 0001:00:00.0: write of iova",
        "mapped again: ['DSA_COMP_SUCCESS']",
    ],
    "walk.py": ["b'Hello'", "unmapped: not present"],
}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    # The pvfio that is tested, installed or not.
    environment = os.environ | {"PYTHONPATH": str(Path(pvfio.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_the_table_names_every_example() -> None:
    assert sorted(WORDS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", WORDS)
def test_example(name: str, tmp_path: Path) -> None:
    arguments: list[str] = []
    source, target = tmp_path / "source", tmp_path / "target"
    if name in ("copy_file.py", "crc_pipeline.py"):
        source.write_bytes(bytes(range(250)) * 2000)
        arguments = [str(source), str(target)]
    elif name == "nvme_image.py":
        source.write_bytes(bytes(range(256)) * 40_002)  # the last transfers are short ones
        arguments = [str(source)]
    done = run(name, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for words in WORDS[name]:
        assert words in done.stdout
    if target.exists():
        assert target.read_bytes() == source.read_bytes()


def test_the_pipeline_judges_the_crc(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"123456789")
    done = run("crc_pipeline.py", str(source), str(target), "0xe3069283")
    assert (done.returncode, done.stderr) == (0, "")
    assert target.read_bytes() == b"123456789"
    done = run("crc_pipeline.py", str(source), str(target), "0xe3069284")
    assert done.returncode == 1
    assert "CRC-32C is not 0xe3069284" in done.stderr
    assert not target.exists()
    source.write_bytes(b"")
    done = run("crc_pipeline.py", str(source), str(target), "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert target.read_bytes() == b""
