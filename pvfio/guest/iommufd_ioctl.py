"""The requests of <linux/iommufd.h>: structures of any size, flags, arrays in user memory.

Each structure begins with its size. Shorter than the first form of the request: EINVAL. Longer than what is known here:
the rest must be zero (E2BIG). What is missing counts as zero. Reserved words and unknown flags that are not zero:
EOPNOTSUPP. Not modelled: see abi/iommufd.h; those numbers are unknown here (ENOTTY).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pvfio.abi import ffi, lib
from pvfio.errors import VfioError
from pvfio.guest.hwpt import NestedHwpt, PagingHwpt
from pvfio.guest.ioas import FIXED, PROT, Ioas
from pvfio.guest.ioas_iova import TOP
from pvfio.guest.iommufd_hw_info import hw_info
from pvfio.guest.user_copy import copy_from_user, copy_to_user

if TYPE_CHECKING:
    from pvfio.guest.iommufd import IommufdFile

__all__ = ["copy_struct", "iommufd_ioctl"]

_MAX_ENTRY = 4096
_PAGE = 4096
_WORD = ffi.typeof("uint32_t *")


def _refused(number: int, operation: str, reason: str) -> VfioError:
    return VfioError(number, operation, reason)


def iommufd_ioctl(file: IommufdFile, request: int, arg: Any) -> int:
    """Carries out one request; see ``IommufdFile.ioctl``."""
    known = _REQUESTS.get(request)
    if known is None:
        raise _refused(errno.ENOTTY, f"ioctl {request:#x}", "not a request of iommufd")
    name, kind, size, least, handler = known
    if isinstance(arg, int) or arg == ffi.NULL:
        raise _refused(errno.EFAULT, name, "no structure")
    given: int = ffi.cast(_WORD, arg)[0]
    if given < least:
        raise _refused(errno.EINVAL, name, f"size {given} is below {least}")
    command = ffi.new(kind)
    if given > _MAX_ENTRY:
        raise _refused(errno.E2BIG, name, f"a structure of {given} bytes")
    ffi.memmove(command, arg, min(size, given))
    if given > size and any(_read_user(name, int(ffi.cast("uintptr_t", arg)) + size, given - size)):
        raise _refused(errno.E2BIG, name, "an unknown part of the structure is not zero")
    try:
        handler(file, command)
    except _Answered as answer:
        ffi.memmove(arg, command, min(given, size))
        raise answer.error from None
    ffi.memmove(arg, command, min(given, size))
    return 0


class _Answered(Exception):
    """A refusal that all the same updates the structure."""

    def __init__(self, error: VfioError) -> None:
        super().__init__(str(error))
        self.error = error


def copy_struct(name: str, into: Any, given: bytes) -> None:
    """A structure from user memory that is shorter or longer than the known one. Raises E2BIG."""
    size = ffi.sizeof(f"struct {name}")
    if any(given[size:]):
        raise _refused(errno.E2BIG, name, "an unknown part of the structure is not zero")
    ffi.memmove(into, given, min(size, len(given)))


def _read_user(operation: str, address: int, size: int) -> bytes:
    try:
        return copy_from_user(address, size)
    except (OSError, OverflowError, ValueError) as error:
        raise _refused(errno.EFAULT, operation, f"no memory at {address:#x}") from error


def _write_user(operation: str, address: int, data: bytes) -> None:
    try:
        copy_to_user(address, data)
    except (OSError, OverflowError, ValueError) as error:
        raise _refused(errno.EFAULT, operation, f"no memory at {address:#x}") from error


def _zero(operation: str, *values: int) -> None:
    if any(values):
        raise _refused(errno.EOPNOTSUPP, operation, "unknown flags, or a reserved word is not zero")


def _destroy(file: IommufdFile, command: Any) -> None:
    file.destroy(command.id)


def _ioas_alloc(file: IommufdFile, command: Any) -> None:
    _zero("ioas_alloc", command.flags)
    command.out_ioas_id = file.alloc_ioas()


def _iova_ranges(file: IommufdFile, command: Any) -> None:
    _zero("iova_ranges", getattr(command, "__reserved"))
    ioas = file.get(command.ioas_id, Ioas)
    ranges = ioas.iovas.ranges
    room = command.num_iovas
    answer = ffi.new("struct iommu_iova_range[]", [tuple(found) for found in ranges[:room]])
    _write_user("iova_ranges", command.allowed_iovas, bytes(ffi.buffer(answer)))
    command.num_iovas = len(ranges)
    command.out_iova_alignment = ioas.alignment
    if len(ranges) > room:
        raise _Answered(_refused(errno.EMSGSIZE, "iova_ranges", f"{len(ranges)} ranges, room for {room}"))


def _allow_iovas(file: IommufdFile, command: Any) -> None:
    _zero("allow_iovas", getattr(command, "__reserved"))
    ioas = file.get(command.ioas_id, Ioas)
    size = ffi.sizeof("struct iommu_iova_range")
    ranges = []
    for i in range(command.num_iovas):
        entry = ffi.new("struct iommu_iova_range *")
        ffi.memmove(entry, _read_user("allow_iovas", command.allowed_iovas + i * size, size), size)
        ranges.append((entry.start, entry.last))
        if entry.start >= entry.last:
            break
    ioas.iovas.allow(ranges)


def _check_map(operation: str, command: Any, *addresses: int) -> None:
    """Flags, addresses and permissions, in Linux's order."""
    _zero(operation, command.flags & ~(FIXED | PROT), getattr(command, "__reserved", 0))
    if TOP in (*addresses, command.length):
        raise _refused(errno.EOVERFLOW, operation, "an address or the length is 2^64 - 1")
    if not command.flags & PROT:
        raise _refused(errno.EINVAL, operation, "neither readable nor writeable")


def _ioas_map(file: IommufdFile, command: Any) -> None:
    _check_map("ioas_map", command, command.iova)
    ioas = file.get(command.ioas_id, Ioas)
    command.iova = ioas.map(command.iova, command.user_va, command.length, command.flags, file.account)


def _ioas_copy(file: IommufdFile, command: Any) -> None:
    _check_map("ioas_copy", command, command.src_iova, command.dst_iova)
    source = file.get(command.src_ioas_id, Ioas)
    slices = source.slices(command.src_iova, command.length)
    try:
        target = file.get(command.dst_ioas_id, Ioas)
    except BaseException:
        for pages, _, _ in slices:
            file.store.put(pages)
        raise
    command.dst_iova = target.copy(slices, command.dst_iova, command.length, command.flags)


def _ioas_unmap(file: IommufdFile, command: Any) -> None:
    command.length = file.get(command.ioas_id, Ioas).unmap(command.iova, command.length)


def _option(file: IommufdFile, command: Any) -> None:
    _zero("option", getattr(command, "__reserved"))
    if command.option_id == lib.IOMMU_OPTION_RLIMIT_MODE:
        _zero("option", command.object_id)
        _option_rlimit(file, command)
    elif command.option_id == lib.IOMMU_OPTION_HUGE_PAGES:
        _option_huge_pages(file.get(command.object_id, Ioas), command)
    else:
        _zero("option", 1)


def _option_rlimit(file: IommufdFile, command: Any) -> None:
    if command.op == lib.IOMMU_OPTION_OP_GET:
        command.val64 = file.rlimit_mode
        return
    _zero("option", command.op != lib.IOMMU_OPTION_OP_SET)
    if file.objects:
        raise _refused(errno.EBUSY, "option", "objects exist")
    if command.val64 > 1:
        raise _refused(errno.EINVAL, "option", f"RLIMIT_MODE {command.val64}")
    file.rlimit_mode = command.val64


def _option_huge_pages(ioas: Ioas, command: Any) -> None:
    if command.op == lib.IOMMU_OPTION_OP_GET:
        command.val64 = ioas.large_pages
        return
    _zero("option", command.op != lib.IOMMU_OPTION_OP_SET)
    if command.val64 > 1:
        raise _refused(errno.EINVAL, "option", f"HUGE_PAGES {command.val64}")
    ioas.set_large_pages(bool(command.val64))


def _hwpt_alloc(file: IommufdFile, command: Any) -> None:
    from pvfio.guest.iommufd import BoundDevice

    operation = "hwpt_alloc"
    _zero(operation, getattr(command, "__reserved"), command.__reserved2)
    if bool(command.data_type) != bool(command.data_len):
        raise _refused(errno.EINVAL, operation, "data type and length do not go together")
    device = file.get(command.dev_id, BoundDevice)
    try:
        over = file.get(command.pt_id, object)
    except VfioError as error:
        raise _refused(errno.EINVAL, operation, f"object {command.pt_id}") from error
    if isinstance(over, Ioas):
        # No dirty tracking: the leaves of an x86-64 stage 1 are written dirty. No data: the format has no variants.
        _zero(operation, command.flags & ~lib.IOMMU_HWPT_ALLOC_NEST_PARENT, command.data_len)
        nest_parent = bool(command.flags & lib.IOMMU_HWPT_ALLOC_NEST_PARENT)
        command.out_hwpt_id = file.alloc_hwpt(device, over, nest_parent=nest_parent)
    elif isinstance(over, PagingHwpt):
        command.out_hwpt_id = _alloc_nested(file, over, command)
    else:
        raise _refused(errno.EINVAL, operation, "neither an address space nor a parent page table")


def _alloc_nested(file: IommufdFile, parent: PagingHwpt, command: Any) -> int:
    operation = "hwpt_alloc"
    # Page requests (IOMMU_HWPT_FAULT_ID_VALID) do not exist on the pvIOMMU.
    _zero(operation, command.flags, not command.data_len)
    if parent.auto or not parent.nest_parent:
        raise _refused(errno.EINVAL, operation, "the page table is no nesting parent")
    _zero(operation, command.data_type != lib.IOMMU_HWPT_DATA_VTD_S1)
    if not ffi.sizeof("struct iommu_hwpt_vtd_s1") <= command.data_len <= _MAX_ENTRY:
        raise _refused(errno.EINVAL, operation, f"{command.data_len} bytes of data")
    stage1 = ffi.new("struct iommu_hwpt_vtd_s1 *")
    copy_struct("iommu_hwpt_vtd_s1", stage1, _read_user(operation, command.data_uptr, command.data_len))
    _zero(operation, stage1.flags, getattr(stage1, "__reserved"))
    return file.alloc_nested(parent, stage1.pgtbl_addr, stage1.addr_width)


def _get_hw_info(file: IommufdFile, command: Any) -> None:
    from pvfio.guest.iommufd import BoundDevice

    _zero("get_hw_info", command.flags, getattr(command, "__reserved"))
    info = hw_info(file.get(command.dev_id, BoundDevice).group.group.iommu)
    given = command.data_len
    _write_user("get_hw_info", command.data_uptr, info[:given])
    for at in range(len(info), given, _PAGE):
        _write_user("get_hw_info", command.data_uptr + at, bytes(min(given - at, _PAGE)))
    command.data_len = len(info)
    command.out_data_type = lib.IOMMU_HW_INFO_TYPE_INTEL_VTD
    command.out_capabilities = 0


def _set_dirty_tracking(file: IommufdFile, command: Any) -> None:
    _zero("set_dirty_tracking", command.flags & ~lib.IOMMU_HWPT_DIRTY_TRACKING_ENABLE)
    file.get(command.hwpt_id, PagingHwpt)
    raise _refused(errno.EOPNOTSUPP, "set_dirty_tracking", "x86-64 stage-1 leaves are written dirty")


def _get_dirty_bitmap(file: IommufdFile, command: Any) -> None:
    operation = "get_dirty_bitmap"
    unknown = command.flags & ~lib.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
    _zero(operation, unknown, getattr(command, "__reserved"))
    ioas = file.get(command.hwpt_id, PagingHwpt).ioas
    last, page = command.iova + command.length - 1, command.page_size
    if not 0 <= last <= TOP:
        raise _refused(errno.EOVERFLOW, operation, "the range wraps")
    if (command.iova | last + 1) % ioas.alignment or not page or (command.iova | last + 1) & page - 1:
        raise _refused(errno.EINVAL, operation, "the range is not aligned")
    raise _refused(errno.EOPNOTSUPP, operation, "x86-64 stage-1 leaves are written dirty")


def _hwpt_invalidate(file: IommufdFile, command: Any) -> None:
    asked, command.entry_num = command.entry_num, 0
    try:
        _zero("hwpt_invalidate", getattr(command, "__reserved"))
        if asked and (not command.data_uptr or not command.entry_len):
            raise _refused(errno.EINVAL, "hwpt_invalidate", "no entries")
        hwpt = file.get(command.hwpt_id, object)
        if not isinstance(hwpt, NestedHwpt):
            raise _refused(
                errno.EINVAL, "hwpt_invalidate", f"object {command.hwpt_id} is no nested page table"
            )
        if command.data_type != lib.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1:
            raise _refused(errno.EINVAL, "hwpt_invalidate", f"data type {command.data_type}")
        for i in range(asked):
            hwpt.invalidate(*_invalidated(command, i))
            command.entry_num = i + 1
    except VfioError as error:
        raise _Answered(error) from error


def _invalidated(command: Any, number: int) -> tuple[int, int]:
    """The (first, last) IOVA of one entry of an invalidation."""
    operation = "hwpt_invalidate"
    if not ffi.sizeof("struct iommu_hwpt_vtd_s1_invalidate") <= command.entry_len <= _MAX_ENTRY:
        raise _refused(errno.EINVAL, operation, f"entries of {command.entry_len} bytes")
    entry = ffi.new("struct iommu_hwpt_vtd_s1_invalidate *")
    raw = _read_user(operation, command.data_uptr + number * command.entry_len, command.entry_len)
    copy_struct("iommu_hwpt_vtd_s1_invalidate", entry, raw)
    _zero(operation, entry.flags & ~lib.IOMMU_VTD_INV_FLAGS_LEAF, getattr(entry, "__reserved"))
    if entry.addr % _PAGE or (entry.npages == TOP and entry.addr) or not entry.npages:
        raise _refused(errno.EINVAL, operation, f"{entry.npages} pages at {entry.addr:#x}")
    return entry.addr, min(entry.addr + entry.npages * _PAGE - 1, TOP)


def _end_of(struct: str, field: str) -> int:
    """The least size of a request: up to a field, included."""
    entry = dict(ffi.typeof(f"struct {struct}").fields)[field]
    return int(entry.offset + ffi.sizeof(entry.type))


def _request(struct: str, field: str, handler: Callable[[IommufdFile, Any], None]) -> Any:
    """Name, pointer type, bytes, least bytes and handler of a request."""
    name = f"struct {struct}"
    return struct, ffi.typeof(f"{name} *"), ffi.sizeof(name), _end_of(struct, field), handler


_REQUESTS: dict[int, tuple[str, Any, int, int, Callable[[IommufdFile, Any], None]]] = {
    lib.IOMMU_DESTROY: _request("iommu_destroy", "id", _destroy),
    lib.IOMMU_IOAS_ALLOC: _request("iommu_ioas_alloc", "out_ioas_id", _ioas_alloc),
    lib.IOMMU_IOAS_ALLOW_IOVAS: _request("iommu_ioas_allow_iovas", "allowed_iovas", _allow_iovas),
    lib.IOMMU_IOAS_COPY: _request("iommu_ioas_copy", "src_iova", _ioas_copy),
    lib.IOMMU_IOAS_IOVA_RANGES: _request("iommu_ioas_iova_ranges", "out_iova_alignment", _iova_ranges),
    lib.IOMMU_IOAS_MAP: _request("iommu_ioas_map", "iova", _ioas_map),
    lib.IOMMU_IOAS_UNMAP: _request("iommu_ioas_unmap", "length", _ioas_unmap),
    lib.IOMMU_OPTION: _request("iommu_option", "val64", _option),
    lib.IOMMU_HWPT_ALLOC: _request("iommu_hwpt_alloc", "__reserved", _hwpt_alloc),
    lib.IOMMU_GET_HW_INFO: _request("iommu_hw_info", "__reserved", _get_hw_info),
    lib.IOMMU_HWPT_SET_DIRTY_TRACKING: _request(
        "iommu_hwpt_set_dirty_tracking", "__reserved", _set_dirty_tracking
    ),
    lib.IOMMU_HWPT_GET_DIRTY_BITMAP: _request("iommu_hwpt_get_dirty_bitmap", "data", _get_dirty_bitmap),
    lib.IOMMU_HWPT_INVALIDATE: _request("iommu_hwpt_invalidate", "__reserved", _hwpt_invalidate),
}
