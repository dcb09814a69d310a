"""The SIGBUS handler, by a program in C under sanitizers, and beside Python's faulthandler."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import pvfio
from pvfio import _native
from tests.c_program import ENVIRONMENT, build, run

SANITIZERS = ("thread", "address,undefined")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_files_that_are_cut(sanitizer: str, tmp_path: Path) -> None:
    program = build(Path(__file__).with_name("guard.c"), ("memory",), sanitizer, tmp_path)
    for what in ("mended", "threads", "chained", "ignored"):
        done = run(program, what)
        assert not done.returncode, what + done.stdout + done.stderr
    for what in ("bus", "sent", "nosy"):
        done = run(program, what)
        assert done.returncode == -signal.SIGBUS, what + done.stdout + done.stderr


def test_the_sanitizers_own_handler_reports(tmp_path: Path) -> None:
    program = build(Path(__file__).with_name("guard.c"), ("memory",), "address,undefined", tmp_path)
    done = run(program, "untouched")
    assert done.returncode > 0
    assert "AddressSanitizer: BUS" in done.stderr


PROGRAM = """
import faulthandler, mmap, os
from pvfio.memory import map_fd

def guard():
    fd = os.memfd_create("guarded")
    os.ftruncate(fd, 8192)
    mapping = map_fd(fd, 0, 8192, write=True)
    os.ftruncate(fd, 4096)
    assert mapping.view()[4096] == 0 and mapping.poisoned
    mapping.close()
    os.close(fd)

{enable}
guard()
fd = os.memfd_create("unguarded")
os.ftruncate(fd, 8192)
unguarded = mmap.mmap(fd, 8192)
os.ftruncate(fd, 0)
print("so far", flush=True)
unguarded[0]
"""


@pytest.mark.skipif(
    b"__asan_init" in Path(_native.__file__).read_bytes(),
    reason="sanitizers have SIGBUS handlers of their own",
)
@pytest.mark.parametrize("enable", ["", "faulthandler.enable()", "guard(); faulthandler.enable()"])
def test_faulthandler_sees_what_is_not_guarded(enable: str) -> None:
    program = textwrap.dedent(PROGRAM).format(enable=enable)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**ENVIRONMENT, "PYTHONPATH": str(Path(pvfio.__file__).parents[1])},
        check=False,
    )
    assert done.stdout == "so far\n", done.stderr
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Fatal Python error: Bus error") == bool(enable)
