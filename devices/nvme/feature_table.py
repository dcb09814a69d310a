"""What each feature means: its bits, its default, what a new value does (NVMe Base 2.0c 5.27.1, NVM 4.1.3)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import lib
from pvfio.devices.nvme.admin import AdminError, Command
from pvfio.devices.nvme.features import Feature, Features, Structure
from pvfio.devices.nvme.health import OVER, SENSORS, UNDER

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin_queues import QueueCommands
    from pvfio.devices.nvme.config import NvmeConfig
    from pvfio.devices.nvme.events import AsyncEvents
    from pvfio.devices.nvme.health import Health
    from pvfio.devices.nvme.keep_alive import KeepAlive
    from pvfio.devices.nvme.namespaces import Namespaces
    from pvfio.devices.nvme.registers import Registers

__all__ = ["EVENTS", "UNTIL_POWER_CYCLE", "FeatureTable"]

_BYTE_CDW11 = 44
_BURST: Final = 7  # no limit
EVENTS: Final[int] = 0x1F | lib.NVME_OAES_NS_ATTR | lib.NVME_OAES_FW_ACT
"""Bits of feature 0Bh: the critical warnings, and what OAES offers."""
_SENSOR_SHIFT, _SIDE_SHIFT, _ALL_SENSORS = 16, 20, 15
_BEHAVIOR_SIZE: Final = 512
UNTIL_POWER_CYCLE, _PERMANENT = 2, 3
"""States of feature 84h, after no protection and protection (Base 5.27.1.29)."""


def _invalid(byte: int = _BYTE_CDW11) -> AdminError:
    return AdminError(lib.NVME_SC_INVALID_FIELD, byte)


class FeatureTable:
    """Fills a controller's features."""

    def __init__(
        self,
        config: NvmeConfig,
        nvme: Any,
        *,
        registers: Registers,
        queues: QueueCommands,
        namespaces: Namespaces,
        events: AsyncEvents,
        health: Health,
        keep_alive: KeepAlive,
    ) -> None:
        self._config = config
        self._nvme = nvme
        self._registers = registers
        self._queues = queues
        self._namespaces = namespaces
        self._events = events
        self._health = health
        self._keep_alive = keep_alive
        self._reset_structures()

    def fill(self, features: Features) -> None:
        """Every feature the controller has."""
        features.add(self._controller())
        features.add(self._interrupts())
        features.add(self._nvm())
        features.add(self._structures())

    def _reset_structures(self) -> None:
        self._timestamp, self._timestamp_set, self._timestamp_since = 0, False, time.monotonic()
        self._host_id = bytes(16)
        self._behavior = bytes(_BEHAVIOR_SIZE)

    def _controller(self) -> dict[int, Feature | Structure]:
        return {
            lib.NVME_FEAT_ARBITRATION: Feature(
                mask=0xFFFFFF07, default=lambda _: _BURST, saveable=True, apply=self._arbitration
            ),
            # One power state; workload hints are kept.
            lib.NVME_FEAT_POWER_MGMT: Feature(mask=0xE0, saveable=True),
            lib.NVME_FEAT_TEMP_THRESH: Feature(
                mask=0x3FFFFF,
                default=self._health.default_threshold,
                saveable=True,
                keys=_sensors,
                apply=lambda key, value: self._health.set_threshold(key, value & 0xFFFF),
            ),
            lib.NVME_FEAT_NUM_QUEUES: Feature(
                mask=0xFFFFFFFF,
                default=lambda _: self._queues.offered,
                apply=lambda _, value: self._queues.grant(value),
                result=lambda value: value,
            ),
            lib.NVME_FEAT_ASYNC_EVENT: Feature(mask=EVENTS, saveable=True, apply=self._events_enabled),
            lib.NVME_FEAT_KATO: Feature(
                mask=0xFFFFFFFF, apply=lambda _, value: self._keep_alive.set_timeout(value)
            ),
            lib.NVME_FEAT_IOCS_PROFILE: Feature(
                mask=0x1FF, apply=_profile, supported=lambda: self._registers.all_command_sets
            ),
            # Across resets and power cycles until the driver clears it (Base 5.27.1.23).
            lib.NVME_FEAT_SW_PROGRESS: Feature(mask=0xFF, saveable=True, persistent=True),
        }

    def _interrupts(self) -> dict[int, Feature | Structure]:
        return {
            lib.NVME_FEAT_IRQ_COALESCE: Feature(mask=0xFFFF, saveable=True, apply=self._coalescing),
            lib.NVME_FEAT_IRQ_CONFIG: Feature(
                mask=0x1FFFF,
                default=lambda key: key,
                saveable=True,
                keys=self._vector,
                apply=self._vector_off,
            ),
        }

    def _nvm(self) -> dict[int, Feature | Structure]:
        return {
            # Deallocated blocks are never errors here, so DULBE cannot be asked for (NVM 4.1.3.2).
            lib.NVME_FEAT_ERR_RECOVERY: Feature(mask=0xFFFF, saveable=True, per_namespace=True),
            lib.NVME_FEAT_VOLATILE_WC: Feature(
                mask=1,
                default=lambda _: 1,
                saveable=True,
                apply=self._write_cache,
                supported=lambda: self._namespaces.volatile,
            ),
            lib.NVME_FEAT_WRITE_ATOMIC: Feature(mask=1, saveable=True),
            lib.NVME_FEAT_WRITE_PROTECT: Feature(
                mask=7, per_namespace=True, persistent=True, apply=self._write_protect
            ),
        }

    def _structures(self) -> dict[int, Feature | Structure]:
        return {
            lib.NVME_FEAT_TIMESTAMP: Structure(
                size=lambda _: 8,
                get=lambda _: self._get_timestamp(),
                set=self._set_timestamp,
                default=lambda _: bytes(8),
                reset=self._reset_structures,
            ),
            lib.NVME_FEAT_HOST_BEHAVIOR: Structure(
                size=lambda _: _BEHAVIOR_SIZE,
                get=lambda _: self._behavior,
                set=self._set_behavior,
                default=lambda _: bytes(_BEHAVIOR_SIZE),
                reset=self._reset_structures,
            ),
            lib.NVME_FEAT_HOST_ID: Structure(
                size=_host_id_size,
                get=lambda command: self._host_id[: _host_id_size(command)],
                set=self._set_host_id,
                default=lambda command: bytes(_host_id_size(command)),
                reset=self._reset_structures,
            ),
        }

    def _arbitration(self, _key: int, value: int) -> int:
        low, medium, high = (value >> shift & 0xFF for shift in (8, 16, 24))
        lib.pv_nvme_set_arbitration(self._nvme, value & 7, low, medium, high)
        return value

    def _events_enabled(self, _key: int, value: int) -> int:
        self._events.enabled = value
        self._health.look()
        return value

    def _coalescing(self, _key: int, value: int) -> int:
        lib.pv_nvme_set_coalescing(self._nvme, value & 0xFF, value >> 8)
        return value

    def _vector(self, command: Command, _setting: bool) -> tuple[int, ...]:
        vector = command.cdw11 & 0xFFFF
        if vector >= self._config.vector_count:
            raise _invalid()
        return (vector,)

    def _vector_off(self, key: int, value: int) -> int:
        lib.pv_nvme_set_vector_coalescing(self._nvme, key, not value >> 16)
        return value

    def _write_cache(self, _key: int, value: int) -> int:
        lib.pv_nvme_set_write_cache(self._nvme, value)
        return value

    def _write_protect(self, nsid: int, value: int) -> int:
        """Base 8.12: the last two states are left by a power cycle, or never."""
        found = self._namespaces.by_nsid[nsid]
        if value > _PERMANENT:
            raise _invalid()
        if found.protection_state >= UNTIL_POWER_CYCLE and value != found.protection_state:
            raise AdminError(lib.NVME_SC_FEATURE_NOT_CHANGEABLE, _BYTE_CDW11)
        self._namespaces.protect(nsid, value)
        return value

    def _get_timestamp(self) -> bytes:
        """Base 5.27.1.14: milliseconds that go on by themselves, and whether the host set them."""
        now = self._timestamp + int((time.monotonic() - self._timestamp_since) * 1000)
        return (now & (1 << 48) - 1).to_bytes(6, "little") + bytes([2 * self._timestamp_set, 0])

    def _set_timestamp(self, _command: Command, data: bytes) -> None:
        self._timestamp = int.from_bytes(data[:6], "little")
        self._timestamp_set, self._timestamp_since = True, time.monotonic()

    def _set_behavior(self, _command: Command, data: bytes) -> None:
        """Base 5.27.1.18. Only the first byte (ACRE) means anything here: the others ask for what is not offered."""
        if data[0] > 1 or any(data[1:]):
            raise AdminError(lib.NVME_SC_INVALID_FIELD)
        self._behavior = data

    def _set_host_id(self, command: Command, data: bytes) -> None:
        self._host_id = data.ljust(16, b"\0")


def _sensors(command: Command, setting: bool) -> tuple[int, ...]:
    """Base 5.27.1.3: a sensor and a side; all sensors may only be set."""
    sensor, side = command.cdw11 >> _SENSOR_SHIFT & 15, command.cdw11 >> _SIDE_SHIFT & 3
    if side not in (OVER, UNDER):
        raise _invalid(_BYTE_CDW11 + 2)
    if sensor == _ALL_SENSORS and setting:
        return tuple(sensor << 1 | side for sensor in range(SENSORS + 1))
    if sensor > SENSORS:
        raise _invalid(_BYTE_CDW11 + 2)
    return (sensor << 1 | side,)


def _profile(_key: int, value: int) -> int:
    """Base 5.27.1.21: the one combination is number 0."""
    if value:
        raise AdminError(lib.NVME_SC_IOCS_COMBINATION_REJECTED, _BYTE_CDW11)
    return value


def _host_id_size(command: Command) -> int:
    """EXHID: 128 bits instead of 64 (Base 5.27.1.25)."""
    return 16 if command.cdw11 & 1 else 8
