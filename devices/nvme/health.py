"""The health of the drive: temperature and thresholds, spare, counters, the SMART log (NVMe Base 2.0c 5.16.1.3).

Counters are of what happened; temperature, spare and wear are what the host says they are (``Health.set``). A critical
warning that appears is an asynchronous event where feature 0Bh asks for it; it is not sent again before it went away.
Not modelled: endurance groups, thermal management, the persistent memory region.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import ffi, lib

if TYPE_CHECKING:
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.events import AsyncEvents

__all__ = ["CRITICAL_TEMPERATURE", "WARNING_TEMPERATURE", "Health"]

WARNING_TEMPERATURE: Final = 343
CRITICAL_TEMPERATURE: Final = 353
_ROOM: Final = 313
_SPARE_THRESHOLD: Final = 10
_NO_LIMIT: Final = 0xFFFF
_EVENTS: Final[dict[int, int]] = {
    lib.NVME_SMART_SPARE: lib.NVME_AER_SMART_SPARE,
    lib.NVME_SMART_TEMPERATURE: lib.NVME_AER_SMART_TEMPERATURE,
    lib.NVME_SMART_DEGRADED: lib.NVME_AER_SMART_RELIABILITY,
    lib.NVME_SMART_READ_ONLY: lib.NVME_AER_SMART_RELIABILITY,
    lib.NVME_SMART_VOLATILE_MEMORY: lib.NVME_AER_SMART_RELIABILITY,
}
OVER, UNDER = 0, 1
SENSORS: Final = 1
"""Besides the composite temperature."""


class Health:
    """What a drive knows of itself. Temperatures in kelvins, spare and wear in percent."""

    def __init__(self, config: NvmeConfig, nvme: Any, events: AsyncEvents) -> None:
        self._config = config
        self._nvme = nvme
        self._events = events
        self._stats = ffi.new("struct pv_nvme_stats *")
        self._since = time.monotonic()
        self.temperature = _ROOM
        self.available_spare = 100
        self.percentage_used = 0
        self._warnings = 0
        self._seen = 0
        self._hot_since = self._since
        self._hot: list[float] = [0.0, 0.0]
        self.power_cycles = 1
        self.unsafe_shutdowns = 0
        self.thresholds: dict[int, int] = {}
        """By sensor << 1 | ``OVER`` or ``UNDER``; sensor 0 is the composite temperature."""

    @staticmethod
    def default_threshold(key: int) -> int:
        """Of feature 04h: Identify's WCTEMP for the composite temperature, else none (Base 5.27.1.3)."""
        if key & 1 == UNDER:
            return 0
        return WARNING_TEMPERATURE if key == OVER else _NO_LIMIT

    @property
    def power_on_hours(self) -> int:
        """Hours."""
        return self._config.power_on_hours + int((time.monotonic() - self._since) / 3600)

    @property
    def critical_warning(self) -> int:
        """The first byte of the log."""
        warning = self._warnings
        if self.available_spare < _SPARE_THRESHOLD:
            warning |= lib.NVME_SMART_SPARE
        if any(self._crossed(sensor) for sensor in range(SENSORS + 1)):
            warning |= lib.NVME_SMART_TEMPERATURE
        return warning

    def set(
        self,
        *,
        temperature: int | None = None,
        available_spare: int | None = None,
        percentage_used: int | None = None,
        degraded: bool | None = None,
        volatile_memory_failed: bool | None = None,
        read_only: bool | None = None,
    ) -> None:
        """The host's side: what has become of the drive. ``read_only``: the media went read-only, as far as the log
        says. Raises ``ValueError`` for numbers that cannot be.
        """
        for value, most in ((temperature, 0xFFFF), (available_spare, 100), (percentage_used, 255)):
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{value} is not between 0 and {most}")
        self._count_heat()
        self.temperature = self.temperature if temperature is None else temperature
        self.available_spare = self.available_spare if available_spare is None else available_spare
        self.percentage_used = self.percentage_used if percentage_used is None else percentage_used
        for bit, on in (
            (int(lib.NVME_SMART_DEGRADED), degraded),
            (int(lib.NVME_SMART_VOLATILE_MEMORY), volatile_memory_failed),
            (int(lib.NVME_SMART_READ_ONLY), read_only),
        ):
            if on is not None:
                self._warnings = self._warnings & ~bit | bit * on
        self.look()

    def look(self) -> None:
        """Sends events for the critical warnings that are new."""
        warning = self.critical_warning
        for bit, information in _EVENTS.items():
            if warning & ~self._seen & bit & self._events.enabled:
                self._events.post(lib.NVME_AER_SMART, information, lib.NVME_LOG_SMART)
        self._seen = warning & self._events.enabled

    def set_threshold(self, key: int, value: int) -> int:
        """Feature 04h."""
        self.thresholds[key] = value
        self.look()
        return value

    def reset(self) -> None:
        """A reset of the controller: thresholds are the defaults again, warnings are news again."""
        self.thresholds.clear()
        self._seen = 0

    def power_cycle(self, *, unsafe: bool) -> None:
        """Counts one."""
        self.power_cycles += 1
        self.unsafe_shutdowns += unsafe

    def _crossed(self, sensor: int) -> bool:
        over, under = (
            self.thresholds.get(sensor << 1 | side, self.default_threshold(sensor << 1 | side))
            for side in (OVER, UNDER)
        )
        return self.temperature >= over or self.temperature <= under

    def _count_heat(self) -> None:
        now = time.monotonic()
        if self.temperature >= WARNING_TEMPERATURE:
            self._hot[self.temperature >= CRITICAL_TEMPERATURE] += now - self._hot_since
        self._hot_since = now

    def log(self) -> bytes:
        """The SMART / Health Information log."""
        self._count_heat()
        stats = self._stats
        lib.pv_nvme_get_stats(self._nvme, stats)
        total = ffi.new("uint64_t *")
        lib.pv_nvme_errors(self._nvme, ffi.NULL, 0, total)
        page = ffi.new("struct nvme_smart_log *")
        page.critical_warning = self.critical_warning
        page.temperature = self.temperature
        page.avail_spare, page.spare_thresh = self.available_spare, _SPARE_THRESHOLD
        page.percent_used = self.percentage_used
        counters = {
            "data_units_read": -(-stats.read_bytes // lib.NVME_DATA_UNIT),
            "data_units_written": -(-stats.written_bytes // lib.NVME_DATA_UNIT),
            "host_reads": stats.reads,
            "host_writes": stats.writes,
            "ctrl_busy_time": stats.busy_ns // 60_000_000_000,
            "power_cycles": self.power_cycles,
            "power_on_hours": self.power_on_hours,
            "unsafe_shutdowns": self.unsafe_shutdowns,
            "media_errors": stats.media_errors,
            "num_err_log_entries": total[0],
        }
        for name, value in counters.items():
            ffi.buffer(getattr(page, name))[:] = int(value).to_bytes(16, "little")
        page.warning_temp_time, page.critical_comp_time = (int(seconds / 60) for seconds in self._hot)
        for sensor in range(SENSORS):
            page.temp_sensor[sensor] = self.temperature
        return bytes(ffi.buffer(page))
