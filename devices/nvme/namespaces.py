"""The namespaces of a controller: what they are kept in, their formats, which are attached.

Not modelled: namespaces shared between controllers, ANA groups, NVM sets. A namespace that a driver makes is of memory.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import trio
from numpy.typing import NDArray

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.admin import AdminError
from pvfio.devices.nvme.config import FORMATS, NamespaceSpec, NvmeConfig

__all__ = ["Namespace", "Namespaces"]

_ALL: Final[int] = lib.NVME_NSID_ALL
_PAGE: Final = 4096
_OUI: Final = bytes.fromhex("525400")
_UUIDS: Final = uuid.UUID("2f0b1f5e-6a7c-4c0f-8f0d-6e766d653034")


@dataclass
class Namespace:
    """One namespace. ``backing`` is the C object; ``spec`` what it was made of, kept up to date by a format.

    ``protection_state``: feature 84h. ``formatting``: percent of a format that is to come, 0: none runs.
    """

    nsid: int
    spec: NamespaceSpec
    size: int
    backing: Any
    eui64: bytes
    nguid: bytes
    uuid: bytes
    attached: bool = False
    protection_state: int = 0
    formatting: int = 0

    @property
    def blocks(self) -> int:
        """Its size in blocks of its format."""
        return self.size >> self.spec.lba_shift

    @property
    def allocated(self) -> int:
        """Bytes of the controller's capacity, whole pages."""
        return -(-self.size // _PAGE) * _PAGE

    @property
    def used(self) -> int:
        """Blocks that take room."""
        return min(self.blocks, int(lib.pv_nvme_backing_used(self.backing)) >> self.spec.lba_shift)

    @property
    def memory(self) -> NDArray[np.uint8] | None:
        """The bytes it is kept in, shape ``(size,)``; what the device does at the same time is not waited for.

        For as long as the namespace is there; ``None`` where it is an image.
        """
        base = lib.pv_nvme_backing_memory(self.backing)
        return None if base == ffi.NULL else np.frombuffer(ffi.buffer(base, self.size), dtype=np.uint8)

    @property
    def format_index(self) -> int:
        """Which of ``FORMATS`` it has."""
        return FORMATS.index((self.spec.lba_shift, self.spec.metadata))

    @property
    def formats(self) -> tuple[tuple[int, int], ...]:
        """What it can be formatted to: an image without metadata (``NamespaceSpec``)."""
        return FORMATS if self.spec.image is None else tuple(f for f in FORMATS if not f[1])

    @property
    def write_protected(self) -> bool:
        """Writes are refused."""
        return bool(self.protection_state) or self.spec.read_only


class Namespaces:
    """The namespaces by number. Raises ``OSError`` for an image that cannot be opened, ``MemoryError``."""

    def __init__(self, config: NvmeConfig, nvme: Any, specs: Sequence[NamespaceSpec]) -> None:
        self._config = config
        self._nvme = nvme
        self._made = 0
        self.by_nsid: dict[int, Namespace] = {}
        try:
            for spec in specs:
                made = self.create(spec)
                if spec.attached:
                    self.attach(made.nsid)
            self.capacity = sum(n.allocated for n in self.by_nsid.values()) + config.capacity
        except BaseException:
            self.close()
            raise

    @property
    def unallocated(self) -> int:
        """Bytes that namespaces may still be made of."""
        return self.capacity - sum(n.allocated for n in self.by_nsid.values())

    @property
    def volatile(self) -> bool:
        """There is a volatile write cache: what an image takes is durable only after a flush."""
        return any(n.spec.image is not None and not n.spec.read_only for n in self.by_nsid.values())

    def check(self, nsid: int) -> None:
        """Raises Invalid Namespace or Format for a number that no namespace can have."""
        if not 0 < nsid <= self._config.max_namespaces:
            raise AdminError(lib.NVME_SC_INVALID_NS, 4)

    def active(self, nsid: int) -> Namespace:
        """An attached namespace. Raises Invalid Namespace or Format for another number, Invalid Field for an inactive
        one (Base 3.2.1.5).
        """
        self.check(nsid)
        found = self.by_nsid.get(nsid)
        if found is None or not found.attached:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, 4)
        return found

    def chosen(self, nsid: int) -> list[Namespace]:
        """The attached namespaces that a command is about, all for FFFFFFFFh. Raises as ``active``."""
        if nsid != _ALL:
            return [self.active(nsid)]
        return [n for n in self.by_nsid.values() if n.attached]

    def create(self, spec: NamespaceSpec, *, size: int | None = None) -> Namespace:
        """A namespace under the lowest free number; not attached. ``size``: fewer bytes than ``spec`` has.

        ``ValueError`` where there is no number, ``MemoryError``.
        """
        nsid = next((n for n in range(1, self._config.max_namespaces + 1) if n not in self.by_nsid), None)
        if nsid is None:
            raise ValueError(f"more than {self._config.max_namespaces} namespaces")
        whole, backing = _open(spec)
        self._made += 1
        name = uuid.uuid5(_UUIDS, f"{self._config.serial} {self._made}")
        eui64 = _OUI + name.bytes[:5]
        made = Namespace(
            nsid,
            spec,
            size or whole,
            ffi.gc(backing, lib.pv_nvme_backing_put),
            eui64=eui64,
            nguid=name.bytes[8:] + eui64,
            uuid=name.bytes,
        )
        self.by_nsid[nsid] = made
        try:
            self._give(made, spec)
        except MemoryError:
            del self.by_nsid[nsid]
            raise
        self.refresh(nsid)
        return made

    def _give(self, namespace: Namespace, spec: NamespaceSpec) -> None:
        """To the data path, in this format; what metadata there was is gone. ``MemoryError`` changes nothing."""
        values = {
            "blocks": namespace.size >> spec.lba_shift,
            "lba_shift": spec.lba_shift,
            "metadata": spec.metadata,
            "extended": spec.extended,
            "pi": spec.protection,
            "pi_first": spec.protection_first,
            "read_only": spec.read_only,
        }
        made = ffi.new("struct pv_nvme_format *", values)
        if lib.pv_nvme_set_namespace(self._nvme, namespace.nsid, namespace.backing, made):
            raise MemoryError(f"no room for namespace {namespace.nsid}")
        namespace.spec = spec

    def attach(self, nsid: int) -> None:
        """Commands may use it."""
        self.by_nsid[nsid].attached = True
        self.refresh(nsid)

    def detach(self, nsid: int) -> None:
        """Commands may not use it any more; its blocks keep their contents."""
        self.by_nsid[nsid].attached = False
        self.refresh(nsid)

    def delete(self, nsid: int) -> None:
        """Forgets a namespace, and what it was kept in. An image keeps its contents."""
        lib.pv_nvme_set_namespace(self._nvme, nsid, ffi.NULL, ffi.NULL)
        del self.by_nsid[nsid]

    def protect(self, nsid: int, state: int) -> None:
        """Feature 84h: what was written is durable first (Base 8.12.1)."""
        lib.pv_nvme_backing_sync(self.by_nsid[nsid].backing)
        self.by_nsid[nsid].protection_state = state
        lib.pv_nvme_write_protect(self._nvme, nsid, state)

    def refresh(self, nsid: int) -> None:
        """Makes the data path take or refuse commands, as the namespace says."""
        found = self.by_nsid[nsid]
        status = 0 if found.attached else lib.NVME_SC_INVALID_FIELD | lib.NVME_STATUS_DNR
        lib.pv_nvme_refuse_namespace(
            self._nvme, nsid, lib.NVME_SC_FORMAT_IN_PROGRESS if found.formatting else status
        )

    def reformat(self, nsid: int, **changes: Any) -> None:
        """Another format, which leaves out what is no whole block; what the blocks hold is the caller's business.

        Raises ``ValueError`` for what cannot be and ``MemoryError``, and has changed nothing then.
        """
        found = self.by_nsid[nsid]
        shift = changes.get("lba_shift", found.spec.lba_shift)
        self._give(found, replace(found.spec, size=found.spec.size >> shift << shift, **changes))

    async def sync(self, nsid: int | None = None) -> bool:
        """Makes everything, or one namespace, durable, without blocking other tasks; whether it is.

        Cancelled: the sync under way still ends.
        """
        done = True
        for found in [n for n in self.by_nsid.values() if nsid in (None, n.nsid)]:
            if found.spec.image is not None:
                done &= not await trio.to_thread.run_sync(lib.pv_nvme_backing_sync, found.backing)
        return done

    def close(self) -> None:
        """Takes everything from the data path; images are closed when nothing uses them."""
        for nsid in list(self.by_nsid):
            self.delete(nsid)


def _open(spec: NamespaceSpec) -> tuple[int, Any]:
    """Size in bytes and backing."""
    if spec.image is None:
        backing = lib.pv_nvme_memory(spec.size)
        if backing == ffi.NULL:
            raise MemoryError(f"no room for a namespace of {spec.size} bytes")
        return spec.size, backing
    flags = os.O_CLOEXEC | (os.O_RDONLY if spec.read_only else os.O_RDWR)
    descriptor = os.open(spec.image, flags)
    try:
        size = _image_size(descriptor, spec)
        backing = lib.pv_nvme_file(descriptor, size, spec.read_only, spec.volatile_cache)
        if backing == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno), os.fspath(spec.image))
    finally:
        os.close(descriptor)
    return size, backing


def _image_size(descriptor: int, spec: NamespaceSpec) -> int:
    """Bytes of an image, whole blocks. ``ValueError`` where the file has fewer than asked, or none."""
    status = os.fstat(descriptor)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise ValueError(f"{spec.image}: neither a file nor a block device")
    length = os.lseek(descriptor, 0, os.SEEK_END) >> spec.lba_shift << spec.lba_shift
    if not length or spec.size > length:
        raise ValueError(f"{spec.image}: {length} bytes, {spec.size or 'at least one block'} wanted")
    return spec.size or length
