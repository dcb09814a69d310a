"""Nanoseconds of one map and one unmap in the page-table layer alone, medians, beside plain stores of the same entries.

Run it as a program. It measures loops inside the extension; it does not measure Python's share, page pinning, or the
flush. Each range lies in tables that other mappings keep in use, as in a live domain. The rounds of all cases take
turns, so that a machine that is busy for a while is busy for all of them.
"""

from __future__ import annotations

import statistics

from pvfio.abi import ffi, lib
from pvfio.memory import GuestMemory
from pvfio.pagetable import Format, PageTable, Perm

K4, M2 = 1 << 12, 1 << 21
RW = Perm.READ | Perm.WRITE
# name -> (page size, pages a call, calls a series)
CASES = {"4K": (K4, 1, 256), "256 x 4K": (K4, 256, 16), "2M": (M2, 1, 256), "256 x 2M": (M2, 256, 16)}
# What the project promises of x86_64 on an idle machine; the other formats within a fifth of it.
MOST = {"4K": (90, 110), "256 x 4K": (450, 350), "256 x 2M": (450, 350)}


class Series:
    """One case in a table of its own, timed again and again: one map call and one unmap call at a time."""

    def __init__(self, fmt: Format, page: int, pages: int, calls: int) -> None:
        memory = GuestMemory(64 << 20)
        self.table = PageTable(fmt, memory, owner="guest", levels=4, pgsize_bitmap=page)
        self.calls = calls
        covered = page * 512  # what one table of these pages spans
        start, stride = covered, page if pages == 1 else covered
        for table_start in range(start, start + max(stride * calls, covered), covered):
            self.table.map_range(table_start + covered - page, 0, page, RW)  # keeps the table
        fields = {
            "iova": start,
            "phys": 0,
            "size": page * pages,
            "stride": stride,
            "calls": calls,
            "perm": int(RW),
        }
        self._bench = ffi.new("struct pt_bench *", fields)
        self._out = ffi.new("uint64_t[2]")
        self._maps: list[float] = []
        self._unmaps: list[float] = []

    def run(self) -> None:
        error = lib.pt_bench(self.table.ptr, self._bench, self._out, self._out + 1)
        if error:
            raise OSError(-error, f"{self.table.format.name} {self._bench.size:#x}")
        self._maps.append(self._out[0] / self.calls)
        self._unmaps.append(self._out[1] / self.calls)

    def medians(self) -> tuple[float, float]:
        """ns of a map call and of an unmap call."""
        return statistics.median(self._maps), statistics.median(self._unmaps)


def floor_of(pages: int) -> float:
    """ns of a plain loop that stores that many entries."""
    calls = 20000 // pages
    return float(lib.pt_bench_stores(pages, calls)) / calls


def measure(rounds: int = 41) -> dict[str, tuple[float, dict[Format, tuple[float, float]]]]:
    """Case -> (plain stores ns, format -> (map ns, unmap ns)); medians of rounds in which all take turns."""
    series = {(name, fmt): Series(fmt, *case) for name, case in CASES.items() for fmt in Format}
    floors: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, (_page, pages, _calls) in CASES.items():
            floors[name].append(floor_of(pages))
        for one in series.values():
            one.run()
    medians = {name: {fmt: series[name, fmt].medians() for fmt in Format} for name in CASES}
    return {name: (statistics.median(floors[name]), medians[name]) for name in CASES}


def main() -> None:
    print(
        f"{'':9} {'':9} {'map ns':>8} {'unmap ns':>8} {'stores ns':>9} {'map/stores':>10} {'unmap/stores':>12}  most ns"
    )
    for name, (floor, formats) in measure().items():
        for fmt, (mapped, unmapped) in formats.items():
            ratios = f"{mapped / floor:10.2f} {unmapped / floor:12.2f}"
            row = f"{fmt.name.lower():9} {name:9} {mapped:8.1f} {unmapped:8.1f} {floor:9.1f} {ratios}"
            print(
                row
                + (f"  {MOST[name][0]} and {MOST[name][1]}" if name in MOST and fmt is Format.X86_64 else "")
            )


if __name__ == "__main__":
    main()
