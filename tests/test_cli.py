"""The command line: what it prints, and the exit status of every way to use it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

import pvfio
from pvfio import cli

pytestmark = pytest.mark.touches_c


@pytest.fixture(autouse=True)
def processes_find_this_pvfio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is tested, installed or not."""
    monkeypatch.setenv("PYTHONPATH", str(Path(pvfio.__file__).parents[1]))


def run(capfd: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of the command in this process."""
    status = cli._status(list(arguments))
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert text.startswith("pvfio: ")
    return text


@pytest.mark.parametrize(
    "arguments", [["--help"], ["dmatest", "--help"], ["walk", "--help"], ["devices", "--help"], []]
)
def test_help(capfd: Any, arguments: list[str]) -> None:
    status, out, err = run(capfd, *arguments)
    assert (status, err) == (0, "")
    assert "Usage:" in out


def test_version(capfd: Any) -> None:
    assert run(capfd, "--version") == (0, f"pvfio {pvfio.__version__}\n", "")


WRONG: list[tuple[list[str], str]] = [
    (["bogus"], "No such command"),
    (["--bogus"], "No such option"),
    (["dmatest", "--bogus"], "No such option"),
    (["dmatest", "extra"], "extra"),
    (["dmatest", "--platform", "arm"], "arm"),
    (["dmatest", "--engine", "steam"], "steam"),
    (["dmatest", "--iterations", "many"], "iterations"),
    (["dmatest", "--iterations", "-1"], "iterations"),
    (["dmatest", "--threads-per-chan", "0"], "threads-per-chan"),
    (["dmatest", "--max-channels", "-1"], "max-channels"),
    (["dmatest", "--max-channels", "9"], "8 work queues"),
    (["dmatest", "--test-buf-size", "0"], "test_buf_size"),
    (["dmatest", "--test-buf-size", "12Q"], "12Q"),
    (["dmatest", "--test-buf-size", ""], "not a size"),
    (["dmatest", "--test-buf-size", "-5"], "test_buf_size"),
    (["dmatest", "--test-buf-size", "1G"], "more than"),
    (["dmatest", "--ram", "64M", "--test-buf-size", "32760K"], "no room"),
    (["dmatest", "--transfer-size", "16K"], "transfer size"),
    (["dmatest", "--timeout", "0"], "timeout"),
    (["dmatest", "--dmatest", "2"], "dmatest"),
    (["dmatest", "--alignment", "40"], "alignment"),
    (["dmatest", "--ram", "3M"], "2 MiB"),
    (["dmatest", "--ram", "33M"], "2 MiB"),
    (["dmatest", "--output", "x"], "--input"),
    (["dmatest", "--copy-crc"], "--input"),
    (["dmatest", "--input"], "input"),
    (["walk", "nowhere"], "nowhere"),
    (["walk", "0x10000000000000000"], "64-bit"),
    (["walk", "--size", "0"], "does not fit"),
    (["walk", "--size", "8G"], "does not fit"),
    (["walk", "--unmapped"], "needs an IOVA"),
    (["devices", "--platform", "ibm"], "ibm"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_a_request_that_cannot_be_is_one_line_and_status_2(
    capfd: Any, arguments: list[str], words: str
) -> None:
    status, out, err = run(capfd, *arguments)
    assert (status, out) == (2, "")
    assert re.search(words, one_line(err))


def test_files_that_cannot_be_copied(capfd: Any, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    link = tmp_path / "loop"
    link.symlink_to(link)
    good = tmp_path / "good"
    good.write_bytes(b"data")
    cases = [
        (["--input", str(tmp_path / "missing")], "No such file"),
        (["--input", str(tmp_path)], "directory|regular"),
        (["--input", str(fifo)], "regular"),
        (["--input", "/dev/null"], "regular"),
        (["--input", str(link)], "symbolic links"),
        (["--input", str(good / "below")], "Not a directory"),
        (["--input", str(good), "--output", str(good)], "is the input file"),
        (["--input", str(good), "--output", str(tmp_path)], "directory"),
        (["--input", str(good), "--output", str(tmp_path / "no" / "where")], "No such file"),
    ]
    for arguments, words in cases:
        status, out, err = run(capfd, "dmatest", *arguments)
        assert (status, out) == (2, ""), arguments
        assert re.search(words, one_line(err)), arguments
    assert good.read_bytes() == b"data"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_must_not_be_read(capfd: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"data")
    secret.chmod(0)
    status, _, err = run(capfd, "dmatest", "--input", str(secret))
    assert status == 2
    assert "Permission denied" in one_line(err)


@pytest.mark.parametrize("platform", ["intel", "amd"])
@pytest.mark.parametrize("engine", ["inline", "thread"])
def test_the_main_job(capfd: Any, tmp_path: Path, platform: str, engine: str) -> None:
    """Acceptance: this interpreter through the device, no failure, the right CRC."""
    source, target = Path(sys.executable).resolve(), tmp_path / "copy"
    content = source.read_bytes()
    status, out, err = run(
        capfd,
        "dmatest", "--input", str(source), "--output", str(target), "--platform", platform, "--engine", engine,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert target.read_bytes() == content
    chunks = -(-len(content) // (1 << 20))
    assert f"summary {chunks} tests, 0 failures" in out.splitlines()[0]
    crc = f"{google_crc32c.value(content):#010x}"
    assert f"{crc} from the device, {crc} from numpy: they agree" in out
    assert f"{len(content):,} bytes" in out
    assert re.search(r"page faults logged +0", out)
    assert re.search(r"hypercalls +\d+, 2 of them since the driver began", out)  # two buffers were unmapped
    assert re.search(r"first buffer +IOVA 0x\w+ -> GPA 0x\w+ -> HPA 0x\w+", out)
    assert platform in out
    assert engine in out


def test_an_empty_file_is_nothing_to_do(capfd: Any, tmp_path: Path) -> None:
    empty, target = tmp_path / "empty", tmp_path / "copy"
    empty.touch()
    status, out, err = run(capfd, "dmatest", "--input", str(empty), "--output", str(target))
    assert (status, err) == (0, "")
    assert out.startswith("dmatest: dma0chan0-copy0: summary 0 tests, 0 failures 0.00 iops 0 KB/s (0)\n")
    assert target.read_bytes() == b""


@pytest.mark.parametrize("how", [[], ["--polled"], ["--irq"]])
@pytest.mark.parametrize("what", [[], ["--dmatest", "1"], ["--norandom", "--noverify"], ["--copy-crc"]])
def test_the_options_reach_the_workload(capfd: Any, tmp_path: Path, how: list[str], what: list[str]) -> None:
    arguments = ["--iterations", "20", "--threads-per-chan", "2", "--max-channels", "2", *how, *what]
    if "--copy-crc" in what:
        (tmp_path / "file").write_bytes(bytes(100_000))
        arguments += ["--input", str(tmp_path / "file"), "--test-buf-size", "16K"]
    status, out, err = run(capfd, "dmatest", *arguments)
    assert (status, err) == (0, "")
    tests = 7 if "--copy-crc" in what else 20
    assert out.count(f"summary {tests} tests, 0 failures") == 4
    mode = {"--polled": "polled", "--irq": "interrupt"}.get(how[0] if how else "", "hybrid")
    assert f"completion {mode}" in out


def test_failures_are_status_1(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pvfio.workloads import dmatest

    monkeypatch.setattr(dmatest, "fill_source", lambda *args, **kw: None)
    status, out, _ = run(capfd, "dmatest", "--iterations", "3")
    assert status == 1
    assert "summary 3 tests, 3 failures" in out


def test_walk_shows_both_stages(capfd: Any) -> None:
    for platform in ("intel", "amd"):
        status, out, err = run(capfd, "walk", "0x12345678", "--platform", platform)
        assert (status, err) == (0, "")
        assert out.splitlines()[1].endswith("PML4 0 | PDPT 0 | PD 145 | PT 325 | offset 0x678")
        assert [line.split()[0] for line in out.splitlines() if re.match(r"[12] [GH]PA", line)] == list(
            "1111222"
        )
        assert re.search(r"IOVA 0x12345678 -> GPA 0x\w*678 -> HPA 0x\w+678$", out.rstrip())
        assert "4 KiB page" in out
        assert max(map(len, out.splitlines())) <= 80
    status, out, _ = run(capfd, "walk", "--all")
    assert status == 0
    assert len(re.findall(r"^\+ HPA", out, re.MULTILINE)) == 12
    status, out, _ = run(capfd, "walk", "--size", "2M", "0x40000000")
    assert "(2 MiB page)" in out
    assert "offset 0x0" in out


def test_walk_shows_faults(capfd: Any) -> None:
    status, out, err = run(capfd, "walk", "--unmapped", "0x7000")
    assert (status, err) == (0, "")
    assert out.rstrip().endswith("IOVA 0x7000 -> fault: not present (stage 1, level 4)")
    status, out, _ = run(capfd, "walk", "0xfee00000", "0x5000")
    assert status == 0
    assert "not mapped: map_dma iova 0xfee00000" in out
    assert "fault: interrupt range" in out
    assert "IOVA 0x5000 -> GPA" in out


def test_walk_of_a_dmatest_buffer(capfd: Any) -> None:
    status, out, _ = run(capfd, "dmatest", "--iterations", "1", "--walk")
    assert status == 0
    assert "1 GPA 4 PML4" in out


def test_devices(capfd: Any) -> None:
    status, out, err = run(capfd, "devices")
    assert (status, err) == (0, "")
    (line,) = out.splitlines()
    assert re.fullmatch(
        r"0001:00:00\.0 System peripheral \[0880\]: Intel Corporation Data Streaming Accelerator "
        r"\[8086:0b25\] \(rev \w\w\)",
        line,
    )
    status, out, _ = run(capfd, "devices", "-v", "--platform", "amd")
    assert status == 0
    for words in (
        "IOMMU group: 0",
        "Region 0: Memory (64-bit",
        "Region 2: Memory",
        "MSI-X: Count=9",
        "vfio-pci",
    ):
        assert words in out


def test_import_of_the_command_line_is_light() -> None:
    code = (
        "import sys, pvfio.cli; print(sorted({'numpy', 'trio', 'pvfio._native', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_as_a_process_it_ends_with_the_status() -> None:
    command = [sys.executable, "-P", "-m", "pvfio"]
    done = subprocess.run([*command, "walk", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("engine", ["inline", "thread"])
def test_an_interrupt_is_status_130_after_the_summary(engine: str) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pvfio.cli",
        "dmatest",
        "--iterations",
        "0",
        "--engine",
        engine,
        "--verbose",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(3):
            assert "'test passed'" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors == ""
    assert re.fullmatch(
        r"dmatest: dma0chan0-copy0: summary \d+ tests, 0 failures .*", output.splitlines()[-1]
    )


def test_a_reader_that_went_away() -> None:
    command = f"{sys.executable} -P -m pvfio.cli dmatest --iterations 2000 --verbose | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "'test passed'" in done.stdout
    assert "Traceback" not in done.stderr


def test_on_a_terminal_there_is_a_progress_bar(tmp_path: Path) -> None:
    import pty

    main, terminal = pty.openpty()
    command = [sys.executable, "-P", "-m", "pvfio.cli", "dmatest", "--iterations", "300"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=terminal, stderr=subprocess.PIPE, env=environment) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                piece = os.read(main, 65536)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        assert process.wait(timeout=30) == 0
    os.close(main)
    assert b"/300" in shown
    assert b"dmatest: dma0chan0-copy0: summary 300 tests, 0 failures" in shown
