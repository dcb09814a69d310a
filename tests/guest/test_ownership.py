"""A device goes from the kernel to VFIO and back while its engine never stops, and no DMA is ever out of place.

The engine writes numbered words into one window of IOVAs all the time: it ignores bus mastering and resets. The kernel
and VFIO map the window to memory of their own, so where a word is says through which domain it went; the memory whose
GPA is the window (a canary, or in an identity domain the kernel's own) would show a moment without translation.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio

from pvfio import Machine, MachineConfig
from pvfio.abi import lib
from pvfio.devices.rogue import RogueDevice
from pvfio.errors import HypercallError, VfioError
from pvfio.guest.iommu_group import IommuGroup
from pvfio.guest.paging_domain import Domain, PagingDomain
from pvfio.guest.pci import PciDevice
from pvfio.guest.pviommu import PvIommu
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec
from pvfio.memory import DmaBuffer
from tests.guest.ownership import Watch, Words

pytestmark = pytest.mark.touches_c

SIZE = 1 << 18
MOVES = 5


def words(buffer: DmaBuffer) -> Words:
    return np.asarray(buffer).view(np.uint64)


class Rig:
    """A machine with one rogue device, bound to kernel driver "edu" and let loose on the window at ``iova``."""

    def __init__(self, machine: Machine) -> None:
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
        memory = machine.memory
        self.kernel_memory, self.user_memory = (memory.alloc(SIZE, align=SIZE) for _ in range(2))
        self.iova = self.gpa(self.kernel_memory)
        places = {"kernel": words(self.kernel_memory), "user": words(self.user_memory)}
        self.rogue.aim(self.iova, SIZE)
        self.watch = Watch(self.rogue, places, "kernel")

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
async def running(platform: Any = "intel", *, ats: bool = False) -> AsyncIterator[Rig]:
    config = MachineConfig(
        iommu=IommuConfig(platform=platform),
        ram=64 << 20,
        devices=(DeviceSpec(kind="rogue", driver="edu", options={"log_shift": 24, "ats": ats}),),
    )
    with trio.fail_after(120):
        async with Machine(config) as machine:
            rig = Rig(machine)
            try:
                yield rig
            finally:
                rig.rogue.aim(0, 0)


@pytest.mark.parametrize(("platform", "ats"), [("intel", True), ("intel", False), ("amd", False)])
async def test_every_step_of_a_group(platform: Any, ats: bool) -> None:
    """Each call's effect is there when it returns, and what it does on the way is seen by no write."""
    async with running(platform, ats=ats) as rig:
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


@pytest.mark.parametrize(("platform", "ats"), [("intel", True), ("intel", False), ("amd", False)])
async def test_to_vfio_and_back(platform: Any, ats: bool) -> None:
    """The whole way: driver, container, group, device, mapping, and all of it closed again."""
    async with running(platform, ats=ats) as rig:
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


async def test_closed_while_mapped() -> None:
    """Nobody unmaps: the end of the container takes the device out first."""
    async with running() as rig:
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


async def test_cancelled_on_the_way() -> None:
    """An open that is cancelled, at whatever point, has given the device back when it returns."""
    async with running() as rig:
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
        async with rig.machine.open("rogue0"):

            def bind(driver: str | None) -> None:
                with pytest.raises(VfioError) as raised:
                    rig.bind(driver)
                assert raised.value.errno == errno.EBUSY

            rig.watch.at = None
            for place in rig.watch.places.values():
                place[:] = 0
            rig.watch.step(lambda: bind("edu"), None)
            rig.watch.step(lambda: bind(None), None)


@pytest.mark.parametrize("step", ["claim", "attach", "detach", "release"])
async def test_a_refused_step(step: str) -> None:
    """The host says no: the device is where it was, or blocked; nowhere else on the way."""
    async with running() as rig:
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


@pytest.mark.parametrize("broken", [through_identity, never_blocked])
@pytest.mark.parametrize("step", ["claim", "attach", "detach"])
async def test_the_checker_sees_a_broken_kernel(
    broken: Callable[..., None], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as rig:
        group, watch, domain = rig.group, rig.watch, rig.paging()
        rig.bind("vfio-pci")
        harmless = {(through_identity, "claim"), (never_blocked, "attach")}
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
                if (broken, name) in harmless:
                    watch.step(action, to)
                else:
                    with pytest.raises(AssertionError):
                        watch.step(action, to)
            break
        group.release_dma_owner()
        domain.free()
