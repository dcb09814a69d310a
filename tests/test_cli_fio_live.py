"""``pvfio fio`` as a program of its own: the status line on a terminal, interrupts, the benchmark's lines."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from pvfio import cli
from pvfio.cli_fio_status import status_text
from pvfio.workloads.fio import Notes, bench, build, parse_job_text, share
from pvfio.workloads.fio.engine import Engine
from pvfio.workloads.fio.outcome import Place
from pvfio.workloads.fio.queue import NullQueue
from pvfio.workloads.fio.run import Run
from pvfio.workloads.fio.stats import JobStats

pytestmark = pytest.mark.touches_c

LONG = "[a]\nrw=randread\nsize=4m\niodepth=4\ntime_based\nruntime=60\n"
SECONDS = 30


@contextmanager
def started(job: Path, *arguments: str, stderr: Any = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """The program at work; killed where a test gives up."""
    code = "import sys; from pvfio import cli; sys.exit(cli._status(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, "fio", str(job), *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def until(stream: IO[bytes], wanted: bytes) -> bytes:
    """What the program says up to there."""
    said = b""
    while wanted not in said:
        part = stream.read1(4096)  # type: ignore[attr-defined]
        assert part, said
        said += part
    return said


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.fio"
    path.write_text(LONG)
    return path


def test_the_status_line(job: Path) -> None:
    """A line with the rates a second after the jobs began, which is wiped away at the end."""
    leader, follower = pty.openpty()
    with started(job, stderr=follower) as process, os.fdopen(leader, "rb", 0) as screen:
        os.close(follower)
        said, asked = b"", False
        try:
            while part := screen.read(4096):
                said += part
                if b"eta" in said and not asked:
                    process.send_signal(signal.SIGINT)
                    asked = True
        except OSError:  # the other end is closed
            pass
        assert process.wait(SECONDS) == 128
    shown = [line for line in said.decode().split("\r") if line.startswith("Jobs:")]
    assert shown
    pattern = r"Jobs: 1 \(f=1\): \[r\(1\)\]\[[\d.]+%\]\[r=[\d.]+[KMG]iB/s\]\[r=[\d.]+[kM]? IOPS\]\[eta \d\dm:\d\ds\]"
    assert all(re.match(pattern, line) for line in shown)
    assert said.decode().rsplit("\r", 2)[1].strip() == ""


LETTERS = {"read": "R", "randread": "r", "write": "W", "randwrite": "w", "rw": "M", "randrw": "m"}
LETTERS |= {"trim": "D", "randtrim": "d", "randtrimwrite": "w"}


def test_the_letters_of_the_status_line() -> None:
    def engines(*names: str) -> list[Any]:
        text = "".join(f"[j]\nrw={name}\nsize=1m\n" for name in names)
        jobs = [build(section, Notes()) for section in parse_job_text(text, {})]
        queue, place = NullQueue(1, 4096), Place("f", 0, 1 << 20)
        return [Engine(job, queue, place, JobStats(), seed=1) for job in jobs]

    for name, letter in LETTERS.items():
        assert f": [{letter}(1)][" in status_text(Run((), None, engines=engines(name)), {})  # type: ignore[arg-type]
    work = Run((), None, engines=engines("read", "read", "randrw", "read"))  # type: ignore[arg-type]
    assert status_text(work, {}).startswith("Jobs: 4 (f=4): [R(2),m(1),R(1)][0.0%]")


def test_no_status_line_where_there_is_no_terminal(job: Path) -> None:
    with started(job, "--option", "runtime=1200ms") as process:
        _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, b"Jobs:" in err) == (0, False)


@pytest.mark.parametrize("more", ["", "startdelay=50\n", "thinktime=30s\n"])
def test_an_interrupt_ends_the_jobs_with_their_report(job: Path, more: str) -> None:
    """The first one ends what works, begins nothing more, and gives fio's exit status."""
    job.write_text(LONG + "[b]\nrw=read\nsize=4m\n" + more + "[c]\nstonewall\nrw=read\nsize=4m\n")
    with started(job) as process:
        assert process.stdout is not None
        until(process.stdout, b"Starting 3 processes")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    text = out.decode()
    assert process.returncode == 128, err.decode()
    assert "terminating on signal 2" in err.decode()
    assert "\na: (groupid=0, jobs=1): err= 0:" in text
    assert "\nc: " not in text
    assert "Run status group 0 (all jobs):" in text


def test_an_interrupt_ends_a_verification(job: Path) -> None:
    job.write_text("[v]\nrw=randwrite\nbs=4k\nsize=64m\niodepth=8\nverify=sha512\nloops=100000\n")
    with started(job) as process:
        assert process.stdout is not None
        until(process.stdout, b"Starting 1 process")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 128, err.decode()
    assert "\nv: (groupid=0, jobs=1): err= 0:" in out.decode()


def test_the_benchmark_prints_its_lines(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many figures as always, of fewer I/Os."""
    monkeypatch.setattr(bench, "_COUNT", {key: 2 * key[1] for key in bench._COUNT})
    monkeypatch.setattr(bench, "_AWAITED", 3)
    monkeypatch.setattr(share, "RATE", 20)
    assert cli._status(["fio", "--bench", "--engine", "thread"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("engine thread, one queue, 256 MiB of namespace in memory")
    for case in bench.CASES:
        rate = r"[\d.]+ M/s" if case.random else r"[\d.]+ GB/s"
        row = rf"{case.size >> 10} KiB {case.name} +{case.depth} +{rate} +[\d.]+ us +{rate} +[\d.]+[* ]"
        assert sum(bool(re.match(row, line)) for line in lines) == 1
    for operation in ("read", "write"):
        assert sum(line.startswith(f"one {operation}: ") for line in lines) == 1
    little = r"1,000 reads a second by interrupt: -?[\d.]+\*? % of a core .* nobody at work: [\d.]+\*? %"
    assert sum(bool(re.match(little, line)) for line in lines) == 1
    assert cli._status(["fio", "--bench", "--output-format", "json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [(row["case"]["operation"], row["case"]["depth"]) for row in found["table"]] == [
        (case.operation, case.depth) for case in bench.CASES
    ]
    assert found["awaited_read"] > 0 < found["awaited_write"]
    assert found["shares"]["reads"] > 0 < found["shares"]["pace"]
