"""Messages as lines: what a line says, and that nothing makes it fail."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.vfio_user import messages, wire_log
from pvfio.vfio_user.messages import DeviceInfo, DmaMap, DmaUnmap, IrqInfo, IrqSet, RegionInfo
from pvfio.vfio_user.version import Limits, Version
from tests.vfio_user.raw import ERROR, NO_REPLY, REPLY

EVENTFD, TRIGGER, BOOL = (
    lib.VFIO_IRQ_SET_DATA_EVENTFD,
    lib.VFIO_IRQ_SET_ACTION_TRIGGER,
    lib.VFIO_IRQ_SET_DATA_BOOL,
)

LINES: list[tuple[int, int, int, bytes, int, str]] = [
    (
        1,
        0,
        0,
        Version(Limits(8), frozenset({"max_msg_fds"}), 0, 0).pack(),
        0,
        'VERSION 0.0 {"max_msg_fds": 8}',
    ),
    (1, 0, 0, bytes(4), 0, "VERSION 0.0"),
    (2, 0, 0, DmaMap(0x1000, 0x2000, 1).pack(), 1, "DMA_MAP 0x1000+0x2000 r offset 0x0 [1 fd]"),
    (2, REPLY, 0, b"", 0, "DMA_MAP"),
    (2, REPLY | ERROR, errno.EEXIST, b"", 0, "DMA_MAP error EEXIST"),
    (2, REPLY | ERROR, 0, b"", 0, "DMA_MAP error 0"),
    (3, 0, 0, DmaUnmap(0, 0, 2).pack(), 0, "DMA_UNMAP all"),
    (3, REPLY, 0, DmaUnmap(0, 4096).pack(), 0, "DMA_UNMAP 0x0+0x1000"),
    (4, 0, 0, DeviceInfo.request(), 0, "DEVICE_GET_INFO "),
    (4, REPLY, 0, DeviceInfo(3, 9, 5).pack(), 0, "DEVICE_GET_INFO flags 0x3 regions 9 irqs 5"),
    (5, 0, 0, RegionInfo.request(0), 0, "DEVICE_GET_REGION_INFO BAR0 argsz 32"),
    (
        5,
        REPLY,
        0,
        RegionInfo(0, 0x4000, 7, 0, ((0x1000, 0x1000),)).pack(64),
        1,
        "DEVICE_GET_REGION_INFO BAR0 size 0x4000 flags 0xf argsz 64 area 0x1000+0x1000 [1 fd]",
    ),
    (7, 0, 0, IrqInfo.request(2), 0, "DEVICE_GET_IRQ_INFO MSI-X"),
    (7, REPLY, 0, IrqInfo(9, 1, 3).pack(), 0, "DEVICE_GET_IRQ_INFO 9 flags 0x1 count 3"),
    (
        8,
        0,
        0,
        IrqSet(2, EVENTFD | TRIGGER, 3, 2).pack(),
        2,
        "DEVICE_SET_IRQS MSI-X EVENTFD TRIGGER 3+2 [2 fds]",
    ),
    (8, 0, 0, IrqSet(0, BOOL | TRIGGER, 0, 1, b"\1").pack(), 0, "DEVICE_SET_IRQS INTx BOOL TRIGGER 0+1 01"),
    (9, 0, 0, messages.region_access(4, 7, 2), 0, "REGION_READ config 0x4+0x2"),
    (10, NO_REPLY, 0, messages.region_access(8, 0, 2, b"ab"), 0, "REGION_WRITE posted BAR0 0x8+0x2 = 6162"),
    (
        10,
        0,
        0,
        messages.region_access(8, 0, 64, bytes(64)),
        0,
        "REGION_WRITE BAR0 0x8+0x40 = 00000000 " + "0" * 8,
    ),
    (11, 0, 0, messages.dma_access(64, 8), 0, "DMA_READ 0x40+0x8"),
    (11, REPLY, 0, messages.dma_access(64, 2, b"ab"), 0, "DMA_READ 0x40+0x2 = 6162"),
    (13, 0, 0, b"", 0, "DEVICE_RESET"),
    (15, 0, 0, messages.write_multi([(8, 0, b"ab")]), 0, "REGION_WRITE_MULTI BAR0 0x8+0x2 = 6162"),
    (16, 0, 0, messages.device_feature(1), 0, "DEVICE_FEATURE 08000000 01000000"),
    (99, 0, 0, b"abc", 0, "command 99 616263"),
    (9, 0, 0, b"abc", 0, "REGION_READ 616263"),
]


@pytest.mark.parametrize(("command", "flags", "error", "body", "fds", "text"), LINES)
def test_lines(command: int, flags: int, error: int, body: bytes, fds: int, text: str) -> None:
    assert wire_log.line("<", command, 7, flags, error, body, fds).startswith(f"< 7 {text}")


@settings(max_examples=300)
@given(
    st.integers(0, 20),
    st.sampled_from([0, REPLY, NO_REPLY, REPLY | ERROR, 15]),
    st.integers(0, (1 << 32) - 1),
    st.binary(max_size=200),
)
def test_anything(command: int, flags: int, error: int, body: bytes) -> None:
    line = wire_log.line(">", command, 1, flags, error, memoryview(body), 0)
    assert "\n" not in line
    assert len(line) < 1200
