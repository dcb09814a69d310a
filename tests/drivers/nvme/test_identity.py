"""What tells controllers and namespaces apart."""

from __future__ import annotations

import pytest

from pvfio.abi import ffi, lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.drivers.nvme import NvmeDriver
from pvfio.machine import DeviceSpec, Machine, MachineConfig

pytestmark = pytest.mark.touches_c

_SMALL = NamespaceSpec(size=1 << 20)


def disk(name: str | None = None, **options: object) -> DeviceSpec:
    return DeviceSpec(kind="nvme", name=name, options={"namespaces": (_SMALL, _SMALL), **options})


async def names(machine: Machine, disk: str) -> list[bytes]:
    """Serial number and NQN of a controller; EUI-64, NGUID, UUID of its namespaces."""
    async with machine.open(disk) as device, NvmeDriver(device) as nvme:
        controller = ffi.from_buffer("struct nvme_id_ctrl *", nvme.controller.raw)
        found = [bytes(controller.sn), ffi.string(controller.subnqn)]
        for nsid in nvme.namespaces:
            raw = await nvme.admin.identify(lib.NVME_ID_CNS_NS_DESC_LIST, nsid)
            for _ in range(3):
                found.append(raw[4 : 4 + raw[1]])
                raw = raw[4 + raw[1] :]
    return found


async def test_no_name_comes_twice() -> None:
    """In a machine; the next machine of this kind has the same names."""
    machine_config = MachineConfig(
        engine="inline",
        ram=64 << 20,
        devices=(
            disk(),
            disk("the disk of the second guest"),
            disk("the disk of the third guest"),
            disk(),
            disk(config=NvmeConfig(serial="S1")),
            disk(identity="/run/disk.sock"),
        ),
    )
    seen = []
    for _ in range(2):
        async with Machine(machine_config) as machine:
            seen.append({name: await names(machine, name) for name in machine.devices})
    assert seen[0] == seen[1]
    assert (seen[0]["nvme0"][0].rstrip(), seen[0]["nvme4"][0].rstrip()) == (b"pvfio-nvme0", b"S1")
    every = [name for found in seen[0].values() for name in found]
    assert len(set(every)) == len(every) == 6 * 8
