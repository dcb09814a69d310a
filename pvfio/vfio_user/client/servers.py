"""The servers of a container: telling them what is mapped, and what not any more.

Requests are pipelined. A map is all or nothing: what became of each request is known before what was done is taken
back.

Not here: what may be mapped (memory.py), and the requests of users (container.py).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, VfioError
from pvfio.vfio_user.client.link import SPIN_NS
from pvfio.vfio_user.messages import DmaMap, DmaUnmap

if TYPE_CHECKING:
    from pvfio.vfio_user.client.call import Call
    from pvfio.vfio_user.client.link import Link
    from pvfio.vfio_user.client.memory import Mapping, Mappings

__all__ = ["Servers"]

_DMA_MAP: Final[int] = lib.VFIO_USER_DMA_MAP
_DMA_UNMAP: Final[int] = lib.VFIO_USER_DMA_UNMAP
_RIGHTS: Final[int] = lib.VFIO_USER_F_DMA_REGION_READ | lib.VFIO_USER_F_DMA_REGION_WRITE
# Requests to one server that may wait for their replies at a time.
_PIPELINED: Final = 64


class Servers:
    """``links``: one for each group in the container. ``share``: they get the files of the memory."""

    def __init__(self, mappings: Mappings, *, share: bool) -> None:
        self.links: list[Link] = []
        self._mappings = mappings
        self._share = share

    @property
    def most_pieces(self) -> int:
        """How many maps every one of them can hold."""
        return min((link.limits.max_dma_maps for link in self.links), default=0)

    @property
    def silent(self) -> Link | None:
        """One that does not answer, so that what it may still reach is not known."""
        return next((link for link in self.links if link.silent), None)

    def to_tell(self, operation: str) -> list[Link]:
        """Those to tell of a new mapping: who joins later is told when its device is opened. Raises ENODEV where all
        are lost.
        """
        lost = [link for link in self.links if link.lost is not None]
        if lost and len(lost) == len(self.links):
            raise lost[0].error(operation)
        return [link for link in self.links if link.fed]

    async def map(self, mappings: list[Mapping], links: list[Link]) -> None:
        """DMA_MAPs. Raises VfioError, which names the mapping where a server refuses it, and DeadlineExceeded.
        Failed or cancelled: what was done is taken back.
        """
        sent: list[Told] = []
        ended = 0
        try:
            for mapping in mappings:
                fds = (self._mappings.fd(mapping),) if self._share else ()
                iova, rights = mapping.iova, mapping.flags & _RIGHTS
                for offset, size in self._mappings.file_pieces(mapping):
                    body = DmaMap(iova, size, rights, offset if fds else 0).pack()
                    for link in links:
                        call = await link.begin(_DMA_MAP, body, operation="map_dma", fds=fds)
                        sent.append(Told(link, call, iova, size, mapping))
                    iova += size
                while len(sent) - ended > _PIPELINED * len(links):
                    await sent[ended].end()
                    ended += 1
            if sent:
                sent[-1].link.look(sent[-1].call)
            await trio.lowlevel.checkpoint()
            while ended < len(sent):
                await sent[ended].end()
                ended += 1
        except BaseException:
            await self._take_back(sent)
            raise

    async def _take_back(self, sent: list[Told]) -> None:
        done = [told for told in sent if await told.link.settle(told.call)]
        waiting = []
        for told in done:
            if told.link.connected:
                waiting += await self._ask(told.link, DmaUnmap(told.iova, told.size).pack())
        for link, call in waiting:
            await self._answered(link, call)

    async def unmap(self, mappings: Iterable[Mapping]) -> None:
        """DMA_UNMAPs, to all that were told of them. A server that refuses is lost, and so forgets everything; one that
        does not answer is lost and ``silent``. Not cancelled.
        """
        links = [link for link in self.links if link.fed]
        waiting: list[tuple[Link, Call]] = []
        for mapping in mappings:
            iova = mapping.iova
            for _, size in self._mappings.file_pieces(mapping):
                body = DmaUnmap(iova, size).pack()
                for link in links:
                    if link.connected:
                        waiting += await self._ask(link, body)
                iova += size
            while len(waiting) > _PIPELINED * len(links):
                await self._answered(*waiting.pop(0))
        if waiting:
            waiting[-1][0].look(waiting[-1][1])
        await trio.lowlevel.cancel_shielded_checkpoint()
        for link, call in waiting:
            await self._answered(link, call)

    @staticmethod
    async def _ask(link: Link, body: bytes) -> list[tuple[Link, Call]]:
        try:
            return [(link, await link.begin(_DMA_UNMAP, body, operation="unmap_dma", shield=True))]
        except (VfioError, DeadlineExceeded):  # lost
            return []

    @staticmethod
    async def _answered(link: Link, call: Call) -> None:
        try:
            with trio.CancelScope(shield=True) if not link.look(call, SPIN_NS) else nullcontext():
                await link.end(call)
        except DeadlineExceeded:
            link.lose(f"no answer to an unmap within {link.deadline:g} s", silent=True)
        except VfioError as error:
            link.lose(f"it refused an unmap: {error.reason or error.strerror}")


class Told(NamedTuple):
    """A DMA_MAP that was sent: of a piece, [iova, iova + size), of a mapping."""

    link: Link
    call: Call
    iova: int
    size: int
    mapping: Mapping

    async def end(self) -> None:
        try:
            await self.link.end(self.call)
        except VfioError as error:
            if not self.link.connected:
                raise
            raise VfioError(
                error.errno or errno.EIO,
                "map_dma",
                error.reason or "the server refused it",
                device=self.link.name,
                iova=self.mapping.iova,
                length=self.mapping.size,
            ) from None
