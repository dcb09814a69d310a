"""A real Linux guest under QEMU: boots, runs one of the programs in ``inside/``, hands back what it saw.

The rig is a folder with ``run-guest.sh``, which boots a guest, and ``make-rig.sh``, which builds what it boots (kernel,
root file system, QEMU) into ``$RIG`` or the user's cache. ``$PVFIO_RIG`` names the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["GuestFailed", "GuestRun", "Rig"]

INSIDE = Path(__file__).parent / "inside"
_PYTHON = "cd /share && PYTHONDONTWRITEBYTECODE=1 exec python3 -m inside."


class GuestFailed(AssertionError):
    """The program in the guest failed, or never came to its end; the message has what it and the kernel wrote."""


@dataclass(frozen=True)
class GuestRun:
    """What a guest left. ``facts``: the program's report, values by name. ``boot_seconds``: until it started."""

    output: str
    console: str
    facts: dict[str, Any] = field(repr=False)
    boot_seconds: float


@dataclass(frozen=True)
class Rig:
    """A rig that was built."""

    folder: Path

    @classmethod
    def missing(cls) -> str | None:
        """Why there is no rig to use, or None."""
        folder = os.environ.get("PVFIO_RIG")
        if not folder:
            return "PVFIO_RIG does not name the rig's folder"
        if not (Path(folder) / "run-guest.sh").is_file():
            return f"{folder} has no run-guest.sh"
        return (
            None
            if (_built() / "guest.ext4").is_file()
            else f"no guest in {_built()}: run {folder}/make-rig.sh"
        )

    @classmethod
    def find(cls) -> Rig:
        """The rig ``$PVFIO_RIG`` names. Raises ``KeyError`` where ``missing`` has a reason."""
        return cls(Path(os.environ["PVFIO_RIG"]))

    @property
    def kernel(self) -> tuple[Path, Path]:
        """The guest's kernel, and its initial RAM disk."""
        return _built() / "kernel" / "vmlinuz", _built() / "initrd.gz"

    def link_qemu(self, path: Path) -> None:
        """Makes ``path`` a program that is the rig's QEMU, which runs on libraries of its own."""
        root = Path(os.environ.get("RIG_CHROOT") or f"{_built()}.chroot")
        libraries = root / "usr/lib/x86_64-linux-gnu"
        path.write_text(
            f"""#!/bin/sh
QEMU_MODULE_DIR={libraries}/qemu exec {root}/lib64/ld-linux-x86-64.so.2 --library-path {libraries} \\
    {root}/usr/bin/qemu-system-x86_64 -L {root}/usr/share/qemu -L {root}/usr/share/seabios "$@"
"""
        )
        path.chmod(0o755)

    def run(
        self,
        program: str,
        *arguments: str,
        work: Path,
        sockets: list[Path] | None = None,
        options: list[str] | None = None,
        processors: int = 2,
        seconds: int = 240,
    ) -> GuestRun:
        """Boots with a device for each of the sockets, at 00:10.0, 00:11.0, ...; runs ``inside/program.py``.

        ``work``: a folder that boots of one machine may share; it holds what the program reported and the console's
        log. ``options``: more of run-guest.sh's. ``seconds``: after which QEMU is ended. Raises ``GuestFailed``.
        """
        share = work / "share"
        shutil.copytree(
            INSIDE, share / "inside", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
        report = share / "report.json"
        report.unlink(missing_ok=True)
        command = [str(self.folder / "run-guest.sh"), "--share", str(share), "--keep", str(work / "kept")]
        command += ["--smp", str(processors), "--timeout", str(seconds), *(options or [])]
        for socket in sockets or []:
            command += ["--vfio-user", str(socket)]
        command += ["--", _PYTHON + " ".join([program, *arguments])]
        # What is preloaded into this process is not for QEMU's libraries.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + 30,
            check=False,
            env=environment,
        )
        console = work / "kept" / "console.log"
        log = console.read_text(errors="replace") if console.is_file() else ""
        if done.returncode:
            raise GuestFailed(
                f"{program} in the guest: status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
            )
        return GuestRun(
            output=done.stdout,
            console=log,
            facts=json.loads(report.read_text()),
            boot_seconds=float((work / "kept" / "boot-seconds").read_text()),
        )


def _built() -> Path:
    """Where make-rig.sh puts what it builds."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("RIG") or f"{cache}/pvfio-rig")
