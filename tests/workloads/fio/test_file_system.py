"""``pvfio fio`` reads a whole file system that a real ``mkfs.ext4`` made: every byte it gets is the image's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pvfio import cli
from pvfio.workloads.fio.plan import Ios
from pvfio.workloads.fio.queue import NvmeQueue
from tests.file_system import SIZE, make_image, needs_ext4

pytestmark = [pytest.mark.touches_c, needs_ext4]


class Listener:
    """Keeps what I/O reads, where it is of the namespace, as it completes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.image = np.full(SIZE, 0x5A, dtype=np.uint8)
        self.touched = np.zeros(SIZE, dtype=np.uint8)
        self._extents: dict[int, tuple[int, int]] = {}
        submit, reap, wait = NvmeQueue.submit, NvmeQueue.reap, NvmeQueue.wait

        def on_submit(queue: NvmeQueue, ios: Ios, slots: NDArray[np.intp]) -> None:
            extents = zip(ios.offset.tolist(), ios.length.tolist(), strict=True)
            begun = dict(zip(slots.tolist(), extents, strict=True))
            self._extents |= begun
            for slot, (_, length) in begun.items():
                queue.buffer[slot * queue.stride : slot * queue.stride + length] = 0xEE
            submit(queue, ios, slots)

        def on_reap(queue: NvmeQueue, *arguments: Any) -> Any:
            return self._keep(queue, reap(queue, *arguments))

        async def on_wait(queue: NvmeQueue, *arguments: Any) -> Any:
            return self._keep(queue, await wait(queue, *arguments))

        for name, function in (("submit", on_submit), ("reap", on_reap), ("wait", on_wait)):
            monkeypatch.setattr(NvmeQueue, name, function)

    def _keep(self, queue: NvmeQueue, done: Any) -> Any:
        for slot in done[0].tolist():
            offset, length = self._extents.pop(slot)
            start = slot * queue.stride
            self.image[offset : offset + length] = queue.buffer[start : start + length]
            self.touched[offset : offset + length] += 1
        return done


@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize(
    "lines",
    ["rw=read\nbs=128k\niodepth=16", "rw=randread\nbs=4k\niodepth=64", "rw=randread\nbssplit=512/10:8k/90"],
)
def test_reading_a_whole_file_system(
    lines: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each byte, with or without an order; the image stays as it is."""
    image, job = make_image(tmp_path), tmp_path / "job.fio"
    before = np.fromfile(image, dtype=np.uint8)
    job.write_text(f"[all]\nfilename=/dev/nvme0n1\n{lines}\n")
    heard = Listener(monkeypatch)
    assert cli._status(["fio", str(job), "--image", str(image), "--read-only", "--engine", engine]) == 0
    assert (heard.touched == 1).all()
    assert np.array_equal(heard.image, before)
    assert np.array_equal(np.fromfile(image, dtype=np.uint8), before)


def test_a_byte_that_is_wrong_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, job = make_image(tmp_path), tmp_path / "job.fio"
    job.write_text("[all]\nfilename=/dev/nvme0n1\nrw=read\nbs=64k\niodepth=4\n")
    heard = Listener(monkeypatch)
    fault = ["--inject", "corrupt:opcode=2,lba=16"]
    assert cli._status(["fio", str(job), "--image", str(image), "--read-only", *fault]) == 0
    different = np.flatnonzero(heard.image != np.fromfile(image, dtype=np.uint8))
    assert len(different) == 1
    assert 16 * 4096 <= different[0] < 32 * 4096
