"""Programs in C that race the IOMMU's flushes and the engines' doorbells from several threads, under sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.c_program import build, run

ROOMS = ("silicon", "memory", "pagetable")
MILLISECONDS = "1500"


@pytest.mark.parametrize("name", ["dma_race", "engine_race"])
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_race(name: str, sanitizer: str, tmp_path: Path) -> None:
    program = build(Path(__file__).with_name(f"{name}.c"), ROOMS, sanitizer, tmp_path)
    raced = run(program, MILLISECONDS)
    assert not raced.returncode, raced.stdout + raced.stderr
