"""The namespaces of a controller: what they are kept in, their formats, which are attached.

Not modelled: namespaces shared between controllers, ANA groups, NVM sets.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.config import FORMATS, NamespaceSpec, NvmeConfig

__all__ = ["Namespace", "Namespaces"]


@dataclass
class Namespace:
    """One namespace. ``backing`` is the C object; ``spec`` what it was made of, kept up to date by a format."""

    nsid: int
    spec: NamespaceSpec
    size: int
    backing: Any
    attached: bool = False
    write_protected: bool = False
    nguid: bytes = field(default_factory=bytes)
    uuid: bytes = field(default_factory=bytes)
    eui64: bytes = field(default_factory=bytes)

    @property
    def blocks(self) -> int:
        """Its size in blocks of its format."""
        return self.size >> self.spec.lba_shift

    @property
    def format_index(self) -> int:
        """Which of ``FORMATS`` it has."""
        return FORMATS.index((self.spec.lba_shift, self.spec.metadata))


class Namespaces:
    """The namespaces by number. Raises ``OSError`` for an image that cannot be opened, ``MemoryError``."""

    def __init__(self, config: NvmeConfig, nvme: Any, specs: Sequence[NamespaceSpec]) -> None:
        self._config = config
        self._nvme = nvme
        self.by_nsid: dict[int, Namespace] = {}
        try:
            for spec in specs:
                made = self.create(spec)
                if spec.attached:
                    self.attach(made.nsid)
        except BaseException:
            self.close()
            raise

    def create(self, spec: NamespaceSpec) -> Namespace:
        """A namespace under the lowest free number; not attached. ``ValueError`` where there is none."""
        nsid = next((n for n in range(1, self._config.max_namespaces + 1) if n not in self.by_nsid), None)
        if nsid is None:
            raise ValueError(f"more than {self._config.max_namespaces} namespaces")
        size, backing = _open(spec)
        made = self.by_nsid[nsid] = Namespace(nsid, spec, size, ffi.gc(backing, lib.pv_nvme_backing_put))
        made.eui64 = bytes.fromhex("525400") + nsid.to_bytes(5)
        made.nguid = made.eui64 + b"pvfio" + nsid.to_bytes(3)
        return made

    def attach(self, nsid: int) -> None:
        """Gives a namespace to the data path, in its format; blocks keep their contents."""
        found = self.by_nsid[nsid]
        spec = found.spec
        values = {
            "blocks": found.blocks,
            "lba_shift": spec.lba_shift,
            "metadata": spec.metadata,
            "extended": spec.extended,
            "pi": spec.protection,
            "pi_first": False,
            "read_only": spec.read_only,
        }
        error = lib.pv_nvme_set_namespace(
            self._nvme, nsid, found.backing, ffi.new("struct pv_nvme_format *", values)
        )
        if error:
            raise MemoryError(f"no room for namespace {nsid}")
        found.attached = True
        lib.pv_nvme_write_protect(self._nvme, nsid, found.write_protected)

    def detach(self, nsid: int) -> None:
        """Takes a namespace from the data path."""
        lib.pv_nvme_set_namespace(self._nvme, nsid, ffi.NULL, ffi.NULL)
        self.by_nsid[nsid].attached = False

    def delete(self, nsid: int) -> None:
        """Forgets a namespace, and what it was kept in."""
        self.detach(nsid)
        del self.by_nsid[nsid]

    def reformat(self, nsid: int, **changes: Any) -> None:
        """Another format; what the blocks hold is the caller's business."""
        found = self.by_nsid[nsid]
        attached = found.attached
        self.detach(nsid)
        found.spec = replace(found.spec, **changes)
        if attached:
            self.attach(nsid)

    async def sync(self) -> None:
        """Makes everything durable, without blocking other tasks. Cancelled: the sync under way still ends."""
        for found in list(self.by_nsid.values()):
            await trio.to_thread.run_sync(lib.pv_nvme_backing_sync, found.backing)

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
