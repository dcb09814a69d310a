"""A single command, as 64 bytes of a submission queue (NVMe Base 2.0c 3.3.3.1)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["Sqe"]

_LAYOUT = struct.Struct("<BBHIIIQQQIIIIII")


@dataclass(slots=True)
class Sqe:
    """The fields of ``struct nvme_command``, but for its identifier, which the queue gives it."""

    opcode: int
    nsid: int = 0
    flags: int = 0
    cdw2: int = 0
    cdw3: int = 0
    metadata: int = 0
    prp1: int = 0
    prp2: int = 0
    cdw10: int = 0
    cdw11: int = 0
    cdw12: int = 0
    cdw13: int = 0
    cdw14: int = 0
    cdw15: int = 0

    def pack(self) -> bytes:
        """The command, without an identifier. ``struct.error`` for a field with more bits than there is room for."""
        return _LAYOUT.pack(
            self.opcode,
            self.flags,
            0,
            self.nsid,
            self.cdw2,
            self.cdw3,
            self.metadata,
            self.prp1,
            self.prp2,
            self.cdw10,
            self.cdw11,
            self.cdw12,
            self.cdw13,
            self.cdw14,
            self.cdw15,
        )
