"""What a controller and its namespaces say of themselves (NVMe Base 2.0c 5.17, NVM Command Set 1.0c 4.1.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pvfio.abi import ffi, lib

__all__ = [
    "IdentifyController",
    "LbaFormat",
    "Namespace",
    "parse_controller",
    "parse_list",
    "parse_namespace",
]

_LARGEST_MDTS: Final = 20  # a transfer of 4 GiB: no limit
_FLUSH: Final[int] = lib.NVME_VWC_FLUSH_BROADCAST | lib.NVME_VWC_FLUSH_NO_BROADCAST


@dataclass(frozen=True, slots=True)
class IdentifyController:
    """Identify Controller. Fields have the specification's names; ``max_transfer`` is MDTS in bytes, ``raw`` the page.

    ``rtd3e`` is in seconds.
    """

    vid: int
    sn: str
    mn: str
    fr: str
    cntlid: int
    version: int
    max_transfer: int
    oaes: int
    oacs: int
    acl: int
    aerl: int
    lpa: int
    elpe: int
    oncs: int
    fuses: int
    fna: int
    vwc: bool
    flush_broadcast: bool
    sgls: bool
    nn: int
    rtd3e: float
    sanicap: int
    raw: bytes

    def supports(self, capability: int) -> bool:
        """Whether an optional I/O command is there: ``lib.NVME_ONCS_*``."""
        return bool(self.oncs & capability)


@dataclass(frozen=True, slots=True)
class LbaFormat:
    """Bytes of data and of metadata of a block."""

    block_size: int
    metadata: int


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace: ``blocks`` of ``block_size`` bytes, ``metadata`` bytes with each, at its end where ``extended``.

    ``size`` is in bytes, without metadata; ``capacity`` and ``used`` in blocks. ``formats`` are those it can be
    formatted to, ``format`` the index of its own; ``protection`` the type of protection information.
    """

    nsid: int
    blocks: int
    block_size: int
    capacity: int
    used: int
    metadata: int
    extended: bool
    protection: int
    format: int
    formats: tuple[LbaFormat, ...]
    nguid: bytes
    eui64: bytes
    raw: bytes

    @property
    def size(self) -> int:
        """Bytes of data."""
        return self.blocks * self.block_size

    @property
    def transfer_size(self) -> int:
        """Bytes that a block takes in a transfer."""
        return self.block_size + (self.metadata if self.extended else 0)


def _text(field: Any) -> str:
    return bytes(field).decode("ascii", "replace").rstrip(" \0")


def parse_controller(page: bytes, page_size: int) -> IdentifyController:
    """An Identify Controller page; ``page_size``: of CAP.MPSMIN, the unit of MDTS."""
    c = ffi.from_buffer("struct nvme_id_ctrl *", page)
    return IdentifyController(
        vid=c.vid,
        sn=_text(c.sn),
        mn=_text(c.mn),
        fr=_text(c.fr),
        cntlid=c.cntlid,
        version=c.ver,
        max_transfer=page_size << min(c.mdts or _LARGEST_MDTS, _LARGEST_MDTS),
        oaes=c.oaes,
        oacs=c.oacs,
        acl=c.acl,
        aerl=c.aerl,
        lpa=c.lpa,
        elpe=c.elpe,
        oncs=c.oncs,
        fuses=c.fuses,
        fna=c.fna,
        vwc=bool(c.vwc & lib.NVME_VWC_PRESENT),
        flush_broadcast=c.vwc & _FLUSH == lib.NVME_VWC_FLUSH_BROADCAST,
        sgls=bool(c.sgls & 3),
        nn=c.nn,
        rtd3e=c.rtd3e * 1e-6,
        sanicap=c.sanicap,
        raw=page,
    )


def parse_namespace(nsid: int, page: bytes) -> Namespace | None:
    """An Identify Namespace page; None for a namespace that is not active."""
    n = ffi.from_buffer("struct nvme_id_ns *", page)
    if not n.nsze:
        return None
    index = n.flbas & lib.NVME_FLBAS_INDEX_MASK | (n.flbas >> 5 & 3) << 4
    formats = tuple(LbaFormat(1 << n.lbaf[i].ds, n.lbaf[i].ms) for i in range(min(n.nlbaf + 1, len(n.lbaf))))
    chosen = LbaFormat(1 << n.lbaf[index].ds, n.lbaf[index].ms)
    return Namespace(
        nsid=nsid,
        blocks=n.nsze,
        block_size=chosen.block_size,
        capacity=n.ncap,
        used=n.nuse,
        metadata=chosen.metadata,
        extended=bool(n.flbas & lib.NVME_FLBAS_EXTENDED) and bool(chosen.metadata),
        protection=n.dps & lib.NVME_DPS_TYPE_MASK,
        format=index,
        formats=formats,
        nguid=bytes(n.nguid),
        eui64=bytes(n.eui64),
        raw=page,
    )


def parse_list(page: bytes) -> list[int]:
    """A namespace list: numbers up to the first zero (NVMe Base 2.0c 4.4.2)."""
    numbers = memoryview(page).cast("I").tolist()
    return numbers[: numbers.index(0)] if 0 in numbers else numbers
