"""Names and errnos of hypercalls and their statuses, shared by the host that answers and the guest that asks.

The names are those of ``hyperv.h``; the errno of a status is what Linux makes of it (``hv_result_to_errno``).
"""

from __future__ import annotations

import errno
from typing import Final

from pvfio.abi import lib

__all__ = ["CALL_NAMES", "STATUS_NAMES", "call_name", "logical_id_prefix", "status_errno", "status_name"]


def _names(prefix: str) -> dict[int, str]:
    return {int(getattr(lib, name)): name for name in dir(lib) if name.startswith(prefix)}


STATUS_NAMES: Final = _names("HV_STATUS_")
CALL_NAMES: Final = _names("HVCALL_")

_ERRNOS: Final = {
    lib.HV_STATUS_SUCCESS: 0,
    lib.HV_STATUS_INVALID_HYPERCALL_CODE: errno.EINVAL,
    lib.HV_STATUS_INVALID_HYPERCALL_INPUT: errno.EINVAL,
    lib.HV_STATUS_INVALID_PARAMETER: errno.EINVAL,
    lib.HV_STATUS_UNKNOWN_PROPERTY: errno.EINVAL,
    lib.HV_STATUS_PROPERTY_VALUE_OUT_OF_RANGE: errno.EINVAL,
    lib.HV_STATUS_INVALID_PARTITION_ID: errno.EINVAL,
    lib.HV_STATUS_INVALID_VP_INDEX: errno.EINVAL,
    lib.HV_STATUS_INVALID_PORT_ID: errno.EINVAL,
    lib.HV_STATUS_INVALID_CONNECTION_ID: errno.EINVAL,
    lib.HV_STATUS_INVALID_LP_INDEX: errno.EINVAL,
    lib.HV_STATUS_INVALID_REGISTER_VALUE: errno.EINVAL,
    lib.HV_STATUS_ACCESS_DENIED: errno.EACCES,
    lib.HV_STATUS_OPERATION_DENIED: errno.EACCES,
    lib.HV_STATUS_INSUFFICIENT_MEMORY: errno.ENOMEM,
    lib.HV_STATUS_INSUFFICIENT_ROOT_MEMORY: errno.ENOMEM,
    lib.HV_STATUS_INSUFFICIENT_CONTIGUOUS_MEMORY: errno.ENOMEM,
    lib.HV_STATUS_INSUFFICIENT_CONTIGUOUS_ROOT_MEMORY: errno.ENOMEM,
    lib.HV_STATUS_PROCESSOR_FEATURE_NOT_SUPPORTED: errno.EOPNOTSUPP,
    lib.HV_HYPERCALL_UNAVAILABLE: errno.EOPNOTSUPP,
}


def status_name(status: int) -> str:
    """``HV_STATUS_...`` of a status, or its number in hexadecimal where it has no name here."""
    return STATUS_NAMES.get(status, f"{status:#x}")


def call_name(code: int) -> str:
    """``HVCALL_...`` of a call code, or its number in hexadecimal."""
    return CALL_NAMES.get(code, f"{code:#x}")


def status_errno(status: int) -> int:
    """The (positive) errno of a status, 0 for success, EIO for every status Linux does not name.

    A whole result word of all ones (there is no hypercall page) is accepted as a status: EOPNOTSUPP.
    """
    return _ERRNOS.get(status, errno.EIO)


def logical_id_prefix(instance_guid: bytes) -> int:
    """The part of a logical device ID that a vPCI bus gives: a device's ID is this | its PCI function number.

    ``instance_guid``: the 16 bytes of the VMBus channel's instance GUID as they lie in memory (for a
    ``uuid.UUID``: its ``bytes_le``). Source: the registry rule of the pvIOMMU series,
    ``b[5] << 24 | b[4] << 16 | b[7] << 8 | (b[6] & 0xf8)``.
    """
    b = instance_guid
    return b[5] << 24 | b[4] << 16 | b[7] << 8 | (b[6] & 0xF8)
