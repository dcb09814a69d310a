"""Fault injection: commands that are late, lost, refused or corrupted, lost interrupts, fatal status, surprise removal.

A part of the device: a rule matches the bytes of a command where it is fetched, so a driver meets a fault where a real
one would come from. The rules are C's (inject.c); this names their fields. They change between two steps of the engine,
which these calls wait for: where it asks a vfio-user client for memory, as long as that takes, two seconds at most. So
call them from a worker thread there.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

from pvfio.abi import ffi, lib

__all__ = ["Fault", "FaultHooks", "Injection"]

Fault: TypeAlias = Literal["delay", "drop", "status", "corrupt", "lose_interrupt", "fatal", "vanish"]
"""Begin later; never complete (an abort finds it); end with a status, nothing done; flip a bit of the data of a read or
write and succeed; complete without the interrupt; controller fatal status; surprise removal."""

_ACTIONS: Final[dict[str, int]] = {
    "delay": lib.PV_NVME_INJECT_DELAY,
    "drop": lib.PV_NVME_INJECT_DROP,
    "status": lib.PV_NVME_INJECT_STATUS,
    "corrupt": lib.PV_NVME_INJECT_CORRUPT,
    "lose_interrupt": lib.PV_NVME_INJECT_LOSE_INTERRUPT,
    "fatal": lib.PV_NVME_INJECT_FATAL,
    "vanish": lib.PV_NVME_INJECT_VANISH,
}
_BITS: Final = {name: 8 * ffi.sizeof(field.type) for name, field in ffi.typeof("struct nvme_command").fields}
_STATUS: Final[int] = lib.NVME_SC_MASK | lib.NVME_STATUS_DNR


class Injection:
    """A rule that was made."""

    def __init__(self, nvme: Any, number: int) -> None:
        self._nvme = nvme
        self._number = number

    @property
    def count(self) -> int:
        """How many commands it acted on."""
        return int(lib.pv_nvme_injected(self._nvme, self._number))

    def clear(self) -> None:
        """Forgets the rule. What it dropped stays dropped."""
        lib.pv_nvme_inject_clear(self._nvme, self._number)


class FaultHooks:
    """Mixed into the device."""

    _nvme: Any

    def inject(
        self,
        fault: Fault,
        *,
        opcode: int | None = None,
        nsid: int | None = None,
        lba: int | None = None,
        match: Mapping[str, int | tuple[int, int]] | None = None,
        queue: int | None = None,
        skip: int = 0,
        times: int | None = 1,
        probability: float = 1.0,
        status: int = 0,
        delay: float = 0.0,
    ) -> Injection:
        """From now on, commands that match meet ``fault``; the first rule that acts on a command decides.

        ``match``: fields of ``struct nvme_command``, each a value, or a value and the mask of the bits that count;
        ``opcode``, ``nsid`` and ``lba`` (the first one) are short for some. ``queue``: a submission queue, 0 the admin
        queue; ``None``: any. ``skip`` matches pass first, then ``times`` are acted on (``None``: all), each with
        ``probability``, decided by the device's seed. ``status``: SCT and SC, with NVME_STATUS_DNR if it shall be set;
        0 is success of what was not done. ``delay``: seconds. Rules stay over resets. Raises ``ValueError`` for a rule
        that cannot be, ``BlockingIOError`` when there are 32.
        """
        short = {"opcode": opcode, "nsid": nsid}
        fields = dict(match or {}) | {name: value for name, value in short.items() if value is not None}
        if lba is not None:
            fields["cdw10"], fields["cdw11"] = lba & 0xFFFFFFFF, lba >> 32
        if fault not in _ACTIONS:
            raise ValueError(f"a fault is one of {', '.join(_ACTIONS)}, not {fault!r}")
        numbers = skip >= 0 and (times is None or times > 0) and 0 <= probability <= 1 and delay >= 0
        if not numbers or status & ~_STATUS or (status and fault != "status"):
            raise ValueError(f"{fault}: skip {skip}, times {times}, {probability}, {status:#x}, {delay} s")
        rule = ffi.new("struct pv_nvme_rule *")
        rule.sq = -1 if queue is None else queue
        rule.action = _ACTIONS[fault]
        rule.skip, rule.times = skip, times or 0
        rule.per_mille = round(probability * 1000)
        rule.status, rule.delay_ns = status, round(delay * 1e9)
        _fill(rule, fields)
        return self._add(rule)

    def _add(self, rule: Any) -> Injection:
        number = lib.pv_nvme_inject(self._nvme, rule)
        if number == -errno.ENOSPC:
            raise BlockingIOError("there are 32 rules")
        if number < 0:
            raise ValueError("no such queue")
        return Injection(self._nvme, number)

    def clear_injections(self) -> None:
        """Forgets every rule."""
        lib.pv_nvme_inject_clear(self._nvme, -1)

    def seed_injections(self, seed: int) -> None:
        """What chance is made of from now on: the same seed, rules and commands give the same faults."""
        lib.pv_nvme_inject_seed(self._nvme, seed & 0xFFFFFFFFFFFFFFFF)


def _fill(rule: Any, fields: Mapping[str, int | tuple[int, int]]) -> None:
    """The bytes of a command and their mask. ``ValueError`` for a field that is not there or too small."""
    value, mask = ffi.new("struct nvme_command *"), ffi.new("struct nvme_command *")
    for name, wanted in fields.items():
        if name not in _BITS:
            raise ValueError(f"no field of a command is called {name!r}")
        bits = (wanted, -1) if isinstance(wanted, int) else wanted
        ones = (1 << _BITS[name]) - 1
        if not 0 <= bits[0] <= ones:
            raise ValueError(f"{name} has {_BITS[name]} bits: {bits[0]:#x}")
        setattr(value, name, bits[0])
        setattr(mask, name, bits[1] & ones)
    ffi.buffer(rule.match)[:] = ffi.buffer(value)[:]
    ffi.buffer(rule.mask)[:] = ffi.buffer(mask)[:]
