"""Namespaces in image files: read-only, sparse, cut short under us, holes, and what survives a kill."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pvfio.abi import dtype_of, ffi, lib
from tests.devices.nvme.data_path_rig import DATA, DNR, PAGE, Rig, command, noise

pytestmark = pytest.mark.touches_c

READ, WRITE, FLUSH = lib.NVME_CMD_READ, lib.NVME_CMD_WRITE, lib.NVME_CMD_FLUSH
BLOCKS = 256
ROUNDS = int(os.environ.get("PVFIO_POWER_LOSSES", "10"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(noise(BLOCKS * PAGE).tobytes())
    return path


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def blocks_of(path: Path) -> int:
    """Bytes that a file takes."""
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("cache", [False, True])
def test_read_and_write(rig: Rig, image: Path, cache: bool) -> None:
    """A write cache keeps writes from the file until a flush, and from nobody who reads."""
    before = noise(BLOCKS * PAGE).reshape(-1, PAGE)
    rig.file_namespace(image, cache=cache)
    assert rig.run(command(READ, lba=7)) == 0
    assert (rig.at(DATA, PAGE) == before[7]).all()
    rig.put(DATA, noise(PAGE, 2))
    assert rig.run(command(WRITE, lba=9)) == 0
    assert ((np.fromfile(image, np.uint8).reshape(-1, PAGE)[9] == before[9]).all()) == cache
    assert rig.run(command(READ, lba=9, prp1=DATA + PAGE)) == 0
    assert (rig.at(DATA + PAGE, PAGE) == noise(PAGE, 2)).all()
    assert rig.run(command(FLUSH)) == 0
    before[9] = noise(PAGE, 2)
    assert (np.fromfile(image, np.uint8).reshape(-1, PAGE) == before).all()


@pytest.mark.parametrize("cache", [False, True])
def test_zeroes_and_holes(rig: Rig, image: Path, cache: bool) -> None:
    """Deallocating gives the room back; zeroes are read at once, and what is around them stays."""
    backing = rig.file_namespace(image, cache=cache)
    content = noise(BLOCKS * PAGE).reshape(-1, PAGE)
    full = blocks_of(image)
    rig.put(DATA, noise(PAGE, 2))
    for lba in (40, 41, 99):
        assert rig.run(command(WRITE, lba=lba)) == 0
        content[lba] = noise(PAGE, 2)
    table = np.zeros(2, dtype_of("struct nvme_dsm_range"))
    table["slba"], table["nlb"] = [32, 200], [64, 8]
    rig.put(DATA, table)
    assert rig.run(command(lib.NVME_CMD_DSM, cdw10=1, cdw11=lib.NVME_DSM_AD, cdw12=0)) == 0
    content[32:96] = content[200:208] = 0
    assert rig.run(command(lib.NVME_CMD_WRITE_ZEROES, lba=100, blocks=3)) == 0
    content[100:103] = 0
    assert (rig.media(backing, 0, BLOCKS * PAGE).reshape(-1, PAGE) == content).all()
    assert rig.run(command(FLUSH)) == 0
    assert (np.fromfile(image, np.uint8).reshape(-1, PAGE) == content).all()
    assert blocks_of(image) <= full - 64 * PAGE
    assert lib.pv_nvme_backing_used(backing) <= full - 64 * PAGE


@pytest.mark.parametrize("cache", [False, True])
def test_zeroes_of_parts_of_pages(rig: Rig, image: Path, cache: bool) -> None:
    """Where blocks are smaller than what files and caches are made of."""
    backing = rig.file_namespace(image, cache=cache)
    rig.attach(1, lib.pv_nvme_backing_get(backing), BLOCKS * PAGE, lba_shift=9)
    content = noise(BLOCKS * PAGE).reshape(-1, 512)
    for lba, count in ((1, 2), (13, 30), (60, 4), (80, 8), (101, 1), (2047, 1)):
        one = command(
            lib.NVME_CMD_WRITE_ZEROES, lba=lba, blocks=count, control=lib.NVME_RW_DEAC if lba % 2 else 0
        )
        assert rig.run(one) == 0
        content[lba : lba + count] = 0
        assert (rig.media(backing, 0, BLOCKS * PAGE).reshape(-1, 512) == content).all()


def test_metadata_is_refused(rig: Rig, image: Path) -> None:
    """It would be in memory, and lost with the process, whatever was flushed."""
    backing = rig.file_namespace(image)
    made = ffi.new("struct pv_nvme_format *", {"blocks": 16, "lba_shift": 12, "metadata": 8, "pi": 1})
    assert lib.pv_nvme_set_namespace(rig.nvme, 1, backing, made) == -errno.EINVAL
    made.metadata = made.pi = 0
    assert lib.pv_nvme_set_namespace(rig.nvme, 1, backing, made) == 0


def test_read_only(rig: Rig, image: Path) -> None:
    rig.file_namespace(image, read_only=True)
    assert rig.run(command(WRITE)) == lib.NVME_SC_READ_ONLY | DNR
    assert rig.run(command(READ)) == rig.run(command(FLUSH)) == 0


@pytest.mark.parametrize("cache", [False, True])
def test_larger_than_memory(rig: Rig, tmp_path: Path, cache: bool) -> None:
    """A sparse image of four tebibytes takes what was written."""
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 1 << 42)
    rig.file_namespace(path, cache=cache)
    last = (1 << 42) // PAGE - 1
    rig.put(DATA, noise(PAGE))
    assert rig.run(command(WRITE, lba=last)) == rig.run(command(WRITE, lba=last // 2)) == 0
    assert rig.run(command(FLUSH)) == 0
    assert rig.run(command(READ, lba=last, prp1=DATA + PAGE)) == 0
    assert (rig.at(DATA + PAGE, PAGE) == noise(PAGE)).all()
    assert rig.run(command(READ, lba=last - 1)) == 0
    assert not rig.at(DATA, PAGE).any()
    assert rig.run(command(READ, lba=last + 1)) == lib.NVME_SC_LBA_RANGE | DNR
    assert blocks_of(path) < 1 << 20


@pytest.mark.parametrize("cache", [False, True])
def test_cut_short(rig: Rig, image: Path, cache: bool) -> None:
    """Somebody truncates the file: what is gone cannot be read; the rest, and the process, go on."""
    rig.file_namespace(image, cache=cache)
    os.truncate(image, 100 * PAGE + 5)
    assert rig.run(command(READ, lba=99)) == 0
    for lba in (100, 101, 255):
        for opcode in (READ, lib.NVME_CMD_COMPARE, lib.NVME_CMD_VERIFY):
            assert rig.run(command(opcode, lba=lba)) == lib.NVME_SC_READ_ERROR
    assert rig.run(command(WRITE, lba=200)) == rig.run(command(FLUSH)) == 0
    assert rig.run(command(READ, lba=200)) == 0


@pytest.mark.parametrize("cache", [False, True])
def test_a_file_that_takes_no_more(rig: Rig, cache: bool) -> None:
    """A full disk is a Write Fault: of whatever writes, or of the flush that finds out."""
    fd = os.memfd_create("image", os.MFD_ALLOW_SEALING)
    os.truncate(fd, 16 * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    backing = lib.pv_nvme_file(fd, 16 * PAGE, False, cache)
    os.close(fd)
    rig.attach(1, backing, 16 * PAGE)
    assert rig.run(command(WRITE)) == (0 if cache else lib.NVME_SC_WRITE_FAULT)
    assert rig.run(command(FLUSH)) == (lib.NVME_SC_WRITE_FAULT if cache else 0)
    assert rig.run(command(WRITE, lba=2, control=lib.NVME_RW_FUA)) == lib.NVME_SC_WRITE_FAULT
    away = command(lib.NVME_CMD_WRITE_ZEROES, blocks=2, control=lib.NVME_RW_DEAC)
    assert rig.run(away) == lib.NVME_SC_WRITE_FAULT
    assert rig.run(command(READ)) == 0


@pytest.mark.parametrize("size", [0, 100, 513])
def test_bad_sizes(image: Path, size: int) -> None:
    with image.open("rb") as file:
        assert lib.pv_nvme_file(file.fileno(), size, True, False) == ffi.NULL
    assert lib.pv_nvme_memory(size) == ffi.NULL


WRITER = """
import sys
sys.path[:0] = {path!r}
from tests.devices.nvme.test_data_path_images import write_forever
write_forever({image!r}, {cache}, {seed}, {lie})
"""


def write_forever(image: str, cache: bool, seed: int, lie: bool) -> None:
    """Writes numbered blocks, and says which number is durable once a flush or an FUA write says so."""
    rng = np.random.default_rng(seed)
    with Rig() as rig:
        rig.file_namespace(Path(image), cache=cache)
        if lie:  # every flush succeeds without doing anything, and no write is forced
            assert rig.inject(lib.PV_NVME_INJECT_STATUS, opcode=FLUSH) == 0
        number = 0
        while True:
            force = not lie and rng.random() < 0.3
            for _ in range(1 if force else int(rng.integers(1, 8))):
                number += 1
                rig.at(DATA, PAGE).view(np.uint64)[:] = number
                control = lib.NVME_RW_FUA if force else 0
                assert rig.run(command(WRITE, lba=number % BLOCKS, control=control)) == 0
            assert force or rig.run(command(FLUSH)) == 0
            os.write(1, number.to_bytes(8))


def survivors(image: Path, cache: bool, seed: int, *, lie: bool = False) -> bool:
    """Kills a writer and looks whether every block has what was durable, or something later."""
    image.write_bytes(bytes(BLOCKS * PAGE))
    code = WRITER.format(path=sys.path, image=str(image), cache=cache, seed=seed, lie=lie)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        wanted = 8 * (5 + 30 * (seed % 4))
        words = writer.stdout.read(wanted)
        writer.send_signal(signal.SIGKILL)
        assert len(words) == wanted, "the writer ended by itself"
        words += writer.stdout.read()
    durable = int.from_bytes(words[len(words) // 8 * 8 - 8 :][:8])
    content = np.fromfile(image, np.uint64).reshape(BLOCKS, -1)
    kept = np.zeros(BLOCKS, np.uint64)
    for number in range(max(1, durable - BLOCKS + 1), durable + 1):
        kept[number % BLOCKS] = number
    whole = bool((content == content[:, :1]).all())
    return whole and bool((content[:, 0] >= kept).all())


@pytest.mark.parametrize("cache", [False, True], ids=["page cache", "write cache"])
def test_power_loss(image: Path, cache: bool) -> None:
    """Rounds of writes and flushes, each ended by a kill: nothing that was acknowledged as durable is lost.

    The system's page cache survives a kill; the write cache of the device does not.
    """
    for seed in range(ROUNDS):
        assert survivors(image, cache, seed)


def test_power_loss_with_a_device_that_lies(image: Path) -> None:
    """Without the sync, the test above fails."""
    assert not survivors(image, True, 1, lie=True)
