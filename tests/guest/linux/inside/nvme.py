"""Linux's nvme driver, nvme-cli, fio and a file system on the controller at 00:10.0: ``nvme.py PART...``.

Parts, in the order given: ``identity``, ``features``, ``commands``, ``resets``, ``format``,
``maintenance``, ``zeroes``, ``fio SECONDS``, ``polled``, ``files``, ``files-again``. Most overwrite namespace 1;
``maintenance`` deletes namespace 2. The last word may be ``reboot``, as a user would, or ``crash``: the machine is
reset in the middle of writes to namespace 2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .report import Report, attempt, boots, crash, reboot, run, tool_json, wait_for

FUNCTION: Final = Path("/sys/bus/pci/devices/0000:00:10.0")
_MIB: Final = 1 << 20
_TREE: Final = (
    Path("/usr/lib/python3.13/asyncio"),
    Path("/usr/lib/python3.13/email"),
    Path("/usr/share/perl5"),
)
_SECOND: Final = 32 * _MIB  # bytes of namespace 2 when it is made anew
_VERIFY: Final = ("--verify=crc32c", "--verify_fatal=1", "--do_verify=1")
_MOUNT: Final = Path("/tmp/mounted")


class Disk:
    """A controller by its function's folder in sysfs, and its namespace 1."""

    def __init__(self, function: Path = FUNCTION) -> None:
        self.function = function
        run("modprobe", "nvme")
        self.find()

    def find(self) -> None:
        """Looks for the block device. Raises ``RuntimeError``."""
        wait_for(lambda: bool(self.namespaces(1)), f"block device of {self.function.name}")
        self.block = self.namespaces(1)[0]
        self.controller = Path("/dev") / next(self.function.glob("nvme/nvme*")).name
        wait_for(self.block.is_block_device, f"{self.block}")
        self.queue = Path("/sys/block") / self.block.name / "queue"

    def namespaces(self, nsid: int) -> list[Path]:
        """The block device of a namespace, if there is one; the number in its name is that of its discovery."""
        found = self.function.glob("nvme/nvme*/nvme*n*/nsid")
        return [Path("/dev") / path.parent.name for path in found if int(path.read_text()) == nsid]

    def limit(self, name: str) -> int:
        """A number of the block device's queue."""
        return int((self.queue / name).read_text())


def stat(device: Path) -> list[int]:
    """Fields of a block device's ``stat``."""
    return [int(word) for word in (Path("/sys/block") / device.name / "stat").read_text().split()]


def identity(disk: Disk, facts: dict[str, Any]) -> None:
    """What Linux and nvme-cli make of it."""
    facts["pci"] = run("lspci", "-vvnns", "00:10.0")
    facts["interrupts"] = [
        line for line in Path("/proc/interrupts").read_text().splitlines() if "nvme" in line
    ]
    facts["queue"] = {
        path.name: path.read_text().strip()
        for path in sorted(disk.queue.iterdir())
        if path.is_file() and os.access(path, os.R_OK)
    }
    attributes = ("model", "serial", "firmware_rev", "queue_count", "sqsize", "state", "subsysnqn", "cntlid")
    sysfs = Path("/sys/class/nvme") / disk.controller.name
    facts["sysfs"] = {name: (sysfs / name).read_text().strip() for name in attributes}
    facts["list"] = tool_json("nvme", "list", "-o", "json")
    reports = {
        "id-ctrl": disk.controller,
        "id-ns": disk.block,
        "ns-descs": disk.block,
        "list-ns": disk.controller,
        "list-ctrl": disk.controller,
        "nvm-id-ctrl": disk.controller,
        "nvm-id-ns": disk.block,
        "cmdset-ind-id-ns": disk.block,
        "id-iocs": disk.controller,
        "smart-log": disk.controller,
        "error-log": disk.controller,
        "fw-log": disk.controller,
        "changed-ns-list-log": disk.controller,
        "self-test-log": disk.controller,
        "sanitize-log": disk.controller,
        "supported-log-pages": disk.controller,
    }
    for name, device in reports.items():
        facts[name] = tool_json("nvme", name, str(device), "-o", "json")
    facts["effects-log"] = run("nvme", "effects-log", str(disk.controller), "--csi=0", "-H")


def features(disk: Disk, facts: dict[str, Any]) -> None:
    """Every feature's value in nvme-cli's words, and one that is changed."""
    known = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 0x10, 0x16, 0x19, 0x80, 0x81, 0x84)
    facts["features"] = {
        f"{feature:#x}": attempt(
            "nvme", "get-feature", str(disk.controller), f"--feature-id={feature}", "-n", "1", "-H"
        )
        for feature in known
    }
    run("nvme", "set-feature", str(disk.controller), "--feature-id=4", "--value=333")
    facts["changed_feature"] = run("nvme", "get-feature", str(disk.controller), "--feature-id=4")
    run("nvme", "set-feature", str(disk.controller), "--feature-id=4", "--value=343")


def commands(disk: Disk, facts: dict[str, Any]) -> None:
    """Commands the block layer does not send, through nvme-cli; and errors, in status and log."""
    block, size = str(disk.block), disk.limit("logical_block_size")
    data = bytes(range(256)) * (size // 256)
    first = ("--start-block=8", "--block-count=0", f"--data-size={size}")
    run("nvme", "write", block, *first, stdin=data)
    run("nvme", "compare", block, *first, stdin=data)
    facts["compare_other"] = attempt("nvme", "compare", block, *first, stdin=bytes(size))
    run("nvme", "verify", block, "--start-block=8", "--block-count=0")
    run("nvme", "copy", block, "--sdlba=9", "--slbs=8", "--blocks=0", "--format=0")
    run("nvme", "compare", block, "--start-block=9", *first[1:], stdin=data)
    run("nvme", "write-uncor", block, "--start-block=8", "--block-count=0")
    facts["read_uncorrectable"] = attempt("nvme", "read", block, *first)
    run("nvme", "write-zeroes", block, "--start-block=8", "--block-count=1")
    run("nvme", "compare", block, "--start-block=9", *first[1:], stdin=bytes(size))
    run("nvme", "dsm", block, "--ad", "--slbs=8", "--blocks=1")
    run("nvme", "flush", block)
    beyond = disk.limit("../size") * 512 // size
    facts["read_beyond"] = attempt("nvme", "read", block, f"--start-block={beyond}", *first[1:])
    facts["unknown_opcode"] = attempt(
        "nvme", "admin-passthru", str(disk.controller), "--opcode=0x7f", "--namespace-id=0"
    )
    facts["errors"] = tool_json("nvme", "error-log", str(disk.controller), "-o", "json", "--log-entries=8")

    run("nvme", "device-self-test", str(disk.controller), "--namespace-id=1", "--self-test-code=1", "--wait")
    facts["self_test"] = tool_json("nvme", "self-test-log", str(disk.controller), "-o", "json")
    facts["after_commands"] = tool_json("nvme", "smart-log", str(disk.controller), "-o", "json")


def resets(disk: Disk, facts: dict[str, Any]) -> None:
    """Controller reset, function reset, subsystem reset, the driver taken away and brought back: data stays."""
    data = os.urandom(4096 * 64)
    _write(disk.block, 0, data)

    def check(name: str) -> None:
        disk.find()
        wait_for(lambda: _state(disk) == "live", f"live controller after {name}")
        facts[f"after_{name}"] = _read(disk.block, 0, len(data)) == data

    run("nvme", "reset", str(disk.controller))
    check("reset")
    facts["reset_methods"] = (FUNCTION / "reset_method").read_text().split()
    (FUNCTION / "reset").write_text("1")
    check("function_reset")
    # On hardware the link goes down, and error recovery finds the controller again; here it is reset by hand.
    run("nvme", "subsystem-reset", str(disk.controller))
    run("nvme", "reset", str(disk.controller))
    check("subsystem_reset")
    driver = FUNCTION / "driver"
    (driver / "unbind").write_text(FUNCTION.name)
    Path("/sys/bus/pci/drivers/nvme/bind").write_text(FUNCTION.name)
    check("unbind")
    (FUNCTION / "remove").write_text("1")
    Path("/sys/bus/pci/rescan").write_text("1")
    check("remove")


def format_(disk: Disk, facts: dict[str, Any]) -> None:
    """Both block sizes without metadata, the smaller one last but for the way back."""
    before = disk.limit("logical_block_size")
    for index, size in ((0, 512), (1, 4096)):
        _write(disk.block, 0, b"x" * 4096)
        run("nvme", "format", str(disk.block), f"--lbaf={index}", "--force")
        wait_for(lambda wanted=size: disk.limit("logical_block_size") == wanted, f"blocks of {size}")  # type: ignore[misc]
        facts[f"format_{size}"] = _read(disk.block, 0, 4096) == bytes(4096)
    facts["format_before"] = before


def maintenance(disk: Disk, facts: dict[str, Any]) -> None:
    """Firmware, sanitizing; namespace 2 is deleted, created and formatted with protection information."""
    controller = str(disk.controller)
    image = Path("/tmp/firmware")
    words = b"PVFIOFW1" + b"2.0     "
    image.write_bytes(words + zlib.crc32(words).to_bytes(4, "little"))
    run("nvme", "fw-download", controller, f"--fw={image}")
    facts["firmware_commit"] = run("nvme", "fw-commit", controller, "--slot=2", "--action=3")
    facts["firmware"] = run("nvme", "fw-log", controller)
    _write(disk.block, 0, b"x" * 4096)
    run("nvme", "sanitize", controller, "--sanact=2")
    wait_for(lambda: "(1)" in run("nvme", "sanitize-log", controller, "-o", "json"), "end of sanitizing")
    facts["sanitized"] = _read(disk.block, 0, 4096) == bytes(4096)
    run("nvme", "delete-ns", controller, "--namespace-id=2")
    wait_for(lambda: not disk.namespaces(2), "end of namespace 2")
    size = f"--nsze-si={_SECOND >> 20}M", f"--ncap-si={_SECOND >> 20}M"
    run("nvme", "create-ns", controller, *size, "--flbas=2", "--dps=1")
    run("nvme", "attach-ns", controller, "--namespace-id=2", "--controllers=0")
    wait_for(lambda: bool(disk.namespaces(2)), "namespace 2 after it was attached")
    second = disk.namespaces(2)[0]
    wait_for(second.is_block_device, f"{second}")
    facts["namespaces"] = tool_json("nvme", "list-ns", controller, "-o", "json")
    facts["integrity"] = (Path("/sys/block") / second.name / "integrity" / "format").read_text().strip()
    facts["protected"] = _fio(second, "randwrite", 32, 4096, "--size=4m", *_VERIFY)


def zeroes(disk: Disk, facts: dict[str, Any]) -> None:
    """Discarded and zeroed ranges read as zeroes, what is beside them stays."""
    data = os.urandom(4 * _MIB)
    for name, options in {"discard": (), "zeroout": ("--zeroout",)}.items():
        _write(disk.block, 0, data)
        before = stat(disk.block)
        run(
            "blkdiscard",
            "--force",
            *options,
            "--offset",
            str(_MIB),
            "--length",
            str(2 * _MIB),
            str(disk.block),
        )
        found = _read(disk.block, 0, len(data))
        facts[name] = found == data[:_MIB] + bytes(2 * _MIB) + data[3 * _MIB :]
        facts[f"{name}_stat"] = [new - old for new, old in zip(stat(disk.block), before, strict=True)]
    run("blkdiscard", "--force", str(disk.block))
    facts["discard_all"] = _read(disk.block, 0, len(data)) == bytes(len(data))


def fio(disk: Disk, facts: dict[str, Any], seconds: str) -> None:
    """Random and sequential, depths 1 and 32; then written and verified with crc32c, in blocks up to a megabyte."""
    facts["fio"] = {}
    for rw in ("randread", "randwrite", "read", "write"):
        for depth in (1, 32):
            words = ("--time_based", f"--runtime={seconds}", "--size=64m")
            facts["fio"][f"{rw}-{depth}"] = _fio(disk.block, rw, depth, 4096, *words)
    for name, (rw, depth, block, size) in {
        "verify-random-1": ("randwrite", 1, 4096, "4m"),
        "verify-random-32": ("randwrite", 32, 4096, "8m"),
        "verify-sequential-1": ("write", 1, 65536, "16m"),
        "verify-sequential-32": ("write", 32, _MIB, "64m"),
    }.items():
        facts["fio"][name] = _fio(disk.block, rw, depth, block, f"--size={size}", *_VERIFY)
    facts["after_fio"] = tool_json("nvme", "smart-log", str(disk.controller), "-o", "json")


def verified(disk: Disk, size: str) -> dict[str, Any]:
    """Random blocks at depth 32, written and verified with crc32c."""
    return _fio(disk.block, "randwrite", 32, 4096, f"--size={size}", *_VERIFY)


def polled(disk: Disk, facts: dict[str, Any]) -> None:
    """The driver once more, with a queue whose completions it polls for, then as before."""
    run("modprobe", "-r", "nvme")
    run("modprobe", "nvme", "poll_queues=1")
    disk.find()
    words = (
        "--ioengine=io_uring",
        "--hipri=1",
        "--size=4m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
    )
    facts["polled"] = _fio(disk.block, "randwrite", 8, 4096, *words)
    facts["polled_queues"] = [line for line in run("dmesg").splitlines() if "poll queues" in line][-1]
    run("modprobe", "-r", "nvme")
    run("modprobe", "nvme")
    disk.find()


def files(disk: Disk, facts: dict[str, Any]) -> None:
    """ext4: a tree is copied, the file system unmounted and mounted again, the tree compared; then trimmed."""
    run("mkfs.ext4", "-q", "-F", str(disk.block))
    _MOUNT.mkdir(exist_ok=True)
    run("mount", str(disk.block), str(_MOUNT))
    for source in _TREE:
        shutil.copytree(source, _MOUNT / source.name, symlinks=True)
    run("umount", str(_MOUNT))
    run("mount", str(disk.block), str(_MOUNT))
    facts["files"] = _compare()
    facts["trimmed"] = run("fstrim", "-v", str(_MOUNT))
    run("umount", str(_MOUNT))
    facts["files_checked"] = attempt("e2fsck", "-f", "-n", str(disk.block))


def files_again(disk: Disk, facts: dict[str, Any]) -> None:
    """In a later boot: the tree is there as it was."""
    facts["files_checked"] = attempt("e2fsck", "-f", "-n", str(disk.block))
    _MOUNT.mkdir(exist_ok=True)
    run("mount", str(disk.block), str(_MOUNT))
    facts["files"] = _compare()
    run("umount", str(_MOUNT))


def _compare() -> int:
    """How many files were compared. Raises ``RuntimeError`` for one that differs."""
    count = 0
    for source in _TREE:
        run("diff", "-r", "--no-dereference", str(source), str(_MOUNT / source.name))
        count += sum(len(names) for _, _, names in os.walk(source))
    return count


def _fio(device: Path, rw: str, depth: int, block: int, *words: str) -> dict[str, Any]:
    """One job's figures, and how many 512-byte sectors it and the block layer counted."""
    before = stat(device)
    job = tool_json(
        "fio",
        f"--name={rw}",
        f"--filename={device}",
        "--allow_file_create=0",
        "--direct=1",
        f"--rw={rw}",
        f"--bs={block}",
        f"--iodepth={depth}",
        "--output-format=json",
        *(words if "--ioengine=io_uring" in words else ("--ioengine=libaio", *words)),
    )["jobs"][0]
    after = stat(device)
    return {
        "error": job["error"],
        "sectors": sum(job[way]["io_bytes"] for way in ("read", "write")) // 512,
        "sectors_of_block_layer": after[2] + after[6] - before[2] - before[6],
        "iops": {way: round(job[way]["iops"]) for way in ("read", "write") if job[way]["total_ios"]},
        "verified": job["read"]["total_ios"] if "--do_verify=1" in words else 0,
    }


def _keep_writing(disk: Disk) -> None:
    """Leaves behind a process that writes to namespace 2, and has begun."""
    second = disk.namespaces(2)[0]
    words = ("--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bs=64k", "--iodepth=32", "--size=32m")
    subprocess.Popen(
        ["fio", "--name=writer", f"--filename={second}", "--time_based", "--runtime=600", *words]
    )
    before = stat(second)[4]
    wait_for(lambda: stat(second)[4] > before + 100, "writes to namespace 2")


def _state(disk: Disk) -> str:
    return (Path("/sys/class/nvme") / disk.controller.name / "state").read_text().strip()


def _write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as device:
        device.seek(offset)
        device.write(data)
        device.flush()
        os.fsync(device.fileno())


def _read(path: Path, offset: int, size: int) -> bytes:
    """Past the page cache: what the device has."""
    run("blockdev", "--flushbufs", str(path))
    with path.open("rb") as device:
        device.seek(offset)
        return device.read(size)


_ENDS: Final = {"reboot": reboot, "crash": crash}
PARTS: Final[dict[str, Callable[..., None]]] = {
    "identity": identity,
    "features": features,
    "commands": commands,
    "resets": resets,
    "format": format_,
    "maintenance": maintenance,
    "zeroes": zeroes,
    "fio": fio,
    "polled": polled,
    "files": files,
    "files-again": files_again,
}


def main(words: list[str]) -> None:
    """Runs the parts; a part's argument follows it."""
    words = boots(words)
    with Report() as facts:
        disk = Disk()
        while words and words[0] not in _ENDS:
            part = words.pop(0)
            print(f"{part} ...", flush=True)
            if part == "fio":
                fio(disk, facts, words.pop(0))
            else:
                PARTS[part](disk, facts)
        if words[:1] == ["crash"]:
            _keep_writing(disk)
    if words:
        _ENDS[words[0]]()


if __name__ == "__main__":
    main(sys.argv[1:])
