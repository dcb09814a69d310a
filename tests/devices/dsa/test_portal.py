"""Portals: who may submit where, full queues, thresholds, 8-byte stores, reads."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from pvfio.abi import ffi, lib
from tests.devices.dsa.rig import Rig, descriptor

pytestmark = pytest.mark.touches_c

STRIDE, PAGE_SIZE = lib.IDXD_WQ_PORTAL_STRIDE, lib.IDXD_PORTAL_SIZE
UNLIMITED, LIMITED = lib.IDXD_PORTAL_UNLIMITED, lib.IDXD_PORTAL_LIMITED
NOOP = descriptor(lib.DSA_OPCODE_NOOP)


def error(rig: Rig) -> int:
    return int(rig.swerr().status >> lib.IDXD_SWERR_ERROR_SHIFT & 0xFF)


def occupancy(rig: Rig, wq: int = 0) -> int:
    return int(lib.pv_dsa_wq_occupancy(rig.dsa, wq))


@pytest.mark.parametrize("page", range(4))
@pytest.mark.parametrize("slot", [0, 1, 63])
def test_any_slot_of_any_page(rig: Rig, page: int, slot: int) -> None:
    offset = page * PAGE_SIZE + slot * 64
    assert lib.pv_mmio_movdir64b(rig.portals, offset, ffi.from_buffer(NOOP), 1) == 0
    assert rig.record["status"] == lib.DSA_COMP_SUCCESS


def test_a_full_dedicated_wq_drops(rig: Rig) -> None:
    """Sixteen fit while the engine stands still; the seventeenth is gone, and SWERR says so."""
    rig.engine.stop_before(0)
    rig.submit(np.repeat(NOOP, 16))
    assert (occupancy(rig), error(rig)) == (16, 0)
    rig.submit(descriptor(lib.DSA_OPCODE_MEMMOVE, 0))
    assert (occupancy(rig), error(rig)) == (16, lib.DSA_SWERR_WQ_FULL)
    assert rig.swerr().status >> lib.IDXD_SWERR_OPERATION_SHIFT & 0xFF == lib.DSA_OPCODE_MEMMOVE
    rig.engine.resume()
    assert (occupancy(rig), rig.handed) == (0, 16)


def test_a_wq_that_is_not_enabled(rig: Rig) -> None:
    rig.submit(NOOP, 3)
    assert error(rig) == lib.DSA_SWERR_WQ_NOT_ENABLED
    assert rig.swerr().status >> lib.IDXD_SWERR_WQ_IDX_SHIFT & 0xFF == 3
    assert rig.enqcmd(NOOP, 3) == -errno.EAGAIN


def test_posted_to_a_shared_wq(rig: Rig) -> None:
    rig.enable(1, dedicated=0, threshold=4)
    rig.submit(NOOP, 1)
    assert (error(rig), rig.handed) == (lib.DSA_SWERR_WQ_MODE, 0)


def test_nonposted_to_a_dedicated_wq(rig: Rig) -> None:
    assert rig.enqcmd(NOOP) == -errno.EAGAIN
    assert (error(rig), rig.handed) == (0, 0)


def test_a_shared_wq_says_retry(rig: Rig) -> None:
    """A limited portal takes work below the threshold, an unlimited one until the WQ is full."""
    rig.enable(1, dedicated=0, size=6, threshold=4)
    rig.engine.stop_before(0)
    assert [rig.enqcmd(NOOP, 1, LIMITED) for _ in range(5)] == [0] * 4 + [-errno.EAGAIN]
    assert [rig.enqcmd(NOOP, 1, UNLIMITED) for _ in range(3)] == [0, 0, -errno.EAGAIN]
    assert rig.enqcmd(NOOP, 1, LIMITED) == -errno.EAGAIN
    assert error(rig) == 0
    rig.engine.resume()
    assert (occupancy(rig, 1), rig.handed) == (0, 6)
    assert rig.enqcmd(NOOP, 1, LIMITED) == 0


def test_a_closed_wq(rig: Rig) -> None:
    """It takes nothing more, and finishes what it has."""
    rig.engine.stop_before(0)
    rig.submit(NOOP)
    lib.pv_dsa_wq_close(rig.dsa, 0)
    rig.submit(NOOP)
    assert (occupancy(rig), error(rig)) == (1, lib.DSA_SWERR_WQ_NOT_ENABLED)
    rig.engine.resume()
    assert rig.handed == 1


def store(
    rig: Rig, words: list[int], values: np.ndarray[tuple[int], np.dtype[np.uint64]], base: int = 0
) -> None:
    for word in words:
        assert lib.pv_mmio_store(rig.portals, base + 8 * word, 8, int(values[word])) == 0


@pytest.mark.parametrize(
    ("order", "taken"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], True),
        ([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7], True),
        ([5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7], True),
        ([0, 1, 2, 3, 4, 5, 6], False),
        ([0, 1, 2, 3, 4, 5, 7, 6], False),
        ([7, 6, 5, 4, 3, 2, 1, 0], False),
        ([1, 2, 3, 4, 5, 6, 7, 0], False),
        ([0, 1, 2, 2, 3, 4, 5, 6, 7], False),
    ],
)
def test_eight_stores(rig: Rig, order: list[int], taken: bool) -> None:
    """Ascending stores of a whole slot are a submission; anything else is not, and does no harm."""
    words = NOOP.view(np.uint64)
    store(rig, order, words, LIMITED * PAGE_SIZE + 128)
    assert rig.handed == taken
    store(rig, list(range(8)), words, LIMITED * PAGE_SIZE + 128)
    assert rig.handed == taken + 1


def test_slots_are_assembled_apart(rig: Rig) -> None:
    """Two clients, two slots, stores in turn; the same slot of two pages does not mix."""
    words = NOOP.view(np.uint64)
    for word in range(8):
        store(rig, [word], words, 0)
        store(rig, [word], words, 64)
    assert rig.handed == 2
    store(rig, [0, 1, 2, 3], words, 0)
    store(rig, [4, 5, 6, 7], words, PAGE_SIZE)
    assert rig.handed == 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_short_stores(rig: Rig, size: int) -> None:
    assert lib.pv_mmio_store(rig.portals, 0, size, 0) == -errno.EINVAL


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_reads_are_ones(rig: Rig, size: int) -> None:
    value = ffi.new("uint64_t *")
    assert lib.pv_mmio_load(rig.portals, 64, size, value) == 0
    assert value[0] == (1 << 8 * size) - 1


def test_beyond_the_last_wq(rig: Rig) -> None:
    end = 4 * STRIDE
    assert lib.pv_mmio_movdir64b(rig.portals, end, ffi.from_buffer(NOOP), 1) == -errno.EINVAL
    assert lib.pv_mmio_store(rig.portals, end, 8, 0) == -errno.EINVAL


def test_without_memory_decoding(rig: Rig) -> None:
    lib.pv_dsa_decode(rig.dsa, 0)
    rig.submit(NOOP)
    store(rig, list(range(8)), NOOP.view(np.uint64))
    assert rig.enqcmd(NOOP) == -errno.EAGAIN
    assert (rig.handed, error(rig)) == (0, 0)
