"""Submitting: room, order, back-pressure, and what is kept alive meanwhile."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.drivers.dsa import WqConfig, descriptors
from pvfio.errors import DeadlineExceeded, VfioError

pytestmark = pytest.mark.touches_c

SHARED = (WqConfig(size=8, shared=True),)
SMALL = (WqConfig(size=8),)
Kind = tuple[str, str]


@pytest.mark.parametrize("completion", ["polled", "interrupt", "hybrid"])
@pytest.mark.parametrize("wqs", [SMALL, SHARED], ids=["dedicated", "shared"])
async def test_an_array_longer_than_the_queue_goes_through(
    running: Any, kind: Kind, wqs: Any, completion: Any
) -> None:
    async with running(*kind, wqs=wqs) as r:
        r.wq.completion = completion
        a = await r.container.alloc(100 * 64)
        b = await r.container.alloc(100 * 64)
        a[:] = np.arange(100 * 64) % 251
        offsets = np.arange(100, dtype=np.uint64) * 64
        submission = await r.wq.submit(
            descriptors.memmove(b.iova + offsets, a.iova + offsets, 64), keep=(a, b)
        )
        records = await submission.wait()
        assert records["status"].tolist() == [1] * 100
        assert submission.done
        assert np.array_equal(a, b)
        assert r.wq.outstanding == 0


async def test_records_stand_in_the_order_of_the_descriptors(running: Any, kind: Kind) -> None:
    async with running(*kind, wqs=SMALL) as r:
        a = await r.container.alloc(4096)
        good, bad = descriptors.fill(a, 1, 8), descriptors.fill(0x1000, 1, 8)
        wanted = [1, 1, 0x83, 1, 0x83, 0x83, 1, 1, 1, 0x83, 1]
        array = descriptors.join(*(bad if status == 0x83 else good for status in wanted))
        records = await (await r.wq.submit(array)).wait()
        assert records["status"].tolist() == wanted


async def test_nowait_takes_no_more_than_there_is_room_for(running: Any) -> None:
    async with running(wqs=SMALL) as r:
        r.engine.stop_before(0)
        first = r.wq.submit_nowait(descriptors.noop(5))
        with pytest.raises(trio.WouldBlock):
            r.wq.submit_nowait(descriptors.noop(4))
        second = r.wq.submit_nowait(descriptors.noop(3))
        assert (r.wq.room, r.wq.outstanding) == (0, 8)
        with pytest.raises(trio.WouldBlock):
            r.wq.submit_nowait(descriptors.noop(1))
        with pytest.raises(trio.WouldBlock):
            r.wq.memmove_nowait(0x1000, 0x2000, 8)
        with pytest.raises(ValueError, match="8"):
            r.wq.submit_nowait(descriptors.noop(9))
        assert not first.poll()
        r.engine.resume()
        assert r.wq.poll() == [first, second]
        assert r.wq.poll() == []
        assert r.wq.room == 8
        assert await r.dsa.recover()  # nothing was dropped: no software error
        assert r.dsa.last_software_error is None


async def test_a_shared_queue_takes_what_fits_and_says_how_much(running: Any) -> None:
    async with running(wqs=(WqConfig(size=8, shared=True, threshold=5),)) as r:
        r.engine.stop_before(0)
        taken = r.wq.submit_nowait(descriptors.noop(8))
        assert 0 < taken.count < 8
        assert len(taken.records) == taken.count == r.wq.outstanding
        with pytest.raises(trio.WouldBlock):
            r.wq.submit_nowait(descriptors.noop(1))
        r.engine.resume()
        assert (await taken.wait())["status"].tolist() == [1] * taken.count


@pytest.mark.parametrize("wqs", [SMALL, SHARED], ids=["dedicated", "shared"])
async def test_submit_waits_for_room(running: Any, wqs: Any, autojump_clock: Any) -> None:
    async with running(wqs=wqs) as r:
        r.engine.stop_before(0)
        a = await r.container.alloc(4096)
        finished = []

        async def one(number: int) -> None:
            await r.wq.fill(a[number:], 7, 1)
            finished.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number)
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(1)
            assert finished == []
            assert r.wq.outstanding == 8
            r.engine.resume()
        assert sorted(finished) == list(range(20))
        assert np.all(np.asarray(a)[:20] == 7)


@pytest.mark.parametrize("wqs", [SMALL, SHARED], ids=["dedicated", "shared"])
async def test_a_deadline_bounds_the_wait_for_room(running: Any, wqs: Any, autojump_clock: Any) -> None:
    async with running(wqs=wqs) as r:
        r.engine.stop_before(0)
        blocker = r.wq.submit_nowait(descriptors.noop(8))
        began = trio.current_time()
        with pytest.raises(DeadlineExceeded, match="nothing"):
            await r.wq.submit(descriptors.noop(2), deadline=3, operation="nothing")
        assert trio.current_time() - began == pytest.approx(3, abs=0.1)
        assert not blocker.poll()
        r.engine.resume()
        assert blocker.poll()


async def test_memory_of_an_operation_in_flight_is_not_recycled(running: Any) -> None:
    async with running() as r:
        r.engine.stop_before(0)
        a = await r.container.alloc(4096)
        b = await r.container.alloc(4096)
        a[:] = 9
        target = b.vaddr
        submission = r.wq.memmove_nowait(b, a, 4096)
        del a, b
        others = [await r.container.alloc(4096) for _ in range(64)]
        assert target not in [other.vaddr for other in others]
        r.engine.resume()
        assert submission.poll()
        assert submission.keep == ()


async def test_slow_descriptors_do_not_mix_up_records(running: Any, kind: Kind) -> None:
    async with running(*kind, wqs=SMALL) as r:
        a = await r.container.alloc(1 << 20)
        b = await r.container.alloc(1 << 20)
        submissions = []
        for number in range(200):
            size = (1 << 20) if number % 10 == 0 else 8
            where = 0 if size > 8 else number % 1000
            bad = number % 7 == 3
            array = descriptors.memmove(0x1000 if bad else b[where:], a[where:], size)
            submissions.append((bad, await r.wq.submit(array)))
        for bad, submission in submissions:
            records = await submission.wait()
            assert int(records["status"][0]) == (0x83 if bad else 1)


@pytest.mark.parametrize("wqs", [SMALL, SHARED], ids=["dedicated", "shared"])
@pytest.mark.parametrize("count", [1, 3])
async def test_a_portal_that_cannot_be_written(
    running: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch, wqs: Any, count: int
) -> None:
    """As one of a server that does not read: at most the first descriptor arrives. Nothing is lost, and the buffers are
    the caller's.
    """
    async with running(wqs=wqs, grace=0.1) as r:
        a, b = await r.container.alloc(4096), await r.container.alloc(4096)
        moves = descriptors.memmove(b.iova + np.arange(count, dtype=np.uint64) * 64, a, 64)
        arrives = iter([count > 1, False])

        def deaf_after_the_first(store: Any) -> Any:
            def deaf(offset: int, items: Any) -> Any:
                if next(arrives):
                    store(offset, items[:1])
                    if len(items) == 1:
                        return True
                raise VfioError(errno.EAGAIN, "submission")

            return deaf

        with monkeypatch.context() as patch:
            for name in ("movdir64b", "enqcmd"):
                patch.setattr(r.wq._portals, name, deaf_after_the_first(getattr(r.wq._portals, name)))
            with pytest.raises(VfioError):
                await (r.wq.memmove(b, a, 64) if count == 1 else r.wq.submit(moves))
        assert (r.wq.outstanding, r.wq.room) == (0, r.wq.size)
        b[:] = 7
        await r.wq.drain()
        assert np.all(b == 7)
        await (await r.wq.submit(descriptors.noop(20))).wait()
        await r.dsa.reset()
        assert (r.wq.outstanding, r.wq.room) == (0, r.wq.size)
