"""Identify Controller (NVMe Base 2.0c figure 275): what the controller offers, and its limits."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import ffi, lib
from pvfio.devices.nvme.events import LIMIT
from pvfio.devices.nvme.health import CRITICAL_TEMPERATURE, WARNING_TEMPERATURE
from pvfio.devices.nvme.keep_alive import GRANULARITY

if TYPE_CHECKING:
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.namespaces import Namespaces

__all__ = ["ABORT_LIMIT", "CONTROLLER_ID", "FIRMWARE_SLOTS", "controller_page"]

CONTROLLER_ID: Final = 0
ABORT_LIMIT: Final = 4
FIRMWARE_SLOTS: Final = 3
_SUBSYSTEMS: Final = uuid.UUID("8a5a1f8e-3b1c-4b63-9d0c-70766669006e")
_OACS: Final[int] = lib.NVME_OACS_FORMAT | lib.NVME_OACS_FW | lib.NVME_OACS_NS_MGMT | lib.NVME_OACS_SELF_TEST
_ONCS: Final[int] = (
    lib.NVME_ONCS_COMPARE
    | lib.NVME_ONCS_WRITE_UNCOR
    | lib.NVME_ONCS_DSM
    | lib.NVME_ONCS_WRITE_ZEROES
    | lib.NVME_ONCS_SAVE_SELECT
    | lib.NVME_ONCS_TIMESTAMP
    | lib.NVME_ONCS_VERIFY
    | lib.NVME_ONCS_COPY
)


def controller_page(config: NvmeConfig, namespaces: Namespaces, firmware: str) -> bytes:
    """The structure. ``firmware``: the revision that runs."""
    page = ffi.new("struct nvme_id_ctrl *")
    page.vid = page.ssvid = config.vendor
    for name, length, value in (("sn", 20, config.serial), ("mn", 40, config.model), ("fr", 8, firmware)):
        setattr(page, name, value.ljust(length).encode("ascii"))
    page.rab = 5
    page.ieee = bytes.fromhex("005452")  # low byte first
    page.mdts = config.mdts_shift
    page.cntlid = CONTROLLER_ID
    page.ver = lib.NVME_VS_2_0
    page.oaes = lib.NVME_OAES_NS_ATTR | lib.NVME_OAES_FW_ACT
    page.ctratt = lib.NVME_CTRATT_128_ID
    page.cntrltype = lib.NVME_CNTRLTYPE_IO
    page.sqes, page.cqes = 0x66, 0x44
    page.nn = config.max_namespaces
    ffi.buffer(page.tnvmcap)[:] = namespaces.capacity.to_bytes(16, "little")
    ffi.buffer(page.unvmcap)[:] = namespaces.unallocated.to_bytes(16, "little")
    name = f"nqn.2014-08.org.nvmexpress:uuid:{uuid.uuid5(_SUBSYSTEMS, config.serial)}"
    ffi.buffer(page.subnqn)[: len(name)] = name.encode("ascii")
    page.psd[0].max_power = 2500
    _admin(page, config)
    _nvm(page, namespaces)
    return bytes(ffi.buffer(page))


def _admin(page: Any, config: NvmeConfig) -> None:
    """The admin command set's attributes."""
    page.oacs = _OACS | lib.NVME_OACS_DBBUF * config.shadow_doorbells
    page.acl = ABORT_LIMIT - 1
    page.aerl = LIMIT - 1
    page.frmw = FIRMWARE_SLOTS << lib.NVME_FRMW_SLOTS_SHIFT | lib.NVME_FRMW_NO_RESET
    page.lpa = lib.NVME_LPA_EFFECTS | lib.NVME_LPA_EXTENDED | lib.NVME_LPA_SUPPORTED_PAGES
    page.elpe = lib.PV_NVME_ERRORS - 1
    page.wctemp, page.cctemp = WARNING_TEMPERATURE, CRITICAL_TEMPERATURE
    page.edstt = config.extended_test_minutes
    page.dsto = 1  # one self-test at a time
    page.fwug = 0xFF  # pieces of any size
    page.kas = GRANULARITY
    page.sanicap = (
        lib.NVME_SANICAP_CRYPTO
        | lib.NVME_SANICAP_BLOCK
        | lib.NVME_SANICAP_OVERWRITE
        | lib.NVME_SANICAP_NODMMAS
    )


def _nvm(page: Any, namespaces: Namespaces) -> None:
    """The NVM command set's attributes."""
    page.oncs = _ONCS
    page.fuses = lib.NVME_FUSES_COMPARE_WRITE
    page.fna = lib.NVME_FNA_CRYPTO
    page.vwc = lib.NVME_VWC_FLUSH_NO_BROADCAST | lib.NVME_VWC_PRESENT * namespaces.volatile
    page.nwpc = lib.NVME_NWPC_PROTECT | lib.NVME_NWPC_UNTIL_POWER_CYCLE | lib.NVME_NWPC_PERMANENT
    page.ocfs = lib.NVME_OCFS_FORMAT_0
    page.sgls = lib.NVME_SGLS_SUPPORTED | lib.NVME_SGLS_BIT_BUCKET | lib.NVME_SGLS_LARGER
