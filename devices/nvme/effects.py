"""What commands and features touch: the Commands Supported and Effects log and the one for features (NVMe Base 2.0c
5.16.1.6 and 5.16.1.18).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from pvfio.abi import ffi, lib

if TYPE_CHECKING:
    from pvfio.devices.nvme.features import Feature, Structure

__all__ = ["command_effects", "feature_effects"]

SCOPE_NAMESPACE: Final = 1 << 20
SCOPE_CONTROLLER: Final = 1 << 21
SCOPE_SUBSYSTEM: Final = 1 << 25
_CSUPP: Final[int] = lib.NVME_CMD_EFFECTS_CSUPP
_LBCC: Final[int] = lib.NVME_CMD_EFFECTS_LBCC
_NCC: Final[int] = lib.NVME_CMD_EFFECTS_NCC
_NIC: Final[int] = lib.NVME_CMD_EFFECTS_NIC
_CCC: Final[int] = lib.NVME_CMD_EFFECTS_CCC
_ALONE_IN_NAMESPACE: Final[int] = 1 << lib.NVME_CMD_EFFECTS_CSE_SHIFT
_ALONE: Final[int] = 2 << lib.NVME_CMD_EFFECTS_CSE_SHIFT

_ADMIN: Final[dict[int, int]] = {
    lib.NVME_ADMIN_FORMAT_NVM: SCOPE_NAMESPACE | _LBCC | _NCC | _ALONE_IN_NAMESPACE,
    lib.NVME_ADMIN_SANITIZE: SCOPE_SUBSYSTEM | _LBCC | _ALONE,
    lib.NVME_ADMIN_NS_MGMT: SCOPE_SUBSYSTEM | _NIC,
    lib.NVME_ADMIN_NS_ATTACH: SCOPE_NAMESPACE | SCOPE_CONTROLLER | _NIC,
    lib.NVME_ADMIN_FW_COMMIT: SCOPE_SUBSYSTEM | _CCC,
    lib.NVME_ADMIN_FW_DOWNLOAD: SCOPE_SUBSYSTEM,
    lib.NVME_ADMIN_SELF_TEST: SCOPE_SUBSYSTEM,
    lib.NVME_ADMIN_SET_FEATURES: SCOPE_CONTROLLER | SCOPE_NAMESPACE | _CCC,
}
_IO: Final[dict[int, int]] = {
    lib.NVME_CMD_FLUSH: 0,
    lib.NVME_CMD_WRITE: _LBCC,
    lib.NVME_CMD_READ: 0,
    lib.NVME_CMD_WRITE_UNCOR: _LBCC,
    lib.NVME_CMD_COMPARE: 0,
    lib.NVME_CMD_WRITE_ZEROES: _LBCC,
    lib.NVME_CMD_DSM: _LBCC,
    lib.NVME_CMD_VERIFY: 0,
    lib.NVME_CMD_COPY: _LBCC,
}


def command_effects(admin: Iterable[int]) -> bytes:
    """The log for these admin opcodes and the NVM command set.

    I/O commands report no scope, which a controller need not: Linux calls any bit but the two lowest unusual there.
    """
    page = ffi.new("struct nvme_effects_log *")
    for opcode in admin:
        page.acs[opcode] = _CSUPP | _ADMIN.get(opcode, SCOPE_CONTROLLER)
    for opcode, effects in _IO.items():
        page.iocs[opcode] = _CSUPP | effects
    return bytes(ffi.buffer(page))


def feature_effects(table: Mapping[int, Feature | Structure]) -> bytes:
    """The log for these features: a word each."""
    words = ffi.new("uint32_t[]", 1024)
    for fid, feature in table.items():
        scope = SCOPE_NAMESPACE if getattr(feature, "per_namespace", False) else SCOPE_CONTROLLER
        words[fid] = _CSUPP | scope
    words[lib.NVME_FEAT_WRITE_PROTECT] |= _NCC
    words[lib.NVME_FEAT_VOLATILE_WC] |= _CCC
    return bytes(ffi.buffer(words))
