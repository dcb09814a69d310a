"""A container of vfio-user devices: an IO address space that is told to every server in it, map by map.

A map is checked as type1 checks it, then becomes a DMA_MAP for each piece of its memory, with the memfd and the
offset; it is there when every server has said so, and nowhere when one has refused. An unmap becomes a DMA_UNMAP
for each of those pieces, by its exact range. Servers that join get what is mapped when their device is opened. A
server that has gone holds nothing; from one that does not answer, memory it may still reach stays pinned until it
serves again.

Every request to a server waits, so ``_nowait`` twins check a request and raise trio.WouldBlock where it would be
carried out. Not modelled: dirty tracking.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, VfioBatchError, VfioError
from pvfio.vfio.batch import Words, batch_of, ranges_of
from pvfio.vfio.container import Container, IommuInfo
from pvfio.vfio.ioas import extent_of
from pvfio.vfio_user.client.memory import IOVA_RANGES, Mapping, Mappings
from pvfio.vfio_user.client.servers import Servers
from pvfio.vfio_user.wire import PAGE

if TYPE_CHECKING:
    from pvfio.memory import DmaBuffer
    from pvfio.vfio_user.client.backend import VfioUserVfio
    from pvfio.vfio_user.client.link import Link

__all__ = ["UserContainer"]

_READ: Final[int] = lib.VFIO_DMA_MAP_FLAG_READ
_WRITE: Final[int] = lib.VFIO_DMA_MAP_FLAG_WRITE
_TYPES: Final = (lib.VFIO_TYPE1_IOMMU, lib.VFIO_TYPE1v2_IOMMU)
_EXTENSIONS: Final = (*_TYPES, lib.VFIO_UNMAP_ALL)


class UserContainer(Container):
    """Made by ``VfioUserVfio.open_container``."""

    def __init__(self, vfio: VfioUserVfio) -> None:
        super().__init__()
        self.closed = False
        self._vfio = vfio
        self._kind: int | None = None
        self._mappings = Mappings(vfio.memories)
        self._servers = Servers(self._mappings, share=vfio.share)
        self._memory: Any = None
        # Mappings, by IOVA, that a request to a server is about.
        self._busy: dict[int, trio.Event] = {}

    @property
    def ready(self) -> bool:
        return self._kind is not None

    def check_extension(self, extension: int) -> bool:
        self._check_open("CHECK_EXTENSION")
        return extension in _EXTENSIONS

    async def set_iommu(self, kind: int | None = None) -> None:
        await trio.lowlevel.checkpoint()
        self._check_open("SET_IOMMU")
        if not self._servers.links or self._kind is not None:
            reason = "the container has no group" if not self._servers.links else "set already"
            raise VfioError(errno.EINVAL, "SET_IOMMU", reason)
        kind = int(lib.VFIO_TYPE1v2_IOMMU) if kind is None else kind
        if kind not in _TYPES:
            raise VfioError(errno.ENODEV, "SET_IOMMU", f"no IOMMU type {kind}")
        self._kind = kind
        self.refresh()

    def info(self) -> IommuInfo:
        self._check_ready("GET_INFO")
        return IommuInfo(PAGE, IOVA_RANGES, self._servers.most_pieces - self._mappings.pieces, None)

    # Groups.

    def join(self, link: Link) -> None:
        """A group was put in. Raises EINVAL where its server cannot hold what is mapped."""
        if self._mappings.pieces > link.limits.max_dma_maps:
            reason = f"{self._mappings.pieces} mappings are more than {link.limits.max_dma_maps}"
            raise VfioError(errno.EINVAL, "SET_CONTAINER", reason, device=link.name)
        if not link.limits.pgsizes & PAGE:
            raise VfioError(errno.EINVAL, "SET_CONTAINER", "it has no pages of 4 KiB", device=link.name)
        self._servers.links.append(link)
        self.users += 1
        link.reach = self._mappings
        self.refresh()

    def leave(self, link: Link) -> None:
        """A group was taken out, and its connection ended; the last one takes the IOMMU type and every mapping
        along.
        """
        self._servers.links.remove(link)
        self.users -= 1
        link.reach = None
        if self._servers.links:
            return
        self._kind = None
        for mapping in list(self._mappings):
            self._mappings.drop(mapping, keep=link.silent)
        self._forget_iovas()
        if self.closed:
            self._memory = None

    def refresh(self) -> None:
        """A group came: ``alloc`` may use what a server takes."""
        if self._kind is not None and not self.iova_allocator.ranges:
            self.iova_allocator.set_ranges(IOVA_RANGES)

    async def feed(self, link: Link) -> None:
        """Tells a server that joined what is mapped. Raises as a map. Cancelled or failed: its connection is to be
        ended.
        """
        if link.fed:
            return
        await self._idle()
        if self._servers.silent is None:
            self._mappings.release_kept()
        link.fed = True
        mappings = list(self._mappings)
        with self._at_work(mappings):
            await self._servers.map(mappings, [link])

    # Maps.

    def map_dma_nowait(self, iova: int, buffer: Any, *, read: bool = True, write: bool = True) -> None:
        vaddr, size, _ = extent_of(buffer)
        self._map_address_nowait(iova, vaddr, size, (_READ if read else 0) | (_WRITE if write else 0))

    def _map_address_nowait(self, iova: int, vaddr: int, size: int, flags: int) -> None:
        self._mappings.drop(self._admit(iova, vaddr, size, flags))
        raise trio.WouldBlock

    async def map_dma(self, iova: int, buffer: Any, *, read: bool = True, write: bool = True) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        vaddr, size, plain = extent_of(buffer)
        try:
            mapping = self._admit(iova, vaddr, size, (_READ if read else 0) | (_WRITE if write else 0))
        except VfioError:
            await trio.lowlevel.cancel_shielded_checkpoint()
            raise
        await self._announce([mapping])
        if not plain:
            buffer.iova = iova

    async def map_dma_batch(
        self,
        iovas: npt.ArrayLike,
        memory: npt.ArrayLike | Sequence[DmaBuffer],
        sizes: npt.ArrayLike | None = None,
        *,
        read: bool = True,
        write: bool = True,
    ) -> None:
        await trio.lowlevel.checkpoint()
        batch = batch_of(iovas, memory, sizes, read=read, write=write)
        self._check_ready("map_dma")
        mappings: list[Mapping] = []
        elements = zip(batch.iovas.tolist(), batch.vaddrs.tolist(), batch.sizes.tolist(), strict=True)
        for iova, vaddr, size in elements:
            try:
                mappings.append(self._admit(iova, vaddr, size, batch.flags))
            except VfioError as error:
                for mapping in mappings:
                    self._mappings.drop(mapping)
                raise VfioBatchError(error, len(mappings)) from None
        try:
            await self._announce(mappings)
        except VfioError as error:
            refused = next((i for i, mapping in enumerate(mappings) if mapping.iova == error.iova), 0)
            raise VfioBatchError(error, refused) from None
        self._batch_mapped(batch)

    def _admit(self, iova: int, vaddr: int, size: int, flags: int) -> Mapping:
        self._check_ready("map_dma")
        return self._mappings.add(iova, vaddr, size, flags, self._servers.most_pieces)

    async def _announce(self, mappings: list[Mapping]) -> None:
        """Tells every server of new mappings; where it fails or is cancelled they are nowhere any more."""
        with self._at_work(mappings):
            try:
                await self._servers.map(mappings, self._servers.to_tell("map_dma"))
            except BaseException:
                for mapping in mappings:
                    self._mappings.drop(mapping, keep=self._servers.silent is not None)
                raise

    # Unmaps.

    def try_unmap_dma_nowait(self, iova: int, size: int) -> int:
        self._check_ready("unmap_dma")
        if self._mappings.to_unmap(iova, size, v2=self._v2):
            raise trio.WouldBlock
        return 0

    async def try_unmap_dma(self, iova: int, size: int) -> int:
        """As the base class says; raises DeadlineExceeded where a server does not answer: it is unmapped, and its
        memory stays pinned.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            found = await self._to_unmap(iova, size)
        except VfioError:
            await trio.lowlevel.cancel_shielded_checkpoint()
            raise
        await self._unmap(found)
        return sum(mapping.size for mapping in found)

    async def try_unmap_dma_batch(self, iovas: npt.ArrayLike, sizes: npt.ArrayLike) -> Words:
        await trio.lowlevel.checkpoint()
        at, lengths = ranges_of(iovas, sizes)
        self._check_ready("unmap_dma")
        unmapped = np.zeros(len(at), np.uint64)
        taken: dict[int, Mapping] = {}
        refusal: tuple[VfioError, int] | None = None
        for index, (iova, size) in enumerate(zip(at.tolist(), lengths.tolist(), strict=True)):
            try:
                found = await self._to_unmap(iova, size, taken)
            except VfioError as error:
                refusal = error, index
                break
            taken |= {mapping.iova: mapping for mapping in found}
            unmapped[index] = sum(mapping.size for mapping in found)
        await self._unmap(list(taken.values()))
        if refusal is not None:
            raise VfioBatchError(*refusal, unmapped[: refusal[1]])
        return unmapped

    async def unmap_all(self) -> int:
        await trio.lowlevel.checkpoint()
        self._check_ready("unmap_dma")
        await self._idle()
        found = list(self._mappings)
        await self._unmap(found)
        self._forget_iovas()
        return sum(mapping.size for mapping in found)

    async def _to_unmap(self, iova: int, size: int, without: Collection[int] = ()) -> list[Mapping]:
        """What to unmap, once no other request is about any of it."""
        while True:
            self._check_ready("unmap_dma")
            found = self._mappings.to_unmap(iova, size, v2=self._v2, without=without)
            busy = next((self._busy[m.iova] for m in found if m.iova in self._busy), None)
            if busy is None:
                return found
            await busy.wait()

    async def _idle(self) -> None:
        """Until no request about any mapping is under way."""
        while self._busy:
            await next(iter(self._busy.values())).wait()

    async def _unmap(self, mappings: list[Mapping]) -> None:
        """Takes mappings away from every server, and then away; not cancelled once it began."""
        if not mappings:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        with self._at_work(mappings):
            await self._servers.unmap(mappings)
            silent = self._servers.silent
            for mapping in mappings:
                self._mappings.drop(mapping, keep=silent is not None)
        if silent is not None:
            raise DeadlineExceeded("unmap_dma", silent.deadline, device=silent.name)

    # What is asked before.

    async def close(self) -> None:
        self.closed = True
        if not self._servers.links:
            self._memory = None
        await trio.lowlevel.checkpoint()

    def _new_buffer(self, size: int, align: int, scattered: bool) -> DmaBuffer:
        if self._memory is None:
            self._memory = self._vfio.new_memory()
        buffer: DmaBuffer = self._memory.alloc(size, align=align, scattered=scattered)
        return buffer

    @property
    def _v2(self) -> bool:
        return bool(self._kind == lib.VFIO_TYPE1v2_IOMMU)

    def _check_open(self, operation: str) -> None:
        if self.closed:
            raise VfioError(errno.EBADF, operation, "the container is closed")

    def _check_ready(self, operation: str) -> None:
        self._check_open(operation)
        if self._kind is None:
            raise VfioError(errno.EINVAL, operation, "before SET_IOMMU")

    def _at_work(self, mappings: list[Mapping]) -> _Work:
        return _Work(self._busy, [mapping.iova for mapping in mappings])


class _Work:
    """While it is entered, other requests about these mappings wait."""

    def __init__(self, busy: dict[int, trio.Event], iovas: list[int]) -> None:
        self._busy = busy
        self._iovas = iovas

    def __enter__(self) -> None:
        event = trio.Event()
        for iova in self._iovas:
            self._busy[iova] = event

    def __exit__(self, *exception: object) -> None:
        event = self._busy.get(self._iovas[0]) if self._iovas else None
        for iova in self._iovas:
            self._busy.pop(iova, None)
        if event is not None:
            event.set()
