"""The drivers, unchanged, on every backend: the same small cases over ``emu:`` and over ``vfio-user:``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import google_crc32c
import numpy as np
import pytest
import trio

import pvfio
from pvfio.drivers.dsa import DsaDriver, DsaError, WqConfig, descriptors
from pvfio.drivers.nvme import NvmeDriver, NvmeError
from tests.conformance.conftest import Serving

pytestmark = pytest.mark.touches_c

BLOCK = 4096
SIZE = 5 * 4096
UNMAPPED = 0x7000_0000
KINDS = ("emu", "vfio-user", "vfio-user, memory not shared")


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The sockets of a DSA and an NVMe controller of another process."""
    home = tmp_path_factory.mktemp("served")
    paths = {"dsa": str(home / "dsa"), "nvme": str(home / "nvme")}
    with Serving(
        "--device", f"dsa,socket={paths['dsa']}", "--device", f"nvme,socket={paths['nvme']},size=16M,lba=4096"
    ):
        yield paths


@pytest.fixture(params=KINDS)
def uris(request: pytest.FixtureRequest) -> dict[str, str]:
    """What to open: a DSA and an NVMe controller."""
    if request.param == "emu":
        return {"dsa": "emu:dsa?ram=64", "nvme": "emu:nvme?ram=64&size=16&lba=4096"}
    query = "?ram=64" if request.param == "vfio-user" else "?ram=64&share=no"
    paths = request.getfixturevalue("sockets")
    return {kind: f"vfio-user:{path}{query}" for kind, path in paths.items()}


def iova_of(buffer: Any) -> int:
    """Of a buffer that is mapped."""
    assert isinstance(buffer.iova, int)
    return buffer.iova


def noise(size: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@asynccontextmanager
async def nvme_at(uri: str, **options: Any) -> AsyncIterator[NvmeDriver]:
    with trio.fail_after(60):
        async with pvfio.open_device(uri) as device, NvmeDriver(device, **options) as nvme:
            yield nvme


@asynccontextmanager
async def dsa_at(uri: str, **wq: Any) -> AsyncIterator[DsaDriver]:
    with trio.fail_after(60):
        async with pvfio.open_device(uri) as device, DsaDriver(device, wqs=[WqConfig(**wq)]) as dsa:
            yield dsa


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_nvme_reads_what_it_wrote(uris: dict[str, str], completion: Any) -> None:
    async with nvme_at(uris["nvme"], completion=completion) as nvme:
        assert (nvme.namespaces[1].block_size, nvme.namespaces[1].blocks) == (BLOCK, 4096)
        container = nvme.device.container
        there = await container.alloc(64 * BLOCK, scattered=True)
        back = await container.alloc(64 * BLOCK)
        there[:] = noise(64 * BLOCK)
        await nvme.write(1, 100, there)
        await nvme.flush(1)
        await nvme.read(1, 100, back)
        assert np.array_equal(there, back)
        await nvme.queues[0].compare(1, 100, back)
        back[-1] ^= 1
        with pytest.raises(NvmeError, match="COMPARE_FAILED"):
            await nvme.queues[0].compare(1, 100, back)
        with pytest.raises(NvmeError, match="LBA_RANGE"):
            await nvme.read(1, 4096, await container.alloc(BLOCK))


async def test_nvme_by_the_array(uris: dict[str, str]) -> None:
    async with nvme_at(uris["nvme"], entries=64) as nvme:
        blocks = 48
        container, queue = nvme.device.container, nvme.queues[0]
        data = await container.alloc(blocks * BLOCK)
        data[:] = noise(blocks * BLOCK, 7)
        await nvme.write(1, 0, data)
        back = await container.alloc(blocks * BLOCK)
        lbas = np.random.default_rng(5).permutation(blocks).astype(np.uint64)
        iovas = np.uint64(iova_of(back)) + lbas * np.uint64(BLOCK)
        queue.submit_nowait(pvfio.abi.lib.NVME_CMD_READ, 1, lbas, 1, iovas)
        done = 0
        while done < blocks:
            completions = await queue.reap()
            assert not completions.status.any()
            done += len(completions.status)
        assert np.array_equal(data, back)


async def test_nvme_after_a_reset(uris: dict[str, str]) -> None:
    async with nvme_at(uris["nvme"]) as nvme:
        data = await nvme.device.container.alloc(BLOCK)
        data[:] = noise(BLOCK, 3)
        await nvme.write(1, 9, data)
        for _ in range(2):
            await nvme.reset()
            back = await nvme.device.container.alloc(BLOCK)
            await nvme.read(1, 9, back)
            assert np.array_equal(data, back)


async def test_nvme_does_not_reach_what_is_not_mapped(uris: dict[str, str]) -> None:
    async with nvme_at(uris["nvme"]) as nvme:
        queue = nvme.queues[0]
        queue.submit_nowait(
            pvfio.abi.lib.NVME_CMD_READ, 1, np.array([0], np.uint64), 1, np.array([UNMAPPED], np.uint64)
        )
        completions = await queue.reap()
        assert completions.status.all()
        buffer = await nvme.device.container.alloc(BLOCK)
        await nvme.read(1, 0, buffer)


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_dsa_moves_and_sums(uris: dict[str, str], completion: Any) -> None:
    async with dsa_at(uris["dsa"], completion=completion) as dsa:
        wq, container = dsa.wq(0), dsa.device.container
        source, target = await container.alloc(SIZE, scattered=True), await container.alloc(SIZE)
        source[:] = noise(SIZE)
        await wq.memmove(target[3:], source[5:], SIZE - 5)
        assert np.array_equal(target[3:-2], source[5:])
        assert await wq.crcgen(source, SIZE) == google_crc32c.value(source.tobytes())
        await wq.fill(target, 0x1122334455667788, SIZE)
        assert target.tobytes() == (0x1122334455667788).to_bytes(8, "little") * (SIZE // 8)


async def test_dsa_many_at_once(uris: dict[str, str]) -> None:
    """More descriptors than the work queue holds, and a batch of them."""
    async with dsa_at(uris["dsa"], size=8) as dsa:
        wq, container = dsa.wq(0), dsa.device.container
        pieces, step = 40, 512
        source, target = await container.alloc(pieces * step), await container.alloc(pieces * step)
        source[:] = noise(pieces * step)
        at = np.arange(0, pieces * step, step, dtype=np.uint64)
        descs = descriptors.memmove(
            np.uint64(iova_of(target)) + at[::-1], np.uint64(iova_of(source)) + at, step
        )
        await (await wq.submit(descs, keep=(source, target))).wait()
        expected = source.reshape(pieces, step)[::-1].reshape(-1)
        assert np.array_equal(target, expected)
        target[:] = 0
        await wq.batch(descs[:16], keep=(source, target))
        assert np.array_equal(target[-16 * step :], expected[-16 * step :])
        assert not target[: -16 * step].any()


async def test_dsa_reports_a_fault_and_goes_on(uris: dict[str, str]) -> None:
    async with dsa_at(uris["dsa"]) as dsa:
        wq = dsa.wq(0)
        buffer = await dsa.device.container.alloc(4096, write=False)
        with pytest.raises(DsaError) as caught:
            await wq.memmove(UNMAPPED, iova_of(buffer), 64)
        assert caught.value.fault_addr == UNMAPPED
        with pytest.raises(DsaError) as caught:
            await wq.fill(iova_of(buffer), 0, 64)
        assert caught.value.fault_addr == buffer.iova
        target = await dsa.device.container.alloc(4096)
        buffer[:] = 0x5A
        await wq.memmove(target, buffer, 4096)
        assert (target == 0x5A).all()


async def test_dsa_after_a_reset(uris: dict[str, str]) -> None:
    async with dsa_at(uris["dsa"], completion="interrupt") as dsa:
        buffer = await dsa.device.container.alloc(4096)
        for value in (1, 2):
            await dsa.reset()
            await dsa.wq(0).fill(buffer, bytes([value]), 4096)
            assert (buffer == value).all()
