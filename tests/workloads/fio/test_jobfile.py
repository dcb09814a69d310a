"""Job files: sections, inheritance, includes, variables, values, and everything that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pvfio.workloads.fio import Job, JobFileError, Notes, build, parse_job_files, parse_job_text
from pvfio.workloads.fio.options import ALIASES, IGNORED, OPTIONS
from pvfio.workloads.fio.steady import Criterion
from pvfio.workloads.fio.values import parse_bssplit, parse_size, parse_time


def jobs(text: str, **environment: str) -> tuple[list[Job], list[str]]:
    notes = Notes()
    return [build(section, notes) for section in parse_job_text(text, environment)], notes.lines


def one(*lines: str) -> Job:
    found, _ = jobs("\n".join(("[job]", *lines)))
    return found[0]


def test_sections_inherit_what_is_global_before_them() -> None:
    found, _ = jobs(
        "[global]\nbs=8k\n[a]\nrw=randread\n[global]\niodepth=4\n[b]\nbs=16k ; larger\n# nothing\n"
    )
    assert [(job.name, job.bs[0][0], job.iodepth) for job in found] == [("a", 8192, 1), ("b", 16384, 4)]
    assert found[0].mode.random
    assert found[1].own == (("bs", "16k"),)


def test_variables_and_keywords() -> None:
    found, _ = jobs("[${NAME}]\nsize=${SIZE}m\nbs=$pagesize\n", NAME="x", SIZE="3")
    assert (found[0].name, found[0].size, found[0].bs[0][0]) == ("x", 3 << 20, 4096)


def test_include_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "common.inc").write_text("include more.inc\niodepth=7\n")
    (tmp_path / "sub" / "more.inc").write_text("bs=512\n")
    (tmp_path / "a.fio").write_text("[global]\ninclude sub/common.inc\n[a]\n")
    (section,) = parse_job_files([tmp_path / "a.fio"])
    job = build(section, Notes())
    assert (job.iodepth, job.bs[0]) == (7, (512, 512))


def test_a_file_that_includes_itself(tmp_path: Path) -> None:
    (tmp_path / "a.fio").write_text("[a]\ninclude a.fio\n")
    with pytest.raises(JobFileError, match="too deeply"):
        parse_job_files([tmp_path / "a.fio"])


SIZES = [
    ("4096", 4096),
    ("4k", 4096),
    ("4K", 4096),
    ("4kb", 4096),
    ("1m", 1 << 20),
    ("2GiB", 2 << 30),
    ("0x200", 512),
]
SIZES += [("(4*1024)", 4096), ("1.5k", 1536), ("(2+2)k", 4096), ("1t", 1 << 40)]


@pytest.mark.parametrize(("text", "value"), SIZES)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


def test_sizes_of_powers_of_ten() -> None:
    assert (parse_size("4k", kb_base=1000), parse_size("4ki", kb_base=1000)) == (4000, 4096)
    assert one("size=1m", "kb_base=1000").size == 1_000_000


TIMES = [
    ("10", 10e9),
    ("10s", 10e9),
    ("500ms", 5e8),
    ("2m", 120e9),
    ("1h30m", 5400e9),
    ("7us", 7e3),
    ("1d", 86400e9),
]


@pytest.mark.parametrize(("text", "value"), TIMES)
def test_times(text: str, value: float) -> None:
    assert parse_time(text) == value


def test_bssplit_shares_what_is_left() -> None:
    assert parse_bssplit("4k/10:64k/50:32k") == ((4096, 10), (65536, 50), (32768, 40))
    assert one("bssplit=4k/50:8k/50,16k").bssplit == (
        ((4096, 50), (8192, 50)),
        ((16384, 100),),
        ((16384, 100),),
    )


VALUES: list[tuple[str, str, Any]] = [
    ("bs=4k,8k", "bs", ((4096, 4096), (8192, 8192), (8192, 8192))),
    ("bs=,8k", "bs", ((4096, 4096), (8192, 8192), (8192, 8192))),
    ("bsrange=4k-16k", "bs", ((4096, 16384),) * 3),
    ("blocksize=1m", "bs", ((1 << 20, 1 << 20),) * 3),
    ("size=20%", "size_percent", 20.0),
    ("rwmixwrite=30", "rwmixread", 70),
    ("runtime=2m", "runtime", 120 * 10**9),
    ("thinktime=50", "thinktime", 50_000),
    ("rate_iops=1000,2000", "rate_iops", (1000, 2000, 2000)),
    ("rate=1m", "rate", (1 << 20,) * 3),
    ("percentile_list=99.9:50", "percentiles", (50.0, 99.9)),
    ("stonewall", "stonewall", True),
    ("wait_for_previous", "stonewall", True),
    ("iodepth_batch_submit=4", "batch_submit", 4),
    ("iodepth_batch_complete=2", "batch_complete_min", 2),
    ("iodepth_batch_complete_max=9", "batch_complete_max", 9),
    ("rate_min=1m,2m", "rate_min", (1 << 20, 2 << 20, 2 << 20)),
    ("ratecycle=500", "rate_cycle", 500 * 10**6),
    ("max_latency=10ms", "max_latency", (10**7,) * 3),
    ("latency_target=100", "latency_target", 100_000),
    ("latency_window=10ms", "latency_window", 10**7),
    ("latency_percentile=99.9", "latency_percentile", 99.9),
    ("latency_run", "latency_run", True),
    ("steadystate=bw_slope:0.1%", "steady", Criterion("bw", True, True, 0.1)),
    ("ss=iops:20", "steady", Criterion("iops", False, False, 20)),
    ("ss=bw:2m", "steady", Criterion("bw", False, False, 2 << 20)),
    ("ss_dur=5", "steady_duration", 5 * 10**9),
    ("verify=crc32c-intel", "verify", "crc32c"),
    ("gtod_reduce=1", "disable_clat", True),
    ("percentage_random=20", "percentage_random", (20, 20, 20)),
    ("loops=3", "loops", 3),
    ("numjobs=4", "numjobs", 4),
    ("randseed=42", "randseed", 42),
    ("filename=/dev/nvme0n1", "filename", "/dev/nvme0n1"),
    ("offset=1m", "offset", 1 << 20),
    ("do_verify=0", "do_verify", False),
    ("sync=dsync", "sync", True),
    ("sync=0", "sync", False),
    ("norandommap", "norandommap", True),
    ("write_bw_log=x", "write_bw_log", "x"),
    ("write_bw_log", "write_bw_log", "job"),
]


@pytest.mark.parametrize(("line", "name", "value"), VALUES)
def test_options(line: str, name: str, value: Any) -> None:
    assert getattr(one(line), name) == value


def test_directions_by_name() -> None:
    for text, flags in {
        "read": (True, False, False, False),
        "randwrite": (False, True, False, True),
        "randrw:8": (True, True, False, True),
        "trimwrite": (False, True, True, False),
        "randtrim": (False, False, True, True),
    }.items():
        mode = one(f"rw={text}").mode
        assert (mode.reads, mode.writes, mode.trims, mode.random) == flags
    assert one("readwrite=randread:8").mode.modifier == 8


WRONG = [
    ("bs=4q", "4q"),
    ("bs=0", "0 bytes"),
    ("rw=sideways", "sideways"),
    ("size=-1", "-1"),
    ("runtime=soon", "soon"),
    ("bssplit=4k/60:8k/60", "100 percent"),
    ("bssplit=4k/60:8k/20", "add up to 80"),
    ("rwmixread=101", "101"),
    ("random_distribution=zipf:1", "zipf"),
    ("random_distribution=pareto:2", "pareto"),
    ("random_distribution=odd", "odd"),
    ("verify=crc99", "crc99"),
    ("verify=pattern", "verify_pattern"),
    ("verify_pattern=zz", "pattern"),
    ("percentile_list=0", "percentiles"),
    ("iodepth=0", "from 1"),
    ("time_based", "runtime"),
    ("verify_only", "verify"),
    ("bs=1,2,3,4", "more than three"),
    ("size=${NOWHERE}", "NOWHERE"),
    ("size=99999999999999g", "64 bits"),
    ("size=(__import__('os'))", "size"),
    ("bs=128m", "64 MiB"),
    ("latency_percentile=101", "101"),
    ("latency_target=never", "never"),
    ("steadystate=iops", "limit"),
    ("steadystate=speed:1%", "speed"),
    ("steadystate=iops:odd", "odd"),
    ("ss_dur=1", "two"),
    ("rate=1k\nrate_min=2k", "exceeds"),
    ("rate_iops=1\nrate=1", "exclusive"),
    ("sync=maybe", "maybe"),
    ("percentage_random=-5", "-5"),
    ("ss_interval=0", "below a millisecond"),
    ("bwavgtime=0", "below a millisecond"),
    ("iopsavgtime=999us", "below a millisecond"),
    ("rate_cycle=0", "below a millisecond"),
    ("verify=md5\nbssplit=4k/50:6k/50\nverify_interval=4k", "verify_interval=4096"),
    ("rate_min=1\nrate_iops_min=1", "exclusive"),
]


@pytest.mark.parametrize(("line", "part"), WRONG)
def test_what_cannot_be(line: str, part: str) -> None:
    with pytest.raises(JobFileError) as caught:
        one(line)
    assert part in str(caught.value)
    assert "job" in str(caught.value)


@pytest.mark.parametrize("text", ["bs=4k\n", "[a\n", "[]\n"])
def test_lines_that_are_nowhere(text: str) -> None:
    with pytest.raises(JobFileError, match="job:1"):
        parse_job_text(text, {})


def test_unknown_keys_warn_and_meaningless_ones_are_noted() -> None:
    _, notes = jobs(
        "[a]\niodeph=4\ndirect=1\nioengine=libaio\nhipri\nrandom_generator=lfsr\nsoftrandommap=1\n"
    )
    assert notes[0] == "warning: unknown option iodeph=4 (did you mean iodepth?)"
    assert "direct=1 makes no difference here" in notes[1]
    assert "pvfio's NVMe driver" in notes[2]
    assert all("makes no difference here: " in note for note in notes[3:])
    assert [note.split("=")[0] for note in notes[3:]] == ["hipri", "random_generator", "softrandommap"]


def test_every_alias_is_of_something() -> None:
    assert set(ALIASES.values()) <= set(OPTIONS) | set(IGNORED)
    assert not set(OPTIONS) & set(IGNORED)
    assert all(IGNORED.values())
