"""A host, teaching devices and the guest's lowest rooms on them; and, with the IOMMU driver, what type1 runs on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.abi.hyperv import logical_id_prefix
from pvfio.devices.testdev import TestDevice
from pvfio.guest.iommu_group import IommuGroup
from pvfio.guest.logical_id import LogicalIdRegistry
from pvfio.guest.pci import PciDevice, enumerate_bus
from pvfio.guest.pviommu import PvIommu
from pvfio.guest.transport import HypercallTransport
from pvfio.guest.type1 import LockedMemory, Type1, Type1Limits
from pvfio.host.config import IommuConfig
from pvfio.host.hypervisor import Hypervisor
from pvfio.memory import GuestMemory
from pvfio.silicon import BusMaster

_GUID = uuid.UUID("6a1cb2c4-0f3e-4d35-9a70-3b5f1c2d4e5f")


class Type1Machine:
    """The room type1 lives in. ``groups[i]`` holds the device whose bus master is ``buses[i]``."""

    def __init__(self, *, ram: int = 64 << 20, devices: int = 2) -> None:
        self.memory = GuestMemory(ram, host_private=16 << 20)
        self.hypervisor = Hypervisor(self.memory, IommuConfig())
        self.calls: list[int] = []
        self.interrupt: BaseException | None = None
        self.transport = HypercallTransport(self.memory, self.hypercall, 2)
        iommu = PvIommu.detect(self.transport, self.memory)
        assert iommu is not None
        self.iommu = iommu
        channel = self.hypervisor.add_bus(_GUID, 0)
        registry = LogicalIdRegistry()
        registry.register(0, logical_id_prefix(_GUID.bytes_le))
        self.buses: list[BusMaster] = []
        for function in range(devices):
            channel.plug(function, self._make_device)
        self.groups: list[IommuGroup] = []
        for device in enumerate_bus(channel, registry):
            iommu.probe(device)
            device.enable()
            self.groups.append(IommuGroup(len(self.groups), iommu, [device]))

    def _make_device(self, bus: BusMaster) -> TestDevice:
        self.buses.append(bus)
        return TestDevice(bus)

    def hypercall(self, vp: int, control: int, input_gpa: int, output_gpa: int) -> int:
        """The host's door; ``calls`` remembers the call codes. ``interrupt`` is raised, once, instead."""
        self.calls.append(control & 0xFFFF)
        if self.interrupt is not None:
            interrupt, self.interrupt = self.interrupt, None
            raise interrupt
        return self.hypervisor.hypercall(vp, control, input_gpa, output_gpa)

    def type1(
        self,
        *,
        v2: bool = True,
        groups: int = 1,
        entries: int = 65535,
        memlock: int | None = None,
        account: LockedMemory | None = None,
    ) -> Type1:
        """A container's type1 with that many groups in it."""
        type1 = Type1(self.memory, self.iommu, Type1Limits(entries, memlock), v2, account=account)
        for group in self.groups[:groups]:
            type1.attach_group(group)
        return type1

    def held(self) -> tuple[int, int, int]:
        """Pins, table pages and free frames: what a leak would change."""
        stats = self.memory.stats()
        return stats.pins, stats.table_pages, stats.free_frames

    def flushes(self) -> int:
        """Flush hypercalls so far."""
        flushing = (lib.HVCALL_FLUSH_DEVICE_DOMAIN, lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST)
        return sum(call in flushing for call in self.calls)

    def close(self) -> None:
        """Takes the host away."""
        self.hypervisor.close()


@pytest.fixture
def make_type1_machine() -> Iterator[Callable[..., Type1Machine]]:
    made: list[Type1Machine] = []

    def make(**how: Any) -> Type1Machine:
        made.append(Type1Machine(**how))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


@pytest.fixture
def type1_machine(make_type1_machine: Callable[..., Type1Machine]) -> Type1Machine:
    return make_type1_machine()


INSTANCE = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")
SEGMENT = 0x12


class Guest:
    """``entry`` is the hypervisor's door with a window: ``calls`` lists the call codes that went through it,
    ``before`` runs ahead of each, and a code in ``swallowed`` is answered with success and not passed on."""

    def __init__(self, config: IommuConfig, functions: int, ats: bool, pviommu: bool) -> None:
        self.memory = GuestMemory(32 << 20)
        self.hypervisor = Hypervisor(self.memory, config, vps=2)
        self.bus = self.hypervisor.add_bus(INSTANCE, SEGMENT)
        self.calls: list[int] = []
        self.swallowed: set[int] = set()
        self.before: Callable[[int], None] = lambda code: None
        self.transport = HypercallTransport(self.memory, self.entry, 2)
        self.registry = LogicalIdRegistry()
        self.registry.register(SEGMENT, logical_id_prefix(INSTANCE.bytes_le))
        self.functions = [
            self.bus.plug(number, lambda bus: TestDevice(bus, ats=ats), pviommu=pviommu)
            for number in range(functions)
        ]
        self.devices: list[PciDevice] = enumerate_bus(self.bus, self.registry)
        for device in self.devices:
            device.enable()

    def entry(self, vp: int, control: int, input_gpa: int, output_gpa: int) -> int:
        code = control & lib.HV_HYPERCALL_CODE_MASK
        self.before(code)
        self.calls.append(code)
        if code in self.swallowed:
            reps: int = control & lib.HV_HYPERCALL_REP_COUNT_MASK
            return reps
        return self.hypervisor.hypercall(vp, control, input_gpa, output_gpa)

    def detect(self) -> PvIommu:
        iommu = PvIommu.detect(self.transport, self.memory)
        assert iommu is not None
        return iommu

    def codes(self, *codes: int) -> list[int]:
        """The calls made with one of these codes, in order."""
        return [code for code in self.calls if code in codes]

    def count(self, code: int) -> int:
        return self.calls.count(code)


@pytest.fixture
def make_guest() -> Iterator[Callable[..., Guest]]:
    """Makes guests: ``make_guest(config=IommuConfig(), functions=1, ats=True, pviommu=True)``."""
    made: list[Guest] = []

    def make(
        config: IommuConfig | None = None, *, functions: int = 1, ats: bool = True, pviommu: bool = True
    ) -> Guest:
        guest = Guest(config or IommuConfig(), functions, ats, pviommu)
        made.append(guest)
        return guest

    yield make
    for guest in made:
        guest.hypervisor.close()


@pytest.fixture
def guest(make_guest: Callable[..., Guest]) -> Any:
    """One such guest, with the default IOMMU and one function that has ATS."""
    return make_guest()
