"""Linux's nvme driver on a served controller: what nvme-cli says, every reset, fio, a file system, reboots."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.guest.linux.rig import Rig
from tests.guest.linux.serving import Served
from tests.guest.linux.warnings import about_devices
from tests.profiles import PROFILE

MIB = 1 << 20
SECONDS = 10 if PROFILE == "nightly" else 1
"""Of each of eight fio jobs."""


def image(folder: Path, size: int) -> Path:
    path = folder / "disk.img"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_what_linux_says_of_it(rig: Rig, tmp_path: Path) -> None:
    """Everything nvme-cli asks; commands the block layer does not send; formats, firmware, sanitize, namespaces;
    every way to reset or to take the driver away.
    """
    disk = image(tmp_path, 256 * MIB)
    with Served(tmp_path, f"nvme,image={disk},size=64M,lba=4096,serial=guest-1") as served:
        parts = ("identity", "features", "commands", "format", "maintenance", "zeroes", "resets")
        facts = rig.run("nvme", *parts, work=tmp_path, sockets=served.sockets).facts
    _check_identity(facts)
    _check_commands(facts)
    assert facts["format_512"]
    assert facts["format_4096"]
    assert " 0x2020202020302e32 (2.0" in facts["firmware"]
    assert facts["sanitized"]
    assert facts["namespaces"] == {"nsid_list": [{"nsid": 1}, {"nsid": 2}]}
    assert facts["integrity"] == "T10-DIF-TYPE1-CRC"
    _check_fio("protected", facts["protected"], verified=1024)
    assert facts["discard"]
    assert facts["zeroout"]
    assert facts["discard_all"]
    # Discarded by one request of the block layer, zeroed without data: Write Zeroes.
    assert facts["discard_stat"][11:14] == [1, 0, 4096]
    assert facts["zeroout_stat"][11] == 0
    assert facts["reset_methods"] == ["flr"]
    for reset in ("reset", "function_reset", "subsystem_reset", "unbind", "remove"):
        assert facts[f"after_{reset}"], reset
    assert set(about_devices(facts)) <= {"nvme nvme0: resetting controller"}


def _check_identity(facts: dict[str, Any]) -> None:
    assert facts["sysfs"] == {
        "model": "pvfio NVMe Controller",
        "serial": "guest-1",
        "firmware_rev": "1.0",
        "queue_count": "3",
        "sqsize": "1023",
        "state": "live",
        "subsysnqn": facts["id-ctrl"]["subnqn"],
        "cntlid": "0",
    }
    assert len(facts["interrupts"]) == 3
    queue = facts["queue"]
    assert (queue["logical_block_size"], queue["write_cache"], queue["fua"]) == ("4096", "write back", "1")
    assert int(queue["max_hw_sectors_kb"]) == 2048
    assert all(int(queue[name]) > 0 for name in ("discard_max_bytes", "write_zeroes_max_bytes"))
    listed = {device["NameSpace"]: device for device in facts["list"]["Devices"]}
    assert (listed[1]["PhysicalSize"], listed[1]["SectorSize"]) == (256 * MIB, 4096)
    assert (listed[2]["PhysicalSize"], listed[2]["SerialNumber"]) == (64 * MIB, "guest-1")
    assert "Kernel driver in use: nvme" in facts["pci"]
    assert "FLReset+" in facts["pci"]
    assert "MSI-X: Enable+ Count=65" in facts["pci"]
    assert {entry["Type"] for entry in facts["ns-descs"]["ns-descs"]} == {"eui64", "nguid", "uuid", "csi"}
    assert facts["list-ctrl"] == {"num_ctrl": 1, "ctrl_list": [{"ctrl_id": 0}]}
    health = facts["smart-log"]
    assert (health["critical_warning"], health["temperature"], health["avail_spare"]) == (0, 313, 100)
    # A driver that probes makes no mistakes.
    assert health["num_err_log_entries"] == 0
    assert all(entry["error_count"] == 0 for entry in facts["error-log"]["errors"])


def _check_commands(facts: dict[str, Any]) -> None:
    # LBA ranges, power state transitions, host memory: features this controller does not have.
    assert {name for name, (status, _) in facts["features"].items() if status} == {"0x3", "0xc", "0x10"}
    assert "Number of IO Completion Queues Allocated (NCQA): 2" in facts["features"]["0x7"][1]
    assert "Timestamp field was initialized" in facts["features"]["0xe"][1]
    assert "Current value:0x0000014d" in facts["changed_feature"]
    for name, words in {
        "compare_other": "Compare Failure",
        "read_uncorrectable": "Unrecovered Read Error",
        "read_beyond": "LBA Out of Range",
        "unknown_opcode": "Invalid Command Opcode",
    }.items():
        status, said = facts[name]
        assert status == 1
        assert words in said
    newest = facts["errors"]["errors"][:4]
    assert [entry["nsid"] for entry in newest] == [0, 1, 1, 1]
    assert newest[1]["lba"] == 256 * MIB // 4096
    assert facts["self_test"]["List of Valid Reports"][0]["Self test result"] == 0
    assert facts["after_commands"]["media_errors"] == 1


def test_it_holds_data(rig: Rig, tmp_path: Path) -> None:
    """fio at depths 1 and 32, interrupts and polling, every block verified; a file system; the same tree after the
    guest rebooted with the server as it is, after the server was killed and started again, and after a guest that was
    reset in the middle of its writes.
    """
    disk = image(tmp_path, 512 * MIB)
    with Served(tmp_path, f"nvme,image={disk}") as served:
        parts = ("fio", str(SECONDS), "polled", "files", "reboot", "files-again")
        options = ["--qemu", "-action reboot=reset"]
        facts = rig.run(
            "nvme", *parts, work=tmp_path, sockets=served.sockets, options=options, seconds=600
        ).facts
        served.kill()
    _check_io(facts["before"])
    files = facts["before"]["files"]
    assert files > 100
    _check_files(facts, files)
    with Served(tmp_path, f"nvme,image={disk},size=64M") as served:
        for words in (["files-again", "crash"], ["files-again"]):
            _check_files(rig.run("nvme", *words, work=tmp_path, sockets=served.sockets).facts, files)
    # The host's own tool agrees.
    subprocess.run(["e2fsck", "-f", "-n", disk], check=True, capture_output=True)


def test_with_its_pin(rig: Rig, tmp_path: Path) -> None:
    """Linux without MSI: no interrupt that nobody wants, after which it would not listen to the pin any more."""
    if PROFILE != "nightly":
        pytest.skip("nightly")
    with Served(tmp_path, "nvme,size=64M") as served:
        parts = ("identity", "zeroes", "files", "resets")
        options = ["--append", "pci=nomsi"]
        facts = rig.run("nvme", *parts, work=tmp_path, sockets=served.sockets, options=options).facts
    (line,) = facts["interrupts"]
    assert "fasteoi" in line
    assert facts["files"] > 100
    assert facts["discard"]
    assert facts["after_function_reset"]
    assert set(about_devices(facts)) <= {"nvme nvme0: resetting controller"}


def _check_io(facts: dict[str, Any]) -> None:
    assert about_devices(facts) == []
    jobs = facts["fio"]
    assert len(jobs) == 12
    verified = {"random-1": 1024, "random-32": 2048, "sequential-1": 256, "sequential-32": 64}
    for name, job in jobs.items():
        _check_fio(name, job, verified.get(name.removeprefix("verify-"), 0))
    _check_fio("polled", facts["polled"], verified=1024)
    assert facts["polled_queues"].endswith("2/0/1 default/read/poll queues")
    # In thousands of 512 bytes. The sectors' numbers are the block layer's.
    health, sectors = facts["after_fio"], sum(job["sectors"] for job in jobs.values())
    assert 1000 * (health["data_units_read"] + health["data_units_written"]) >= sectors
    assert (health["media_errors"], health["num_err_log_entries"]) == (0, 0)


def _check_fio(name: str, job: dict[str, Any], verified: int) -> None:
    assert job["error"] == 0, name
    assert job["sectors"] == job["sectors_of_block_layer"] > 0, name
    assert job["verified"] == verified, name


def _check_files(facts: dict[str, Any], files: int) -> None:
    assert facts["files"] == files
    status, said = facts["files_checked"]
    assert status == 0, said
    assert about_devices(facts) == []
