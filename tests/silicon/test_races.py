"""Programs in C that race the IOMMU's flushes and the engines' doorbells from several threads, under sanitizers.

On each platform it is 50,000 unmaps at least under AddressSanitizer, and 2,000 under the slower ThreadSanitizer;
``PVFIO_STRESS_UNMAPS`` raises either.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.c_program import build, run

ROOMS = ("silicon", "memory", "pagetable")
MILLISECONDS = 1000
UNMAPS = int(os.environ.get("PVFIO_STRESS_UNMAPS", "0"))
LEAST = {"thread": 2_000, "address,undefined": 50_000}


@pytest.mark.parametrize("name", ["dma_race", "dirty_race", "engine_race", "table_race", "tlb_race"])
@pytest.mark.parametrize("sanitizer", LEAST)
def test_no_race(name: str, sanitizer: str, tmp_path: Path) -> None:
    program = build(Path(__file__).with_name(f"{name}.c"), ROOMS, sanitizer, tmp_path)
    unmaps = max(UNMAPS, LEAST[sanitizer])
    raced = run(program, MILLISECONDS, unmaps, timeout=180 + unmaps / 50)
    assert not raced.returncode, raced.stdout + raced.stderr


@pytest.mark.parametrize("sanitizer", LEAST)
def test_busy_engines_end(sanitizer: str, tmp_path: Path) -> None:
    program = build(Path(__file__).with_name("engine_end.c"), ROOMS, sanitizer, tmp_path)
    ended = run(program, 3 * MILLISECONDS, timeout=120)
    assert not ended.returncode, ended.stdout + ended.stderr
