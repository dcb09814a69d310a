"""Firmware Image Download and Firmware Commit, the slots, the slot log (NVMe Base 2.0c 5.12, 5.13, 5.16.1.4).

An image of this device is the word ``PVFIOFW1``, a revision of eight characters, anything, and a CRC-32 of it all
(``firmware_image`` makes one). Not modelled: boot partitions, images that change behaviour, activation that takes time.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.admin import AdminError, Command
from pvfio.devices.nvme.identify_controller import FIRMWARE_SLOTS

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Handler
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.events import AsyncEvents

__all__ = ["Firmware", "firmware_image"]

_MAGIC: Final = b"PVFIOFW1"
_LONGEST: Final = 16 << 20
_BYTE_CDW10, _BYTE_CDW11 = 40, 44


def firmware_image(revision: str, payload: bytes = b"") -> bytes:
    """An image that the device takes. ``ValueError`` for a revision that is not at most eight ASCII characters."""
    if not 0 < len(revision) <= 8 or not revision.isascii():
        raise ValueError(f"a revision is one to eight ASCII characters, not {revision!r}")
    body = _MAGIC + revision.ljust(8).encode("ascii") + payload.ljust(-(-len(payload) // 4) * 4, b"\0")
    return body + zlib.crc32(body).to_bytes(4, "little")


class Firmware:
    """The slots of one controller."""

    def __init__(self, config: NvmeConfig, events: AsyncEvents) -> None:
        self._events = events
        self._longest_piece = config.longest_transfer
        self._slots: dict[int, str] = {1: config.firmware}
        self._active, self._next = 1, 0
        self._pieces: dict[int, bytes] = {}

    @property
    def revision(self) -> str:
        """What runs."""
        return self._slots[self._active]

    @property
    def waits_for_reset(self) -> bool:
        """An image will be activated by the next reset."""
        return bool(self._next)

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_FW_DOWNLOAD: self._download, lib.NVME_ADMIN_FW_COMMIT: self._commit}

    def reset(self) -> None:
        """A reset of the controller activates what waits for it; what was downloaded and not committed is gone."""
        self._pieces.clear()
        if self._next:
            self._active, self._next = self._next, 0

    def log(self) -> bytes:
        """The firmware slot information log."""
        page = ffi.new("struct nvme_fw_slot_log *")
        page.afi = self._active | self._next << 4
        for slot, revision in self._slots.items():
            page.frs[8 * (slot - 1) : 8 * slot] = revision.ljust(8).encode("ascii")
        return bytes(ffi.buffer(page))

    async def _download(self, command: Command) -> int:
        """Pieces in any order, which must not overlap (Base 5.13)."""
        size, offset = 4 * (command.cdw10 + 1), 4 * command.cdw11
        if size > self._longest_piece:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW10)
        if offset + size > _LONGEST:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW11)
        if any(at < offset + size and offset < at + len(piece) for at, piece in self._pieces.items()):
            raise AdminError(lib.NVME_SC_OVERLAPPING_RANGE, _BYTE_CDW11)
        self._pieces[offset] = await command.from_host(size)
        return 0

    def _commit(self, command: Command) -> int:
        """Base 5.12, figure 170: the actions."""
        slot = command.cdw10 & lib.NVME_FW_COMMIT_SLOT_MASK
        action = command.cdw10 >> lib.NVME_FW_COMMIT_ACTION_SHIFT & 7
        if action > lib.NVME_FW_COMMIT_ACTIVATE_NOW:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW10)
        if slot > FIRMWARE_SLOTS or (not slot and action == lib.NVME_FW_COMMIT_ACTIVATE):
            raise AdminError(lib.NVME_SC_FIRMWARE_SLOT, _BYTE_CDW10)
        slot = slot or self._free_slot()
        replaces = action in (lib.NVME_FW_COMMIT_REPLACE, lib.NVME_FW_COMMIT_REPLACE_ACTIVATE)
        if replaces or (action == lib.NVME_FW_COMMIT_ACTIVATE_NOW and self._pieces):
            self._slots[slot] = self._take_image()
        elif slot not in self._slots:
            raise AdminError(lib.NVME_SC_FIRMWARE_IMAGE, _BYTE_CDW10)
        if action == lib.NVME_FW_COMMIT_ACTIVATE_NOW:
            self._activate(slot)
        elif action != lib.NVME_FW_COMMIT_REPLACE:
            self._next = slot
        return 0

    def _free_slot(self) -> int:
        """The controller chooses: an empty slot, else one that does not run."""
        others = [slot for slot in range(1, FIRMWARE_SLOTS + 1) if slot != self._active]
        return next((slot for slot in others if slot not in self._slots), others[0])

    def _take_image(self) -> str:
        """The revision of what was downloaded, which is gone then. Raises Invalid Firmware Image."""
        image = b""
        for offset in sorted(self._pieces):
            image += self._pieces[offset] if offset == len(image) else b""
        whole = len(image) == sum(map(len, self._pieces.values()))
        self._pieces.clear()
        good = whole and len(image) >= 20 and image.startswith(_MAGIC)
        if not good or zlib.crc32(image[:-4]).to_bytes(4, "little") != image[-4:]:
            raise AdminError(lib.NVME_SC_FIRMWARE_IMAGE)
        revision = image[8:16]
        if not revision.isascii():
            raise AdminError(lib.NVME_SC_FIRMWARE_IMAGE)
        return revision.decode("ascii").rstrip()

    def _activate(self, slot: int) -> None:
        if self._events.enabled & lib.NVME_OAES_FW_ACT:
            self._events.post(lib.NVME_AER_NOTICE, lib.NVME_AER_NOTICE_FW_ACT_STARTING, lib.NVME_LOG_FW_SLOT)
        self._active, self._next = slot, 0
