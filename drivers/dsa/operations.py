"""The awaitable operations of a work queue.

Addresses are IOVAs or mapped DMA buffers. Every operation takes ``deadline`` in seconds (default: the
driver's) and ``flags``, descriptor flags beyond the completion ones. Every one raises ``DsaError`` when the
device reports another status than success, ``DeadlineExceeded`` when it reports none in time,
``OperationAborted`` when an abort or a reset took it back, ``DeviceFailed`` when the WQ is not enabled,
``ValueError`` for a size the WQ does not take. When cancelled, an operation that has not begun does not
begin, and one that has is finished or taken back before the cancellation goes on: on return the buffers may
be reused.

The ``_nowait`` twins submit and return the Submission; they raise ``trio.WouldBlock`` when the WQ is full,
and leave looking at the record to the caller (``check``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pvfio.abi import lib
from pvfio.drivers.dsa.batch import Batch
from pvfio.drivers.dsa.descriptors import Address, address_of, pattern_of, words_of
from pvfio.drivers.dsa.errors import BatchError
from pvfio.drivers.dsa.operations_delta import DeltaOperations
from pvfio.drivers.dsa.operations_dif import DifOperations
from pvfio.drivers.dsa.ring import Submission
from pvfio.drivers.dsa.single import Operation

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["WorkQueue"]


class WorkQueue(DeltaOperations, DifOperations):
    """A work queue with the operations of the device as coroutines. Made by the driver."""

    async def noop(self, *, flags: int = 0, deadline: float | None = None) -> None:
        """NOOP: does nothing, and completes."""
        await self._done(Operation("noop", lib.DSA_OPCODE_NOOP, {}), flags, deadline)

    async def drain(self, *, flags: int = 0, deadline: float | None = None) -> None:
        """DRAIN: completes when every descriptor submitted to this WQ before it has completed."""
        await self._done(Operation("drain", lib.DSA_OPCODE_DRAIN, {}), flags, deadline)

    def _memmove(self, dst: Address, src: Address, size: int) -> Operation:
        self._size(size)
        fields = {"src_addr": address_of(src, size), "dst_addr": address_of(dst, size), "xfer_size": size}
        return Operation("memmove", lib.DSA_OPCODE_MEMMOVE, fields, (dst, src))

    async def memmove(
        self,
        dst: Address,
        src: Address,
        size: int,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> None:
        """MEMMOVE: copies ``size`` bytes; the ranges may overlap."""
        await self._done(self._memmove(dst, src, size), flags, deadline)

    def memmove_nowait(self, dst: Address, src: Address, size: int, *, flags: int = 0) -> Submission:
        """Submits a MEMMOVE."""
        return self._start(self._memmove(dst, src, size), flags)

    def _memfill(self, dst: Address, pattern: int | bytes, size: int) -> Operation:
        fields = {
            "pattern": pattern_of(pattern),
            "dst_addr": address_of(dst, size),
            "xfer_size": self._size(size),
        }
        return Operation("fill", lib.DSA_OPCODE_MEMFILL, fields, (dst,))

    async def fill(
        self,
        dst: Address,
        pattern: int | bytes,
        size: int,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> None:
        """FILL: repeats an 8-byte pattern over ``size`` bytes; the last repetition may be cut."""
        await self._done(self._memfill(dst, pattern, size), flags, deadline)

    def fill_nowait(self, dst: Address, pattern: int | bytes, size: int, *, flags: int = 0) -> Submission:
        """Submits a FILL."""
        return self._start(self._memfill(dst, pattern, size), flags)

    def _compare(self, first: Address, second: Address, size: int) -> Operation:
        self._size(size)
        fields = {
            "src_addr": address_of(first, size),
            "src2_addr": address_of(second, size),
            "xfer_size": size,
        }
        return Operation("compare", lib.DSA_OPCODE_COMPARE, fields, (first, second))

    async def compare(
        self,
        first: Address,
        second: Address,
        size: int,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> int | None:
        """COMPARE: ``None`` where the ranges are equal, else the offset in bytes of the first difference."""
        record = await self._done(self._compare(first, second, size), flags, deadline)
        return int(record["bytes_completed"]) if record["result"] else None

    def compare_nowait(self, first: Address, second: Address, size: int, *, flags: int = 0) -> Submission:
        """Submits a COMPARE."""
        return self._start(self._compare(first, second, size), flags)

    def _crcgen(self, src: Address, size: int, seed: int) -> Operation:
        fields = {"src_addr": address_of(src, size), "xfer_size": self._size(size), "crc_seed": seed}
        return Operation("crcgen", lib.DSA_OPCODE_CRCGEN, fields, (src,))

    async def crcgen(
        self,
        src: Address,
        size: int,
        *,
        seed: int = 0,
        flags: int = 0,
        deadline: float | None = None,
    ) -> int:
        """CRCGEN: the CRC-32C of ``size`` bytes, going on from ``seed``, the CRC of the bytes before."""
        record = await self._done(self._crcgen(src, size, seed), flags, deadline)
        return int(record["crc_val"]) & 0xFFFFFFFF

    def crcgen_nowait(self, src: Address, size: int, *, seed: int = 0, flags: int = 0) -> Submission:
        """Submits a CRCGEN; the CRC is the record's ``crc_val``."""
        return self._start(self._crcgen(src, size, seed), flags)

    def _copy_crc(self, dst: Address, src: Address, size: int, seed: int) -> Operation:
        operation = self._memmove(dst, src, size)
        fields = operation.fields | {"crc_seed": seed}
        return Operation("copy_crc", lib.DSA_OPCODE_COPY_CRC, fields, operation.keep)

    async def copy_crc(
        self,
        dst: Address,
        src: Address,
        size: int,
        *,
        seed: int = 0,
        flags: int = 0,
        deadline: float | None = None,
    ) -> int:
        """COPY_CRC: copies ``size`` bytes (the ranges must not overlap) and returns their CRC-32C from
        ``seed`` on.
        """
        record = await self._done(self._copy_crc(dst, src, size, seed), flags, deadline)
        return int(record["crc_val"]) & 0xFFFFFFFF

    def copy_crc_nowait(
        self, dst: Address, src: Address, size: int, *, seed: int = 0, flags: int = 0
    ) -> Submission:
        """Submits a COPY_CRC; the CRC is the record's ``crc_val``."""
        return self._start(self._copy_crc(dst, src, size, seed), flags)

    # Batches

    async def alloc_batch(self, capacity: int) -> Batch:
        """DMA memory for a batch of up to ``capacity`` descriptors, for use again and again. Freed with the
        driver.
        """
        if not 2 <= capacity <= self.max_batch:
            raise ValueError(f"a batch has 2 to {self.max_batch} descriptors, not {capacity}")
        return await self.driver._alloc_batch(capacity)

    def _batch(self, batch: Batch, count: int, records: bool, keep: tuple[Any, ...]) -> Operation:
        if not 2 <= count <= min(batch.capacity, self.max_batch):
            raise ValueError(
                f"a batch has 2 to {min(batch.capacity, self.max_batch)} descriptors, not {count}"
            )
        batch.prepare(count, records=records)
        fields = {"desc_list_addr": batch.iova, "desc_count": count}
        return Operation("batch", lib.DSA_OPCODE_BATCH, fields, (batch, *keep))

    def batch_nowait(
        self, batch: Batch, count: int | None = None, *, records: bool = True, keep: tuple[Any, ...] = ()
    ) -> Submission:
        """Submits the first ``count`` descriptors (default: all) of a batch. Leave the batch alone until it
        is done.
        """
        return self._start(self._batch(batch, batch.capacity if count is None else count, records, keep), 0)

    async def batch(
        self,
        descriptors: NDArray[Any] | Batch,
        count: int | None = None,
        *,
        records: bool = True,
        keep: tuple[Any, ...] = (),
        deadline: float | None = None,
    ) -> NDArray[Any]:
        """BATCH: one submission for many descriptors; returns a copy of their completion records.

        An array of ``struct dsa_hw_desc`` is copied to DMA memory first; a :class:`Batch` is used as it is.
        With ``records=False`` the members write no completion records (statuses stay 0), only the batch
        does. Raises ``BatchError`` when a member fails.
        """
        if isinstance(descriptors, Batch):
            return await self._run_batch(descriptors, count, records, keep, deadline)
        number = len(descriptors) if count is None else count
        self._check(descriptors)
        if not 2 <= number <= min(self.max_batch, len(descriptors)):
            raise ValueError(f"a batch has 2 to {self.max_batch} descriptors, not {number}")
        batch = await self.driver._borrow_batch(number)
        try:
            words_of(batch.descriptors)[:number] = words_of(descriptors[:number])
            return await self._run_batch(batch, number, records, keep, deadline)
        finally:
            self.driver._return_batch(batch)

    async def _run_batch(
        self, batch: Batch, count: int | None, records: bool, keep: tuple[Any, ...], deadline: float | None
    ) -> NDArray[Any]:
        number = batch.capacity if count is None else count
        record = await self._run(self._batch(batch, number, records, keep), 0, deadline)
        members = words_of(batch.records[:number]).copy().view(batch.records.dtype)[:, 0]
        if record["status"] != lib.DSA_COMP_SUCCESS:
            statuses = members["status"]
            bad = (statuses != lib.DSA_COMP_SUCCESS) & (statuses != lib.DSA_COMP_NONE)
            failed = [int(index) for index in np.flatnonzero(bad)]
            raise BatchError(record, members, failed, device=self.device)
        return members
