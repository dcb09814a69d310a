"""A test of every operation of a DSA, for ``dmatest --operation``.

Each draws sizes, offsets and data, says in the trial's model what must come out, by numpy or plain Python
and never by what the device computed, and lets the device do it. The operations on protection information
are in ``operations_dif``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pvfio.abi import lib
from pvfio.drivers.dsa import descriptors
from pvfio.workloads.crc32c import crc32c
from pvfio.workloads.dmatest import GUARD
from pvfio.workloads.operations_dif import DIF_OPERATIONS
from pvfio.workloads.trial import AREAS, Operation, OperationThread, Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.workloads.dmatest import DmatestParams

__all__ = ["OPERATIONS", "Operation", "area_bytes", "delta_record", "operation_thread"]

SRC, DST, SRC2, DST2 = range(4)
_DELTA_ENTRY = np.dtype([("offset", "<u2"), ("data", "<u8")])
_MOST_DELTA = 1 << 19  # bytes that 16-bit offsets of 8-byte words reach


async def _memmove(t: Trial) -> None:
    size = t.length()
    src, dst = t.place(size), t.place(size)
    to = SRC if t.chance(0.25) else DST  # in the same area: ranges may overlap
    t.where = (src, dst, size)
    t.data(to, dst, size)[:] = t.data(SRC, src, size).copy()
    await t.device(t.wq.memmove(t.at(to, dst), t.at(SRC, src), size, deadline=t.deadline))


async def _fill(t: Trial) -> None:
    size = t.length()
    dst, pattern = t.place(size), t.rng.bytes(8)
    t.where = (0, dst, size)
    t.data(DST, dst, size)[:] = np.resize(np.frombuffer(pattern, np.uint8), size)
    await t.device(t.wq.fill(t.at(DST, dst), pattern, size, deadline=t.deadline))


def _spoil(t: Trial, area: int, offset: int, size: int) -> int | None:
    """Changes a byte, or in half of all cases none; where, counted from ``offset``."""
    if t.chance(0.5):
        return None
    where = int(t.rng.integers(0, size))
    t.set(area, offset + where, t.data(area, offset + where, 1) ^ np.uint8(t.rng.integers(1, 256)))
    return where


async def _compare(t: Trial) -> None:
    size = t.length()
    first, second = t.place(size), t.place(size)
    t.where = (first, second, size)
    t.set(SRC2, second, t.data(SRC, first, size))
    expected = _spoil(t, SRC2, second, size)
    work = t.wq.compare(t.at(SRC, first), t.at(SRC2, second), size, deadline=t.deadline)
    t.expect("first difference", await t.device(work), expected)


async def _compval(t: Trial) -> None:
    size = t.length()
    src, pattern = t.place(size), t.rng.bytes(8)
    t.where = (src, 0, size)
    t.set(SRC, src, np.resize(np.frombuffer(pattern, np.uint8), size))
    expected = _spoil(t, SRC, src, size)
    work = t.wq.compval(t.at(SRC, src), int.from_bytes(pattern, "little"), size, deadline=t.deadline)
    t.expect("first difference", await t.device(work), expected)


def delta_record(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The delta record that makes ``second`` of ``first`` (multiples of 8 bytes): for each 8-byte word that
    differs its index in 16 bits and what it becomes, 10 bytes in all.
    """
    a, b = (np.ascontiguousarray(data).view("<u8") for data in (first, second))
    where = np.flatnonzero(a != b)
    entries = np.zeros(where.size, _DELTA_ENTRY)
    entries["offset"] = where
    entries["data"] = b[where]
    return entries.view(np.uint8)


def _change_words(t: Trial, size: int) -> NDArray[np.uint8]:
    """The bytes of ``SRC`` with some words changed, often few, now and then none or all."""
    data = t.data(SRC, 0, size).copy()
    words = data.view("<u8")
    share = float(t.rng.choice([0.0, 0.01, 0.2, 1.0]))
    changed = t.rng.random(words.size) < share
    words[changed] ^= t.rng.integers(1, 1 << 63, int(changed.sum()), dtype=np.uint64)
    return data


async def _create_delta(t: Trial) -> None:
    size = t.length(8, _MOST_DELTA)
    t.where = (0, 0, size)
    t.set(SRC2, 0, _change_words(t, size))
    record = delta_record(t.data(SRC, 0, size), t.data(SRC2, 0, size))
    most = -(-max(record.size, 10) // 80) * 80
    if record.size > 80 and t.chance(0.3):
        most = record.size // 160 * 80 or 80
    work = t.wq.create_delta(
        t.at(SRC), t.at(SRC2), t.at(DST2), size, max_delta_size=most, deadline=t.deadline
    )
    delta = await t.device(work)
    t.expect("delta fits", delta.fits, record.size <= most)
    if record.size > most:  # a record of what comes before the entry that does not fit
        t.expect(
            "bytes compared", delta.bytes_compared, int(record.view(_DELTA_ENTRY)["offset"][most // 10]) * 8
        )
    t.expect("delta size", delta.size, min(record.size, most))
    t.data(DST2, 0, most)[: record.size] = record[:most]


async def _apply_delta(t: Trial) -> None:
    size = t.length(8, _MOST_DELTA)
    t.where = (0, 0, size)
    target = _change_words(t, size)
    word = int(t.rng.integers(0, size // 8)) * 8  # a record has at least one entry
    target[word] ^= 1
    record = delta_record(t.data(SRC, 0, size), target)
    t.set(SRC2, 0, record)
    t.data(SRC, 0, size)[:] = target
    await t.device(t.wq.apply_delta(t.at(SRC), t.at(SRC2), record.size, size, deadline=t.deadline))


async def _dualcast(t: Trial) -> None:
    size = t.length()
    src, dst = t.place(size), t.place(size)
    t.where = (src, dst, size)
    for area in (DST, DST2):
        t.data(area, dst, size)[:] = t.data(SRC, src, size)
    work = t.wq.dualcast(t.at(DST, dst), t.at(DST2, dst), t.at(SRC, src), size, deadline=t.deadline)
    await t.device(work)


async def _nothing_changes(method: str, t: Trial) -> None:
    """TRANSL_FETCH and CFLUSH: whatever they do to caches, memory stays."""
    size = t.length()
    at = t.place(size)
    t.where = (at, at, size)
    await t.device(getattr(t.wq, method)(t.at(SRC, at), size, deadline=t.deadline))


async def _crcgen(t: Trial) -> None:
    size = t.length()
    src, seed = t.place(size), int(t.rng.integers(0, 1 << 32))
    t.where = (src, 0, size)
    crc = await t.device(t.wq.crcgen(t.at(SRC, src), size, seed=seed, deadline=t.deadline))
    t.expect("CRC-32C", crc, crc32c(t.data(SRC, src, size), seed))


async def _copy_crc(t: Trial) -> None:
    size = t.length()
    src, dst, seed = t.place(size), t.place(size), int(t.rng.integers(0, 1 << 32))
    t.where = (src, dst, size)
    t.data(DST, dst, size)[:] = t.data(SRC, src, size)
    work = t.wq.copy_crc(t.at(DST, dst), t.at(SRC, src), size, seed=seed, deadline=t.deadline)
    t.expect("CRC-32C", await t.device(work), crc32c(t.data(SRC, src, size), seed))


async def _noop(t: Trial) -> None:
    await t.device(t.wq.noop(deadline=t.deadline))


def _pieces(t: Trial) -> tuple[NDArray[np.uint64], int]:
    """Offsets of a few pieces side by side, and their size."""
    most = min(16, t.params.test_buf_size, t.wq.size, t.wq.max_batch)
    count = int(t.rng.integers(2, most + 1))
    size = max(1, t.length() // count)
    return np.arange(count, dtype=np.uint64) * np.uint64(size), size


async def _drain(t: Trial) -> None:
    """Several copies, then a DRAIN: when it is done, they are."""
    at, size = _pieces(t)
    t.where = (0, 0, size * len(at))
    t.data(DST, 0, t.where[2])[:] = t.data(SRC, 0, t.where[2])
    moves = descriptors.memmove(np.uint64(t.at(DST)) + at, np.uint64(t.at(SRC)) + at, size)
    keep = tuple(area.buffer for area in t.areas)
    submission = await t.device(t.wq.submit(moves, keep=keep, deadline=t.deadline))
    try:
        await t.device(t.wq.drain(deadline=t.deadline))
        t.expect("copies done after the drain", submission.poll(), True)
    finally:
        records = await t.device(submission.wait(deadline=t.deadline))
    for record in records:
        t.wq.check(record, "memmove")


def _member(t: Trial, at: int, size: int) -> tuple[NDArray[Any], Callable[[Any], None]]:
    """A member of a batch, at random, and what to look at in its record."""
    src, dst, other = t.at(SRC, at), t.at(DST, at), t.at(SRC2, at)
    kind = int(t.rng.integers(0, 4))
    if kind == 0:
        t.data(DST, at, size)[:] = t.data(SRC, at, size)
        return descriptors.memmove(dst, src, size), lambda _: None
    if kind == 1:
        pattern = t.rng.bytes(8)
        t.data(DST, at, size)[:] = np.resize(np.frombuffer(pattern, np.uint8), size)
        return descriptors.fill(dst, pattern, size), lambda _: None
    if kind == 2:
        crc = crc32c(t.data(SRC, at, size))
        return (
            descriptors.crcgen(src, size),
            lambda record: t.expect("CRC-32C", int(record["crc_val"]) & 0xFFFFFFFF, crc),
        )
    t.set(SRC2, at, t.data(SRC, at, size))
    difference = _spoil(t, SRC2, at, size)
    return (
        descriptors.compare(src, other, size),
        lambda record: t.expect(
            "first difference", int(record["bytes_completed"]) if record["result"] else None, difference
        ),
    )


async def _batch(t: Trial) -> None:
    """Copies, fills, CRCs and comparisons in one batch."""
    at, size = _pieces(t)
    t.where = (0, 0, size * len(at))
    members = [_member(t, int(offset), size) for offset in at]
    batch = descriptors.join(*(descriptor for descriptor, _ in members))
    keep = tuple(area.buffer for area in t.areas)
    records = await t.device(t.wq.batch(batch, keep=keep, deadline=t.deadline))
    for (_, look), record in zip(members, records, strict=True):
        t.wq.check(record, "member")
        look(record)


OPERATIONS: dict[str, Operation] = {
    "noop": Operation(_noop, lib.DSA_OPCODE_NOOP),
    "batch": Operation(_batch, lib.DSA_OPCODE_BATCH, smallest=2),
    "drain": Operation(_drain, lib.DSA_OPCODE_DRAIN, smallest=2),
    "memmove": Operation(_memmove, lib.DSA_OPCODE_MEMMOVE),
    "fill": Operation(_fill, lib.DSA_OPCODE_MEMFILL),
    "compare": Operation(_compare, lib.DSA_OPCODE_COMPARE),
    "compval": Operation(_compval, lib.DSA_OPCODE_COMPVAL),
    "create-delta": Operation(_create_delta, lib.DSA_OPCODE_CR_DELTA, smallest=8, room=1536),
    "apply-delta": Operation(_apply_delta, lib.DSA_OPCODE_AP_DELTA, smallest=8, room=1536),
    "dualcast": Operation(_dualcast, lib.DSA_OPCODE_DUALCAST),
    "transl-fetch": Operation(partial(_nothing_changes, "transl_fetch"), lib.DSA_OPCODE_TRANSL_FETCH),
    "crcgen": Operation(_crcgen, lib.DSA_OPCODE_CRCGEN),
    "copy-crc": Operation(_copy_crc, lib.DSA_OPCODE_COPY_CRC),
    **DIF_OPERATIONS,
    "cflush": Operation(partial(_nothing_changes, "cflush"), lib.DSA_OPCODE_CFLUSH),
}
"""By the name that ``dmatest --operation`` has for it."""


def area_bytes(name: str, params: DmatestParams) -> int:
    """DMA memory that a thread of an operation takes, in bytes."""
    return AREAS * (params.test_buf_size * OPERATIONS[name].room // 1024 + 2 * GUARD + 4096)


def operation_thread(name: str, *arguments: Any) -> OperationThread:
    """A dmatest thread that tries an operation, from what a ``TestThread`` is made of.

    Raises ``ValueError`` for an unknown operation, one the device does not have, or a test buffer too small
    for it.
    """
    operation = OPERATIONS.get(name)
    if operation is None:
        raise ValueError(f"an operation is one of {', '.join(OPERATIONS)}, not {name!r}")
    thread = OperationThread(*arguments)
    thread.trial, thread.room = operation.test, operation.room
    if not thread.wq.driver.capabilities.has_operation(operation.opcode):
        raise ValueError(f"the device does not have {name} (OPCAP bit {operation.opcode})")
    if thread.params.test_buf_size < operation.smallest:
        raise ValueError(
            f"{name} needs a test buffer of {operation.smallest} bytes, not {thread.params.test_buf_size}"
        )
    return thread
