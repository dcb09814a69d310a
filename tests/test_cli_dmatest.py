"""``pvfio dmatest``: parameters as the module takes them, channels, operations, JSON, the benchmark."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from pvfio import cli, cli_bench
from pvfio.workloads.operations import OPERATIONS


def run(capfd: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of the command in this process."""
    status = cli._status(["dmatest", *arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def document(capfd: Any, *arguments: str, status: int = 0) -> Any:
    found, out, err = run(capfd, *arguments, "--json", "--engine", "inline")
    assert (found, err) == (status, "")
    return json.loads(out)


WRONG: list[tuple[str, str]] = [
    ("extra", "unknown parameter 'extra'"),
    ("iterations=ten", "iterations: 'ten' is not a number"),
    ("iterations=-1", "iterations is at least 0"),
    ("iterations", "iterations needs a value"),
    ("threads_per_chan=0", "threads_per_chan is at least 1"),
    ("max_channels=-1", "max_channels is at least 0"),
    ("max_channels=9", "8 work queues"),
    ("test_buf_size=0", "test_buf_size is at least 1"),
    ("test_buf_size=1G", "more than"),
    ("timeout=0", "timeout is at least 1 ms"),
    ("noverify=2", "noverify: '2' is not 0 or 1"),
    ("alignment=32", "alignment is 0 to 31"),
    ("alignment=15", "too small"),
    ("transfer_size=16K", "transfer size"),
    ("polled=perhaps", "polled: 'perhaps'"),
    ("dmatest=3", "not 0 .memcpy. or 1"),
    ("run=0", "does nothing"),
    ("channel=chan0", "not a channel"),
    ("channel=dma0chan8", "8 work queues"),
    ("channel=dma64chan0", "64 devices at most"),
    ("channel=dma1chan0 --devices 1", "there is no channel dma1chan0"),
    ("channel=dma0chan1 --channels 1", "there is no channel dma0chan1"),
    ("--channel dma0", "not a channel"),
    ("--devices 0", "devices"),
    ("--devices 65", "devices"),
    ("--channels 0", "channels"),
    ("--channels 9", "8 work queues"),
    ("--operation juggle", "operation is one of noop, batch, .* not 'juggle'"),
    ("--operation fill dmatest=1", "neither with --input"),
    ("--operation fill --input FILE", "neither with --input"),
    ("--operation dif-check test_buf_size=519", "needs a test buffer of 520"),
    ("--operation fill test_buf_size=256M", "more than"),
    ("--bench --operation fill", "goes neither"),
    ("--bench --ram 33M", "2 MiB"),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_what_cannot_be_is_one_line_and_status_2(capfd: Any, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"data")
    arguments = [str(file) if word == "FILE" else word for word in text.split()]
    status, out, err = run(capfd, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("pvfio: ")
    assert err.count("\n") == 1
    assert re.search(words, err)


RIGHT: list[tuple[str, list[str], int]] = [
    ("channel=dma0chan0 iterations=10 dmatest=1", ["dma0chan0-set0"], 10),
    ("iterations=3 threads_per_chan=2 --iterations 9", ["dma0chan0-copy0", "dma0chan0-copy1"], 3),
    ("iterations=2 max_channels=2", ["dma0chan0-copy0", "dma0chan1-copy0"], 2),
    ("iterations=2 max_channels=3 --channels 2 --devices 2",
     ["dma0chan0-copy0", "dma0chan1-copy0", "dma1chan0-copy0"], 2),
    ("iterations=2 --channels 2 --devices 2",
     ["dma0chan0-copy0", "dma0chan1-copy0", "dma1chan0-copy0", "dma1chan1-copy0"], 2),
    ("iterations=2 channel=dma2chan1 channel=dma0chan3", ["dma0chan3-copy0", "dma2chan1-copy0"], 2),
    ("iterations=2 --channel dma0chan1 --channel dma0chan1", ["dma0chan1-copy0"], 2),
    ("iterations=2 --channel dma0chan1 channel=dma0chan2", ["dma0chan2-copy0"], 2),
    ("iterations=4 --operation crcgen max_channels=2", ["dma0chan0-crcgen0", "dma0chan1-crcgen0"], 4),
    ("dmatest.iterations=4 run=1 norandom polled=1", ["dma0chan0-copy0"], 4),
]  # fmt: skip


@pytest.mark.parametrize(("text", "names", "tests"), RIGHT)
def test_parameters_and_channels(capfd: Any, text: str, names: list[str], tests: int) -> None:
    result = document(capfd, *text.split())
    assert [(thread["name"], thread["tests"]) for thread in result["threads"]] == [
        (name, tests) for name in names
    ]
    assert result["totals"] == {
        "threads": len(names),
        "tests": tests * len(names),
        "failures": 0,
        "bytes": sum(thread["bytes"] for thread in result["threads"]),
    }


def test_every_parameter_arrives(capfd: Any) -> None:
    words = (
        "channel=dma0chan1 threads_per_chan=2 iterations=3 test_buf_size=32K timeout=-1 noverify=1 norandom=1 "
        "verbose=1 alignment=4 transfer_size=1024 polled=1 dmatest=1"
    )
    result = document(capfd, *words.split(), "--seed", "5", "--platform", "amd")
    config = result["config"]
    assert config["params"] == {
        "test_buf_size": 32768, "threads_per_chan": 2, "iterations": 3, "memset": True, "timeout": -1,
        "noverify": True, "norandom": True, "verbose": True, "alignment": 4, "transfer_size": 1024, "seed": 5,
    }  # fmt: skip
    del config["params"]
    assert config == {
        "platform": "amd", "engine": "inline", "completion": "polled", "ram": 512 << 20, "devices": 1,
        "channels": ["dma0chan1"], "operation": "set", "input": None,
    }  # fmt: skip
    assert len(result["messages"]) == 6
    assert all("'test passed' with src_off=0x0 dst_off=0x0 len=0x400" in line for line in result["messages"])
    interrupt = document(capfd, "iterations=1", "polled=0")
    assert interrupt["config"]["completion"] == "interrupt"


THREAD = {
    "name": str, "channel": str, "thread": int, "tests": int, "failures": int, "bytes": int,
    "seconds": float, "iops": float, "kb_per_second": int, "status": int,
}  # fmt: skip


def test_the_document(capfd: Any, tmp_path: Path) -> None:
    result = document(capfd, "iterations=5")
    assert list(result) == ["config", "threads", "totals", "faults", "messages"]
    (thread,) = result["threads"]
    assert {key: type(value) for key, value in thread.items()} == THREAD
    assert (thread["channel"], thread["thread"], thread["status"]) == ("dma0chan0", 0, 0)
    assert thread["seconds"] > 0
    assert thread["iops"] == pytest.approx(5 / thread["seconds"], rel=0.01)
    assert result["faults"] == {"count": 0, "log": []}
    assert result["messages"] == []

    file = tmp_path / "file"
    file.write_bytes(bytes(range(250)) * 100)
    result = document(capfd, "--input", str(file), "test_buf_size=8K", "--devices", "2")
    crc = google_crc32c.value(file.read_bytes())
    assert result["file"] == {
        "nbytes": 25000, "chunks": 4, "guard_bytes": 4 * (8192 + 2 * 4096) - 25000,
        "device_crc": crc, "expected_crc": crc, "by": "MEMMOVE and CRCGEN",
    }  # fmt: skip
    assert [thread["name"] for thread in result["threads"]] == ["dma0chan0-copy0", "dma1chan0-copy0"]
    assert result["config"]["input"] == str(file)


def test_faults_and_failures_are_in_the_document(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pvfio.workloads import trial

    honest = trial.OperationThread.allocate

    async def allocate(thread: Any) -> None:
        await honest(thread)
        container = thread.wq.driver.device.container
        area = thread.areas[1]
        container.unmap_dma_nowait(area.iova - 4096, area.buffer.nbytes_mapped)
        container.map_dma_nowait(area.iova - 4096, area.buffer, write=False)

    monkeypatch.setattr(trial.OperationThread, "allocate", allocate)
    result = document(capfd, "--operation", "fill", "iterations=3", status=1)
    assert result["totals"]["failures"] == 3
    assert result["faults"]["count"] == 3
    fault = result["faults"]["log"][0]
    assert (fault["device"], fault["permission"], fault["stage"]) == ("0001:00:00.0", "write", 1)
    assert "completion error status DSA_COMP_PAGE_FAULT_NOBOF" in result["messages"][0]


def test_operations(capfd: Any) -> None:
    status, out, err = run(capfd, "--operation", "list")
    assert (status, err) == (0, "")
    assert out.split() == list(OPERATIONS)
    for name in OPERATIONS:
        status, out, err = run(capfd, "--operation", name, "iterations=3", "--engine", "inline")
        assert (status, err) == (0, "")
        assert out.startswith(f"dmatest: dma0chan0-{name}0: summary 3 tests, 0 failures ")
        assert re.search(rf"^{name} +3 times on [\d,]+ bytes, every byte verified", out, re.MULTILINE)


def test_several_devices_are_shown_as_one_is(capfd: Any) -> None:
    status, out, err = run(capfd, "--devices", "2", "--channels", "2", "iterations=5")
    assert (status, err) == (0, "")
    assert (
        len(re.findall(r"^dmatest: dma[01]chan[01]-copy0: summary 5 tests, 0 failures", out, re.MULTILINE))
        == 4
    )
    assert re.search(r"^moved +[\d,]+ bytes in 20 transfers", out, re.MULTILINE)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_bench, "_ROUNDS", 1)


def test_bench(capfd: Any, short: None) -> None:
    status, out, err = run(capfd, "--bench")
    assert (status, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("engine")] == ["inline", "thread"]
    rows = re.findall(
        r"^(\S+) +(\d+ [KM]iB) .* GB/s +\S+ \S/s +(\d+\.\d\d)[* ](>= 0\.\d\d)?", out, re.MULTILINE
    )
    assert len(rows) == 36
    assert [row[3] for row in rows[:5]] == [">= 0.60", ">= 0.90", ">= 0.90", ">= 0.40", ""]
    assert out.count("noop ") == out.count("one 4 KiB memmove: awaited") == 2


def test_bench_as_a_document(capfd: Any, short: None) -> None:
    result = document(capfd, "--bench", "--platform", "amd")
    assert list(result) == ["config", "engines"]
    assert result["config"]["platform"] == "amd"
    assert list(result["engines"]) == ["inline"]
    bench = result["engines"]["inline"]
    assert len(bench["table"]) == 18
    assert bench["table"][0]["orientation"] == 7.6e6
    assert bench["table"][0]["target"] == 0.6
    assert all(figure["rate"] > 0 and figure["ratio"] > 0 for figure in bench["table"])
    assert bench["awaited"] > 0
