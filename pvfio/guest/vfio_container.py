"""A container file (/dev/vfio/vfio): groups that share an IO address space, and the IOMMU type that makes it.

The IOMMU type can be set once a group is in; every other request is then the type's. When the last group
leaves the type goes, with everything mapped, and the container is as new. A closed container lives on while
groups are in it. Rules and errnos: Linux container.c.

Not modelled: no-IOMMU groups, emulated-IOMMU groups, SPAPR.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pvfio.abi import lib
from pvfio.errors import HypercallError, IommuError, VfioError
from pvfio.guest.type1_ioctl import check_extension
from pvfio.guest.vfio_files import FileTable

if TYPE_CHECKING:
    from pvfio.guest.iommu_group import IommuGroup
    from pvfio.guest.type1 import Type1, Words

__all__ = ["ContainerFile"]

_VERSION: int = lib.VFIO_GET_API_VERSION
_EXTENSION: int = lib.VFIO_CHECK_EXTENSION
_SET: int = lib.VFIO_SET_IOMMU
_TYPES: tuple[int, ...] = (lib.VFIO_TYPE1_IOMMU, lib.VFIO_TYPE1v2_IOMMU)


class ContainerFile:
    """``make_type1(v2)`` makes the IOMMU driver's side; ``groups`` are the groups in the container."""

    def __init__(self, make_type1: Callable[[bool], Type1], files: FileTable) -> None:
        self._make_type1 = make_type1
        self._files = files
        self._open = True
        self.iommu: Type1 | None = None
        self.groups: list[IommuGroup] = []
        self.fd = files.install(self)

    def __repr__(self) -> str:
        return f"<VFIO container {self.fd:#x}>"

    def ioctl(self, request: int, arg: Any = 0) -> int:
        """A request. Raises VfioError: EINVAL for one of the IOMMU type before there is one, EBADF once
        closed.
        """
        iommu = self.iommu
        if iommu is not None and request > _SET and self._open:
            return iommu.ioctl(request, arg)
        if not self._open:
            raise VfioError(errno.EBADF, "container", "closed")
        if request == _VERSION:
            return int(lib.VFIO_API_VERSION)
        if request == _EXTENSION:
            return check_extension(int(arg))
        if request == _SET:
            return self._set_iommu(arg)
        if iommu is not None:
            return iommu.ioctl(request, arg)
        raise VfioError(errno.EINVAL, "container", f"request {request:#x} before SET_IOMMU")

    def map_batch(self, iovas: Words, vaddrs: Words, sizes: Words, flags: int) -> None:
        """Many VFIO_IOMMU_MAP_DMA at once, see ``Type1.map_batch``. Raises EBADF and EINVAL as ``ioctl``."""
        self._type1().map_batch(iovas, vaddrs, sizes, flags)

    def unmap_batch(self, iovas: Words, sizes: Words) -> Words:
        """Many VFIO_IOMMU_UNMAP_DMA at once, see ``Type1.unmap_batch``. Raises EBADF and EINVAL as ``ioctl``."""
        return self._type1().unmap_batch(iovas, sizes)

    def close(self) -> None:
        """Closes the file. Safe to call twice."""
        self._open = False
        self._files.remove(self.fd)

    def attach(self, group: IommuGroup) -> None:
        """Puts a group in: claims its DMA, and, with an IOMMU type set, gives it the container's address
        space.

        Raises EPERM where it is not viable and what the host or the IOMMU type refuses; the group is not in
        then.
        """
        with _as_vfio_errors("SET_CONTAINER"):
            group.claim_dma_owner(self)
            if self.iommu is not None:
                try:
                    self.iommu.attach_group(group)
                except BaseException:
                    group.release_dma_owner()
                    raise
        self.groups.append(group)

    def detach(self, group: IommuGroup) -> None:
        """Takes a group out; the last one takes the IOMMU type and every mapping with it.

        Raises what the host's refusal means; the group is still in then, and a later call begins again.
        """
        with _as_vfio_errors("UNSET_CONTAINER"):
            if self.iommu is not None and group in self.iommu.groups:
                self.iommu.detach_group(group)
            group.release_dma_owner()
        self.groups.remove(group)
        if not self.groups:
            self.iommu = None

    def _type1(self) -> Type1:
        if not self._open:
            raise VfioError(errno.EBADF, "container", "closed")
        if self.iommu is None:
            raise VfioError(errno.EINVAL, "container", "a batch before SET_IOMMU")
        return self.iommu

    def _set_iommu(self, kind: int) -> int:
        if not self.groups or self.iommu is not None:
            reason = "the container has no group" if not self.groups else "set already"
            raise VfioError(errno.EINVAL, "SET_IOMMU", reason)
        if kind not in _TYPES:
            raise VfioError(errno.ENODEV, "SET_IOMMU", f"no IOMMU type {kind}")
        iommu = self._make_type1(kind == lib.VFIO_TYPE1v2_IOMMU)
        attached: list[IommuGroup] = []
        try:
            for group in self.groups:
                iommu.attach_group(group)
                attached.append(group)
        except BaseException:
            for group in reversed(attached):
                iommu.detach_group(group)
            raise
        self.iommu = iommu
        return 0


@contextmanager
def _as_vfio_errors(operation: str) -> Iterator[None]:
    try:
        yield
    except (HypercallError, IommuError) as error:
        raise VfioError(error.errno or errno.EIO, operation, error.reason) from error
