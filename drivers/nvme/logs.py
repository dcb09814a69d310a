"""Log pages as dataclasses (NVMe Base 2.0c 5.16.1). Fields have the names of abi/nvme.h, which are nvme-cli's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pvfio.abi import ffi, lib
from pvfio.drivers.nvme.errors import status_name

__all__ = [
    "EffectsLog",
    "ErrorLogEntry",
    "FirmwareLog",
    "SanitizeLog",
    "SelfTestLog",
    "SelfTestResult",
    "SmartLog",
]

_COUNTERS: Final = (
    "data_units_read",
    "data_units_written",
    "host_reads",
    "host_writes",
    "ctrl_busy_time",
    "power_cycles",
    "power_on_hours",
    "unsafe_shutdowns",
    "media_errors",
    "num_err_log_entries",
)
_FW_SLOTS: Final = 7


@dataclass(frozen=True, slots=True)
class SmartLog:
    """SMART / health information (5.16.1.3). ``temperature`` in kelvins, ``data_units_*`` in thousands of 512 bytes,
    ``ctrl_busy_time`` in minutes.
    """

    critical_warning: int
    temperature: int
    avail_spare: int
    spare_thresh: int
    percent_used: int
    data_units_read: int
    data_units_written: int
    host_reads: int
    host_writes: int
    ctrl_busy_time: int
    power_cycles: int
    power_on_hours: int
    unsafe_shutdowns: int
    media_errors: int
    num_err_log_entries: int
    warning_temp_time: int
    critical_comp_time: int
    temp_sensors: tuple[int, ...]

    @classmethod
    def parse(cls, page: bytes) -> SmartLog:
        """A page of 512 bytes."""
        log = ffi.from_buffer("struct nvme_smart_log *", page)
        counters = {name: int.from_bytes(bytes(getattr(log, name)), "little") for name in _COUNTERS}
        return cls(
            critical_warning=log.critical_warning,
            temperature=log.temperature,
            avail_spare=log.avail_spare,
            spare_thresh=log.spare_thresh,
            percent_used=log.percent_used,
            warning_temp_time=log.warning_temp_time,
            critical_comp_time=log.critical_comp_time,
            temp_sensors=tuple(log.temp_sensor),
            **counters,
        )


@dataclass(frozen=True, slots=True)
class ErrorLogEntry:
    """An entry of the error information log (5.16.1.2). ``status`` without its phase tag, ``parm_error_location``
    ``None`` where no field of the command was wrong.
    """

    error_count: int
    sqid: int
    cmdid: int
    status: int
    parm_error_location: int | None
    lba: int
    nsid: int

    @property
    def name(self) -> str:
        """The status's name."""
        return status_name(self.status)

    @classmethod
    def parse(cls, page: bytes) -> list[ErrorLogEntry]:
        """The entries that are there, newest first."""
        entries: Any = ffi.from_buffer("struct nvme_error_log_entry[]", page)
        return [
            cls(
                error_count=entry.error_count,
                sqid=entry.sqid,
                cmdid=entry.cmdid,
                status=entry.status_field >> int(lib.NVME_CQE_STATUS_SHIFT),
                parm_error_location=(
                    None
                    if entry.parm_error_location == lib.NVME_ERROR_LOCATION_NONE
                    else entry.parm_error_location
                ),
                lba=entry.lba,
                nsid=entry.nsid,
            )
            for entry in entries
            if entry.error_count
        ]


@dataclass(frozen=True, slots=True)
class FirmwareLog:
    """Firmware slots (5.16.1.4): the active one, the one after the next reset (0: the same), revisions by slot."""

    active: int
    next: int
    revisions: dict[int, str]

    @classmethod
    def parse(cls, page: bytes) -> FirmwareLog:
        """A page of 512 bytes."""
        log = ffi.from_buffer("struct nvme_fw_slot_log *", page)
        texts = bytes(log.frs)
        slots = {slot: texts[8 * (slot - 1) : 8 * slot] for slot in range(1, _FW_SLOTS + 1)}
        revisions = {slot: text.decode("ascii", "replace").rstrip(" \0") for slot, text in slots.items()}
        return cls(log.afi & 7, log.afi >> 4 & 7, {slot: text for slot, text in revisions.items() if text})


@dataclass(frozen=True, slots=True)
class EffectsLog:
    """Commands supported and effects (5.16.1.6): NVME_CMD_EFFECTS_* by opcode, of those that are supported."""

    admin: dict[int, int]
    io: dict[int, int]

    @classmethod
    def parse(cls, page: bytes) -> EffectsLog:
        """A page of 4096 bytes."""
        log = ffi.from_buffer("struct nvme_effects_log *", page)
        both = [{i: word for i, word in enumerate(words) if word & 1} for words in (log.acs, log.iocs)]
        return cls(*both)


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """One self-test that was run: NVME_SELF_TEST_* and NVME_SELF_TEST_RESULT_*."""

    code: int
    result: int
    power_on_hours: int
    segment: int
    nsid: int | None
    lba: int | None


@dataclass(frozen=True, slots=True)
class SelfTestLog:
    """Device self-test (5.16.1.7): what runs now (0: nothing), how far it is in percent, results, newest first."""

    current: int
    percent: int
    results: tuple[SelfTestResult, ...]

    @classmethod
    def parse(cls, page: bytes) -> SelfTestLog:
        """A page of 564 bytes."""
        log = ffi.from_buffer("struct nvme_self_test_log *", page)
        results = tuple(
            SelfTestResult(
                code=r.dsts >> 4,
                result=r.dsts & 0xF,
                power_on_hours=r.poh,
                segment=r.seg,
                nsid=r.nsid if r.vdi & 1 else None,
                lba=r.flba if r.vdi & 2 else None,
            )
            for r in log.result
            if r.dsts & 0xF != lib.NVME_SELF_TEST_RESULT_UNUSED
        )
        return cls(log.current_operation & 0xF, log.completion & 0x7F, results)


@dataclass(frozen=True, slots=True)
class SanitizeLog:
    """Sanitize status (5.16.1.20): NVME_SSTAT_* and how far it is, from 0 to 1."""

    status: int
    progress: float
    erased: bool

    @classmethod
    def parse(cls, page: bytes) -> SanitizeLog:
        """A page of 512 bytes."""
        log = ffi.from_buffer("struct nvme_sanitize_log *", page)
        return cls(log.sstat & 7, min(1.0, log.sprog / 65535), bool(log.sstat & lib.NVME_SSTAT_GLOBAL_ERASED))
