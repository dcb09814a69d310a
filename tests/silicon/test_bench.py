"""The translation bench does what its figures are about: as many translations as asked for, hits or misses."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from pvfio.abi import ffi, lib
from pvfio.pagetable import Perm
from pvfio.silicon import READ, Requester

pytestmark = pytest.mark.touches_c

PAGE = 4096
WINDOW = 0x7F12_3000_0000
PAGES = 32_768  # twice the IOTLB's room
RW = Perm.READ | Perm.WRITE


def device(rig: Any) -> Requester:
    domain, table = rig.paging()
    for page in range(PAGES):
        table.map_range(WINDOW + page * PAGE, page % 1024 * PAGE, PAGE, RW)
    rig.tables = [*getattr(rig, "tables", []), table]
    requester: Requester = rig.requester(domain)
    return requester


def bench(count: int = 16, **other: int) -> Any:
    fields = {"iova": WINDOW, "stride": PAGE, "calls": 3 * PAGES, "count": count, "section": 7, "perm": READ}
    return ffi.new("struct pv_bench *", fields | other)


def run(requesters: list[Requester], how: Any) -> tuple[int, int, int]:
    buses = ffi.new("struct pv_bus *[]", [requester.ptr for requester in requesters])
    ns, cpu_ns = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    error: int = lib.pv_bench_translate_all(buses, len(requesters), how, ns, cpu_ns)
    return error, ns[0], cpu_ns[0]


def test_hits_are_hits_and_misses_are_misses(rig: Any) -> None:
    requester = device(rig)
    ns = ffi.new("uint64_t *")
    assert lib.pv_bench_translate(requester.ptr, bench(64), ns) == 0
    hits = requester.tlb_stats()
    assert (hits.hits, hits.misses) == (3 * PAGES - 64, 64)
    assert lib.pv_bench_translate(requester.ptr, bench(PAGES), ns) == 0
    after = requester.tlb_stats()
    assert after.hits + after.misses == 6 * PAGES
    assert after.misses - hits.misses >= 3 * PAGES - 64  # what was left of the first pages may hit once
    assert ns[0] > 0


def test_every_device_does_its_share(rig: Any) -> None:
    requesters = [device(rig) for _ in range(5)]
    error, ns, cpu_ns = run(requesters, bench(16))
    assert (error, ns > 0, cpu_ns > 0) == (0, True, True)
    for requester in requesters:
        stats = requester.tlb_stats()
        assert (stats.hits, stats.misses) == (3 * PAGES - 16, 16)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"count": 0}, errno.EINVAL),
        ({"section": 0}, errno.EINVAL),
        ({"iova": WINDOW + PAGES * PAGE}, errno.EFAULT),
    ],
)
def test_what_cannot_be_timed(rig: Any, fields: dict[str, int], error: int) -> None:
    requesters = [device(rig), device(rig)]
    how = bench(**fields)
    assert lib.pv_bench_translate(requesters[0].ptr, how, ffi.new("uint64_t *")) == -error
    assert run(requesters, how)[0] == -error
    requesters[0].write(WINDOW, b"still usable")
