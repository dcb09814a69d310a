"""The operations again, every second page of memory reached by asking for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pvfio.silicon import READ, WRITE
from pvfio.silicon.engine import EngineKind
from tests.devices.dsa import test_batch, test_completion, test_delta, test_dif, test_operations, test_pages
from tests.devices.dsa.conftest import MakeRig
from tests.devices.dsa.rig import MEMORY, PAGE, Rig
from tests.far_memory import FarMemory

pytestmark = pytest.mark.touches_c

for _module in (test_batch, test_completion, test_delta, test_dif, test_operations, test_pages):
    for _name, _value in vars(_module).items():
        if _name.startswith("test_") and callable(_value):
            globals()[f"{_name}_{_module.__name__.rsplit('_')[-1]}"] = _value


class FarRig(Rig):
    """A rig whose even pages are remote."""

    def map(self, iova: int, perm: int = READ | WRITE) -> None:
        if not hasattr(self, "far"):
            self.far = FarMemory(self.bus)
        if iova // PAGE % 2:
            super().map(iova, perm)
        else:
            self.far.map(iova, self.memory[iova - MEMORY : iova - MEMORY + PAGE], perm)

    def unmap(self, iova: int) -> None:
        self.far.unmap(iova, PAGE)


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(kind: EngineKind = "inline", **options: int) -> Rig:
        rigs.append(FarRig(kind, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    rig = FarRig()
    yield rig
    rig.close()
