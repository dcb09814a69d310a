"""Socket pairs with a channel at one end or at both; served devices and their clients."""

from __future__ import annotations

import gc
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from pvfio.vfio_user.channel import Channel
from tests.vfio_user.channel_peer import Peer, open_fds
from tests.vfio_user.raw import RawClient, Served, serve

MAX_MESSAGE = 4096
MAX_FDS = 4

PeerFactory = Callable[..., tuple[Channel, Peer]]


@pytest.fixture
def no_leaked_fds() -> Iterator[None]:
    """Every descriptor that the test opened or was sent is closed at its end."""
    gc.collect()
    before = open_fds()
    yield
    gc.collect()
    assert open_fds() == before


@pytest.fixture
def with_peer(no_leaked_fds: None) -> Iterator[PeerFactory]:
    """Makes a channel and the plain socket at its other end."""
    made: list[Channel | Peer] = []

    def make(max_message: int = MAX_MESSAGE, max_fds: int = MAX_FDS) -> tuple[Channel, Peer]:
        ours, theirs = socket.socketpair()
        channel, peer = Channel(ours, max_message=max_message, max_fds=max_fds), Peer(theirs)
        made.extend((channel, peer))
        return channel, peer

    yield make
    for end in made:
        end.close()
    made.clear()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A teaching device. A module whose device is to be another one has its own."""
    async with serve(tmp_path) as server:
        yield server


@pytest.fixture
async def client(served: Served) -> RawClient:
    """Has negotiated; the device decodes memory and may do DMA."""
    client = await served.connect()
    await client.enable()
    return client
