"""Regions of a served function: BARs and configuration space by message and by mapping, resets, portals."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from pvfio.abi import ffi, lib
from pvfio.vfio_user import messages
from pvfio.vfio_user.messages import RegionInfo
from tests.vfio_user.raw import CONFIG, RawClient, Served, serve

pytestmark = pytest.mark.touches_c

WRITE, MULTI = lib.VFIO_USER_REGION_WRITE, lib.VFIO_USER_REGION_WRITE_MULTI
BAR0, BAR2, COMMAND = 0x10, 0x18, 4
SCRATCH, REGISTERS = 0x4000, 0x4000


async def region(client: RawClient, index: int, argsz: int = 4096) -> tuple[RegionInfo, list[int]]:
    body = RegionInfo.request(index, argsz)
    reply = await client.call(lib.VFIO_USER_DEVICE_GET_REGION_INFO, body)
    assert reply.error == 0
    return RegionInfo.parse(reply.body), reply.fds


async def test_an_area_is_mapped(client: RawClient) -> None:
    info, fds = await region(client, 0)
    assert info.flags & lib.VFIO_REGION_INFO_FLAG_MMAP
    assert info.areas == ((0, SCRATCH),)
    with mmap.mmap(fds[0], SCRATCH, offset=info.offset) as area:
        os.close(fds[0])
        area[:5] = b"hello"
        assert await client.read_bytes(0, 0, 5) == b"hello"
        await client.write_bytes(0, 8, b"back")
        assert area[8:12] == b"back"


async def test_a_short_answer_about_an_area(client: RawClient) -> None:
    """QEMU asks with 32 bytes first, checks cap_offset all the same, and closes the file."""
    reply = await client.call(lib.VFIO_USER_DEVICE_GET_REGION_INFO, RegionInfo.request(0, 32))
    assert len(reply.body) == 32
    argsz, flags, _, offset = struct.unpack_from("<4I", reply.body)
    assert (argsz, flags, offset) == (64, 15, 32)
    for fd in reply.fds:
        os.close(fd)
    reply = await client.call(lib.VFIO_USER_DEVICE_GET_REGION_INFO, RegionInfo.request(0, 40))
    assert len(reply.body) == 40
    for fd in reply.fds:
        os.close(fd)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 16, 64, 100, 4095])
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 7, 8, 0x3FF])
async def test_sizes(client: RawClient, offset: int, size: int) -> None:
    data = os.urandom(size)
    await client.write_bytes(0, 0, b"\xaa" * 0x2000)
    await client.write_bytes(0, offset, data)
    whole = await client.read_bytes(0, 0, 0x2000)
    assert whole[offset : offset + size] == data
    assert set(whole[:offset] + whole[offset + size :]) == {0xAA}
    assert await client.read_bytes(0, offset, size) == data


async def test_a_whole_bar(client: RawClient) -> None:
    data = await client.read_bytes(0, 0, 0x8000)
    assert data[REGISTERS : REGISTERS + 4] == b"TEST"
    await client.write_bytes(0, 0, bytes(range(256)) * 128)
    assert await client.read_bytes(0, 0, SCRATCH) == bytes(range(256)) * 64


async def test_config_at_once(client: RawClient) -> None:
    whole = await client.read_bytes(CONFIG, 0, 4096)
    assert whole[:4] == b"\x34\x12\xe8\x11"
    pieces = [await client.read_bytes(CONFIG, at, size) for at, size in ((0, 1), (1, 2), (3, 61), (64, 192))]
    assert b"".join(pieces) == whole[:256]
    assert await client.read(CONFIG, 0x100) == 0


async def test_bar_sizing(client: RawClient) -> None:
    """All ones are written and the size is read; a move moves nothing (PCI Local Bus 3.0 6.2.5.1)."""
    await client.write_bytes(CONFIG, BAR0, b"\xff" * 24)
    low, high, second, *rest = struct.unpack("<6I", await client.read_bytes(CONFIG, BAR0, 24))
    assert (low, high) == (0xFFFF_8000 | 0xC, 0xFFFF_FFFF)
    assert (second, rest) == (0xFFFF_F000, [0, 0, 0])
    await client.write(CONFIG, BAR0, 0xFE000000)
    await client.write(CONFIG, BAR0 + 4, 1)
    assert await client.read(CONFIG, BAR0, 8) == 0x1_FE00_000C
    await client.write(CONFIG, 0x30, 0xFFFFFFFE)
    assert await client.read(CONFIG, 0x30) == 0, "there is no ROM"
    await client.write_bytes(0, 0, b"here")
    assert await client.read_bytes(0, 0, 4) == b"here"


async def test_read_only_registers(client: RawClient) -> None:
    before = await client.read_bytes(CONFIG, 0, 16)
    await client.write_bytes(CONFIG, 0, b"\xff" * 4)
    await client.write_bytes(CONFIG, 8, b"\xff" * 4)
    assert (await client.read_bytes(CONFIG, 0, 16))[8:12] == before[8:12]
    assert await client.read(CONFIG, 0) == 0x11E81234


async def test_decoding_off(client: RawClient) -> None:
    await client.write_bytes(0, 0, b"kept")
    await client.write(CONFIG, COMMAND, 0, 2)
    assert await client.read_bytes(0, 0, 4) == b"\xff" * 4
    await client.write_bytes(0, 0, b"lost")
    await client.write(CONFIG, COMMAND, 2, 2)
    assert await client.read_bytes(0, 0, 4) == b"kept"


async def test_power(client: RawClient) -> None:
    """In D3hot neither BARs decode nor DMA is made; other states are not there."""
    at = await client.find_capability(lib.PCI_CAP_ID_PM) + lib.PCI_PM_CTRL
    await client.write(CONFIG, at, 3, 2)
    assert await client.read(CONFIG, at, 2) & 3 == 3
    assert await client.read(0, 0) == 0xFFFFFFFF
    await client.write(CONFIG, at, 1, 2)
    assert await client.read(CONFIG, at, 2) & 3 == 3
    await client.write(CONFIG, at, 0, 2)
    assert await client.read(0, REGISTERS) == 0x54534554


async def test_a_fresh_client_finds_decoding_on(served: Served) -> None:
    """As a device that Linux's vfio-pci opens: drivers that never touch the bit rely on it."""
    client = await served.connect()
    assert await client.read(CONFIG, COMMAND, 2) == 2
    assert await client.read(0, REGISTERS) == 0x54534554


async def test_reset_puts_back(client: RawClient) -> None:
    await client.write_bytes(0, 0, b"gone")
    await client.write(CONFIG, BAR0, 0xFE000000)
    await client.write(CONFIG, lib.PCI_INTERRUPT_LINE, 11, 1)
    await client.write(CONFIG, lib.PCI_CACHE_LINE_SIZE, 16, 1)
    assert (await client.call(lib.VFIO_USER_DEVICE_RESET)).error == 0
    assert await client.read(CONFIG, COMMAND, 2) == 6
    assert await client.read(CONFIG, BAR0) == 0xFE00000C
    assert await client.read(CONFIG, lib.PCI_INTERRUPT_LINE, 1) == 11
    assert await client.read(CONFIG, lib.PCI_CACHE_LINE_SIZE, 1) == 16
    assert await client.read(0, 0) == 0


async def test_flr(client: RawClient) -> None:
    """As after power-on, at once (PCI Express 4.0 6.6.2)."""
    await client.write_bytes(0, 0, b"gone")
    await client.write(CONFIG, BAR0, 0xFE000000)
    await client.flr()
    assert await client.read(CONFIG, COMMAND, 2) == 0
    assert await client.read(CONFIG, BAR0) == 0xC
    await client.write(CONFIG, COMMAND, 2, 2)
    assert await client.read(0, 0) == 0


async def test_write_multi(client: RawClient) -> None:
    writes = [(0, 0, b"a"), (1, 0, b"bc"), (8, 0, b"12345678"), (REGISTERS + 4, 0, b"\1\0\0\0")]
    reply = await client.call(MULTI, messages.write_multi(writes))
    assert reply.body == struct.pack("<Q", 4)
    assert await client.read_bytes(0, 0, 16) == b"abc" + bytes(5) + b"12345678"
    assert await client.read(0, REGISTERS + 4) == 0xFFFFFFFE
    bad = [(0, 0, b"x"), (0x8000, 0, b"y"), (1, 0, b"z")]
    assert (await client.call(MULTI, messages.write_multi(bad))).error == errno.EINVAL
    assert await client.read_bytes(0, 0, 3) == b"xbc", "up to the one that cannot be"
    await client.post(MULTI, messages.write_multi([(0, 0, b"posted!!")]))
    assert await client.read_bytes(0, 0, 8) == b"posted!!"
    many = [(i % SCRATCH, 0, b"m") for i in range(20000)]
    assert (await client.call(MULTI, messages.write_multi(many))).body == struct.pack("<Q", 20000)


# NVMe: the doorbell page.


async def test_nvme_doorbell_page(tmp_path: Path) -> None:
    """Mapped apart from the registers and from MSI-X; the file reaches to the page's end, and cannot be cut."""
    async with serve(tmp_path, "nvme") as served:
        client = await served.connect()
        info, fds = await region(client, 0)
        assert info.areas == ((0x1000, 0x1000),)
        assert os.fstat(fds[0]).st_size >= info.offset + 0x2000
        with pytest.raises(OSError):
            os.truncate(fds[0], 0)
        with mmap.mmap(fds[0], 0x1000, offset=info.offset + 0x1000) as page:
            assert len(page) == 0x1000
        os.close(fds[0])
        assert await client.read(0, 8) == 0x20000
        assert await client.read(0, 0, 8) & 0xFFFF == 1023
        assert await client.read(0, 0x2000 + 12) == 1, "a vector's mask"


# DSA: portals.

SWERR = 0xC0


async def submit(client: RawClient, offset: int, descriptor: bytes, how: str) -> None:
    if how == "whole":
        await client.write_bytes(2, offset, descriptor)
    elif how == "posted":
        await client.post(WRITE, messages.region_access(offset, 2, 64, descriptor))
    elif how == "words":
        for at in range(0, 64, 8):
            await client.write_bytes(2, offset + at, descriptor[at : at + 8])
    elif how == "posted words":
        for at in range(0, 64, 8):
            body = messages.region_access(offset + at, 2, 8, descriptor[at : at + 8])
            await client.post(WRITE, body)
    else:
        writes = [(offset + at, 2, descriptor[at : at + 8]) for at in range(0, 64, 8)]
        assert (await client.call(MULTI, messages.write_multi(writes))).error == 0


@pytest.fixture
async def dsa(tmp_path: Path) -> AsyncIterator[RawClient]:
    async with serve(tmp_path, "dsa") as served:
        client = await served.connect()
        await client.enable()
        yield client


@pytest.mark.parametrize("how", ["whole", "posted", "words", "posted words", "multi"])
async def test_submission(dsa: RawClient, how: str) -> None:
    """To a work queue that is not enabled: the software error tells what arrived (Intel DSA 1.2 5.7)."""
    info, fds = await region(dsa, 2)
    assert (info.areas, fds) == ((), [])
    descriptor = ffi.new("struct dsa_hw_desc *")
    descriptor.flags_opcode = lib.DSA_OPCODE_MEMMOVE << lib.DSA_DESC_OPCODE_SHIFT
    await submit(dsa, 3 * lib.IDXD_WQ_PORTAL_STRIDE + 0x140, bytes(ffi.buffer(descriptor)), how)
    error = await dsa.read(0, SWERR, 8)
    assert error & lib.IDXD_SWERR_VALID
    assert error >> lib.IDXD_SWERR_WQ_IDX_SHIFT & 0xFF == 3
    assert error >> lib.IDXD_SWERR_OPERATION_SHIFT & 0xFF == lib.DSA_OPCODE_MEMMOVE
    assert error >> lib.IDXD_SWERR_ERROR_SHIFT & 0xFF == lib.DSA_SWERR_WQ_NOT_ENABLED


@pytest.mark.parametrize(
    "order",
    [(0, 1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7), (0, 2, 1, 3, 4, 5, 6, 7), (7, 6, 5, 4, 3, 2, 1, 0)],
)
async def test_no_submission(dsa: RawClient, order: tuple[int, ...]) -> None:
    """Fewer than eight words, or not in ascending order, are none."""
    for word in order:
        await dsa.write(2, 8 * word, 0, 8)
    assert await dsa.read(0, SWERR, 8) == 0
    assert await dsa.read(2, 0, 8) == (1 << 64) - 1, "portals read as ones"


async def test_submissions_in_one_write(dsa: RawClient) -> None:
    await dsa.write_bytes(2, 0xFC0, bytes(128))
    assert await dsa.read(0, SWERR, 8) & lib.IDXD_SWERR_VALID
    await dsa.write_bytes(2, 0, bytes(4096))
    for size in (1, 2, 4, 12):
        await dsa.write_bytes(2, 0, bytes(size))
    await trio.lowlevel.checkpoint()
