"""Tests of the operations on protection information, for ``dmatest --operation``.

Blocks of every size with random tags and formats; where fields are checked, half of the trials have a block that is
wrong in its data or its tags, and the device must stop there and say which part it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pvfio.abi import lib
from pvfio.drivers.dsa import DifError, DifFormat, DifTags
from pvfio.workloads import dif_reference as reference
from pvfio.workloads.trial import Operation, Trial

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from numpy.typing import NDArray

__all__ = ["DIF_OPERATIONS"]

SRC, DST = 0, 1
_SIZES = (512, 520, 4096, 4104)
_FIELD = 8
_SMALLEST = _SIZES[0] + _FIELD
_ROOM = 1056  # a field adds a 64th


def _bit(t: Trial) -> bool:
    return t.chance(0.5)


def _tags(t: Trial) -> DifTags:
    # Often close to where tags wrap around.
    ref = int(t.rng.integers(0, 1 << 32)) if _bit(t) else 0xFFFFFFFF - int(t.rng.integers(0, 8))
    app = int(t.rng.integers(0, 1 << 16)) if _bit(t) else 0xFFFF - int(t.rng.integers(0, 8))
    mask = int(t.rng.integers(0, 1 << 16)) if _bit(t) else 0
    return DifTags(ref=ref, app=app, app_mask=mask, fixed_ref=_bit(t), incrementing_app=_bit(t))


def _format(t: Trial) -> DifFormat:
    fitting = [size for size in _SIZES if size + _FIELD <= t.params.test_buf_size]
    return DifFormat(
        block_size=int(t.rng.choice(fitting)),
        tags=_tags(t),
        invert_crc_seed=_bit(t),
        invert_crc_result=_bit(t),
        check_guard=t.chance(0.8),
        check_ref=t.chance(0.8),
        check_app=t.chance(0.8),
    )


def _fields(data: NDArray[np.uint8], fmt: DifFormat) -> NDArray[Any]:
    tags = fmt.tags
    return reference.fields(
        data,
        ref=tags.ref,
        app=tags.app,
        app_mask=tags.app_mask,
        fixed_ref=tags.fixed_ref,
        incrementing_app=tags.incrementing_app,
        invert_crc_seed=fmt.invert_crc_seed,
        invert_crc_result=fmt.invert_crc_result,
    )


class _Source:
    """Protected blocks in the source area, one of them perhaps wrong."""

    def __init__(self, t: Trial, fmt: DifFormat) -> None:
        self.fmt = fmt
        self.size = t.length(fmt.protected_size)
        self.offset = t.place(self.size)
        count = self.size // fmt.protected_size
        data = t.data(SRC, self.offset, count * fmt.block_size).reshape(count, -1).copy()
        self.blocks = reference.join(data, _fields(data, fmt))
        self.wrong, self.part = self._spoil(t)
        t.set(SRC, self.offset, self.blocks.reshape(-1))

    def _spoil(self, t: Trial) -> tuple[int, str | None]:
        """Makes a block wrong: the first that is, or the number of blocks; and which part the device finds."""
        fmt, count = self.fmt, len(self.blocks)
        if _bit(t):
            return count, None
        block = int(t.rng.integers(0, count))
        part = str(t.rng.choice(["guard", "app_tag", "ref_tag"]))
        flip, at = 1 << int(t.rng.integers(0, 8)), int(t.rng.integers(0, fmt.block_size))
        checked = {"guard": fmt.check_guard, "app_tag": fmt.check_app, "ref_tag": fmt.check_ref}[part]
        if part == "app_tag":
            at = fmt.block_size + 3
            checked = checked and not flip & fmt.tags.app_mask
        elif part == "ref_tag":
            at = fmt.block_size + 4 + int(t.rng.integers(0, 4))
        self.blocks[block, at] ^= flip
        # A mask of ones is how the device is told not to check the application tag.
        return (block, part) if checked else (count, None)

    async def run(self, t: Trial, work: Awaitable[None]) -> None:
        """Awaits the device, and expects the error that the wrong block is."""
        found: tuple[str | None, int] = (None, len(self.blocks))
        try:
            await t.device(work)
        except DifError as error:
            parts = ("guard", "app_tag", "ref_tag", "all_ones")
            found = (
                " and ".join(part for part in parts if getattr(error, part)),
                error.bytes_completed // self.fmt.protected_size,
            )
        t.expect("wrong part and block", found, (self.part, self.wrong))


def _written(t: Trial, offset: int, blocks: NDArray[np.uint8], good: int) -> None:
    """The destination gets the blocks before the wrong one; of that one, whatever the device has written."""
    step = blocks.shape[1]
    t.data(DST, offset, good * step)[:] = blocks[:good].reshape(-1)
    if good < len(blocks):
        t.data(DST, offset + good * step, step)[:] = t.real(DST, offset + good * step, step)


async def _check(t: Trial) -> None:
    source = _Source(t, _format(t))
    t.where = (source.offset, 0, source.size)
    work = t.wq.dif_check(t.at(SRC, source.offset), source.size, source.fmt, deadline=t.deadline)
    await source.run(t, work)


async def _strip(t: Trial) -> None:
    source = _Source(t, _format(t))
    dst = t.place(source.size)
    t.where = (source.offset, dst, source.size)
    work = t.wq.dif_strip(
        t.at(DST, dst), t.at(SRC, source.offset), source.size, source.fmt, deadline=t.deadline
    )
    await source.run(t, work)
    _written(t, dst, reference.split(source.blocks)[0], source.wrong)


async def _update(t: Trial) -> None:
    source = _Source(t, _format(t))
    after = replace(source.fmt, tags=_tags(t), pass_guard=_bit(t), pass_app=_bit(t), pass_ref=_bit(t))
    dst = t.place(source.size)
    t.where = (source.offset, dst, source.size)
    work = t.wq.dif_update(
        t.at(DST, dst), t.at(SRC, source.offset), source.size, source.fmt, after, deadline=t.deadline
    )
    await source.run(t, work)
    data, before = reference.split(source.blocks)
    new = _fields(data, after)
    for kept, name in ((after.pass_guard, "guard"), (after.pass_app, "app"), (after.pass_ref, "ref")):
        if kept:
            new[name] = before[name]
    _written(t, dst, reference.join(data, new), source.wrong)


def _plain(t: Trial) -> tuple[DifFormat, int, int, NDArray[np.uint8]]:
    """A format, and a source without fields: offset, size, blocks."""
    fmt = _format(t)
    size = t.length(fmt.block_size)
    src = t.place(size)
    return fmt, src, size, t.data(SRC, src, size).reshape(-1, fmt.block_size)


async def _insert(t: Trial) -> None:
    fmt, src, size, data = _plain(t)
    blocks = reference.join(data, _fields(data, fmt))
    dst = t.place(blocks.size)
    t.where = (src, dst, size)
    _written(t, dst, blocks, len(blocks))
    await t.device(t.wq.dif_insert(t.at(DST, dst), t.at(SRC, src), size, fmt, deadline=t.deadline))


async def _dix(t: Trial) -> None:
    fmt, src, size, data = _plain(t)
    new = _fields(data, fmt).view(np.uint8).reshape(len(data), _FIELD)
    dst = t.place(new.size)
    t.where = (src, dst, size)
    _written(t, dst, new, len(new))
    await t.device(t.wq.dix_generate(t.at(DST, dst), t.at(SRC, src), size, fmt, deadline=t.deadline))


DIF_OPERATIONS: dict[str, Operation] = {
    "dif-check": Operation(_check, lib.DSA_OPCODE_DIF_CHECK, _SMALLEST, _ROOM),
    "dif-insert": Operation(_insert, lib.DSA_OPCODE_DIF_INS, _SMALLEST, _ROOM),
    "dif-strip": Operation(_strip, lib.DSA_OPCODE_DIF_STRP, _SMALLEST, _ROOM),
    "dif-update": Operation(_update, lib.DSA_OPCODE_DIF_UPDT, _SMALLEST, _ROOM),
    "dix-gen": Operation(_dix, lib.DSA_OPCODE_DIX_GEN, _SMALLEST, _ROOM),
}
"""By the name that ``dmatest --operation`` has for it."""
