"""Memory that others have mapped as well: the doorbell page in a client, a client's memory in the data path."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.memory import FdMemory, map_fd
from tests.devices.nvme.data_path_rig import ENTRIES, PAGE, Rig, command, noise, wait_for

pytestmark = pytest.mark.touches_c

READ, WRITE = lib.NVME_CMD_READ, lib.NVME_CMD_WRITE
BAD_VALUE = lib.PV_NVME_EVENT_DOORBELL_VALUE


def mapped_doorbells(rig: Rig) -> Any:
    """The doorbells as a client maps them: shape (n,), uint32."""
    fd = lib.pv_nvme_doorbell_fd(rig.nvme)
    size = os.fstat(fd).st_size - lib.NVME_REG_DBS
    return np.frombuffer(map_fd(fd, lib.NVME_REG_DBS, size, write=True).view(), "<u4")


def has_completed(rig: Rig, count: int) -> bool:
    return len(rig.peek()) == count


@contextmanager
def open_memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("client")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def test_a_mapped_page() -> None:
    """A client stores into the page itself; the engine looks at it at least every millisecond."""
    with Rig("thread", poll=True) as rig:
        rig.memory_namespace()
        page = mapped_doorbells(rig)
        for _ in range(5):
            [cid] = rig.fill(command(READ))
            page[2] = rig.tail[1]
            wait_for(rig.peek)
            assert [int(entry["cid"]) for entry in rig.peek()] == [cid]
            rig.head[1] = (rig.head[1] + 1) % (2 * ENTRIES)
            page[3] = rig.head[1] % ENTRIES


@pytest.mark.parametrize("dstrd", range(lib.PV_NVME_MAX_DSTRD + 1))
def test_the_file_of_the_page(dstrd: int) -> None:
    """It has the doorbells where BAR 0 has them, and nobody can cut it."""
    with Rig("thread", poll=True, dstrd=dstrd) as rig:
        fd = lib.pv_nvme_doorbell_fd(rig.nvme)
        doorbells = max(PAGE, 2 * 65 * rig.stride)
        assert os.fstat(fd).st_size == lib.NVME_REG_DBS + -(-doorbells // PAGE) * PAGE
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        rig.memory_namespace()
        [cid] = rig.fill(command(READ))
        mapped_doorbells(rig)[2 * rig.stride // 4] = rig.tail[1]
        wait_for(rig.peek)
        assert [int(entry["cid"]) for entry in rig.peek()] == [cid]


def test_no_file_where_nobody_looks() -> None:
    with Rig() as rig:
        assert lib.pv_nvme_doorbell_fd(rig.nvme) == -1


def test_a_mapped_page_that_is_not_decoded() -> None:
    with Rig(poll=True) as rig:
        rig.memory_namespace()
        lib.pv_nvme_decode(rig.nvme, 0)
        rig.fill(command(READ))
        mapped_doorbells(rig)[2] = rig.tail[1]
        rig.engine.kick()
        assert not rig.peek()
        lib.pv_nvme_decode(rig.nvme, 1)
        rig.engine.kick()
        assert len(rig.peek()) == 1


def test_rubbish_in_a_mapped_page() -> None:
    """Stored all the time, by a client that also works: what it works on goes on, and it is told once."""
    with Rig("thread", poll=True) as rig:
        rig.memory_namespace()
        page, stop = mapped_doorbells(rig), threading.Event()

        def scribble() -> None:
            random = np.random.default_rng(1)
            while not stop.is_set():
                page[3:] = random.integers(0, 1 << 32, len(page) - 3, np.uint32)
                page[3] = random.integers(0, 2 * ENTRIES)
                page[0] = random.integers(ENTRIES, 1 << 32)

        scribbler = threading.Thread(target=scribble)
        scribbler.start()
        try:
            for done in range(1, ENTRIES - 1):
                rig.fill(command(READ))
                page[2] = rig.tail[1]
                wait_for(partial(has_completed, rig, done))
        finally:
            stop.set()
            scribbler.join()
        assert rig.events() == BAD_VALUE


def test_memory_that_is_cut_under_a_command() -> None:
    """Its owner gets zeroes, or nothing of what it asked for, and everybody else what there was."""
    with Rig("thread") as rig, open_memfd(4 * PAGE) as fd:
        backing = rig.memory_namespace()
        rig.set_media(backing, 0, noise(4 * PAGE))
        files = FdMemory()
        theirs = files.map(fd, 0, 4 * PAGE, write=True)
        rig.bus.map(1 << 30, theirs.view())
        os.ftruncate(fd, PAGE)
        for opcode in (READ, WRITE):
            rig.submit(command(opcode, prp1=(1 << 30) + PAGE))
        wait_for(lambda: len(rig.peek()) == 2)
        assert [status for _, status in rig.reap()] == [0, 0]
        assert files.poisoned
        rig.bus.unmap(1 << 30, 4 * PAGE)
