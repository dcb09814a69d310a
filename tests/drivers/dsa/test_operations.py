"""Every operation against numpy and an independent CRC, on both platforms and both engines."""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvfio.drivers.dsa import BatchError, DsaError, descriptors
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

SIZE = 3 * 4096
Kind = tuple[str, str]


def random_bytes(size: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


async def buffers(r: Any, *, scattered: bool = True) -> tuple[Any, Any]:
    a = await r.container.alloc(SIZE, scattered=scattered)
    b = await r.container.alloc(SIZE, scattered=scattered)
    a[:] = random_bytes(SIZE)
    b[:] = random_bytes(SIZE, 2)
    return a, b


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
async def test_memmove_moves_exactly_what_it_is_told(running: Any, kind: Kind, completion: Any) -> None:
    async with running(*kind) as r:
        r.wq.completion = completion
        a, b = await buffers(r)
        for src, dst, size in ((0, 0, SIZE), (1, 4095, 2), (100, 4000, 4096), (4096, 1, 1), (5, 7, SIZE - 7)):
            source, expected = np.array(a), np.array(b)
            expected[dst : dst + size] = source[src : src + size]
            await r.wq.memmove(b[dst:], a[src:], size)
            assert np.array_equal(b, expected)
            assert np.array_equal(a, source)


async def test_memmove_overlaps_both_ways(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        a, _ = await buffers(r)
        for src, dst in ((0, 100), (100, 0), (4096, 0), (0, 4096), (17, 17)):
            size = SIZE - max(src, dst)
            expected = np.array(a)
            expected[dst : dst + size] = np.array(a)[src : src + size]
            await r.wq.memmove(a[dst:], a[src:], size)
            assert np.array_equal(a, expected)


@pytest.mark.parametrize(
    ("pattern", "period"),
    [
        (0x0123456789ABCDEF, bytes.fromhex("efcdab8967452301")),
        (b"\x5a", b"\x5a"),
        (b"abcd", b"abcd"),
        (0, b"\0"),
    ],
)
async def test_fill_repeats_the_pattern_and_cuts_the_last_one(
    running: Any, kind: Kind, pattern: Any, period: bytes
) -> None:
    async with running(*kind) as r:
        a, _ = await buffers(r)
        expected = np.array(a)
        expected[3 : 3 + 5001] = np.resize(np.frombuffer(period, np.uint8), 5001)
        await r.wq.fill(a[3:], pattern, 5001)
        assert np.array_equal(a, expected)


async def test_compare_finds_the_first_difference(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        a, b = await buffers(r)
        b[:] = a
        assert await r.wq.compare(a, b, SIZE) is None
        for where in (0, 1, 4095, 4096, 9000, SIZE - 1):
            b[where] ^= 0x80
            b[SIZE - 1] ^= where != SIZE - 1
            assert await r.wq.compare(a, b, SIZE) == where
            assert await r.wq.compare(a, b, where or 1) == (None if where else 0)
            b[:] = a


async def test_crc_agrees_with_a_library_and_goes_on_from_a_seed(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        a, b = await buffers(r)
        whole = google_crc32c.value(a.tobytes())
        assert await r.wq.crcgen(a, SIZE) == whole
        first = await r.wq.crcgen(a, 5000)
        assert first == google_crc32c.value(a[:5000].tobytes())
        assert await r.wq.crcgen(a[5000:], SIZE - 5000, seed=first) == whole
        first = await r.wq.copy_crc(b, a, 777)
        assert await r.wq.copy_crc(b[777:], a[777:], SIZE - 777, seed=first) == whole
        assert np.array_equal(a, b)


async def test_noop_and_drain(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        await r.wq.noop()
        a, b = await buffers(r)
        submission = r.wq.memmove_nowait(b, a, SIZE)
        await r.wq.drain()
        assert submission.poll()
        assert np.array_equal(a, b)


async def test_nowait_twins_leave_the_answer_in_the_record(running: Any) -> None:
    async with running() as r:
        a, b = await buffers(r)
        assert r.wq.memmove_nowait(b, a, SIZE).poll()
        assert np.array_equal(a, b)
        compared = r.wq.compare_nowait(a, b, SIZE)
        assert compared.poll()
        assert r.wq.check(compared.records[0])["result"] == 0
        summed = r.wq.crcgen_nowait(a, SIZE)
        copied = r.wq.copy_crc_nowait(b, a, SIZE)
        assert summed.poll()
        assert copied.poll()
        assert (
            summed.records[0]["crc_val"] == copied.records[0]["crc_val"] == google_crc32c.value(a.tobytes())
        )
        assert r.wq.fill_nowait(b, b"\x11", SIZE).poll()
        assert np.all(b == 0x11)


async def test_a_batch_is_one_submission(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        a, b = await buffers(r)
        offsets = np.arange(12, dtype=np.uint64) * 1024
        moves = descriptors.memmove(b.iova + offsets, a.iova + offsets, 1024)
        records = await r.wq.batch(moves)
        assert records["status"].tolist() == [1] * 12
        assert np.array_equal(a, b)
        batch = await r.wq.alloc_batch(4)
        descriptors.fill(a.iova + offsets[:4], 0, 1024, out=batch.descriptors)
        for _ in range(3):
            a[:] = 1
            assert (await r.wq.batch(batch))["status"].tolist() == [1] * 4
            assert not a[:4096].any()
            assert a[4096:].all()
        assert (await r.wq.batch(batch, records=False))["status"].tolist() == [0] * 4
        submission = r.wq.batch_nowait(batch, 2)
        await submission.wait()
        assert batch.records["status"].tolist()[:2] == [1, 1]


async def test_a_batch_with_a_bad_member_says_which(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        a, b = await buffers(r)
        members = descriptors.join(
            descriptors.memmove(b, a, 4096),
            descriptors.memmove(b, 0x1000, 4096),
            descriptors.memmove(b[4096:], a[4096:], 4096),
        )
        with pytest.raises(BatchError) as caught:
            await r.wq.batch(members)
        error = caught.value
        assert error.name == "DSA_COMP_BATCH_FAIL"
        assert error.failed == [1]
        assert error.descs_completed == 3
        assert error.records["status"].tolist() == [1, 3, 1]
        assert error.records["fault_addr"][1] == 0x1000
        assert "member 1: DSA_COMP_PAGE_FAULT_NOBOF" in str(error)
        assert np.array_equal(a[:8192], b[:8192])


MISTAKES: list[tuple[Any, type[Exception]]] = [
    (lambda wq, a: wq.memmove(a, a, 0), ValueError),
    (lambda wq, a: wq.memmove(a, a, -1), ValueError),
    (lambda wq, a: wq.memmove(a, a, SIZE + 1), ValueError),
    (lambda wq, a: wq.memmove(a, a[::2], 100), ValueError),
    (lambda wq, a: wq.memmove(a, np.zeros(4096, np.uint8), 100), ValueError),
    (lambda wq, a: wq.memmove(a.iova, a.iova, wq.max_transfer + 1), ValueError),
    (lambda wq, a: wq.noop(flags=1 << 24), ValueError),
    (lambda wq, a: wq.fill(a, b"abc", 10), ValueError),
    (lambda wq, a: wq.fill(a, 1 << 64, 10), ValueError),
    (lambda wq, a: wq.fill(a, -1, 10), ValueError),
    (lambda wq, a: wq.batch(descriptors.noop(1)), ValueError),
    (lambda wq, a: wq.batch(descriptors.noop(2), 3), ValueError),
    (lambda wq, a: wq.batch(descriptors.noop(wq.max_batch + 1)), ValueError),
    (lambda wq, a: wq.batch(np.zeros(4)), ValueError),
    (lambda wq, a: wq.alloc_batch(1), ValueError),
    (lambda wq, a: wq.alloc_batch(wq.max_batch + 1), ValueError),
    (lambda wq, a: wq.submit(np.zeros((2, 2), descriptors.noop().dtype)), ValueError),
    (lambda wq, a: wq.submit(descriptors.empty(0)), ValueError),
    (lambda wq, a: wq.noop(flags=0x2), DsaError),
    (lambda wq, a: wq.copy_crc(a, a, 100), DsaError),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
async def test_mistakes_are_refused_and_leave_the_queue_working(running: Any, number: int) -> None:
    action, error = MISTAKES[number]
    async with running() as r:
        a, b = await buffers(r)
        before = np.array(a)
        with pytest.raises(error):
            await action(r.wq, a)
        assert np.array_equal(a, before)
        await r.wq.memmove(b, a, SIZE)
        assert np.array_equal(a, b)
        assert r.wq.outstanding == 0


async def test_completion_is_one_of_three(running: Any) -> None:
    async with running() as r:
        with pytest.raises(ValueError, match="completion"):
            r.wq.completion = "sometimes"


async def test_operations_of_many_tasks_at_once(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:

        async def work(seed: int) -> None:
            a = await r.container.alloc(4096)
            b = await r.container.alloc(4096)
            for turn in range(10):
                a[:] = random_bytes(4096, 100 * seed + turn)
                await r.wq.memmove(b, a, 4096)
                assert np.array_equal(a, b)
                assert await r.wq.crcgen(b, 4096) == google_crc32c.value(a.tobytes())

        async with trio.open_nursery() as nursery:
            for seed in range(8):
                nursery.start_soon(work, seed)


MOVE = st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1), st.integers(1, SIZE))


@settings(max_examples=tries(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(MOVE, min_size=2, max_size=20), scattered=st.booleans())
def test_random_batches_of_fenced_moves_do_what_numpy_does(
    running: Any, moves: list[tuple[int, int, int]], scattered: bool
) -> None:
    fence = 1

    async def main() -> None:
        async with running() as r:
            a, b = await buffers(r, scattered=scattered)
            expected = [np.array(a), np.array(b)]
            members = descriptors.empty(len(moves))
            for index, (src, dst, size) in enumerate(moves):
                length = min(size, SIZE - max(src, dst))
                source, target = (a, b) if index % 2 else (b, a)
                descriptors.memmove(
                    target[dst:], source[src:], length, flags=fence, out=members[index : index + 1]
                )
                value = expected[1 - index % 2][src : src + length].copy()
                expected[index % 2][dst : dst + length] = value
            await r.wq.batch(members)
            assert np.array_equal(a, expected[0])
            assert np.array_equal(b, expected[1])

    trio.run(main)
