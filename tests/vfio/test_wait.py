"""Waiting for memory that a device writes: in C, and as coroutines."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.errors import DeadlineExceeded
from pvfio.vfio import Records, Word, wait_records, wait_word

pytestmark = pytest.mark.touches_c

DTYPES = [np.uint8, np.uint16, np.uint32, np.uint64]
RECORD = np.dtype([("head", "<u4"), ("status", "u1"), ("rest", "u1", (27,))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_look(dtype: Any) -> None:
    array = np.zeros(3, dtype)
    word = Word(array[1:2])
    top = 1 << 8 * array.itemsize - 1
    assert not word.look(top)
    array[1] = top
    assert word.look(top)
    assert word.value == top
    assert word.look(0, negate=True)
    assert not word.look(top, negate=True)
    array[0] = array[2] = 1
    assert not word.look(0)


def test_a_mask() -> None:
    array = np.array([0xAB], np.uint16)
    phase = Word(array, mask=1)
    assert phase.look(1)
    assert not phase.look(0xAB)
    array[0] = 0xAA
    assert phase.look(0)
    assert phase.value == 0xAA


BAD_WORDS = [
    np.zeros(2, np.uint32),
    np.zeros(0, np.uint32),
    np.zeros(1, np.int32),
    np.zeros(1, np.float32),
    np.zeros(9, np.uint8)[1:5].view(np.uint32) if np.zeros(9, np.uint8).ctypes.data % 4 == 0 else np.zeros(2),
]


@pytest.mark.parametrize("array", BAD_WORDS)
def test_what_is_no_word(array: Any) -> None:
    with pytest.raises(ValueError):
        Word(array)


@pytest.mark.parametrize(("size", "shift"), [(3, 0), (0, 0), (16, 0), (4, 1), (8, 4)])
def test_bad_words_in_c(size: int, shift: int) -> None:
    memory = ffi.new("uint64_t[4]")
    address = ffi.cast("uint8_t *", memory) + shift
    assert lib.pv_wait_word(address, size, 1, 1, 0, 0, ffi.new("uint64_t *")) == -22


def test_records_are_counted_whatever_their_order() -> None:
    records = np.zeros(70, RECORD)
    status = Records(records["status"])
    assert status.count == 70
    assert status.ready() == 0
    for i in (69, 3, 0):
        records["status"][i] = 1
    assert status.ready() == 3
    records["head"] = 0xFFFFFFFF
    assert status.ready() == 3
    records["status"] = 2
    assert status.ready() == 70
    assert Records(records["status"], mask=1).ready() == 0
    assert Records(records["status"][::-2]).ready() == 35
    assert Records(records["status"][:0]).ready() == 0


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint8), np.zeros(4, np.int8), np.zeros(4, np.uint16)])
def test_what_is_no_status(array: Any) -> None:
    with pytest.raises(ValueError):
        Records(array)


def test_a_blocking_wait_sees_another_thread() -> None:
    records = np.zeros(8, RECORD)
    start = threading.Event()

    def device() -> None:
        start.wait()
        for i in range(8):
            records["head"][i] = i
            records["status"][i] = 1

    thread = threading.Thread(target=device)
    thread.start()
    start.set()
    assert Records(records["status"]).ready(10_000_000_000) == 8
    assert list(records["head"]) == list(range(8))
    thread.join()


def test_a_blocking_wait_ends() -> None:
    assert Records(np.zeros(2, np.uint8)).ready(2_000_000) == 0
    assert not Word(np.zeros(1, np.uint32)).look(1, timeout_ns=2_000_000)


async def test_waiting_with_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()
    with pytest.raises(DeadlineExceeded):
        await wait_word(np.zeros(1, np.uint32), 1, deadline=3)
    with pytest.raises(DeadlineExceeded):
        await wait_records(np.array([1, 0], np.uint8), deadline=2, operation="reap", device="dsa0")
    assert trio.current_time() - start == pytest.approx(5, abs=0.01)
    with pytest.raises(DeadlineExceeded):
        await wait_word(np.zeros(1, np.uint32), 1, deadline=0)


async def test_waiting_for_another_task(autojump_clock: trio.testing.MockClock) -> None:
    array, records = np.zeros(1, np.uint16), np.zeros(3, RECORD)

    async def device() -> None:
        for i in range(3):
            await trio.sleep(1)
            records["status"][i] = 1
        await trio.sleep(1)
        array[0] = 0x8001

    async with trio.open_nursery() as nursery:
        nursery.start_soon(device)
        await wait_records(records["status"], deadline=60)
        assert trio.current_time() == pytest.approx(3, abs=0.01)
        assert await wait_word(array, 1, mask=1, deadline=60) == 0x8001
        assert trio.current_time() == pytest.approx(4, abs=0.01)


async def test_what_is_there_already_checkpoints() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await wait_word(np.ones(1, np.uint8), 1, deadline=1)
    assert scope.cancelled_caught
    assert await wait_word(np.ones(1, np.uint8), 0, negate=True, deadline=1) == 1


async def test_a_wait_can_be_cancelled() -> None:
    with trio.move_on_after(0.01) as scope:
        await wait_records(np.zeros(1, np.uint8), deadline=1000)
    assert scope.cancelled_caught


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_run_of_phase_bits(wanted: int) -> None:
    entries = np.full((6, 16), wanted ^ 1, np.uint8)
    first = ffi.cast("uint8_t *", ffi.from_buffer(entries)) + 14

    def run(count: int, least: int = 1) -> int:
        return int(lib.pv_wait_run(first, 16, count, 1, wanted, least, 1000))

    assert run(6) == 0
    entries[:2, 14] ^= 1
    entries[3, 14] ^= 1
    assert run(6) == run(6, least=6) == 2
    assert run(1) == 1
    assert run(0) == 0
    entries[2, 14] = wanted | 0xFE
    assert run(6) == 4


def test_an_eventfd() -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        assert lib.pv_wait_event(fd, 0) == 0
        assert lib.pv_wait_event(fd, 1000) == 0
        os.eventfd_write(fd, 3)
        assert lib.pv_wait_event(fd, 0) == 3
        assert lib.pv_wait_event(fd, 0) == 0
        writer = threading.Timer(0.01, os.eventfd_write, (fd, 1))
        writer.start()
        assert lib.pv_wait_event(fd, 60_000_000_000) == 1
        writer.join()
    finally:
        os.close(fd)
    assert lib.pv_wait_event(-1, 1000) == 0
