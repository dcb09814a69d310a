"""Byte patterns of ``verify_pattern`` and ``buffer_pattern``: hexadecimal, decimal, strings, files, and ``%o``.

fio's rules: pieces of any kind follow each other ("abcd"-120'file'0x0ff0); a hexadecimal number is as many bytes as
its digits need, in the order written; a decimal is the bytes of the number without leading zero bytes, the lowest
first, and four bytes where it is negative; ``%o`` is the offset of the block, eight bytes with the lowest first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Pattern", "parse_pattern"]

_PIECE: Final = re.compile(
    r"\"(?P<string>[^\"]*)\"|'(?P<file>[^']*)'|(?P<hex>0x[0-9a-f]+)|(?P<offset>%o)|(?P<number>-?\d+)",
    re.IGNORECASE,
)
_LONGEST: Final = 512


@dataclass(frozen=True, slots=True)
class Pattern:
    """``data`` repeats through a block; at each of ``offsets`` in it stand eight bytes of the block's offset."""

    data: bytes
    offsets: tuple[int, ...] = ()

    def fill(self, length: int, offsets: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Blocks of ``length`` bytes at ``offsets``, shape (n, length)."""
        count = -(-length // len(self.data))
        one = np.frombuffer(self.data * count, dtype=np.uint8)
        blocks = np.tile(one, (len(offsets), 1))
        values = offsets.astype("<u8").view(np.uint8).reshape(-1, 8)
        for at in self.offsets:
            for begin in range(at, blocks.shape[1], len(self.data)):
                size = min(8, blocks.shape[1] - begin)
                blocks[:, begin : begin + size] = values[:, :size]
        return blocks[:, :length]


def _number(text: str) -> bytes:
    value = int(text)
    if value < 0:
        return value.to_bytes(4, "little", signed=True)
    return value.to_bytes(max(1, (value.bit_length() + 7) // 8), "little")


def parse_pattern(text: str, folder: Path | None = None) -> Pattern:
    """The pattern ``text`` means; files are relative to ``folder``. ``ValueError``."""
    data, offsets, position = bytearray(), [], 0
    word = text.strip()
    while position < len(word):
        match = _PIECE.match(word, position)
        if match is None:
            raise ValueError(f"{text!r} is not a pattern")
        position = match.end()
        if match["string"] is not None:
            data += match["string"].encode().decode("unicode_escape").encode("latin-1")
        elif match["file"] is not None:
            data += _file((folder or Path()) / match["file"])
        elif match["hex"] is not None:
            digits = match["hex"][2:]
            data += bytes.fromhex(digits.zfill(len(digits) + len(digits) % 2))
        elif match["offset"] is not None:
            offsets.append(len(data))
            data += bytes(8)
        else:
            data += _number(match["number"])
    if not 0 < len(data) <= _LONGEST:
        raise ValueError(f"a pattern has 1 to {_LONGEST} bytes, not {len(data)}")
    return Pattern(bytes(data), tuple(offsets))


def _file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_LONGEST + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
