"""Hostile clients, one after the other, against served devices: the parser and the device together.

``PVFIO_SERVER_FUZZ_SECONDS`` says how long (ten minutes at night, a minute in CI under the sanitizers, else seconds),
``PVFIO_FUZZ_SEED`` makes a campaign again. After every client a well-behaved one is served; in the end no descriptor,
no mapping and no memory is left over.
"""

from __future__ import annotations

import gc
import os
import re
import time
from pathlib import Path

import pytest
import trio

from pvfio.abi import lib
from tests.vfio_user.hostile import HostileClient
from tests.vfio_user.raw import CONFIG, Served, serve

pytestmark = pytest.mark.touches_c

SECONDS = float(os.environ.get("PVFIO_SERVER_FUZZ_SECONDS") or 6) / 3
SEED = int(os.environ.get("PVFIO_FUZZ_SEED") or time.time_ns() // 1000)
MESSAGES = 200
WARM_UP = 20
GROWTH = 64 << 20
KINDS = ("nvme", "dsa", "testdev")


def footprint() -> tuple[int, int, int]:
    """Descriptors, mappings of files, bytes of memory that only this process has."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("memfd:")
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert anonymous
    return len(os.listdir("/proc/self/fd")), maps, int(anonymous[1]) << 10


async def well_behaved(served: Served) -> tuple[int, int, int]:
    """Negotiates, and finds the device as it should be. The footprint: the client before it was cleaned up after."""
    client = await served.connect()
    assert await client.read(CONFIG, 0, 2) > 0
    await client.enable()
    assert (await client.read(CONFIG, 4, 2)) & 6 == 6
    now = footprint()
    client.close()
    served.clients.remove(client)
    return now


async def dsa_tables(served: Served) -> tuple[int, int]:
    """Where a DSA says its GRPCFG and WQCFG are."""
    client = await served.connect()
    await client.enable()
    words = await client.read(0, lib.IDXD_TABLE_OFFSET, 8)
    client.close()
    served.clients.remove(client)
    return (words & 0xFFFF) * 0x100, (words >> 16 & 0xFFFF) * 0x100


@pytest.mark.parametrize("kind", KINDS)
async def test_hostile_clients(kind: str, tmp_path: Path) -> None:
    """No crash, no hang, no leak; whatever the last client did, the next one is served."""
    clients = messages = 0
    before: tuple[int, int, int] | None = None
    after = (0, 0, 0)
    async with serve(tmp_path, kind) as served:
        tables = await dsa_tables(served)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end or before is None:
            hostile = HostileClient(SEED + clients, kind)
            hostile.dsa_tables = tables
            with trio.fail_after(60):
                await hostile.run(served.server.path, MESSAGES)
                after = await well_behaved(served)
            clients += 1
            messages += hostile.sent
            if clients == WARM_UP:
                before = after
    commands = served.device.engine.stats().gates if kind != "testdev" else clients
    print(
        f"{kind}: seed {SEED}, {clients} clients, {messages} messages, {commands} commands; {before} -> {after}"
    )
    assert commands, "nothing got as far as the engine"
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # It keeps what is freed for a while.
        assert after[2] - before[2] < GROWTH
