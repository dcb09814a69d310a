"""Hypothesis strategies for DIF operations: a descriptor's DIF part, and sources with fields good and bad."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from pvfio.abi import lib
from tests.devices.dsa.dif_reference import BLOCK_SIZES, CHECKING, OPCODES, UPDATE, WRITING, Dif, Tags

INVERT = int(lib.DSA_DIF_FLAG_INVERT_CRC_SEED | lib.DSA_DIF_FLAG_INVERT_CRC_RESULT)
PASS = int(
    lib.DSA_DIF_DEST_FLAG_APP_TAG_PASS | lib.DSA_DIF_DEST_FLAG_GUARD_PASS | lib.DSA_DIF_DEST_FLAG_REF_TAG_PASS
)
TYPES = int(lib.DSA_DIF_DEST_FLAG_APP_TAG_INC | lib.DSA_DIF_DEST_FLAG_REF_TAG_FIXED)
LONGEST = 5  # blocks

edges16 = st.one_of(st.sampled_from([0, 1, 0xFFFE, 0xFFFF]), st.integers(0, 0xFFFF))
tags = st.builds(
    Tags,
    st.one_of(st.sampled_from([0, 0xFFFFFFFE, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF)),
    edges16,
    st.one_of(st.just(0), edges16),
)


@dataclass(frozen=True)
class Case:
    """An operation and its source."""

    dif: Dif
    source: bytes

    @property
    def blocks(self) -> int:
        return len(self.source) // self.dif.step


@st.composite
def difs(draw: st.DrawFn, opcodes: tuple[int, ...] = OPCODES) -> Dif:
    """Whatever a descriptor may ask for."""
    opcode = draw(st.sampled_from(opcodes))
    checks, writes = opcode in CHECKING, opcode in WRITING
    return Dif(
        opcode,
        draw(st.integers(0, len(BLOCK_SIZES) - 1)),
        draw(st.integers(0, 3)) << 2,
        draw(st.one_of(st.just(0), st.integers(0, 255))) if checks else 0,
        draw(st.integers(0, 255)) & (TYPES | (PASS if opcode == UPDATE else 0)) if writes else 0,
        draw(tags) if checks else Tags(),
        draw(tags) if writes else Tags(),
    )


def sources(dif: Dif, blocks: int, seed: int) -> bytes:
    """Random data, with good fields where the operation checks them."""
    rng = np.random.default_rng(seed)
    out = b""
    for block in range(blocks):
        data = rng.integers(0, 256, dif.block, np.uint8).tobytes()
        out += data + (dif.good_field(data, block) if dif.opcode in CHECKING else b"")
    return out


@st.composite
def cases(draw: st.DrawFn, opcodes: tuple[int, ...] = OPCODES, bad: bool = True) -> Case:
    """An operation on up to ``LONGEST`` blocks; with ``bad``, fields may be wrong or say "not written"."""
    dif = draw(difs(opcodes))
    blocks = draw(st.integers(1, LONGEST))
    source = bytearray(sources(dif, blocks, draw(st.integers(0, 7))))
    if bad and dif.opcode in CHECKING:
        for block in draw(st.sets(st.integers(0, blocks - 1), max_size=2)):
            at = block * dif.step + dif.block
            first, last = draw(st.sampled_from([(0, 8), (2, 8), (2, 4), (0, 2), (4, 8), (0, 0)]))
            source[at + first : at + last] = b"\xff" * (last - first)
            flipped = draw(st.sampled_from([None, 0, 1, 2, 3, 4, 7, -1]))
            if flipped is not None:
                source[at + flipped] ^= 1 << draw(st.integers(0, 7))
    return Case(dif, bytes(source))
