"""Controller registers: enabling, what cannot be enabled, shutdown, resets of every kind, masks and the pin."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import MIB, PLACES, Place, Rig, running

pytestmark = pytest.mark.touches_c

RDY, CFS, NSSRO = lib.NVME_CSTS_RDY, lib.NVME_CSTS_CFS, lib.NVME_CSTS_NSSRO
CC, CSTS, AQA, ASQ, ACQ = (
    lib.NVME_REG_CC,
    lib.NVME_REG_CSTS,
    lib.NVME_REG_AQA,
    lib.NVME_REG_ASQ,
    lib.NVME_REG_ACQ,
)
ON = lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_after_power_on(place: Place, engine: EngineKind) -> None:
    config = NvmeConfig(entries=256, timeout=5.0, dstrd=1)
    async with running(config, place=place, engine=engine, enable=False) as rig:
        cap = rig.read(lib.NVME_REG_CAP, 8)
        assert cap & lib.NVME_CAP_MQES_MASK == 255
        assert cap & lib.NVME_CAP_CQR
        assert cap >> lib.NVME_CAP_AMS_SHIFT & 3 == lib.NVME_CAP_AMS_WRR
        assert cap >> lib.NVME_CAP_TO_SHIFT & 0xFF == 10
        assert cap >> lib.NVME_CAP_DSTRD_SHIFT & 15 == 1
        assert cap >> lib.NVME_CAP_NSSRS_SHIFT & 1
        assert cap >> lib.NVME_CAP_CSS_SHIFT & 0xFF == lib.NVME_CAP_CSS_NVM | lib.NVME_CAP_CSS_IO
        assert cap >> lib.NVME_CAP_MPSMAX_SHIFT & 15 == 4
        assert cap == rig.read(0, 4) | rig.read(4, 4) << 32
        assert rig.read(lib.NVME_REG_VS, 4) == lib.NVME_VS_2_0
        for offset in (CC, CSTS, AQA, lib.NVME_REG_CMBLOC, lib.NVME_REG_CMBSZ, lib.NVME_REG_BPINFO, 0xFFC):
            assert rig.read(offset, 4) == 0
        rig.enable()
        assert rig.csts == RDY
        rig.disable()
        assert rig.csts == 0
        assert rig.read(ASQ, 8) == rig.iova


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (CC, lib.NVME_CC_ENABLE | 1 << lib.NVME_CC_CSS_SHIFT),
        (CC, lib.NVME_CC_ENABLE | lib.NVME_CC_CSS_ADMIN << lib.NVME_CC_CSS_SHIFT),
        (CC, lib.NVME_CC_ENABLE | 5 << lib.NVME_CC_MPS_SHIFT),
        (CC, lib.NVME_CC_ENABLE | lib.NVME_CC_AMS_VS << lib.NVME_CC_AMS_SHIFT),
        (CC, lib.NVME_CC_ENABLE | 2 << lib.NVME_CC_AMS_SHIFT),
        (AQA, 0),
        (AQA, 63),
        (AQA, 63 << lib.NVME_AQA_ACQS_SHIFT),
    ],
)
async def test_what_cannot_be_enabled(register: int, value: int) -> None:
    """Fatal, and good again after CC.EN went to zero."""
    async with running(enable=False) as rig:
        rig.write(AQA, 4, 63 | 63 << lib.NVME_AQA_ACQS_SHIFT)
        rig.write(ASQ, 8, rig.iova)
        rig.write(ACQ, 8, rig.iova + 4096)
        rig.write(register, 4, value)
        rig.write(CC, 4, value if register == CC else lib.NVME_CC_ENABLE)
        assert rig.csts == CFS
        rig.disable()
        assert rig.csts == 0
        rig.enable()
        assert rig.csts == RDY


async def test_queues_that_do_not_translate_are_fatal() -> None:
    async with running(enable=False) as rig:
        rig.write(AQA, 4, 63 | 63 << lib.NVME_AQA_ACQS_SHIFT)
        rig.write(ASQ, 8, 0xDEAD0000)
        rig.write(ACQ, 8, 0xDEAE0000)
        rig.write(CC, 4, lib.NVME_CC_ENABLE)
        assert rig.csts == RDY
        rig.doorbell(0, 1)
        await rig.until(lambda: rig.csts != RDY)
        assert rig.csts == RDY | CFS


async def test_admin_queue_registers_stand_while_enabled() -> None:
    async with running() as rig:
        before = [rig.read(register, 8) for register in (ASQ, ACQ)]
        for register in (AQA, ASQ, ACQ):
            rig.write(register, 4, 0)
        assert [rig.read(register, 8) for register in (ASQ, ACQ)] == before
        assert rig.read(AQA, 4)
        await rig.settle()


@pytest.mark.parametrize("offset", [0x00, 0x08, 0x38, 0x40, 0x68, 0x800, 0xFFC])
async def test_what_is_not_for_writing(offset: int) -> None:
    async with running() as rig:
        before = rig.read(offset, 4)
        rig.write(offset, 4, 0xFFFFFFFF)
        assert rig.read(offset, 4) == before


@pytest.mark.parametrize(("offset", "size"), [(0x14, 1), (0x14, 2), (0x16, 2)])
async def test_small_accesses_have_no_effect(offset: int, size: int) -> None:
    async with running() as rig:
        assert rig.read(offset, size) == 0
        rig.write(offset, size, 0)
        assert rig.csts == RDY


@pytest.mark.parametrize(("place", "engine"), PLACES)
@pytest.mark.parametrize("how", [lib.NVME_CC_SHN_NORMAL, lib.NVME_CC_SHN_ABRUPT])
async def test_shutdown(place: Place, engine: EngineKind, how: int, tmp_path: Path) -> None:
    """What was written is in the file when SHST says complete; the next power cycle is a safe one."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    spec = NamespaceSpec(image=image, size=0, volatile_cache=True)
    async with running(namespaces=(spec,), place=place, engine=engine) as rig:
        assert (await rig.io(lib.NVME_CMD_WRITE, data=b"kept" * 1024)).status == 0
        assert image.read_bytes()[:4] == bytes(4)
        rig.write(CC, 4, rig.read(CC, 4) | how)
        await rig.until(lambda: rig.csts & lib.NVME_CSTS_SHST_MASK == lib.NVME_CSTS_SHST_CMPLT)
        assert image.read_bytes()[:4] == b"kept"
        rig.reset()
        assert rig.csts == RDY


@pytest.mark.parametrize("shut_down", [True, False])
async def test_unsafe_shutdowns_are_counted(shut_down: bool) -> None:
    async with running() as rig:
        if shut_down:
            rig.write(CC, 4, rig.read(CC, 4) | lib.NVME_CC_SHN_NORMAL)
            await rig.until(lambda: rig.csts & lib.NVME_CSTS_SHST_MASK == lib.NVME_CSTS_SHST_CMPLT)
            rig.disable()
        rig.device.power_cycle()
        rig.config_write(lib.PCI_COMMAND, 2, ON)
        rig.enable()
        smart = await rig.log(lib.NVME_LOG_SMART, 512, kind="nvme_smart_log")
        assert (smart.power_cycles[0], smart.unsafe_shutdowns[0]) == (2, int(not shut_down))


async def test_subsystem_reset() -> None:
    async with running() as rig:
        rig.write(lib.NVME_REG_NSSR, 4, 0x12345678)
        assert rig.csts == RDY
        rig.write(lib.NVME_REG_NSSR, 4, lib.NVME_NSSR_RESET)
        assert (rig.csts, rig.read(CC, 4), rig.read(AQA, 4)) == (NSSRO, 0, 0)
        rig.enable()
        assert rig.csts == RDY | NSSRO
        rig.write(CSTS, 4, NSSRO)
        assert rig.csts == RDY


@pytest.mark.parametrize(("place", "engine"), PLACES)
async def test_function_level_reset(place: Place, engine: EngineKind) -> None:
    async with running(place=place, engine=engine) as rig:
        await rig.device.reset()
        assert rig.device.read(0, CC, 4) == 0xFFFFFFFF
        rig.config_write(lib.PCI_COMMAND, 2, ON)
        assert (rig.read(CC, 4), rig.csts, rig.read(ASQ, 8)) == (0, 0, 0)
        rig.enable()
        await rig.make_queues()
        assert (await rig.io(lib.NVME_CMD_READ)).status == 0


async def test_a_reset_takes_every_queue_with_it() -> None:
    async with running() as rig:
        rig.device.inject("drop", opcode=lib.NVME_CMD_READ)
        lost = rig.submit(lib.NVME_CMD_READ, ring=rig.io_ring, nsid=1, prp1=rig.iova)
        rig.reset()
        await rig.settle()
        assert not rig.io_ring.collect()
        await rig.make_queues()
        assert (await rig.admin(lib.NVME_ADMIN_ABORT, cdw10=1 | lost << 16)).result == 1
        assert (await rig.io(lib.NVME_CMD_READ)).status == 0


async def test_the_pin_and_its_mask() -> None:
    """The level is up while a completion queue is not empty, unless INTMS masks it."""
    async with running() as rig:
        levels: list[bool] = []
        rig.device.connect_intx(levels.append)

        async def level() -> bool:
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            return bool(levels and levels[-1])

        assert not await level()
        cid = rig.submit(lib.NVME_ADMIN_KEEP_ALIVE)
        assert await level()
        rig.write(lib.NVME_REG_INTMS, 4, 1)
        assert rig.read(lib.NVME_REG_INTMC, 4) == 1
        assert not await level()
        rig.write(lib.NVME_REG_INTMC, 4, 1)
        assert await level()
        await rig.wait(cid)
        assert not await level()
        rig.write(lib.NVME_REG_INTMS, 4, 1)
        rig.reset()
        assert rig.read(lib.NVME_REG_INTMS, 4) == 0


async def test_the_pin_is_looked_at_again() -> None:
    """A host that maps the doorbell page stores a head there, and unmasks the interrupt at once: the device must not
    fire for what is acknowledged, whoever would hear of the head later; and must fire for what came since.
    """
    async with running(NvmeConfig(poll_doorbells=True)) as rig:
        page, ring = rig.device.map_area(0, lib.NVME_REG_DBS, 4096), rig.admin_ring
        levels: list[bool] = []
        rig.device.connect_intx(levels.append)

        async def told() -> list[bool]:
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            found = levels.copy()
            levels.clear()
            return found

        def acknowledge() -> None:
            assert ring.collect()
            page[4:8] = ring.head.to_bytes(4, "little")

        await told()
        for _ in range(3):
            rig.submit(lib.NVME_ADMIN_KEEP_ALIVE)
            assert await told() == [True]
            assert rig.device.recheck_intx()
            assert await told() == [True], "nothing was acknowledged"
            acknowledge()
            assert await told() == [], "the store alone is not heard"
            assert rig.device.recheck_intx()
            assert await told() == [False]


async def test_msix_after_bus_mastering() -> None:
    """A driver may enable MSI-X last of all: from then on the pin is silent."""
    async with running() as rig:
        device = rig.device
        assert device.msix is not None
        levels: list[bool] = []
        device.connect_intx(levels.append)
        flags = device.config.get(lib.PCI_CAPABILITY_LIST, 1)
        while device.config.get(flags, 1) != lib.PCI_CAP_ID_MSIX:
            flags = device.config.get(flags + 1, 1)
        device.config_write(flags + lib.PCI_MSIX_FLAGS, 2, lib.PCI_MSIX_FLAGS_ENABLE)
        for vector in range(2):
            base = rig.config.msix_offset + 16 * vector
            rig.write(base, 8, 0xFEE00000)
            rig.write(base + 8, 8, vector)
        levels.clear()
        before = _messages(rig)
        await rig.settle()
        assert _messages(rig) == before + 1
        assert True not in levels


def _messages(rig: Rig) -> int:
    bus = rig.device.bus
    return int(bus.msis()[0])  # type: ignore[attr-defined]


@pytest.mark.parametrize("dstrd", [0, 4])
async def test_the_doorbell_page_can_be_mapped_where_it_is_polled(dstrd: int) -> None:
    async with running(NvmeConfig(poll_doorbells=True, dstrd=dstrd), enable=False) as rig:
        [bar] = rig.device.bars()
        [(offset, size)] = bar.mmap_areas
        assert offset == lib.NVME_REG_DBS
        fd, at = rig.device.map_fd(bar.index, offset, size)
        assert at == offset
        assert os.fstat(fd).st_size == offset + size
        with pytest.raises(OSError):
            rig.device.map_fd(bar.index, 0, size)
    async with running(NvmeConfig(), enable=False) as rig:
        with pytest.raises(OSError):
            rig.device.map_fd(bar.index, offset, 4096)
