"""Sleeping in C for an interrupt that is about to come."""

from __future__ import annotations

import os

import pytest

from pvfio.vfio import Irq

pytestmark = pytest.mark.touches_c


class _Irq(Irq):
    """Nothing behind it: the test fires."""

    async def _set(self, flags: int, start: int, count: int, data: bytes = b"") -> None:
        pass


async def test_soon() -> None:
    irq = _Irq("device", 2, 2, 0)
    assert irq.soon() == 0  # not enabled
    await irq.enable(2)
    os.eventfd_write(irq.fd(1), 2)
    assert irq.soon(0) == 0
    assert irq.soon(1) == 2
    assert irq.soon(1) == 0
    assert irq.soon(2) == irq.soon(-1) == 0
    await irq.disable()
    assert irq.soon(1) == 0


async def test_nobody_sleeps_where_it_was_in_vain() -> None:
    irq = _Irq("device", 2, 2, 0)
    await irq.enable(2)
    tries = []
    for _ in range(4):  # the last of them decides
        assert irq.soon() == 0
    for _ in range(3):
        os.eventfd_write(irq.fd(), 1)
        tries.append(next(count for count in range(1, 5000) if irq.soon()))
        for _ in range(4):
            irq.soon()
    assert tries == [17] * 3  # once it was of use, it is worth it again
    for _ in range(20_000):
        irq.soon()
    os.eventfd_write(irq.fd(), 1)
    os.eventfd_write(irq.fd(1), 1)
    assert irq.soon(1) == 1  # every vector for itself
    assert any(irq.soon() for _ in range(1025))
    await irq.disable()
