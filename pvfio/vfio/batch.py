"""Mapping and unmapping many ranges in one call: arrays of IOVAs, addresses and sizes.

A backend that can hands a whole batch over at once (``BatchFile``): the checks, the pins and the page tables of a
thousand mappings then cost little more than those of ten, and all of a batch's unmaps share one flush. For every other
backend a batch is a loop over its single requests, with the same results.

Not here: what a mapping means and every errno (``guest/type1.py``, or the kernel).
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import trio

from pvfio.abi import lib
from pvfio.errors import VfioBatchError, VfioError

if TYPE_CHECKING:
    from pvfio.memory import DmaBuffer

__all__ = [
    "BatchFile",
    "BatchOperations",
    "MapBatch",
    "UnmapMismatch",
    "Words",
    "batch_of",
    "ranges_of",
]

Words = npt.NDArray[np.uint64]
"""Shape (n,), contiguous: addresses or bytes."""

_READ: int = lib.VFIO_DMA_MAP_FLAG_READ
_WRITE: int = lib.VFIO_DMA_MAP_FLAG_WRITE


class UnmapMismatch(VfioError):
    """An unmap succeeded, but for another number of bytes than asked: ``length`` was asked, ``unmapped`` was
    done.
    """

    def __init__(self, iova: int, asked: int, unmapped: int) -> None:
        reason = f"{unmapped:#x} bytes were unmapped: what is mapped there is not what the caller believes"
        super().__init__(errno.ENOENT, "unmap_dma", reason, iova=iova, length=asked)
        self.unmapped = unmapped


class BatchFile(Protocol):
    """A container file that takes whole batches. Both raise VfioBatchError, and what a single request raises for
    the file's own state.
    """

    def map_batch(self, iovas: Words, vaddrs: Words, sizes: Words, flags: int, /) -> None: ...
    def unmap_batch(self, iovas: Words, sizes: Words, /) -> Words: ...


class BatchOperations(ABC):
    """What a container does with arrays. ``_batch_file``: the backend's fast path, None for the loop."""

    _batch_file: BatchFile | None = None

    @abstractmethod
    def _map_address_nowait(self, iova: int, vaddr: int, size: int, flags: int) -> None:
        """One mapping of process memory by its address; ``flags``: VFIO_DMA_MAP_FLAG_READ, _WRITE."""

    def _mapped(self, buffer: DmaBuffer, iova: int, size: int) -> None:
        """A buffer of a batch was mapped."""
        buffer.iova = iova

    @abstractmethod
    def try_unmap_dma_nowait(self, iova: int, size: int) -> int:
        """See ``Container.try_unmap_dma_nowait``."""

    def map_dma_batch_nowait(
        self,
        iovas: npt.ArrayLike,
        memory: npt.ArrayLike | Sequence[DmaBuffer],
        sizes: npt.ArrayLike | None = None,
        *,
        read: bool = True,
        write: bool = True,
    ) -> None:
        """Maps n ranges, in order: ``sizes[i]`` bytes of ``memory[i]`` at ``iovas[i]``. All or nothing.

        ``iovas``: shape (n,), uint64. ``memory``: process addresses, shape (n,), uint64 (the fast form), or a
        sequence of n DmaBuffers, whose ``iova`` is set. ``sizes``: bytes, shape (n,) or one for all; may be left out
        for DmaBuffers, each of which is then mapped whole.

        Raises ``VfioBatchError`` with the ``index`` of the element that was refused and the errno ``map_dma_nowait``
        gives for it; those before it are unmapped again, and devices may have used them until then. Raises
        ValueError for shapes, TypeError for dtypes that cannot be.
        """
        maps = batch_of(iovas, memory, sizes, read=read, write=write)
        if self._batch_file is not None:
            self._batch_file.map_batch(maps.iovas, maps.vaddrs, maps.sizes, maps.flags)
        else:
            self._map_loop(maps)
        self._batch_mapped(maps)

    async def map_dma_batch(
        self,
        iovas: npt.ArrayLike,
        memory: npt.ArrayLike | Sequence[DmaBuffer],
        sizes: npt.ArrayLike | None = None,
        *,
        read: bool = True,
        write: bool = True,
    ) -> None:
        """As ``map_dma_batch_nowait``. Cancelled: nothing is mapped."""
        await trio.lowlevel.checkpoint()
        self.map_dma_batch_nowait(iovas, memory, sizes, read=read, write=write)

    def try_unmap_dma_batch_nowait(self, iovas: npt.ArrayLike, sizes: npt.ArrayLike) -> Words:
        """Unmaps what is mapped in n ranges, in order, and returns the bytes of each, 0 included: shape (n,), uint64.

        ``iovas``: shape (n,), ``sizes``: shape (n,) or one for all. When it returns, no DMA lands there any more;
        where the backend takes whole batches, one flush saw to that. Raises ``VfioBatchError`` for the first element
        that is refused: those before it are unmapped (``unmapped`` has their bytes), it and those after it are not.
        Raises ValueError for shapes, TypeError for dtypes that cannot be.
        """
        at, lengths = ranges_of(iovas, sizes)
        if self._batch_file is not None:
            return self._batch_file.unmap_batch(at, lengths)
        unmapped = np.zeros(len(at), np.uint64)
        for index, (iova, size) in enumerate(zip(at.tolist(), lengths.tolist(), strict=True)):
            try:
                unmapped[index] = self.try_unmap_dma_nowait(iova, size)
            except VfioError as error:
                raise VfioBatchError(error, index, unmapped[:index]) from None
        return unmapped

    async def try_unmap_dma_batch(self, iovas: npt.ArrayLike, sizes: npt.ArrayLike) -> Words:
        """As ``try_unmap_dma_batch_nowait``. Cancelled: nothing is unmapped."""
        await trio.lowlevel.checkpoint()
        return self.try_unmap_dma_batch_nowait(iovas, sizes)

    def unmap_dma_batch_nowait(self, iovas: npt.ArrayLike, sizes: npt.ArrayLike) -> Words:
        """As ``try_unmap_dma_batch_nowait``; raises ``UnmapMismatch`` for the first range of which another number of
        bytes was unmapped than asked. All of them have been dealt with then.
        """
        return _all_of_them(iovas, sizes, self.try_unmap_dma_batch_nowait(iovas, sizes))

    async def unmap_dma_batch(self, iovas: npt.ArrayLike, sizes: npt.ArrayLike) -> Words:
        """As ``unmap_dma_batch_nowait``. Cancelled: nothing is unmapped."""
        return _all_of_them(iovas, sizes, await self.try_unmap_dma_batch(iovas, sizes))

    def _batch_mapped(self, maps: MapBatch) -> None:
        if maps.buffers is not None:
            ranges = zip(maps.buffers, maps.iovas.tolist(), maps.sizes.tolist(), strict=True)
            for buffer, iova, size in ranges:
                self._mapped(buffer, iova, size)

    def _map_loop(self, maps: MapBatch) -> None:
        iovas, vaddrs, sizes = maps.iovas.tolist(), maps.vaddrs.tolist(), maps.sizes.tolist()
        done = 0
        try:
            for iova, vaddr, size in zip(iovas, vaddrs, sizes, strict=True):
                self._map_address_nowait(iova, vaddr, size, maps.flags)
                done += 1
        except BaseException as error:
            for iova, size in zip(iovas[:done], sizes[:done], strict=True):
                self.try_unmap_dma_nowait(iova, size)
            if isinstance(error, VfioError):
                raise VfioBatchError(error, done) from None
            raise


class MapBatch(NamedTuple):
    """A batch of mappings: three arrays of one length, the flags of all, and the buffers where it was made of such."""

    iovas: Words
    vaddrs: Words
    sizes: Words
    flags: int
    buffers: Sequence[DmaBuffer] | None


def batch_of(
    iovas: npt.ArrayLike,
    memory: npt.ArrayLike | Sequence[DmaBuffer],
    sizes: npt.ArrayLike | None,
    *,
    read: bool,
    write: bool,
) -> MapBatch:
    """The arguments of ``map_dma_batch``, checked as far as arrays can be."""
    buffers = _buffers(memory)
    at = _words("iovas", iovas)
    if buffers is None:
        addresses = _words("memory", memory, len(at))
    else:
        addresses = _words("memory", [buffer.vaddr for buffer in buffers], len(at))
        if sizes is None:
            sizes = [buffer.nbytes_mapped or buffer.nbytes for buffer in buffers]
    if sizes is None:
        raise ValueError("memory by its addresses needs sizes")
    flags = (_READ if read else 0) | (_WRITE if write else 0)
    return MapBatch(at, addresses, _words("sizes", sizes, len(at)), flags, buffers)


def ranges_of(iovas: npt.ArrayLike, sizes: npt.ArrayLike) -> tuple[Words, Words]:
    """The arguments of ``try_unmap_dma_batch``, checked as far as arrays can be."""
    at = _words("iovas", iovas)
    return at, _words("sizes", sizes, len(at))


def _all_of_them(iovas: npt.ArrayLike, sizes: npt.ArrayLike, unmapped: Words) -> Words:
    """What was unmapped. Raises ``UnmapMismatch`` where it is not what was asked."""
    asked = np.broadcast_to(np.asarray(sizes, np.uint64), unmapped.shape)
    wrong = unmapped != asked
    if wrong.any():
        index = int(wrong.argmax())
        raise UnmapMismatch(int(np.asarray(iovas)[index]), int(asked[index]), int(unmapped[index]))
    return unmapped


def _buffers(memory: Any) -> Sequence[DmaBuffer] | None:
    """The DmaBuffers of a sequence of them; None for numbers."""
    if isinstance(memory, np.ndarray) or not isinstance(memory, Sequence) or not memory:
        return None
    return memory if hasattr(memory[0], "vaddr") else None


def _words(name: str, values: Any, length: int | None = None) -> Words:
    """64-bit numbers as one contiguous array; a single one is repeated ``length`` times where that is given."""
    array = np.asarray(values)
    if array.dtype != np.uint64:
        if array.size == 0:
            array = array.astype(np.uint64)
        elif array.dtype == np.int64:
            if array.min() < 0:
                index = int((array.reshape(-1) < 0).argmax())
                raise VfioBatchError(VfioError(errno.EINVAL, "batch", f"{name}: not 64 bits"), index)
            array = array.astype(np.uint64)
        else:
            raise TypeError(f"{name} are 64-bit integers, not {array.dtype}")
    if length is not None and array.ndim == 0:
        return np.full(length, array, np.uint64)
    if array.ndim != 1 or (length is not None and len(array) != length):
        raise ValueError(f"{name} have shape {array.shape}, not ({'n' if length is None else length},)")
    return np.ascontiguousarray(array)
