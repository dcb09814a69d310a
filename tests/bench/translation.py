"""Nanoseconds of one translation: IOTLB hits, misses with the whole nested walk, and many devices at once.

Run it as a program. Medians of loops inside the extension: what an engine pays for each page of a DMA, without the
bytes it moves. A miss reads every entry of both stages; nothing but the IOTLB remembers one. ``entries`` says how many
that are: 24 where both stages have four levels and 4 KiB pages, fewer where stage 2 has larger ones.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass

from pvfio.abi import ffi, lib
from pvfio.memory import BLOCK_SIZE, GuestMemory
from pvfio.pagetable import Format, PageTable, Perm
from pvfio.silicon import PAGING, READ, Iommu, Requester

K4, M2, MIB = 1 << 12, 1 << 21, 1 << 20
RW = Perm.READ | Perm.WRITE
WINDOW = 0x7F12_3000_0000  # every level's index is of its own
HIT_PAGES, MISS_PAGES = 64, 32768  # the IOTLB has room for 16384
FAR_PAGES, FAR = 2048, 1 << 24  # so far apart that it has room for 1024 of them
DEVICES = (1, 2, 4, 8, 16)


@dataclass
class Rig:
    """An IOMMU over a stage 2 of one page size, and the tables that must outlive it."""

    memory: GuestMemory
    stage2: PageTable
    iommu: Iommu
    tables: list[PageTable]

    def device(self, pages: int, levels: int = 4, stride: int = K4) -> Requester:
        """A requester on a domain of its own, which maps that many pages of 4 KiB from ``WINDOW`` on."""
        table = PageTable(Format.X86_64, self.memory, owner="guest", levels=levels, pgsize_bitmap=K4)
        for page in range(pages):
            table.map_range(WINDOW + page * stride, page * K4, K4, RW)
        self.tables.append(table)
        domain = self.iommu.domain(len(self.tables))
        domain.configure(PAGING, table.root, levels)
        requester = self.iommu.requester(len(self.tables))
        requester.attach(domain)
        return requester


def make_rig(fmt: Format, page: int) -> Rig:
    memory = GuestMemory(256 * MIB)
    stage2 = PageTable(fmt, memory, owner="host", levels=4, pgsize_bitmap=page)
    for start, length in memory.ram_ranges():
        for gpa in range(start, start + length, BLOCK_SIZE):
            stage2.map_range(gpa, memory.gpa_to_hpa(gpa), BLOCK_SIZE, RW)
    return Rig(memory, stage2, Iommu(memory, stage2.format, stage2.root, stage2.levels), [])


def bench(pages: int, *, section: int = 64, stride: int = K4, calls: int = 100_000) -> object:
    return ffi.new(
        "struct pv_bench *",
        {"iova": WINDOW, "stride": stride, "calls": calls, "count": pages, "section": section, "perm": READ},
    )


def nanoseconds(requester: Requester, how: object, calls: int = 100_000, rounds: int = 31) -> float:
    """The median over all rounds, for one translation."""
    ns = ffi.new("uint64_t *")
    times: list[float] = []
    for _ in range(rounds):
        error = lib.pv_bench_translate(requester.ptr, how, ns)
        if error:
            raise OSError(-error, "translation bench")
        times.append(ns[0] / calls)
    return float(statistics.median(times))


def one_device() -> None:
    print(
        f"{'stage 2':12} {'entries':>7} {'hit ns':>8} {'hit, own section':>17} {'miss ns':>8} {'scattered':>10}"
    )
    for fmt in (Format.VTDSS, Format.AMDV1):
        for page, name in ((K4, "4K"), (M2, "2M")):
            rig = make_rig(fmt, page)
            near = rig.device(MISS_PAGES)
            far = rig.device(FAR_PAGES, stride=FAR)  # every page in a leaf table of its own
            hit = nanoseconds(near, bench(HIT_PAGES))
            single = nanoseconds(near, bench(HIT_PAGES, section=1))
            before = near.tlb_stats()
            miss = nanoseconds(near, bench(MISS_PAGES))
            after = near.tlb_stats()
            assert after.misses - before.misses >= 31 * 100_000 * 0.99, "these were no misses"
            scattered = nanoseconds(far, bench(FAR_PAGES, stride=FAR))
            entries = len(near.walk(WINDOW).steps)
            print(
                f"{fmt.name.lower():6} {name:5} {entries:7} {hit:8.1f} {single:17.1f} {miss:8.1f} {scattered:10.1f}"
            )


def many_devices(rounds: int = 7) -> None:
    """Each device has a thread and a domain of its own: what they do together, and the processor time of one
    translation. While that stays what it is, devices cost each other nothing but the processors.
    """
    rig = make_rig(Format.VTDSS, M2)
    pages, calls = MISS_PAGES, 300_000
    requesters = [rig.device(pages) for _ in range(max(DEVICES))]
    buses = ffi.new("struct pv_bus *[]", [requester.ptr for requester in requesters])
    ns, cpu_ns = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    print(f"\n{os.cpu_count()} processors     hits {'':14} misses")
    print(f"{'devices':>7} {'M/s':>12} {'cpu ns':>8} {'M/s':>12} {'cpu ns':>8}")
    for devices in DEVICES:
        line = f"{devices:7}"
        for how in (bench(HIT_PAGES, calls=calls), bench(pages, calls=calls)):
            walls, cpus = [], []
            for _ in range(rounds):
                error = lib.pv_bench_translate_all(buses, devices, how, ns, cpu_ns)
                if error:
                    raise OSError(-error, "translation bench")
                walls.append(ns[0] / (devices * calls))
                cpus.append(cpu_ns[0] / (devices * calls))
            line += f" {1000 / statistics.median(walls):12.1f} {statistics.median(cpus):8.1f}"
        print(line)


def main() -> None:
    one_device()
    many_devices()


if __name__ == "__main__":
    main()
