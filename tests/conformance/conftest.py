"""The backends that the conformance cases run on: the same cases, whatever carries the requests out.

A case gets a ``Bench``: a backend, the names of two devices like ``pvfio.devices.testdev`` in groups of their
own, and what is not a backend's own about it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from pvfio.vfio import Backend


@dataclass
class Bench:
    """``names``: two devices. ``dma_entry_limit``: how many mappings a container may have. ``pins()``: how
    many pins are left of all containers."""

    vfio: Backend
    names: tuple[str, str]
    dma_entry_limit: int
    pins: Callable[[], int]


@pytest.fixture(params=["emulated"])
async def backend(request: pytest.FixtureRequest, emulated: Callable[..., Awaitable[Any]]) -> Bench:
    """One bench per backend."""
    from pvfio.guest.type1 import Type1Limits

    limit = 16
    machine = await emulated(
        buses=(1, 1), limits=Type1Limits(dma_entry_limit=limit, memlock=8 << 20), intx=True
    )
    first, second = machine.names
    return Bench(machine.vfio, (first, second), limit, lambda: machine.memory.stats().pins)
