"""A million random maps and unmaps of each format in a C program, every table page accounted for (``churn.c``)."""

from __future__ import annotations

from pathlib import Path

from tests.c_program import build, run

OPERATIONS = 1_000_000


def test_no_table_page_is_lost(tmp_path: Path) -> None:
    program = build(
        Path(__file__).with_name("churn.c"), ("pagetable", "memory"), "address,undefined", tmp_path
    )
    churned = run(program, OPERATIONS, timeout=300)
    assert not churned.returncode, churned.stdout + churned.stderr
    assert churned.stdout.count("format ") == 4
