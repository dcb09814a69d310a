"""A running NVMe driver on a machine, with the emulated controller at hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.drivers.nvme import NvmeDriver, QueuePair
from tests.drivers.rig import Rig, open_device

SIZE = 16 << 20


@dataclass
class Running(Rig):
    """A machine with one NVMe controller whose driver runs."""

    nvme: NvmeDriver

    @property
    def queue(self) -> QueuePair:
        return self.nvme.queues[0]


RigMaker = Callable[..., AbstractAsyncContextManager[Rig]]
RunningMaker = Callable[..., AbstractAsyncContextManager[Running]]


def open_rig(
    platform: Any = "intel",
    engine: Any = "inline",
    config: NvmeConfig | None = None,
    namespaces: Sequence[NamespaceSpec] = (NamespaceSpec(size=SIZE),),
) -> AbstractAsyncContextManager[Rig]:
    return open_device("nvme", platform, engine, config=config, namespaces=namespaces)


@asynccontextmanager
async def open_running(
    platform: Any = "intel",
    engine: Any = "inline",
    config: NvmeConfig | None = None,
    namespaces: Sequence[NamespaceSpec] = (NamespaceSpec(size=SIZE),),
    **options: Any,
) -> AsyncIterator[Running]:
    async with open_rig(platform, engine, config, namespaces) as rig:
        async with NvmeDriver(rig.device, **options) as nvme:
            yield Running(rig.machine, rig.device, nvme)


@pytest.fixture
def rig() -> RigMaker:
    """``async with rig(platform, engine, config, namespaces) as r``: the device is open, no driver runs."""
    return open_rig


@pytest.fixture
def running() -> RunningMaker:
    """``async with running(platform, engine, config, namespaces, **driver_options) as r``."""
    return open_running
