"""DEVICE_SET_IRQS in all its forms, over real sockets: what is set, what rings, what is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from pvfio.abi import lib
from tests.vfio_user.raw import (
    BOOL,
    CONFIG,
    ERR,
    EVENTFD,
    INTX,
    MASK,
    MSI,
    MSIX,
    NONE,
    REQ,
    TRIGGER,
    UNMASK,
    RawClient,
    Served,
    memory,
    serve,
)

pytestmark = pytest.mark.touches_c

RAISE, ACK = 0x4034, 0x4038
EINVAL, ENOTTY = errno.EINVAL, errno.ENOTTY


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path, intx=True, vectors=40) as server:
        yield server


@pytest.fixture
def events() -> Iterator[list[int]]:
    """Forty eventfds."""
    with ExitStack() as stack:
        fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(40)]
        for fd in fds:
            stack.callback(os.close, fd)
        yield fds


def rang(fd: int) -> int:
    """How often, since it was asked last."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# Index, flags, start, count, fds (eventfds 0..n-1), bools -> errno; each on a fresh device where nothing is set up.
FRESH: list[tuple[int, int, int, int, int, bytes, int]] = [
    (INTX, EVENTFD | TRIGGER, 0, 1, 1, b"", 0),
    (INTX, EVENTFD | TRIGGER, 0, 1, 0, b"", 0),
    (INTX, EVENTFD | TRIGGER, 0, 0, 0, b"", EINVAL),
    (INTX, EVENTFD | TRIGGER, 0, 2, 2, b"", EINVAL),
    (INTX, EVENTFD | TRIGGER, 1, 1, 1, b"", EINVAL),
    (INTX, EVENTFD | TRIGGER, 0, 1, 2, b"", EINVAL),
    (INTX, NONE | TRIGGER, 0, 0, 0, b"", EINVAL),
    (INTX, NONE | TRIGGER, 0, 1, 0, b"", EINVAL),
    (INTX, NONE | TRIGGER, 0, 1, 1, b"", EINVAL),
    (INTX, BOOL | TRIGGER, 0, 1, 0, b"\1", EINVAL),
    (INTX, NONE | MASK, 0, 1, 0, b"", EINVAL),
    (INTX, NONE | UNMASK, 0, 1, 0, b"", EINVAL),
    (INTX, EVENTFD | UNMASK, 0, 1, 1, b"", EINVAL),
    (MSI, EVENTFD | TRIGGER, 0, 1, 1, b"", EINVAL),
    (MSI, NONE | TRIGGER, 0, 0, 0, b"", EINVAL),
    (MSIX, EVENTFD | TRIGGER, 0, 1, 0, b"", 0),
    (MSIX, EVENTFD | TRIGGER, 0, 16, 16, b"", 0),
    (MSIX, EVENTFD | TRIGGER, 39, 1, 1, b"", 0),
    (MSIX, EVENTFD | TRIGGER, 40, 1, 1, b"", EINVAL),
    (MSIX, EVENTFD | TRIGGER, 39, 2, 2, b"", EINVAL),
    (MSIX, EVENTFD | TRIGGER, 0, 2, 1, b"", EINVAL),
    (MSIX, EVENTFD | TRIGGER, 0, 1, 2, b"", EINVAL),
    (MSIX, EVENTFD | TRIGGER, 0, 0, 0, b"", EINVAL),
    (MSIX, NONE | TRIGGER, 0, 0, 0, b"", EINVAL),
    (MSIX, NONE | TRIGGER, 0, 1, 0, b"", EINVAL),
    (MSIX, BOOL | TRIGGER, 0, 2, 0, b"\1\1", EINVAL),
    (MSIX, NONE | MASK, 0, 1, 0, b"", ENOTTY),
    (MSIX, NONE | UNMASK, 0, 1, 0, b"", ENOTTY),
    (MSIX, BOOL | MASK, 0, 1, 0, b"\1", ENOTTY),
    (MSIX, EVENTFD | MASK, 0, 1, 1, b"", ENOTTY),
    (MSIX, EVENTFD | UNMASK, 0, 1, 1, b"", ENOTTY),
    (ERR, EVENTFD | TRIGGER, 0, 1, 1, b"", 0),
    (ERR, EVENTFD | TRIGGER, 0, 1, 0, b"", 0),
    (ERR, EVENTFD | TRIGGER, 0, 0, 0, b"", EINVAL),
    (ERR, NONE | TRIGGER, 0, 1, 0, b"", EINVAL),
    (ERR, NONE | MASK, 0, 1, 0, b"", ENOTTY),
    (REQ, EVENTFD | TRIGGER, 0, 1, 1, b"", 0),
    (REQ, BOOL | TRIGGER, 0, 1, 0, b"\1", 0),
    (REQ, EVENTFD | UNMASK, 0, 1, 1, b"", ENOTTY),
    (REQ, EVENTFD | TRIGGER, 1, 1, 1, b"", EINVAL),
    (5, NONE | TRIGGER, 0, 0, 0, b"", EINVAL),
    (0xFFFFFFFF, NONE | TRIGGER, 0, 0, 0, b"", EINVAL),
    (MSIX, NONE, 0, 1, 0, b"", EINVAL),
    (MSIX, TRIGGER, 0, 1, 0, b"", EINVAL),
    (MSIX, NONE | EVENTFD | TRIGGER, 0, 1, 1, b"", EINVAL),
    (MSIX, NONE | TRIGGER | 0x40, 0, 1, 0, b"", EINVAL),
    (MSIX, EVENTFD | TRIGGER, 0xFFFFFFFF, 1, 1, b"", EINVAL),
    (MSIX, EVENTFD | TRIGGER, 1, 0xFFFFFFFF, 0, b"", EINVAL),
]


@pytest.mark.parametrize(("index", "flags", "start", "count", "fds", "bools", "number"), FRESH)
async def test_fresh(
    client: RawClient,
    events: list[int],
    index: int,
    flags: int,
    start: int,
    count: int,
    fds: int,
    bools: bytes,
    number: int,
) -> None:
    assert await client.set_irqs(index, flags, start, count, fds=events[:fds], bools=bools) == number


@pytest.mark.parametrize("index", [INTX, MSIX, ERR, REQ])
async def test_what_is_no_eventfd(client: RawClient, events: list[int], index: int) -> None:
    fd = memory()
    assert await client.set_irqs(index, EVENTFD | TRIGGER, 0, 1, fds=[fd]) == EINVAL
    os.close(fd)
    assert await client.set_irqs(index, EVENTFD | TRIGGER, 0, 1, fds=events[:1]) == 0


async def test_msix_in_chunks(client: RawClient, events: list[int]) -> None:
    """As QEMU: enabled without an eventfd, then vectors, as many with a message as the server takes."""
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 1) == 0
    for start in range(0, 40, 16):
        chunk = events[start : start + 16]
        assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, start, len(chunk), fds=chunk) == 0
    for vector in range(40):
        await client.write(0, RAISE, vector)
    assert [rang(fd) for fd in events] == [1] * 40
    assert await client.set_irqs(MSIX, NONE | TRIGGER, 0, 0) == 0
    await client.write(0, RAISE, 3)
    await client.write(0, ACK, 0)
    assert not any(rang(fd) for fd in events)


async def test_msix_replaced_and_taken_away(client: RawClient, events: list[int]) -> None:
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 3, fds=events[:3]) == 0
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 1, 1, fds=events[5:6]) == 0
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 2, 1) == 0
    for vector in range(3):
        await client.write(0, RAISE, vector)
    assert [rang(fd) for fd in events[:6]] == [1, 0, 0, 0, 0, 1]
    assert await client.read(0, 0x5000 + 40 * 16, 8) == 1 << 2, "what nobody hears is pending"
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 2, 1, fds=events[2:3]) == 0
    assert rang(events[2]) == 1, "and is sent when somebody does"
    assert await client.read(0, 0x5000 + 40 * 16, 8) == 0


async def test_a_block_with_a_bad_descriptor(client: RawClient, events: list[int]) -> None:
    """None of the block's vectors has an eventfd afterwards, and the others keep theirs."""
    fd = memory()
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 4, fds=events[:4]) == 0
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 1, 2, fds=[events[5], fd]) == EINVAL
    os.close(fd)
    for vector in range(4):
        await client.write(0, RAISE, vector)
    assert [rang(fd) for fd in events[:6]] == [1, 0, 0, 1, 0, 0]


async def test_loopback(client: RawClient, events: list[int]) -> None:
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 3, fds=events[:3]) == 0
    assert await client.set_irqs(MSIX, NONE | TRIGGER, 0, 2) == 0
    assert await client.set_irqs(MSIX, BOOL | TRIGGER, 0, 3, bools=b"\0\1\1") == 0
    assert [rang(fd) for fd in events[:3]] == [1, 2, 1]
    for index in (ERR, REQ):
        assert await client.set_irqs(index, EVENTFD | TRIGGER, 0, 1, fds=events[4:5]) == 0
        assert await client.set_irqs(index, NONE | TRIGGER) == 0
        assert await client.set_irqs(index, BOOL | TRIGGER, bools=b"\1") == 0
        assert await client.set_irqs(index, BOOL | TRIGGER, bools=b"\0") == 0
        assert rang(events[4]) == 2
        assert await client.set_irqs(index, NONE | TRIGGER, 0, 0) == 0
        assert await client.set_irqs(index, NONE | TRIGGER) == EINVAL


async def test_one_of_intx_and_msix(client: RawClient, events: list[int]) -> None:
    assert await client.set_irqs(INTX, EVENTFD | TRIGGER, fds=events[:1]) == 0
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, fds=events[1:2]) == EINVAL
    assert await client.set_irqs(INTX, NONE | TRIGGER, 0, 0) == 0
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, fds=events[1:2]) == 0
    assert await client.set_irqs(INTX, EVENTFD | TRIGGER, fds=events[:1]) == EINVAL


async def test_intx(client: RawClient, events: list[int]) -> None:
    """It masks itself, and fires again when it is unmasked with the line up."""
    event = events[0]
    assert await client.set_irqs(INTX, EVENTFD | TRIGGER, fds=[event]) == 0
    await client.write(0, RAISE, 0)
    assert rang(event) == 1
    await client.write(0, ACK, 0)
    await client.write(0, RAISE, 0)
    assert rang(event) == 0, "masked by itself"
    assert await client.set_irqs(INTX, NONE | UNMASK) == 0
    assert rang(event) == 1, "the line is up"
    await client.write(0, ACK, 0)
    assert await client.set_irqs(INTX, BOOL | UNMASK, bools=b"\1") == 0
    assert rang(event) == 0
    await client.write(0, RAISE, 0)
    assert rang(event) == 1
    await client.write(0, ACK, 0)
    assert await client.set_irqs(INTX, NONE | UNMASK) == 0
    assert await client.set_irqs(INTX, BOOL | MASK, bools=b"\0") == 0
    assert await client.set_irqs(INTX, NONE | MASK) == 0
    await client.write(0, RAISE, 0)
    assert rang(event) == 0
    assert await client.set_irqs(INTX, BOOL | UNMASK, bools=b"\0") == 0
    assert rang(event) == 0
    assert await client.set_irqs(INTX, NONE | TRIGGER) == 0
    assert rang(event) == 1
    assert await client.set_irqs(INTX, EVENTFD | MASK, fds=[event]) == ENOTTY


async def test_intx_up_before_it_is_set_up(client: RawClient, events: list[int]) -> None:
    await client.write(0, RAISE, 0)
    assert await client.set_irqs(INTX, EVENTFD | TRIGGER, fds=events[:1]) == 0
    assert rang(events[0]) == 1


async def test_intx_disable(client: RawClient, events: list[int]) -> None:
    """The bit of the command register silences the pin; the status register tells of it all the same."""
    assert await client.set_irqs(INTX, EVENTFD | TRIGGER, fds=events[:1]) == 0
    await client.write(CONFIG, 4, 6 | 0x400, 2)
    await client.write(0, RAISE, 0)
    assert rang(events[0]) == 0
    assert await client.read(CONFIG, 6, 2) & 8
    await client.write(CONFIG, 4, 6, 2)
    assert rang(events[0]) == 1


async def test_intx_unmasked_by_an_eventfd(client: RawClient, events: list[int]) -> None:
    """The last one given does it, and no other."""
    event, unmask, other = events[:3]
    assert await client.set_irqs(INTX, EVENTFD | TRIGGER, fds=[event]) == 0
    assert await client.set_irqs(INTX, EVENTFD | UNMASK, fds=[other]) == 0
    assert await client.set_irqs(INTX, EVENTFD | UNMASK, fds=[unmask]) == 0
    await client.write(0, RAISE, 0)
    os.eventfd_write(other, 1)
    await client.read(CONFIG, 0)
    assert rang(other) == 1, "nobody listens to it"
    assert rang(event) == 1
    os.eventfd_write(unmask, 1)
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(event)
    assert rang(event) == 1
    assert rang(unmask) == 0, "it was read"
    assert await client.set_irqs(INTX, EVENTFD | UNMASK) == 0
    os.eventfd_write(unmask, 1)
    await client.read(CONFIG, 0)
    assert rang(unmask) == 1, "nobody listens any more"
    assert await client.set_irqs(INTX, EVENTFD | UNMASK, fds=[other]) == 0
    assert await client.set_irqs(INTX, NONE | TRIGGER, 0, 0) == 0
    assert await client.set_irqs(INTX, EVENTFD | TRIGGER, fds=[event]) == 0
    assert await client.set_irqs(INTX, EVENTFD | UNMASK, fds=[unmask]) == 0


async def test_a_full_eventfd(client: RawClient, events: list[int]) -> None:
    """The server does not wait for it."""
    most = (1 << 64) - 2
    for fd in events[:3]:
        os.eventfd_write(fd, most)
        os.set_blocking(fd, True)
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, fds=events[:1]) == 0
    assert await client.set_irqs(MSIX, NONE | TRIGGER) == 0
    await client.write(0, RAISE, 0)
    assert await client.set_irqs(MSIX, NONE | TRIGGER, 0, 0) == 0
    assert await client.set_irqs(INTX, EVENTFD | TRIGGER, fds=events[1:2]) == 0
    await client.write(0, RAISE, 0)
    assert await client.set_irqs(REQ, EVENTFD | TRIGGER, fds=events[2:3]) == 0
    assert await client.set_irqs(REQ, NONE | TRIGGER) == 0
    for fd in events[:3]:
        assert os.eventfd_read(fd) >= most


@pytest.mark.parametrize("how", ["reset", "flr"])
async def test_interrupts_outlive_a_reset(client: RawClient, events: list[int], how: str) -> None:
    """As those of vfio-pci: after a function level reset by configuration space nobody sets them up again."""
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 2, fds=events[:2]) == 0
    if how == "reset":
        assert (await client.call(lib.VFIO_USER_DEVICE_RESET)).error == 0
        assert await client.read(CONFIG, 4, 2) & 7 == 6, "the command register is put back"
    else:
        await client.flr()
        assert await client.read(CONFIG, 4, 2) & 7 == 0, "the command register is as after power-on"
        await client.enable()
    await client.write(0, RAISE, 1)
    assert [rang(fd) for fd in events[:2]] == [0, 1]


async def test_msix_of_the_client_is_virtual(client: RawClient, events: list[int]) -> None:
    """The table keeps what is written and nothing follows; so do enable and function mask of the capability."""
    assert await client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 1, fds=events[:1]) == 0
    table = 0x5000
    assert await client.read_bytes(0, table, 32) == (bytes(12) + b"\1\0\0\0") * 2
    await client.write_bytes(0, table, bytes.fromhex("0010e0fe 00000000 21400000 01000000"))
    assert await client.read(0, table, 8) == 0xFEE01000
    assert await client.read(0, table + 8, 2) == 0x4021
    control = await client.find_capability(lib.PCI_CAP_ID_MSIX) + 2
    assert await client.read(CONFIG, control, 2) == 39
    await client.write(CONFIG, control, 0xC000, 2)
    assert await client.read(CONFIG, control, 2) == 0xC000 | 39
    assert await client.read(CONFIG, control - 2, 4) >> 16 == 0xC000 | 39
    await client.write(0, RAISE, 0)
    assert rang(events[0]) == 1, "masked for the client's eyes alone"
    await client.write(CONFIG, control + 1, 0, 1)
    assert await client.read(CONFIG, control, 2) == 39
    await client.write(0, RAISE, 0)
    assert rang(events[0]) == 1, "and not disabled"
    assert (await client.call(lib.VFIO_USER_DEVICE_RESET)).error == 0
    await client.flr()
    await client.enable()
    assert await client.read_bytes(0, table, 16) == bytes(12) + b"\1\0\0\0"
