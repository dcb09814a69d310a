"""``emu:nvme?...``: the words of the URI reach the controller."""

from __future__ import annotations

from pathlib import Path

import pytest

import pvfio
from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.open_nvme import nvme_options

pytestmark = pytest.mark.touches_c


def test_words() -> None:
    made = nvme_options({"size": "8", "lba": "512", "pi": "1", "namespaces": "2", "queues": "4", "seed": "7"})
    spec = NamespaceSpec(size=8 << 20, lba_shift=9, metadata=8, protection=1)
    assert made == {"config": NvmeConfig(queues=4), "namespaces": (spec, spec), "seed": 7}


def test_an_image_has_its_own_size_and_small_blocks() -> None:
    (spec,) = nvme_options({"image": "/x", "read_only": "1"})["namespaces"]
    assert (spec.image, spec.size, spec.lba_shift, spec.read_only) == ("/x", 0, 9, True)


@pytest.mark.parametrize(
    "query",
    [
        "size=lots",
        "size=0",
        "lba=1000",
        "pi=2",
        "metadata=5",
        "read_only=yes",
        "namespaces=-1",
        "namespaces=2&image=/dev/null",
        "image=/dev/null&metadata=8",
        "queues=65",
        "volatile_cache=1",
        "colour=red",
        "seed=x",
    ],
)
async def test_bad_words(query: str) -> None:
    with pytest.raises(ValueError):
        async with pvfio.open_device(f"emu:nvme?{query}"):
            pass


async def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with pvfio.open_device(f"emu:nvme?image={tmp_path}/none"):
            pass


async def test_opens(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    async with pvfio.open_device(f"emu:nvme?image={image}&engine=inline&ram=64&platform=amd") as device:
        assert await device.region(0).read(lib.NVME_REG_VS, 4) == lib.NVME_VS_2_0
