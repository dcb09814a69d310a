"""Batches: members, failing members, fences, the list itself, stop points inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from tests.devices.dsa.rig import CRAV_RCR, LIST, MEMORY, PAGE, RECORDS, Rig, descriptor, descriptors

pytestmark = pytest.mark.touches_c

NOOP, BATCH, DRAIN, MEMMOVE = (
    lib.DSA_OPCODE_NOOP,
    lib.DSA_OPCODE_BATCH,
    lib.DSA_OPCODE_DRAIN,
    lib.DSA_OPCODE_MEMMOVE,
)
FENCE = lib.IDXD_OP_FLAG_FENCE
SUCCESS, FAIL = lib.DSA_COMP_SUCCESS, lib.DSA_COMP_BATCH_FAIL


def member(number: int, opcode: int = NOOP, flags: int = CRAV_RCR, **fields: int) -> np.ndarray[Any, Any]:
    """A member whose record is at its number plus one."""
    return descriptor(opcode, flags, completion_addr=RECORDS + 32 * (number + 1), **fields)


def statuses(rig: Rig, count: int) -> list[int]:
    return [int(status) for status in rig.records(count + 1)["status"][1:]]


@pytest.mark.parametrize("count", [2, 31, 32, 33, 63, 64, 65, 200])
def test_every_member_runs(rig: Rig, count: int) -> None:
    """Counts around the sizes in which members are fetched and taken turns with."""
    rig.at(MEMORY, count)[:] = np.arange(count) % 251 + 1
    record = rig.batch(
        descriptors(
            *(
                member(i, MEMMOVE, src_addr=MEMORY + i, dst_addr=MEMORY + 0x4000 + i, xfer_size=1)
                for i in range(count)
            )
        )
    )
    assert (record["status"], record["descs_completed"]) == (SUCCESS, count)
    assert statuses(rig, count) == [SUCCESS] * count
    assert np.array_equal(rig.at(MEMORY + 0x4000, count), rig.at(MEMORY, count))
    assert rig.handed == count + 1


def test_the_largest_batch(rig: Rig) -> None:
    record = rig.batch(np.repeat(descriptor(NOOP, 0), 1024))
    assert (record["status"], record["descs_completed"], rig.handed) == (SUCCESS, 1024, 1025)


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (member(1, 0x7F), lib.DSA_COMP_BAD_OPCODE),
        (member(1, BATCH, desc_list_addr=LIST, desc_count=2), lib.DSA_COMP_BAD_OPCODE),
        (member(1, DRAIN), lib.DSA_COMP_BAD_OPCODE),
        (member(1, MEMMOVE), lib.DSA_COMP_XFER_ERANGE),
        (
            member(1, MEMMOVE, src_addr=0xDEAD000, dst_addr=MEMORY, xfer_size=1),
            lib.DSA_COMP_PAGE_FAULT_NOBOF,
        ),
        (
            member(
                1,
                lib.DSA_OPCODE_COMPARE,
                CRAV_RCR | lib.IDXD_OP_FLAG_CR,
                src_addr=MEMORY,
                src2_addr=MEMORY,
                xfer_size=1,
                expected_res=1,
            ),
            lib.DSA_COMP_SUCCESS_PRED,
        ),
    ],
    ids=["opcode", "batch", "drain", "size", "fault", "predicate"],
)
@pytest.mark.parametrize("fence", [False, True])
def test_a_failing_member(rig: Rig, bad: np.ndarray[Any, Any], status: int, fence: bool) -> None:
    """The others run; after a fence nothing does."""
    last = member(3, NOOP, CRAV_RCR | FENCE * fence)
    record = rig.batch(descriptors(member(0), bad, member(2), last, member(4)))
    done = 3 if fence else 5
    assert (record["status"], record["descs_completed"]) == (FAIL, done)
    assert statuses(rig, 5) == [SUCCESS, status, SUCCESS, SUCCESS, SUCCESS][:done] + [0] * (5 - done)


def test_a_fence_without_failure(rig: Rig) -> None:
    record = rig.batch(descriptors(member(0), member(1, NOOP, CRAV_RCR | FENCE)))
    assert (record["status"], statuses(rig, 2)) == (SUCCESS, [SUCCESS, SUCCESS])


def test_a_failure_nobody_recorded(rig: Rig) -> None:
    """A member without completion address fails into SWERR, with its place in the batch."""
    record = rig.batch(descriptors(member(0), member(1), descriptor(0x7F, 0)))
    assert (record["status"], record["descs_completed"]) == (FAIL, 3)
    error = rig.swerr()
    assert error.status & lib.IDXD_SWERR_BATCH
    assert error.batch_flags & lib.IDXD_SWERR_BATCH_IDX_MASK == 2


def test_a_record_that_cannot_be_written(rig: Rig) -> None:
    record = rig.batch(descriptors(member(0), descriptor(NOOP, completion_addr=0xDEAD000)))
    assert record["status"] == FAIL
    assert rig.swerr().status >> lib.IDXD_SWERR_ERROR_SHIFT & 0xFF == lib.DSA_COMP_CRA_XLAT


@pytest.mark.parametrize("readable", [0, 1, 40])
def test_a_list_that_ends_in_a_fault(rig: Rig, readable: int) -> None:
    """Members before the fault run, those after do not; the fault's address is the list's."""
    start = MEMORY + 0xD0000 + PAGE - 64 * readable
    members = descriptors(*(member(i) for i in range(readable + 2)))
    rig.at(start, members.nbytes)[:] = members.view(np.uint8)
    rig.unmap(MEMORY + 0xD0000 + PAGE)
    record = rig.run(BATCH, desc_list_addr=start, desc_count=len(members))
    assert (record["status"], record["descs_completed"]) == (lib.DSA_COMP_BATCH_PAGE_FAULT, readable)
    assert record["fault_addr"] == MEMORY + 0xD0000 + PAGE
    assert statuses(rig, readable + 2) == [SUCCESS] * readable + [0, 0]


def test_a_list_that_blocks_on_the_fault(rig: Rig) -> None:
    members = descriptors(*(member(i) for i in range(3)))
    rig.unmap(LIST)
    record = rig.batch(members, CRAV_RCR | lib.IDXD_OP_FLAG_BOF)
    assert record["status"] == 0
    rig.map(LIST)
    rig.engine.kick()
    assert (record["status"], statuses(rig, 3)) == (SUCCESS, [SUCCESS] * 3)


@pytest.mark.parametrize("before", range(6))
def test_stop_points_inside(rig: Rig, before: int) -> None:
    """The engine stops before exactly the descriptor asked for, the batch itself being the first."""
    rig.engine.stop_before(before)
    record = rig.batch(descriptors(*(member(i) for i in range(5))))
    assert rig.engine.stopped
    assert (record["status"], rig.handed) == (0, before)
    assert sum(statuses(rig, 5)) == max(before - 1, 0)
    rig.engine.resume()
    assert (record["status"], record["descs_completed"], statuses(rig, 5)) == (SUCCESS, 5, [SUCCESS] * 5)


def test_interrupts_of_members_and_batch(rig: Rig) -> None:
    rci = CRAV_RCR | lib.IDXD_OP_FLAG_RCI
    members = descriptors(member(0, NOOP, rci, int_handle=1), member(1, NOOP, rci, int_handle=9))
    record = rig.batch(members, rci, int_handle=2)
    assert (record["status"], statuses(rig, 2)) == (FAIL, [SUCCESS, lib.DSA_COMP_INT_HANDLE_INVAL])
    assert rig.bus.msis() == (2, 0xFEE00000, 0x42)


def test_memory_unmapped_between_two_members(rig: Rig) -> None:
    """What a mapping change in the middle of a batch does is exact."""
    copies = [
        member(i, MEMMOVE, src_addr=MEMORY, dst_addr=MEMORY + 0x4000 + i * PAGE, xfer_size=PAGE)
        for i in range(4)
    ]
    rig.at(MEMORY, PAGE)[:] = 7
    rig.engine.stop_before(3)
    rig.batch(descriptors(*copies))
    rig.unmap(MEMORY + 0x4000 + 2 * PAGE)
    rig.engine.resume()
    fault = lib.DSA_COMP_PAGE_FAULT_NOBOF | lib.DSA_COMP_STATUS_WRITE
    assert statuses(rig, 4) == [SUCCESS, SUCCESS, fault, SUCCESS]
    assert rig.records(4)[3]["fault_addr"] == MEMORY + 0x4000 + 2 * PAGE
    assert rig.record["status"] == FAIL
    assert [int(rig.at(MEMORY + 0x4000 + i * PAGE, 1)[0]) for i in range(4)] == [7, 7, 0, 7]
