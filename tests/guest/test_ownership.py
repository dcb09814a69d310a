"""A device goes from the kernel to VFIO and back while its engine never stops, and no DMA is ever out of place.

The engine writes numbered words into one window of IOVAs all the time: it ignores bus mastering and resets. The kernel
and VFIO map the window to memory of their own, so where a word is says through which domain it went; the memory whose
GPA is the window (a canary, or in an identity domain the kernel's own) would show a moment without translation.
``PVFIO_OWNERSHIP_MOVES`` says how often.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio

from pvfio import Machine, MachineConfig
from pvfio.abi import lib
from pvfio.devices.rogue import RogueDevice
from pvfio.errors import HypercallError, VfioError
from pvfio.guest.dma_api import Direction, DmaDevice
from pvfio.guest.dma_debug import DmaDebug, Rule
from pvfio.guest.dma_domain import DomainKind
from pvfio.guest.iommu_group import IommuGroup
from pvfio.guest.paging_domain import Domain, PagingDomain
from pvfio.guest.pci import PciDevice
from pvfio.guest.pviommu import PvIommu
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec
from pvfio.memory import DmaBuffer
from tests.guest.ownership import Watch, Words

pytestmark = pytest.mark.touches_c

RAM = 64 << 20
MASK_BITS = 25
SIZE = 1 << 18
MOVES = int(os.environ.get("PVFIO_OWNERSHIP_MOVES", "3"))
SHAPES = [
    ("intel", "identity", True),
    ("amd", "identity", False),
    ("amd", "strict", False),
    ("intel", "strict", True),
    ("intel", "lazy", False),
]


def words(buffer: npt.NDArray[Any]) -> Words:
    return np.asarray(buffer).view(np.uint64)


class Rig:
    """A machine with one rogue device, bound to kernel driver "edu" and let loose on the window at ``iova``.

    In a DMA domain ``iova`` is a DMA address of the kernel's memory, and the GPA of a canary.
    """

    def __init__(self, machine: Machine, window: int) -> None:
        self.machine = machine
        self.kernel = machine.kernel
        known = machine.devices["rogue0"]
        assert isinstance(known.function, RogueDevice)
        self.rogue = known.function
        self.device: PciDevice = machine.kernel.device(known.pci_name)
        assert self.device.iommu_group is not None
        assert machine.kernel.iommu is not None
        self.group: IommuGroup = self.device.iommu_group
        self.iommu: PvIommu = machine.kernel.iommu
        # The lower half of RAM, so that the canary is in it.
        blocks = [machine.memory.alloc(SIZE, align=SIZE) for _ in range(RAM // 2 // SIZE)]
        blocks.sort(key=self.gpa)
        self.kernel_memory, self.user_memory, self.other_memory = blocks[:3]
        places = {"kernel": self.kernel_memory, "user": self.user_memory, "other": self.other_memory}
        self.dma = DmaDevice(self.kernel, self.device, mask_bits=MASK_BITS)
        self.iova = self.map()
        if machine.config.default_domain != "identity":
            canary = next(block for block in blocks[3:] if self.gpa(block) == self.iova)
            places["canary"] = canary
        self.rogue.aim(self.iova, window)
        self.watch = Watch(
            self.rogue, {name: words(place[:window]) for name, place in places.items()}, "kernel"
        )

    def map(self) -> int:
        """Lends the kernel's memory to the device."""
        return self.dma.map_single(self.kernel_memory, Direction.BIDIRECTIONAL)

    def unmap(self) -> None:
        self.dma.unmap_single(self.iova, SIZE, Direction.BIDIRECTIONAL)

    def gpa(self, buffer: DmaBuffer) -> int:
        return self.machine.memory.runs(buffer.vaddr, SIZE)[0][0]

    def paging(self) -> PagingDomain:
        """As a container's: the window leads to the user's memory."""
        domain = self.iommu.paging_domain()
        domain.map(self.iova, self.gpa(self.user_memory), SIZE)
        return domain

    def bind(self, driver: str | None) -> None:
        self.kernel.bind(self.device, driver)


@asynccontextmanager
async def running(
    platform: Any = "intel", *, kind: DomainKind = "identity", ats: bool = False, window: int = SIZE
) -> AsyncIterator[Rig]:
    config = MachineConfig(
        iommu=IommuConfig(platform=platform),
        ram=RAM,
        default_domain=kind,
        devices=(DeviceSpec(kind="rogue", driver="edu", options={"log_shift": 24, "ats": ats}),),
    )
    with trio.fail_after(60 + 20 * MOVES):
        async with Machine(config) as machine:
            rig = Rig(machine, window)
            try:
                yield rig
            finally:
                rig.rogue.aim(0, 0)


@pytest.mark.parametrize(("platform", "kind", "ats"), SHAPES)
async def test_every_step_of_a_group(platform: Any, kind: DomainKind, ats: bool) -> None:
    """Each call's effect is there when it returns, and what it does on the way is seen by no write."""
    async with running(platform, ats=ats, kind=kind) as rig:
        watch, group, domain = rig.watch, rig.group, rig.paging()
        for _ in range(MOVES):
            watch.step(lambda: rig.bind(None), "kernel")
            watch.step(lambda: rig.bind("vfio-pci"), "kernel")
            assert rig.device.ats_enabled == ats
            watch.step(group.claim_dma_owner, None)
            assert not rig.device.ats_enabled
            for _ in range(2):
                watch.step(lambda: group.attach(domain), "user")
                watch.step(group.detach, None)
            watch.step(lambda: group.attach(domain), "user")
            watch.step(group.release_dma_owner, "kernel")
            watch.step(lambda: rig.bind("edu"), "kernel")
        domain.free()
        assert watch.landed
        assert watch.aborted


@pytest.mark.parametrize(("platform", "kind", "ats"), SHAPES)
async def test_to_vfio_and_back(platform: Any, kind: DomainKind, ats: bool) -> None:
    """The whole way: driver, container, group, device, mapping, and all of it closed again."""
    async with running(platform, ats=ats, kind=kind) as rig:
        watch = rig.watch
        for _ in range(MOVES):
            rig.bind("vfio-pci")
            since = watch.begin()
            async with rig.machine.open("rogue0") as device:
                watch.end(since, None)
                container = device.container
                since = watch.begin()
                await container.map_dma(rig.iova, rig.user_memory)
                watch.end(since, "user")
                since = watch.begin()
                await device.reset()
                watch.end(since, "user")
                since = watch.begin()
                await container.unmap_dma(rig.iova, SIZE)
                watch.end(since, None)
                since = watch.begin()
            watch.end(since, "kernel")
            watch.step(lambda: rig.bind("edu"), "kernel")
        assert watch.aborted


@pytest.mark.parametrize("kind", ["identity", "lazy"])
async def test_closed_while_mapped(kind: DomainKind) -> None:
    """Nobody unmaps: the end of the container takes the device out first."""
    async with running(kind=kind) as rig:
        watch = rig.watch
        rig.bind("vfio-pci")
        for _ in range(MOVES):
            since = watch.begin()
            async with rig.machine.open("rogue0") as device:
                watch.end(since, None)
                since = watch.begin()
                await device.container.map_dma(rig.iova, rig.user_memory)
                watch.end(since, "user")
                since = watch.begin()
            watch.end(since, "kernel")


@pytest.mark.parametrize(("platform", "kind", "ats"), SHAPES[1:4])
async def test_to_iommufd_and_from_table_to_table(platform: Any, kind: DomainKind, ats: bool) -> None:
    """Between two address spaces there is no gap either: not one write is refused."""
    async with running(platform, kind=kind, ats=ats) as rig:
        watch, vfio = rig.watch, rig.machine.vfio
        rig.bind("vfio-pci")
        async with await vfio.open_iommufd() as iommufd:
            one, two = iommufd.alloc_ioas(), iommufd.alloc_ioas()
            one.map_dma_nowait(rig.iova, rig.user_memory)
            two.map_dma_nowait(rig.iova, rig.other_memory)
            for _ in range(MOVES):
                since = watch.begin()
                async with await vfio.bind_device(rig.device.name, iommufd) as device:
                    watch.end(since, None)
                    watch.step(partial(device.attach, one), "user")
                    refused = watch.aborted
                    for _ in range(5):
                        watch.step(partial(device.attach, two), "other")
                        watch.step(partial(device.attach, one), "user")
                    assert watch.aborted == refused
                    watch.step(device.detach, None)
                    watch.step(partial(device.attach, two), "other")
                    since = watch.begin()
                watch.end(since, "kernel")
        rig.bind("edu")


async def test_cancelled_on_the_way() -> None:
    """An open that is cancelled, at whatever point, has given the device back when it returns."""
    async with running(kind="strict") as rig:
        rig.bind("vfio-pci")
        for checkpoints in range(12):
            since = rig.watch.begin()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def cancel(after: int, scope: trio.CancelScope) -> None:
                        for _ in range(after):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

                    nursery.start_soon(cancel, checkpoints, scope)
                    async with rig.machine.open("rogue0"):
                        await trio.sleep_forever()
            rig.watch.end(since, "kernel")


async def test_a_kernel_driver_keeps_its_device() -> None:
    """Refused, and not one write ended otherwise meanwhile."""
    async with running() as rig:

        def claim() -> None:
            with pytest.raises(VfioError) as raised:
                rig.group.claim_dma_owner()
            assert raised.value.errno == errno.EPERM

        rig.watch.step(claim, "kernel")
        assert not rig.watch.aborted


async def test_the_kernel_does_not_get_what_vfio_has() -> None:
    async with running() as rig:
        rig.bind("vfio-pci")
        since = rig.watch.begin()
        async with rig.machine.open("rogue0"):
            rig.watch.end(since, None)

            def bind(driver: str | None) -> None:
                with pytest.raises(VfioError) as raised:
                    rig.bind(driver)
                assert raised.value.errno == errno.EBUSY

            rig.watch.step(lambda: bind("edu"), None)
            rig.watch.step(lambda: bind(None), None)


@pytest.mark.parametrize("step", ["claim", "attach", "detach", "release"])
async def test_a_refused_step(step: str) -> None:
    """The host says no: the device is where it was, or blocked; nowhere else on the way."""
    async with running(kind="strict") as rig:
        group, watch, domain = rig.group, rig.watch, rig.paging()
        rig.bind("vfio-pci")
        steps: dict[str, tuple[Callable[[], None], str | None, str | None]] = {
            "claim": (group.claim_dma_owner, "kernel", None),
            "attach": (lambda: group.attach(domain), None, "user"),
            "detach": (group.detach, "user", None),
            "release": (group.release_dma_owner, None, "kernel"),
        }
        for name, (action, before, after) in steps.items():
            if name == step:
                rig.machine.hypervisor.inject(lib.HVCALL_ATTACH_DEVICE_DOMAIN, lib.HV_STATUS_OPERATION_DENIED)

                def refused(action: Callable[[], None] = action) -> None:
                    with pytest.raises(HypercallError):
                        action()

                watch.step(refused, before)
            watch.step(action, after)
        domain.free()


def through_identity(rig: Rig, domain: Domain, attach: Callable[..., None]) -> None:
    """A kernel that unhooks a device before it hooks it up again."""
    attach(rig.iommu.identity, rig.device)
    rig.watch.run()
    attach(domain, rig.device)


def never_blocked(rig: Rig, domain: Domain, attach: Callable[..., None]) -> None:
    """A kernel whose blocking is a promise."""
    if domain is not rig.iommu.blocking:
        attach(domain, rig.device)


BREAKS = [(through_identity, step) for step in ("claim", "attach", "detach")]
BREAKS += [(never_blocked, "claim"), (never_blocked, "detach")]


@pytest.mark.parametrize(("broken", "step"), BREAKS)
async def test_the_checker_sees_a_broken_kernel(
    broken: Callable[..., None], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(kind="strict") as rig:
        group, watch, domain = rig.group, rig.watch, rig.paging()
        rig.bind("vfio-pci")
        steps: dict[str, tuple[Callable[[], None], str | None]] = {
            "claim": (group.claim_dma_owner, None),
            "attach": (lambda: group.attach(domain), "user"),
            "detach": (group.detach, None),
        }
        attach = rig.iommu.attach
        for name, (action, to) in steps.items():
            if name != step:
                watch.step(action, to)
                continue
            with monkeypatch.context() as patch:
                patch.setattr(rig.iommu, "attach", lambda domain, _: broken(rig, domain, attach))
                with pytest.raises(AssertionError):
                    watch.step(action, to)
            break
        group.release_dma_owner()
        domain.free()


@pytest.mark.parametrize("kind", ["strict", "lazy"])
async def test_the_dma_api_of_a_device_that_never_stops(kind: DomainKind) -> None:
    """Strict: out of reach when the unmap returns. Lazy: some time later, and never let in again by itself.

    One page, which the IOTLB knows: in lazy's window the device reaches what is cached and not the rest.
    """
    async with running(kind=kind, window=4096) as rig:
        watch = rig.watch
        for _ in range(MOVES):
            since = watch.begin()
            rig.unmap()
            if kind == "lazy":
                await flushed(rig)
            watch.end(since, None)
            since = watch.begin()
            assert rig.map() == rig.iova
            watch.end(since, "kernel")


async def flushed(rig: Rig) -> None:
    """Until the flush queue's timer has fired: nothing lands any more."""
    landed = -1
    while landed < (landed := rig.rogue.stats().landed):
        rig.watch.run()
        await trio.sleep(0.001)


async def test_a_lazy_unmap_does_not_survive_a_move() -> None:
    """Unmapped, not flushed, and off to VFIO: what the IOTLB knew is gone when the device comes back."""
    async with running(kind="lazy", window=4096) as rig:
        watch, domain = rig.watch, rig.paging()
        rig.bind("vfio-pci")
        for _ in range(MOVES):

            def move() -> None:
                rig.unmap()
                rig.group.claim_dma_owner()

            watch.step(move, None)
            watch.step(lambda: rig.group.attach(domain), "user")
            watch.step(rig.group.release_dma_owner, None)
            rig.group.dma.flush()
            since = watch.begin()
            assert rig.map() == rig.iova
            watch.end(since, "kernel")
        domain.free()


async def test_another_default_domain_while_it_runs() -> None:
    """Between two drivers, in one step each: from the kernel's memory to the canary that identity leads to."""
    async with running(kind="strict") as rig:
        watch, group = rig.watch, rig.group
        rig.bind(None)
        watch.step(lambda: group.set_default_domain("identity"), "canary")
        watch.step(lambda: group.set_default_domain("strict"), None)
        watch.step(lambda: group.set_default_domain("identity"), "canary")


async def test_mappings_left_behind_stay_and_are_reported() -> None:
    """A driver that unmaps nothing: its mappings are in the default domain again after a visit to VFIO."""
    async with running(kind="strict") as rig:
        rig.kernel.dma_debug = debug = DmaDebug()
        dma = DmaDevice(rig.kernel, rig.device)
        buffer = rig.machine.memory.alloc(4096)
        address = dma.map_single(buffer, Direction.TO_DEVICE)
        rig.bind("vfio-pci")
        assert [(report.rule, report.address) for report in debug.reports] == [(Rule.LEAK, address)]
        assert [report.mapped_at[2] for report in debug.reports if report.mapped_at] == [
            "test_mappings_left_behind_stay_and_are_reported"
        ]
        since = rig.watch.begin()
        async with rig.machine.open("rogue0"):
            rig.watch.end(since, None)
            since = rig.watch.begin()
        rig.watch.end(since, "kernel")
        rig.bind("edu")
        dma.unmap_single(address, buffer.size, Direction.TO_DEVICE)
        rig.bind(None)
        assert debug.count == 1
