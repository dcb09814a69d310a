"""MSI-X: the table and pending bits as PCI Local Bus 3.0 section 6.8.2 has them, over the table bus."""

from __future__ import annotations

import pytest

from pvfio.silicon import Msix, TableBus

pytestmark = pytest.mark.touches_c

ADDRESS = 0xFEE0_1004


@pytest.fixture
def bus() -> TableBus:
    return TableBus()


@pytest.fixture
def msix(bus: TableBus) -> Msix:
    msix = Msix(bus, 70)
    msix.control(True, False)
    return msix


def program(msix: Msix, vector: int, data: int, masked: bool = False) -> None:
    msix.table_write(16 * vector, 8, ADDRESS)
    msix.table_write(16 * vector + 8, 8, masked << 32 | data)


def test_a_vector_is_sent_where_its_entry_says(bus: TableBus, msix: Msix) -> None:
    program(msix, 5, 0x4041)
    assert msix.fire(5)
    assert bus.msis() == (1, ADDRESS, 0x4041)


def test_entries_are_born_masked_and_what_was_pending_is_sent_once(bus: TableBus, msix: Msix) -> None:
    assert msix.table_read(16 * 69 + 12, 4) == 1
    assert not msix.fire(69)
    assert not msix.fire(69)
    assert msix.pba_read(8, 8) == 1 << 5
    assert msix.pba_read(8, 4) == 1 << 5
    program(msix, 69, 0x21)
    assert bus.msis() == (1, ADDRESS, 0x21)
    assert msix.pba_read(8, 8) == 0


def test_function_mask_holds_every_vector_back(bus: TableBus, msix: Msix) -> None:
    program(msix, 0, 1)
    program(msix, 1, 2)
    msix.control(True, True)
    assert not msix.fire(0)
    assert not msix.fire(1)
    assert (bus.msis()[0], msix.pba_read(0, 8)) == (0, 3)
    msix.control(True, False)
    assert (bus.msis(), msix.pba_read(0, 8)) == ((2, ADDRESS, 2), 0)


def test_disabled_sends_nothing_and_remembers_nothing(bus: TableBus, msix: Msix) -> None:
    program(msix, 0, 1)
    msix.control(False, False)
    assert not msix.fire(0)
    msix.control(True, False)
    assert bus.msis()[0] == 0


def test_reset_masks_and_disables(bus: TableBus, msix: Msix) -> None:
    program(msix, 0, 1)
    msix.reset()
    assert msix.table_read(0, 8) == 0
    assert msix.table_read(12, 4) == 1
    assert not msix.fire(0)
    assert msix.pba_read(0, 8) == 0


def test_dwords_and_qwords_agree_and_reserved_bits_read_zero(msix: Msix) -> None:
    msix.table_write(16, 4, 0xFFFF_FFFF)
    msix.table_write(20, 4, 0x1234_5678)
    assert msix.table_read(16, 8) == 0x1234_5678_FFFF_FFFC
    msix.table_write(28, 4, 0xFFFF_FFFF)
    assert msix.table_read(28, 4) == 1


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (2, 4), (4, 8), (70 * 16, 4), (1 << 40, 8)])
def test_accesses_that_cannot_be(msix: Msix, offset: int, size: int) -> None:
    with pytest.raises(OSError):
        msix.table_read(offset, size)
    with pytest.raises(OSError):
        msix.table_write(offset, size, 0)
    with pytest.raises(OSError):
        msix.pba_read(offset, size)


@pytest.mark.parametrize("vectors", [0, 2049])
def test_tables_that_cannot_be(bus: TableBus, vectors: int) -> None:
    with pytest.raises(ValueError):
        Msix(bus, vectors)


def test_no_such_vector(msix: Msix) -> None:
    with pytest.raises(ValueError):
        msix.fire(70)


def test_a_message_nothing_accepts_is_not_sent(bus: TableBus) -> None:
    """Bus-master enable off: the message is lost, as on a real bus."""
    msix = Msix(bus, 1)
    msix.control(True, False)
    program(msix, 0, 1)
    bus.cancel(True)
    assert not msix.fire(0)
    assert bus.msis()[0] == 0
