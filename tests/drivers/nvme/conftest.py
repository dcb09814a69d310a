"""A running NVMe driver on a machine, with the emulated controller at hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.drivers.nvme import NvmeDriver, QueuePair
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.silicon import Engine
from pvfio.vfio import Container, Device

SIZE = 16 << 20


@dataclass
class Rig:
    """A machine with one NVMe controller that is open."""

    machine: Machine
    device: Device

    @property
    def container(self) -> Container:
        return self.device.container

    @property
    def function(self) -> Any:
        return self.machine.devices["nvme0"].function

    @property
    def engine(self) -> Engine:
        engine: Engine = self.function.engine
        return engine


@dataclass
class Running(Rig):
    """A machine with one NVMe controller whose driver runs."""

    nvme: NvmeDriver

    @property
    def queue(self) -> QueuePair:
        return self.nvme.queues[0]


RigMaker = Callable[..., AbstractAsyncContextManager[Rig]]
RunningMaker = Callable[..., AbstractAsyncContextManager[Running]]


@asynccontextmanager
async def open_rig(
    platform: Any = "intel",
    engine: Any = "inline",
    config: NvmeConfig | None = None,
    namespaces: Sequence[NamespaceSpec] = (NamespaceSpec(size=SIZE),),
) -> AsyncIterator[Rig]:
    machine_config = MachineConfig(
        iommu=IommuConfig(platform=platform),
        engine=engine,
        ram=64 << 20,
        devices=(DeviceSpec(kind="nvme", options={"config": config, "namespaces": namespaces}),),
    )
    async with Machine(machine_config) as machine, machine.open("nvme0") as device:
        yield Rig(machine, device)


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


@pytest.fixture(
    params=[("intel", "inline"), ("intel", "thread"), ("amd", "inline"), ("amd", "thread")], ids="-".join
)
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Platform and engine."""
    chosen: tuple[str, str] = request.param
    return chosen
