"""Reading and writing: single commands, arrays of them, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.drivers.nvme import NvmeError
from pvfio.errors import DeviceFailed

pytestmark = pytest.mark.touches_c

BLOCK = 4096


def noise(size: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def addresses(buffer: Any, count: int, step: int = BLOCK) -> Any:
    return np.uint64(buffer.iova) + np.arange(count, dtype=np.uint64) * np.uint64(step)


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
@pytest.mark.parametrize("sgl", [True, False], ids=["sgl", "prp"])
async def test_what_was_written_is_read(running: Any, kind: Any, completion: str, sgl: bool) -> None:
    """A whole mebibyte, that is several commands where the controller takes less at once."""
    config = NvmeConfig(mdts_shift=6, queues=3)
    async with running(*kind, config, queues=2, completion=completion, sgl=sgl) as r:
        assert len(r.nvme.queues) == 2
        assert r.nvme.max_transfer == 64 * BLOCK
        data, back = await r.container.alloc(1 << 20), await r.container.alloc(1 << 20)
        data[:] = noise(1 << 20)
        await r.nvme.write(1, 3, data)
        await r.nvme.flush()
        await r.nvme.queues[1].read(1, 3, back)
        assert np.array_equal(data, back)
        assert r.queue.outstanding == 0


@pytest.mark.parametrize("offset", [0, 4, 512, BLOCK - 4])
@pytest.mark.parametrize("blocks", [1, 2, 3, 64])
async def test_a_buffer_may_begin_inside_a_page(running: Any, offset: int, blocks: int) -> None:
    for sgl in (True, False):
        async with running(config=NvmeConfig(mdts_shift=6), sgl=sgl) as r:
            whole = await r.container.alloc(65 * BLOCK)
            view = whole[offset : offset + blocks * BLOCK]
            view[:] = data = noise(blocks * BLOCK)
            await r.nvme.write(1, 0, view)
            whole[:] = 0
            await r.nvme.read(1, 0, view)
            assert np.array_equal(view, data)
            assert not whole[:offset].any()
            assert not whole[offset + blocks * BLOCK :].any()


async def test_arrays_of_commands(running: Any, kind: Any) -> None:
    """More commands than the rings have entries, several times around, in any order."""
    async with running(*kind, entries=16, completion="polled") as r:
        count = 100
        data, back = await r.container.alloc(count * BLOCK), await r.container.alloc(count * BLOCK)
        data[:] = noise(count * BLOCK)
        lbas = np.random.default_rng(2).permutation(count).astype(np.uint64)
        written = await r.queue.transfer(lib.NVME_CMD_WRITE, 1, lbas, 1, addresses(data, count))
        read = await r.queue.transfer(lib.NVME_CMD_READ, 1, lbas, 1, addresses(back, count))
        assert not written.any()
        assert not read.any()
        assert np.array_equal(data, back)
        await r.nvme.read(1, 0, back)
        assert np.array_equal(back.reshape(count, BLOCK)[lbas.astype(int)], data.reshape(count, BLOCK))


@pytest.mark.parametrize("sgl", [True, False], ids=["sgl", "prp"])
async def test_arrays_of_commands_of_different_lengths(running: Any, sgl: bool) -> None:
    async with running(config=NvmeConfig(mdts_shift=6), entries=16, sgl=sgl) as r:
        rng = np.random.default_rng(4)
        sizes = rng.integers(1, 9, 40).astype(np.uint16)
        ends = np.cumsum(sizes)
        total = int(ends[-1]) * BLOCK
        data, back = await r.container.alloc(total), await r.container.alloc(total + BLOCK)
        data[:] = noise(total)
        starts = (ends - sizes).astype(np.uint64)
        byte = starts * np.uint64(BLOCK)
        assert not (
            await r.queue.transfer(lib.NVME_CMD_WRITE, 1, starts, sizes, byte + np.uint64(data.iova))
        ).any()
        assert not (
            await r.queue.transfer(lib.NVME_CMD_READ, 1, starts, sizes, byte + np.uint64(back.iova + 512))
        ).any()
        assert np.array_equal(back[512 : 512 + total], data)


async def test_submitting_and_reaping_by_hand(running: Any) -> None:
    async with running(entries=8, completion="polled") as r:
        queue = r.queue
        buffer = await r.container.alloc(8 * BLOCK)
        lbas = np.arange(7, dtype=np.uint64)
        cids = queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas, 1, addresses(buffer, 7))
        assert sorted(cids.tolist()) == list(range(7))
        assert (queue.outstanding, queue.room) == (7, 0)
        with pytest.raises(trio.WouldBlock):
            queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas[:1], 1, addresses(buffer, 1))
        some = queue.reap_nowait(3)
        assert some.cids.tolist() == cids[:3].tolist()
        assert some.failed == 0
        rest = queue.reap_nowait()
        assert rest.cids.tolist() == cids[3:].tolist()
        assert len(queue.reap_nowait()) == 0
        assert len(await queue.reap()) == 0
        assert queue.outstanding == 0


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("sgl", [True, False])
async def test_one_by_one_and_by_the_array(running: Any, mapped: bool, sgl: bool) -> None:
    async with running(entries=8, completion="polled", sgl=sgl) as r:
        queue, count = r.queue, 25
        data, back = await r.container.alloc((count + 2) * BLOCK), await r.container.alloc(count * BLOCK)
        data[:] = noise(data.nbytes)
        lbas, iovas = np.arange(count, dtype=np.uint64), addresses(data, count) + np.uint64(8)

        def one(opcode: int, lba: int, iova: int) -> None:
            cid = queue.submit_one_nowait(opcode, 1, lba, 1, iova)
            assert queue.reap_one_nowait(1_000_000) == (cid, 0)

        if not mapped:  # as where no store in C reaches the BAR
            r.device.region(lib.VFIO_PCI_BAR0_REGION_INDEX).mmio = None
        for number in range(0, count, 5):
            one(lib.NVME_CMD_WRITE, number, int(iovas[number]))
            part = slice(number + 1, number + 4)
            queue.submit_nowait(lib.NVME_CMD_WRITE, 1, lbas[part], 1, iovas[part])
            assert len(queue.reap_nowait(3, least=3, wait_ns=1_000_000)) == 3
            one(lib.NVME_CMD_WRITE, number + 4, int(iovas[number + 4]))
        for number, iova in enumerate(addresses(back, count).tolist()):
            one(lib.NVME_CMD_READ, number, iova)
        assert np.array_equal(back, data[8 : 8 + count * BLOCK])
        with pytest.raises(OverflowError):
            queue.submit_one_nowait(lib.NVME_CMD_READ, 1, 1 << 64, 1, int(iovas[0]))
        assert (queue.outstanding, queue.room) == (0, queue.depth)
        assert queue.reap_one_nowait() is None
        cid = queue.submit_one_nowait(lib.NVME_CMD_READ, 1, r.nvme.namespaces[1].blocks, 1, int(iovas[0]))
        named, status = queue.reap_one_nowait(1_000_000) or (-1, 0)
        assert (named, status & lib.NVME_SC_MASK) == (cid, lib.NVME_SC_LBA_RANGE)


@pytest.mark.parametrize("reset", [False, True])
async def test_an_identifier_is_not_given_out_again_before_its_completion_was(
    running: Any, reset: bool
) -> None:
    async with running() as r:
        buffer = await r.container.alloc(8 * 4096)
        lbas = np.arange(4, dtype=np.uint64)
        first = r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas, 1, addresses(buffer, 4))
        await r.queue.flush(1)  # looks at the queue, and sees the reads complete
        if reset:
            await r.nvme.reset()
        second = r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas, 1, addresses(buffer, 4))
        assert not set(first.tolist()) & set(second.tolist())
        reaped: list[int] = []
        while len(reaped) < 8:
            reaped += (await r.queue.reap()).cids.tolist()
        assert reaped == first.tolist() + second.tolist()
        everything = r.queue.submit_nowait(
            lib.NVME_CMD_READ,
            1,
            np.zeros(r.queue.room, dtype=np.uint64),
            1,
            np.full(r.queue.room, buffer.iova),
        )
        assert len(set(everything.tolist())) == len(everything)
        while r.queue.outstanding:
            await r.queue.reap()


async def test_a_status_for_each_command(running: Any) -> None:
    async with running() as r:
        blocks = r.nvme.namespaces[1].blocks
        buffer = await r.container.alloc(3 * BLOCK)
        lbas = np.array([0, blocks, 1], dtype=np.uint64)
        cids = r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas, 1, addresses(buffer, 3))
        done = await r.queue.reap()
        assert done.failed == 1
        status = dict(zip(done.cids.tolist(), (done.status & lib.NVME_SC_MASK).tolist(), strict=True))
        assert [status[cid] for cid in cids.tolist()] == [0, lib.NVME_SC_LBA_RANGE, 0]
        with pytest.raises(NvmeError) as caught:
            await r.nvme.read(1, blocks, buffer)
        error = caught.value
        assert (error.name, error.sct, error.sc, error.nsid, error.lba) == ("LBA_RANGE", 0, 0x80, 1, blocks)
        assert error.dnr
        assert str(error).startswith(f"read {r.device.name} nsid 1 lba {blocks:#x}: LBA_RANGE")


async def test_an_address_that_does_not_translate(running: Any, kind: Any) -> None:
    async with running(*kind) as r:
        nowhere = np.array([1 << 40], dtype=np.uint64)
        status = await r.queue.transfer(lib.NVME_CMD_READ, 1, np.zeros(1, dtype=np.uint64), 1, nowhere)
        assert status[0] == lib.NVME_SC_DATA_XFER_ERROR | lib.NVME_STATUS_DNR


async def test_what_is_refused_before_it_is_submitted(running: Any) -> None:
    namespaces = (NamespaceSpec(size=1 << 20), NamespaceSpec(size=1 << 20, lba_shift=9))
    async with running(config=NvmeConfig(mdts_shift=2), namespaces=namespaces, entries=4) as r:
        buffer = await r.container.alloc(8 * BLOCK)
        unmapped = await r.container.alloc(BLOCK, map=False)
        refused: list[tuple[str, Any]] = [
            ("whole blocks", lambda: r.nvme.read(1, 0, buffer[:512])),
            ("whole blocks", lambda: r.nvme.read(2, 0, buffer[:100])),
            ("whole blocks", lambda: r.nvme.read(1, 0, buffer[:0])),
            ("four bytes", lambda: r.nvme.read(2, 0, buffer[2:514])),
            ("contiguous", lambda: r.nvme.read(1, 0, buffer[: 2 * BLOCK : 2])),
            ("not mapped", lambda: r.nvme.write(1, 0, unmapped)),
            ("no namespace 7", lambda: r.nvme.read(7, 0, buffer)),
            ("no block", lambda: r.nvme.read(1, -1, buffer)),
            ("are none", lambda: r.queue.write_zeroes(1, 0, 0)),
            ("one command", lambda: r.queue.readv(1, 0, [buffer])),
            ("256 ranges", lambda: r.queue.deallocate(1, [(0, 1)] * 257)),
            ("128 ranges", lambda: r.queue.copy(1, [(0, 1)] * 129, 8)),
        ]
        for message, operation in refused:
            with pytest.raises(ValueError, match=message):
                await operation()
        lbas = np.zeros(1, dtype=np.uint64)
        for blocks in (0, 65537, 5, np.array([1, 2]), np.array([0])):
            with pytest.raises(ValueError):
                r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas, blocks, addresses(buffer, 1))
        with pytest.raises(ValueError, match="queue of 3"):
            await r.queue.submit(lib.NVME_CMD_READ, 1, np.zeros(4, dtype=np.uint64), 1, addresses(buffer, 4))
        assert r.queue.outstanding == 0
        assert r.queue.room == r.queue.depth
        await r.nvme.read(2, 0, buffer[4:516])


async def test_a_device_of_another_class(rig: Any) -> None:
    from pvfio.drivers.nvme import NvmeDriver
    from pvfio.machine import DeviceSpec, Machine, MachineConfig

    config = MachineConfig(ram=64 << 20, engine="inline", devices=(DeviceSpec(kind="dsa"),))
    async with Machine(config) as machine, machine.open("dsa0") as device:
        with pytest.raises(DeviceFailed, match="not an NVMe controller"):
            async with NvmeDriver(device):
                pass


SHAPES: dict[str, dict[str, Any]] = {
    "fewer addresses": {"iovas": 2},
    "more addresses": {"iovas": 4},
    "fewer lengths": {"blocks": np.ones(2, dtype=np.uint16)},
    "a length of nothing": {"blocks": np.array([1, 0, 1], dtype=np.uint16)},
    "less metadata": {"metadata": np.zeros(2, dtype=np.uint64)},
    "metadata for one": {"metadata": np.zeros((3, 1), dtype=np.uint64)},
}


@pytest.mark.parametrize("sgl", [True, False], ids=["sgl", "prp"])
@pytest.mark.parametrize("wrong", SHAPES.values(), ids=SHAPES)
async def test_arrays_that_do_not_fit_each_other(
    running: Any, autojump_clock: Any, wrong: dict[str, Any], sgl: bool
) -> None:
    """Nothing is submitted, and no identifier is lost."""
    async with running(completion="polled", sgl=sgl) as r:
        buffer = await r.container.alloc(4 * BLOCK)
        iovas = addresses(buffer, wrong.get("iovas", 3))
        lbas = np.arange(3, dtype=np.uint64)
        blocks, metadata = wrong.get("blocks", 1), wrong.get("metadata")
        room = r.queue.room
        with pytest.raises(ValueError, match=r"values for|its number of blocks|its metadata"):
            r.queue.submit_nowait(lib.NVME_CMD_READ, 1, lbas, blocks, iovas, metadata=metadata)
        assert (r.queue.outstanding, r.queue.room) == (0, room)
        await r.nvme.read(1, 0, buffer)
