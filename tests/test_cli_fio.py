"""``pvfio fio``: reports, JSON, pictures, images, faults, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvfio import cli

pytestmark = pytest.mark.touches_c

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "fio"
SHORT = ("--option", "runtime=200ms", "--option", "ramp_time=0", "--option", "size=4m")


def run(capfd: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of the command in this process."""
    status = cli._status(["fio", *arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def document(capfd: Any, *arguments: str, status: int = 0) -> Any:
    found, out, err = run(capfd, *arguments, "--output-format=json")
    assert found == status, err
    return json.loads(out)


def job_file(folder: Path, text: str) -> str:
    path = folder / "job.fio"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.fio")), ids=lambda path: path.stem)
@pytest.mark.parametrize("engine", ["inline", "thread"])
def test_examples_run(example: Path, engine: str, capfd: Any) -> None:
    found = document(capfd, str(example), "--engine", engine, *SHORT)
    for job in found["jobs"]:
        assert job["error"] == 0
        assert job["read"]["total_ios"] + job["write"]["total_ios"] > 0
        assert "verify" not in job or job["verify"]["failed"] == 0


def test_the_default_report(capfd: Any) -> None:
    status, out, err = run(capfd, str(EXAMPLES / "randread.fio"), *SHORT)
    assert status == 0
    for part in (
        "randread: (g=0): rw=randread",
        "read: IOPS=",
        "clat percentiles",
        "Run status group 0",
        "READ: bw=",
    ):
        assert part in out
    assert "direct=1 makes no difference here" in err


def test_json_is_read_as_tools_read_it(tmp_path: Path, capfd: Any) -> None:
    text = (
        "[a]\nrw=randrw\nbs=4k\nsize=2m\niodepth=4\nrandseed=3\n[b]\nstonewall\nrw=write\nsize=1m\nfsync=8\n"
    )
    first, second = document(capfd, job_file(tmp_path, text))["jobs"]
    assert first["read"]["total_ios"] + first["write"]["total_ios"] == 512
    assert first["read"]["io_bytes"] == 4096 * first["read"]["total_ios"]
    clat = first["read"]["clat_ns"]
    assert (
        clat["min"]
        <= clat["percentile"]["50.000000"]
        <= clat["percentile"]["99.000000"]
        <= clat["max"] * 1.02
    )
    assert clat["N"] == first["read"]["total_ios"]
    assert first["read"]["lat_ns"]["mean"] == pytest.approx(
        clat["mean"] + first["read"]["slat_ns"]["mean"], rel=1e-6
    )
    assert (second["write"]["total_ios"], second["sync"]["total_ios"]) == (256, 31)
    assert sum(first["iodepth_level"].values()) == pytest.approx(100, abs=1)


def test_rates_are_kept(tmp_path: Path, capfd: Any) -> None:
    text = "[a]\nrw=randread\nrate_iops=2000\nruntime=500ms\ntime_based\nsize=1m\n"
    (job,) = document(capfd, job_file(tmp_path, text))["jobs"]
    assert 0 < job["read"]["total_ios"] <= 1001


def test_groups_are_joined(tmp_path: Path, capfd: Any) -> None:
    text = "[a]\nrw=write\nsize=1m\nnumjobs=3\n"
    assert len(document(capfd, job_file(tmp_path, text))["jobs"]) == 3
    (job,) = document(capfd, job_file(tmp_path, text + "group_reporting\n"))["jobs"]
    assert job["write"]["io_bytes"] == 3 << 20


def test_an_image_gets_what_is_written(tmp_path: Path, capfd: Any) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    text = "[a]\nrw=write\nbs=512\nsize=512k\nbuffer_pattern=0xa5\nend_fsync=1\n"
    (job,) = document(capfd, job_file(tmp_path, text), "--image", str(image))["jobs"]
    assert (job["write"]["total_ios"], job["sync"]["total_ios"]) == (1024, 1)
    data = np.frombuffer(image.read_bytes(), dtype=np.uint8)
    assert (data[: 512 << 10] == 0xA5).all()
    assert not data[512 << 10 :].any()


REFILLED: list[tuple[str, int, set[int]]] = [
    ("", 1, set(range(256))),
    ("refill_buffers", 64, set(range(256))),
    ("zero_buffers\nrefill_buffers", 1, {0}),
    ("buffer_pattern=0xa5\nrefill_buffers", 1, {0xA5}),
]


@pytest.mark.parametrize(("lines", "different", "values"), REFILLED)
def test_refilled_buffers(lines: str, different: int, values: set[int], tmp_path: Path, capfd: Any) -> None:
    """New data for every write, but where there is a pattern, or nothing."""
    image = tmp_path / "image"
    image.write_bytes(b"\x77" * (1 << 20))
    path = job_file(tmp_path, f"[a]\nrw=randwrite\nbs=4k\nsize=256k\n{lines}\n")
    document(capfd, path, "--image", str(image))
    data = np.fromfile(image, dtype=np.uint8, count=64 * 4096).reshape(64, 4096)
    assert len(np.unique(data, axis=0)) == different
    assert set(data.flat) == values


def test_an_injected_corruption_is_found(tmp_path: Path, capfd: Any) -> None:
    text = "[v]\nrw=randwrite\nbs=4k\nsize=1m\niodepth=8\nverify=crc32c\n"
    status, out, err = run(capfd, job_file(tmp_path, text), "--inject", "corrupt:opcode=1,lba=42")
    assert status == 1
    assert "crc32c: verify failed" in err
    assert "(LBA 42)" in err
    assert "err=84" in out
    assert "crc32c: 256 blocks, 1 failed" in out


def test_logs_and_pictures(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    text = "[a]\nrw=randrw\nsize=1m\nwrite_bw_log=x\nwrite_lat_log=x\nwrite_iops_log=x\nlog_avg_msec=10\n"
    path = job_file(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    assert run(capfd, path, "--plot", str(picture))[0] == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for kind in ("bw", "iops", "slat", "clat", "lat"):
        lines = (tmp_path / f"x_{kind}.1.log").read_text().splitlines()
        assert lines
        assert all(len(line.split(", ")) == 5 for line in lines)


WRONG = [
    ("", "there is no job"),
    ("[a]\nbs=4q\n", "bs=4q"),
    ("[a]\niodepth=5000\n", "1023"),
    ("[a]\nbs=4m\nsize=8m\n", "at a time"),
    ("[a]\nnumjobs=65\nsize=1m\n", "64 queues"),
    ("[a]\nbs=1m\niodepth=900\nsize=1g\n", "guest memory"),
    ("[a]\nsize=1m\noffset=2g\nfilename=/dev/nvme0n1\n", "outside"),
    ("[a]\nbs=64k\nsize=4k\n", "do not fit"),
    ("[a]\nsize=1m\noffset=100\n", "100 bytes are not whole blocks of 512"),
    ("[a]\nrw=read:100\nsize=1m\n", "not of whole blocks of 512"),
    ("[a]\nbssplit=4k/50:6000/50\nsize=1m\n", "not of whole blocks of 512"),
    ("[a]\nrw=write\nbs=512\nsize=4k\nverify=sha512\nverify_interval=64\n", "no room for the 104 of sha512"),
]


@pytest.mark.parametrize(("text", "part"), WRONG)
def test_what_cannot_be_is_said_in_a_line(text: str, part: str, tmp_path: Path, capfd: Any) -> None:
    status, _, err = run(capfd, job_file(tmp_path, text), "--size", "256M")
    assert status == 2
    assert part in err
    assert "Traceback" not in err


def test_a_wave_has_the_memory_of_the_one_before_it(tmp_path: Path, capfd: Any) -> None:
    """Together the buffers are larger than guest memory."""
    jobs = "".join(f"[{number}]\nstonewall\n" for number in range(8))
    text = f"[global]\nrw=read\nbs=128k\nsize=16m\niodepth=100\n{jobs}"
    found = document(capfd, job_file(tmp_path, text), "--ram", "64M")
    assert [job["read"]["total_ios"] for job in found["jobs"]] == [128] * 8


def test_options_of_the_command(tmp_path: Path, capfd: Any) -> None:
    path = job_file(tmp_path, "[a]\nsize=1m\n[b]\nsize=2m\n")
    assert [job["jobname"] for job in document(capfd, path, "--section", "b")["jobs"]] == ["b"]
    assert run(capfd, path, "--section", "c")[0] == 2
    for words, part in (
        ((path, "--bench"), "without a job file"),
        (("--bench", "--image", path), "without --image"),
    ):
        status, out, err = run(capfd, *words)
        assert (status, out) == (2, "")
        assert part in err
    assert run(capfd, path, "--inject", "odd:lba=1")[0] == 2
    assert run(capfd, str(tmp_path / "none.fio"))[0] == 2
    image = tmp_path / "image"
    image.write_bytes(bytes(4 << 20))
    for precious in (path, str(image)):  # neither job file nor image becomes a report
        assert run(capfd, path, "--image", str(image), "--output", precious)[0] == 2
        assert run(capfd, path, "--image", str(image), "--plot", precious)[0] == 2
    assert image.read_bytes() == bytes(4 << 20)
    report = tmp_path / "report.json"
    assert run(capfd, path, "--output-format", "json+", "--output", str(report))[0] == 0
    assert json.loads(report.read_text())["jobs"][0]["read"]["clat_ns"]["bins"]
