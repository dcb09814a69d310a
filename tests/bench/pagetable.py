"""Nanoseconds of one map and one unmap in the page-table layer alone, medians, beside plain stores of the same entries.

Run it as a program. It measures loops inside the extension; it does not measure Python's share, page pinning, or the
flush. Each range lies in tables that other mappings keep in use, as in a live domain.
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


def measure(
    fmt: Format, levels: int, page: int, pages: int, calls: int, rounds: int = 31
) -> tuple[float, float]:
    """Median ns of one map call and of one unmap call."""
    memory = GuestMemory(64 << 20)
    table = PageTable(fmt, memory, owner="guest", levels=levels, pgsize_bitmap=page)
    covered = page * 512  # what one table of these pages spans
    start, stride = covered, page if pages == 1 else covered
    for table_start in range(start, start + max(stride * calls, covered), covered):
        table.map_range(table_start + covered - page, 0, page, RW)  # keeps the table
    bench = ffi.new(
        "struct pt_bench *",
        {"iova": start, "phys": 0, "size": page * pages, "stride": stride, "calls": calls, "perm": int(RW)},
    )
    out = ffi.new("uint64_t[2]")
    maps, unmaps = [], []
    for _ in range(rounds):
        error = lib.pt_bench(table.ptr, bench, out, out + 1)
        if error:
            raise OSError(-error, f"{fmt.name} {page:#x} x {pages}")
        maps.append(out[0] / calls)
        unmaps.append(out[1] / calls)
    table.destroy()
    return statistics.median(maps), statistics.median(unmaps)


def plain_stores(pages: int) -> float:
    """Median ns of a loop that stores that many entries."""
    calls = 20000 // pages
    return statistics.median(float(lib.pt_bench_stores(pages, calls)) / calls for _ in range(31))


def main() -> None:
    print(f"{'':9} {'':9} {'map ns':>9} {'unmap ns':>9} {'plain stores ns':>16}")
    for name, (page, pages, calls) in CASES.items():
        floor = plain_stores(pages)
        for fmt, levels in ((Format.X86_64, 4), (Format.VTDSS, 4), (Format.AMDV1, 4)):
            mapped, unmapped = measure(fmt, levels, page, pages, calls)
            print(f"{fmt.name.lower():9} {name:9} {mapped:9.1f} {unmapped:9.1f} {floor:16.1f}")


if __name__ == "__main__":
    main()
