"""The commands of the NVM command set besides read and write, and blocks with metadata and protection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec
from pvfio.drivers.nvme import NvmeError

pytestmark = pytest.mark.touches_c

BLOCK = 4096


def noise(size: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


async def filled(r: Any, blocks: int = 16) -> Any:
    """A buffer of noise that is in the first blocks of the namespace too."""
    buffer = await r.container.alloc(blocks * BLOCK)
    buffer[:] = noise(blocks * BLOCK)
    await r.nvme.write(1, 0, buffer)
    return buffer


async def blocks_of(r: Any, first: int, count: int) -> Any:
    buffer = await r.container.alloc(count * BLOCK)
    await r.nvme.read(1, first, buffer)
    return np.array(buffer)


async def failure(operation: Any) -> str:
    with pytest.raises(NvmeError) as caught:
        await operation
    return caught.value.name


async def test_compare(running: Any, kind: Any) -> None:
    async with running(*kind) as r:
        data = await filled(r, 4)
        await r.queue.compare(1, 0, data)
        data[5000] ^= 1
        assert await failure(r.queue.compare(1, 0, data)) == "COMPARE_FAILED"


async def test_compare_and_write(running: Any, kind: Any) -> None:
    async with running(*kind) as r:
        old = await filled(r, 2)
        new = await r.container.alloc(2 * BLOCK)
        new[:] = noise(2 * BLOCK, 2)
        await r.queue.compare_and_write(1, 0, old, new)
        assert np.array_equal(await blocks_of(r, 0, 2), new)
        assert await failure(r.queue.compare_and_write(1, 0, old, old)) == "COMPARE_FAILED"
        assert np.array_equal(await blocks_of(r, 0, 2), new)
        assert r.queue.outstanding == 0
        with pytest.raises(ValueError, match="compared"):
            await r.queue.compare_and_write(1, 0, old, new[:BLOCK])


async def test_compare_and_write_round_the_ring(running: Any) -> None:
    """The pair stays together where the ring's memory ends."""
    async with running(entries=4) as r:
        data = await filled(r, 1)
        for _ in range(6):
            await r.queue.compare_and_write(1, 0, data, data)
            await r.queue.flush(1)


@pytest.mark.parametrize("deallocate", [False, True])
async def test_write_zeroes(running: Any, kind: Any, deallocate: bool) -> None:
    async with running(*kind) as r:
        data = np.array(await filled(r))
        await r.queue.write_zeroes(1, 3, 5, deallocate=deallocate)
        data[3 * BLOCK : 8 * BLOCK] = 0
        assert np.array_equal(await blocks_of(r, 0, 16), data)


async def test_deallocate(running: Any, kind: Any) -> None:
    async with running(*kind) as r:
        data = np.array(await filled(r))
        await r.queue.deallocate(1, [(1, 2), (8, 4)])
        data[BLOCK : 3 * BLOCK] = 0
        data[8 * BLOCK : 12 * BLOCK] = 0
        assert np.array_equal(await blocks_of(r, 0, 16), data)


async def test_copy(running: Any, kind: Any) -> None:
    async with running(*kind) as r:
        data = np.array(await filled(r)).reshape(16, BLOCK)
        await r.queue.copy(1, [(2, 3), (0, 1)], 20)
        copied = (await blocks_of(r, 20, 4)).reshape(4, BLOCK)
        assert np.array_equal(copied, data[[2, 3, 4, 0]])


async def test_write_uncorrectable_and_verify(running: Any, kind: Any) -> None:
    async with running(*kind) as r:
        data = await filled(r)
        await r.queue.verify(1, 0, 16)
        await r.queue.write_uncorrectable(1, 4, 2)
        assert await failure(r.queue.verify(1, 0, 16)) == "READ_ERROR"
        assert await failure(r.queue.read(1, 5, data[:BLOCK])) == "READ_ERROR"
        await r.queue.read(1, 6, data[:BLOCK])
        await r.nvme.write(1, 4, data[: 2 * BLOCK])
        await r.queue.verify(1, 0, 16)


@pytest.mark.parametrize("sgl", [True, False], ids=["sgl", "prp"])
async def test_vectored(running: Any, sgl: bool) -> None:
    async with running(sgl=sgl) as r:
        data = await filled(r)
        pieces = [await r.container.alloc(n * BLOCK) for n in (1, 3, 4)]
        await r.queue.readv(1, 2, pieces)
        assert np.array_equal(np.concatenate(pieces), data[2 * BLOCK : 10 * BLOCK])
        await r.queue.writev(1, 30, pieces[::-1], fua=True)
        assert np.array_equal(await blocks_of(r, 30, 8), np.concatenate(pieces[::-1]))
        await r.queue.readv(1, 0, pieces[:1])
        await r.queue.readv(1, 0, [pieces[1][:BLOCK], pieces[2][BLOCK : 2 * BLOCK]])
        assert np.array_equal(pieces[2][BLOCK : 2 * BLOCK], data[BLOCK : 2 * BLOCK])
        odd = [pieces[1][: BLOCK - 512], pieces[2][: BLOCK + 512]]
        if sgl:
            await r.queue.readv(1, 0, odd)
            assert np.array_equal(np.concatenate(odd), data[: 2 * BLOCK])
        else:
            with pytest.raises(ValueError, match="page boundaries"):
                await r.queue.readv(1, 0, odd)
        with pytest.raises(ValueError, match=r"one command|buffers"):
            await r.queue.readv(1, 0, [pieces[0]] * 600)


async def test_fua(running: Any) -> None:
    async with running() as r:
        buffer = await r.container.alloc(BLOCK)
        buffer[:] = 1
        await r.nvme.write(1, 0, buffer, fua=True)
        assert np.all(await blocks_of(r, 0, 1) == 1)


@pytest.mark.parametrize("extended", [True, False])
async def test_metadata(running: Any, extended: bool) -> None:
    spec = NamespaceSpec(size=1 << 20, lba_shift=9, metadata=8, extended=extended)
    async with running(namespaces=(spec,)) as r:
        namespace = r.nvme.namespaces[1]
        assert (namespace.metadata, namespace.extended) == (8, extended)
        size = 16 * namespace.transfer_size
        data, back = await r.container.alloc(size), await r.container.alloc(size)
        tags, tags_back = await r.container.alloc(128), await r.container.alloc(128)
        data[:], tags[:] = noise(size), noise(128, 2)
        with_tags: dict[str, Any] = {} if extended else {"metadata": tags}
        await r.queue.write(1, 0, data, **with_tags)
        await r.queue.read(1, 0, back, **({} if extended else {"metadata": tags_back}))
        assert np.array_equal(data, back)
        assert extended or np.array_equal(tags, tags_back)
        if not extended:
            with pytest.raises(ValueError, match="metadata"):
                await r.queue.read(1, 0, back, metadata=tags[:64])


async def test_protection_information(running: Any) -> None:
    """PRACT: the controller makes the tuples and checks them; a wrong tag in what it reads is an error."""
    spec = NamespaceSpec(size=1 << 20, lba_shift=9, metadata=8, protection=1)
    async with running(namespaces=(spec,)) as r:
        data = await r.container.alloc(16 * 512)
        data[:] = noise(16 * 512)
        control = int(lib.NVME_RW_PRACT)
        await r.queue.write(1, 0, data, control=control)
        await r.queue.read(1, 0, data, control=control | int(lib.NVME_RW_PRCHK_GUARD))
        tags = await r.container.alloc(128)
        await r.queue.read(1, 0, data, metadata=tags)
        assert tags.reshape(16, 8)[:, :2].any()
        tags[0] ^= 1
        wrong = r.queue.write(1, 0, data, metadata=tags, control=int(lib.NVME_RW_PRCHK_GUARD))
        assert await failure(wrong) == "GUARD_CHECK"


async def test_a_read_only_namespace(running: Any) -> None:
    async with running(namespaces=(NamespaceSpec(size=1 << 20, read_only=True),)) as r:
        buffer = await r.container.alloc(BLOCK)
        await r.nvme.read(1, 0, buffer)
        assert await failure(r.nvme.write(1, 0, buffer)) in ("NS_WRITE_PROTECTED", "READ_ONLY")
