"""The end of a device nobody closes: in a reference cycle, and with its interpreter."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.devices.dsa.function import Function

pytestmark = pytest.mark.touches_c

# The pvfio that is tested, installed or not, and the tests' own rig beside it.
BUSY_AT_EXIT = f"""
import ctypes, sys
from pvfio.abi import ffi, lib
sys.path.append({str(Path(__file__).parents[3])!r})
from tests.devices.dsa.rig import MEMORY, Rig, descriptor
rig = Rig("thread")
ctypes.pythonapi.Py_IncRef(ctypes.py_object(rig.memory)) # memory that a device may reach lasts as long as the process
rig.submit(descriptor(lib.DSA_OPCODE_MEMFILL, dst_addr=MEMORY, xfer_size=1 << 20, flags=0))
print("bye")
"""


def test_finally_blocks_of_a_dead_cycle_find_the_data_path() -> None:
    """As a coroutine does that waited for the device when its event loop broke down."""
    seen = []

    def wait(function: Function) -> Iterator[None]:
        try:
            yield
        finally:
            seen.append(function.device.engine.stats().gates)

    function: Any = Function(engine="thread")
    function.waiter = wait(function)
    next(function.waiter)
    del function
    gc.collect()
    assert seen == [0]


def test_interpreter_exits_while_the_engine_works() -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-c", BUSY_AT_EXIT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "bye\n"), ended.stderr
