"""Every rule of the DMA API that is checked: what breaks it, what does not, and what the report says."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from pvfio.guest.dma_debug import DmaDebug, DmaMisuseError, Rule

BIDIRECTIONAL, TO_DEVICE, FROM_DEVICE = range(3)
DEVICE = "0001:00:00.0"
OTHER = "0002:00:00.0"
ADDRESS = 0xFFFF_0000
SG = "scatter-gather"

Action = Callable[[DmaDebug], None]


def map_(kind: str = "single", direction: int = TO_DEVICE, *, cpu: int = 0, entries: int = 1) -> Action:
    return lambda debug: debug.mapped(DEVICE, kind, ADDRESS, 0x1000, direction, cpu=cpu, entries=entries)


def unmap(
    kind: str = "single", size: int = 0x1000, direction: int = TO_DEVICE, *, cpu: int = 0, entries: int = 1
) -> Action:
    return lambda debug: debug.unmapping(DEVICE, kind, ADDRESS, size, direction, cpu=cpu, entries=entries)


def sync(
    to_cpu: bool,
    direction: int = TO_DEVICE,
    *,
    at: int = 0,
    size: int = 0x1000,
    kind: str = "single",
    entries: int = 1,
) -> Action:
    return lambda debug: debug.syncing(
        DEVICE, kind, ADDRESS + at, size, direction, to_cpu=to_cpu, entries=entries
    )


MISUSES: dict[str, tuple[list[Action], list[Rule]]] = {
    "right": ([map_(), sync(True), sync(False), unmap()], []),
    "right, parts": (
        [map_(), sync(True, at=8, size=8), sync(True, at=64, size=64), sync(False, at=70, size=3), unmap()],
        [],
    ),
    "right, any direction of a bidirectional one": (
        [
            map_(direction=BIDIRECTIONAL),
            sync(True, FROM_DEVICE),
            sync(False, TO_DEVICE),
            unmap(direction=BIDIRECTIONAL),
        ],
        [],
    ),
    "unmapped, never mapped": ([unmap()], [Rule.UNMAP_UNKNOWN]),
    "unmapped twice": ([map_(), unmap(), unmap()], [Rule.DOUBLE_UNMAP]),
    "unmapped twice, mapped between": ([map_(), unmap(), map_(), unmap(), unmap()], [Rule.DOUBLE_UNMAP]),
    "size": ([map_(), unmap(size=0x800), unmap()], [Rule.WRONG_SIZE, Rule.DOUBLE_UNMAP]),
    "direction": ([map_(), unmap(direction=FROM_DEVICE)], [Rule.WRONG_DIRECTION]),
    "page as single": ([map_("page"), unmap("single")], [Rule.WRONG_FUNCTION]),
    "list as coherent": ([map_(SG, entries=3), unmap("coherent")], [Rule.WRONG_FUNCTION]),
    "CPU address": ([map_("coherent", cpu=0x5000), unmap("coherent", cpu=0x6000)], [Rule.WRONG_MEMORY]),
    "entries": ([map_(SG, entries=3), unmap(SG, entries=2)], [Rule.WRONG_COUNT]),
    "entries of a sync": ([map_(SG, entries=3), sync(True, kind=SG, entries=2)], [Rule.WRONG_COUNT]),
    "everything": (
        [map_(), unmap("page", 0x800, FROM_DEVICE)],
        [Rule.WRONG_SIZE, Rule.WRONG_FUNCTION, Rule.WRONG_DIRECTION],
    ),
    "sync, never mapped": ([sync(True)], [Rule.SYNC_UNKNOWN]),
    "sync after unmap": ([map_(), unmap(), sync(True)], [Rule.SYNC_AFTER_UNMAP]),
    "sync behind the end": ([map_(), sync(True, at=0xF00, size=0x200)], [Rule.SYNC_RANGE]),
    "sync past the mapping": ([map_(), sync(True, at=0x1000, size=8)], [Rule.SYNC_UNKNOWN]),
    "sync direction": ([map_(), sync(True, FROM_DEVICE)], [Rule.SYNC_DIRECTION]),
    "sync to its owner": ([map_(), sync(False)], [Rule.SYNC_OWNER]),
    "sync twice": ([map_(), sync(True), sync(True)], [Rule.SYNC_OWNER]),
    "sync of a part that is gone": (
        [map_(), sync(True), sync(False, at=0x100, size=0x100), sync(False)],
        [Rule.SYNC_OWNER],
    ),
    "two writers": (
        [map_(direction=FROM_DEVICE, cpu=0x5000), map_(direction=BIDIRECTIONAL, cpu=0x5020)],
        [Rule.OVERLAP],
    ),
    "a writer after a reader": ([map_(cpu=0x5000), map_(direction=FROM_DEVICE, cpu=0x5000)], []),
    "a writer after a writer": (
        [
            map_(direction=FROM_DEVICE, cpu=0x5000),
            unmap(direction=FROM_DEVICE),
            map_(direction=FROM_DEVICE, cpu=0x5000),
        ],
        [],
    ),
    "left mapped": ([map_(), lambda debug: debug.unbound(DEVICE)], [Rule.LEAK]),
    "left mapped, told once": (
        [map_(), lambda debug: debug.unbound(DEVICE), lambda debug: debug.unbound(DEVICE)],
        [Rule.LEAK],
    ),
    "nothing left mapped": ([map_(), unmap(), lambda debug: debug.unbound(DEVICE)], []),
    "another's leak": ([map_(), lambda debug: debug.unbound(OTHER)], []),
    "another's mapping": (
        [map_(), lambda debug: debug.unmapping(OTHER, "single", ADDRESS, 0x1000, TO_DEVICE)],
        [Rule.UNMAP_UNKNOWN],
    ),
}

ONLY_TOLD = {Rule.OVERLAP, Rule.LEAK}


@pytest.mark.parametrize("name", MISUSES)
def test_rules(name: str, caplog: pytest.LogCaptureFixture) -> None:
    actions, wanted = MISUSES[name]
    debug = DmaDebug()
    for action in actions:
        action(debug)
    assert [report.rule for report in debug.reports] == wanted
    assert debug.count == len(wanted)
    assert [record.getMessage() for record in caplog.records] == [str(report) for report in debug.reports]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize("name", [name for name, (_, wanted) in MISUSES.items() if set(wanted) - ONLY_TOLD])
def test_rules_that_raise(name: str) -> None:
    actions, wanted = MISUSES[name]
    debug = DmaDebug(raises=True)
    raised: list[Rule] = []
    for action in actions:
        try:
            action(debug)
        except DmaMisuseError as error:
            raised += [report.rule for report in error.reports if str(report) in str(error)]
    # Where an unmap was refused, the mapping is there: what comes next is right, or wrong in itself.
    assert raised == wanted[: len(raised)]
    assert raised[0] == wanted[0]


@pytest.mark.parametrize("name", ["two writers", "left mapped"])
def test_what_has_happened_is_told_and_not_raised(name: str) -> None:
    actions, wanted = MISUSES[name]
    debug = DmaDebug(raises=True)
    for action in actions:
        action(debug)
    assert [report.rule for report in debug.reports] == wanted


def test_a_refused_unmap_leaves_the_mapping() -> None:
    debug = DmaDebug(raises=True)
    map_()(debug)
    with pytest.raises(DmaMisuseError, match="another size"):
        unmap(size=8)(debug)
    assert len(debug) == 1
    unmap()(debug)
    assert len(debug) == 0
    assert debug.count == 1


def first_driver(debug: DmaDebug) -> None:
    debug.mapped(DEVICE, "single", ADDRESS, 64, TO_DEVICE)


def second_driver(debug: DmaDebug) -> None:
    debug.unmapping(DEVICE, "single", ADDRESS, 64, TO_DEVICE)


def test_call_sites() -> None:
    debug = DmaDebug()
    first_driver(debug)
    second_driver(debug)
    second_driver(debug)
    debug.syncing(DEVICE, "single", ADDRESS, 64, TO_DEVICE, to_cpu=True)
    first_driver(debug)
    debug.unbound(DEVICE)
    twice, late, leak = debug.reports

    def line(function: Callable[[DmaDebug], None]) -> tuple[str, int, str]:
        return __file__, function.__code__.co_firstlineno + 1, function.__name__

    assert (twice.at, twice.mapped_at, twice.unmapped_at) == (
        line(second_driver),
        line(first_driver),
        line(second_driver),
    )
    assert (late.at[2], late.mapped_at, late.unmapped_at) == (
        "test_call_sites",
        line(first_driver),
        line(second_driver),
    )
    assert leak.mapped_at == line(first_driver)
    assert str(twice) == (
        f"{DEVICE}: unmapped twice: dma address 0xffff0000 length 0x40, at {__file__}:{twice.at[1]} in second_driver;"
        f" mapped at {__file__}:{line(first_driver)[1]} in first_driver;"
        f" unmapped at {__file__}:{line(second_driver)[1]} in second_driver"
    )


def test_one_address_many_mappings() -> None:
    """An identity domain gives the same address again: the unmap ends the mapping that fits it."""
    debug = DmaDebug()
    for direction in (TO_DEVICE, FROM_DEVICE, TO_DEVICE):
        map_(direction=direction)(debug)
    debug.mapped(DEVICE, "single", ADDRESS, 64, TO_DEVICE)
    unmap(direction=FROM_DEVICE)(debug)
    debug.unmapping(DEVICE, "single", ADDRESS, 64, TO_DEVICE)
    unmap()(debug)
    assert not debug.reports
    assert [mapping.direction for mapping in debug.mappings(DEVICE)] == [TO_DEVICE]
    unmap()(debug)
    assert not debug.reports
    assert list(debug.mappings()) == []
    unmap()(debug)
    assert [report.rule for report in debug.reports] == [Rule.DOUBLE_UNMAP]


def test_what_it_remembers_is_bounded() -> None:
    debug = DmaDebug(remember=4, keep=3)
    for at in range(10):
        debug.mapped(DEVICE, "single", at << 12, 4096, TO_DEVICE)
        debug.unmapping(DEVICE, "single", at << 12, 4096, TO_DEVICE)
    for at in range(10):
        debug.unmapping(DEVICE, "single", at << 12, 4096, TO_DEVICE)
    assert debug.count == 10
    assert [report.rule for report in debug.reports] == [Rule.DOUBLE_UNMAP] * 3
    debug.unmapping(DEVICE, "single", 0, 4096, TO_DEVICE)
    assert debug.reports[-1].rule is Rule.UNMAP_UNKNOWN


def test_a_refused_unmap_needs_no_memory_of_it() -> None:
    debug = DmaDebug(remember=0)
    debug.mapped(DEVICE, "single", 4096, 4096, TO_DEVICE)
    debug.unmapping(DEVICE, "single", 4096, 4096, TO_DEVICE)
    debug.unmap_refused()
    assert len(debug) == 1
    assert not debug.reports


def test_a_sync_finds_its_mapping_among_many() -> None:
    debug = DmaDebug()
    for at in range(0, 200, 2):
        debug.mapped(DEVICE, "single", at << 12, 4096, FROM_DEVICE)
    for at in (198, 0, 100, 52):
        debug.syncing(DEVICE, "single", (at << 12) + 100, 8, FROM_DEVICE, to_cpu=True)
    assert not debug.reports
    debug.syncing(DEVICE, "single", (53 << 12) + 100, 8, FROM_DEVICE, to_cpu=True)
    assert [report.rule for report in debug.reports] == [Rule.SYNC_UNKNOWN]
