"""The real fio with the same job files: what it accepts, reports and verifies. Skipped where it is not installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pvfio import cli

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "fio"
FIO = shutil.which("fio")
pytestmark = [
    pytest.mark.touches_c,
    pytest.mark.skipif(FIO is None, reason="fio is not installed"),
]

NULL_JOBS = """
[global]
ioengine=null
size=4m
bs=4k
[mixed]
rw=randrw
rwmixread=70
iodepth=8
percentile_list=50:99.9
[writers]
stonewall
rw=write
numjobs=2
group_reporting
lat_percentiles=1
[split]
new_group
rw=randread
bssplit=4k/50:8k/50
norandommap
loops=2
[steady]
stonewall
rw=randread
rate_iops=1000
latency_target=1s
latency_percentile=99.5
latency_window=100ms
latency_run=1
steadystate=iops:50%
steadystate_duration=2
time_based
runtime=5
"""
OURS = {"verify", "reason"}


def fio(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    assert FIO is not None
    return subprocess.run(
        [FIO, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def pvfio(capfd: Any, *arguments: str) -> tuple[int, str, str]:
    status = cli._status(["fio", *arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def shape(value: Any) -> Any:
    """Keys and kinds; what depends on values (percentages that are there, buckets) is left out."""
    if isinstance(value, dict):
        return {key: shape(found) for key, found in value.items() if key not in OURS}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return "number" if isinstance(value, int | float) else "text"


def test_json_has_the_same_keys_and_counts(tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "jobs.fio"
    path.write_text(NULL_JOBS)
    theirs = json.loads(fio("--output-format=json", str(path), folder=tmp_path).stdout)
    status, out, _ = pvfio(capfd, str(path), "--output-format=json")
    ours = json.loads(out)
    assert status == 0
    assert list(ours) == list(theirs)
    assert ours["global options"].keys() == theirs["global options"].keys()
    assert len(ours["jobs"]) == len(theirs["jobs"])
    for mine, its in zip(ours["jobs"], theirs["jobs"], strict=True):
        assert list(mine) == list(its)
        assert (mine["jobname"], mine["groupid"]) == (its["jobname"], its["groupid"])
        assert (
            its["job options"].items() <= mine["job options"].items()
        )  # fio leaves keys without a value out
        for direction in ("read", "write", "trim"):
            assert list(mine[direction]) == list(its[direction])
            if mine["jobname"] == "writers":
                assert mine[direction]["total_ios"] == its[direction]["total_ios"]
        if mine["jobname"] == "steady":
            assert shape(mine["steadystate"]) == shape(its["steadystate"])
            assert mine["steadystate"]["attained"] == its["steadystate"]["attained"] == 1
            found = [
                name for name in mine if name.startswith("latency_") and name[-2:] not in ("ns", "us", "ms")
            ]
            assert [mine[name] for name in found if name != "latency_depth"] == [
                its[name] for name in found if name != "latency_depth"
            ]
            continue
        total = {d: (mine[d]["io_bytes"], its[d]["io_bytes"]) for d in ("read", "write")}
        assert abs(sum(m - t for m, t in total.values())) < 16384
    assert shape(ours["jobs"][1]["write"]["lat_ns"]) == shape(theirs["jobs"][1]["write"]["lat_ns"])


def labels(text: str) -> list[str]:
    """The report's lines without what depends on the run: numbers, units, and lines that may be missing."""
    found = []
    for line in text.splitlines():
        if re.match(r"\s+(\||lat \(|bw \(|iops )|.*(err=|note:|^fio-|Starting)", line) or not line.strip():
            continue
        line = re.sub(r"\((nsec|usec|msec)\)", "(unit)", line)
        line = re.sub(r"[\d.]+(%|[kMG]i?B?|B|msec)?(/s)?", "N", line)
        found.append(re.sub(r"\s+", " ", line))
    return found


def test_the_report_has_the_same_lines(tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "jobs.fio"
    path.write_text(NULL_JOBS)
    theirs = labels(fio(str(path), folder=tmp_path).stdout)
    _, out, _ = pvfio(capfd, str(path))
    ours = labels(out)
    header = [line for line in theirs if "(g=" in line]
    assert [line for line in ours if "(g=" in line] == header

    def counted(lines: list[str]) -> list[str]:
        # fio's null engine submits one at a time and has a submission latency only at depth; so have we.
        return sorted({line.split(":")[0].strip() for line in lines})

    assert counted(ours) == counted(theirs)


PARSED = [
    ("bs=4k", True),
    ("bssplit=4k/60:8k/40", True),
    ("rw=sideways", False),
    ("size=1m", True),
    ("rwmixread=101", False),
    ("random_distribution=zipf:1.2", True),
    ("random_distribution=zipf:1", False),
    ("random_distribution=pareto:0.2", True),
    ("percentile_list=50:99", True),
    ("runtime=10s", True),
    ("runtime=2m", True),
    ("iodepth_batch_complete_min=2", True),
    ("thinktime=5ms", True),
    ("rate=1m,500k", True),
    ("rate_iops=100", True),
    ("verify=crc32c", True),
    ("verify=nothing-known", False),
    ("verify=sha3-256", True),
    ("verify_interval=512", True),
    ("fdatasync=8", True),
    ("write_bw_log=x", True),
    ("gtod_reduce=1", True),
    ("unified_rw_reporting=1", True),
    ("rate_min=1m", True),
    ("rate_cycle=500", True),
    ("max_latency=10ms", True),
    ("latency_target=10ms\nlatency_window=1s\nlatency_percentile=99.9", True),
    ("latency_percentile=101", False),
    ("steadystate=iops_slope:0.3%\nsteadystate_duration=10", True),
    ("ss=bw:10m\nss_dur=10\nss_ramp=5", True),
    ("steadystate=iops", False),
    ("steadystate=speed:1%", False),
]


@pytest.mark.parametrize(("line", "good"), PARSED)
def test_accepts_and_refuses_the_same(line: str, good: bool, tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "job.fio"
    path.write_text(f"[job]\nioengine=null\nsize=4m\n{line}\n")
    theirs = fio("--parse-only", str(path), folder=tmp_path).returncode == 0
    ours = pvfio(capfd, str(path), "--parse-only")[0] == 0
    assert (ours, theirs) == (good, good)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.fio")), ids=lambda path: path.stem)
def test_examples_are_fios_too(example: Path, tmp_path: Path) -> None:
    found = fio("--parse-only", str(example), folder=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["crc32c", "md5", "sha3-256", "meta", "pattern"])
def test_each_verifies_what_the_other_wrote(kind: str, tmp_path: Path, capfd: Any) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    common = f"verify={kind}\nbs=4k\nsize=1m\nfilename={image}\nverify_pattern=0xc0ffee\n"
    write, read = tmp_path / "write.fio", tmp_path / "read.fio"
    write.write_text(f"[w]\nioengine=psync\nrw=write\ndo_verify=0\n{common}")
    read.write_text(f"[r]\nioengine=psync\nrw=read\n{common}")
    assert pvfio(capfd, str(write), "--image", str(image))[0] == 0
    theirs = fio(str(read), folder=tmp_path)
    assert theirs.returncode == 0, theirs.stdout + theirs.stderr
    image.write_bytes(bytes(1 << 20))
    assert fio(str(write), folder=tmp_path).returncode == 0
    status, out, err = pvfio(capfd, str(read), "--image", str(image), "--read-only")
    assert status == 0, out + err
    with image.open("r+b") as file:
        file.seek(5 * 4096 + 100)
        file.write(b"\0\1\2")
    if kind != "meta":
        status, out, err = pvfio(capfd, str(read), "--image", str(image), "--read-only")
        assert status == 1
        assert "offset 20480" in err
