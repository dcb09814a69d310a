"""What an NVMe controller is capable of, and the namespaces it begins with.

Models the capability registers and the static parts of Identify (NVMe Base 2.0c 3.1.3.1 and 5.17). Not modelled:
several controllers in one subsystem, several power states that save anything.
"""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass
from typing import Final

from pvfio.abi import lib

__all__ = ["FORMATS", "NamespaceSpec", "NvmeConfig", "serial_of"]

FORMATS: Final[tuple[tuple[int, int], ...]] = ((9, 0), (12, 0), (9, 8), (12, 8), (12, 16))
"""The LBA formats of every namespace: block size as a power of two, bytes of metadata. Their order is Identify's."""

_PAGE: Final = 4096
_LONGEST_SERIAL: Final = 20
_SERIALS: Final = uuid.UUID("5d6b9d0e-2f7b-4a53-8b58-706676696f73")


def serial_of(identity: str) -> str:
    """The serial number of the controller that this names: always the same one, and another for another name."""
    plain = f"pvfio-{identity}"
    if len(plain) <= _LONGEST_SERIAL and identity.isascii() and identity.isalnum():
        return plain
    return "pvfio_" + uuid.uuid5(_SERIALS, identity).hex[: _LONGEST_SERIAL - 6]


@dataclass(frozen=True, kw_only=True)
class NvmeConfig:
    """Capabilities of one controller.

    ``queues``: I/O queue pairs. ``entries``: the most in a queue. ``mdts_shift``: longest transfer, a power of two of
    4 KiB. ``dstrd``: doorbell stride (4 << dstrd bytes). ``weighted``: weighted round robin is offered. ``timeout``:
    seconds after which a driver gives up waiting for CSTS.RDY. ``max_page_shift``: largest memory page size.
    ``capacity``: bytes that namespaces may be made of at run time, beyond those the device begins with. ``vectors``:
    MSI-X, one for the admin queue and one for each I/O queue by default. ``serial``: what sets the controller apart,
    and of which the names of its subsystem and namespaces (NQN, UUID, NGUID, EUI-64) are made; empty: the device's
    ``identity`` decides. ``power_on_hours``: what the health log begins with. ``poll_doorbells``: the doorbell page may
    be mapped, and an engine that is a thread looks at it every millisecond at least. ``short_test_seconds``,
    ``extended_test_seconds``, ``sanitize_seconds``: what self-tests and sanitizing take at least; nvme-cli,
    which looks once a second, wants to see a test on its way. ``vendor``, ``device``: the default is what other
    emulators call a controller for Hyper-V guests; of 1b36:0010, which is QEMU's, Linux takes no namespace identifiers.
    Raises ``ValueError`` for what no controller can be.
    """

    queues: int = 64
    entries: int = 1024
    mdts_shift: int = lib.PV_NVME_MAX_MDTS
    dstrd: int = 0
    weighted: bool = True
    timeout: float = 10.0
    max_page_shift: int = 16
    max_namespaces: int = 32
    capacity: int = 0
    vectors: int | None = None
    vendor: int = 0x1414
    device: int = 0x00A9
    serial: str = ""
    model: str = "pvfio NVMe Controller"
    firmware: str = "1.0"
    power_on_hours: int = 0
    poll_doorbells: bool = False
    short_test_seconds: float = 3.0
    extended_test_seconds: float = 5.0
    sanitize_seconds: float = 0.5

    def __post_init__(self) -> None:
        limits = {
            "queues": (1, lib.PV_NVME_QUEUES - 1),
            "entries": (2, 1 << 16),
            "mdts_shift": (0, lib.PV_NVME_MAX_MDTS),
            "dstrd": (0, lib.PV_NVME_MAX_DSTRD),
            "max_page_shift": (12, 16),
            "max_namespaces": (1, lib.PV_NVME_NAMESPACES),
        }
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {least} to {most}, not {getattr(self, name)}")
        if not 0 < self.timeout <= 127.5:
            raise ValueError(f"timeout is at most 127.5 s, not {self.timeout}")
        if self.capacity < 0 or self.capacity % _PAGE:
            raise ValueError(f"capacity is a multiple of 4096, not {self.capacity}")
        for name, length in {"serial": _LONGEST_SERIAL, "model": 40, "firmware": 8}.items():
            value = getattr(self, name)
            if len(value) > length or not value.isascii():
                raise ValueError(f"{name} is at most {length} ASCII characters, not {value!r}")

    @property
    def extended_test_minutes(self) -> int:
        """Identify's EDSTT."""
        return max(1, math.ceil(self.extended_test_seconds / 60))

    @property
    def shadow_doorbells(self) -> bool:
        """Doorbell Buffer Config is offered: all doorbells fit into a page of 4 KiB, the smallest (Base 5.8)."""
        return self.doorbell_bytes <= _PAGE

    @property
    def vector_count(self) -> int:
        """MSI-X vectors."""
        return self.vectors if self.vectors is not None else self.queues + 1

    @property
    def doorbell_bytes(self) -> int:
        """Bytes of BAR 0 that are doorbells, whole pages."""
        return -(-(2 * int(lib.PV_NVME_QUEUES) * 4 << self.dstrd) // _PAGE) * _PAGE

    @property
    def msix_offset(self) -> int:
        """Where the MSI-X pages begin."""
        return int(lib.NVME_REG_DBS) + self.doorbell_bytes

    @property
    def longest_transfer(self) -> int:
        """Bytes a command may move."""
        return 4096 << self.mdts_shift

    @property
    def cap(self) -> int:
        """The CAP register (NVMe Base 2.0c 3.1.3.1)."""
        return int(
            self.entries - 1
            | lib.NVME_CAP_CQR
            | (lib.NVME_CAP_AMS_WRR * self.weighted) << lib.NVME_CAP_AMS_SHIFT
            | int(self.timeout * 2 + 0.999) << lib.NVME_CAP_TO_SHIFT
            | self.dstrd << lib.NVME_CAP_DSTRD_SHIFT
            | 1 << lib.NVME_CAP_NSSRS_SHIFT
            | (lib.NVME_CAP_CSS_NVM | lib.NVME_CAP_CSS_IO) << lib.NVME_CAP_CSS_SHIFT
            | (self.max_page_shift - 12) << lib.NVME_CAP_MPSMAX_SHIFT
        )


@dataclass(frozen=True, kw_only=True)
class NamespaceSpec:
    """A namespace the controller begins with.

    ``size`` bytes of memory, or the raw ``image`` file (``size`` 0: all of it), which keeps its size.
    ``read_only``: writes are refused. ``volatile_cache``: what was not flushed is lost with the process, as in a
    drive whose power fails. ``lba_shift`` and ``metadata`` (bytes a block) are one of ``FORMATS``. Metadata, and marks
    of Write Uncorrectable, are in memory; so an image is refused metadata, which a flush could not save together with
    its blocks. ``extended``: metadata is at the end of each block. ``protection``: type 0 or 1, its eight bytes the
    last of the metadata, or the first with ``protection_first``. Raises ``ValueError``.
    """

    size: int = 256 << 20
    image: str | os.PathLike[str] | None = None
    read_only: bool = False
    volatile_cache: bool = False
    lba_shift: int = 12
    metadata: int = 0
    extended: bool = False
    protection: int = 0
    protection_first: bool = False
    attached: bool = True

    def __post_init__(self) -> None:
        if (self.lba_shift, self.metadata) not in FORMATS:
            raise ValueError(f"no LBA format has 2^{self.lba_shift} bytes and {self.metadata} of metadata")
        if self.image is not None and self.metadata:
            raise ValueError(
                "an image has no metadata: it could not be made durable together with the blocks"
            )
        if self.image is None and (self.size <= 0 or self.size % _PAGE):
            raise ValueError(f"size is a multiple of 4096, not {self.size}")
        if self.size < 0 or self.size % (1 << self.lba_shift):
            raise ValueError(f"{self.size} bytes are not whole blocks")
        if self.protection not in (0, 1) or (self.protection and self.metadata < 8):
            raise ValueError("protection is type 0 or 1, and 1 takes eight bytes of metadata")
        if self.volatile_cache and self.image is None:
            raise ValueError("a volatile cache is for images")
