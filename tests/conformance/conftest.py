"""The backends that the conformance cases run on: the same cases, whatever carries the requests out.

A case gets a ``Bench``: a backend, the names of two devices like ``pvfio.devices.testdev`` in groups of their
own, and what is not a backend's own about it. Cases marked ``every_shape`` run on machines of several shapes
(shapes.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from pvfio.vfio import Backend
from tests.conformance.shapes import Shape, shapes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``shape``: of the machine. The teaching device has no engine thread, so its cases leave that axis out."""
    if "shape" in metafunc.fixturenames and metafunc.definition.get_closest_marker("every_shape"):
        taken = shapes(without=["engine"] if "backend" in metafunc.fixturenames else [])
        metafunc.parametrize("shape", taken, ids=str)


@pytest.fixture
def shape() -> Shape:
    """The default one."""
    return Shape()


@dataclass
class Bench:
    """``names``: two devices. ``dma_entry_limit``: how many mappings a container may have. ``pins()``: how
    many pins are left of all containers."""

    vfio: Backend
    names: tuple[str, str]
    dma_entry_limit: int
    pins: Callable[[], int]


@pytest.fixture(params=["emulated"])
async def backend(
    request: pytest.FixtureRequest, emulated: Callable[..., Awaitable[Any]], shape: Shape
) -> Bench:
    """One bench per backend."""
    from pvfio.guest.type1 import Type1Limits

    limit = 16
    machine = await emulated(
        buses=(1, 1),
        limits=Type1Limits(dma_entry_limit=limit, memlock=8 << 20),
        config=shape.iommu(),
        intx=True,
        ats=True,
    )
    first, second = machine.names
    return Bench(machine.vfio, (first, second), limit, lambda: machine.memory.stats().pins)
