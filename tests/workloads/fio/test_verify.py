"""Verification against the device: clean runs pass; what the device corrupts is found, with its LBA."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from pvfio import Machine
from pvfio.abi import lib
from pvfio.cli_fio import FioOptions, machine_for, queue_maker
from pvfio.drivers.nvme import NvmeDriver
from pvfio.machine import MachineDevice
from pvfio.workloads.fio import Job, Notes, build, parse_job_text
from pvfio.workloads.fio.layout import Layout, clones
from pvfio.workloads.fio.plan import Ios
from pvfio.workloads.fio.run import Finished, Run
from pvfio.workloads.fio.verify import Written

pytestmark = pytest.mark.touches_c


class Rig:
    """A machine with a controller, its driver, and jobs run on it."""

    def __init__(self, nvme: NvmeDriver, device: MachineDevice) -> None:
        self.nvme = nvme
        self.function: Any = device.function

    async def run(self, text: str) -> list[Finished]:
        found = clones(jobs_of(text), entropy=1)
        layout = Layout({nsid: namespace.size for nsid, namespace in self.nvme.namespaces.items()}, Notes())
        layout.plan(found)
        return await Run(found, queue_maker(self.nvme, layout)).run()


def jobs_of(text: str) -> list[Job]:
    return [build(section, Notes()) for section in parse_job_text(text, {})]


@asynccontextmanager
async def rig(engine: Any = "inline", platform: Any = "intel") -> AsyncIterator[Rig]:
    options = FioOptions(files=(), engine=engine, platform=platform, size=16 << 20, ram=128 << 20)
    async with Machine(machine_for(options, [], [])) as machine, machine.open("nvme0") as device:
        async with NvmeDriver(device, queues=4, entries=64) as nvme:
            yield Rig(nvme, machine.devices["nvme0"])


KINDS = [
    "crc32c",
    "crc32",
    "md5",
    "sha1",
    "sha256",
    "sha512",
    "sha3-256",
    "meta",
    "pattern\nverify_pattern=0xab%o",
]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_clean_run_passes_and_a_corrupted_block_is_found(kind: str) -> None:
    async with rig() as it:
        job = f"[v]\nrw=randwrite\nbs=4k\nsize=1m\niodepth=8\nverify={kind}\n"
        (clean,) = await it.run(job)
        assert (clean.stats.error, clean.stats.verified, clean.stats.failed) == (0, 256, 0)
        fault = it.function.inject("corrupt", opcode=lib.NVME_CMD_WRITE, lba=77)
        (bad,) = await it.run(job)
        assert fault.count == 1
        if kind == "meta" and not bad.stats.failed:
            return  # only headers are checked, and the bit was not in one
        assert (bad.stats.error, bad.stats.verified, bad.stats.failed) == (84, 256, 1)
        assert "(LBA 77)" in bad.stats.failures[0]
        assert "LBA 77" in bad.stats.reason


JOBS = [
    "rw=randwrite\nbssplit=4k/60:8k/20:32k/20\nverify_interval=4k",
    "rw=randwrite\nbsrange=4k-32k",
    "rw=write\nbs=64k\nverify_interval=8k\nloops=2",
    "rw=randrw\nbs=4k\nrwmixread=50",
    "rw=randwrite\nbs=4k\nnorandommap\nrandom_distribution=zipf:1.1\nio_size=4m",
    "rw=randwrite\nbssplit=4k/50:16k/50\nnorandommap",
    "rw=randwrite\nnumjobs=3\nbs=4k",
    "rw=randwrite:4\nbs=4k\nfsync=16",
    "rw=randwrite\nbs=4k\nsize=16m\nloops=3",
    "rw=randwrite\nbs=8k\nblockalign=4k\nnorandommap\nsize=256k\nio_size=2m",
]


SIZES = [
    "bssplit=8k/50:12k/50",
    "bssplit=8k/50:12k/50\nverify_interval=4k",
    "bs=8k\nrw=write:4k\nio_size=512k",
]


@pytest.mark.parametrize("lines", SIZES)
async def test_blocks_that_are_no_multiples_of_each_other(lines: str) -> None:
    """What is written once is read back and verified, all of it."""
    async with rig() as it:
        (item,) = await it.run(f"[v]\nrw=randwrite\nsize=1m\niodepth=8\nverify=crc32c\n{lines}\n")
        read, write, _ = item.stats.directions
        assert (item.stats.error, read.ios, read.nbytes) == (0, write.ios, write.nbytes)
        assert item.stats.verified >= write.ios > 60


@pytest.mark.parametrize("loops", [1, 3])
async def test_each_pass_is_written_once_and_verified(loops: int) -> None:
    """What the real fio does: so many passes, and all of each is read back."""
    async with rig() as it:
        (item,) = await it.run(f"[v]\nrw=randwrite\nbs=4k\nsize=64k\nverify=crc32c\nloops={loops}\n")
        read, write, _ = item.stats.directions
        assert (write.ios, read.ios, item.stats.verified) == (16 * loops,) * 3


@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize("lines", JOBS)
async def test_what_is_written_in_any_way_is_read_back(lines: str, engine: str) -> None:
    async with rig(engine) as it:
        for item in await it.run(f"[v]\nsize=2m\niodepth=13\nverify=crc32c\n{lines}\n"):
            assert (item.stats.error, item.stats.failed, item.stats.failures) == (0, 0, [])
            assert item.stats.verified > 0


async def test_reading_verifies_what_an_earlier_job_wrote() -> None:
    async with rig() as it:
        both = "[w]\nfilename=f\nrw=write\nsize=1m\nverify=md5\ndo_verify=0\n[r]\nstonewall\nfilename=f\nrw=randread\n"
        both += "size=1m\nverify=md5\n"
        _, reader = await it.run(both)
        assert (reader.stats.error, reader.stats.verified) == (0, 256)
        it.function.inject("corrupt", opcode=lib.NVME_CMD_READ, lba=5)
        _, reader = await it.run(both)
        assert (reader.stats.error, reader.stats.failed) == (84, 1)
        assert "(LBA 5)" in reader.stats.failures[0]


async def test_an_old_block_is_not_taken_for_the_last_one() -> None:
    """The device says that it wrote a block, and did not: what an earlier run left there is whole, but old."""
    async with rig() as it:
        job = "[v]\nrw=randwrite\nbs=4k\nsize=256k\nverify=crc32c\n"
        (first,) = await it.run(job + "randseed=1\n")
        assert (first.stats.error, first.stats.verified) == (0, 64)
        fault = it.function.inject("status", opcode=lib.NVME_CMD_WRITE, lba=9, status=0)
        (second,) = await it.run(job + "randseed=2\n")
        assert fault.count == 1
        assert (second.stats.error, second.stats.failed) == (84, 1)
        assert "(LBA 9): it is of another write" in second.stats.failures[0]
        # Numbers are not known to a run that did not write, nor asked for.
        (other,) = await it.run(job + "randseed=2\nverify_only=1\n")
        assert (other.stats.error, other.stats.verified) == (0, 64)
        it.function.inject("status", opcode=lib.NVME_CMD_WRITE, lba=9, status=0)
        (unasked,) = await it.run(job + "randseed=3\nverify_write_sequence=0\n")
        assert (unasked.stats.error, unasked.stats.verified) == (0, 64)


async def test_sync_writes_are_forced_to_the_medium() -> None:
    """A fault of writes with Force Unit Access meets all of them, and no other write; reads are not concerned."""
    async with rig() as it:
        forced = {"cdw12": (lib.NVME_RW_FUA, lib.NVME_RW_FUA)}
        it.function.inject("status", match=forced, times=None, status=lib.NVME_SC_WRITE_FAULT)
        for line, failed in (("sync=1", 16), ("sync=dsync", 16), ("sync=0", 0), ("", 0)):
            (item,) = await it.run(
                f"[w]\nrw=write\nbs=4k\nsize=64k\niodepth=4\ncontinue_on_error=io\n{line}\n"
            )
            assert (item.stats.failed, item.stats.directions[1].ios) == (failed, 16 - failed)
        (item,) = await it.run("[r]\nrw=read\nbs=4k\nsize=64k\nsync=1\n")
        assert (item.stats.failed, item.stats.directions[0].ios) == (0, 16)


async def test_a_command_that_fails_is_named() -> None:
    async with rig() as it:
        status = lib.NVME_SC_WRITE_FAULT
        it.function.inject("status", opcode=lib.NVME_CMD_WRITE, lba=3, status=status)
        (item,) = await it.run("[w]\nrw=write\nbs=4k\nsize=64k\n")
        assert item.stats.error == 5
        assert "(LBA 3)" in item.stats.failures[0]
        it.function.inject("status", opcode=lib.NVME_CMD_WRITE, lba=3, status=status)
        (item,) = await it.run("[w]\nrw=write\nbs=4k\nsize=64k\ncontinue_on_error=io\n")
        assert (item.stats.error, item.stats.directions[1].ios, item.stats.failed) == (0, 15, 1)


def test_what_was_written_last_counts() -> None:
    written = Written(64 << 10, 4096)
    whole = Ios(np.ones(1, np.uint8), np.array([0], np.uint64), np.array([16384], np.uint64))
    part = Ios(np.ones(1, np.uint8), np.array([4096], np.uint64), np.array([4096], np.uint64))
    written.add(whole)
    written.add(part)
    ios, numbers = written.remaining(ordered=True)
    assert (ios.offset.tolist(), numbers.tolist()) == ([4096], [1])
