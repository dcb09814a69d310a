"""Get Features and Set Features: current, default and saved values, capabilities (NVMe Base 2.0c 5.15 and 5.27).

A feature is a word for each of its keys (a namespace, a vector, a sensor), or a structure. What each means is in
feature_table.py. A reset of the controller brings back the saved value, or the default. Not modelled: features of
power states, host memory, directives, NVM sets and reservations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pvfio.abi import lib
from pvfio.devices.nvme.admin import AdminError, Command

if TYPE_CHECKING:
    from pvfio.devices.nvme.admin import Handler
    from pvfio.devices.nvme.namespaces import Namespaces

__all__ = ["Feature", "Features", "Structure"]

_ALL: Final[int] = lib.NVME_NSID_ALL
_BYTE_NSID, _BYTE_CDW10, _BYTE_SELECT, _BYTE_CDW11 = 4, 40, 41, 44


def _no_key(command: Command, setting: bool) -> tuple[int, ...]:
    return (0,)


def _zero(key: int) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A feature in CDW11.

    ``mask``: bits that may be set. ``keys``: which values a command is about. ``apply`` checks (raising ``AdminError``)
    and does what a new value of a key orders; it returns the value to keep. ``supported``: the controller has it now.
    ``persistent``: a reset of the controller does not change it.
    """

    mask: int
    default: Callable[[int], int] = _zero
    saveable: bool = False
    per_namespace: bool = False
    persistent: bool = False
    keys: Callable[[Command, bool], tuple[int, ...]] = _no_key
    apply: Callable[[int, int], int] = lambda key, value: value
    supported: Callable[[], bool] = lambda: True
    result: Callable[[int], int] | None = None
    """What Set Features answers, from the value it keeps; None: zero."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A feature in a data buffer. ``size``: its bytes, by the command."""

    size: Callable[[Command], int]
    get: Callable[[Command], bytes]
    set: Callable[[Command, bytes], None]
    default: Callable[[Command], bytes]
    reset: Callable[[], None]


class Features:
    """The features of one controller. ``table`` is filled by feature_table.py."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self.table: dict[int, Feature | Structure] = {}
        self._current: dict[tuple[int, int], int] = {}
        self._saved: dict[tuple[int, int], int] = {}

    def handlers(self) -> dict[int, Handler]:
        """Opcodes of this module."""
        return {lib.NVME_ADMIN_GET_FEATURES: self._get, lib.NVME_ADMIN_SET_FEATURES: self._set}

    def add(self, features: dict[int, Feature | Structure]) -> None:
        """Features by their identifiers."""
        self.table.update({int(fid): feature for fid, feature in features.items()})

    def value(self, fid: int, key: int = 0) -> int:
        """The current value."""
        feature = self.table[fid]
        assert isinstance(feature, Feature)
        return self._current.get((fid, key), self._initial(fid, feature, key))

    def put(self, fid: int, key: int, value: int) -> None:
        """Another value, by other ways than the command."""
        self._current[int(fid), key] = value

    def reset(self) -> None:
        """After a reset of the controller (Base 3.7.2): saved values, else defaults, where they do not persist."""
        for fid, feature in self.table.items():
            if isinstance(feature, Structure):
                feature.reset()
            elif not feature.persistent:
                for key in [key for number, key in self._current if number == fid]:
                    del self._current[fid, key]
        for (fid, key), value in self._saved.items():
            feature = self.table[fid]
            assert isinstance(feature, Feature)
            self._current[fid, key] = feature.apply(key, value)

    def forget(self, nsid: int) -> None:
        """A namespace was deleted: what its features were goes with it."""
        for values in (self._current, self._saved):
            for fid, key in list(values):
                feature = self.table[fid]
                if key == nsid and isinstance(feature, Feature) and feature.per_namespace:
                    del values[fid, key]

    def _initial(self, fid: int, feature: Feature, key: int) -> int:
        return self._saved.get((fid, key), feature.default(key))

    def _find(self, command: Command) -> Feature | Structure:
        found = self.table.get(command.cdw10 & 0xFF)
        if found is None or (isinstance(found, Feature) and not found.supported()):
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW10)
        return found

    def _keys(self, command: Command, feature: Feature, *, setting: bool) -> tuple[int, ...]:
        """Base 5.27: a number of a namespace is for namespace specific features, and all of them only to be set."""
        nsid = command.nsid
        if not feature.per_namespace:
            if setting and nsid not in (0, _ALL):
                raise AdminError(lib.NVME_SC_FEATURE_NOT_PER_NS, _BYTE_NSID)
            return feature.keys(command, setting)
        if nsid == _ALL and setting:
            return tuple(n.nsid for n in self._namespaces.by_nsid.values() if n.attached)
        self._namespaces.active(nsid)
        return (nsid,)

    async def _get(self, command: Command) -> int:
        feature = self._find(command)
        fid, select = command.cdw10 & 0xFF, command.cdw10 >> lib.NVME_FEAT_SEL_SHIFT & 7
        if select > lib.NVME_FEAT_SEL_SUPPORTED:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_SELECT)
        if select == lib.NVME_FEAT_SEL_SUPPORTED:
            return self._capabilities(feature)
        if isinstance(feature, Structure):
            current = select == lib.NVME_FEAT_SEL_CURRENT
            await command.to_host(feature.get(command) if current else feature.default(command))
            return 0
        key = self._keys(command, feature, setting=False)[0]
        if select == lib.NVME_FEAT_SEL_CURRENT:
            return self.value(fid, key)
        return (
            feature.default(key) if select == lib.NVME_FEAT_SEL_DEFAULT else self._initial(fid, feature, key)
        )

    def _capabilities(self, feature: Feature | Structure) -> int:
        """Base 5.15, figure 185."""
        result = int(lib.NVME_FEAT_CAP_CHANGEABLE)
        if isinstance(feature, Feature):
            result |= lib.NVME_FEAT_CAP_SAVEABLE * feature.saveable
            result |= lib.NVME_FEAT_CAP_PER_NS * feature.per_namespace
        return result

    async def _set(self, command: Command) -> int:
        feature = self._find(command)
        fid, save = command.cdw10 & 0xFF, bool(command.cdw10 & lib.NVME_FEAT_SAVE)
        if save and not (isinstance(feature, Feature) and feature.saveable):
            raise AdminError(lib.NVME_SC_FEATURE_NOT_SAVEABLE, _BYTE_CDW10 + 3)
        if isinstance(feature, Structure):
            if command.nsid not in (0, _ALL):
                raise AdminError(lib.NVME_SC_FEATURE_NOT_PER_NS, _BYTE_NSID)
            feature.set(command, await command.from_host(feature.size(command)))
            return 0
        keys = self._keys(command, feature, setting=True)
        if command.cdw11 & ~feature.mask:
            raise AdminError(lib.NVME_SC_INVALID_FIELD, _BYTE_CDW11)
        value = command.cdw11
        for key in keys:
            value = self._current[fid, key] = feature.apply(key, command.cdw11)
            if save:
                self._saved[fid, key] = value
        return feature.result(value) if feature.result else 0
