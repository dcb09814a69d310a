"""``pvfio serve`` in a process of its own, for a guest's QEMU to connect to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import pvfio

__all__ = ["Served"]

_ENDS_WITHIN = 30


class Served:
    """A running ``pvfio serve``: ``with Served(folder, "nvme,image=disk.img", "dsa") as served``.

    Devices are in ``--device``'s words without their sockets, which are ``sockets``, in order, in ``folder``. Leaving
    ends it with SIGTERM, and it must end as that says. ``kill`` does not give it the time to end.
    """

    def __init__(self, folder: Path, *devices: str) -> None:
        self.sockets = [folder / f"device{number}.sock" for number in range(len(devices))]
        self._log = folder / "serve.log"
        self._command = [sys.executable, "-P", "-m", "pvfio", "serve"]
        for device, socket in zip(devices, self.sockets, strict=True):
            kind, _, words = device.partition(",")
            self._command += ["--device", f"{kind},socket={socket}" + (f",{words}" if words else "")]

    def __enter__(self) -> Self:
        environment = os.environ | {"PYTHONPATH": str(Path(pvfio.__file__).parents[1])}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == "pvfio: ready\n":
                return self
        self._process.wait()
        raise AssertionError(f"pvfio serve did not get ready:\n{self.log}")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            status = self._end(signal.SIGTERM)
            if value is None:
                assert (status, self.log) == (0, "")

    def kill(self) -> None:
        """SIGKILL, and its end. Raises ``AssertionError`` where it has ended before."""
        assert self._process.poll() is None, self.log
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        self._process.send_signal(number)
        try:
            status = self._process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"pvfio serve goes on after {number.name}") from None
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status

    @property
    def processor_seconds(self) -> float:
        """Processor time it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def log(self) -> str:
        """What it wrote to standard error."""
        return self._log.read_text()
