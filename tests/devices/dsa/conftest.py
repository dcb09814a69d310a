"""The DSA's data path for tests, and the whole function."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pvfio.silicon.engine import EngineKind
from tests.devices.dsa.rig import Rig

MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    """Makes rigs; what they ran must be over, or held on purpose, when the test ends."""
    rigs: list[Rig] = []

    def make(kind: EngineKind = "inline", **options: int) -> Rig:
        rigs.append(Rig(kind, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig()
