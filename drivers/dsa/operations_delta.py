"""Awaitable COMPVAL, delta records, DUALCAST, TRANSL_FETCH and CFLUSH, and their ``_nowait`` twins.

Errors, deadlines and cancellation are as operations.py says for every operation. Sizes of delta records and of
what they describe are checked here, addresses by the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pvfio.abi import lib
from pvfio.drivers.dsa.descriptors_build import Address, address_of, pattern_of
from pvfio.drivers.dsa.single import Operation, SingleQueue

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvfio.drivers.dsa.ring import Submission

__all__ = ["Delta", "DeltaOperations"]

_STRIDED = int(lib.DSA_TRANSL_FETCH_FLAG_STRIDE)


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta record that was created.

    ``size``: its bytes, 0 where the ranges are equal. ``fits``: it holds every difference; otherwise there was no
    room for the one after ``bytes_compared``, and it describes only the bytes before that.
    """

    size: int
    fits: bool
    bytes_compared: int


class DeltaOperations(SingleQueue):
    """A work queue's operations beyond copy, fill, compare and CRC."""

    def _compval(self, src: Address, pattern: int | bytes, size: int) -> Operation:
        fields = {
            "src_addr": address_of(src, size),
            "comp_pattern": pattern_of(pattern),
            "xfer_size": self._size(size),
        }
        return Operation("compval", lib.DSA_OPCODE_COMPVAL, fields, (src,))

    async def compval(
        self,
        src: Address,
        pattern: int | bytes,
        size: int,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> int | None:
        """COMPVAL: ``None`` where ``size`` bytes are the 8-byte pattern, repeated, else the offset in bytes of the
        first difference.
        """
        record = await self._done(self._compval(src, pattern, size), flags, deadline)
        return int(record["bytes_completed"]) if record["result"] else None

    def compval_nowait(self, src: Address, pattern: int | bytes, size: int, *, flags: int = 0) -> Submission:
        """Submits a COMPVAL."""
        return self._start(self._compval(src, pattern, size), flags)

    def _delta_size(self, size: int) -> int:
        word, limit = int(lib.DSA_DELTA_WORD), min(int(lib.DSA_DELTA_MAX_XFER), self.max_transfer)
        if size % word or not 0 < size <= limit:
            raise ValueError(f"a delta record describes 8 to {limit} bytes, a multiple of 8, not {size}")
        return size

    def _create_delta(
        self, first: Address, second: Address, delta: Address, size: int, max_delta_size: int | None
    ) -> Operation:
        self._delta_size(size)
        one, least = int(lib.DSA_DELTA_SIZE), int(lib.DSA_DELTA_MIN_RECORD)
        if max_delta_size is None:
            max_delta_size = max(size // int(lib.DSA_DELTA_WORD) * one, least)
            if isinstance(delta, np.ndarray):
                max_delta_size = min(max_delta_size, delta.nbytes // one * one)
        if max_delta_size < least or max_delta_size % one:
            raise ValueError(f"room for a delta record is {least} bytes or more, a multiple of {one}")
        fields = {
            "src_addr": address_of(first, size),
            "src2_addr": address_of(second, size),
            "delta_addr": address_of(delta, max_delta_size),
            "max_delta_size": max_delta_size,
            "xfer_size": size,
        }
        return Operation("create_delta", lib.DSA_OPCODE_CR_DELTA, fields, (first, second, delta))

    @staticmethod
    def delta_of(record: NDArray[Any]) -> Delta:
        """What a CR_DELTA's completion record says."""
        overflow = int(record["result"]) == 2
        return Delta(int(record["delta_rec_size"]), not overflow, int(record["bytes_completed"]))

    async def create_delta(
        self,
        first: Address,
        second: Address,
        delta: Address,
        size: int,
        *,
        max_delta_size: int | None = None,
        flags: int = 0,
        deadline: float | None = None,
    ) -> Delta:
        """CR_DELTA: writes to ``delta`` what makes the ``size`` bytes at ``second`` out of those at ``first``.

        Sources are 8-byte aligned, ``size`` is a multiple of 8 up to 512 KiB. ``max_delta_size`` is the room
        at ``delta``, a multiple of 10 and at least 80 (default: what the worst case needs, or the buffer has).
        """
        operation = self._create_delta(first, second, delta, size, max_delta_size)
        return self.delta_of(await self._done(operation, flags, deadline))

    def create_delta_nowait(
        self,
        first: Address,
        second: Address,
        delta: Address,
        size: int,
        *,
        max_delta_size: int | None = None,
        flags: int = 0,
    ) -> Submission:
        """Submits a CR_DELTA; ``delta_of`` reads its record."""
        return self._start(self._create_delta(first, second, delta, size, max_delta_size), flags)

    def _apply_delta(self, dst: Address, delta: Address, delta_size: int, size: int) -> Operation:
        if delta_size <= 0 or delta_size % int(lib.DSA_DELTA_SIZE):
            raise ValueError(f"a delta record has a multiple of 10 bytes and some, not {delta_size}")
        fields = {
            "src_addr": address_of(delta, delta_size),
            "dst_addr": address_of(dst, size),
            "delta_rec_size": delta_size,
            "xfer_size": self._delta_size(size),
        }
        return Operation("apply_delta", lib.DSA_OPCODE_AP_DELTA, fields, (dst, delta))

    async def apply_delta(
        self,
        dst: Address,
        delta: Address,
        delta_size: int,
        size: int,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> None:
        """AP_DELTA: applies a delta record to ``size`` bytes at ``dst``, which are 8-byte aligned.

        A record of no bytes is refused (``ValueError``): there is nothing to apply.
        """
        await self._done(self._apply_delta(dst, delta, delta_size, size), flags, deadline)

    def apply_delta_nowait(
        self, dst: Address, delta: Address, delta_size: int, size: int, *, flags: int = 0
    ) -> Submission:
        """Submits an AP_DELTA."""
        return self._start(self._apply_delta(dst, delta, delta_size, size), flags)

    def _dualcast(self, dst1: Address, dst2: Address, src: Address, size: int) -> Operation:
        self._size(size)
        fields = {
            "src_addr": address_of(src, size),
            "dst_addr": address_of(dst1, size),
            "dest2": address_of(dst2, size),
            "xfer_size": size,
        }
        return Operation("dualcast", lib.DSA_OPCODE_DUALCAST, fields, (dst1, dst2, src))

    async def dualcast(
        self,
        dst1: Address,
        dst2: Address,
        src: Address,
        size: int,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> None:
        """DUALCAST: copies ``size`` bytes to two places at once.

        Bits 11:0 of the destinations are the same (else DSA_COMP_DCAST_ERR); no range overlaps another.
        """
        await self._done(self._dualcast(dst1, dst2, src, size), flags, deadline)

    def dualcast_nowait(
        self, dst1: Address, dst2: Address, src: Address, size: int, *, flags: int = 0
    ) -> Submission:
        """Submits a DUALCAST."""
        return self._start(self._dualcast(dst1, dst2, src, size), flags)

    def _transl_fetch(self, addr: Address, size: int, stride: int) -> Operation:
        fields = {"transl_fetch_addr": address_of(addr, size), "region_size": self._size(size)}
        fields["region_stride"] = stride
        return Operation("transl_fetch", lib.DSA_OPCODE_TRANSL_FETCH, fields, (addr,))

    async def transl_fetch(
        self, addr: Address, size: int, *, stride: int = 0, flags: int = 0, deadline: float | None = None
    ) -> None:
        """TRANSL_FETCH: has the translations of ``size`` bytes fetched, for reading.

        ``stride`` is how many bytes apart they are asked for; 0: of every page.
        """
        flags |= _STRIDED if stride else 0
        await self._done(self._transl_fetch(addr, size, stride), flags, deadline)

    def transl_fetch_nowait(self, addr: Address, size: int, *, stride: int = 0, flags: int = 0) -> Submission:
        """Submits a TRANSL_FETCH."""
        return self._start(self._transl_fetch(addr, size, stride), flags | (_STRIDED if stride else 0))

    def _cflush(self, dst: Address, size: int) -> Operation:
        fields = {"dst_addr": address_of(dst, size), "xfer_size": self._size(size)}
        return Operation("cflush", lib.DSA_OPCODE_CFLUSH, fields, (dst,))

    async def cflush(self, dst: Address, size: int, *, flags: int = 0, deadline: float | None = None) -> None:
        """CFLUSH: writes the cache lines of ``size`` bytes back to memory."""
        await self._done(self._cflush(dst, size), flags, deadline)

    def cflush_nowait(self, dst: Address, size: int, *, flags: int = 0) -> Submission:
        """Submits a CFLUSH."""
        return self._start(self._cflush(dst, size), flags)
