"""Hypercalls, as the guest makes them: one page per VP, shared by input and output, and nine typed calls.

The input structure is at the start of the VP's page and the output right after it, 8-byte aligned. The
driver zeroes the whole input it sends and never the output. Between filling the page and reading the result
nothing else may use it: in a kernel interrupts are off; here every call is synchronous, never awaits, and a
nested use is detected. Which VP a task runs on is a context variable: a task started by another inherits
its VP.

Not modelled: fast hypercalls (input in registers), variable-size headers, extended hypercalls, and the
hypercall page itself (the entry point is a callable).
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pvfio.abi import ffi, lib
from pvfio.abi.hyperv import status_errno, status_name
from pvfio.errors import HypercallError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pvfio.memory import GuestMemory

__all__ = [
    "HypercallEntry",
    "HypercallTransport",
    "IommuCapabilities",
    "current_vp",
    "on_vp",
]

_PAGE_SIZE = 4096
_SELF: int = lib.HV_PARTITION_ID_SELF
_UNAVAILABLE: int = lib.HV_HYPERCALL_UNAVAILABLE
_STATUS_MASK: int = lib.HV_HYPERCALL_RESULT_MASK
_REP_COUNT_SHIFT: int = lib.HV_HYPERCALL_REP_COUNT_SHIFT
_REP_START_SHIFT: int = lib.HV_HYPERCALL_REP_START_SHIFT
_REP_COMP_SHIFT: int = lib.HV_HYPERCALL_REP_COMP_SHIFT
_REP_MASK: int = lib.HV_HYPERCALL_REP_FIELD_MASK
_ONE_REP = 1 << _REP_COUNT_SHIFT
_ONE_REP_DONE = 1 << _REP_COMP_SHIFT
_DOMAIN_SHIFT: int = lib.HV_DEVICE_DOMAIN_ID_SHIFT
_STAGE_1: int = lib.HV_DEVICE_DOMAIN_TYPE_S1
_IOMMU_FORMAT: int = lib.HV_FLUSH_LIST_IOMMU_FORMAT
_MAX_ENTRIES: int = lib.HV_FLUSH_LIST_MAX_ENTRIES
# How often a rep call may answer "success" without having done anything before it counts as failed.
_MAX_IDLE_REPS = 3

_vp: ContextVar[int] = ContextVar("pvfio_vp", default=0)


def current_vp() -> int:
    """The VP the running task is on; 0 where nobody chose."""
    return _vp.get()


@contextmanager
def on_vp(vp: int) -> Iterator[None]:
    """Runs the body, and the tasks it starts, on that VP. Raises ``ValueError`` for a negative one."""
    if vp < 0:
        raise ValueError(f"VP {vp}")
    token = _vp.set(vp)
    try:
        yield
    finally:
        _vp.reset(token)


class HypercallEntry(Protocol):
    """The one door to the host: ``(vp, control, input_gpa, output_gpa)`` to the 64-bit result."""

    def __call__(self, vp: int, control: int, input_gpa: int, output_gpa: int, /) -> int: ...


class IommuCapabilities(NamedTuple):
    """What GET_IOMMU_CAPABILITIES answered; widths in bits, the last two are bit masks."""

    size: int
    max_iova_width: int
    max_pasid_width: int
    iommu_cap: int
    pgsize_bitmap: int


class _Call:
    """One kind of call, laid over one VP's page once and for all."""

    __slots__ = ("control", "domain", "input", "name", "output", "output_gpa", "view", "zeros")

    def __init__(self, name: str, page: Any, gpa: int, view: memoryview, *, variable: int = 0) -> None:
        lower = name.lower()
        input_type = f"struct hv_input_{lower}"
        size = ffi.sizeof(input_type) + variable
        self.name = name
        self.control = int(getattr(lib, f"HVCALL_{name}"))
        self.input = ffi.cast(f"{input_type} *", page)
        self.domain: Any = getattr(self.input, "device_domain", None)
        self.view = view[:size]
        self.zeros = bytes(size)
        self.output: Any = None
        self.output_gpa = 0
        if name.startswith("GET_"):
            offset = (size + 7) & ~7
            self.output = ffi.cast(f"struct hv_output_{lower} *", page + offset)
            self.output_gpa = gpa + offset


class _VpPage:
    """A VP's page: where its calls lie, and whether it is in use."""

    __slots__ = (
        "attach",
        "busy",
        "capabilities",
        "configure",
        "create",
        "delete",
        "detach",
        "entries",
        "flush",
        "flush_list",
        "flush_one",
        "gpa",
        "property",
        "vp",
    )

    def __init__(self, memory: GuestMemory, vp: int) -> None:
        self.vp = vp
        self.busy: str | None = None
        self.gpa = memory.guest_page()
        view = memory.view_guest(self.gpa, _PAGE_SIZE)
        page = memory.guest_ptr(self.gpa, _PAGE_SIZE)

        # Views and casts are made once: making one costs more than the rest of a call's Python.
        def call(name: str, variable: int = 0) -> _Call:
            return _Call(name, page, self.gpa, view, variable=variable)

        self.create = call("CREATE_DEVICE_DOMAIN")
        self.delete = call("DELETE_DEVICE_DOMAIN")
        self.configure = call("CONFIGURE_DEVICE_DOMAIN")
        self.attach = call("ATTACH_DEVICE_DOMAIN")
        self.detach = call("DETACH_DEVICE_DOMAIN")
        self.flush = call("FLUSH_DEVICE_DOMAIN")
        self.flush_one = call("FLUSH_DEVICE_DOMAIN_LIST", 8)
        self.flush_list = call("FLUSH_DEVICE_DOMAIN_LIST", 8 * _MAX_ENTRIES)
        self.entries = self.flush_list.input.list
        self.capabilities = call("GET_IOMMU_CAPABILITIES")
        self.property = call("GET_LOGICAL_DEVICE_PROPERTY")

    def __enter__(self) -> _VpPage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.busy = None


class HypercallTransport:
    """The guest's hypercalls, over a page per VP taken from guest RAM.

    Every method is synchronous and runs on the caller's VP. All raise ``HypercallError`` with the status
    and its errno (EOPNOTSUPP where the answer is all ones: there is no hypercall page), and
    ``RuntimeError`` where the VP's page is already in use or the task's VP does not exist. ``calls`` counts
    how often the hypervisor was called.
    """

    def __init__(self, memory: GuestMemory, entry: HypercallEntry, vps: int) -> None:
        if vps < 1:
            raise ValueError(f"{vps} VPs")
        self._memory = memory
        self._entry = entry
        self.calls = 0
        self._pages = [_VpPage(memory, vp) for vp in range(vps)]

    @property
    def vps(self) -> int:
        """How many VPs there are."""
        return len(self._pages)

    def page_of(self, vp: int) -> int:
        """GPA of a VP's page."""
        return self._pages[vp].gpa

    def close(self) -> None:
        """Hands the pages back to guest memory; no call may follow."""
        for page in self._pages:
            self._memory.free_guest_page(page.gpa)
        self._pages.clear()

    def create_device_domain(self, domain_id: int) -> None:
        """Makes an unconfigured stage-1 device domain."""
        with self._hold("CREATE_DEVICE_DOMAIN") as page:
            call = page.create
            _begin_domain(call, domain_id)
            self._simple(page, call)

    def delete_device_domain(self, domain_id: int) -> None:
        """Deletes a device domain that no device is attached to."""
        with self._hold("DELETE_DEVICE_DOMAIN") as page:
            call = page.delete
            _begin_domain(call, domain_id)
            self._simple(page, call)

    def configure_device_domain(
        self,
        domain_id: int,
        *,
        translation_enabled: bool,
        blocked: bool = False,
        five_level: bool = False,
        root: int = 0,
    ) -> None:
        """Says what a domain does: identity (neither flag), blocking (both), paging (``root`` is a GPA)."""
        with self._hold("CONFIGURE_DEVICE_DOMAIN") as page:
            call = page.configure
            _begin_domain(call, domain_id)
            flags = lib.HV_DOMAIN_TRANSLATION_ENABLED if translation_enabled else 0
            flags |= lib.HV_DOMAIN_BLOCKED if blocked else 0
            flags |= lib.HV_DOMAIN_FIRST_STAGE_5_LEVEL if five_level else 0
            call.input.flags = flags
            call.input.page_table_root = root
            self._simple(page, call)

    def attach_device_domain(self, domain_id: int, device_id: int) -> None:
        """Moves a device (logical ID) into a domain, atomically replacing the one it was in."""
        with self._hold("ATTACH_DEVICE_DOMAIN") as page:
            call = page.attach
            _begin_domain(call, domain_id)
            call.input.device_id = device_id
            self._simple(page, call)

    def detach_device_domain(self, device_id: int) -> None:
        """Takes a device out of its domain.

        The pvIOMMU driver never does: between a detach and an attach DMA is neither blocked nor mapped.
        """
        with self._hold("DETACH_DEVICE_DOMAIN") as page:
            call = page.detach
            call.view[:] = call.zeros
            call.input.partition_id = _SELF
            call.input.device_id = device_id
            self._simple(page, call)

    def flush_device_domain(self, domain_id: int) -> None:
        """Drops every cached translation of a domain."""
        with self._hold("FLUSH_DEVICE_DOMAIN") as page:
            self._flush_all(page, domain_id)

    def flush_device_domain_list(self, domain_id: int, entries: Sequence[int]) -> None:
        """Drops the cached translations of 1 to 508 page ranges ``page_number << 12 | page_mask_shift``.

        Goes on where the host stopped; a host that keeps answering "success" without progress is an EIO.
        Raises ``ValueError`` for another number of entries.
        """
        with self._hold("FLUSH_DEVICE_DOMAIN_LIST") as page:
            count = len(entries)
            if not 1 <= count <= _MAX_ENTRIES:
                raise ValueError(f"{count} flush entries: a page holds 1 to {_MAX_ENTRIES}")
            self._flush_entries(page, domain_id, entries)

    def flush_pages(self, domain_id: int, entry: int) -> tuple[HypercallError | None, HypercallError | None]:
        """Flushes one list entry and, where the host refuses, the whole domain through the same page.

        Never raises a ``HypercallError``: returns the refusal of the list flush and that of the domain
        flush.
        """
        page = self._hold("FLUSH_DEVICE_DOMAIN_LIST")
        try:
            call = page.flush_one
            call.view[:] = call.zeros
            domain = call.domain
            domain.partition_id = _SELF
            domain.domain_id = domain_id << _DOMAIN_SHIFT | _STAGE_1
            call.input.flags = _IOMMU_FORMAT
            page.entries[0] = entry
            self.calls += 1
            result = self._entry(page.vp, call.control | _ONE_REP, page.gpa, 0)
            if result == _ONE_REP_DONE:
                return None, None
            return self._flush_refused(page, domain_id, result)
        finally:
            page.busy = None

    def get_iommu_capabilities(self) -> IommuCapabilities:
        """What the pvIOMMU can do."""
        with self._hold("GET_IOMMU_CAPABILITIES") as page:
            call = page.capabilities
            call.view[:] = call.zeros
            call.input.partition_id = _SELF
            self._simple(page, call)
            out = call.output
            return IommuCapabilities(
                int(out.size),
                int(out.max_iova_width),
                int(out.max_pasid_width),
                int(out.iommu_cap),
                int(out.pgsize_bitmap),
            )

    def get_logical_device_property(self, device_id: int, code: int) -> int:
        """The 64-bit value of a property of a logical device."""
        with self._hold("GET_LOGICAL_DEVICE_PROPERTY") as page:
            call = page.property
            call.view[:] = call.zeros
            call.input.partition_id = _SELF
            call.input.logical_device_id = device_id
            call.input.code = code
            self._simple(page, call)
            return int(call.output.device_iommu)

    def _hold(self, name: str) -> _VpPage:
        vp = _vp.get()
        try:
            page = self._pages[vp]
        except IndexError:
            raise RuntimeError(f"{name} on VP {vp}: there are {len(self._pages)}") from None
        if page.busy is not None:
            raise RuntimeError(f"{name}: the hypercall page of VP {vp} is in use by {page.busy}")
        page.busy = name
        return page

    def _simple(self, page: _VpPage, call: _Call) -> None:
        self.calls += 1
        result = self._entry(page.vp, call.control, page.gpa, call.output_gpa)
        if result & _STATUS_MASK:
            raise _error(call.name, result)

    def _flush_all(self, page: _VpPage, domain_id: int) -> None:
        _begin_domain(page.flush, domain_id)
        self._simple(page, page.flush)

    def _flush_entries(self, page: _VpPage, domain_id: int, entries: Sequence[int]) -> None:
        call = page.flush_list
        used = page.flush_one.view.nbytes + 8 * (len(entries) - 1)
        call.view[:used] = call.zeros[:used]
        call.domain.partition_id = _SELF
        call.domain.domain_id = domain_id << _DOMAIN_SHIFT | _STAGE_1
        call.input.flags = _IOMMU_FORMAT
        for index, entry in enumerate(entries):
            page.entries[index] = entry
        self._rep(page, call, len(entries))

    def _rep(self, page: _VpPage, call: _Call, reps: int, result: int | None = None) -> None:
        """Runs a rep call to its end; ``result``: the answer to the first try, if made already."""
        done = idle = 0
        while done < reps:
            if result is None:
                control = call.control | reps << _REP_COUNT_SHIFT | done << _REP_START_SHIFT
                self.calls += 1
                result = self._entry(page.vp, control, page.gpa, 0)
            if result & _STATUS_MASK:
                raise _error(call.name, result)
            completed = result >> _REP_COMP_SHIFT & _REP_MASK
            if completed <= done:
                idle += 1
                if idle == _MAX_IDLE_REPS:
                    raise _stuck(call.name, done)
            else:
                idle = 0
                done = completed
            result = None

    def _flush_refused(
        self, page: _VpPage, domain_id: int, result: int
    ) -> tuple[HypercallError | None, HypercallError | None]:
        try:
            self._rep(page, page.flush_one, 1, result)
        except HypercallError as refused:
            try:
                self._flush_all(page, domain_id)
            except HypercallError as again:
                return refused, again
            return refused, None
        return None, None


def _begin_domain(call: _Call, domain_id: int) -> None:
    call.view[:] = call.zeros
    domain = call.domain
    domain.partition_id = _SELF
    domain.domain_id = domain_id << _DOMAIN_SHIFT | _STAGE_1


def _error(operation: str, result: int) -> HypercallError:
    if result == _UNAVAILABLE:
        return HypercallError(status_errno(result), operation, result, "no hypercall page")
    status = result & _STATUS_MASK
    completed = result >> _REP_COMP_SHIFT & _REP_MASK
    return HypercallError(status_errno(status), operation, status, status_name(status), completed=completed)


def _stuck(operation: str, done: int) -> HypercallError:
    return HypercallError(errno.EIO, operation, 0, "HV_STATUS_SUCCESS without progress", completed=done)
