"""Configuration space: capabilities as a driver walks them, write masks, BAR sizing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import dtype_of, lib
from pvfio.devices.config_space import ConfigSpace
from pvfio.devices.pci import Bar, MsixLayout, PciFunction, PciIdentity
from pvfio.devices.testdev import TestDevice
from pvfio.silicon import TableBus

pytestmark = pytest.mark.touches_c


@pytest.fixture
def device() -> Iterator[TestDevice]:
    made = TestDevice(TableBus(), vectors=5, ats=True, intx=True)
    yield made
    made.close()


def walk(device: PciFunction) -> dict[int, int]:
    """The capability chain through bus reads only: id -> offset."""
    assert device.config_read(lib.PCI_STATUS, 2) & lib.PCI_STATUS_CAP_LIST
    found: dict[int, int] = {}
    offset = device.config_read(lib.PCI_CAPABILITY_LIST, 1)
    while offset:
        assert offset % 4 == 0
        assert 0x40 <= offset < 0x100
        found[device.config_read(offset, 1)] = offset
        offset = device.config_read(offset + 1, 1)
    return found


def test_header(device: TestDevice) -> None:
    header = bytes(device.config_read(n, 1) for n in range(64))
    import numpy as np

    h: Any = np.frombuffer(header, dtype_of("struct pci_type0_header"))[0]
    assert (h["vendor_id"], h["device_id"]) == (0x1234, 0x11E8)
    assert (h["base_class"], h["sub_class"], h["prog_if"]) == (0x00, 0xFF, 0x00)
    assert (h["revision_id"], h["header_type"], h["interrupt_pin"]) == (0x10, 0, 1)
    assert (h["command"], h["capabilities"]) == (0, 0x40)


def test_capabilities(device: TestDevice) -> None:
    caps = walk(device)
    assert set(caps) == {lib.PCI_CAP_ID_PM, lib.PCI_CAP_ID_EXP, lib.PCI_CAP_ID_MSIX}
    assert all(device.config.find_capability(cap) == at for cap, at in caps.items())
    assert device.config.find_capability(0x05) == 0
    exp = caps[lib.PCI_CAP_ID_EXP]
    assert device.config_read(exp + lib.PCI_EXP_DEVCAP, 4) & lib.PCI_EXP_DEVCAP_FLR
    assert device.config_read(exp + lib.PCI_EXP_FLAGS, 2) == 0x92
    msix = caps[lib.PCI_CAP_ID_MSIX]
    assert device.config_read(msix + lib.PCI_MSIX_FLAGS, 2) == 4
    assert device.config_read(msix + lib.PCI_MSIX_TABLE, 4) == 0x5000
    assert device.config_read(msix + lib.PCI_MSIX_PBA, 4) == 0x5000 + 5 * 16
    pm = caps[lib.PCI_CAP_ID_PM]
    assert device.config_read(pm + lib.PCI_PM_PMC, 2) & 7 == 3


def test_extended_capability(device: TestDevice) -> None:
    first = device.config_read(lib.PCI_EXT_CAP_BASE, 4)
    assert first == lib.PCI_EXT_CAP_ID_ATS | 1 << 16
    control = lib.PCI_EXT_CAP_BASE + lib.PCI_ATS_CTRL
    assert not device.ats_enabled
    device.config_write(control, 2, 0xFFFF)
    assert device.ats_enabled
    assert device.config_read(control, 2) == lib.PCI_ATS_CTRL_ENABLE | lib.PCI_ATS_CTRL_STU_MASK


def test_a_function_without_options() -> None:
    bar = Bar(index=0, size=4096)
    plain = PciFunction(TableBus(), PciIdentity(vendor=1, device=2, class_code=3), bars=[bar])
    assert set(walk(plain)) == {lib.PCI_CAP_ID_PM, lib.PCI_CAP_ID_EXP}
    assert plain.config_read(lib.PCI_EXT_CAP_BASE, 4) == 0
    assert plain.config_read(lib.PCI_INTERRUPT_PIN, 1) == 0
    assert not plain.msix_enabled
    assert not plain.ats_enabled


def test_bar_sizing(device: TestDevice) -> None:
    bar0 = lib.PCI_BASE_ADDRESS_0
    assert device.config_read(bar0, 4) == 0xC
    device.config_write(bar0, 4, 0xFFFFFFFF)
    device.config_write(bar0 + 4, 4, 0xFFFFFFFF)
    low, high = device.config_read(bar0, 4), device.config_read(bar0 + 4, 4)
    assert 2**64 - ((high << 32 | low) & ~0xF) == 0x8000
    device.config_write(bar0, 4, 0x12345678)
    assert device.config_read(bar0, 4) == 0x12340000 | 0xC
    bar2 = bar0 + 8
    device.config_write(bar2, 4, 0xFFFFFFFF)
    assert device.config_read(bar2, 4) == 0xFFFFF000
    for unused in (bar0 + 12, bar0 + 16, bar0 + 20, lib.PCI_ROM_ADDRESS):
        device.config_write(unused, 4, 0xFFFFFFFF)
        assert device.config_read(unused, 4) == 0


READ_ONLY = [
    (lib.PCI_VENDOR_ID, 4),
    (lib.PCI_REVISION_ID, 4),
    (lib.PCI_HEADER_TYPE, 1),
    (lib.PCI_CAPABILITY_LIST, 1),
    (lib.PCI_INTERRUPT_PIN, 1),
    (0x40, 2),
    (lib.PCI_EXT_CAP_BASE, 4),
    (0x300, 4),
]


@pytest.mark.parametrize(("offset", "size"), READ_ONLY)
def test_read_only_registers(device: TestDevice, offset: int, size: int) -> None:
    before = device.config_read(offset, size)
    device.config_write(offset, size, ~before & (1 << 8 * size) - 1)
    assert device.config_read(offset, size) == before


def test_command_register_bits(device: TestDevice) -> None:
    device.config_write(lib.PCI_COMMAND, 2, 0xFFFF)
    assert device.config_read(lib.PCI_COMMAND, 2) == 0x546


def test_write_one_to_clear(device: TestDevice) -> None:
    status = device.config_read(lib.PCI_STATUS, 2)
    device.config.poke(lib.PCI_STATUS, 2, status | 0x3000)
    device.config_write(lib.PCI_STATUS, 2, 0x1000)
    assert device.config_read(lib.PCI_STATUS, 2) == status | 0x2000
    device.config_write(lib.PCI_STATUS, 2, 0)
    assert device.config_read(lib.PCI_STATUS, 2) == status | 0x2000


def test_odd_offsets_and_the_end(device: TestDevice) -> None:
    assert device.config_read(1, 2) == 0xE812
    device.config_write(lib.PCI_CACHE_LINE_SIZE - 1, 4, 0x0000AA00)
    assert device.config_read(lib.PCI_CACHE_LINE_SIZE, 1) == 0xAA
    assert device.config_read(4094, 4) == 0xFFFFFFFF
    assert device.config_read(4096, 1) == 0xFF
    assert device.config_read(-1, 1) == 0xFF
    device.config_write(4094, 4, 0)
    device.config_write(-2, 4, 0)


@given(
    writes=st.lists(st.tuples(st.integers(-4, 4100), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)))
)
def test_writes_only_change_writable_bits(writes: list[tuple[int, int, int]]) -> None:
    space = ConfigSpace()
    space.set(0x10, 4, 0xC, writable=0xFFFF0000)
    space.set(0x20, 2, 0x1234, writable=0x00FF)
    space.seal()
    for offset, size, value in writes:
        space.write(offset, size, value & (1 << 8 * size) - 1)
    assert space.read(0x10, 4) & 0xFFFF == 0xC
    assert space.read(0x20, 2) & 0xFF00 == 0x1200
    rest = space.data[:0x10] + space.data[0x14:0x20] + space.data[0x22:]
    assert not any(rest)
    space.reset()
    assert space.read(0x20, 2) == 0x1234


def test_full_spaces() -> None:
    space = ConfigSpace()
    space.add_capability(1, 0xC0)
    with pytest.raises(ValueError):
        space.add_capability(2, 4)
    space.add_extended(1, 1, 0xF00)
    with pytest.raises(ValueError):
        space.add_extended(2, 1, 4)


def test_extended_chain() -> None:
    space = ConfigSpace()
    first, second = space.add_extended(0x0F, 1, 8), space.add_extended(0x1B, 2, 8)
    assert (first, second) == (0x100, 0x108)
    assert space.read(first, 4) == 0x0F | 1 << 16 | 0x108 << 20
    assert space.read(second, 4) == 0x1B | 2 << 16


BAD_LAYOUTS = [
    {"bars": [{"index": 0, "size": 4095}]},
    {"bars": [{"index": 0, "size": 2048}]},
    {"bars": [{"index": 5, "size": 4096}]},
    {"bars": [{"index": -1, "size": 4096}]},
    {"bars": [{"index": 0, "size": 4096}, {"index": 1, "size": 4096}]},
    {"bars": [{"index": 0, "size": 8192, "mmap_areas": ((0, 12288),)}]},
    {"bars": [{"index": 0, "size": 8192, "mmap_areas": ((1, 4096),)}]},
    {"bars": [{"index": 0, "size": 4096}], "msix": {"bar": 1, "offset": 0, "vectors": 1}},
    {"bars": [{"index": 0, "size": 4096}], "msix": {"bar": 0, "offset": 4096, "vectors": 1}},
    {"bars": [{"index": 0, "size": 4096}], "msix": {"bar": 0, "offset": 8, "vectors": 1}},
    {"bars": [{"index": 0, "size": 4096}], "msix": {"bar": 0, "offset": 0, "vectors": 256}},
    {"bars": [{"index": 0, "size": 65536}], "msix": {"bar": 0, "offset": 0, "vectors": 2049}},
    {"bars": [{"index": 0, "size": 65536}], "msix": {"bar": 0, "offset": 0, "vectors": 0}},
    {
        "bars": [{"index": 0, "size": 8192, "mmap_areas": ((0, 8192),)}],
        "msix": {"bar": 0, "offset": 4096, "vectors": 1},
    },
    {"bars": [{"index": 0, "size": 4096}], "intx_pin": 5},
]


@pytest.mark.parametrize("layout", BAD_LAYOUTS, ids=str)
def test_layouts_that_cannot_be(layout: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PciFunction(
            TableBus(),
            PciIdentity(vendor=1, device=2, class_code=3),
            bars=[Bar(**bar) for bar in layout["bars"]],
            msix=MsixLayout(**layout["msix"]) if "msix" in layout else None,
            intx_pin=layout.get("intx_pin", 0),
        )
