"""A client and a server that does as it is told, in one process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from pvfio.vfio_user.client import VfioUserVfio
from tests.vfio_user.client.fake_server import FakeServer


@pytest.fixture
async def server(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[FakeServer]:
    fake = FakeServer(tmp_path / "socket")
    await nursery.start(fake.run)
    yield fake
    nursery.cancel_scope.cancel()


@pytest.fixture
async def vfio(server: FakeServer) -> AsyncIterator[VfioUserVfio]:
    async with VfioUserVfio([str(server.path)], ram=16 << 20, deadline=5, grace=0.2) as vfio:
        yield vfio


@pytest.fixture
async def device(vfio: VfioUserVfio) -> AsyncIterator[Any]:
    async with vfio.open_device(vfio.paths[0]) as device:
        yield device


@pytest.fixture
async def two(
    server: FakeServer, tmp_path: Path, nursery: trio.Nursery
) -> AsyncIterator[tuple[FakeServer, FakeServer, VfioUserVfio]]:
    other = FakeServer(tmp_path / "other")
    await nursery.start(other.run)
    async with VfioUserVfio([str(server.path), str(other.path)], ram=16 << 20, grace=0.2) as vfio:
        yield server, other, vfio
