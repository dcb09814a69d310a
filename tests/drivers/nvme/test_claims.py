"""What a controller says of itself and the driver does not take at its word."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.drivers.nvme import NvmeDriver
from pvfio.drivers.nvme.identify import LbaFormat, parse_namespace
from pvfio.errors import DeviceFailed

pytestmark = pytest.mark.touches_c


async def test_larger_pages_than_those_of_the_lists(rig: Any) -> None:
    async with rig() as r:
        r.function.registers._cap |= 4 << lib.NVME_CAP_MPSMIN_SHIFT
        with pytest.raises(DeviceFailed, match="65536 bytes"):
            async with NvmeDriver(r.device):
                pass


@pytest.mark.parametrize("first", [1, 0xFFFFFFFF - 1024], ids=["the same again", "not in order"])
async def test_a_list_of_namespaces_that_does_not_end(
    running: Any, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    async def identify(cns: int, nsid: int = 0) -> bytes:
        numbers = list(range(first, first + 1024))
        return bytes(ffi.buffer(ffi.new("uint32_t[]", numbers if first == 1 else numbers[::-1])))

    async with running() as r:
        monkeypatch.setattr(r.nvme.admin, "identify", identify)
        with pytest.raises(DeviceFailed, match="in no order"):
            await r.nvme.namespace_list()


def test_more_formats_than_there_is_room_for() -> None:
    page = ffi.new("struct nvme_id_ns *", {"nsze": 1, "nlbaf": 255, "flbas": 0x6F})
    page.lbaf[63].ds = 12
    namespace = parse_namespace(1, bytes(ffi.buffer(page)))
    assert namespace is not None
    assert len(namespace.formats) == 64
    assert namespace.formats[63] == LbaFormat(4096, 0)
    assert namespace.block_size == 4096


async def test_a_shutdown_that_may_take_an_hour(
    rig: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never() -> bool:
        return False

    async with rig() as r:
        async with NvmeDriver(r.device) as nvme:
            nvme.controller = dataclasses.replace(nvme.controller, rtd3e=4000.0)
            monkeypatch.setattr(nvme._registers, "_shut_down", never)
            began = trio.current_time()
        assert 60 <= trio.current_time() - began < 61
        async with NvmeDriver(r.device) as nvme:
            await nvme.flush()
