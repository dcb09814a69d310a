"""The IOMMU hardware from Python: what the hypervisor programs and reads.

Models device contexts, domains, invalidation, the fault log and interrupt delivery (``iommu.h``). Does not model
a register interface: the host's own driver for it would add nothing that anybody here could see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pvfio.abi import ffi, lib
from pvfio.memory import GuestMemory
from pvfio.silicon.bus import READ, WRITE, BusMaster

BLOCKED: int = lib.PV_DOMAIN_BLOCKED
IDENTITY: int = lib.PV_DOMAIN_IDENTITY
PAGING: int = lib.PV_DOMAIN_PAGING
MSI_START: int = lib.PV_MSI_START
MSI_END: int = lib.PV_MSI_END

REASONS: dict[int, str] = {
    lib.PV_FAULT_BLOCKED: "blocked",
    lib.PV_FAULT_NOT_PRESENT: "not present",
    lib.PV_FAULT_PERMISSION: "permission",
    lib.PV_FAULT_RESERVED: "reserved bits",
    lib.PV_FAULT_ADDRESS_WIDTH: "address too wide",
    lib.PV_FAULT_TABLE: "table page is not memory",
    lib.PV_FAULT_OUTPUT: "output is not memory",
    lib.PV_FAULT_INTERRUPT_RANGE: "interrupt range",
    lib.PV_FAULT_INTERRUPT: "interrupt not accepted",
}


@dataclass(frozen=True)
class Fault:
    """One aborted transaction.

    ``stage`` 0 is the device context or an interrupt; ``level`` 0 means no entry was read.
    """

    device_id: int
    iova: int
    gpa: int
    domain: int
    stage: int
    level: int
    perm: int
    reason: int

    @property
    def reason_name(self) -> str:
        """The reason in words."""
        return REASONS.get(self.reason, str(self.reason))

    @property
    def access(self) -> str:
        """What the device wanted: ``"read"`` or ``"write"``."""
        return "write" if self.perm & WRITE else "read"


@dataclass(frozen=True)
class WalkStep:
    """One entry that a translation read. ``depth`` 1: stage 2, to reach a stage-1 table page.

    ``table`` and ``output`` are GPAs in stage 1 and HPAs in stage 2; ``output`` is 0 where the entry is not present.
    """

    stage: int
    level: int
    leaf: bool
    depth: int
    table: int
    index: int
    entry: int
    output: int


@dataclass(frozen=True)
class Walk:
    """A translation looked at: ``hpa``, or ``None`` and the fault it would give; and every entry on the way."""

    hpa: int | None
    fault: Fault | None
    steps: list[WalkStep]


@dataclass(frozen=True)
class TlbStats:
    """Counts of one requester's IOTLB."""

    hits: int
    misses: int
    invalidations: int
    entries: int


@dataclass(frozen=True)
class AtcStats:
    """Counts of one device's own translation cache (ATC, device TLB); zero while ATS was never on.

    ``hits`` are accesses it answered, ``requests`` the Translation Requests it sent, ``untranslated`` those of
    them that led to no entry, ``invalidations`` the Invalidate Requests that arrived, ``lost`` those that did
    not, ``entries`` what it holds now.
    """

    hits: int
    requests: int
    untranslated: int
    invalidations: int
    lost: int
    entries: int


def _fault(raw: Any) -> Fault:
    return Fault(raw.device_id, raw.iova, raw.gpa, raw.domain, raw.stage, raw.level, raw.perm, raw.reason)


class Domain:
    """A domain of device contexts: blocked, identity, or a stage-1 table. Born blocked."""

    def __init__(self, iommu: Iommu, id: int) -> None:
        ptr = lib.pv_domain_create(iommu.ptr, id)
        if ptr == ffi.NULL:
            raise MemoryError("no room for a domain")
        self.ptr = ffi.gc(ptr, lib.pv_domain_release)
        self.id = id
        self._iommu = iommu

    def configure(self, type: int, root: int = 0, levels: int = 0) -> None:
        """Sets what the domain does.

        ``OSError`` EBUSY while a requester is attached, EINVAL for values that cannot be.
        """
        _check(lib.pv_domain_configure(self.ptr, type, root, levels), "configure domain")

    def invalidate(self) -> None:
        """Forgets every translation, in the devices with ATS as well.

        Returns when no DMA uses one from before.
        """
        lib.pv_iommu_invalidate_domain(self.ptr)

    def invalidate_pages(self, page: int, shift: int) -> None:
        """Forgets 2**shift pages around page number ``page``, aligned to their size; else as ``invalidate``."""
        lib.pv_iommu_invalidate_pages(self.ptr, page, shift)

    def destroy(self) -> None:
        """Ends the domain. ``OSError`` EBUSY while a requester is attached."""
        _check(lib.pv_domain_destroy(self.ptr), "destroy domain")
        ffi.gc(self.ptr, None)
        self.ptr = ffi.NULL


def _check(error: int, operation: str) -> None:
    if error:
        import os

        raise OSError(-error, f"{operation}: {os.strerror(-error)}")


class Requester(BusMaster):
    """The bus master of one device behind the IOMMU. Born in no domain: blocked."""

    def __init__(self, iommu: Iommu, device_id: int) -> None:
        super().__init__(lib.pv_requester_create(iommu.ptr, device_id))
        self.device_id = device_id
        self._iommu = iommu

    def attach(self, domain: Domain | None) -> None:
        """Replaces the domain at once; ``None`` blocks. When it returns no DMA lands through the one before."""
        _check(lib.pv_requester_attach(self.ptr, domain.ptr if domain else ffi.NULL), "attach")

    def set_msi(self, data: int, eventfd: int) -> None:
        """Messages with ``data`` ring ``eventfd`` (duplicated here), or nothing with -1. ``OSError`` EINVAL."""
        _check(lib.pv_requester_set_msi(self.ptr, data, eventfd), "set MSI")

    def walk(self, iova: int, perm: int = READ) -> Walk:
        """Translates without touching the IOTLB or the fault log."""
        hpa, count = ffi.new("uint64_t *"), ffi.new("uint32_t *")
        fault, steps = ffi.new("struct pv_fault *"), ffi.new("struct pv_walk_step[64]")
        error = lib.pv_requester_walk(self.ptr, iova, perm, hpa, fault, steps, 64, count)
        taken = [
            WalkStep(s.stage, s.level, bool(s.leaf), s.depth, s.table, s.index, s.entry, s.output)
            for s in steps[0 : count[0]]
        ]
        return Walk(None if error else hpa[0], _fault(fault) if error else None, taken)

    def allow_ats(self, allowed: bool) -> None:
        """Whether the device context lets the device's Translation Requests through. Not at first."""
        lib.pv_requester_allow_ats(self.ptr, allowed)

    def lose_invalidations(self, count: int) -> None:
        """Fault injection: the next ``count`` Invalidate Requests to the device's own cache never arrive there.

        The IOMMU takes them for completed, so whoever flushes cannot know. 0 ends it.
        """
        lib.pv_requester_lose_invalidations(self.ptr, count)

    def atc_stats(self) -> AtcStats:
        """The counts of the device's own translation cache."""
        raw = ffi.new("struct pv_atc_stats *")
        lib.pv_requester_atc_stats(self.ptr, raw)
        return AtcStats(raw.hits, raw.requests, raw.untranslated, raw.invalidations, raw.lost, raw.entries)

    def tlb_stats(self) -> TlbStats:
        """The IOTLB's counts."""
        raw = ffi.new("struct pv_tlb_stats *")
        lib.pv_requester_tlb_stats(self.ptr, raw)
        return TlbStats(raw.hits, raw.misses, raw.invalidations, raw.entries)


class Iommu:
    """One IOMMU with its stage 2 (a vtdss or amdv1 table in host memory, ``stage2_levels`` deep)."""

    def __init__(self, memory: GuestMemory, stage2_format: int, stage2_root: int, stage2_levels: int) -> None:
        ptr = lib.pv_iommu_create(memory.ptr, stage2_format, stage2_root, stage2_levels)
        if ptr == ffi.NULL:
            raise MemoryError("no room for an IOMMU")
        self.ptr = ffi.gc(ptr, lib.pv_iommu_destroy)
        self._memory = memory
        self.fault_fd: int = lib.pv_iommu_fault_fd(self.ptr)
        self.lost_faults = 0
        self._raw_faults = ffi.new("struct pv_fault[64]")

    def domain(self, id: int) -> Domain:
        """A new domain, named ``id`` in faults."""
        return Domain(self, id)

    def requester(self, device_id: int) -> Requester:
        """The bus master for a device."""
        return Requester(self, device_id)

    def invalidate_stage2(self) -> None:
        """Forgets all translations of all domains; returns when no DMA uses one from before. For changes of stage 2."""
        lib.pv_iommu_invalidate_stage2(self.ptr)

    def faults(self) -> list[Fault]:
        """Takes what was logged since the last call, oldest first; ``lost_faults`` counts what found no room.

        At most what the log has room for: a device may fault faster than anybody reads.
        """
        taken: list[Fault] = []
        lost = ffi.new("uint64_t *")
        for _ in range(lib.PV_FAULT_ROOM // len(self._raw_faults)):
            count = lib.pv_iommu_faults(self.ptr, self._raw_faults, len(self._raw_faults), lost)
            taken += [_fault(self._raw_faults[i]) for i in range(count)]
            self.lost_faults = lost[0]
            if count < len(self._raw_faults):
                break
        return taken
