"""Print what the DMA API costs: map and unmap of one 4 KiB buffer, by the kind of the default domain.

All kinds in one run, interleaved, medians; the machines are noisy, so read the ratios. Run by hand: it states figures
and judges nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import trio

from pvfio import Machine, MachineConfig
from pvfio.guest.dma_api import Direction, DmaDevice
from pvfio.guest.dma_domain import DomainKind
from pvfio.machine import DeviceSpec
from pvfio.memory import DmaBuffer

ROUNDS = 25
CALLS = 2000
KINDS: tuple[DomainKind, ...] = ("identity", "strict", "lazy")


async def measure() -> None:
    """One machine with a device for each kind, and one that is untrusted."""
    names = (*KINDS, "bounced")
    specs = tuple(DeviceSpec(kind="testdev", name=name, driver=None) for name in names)
    times: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    async with Machine(MachineConfig(devices=specs, engine="inline")) as machine:
        sides = {}
        for name in names:
            device = machine.kernel.device(machine.devices[name].pci_name)
            assert device.iommu_group is not None
            for kind in KINDS:
                if kind == name:
                    device.iommu_group.set_default_domain(kind)
            sides[name] = DmaDevice(machine.kernel, device, untrusted=name == "bounced")
        whole, part = machine.memory.alloc(4096), machine.memory.alloc(4000)
        for _ in range(ROUNDS):
            for name in names:
                times[name].append(one_round(sides[name], part if name == "bounced" else whole))
                await trio.lowlevel.checkpoint()
    for name, rounds in times.items():
        mapped, unmapped = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:8}  map {mapped:7.0f} ns  unmap {unmapped:7.0f} ns  both {mapped + unmapped:7.0f} ns")


def one_round(dma: DmaDevice, buffer: DmaBuffer) -> tuple[float, float]:
    """Nanoseconds of a map and of an unmap: as a driver does, one after the other, and 64 in flight."""
    depth = 64
    map_single, unmap_single = dma.map_single, dma.unmap_single
    mapping = unmapping = 0
    for _ in range(CALLS // depth):
        start = time.perf_counter_ns()
        addresses = [map_single(buffer, Direction.BIDIRECTIONAL) for _ in range(depth)]
        middle = time.perf_counter_ns()
        for address in addresses:
            unmap_single(address, buffer.nbytes, Direction.BIDIRECTIONAL)
        unmapping += time.perf_counter_ns() - middle
        mapping += middle - start
    calls = CALLS // depth * depth
    return mapping / calls, unmapping / calls


if __name__ == "__main__":
    trio.run(measure)
