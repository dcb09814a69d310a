"""Memory and tables for the tests of the page tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pvfio.memory import GuestMemory
from pvfio.pagetable import Format, PageTable
from tests.pagetable.reference import SHAPES

Make = Callable[..., PageTable]


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(32 << 20, host_private=4 << 20)


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0].name.lower()}-{shape[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[Format, int]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def make(memory: GuestMemory, shape: tuple[Format, int]) -> Iterator[Make]:
    """Makes tables of the shape; afterwards none may have kept a page."""
    tables: list[PageTable] = []
    before = memory.stats()

    def make_table(**options: object) -> PageTable:
        options = {"owner": "guest", "levels": shape[1], **options}
        table = PageTable(shape[0], memory, **options)  # type: ignore[arg-type]
        tables.append(table)
        return table

    yield make_table
    for table in tables:
        table.destroy()
    assert memory.stats() == before


@pytest.fixture
def table(make: Make) -> PageTable:
    return make()
