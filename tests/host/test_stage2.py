"""Stage 2 is the permutation: every block, both platforms, every depth."""

from __future__ import annotations

import contextlib

import pytest

from pvfio.abi import lib
from pvfio.host import Hypervisor, IommuConfig, Platform
from pvfio.memory import GuestMemory

pytestmark = pytest.mark.touches_c

DEPTHS = [*(("intel", levels) for levels in range(3, 6)), *(("amd", levels) for levels in range(1, 7))]


@pytest.mark.parametrize(("platform", "levels"), DEPTHS)
def test_every_block_follows_the_permutation(platform: Platform, levels: int) -> None:
    memory = GuestMemory(64 << 20)
    host = Hypervisor(memory, IommuConfig(platform=platform, stage2_levels=levels))
    blocks = [gpa for start, size in memory.ram_ranges() for gpa in range(start, start + size, 2 << 20)]
    assert len(blocks) == 32
    for gpa in blocks:
        for offset in (0, 0x1234, (2 << 20) - 1):
            hpa = host.stage2.iova_to_phys(gpa + offset)
            assert hpa == memory.gpa_to_hpa(gpa + offset) != gpa + offset
    outputs = {host.stage2.iova_to_phys(gpa) for gpa in blocks}
    assert len(outputs) == len(blocks)
    host.close()


@pytest.mark.parametrize("platform", ["intel", "amd"])
def test_the_machine_default_size_and_the_hole(platform: Platform) -> None:
    memory = GuestMemory(512 << 20)
    host = Hypervisor(memory, IommuConfig(platform=platform))
    for start, size in memory.ram_ranges():
        for gpa in range(start, start + size, 2 << 20):
            assert host.stage2.iova_to_phys(gpa) == memory.gpa_to_hpa(gpa)
        assert host.stage2.iova_to_phys(start + size) is None
    for gpa in (lib.PV_GPA_HOLE_START, lib.PV_MSI_START, lib.PV_GPA_HOLE_END - 1):
        assert host.stage2.iova_to_phys(gpa) is None
    host.close()


def test_close_hands_the_tables_back() -> None:
    memory = GuestMemory(16 << 20)
    host = Hypervisor(memory)
    assert memory.stats().host_pages > 0
    host.close()
    host.close()
    assert memory.stats().host_pages == 0


def test_host_memory_too_small_for_the_tables() -> None:
    memory = GuestMemory(16 << 20, host_private=2 << 20)
    with contextlib.suppress(MemoryError):
        while True:
            memory.host_page()
    with pytest.raises(MemoryError):
        Hypervisor(memory)


def test_a_machine_has_a_vp() -> None:
    with pytest.raises(ValueError):
        Hypervisor(GuestMemory(2 << 20), vps=0)
