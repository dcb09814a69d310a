"""Random commands, doorbells, pointers, configuration and faults against the data path in C, under sanitizers.

The program is fuzz.c; ``PVFIO_FUZZ_SECONDS`` says how long: a minute where ``CI`` is set, seconds elsewhere, an hour at
night. ``PVFIO_FUZZ_SEED`` makes a campaign again.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.c_program import build, run

ROOMS = ("silicon", "memory", "pagetable", "devices/nvme")
SECONDS = float(os.environ.get("PVFIO_FUZZ_SECONDS") or (60 if os.environ.get("CI") else 3))
SEED = int(os.environ.get("PVFIO_FUZZ_SEED") or time.time_ns() // 1000)


@pytest.mark.parametrize(("sanitizer", "share"), [("address,undefined", 0.9), ("thread", 0.1)])
def test_fuzz(sanitizer: str, share: float, tmp_path: Path) -> None:
    """No finding, and after a reset the controller works every time."""
    program = build(Path(__file__).with_name("fuzz.c"), ROOMS, sanitizer, tmp_path)
    seconds = SECONDS * share
    fuzzed = run(program, seconds, SEED, timeout=120 + 2 * seconds)
    assert not fuzzed.returncode, f"seed {SEED}: {fuzzed.stdout}{fuzzed.stderr}"
