"""COMPVAL, delta records, DUALCAST, TRANSL_FETCH and CFLUSH against numpy and plain Python, on both platforms and
both engines.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pvfio.drivers.dsa import Delta, DsaError, descriptors
from tests.drivers.dsa.conftest import cases

pytestmark = pytest.mark.touches_c

SIZE = 1 << 16
MEBIBYTE = 1 << 20
Kind = tuple[str, str]
LAYOUTS = ("4K", "scattered", "2M")
PARTS = 4 * len(LAYOUTS)  # platforms and engines, and these


def random_bytes(size: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


async def buffers(r: Any, count: int, layout: str = "4K", size: int = SIZE) -> list[Any]:
    """Buffers of ``size`` bytes in pages of their kind, full of random bytes."""
    made = []
    for seed in range(count):
        options = {"scattered": layout == "scattered", "align": 2 * MEBIBYTE if layout == "2M" else 4096}
        length = 2 * MEBIBYTE if layout == "2M" else size
        made.append((await r.container.alloc(length, **options))[:size])
        made[-1][:] = random_bytes(size, seed)
    return made


def first_difference(data: Any, pattern: int) -> int | None:
    period = np.frombuffer(pattern.to_bytes(8, "little"), np.uint8)
    different = np.flatnonzero(np.asarray(data) != np.resize(period, len(data)))
    return int(different[0]) if len(different) else None


def delta_record(first: bytes, second: bytes, room: int) -> tuple[bytes, int | None]:
    """The record by definition, and where it ran out of room."""
    record = b""
    for at in range(0, len(first), 8):
        if first[at : at + 8] != second[at : at + 8]:
            if len(record) + 10 > room:
                return record, at
            record += struct.pack("<H8s", at // 8, second[at : at + 8])
    return record, None


def applied(target: bytes, record: bytes) -> bytes:
    result = bytearray(target)
    for offset, data in struct.iter_unpack("<H8s", record):
        result[8 * offset : 8 * offset + 8] = data
    return bytes(result)


@pytest.mark.parametrize("pattern", [0, 0x0123456789ABCDEF, b"\x5a", b"ab", 2**64 - 1])
async def test_compval_finds_the_first_difference(running: Any, kind: Kind, pattern: Any) -> None:
    async with running(*kind) as r:
        (a,) = await buffers(r, 1)
        word = descriptors.pattern_of(pattern)
        await r.wq.fill(a[3:], pattern, SIZE - 3)
        assert await r.wq.compval(a[3:], pattern, SIZE - 3) is None
        for where in (3, 4, 10, 4095, 4096, 50000, SIZE - 1):
            a[where] ^= 1
            assert await r.wq.compval(a[3:], pattern, SIZE - 3) == where - 3 == first_difference(a[3:], word)
            a[where] ^= 1


async def test_a_delta_record_makes_the_second_out_of_the_first(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        a, b, delta = await buffers(r, 3, "scattered", 2 * SIZE)
        b[:SIZE] = a[:SIZE]
        assert await r.wq.create_delta(a, b, delta, SIZE) == Delta(0, True, SIZE)
        for where in (0, 8, 9, 4095, 4096, 30001, SIZE - 1):
            b[where] ^= 0x40
        found = await r.wq.create_delta(a, b, delta, SIZE)
        assert found == Delta(60, True, SIZE)
        expected, _ = delta_record(a[:SIZE].tobytes(), b[:SIZE].tobytes(), 80)
        assert delta[:60].tobytes() == expected
        await r.wq.apply_delta(a, delta, found.size, SIZE)
        assert np.array_equal(a[:SIZE], b[:SIZE])


async def test_a_delta_record_that_has_no_room(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        a, b, delta = await buffers(r, 3)
        before = delta.copy()
        found = await r.wq.create_delta(a, b, delta, 4096, max_delta_size=100)
        assert found == Delta(100, False, 80)
        assert np.array_equal(delta[100:], before[100:])
        await r.wq.apply_delta(a, delta, found.size, 4096)
        assert np.array_equal(a[:80], b[:80])
        assert not np.array_equal(a[80:88], b[80:88])
        assert await r.wq.create_delta(a, b, delta[:95], 64) == Delta(0, True, 64)


async def test_the_largest_delta_record(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        size = 512 << 10
        a, b = await buffers(r, 2, "scattered", size)
        delta = await r.container.alloc(size // 8 * 10)
        assert await r.wq.create_delta(a, b, delta, size) == Delta(size // 8 * 10, True, size)
        offsets = np.asarray(delta).reshape(-1, 10)[:, :2].copy().view("<u2")[:, 0]
        assert np.array_equal(offsets, np.arange(65536))
        await r.wq.apply_delta(a, delta, delta.nbytes, size)
        assert np.array_equal(a, b)


async def test_dualcast_reaches_both(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        src, one, two = await buffers(r, 3, "scattered")
        for at, size in ((0, SIZE), (100, 4000), (4095, 2), (17, 1), (7, 40000)):
            wanted = [np.array(one), np.array(two)]
            for buffer in wanted:
                buffer[at : at + size] = src[:size]
            await r.wq.dualcast(one[at:], two[at:], src, size)
            assert np.array_equal(one, wanted[0])
            assert np.array_equal(two, wanted[1])


async def test_translations_are_fetched(running: Any, kind: Kind) -> None:
    """What was fetched is found in the device's own cache afterwards, which ATS filled."""
    async with running(*kind) as r:
        (a,) = await buffers(r, 1, "scattered")
        await r.wq.transl_fetch(a, SIZE)
        bus = r.function.bus
        before = bus.tlb_stats(), bus.atc_stats()
        await r.wq.crcgen(a, SIZE)
        after = bus.tlb_stats(), bus.atc_stats()
        assert after[0].misses == before[0].misses
        assert after[1].requests == before[1].requests
        assert after[1].hits > before[1].hits
        with pytest.raises(DsaError) as caught:
            await r.wq.transl_fetch(0x7000_0000, 4096)
        assert (caught.value.fault_addr, caught.value.write) == (0x7000_0000, False)
        await r.wq.transl_fetch(a[100:], SIZE - 100, stride=16384)


async def test_a_cache_flush_changes_nothing(running: Any, kind: Kind) -> None:
    async with running(*kind) as r:
        (a,) = await buffers(r, 1)
        before = np.array(a)
        await r.wq.cflush(a, SIZE)
        assert np.array_equal(a, before)
        with pytest.raises(DsaError) as caught:
            await r.wq.cflush(a.iova + SIZE, 4096)
        assert caught.value.fault_addr == a.iova + SIZE


async def test_nowait_twins_leave_the_answer_in_the_record(running: Any) -> None:
    async with running() as r:
        a, b, delta = await buffers(r, 3)
        b[:4096] = a[:4096]
        b[123] ^= 1
        created = r.wq.create_delta_nowait(a, b, delta, 4096)
        assert created.poll()
        assert r.wq.delta_of(r.wq.check(created.records[0])) == Delta(10, True, 4096)
        assert r.wq.apply_delta_nowait(a, delta, 10, 4096).poll()
        assert np.array_equal(a[:4096], b[:4096])
        assert r.wq.dualcast_nowait(b, delta, a, 100).poll()
        assert np.array_equal(a[:100], delta[:100])
        compared = r.wq.compval_nowait(a, 0, 4096)
        assert compared.poll()
        assert compared.records[0]["result"] == 1
        assert r.wq.transl_fetch_nowait(a, SIZE).poll()
        assert r.wq.cflush_nowait(a, SIZE).poll()


MISTAKES: list[tuple[Any, type[Exception]]] = [
    (lambda wq, a: wq.compval(a, 1 << 64, 8), ValueError),
    (lambda wq, a: wq.compval(a, b"abc", 8), ValueError),
    (lambda wq, a: wq.compval(a, 0, 0), ValueError),
    (lambda wq, a: wq.create_delta(a, a, a.iova, 12), ValueError),
    (lambda wq, a: wq.create_delta(a, a, a.iova, 0), ValueError),
    (lambda wq, a: wq.create_delta(a.iova, a.iova, 0, (512 << 10) + 8), ValueError),
    (lambda wq, a: wq.create_delta(a, a, a[:70], 8), ValueError),
    (lambda wq, a: wq.create_delta(a, a, a, 8, max_delta_size=70), ValueError),
    (lambda wq, a: wq.create_delta(a, a, a, 8, max_delta_size=85), ValueError),
    (lambda wq, a: wq.create_delta(a, a, a, 8), DsaError),
    (lambda wq, a: wq.create_delta(a[1:], a, 0x1000, 8), DsaError),
    (lambda wq, a: wq.apply_delta(a, a[4096:], 0, 8), ValueError),
    (lambda wq, a: wq.apply_delta(a, a[4096:], 11, 8), ValueError),
    (lambda wq, a: wq.apply_delta(a, a[4096:], 10, 9), ValueError),
    (lambda wq, a: wq.apply_delta(a, a, 10, 8), DsaError),
    (lambda wq, a: wq.dualcast(a, a[4096:], a[8192:], 0), ValueError),
    (lambda wq, a: wq.dualcast(a, a[4097:], a[8192:], 8), DsaError),
    (lambda wq, a: wq.transl_fetch(a, 0), ValueError),
    (lambda wq, a: wq.cflush(a, SIZE + 1), ValueError),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
async def test_mistakes_are_refused_and_leave_the_queue_working(running: Any, number: int) -> None:
    action, error = MISTAKES[number]
    async with running() as r:
        a, b = await buffers(r, 2)
        before = np.array(a)
        with pytest.raises(error):
            await action(r.wq, a)
        assert np.array_equal(a, before)
        await r.wq.memmove(b, a, SIZE)
        assert np.array_equal(a, b)


CODES: list[tuple[Any, str]] = [
    (lambda a, b: descriptors.compval(a, 0, 8, expected_result=0, flags=0x80), "DSA_COMP_SUCCESS_PRED"),
    (lambda a, b: descriptors.create_delta(a, b, 0x1000, 64, 70), "DSA_COMP_DR_ERANGE"),
    (lambda a, b: descriptors.create_delta(a, b, 0x1000, 64, 81), "DSA_COMP_DR_ERANGE"),
    (lambda a, b: descriptors.create_delta(a, b, 0x1000, 0, 80), "DSA_COMP_XFER_ERANGE"),
    (lambda a, b: descriptors.create_delta(a, b, 0x1000, 0x80008, 80), "DSA_COMP_XFER_ERANGE"),
    (lambda a, b: descriptors.create_delta(a, b, 0x1000, 60, 80), "DSA_COMP_ADDR_ALIGN"),
    (lambda a, b: descriptors.create_delta(a[4:], b, 0x1000, 64, 80), "DSA_COMP_ADDR_ALIGN"),
    (lambda a, b: descriptors.create_delta(a, b[4:], 0x1000, 64, 80), "DSA_COMP_ADDR_ALIGN"),
    (lambda a, b: descriptors.create_delta(a, b, b[56:], 64, 80), "DSA_COMP_OVERLAP_BUFFERS"),
    (
        lambda a, b: descriptors.create_delta(a, b, 0x1000, 64, 80, expected_results=3, flags=0x80),
        "DSA_COMP_PAGE_FAULT_NOBOF",
    ),
    (lambda a, b: descriptors.apply_delta(a, b, 0, 64), "DSA_COMP_DR_ERANGE"),
    (lambda a, b: descriptors.apply_delta(a, b, 15, 64), "DSA_COMP_DR_ERANGE"),
    (lambda a, b: descriptors.apply_delta(a[4:], b, 10, 64), "DSA_COMP_ADDR_ALIGN"),
    (lambda a, b: descriptors.apply_delta(a, a[8:], 10, 64), "DSA_COMP_OVERLAP_BUFFERS"),
    (lambda a, b: descriptors.apply_delta(a, b, 20, 64), "DSA_COMP_DR_OFFSET_NOINC"),
    (lambda a, b: descriptors.apply_delta(a, b[100:], 10, 64), "DSA_COMP_DR_OFFSET_ERANGE"),
    (lambda a, b: descriptors.dualcast(a, b[1:], 0x1000, 8), "DSA_COMP_DCAST_ERR"),
    (lambda a, b: descriptors.dualcast(a, a[4096:], 0x1000, 5000), "DSA_COMP_OVERLAP_BUFFERS"),
    (lambda a, b: descriptors.transl_fetch(a, 8, flags=0x10000), "DSA_COMP_XFER_ERANGE"),
    (lambda a, b: descriptors.cflush(a, 8, flags=0x100), "DSA_COMP_INVALID_FLAGS"),
]


@pytest.mark.parametrize("number", range(len(CODES)))
async def test_each_completion_code(running: Any, number: int) -> None:
    make, name = CODES[number]
    async with running() as r:
        a, b = await buffers(r, 2)
        b[:20] = np.frombuffer(struct.pack("<HQHQ", 3, 1, 3, 2), np.uint8)
        b[100:110] = np.frombuffer(struct.pack("<HQ", 8, 1), np.uint8)
        submission = r.wq.submit_nowait(make(a, b), keep=(a, b))
        records = await submission.wait()
        with pytest.raises(DsaError) as caught:
            r.wq.check(records[0])
        assert caught.value.name == name


PLACE = st.one_of(st.integers(0, 64), st.integers(4080, 4110), st.integers(0, SIZE // 2))
LENGTH = st.one_of(st.integers(1, 200), st.integers(4000, 4200), st.integers(1, SIZE // 2))
WHERE = st.lists(st.integers(0, SIZE // 2 - 1), max_size=40)


async def failure(operation: Any) -> DsaError | None:
    try:
        await operation
    except DsaError as error:
        return error
    return None


def run_random(running: Any, kind: Kind, layout: str, count: int, property_of: Any) -> None:
    """One machine for all cases: ``property_of(run)`` makes the test that hypothesis runs, out of one that runs a
    coroutine function with the machine and its buffers.
    """

    async def main() -> None:
        async with running(*kind) as r:
            made = await buffers(r, count, layout)

            def run(body: Any, *args: Any) -> None:
                trio.from_thread.run(body, r, made, *args)

            await trio.to_thread.run_sync(property_of(run))

    trio.run(main)


@pytest.mark.parametrize("layout", LAYOUTS)
class TestRandom:
    """Each property of an operation with random sizes, places, contents and overlaps."""

    def test_compval(self, running: Any, kind: Kind, layout: str) -> None:
        def property_of(run: Any) -> Any:
            @cases(PARTS)
            @given(at=PLACE, size=LENGTH, pattern=st.integers(0, 2**64 - 1), where=WHERE)
            def test(at: int, size: int, pattern: int, where: list[int]) -> None:
                async def body(r: Any, made: Any) -> None:
                    a = made[0]
                    period = np.frombuffer(pattern.to_bytes(8, "little"), np.uint8)
                    a[at : at + size] = np.resize(period, size)
                    for place in where[:2]:
                        a[at + place % size] ^= 1 + place % 255
                    expected = first_difference(a[at : at + size], pattern)
                    assert await r.wq.compval(a[at:], pattern, size) == expected

                run(body)

            return test

        run_random(running, kind, layout, 1, property_of)

    def test_delta(self, running: Any, kind: Kind, layout: str) -> None:
        def property_of(run: Any) -> Any:
            @cases(PARTS)
            @given(
                at=PLACE,
                size=LENGTH,
                gap=st.integers(0, 9),
                where=WHERE,
                dense=st.booleans(),
                room=st.integers(8, 5000),
            )
            def test(at: int, size: int, gap: int, where: list[int], dense: bool, room: int) -> None:
                async def body(r: Any, made: Any) -> None:
                    a, b, delta = made
                    start, length = at // 8 * 8, -(-size // 8) * 8
                    first, second = a[start : start + length], b[:length]
                    second[:] = random_bytes(length, room) if dense else first
                    for place in where:
                        second[place % length] ^= 1 + place % 255
                    before = delta.tobytes()
                    expected, end = delta_record(first.tobytes(), second.tobytes(), 10 * room)
                    found = await r.wq.create_delta(
                        first, second, delta[gap:], length, max_delta_size=10 * room
                    )
                    assert found == Delta(len(expected), end is None, length if end is None else end)
                    assert delta.tobytes() == before[:gap] + expected + before[gap + len(expected) :]
                    if not expected:
                        return
                    target = first.tobytes()
                    await r.wq.apply_delta(first, delta[gap:], found.size, length)
                    assert first.tobytes() == applied(target, expected)
                    assert first[: found.bytes_compared].tobytes() == second[: found.bytes_compared].tobytes()

                run(body)

            return test

        run_random(running, kind, layout, 3, property_of)

    def test_apply(self, running: Any, kind: Kind, layout: str) -> None:
        """Records that nobody created: any offsets, in order or not, in range or not."""

        def property_of(run: Any) -> Any:
            @cases(PARTS)
            @given(
                offsets=st.lists(st.integers(0, SIZE // 8 + 2), min_size=1, max_size=60),
                ordered=st.booleans(),
                at=PLACE,
            )
            def test(offsets: list[int], ordered: bool, at: int) -> None:
                async def body(r: Any, made: Any) -> None:
                    a, delta = made
                    chosen = sorted(set(offsets)) if ordered else offsets
                    record = b"".join(
                        struct.pack("<HQ", o, 0x9E3779B97F4A7C15 * (o + 1) % 2**64) for o in chosen
                    )
                    good, name = len(chosen), None
                    for index, offset in enumerate(chosen):
                        if index and offset <= chosen[index - 1]:
                            good, name = index, "DSA_COMP_DR_OFFSET_NOINC"
                            break
                        if offset >= SIZE // 8:
                            good, name = index, "DSA_COMP_DR_OFFSET_ERANGE"
                            break
                    expected = applied(a.tobytes(), record[: 10 * good])
                    delta[at : at + len(record)] = np.frombuffer(record, np.uint8)
                    error = await failure(r.wq.apply_delta(a, delta[at:], len(record), SIZE))
                    assert (error and error.name) == name
                    assert error is None or error.bytes_completed == 10 * good
                    assert a.tobytes() == expected

                run(body)

            return test

        run_random(running, kind, layout, 2, property_of)

    def test_dualcast(self, running: Any, kind: Kind, layout: str) -> None:
        def property_of(run: Any) -> Any:
            @cases(PARTS)
            @given(src=PLACE, dst=PLACE, pages=st.integers(0, 7), size=LENGTH, same=st.booleans())
            def test(src: int, dst: int, pages: int, size: int, same: bool) -> None:
                async def body(r: Any, made: Any) -> None:
                    a, b, c = made
                    other = (dst + 4096 * pages) % (SIZE // 2) // 4096 * 4096 + dst % 4096
                    second = b if same else c
                    if dst >= SIZE // 2:
                        return
                    expected = [x.copy() for x in made]
                    overlap = same and abs(dst - other) < size
                    error = await failure(r.wq.dualcast(b[dst:], second[other:], a[src:], size))
                    assert (error and error.name) == ("DSA_COMP_OVERLAP_BUFFERS" if overlap else None)
                    if not overlap:
                        expected[1][dst : dst + size] = a[src : src + size]
                        expected[1 if same else 2][other : other + size] = a[src : src + size]
                    for got, want in zip(made, expected, strict=True):
                        assert np.array_equal(got, want)

                run(body)

            return test

        run_random(running, kind, layout, 3, property_of)

    def test_nothing_moves(self, running: Any, kind: Kind, layout: str) -> None:
        """TRANSL_FETCH and CFLUSH: every address that translates will do, and no byte changes."""

        def property_of(run: Any) -> Any:
            @cases(PARTS)
            @given(at=PLACE, size=LENGTH, stride=st.integers(0, 9000), flush=st.booleans())
            def test(at: int, size: int, stride: int, flush: bool) -> None:
                async def body(r: Any, made: Any) -> None:
                    before = made[0].tobytes()
                    if flush:
                        await r.wq.cflush(made[0][at:], size)
                    else:
                        await r.wq.transl_fetch(made[0][at:], size, stride=stride)
                    assert made[0].tobytes() == before

                run(body)

            return test

        run_random(running, kind, layout, 1, property_of)
