"""The device that never stops: where its writes land, what its log says, and what does not stop it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.devices.rogue import RogueDevice
from pvfio.memory import GuestMemory
from pvfio.pagetable import Format
from pvfio.silicon import Iommu, TableBus

pytestmark = pytest.mark.touches_c

WINDOW = 0x10000


class Rig:
    """Half of the window is memory."""

    def __init__(self) -> None:
        self.memory = np.zeros(512, np.uint64)
        self.bus = TableBus()
        self.bus.map(WINDOW, self.memory)
        self.device = RogueDevice(self.bus, log_shift=12)
        self.device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY)

    def run(self, writes: int = 5000) -> int:
        """Lets it write, then holds it; returns the number of the next write."""
        until = self.device.stats().next + writes
        while self.device.stats().next < until:
            pass
        self.device.engine.pause()
        return self.device.stats().next


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.device.close()


def test_every_write_is_where_the_log_says(rig: Rig) -> None:
    rig.device.write(0, 0x00, 8, WINDOW)
    rig.device.write(0, 0x08, 8, 8192)
    last = rig.run()
    stats = rig.device.stats()
    assert stats.landed + stats.aborted + stats.cancelled == last
    assert abs(stats.landed - stats.aborted) <= 512
    log, first = rig.device.log(last - 1024), last - 1024
    numbers = np.arange(first, last)
    assert ((log == RogueDevice.LANDED) == (numbers % 1024 < 512)).all()
    landed = numbers[log == RogueDevice.LANDED]
    assert (rig.memory[landed % 1024] == landed + 1).all()
    assert rig.device.read(0, 0x10, 8) == last
    assert rig.device.read(0, 0x18, 8) == stats.landed
    assert rig.device.read(0, 0x20, 4) == stats.aborted
    assert (rig.device.read(0, 0x00, 8), rig.device.read(0, 0x08, 8)) == (WINDOW, 8192)


def test_neither_a_reset_nor_the_command_register_stops_it(rig: Rig) -> None:
    rig.device.aim(WINDOW, 4096)
    rig.run()
    rig.device.engine.unpause()
    rig.device.function_level_reset()
    assert not rig.device.master_enabled
    before = rig.device.stats()
    rig.run()
    assert rig.device.stats().landed > before.landed


def test_what_stops_it(rig: Rig) -> None:
    rig.device.aim(WINDOW, 4096)
    rig.run()
    rig.device.engine.unpause()
    rig.device.write(0, 0x08, 8, 0)
    stopped = rig.device.stats()
    assert rig.device.stats() == stopped
    rig.device.aim(WINDOW, 4096)
    rig.run()
    rig.device.engine.unpause()
    rig.device.close()
    rig.device.close()
    closed = rig.device.stats()
    rig.memory[:] = 0
    assert rig.device.stats() == closed
    assert not rig.memory.any()


def test_what_it_refuses(rig: Rig) -> None:
    for size in (-8, 7):
        with pytest.raises(ValueError, match="window"):
            rig.device.aim(WINDOW, size)
    rig.device.aim(WINDOW, 8)
    last = rig.run()
    for first in (-1, last + 1, last - 4097):
        with pytest.raises(ValueError, match="log holds"):
            rig.device.log(first)
    with pytest.raises(MemoryError):
        RogueDevice(rig.bus, log_shift=31)
    rig.device.write(0, 0x08, 4, 0)
    assert rig.device.read(0, 0x08, 8) == 8
    assert rig.device.read(0, 0x100, 8) == 0


def test_a_fault_log_that_fills_faster_than_it_is_read() -> None:
    """Taking the faults ends, with no more of them than the log has room for; the rest is counted."""
    memory = GuestMemory(16 << 20)
    iommu = Iommu(memory, Format.VTDSS, 0, 4)
    requester = iommu.requester(1)
    device = RogueDevice(requester, log_shift=4)
    device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY)
    try:
        device.aim(WINDOW, 4096)
        taken = 0
        while not iommu.lost_faults or taken < 5 * lib.PV_FAULT_ROOM:
            faults = iommu.faults()
            assert len(faults) <= lib.PV_FAULT_ROOM
            taken += len(faults)
        device.aim(0, 0)
        taken += len(iommu.faults())
        assert taken + iommu.lost_faults == device.stats().aborted
    finally:
        device.close()
