"""``pvfio serve``: what is refused, what it prints, how it starts over a dead server's sockets, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from pvfio import cli
from pvfio.cli_run import UsageError
from pvfio.cli_serve import ServedSpec, parse_device
from pvfio.vfio_user.server.listener import Listener, has_hung_up
from pvfio.vfio_user.version import Version
from tests.vfio_user.raw import CONFIG, RawClient

pytestmark = pytest.mark.touches_c

PVFIO = [sys.executable, "-P", "-m", "pvfio", "serve"]


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The command in another process, once it is ready; and the lines it printed until then."""
    process = subprocess.Popen(
        [*PVFIO, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line == "pvfio: ready\n":
                break
        yield process, lines
    finally:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Exit status and standard error."""
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


async def probe(path: Path) -> int:
    """Vendor and device, as a client reads them."""
    client = await RawClient.connect(path)
    await client.version()
    found = await client.read(CONFIG, 0)
    client.close()
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_one_device(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "socket"
    with serving("testdev", "--socket", str(path)) as (process, lines):
        assert lines == [f"pvfio: testdev at {path}", "pvfio: ready"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await probe(path) == 0x11E81234
        assert end(process, number) == (0, "")
    assert not path.exists()


async def test_several_devices(tmp_path: Path) -> None:
    """One of them with a client that never goes."""
    image = tmp_path / "a, b.img"
    image.write_bytes(bytes(1 << 20))
    devices = [
        f"nvme,socket={tmp_path}/nvme,image={str(image).replace(',', ',,')},size=4M,lba=4096",
        f"dsa,socket={tmp_path}/dsa,preset=dsa2.0",
    ]
    options = [part for device in devices for part in ("--device", device)]
    with serving("testdev", "--socket", f"{tmp_path}/testdev", *options, "--mode", "0660") as (
        process,
        lines,
    ):
        assert lines == [f"pvfio: {kind} at {tmp_path}/{kind}" for kind in ("testdev", "nvme", "dsa")] + [
            "pvfio: ready"
        ]
        found = [await probe(tmp_path / kind) for kind in ("testdev", "nvme", "dsa")]
        assert found == [0x11E81234, 0x00A91414, 0x0B258086]
        assert stat.S_IMODE((tmp_path / "dsa").stat().st_mode) == 0o660
        client = await RawClient.connect(tmp_path / "nvme")
        await client.version()
        assert end(process, signal.SIGTERM)[0] == 0
        assert await client.is_closed()
        client.close()
    assert os.listdir(tmp_path) == [image.name]


async def test_over_a_dead_servers_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving("testdev", "--socket", str(path)) as (process, _):
        end(process, signal.SIGKILL)
    assert path.is_socket()
    with serving("testdev", "--socket", str(path)) as (process, lines):
        assert lines[-1] == "pvfio: ready"
        again = await trio.run_process(
            [*PVFIO, "testdev", "--socket", str(path)], capture_stderr=True, check=False
        )
        assert again.returncode == 1
        assert b"somebody listens there" in again.stderr
        assert await probe(path) == 0x11E81234


async def test_wire_log(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving("testdev", "--socket", str(path), "--log", "wire") as (process, _):
        await probe(path)
        status, err = end(process, signal.SIGTERM)
    assert status == 0
    assert "socket < 2 REGION_READ config 0x0+0x4\n" in err
    assert "socket > 2 REGION_READ config 0x0+0x4 = 3412e811\n" in err


WRONG: list[tuple[list[str], int, str]] = [
    ([], 2, "nothing to serve"),
    (["nvme"], 2, "a kind and a --socket"),
    (["--socket", "x"], 2, "a kind and a --socket"),
    (["--image", "x"], 2, "a kind and a --socket"),
    (["floppy", "--socket", "x"], 2, "one of nvme, dsa, testdev"),
    (["nvme", "--socket", "x", "--preset", "dsa1.0"], 2, "not 'preset'"),
    (["nvme", "--socket", "x", "-o", "lba=7"], 2, "512 or 4096"),
    (["nvme", "--socket", "x", "-o", "lba"], 2, "not WORD=VALUE"),
    (["nvme", "--socket", "x", "-o", "queues=0"], 2, "queues is 1 to"),
    (["nvme", "--socket", "x", "--size", "5"], 2, "multiple of 4096"),
    (["nvme", "--socket", "x", "--size", "many"], 2, "size"),
    (["nvme", "--socket", "x", "--size", "4K", "-o", "size=8K"], 2, "given twice"),
    (["dsa", "--socket", "x", "--preset", "dsa9"], 2, "preset"),
    (["testdev", "--socket", "x", "-o", "intx=maybe"], 2, "on or off"),
    (["testdev", "--socket", "x", "-o", "vectors=0"], 2, "vectors"),
    (["testdev", "--socket", "x", "--mode", "9"], 2, "not octal"),
    (["testdev", "--socket", "x", "--mode", "7777"], 2, "not octal"),
    (["testdev", "--socket", "x", "--device", "testdev,socket=./x"], 2, "two devices with one socket"),
    (["--device", "testdev"], 2, "has one socket=PATH"),
    (["--device", "testdev,socket=a,socket=b"], 2, "has one socket=PATH"),
    (["--device", "testdev,socket=a,intx"], 2, "not WORD=VALUE"),
    (["--device", "testdev,socket=a,colour=red"], 2, "not 'colour'"),
    (["nvme", "--socket", "x", "--image", "/nonexistent"], 1, "No such file"),
    (["testdev", "--socket", "/nonexistent/x"], 1, "No such file"),
    (["testdev", "--socket", "/dev/null"], 1, "no socket"),
    (["testdev", "--socket", "x" * 200], 1, "at most 107 bytes"),
]


@pytest.mark.parametrize(("arguments", "status", "part"), WRONG, ids=[" ".join(w[0])[:60] for w in WRONG])
def test_refused(
    arguments: list[str],
    status: int,
    part: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli._status(["serve", *arguments]) == status
    captured = capfd.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert part in captured.err
    assert not list(tmp_path.iterdir())


def test_device_words() -> None:
    assert parse_device("testdev,socket=/tmp/a,,b,intx=on,vectors=8") == ServedSpec(
        "testdev", Path("/tmp/a,b"), {"intx": True, "vectors": 8}
    )
    spec = parse_device("nvme,image=a,socket=s,image=b,read-only=off,size=1G")
    assert spec.words == {"image": (Path("a"), Path("b")), "read-only": False, "size": 1 << 30}
    with pytest.raises(UsageError):
        parse_device("")


# The path of a socket.


def test_a_listener_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Listener(path, 0o640) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        with pytest.raises(OSError, match="somebody listens"):
            Listener(path)
        assert path.is_socket()
        listener.close()
        assert not path.exists()
    path.write_text("somebody's file")
    with pytest.raises(FileExistsError):
        Listener(path)
    assert path.read_text() == "somebody's file"


def test_a_listener_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    """Its path was replaced: by a later server, or by anything else."""
    path = tmp_path / "socket"
    first = Listener(path)
    path.unlink()
    with Listener(path) as second:
        first.close()
        assert path.is_socket()
        assert os.lstat(path).st_ino == second._identity[1]


def test_a_link_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        Listener(path)
    assert path.is_symlink()


def test_a_socket_with_a_full_backlog_is_alive(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Listener(path):
        waiting = []
        with pytest.raises(BlockingIOError):
            while True:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(os.fspath(path))
        with pytest.raises(OSError, match="somebody listens"):
            Listener(path)
        for one in waiting:
            one.close()


def test_hang_up() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        assert not has_hung_up(ours.fileno())
        theirs.send(Version().pack())
        assert not has_hung_up(ours.fileno())
        theirs.close()
        assert has_hung_up(ours.fileno())
