"""Fixtures of the tests of all drivers."""

from __future__ import annotations

import pytest


@pytest.fixture(
    params=[("intel", "inline"), ("intel", "thread"), ("amd", "inline"), ("amd", "thread")], ids="-".join
)
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Platform and engine."""
    chosen: tuple[str, str] = request.param
    return chosen
