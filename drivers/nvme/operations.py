"""The commands of an I/O queue that a task awaits: read, write, flush and the rest of the NVM command set.

Sections: NVM Command Set 1.0c 3.2. Data is a ``DmaBuffer`` of whole blocks; a longer one than the controller takes at
once becomes several commands, which are not one to anybody who looks meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from pvfio.abi import dtype_of, lib
from pvfio.drivers.nvme.data_pointer import scattered
from pvfio.drivers.nvme.errors import opcode_name
from pvfio.drivers.nvme.qpair import VectorQueue
from pvfio.drivers.nvme.queue import Command
from pvfio.drivers.nvme.sqe import Sqe

if TYPE_CHECKING:
    from pvfio.drivers.nvme.identify import Namespace
    from pvfio.vfio import DmaBuffer

__all__ = ["QueuePair"]

_MOST_BLOCKS: Final = 1 << 16
_COPY_RANGES: Final = 128


class QueuePair(VectorQueue):
    """An I/O queue with its commands.

    ``nsid`` is a namespace that was found, ``lba`` its first block. ``deadline`` is in seconds (default: the
    driver's). All raise ``NvmeError`` for another status than success, ``DeadlineExceeded``, ``OperationAborted`` when
    a reset took the command back, ``DeviceFailed``, ``VfioError`` where the controller cannot be told of the command,
    and ``ValueError`` for what cannot be asked. When they return or raise, and when they are cancelled, the controller
    does not touch the buffers any more.
    """

    async def read(
        self,
        nsid: int,
        lba: int,
        buffer: DmaBuffer,
        *,
        metadata: DmaBuffer | None = None,
        control: int = 0,
        deadline: float | None = None,
    ) -> None:
        """Reads ``buffer.nbytes`` bytes (3.2.4). ``control``: ``lib.NVME_RW_*`` of CDW12."""
        await self._transfer(lib.NVME_CMD_READ, nsid, lba, buffer, metadata, control, deadline)

    async def write(
        self,
        nsid: int,
        lba: int,
        buffer: DmaBuffer,
        *,
        fua: bool = False,
        metadata: DmaBuffer | None = None,
        control: int = 0,
        deadline: float | None = None,
    ) -> None:
        """Writes ``buffer.nbytes`` bytes (3.2.6). ``fua``: they are durable when it returns."""
        control |= int(lib.NVME_RW_FUA) if fua else 0
        await self._transfer(lib.NVME_CMD_WRITE, nsid, lba, buffer, metadata, control, deadline)

    async def compare(
        self,
        nsid: int,
        lba: int,
        buffer: DmaBuffer,
        *,
        metadata: DmaBuffer | None = None,
        control: int = 0,
        deadline: float | None = None,
    ) -> None:
        """Compares blocks with ``buffer`` (3.2.1); ``NvmeError`` COMPARE_FAILED where they differ."""
        await self._transfer(lib.NVME_CMD_COMPARE, nsid, lba, buffer, metadata, control, deadline)

    async def readv(
        self, nsid: int, lba: int, buffers: Sequence[DmaBuffer], *, deadline: float | None = None
    ) -> None:
        """Reads consecutive blocks into several buffers, in one command; together they are whole blocks.

        Without SGLs every boundary between two buffers must be one of memory pages: ``ValueError``.
        """
        await self._vectored(lib.NVME_CMD_READ, nsid, lba, buffers, 0, deadline)

    async def writev(
        self,
        nsid: int,
        lba: int,
        buffers: Sequence[DmaBuffer],
        *,
        fua: bool = False,
        deadline: float | None = None,
    ) -> None:
        """Writes several buffers to consecutive blocks; else as ``readv``."""
        control = int(lib.NVME_RW_FUA) if fua else 0
        await self._vectored(lib.NVME_CMD_WRITE, nsid, lba, buffers, control, deadline)

    async def flush(self, nsid: int | None = None, *, deadline: float | None = None) -> None:
        """What was written before is durable when it returns (Base 7.1): of a namespace, or of all.

        All are one command where the controller takes that (VWC), else one after the other.
        """
        if nsid is not None:
            numbers = [nsid]
        elif self._controller.controller.flush_broadcast:
            numbers = [int(lib.NVME_NSID_ALL)]
        else:
            numbers = list(self._controller.namespaces)
        for number in numbers:
            await self._done(Sqe(lib.NVME_CMD_FLUSH, number), "flush", deadline)

    async def write_zeroes(
        self,
        nsid: int,
        lba: int,
        blocks: int,
        *,
        deallocate: bool = False,
        fua: bool = False,
        deadline: float | None = None,
    ) -> None:
        """Blocks read as zeroes afterwards (3.2.8)."""
        control = (int(lib.NVME_RW_DEAC) if deallocate else 0) | (int(lib.NVME_RW_FUA) if fua else 0)
        await self._blocks(lib.NVME_CMD_WRITE_ZEROES, nsid, lba, blocks, control, deadline)

    async def write_uncorrectable(
        self, nsid: int, lba: int, blocks: int, *, deadline: float | None = None
    ) -> None:
        """Reading these blocks fails until they are written (3.2.7)."""
        await self._blocks(lib.NVME_CMD_WRITE_UNCOR, nsid, lba, blocks, 0, deadline)

    async def verify(
        self, nsid: int, lba: int, blocks: int, *, control: int = 0, deadline: float | None = None
    ) -> None:
        """The controller reads and checks blocks, and transfers nothing (3.2.5)."""
        await self._blocks(lib.NVME_CMD_VERIFY, nsid, lba, blocks, control, deadline)

    async def deallocate(
        self, nsid: int, ranges: Sequence[tuple[int, int]], *, deadline: float | None = None
    ) -> None:
        """Tells that ranges, (first block, blocks) each, are not needed any more (3.2.3); at most 256."""
        await self.dataset_management(nsid, ranges, int(lib.NVME_DSM_AD), deadline=deadline)

    async def dataset_management(
        self, nsid: int, ranges: Sequence[tuple[int, int]], attributes: int, *, deadline: float | None = None
    ) -> None:
        """Dataset management with any attributes, ``lib.NVME_DSM_*`` (3.2.3)."""
        if not 1 <= len(ranges) <= lib.NVME_DSM_MAX_RANGES:
            raise ValueError(f"1 to {lib.NVME_DSM_MAX_RANGES} ranges, not {len(ranges)}")
        entries = np.zeros(len(ranges), dtype=dtype_of("struct nvme_dsm_range"))
        entries["slba"], entries["nlb"] = np.array(ranges, dtype=np.uint64).T
        sqe = Sqe(lib.NVME_CMD_DSM, nsid, cdw10=len(ranges) - 1, cdw11=attributes)
        await self._with_list(sqe, entries.tobytes(), "dataset management", ranges[0][0], deadline)

    async def copy(
        self, nsid: int, ranges: Sequence[tuple[int, int]], to: int, *, deadline: float | None = None
    ) -> None:
        """Copies ranges, (first block, blocks) each, one after the other to ``to`` on (3.2.2); at most 128."""
        if not 1 <= len(ranges) <= _COPY_RANGES or not all(1 <= n <= _MOST_BLOCKS for _, n in ranges):
            raise ValueError(f"1 to {_COPY_RANGES} ranges of 1 to {_MOST_BLOCKS} blocks")
        entries = np.zeros(len(ranges), dtype=dtype_of("struct nvme_copy_range"))
        entries["slba"] = [first for first, _ in ranges]
        entries["nlb"] = [blocks - 1 for _, blocks in ranges]
        sqe = Sqe(lib.NVME_CMD_COPY, nsid, cdw10=to & 0xFFFFFFFF, cdw11=to >> 32, cdw12=len(ranges) - 1)
        await self._with_list(sqe, entries.tobytes(), "copy", to, deadline)

    async def compare_and_write(
        self, nsid: int, lba: int, expected: DmaBuffer, data: DmaBuffer, *, deadline: float | None = None
    ) -> None:
        """Writes ``data`` if the blocks are as ``expected``, with nothing in between (a fused pair, Base 3.4.2).

        ``NvmeError`` COMPARE_FAILED where they are not; nothing was written then.
        """
        namespace, blocks, _ = self._extent(nsid, lba, expected)
        if expected.nbytes != data.nbytes:
            raise ValueError(f"{expected.nbytes} bytes are compared, {data.nbytes} written")
        self._one_command(expected.nbytes)
        pair = []
        async with self._controller.pages.borrow() as first, self._controller.pages.borrow() as second:
            fuses = (lib.NVME_CMD_FUSE_FIRST, lib.NVME_CMD_FUSE_SECOND)
            opcodes = (lib.NVME_CMD_COMPARE, lib.NVME_CMD_WRITE)
            for opcode, fuse, buffer, page in zip(
                opcodes, fuses, (expected, data), (first, second), strict=True
            ):
                sqe = _block_command(opcode, namespace.nsid, lba, blocks, 0)
                self._point(sqe, [buffer], page)
                sqe.flags |= fuse
                pair.append(sqe)
            await self._fused(pair, lba, deadline)

    # How they are made

    def _namespace(self, nsid: int) -> Namespace:
        namespace = self._controller.namespaces.get(nsid)
        if namespace is None:
            raise ValueError(f"no namespace {nsid} was found on {self.device}")
        return namespace

    def _extent(self, nsid: int, lba: int, *buffers: DmaBuffer) -> tuple[Namespace, int, int]:
        """The namespace, how many blocks the buffers are, and where the first one is. ``ValueError`` for what is not
        whole blocks.
        """
        namespace = self._namespace(nsid)
        size, places = 0, []
        for buffer in buffers:
            iova = buffer.iova
            if iova is None:
                raise ValueError("the buffer is not mapped: the controller cannot reach it")
            if iova % 4 or not buffer.flags.c_contiguous:
                raise ValueError("a buffer is contiguous and begins at a multiple of four bytes")
            size += buffer.nbytes
            places.append(iova)
        block = namespace.transfer_size
        if not size or size % block:
            raise ValueError(f"{size} bytes are not whole blocks of {block} bytes")
        if lba < 0:
            raise ValueError(f"no block has the number {lba}")
        return namespace, size // block, places[0]

    def _one_command(self, size: int) -> None:
        most = self._controller.max_transfer
        if size > most:
            raise ValueError(f"{size} bytes are more than the {most} of one command")

    async def _transfer(
        self,
        opcode: int,
        nsid: int,
        lba: int,
        buffer: DmaBuffer,
        metadata: DmaBuffer | None,
        control: int,
        deadline: float | None,
    ) -> None:
        namespace, blocks, first = self._extent(nsid, lba, buffer)
        place = None
        if metadata is not None:
            if metadata.nbytes != blocks * namespace.metadata:
                raise ValueError(
                    f"{metadata.nbytes} bytes of metadata for {blocks} blocks of {namespace.metadata}"
                )
            place = metadata.iova or 0
        name, block = opcode_name(opcode), namespace.transfer_size
        most = min(_MOST_BLOCKS, self._controller.max_transfer // block)
        for done in range(0, blocks, most):
            start = self._starter(
                opcode,
                nsid,
                lba + done,
                min(most, blocks - done),
                first + done * block,
                place + done * namespace.metadata if place is not None else None,
                control,
            )
            self._judge(await self._run(start, name, deadline), opcode, nsid, lba + done)

    def _starter(
        self, opcode: int, nsid: int, lba: int, blocks: int, iova: int, metadata: int | None, control: int
    ) -> Callable[[Command], None]:
        """What submits one command."""

        def start(command: Command) -> None:
            if metadata is None:
                command.cid = self.submit_one_nowait(opcode, nsid, lba, blocks, iova, control=control)
            else:
                where = np.array([lba, iova, metadata], dtype=np.uint64)
                cids = self.submit_nowait(
                    opcode, nsid, where[:1], blocks, where[1:2], control=control, metadata=where[2:]
                )
                command.cid = int(cids[0])
            self._waiters[command.cid] = command

        return start

    async def _blocks(
        self, opcode: int, nsid: int, lba: int, blocks: int, control: int, deadline: float | None
    ) -> None:
        """A command without data, or several where it has more blocks than one takes."""
        if blocks < 1 or lba < 0:
            raise ValueError(f"{blocks} blocks from {lba} on are none")
        for first in range(lba, lba + blocks, _MOST_BLOCKS):
            some = min(_MOST_BLOCKS, lba + blocks - first)
            sqe = _block_command(opcode, nsid, first, some, control)
            await self._done(sqe, opcode_name(opcode), deadline, lba=first)

    async def _with_list(
        self, sqe: Sqe, entries: bytes, operation: str, lba: int, deadline: float | None
    ) -> None:
        """A command whose data is a list of ranges: at most a page."""
        async with self._controller.pages.borrow() as page:
            page[: len(entries)] = np.frombuffer(entries, dtype=np.uint8)
            sqe.prp1 = page.iova or 0
            await self._done(sqe, operation, deadline, lba=lba)

    async def _vectored(
        self,
        opcode: int,
        nsid: int,
        lba: int,
        buffers: Sequence[DmaBuffer],
        control: int,
        deadline: float | None,
    ) -> None:
        namespace, blocks, _ = self._extent(nsid, lba, *buffers)
        self._one_command(blocks * namespace.transfer_size)
        sqe = _block_command(opcode, nsid, lba, blocks, control)
        async with self._controller.pages.borrow() as page:
            self._point(sqe, buffers, page)
            await self._done(sqe, opcode_name(opcode), deadline, lba=lba)

    def _point(self, sqe: Sqe, buffers: Sequence[DmaBuffer], page: DmaBuffer) -> None:
        flags, sqe.prp1, sqe.prp2 = scattered(buffers, page, sgl=self._lists is None)
        sqe.flags |= flags

    async def _fused(self, pair: list[Sqe], lba: int, deadline: float | None) -> None:
        commands: list[Command] = []

        def start(command: Command) -> None:
            commands.extend((command, Command("write")))
            self._start(*zip(commands, pair, strict=True))

        first = await self._run(start, "compare", deadline, count=2)
        try:
            await self._until(lambda: commands[1].done)
        except BaseException:
            await self._make_safe(lambda: commands[1].done, lambda: [commands[1].cid])
            raise
        self._judge(first, pair[0].opcode, pair[0].nsid, lba)
        self._judge(commands[1], pair[1].opcode, pair[1].nsid, lba)


def _block_command(opcode: int, nsid: int, lba: int, blocks: int, control: int) -> Sqe:
    return Sqe(opcode, nsid, cdw10=lba & 0xFFFFFFFF, cdw11=lba >> 32, cdw12=blocks - 1 | control)
