"""The data path where it lives: on the bare function and behind the IOMMU of both platforms, inline and threaded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from pvfio.abi import dtype_of, lib
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import DNR, PLACES, Place, Rig, running

pytestmark = pytest.mark.touches_c
places = pytest.mark.parametrize(("place", "engine"), PLACES)
PAGE = 4096
NOWHERE = 1 << 45
LIST = 0x80000  # in the rig's memory


@asynccontextmanager
async def written(place: Place, engine: EngineKind) -> AsyncIterator[tuple[Rig, bytes]]:
    """A rig whose first eight blocks have been written."""
    async with running(place=place, engine=engine) as rig:
        content = np.random.default_rng(1).integers(0, 256, 8 * PAGE, np.uint8).tobytes()
        for lba in range(0, 8, 2):
            part = content[lba * PAGE : (lba + 2) * PAGE]
            assert (await rig.io(lib.NVME_CMD_WRITE, data=part, cdw10=lba, cdw12=1)).status == 0
        yield rig, content


@places
async def test_every_command(place: Place, engine: EngineKind) -> None:
    """Each does its work, in an order that lets the next one see it."""
    async with written(place, engine) as (rig, content):

        async def check(lba: int, wanted: bytes) -> None:
            assert (await rig.io(lib.NVME_CMD_READ, cdw10=lba)).status == 0
            assert rig.data[:PAGE].tobytes() == wanted

        def block(lba: int) -> bytes:
            return content[lba * PAGE : (lba + 1) * PAGE]

        await check(3, block(3))
        assert (await rig.io(lib.NVME_CMD_COMPARE, data=block(3), cdw10=3)).status == 0
        failed = await rig.io(lib.NVME_CMD_COMPARE, data=block(2), cdw10=3)
        assert failed.status == lib.NVME_SC_COMPARE_FAILED | DNR
        assert (await rig.io(lib.NVME_CMD_VERIFY, cdw12=7)).status == 0
        source = np.zeros(1, dtype_of("struct nvme_copy_range"))
        source["slba"] = 2
        assert (await rig.io(lib.NVME_CMD_COPY, data=source.tobytes(), cdw10=100)).status == 0
        await check(100, block(2))
        assert (await rig.io(lib.NVME_CMD_WRITE_UNCOR, cdw10=4)).status == 0
        assert (await rig.io(lib.NVME_CMD_READ, cdw10=4)).status == lib.NVME_SC_READ_ERROR
        assert (await rig.io(lib.NVME_CMD_WRITE_ZEROES, cdw10=4)).status == 0
        await check(4, bytes(PAGE))
        away = np.zeros(1, dtype_of("struct nvme_dsm_range"))
        away["slba"], away["nlb"] = 5, 1
        done = await rig.io(lib.NVME_CMD_DSM, data=away.tobytes(), cdw11=lib.NVME_DSM_AD)
        assert done.status == 0
        await check(5, bytes(PAGE))
        assert (await rig.io(lib.NVME_CMD_FLUSH)).status == 0
        await check(6, block(6))


SGL = {"flags": lib.NVME_CMD_SGL_METABUF}
LAST = (lib.NVME_SGL_LAST_SEGMENT << 4) << 56


@places
@pytest.mark.parametrize("opcode", [lib.NVME_CMD_READ, lib.NVME_CMD_WRITE])
@pytest.mark.parametrize(
    "pointer",
    [
        {"prp1": NOWHERE},
        {"prp2": NOWHERE, "cdw12": 1},
        {"prp2": NOWHERE, "cdw12": 3},
        {"list": NOWHERE, "cdw12": 3},
        {"prp1": NOWHERE, "prp2": PAGE, **SGL},
        {"prp1": NOWHERE, "prp2": 16 | LAST, **SGL},
    ],
    ids=["page", "second page", "list", "page in a list", "SGL", "SGL segment"],
)
async def test_pointers_that_do_not_translate(
    place: Place, engine: EngineKind, opcode: int, pointer: dict[str, Any]
) -> None:
    """Data Transfer Error, and the controller goes on."""
    fields = dict(pointer)
    async with written(place, engine) as (rig, content):
        if "list" in fields:
            rig.memory[LIST : LIST + 24].view(np.uint64)[:] = rig.iova + PAGE * 32, fields.pop("list"), 0
            fields["prp2"] = rig.iova + LIST
        failed = await rig.io(opcode, **fields)
        assert failed.status == lib.NVME_SC_DATA_XFER_ERROR | DNR
        assert (await rig.io(lib.NVME_CMD_READ, cdw10=7)).status == 0
        assert rig.data[:PAGE].tobytes() == content[7 * PAGE :]
        assert not rig.csts & lib.NVME_CSTS_CFS
