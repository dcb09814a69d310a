"""Linux's idxd driver, accel-config and dmatest on the first DSA: ``idxd.py PART...``.

Parts, in the order given: ``identity``, ``configure QUEUES``, ``dmatest ITERATIONS THREADS`` (on every channel),
``disable``, ``function-reset``, ``remove``. The driver is the rig's where the processor lacks MOVDIR64B: it sends a
descriptor as eight stores.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Final

from .report import Report, attempt, run, tool_json, wait_for

_BUS: Final = Path("/sys/bus/dsa/devices")
_CHANNELS: Final = Path("/sys/class/dma")
_DMATEST: Final = Path("/sys/module/dmatest/parameters")
_SUMMARY: Final = re.compile(
    r"dmatest: (?P<thread>\S+): summary (?P<tests>\d+) tests, (?P<failures>\d+) failures"
    r" (?P<iops>[\d.]+) iops (?P<rate>\d+) KB/s"
)


class Accelerator:
    """The first DSA: its name, and its function's folder in sysfs."""

    def __init__(self) -> None:
        if "movdir64b" in Path("/proc/cpuinfo").read_text():
            run("modprobe", "idxd")
        else:
            run("insmod", "/opt/rig/tcg/idxd_bus.ko")
            run("insmod", "/opt/rig/tcg/idxd.ko")
        self.find()

    def find(self) -> None:
        """Looks for the device. Raises ``RuntimeError``."""
        wait_for(lambda: bool(_devices()), "DSA")
        self.name = _devices()[0]
        self.number = self.name.removeprefix("dsa")
        self.function = (_BUS / self.name).resolve().parent

    def queue(self, number: int) -> str:
        """A work queue as accel-config names it."""
        return f"{self.name}/wq{self.number}.{number}"

    def states(self) -> dict[str, str]:
        """State of the device, and of each work queue that was configured."""
        found = {self.name: (_BUS / self.name / "state").read_text().strip()}
        for path in sorted((_BUS / self.name).glob("wq*")):
            if int((path / "size").read_text()):
                found[path.name] = (path / "state").read_text().strip()
        return found


def _devices() -> list[str]:
    return sorted(path.name for path in _BUS.glob("dsa*"))


def identity(dsa: Accelerator, facts: dict[str, Any]) -> None:
    """What Linux and accel-config make of it."""
    facts["pci"] = run("lspci", "-vvnns", dsa.function.name)
    facts["list"] = tool_json("accel-config", "list", "-i")
    facts["attributes"] = {
        path.name: attempt("cat", str(path))[1].strip()
        for path in sorted((_BUS / dsa.name).iterdir())
        if path.is_file() and path.stat().st_mode & 0o400
    }


def configure(dsa: Accelerator, facts: dict[str, Any], queues: str) -> None:
    """So many work queues and as many engines, each pair a group; device and queues enabled."""
    size = int((_BUS / dsa.name / "max_work_queues_size").read_text()) // int(queues)
    for number in range(int(queues)):
        run(
            "accel-config", "config-engine", f"{dsa.name}/engine{dsa.number}.{number}", f"--group-id={number}"
        )
        run(
            "accel-config",
            "config-wq",
            dsa.queue(number),
            f"--group-id={number}",
            "--mode=dedicated",
            f"--wq-size={size}",
            "--type=kernel",
            f"--name=queue{number}",
            "--driver-name=dmaengine",
            f"--priority={number + 1}",
            "--max-batch-size=32",
            "--max-transfer-size=1048576",
        )
    run("accel-config", "enable-device", dsa.name)
    for number in range(int(queues)):
        run("accel-config", "enable-wq", dsa.queue(number))
    facts["configured"] = dsa.states()
    facts["configured_list"] = tool_json("accel-config", "list")
    facts["channels"] = _channels()
    facts["interrupts"] = [
        line for line in Path("/proc/interrupts").read_text().splitlines() if "idxd" in line
    ]


def dmatest(_: Accelerator, facts: dict[str, Any], iterations: str, threads: str) -> None:
    """Random sizes and offsets, checked by dmatest; its summaries, one a thread."""
    run("modprobe", "dmatest")
    before = len(_summaries())
    for name, value in {"timeout": "10000", "iterations": iterations, "threads_per_chan": threads}.items():
        (_DMATEST / name).write_text(value)
    for channel in _channels():
        (_DMATEST / "channel").write_text(channel)
    expected = before + len(_channels()) * int(threads)
    (_DMATEST / "run").write_text("1")
    wait_for(lambda: len(_summaries()) >= expected, f"{expected} summaries of dmatest", seconds=600)
    facts.setdefault("dmatest", []).append(_summaries()[before:])
    (_DMATEST / "run").write_text("0")


def _summaries() -> list[dict[str, str]]:
    return [found.groupdict() for found in _SUMMARY.finditer(run("dmesg"))]


def _channels() -> list[str]:
    return sorted(path.name for path in _CHANNELS.glob("dma*chan*"))


def disable(dsa: Accelerator, facts: dict[str, Any]) -> None:
    """Queues and device off; the configuration goes with them."""
    for path in sorted((_BUS / dsa.name).glob("wq*")):
        if (path / "state").read_text().strip() == "enabled":
            run("accel-config", "disable-wq", f"{dsa.name}/{path.name}")
    run("accel-config", "disable-device", dsa.name)
    facts["disabled"] = dsa.states()
    facts["disabled_channels"] = _channels()


def function_reset(dsa: Accelerator, facts: dict[str, Any]) -> None:
    """FLR: the driver saves what was configured, and restores it."""
    facts["reset_methods"] = (dsa.function / "reset_method").read_text().split()
    (dsa.function / "reset").write_text("1")
    wait_for(lambda: (_BUS / dsa.name / "state").exists(), "device after the reset")
    facts["after_reset"] = dsa.states()


def remove(dsa: Accelerator, facts: dict[str, Any]) -> None:
    """The function is removed from the bus, and found again."""
    (dsa.function / "remove").write_text("1")
    facts["removed"] = _devices()
    Path("/sys/bus/pci/rescan").write_text("1")
    dsa.find()


def main(words: list[str]) -> None:
    """Runs the parts; a part's arguments follow it."""
    with Report() as facts:
        dsa = Accelerator()
        while words:
            part = words.pop(0)
            print(f"{part} ...", flush=True)
            if part == "configure":
                configure(dsa, facts, words.pop(0))
            elif part == "dmatest":
                dmatest(dsa, facts, words.pop(0), words.pop(0))
            else:
                {
                    "identity": identity,
                    "disable": disable,
                    "function-reset": function_reset,
                    "remove": remove,
                }[part](dsa, facts)


if __name__ == "__main__":
    main(sys.argv[1:])
