"""Structures of NVMe: sizes and places that the specifications give."""

from __future__ import annotations

import pytest

from pvfio.abi import ffi, lib

SIZES = {
    "nvme_command": 64,
    "nvme_completion": 16,
    "nvme_sgl_desc": 16,
    "nvme_dsm_range": 16,
    "nvme_copy_range": 32,
    "nvme_pi_tuple": 8,
    "nvme_id_power_state": 32,
    "nvme_id_ctrl": 4096,
    "nvme_lbaf": 4,
    "nvme_id_ns": 4096,
    "nvme_ns_id_desc": 4,
    "nvme_id_ctrl_nvm": 4096,
    "nvme_id_ns_indep": 4096,
    "nvme_error_log_entry": 64,
    "nvme_smart_log": 512,
    "nvme_fw_slot_log": 512,
    "nvme_effects_log": 4096,
    "nvme_self_test_result": 28,
    "nvme_self_test_log": 564,
    "nvme_sanitize_log": 512,
}
OFFSETS = {
    # NVMe Base 2.0c figure 275
    "nvme_id_ctrl": {
        "vid": 0, "sn": 4, "mn": 24, "fr": 64, "rab": 72, "ieee": 73, "cmic": 76, "mdts": 77, "cntlid": 78,
        "ver": 80, "rtd3r": 84, "rtd3e": 88, "oaes": 92, "ctratt": 96, "rrls": 100, "cntrltype": 111,
        "fguid": 112, "crdt1": 128, "nvmsr": 253, "vwci": 254, "mec": 255, "oacs": 256, "acl": 258, "aerl": 259,
        "frmw": 260, "lpa": 261, "elpe": 262, "npss": 263, "avscc": 264, "apsta": 265, "wctemp": 266,
        "cctemp": 268, "mtfa": 270, "hmpre": 272, "hmmin": 276, "tnvmcap": 280, "unvmcap": 296, "rpmbs": 312,
        "edstt": 316, "dsto": 318, "fwug": 319, "kas": 320, "hctma": 322, "mntmt": 324, "mxtmt": 326,
        "sanicap": 328, "hmminds": 332, "hmmaxd": 336, "nsetidmax": 338, "endgidmax": 340, "anatt": 342,
        "anacap": 343, "anagrpmax": 344, "nanagrpid": 348, "pels": 352, "domainid": 356, "megcap": 368,
        "sqes": 512, "cqes": 513, "maxcmd": 514, "nn": 516, "oncs": 520, "fuses": 522, "fna": 524, "vwc": 525,
        "awun": 526, "awupf": 528, "icsvscc": 530, "nwpc": 531, "acwu": 532, "ocfs": 534, "sgls": 536,
        "mnan": 540, "maxdna": 544, "maxcna": 560, "subnqn": 768, "ioccsz": 1792, "psd": 2048, "vs": 3072,
    },
    # NVM 1.0c figure 97
    "nvme_id_ns": {
        "nsze": 0, "ncap": 8, "nuse": 16, "nsfeat": 24, "nlbaf": 25, "flbas": 26, "mc": 27, "dpc": 28, "dps": 29,
        "nmic": 30, "rescap": 31, "fpi": 32, "dlfeat": 33, "nawun": 34, "nabspf": 44, "noiob": 46, "nvmcap": 48,
        "npwg": 64, "npwa": 66, "npdg": 68, "npda": 70, "nows": 72, "mssrl": 74, "mcl": 76, "msrc": 80,
        "anagrpid": 92, "nsattr": 99, "nvmsetid": 100, "endgid": 102, "nguid": 104, "eui64": 120, "lbaf": 128,
        "vs": 384,
    },
    # NVMe Base 2.0c figure 280
    "nvme_id_ns_indep": {
        "nsfeat": 0, "nmic": 1, "rescap": 2, "fpi": 3, "anagrpid": 4, "nsattr": 8, "nvmsetid": 10, "endgid": 12,
        "nstat": 14,
    },
    # NVMe Base 2.0c figure 207
    "nvme_smart_log": {
        "critical_warning": 0, "temperature": 1, "avail_spare": 3, "percent_used": 5, "data_units_read": 32,
        "data_units_written": 48, "host_reads": 64, "host_writes": 80, "ctrl_busy_time": 96, "power_cycles": 112,
        "power_on_hours": 128, "unsafe_shutdowns": 144, "media_errors": 160, "num_err_log_entries": 176,
        "warning_temp_time": 192, "critical_comp_time": 196, "temp_sensor": 200, "thm_temp1_trans_count": 216,
    },
    # NVMe Base 2.0c figure 206
    "nvme_error_log_entry": {
        "error_count": 0, "sqid": 8, "cmdid": 10, "status_field": 12, "parm_error_location": 14, "lba": 16,
        "nsid": 24, "vs": 28, "trtype": 29, "cs": 32, "trtype_spec_info": 40,
    },
    # NVMe Base 2.0c figures 87 and 92
    "nvme_command": {"cid": 2, "nsid": 4, "metadata": 16, "prp1": 24, "prp2": 32, "cdw10": 40, "cdw15": 60},
    "nvme_completion": {"result": 0, "sq_head": 8, "sq_id": 10, "cid": 12, "status": 14},
    "nvme_self_test_result": {"seg": 1, "vdi": 2, "poh": 4, "nsid": 12, "flba": 16, "sct": 24, "sc": 25},
    "nvme_sanitize_log": {"sprog": 0, "sstat": 2, "scdw10": 4, "eto": 8, "etcend": 28},
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    assert ffi.sizeof(f"struct {name}") == SIZES[name]


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets(name: str) -> None:
    found = {field: ffi.offsetof(f"struct {name}", field) for field in OFFSETS[name]}
    assert found == OFFSETS[name]


def test_every_structure_is_measured() -> None:
    declared = {name for name in ffi.list_types()[1] if name.startswith("nvme_")}
    assert declared == SIZES.keys()


def test_registers() -> None:
    assert (lib.NVME_REG_CC, lib.NVME_REG_CSTS, lib.NVME_REG_AQA, lib.NVME_REG_ASQ, lib.NVME_REG_ACQ) == (
        0x14,
        0x1C,
        0x24,
        0x28,
        0x30,
    )


# NVMe Base 2.0c figures 94, 95 and 97: SCT and SC.
STATUSES = {
    "INVALID_OPCODE": 0x001, "INVALID_FIELD": 0x002, "DATA_XFER_ERROR": 0x004, "INTERNAL": 0x006, "ABORT_REQ": 0x007,
    "ABORT_QUEUE": 0x008, "INVALID_NS": 0x00B, "CMD_SEQ_ERROR": 0x00C, "PRP_INVALID_OFFSET": 0x013,
    "KAT_EXPIRED": 0x019, "KAT_INVALID": 0x01A, "SANITIZE_FAILED": 0x01C, "SANITIZE_IN_PROGRESS": 0x01D,
    "NS_WRITE_PROTECTED": 0x020, "LBA_RANGE": 0x080, "FORMAT_IN_PROGRESS": 0x084, "CQ_INVALID": 0x100,
    "QID_INVALID": 0x101, "QUEUE_SIZE": 0x102, "ABORT_LIMIT": 0x103, "ASYNC_LIMIT": 0x105, "INVALID_VECTOR": 0x108,
    "INVALID_LOG_PAGE": 0x109, "INVALID_FORMAT": 0x10A, "FW_NEEDS_RESET": 0x111, "NS_INSUFFICIENT_CAP": 0x115,
    "SELF_TEST_IN_PROGRESS": 0x11D, "INVALID_IO_CMD_SET": 0x12C, "INVALID_PI": 0x181, "READ_ONLY": 0x182,
    "CMD_SIZE_LIMIT_EXCEEDED": 0x183, "WRITE_FAULT": 0x280, "READ_ERROR": 0x281, "GUARD_CHECK": 0x282,
    "COMPARE_FAILED": 0x285, "HOST_ABORTED_CMD": 0x371,
}  # fmt: skip


@pytest.mark.parametrize("name", STATUSES)
def test_status_codes(name: str) -> None:
    assert getattr(lib, f"NVME_SC_{name}") == STATUSES[name]
