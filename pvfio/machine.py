"""The machine: memory, hypervisor, guest kernel and devices, wired together and running.

Models one host with one guest and its devices; the tasks of all of them live in the machine's nursery. A device that
crashes cancels its machine with ``DeviceFailed`` and the reason. Does not model CPUs: the guest's software is the
program that uses the machine.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio

from pvfio.backends.emulated import EmulatedVfio
from pvfio.errors import DeviceFailed
from pvfio.guest.dma_domain import DomainKind, check_kind
from pvfio.guest.kernel import GuestKernel
from pvfio.guest.type1 import Type1Limits
from pvfio.host.config import IommuConfig
from pvfio.host.hypervisor import Hypervisor
from pvfio.memory import GuestMemory

if TYPE_CHECKING:
    from pvfio.host.vpci import VpciBus, VpciFunction
    from pvfio.silicon import BusMaster, EngineKind, Requester
    from pvfio.vfio import Container, Device

__all__ = ["DeviceSpec", "Machine", "MachineConfig", "MachineDevice"]

# So that the logical device IDs of a machine are the same in every run.
_GUIDS = uuid.UUID("6d0e8c1e-7f0a-4b0e-9c55-707666696f00")


def _make_dsa(bus: BusMaster, name: str, engine: EngineKind, options: Mapping[str, Any]) -> VpciFunction:
    from pvfio.devices.dsa import DsaDevice

    return DsaDevice(bus, engine=engine, **options)


def _make_testdev(bus: BusMaster, name: str, engine: EngineKind, options: Mapping[str, Any]) -> VpciFunction:
    from pvfio.devices.testdev import TestDevice

    return TestDevice(bus, **options)


def _make_rogue(bus: BusMaster, name: str, engine: EngineKind, options: Mapping[str, Any]) -> VpciFunction:
    from pvfio.devices.rogue import RogueDevice

    return RogueDevice(bus, **options)


def _make_nvme(bus: BusMaster, name: str, engine: EngineKind, options: Mapping[str, Any]) -> VpciFunction:
    from pvfio.devices.nvme import NvmeDevice

    return NvmeDevice(bus, engine=engine, **{"identity": name, **options})


_KINDS = {"dsa": _make_dsa, "nvme": _make_nvme, "testdev": _make_testdev, "rogue": _make_rogue}


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One device of a machine.

    ``kind`` is ``"dsa"``, ``"nvme"``, ``"testdev"`` or ``"rogue"`` (which never stops); ``name`` defaults to
    the kind and a number ("dsa0"). Devices with the same ``bus`` are functions of one vPCI bus, and of one
    IOMMU group unless ``isolated``; by default each has a bus of its own. ``driver`` is the kernel driver that
    owns it at boot.
    ``engine`` overrides the machine's; a rogue is always a thread. ``options`` go to the device's constructor.
    ``pviommu=False``: the hypervisor says the pvIOMMU does not serve it.
    """

    kind: str
    name: str | None = None
    bus: str | None = None
    isolated: bool = True
    driver: str | None = "vfio-pci"
    engine: EngineKind | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pviommu: bool = True

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"a device is one of {', '.join(sorted(_KINDS))}, not {self.kind!r}")
        if self.engine not in (None, "inline", "thread"):
            raise ValueError(f"an engine is inline or thread, not {self.engine!r}")


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """What a machine is made of.

    ``ram``: bytes of guest RAM, a multiple of 2 MiB. ``vps``: virtual processors. ``engine``: how data
    engines run, ``"inline"`` (in the caller, deterministic) or ``"thread"``. ``seed`` decides the permutation
    of GPA to HPA. ``default_domain``: where devices of the guest kernel make DMA, ``"identity"``, ``"strict"`` or
    ``"lazy"``. The platform is ``iommu.platform``. Raises ``ValueError`` for values that cannot be.
    """

    iommu: IommuConfig = field(default_factory=IommuConfig)
    ram: int = 512 << 20
    host_private: int = 64 << 20
    vps: int = 2
    engine: EngineKind = "thread"
    devices: tuple[DeviceSpec, ...] = (DeviceSpec(kind="dsa"),)
    limits: Type1Limits = field(default_factory=Type1Limits)
    default_domain: DomainKind = "identity"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ("inline", "thread"):
            raise ValueError(f"an engine is inline or thread, not {self.engine!r}")
        check_kind(self.default_domain)


@dataclass(frozen=True)
class MachineDevice:
    """A device of a running machine: its names, the emulated function, its bus master, where it is plugged."""

    name: str
    pci_name: str
    kind: str
    function: VpciFunction
    requester: Requester
    bus: VpciBus
    number: int


class Machine:
    """A running machine: ``async with Machine(config) as machine``.

    ``memory``, ``hypervisor``, ``kernel`` are its parts, ``vfio`` is its /dev/vfio, ``devices`` its devices by
    name. Leaving ends every task, closes what is open and frees everything; ``DmaBuffer`` arrays stay valid.
    An exception of the body comes out as it is; a device that crashed comes out as ``DeviceFailed``.
    """

    def __init__(self, config: MachineConfig | None = None) -> None:
        self.config = config if config is not None else MachineConfig()
        self.devices: dict[str, MachineDevice] = {}
        self.memory: GuestMemory
        self.hypervisor: Hypervisor
        self.kernel: GuestKernel
        self.vfio: EmulatedVfio
        self._failure: DeviceFailed | None = None
        self._nursery_manager: AbstractAsyncContextManager[trio.Nursery] | None = None

    async def __aenter__(self) -> Self:
        if self._nursery_manager is not None:
            raise RuntimeError("a machine runs once")
        self._build()
        self._nursery_manager = trio.open_nursery()
        self._nursery = await self._nursery_manager.__aenter__()
        try:
            await self._start()
        except BaseException as error:
            if not await self.__aexit__(type(error), error, error.__traceback__):
                raise
            raise AssertionError("a cancelled start was swallowed") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._nursery_manager is not None
        with trio.CancelScope(shield=True):
            await self.vfio.close()
        self._nursery.cancel_scope.cancel()
        # The nursery sees only what its own cancellation may have caused; the rest is the body's, and goes on as it is.
        ours = value is not None and _has_cancelled(value)
        swallowed = False
        try:
            if ours:
                swallowed = bool(await self._nursery_manager.__aexit__(kind, value, traceback))
            else:
                await self._nursery_manager.__aexit__(None, None, None)
        finally:
            self._close()
        if self._failure is not None and (value is None or ours):
            raise self._failure
        return swallowed

    def _build(self) -> None:
        config = self.config
        self.memory = GuestMemory(config.ram, host_private=config.host_private, seed=config.seed)
        self.hypervisor = Hypervisor(self.memory, config.iommu, vps=config.vps)
        try:
            for segment, (key, specs) in enumerate(_by_bus(config.devices).items(), 1):
                bus = self.hypervisor.add_bus(uuid.uuid5(_GUIDS, key), segment)
                for number, (name, spec) in enumerate(specs):
                    self._plug(bus, number, name, spec)
            self.kernel = GuestKernel(
                self.memory,
                self.hypervisor.hypercall,
                vps=config.vps,
                limits=config.limits,
                default_domain=config.default_domain,
            )
        except BaseException:
            self.hypervisor.close()
            raise
        self.vfio = EmulatedVfio(self.kernel, self.memory)

    def _plug(self, bus: VpciBus, number: int, name: str, spec: DeviceSpec) -> None:
        engine = spec.engine or self.config.engine
        requesters: list[Requester] = []

        def make(requester: Requester) -> VpciFunction:
            requesters.append(requester)
            return _KINDS[spec.kind](requester, name, engine, spec.options)

        function = bus.plug(number, make, pviommu=spec.pviommu)
        pci_name = bus.device_name(number)
        self.devices[name] = MachineDevice(name, pci_name, spec.kind, function, requesters[0], bus, number)

    async def _start(self) -> None:
        await self._nursery.start(self.hypervisor.run)
        await self._nursery.start(self.kernel.run)
        for device in self.devices.values():
            await self._nursery.start(self._run_device, device)
        for specs in _by_bus(self.config.devices).values():
            bus = self.devices[specs[0][0]].bus
            isolated = all(spec.isolated for _name, spec in specs)
            found = self.kernel.add_bus(bus, isolated=isolated, driver=None)
            for pci_device in found:
                if pci_device.iommu_group is not None:
                    self.kernel.bind(pci_device, specs[pci_device.function][1].driver)

    async def _run_device(
        self, device: MachineDevice, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            await device.function.run(task_status=task_status)
        except Exception as error:
            self._failure = DeviceFailed(device.name, f"{type(error).__name__}: {error}")
            self._failure.__cause__ = error
            self._nursery.cancel_scope.cancel()

    def _close(self) -> None:
        try:
            self.kernel.close()
        finally:
            self.hypervisor.close()

    def open(self, name: str, *, container: Container | None = None) -> AbstractAsyncContextManager[Device]:
        """A device by its machine name ("dsa0") or PCI name: ``async with machine.open("dsa0") as device``.

        It comes in a container of its own unless one is given. Raises ``VfioError`` as the kernel does
        (ENODEV for an unknown name, EBUSY when it is open, EPERM when a kernel driver owns its group).
        """
        known = self.devices.get(name)
        return self.vfio.open_device(known.pci_name if known else name, container=container)


def _has_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_has_cancelled(inner) for inner in error.exceptions)
    return isinstance(error, trio.Cancelled)


def _by_bus(specs: tuple[DeviceSpec, ...]) -> dict[str, list[tuple[str, DeviceSpec]]]:
    """Bus key -> its devices with their names, in order. ``ValueError`` for a name that comes twice."""
    counts: dict[str, int] = {}
    buses: dict[str, list[tuple[str, DeviceSpec]]] = {}
    names: set[str] = set()
    for spec in specs:
        number = counts.get(spec.kind, 0)
        counts[spec.kind] = number + 1
        name = spec.name or f"{spec.kind}{number}"
        if name in names:
            raise ValueError(f"two devices are called {name!r}")
        names.add(name)
        buses.setdefault(f"bus {spec.bus}" if spec.bus else f"device {name}", []).append((name, spec))
    return buses
