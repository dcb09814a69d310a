"""What Identify says of a namespace: NVM command set 1.0c figures 97 and 100, NVMe Base 2.0c figures 277 and 280."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.config import FORMATS

if TYPE_CHECKING:
    from pvfio.devices.nvme.namespaces import Namespace

__all__ = ["common_page", "descriptors", "independent_page", "namespace_page", "nvm_namespace_page"]

_BEST: Final = 4096
"""Writes and deallocations of whole pages are the cheapest."""


def _common(page: Any, formats: tuple[tuple[int, int], ...]) -> None:
    """What does not depend on a namespace."""
    page.nsfeat = lib.NVME_NSFEAT_OPTPERF | lib.NVME_NSFEAT_UID_REUSE
    page.nlbaf = len(formats) - 1
    for index, (shift, metadata) in enumerate(formats):
        page.lbaf[index].ds, page.lbaf[index].ms = shift, metadata
        page.lbaf[index].rp = 0 if not metadata else 2
    if any(metadata for _, metadata in formats):
        page.mc = lib.NVME_MC_SEPARATE | lib.NVME_MC_EXTENDED
        page.dpc = lib.NVME_DPC_TYPE1 | lib.NVME_DPC_FIRST | lib.NVME_DPC_LAST
    page.fpi = lib.NVME_FPI_SUPPORTED
    page.dlfeat = lib.NVME_DLFEAT_READS_ZERO | lib.NVME_DLFEAT_WZ_DEAC
    page.mssrl, page.mcl, page.msrc = lib.PV_NVME_COPY_MSSRL, lib.PV_NVME_COPY_MCL, lib.PV_NVME_COPY_MSRC


def common_page() -> bytes:
    """Identify Namespace for number FFFFFFFFh."""
    page = ffi.new("struct nvme_id_ns *")
    _common(page, FORMATS)
    return bytes(ffi.buffer(page))


def namespace_page(namespace: Namespace) -> bytes:
    """Identify Namespace."""
    page = ffi.new("struct nvme_id_ns *")
    spec = namespace.spec
    _common(page, namespace.formats)
    page.nsze = page.ncap = namespace.blocks
    page.nuse = namespace.used
    page.flbas = namespace.format_index | lib.NVME_FLBAS_EXTENDED * spec.extended
    page.dps = spec.protection | lib.NVME_DPS_FIRST * spec.protection_first
    page.fpi = lib.NVME_FPI_SUPPORTED | namespace.formatting
    best = max(0, (_BEST >> spec.lba_shift) - 1)
    page.npwg = page.npwa = page.npdg = page.npda = page.nows = best
    ffi.buffer(page.nvmcap)[:] = namespace.allocated.to_bytes(16, "little")
    page.nsattr = lib.NVME_NSATTR_WRITE_PROTECTED * namespace.write_protected
    page.nguid, page.eui64 = namespace.nguid, namespace.eui64
    return bytes(ffi.buffer(page))


def nvm_namespace_page(namespace: Namespace) -> bytes:
    """The NVM command set's own structure: 16-bit guards, no storage tags, in every format; all zeroes."""
    return b""


def independent_page(namespace: Namespace) -> bytes:
    """What no command set changes."""
    page = ffi.new("struct nvme_id_ns_indep *")
    page.nsfeat = lib.NVME_NSFEAT_UID_REUSE
    page.fpi = lib.NVME_FPI_SUPPORTED | namespace.formatting
    page.nsattr = lib.NVME_NSATTR_WRITE_PROTECTED * namespace.write_protected
    page.nstat = lib.NVME_NSTAT_NRDY
    return bytes(ffi.buffer(page))


def descriptors(namespace: Namespace) -> bytes:
    """The namespace identification descriptor list."""
    kinds = (
        (lib.NVME_NIDT_EUI64, namespace.eui64),
        (lib.NVME_NIDT_NGUID, namespace.nguid),
        (lib.NVME_NIDT_UUID, namespace.uuid),
        (lib.NVME_NIDT_CSI, bytes([lib.NVME_CSI_NVM])),
    )
    return b"".join(bytes([kind, len(value), 0, 0]) + value for kind, value in kinds)
