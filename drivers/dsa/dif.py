"""Data Integrity Fields: how blocks are protected, and what is checked of it.

A protected block is 512, 520, 4096 or 4104 bytes of data and an 8-byte field, big-endian: guard (CRC-16/T10-DIF of
the data), application tag, reference tag (SCSI SBC, protection information; Intel DSA 1.2 8.3.13 to 8.3.17). With DIX
the fields stand apart from the data, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from pvfio.abi import lib

__all__ = ["BLOCK_SIZES", "FIELD_SIZE", "AllOnes", "DifFormat", "DifTags"]

BLOCK_SIZES: Final = (512, 520, 4096, 4104)
FIELD_SIZE: Final = 8

AllOnes: TypeAlias = Literal["check", "skip", "error"]
"""What a field of 64 ones means: checked as any other; block not checked; an error of its own kind."""


def _within(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} has {bits} bits: {value:#x}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DifTags:
    """The tags of a run of blocks.

    ``ref`` and ``app`` are those of the first block. The reference tag grows by one with every block unless it is
    ``fixed_ref``; the application tag stays unless it is ``incrementing_app``; both wrap around. Bits set in
    ``app_mask`` are not compared, and written as 0. ``ValueError`` for a value of too many bits.
    """

    ref: int = 0
    app: int = 0
    app_mask: int = 0
    fixed_ref: bool = False
    incrementing_app: bool = False

    def __post_init__(self) -> None:
        _within("a reference tag", self.ref, 32)
        _within("an application tag", self.app, 16)
        _within("an application tag's mask", self.app_mask, 16)

    def after(self, blocks: int) -> DifTags:
        """The tags of what follows ``blocks`` blocks."""
        return replace(
            self,
            ref=self.ref if self.fixed_ref else (self.ref + blocks) & 0xFFFFFFFF,
            app=(self.app + blocks) & 0xFFFF if self.incrementing_app else self.app,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DifFormat:
    """How blocks are protected.

    ``block_size``: bytes of data a block. ``invert_crc_seed``: the guard's CRC begins with 0xffff, not 0;
    ``invert_crc_result``: the guard is its complement.

    What counts where blocks are checked: ``check_guard``, ``check_ref``, ``check_app``; ``all_ones``, for a field of
    ones; ``skip_app_ones``, no check of a block with the application tag 0xffff (SCSI protection types 1 and 2);
    ``skip_tags_ones``, none with both tags all ones (type 3).

    What counts where an update writes them: ``pass_guard``, ``pass_app``, ``pass_ref`` keep the source's. Elsewhere
    they are ``ValueError``, since there is nothing to keep.
    """

    block_size: int = 512
    tags: DifTags = DifTags()
    invert_crc_seed: bool = False
    invert_crc_result: bool = False
    check_guard: bool = True
    check_ref: bool = True
    check_app: bool = True
    all_ones: AllOnes = "check"
    skip_app_ones: bool = False
    skip_tags_ones: bool = False
    pass_guard: bool = False
    pass_app: bool = False
    pass_ref: bool = False

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"a block has {', '.join(map(str, BLOCK_SIZES))} bytes, not {self.block_size}")
        if self.all_ones not in ("check", "skip", "error"):
            raise ValueError(f"all_ones is check, skip or error, not {self.all_ones!r}")

    @property
    def protected_size(self) -> int:
        """Bytes of a block with its field."""
        return self.block_size + FIELD_SIZE

    def blocks(self, size: int, *, protected: bool) -> int:
        """How many blocks ``size`` bytes are, with their fields if ``protected``; ``ValueError`` if not whole ones."""
        step = self.protected_size if protected else self.block_size
        if size % step:
            raise ValueError(f"{size} bytes are not whole blocks of {step}")
        return size // step

    def after(self, blocks: int) -> DifFormat:
        """The same with the tags of what follows ``blocks`` blocks: to go on after a fault, or to cut work up."""
        return replace(self, tags=self.tags.after(blocks))

    # As the descriptor has it

    @property
    def flags(self) -> int:
        """DIF flags."""
        return int(
            BLOCK_SIZES.index(self.block_size)
            | lib.DSA_DIF_FLAG_INVERT_CRC_SEED * self.invert_crc_seed
            | lib.DSA_DIF_FLAG_INVERT_CRC_RESULT * self.invert_crc_result
        )

    @property
    def source_flags(self) -> int:
        """Source DIF flags."""
        return int(
            lib.DSA_DIF_SRC_FLAG_REF_TAG_FIXED * self.tags.fixed_ref
            | lib.DSA_DIF_SRC_FLAG_REF_TAG_DISABLE * (not self.check_ref)
            | lib.DSA_DIF_SRC_FLAG_GUARD_DISABLE * (not self.check_guard)
            | lib.DSA_DIF_SRC_FLAG_APP_TAG_INC * self.tags.incrementing_app
            | lib.DSA_DIF_SRC_FLAG_APP_REF_TAG_F * self.skip_tags_ones
            | lib.DSA_DIF_SRC_FLAG_APP_TAG_F * self.skip_app_ones
            | lib.DSA_DIF_SRC_FLAG_ALL_F * (self.all_ones != "check")
            | lib.DSA_DIF_SRC_FLAG_ALL_F_ERR * (self.all_ones == "error")
        )

    @property
    def source_mask(self) -> int:
        """Source application tag mask; all ones is how the device is told not to check."""
        return self.tags.app_mask if self.check_app else 0xFFFF

    @property
    def destination_flags(self) -> int:
        """Destination DIF flags."""
        return int(
            lib.DSA_DIF_DEST_FLAG_REF_TAG_FIXED * self.tags.fixed_ref
            | lib.DSA_DIF_DEST_FLAG_REF_TAG_PASS * self.pass_ref
            | lib.DSA_DIF_DEST_FLAG_GUARD_PASS * self.pass_guard
            | lib.DSA_DIF_DEST_FLAG_APP_TAG_INC * self.tags.incrementing_app
            | lib.DSA_DIF_DEST_FLAG_APP_TAG_PASS * self.pass_app
        )

    def check_fields(self) -> dict[str, int]:
        """What a check or a strip needs, by the names in ``struct dsa_hw_desc``."""
        return {
            "src_dif_flags": self.source_flags,
            "dif_chk_flags": self.flags,
            "chk_ref_tag_seed": self.tags.ref,
            "chk_app_tag_mask": self.source_mask,
            "chk_app_tag_seed": self.tags.app,
        }

    def insert_fields(self) -> dict[str, int]:
        """What an insert or a DIX generate needs."""
        if self.pass_guard or self.pass_app or self.pass_ref:
            raise ValueError("only an update has fields to pass through")
        return {
            "dest_dif_flag": self.destination_flags,
            "dif_ins_flags": self.flags,
            "ins_ref_tag_seed": self.tags.ref,
            "ins_app_tag_mask": self.tags.app_mask,
            "ins_app_tag_seed": self.tags.app,
        }

    def update_fields(self, dst: DifFormat) -> dict[str, int]:
        """What an update from this format to ``dst`` needs; both have one block size and one way of inversion."""
        if self.flags != dst.flags:
            raise ValueError("an update keeps the block size and the inversion of the guard")
        return {
            "src_upd_flags": self.source_flags,
            "upd_dest_flags": dst.destination_flags,
            "dif_upd_flags": self.flags,
            "src_ref_tag_seed": self.tags.ref,
            "src_app_tag_mask": self.source_mask,
            "src_app_tag_seed": self.tags.app,
            "dest_ref_tag_seed": dst.tags.ref,
            "dest_app_tag_mask": dst.tags.app_mask,
            "dest_app_tag_seed": dst.tags.app,
        }
