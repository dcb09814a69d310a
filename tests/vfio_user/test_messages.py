"""vfio-user bodies: what is built is parsed back, and what cannot be has its errno."""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.vfio_user import messages
from pvfio.vfio_user.messages import DeviceInfo, DmaMap, DmaUnmap, IrqInfo, IrqSet, RegionInfo, WireError
from pvfio.vfio_user.version import Limits, Version

MIB = 1 << 20
NONE, BOOL, EVENTFD = (
    lib.VFIO_IRQ_SET_DATA_NONE,
    lib.VFIO_IRQ_SET_DATA_BOOL,
    lib.VFIO_IRQ_SET_DATA_EVENTFD,
)
TRIGGER = lib.VFIO_IRQ_SET_ACTION_TRIGGER


@pytest.mark.parametrize(
    ("body", "parse"),
    [
        (DmaMap(0x1000, 0x2000, 1, 0x3000), DmaMap.parse),
        (DmaUnmap(0x1000, 0x2000), DmaUnmap.parse),
        (DmaUnmap(0, 0, 2), DmaUnmap.parse),
        (DmaUnmap((1 << 64) - 4096, 4096), DmaUnmap.parse),
        (DeviceInfo(3, 9, 5), DeviceInfo.parse),
        (IrqInfo(2, 1, 33), IrqInfo.parse),
        (IrqSet(2, BOOL | TRIGGER, 1, 3, b"\1\0\1"), IrqSet.parse),
        (IrqSet(2, EVENTFD | TRIGGER, 0, 8), IrqSet.parse),
        (Version(), Version.parse),
        (Version(Limits(16, 4096, 7, 1 << 21, True)), Version.parse),
        (Version(Limits(), None, 0, 1), Version.parse),
        (Version(Limits(), frozenset(), 0, 0), Version.parse),
    ],
)
def test_built_and_parsed(body: Any, parse: Callable[[bytes], Any]) -> None:
    assert parse(body.pack()) == body


def test_region_info() -> None:
    areas = ((0x1000, 0x1000), (0x3000, 0x2000))
    info = RegionInfo(2, 0x8000, 7, 0x10000, areas)
    short, whole = info.pack(32), info.pack(4096)
    assert (len(short), len(whole)) == (32, 32 + 16 + 32)
    assert struct.unpack_from("<IIII", short) == (80, 7 | lib.VFIO_REGION_INFO_FLAG_CAPS, 2, 32)
    found = RegionInfo.parse(whole)
    assert (found.index, found.size, found.offset, found.areas, found.argsz) == (
        2,
        0x8000,
        0x10000,
        areas,
        80,
    )
    assert RegionInfo.parse(short).areas == ()
    assert RegionInfo.parse(short).argsz == 80
    assert RegionInfo.parse(RegionInfo(7, 256, 3).pack(32)) == RegionInfo(7, 256, 3)
    assert RegionInfo.parse_request(RegionInfo.request(3, 80)) == (3, 80)


def test_accesses() -> None:
    assert messages.parse_region_read(messages.region_access(8, 0, 4), MIB) == (8, 0, 4)
    offset, region, data = messages.parse_region_write(messages.region_access(8, 2, 3, b"abc"), MIB)
    assert (offset, region, bytes(data)) == (8, 2, b"abc")
    reply = messages.region_access(8, 0, 3, b"xyz")
    assert bytes(messages.parse_region_reply(reply, 8, 0, 3, read=True)) == b"xyz"
    assert messages.parse_dma_read(messages.dma_access(4096, 64), MIB) == (4096, 64)
    address, data = messages.parse_dma_write(messages.dma_access(4096, 2, b"ab"), MIB)
    assert (address, bytes(data)) == (4096, b"ab")
    writes = [(0x1000, 0, b"12345678"), (4, 7, b"\6")]
    assert messages.parse_write_multi(messages.write_multi(writes)) == writes
    assert messages.write_multi_reply(2) == struct.pack("<Q", 2)


def dma_map(*, argsz: int = 32, flags: int = 3, offset: int = 0, address: int = 0, size: int = 4096) -> bytes:
    return struct.pack("<IIQQQ", argsz, flags, offset, address, size)


def dma_unmap(*, argsz: int = 24, flags: int = 0, address: int = 0, size: int = 4096) -> bytes:
    return struct.pack("<IIQQ", argsz, flags, address, size)


def irq_set(flags: int, start: int = 0, count: int = 1, data: bytes = b"", argsz: int | None = None) -> bytes:
    return struct.pack("<5I", 20 + len(data) if argsz is None else argsz, flags, 2, start, count) + data


def multi(count: int, length: int = 8, size: int = 24) -> bytes:
    return struct.pack("<QQII8s", count, 0, 0, length, b"")[: 8 + size]


BAD: list[tuple[str, Callable[..., Any], bytes, int]] = [
    ("map: empty", DmaMap.parse, b"", errno.EINVAL),
    ("map: short", DmaMap.parse, dma_map()[:-1], errno.EINVAL),
    ("map: long", DmaMap.parse, dma_map() + b"\0", errno.EINVAL),
    ("map: argsz", DmaMap.parse, dma_map(argsz=31), errno.EINVAL),
    ("map: no permission", DmaMap.parse, dma_map(flags=0), errno.EINVAL),
    ("map: unknown flag", DmaMap.parse, dma_map(flags=0x13), errno.EINVAL),
    ("map: nothing", DmaMap.parse, dma_map(size=0), errno.EINVAL),
    ("map: half a page", DmaMap.parse, dma_map(size=2048), errno.EINVAL),
    ("map: between pages", DmaMap.parse, dma_map(address=512), errno.EINVAL),
    ("map: past the end", DmaMap.parse, dma_map(address=(1 << 64) - 4096, size=8192), errno.EINVAL),
    ("map: offset", DmaMap.parse, dma_map(offset=1), errno.EINVAL),
    ("map: offset past all files", DmaMap.parse, dma_map(offset=1 << 63), errno.EINVAL),
    ("map: end past all files", DmaMap.parse, dma_map(offset=(1 << 63) - 4096), errno.EINVAL),
    ("unmap: short", DmaUnmap.parse, dma_unmap()[:8], errno.EINVAL),
    ("unmap: long", DmaUnmap.parse, dma_unmap() + bytes(8), errno.EINVAL),
    ("unmap: argsz", DmaUnmap.parse, dma_unmap(argsz=0), errno.EINVAL),
    ("unmap: unknown flag", DmaUnmap.parse, dma_unmap(flags=4), errno.EINVAL),
    ("unmap: dirty bitmap", DmaUnmap.parse, dma_unmap(flags=1) + bytes(16), errno.ENOTSUP),
    ("unmap: all of a range", DmaUnmap.parse, dma_unmap(flags=2), errno.EINVAL),
    ("unmap: nothing", DmaUnmap.parse, dma_unmap(size=0), errno.EINVAL),
    ("unmap: past the end", DmaUnmap.parse, dma_unmap(address=(1 << 64) - 4096, size=8192), errno.EINVAL),
    ("info: short", DeviceInfo.parse_request, bytes(15), errno.EINVAL),
    ("info: argsz", DeviceInfo.parse_request, bytes(16), errno.EINVAL),
    ("region: short", RegionInfo.parse_request, bytes(31), errno.EINVAL),
    ("region: argsz", RegionInfo.parse_request, RegionInfo.request(0, 31), errno.EINVAL),
    ("fds: short", messages.parse_region_io_fds, bytes(12), errno.EINVAL),
    ("fds: argsz", messages.parse_region_io_fds, bytes(16), errno.EINVAL),
    ("fds: count", messages.parse_region_io_fds, struct.pack("<4I", 16, 0, 0, 1), errno.EINVAL),
    ("irq: short", IrqInfo.parse_request, bytes(12), errno.EINVAL),
    ("irq: argsz", IrqInfo.parse_request, bytes(16), errno.EINVAL),
    ("set: short", IrqSet.parse, bytes(19), errno.EINVAL),
    ("set: argsz", IrqSet.parse, irq_set(NONE | TRIGGER, argsz=19), errno.EINVAL),
    ("set: no data", IrqSet.parse, irq_set(TRIGGER), errno.EINVAL),
    ("set: two kinds of data", IrqSet.parse, irq_set(NONE | BOOL | TRIGGER, data=b"\1"), errno.EINVAL),
    ("set: no action", IrqSet.parse, irq_set(NONE), errno.EINVAL),
    ("set: two actions", IrqSet.parse, irq_set(NONE | 0x18), errno.EINVAL),
    ("set: unknown flag", IrqSet.parse, irq_set(NONE | TRIGGER | 64), errno.EINVAL),
    ("set: sum", IrqSet.parse, irq_set(NONE | TRIGGER, start=1 << 31, count=1 << 31), errno.EINVAL),
    ("set: bools missing", IrqSet.parse, irq_set(BOOL | TRIGGER, count=3, data=b"\1\1"), errno.EINVAL),
    ("set: argsz less", IrqSet.parse, irq_set(BOOL | TRIGGER, data=b"\1", argsz=20), errno.EINVAL),
    ("feature: short", messages.parse_device_feature, bytes(7), errno.EINVAL),
    ("feature: argsz", messages.parse_device_feature, bytes(8), errno.EINVAL),
    ("reset: a body", messages.parse_empty, b"\0", errno.EINVAL),
    ("multi: empty", messages.parse_write_multi, b"", errno.EINVAL),
    ("multi: fewer", messages.parse_write_multi, multi(2), errno.EINVAL),
    ("multi: more", messages.parse_write_multi, multi(0), errno.EINVAL),
    ("multi: huge", messages.parse_write_multi, multi((1 << 64) - 1), errno.EINVAL),
    ("multi: cut", messages.parse_write_multi, multi(1, size=23), errno.EINVAL),
    ("multi: none", messages.parse_write_multi, multi(1, length=0), errno.EINVAL),
    ("multi: nine bytes", messages.parse_write_multi, multi(1, length=9), errno.EINVAL),
    ("version: short", Version.parse, bytes(3), errno.EINVAL),
    ("version: no NUL", Version.parse, bytes(4) + b"{}", errno.EINVAL),
    ("version: after the NUL", Version.parse, bytes(4) + b"{}\0x", errno.EINVAL),
    ("version: only a NUL", Version.parse, bytes(5), errno.EINVAL),
    ("version: no JSON", Version.parse, bytes(4) + b"{\0", errno.EINVAL),
    ("version: no object", Version.parse, bytes(4) + b"[]\0", errno.EINVAL),
    ("version: deep", Version.parse, bytes(4) + b"[" * 60000 + b"\0", errno.EINVAL),
    ("version: long", Version.parse, bytes(4) + b" " * 70000 + b"{}\0", errno.EINVAL),
    ("version: not UTF-8", Version.parse, bytes(4) + b'{"\xff":1}\0', errno.EINVAL),
    ("version: list", Version.parse, bytes(4) + b'{"capabilities":[]}\0', errno.EINVAL),
]


@pytest.mark.parametrize(("parse", "body", "number"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_refused(parse: Callable[[bytes], Any], body: bytes, number: int) -> None:
    with pytest.raises(WireError) as caught:
        parse(body)
    assert caught.value.errno == number


@pytest.mark.parametrize(
    ("parse", "body", "number"),
    [
        (messages.parse_region_read, messages.region_access(0, 0, 0), errno.EINVAL),
        (messages.parse_region_read, messages.region_access(0, 0, 65), errno.EINVAL),
        (messages.parse_region_read, messages.region_access(0, 0, 1, b"x"), errno.EINVAL),
        (messages.parse_region_write, messages.region_access(0, 0, 2, b"x"), errno.EINVAL),
        (messages.parse_region_write, messages.region_access(0, 0, 1, b"xy"), errno.EINVAL),
        (messages.parse_region_write, messages.region_access(0, 0, 0), errno.EINVAL),
        (messages.parse_region_write, messages.region_access(0, 0, 65, bytes(65)), errno.EINVAL),
        (messages.parse_dma_read, messages.dma_access(0, 1 << 63), errno.EINVAL),
        (messages.parse_dma_read, messages.dma_access(0, 1, b"x"), errno.EINVAL),
        (messages.parse_dma_write, messages.dma_access(0, 2, b"x"), errno.EINVAL),
        (messages.parse_dma_write, messages.dma_access(0, 65, bytes(65)), errno.EINVAL),
    ],
)
def test_transfers_refused(parse: Callable[[bytes, int], Any], body: bytes, number: int) -> None:
    with pytest.raises(WireError) as caught:
        parse(body, 64)
    assert caught.value.errno == number


@pytest.mark.parametrize(
    ("offset", "region", "count", "data"),
    [(9, 0, 2, b"ab"), (8, 1, 2, b"ab"), (8, 0, 3, b"abc"), (8, 0, 2, b"a")],
)
def test_answers_to_something_else(offset: int, region: int, count: int, data: bytes) -> None:
    reply = messages.region_access(offset, region, count, data)
    with pytest.raises(WireError) as caught:
        messages.parse_region_reply(reply, 8, 0, 2, read=True)
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize(
    ("at", "value", "number"),
    [
        (12, 31, errno.EPROTO),  # cap_offset inside the fixed part
        (12, 60, errno.EPROTO),  # and past the end
        (40, 3, errno.EPROTO),  # more areas than bytes
        (40, 0xFFFFFFFF, errno.EPROTO),
        (16, 0x1800, errno.EINVAL),  # a region smaller than its area
    ],
)
def test_region_capabilities_refused(at: int, value: int, number: int) -> None:
    body = bytearray(RegionInfo(0, 0x4000, 7, 0, ((0x1000, 0x1000),)).pack(4096))
    struct.pack_into("<I", body, at, value)
    with pytest.raises(WireError) as caught:
        RegionInfo.parse(body)
    assert caught.value.errno == number


def test_region_capability_loop() -> None:
    body = bytearray(RegionInfo(0, 0x4000, 7, 0, ((0x1000, 0x1000),)).pack(4096))
    struct.pack_into("<HHI", body, 32, 9, 1, 32)
    with pytest.raises(WireError, match="lead back"):
        RegionInfo.parse(body)


# What QEMU 11.1 sends.
QEMU = bytes(4) + (
    b'{"capabilities": {"migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, "max_msg_fds": 16,'
    b' "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}\0'
)
OWN = Limits(max_msg_fds=16, write_multiple=True)


def test_negotiation_with_qemu() -> None:
    asked = Version.parse(QEMU)
    assert asked.limits == Limits(16, MIB, 65535, 4096, True)
    answer = asked.answer(OWN)
    assert (answer.major, answer.minor) == (0, 0)
    body = answer.pack()
    assert len(body) <= len(QEMU)
    assert json.loads(body[4:-1])["capabilities"] == {
        "max_msg_fds": 16,
        "max_data_xfer_size": MIB,
        "max_dma_maps": 65535,
        "pgsizes": 4096,
        "write_multiple": True,
    }
    asked.check_answer(Version.parse(body))


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (struct.pack("<HH", 0, 1), struct.pack("<HH", 0, 1)),
        (struct.pack("<HH", 0, 9), struct.pack("<HH", 0, 1)),
        (bytes(4) + b"{}\0", bytes(4) + b'{"capabilities":{}}\0'),
        (
            bytes(4) + b'{"capabilities":{"pgsizes":12288}}\0\0',
            bytes(4) + b'{"capabilities":{"pgsizes":4096}}\0',
        ),
        (bytes(4) + b'{"capabilities":{"write_multiple":false}}\0', bytes(4) + b'{"capabilities":{}}\0'),
        (
            bytes(4) + b'{"capabilities":{"twin_socket":{"supported":true}}}\0',
            bytes(4) + b'{"capabilities":{}}\0',
        ),
    ],
    ids=["SPDK", "later minor", "empty", "page sizes", "no multi", "twin socket"],
)
def test_negotiation(said: bytes, answer: bytes) -> None:
    assert Version.parse(said).answer(OWN).pack() == answer


@pytest.mark.parametrize(
    "text",
    [
        '{"max_msg_fds":0}',
        '{"max_msg_fds":-1}',
        '{"max_msg_fds":true}',
        '{"max_msg_fds":"8"}',
        '{"max_msg_fds":1.5}',
        '{"max_data_xfer_size":0}',
        '{"max_data_xfer_size":null}',
        '{"max_dma_maps":[1]}',
        '{"pgsizes":NaN}',
        '{"pgsizes":1e400}',
        '{"write_multiple":1}',
    ],
)
def test_limits_refused(text: str) -> None:
    with pytest.raises(WireError):
        Version.parse(bytes(4) + b'{"capabilities":' + text.encode() + b"}\0")


def test_limits_are_bounded() -> None:
    found = Version.parse(
        bytes(4) + b'{"capabilities":{"max_data_xfer_size":%d,"max_msg_fds":%d}}\0' % (1 << 80, 10**30)
    )
    assert found.limits.max_data_xfer_size == 64 << 20
    assert found.limits.max_msg_fds == (1 << 32) - 1


@pytest.mark.parametrize(("body", "pgsizes"), [(struct.pack("<HH", 1, 0), 4096), (bytes(4), 1 << 21)])
def test_no_agreement(body: bytes, pgsizes: int) -> None:
    with pytest.raises(WireError):
        Version.parse(body).answer(Limits(pgsizes=pgsizes))


@pytest.mark.parametrize(("major", "minor"), [(1, 0), (0, 2)])
def test_client_refuses_another_protocol(major: int, minor: int) -> None:
    with pytest.raises(WireError):
        Version().check_answer(Version(Limits(), None, major, minor))
