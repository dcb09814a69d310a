"""The machine: start, open, the ways out, and what a crashed device does."""

from __future__ import annotations

import errno
import gc
import os
from typing import Any

import pytest
import trio

import pvfio
from pvfio.errors import DeviceFailed, VfioError
from pvfio.host.config import IommuConfig
from pvfio.machine import DeviceSpec, Machine, MachineConfig

pytestmark = pytest.mark.touches_c

TESTDEV = MachineConfig(devices=(DeviceSpec(kind="testdev"),), engine="inline", ram=64 << 20)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("platform", ["intel", "amd"])
async def test_a_device_reads_what_was_mapped_for_it(platform: Any) -> None:
    config = MachineConfig(
        iommu=IommuConfig(platform=platform), devices=(DeviceSpec(kind="testdev"),), engine="inline"
    )
    async with Machine(config) as machine, machine.open("testdev0") as device:
        buffer = await device.container.alloc(8192)
        buffer[:5] = list(b"hello")
        assert buffer.iova is not None
        await device.set_bus_master()
        assert machine.devices["testdev0"].requester.read(buffer.iova, 5) == b"hello"


async def test_nothing_is_left_after_it() -> None:
    async with Machine(TESTDEV):
        pass
    gc.collect()
    before = open_files()
    for _ in range(3):
        async with Machine(TESTDEV) as machine, machine.open("testdev0") as device:
            await device.container.alloc(4096)
            memory = machine.memory
        assert memory.stats().table_pages == 0
        assert memory.stats().host_pages == 0
        assert memory.stats().pins == 0
        del machine, device, memory
        gc.collect()
    assert open_files() == before


async def test_buffers_outlive_the_machine() -> None:
    async with Machine(TESTDEV) as machine, machine.open("testdev0") as device:
        buffer = await device.container.alloc(4096)
    buffer[:] = 7
    assert int(buffer.sum()) == 7 * 4096


async def test_devices_by_machine_name_and_by_pci_name() -> None:
    async with Machine(TESTDEV) as machine:
        name = machine.devices["testdev0"].pci_name
        for wanted in ("testdev0", name):
            async with machine.open(wanted) as device:
                assert device.name == name
        with pytest.raises(VfioError) as caught:
            async with machine.open("nothing"):
                pass
        assert caught.value.errno == errno.ENODEV


async def test_a_device_opens_once() -> None:
    async with Machine(TESTDEV) as machine, machine.open("testdev0"):
        with pytest.raises(VfioError) as caught:
            async with machine.open("testdev0"):
                pass
        assert caught.value.errno == errno.EBUSY


async def test_two_devices_share_a_container() -> None:
    config = MachineConfig(devices=(DeviceSpec(kind="testdev"), DeviceSpec(kind="testdev")), engine="inline")
    async with Machine(config) as machine, machine.open("testdev0") as first:
        async with machine.open("testdev1", container=first.container) as second:
            buffer = await second.container.alloc(4096)
            assert buffer.iova is not None
            for device in (first, second):
                await device.set_bus_master()
            machine.devices["testdev0"].requester.write(buffer.iova, b"shared")
            assert machine.devices["testdev1"].requester.read(buffer.iova, 6) == b"shared"


async def test_a_kernel_driver_keeps_userspace_out() -> None:
    specs = (
        DeviceSpec(kind="testdev", bus="one", isolated=False),
        DeviceSpec(kind="testdev", bus="one", isolated=False, driver="edu"),
    )
    async with Machine(MachineConfig(devices=specs, engine="inline")) as machine:
        with pytest.raises(VfioError) as caught:
            async with machine.open("testdev0"):
                pass
        assert caught.value.errno == errno.EPERM


async def test_the_body_s_exception_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with Machine(TESTDEV) as machine, machine.open("testdev0"):
            raise KeyError("mine")


async def test_a_cancelled_body_is_only_cancelled() -> None:
    with trio.CancelScope() as scope:
        async with Machine(TESTDEV) as machine, machine.open("testdev0"):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_crashed_device_cancels_its_machine_with_the_reason() -> None:
    with trio.fail_after(30):
        with pytest.raises(DeviceFailed, match="testdev0: ValueError: no such thing") as caught:
            async with Machine(TESTDEV) as machine, machine.open("testdev0"):
                device: Any = machine.devices["testdev0"].function

                async def crash(*, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
                    task_status.started()
                    raise ValueError("no such thing")

                device.run = crash
                machine._nursery.start_soon(machine._run_device, machine.devices["testdev0"])
                await trio.sleep_forever()
    assert isinstance(caught.value.__cause__, ValueError)


async def test_a_machine_runs_once() -> None:
    machine = Machine(TESTDEV)
    async with machine:
        pass
    with pytest.raises(RuntimeError, match="once"):
        async with machine:
            pass


async def test_a_machine_without_an_iommu_has_devices_but_no_groups() -> None:
    config = MachineConfig(
        iommu=IommuConfig(present=False), devices=(DeviceSpec(kind="testdev"),), engine="inline"
    )
    async with Machine(config) as machine:
        assert machine.kernel.iommu is None
        with pytest.raises(VfioError):
            async with machine.open("testdev0"):
                pass


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: DeviceSpec(kind="toaster"),
        lambda: DeviceSpec(kind="dsa", engine="steam"),  # type: ignore[arg-type]
        lambda: MachineConfig(engine="steam"),  # type: ignore[arg-type]
        lambda: IommuConfig(platform="sparc"),  # type: ignore[arg-type]
    ],
)
def test_configurations_that_cannot_be(mistake: Any) -> None:
    with pytest.raises(ValueError):
        mistake()


@pytest.mark.parametrize(
    "config",
    [
        MachineConfig(ram=4096),
        MachineConfig(vps=0),
        MachineConfig(devices=(DeviceSpec(kind="testdev", name="x"), DeviceSpec(kind="testdev", name="x"))),
        MachineConfig(devices=tuple(DeviceSpec(kind="testdev", bus="full") for _ in range(9))),
    ],
)
async def test_machines_that_cannot_start(config: MachineConfig) -> None:
    with pytest.raises(ValueError):
        async with Machine(config):
            pass


async def test_open_device_is_the_one_line_way_in() -> None:
    async with pvfio.open_device("emu:testdev?platform=amd&engine=inline&ram=64") as device:
        buffer = await device.container.alloc(4096)
        assert buffer.iova is not None


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "emu",
        "emu:",
        "dsa",
        "tape:0",
        "emu:toaster",
        "emu:testdev?colour=red",
        "emu:testdev?platform=sparc",
        "emu:testdev?engine=steam",
        "emu:testdev?ram=lots",
        "emu:testdev?ram=0",
        "emu:testdev?platform",
    ],
)
async def test_uris_that_name_nothing(uri: str) -> None:
    with pytest.raises(ValueError):
        async with pvfio.open_device(uri):
            pass
