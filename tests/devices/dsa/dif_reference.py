"""Data Integrity Fields computed the plain way: a shift register for the guard, one block after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from pvfio.abi import lib

BLOCK_SIZES = (512, 520, 4096, 4104)
CHECK, INSERT, STRIP, UPDATE, DIX = (
    lib.DSA_OPCODE_DIF_CHECK,
    lib.DSA_OPCODE_DIF_INS,
    lib.DSA_OPCODE_DIF_STRP,
    lib.DSA_OPCODE_DIF_UPDT,
    lib.DSA_OPCODE_DIX_GEN,
)
OPCODES = (CHECK, INSERT, STRIP, UPDATE, DIX)
CHECKING = (CHECK, STRIP, UPDATE)
WRITING = (INSERT, UPDATE, DIX)


@cache
def _of_byte(byte: int) -> int:
    register = byte << 8
    for _ in range(8):
        register = (register << 1 ^ 0x18BB7 * (register >> 15)) & 0xFFFF
    return register


_TABLE = [_of_byte(byte) for byte in range(256)]


def crc16(data: bytes, seed: int = 0) -> int:
    """CRC-16/T10-DIF."""
    table, register = _TABLE, seed
    for byte in data:
        register = (register << 8 & 0xFF00) ^ table[register >> 8 ^ byte]
    return register


@dataclass(frozen=True)
class Tags:
    """Reference tag, application tag and its mask, of block 0."""

    ref: int = 0
    app: int = 0
    mask: int = 0


@dataclass(frozen=True)
class Dif:
    """A descriptor's DIF part, in the bits of the descriptor."""

    opcode: int
    size: int = 0  # which block size
    invert: int = 0  # DSA_DIF_FLAG_INVERT_*
    src_flags: int = 0
    dest_flags: int = 0
    src: Tags = Tags()
    dest: Tags = Tags()

    @property
    def block(self) -> int:
        return BLOCK_SIZES[self.size]

    @property
    def step(self) -> int:
        """Bytes a block has in the source."""
        return self.block + 8 * (self.opcode in CHECKING)

    @property
    def out(self) -> int:
        """Bytes a block has in the destination."""
        return {CHECK: 0, INSERT: self.block + 8, STRIP: self.block, UPDATE: self.block + 8, DIX: 8}[
            self.opcode
        ]

    def fields(self) -> dict[str, int]:
        """By the names in ``struct dsa_hw_desc``."""
        return {
            "src_upd_flags": self.src_flags,
            "upd_dest_flags": self.dest_flags,
            "dif_upd_flags": self.size | self.invert,
            "src_ref_tag_seed": self.src.ref,
            "src_app_tag_mask": self.src.mask,
            "src_app_tag_seed": self.src.app,
            "dest_ref_tag_seed": self.dest.ref,
            "dest_app_tag_mask": self.dest.mask,
            "dest_app_tag_seed": self.dest.app,
        }

    def src_at(self, block: int) -> Tags:
        fixed, incrementing = lib.DSA_DIF_SRC_FLAG_REF_TAG_FIXED, lib.DSA_DIF_SRC_FLAG_APP_TAG_INC
        return _advance(self.src, block, not self.src_flags & fixed, bool(self.src_flags & incrementing))

    def dest_at(self, block: int) -> Tags:
        fixed, incrementing = lib.DSA_DIF_DEST_FLAG_REF_TAG_FIXED, lib.DSA_DIF_DEST_FLAG_APP_TAG_INC
        return _advance(self.dest, block, not self.dest_flags & fixed, bool(self.dest_flags & incrementing))

    def after(self, blocks: int) -> Dif:
        """What is asked for of the blocks that follow."""
        return replace(self, src=self.src_at(blocks), dest=self.dest_at(blocks))

    def guard(self, data: bytes) -> int:
        seed = 0xFFFF if self.invert & lib.DSA_DIF_FLAG_INVERT_CRC_SEED else 0
        return crc16(data, seed) ^ (0xFFFF if self.invert & lib.DSA_DIF_FLAG_INVERT_CRC_RESULT else 0)

    def good_field(self, data: bytes, block: int) -> bytes:
        """The field that the check of a block wants to see."""
        tags = self.src_at(block)
        return _pack(self.guard(data), tags.app, tags.ref)

    def status(self, data: bytes, field: bytes, block: int) -> int:
        """DIF status of one block."""
        flags, want = self.src_flags, self.src_at(block)
        guard, app, ref = _unpack(field)
        if field == b"\xff" * 8 and flags & lib.DSA_DIF_SRC_FLAG_ALL_F:
            return int(lib.DSA_DIF_STATUS_ALL_F) if flags & lib.DSA_DIF_SRC_FLAG_ALL_F_ERR else 0
        if field[2:] == b"\xff" * 6 and flags & lib.DSA_DIF_SRC_FLAG_APP_REF_TAG_F:
            return 0
        if app == 0xFFFF and flags & lib.DSA_DIF_SRC_FLAG_APP_TAG_F:
            return 0
        wrong = 0
        if not flags & lib.DSA_DIF_SRC_FLAG_GUARD_DISABLE and guard != self.guard(data):
            wrong |= lib.DSA_DIF_STATUS_GUARD
        if app | want.mask != want.app | want.mask:
            wrong |= lib.DSA_DIF_STATUS_APP_TAG
        if not flags & lib.DSA_DIF_SRC_FLAG_REF_TAG_DISABLE and ref != want.ref:
            wrong |= lib.DSA_DIF_STATUS_REF_TAG
        return wrong

    def field(self, data: bytes, old: bytes, block: int) -> bytes:
        """The field written for one block; ``old``: the source's, which may be passed through."""
        flags, tags = self.dest_flags, self.dest_at(block)
        new = _pack(self.guard(data), tags.app & ~tags.mask, tags.ref)
        if self.opcode != UPDATE:
            return new
        guard = old if flags & lib.DSA_DIF_DEST_FLAG_GUARD_PASS else new
        app = old if flags & lib.DSA_DIF_DEST_FLAG_APP_TAG_PASS else new
        ref = old if flags & lib.DSA_DIF_DEST_FLAG_REF_TAG_PASS else new
        return guard[:2] + app[2:4] + ref[4:]

    def blocks(self, source: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        """Number, data and field of each block."""
        for block in range(len(source) // self.step):
            at = block * self.step
            yield block, source[at : at + self.block], source[at + self.block : at + self.step]

    def run(self, source: bytes) -> tuple[int, int, bytes]:
        """Blocks done, DIF status, and what is written to the destination."""
        out = b""
        for block, data, old in self.blocks(source):
            if self.opcode in CHECKING and (status := self.status(data, old, block)):
                return block, status, out
            if self.opcode in (INSERT, STRIP, UPDATE):
                out += data
            if self.opcode in WRITING:
                out += self.field(data, old, block)
        return len(source) // self.step, 0, out


def _pack(guard: int, app: int, ref: int) -> bytes:
    return guard.to_bytes(2, "big") + app.to_bytes(2, "big") + ref.to_bytes(4, "big")


def _unpack(field: bytes) -> tuple[int, int, int]:
    return tuple(int.from_bytes(part, "big") for part in (field[:2], field[2:4], field[4:]))  # type: ignore[return-value]


def _advance(tags: Tags, blocks: int, ref: bool, app: bool) -> Tags:
    return Tags((tags.ref + blocks * ref) & 0xFFFFFFFF, (tags.app + blocks * app) & 0xFFFF, tags.mask)
