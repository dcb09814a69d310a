"""What registers say, and which bits take writes when."""

from __future__ import annotations

from typing import Any

import pytest

from pvfio.abi import lib
from pvfio.devices.dsa import DsaConfig, DsaDevice
from pvfio.devices.dsa.config import implemented_opcodes
from pvfio.silicon import TableBus
from tests.devices.dsa.function import DEDICATED, LIMITS, PRIORITY_1, Function, running

pytestmark = pytest.mark.touches_c

ONES = 0xFFFFFFFF


def test_the_defaults_are_the_real_parts(request: pytest.FixtureRequest) -> None:
    f = Function()
    request.addfinalizer(f.device.close)
    assert f.device.config_read(0, 4) == 0x0B258086
    assert f.device.config_read(8, 4) >> 8 == 0x088000
    assert f.read(lib.IDXD_VER_OFFSET, 4) == 0x100
    gencap = f.read(lib.IDXD_GENCAP_OFFSET)
    assert gencap & 0xFFFFFFFF & ~(0x3F << 25) & ~lib.IDXD_GENCAP_CMD_CAP == 0x815F0107
    assert f.read(lib.IDXD_WQCAP_OFFSET) & 0xFFFFFF == 8 << 16 | 128
    assert f.read(lib.IDXD_GRPCAP_OFFSET) & 0xFFFF == 96 << 8 | 4
    assert f.read(lib.IDXD_ENGCAP_OFFSET) == 4
    assert f.read(lib.IDXD_OPCAP_OFFSET) == sum(1 << code for code in implemented_opcodes())
    assert [f.read(lib.IDXD_OPCAP_OFFSET + 8 * i) for i in (1, 2, 3)] == [0, 0, 0]
    assert f.read(lib.IDXD_CMDCAP_OFFSET, 4) == 0x1FFE
    assert f.read(lib.IDXD_EVLCFG_OFFSET) == f.read(lib.IDXD_EVLSTATUS_OFFSET) == 0
    assert [bar.index for bar in f.device.bars()] == [0, 2]


def test_tables_lie_where_they_say(request: pytest.FixtureRequest) -> None:
    f = Function(DsaConfig(wqs=255, groups=64, op_config=True, vectors=2048, total_wq_size=65535))
    request.addfinalizer(f.device.close)
    offsets = [(f.read(lib.IDXD_TABLE_OFFSET) >> 16 * i & 0xFFFF) * 0x100 for i in range(4)]
    grpcfg, wqcfg, perm, ims = offsets
    assert ims == f.read(lib.IDXD_TABLE_OFFSET + 8) == 0
    assert grpcfg + 64 * 64 <= wqcfg
    assert wqcfg + 255 * 64 <= perm
    assert perm + 2048 * 8 <= f.config.msix_offset
    f.write(wqcfg + 254 * 64, 77)
    assert f.read(wqcfg + 254 * 64, 4) == 77


@pytest.mark.parametrize(
    ("option", "register", "bit"),
    [
        ("block_on_fault", lib.IDXD_GENCAP_OFFSET, lib.IDXD_GENCAP_BLOCK_ON_FAULT),
        ("overlap_copy", lib.IDXD_GENCAP_OFFSET, lib.IDXD_GENCAP_OVERLAP_COPY),
        ("cache_control", lib.IDXD_GENCAP_OFFSET, lib.IDXD_GENCAP_CACHE_CONTROL_MEM),
        ("dest_readback", lib.IDXD_GENCAP_OFFSET, lib.IDXD_GENCAP_DEST_READBACK),
        ("drain_readback", lib.IDXD_GENCAP_OFFSET, lib.IDXD_GENCAP_DRAIN_READBACK),
        ("command_capabilities", lib.IDXD_GENCAP_OFFSET, lib.IDXD_GENCAP_CMD_CAP),
        ("config_en", lib.IDXD_GENCAP_OFFSET, lib.IDXD_GENCAP_CONFIG_EN),
        ("shared", lib.IDXD_WQCAP_OFFSET, lib.IDXD_WQCAP_SHARED_MODE),
        ("dedicated", lib.IDXD_WQCAP_OFFSET, lib.IDXD_WQCAP_DEDICATED_MODE),
        ("priority", lib.IDXD_WQCAP_OFFSET, lib.IDXD_WQCAP_PRIORITY),
        ("occupancy", lib.IDXD_WQCAP_OFFSET, lib.IDXD_WQCAP_OCCUPANCY),
        ("op_config", lib.IDXD_WQCAP_OFFSET, lib.IDXD_WQCAP_OP_CONFIG),
        ("read_buffer_control", lib.IDXD_GRPCAP_OFFSET, lib.IDXD_GRPCAP_RDBUF_CTRL),
    ],
)
@pytest.mark.parametrize("on", [False, True])
def test_capability_bits(
    request: pytest.FixtureRequest, option: str, register: int, bit: int, on: bool
) -> None:
    options: dict[str, Any] = {option: on}
    f = Function(DsaConfig(**options))
    request.addfinalizer(f.device.close)
    assert bool(f.read(register) & bit) == on


@pytest.mark.parametrize(
    "options",
    [
        {"wqs": 0},
        {"wqs": 256},
        {"groups": 0},
        {"engines": 65},
        {"total_wq_size": 0},
        {"total_wq_size": 65536},
        {"max_xfer_shift": 32},
        {"max_batch_shift": 16},
        {"read_buffers": 256},
        {"vectors": 1},
        {"vectors": 2049},
        {"int_handles": 9},
        {"shared": False, "dedicated": False},
        {"config_en": False, "dedicated": False},
        {"int_handles": 1, "command_capabilities": False},
        {"opcodes": frozenset({0x7F})},
    ],
    ids=str,
)
def test_impossible_configurations(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        DsaConfig(**options)


def test_read_only_registers(request: pytest.FixtureRequest) -> None:
    f = Function()
    request.addfinalizer(f.device.close)
    constant = (*range(0, 0x70, 8), lib.IDXD_GENSTATS_OFFSET, lib.IDXD_CMDCAP_OFFSET, 0xE0, 0xE8, 0xF0, 0x100)
    before = [f.read(offset) for offset in constant]
    for offset in constant:
        f.write(offset, 2**64 - 1, 8)
    assert [f.read(offset) for offset in constant] == before


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_loads_of_every_size(request: pytest.FixtureRequest, size: int) -> None:
    f = Function()
    request.addfinalizer(f.device.close)
    whole = f.read(lib.IDXD_WQCAP_OFFSET)
    parts = [f.read(lib.IDXD_WQCAP_OFFSET + at, size) << 8 * at for at in range(0, 8, size)]
    assert sum(parts) == whole


@pytest.mark.parametrize(
    ("register", "written", "read"),
    [
        (lib.IDXD_GENCFG_OFFSET, ONES, 0x10FF),
        (lib.IDXD_GENCTRL_OFFSET, ONES, 3),
        (0x400, ONES, ONES),
        (0x420, ONES, ONES),
        (0x428, ONES, 0x0FF0FFBF),
        (0x42C, ONES, 0),
        (0x430, ONES, 0),
        (0x500, ONES, 0xFFFF),
        (0x504, ONES, 0xFFFF),
        (0x508, ONES, 0x3FFFFFF7),
        (0x50C, ONES, 0x1FF),
        (0x510, ONES, 0),
        (0x518, ONES, lib.IDXD_WQCFG_MODE_SUPPORT),
        (0x600, ONES, 0xFFFFF00C),
        (0x604, ONES, 0),
    ],
)
def test_writable_bits(request: pytest.FixtureRequest, register: int, written: int, read: int) -> None:
    f = Function()
    request.addfinalizer(f.device.close)
    f.write(register, written)
    assert f.read(register, 4) == read
    for size in (1, 2):
        f.write(register, 0, size)
    assert f.read(register, 4) == read


async def test_configuration_is_locked_while_enabled() -> None:
    """The size and the groups with the device, the rest of a WQ with the WQ (Intel DSA 1.2 9.2)."""
    async with running() as f:
        await f.configure(0)
        before = [f.read(0x400 + at) for at in range(0, 64, 8)] + [
            f.read(0x500 + at) for at in range(0, 32, 8)
        ]
        for at in range(0, 64, 8):
            f.write(0x400 + at, 2**64 - 1, 8)
        for at in range(0, 32, 8):
            f.write(0x500 + at, 2**64 - 1, 8)
        f.write(lib.IDXD_GENCFG_OFFSET, ONES)
        assert f.read(lib.IDXD_GENCFG_OFFSET, 4) == lib.IDXD_GENCFG_USER_INT_EN
        after = [f.read(0x400 + at) for at in range(0, 64, 8)] + [
            f.read(0x500 + at) for at in range(0, 32, 8)
        ]
        assert after == before
        f.wq(1, size=16, threshold=3)
        assert [f.read(f.wqcfg(1, word), 4) for word in range(4)] == [0, 3, DEDICATED | PRIORITY_1, LIMITS]


async def test_fixed_configuration() -> None:
    """Without configuration support the driver finds a WQ and uses it; only PASID and Priv can be written."""
    async with running(DsaConfig(config_en=False, total_wq_size=64)) as f:
        assert [f.read(f.wqcfg(0, word), 4) for word in (0, 1, 3)] == [64, 0, LIMITS]
        f.wq(0, size=5, limits=0, mode=ONES)
        f.group(0, 2, 2)
        assert f.read(f.wqcfg(0, 0), 4) == 64
        assert f.read(0x400) == 1
        mode = f.read(f.wqcfg(0, 2), 4)
        assert mode & lib.IDXD_WQCFG_PASID_EN
        f.write(f.wqcfg(0, 2), 0)
        assert await f.command(lib.IDXD_CMD_ENABLE_DEVICE) == 0
        assert await f.command(lib.IDXD_CMD_ENABLE_WQ, 0) == 0
        f.noop()
        assert f.statuses(1) == [lib.DSA_COMP_SUCCESS]
        assert await f.command(lib.IDXD_CMD_RESET_DEVICE) == 0
        assert f.read(f.wqcfg(0, 0), 4) == 64


async def test_op_config() -> None:
    """A WQ does only what its OPCFG allows of OPCAP."""
    async with running(DsaConfig(op_config=True)) as f:
        assert f.config.wqcfg_stride == 64
        assert f.read(f.wqcfg(0, 8)) == f.read(lib.IDXD_OPCAP_OFFSET)
        f.write(f.wqcfg(0, 8), 1 << lib.DSA_OPCODE_NOOP | 1 << 0x3F, 8)
        await f.configure(0)
        f.noop()
        f.submit(lib.DSA_OPCODE_MEMFILL, record=1, dst_addr=0x108000, xfer_size=8)
        f.submit(0x3F, record=2)
        bad = lib.DSA_COMP_BAD_OPCODE
        assert f.statuses(3) == [lib.DSA_COMP_SUCCESS, bad, bad]


async def test_a_device_with_fewer_operations() -> None:
    opcodes = frozenset({lib.DSA_OPCODE_NOOP, lib.DSA_OPCODE_MEMMOVE})
    async with running(DsaConfig(opcodes=opcodes)) as f:
        assert f.read(lib.IDXD_OPCAP_OFFSET) == 0b1001
        await f.configure(0)
        f.submit(lib.DSA_OPCODE_CRCGEN, src_addr=0x108000, xfer_size=8)
        assert f.statuses(1) == [lib.DSA_COMP_BAD_OPCODE]


async def test_occupancy() -> None:
    async with running() as f:
        await f.configure(0)
        f.device.engine.stop_before(0)
        for record in range(3):
            f.noop(record=record)
        assert f.read(f.wqcfg(0, 6), 4) & lib.IDXD_WQCFG_OCCUPANCY_MASK == 3
        f.device.engine.resume()
        assert f.read(f.wqcfg(0, 6), 4) & lib.IDXD_WQCFG_OCCUPANCY_MASK == 0


async def test_swerr_register() -> None:
    async with running() as f:
        f.write(lib.IDXD_GENCTRL_OFFSET, lib.IDXD_GENCTRL_SOFTERR_INT_EN)
        f.noop(wq=3)
        status = f.read(lib.IDXD_SWERR_OFFSET)
        assert status & lib.IDXD_SWERR_VALID
        assert f.errors() == lib.DSA_SWERR_WQ_NOT_ENABLED
        assert f.read(lib.IDXD_INTCAUSE_OFFSET, 4) == lib.IDXD_INTC_ERR
        assert f.interrupts() == (1, 0)
        f.write(lib.IDXD_INTCAUSE_OFFSET, lib.IDXD_INTC_ERR)
        f.write(lib.IDXD_SWERR_OFFSET, lib.IDXD_SWERR_ACK, 8)
        assert f.read(lib.IDXD_SWERR_OFFSET) == f.read(lib.IDXD_INTCAUSE_OFFSET, 4) == 0


async def test_permissions_of_vectors() -> None:
    """A vector reserved for a PASID is no handle for descriptors without; Ignore lifts that."""
    async with running() as f:
        await f.configure(0)
        rci = lib.IDXD_OP_FLAG_RCI
        entry = f.config.msix_perm_offset + 2 * lib.IDXD_MSIX_PERM_STRIDE
        for value, status in (
            (lib.IDXD_MSIX_PERM_PASID_EN, lib.DSA_COMP_INT_HANDLE_INVAL),
            (lib.IDXD_MSIX_PERM_PASID_EN | lib.IDXD_MSIX_PERM_IGNORE, lib.DSA_COMP_SUCCESS),
            (0, lib.DSA_COMP_SUCCESS),
        ):
            f.write(entry, value)
            f.submit(lib.DSA_OPCODE_NOOP, flags=rci, int_handle=2)
            assert f.statuses(1) == [status]
        assert f.interrupts() == (2, 2)


async def test_portals_from_registers_too() -> None:
    """The BAR can be read and stored to without the path in C."""
    async with running() as f:
        await f.configure(0)
        portal = lib.IDXD_PORTAL_LIMITED * lib.IDXD_PORTAL_SIZE
        assert f.device.read(lib.IDXD_WQ_BAR, portal, 8) == 2**64 - 1
        flags = lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR
        for word, value in enumerate((flags << 32, 0x100000, 0, 0, 0, 0, 0, 0)):
            f.device.write(lib.IDXD_WQ_BAR, portal + 8 * word, 8, value)
        assert f.statuses(1) == [lib.DSA_COMP_SUCCESS]
        f.device.write(lib.IDXD_WQ_BAR, portal, 4, 0)


def test_closed() -> None:
    """After close nothing moves, and nothing crashes."""
    device = DsaDevice(TableBus(), engine="thread")
    portal = device.mmio(lib.IDXD_WQ_BAR)
    device.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
    device.close()
    device.close()
    assert lib.pv_mmio_store(portal, 0, 8, 0) == 0
    assert device.engine.stats().gates == 0
    del device
    assert lib.pv_mmio_store(portal, 0, 8, 0) == 0
