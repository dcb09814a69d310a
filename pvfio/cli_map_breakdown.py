"""``pvfio dma-map-benchmark --breakdown``: which step of a map and of an unmap takes how long.

Timers stand around the functions that are really called, one at a time, in Python and in the C paths of the guest
kernel (``workloads/stages.py``, ``guest/laps.h``); nothing is computed from parts measured elsewhere. ``call`` is what
is left of the time without timers.

The steps: ``call``, the way in and out in Python and whatever is in no other step; ``validation``, checks and the
look-ups they need; ``iova``, the allocator's; ``pin``; ``index`` of mappings; ``page table``; ``hypercall``, filling
the VP's page and the host's dispatch; ``flush handshake``, dropping IOTLB entries and waiting for the open sections
of engines; ``flush queue`` of a lazy domain, its part of one flush in many.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from pvfio.abi import ffi, lib

if TYPE_CHECKING:
    from pvfio.guest.dma_api import DmaDevice
    from pvfio.guest.paging_domain import PagingDomain
    from pvfio.machine import Machine
    from pvfio.vfio import Container
    from pvfio.workloads.dma_map_benchmark import Mapper
    from pvfio.workloads.stages import Probe, Stages

__all__ = ["STEPS", "Breakdown", "break_down"]

STEPS = (
    "call",
    "validation",
    "iova",
    "pin",
    "index",
    "page table",
    "hypercall",
    "flush handshake",
    "flush queue",
)
_LAP_STEPS = {
    lib.PV_LAP_CHECK: "validation",
    lib.PV_LAP_IOVA: "iova",
    lib.PV_LAP_PIN: "pin",
    lib.PV_LAP_INDEX: "index",
    lib.PV_LAP_TABLE: "page table",
}
_BLOCK_SECONDS = 0.01
_BLOCK = 300  # operations at least between two checkpoints, more than a flush queue holds: some are full


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Nanoseconds of each step of a map and of an unmap; ``count``: of how many of each."""

    map: dict[str, float]
    unmap: dict[str, float]
    count: int


async def break_down(
    source: Container | DmaDevice, mapper: Mapper, machine: Machine, name: str, seconds: float
) -> Breakdown:
    """Maps and unmaps as ``mapper`` does, through a container or a device's DMA side, with every step timed.

    ``name`` is the device's in the machine. Cancelled: the timers are gone.
    """
    from pvfio.workloads.dma_map_benchmark import loop_clock_cost
    from pvfio.workloads.stages import Stages

    owner, domains = _owner(source, machine)
    laps = ffi.new("struct pv_laps *")
    stages = Stages(
        _probes(owner, domains, machine, name),
        rest="call",
        carry=owner.set_laps,
        laps=laps,
        lap_stages=[_LAP_STEPS[number] for number in range(lib.PV_LAPS)],
        lap_clock=loop_clock_cost(),
    )
    end = time.perf_counter() + seconds
    at = 0
    while not at or time.perf_counter() < end:
        with closing(stages.turns()) as turns:
            for _ in turns:
                at = _block(stages, mapper, at)
                await trio.lowlevel.checkpoint()
    return Breakdown(_ordered(stages.typical("map")), _ordered(stages.typical("unmap")), at)


def _block(stages: Stages, mapper: Mapper, at: int) -> int:
    """Some hundred operations from number ``at`` on; the number after them."""
    until, fewest = time.perf_counter() + _BLOCK_SECONDS, at + _BLOCK
    while at < fewest or time.perf_counter() < until:
        place = mapper.places[at % len(mapper.places)]
        at += 1
        if mapper.fill is not None:
            mapper.fill(0x66)
        handle = stages.run("map", mapper.map, place)
        stages.run("unmap", mapper.unmap, place, handle)
    return at


def _ordered(found: dict[str, float]) -> dict[str, float]:
    return {step: found[step] for step in STEPS if step in found}


def _owner(source: Any, machine: Machine) -> tuple[Any, list[PagingDomain]]:
    """What carries the lap timer, a type1 or a DMA domain, and the paging domains it maps in."""
    if hasattr(source, "map_single"):
        dma = source.domain
        return dma, [dma.domain] if dma.domain is not None else []
    file: Any = machine.kernel.vfio.files.get(source.file.fd)
    type1 = file.iommu
    return type1, list(type1.domains)


def _probes(owner: Any, domains: list[PagingDomain], machine: Machine, name: str) -> list[Probe]:
    """The functions of Python that are steps, in the guest and in the host."""
    from pvfio.workloads.stages import Probe

    lazy = getattr(owner, "queue", None) is not None
    within = "flush queue" if lazy else None
    probes = [Probe("page table", domain.table, "release_detached", within) for domain in domains]
    if lazy:
        transport = domains[0].iommu.transport
        probes.append(Probe("flush queue", owner.queue, "flush"))
        probes.append(Probe("hypercall", transport, "flush_device_domain", within))
    else:
        probes += [Probe("hypercall", domain, "_flush_pages") for domain in domains]
    device = machine.hypervisor.domains.device(machine.devices[name].requester.device_id)
    if device is not None and device.domain is not None and domains:
        silicon = device.domain.silicon
        probes.append(
            Probe("flush handshake", silicon, "invalidate" if lazy else "invalidate_pages", "hypercall")
        )
    return probes
