"""A program in C that uses a channel from five threads at once, against a peer that misbehaves, under sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.c_program import build, run

ROOMS = ("vfio_user", "silicon", "memory", "pagetable")
MILLISECONDS = 1000


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_race(sanitizer: str, tmp_path: Path) -> None:
    program = build(Path(__file__).with_name("channel_race.c"), ROOMS, sanitizer, tmp_path)
    raced = run(program, MILLISECONDS, timeout=120)
    assert not raced.returncode, raced.stdout + raced.stderr
