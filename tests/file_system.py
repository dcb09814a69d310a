"""Images of file systems that a real ``mkfs.ext4`` makes; tests are skipped where there is none (Debian: e2fsprogs)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MKFS, FSCK = shutil.which("mkfs.ext4", path=_PATH), shutil.which("e2fsck", path=_PATH)
needs_ext4 = pytest.mark.skipif(MKFS is None or FSCK is None, reason="no e2fsprogs")
SIZE = 48 << 20
_FILES = 40


def make_image(folder: Path) -> Path:
    """A file system with some files in it; much of the image is holes."""
    tree, made = folder / "tree", folder / "ext4.img"
    noise = np.random.default_rng(4)
    for number in range(_FILES):
        directory = tree / f"directory{number % 7}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file{number}").write_bytes(noise.bytes(int(noise.integers(1, 100_000))))
    with made.open("wb") as file:
        file.truncate(SIZE)
    command = [str(MKFS), "-q", "-F", "-d", str(tree), str(made)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)
    return made
