"""What a container of vfio-user devices has mapped: type1's rules, the index of mappings, and what servers may ask for.

Models Linux's type1 as far as a process that gives memory away needs it: which request is refused with which errno,
in which order (overflow, permissions, alignment, overlap, limit, IOVA ranges, then whether it is DMA memory), what
an unmap finds. A mapping is a range of IOVAs over memory of a memfd, in one or more pieces; each piece is a
DMA_MAP.

Not here: telling servers (container.py). Not modelled: RLIMIT_MEMLOCK, for nothing is locked; dirty tracking.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.vfio_user.wire import PAGE, WireError

if TYPE_CHECKING:
    from pvfio.memory import GuestMemory

__all__ = ["IOVA_RANGES", "Mapping", "Mappings"]

IOVA_RANGES: Final = ((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1))
"""What may be mapped: 48 bits, without the window in which a write is an interrupt."""

_TOP: Final = 1 << 64
_READ: Final[int] = lib.VFIO_DMA_MAP_FLAG_READ
_WRITE: Final[int] = lib.VFIO_DMA_MAP_FLAG_WRITE
_EXTENT_BITS: Final = 40
_CHUNK: Final = 64


class Mapping(NamedTuple):
    """[iova, iova + size) is the memory at ``vaddr``; ``flags`` VFIO_DMA_MAP_FLAG_*, ``cookie`` says what keeps it."""

    iova: int
    size: int
    vaddr: int
    flags: int
    cookie: int


class Mappings:
    """The mappings of a container, by IOVA.

    ``memories``: where DMA memory can be, by numbers. ``pieces`` counts what every server holds.
    """

    def __init__(self, memories: MutableMapping[int, GuestMemory]) -> None:
        index = lib.pv_mappings_create(0)
        if index == ffi.NULL:
            raise MemoryError("no memory for an index of mappings")
        self._index: Any = ffi.gc(index, lib.pv_mappings_destroy)
        self._memories = memories
        self._out: Any = ffi.new("struct pv_mapping[]", _CHUNK)
        self._held: dict[int, GuestMemory] = {}
        self._kept: list[tuple[GuestMemory, int]] = []
        self.pieces = 0

    def __len__(self) -> int:
        return int(lib.pv_mappings_count(self._index))

    def __iter__(self) -> Iterator[Mapping]:
        return self.range(0, _TOP - 1)

    def range(self, first: int, last: int) -> Iterator[Mapping]:
        """The mappings with a byte in [first, last], in order."""
        out = self._out
        while True:
            count = lib.pv_mappings_range(self._index, first, last, out, _CHUNK)
            found = [_mapping(out[i]) for i in range(count)]
            yield from found
            if count < _CHUNK:
                return
            first = found[-1].iova + found[-1].size
            if first > last:
                return

    def add(self, iova: int, vaddr: int, size: int, flags: int, most_pieces: int) -> Mapping:
        """A mapping, whose memory stays where it is until ``drop``. Raises VfioError and has changed nothing then."""
        self._check(iova, vaddr, size, flags, most_pieces)
        number, extent = self._pin(iova, vaddr, size)
        cookie = number << _EXTENT_BITS | extent
        mapping = Mapping(iova, size, vaddr, flags, cookie)
        count = len(self.file_pieces(mapping))
        error = -errno.ENOSPC if self.pieces + count > most_pieces else 0
        error = error or lib.pv_mappings_insert(self._index, iova, size, vaddr, flags, cookie)
        if error:
            self._held[number].unpin(extent)
            raise _refused(-error, iova, size, "")
        self.pieces += count
        return mapping

    def drop(self, mapping: Mapping, *, keep: bool = False) -> None:
        """Forgets a mapping, if it is there; ``keep``: its memory stays pinned, for a server may still reach it."""
        if not lib.pv_mappings_remove(self._index, mapping.iova, ffi.NULL):
            return
        self.pieces -= len(self.file_pieces(mapping))
        memory, extent = self._memory(mapping), mapping.cookie & (1 << _EXTENT_BITS) - 1
        if keep:
            self._kept.append((memory, extent))
        else:
            memory.unpin(extent)
        if not len(self):
            self._held.clear()

    def release_kept(self) -> None:
        """No server reaches what was dropped and kept any more."""
        while self._kept:
            memory, extent = self._kept.pop()
            memory.unpin(extent)

    def fd(self, mapping: Mapping) -> int:
        """The memfd of a mapping's memory."""
        return self._memory(mapping).fd

    def file_pieces(self, mapping: Mapping) -> list[tuple[int, int]]:
        """Where a mapping's memory is in its memfd: (offset, bytes) in order."""
        return self._memory(mapping).file_pieces(mapping.vaddr, mapping.size)

    def _memory(self, mapping: Mapping) -> GuestMemory:
        return self._held[mapping.cookie >> _EXTENT_BITS]

    def to_unmap(self, iova: int, size: int, *, v2: bool, without: Collection[int] = ()) -> list[Mapping]:
        """What an unmap of [iova, iova + size) takes away; the mappings at ``without`` are as good as gone.

        Raises VfioError as type1: EINVAL (size, alignment; version 2: it would split a mapping), EOVERFLOW. Version 1
        takes nothing where the range begins inside a mapping, and whole what it ends in.
        """

        def refused(number: int, reason: str) -> VfioError:
            return VfioError(number, "unmap_dma", reason, iova=iova, length=size)

        if iova < 0 or iova % PAGE or iova >= _TOP:
            raise refused(errno.EINVAL, "iova is not page-aligned")
        if size <= 0 or size % PAGE or size >= _TOP:
            raise refused(errno.EINVAL, "size is 0 or not page-aligned")
        if iova + size > _TOP:
            raise refused(errno.EOVERFLOW, "iova wraps")
        found = [mapping for mapping in self.range(iova, iova + size - 1) if mapping.iova not in without]
        if not found:
            return found
        first, last = found[0], found[-1]
        if v2 and (first.iova < iova or last.iova + last.size > iova + size):
            split = first if first.iova < iova else last
            raise refused(errno.EINVAL, f"would split the mapping at {split.iova:#x}")
        return [] if first.iova < iova else found

    # What a server asks for.

    def read(self, address: int, count: int) -> Any:
        """``count`` bytes of mapped memory that devices may read. Raises WireError: EFAULT, EACCES."""
        pieces = self._reached(address, count, _READ)
        return pieces[0] if len(pieces) == 1 else b"".join(bytes(piece) for piece in pieces)

    def write(self, address: int, data: memoryview) -> None:
        """Into mapped memory that devices may write, all of it or nothing. Raises WireError: EFAULT, EACCES."""
        done = 0
        for piece in self._reached(address, len(data), _WRITE):
            ffi.memmove(piece, data[done : done + len(piece)], len(piece))
            done += len(piece)

    def _reached(self, address: int, count: int, right: int) -> list[Any]:
        pieces, at, end = [], address, address + count
        for mapping in self.range(address, min(end, _TOP) - 1):
            if mapping.iova > at:
                break
            if not mapping.flags & right:
                raise WireError(errno.EACCES, f"{at:#x} is not mapped for that")
            length = min(mapping.iova + mapping.size, end) - at
            where = ffi.cast("uint8_t *", mapping.vaddr + at - mapping.iova)
            pieces.append(ffi.buffer(where, length))
            at += length
        if at != end or not count:
            raise WireError(errno.EFAULT, f"{at:#x} is not mapped")
        return pieces

    def _check(self, iova: int, vaddr: int, size: int, flags: int, most_pieces: int) -> None:
        if not (0 <= iova < _TOP and 0 <= vaddr < _TOP and 0 < size < _TOP):
            raise _refused(errno.EINVAL, iova, size, "size 0, or not 64 bits")
        if iova + size > _TOP or vaddr + size > _TOP:
            raise _refused(errno.EOVERFLOW, iova, size, "iova or vaddr wraps")
        if not flags & (_READ | _WRITE):
            raise _refused(errno.EINVAL, iova, size, "neither read nor write")
        if (iova | vaddr | size) % PAGE:
            raise _refused(errno.EINVAL, iova, size, "iova, vaddr or size is not page-aligned")
        if lib.pv_mappings_range(self._index, iova, iova + size - 1, self._out, 1):
            raise _refused(errno.EEXIST, iova, size, f"overlaps the mapping at {self._out[0].iova:#x}")
        if self.pieces >= most_pieces:
            raise _refused(errno.ENOSPC, iova, size, f"{most_pieces} mappings are all there can be")
        if not any(first <= iova and iova + size - 1 <= last for first, last in IOVA_RANGES):
            raise _refused(errno.EINVAL, iova, size, "outside the aperture or in a reserved range")

    def _pin(self, iova: int, vaddr: int, size: int) -> tuple[int, int]:
        """(number of the memory, extent)."""
        for number, memory in self._memories.items():
            extent = lib.pv_memory_pin(memory.ptr, vaddr, size)
            if extent >= 0:
                self._held[number] = memory
                return number, int(extent)
        raise _refused(errno.EFAULT, iova, size, "vaddr is not DMA memory")


def _mapping(entry: Any) -> Mapping:
    return Mapping(entry.iova, entry.size, entry.vaddr, entry.flags, entry.cookie)


def _refused(number: int, iova: int, size: int, reason: str) -> VfioError:
    return VfioError(number, "map_dma", reason, iova=iova, length=size)
