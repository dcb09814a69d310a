"""Many moves at once, against the same moves one by one: bytes, results and faults, whatever each of them meets."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pvfio.abi import ffi, lib
from pvfio.pagetable import Perm
from pvfio.silicon import READ, WRITE, BusMaster, DmaAborted, TableBus
from tests.far_memory import FarMemory
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

PAGE = 4096
BASE = 0x10_0000
BIG = 2 * lib.PV_SECTION_BYTES  # one range of this size, before single pages
PAGES = 8
READ_ONLY, WRITE_ONLY, HOLE = BIG + 2 * PAGE, BIG + 4 * PAGE, BIG + 6 * PAGE
SIZE = BIG + PAGES * PAGE
MEDIA = 1 << 19

Bytes = NDArray[np.uint8]
Move = tuple[int, int, int, bool]  # host offset, media offset, bytes, towards the host


def aligned(size: int, seed: int | None = None) -> Bytes:
    """Noise, or zeros, from a page boundary on, as a namespace is: only whole lines can go past the caches."""
    raw = np.zeros(size + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    found = raw[start : start + size]
    if seed is not None:
        found[:] = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return found


def open_bus(memory: Bytes) -> TableBus:
    bus = TableBus()
    bus.map(BASE, memory[:BIG])
    for at in range(BIG, SIZE, PAGE):
        if at != HOLE:
            perm = {READ_ONLY: READ, WRITE_ONLY: WRITE}.get(at, READ | WRITE)
            bus.map(BASE + at, memory[at : at + PAGE], perm)
    return bus


def transfer(bus: BusMaster, moves: list[Move], media: Bytes) -> list[int]:
    """The results of all of them at once."""
    array = ffi.new("struct pv_transfer[]", len(moves))
    start = ffi.cast("uint8_t *", ffi.from_buffer(media))
    for one, (host, at, n, to_host) in zip(array, moves, strict=True):
        one.iova, one.bytes, one.n, one.perm, one.result = (
            BASE + host,
            start + at,
            n,
            WRITE if to_host else READ,
            1,
        )
    lib.pv_bus_transfer(bus.ptr, array, len(moves))
    return [int(one.result) for one in array]


def one_by_one(bus: BusMaster, moves: list[Move], memory: Bytes, media: Bytes) -> list[int]:
    results = []
    for host, at, n, to_host in moves:
        try:
            if to_host:
                bus.write(BASE + host, media[at : at + n].tobytes())
            else:
                media[at : at + n] = np.frombuffer(bus.read(BASE + host, n), np.uint8)
            results.append(0)
        except DmaAborted as aborted:
            if not to_host:
                media[at : at + aborted.done] = memory[host : host + aborted.done]
            results.append(-errno.EFAULT)
    return results


@st.composite
def a_move(draw: st.DrawFn) -> Move:
    n = draw(st.one_of(st.sampled_from([512, PAGE, 8192, 65536, 65537]), st.integers(0, BIG + PAGE)))
    host = draw(st.one_of(st.sampled_from([0, PAGE, BIG, READ_ONLY, WRITE_ONLY, HOLE]), st.integers(0, SIZE)))
    at = draw(st.one_of(st.integers(0, 15).map(lambda page: page * PAGE), st.integers(0, MEDIA - BIG - PAGE)))
    return host, at, n, draw(st.booleans())


@settings(max_examples=tries(150), deadline=None)
@given(moves=st.lists(a_move(), max_size=40), seed=st.integers(0, 1 << 32))
def test_as_one_by_one(moves: list[Move], seed: int) -> None:
    """In their order, and as far as the page that does not translate."""
    memory, media = aligned(SIZE, seed), aligned(MEDIA, seed + 1)
    expected, expected_media = memory.copy(), media.copy()
    bus, reference = open_bus(memory), open_bus(expected)
    wanted = one_by_one(reference, moves, expected, expected_media)
    assert transfer(bus, moves, media) == wanted
    assert (memory == expected).all()
    assert (media == expected_media).all()


@pytest.mark.parametrize("to_host", [False, True])
def test_memory_that_begins_anywhere(to_host: bool) -> None:
    """Lines that are not whole, and the last bytes of a move, are moved as well as the others."""
    memory, media = aligned(SIZE), aligned(MEDIA)
    source, target = (media, memory) if to_host else (memory, media)
    bus = open_bus(memory)
    for shift in (0, 1, 13, 63, 64, 100, 128):
        for n in (1, 63, 256, 257, 511, 1024, 4000):
            source[shift : shift + n] = np.random.default_rng(n).integers(1, 256, n, dtype=np.uint8)
            target[: shift + n + 64] = 0
            assert transfer(bus, [(shift, shift, n, to_host)], media) == [0]
            assert (target[shift : shift + n] == source[shift : shift + n]).all()
            assert not target[:shift].any()
            assert not target[shift + n : shift + n + 64].any()


def test_a_fault_is_one_fault(make_rig: Any) -> None:
    """Through an IOMMU: a page that does not translate is logged once, and the moves beside it are done."""
    rig = make_rig("intel")
    domain, table = rig.paging()
    memory = rig.memory.alloc(2 * PAGE)
    gpa, _ = next(iter(rig.memory.runs(memory.vaddr, memory.nbytes)))
    table.map_range(BASE, gpa, 2 * PAGE, Perm.READ | Perm.WRITE)
    bus = rig.requester(domain)
    media = np.full(MEDIA, 7, np.uint8)
    moves = [(0, 0, PAGE, True), (PAGE * 64, 0, PAGE, True), (PAGE, PAGE, PAGE, True)]
    assert transfer(bus, moves, media) == [0, -errno.EFAULT, 0]
    assert (memory == 7).all()
    faults = rig.iommu.faults()
    assert [fault.iova for fault in faults] == [BASE + PAGE * 64]


def test_a_cancelled_bus_moves_nothing() -> None:
    memory, media = np.zeros(SIZE, np.uint8), np.ones(MEDIA, np.uint8)
    bus = open_bus(memory)
    bus.cancel(True)
    moves = [(0, 0, PAGE, True), (BIG, 0, 2 * PAGE, True), (0, 0, BIG, True)]
    assert transfer(bus, moves, media) == [-errno.ECANCELED] * 3
    assert not memory.any()
    bus.cancel(False)
    assert transfer(bus, moves, media) == [0] * 3


def test_remote_memory_is_asked_for() -> None:
    """Between moves of memory that is here, and in their order."""
    bus = TableBus()
    far, memory = FarMemory(bus), np.zeros(4 * PAGE, np.uint8)
    bus.map(BASE, memory[:PAGE])
    far.map(BASE + PAGE, memory[PAGE:])
    media = np.random.default_rng(1).integers(0, 256, MEDIA, dtype=np.uint8)
    expected = media[: 2 * PAGE].copy()
    moves = [
        (0, 0, PAGE, True),
        (PAGE, PAGE, PAGE, True),
        (0, 2 * PAGE, PAGE, False),
        (PAGE, 3 * PAGE, PAGE, False),
    ]
    assert transfer(bus, moves, media) == [0] * 4
    assert (memory[: 2 * PAGE] == expected).all()
    assert (media[2 * PAGE : 4 * PAGE] == expected).all()
    assert far.requests == [(BASE + PAGE, PAGE, True), (BASE + PAGE, PAGE, False)]


@pytest.mark.parametrize("to_host", [False, True])
def test_a_move_that_goes_on_in_remote_memory(to_host: bool) -> None:
    """What is here moves at once, only the rest is asked for, and the move after it is of memory that is here again."""
    bus = TableBus()
    far, memory = FarMemory(bus), aligned(4 * PAGE, 1)
    bus.map(BASE, memory[: 2 * PAGE])
    far.map(BASE + 2 * PAGE, memory[2 * PAGE :])
    media = aligned(8 * PAGE, 2)
    source, target = (media, memory) if to_host else (memory, media)
    expected = source[: 4 * PAGE].copy()
    moves = [(0, 0, 4 * PAGE, to_host), (0, 4 * PAGE, PAGE, False)]
    assert transfer(bus, moves, media) == [0, 0]
    assert (target[: 4 * PAGE] == expected).all()
    assert (media[4 * PAGE : 5 * PAGE] == expected[:PAGE]).all()
    assert far.requests == [(BASE + 2 * PAGE, 2 * PAGE, to_host)]
