"""What every program in the guest uses: it runs commands, and reports facts to whoever booted the guest.

Runs on the guest's own Python, with nothing but the standard library. A program's facts are in ``/share/report.json``
when it ends, whichever way. A program that has the guest reboot is started again in the next boot, with the same words.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["SHARE", "Report", "attempt", "boots", "crash", "reboot", "run", "tool_json", "wait_for"]

SHARE = Path("/share")
_REPORT = SHARE / "report.json"


class Report:
    """Facts by name, those of the boot before in ``before``; ``with Report() as facts: facts["name"] = value``."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        if _REPORT.exists():
            self.facts["before"] = json.loads(_REPORT.read_text())
        self._start = time.monotonic()

    def __enter__(self) -> dict[str, Any]:
        return self.facts

    def __exit__(self, *_: object) -> None:
        self.facts["kernel_log"] = run("dmesg").splitlines()
        # Emergency to warning, without the time.
        warnings = run("dmesg", "--level=emerg,alert,crit,err,warn").splitlines()
        self.facts["warnings"] = [re.sub(r"^\[ *[0-9.]+\] ", "", line) for line in warnings]
        self.facts["seconds"] = round(time.monotonic() - self._start, 1)
        _REPORT.write_text(json.dumps(self.facts, indent=1))


def run(*command: str, seconds: float = 120, stdin: bytes | None = None) -> str:
    """The command's output. Raises ``RuntimeError`` with all it wrote where it fails."""
    status, output = attempt(*command, seconds=seconds, stdin=stdin)
    if status:
        raise RuntimeError(f"{' '.join(command)}: status {status}\n{output}")
    return output


def attempt(*command: str, seconds: float = 120, stdin: bytes | None = None) -> tuple[int, str]:
    """Exit status and output, errors in it. Raises ``subprocess.TimeoutExpired``."""
    done = subprocess.run(
        command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False
    )
    return done.returncode, done.stdout.decode(errors="replace")


def tool_json(*command: str) -> Any:
    """What nvme, fio or accel-config say as JSON, from its first bracket on. Raises ``RuntimeError``."""
    output = run(*command)
    start = re.search(r"^[\[{]", output, re.MULTILINE)
    try:
        return json.loads(output[start.start() :] if start else output)
    except ValueError:
        raise RuntimeError(f"{' '.join(command)}: not JSON\n{output}") from None


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Looks ten times a second. Raises ``RuntimeError``."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            print(run("dmesg")[-3000:], file=sys.stderr)
            raise RuntimeError(f"after {seconds} s: no {what}")
        time.sleep(0.1)


def boots(words: list[str]) -> list[str]:
    """The words for this boot: those up to ``reboot``, or what follows it in the boot after."""
    if "reboot" not in words:
        return words
    at = words.index("reboot")
    return words[at + 1 :] if _REPORT.exists() else words[: at + 1]


def reboot() -> None:
    """As a user's last word. Does not return."""
    run("busybox", "sync")
    run("busybox", "reboot", "-f")
    time.sleep(60)
    raise RuntimeError("the guest goes on after a reboot")


def crash() -> None:
    """The machine is reset at once; the program is said to have ended well. Does not return."""
    Path("/rig/rc").write_text("0")
    Path("/proc/sysrq-trigger").write_text("b")
    time.sleep(60)
    raise RuntimeError("the guest goes on after a reset")
