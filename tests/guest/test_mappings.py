"""The index of mappings against a sorted list, at its edges, and when memory runs out."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pvfio.guest.mapping_index import Mapping, MappingIndex
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

TOP = (1 << 64) - 1
COOKIE_MAX = (1 << 56) - 1


class IndexAgainstList(RuleBasedStateMachine):
    """Whatever is done to the index, a plain list of mappings answers the same."""

    @initialize()
    def begin(self) -> None:
        self.index = MappingIndex()
        self.model: list[Mapping] = []

    def overlapping(self, start: int, last: int) -> list[Mapping]:
        return sorted(m for m in self.model if m.iova <= last and m.last >= start)

    @rule(
        page=st.integers(0, 400),
        pages=st.integers(1, 6),
        top=st.booleans(),
        flags=st.integers(0, 255),
        cookie=st.integers(0, COOKIE_MAX),
    )
    def insert(self, page: int, pages: int, top: bool, flags: int, cookie: int) -> None:
        iova = ((TOP >> 12) - 410 + page if top else page) << 12
        mapping = Mapping(iova, pages << 12, iova ^ 0x5000, flags, cookie)
        if self.overlapping(mapping.iova, mapping.last):
            with pytest.raises(OSError) as caught:
                self.index.insert(*mapping)
            assert caught.value.errno == errno.EEXIST
        else:
            self.index.insert(*mapping)
            self.model.append(mapping)

    @rule(
        seed=st.integers(0, 1 << 30), n=st.integers(40, 400), order=st.sampled_from(["up", "down", "mixed"])
    )
    def insert_many(self, seed: int, n: int, order: str) -> None:
        base = 0x10_0000_0000
        pages = list(range(n))
        if order == "down":
            pages.reverse()
        elif order == "mixed":
            random.Random(seed).shuffle(pages)
        for page in pages:
            mapping = Mapping(base + page * 0x3000, 0x1000, page, 3, page)
            if not self.overlapping(mapping.iova, mapping.last):
                self.index.insert(*mapping)
                self.model.append(mapping)

    @rule(seed=st.integers(0, 1 << 30), share=st.floats(0.1, 1))
    def remove_many(self, seed: int, share: float) -> None:
        chosen = random.Random(seed).sample(self.model, int(len(self.model) * share))
        for mapping in chosen:
            assert self.index.remove(mapping.iova) == mapping
            self.model.remove(mapping)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.model:
            mapping = data.draw(st.sampled_from(self.model))
            with pytest.raises(KeyError):
                self.index.remove(mapping.iova + 1)
            assert self.index.remove(mapping.iova) == mapping
            self.model.remove(mapping)

    @rule(page=st.integers(0, 420), span=st.integers(0, 60), top=st.booleans())
    def look(self, page: int, span: int, top: bool) -> None:
        start = ((TOP >> 12) - 410 + page if top else page) << 12
        start = min(start, TOP - 0xFFF)
        last = min(start + (span << 12) + 0xFFF, TOP)
        expected = self.overlapping(start, last)
        assert list(self.index.range(start, last)) == expected
        assert self.index.first(start, last) == (expected[0] if expected else None)
        holds = self.overlapping(start, start)
        assert self.index.find(start) == (holds[0] if holds else None)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.model.clear()

    @invariant()
    def same(self) -> None:
        if hasattr(self, "index"):
            self.index.check()
            assert len(self.index) == len(self.model)
            assert list(self.index) == sorted(self.model)


TestIndexAgainstList = IndexAgainstList.TestCase
TestIndexAgainstList.settings = settings(max_examples=tries(60), stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(
    ("iova", "size", "flags", "cookie", "expected"),
    [
        (0x1000, 0, 0, 0, errno.EINVAL),
        (0x1000, 0x1000, 256, 0, errno.EINVAL),
        (0x1000, 0x1000, 0, COOKIE_MAX + 1, errno.EINVAL),
        (TOP, 2, 0, 0, errno.EOVERFLOW),
        (0x1000, TOP, 0, 0, errno.EOVERFLOW),
        (0x8000, 0x1000, 0, 0, errno.EEXIST),
        (0x7000, 0x2000, 0, 0, errno.EEXIST),
        (0x9FFF, 1, 0, 0, errno.EEXIST),
        (0, TOP, 0, 0, errno.EEXIST),
    ],
)
def test_refused(iova: int, size: int, flags: int, cookie: int, expected: int) -> None:
    index = MappingIndex()
    index.insert(0x8000, 0x2000)
    with pytest.raises(OSError) as caught:
        index.insert(iova, size, 0, flags, cookie)
    assert caught.value.errno == expected
    assert list(index) == [Mapping(0x8000, 0x2000, 0, 0, 0)]


def test_a_mapping_may_end_at_the_top_of_the_address_space() -> None:
    index = MappingIndex()
    index.insert(TOP - 0xFFF, 0x1000, 7, 1, COOKIE_MAX)
    index.insert(0, 0x1000)
    assert index.find(TOP) == Mapping(TOP - 0xFFF, 0x1000, 7, 1, COOKIE_MAX)
    assert index.find(TOP - 0x1000) is None
    assert [m.iova for m in index.range(0x1000)] == [TOP - 0xFFF]
    assert index.first(0x1000, TOP - 0x1000) is None


def test_a_full_64_bit_space_less_one_byte_is_one_mapping() -> None:
    index = MappingIndex()
    index.insert(0, TOP)
    assert index.find(TOP - 1) == Mapping(0, TOP, 0, 0, 0)
    assert index.find(TOP) is None


def test_lack_of_memory_refuses_the_insert_and_changes_nothing() -> None:
    index = MappingIndex(max_bytes=80 << 10)
    inserted = 0
    refused: int | None = None
    while refused is None:
        try:
            index.insert(inserted << 12, 0x1000, inserted)
            inserted += 1
        except OSError as error:
            refused = error.errno
    assert refused == errno.ENOMEM
    assert inserted > 1000
    index.check()
    assert [m.vaddr for m in index] == list(range(inserted))
    assert index.nbytes <= 80 << 10
    index.remove(5 << 12)
    index.insert(5 << 12, 0x1000, 5)
    assert len(index) == inserted


def test_memory_goes_back_when_the_index_is_empty() -> None:
    index = MappingIndex()
    index.insert(0, 1)
    small = index.nbytes
    for i in range(1, 20_000):
        index.insert(i, 1)
    assert index.nbytes > small
    for i in range(20_000):
        index.remove(i)
    assert index.nbytes == small


@pytest.mark.parametrize("order", ["up", "down", "mixed"])
def test_bytes_per_mapping_stay_under_100(order: str) -> None:
    index = MappingIndex()
    iovas = list(range(60_000))
    if order == "down":
        iovas.reverse()
    elif order == "mixed":
        random.Random(1).shuffle(iovas)
    for iova in iovas:
        index.insert(iova << 12, 0x1000)
    assert index.nbytes / len(index) < 100
    index.check()


def test_a_deep_tree_shrinks_and_grows_without_losing_an_entry() -> None:
    rng = random.Random(7)
    index = MappingIndex()
    pages = list(range(50_000))
    rng.shuffle(pages)
    for page in pages:
        index.insert(page << 12, 0x1000, page)
    present = set(pages)
    for keep in (30_000, 3_000, 40_000, 700, 20, 5_000, 0):
        if keep < len(present):
            for page in rng.sample(sorted(present), len(present) - keep):
                assert index.remove(page << 12).vaddr == page
                present.remove(page)
        else:
            for page in rng.sample(sorted(set(pages) - present), keep - len(present)):
                index.insert(page << 12, 0x1000, page)
                present.add(page)
        index.check()
        assert [m.vaddr for m in index] == sorted(present)
