"""What pvfio raises.

Few types, each one a thing a caller may want to handle; the errno says which of the kernel's reasons it was,
and the fields carry what a debugger needs. A mistake in the program itself (a wrong type, a bad
configuration) is a plain ``TypeError`` or ``ValueError``.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any

__all__ = [
    "DeadlineExceeded",
    "DeviceFailed",
    "DmaMappingError",
    "HypercallError",
    "IommuError",
    "PageTableError",
    "PvfioError",
    "VfioBatchError",
    "VfioError",
]


class PvfioError(Exception):
    """Base of everything pvfio raises on purpose."""


def _describe(
    operation: str, device: str | None, iova: int | None, length: int | None, reason: str, number: int
) -> str:
    where = f"{operation} {device}" if device else operation
    if iova is not None:
        where += f" iova {iova:#x}"
    if length is not None:
        where += f" length {length:#x}"
    name = _errno.errorcode.get(number, str(number))
    return f"{where}: {name}: {reason or os.strerror(number)}"


class _OsError(PvfioError, OSError):
    """An error with an errno, an operation and, where they apply, a device, an IOVA and a length in bytes."""

    def __init__(
        self,
        number: int,
        operation: str,
        reason: str = "",
        *,
        device: str | None = None,
        iova: int | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(number, _describe(operation, device, iova, length, reason, number))
        self.operation = operation
        self.reason = reason
        self.device = device
        self.iova = iova
        self.length = length

    def __str__(self) -> str:
        return str(self.strerror)


class VfioError(_OsError):
    """A VFIO request failed; ``errno`` is what Linux gives for the same mistake."""


class VfioBatchError(VfioError):
    """An element of a batch was refused: its ``index``, and the ``cause`` it alone would have raised.

    ``unmapped``: of a batch of unmaps, the bytes of each element before it (those are done); else None.
    """

    def __init__(self, cause: VfioError, index: int, unmapped: Any = None) -> None:
        super().__init__(
            cause.errno or 0,
            cause.operation,
            f"element {index}: {cause.reason or os.strerror(cause.errno or 0)}",
            iova=cause.iova,
            length=cause.length,
        )
        self.cause = cause
        self.index = index
        self.unmapped = unmapped


class PageTableError(_OsError):
    """A page-table operation was refused; ``errno`` is what Linux's generic page table gives."""


class DmaMappingError(_OsError):
    """The DMA API refused a request; ``iova`` is the DMA address where there is one."""


class IommuError(_OsError):
    """The guest's IOMMU or PCI layer refused a request before any hypercall was made."""


class HypercallError(_OsError):
    """The hypervisor refused a hypercall.

    ``status`` is the HV_STATUS value, ``status_name`` its name, ``errno`` what Linux makes of it,
    ``completed`` how many entries of a rep hypercall were done.
    """

    def __init__(
        self,
        number: int,
        operation: str,
        status: int,
        status_name: str,
        *,
        device: str | None = None,
        completed: int = 0,
    ) -> None:
        super().__init__(number, operation, f"{status_name} ({status:#x})", device=device)
        self.status = status
        self.status_name = status_name
        self.completed = completed


class DeadlineExceeded(PvfioError, TimeoutError):
    """Something that hardware or a peer owed us did not arrive in time."""

    def __init__(self, operation: str, seconds: float, *, device: str | None = None) -> None:
        where = f"{operation} {device}" if device else operation
        super().__init__(_errno.ETIMEDOUT, f"{where}: no answer within {seconds:g} s")
        self.operation = operation
        self.seconds = seconds
        self.device = device

    def __str__(self) -> str:
        return str(self.strerror)


class DeviceFailed(PvfioError):
    """A device stopped serving its driver (crashed, halted, removed): only a reset or a new machine helps."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"{device}: {reason}")
        self.device = device
        self.reason = reason
