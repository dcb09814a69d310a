"""Metadata and protection information type 1, against numpy's of ``dif_reference`` (NVM 5.1 and 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pvfio.abi import dtype_of, lib
from pvfio.workloads.dif_reference import FIELD, crc16_t10
from tests.devices.nvme.data_path_rig import DATA, DNR, PAGE, Bytes, Rig, command, noise

pytestmark = pytest.mark.touches_c

READ, WRITE, COMPARE, VERIFY = (
    lib.NVME_CMD_READ,
    lib.NVME_CMD_WRITE,
    lib.NVME_CMD_COMPARE,
    lib.NVME_CMD_VERIFY,
)
ACT, GUARD, APP, REF = (
    lib.NVME_RW_PRACT,
    lib.NVME_RW_PRCHK_GUARD,
    lib.NVME_RW_PRCHK_APP,
    lib.NVME_RW_PRCHK_REF,
)
CHECK = GUARD | APP | REF
METADATA = DATA + 0x80000  # a buffer of its own
LISTS = DATA + 0x90000
TAG = 0xA5C3
SEVEN = 7  # the first LBA of the tests, and how many blocks


@dataclass(frozen=True)
class Format:
    """How the blocks look."""

    shift: int = 9
    metadata: int = 8
    extended: bool = False
    first: bool = False

    @property
    def place(self) -> int:
        """Of the tuple in the metadata."""
        return 0 if self.first else self.metadata - 8


FORMATS = [
    Format(),
    Format(extended=True),
    Format(12, 8),
    Format(12, 64),
    Format(9, 16, extended=True),
    Format(9, 16, first=True),
    Format(12, 64, extended=True, first=True),
]


class Disk(Rig):
    def __init__(self, format: Format, pi: int = 1) -> None:
        super().__init__()
        self.format = format
        self.pi = pi
        self.size = 1 << format.shift
        self.backing = self.memory_namespace(
            size=1 << 20,
            lba_shift=format.shift,
            metadata=format.metadata,
            extended=format.extended,
            pi=pi,
            pi_first=format.first,
        )
        pages = np.arange(DATA + PAGE, DATA + 17 * PAGE, PAGE, dtype=np.uint64)
        self.put(LISTS, pages)

    def tuples(self, data: Bytes, metadata: Bytes, lba: int = SEVEN) -> Bytes:
        """Metadata with right protection information."""
        out = metadata.copy()
        field = np.zeros(len(data), FIELD)
        place = self.format.place
        field["guard"] = crc16_t10(np.hstack([data, metadata[:, :place]]))
        field["app"] = TAG
        field["ref"] = np.arange(lba, lba + len(data))
        out[:, place : place + 8] = field.view(np.uint8).reshape(-1, 8)
        return out

    def command(self, opcode: int, control: int = 0, **fields: int) -> Any:
        fields = {
            "lba": SEVEN,
            "blocks": SEVEN,
            "cdw14": fields.get("lba", SEVEN),
            "metadata": METADATA,
        } | fields
        count = fields["blocks"]
        size = count * (self.size + (self.format.metadata if self.format.extended else 0))
        fields.setdefault("prp2", LISTS if size > 2 * PAGE else DATA + PAGE)
        fields.setdefault("cdw15", 0xFFFF0000 | TAG)
        return command(opcode, control=control, **fields)

    def to_memory(self, data: Bytes, metadata: Bytes | None) -> None:
        """As the format has it; None: the host has no metadata."""
        if metadata is None:
            self.put(DATA, data)
        elif self.format.extended:
            self.put(DATA, np.hstack([data, metadata]))
        else:
            self.put(DATA, data)
            self.put(METADATA, metadata)

    def from_memory(self, count: int = SEVEN, *, stripped: bool = False) -> tuple[Bytes, Bytes]:
        if self.format.extended and not stripped:
            both = self.at(DATA, count * (self.size + self.format.metadata)).reshape(count, -1)
            return both[:, : self.size].copy(), both[:, self.size :].copy()
        data = self.at(DATA, count * self.size).reshape(count, -1).copy()
        return data, self.at(METADATA, count * self.format.metadata).reshape(count, -1).copy()


def content(format: Format, seed: int = 3) -> tuple[Bytes, Bytes]:
    data = noise(SEVEN << format.shift, seed).reshape(SEVEN, -1)
    return data, noise(SEVEN * format.metadata, seed + 1).reshape(SEVEN, -1)


formats = pytest.mark.parametrize("format", FORMATS, ids=str)


@formats
def test_metadata_without_protection(format: Format) -> None:
    """It is kept as it is."""
    with Disk(format, pi=0) as disk:
        data, metadata = content(format)
        disk.to_memory(data, metadata)
        assert disk.run(disk.command(WRITE)) == 0
        disk.at(DATA, 0x20000)[:] = 0
        disk.at(METADATA, PAGE)[:] = 0
        disk.put(LISTS, np.arange(DATA + PAGE, DATA + 17 * PAGE, PAGE, dtype=np.uint64))
        assert disk.run(disk.command(READ)) == 0
        got = disk.from_memory()
        assert (got[0] == data).all()
        assert (got[1] == metadata).all()
        assert disk.run(disk.command(COMPARE)) == 0
        disk.to_memory(data, metadata ^ np.uint8(1))
        assert disk.run(disk.command(COMPARE)) == lib.NVME_SC_COMPARE_FAILED | DNR


@formats
def test_the_host_makes_it(format: Format) -> None:
    """PRACT 0: the device checks what it is asked to, keeps it, and gives it back."""
    with Disk(format) as disk:
        data, metadata = content(format)
        metadata = disk.tuples(data, metadata)
        disk.to_memory(data, metadata)
        assert disk.run(disk.command(WRITE, CHECK)) == 0
        disk.to_memory(np.zeros_like(data), np.zeros_like(metadata))
        for control in (0, GUARD, APP, REF, CHECK):
            assert disk.run(disk.command(VERIFY, control)) == 0
            assert disk.run(disk.command(READ, control)) == 0
            got = disk.from_memory()
            assert (got[0] == data).all()
            assert (got[1] == metadata).all()
        assert disk.run(disk.command(COMPARE, CHECK)) == 0


@formats
def test_the_device_makes_it(format: Format) -> None:
    """PRACT 1: written without, or with metadata whose tuple is replaced; read back checked, or shown."""
    with Disk(format) as disk:
        data, metadata = content(format)
        hidden = format.metadata == 8
        disk.to_memory(data, None if hidden else metadata)
        assert disk.run(disk.command(WRITE, ACT)) == 0
        disk.to_memory(np.zeros_like(data), None if hidden else np.zeros_like(metadata))
        disk.at(METADATA, PAGE)[:] = 0
        disk.put(LISTS, np.arange(DATA + PAGE, DATA + 17 * PAGE, PAGE, dtype=np.uint64))
        assert disk.run(disk.command(READ, ACT | CHECK)) == 0
        got = disk.from_memory(stripped=hidden)
        assert (got[0] == data).all()
        if hidden:
            assert not disk.at(METADATA, PAGE).any()
        assert disk.run(disk.command(READ)) == 0
        got = disk.from_memory()
        assert (got[0] == data).all()
        assert (got[1] == disk.tuples(data, metadata)).all()


@formats
@pytest.mark.parametrize("opcode", [READ, WRITE, VERIFY])
@pytest.mark.parametrize(
    ("byte", "check", "status"),
    [
        (0, GUARD, lib.NVME_SC_GUARD_CHECK),
        (1, GUARD, lib.NVME_SC_GUARD_CHECK),
        (2, APP, lib.NVME_SC_APPTAG_CHECK),
        (3, APP, lib.NVME_SC_APPTAG_CHECK),
        (4, REF, lib.NVME_SC_REFTAG_CHECK),
        (7, REF, lib.NVME_SC_REFTAG_CHECK),
    ],
)
def test_each_check(format: Format, opcode: int, byte: int, check: int, status: int) -> None:
    """One bit wrong in the fourth block: found by its check alone."""
    with Disk(format) as disk:
        data, metadata = content(format)
        metadata = disk.tuples(data, metadata)
        metadata[3, format.place + byte] ^= 0x10
        disk.to_memory(data, metadata)
        if opcode != WRITE:
            assert disk.run(disk.command(WRITE)) == 0
        assert disk.run(disk.command(opcode, CHECK & ~check)) == 0
        assert disk.run(disk.command(opcode, check)) == status
        assert disk.run(disk.command(opcode, check, lba=11, blocks=1, cdw14=11)) in (0, status)


def test_data_that_changed_on_the_media() -> None:
    with Disk(FORMATS[0]) as disk:
        data, metadata = content(FORMATS[0])
        disk.to_memory(data, disk.tuples(data, metadata))
        assert disk.run(disk.command(WRITE, CHECK)) == 0
        at = (SEVEN + 2) * 512 + 100
        disk.set_media(disk.backing, at, disk.media(disk.backing, at, 1) ^ np.uint8(1))
        assert disk.run(disk.command(READ)) == 0
        assert disk.run(disk.command(READ, GUARD)) == lib.NVME_SC_GUARD_CHECK
        assert disk.run(disk.command(READ, APP | REF)) == 0


def test_masks_and_escapes() -> None:
    """Bits of the application tag outside the mask do not count; a tag of all ones switches every check off."""
    with Disk(FORMATS[0]) as disk:
        data, metadata = content(FORMATS[0])
        metadata = disk.tuples(data, metadata)
        disk.to_memory(data, metadata)
        assert disk.run(disk.command(WRITE, CHECK, cdw15=0xFF000000 | TAG ^ 0x0055)) == 0
        assert disk.run(disk.command(READ, APP, cdw15=0xFF000000 | TAG ^ 0x0100)) == lib.NVME_SC_APPTAG_CHECK
        metadata[:, :] = 0xFF
        metadata[:, 0] = 0
        disk.to_memory(data, metadata)
        assert disk.run(disk.command(WRITE, CHECK)) == 0


def test_the_initial_reference_tag() -> None:
    """Type 1: it is the LBA's, where it is checked (NVM 5.2.1.5)."""
    with Disk(FORMATS[0]) as disk:
        for opcode in (READ, WRITE, COMPARE, VERIFY, lib.NVME_CMD_WRITE_ZEROES):
            status = disk.run(disk.command(opcode, REF, cdw14=8))
            assert status == lib.NVME_SC_INVALID_PI | DNR
        assert disk.run(disk.command(READ, ACT | GUARD, cdw14=8)) == 0


def test_blocks_that_were_never_written() -> None:
    """And those that were deallocated, or zeroed, pass every check."""
    with Disk(FORMATS[0]) as disk:
        assert disk.run(disk.command(READ, CHECK)) == 0
        assert disk.run(disk.command(WRITE, ACT)) == 0
        assert disk.run(disk.command(lib.NVME_CMD_WRITE_ZEROES)) == 0
        assert disk.run(disk.command(READ, CHECK)) == 0
        got = disk.from_memory()
        assert not got[0].any()
        assert (got[1] == 0xFF).all()
        assert disk.run(disk.command(lib.NVME_CMD_WRITE_ZEROES, ACT)) == 0
        assert disk.run(disk.command(READ, CHECK)) == 0
        data, metadata = disk.from_memory()
        assert (metadata == disk.tuples(data, metadata)).all()


@pytest.mark.parametrize("metadata", [METADATA + 2, METADATA + 1, 0x10, 2**64 - 4])
def test_bad_metadata_pointers(metadata: int) -> None:
    with Disk(FORMATS[0]) as disk:
        status = disk.run(disk.command(READ, metadata=metadata))
        expected = lib.NVME_SC_INVALID_FIELD if metadata % 4 else lib.NVME_SC_DATA_XFER_ERROR
        assert status == expected | DNR


def test_metadata_segments() -> None:
    """There are no SGLs for metadata."""
    with Disk(FORMATS[0]) as disk:
        status = disk.run(disk.command(READ, flags=lib.NVME_CMD_SGL_METASEG, prp2=SEVEN * 512))
        assert status == lib.NVME_SC_INVALID_FIELD | DNR
        assert disk.run(disk.command(READ, flags=lib.NVME_CMD_SGL_METABUF, prp2=SEVEN * 512)) == 0


def test_mdts_counts_metadata_in_between() -> None:
    """256 blocks of 512 bytes are 32 pages, the rig's limit, and no longer with 16 bytes of metadata each."""
    format = Format(9, 16, extended=True)
    with Disk(format) as disk:
        disk.put(LISTS, np.arange(DATA + 0x100000, DATA + 0x128000, PAGE, dtype=np.uint64))
        assert disk.run(disk.command(READ, blocks=248)) == 0
        assert disk.run(disk.command(READ, blocks=249)) == lib.NVME_SC_INVALID_FIELD | DNR
    with Disk(Format(9, 8, extended=True)) as disk:
        disk.put(LISTS, np.arange(DATA + 0x100000, DATA + 0x128000, PAGE, dtype=np.uint64))
        assert disk.run(disk.command(READ, ACT, blocks=256)) == 0
        assert disk.run(disk.command(READ, ACT, blocks=257)) == lib.NVME_SC_INVALID_FIELD | DNR


class TestCopy:
    """PRINFOR checks the source, PRINFOW the destination (NVM 3.2.2)."""

    def copy(self, disk: Disk, control: int, read_checks: int = 0, **fields: int) -> int:
        entry = np.zeros(1, dtype_of("struct nvme_copy_range"))
        entry["slba"], entry["nlb"] = SEVEN, SEVEN - 1
        entry["elbat"], entry["elbatm"] = TAG, 0xFFFF
        disk.put(DATA, entry)
        fields = {"cdw12": control | read_checks >> 14, "cdw14": 100, "cdw15": 0xFFFF0000 | TAG} | fields
        return disk.run(command(lib.NVME_CMD_COPY, lba=100, **fields))

    @pytest.mark.parametrize("format", [Format(), Format(12, 64), Format(9, 16, first=True)], ids=str)
    def test_made_anew(self, format: Format) -> None:
        with Disk(format) as disk:
            data, metadata = content(format)
            disk.to_memory(data, disk.tuples(data, metadata))
            assert disk.run(disk.command(WRITE, CHECK)) == 0
            assert self.copy(disk, ACT, CHECK) == 0
            assert disk.run(disk.command(READ, CHECK, lba=100, cdw14=100)) == 0
            got = disk.from_memory()
            assert (got[0] == data).all()
            assert (got[1] == disk.tuples(data, metadata, 100)).all()

    def test_taken_along(self) -> None:
        """Its reference tags are those of other blocks then, which a check finds."""
        with Disk(FORMATS[0]) as disk:
            data, metadata = content(FORMATS[0])
            disk.to_memory(data, disk.tuples(data, metadata))
            assert disk.run(disk.command(WRITE, CHECK)) == 0
            assert self.copy(disk, REF) == lib.NVME_SC_REFTAG_CHECK
            assert self.copy(disk, GUARD | APP, CHECK) == 0
            assert disk.run(disk.command(READ, GUARD | APP, lba=100)) == 0
            assert disk.run(disk.command(READ, REF, lba=100, cdw14=100)) == lib.NVME_SC_REFTAG_CHECK

    @pytest.mark.parametrize(
        ("byte", "check", "status"),
        [
            (0, GUARD, lib.NVME_SC_GUARD_CHECK),
            (2, APP, lib.NVME_SC_APPTAG_CHECK),
            (4, REF, lib.NVME_SC_REFTAG_CHECK),
        ],
    )
    def test_bad_sources(self, byte: int, check: int, status: int) -> None:
        with Disk(FORMATS[0]) as disk:
            data, metadata = content(FORMATS[0])
            metadata = disk.tuples(data, metadata)
            metadata[4, byte] ^= 1
            disk.to_memory(data, metadata)
            assert disk.run(disk.command(WRITE)) == 0
            assert self.copy(disk, ACT, check) == status
            assert self.copy(disk, ACT, CHECK & ~check) == 0

    def test_without_protection(self) -> None:
        with Disk(FORMATS[0], pi=0) as disk:
            data, metadata = content(FORMATS[0])
            disk.to_memory(data, metadata)
            assert disk.run(disk.command(WRITE)) == 0
            assert self.copy(disk, 0) == 0
            assert disk.run(disk.command(READ, lba=100)) == 0
            got = disk.from_memory()
            assert (got[0] == data).all()
            assert (got[1] == metadata).all()
