"""A running DSA driver on a machine, with the emulated device's controls at hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from pvfio.devices.dsa import DsaConfig
from pvfio.drivers.dsa import DsaDriver, WorkQueue
from tests.drivers.rig import Rig, open_device
from tests.profiles import PROFILE


def cases(parts: int = 1) -> settings:
    """How many examples a property of an operation is tried with: 200, 10,000 in the nightly profile and 50 under
    sanitizers, in all ``parts`` together that a test is parametrized into.
    """
    total = {"nightly": 10_000, "sanitized": 50}.get(PROFILE, 200)
    return settings(
        max_examples=-(-total // parts),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@dataclass
class Running(Rig):
    """A machine with one DSA whose driver runs."""

    dsa: DsaDriver

    @property
    def wq(self) -> WorkQueue:
        return self.dsa.wq(0)


RigMaker = Callable[..., AbstractAsyncContextManager[Rig]]
RunningMaker = Callable[..., AbstractAsyncContextManager[Running]]


def open_rig(
    platform: Any = "intel", engine: Any = "inline", config: DsaConfig | None = None
) -> AbstractAsyncContextManager[Rig]:
    return open_device("dsa", platform, engine, config=config)


@asynccontextmanager
async def open_running(
    platform: Any = "intel", engine: Any = "inline", config: DsaConfig | None = None, **options: Any
) -> AsyncIterator[Running]:
    async with open_rig(platform, engine, config) as rig:
        async with DsaDriver(rig.device, **options) as dsa:
            yield Running(rig.machine, rig.device, dsa)


@pytest.fixture
def rig() -> RigMaker:
    """``async with rig(platform, engine, config) as r``: the device is open, no driver runs."""
    return open_rig


@pytest.fixture
def running() -> RunningMaker:
    """``async with running(platform, engine, config, **driver_options) as r``."""
    return open_running
