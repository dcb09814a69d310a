"""Requests of iommufd made of anything: each is carried out or refused with an errno, and nothing is left behind."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.guest.hwpt import Hwpt, NestedHwpt
from pvfio.guest.ioas import Ioas
from pvfio.guest.iommufd import BoundDevice
from pvfio.guest.type1 import Type1Limits
from pvfio.vfio.ioas import address_of, command_of

pytestmark = pytest.mark.touches_c

PAGE = 4096
REQUESTS = {
    lib.IOMMU_DESTROY: "iommu_destroy",
    lib.IOMMU_IOAS_ALLOC: "iommu_ioas_alloc",
    lib.IOMMU_IOAS_ALLOW_IOVAS: "iommu_ioas_allow_iovas",
    lib.IOMMU_IOAS_COPY: "iommu_ioas_copy",
    lib.IOMMU_IOAS_IOVA_RANGES: "iommu_ioas_iova_ranges",
    lib.IOMMU_IOAS_MAP: "iommu_ioas_map",
    lib.IOMMU_IOAS_UNMAP: "iommu_ioas_unmap",
    lib.IOMMU_OPTION: "iommu_option",
    lib.IOMMU_HWPT_ALLOC: "iommu_hwpt_alloc",
    lib.IOMMU_GET_HW_INFO: "iommu_hw_info",
    lib.IOMMU_HWPT_SET_DIRTY_TRACKING: "iommu_hwpt_set_dirty_tracking",
    lib.IOMMU_HWPT_GET_DIRTY_BITMAP: "iommu_hwpt_get_dirty_bitmap",
    lib.IOMMU_HWPT_INVALIDATE: "iommu_hwpt_invalidate",
    lib.VFIO_DEVICE_ATTACH_IOMMUFD_PT: "vfio_device_attach_iommufd_pt",
    lib.VFIO_DEVICE_DETACH_IOMMUFD_PT: "vfio_device_detach_iommufd_pt",
}
RARE = ("iommu_destroy", "iommu_ioas_alloc", "iommu_ioas_allow_iovas", "vfio_device_detach_iommufd_pt")
POINTERS = ("user_va", "allowed_iovas", "data_uptr", "data")
ERRNOS = {
    errno.EINVAL,
    errno.ENOENT,
    errno.EBUSY,
    errno.EFAULT,
    errno.ENOMEM,
    errno.EEXIST,
    errno.EPERM,
    errno.E2BIG,
    errno.ENOSPC,
    errno.EMSGSIZE,
    errno.EOVERFLOW,
    errno.EADDRINUSE,
    errno.EOPNOTSUPP,
}


KINDS: dict[str, tuple[type, ...]] = {
    "ioas_id": (Ioas,),
    "dst_ioas_id": (Ioas,),
    "src_ioas_id": (Ioas,),
    "object_id": (Ioas,),
    "dev_id": (BoundDevice,),
    "pt_id": (Ioas, Hwpt),
    "hwpt_id": (Hwpt, NestedHwpt),
}


def value(rng: random.Random, field: str, bits: int, memory: int, objects: dict[int, object]) -> int:
    odd = rng.random() < 0.05
    choices: list[int]
    if field in POINTERS:
        choices = [0, 8, 0x7000_0000_0000] if odd else [memory, memory + 8 * PAGE]
    elif odd:
        choices = [1, (1 << bits) - 1, 1 << (bits - 1)]
    elif field in ("__reserved", "__reserved2", "pasid", "fault_id"):
        choices = [0]
    elif field in KINDS:
        choices = [number for number, thing in objects.items() if isinstance(thing, KINDS[field])] or [1]
    elif field in ("data_len", "entry_len"):
        choices = [24] if field == "entry_len" else [0, 24]
    elif field == "data_type":
        choices = [0, 1]
    elif bits < 64:
        choices = [0, 1, 1, 2, 3, 7]
    elif "iova" in field:
        choices = [0x1000_0000 + n * PAGE for n in range(16)]
    else:
        choices = [n * PAGE for n in (1, 2, 4)]
    return rng.choice(choices)


def command(rng: random.Random, struct: str, memory: int, objects: dict[int, object]) -> Any:
    made = command_of(struct)
    few = struct.startswith(("iommu_hwpt", "vfio"))
    for name, field in ffi.typeof(f"struct {struct}").fields:
        if name == "flags" and rng.random() < 0.9:
            setattr(made, name, rng.randrange(2 if few else 8))
        elif name not in ("size", "argsz"):
            setattr(made, name, value(rng, name, 8 * ffi.sizeof(field.type), memory, objects))
    return made


def data(rng: random.Random, memory: Any, root: int) -> None:
    """What pointers lead to: a stage 1, an invalidation, ranges, all at once."""
    words = memory.view("u8")
    words[:6] = [
        rng.choice([0, 0, 1, root]),
        rng.choice([root, 5, PAGE]),
        rng.choice([48, 48, 57, 1]),
        0,
        1,
        0,
    ]
    if rng.random() < 0.3:
        words[:6] = [0x1000_0000, 0x1FFF_FFFF, 0x4000_0000, 0x4FFF_FFFF, 0, 0]


@pytest.mark.parametrize("seed", range(4))
async def test_any_request(emulated: Callable[..., Awaitable[Any]], seed: int) -> None:
    rng = random.Random(seed)
    machine = await emulated(buses=(1,), limits=Type1Limits(memlock=1 << 20))
    done, refused = 0, list[VfioError]()
    async with await machine.vfio.open_iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        async with await machine.vfio.bind_device(machine.names[0], iommufd) as device:
            await device.set_bus_master()
            memory = machine.memory.alloc(64 * PAGE)
            device.attach(ioas)
            objects = iommufd.file._file.objects
            for _ in range(3000):
                data(rng, memory, 0x1000_0000)
                request, struct = rng.choice(list(REQUESTS.items()))
                if struct in RARE and rng.random() < 0.9:
                    continue
                file: Any = device.file if struct.startswith("vfio") else iommufd.file
                try:
                    file.ioctl(request, command(rng, struct, memory.vaddr, objects))
                    done += 1
                except VfioError as error:
                    refused.append(error)
                assert address_of(ffi.from_buffer(memory)) == memory.vaddr
    assert done > 100
    assert {error.errno for error in refused} <= ERRNOS
    assert len(refused) > 100
    assert machine.memory.stats().pins == 0
    assert machine.kernel.vfio._user_account.locked == machine.kernel.vfio._account.locked == 0
    assert machine.kernel.devices[0].iommu_group.owner is None
