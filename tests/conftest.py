"""What all tests share: how many examples hypothesis tries, chosen by ``HYPOTHESIS_PROFILE``, and a small
machine.

``dev`` is the default, ``ci`` where ``CI`` is set, ``sanitized`` for a second run under sanitizers, ``nightly`` is for
campaigns. No profile has a deadline:
two busy cores say nothing about one example.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import HealthCheck, settings

from tests.profiles import PROFILE

if TYPE_CHECKING:
    from pvfio.backends.emulated import EmulatedVfio
    from pvfio.devices.testdev import TestDevice
    from pvfio.guest.dma_domain import DomainKind
    from pvfio.guest.kernel import GuestKernel
    from pvfio.guest.type1 import Type1Limits
    from pvfio.host import Hypervisor, IommuConfig
    from pvfio.host.vpci import VpciBus
    from pvfio.memory import GuestMemory

SLOW_MACHINE = [HealthCheck.too_slow]

settings.register_profile("dev", deadline=None, max_examples=50, suppress_health_check=SLOW_MACHINE)
settings.register_profile(
    "ci", deadline=None, max_examples=100, print_blob=True, suppress_health_check=SLOW_MACHINE
)
settings.register_profile(
    "nightly", deadline=None, max_examples=5000, print_blob=True, suppress_health_check=SLOW_MACHINE
)
settings.register_profile(
    "sanitized", deadline=None, max_examples=25, print_blob=True, suppress_health_check=SLOW_MACHINE
)
settings.load_profile(PROFILE)


@dataclass
class EmulatedMachine:
    """A guest with teaching devices and no more: what the tests of VFIO stand on."""

    memory: GuestMemory
    hypervisor: Hypervisor
    kernel: GuestKernel
    vfio: EmulatedVfio
    buses: list[VpciBus]
    functions: list[TestDevice]

    @property
    def names(self) -> list[str]:
        return [device.name for device in self.kernel.devices]


MachineFactory = Callable[..., Awaitable[EmulatedMachine]]


@pytest.fixture
async def emulated(nursery: trio.Nursery) -> AsyncIterator[MachineFactory]:
    """Makes machines: ``await emulated(buses=(functions per bus, ...), isolated=True, intx=False, ...)``."""
    from pvfio.backends.emulated import EmulatedVfio
    from pvfio.devices.testdev import TestDevice
    from pvfio.guest.kernel import GuestKernel
    from pvfio.host import Hypervisor, IommuConfig
    from pvfio.memory import GuestMemory

    made: list[EmulatedMachine] = []

    async def make(
        buses: tuple[int, ...] = (1,),
        *,
        isolated: bool = True,
        driver: str | None = "vfio-pci",
        limits: Type1Limits | None = None,
        config: IommuConfig | None = None,
        default_domain: DomainKind = "identity",
        **device: Any,
    ) -> EmulatedMachine:
        memory = GuestMemory(64 << 20)
        hypervisor = Hypervisor(memory, config or IommuConfig())
        kernel = GuestKernel(memory, hypervisor.hypercall, limits=limits, default_domain=default_domain)
        machine = EmulatedMachine(memory, hypervisor, kernel, EmulatedVfio(kernel, memory), [], [])
        made.append(machine)
        await nursery.start(kernel.run)
        for segment, functions in enumerate(buses, 1):
            bus = hypervisor.add_bus(uuid.uuid5(uuid.NAMESPACE_OID, f"bus {segment}"), segment)
            for number in range(functions):
                function = bus.plug(number, lambda requester: TestDevice(requester, **device))
                await nursery.start(function.run)
                machine.functions.append(function)
            kernel.add_bus(bus, isolated=isolated, driver=driver)
            machine.buses.append(bus)
        return machine

    yield make
    for machine in made:
        await machine.vfio.close()
        machine.kernel.close()
        machine.hypervisor.close()
    nursery.cancel_scope.cancel()
