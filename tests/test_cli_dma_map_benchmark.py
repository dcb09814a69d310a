"""``pvfio dma-map-benchmark``: Linux's lines, the limits, the document, the picture."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from pvfio import cli

SHORT = ("--seconds", "0.05")


def run(capfd: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of the command in this process."""
    status = cli._status(["dma-map-benchmark", *arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def document(capfd: Any, *arguments: str) -> Any:
    status, out, err = run(capfd, *SHORT, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


WRONG: list[tuple[str, str]] = [
    ("-t 0", "threads is 1 to 1024, not 0"),
    ("-t 1025", "threads is 1 to 1024, not 1025"),
    ("-t two", "threads: 'two' is not a number"),
    ("-s 0", "seconds is more than 0 and at most 300, not 0"),
    ("-s 301", "seconds is more than 0 and at most 300, not 301"),
    ("-s soon", "seconds: 'soon' is not a number of seconds"),
    ("-n 1", "node is 0, the only one"),
    ("-b 19", "bits is 20 to 64, not 19"),
    ("-b 65", "bits is 20 to 64, not 65"),
    ("-d 3", "dir is one of 0 .BIDIRECTIONAL."),
    ("-d sideways", "dir: 'sideways' is not a number"),
    ("-x -1", "xdelay is 0 to 10000000"),
    ("-x 10000001", "xdelay is 0 to 10000000"),
    ("-g 0", "granule is 1 to 1024"),
    ("-g 1025", "granule is 1 to 1024"),
    ("-m 2", "mode is single or sg, not '2'"),
    ("threads=0", "threads is 1 to 1024, not 0"),
    (
        "speed=9",
        "unknown parameter 'speed' .there are threads, seconds, node, bits, dir, xdelay, granule, mode.",
    ),
    ("threads", "threads needs a value: threads=..."),
    ("--mappings -1", "mappings is 0 to 100000000, not -1"),
    ("--api ioctl", "ioctl"),
    ("--plot nowhere.doc", "a picture's name ends in .*png"),
    ("--plot missing/picture.png", "cannot be written"),
    ("--plot .", "a picture's name"),
    ("--ram 3M", "multiple of 2 MiB"),
    ("--ram 33M --api pagetable", "multiple of 2 MiB"),
    ("--ram 32M -t 64 -g 1024", "--ram 32M"),
    ("-b 20 --mappings 256 --api vfio", "--bits 20: no range of IOVAs has room for 256 live mappings"),
    ("-b 20 --mappings 256", "--bits 20, --ram 512M: .*no IOVAs"),
    ("--api vfio --domain lazy", "--domain is about the DMA API: it does not go with --api vfio"),
    ("--api pagetable --breakdown", "with --api pagetable it has one part only"),
    ("--domain none", "none"),
    ("--api vfio --ram 32M -t 64 -g 1024", "--ram 32M"),
    ("-b 20 --mappings 256 --api pagetable", "--bits 20: no range"),
    ("--ram 32M --mappings 10000000 --api pagetable", "--ram 32M: no memory for the tables"),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_what_cannot_be_is_one_line_and_status_2(
    capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capfd, *text.split())
    assert (status, out) == (2, "")
    assert err.startswith("pvfio: ")
    assert err.count("\n") == 1
    assert re.search(words, err)


RIGHT: list[tuple[str, str]] = [
    ("", ": threads:1 seconds:0.05 node:-1 dir:BIDIRECTIONAL granule: 1"),
    ("-t 2 -n 0 -d 1 -g 4", ": threads:2 seconds:0.05 node:0 dir:TO_DEVICE granule: 4"),
    ("-d FROM_DEVICE -m sg -g 4", r"\(SG_MODE\): threads:1 seconds:0.05 node:-1 dir:FROM_DEVICE granule:4"),
    ("-t 2 threads=3 dir=to-device mode=1", r"\(SG_MODE\): threads:3 seconds:0.05 .*dir:TO_DEVICE granule:1"),
    ("--domain lazy -t 2", ": threads:2 seconds:0.05 node:-1 dir:BIDIRECTIONAL granule: 1"),
    ("--domain identity -x 1000", ": threads:1 seconds:0.05 node:-1 dir:BIDIRECTIONAL granule: 1"),
    ("--api vfio -m sg -g 3", r"\(SG_MODE\): threads:1 seconds:0.05 node:-1 dir:BIDIRECTIONAL granule:3"),
    ("--api pagetable -t 2 -x 100", ": threads:2 seconds:0.05 node:-1 dir:BIDIRECTIONAL granule: 1"),
]


@pytest.mark.parametrize(("text", "first"), RIGHT)
def test_lines_of_linux(capfd: Any, text: str, first: str) -> None:
    status, out, err = run(capfd, *SHORT, *text.split())
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert re.fullmatch(f"dma mapping benchmark{first}", lines[0])
    assert re.fullmatch(r"average map latency\(us\):\d+\.\d standard deviation:\d+\.\d", lines[1])
    assert re.fullmatch(r"average unmap latency\(us\):\d+\.\d standard deviation:\d+\.\d", lines[2])


def test_what_it_says_beyond_that(capfd: Any) -> None:
    status, out, err = run(capfd, *SHORT, "--mappings", "2000")
    assert (status, err) == (0, "")
    assert re.search(r"^latency \(us\) +min +median +90 % +99 % +99\.9 % +max$", out, re.MULTILINE)
    assert len(re.findall(r"^(?:un)?map(?: +\d+\.\d+){6}$", out, re.MULTILINE)) == 2
    assert re.search(r"^mappings +[\d,]+ in \d\.\d s beside 2,000 live ones$", out, re.MULTILINE)
    assert re.search(r"^hypercalls +[\d,]+, 1\.00 a mapping$", out, re.MULTILINE)
    assert re.search(r"^clock +\d+ ns to read", out, re.MULTILINE)
    _, out, _ = run(capfd, *SHORT, "--domain", "identity")
    assert re.search(r"^hypercalls +none$", out, re.MULTILINE)


def test_hypercalls_in_words() -> None:
    from pvfio.cli_map_report import _hypercalls

    assert [_hypercalls(calls, 2560) for calls in (0, 10, 2560, 7680)] == [
        "none", "10, one for 256 mappings", "2,560, 1.00 a mapping", "7,680, 3.00 a mapping",
    ]  # fmt: skip


def test_the_document(capfd: Any) -> None:
    words = "threads=2 granule=3 dir=1 xdelay=1000 bits=40 mode=sg"
    result = document(capfd, *words.split(), "--mappings", "50", "--api", "vfio", "--platform", "amd")
    assert result["config"] == {
        "threads": 2, "seconds": 0.05, "node": -1, "bits": 40, "dir": 1, "xdelay": 1000, "granule": 3,
        "mode": "sg", "dir_name": "TO_DEVICE", "api": "vfio", "domain": None, "mappings": 50,
        "platform": "amd", "ram": 512 << 20,
    }  # fmt: skip
    assert result["hypercalls"] == result["loops"] > 0
    assert 0 < result["seconds"] < 5
    for name in ("map", "unmap"):
        latency = result[name]
        assert 0 < latency["min"] <= latency["median"] <= latency["p90"] <= latency["p999"] <= latency["max"]
        assert latency["min"] <= latency["average"] <= latency["max"]
        assert sum(count for _, count in latency["histogram"]) == result["loops"]
        assert f"average {name} latency(us):{latency['average'] / 1000:.1f}" in "\n".join(result["lines"])
    assert result["sweep"] == []
    assert result["breakdown"] is None


STEPS: list[tuple[str, set[str], set[str]]] = [
    ("", {"call", "iova", "pin", "page table"}, {"call", "iova", "pin", "page table", "hypercall", "flush handshake"}),
    ("--domain lazy", {"call", "iova", "pin", "page table"},
     {"call", "iova", "pin", "page table", "hypercall", "flush handshake", "flush queue"}),
    ("--domain identity", {"call"}, {"call"}),
    ("--api vfio", {"call", "pin", "index", "page table"},
     {"call", "pin", "index", "page table", "hypercall", "flush handshake"}),
    ("--api vfio -m sg -g 4 --mappings 100 --platform amd", {"call", "pin", "index", "page table"},
     {"call", "pin", "index", "page table", "hypercall", "flush handshake"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "mapping", "unmapping"), STEPS)
def test_where_it_goes(capfd: Any, text: str, mapping: set[str], unmapping: set[str]) -> None:
    breakdown = document(capfd, "--breakdown", *text.split())["breakdown"]
    # A step may be shorter than can be told in so short a run.
    for part, steps in (("map", mapping), ("unmap", unmapping)):
        assert steps - {"flush queue"} <= set(breakdown[part]) <= steps | {"validation"}
    assert all(ns >= 0 for part in ("map", "unmap") for ns in breakdown[part].values())
    assert breakdown["count"] >= 300


def test_where_it_goes_as_a_table(capfd: Any) -> None:
    status, out, err = run(capfd, *SHORT, "--breakdown")
    assert (status, err) == (0, "")
    table = out[out.index("where it goes") :].split("\n\n")[0].splitlines()
    rows = {line[:18].strip(): re.findall(r"([\d,]+|-) +(\d+%)?", line[18:] + " ") for line in table[1:]}
    assert list(rows)[-2:] == ["all of it", "without timers"]
    for column in (0, 1):
        cells = [cell[column] for name, cell in rows.items() if name not in ("all of it", "without timers")]
        parts = [int(ns.replace(",", "")) for ns, _ in cells if ns != "-"]
        assert sum(parts) == pytest.approx(int(rows["all of it"][column][0].replace(",", "")), abs=len(parts))
        assert sum(int(share[:-1]) for _, share in cells if share) == pytest.approx(100, abs=len(parts))
    assert rows["hypercall"][0][0] == "-"


@pytest.mark.parametrize(("mappings", "bits"), [(0, 32), (1000, 32), (1_000_000, 33), (10_000_000, 37)])
def test_the_mask_is_as_wide_as_live_mappings_need(mappings: int, bits: int) -> None:
    from pvfio.cli_dma_map_benchmark import make_options

    rest: dict[str, Any] = {
        "api": "vfio", "domain": None, "breakdown": False, "plot": None, "platform": "intel", "ram": 1 << 29,
        "json": False,
    }  # fmt: skip
    assert make_options({}, [], mappings=mappings, **rest).params.bits == bits
    assert make_options({"bits": "30"}, [], mappings=mappings, **rest).params.bits == 30


def test_it_takes_the_seconds_it_was_given(capfd: Any) -> None:
    began = time.perf_counter()
    status, _, _ = run(capfd, "-s", "1", "--api", "pagetable")
    assert status == 0
    assert time.perf_counter() - began > 0.95


def test_the_picture(capfd: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    status, out, err = run(capfd, *SHORT, "--api", "pagetable", "--mappings", "500", "--plot", str(path))
    assert (status, err) == (0, "")
    rows = re.findall(r"^([\d,]+) +\d+\.\d+ +x\d+\.\d\d +\d+\.\d+ +x\d+\.\d\d$", out, re.MULTILINE)
    assert rows == ["1", "10", "100", "500", "1,000", "10,000", "100,000"]
    assert f"plot        {path}" in out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    status, out, err = run(capfd, *SHORT, "--plot", str(tmp_path / "picture.png"))
    assert (status, out) == (2, "")
    assert "needs matplotlib (pip install 'pvfio[plot]')" in err
