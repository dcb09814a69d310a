"""What I/O a job issues: coverage, order, shares of directions, sizes and distributions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.workloads.fio import Notes, build, parse_job_text
from pvfio.workloads.fio.distribution import Normal, Pareto, Shuffle, Zipf, Zoned
from pvfio.workloads.fio.job import Job
from pvfio.workloads.fio.pattern import parse_pattern
from pvfio.workloads.fio.plan import Ios, Plan


def job(*lines: str) -> Job:
    (section,) = parse_job_text("\n".join(("[job]", *lines)), {})
    return build(section, Notes())


def everything(plan: Plan) -> Ios:
    parts = []
    while len(found := plan.take(1000)):
        parts.append(found)
    return Ios(*(np.concatenate([getattr(part, name) for part in parts]) for name in Ios.__slots__))


@given(st.integers(1, 3000), st.integers(0, 5))
def test_a_shuffle_has_every_block_once(count: int, largest: int) -> None:
    for limit in (largest, 1 << 20):
        shuffle = Shuffle(count, np.random.default_rng(count), largest=limit)
        for _ in range(2):
            drawn = np.concatenate([shuffle.draw(count // 2), shuffle.draw(count - count // 2)])
            assert sorted(drawn.tolist()) == list(range(count))


def test_a_shuffle_of_very_many_blocks_is_random() -> None:
    shuffle = Shuffle(1 << 30, np.random.default_rng(3))
    drawn = shuffle.draw(20_000).astype(np.int64)
    assert len(np.unique(drawn)) == 20_000
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
    counts, _ = np.histogram(drawn, bins=16, range=(0, 1 << 30))
    assert counts.min() > 1000


@pytest.mark.parametrize("lines", [("bs=4k",), ("bssplit=4k/50:16k/30:64k/20",), ("bsrange=4k-32k",)])
def test_the_random_map_touches_every_byte_once(lines: tuple[str, ...]) -> None:
    ios = everything(Plan(job("rw=randwrite", *lines), 4 << 20, 1))
    units = np.zeros(1024, dtype=int)
    for offset, length in zip(ios.offset.tolist(), ios.length.tolist(), strict=True):
        units[offset // 4096 : (offset + length) // 4096] += 1
    assert (units == 1).all()
    assert not np.array_equal(ios.offset, np.sort(ios.offset))


def test_sequential_offsets_wrap_and_skip() -> None:
    ios = everything(Plan(job("rw=read", "bs=4k", "io_size=32k"), 16 << 10, 1))
    assert ios.offset.tolist() == [0, 4096, 8192, 12288] * 2
    ios = everything(Plan(job("rw=read:4k", "bs=4k", "io_size=16k"), 16 << 10, 1))
    assert ios.offset.tolist() == [0, 8192, 0, 8192]


def test_random_jumps_every_so_often() -> None:
    ios = everything(Plan(job("rw=randread:4", "bs=4k"), 8 << 20, 1))
    runs = ios.offset[: len(ios) // 4 * 4].reshape(-1, 4).astype(np.int64)
    assert (np.diff(runs, axis=1) == 4096).mean() > 0.98  # but where a run meets the end


def test_identical_offsets_until_the_next_jump() -> None:
    ios = everything(Plan(job("rw=randread:4", "rw_sequencer=identical", "bs=4k"), 8 << 20, 1))
    runs = ios.offset.reshape(-1, 4)
    assert (runs == runs[:, :1]).all()
    assert len(np.unique(runs[:, 0])) > len(runs) // 2


def test_mixes_and_splits_are_as_asked() -> None:
    ios = everything(
        Plan(job("rw=randrw", "rwmixread=70", "bssplit=4k/75:8k/25", "norandommap"), 256 << 20, 1)
    )
    assert (ios.direction == 0).mean() == pytest.approx(0.70, abs=0.01)
    assert (ios.length == 4096).mean() == pytest.approx(0.75, abs=0.01)
    assert int((ios.offset + ios.length).max()) <= 256 << 20


def test_percentage_random() -> None:
    ios = everything(Plan(job("rw=randread", "percentage_random=25", "bs=4k"), 64 << 20, 1))
    steps = np.diff(ios.offset.astype(np.int64))
    assert (steps == 4096).mean() == pytest.approx(0.75, abs=0.02)


def test_passes_and_number_ios() -> None:
    assert len(everything(Plan(job("rw=read"), 16 << 10, 1, passes=3))) == 12
    for number, passes, count in ((3, 1, 3), (3, 2, 6), (9, 1, 4), (9, 2, 8)):
        plan = Plan(job("rw=randread", f"number_ios={number}"), 16 << 10, 1, passes=passes)
        assert len(everything(plan)) == count
    plan = Plan(job("rw=randread"), 16 << 10, 1, passes=None)
    assert sum(len(plan.take(3)) for _ in range(100)) > 100


@pytest.mark.parametrize("line", ["rw=read", "rw=randread", "rw=randread\nnorandommap", "rw=randtrimwrite"])
def test_no_more_is_made_than_a_pass_has(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small passes, again and again: what is made and thrown away would be most of the time."""
    made, make = 0, Plan._make

    def watched(plan: Plan, count: int) -> Ios:
        nonlocal made
        chunk = make(plan, count)
        made += len(chunk)
        return chunk

    monkeypatch.setattr(Plan, "_make", watched)
    for lines in (line, line + "\nnumber_ios=8"):
        made = 0
        ios = everything(Plan(job(*lines.split("\n")), 64 << 10, 1, passes=10))
        assert len(ios) <= made <= 1.5 * len(ios)


def test_what_is_taken_back_comes_again() -> None:
    plan = Plan(job("rw=randread"), 1 << 20, 1)
    first = plan.take(8)
    plan.untake(5)
    assert np.array_equal(plan.take(5).offset, first.offset[3:])


def test_the_seed_decides() -> None:
    one, two, other = (everything(Plan(job("rw=randrw"), 1 << 20, seed)).offset for seed in (5, 5, 6))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_trimwrite_trims_each_block_before_it_writes_it() -> None:
    ios = everything(Plan(job("rw=randtrimwrite", "bs=4k"), 64 << 10, 1))
    assert ios.direction.tolist() == [2, 1] * 16
    assert np.array_equal(ios.offset[0::2], ios.offset[1::2])
    assert len(np.unique(ios.offset)) == 16


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Plan(job("rw=read", "bs=64k"), 4096, 1)
    with pytest.raises(ValueError, match="whole blocks"):
        Plan(job("rw=read", "bs=512"), 1 << 20, 1, unit=4096)
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        Plan(job("rw=read:100", "bs=4k"), 1 << 20, 1, unit=512)
    Plan(job("rw=randread:100", "bs=4k"), 1 << 20, 1, unit=512)  # a number of I/Os


def test_zipf_has_the_shares_of_its_law() -> None:
    count, theta = 1000, 1.2
    ranks = Zipf(count, np.random.default_rng(1), theta).ranks(200_000)
    weights = np.arange(1, count + 1) ** -theta
    for rank in (0, 1):
        assert (ranks == rank).mean() == pytest.approx(weights[rank] / weights.sum(), rel=0.03)
    # The formula approximates the tail.
    assert (ranks < 100).mean() == pytest.approx(weights[:100].sum() / weights.sum(), abs=0.05)


def test_pareto_is_self_similar() -> None:
    ranks = Pareto(100_000, np.random.default_rng(1), 0.2).ranks(100_000)
    assert (ranks < 20_000).mean() == pytest.approx(0.8, abs=0.01)
    assert (ranks < 4_000).mean() == pytest.approx(0.64, abs=0.01)


def test_normal_and_zones() -> None:
    drawn = Normal(10_000, np.random.default_rng(1), 5.0).draw(50_000)
    assert drawn.mean() == pytest.approx(5000, rel=0.01)
    assert drawn.std() == pytest.approx(500, rel=0.05)
    zoned = Zoned(1000, np.random.default_rng(1), ((60, 100), (30, 200), (10, 700))).draw(50_000)
    assert (zoned < 100).mean() == pytest.approx(0.6, abs=0.01)
    assert (zoned >= 300).mean() == pytest.approx(0.1, abs=0.01)


def test_patterns() -> None:
    assert parse_pattern("0xdeadbeef").data == bytes.fromhex("deadbeef")
    assert parse_pattern("12345678").data == bytes.fromhex("4e61bc")
    assert parse_pattern('"abcd"-123').data == b"abcd" + bytes.fromhex("85ffffff")
    pattern = parse_pattern("0xff%o")
    block = pattern.fill(18, np.array([0x1000], dtype=np.uint64))[0].tobytes()
    assert block == (b"\xff" + (0x1000).to_bytes(8, "little")) * 2
