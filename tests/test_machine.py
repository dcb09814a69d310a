"""The machine: start, open, the ways out, and what a crashed device does."""

from __future__ import annotations

import errno
import gc
import os
from typing import Any

import google_crc32c
import numpy as np
import pytest
import trio

import pvfio
from pvfio.drivers.dsa import DsaDriver, DsaError
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


SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    # IOMMU, bits of an IOVA, levels of stage 1
    "intel, 5-level": ({"five_level": True, "max_iova_width": 57}, 57, 5),
    "amd, 5-level": ({"platform": "amd", "five_level": True, "max_iova_width": 64}, 57, 5),
    "5-level hardware, 48 bits": ({"five_level": True}, 48, 4),
    "57 bits without 5-level": ({"max_iova_width": 57}, 48, 4),
    "39 bits": ({"max_iova_width": 39}, 39, 4),
    "4 KiB pages only": ({"pgsize_bitmap": 1 << 12}, 48, 4),
    "no ATS": ({"platform": "amd", "ats": False}, 48, 4),
    "intel, stage 2 of 3 levels": ({"stage2_levels": 3}, 48, 4),
    "intel, stage 2 of 5 levels": ({"stage2_levels": 5}, 48, 4),
    "amd, stage 2 of 6 levels": ({"platform": "amd", "stage2_levels": 6}, 48, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_dma_through_iommus_of_every_shape(shape: str) -> None:
    """A transfer that ends with the last IOVA there is, crossing a 2 MiB boundary, and none after the unmap."""
    options, bits, levels = SHAPES[shape]
    size = (2 << 20) + 3 * 4096
    config = MachineConfig(iommu=IommuConfig(**options), engine="inline", ram=64 << 20)
    async with Machine(config) as machine, machine.open("dsa0") as device, DsaDriver(device) as dsa:
        container = device.container
        assert container.info().iova_ranges[-1][1] == (1 << bits) - 1
        source = await container.alloc(size)
        source[:] = np.random.default_rng(5).integers(0, 256, size)
        target = await container.alloc(size, iova=(1 << bits) - size)
        crc = await dsa.wq(0).copy_crc(target, source, size)
        assert crc == google_crc32c.value(source.tobytes())
        assert np.array_equal(target, source)
        steps = machine.devices["dsa0"].requester.walk((1 << bits) - 1).steps
        assert {step.level for step in steps if step.stage == 1} == set(range(1, levels + 1))
        with pytest.raises(VfioError):
            await container.alloc(4096, iova=1 << bits)
        await container.free(target)
        with pytest.raises(DsaError) as caught:
            await dsa.wq(0).fill((1 << bits) - 4096, 0, 4096)
        assert caught.value.fault_addr == (1 << bits) - 4096


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
