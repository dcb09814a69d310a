"""``pvfio nvme``: a controller's own words, as nvme-cli prints them, or as its JSON.

The commands run on a machine of their own, with a namespace in memory or an image file, so counters are of what the
driver did since it started; ``format`` changes an image for good. Not here: fabrics, vendors' plugins, binary output.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pvfio.abi import ffi
from pvfio.cli_run import EngineChoice, Platform, UsageError, run_program

if TYPE_CHECKING:
    from pvfio.drivers.nvme import NvmeDriver

__all__ = ["COMMANDS", "NvmeOptions", "run"]

_KELVIN: Final = 273
_TEXTS: Final = ("sn", "mn", "fr", "subnqn")
_HEX: Final = (
    "vid", "ssvid", "ieee", "cmic", "cntlid", "ver", "rtd3r", "rtd3e", "oaes", "ctratt", "rrls", "oacs",
    "frmw", "lpa", "avscc", "apsta", "rpmbs", "hctma", "sanicap", "sqes", "cqes", "oncs", "fuses", "fna",
    "vwc", "ocfs", "sgls", "nsze", "ncap", "nuse", "nsfeat", "flbas", "mc", "dpc", "dps", "nmic", "rescap",
    "fpi",
)  # fmt: skip
"""What nvme-cli shows in hexadecimal."""
_RESERVED: Final = ("rsvd", "reserved", "rsv", "vs")


@dataclass(frozen=True, slots=True)
class NvmeOptions:
    """The command's options; ``nsid`` is the namespace it is about."""

    command: str
    platform: Platform = "intel"
    engine: EngineChoice = "thread"
    image: Path | None = None
    read_only: bool = False
    nsid: int = 1
    lbaf: int = 1
    ses: int = 0
    pi: int = 0
    feature: int = 1
    json: bool = False


Answer = tuple[str, dict[str, Any]]
"""A heading, and names with values."""


def _fields(page: bytes, structure: str) -> dict[str, Any]:
    """The fields of a wire structure that are numbers or text."""
    data = ffi.from_buffer(f"{structure} *", page)
    found: dict[str, Any] = {}
    for name, field in ffi.typeof(structure).fields:
        value = getattr(data, name)
        if name.startswith(_RESERVED):
            continue
        if field.type.kind == "primitive":
            found[name] = int.from_bytes(value) if isinstance(value, bytes) else int(value)
        elif field.type.kind == "array" and field.type.item.kind == "primitive":
            raw = bytes(ffi.buffer(value))
            if name in _TEXTS:
                found[name] = raw.decode("ascii", "replace").rstrip(" \0")
            elif name == "ieee":
                found[name] = int.from_bytes(raw, "little")
            elif len(raw) <= 16:
                found[name] = raw.hex()
    return found


async def _identify(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    return "NVME Identify Controller", _fields(nvme.controller.raw, "struct nvme_id_ctrl")


async def _id_ns(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    namespace = nvme.namespaces.get(options.nsid)
    if namespace is None:
        raise UsageError(f"there is no namespace {options.nsid}")
    found = _fields(namespace.raw, "struct nvme_id_ns")
    found["lbafs"] = [
        {"ms": known.metadata, "ds": known.block_size.bit_length() - 1, "in_use": index == namespace.format}
        for index, known in enumerate(namespace.formats)
    ]
    return f"NVME Identify Namespace {options.nsid}", found


async def _list(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    devices = [
        {
            "NameSpace": nsid,
            "DevicePath": f"/dev/nvme0n{nsid}",
            "ModelNumber": nvme.controller.mn,
            "SerialNumber": nvme.controller.sn,
            "Firmware": nvme.controller.fr,
            "UsedBytes": namespace.used * namespace.block_size,
            "MaximumLBA": namespace.blocks,
            "PhysicalSize": namespace.size,
            "SectorSize": namespace.block_size,
        }
        for nsid, namespace in nvme.namespaces.items()
    ]
    return "Devices", {"Devices": devices}


async def _smart(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    found = asdict(await nvme.smart_log())
    sensors = found.pop("temp_sensors")
    found |= {f"temperature_sensor_{number}": value for number, value in enumerate(sensors, 1) if value}
    if not options.json:
        found["temperature"] = f"{found['temperature'] - _KELVIN} C ({found['temperature']} Kelvin)"
    return "Smart Log for NVME device:nvme0", found


async def _error_log(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    entries = await nvme.error_log()
    return "Error Log Entries for device:nvme0", {
        "errors": [asdict(entry) | {"status_field": entry.status, "status": entry.name} for entry in entries]
    }


async def _fw_log(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    log = await nvme.firmware_log()
    found: dict[str, Any] = {"Active Firmware Slot (afi)": log.next << 4 | log.active}
    found |= {f"Firmware Rev Slot {slot}": text for slot, text in log.revisions.items()}
    return "Firmware Log for device:nvme0", {"nvme0": found} if options.json else found


async def _effects_log(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    log = await nvme.effects_log()
    found = {f"ACS_{opcode:02x}": f"{word:#010x}" for opcode, word in log.admin.items()}
    found |= {f"IOCS_{opcode:02x}": f"{word:#010x}" for opcode, word in log.io.items()}
    return "Commands Supported and Effects Log", found


async def _self_test_log(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    return "Device Self Test Log for NVME device:nvme0", asdict(await nvme.self_test_log())


async def _sanitize_log(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    return "Sanitize Log for NVME device:nvme0", asdict(await nvme.sanitize_log())


async def _get_feature(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    value = await nvme.get_features(options.feature, options.nsid)
    return f"get-feature:{options.feature:#04x}", {"Current value": f"{value:#010x}"}


async def _format(nvme: NvmeDriver, options: NvmeOptions) -> Answer:
    await nvme.format(options.nsid, options.lbaf, secure_erase=options.ses, protection=options.pi)
    namespace = nvme.namespaces[options.nsid]
    return "Success formatting namespace", {
        "nsid": options.nsid,
        "lbaf": namespace.format,
        "block_size": namespace.block_size,
        "metadata": namespace.metadata,
        "pi": namespace.protection,
    }


COMMANDS: Final[dict[str, Callable[[Any, NvmeOptions], Awaitable[Answer]]]] = {
    "list": _list,
    "identify": _identify,
    "id-ctrl": _identify,
    "id-ns": _id_ns,
    "smart": _smart,
    "smart-log": _smart,
    "error-log": _error_log,
    "fw-log": _fw_log,
    "effects-log": _effects_log,
    "self-test-log": _self_test_log,
    "sanitize-log": _sanitize_log,
    "get-feature": _get_feature,
    "format": _format,
}
"""What there is, nvme-cli's names and short ones."""


def _text(name: str, value: Any) -> str:
    if name in _HEX and isinstance(value, int):
        return f"{value:#x}"
    return str(value)


def _lines(answer: Answer) -> list[str]:
    title, values = answer
    lines = [f"{title}:"]
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                cells = " ".join(f"{key}:{_text(key, found)}" for key, found in item.items())
                lines.append(f"{name} {number:>2} : {cells}")
        else:
            lines.append(f"{name:<{width}} : {_text(name, value)}")
    return lines


def run(options: NvmeOptions) -> int:
    """Runs a command on a machine of its own; its exit status. ``UsageError`` for one that is not there."""

    async def main() -> int:
        from pvfio.cli_fio import FioOptions, machine_for
        from pvfio.drivers.nvme import NvmeDriver
        from pvfio.machine import Machine

        if options.command not in COMMANDS:
            raise UsageError(f"there is no {options.command!r}; there are {', '.join(COMMANDS)}")
        wanted = FioOptions(
            files=(),
            platform=options.platform,
            engine=options.engine,
            image=options.image,
            read_only=options.read_only,
        )
        async with AsyncExitStack() as stack:
            machine = await stack.enter_async_context(Machine(machine_for(wanted, [], [])))
            device = await stack.enter_async_context(machine.open("nvme0"))
            nvme = await stack.enter_async_context(NvmeDriver(device))
            answer = await COMMANDS[options.command](nvme, options)
            if options.json:
                print(json.dumps(answer[1], indent=2, default=str))
            else:
                print("\n".join(_lines(answer)))
        return 0

    return run_program(main)
