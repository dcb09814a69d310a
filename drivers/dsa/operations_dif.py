"""The DIF operations of a work queue; what operations.py says of errors, deadlines and cancellation holds here.

``size`` is always bytes of the source, whole blocks of it: of ``fmt.protected_size`` bytes where the source has
fields, else of ``fmt.block_size``; ``ValueError`` otherwise. A block that fails its check ends the operation with
``DifError``; the blocks before it are done, and ``bytes_completed`` is where it begins. After a page fault the same:
the rest is submitted with ``fmt.after(blocks)``.
"""

from __future__ import annotations

from pvfio.abi import lib
from pvfio.drivers.dsa.descriptors_build import Address, address_of
from pvfio.drivers.dsa.dif import FIELD_SIZE, DifFormat
from pvfio.drivers.dsa.ring import Submission
from pvfio.drivers.dsa.single import Operation, SingleQueue

__all__ = ["DifOperations"]


class DifOperations(SingleQueue):
    """Checking, inserting, stripping and updating Data Integrity Fields."""

    def _dif_check(self, src: Address, size: int, fmt: DifFormat) -> Operation:
        fmt.blocks(self._size(size), protected=True)
        fields = {"src_addr": address_of(src, size), "xfer_size": size} | fmt.check_fields()
        return Operation("dif_check", lib.DSA_OPCODE_DIF_CHECK, fields, (src,))

    async def dif_check(
        self, src: Address, size: int, fmt: DifFormat, *, flags: int = 0, deadline: float | None = None
    ) -> None:
        """DIF_CHECK: checks ``size`` bytes of protected blocks."""
        await self._done(self._dif_check(src, size, fmt), flags, deadline)

    def dif_check_nowait(self, src: Address, size: int, fmt: DifFormat, *, flags: int = 0) -> Submission:
        """Submits a DIF_CHECK."""
        return self._start(self._dif_check(src, size, fmt), flags)

    def _dif_insert(self, dst: Address, src: Address, size: int, fmt: DifFormat) -> Operation:
        written = fmt.blocks(self._size(size), protected=False) * fmt.protected_size
        fields = {"src_addr": address_of(src, size), "dst_addr": address_of(dst, written), "xfer_size": size}
        return Operation("dif_insert", lib.DSA_OPCODE_DIF_INS, fields | fmt.insert_fields(), (dst, src))

    async def dif_insert(
        self,
        dst: Address,
        src: Address,
        size: int,
        fmt: DifFormat,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> None:
        """DIF_INS: copies ``size`` bytes of data and adds a field to every block; ``dst`` takes 8 more a block. The
        ranges must not overlap.
        """
        await self._done(self._dif_insert(dst, src, size, fmt), flags, deadline)

    def dif_insert_nowait(
        self, dst: Address, src: Address, size: int, fmt: DifFormat, *, flags: int = 0
    ) -> Submission:
        """Submits a DIF_INS."""
        return self._start(self._dif_insert(dst, src, size, fmt), flags)

    def _dif_strip(self, dst: Address, src: Address, size: int, fmt: DifFormat) -> Operation:
        written = fmt.blocks(self._size(size), protected=True) * fmt.block_size
        fields = {"src_addr": address_of(src, size), "dst_addr": address_of(dst, written), "xfer_size": size}
        return Operation("dif_strip", lib.DSA_OPCODE_DIF_STRP, fields | fmt.check_fields(), (dst, src))

    async def dif_strip(
        self,
        dst: Address,
        src: Address,
        size: int,
        fmt: DifFormat,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> None:
        """DIF_STRP: checks ``size`` bytes of protected blocks and copies their data, 8 bytes less a block. The ranges
        must not overlap.
        """
        await self._done(self._dif_strip(dst, src, size, fmt), flags, deadline)

    def dif_strip_nowait(
        self, dst: Address, src: Address, size: int, fmt: DifFormat, *, flags: int = 0
    ) -> Submission:
        """Submits a DIF_STRP."""
        return self._start(self._dif_strip(dst, src, size, fmt), flags)

    def _dif_update(
        self, dst: Address, src: Address, size: int, src_fmt: DifFormat, dst_fmt: DifFormat
    ) -> Operation:
        src_fmt.blocks(self._size(size), protected=True)
        fields = {"src_addr": address_of(src, size), "dst_addr": address_of(dst, size), "xfer_size": size}
        fields |= src_fmt.update_fields(dst_fmt)
        return Operation("dif_update", lib.DSA_OPCODE_DIF_UPDT, fields, (dst, src))

    async def dif_update(
        self,
        dst: Address,
        src: Address,
        size: int,
        src_fmt: DifFormat,
        dst_fmt: DifFormat,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> None:
        """DIF_UPDT: checks ``size`` bytes of protected blocks by ``src_fmt`` and copies them with the fields that
        ``dst_fmt`` asks for. The ranges must not overlap.
        """
        await self._done(self._dif_update(dst, src, size, src_fmt, dst_fmt), flags, deadline)

    def dif_update_nowait(
        self,
        dst: Address,
        src: Address,
        size: int,
        src_fmt: DifFormat,
        dst_fmt: DifFormat,
        *,
        flags: int = 0,
    ) -> Submission:
        """Submits a DIF_UPDT."""
        return self._start(self._dif_update(dst, src, size, src_fmt, dst_fmt), flags)

    def _dix_generate(self, dst: Address, src: Address, size: int, fmt: DifFormat) -> Operation:
        written = fmt.blocks(self._size(size), protected=False) * FIELD_SIZE
        fields = {"src_addr": address_of(src, size), "dst_addr": address_of(dst, written), "xfer_size": size}
        return Operation("dix_generate", lib.DSA_OPCODE_DIX_GEN, fields | fmt.insert_fields(), (dst, src))

    async def dix_generate(
        self,
        dst: Address,
        src: Address,
        size: int,
        fmt: DifFormat,
        *,
        flags: int = 0,
        deadline: float | None = None,
    ) -> None:
        """DIX_GEN: writes the fields of ``size`` bytes of data to ``dst``, 8 bytes a block. The ranges must not
        overlap.
        """
        await self._done(self._dix_generate(dst, src, size, fmt), flags, deadline)

    def dix_generate_nowait(
        self, dst: Address, src: Address, size: int, fmt: DifFormat, *, flags: int = 0
    ) -> Submission:
        """Submits a DIX_GEN."""
        return self._start(self._dix_generate(dst, src, size, fmt), flags)
