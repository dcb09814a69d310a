"""The rig, or a reason why there is none."""

from __future__ import annotations

import pytest

from tests.guest.linux.rig import Rig


@pytest.fixture(scope="session")
def rig() -> Rig:
    """Boots real Linux guests. The test is skipped where there is no rig."""
    reason = Rig.missing()
    if reason is not None:
        pytest.skip(reason)
    return Rig.find()
