"""The example that starts a guest: with the rig, and with QEMU options as a user would give them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pvfio
from tests.guest.linux.rig import Rig

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "linux_guest.sh"


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {
        "PVFIO": f"{sys.executable} -P -m pvfio",
        "PYTHONPATH": str(Path(pvfio.__file__).parents[1]),
        **environment,
    }
    return subprocess.run(
        [EXAMPLE, *options], capture_output=True, text=True, timeout=300, check=False, env=variables
    )


def test_with_the_rig(rig: Rig) -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "[1414:00a9]",
        "[8086:0b25]",
        "pvfio NVMe Controller",
        "/dev/nvme0n1",
        "EXT4-fs (nvme0n1): mounted",
        "summary 100 tests, 0 failures",
    ):
        assert words in done.stdout


def test_with_qemu_options(rig: Rig, tmp_path: Path) -> None:
    """The rig's QEMU under the name a user's has; a guest that stops where it finds no root."""
    rig.link_qemu(tmp_path / "qemu-system-x86_64")
    kernel, initrd = rig.kernel
    options = ["-machine", "accel=tcg", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
    options += [
        "-kernel",
        str(kernel),
        "-initrd",
        str(initrd),
        "-append",
        "console=ttyS0 panic=-1 rdinit=/init",
    ]
    done = run(*options, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1414:00a9] type 00 class 0x010802" in done.stdout
    assert "[8086:0b25] type 00 class 0x088000" in done.stdout


def test_without_either() -> None:
    """It says what it lacks, before anything is started in a guest; the server it started has ended."""
    done = run(PVFIO_RIG="")
    assert done.returncode != 0
    assert "PVFIO_RIG: names the folder of run-guest.sh" in done.stderr
