"""What the tests of all drivers stand on: a machine with one open device, and operations that are cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec, Machine, MachineConfig
from pvfio.silicon import Engine
from pvfio.vfio import Container, Device


@dataclass
class Rig:
    """A machine with one device that is open."""

    machine: Machine
    device: Device

    @property
    def container(self) -> Container:
        return self.device.container

    @property
    def function(self) -> Any:
        (only,) = self.machine.devices.values()
        return only.function

    @property
    def engine(self) -> Engine:
        engine: Engine = self.function.engine
        return engine


@asynccontextmanager
async def open_device(kind: str, platform: Any, engine: Any, **options: Any) -> AsyncIterator[Rig]:
    config = MachineConfig(
        iommu=IommuConfig(platform=platform),
        engine=engine,
        ram=64 << 20,
        devices=(DeviceSpec(kind=kind, options=options),),
    )
    async with Machine(config) as machine, machine.open(f"{kind}0") as device:
        yield Rig(machine, device)


class _CancelAt(trio.abc.Instrument):
    """Cancels a scope while the task that made this is at its n-th await."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.scope = trio.CancelScope()
        self.task = trio.lowlevel.current_task()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if not self.left:
                self.scope.cancel()


async def cancelled_at(n: int, operation: Callable[[], Awaitable[Any]]) -> bool:
    """Runs an operation that is cancelled at its n-th await; false when it had fewer and so was not."""
    instrument = _CancelAt(n)
    trio.lowlevel.add_instrument(instrument)
    try:
        with instrument.scope:
            await operation()
    finally:
        trio.lowlevel.remove_instrument(instrument)
    return instrument.left <= 0
