"""The hypercall door: control word, input and output pages, dispatch, and the statuses of each mistake.

Models slow (memory) hypercalls of one partition, simple and rep, as TLFS 3 describes them. Input is copied
out of the guest page once, before it is looked at: a guest that changes it meanwhile changes nothing. Not
modelled: fast (register) hypercalls, variable headers, nesting, continuation (a rep call is done in one
go); all of them are refused as INVALID_HYPERCALL_INPUT. Calls come from one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pvfio.abi import ffi, lib
from pvfio.host.config import IommuConfig
from pvfio.host.domains import DeviceDomains
from pvfio.memory import GuestMemory

__all__ = ["PARTITION_ID", "Hypercalls"]

PARTITION_ID: Final = 2
"""The guest's own partition id (the host's is 1)."""

_PAGE: Final = 4096
_SUCCESS: Final[int] = lib.HV_STATUS_SUCCESS
_INVALID_CODE: Final[int] = lib.HV_STATUS_INVALID_HYPERCALL_CODE
_INVALID_INPUT: Final[int] = lib.HV_STATUS_INVALID_HYPERCALL_INPUT
_INVALID_ALIGNMENT: Final[int] = lib.HV_STATUS_INVALID_ALIGNMENT
_INVALID_PARAMETER: Final[int] = lib.HV_STATUS_INVALID_PARAMETER
_INVALID_PARTITION: Final[int] = lib.HV_STATUS_INVALID_PARTITION_ID
_REP_COUNT_SHIFT: Final[int] = lib.HV_HYPERCALL_REP_COUNT_SHIFT
_REP_START_SHIFT: Final[int] = lib.HV_HYPERCALL_REP_START_SHIFT
_REP_FIELD: Final[int] = lib.HV_HYPERCALL_REP_FIELD_MASK
_REP_COMP_SHIFT: Final[int] = lib.HV_HYPERCALL_REP_COMP_SHIFT
_REP_FIELDS: Final[int] = lib.HV_HYPERCALL_REP_COUNT_MASK | lib.HV_HYPERCALL_REP_START_MASK
_CODE_MASK: Final[int] = lib.HV_HYPERCALL_CODE_MASK
_IOMMU_FORMAT: Final[int] = lib.HV_FLUSH_LIST_IOMMU_FORMAT
_SHIFT_MASK: Final[int] = lib.HV_FLUSH_ENTRY_SHIFT_MASK
_SHIFT_MAX: Final[int] = lib.HV_FLUSH_ENTRY_SHIFT_MAX
_PAGE_SHIFT: Final[int] = lib.HV_FLUSH_ENTRY_PAGE_SHIFT
_LIST_HEADER: Final[int] = ffi.sizeof("struct hv_input_flush_device_domain_list")


class _Call:
    """A call of fixed size: how much it reads and writes, and who does it."""

    __slots__ = ("handler", "input_size", "output", "output_size")

    def __init__(
        self, input_type: str, handler: Callable[[], int], output: Any = None, *, entries: int = 0
    ) -> None:
        self.input_size: int = ffi.sizeof(f"struct hv_input_{input_type}") + 8 * entries
        self.handler = handler
        self.output = output
        self.output_size: int = ffi.sizeof(output[0]) if output is not None else 0


class _Injection:
    __slots__ = ("completed", "status", "times")

    def __init__(self, status: int, times: int, completed: int) -> None:
        self.status = status
        self.times = times
        self.completed = completed


class Hypercalls:
    """Answers the nine calls of the para-virtualized IOMMU.

    ``hypercall`` never raises on what a guest gives it.
    """

    def __init__(self, memory: GuestMemory, config: IommuConfig, domains: DeviceDomains, *, vps: int) -> None:
        self._memory = memory
        self._domains = domains
        self._find = domains.find
        self._config = config
        self._vps = vps
        self._partitions = frozenset((int(lib.HV_PARTITION_ID_SELF), PARTITION_ID))
        self._pages: dict[int, Any] = {}
        self._injections: dict[int, list[_Injection]] = {}
        self._memmove = ffi.memmove
        self._lay_out_scratch()
        self._fixed = self._calls() if config.present else {}
        self._rep_code = int(lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST) if config.present else -1

    def _lay_out_scratch(self) -> None:
        """One page the input is copied to, seen as each structure."""
        self._scratch = ffi.new("uint64_t[512]")

        def as_input(name: str) -> Any:
            return ffi.cast(f"struct hv_input_{name} *", self._scratch)

        self._head = as_input("device_domain")
        self._in_create = as_input("create_device_domain")
        self._in_configure = as_input("configure_device_domain")
        self._in_attach = as_input("attach_device_domain")
        self._in_detach = as_input("detach_device_domain")
        self._in_flush = as_input("flush_device_domain")
        self._in_list = as_input("flush_device_domain_list")
        self._in_capabilities = as_input("get_iommu_capabilities")
        self._in_property = as_input("get_logical_device_property")
        self._entries = ffi.cast("uint64_t *", self._scratch) + _LIST_HEADER // 8
        # owner_vtl and its padding, one word: all of it must be zero.
        self._vtl_index: int = ffi.offsetof("struct hv_input_device_domain", "owner_vtl") // 8
        self._out_capabilities = ffi.new("struct hv_output_get_iommu_capabilities *")
        self._out_property = ffi.new("struct hv_output_get_logical_device_property *")

    def _calls(self) -> dict[int, _Call]:
        """By whole control word: a simple call's is its code and nothing else. Also the list of one entry."""
        return {
            lib.HVCALL_CREATE_DEVICE_DOMAIN: _Call("create_device_domain", self._create),
            lib.HVCALL_ATTACH_DEVICE_DOMAIN: _Call("attach_device_domain", self._attach),
            lib.HVCALL_DETACH_DEVICE_DOMAIN: _Call("detach_device_domain", self._detach),
            lib.HVCALL_DELETE_DEVICE_DOMAIN: _Call("delete_device_domain", self._delete),
            lib.HVCALL_CONFIGURE_DEVICE_DOMAIN: _Call("configure_device_domain", self._configure),
            lib.HVCALL_FLUSH_DEVICE_DOMAIN: _Call("flush_device_domain", self._flush),
            lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST | 1 << _REP_COUNT_SHIFT: _Call(
                "flush_device_domain_list", self._flush_one, entries=1
            ),
            lib.HVCALL_GET_IOMMU_CAPABILITIES: _Call(
                "get_iommu_capabilities", self._capabilities, self._out_capabilities
            ),
            lib.HVCALL_GET_LOGICAL_DEVICE_PROPERTY: _Call(
                "get_logical_device_property", self._property, self._out_property
            ),
        }

    def hypercall(self, vp: int, control: int, input_gpa: int, output_gpa: int) -> int:
        """One hypercall by virtual processor ``vp``; all four are 64-bit words. Returns the result word.

        TLFS 3.8: status in bits 15:0, reps completed in 43:32. ``output_gpa`` is ignored where a call has
        no output.
        """
        if self._injections and (control & _CODE_MASK) in self._injections:
            return self._injected(control, input_gpa)
        call = self._fixed.get(control)
        if call is None:
            return self._other(vp, control, input_gpa)
        if not 0 <= vp < self._vps:
            return int(lib.HV_STATUS_INVALID_VP_INDEX)
        offset = input_gpa & 0xFFF
        page = self._pages.get(input_gpa - offset) or self._page(input_gpa - offset)
        if offset & 7 or offset + call.input_size > _PAGE or page is None:
            return _INVALID_ALIGNMENT
        if not call.output_size:
            self._memmove(self._scratch, page + offset, call.input_size)
            return call.handler()
        return self._with_output(call, page + offset, output_gpa)

    def _with_output(self, call: _Call, source: Any, output_gpa: int) -> int:
        offset = output_gpa & 0xFFF
        page = self._pages.get(output_gpa - offset) or self._page(output_gpa - offset)
        if offset & 7 or offset + call.output_size > _PAGE or page is None:
            return _INVALID_ALIGNMENT
        self._memmove(self._scratch, source, call.input_size)
        status = call.handler()
        if status == _SUCCESS:
            self._memmove(page + offset, call.output, call.output_size)
        return status

    def _page(self, gpa: int) -> Any:
        """Where a guest page is, None outside RAM. Remembered: a guest uses one page per VP."""
        for start, size in self._memory.ram_ranges():
            if start <= gpa < start + size:
                if len(self._pages) >= 64:
                    self._pages.clear()
                page = self._memory.guest_ptr(gpa, _PAGE)
                self._pages[gpa] = page
                return page
        return None

    def _other(self, vp: int, control: int, input_gpa: int) -> int:
        """The rep call in general, and every control word that is wrong."""
        if not 0 <= vp < self._vps:
            return int(lib.HV_STATUS_INVALID_VP_INDEX)
        code = control & _CODE_MASK
        if code == self._rep_code:
            return self._flush_list(control, input_gpa, _REP_FIELD)
        return _INVALID_INPUT if code in self._fixed else _INVALID_CODE

    def inject(self, call_code: int, status: int, times: int = 1, *, completed: int = 0) -> None:
        """Lets the next ``times`` calls with that code answer ``status`` whatever they ask, and do nothing.

        A rep call does its first ``completed`` entries before. ``status`` may be HV_HYPERCALL_UNAVAILABLE,
        the result word of all ones. Injections for one code queue up. Raises ``ValueError`` for what no
        host can answer.
        """
        whole_word: int = lib.HV_HYPERCALL_UNAVAILABLE
        if not (0 <= status <= lib.HV_HYPERCALL_RESULT_MASK or status == whole_word):
            raise ValueError(f"a status has 16 bits: {status:#x}")
        if times < 1 or not 0 <= completed <= _REP_FIELD:
            raise ValueError(f"times {times}, completed {completed}")
        if completed and call_code != lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST:
            raise ValueError(f"call {call_code:#x} completes no reps")
        self._injections.setdefault(call_code, []).append(_Injection(status, times, completed))

    def _injected(self, control: int, input_gpa: int) -> int:
        code = control & _CODE_MASK
        queue = self._injections[code]
        injection = queue[0]
        injection.times -= 1
        if not injection.times:
            queue.pop(0)
            if not queue:
                del self._injections[code]
        if code != self._rep_code or injection.status > lib.HV_HYPERCALL_RESULT_MASK:
            return injection.status
        result = self._flush_list(control, input_gpa, injection.completed)
        return result | injection.status if result & _CODE_MASK == _SUCCESS else result

    # The calls. Each looks only at the scratch page.

    def _bad_head(self) -> int:
        """What is wrong with partition and VTL, 0 where nothing is."""
        if self._head.partition_id not in self._partitions:
            return _INVALID_PARTITION
        return _INVALID_PARAMETER if self._scratch[self._vtl_index] else _SUCCESS

    def _create(self) -> int:
        return self._bad_head() or self._domains.create(self._head.domain_id, self._in_create.flags)

    def _configure(self) -> int:
        call = self._in_configure
        return self._bad_head() or self._domains.configure(
            self._head.domain_id, call.flags, call.page_table_root
        )

    def _attach(self) -> int:
        return self._bad_head() or self._domains.attach(self._head.domain_id, self._in_attach.device_id)

    def _detach(self) -> int:
        call = self._in_detach
        if call.partition_id not in self._partitions:
            return _INVALID_PARTITION
        return self._domains.detach(call.device_id)

    def _delete(self) -> int:
        return self._bad_head() or self._domains.delete(self._head.domain_id)

    def _flush(self) -> int:
        head = self._head
        if head.partition_id not in self._partitions:
            return _INVALID_PARTITION
        domain = self._find(head.domain_id)
        call = self._in_flush
        if domain is None or self._scratch[self._vtl_index] or call.flags or call.reserved:
            return _INVALID_PARAMETER
        domain.silicon.invalidate()
        return _SUCCESS

    def _flush_list(self, control: int, input_gpa: int, limit: int) -> int:
        """The rep call, at most ``limit`` entries of it; completed entries count from rep 0 (TLFS 3.8)."""
        count = control >> _REP_COUNT_SHIFT & _REP_FIELD
        start = control >> _REP_START_SHIFT & _REP_FIELD
        if control & ~(_CODE_MASK | _REP_FIELDS) or start >= count:
            return _INVALID_INPUT
        offset = input_gpa & 0xFFF
        size = _LIST_HEADER + 8 * count
        page = self._pages.get(input_gpa - offset) or self._page(input_gpa - offset)
        if offset & 7 or offset + size > _PAGE or page is None:
            return _INVALID_ALIGNMENT
        self._memmove(self._scratch, page + offset, size)
        return self._flush_entries(start, min(count, start + limit))

    def _flush_one(self) -> int:
        """A list of one entry, which is what every unmap sends."""
        return self._flush_entries(0, 1)

    def _flush_entries(self, start: int, end: int) -> int:
        head = self._head
        if head.partition_id not in self._partitions:
            return _INVALID_PARTITION | start << _REP_COMP_SHIFT
        domain = self._find(head.domain_id)
        call = self._in_list
        if domain is None or self._scratch[self._vtl_index] or call.reserved or call.flags != _IOMMU_FORMAT:
            return _INVALID_PARAMETER | start << _REP_COMP_SHIFT
        entries, invalidate_pages = self._entries, domain.silicon.invalidate_pages
        for index in range(start, end):
            entry = entries[index]
            shift = entry & _SHIFT_MASK
            if shift > _SHIFT_MAX:
                return _INVALID_PARAMETER | index << _REP_COMP_SHIFT
            invalidate_pages(entry >> _PAGE_SHIFT, shift)
        return end << _REP_COMP_SHIFT

    def _capabilities(self) -> int:
        call = self._in_capabilities
        if call.partition_id not in self._partitions:
            return _INVALID_PARTITION
        if call.reserved:
            return _INVALID_PARAMETER
        config, out = self._config, self._out_capabilities
        out.size = ffi.sizeof(out[0])
        out.max_iova_width = config.max_iova_width
        out.max_pasid_width = config.max_pasid_width
        out.iommu_cap = (
            lib.HV_IOMMU_CAP_PRESENT * config.advertised
            | lib.HV_IOMMU_CAP_S1 * config.stage1
            | lib.HV_IOMMU_CAP_S1_5LVL * config.five_level
            | lib.HV_IOMMU_CAP_PASID * config.pasid
            | lib.HV_IOMMU_CAP_ATS * config.ats
            | lib.HV_IOMMU_CAP_PRI * config.pri
        )
        out.pgsize_bitmap = config.pgsize_bitmap
        return _SUCCESS

    def _property(self) -> int:
        call = self._in_property
        if call.partition_id not in self._partitions:
            return _INVALID_PARTITION
        if call.reserved:
            return _INVALID_PARAMETER
        if call.code != lib.HV_LOGICAL_DEVICE_PROPERTY_PVIOMMU:
            return int(lib.HV_STATUS_UNKNOWN_PROPERTY)
        device = self._domains.device(call.logical_device_id)
        if device is None:
            return int(lib.HV_STATUS_INVALID_DEVICE_ID)
        self._out_property.device_iommu = lib.HV_DEVICE_IOMMU_ENABLED * device.enabled
        return _SUCCESS
