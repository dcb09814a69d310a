"""Entries of the three formats: what is written, and what the hardware makes of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import ffi, lib
from pvfio.pagetable import Format, Perm
from tests.pagetable.reference import (
    ADDRESS,
    G1,
    K4,
    M2,
    MASK64,
    SIZES,
    best_page_size,
    bitmap,
    granted,
    leaf_entry,
    leaf_level,
    table_entry,
)

pytestmark = pytest.mark.touches_c

ALL = tuple(itertools.product(Format, (Perm.READ, Perm.WRITE, Perm.READ | Perm.WRITE)))


@dataclass(frozen=True)
class Decoded:
    present: bool
    leaf: bool
    perm: int
    addr: int
    size: int
    reserved: bool


def decode(fmt: Format, entry: int, level: int) -> Decoded:
    out = ffi.new("struct pt_walk_entry *")
    lib.pt_decode_entry(fmt, entry, level, out)
    return Decoded(
        bool(out.present), bool(out.leaf), out.perm, out.addr, 1 << out.size_lg2, bool(out.reserved)
    )


def lg2(size: int) -> int:
    return size.bit_length() - 1


@pytest.mark.parametrize(("fmt", "perm"), ALL)
def test_a_leaf_round_trips_at_the_ends_of_the_address_field(fmt: Format, perm: Perm) -> None:
    for size in SIZES[fmt]:
        level = leaf_level(size)
        for phys in (0, size if size < 1 << 51 else 0, ADDRESS & ~(size - 1)):
            entry = lib.pt_encode_leaf(fmt, level, lg2(size), phys, perm)
            assert entry == leaf_entry(fmt, level, size, phys, perm)
            assert decode(fmt, entry, level) == Decoded(True, True, granted(fmt, perm), phys, size, False)


@pytest.mark.parametrize("fmt", Format)
def test_a_table_pointer_round_trips_at_the_ends_of_the_address_field(fmt: Format) -> None:
    for level in range(2, 7 if fmt is Format.AMDV1 else 6):
        for phys in (0, 0x1000, ADDRESS):
            entry = lib.pt_encode_table(fmt, level, phys)
            assert entry == table_entry(fmt, level, phys)
            covers = 1 << (12 + 9 * (level - 1))
            assert decode(fmt, entry, level) == Decoded(True, False, 3, phys, covers, False)


@pytest.mark.parametrize("fmt", Format)
def test_a_level_holds_only_its_sizes(fmt: Format) -> None:
    for level in range(9):
        for bits in range(66):
            holds = bits < 64 and (1 << bits) in SIZES[fmt] and leaf_level(1 << bits) == level
            assert (lib.pt_encode_leaf(fmt, level, bits, 0, Perm.READ) != 0) == holds, (level, bits)


MALFORMED = {
    "x86_64: 512G page": (Format.X86_64, 4, leaf_entry(Format.X86_64, 2, M2, 0, 3)),
    "x86_64: 256T page": (Format.X86_64, 5, leaf_entry(Format.X86_64, 2, M2, 0, 3)),
    "x86_64: 2M page at 4K": (Format.X86_64, 2, leaf_entry(Format.X86_64, 2, M2, 0x2000, 3)),
    "x86_64: 1G page at 2M": (Format.X86_64, 3, leaf_entry(Format.X86_64, 3, G1, M2, 3)),
    "vtdss: 512G page": (Format.VTDSS, 4, leaf_entry(Format.VTDSS, 2, M2, 0, 3)),
    "vtdss: 2M page at 4K": (Format.VTDSS, 2, leaf_entry(Format.VTDSS, 2, M2, 0x1000, 3)),
    "amdv1: 2M page at 4K": (Format.AMDV1, 2, leaf_entry(Format.AMDV1, 2, M2, 0x1000, 3)),
    "amdv1: 512G page": (Format.AMDV1, 4, leaf_entry(Format.AMDV1, 1, K4, 0, 3)),
    "amdv1: 512G page by coded size": (Format.AMDV1, 4, leaf_entry(Format.AMDV1, 1, 1 << 39, 0, 3)),
    "amdv1: a leaf on level 6": (Format.AMDV1, 6, leaf_entry(Format.AMDV1, 1, K4, 0, 3)),
    "amdv1: coded size below the level's": (Format.AMDV1, 3, leaf_entry(Format.AMDV1, 1, 0x2000, 0, 3)),
    "amdv1: coded size above the level's": (Format.AMDV1, 1, leaf_entry(Format.AMDV1, 3, G1 << 1, 0, 3)),
    "amdv1: address all ones as a size": (Format.AMDV1, 5, ADDRESS | 7 << 9 | 1),
    "amdv1: a skipped level": (Format.AMDV1, 4, table_entry(Format.AMDV1, 3, 0x1000)),
    "amdv1: a pointer to its own level": (Format.AMDV1, 2, table_entry(Format.AMDV1, 3, 0x1000)),
    "amdv1: a table below the last level": (Format.AMDV1, 1, table_entry(Format.AMDV1, 2, 0x1000)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_the_hardware_refuses_malformed_entries(name: str) -> None:
    fmt, level, entry = MALFORMED[name]
    decoded = decode(fmt, entry, level)
    assert decoded.present
    assert decoded.reserved


def test_x86_64_pat_bit_of_a_large_page_is_no_address_bit() -> None:
    entry = leaf_entry(Format.X86_64, 2, M2, M2, 3) | 1 << 12
    assert decode(Format.X86_64, entry, 2) == Decoded(True, True, 3, M2, M2, False)


def test_x86_64_supervisor_entries_grant_a_device_nothing() -> None:
    assert decode(Format.X86_64, leaf_entry(Format.X86_64, 1, K4, 0, 3) & ~4, 1).perm == 0


@pytest.mark.parametrize("fmt", Format)
@given(entry=st.integers(0, MASK64), level=st.integers(0, 9))
def test_any_entry_decodes_to_something_a_walker_can_follow(fmt: Format, entry: int, level: int) -> None:
    decoded = decode(fmt, entry, level)
    if decoded.present and decoded.leaf and not decoded.reserved:
        assert decoded.size in SIZES[fmt]
        assert leaf_level(decoded.size) == level
        assert decoded.addr % decoded.size == 0
    assert decoded.addr & ~ADDRESS == 0


@pytest.mark.parametrize("fmt", Format)
@given(data=st.data())
def test_best_page_size_against_brute_force(fmt: Format, data: st.DataObject) -> None:
    sizes = data.draw(st.integers(0, MASK64)) & bitmap(fmt)
    shift = st.integers(0, 52)
    iova = data.draw(st.integers(0, MASK64)) >> (s := data.draw(shift)) << s
    phys = (data.draw(st.integers(0, (1 << 52) - 1)) >> (s := data.draw(shift)) << s) & ADDRESS
    size = data.draw(st.integers(1, MASK64)) >> data.draw(shift)
    best = lib.pt_best_pgsize_lg2(sizes, iova, phys, size)
    assert (1 << best if best else 0) == best_page_size(sizes, iova, phys, size)


@pytest.mark.parametrize("fmt", Format)
def test_best_page_size_at_the_edges(fmt: Format) -> None:
    sizes = bitmap(fmt)
    for iova, phys, size in itertools.product(
        (0, K4, M2, G1, 1 << 39, 1 << 47, MASK64 & ~0xFFF, 0xFEF80000),
        (0, K4, M2, 0xFEF80000, 1 << 51, ADDRESS),
        (0, 1, K4 - 1, K4, M2 - 1, M2, G1, G1 + M2, MASK64),
    ):
        best = lib.pt_best_pgsize_lg2(sizes, iova, phys, size)
        assert (1 << best if best else 0) == best_page_size(sizes, iova, phys, size)
