"""Get Features and Set Features: every feature's default, current and saved value, capabilities, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from tests.devices.nvme.rig import MIB, running

pytestmark = pytest.mark.touches_c

SAVE, PER_NS, CHANGE = lib.NVME_FEAT_CAP_SAVEABLE, lib.NVME_FEAT_CAP_PER_NS, lib.NVME_FEAT_CAP_CHANGEABLE
DEFAULT, SAVED, SUPPORTED = 1, 2, 3
INVALID = lib.NVME_SC_INVALID_FIELD
GET, SET = lib.NVME_ADMIN_GET_FEATURES, lib.NVME_ADMIN_SET_FEATURES

# Identifier: its namespace, default, another value, capabilities.
WORDS = {
    lib.NVME_FEAT_ARBITRATION: (0, 7, 0x04030202, SAVE),
    lib.NVME_FEAT_POWER_MGMT: (0, 0, 0x20, SAVE),
    lib.NVME_FEAT_TEMP_THRESH: (0, 343, 360, SAVE),
    lib.NVME_FEAT_ERR_RECOVERY: (1, 0, 0x64, SAVE | PER_NS),
    lib.NVME_FEAT_IRQ_COALESCE: (0, 0, 0x0A07, SAVE),
    lib.NVME_FEAT_WRITE_ATOMIC: (0, 0, 1, SAVE),
    lib.NVME_FEAT_ASYNC_EVENT: (0, 0, 0x31F, SAVE),
    lib.NVME_FEAT_KATO: (0, 0, 60_000, 0),
    lib.NVME_FEAT_IOCS_PROFILE: (0, 0, 0, 0),
    lib.NVME_FEAT_SW_PROGRESS: (0, 0, 3, SAVE),
    lib.NVME_FEAT_WRITE_PROTECT: (1, 0, 1, PER_NS),
}
LASTS = {lib.NVME_FEAT_SW_PROGRESS, lib.NVME_FEAT_WRITE_PROTECT}


@pytest.mark.parametrize("fid", WORDS)
async def test_words(fid: int) -> None:
    nsid, default, other, capabilities = WORDS[fid]
    async with running() as rig:
        assert (await rig.get_feature(fid, nsid=nsid)).result == default
        assert (await rig.set_feature(fid, other, nsid=nsid)).status == 0
        assert (await rig.get_feature(fid, nsid=nsid)).result == other
        assert (await rig.get_feature(fid, nsid=nsid, select=DEFAULT)).result == default
        assert (await rig.get_feature(fid, nsid=nsid, select=SAVED)).result == default
        assert (await rig.get_feature(fid, nsid=nsid, select=SUPPORTED)).result == capabilities | CHANGE
        assert (await rig.get_feature(fid, nsid=nsid, select=4)).code == INVALID
        rig.reset()
        assert (await rig.get_feature(fid, nsid=nsid)).result == (other if fid in LASTS else default)


@pytest.mark.parametrize("fid", WORDS)
async def test_saved_values(fid: int) -> None:
    nsid, _default, other, capabilities = WORDS[fid]
    async with running() as rig:
        done = await rig.set_feature(fid, other, nsid=nsid, save=1)
        if not capabilities & SAVE:
            assert done.code == lib.NVME_SC_FEATURE_NOT_SAVEABLE
            return
        assert done.status == 0
        assert (await rig.get_feature(fid, nsid=nsid, select=SAVED)).result == other
        rig.device.power_cycle()
        rig.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
        rig.enable()
        assert (await rig.get_feature(fid, nsid=nsid)).result == other


@pytest.mark.parametrize(
    ("fid", "value", "nsid", "status"),
    [
        (0x00, 0, 0, INVALID),
        (lib.NVME_FEAT_LBA_RANGE, 0, 1, INVALID),
        (lib.NVME_FEAT_AUTO_PST, 0, 0, INVALID),
        (0x0D, 0, 0, INVALID),
        (0x10, 0, 0, INVALID),
        (lib.NVME_FEAT_SANITIZE, 0, 0, INVALID),
        (0x82, 0, 0, INVALID),
        (0xC0, 0, 0, INVALID),
        (lib.NVME_FEAT_VOLATILE_WC, 1, 0, INVALID),
        (lib.NVME_FEAT_ARBITRATION, 0x08, 0, INVALID),
        (lib.NVME_FEAT_ARBITRATION, 0, 1, lib.NVME_SC_FEATURE_NOT_PER_NS),
        (lib.NVME_FEAT_POWER_MGMT, 1, 0, INVALID),
        (lib.NVME_FEAT_TEMP_THRESH, 2 << 16 | 300, 0, INVALID),
        (lib.NVME_FEAT_TEMP_THRESH, 2 << 20 | 300, 0, INVALID),
        (lib.NVME_FEAT_ERR_RECOVERY, 1 << 16, 1, INVALID),
        (lib.NVME_FEAT_ERR_RECOVERY, 0, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_FEAT_ERR_RECOVERY, 0, 33, lib.NVME_SC_INVALID_NS),
        (lib.NVME_FEAT_ERR_RECOVERY, 0, 3, INVALID),
        (lib.NVME_FEAT_NUM_QUEUES, 0xFFFF, 0, INVALID),
        (lib.NVME_FEAT_NUM_QUEUES, 0xFFFF0000, 0, INVALID),
        (lib.NVME_FEAT_NUM_QUEUES, 0x10001, 0, lib.NVME_SC_CMD_SEQ_ERROR),
        (lib.NVME_FEAT_IRQ_CONFIG, 65, 0, INVALID),
        (lib.NVME_FEAT_IRQ_COALESCE, 0x10000, 0, INVALID),
        (lib.NVME_FEAT_WRITE_ATOMIC, 2, 0, INVALID),
        (lib.NVME_FEAT_ASYNC_EVENT, 1 << 11, 0, INVALID),
        (lib.NVME_FEAT_IOCS_PROFILE, 1, 0, lib.NVME_SC_IOCS_COMBINATION_REJECTED),
        (lib.NVME_FEAT_SW_PROGRESS, 0x100, 0, INVALID),
        (lib.NVME_FEAT_WRITE_PROTECT, 4, 1, INVALID),
        (lib.NVME_FEAT_WRITE_PROTECT, 1, 0, lib.NVME_SC_INVALID_NS),
        (lib.NVME_FEAT_TIMESTAMP, 0, 1, lib.NVME_SC_FEATURE_NOT_PER_NS),
    ],
)
async def test_refused(fid: int, value: int, nsid: int, status: int) -> None:
    async with running() as rig:
        done = await rig.set_feature(fid, value, nsid=nsid)
        assert (done.code, done.dnr) == (status, True)


@pytest.mark.parametrize("fid", [0x00, lib.NVME_FEAT_VOLATILE_WC, lib.NVME_FEAT_LBA_RANGE, 0xFF])
@pytest.mark.parametrize("select", range(4))
async def test_features_that_are_not_there(fid: int, select: int) -> None:
    async with running() as rig:
        assert (await rig.get_feature(fid, select=select)).code == INVALID


@pytest.mark.parametrize(("asked", "granted"), [(0x00010003, 0x00010003), (0xFFFEFFFE, 0x00070007), (0, 0)])
async def test_number_of_queues(asked: int, granted: int) -> None:
    """The first answer stands until a reset (Base 5.27.1.5)."""
    async with running(NvmeConfig(queues=8), enable=False) as rig:
        rig.enable()
        fid = lib.NVME_FEAT_NUM_QUEUES
        assert (await rig.get_feature(fid)).result == 0x00070007
        assert (await rig.set_feature(fid, asked)).result == granted
        assert (await rig.get_feature(fid)).result == granted
        assert (await rig.set_feature(fid, 0x00050005)).result == granted
        number = (granted & 0xFFFF) + 2
        done = await rig.admin(lib.NVME_ADMIN_CREATE_CQ, cdw10=63 << 16 | number, cdw11=1)
        assert done.code == lib.NVME_SC_QID_INVALID
        rig.reset()
        assert (await rig.set_feature(fid, 0x00050005)).result == 0x00050005


async def test_vectors_are_configured_one_by_one() -> None:
    async with running(NvmeConfig(queues=4)) as rig:
        fid, off = lib.NVME_FEAT_IRQ_CONFIG, 1 << 16
        assert (await rig.set_feature(fid, off | 2)).status == 0
        for vector in range(5):
            result = (await rig.get_feature(fid, cdw11=vector)).result
            assert result == vector | off * (vector == 2)
        assert (await rig.get_feature(fid, cdw11=5)).code == INVALID


async def test_temperature_thresholds_by_sensor_and_side() -> None:
    async with running() as rig:
        fid, under, every = lib.NVME_FEAT_TEMP_THRESH, 1 << 20, 15 << 16
        assert (await rig.get_feature(fid, cdw11=1 << 16)).result == 0xFFFF
        assert (await rig.set_feature(fid, under | every | 250)).status == 0
        for sensor in range(2):
            assert (await rig.get_feature(fid, cdw11=under | sensor << 16)).result == 250
        assert (await rig.get_feature(fid)).result == 343
        assert (await rig.get_feature(fid, cdw11=every)).code == INVALID


async def test_all_namespaces_at_once() -> None:
    async with running() as rig:
        fid = lib.NVME_FEAT_ERR_RECOVERY
        assert (await rig.set_feature(fid, 5, nsid=0xFFFFFFFF)).status == 0
        for nsid in (1, 2):
            assert (await rig.get_feature(fid, nsid=nsid)).result == 5
        assert (await rig.get_feature(fid, nsid=0xFFFFFFFF)).code == lib.NVME_SC_INVALID_NS


async def test_the_write_cache_of_an_image(tmp_path: Path) -> None:
    """Off, a write is on disk when it completes; a reset turns it on again."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    spec = NamespaceSpec(image=image, size=0, volatile_cache=True)
    async with running(namespaces=(spec,)) as rig:
        fid = lib.NVME_FEAT_VOLATILE_WC
        page = await rig.identify(lib.NVME_ID_CNS_CTRL, kind="nvme_id_ctrl")
        assert page.vwc & lib.NVME_VWC_PRESENT
        assert (await rig.get_feature(fid)).result == 1
        assert (await rig.io(lib.NVME_CMD_WRITE, data=b"a" * 4096)).status == 0
        assert image.read_bytes()[:1] == b"\0"
        assert (await rig.set_feature(fid, 0)).status == 0
        assert (await rig.io(lib.NVME_CMD_WRITE, data=b"b" * 4096, cdw10=1)).status == 0
        assert image.read_bytes()[4096:4097] == b"b"
        assert (await rig.set_feature(fid, 2)).code == INVALID
        rig.reset()
        assert (await rig.get_feature(fid)).result == 1


async def test_timestamp() -> None:
    async with running() as rig:
        fid, set_by_host = lib.NVME_FEAT_TIMESTAMP, 2
        assert (await rig.get_feature(fid)).status == 0
        assert rig.data[6] == 0
        then = 1_700_000_000_000
        assert (await rig.admin(SET, cdw10=fid, data=then.to_bytes(8, "little"))).status == 0
        assert (await rig.get_feature(fid)).status == 0
        assert then <= int.from_bytes(rig.data[:6].tobytes(), "little") < then + 60_000
        assert rig.data[6] == set_by_host
        rig.reset()
        await rig.get_feature(fid)
        assert rig.data[6] == 0
        assert (await rig.set_feature(fid, save=1)).code == lib.NVME_SC_FEATURE_NOT_SAVEABLE


@pytest.mark.parametrize(("wide", "size"), [(0, 8), (1, 16)])
async def test_host_identifier(wide: int, size: int) -> None:
    async with running() as rig:
        fid = lib.NVME_FEAT_HOST_ID
        assert (await rig.admin(SET, cdw10=fid, cdw11=wide, data=bytes(range(1, size + 1)))).status == 0
        rig.data[:16] = 0
        assert (await rig.get_feature(fid, cdw11=wide)).status == 0
        assert rig.data[:16].tobytes() == bytes(range(1, size + 1)).ljust(16, b"\0")


async def test_host_behavior_support() -> None:
    async with running() as rig:
        fid = lib.NVME_FEAT_HOST_BEHAVIOR
        assert (await rig.admin(SET, cdw10=fid, data=b"\1".ljust(512, b"\0"))).status == 0
        rig.data[:512] = 0
        assert (await rig.get_feature(fid)).status == 0
        assert rig.data[0] == 1
        for bad in (b"\2", b"\0\1", b"\0\0\1"):
            assert (await rig.admin(SET, cdw10=fid, data=bad.ljust(512, b"\0"))).code == INVALID


async def test_profile_needs_every_command_set() -> None:
    async with running(enable=False) as rig:
        rig.enable(csi=lib.NVME_CC_CSS_NVM)
        assert (await rig.get_feature(lib.NVME_FEAT_IOCS_PROFILE)).code == INVALID


async def test_write_protection() -> None:
    """Base 8.12: what changes namespaces is refused; two of the states cannot be left."""
    async with running() as rig:
        fid = lib.NVME_FEAT_WRITE_PROTECT
        assert (await rig.set_feature(fid, 1, nsid=1)).status == 0
        page = await rig.identify(lib.NVME_ID_CNS_NS, 1, kind="nvme_id_ns")
        assert page.nsattr == lib.NVME_NSATTR_WRITE_PROTECTED
        protected = lib.NVME_SC_NS_WRITE_PROTECTED
        assert (await rig.io(lib.NVME_CMD_WRITE)).code == protected
        assert (await rig.io(lib.NVME_CMD_READ)).status == 0
        assert (await rig.admin(lib.NVME_ADMIN_FORMAT_NVM, nsid=1, cdw10=1)).code == protected
        assert (await rig.admin(lib.NVME_ADMIN_SANITIZE, cdw10=2)).code == protected
        assert (await rig.admin(lib.NVME_ADMIN_NS_MGMT, nsid=1, cdw10=1)).code == protected
        assert (await rig.set_feature(fid, 0, nsid=1)).status == 0
        assert (await rig.io(lib.NVME_CMD_WRITE)).status == 0
        for state, nsid in ((2, 1), (3, 2)):
            assert (await rig.set_feature(fid, state, nsid=nsid)).status == 0
            done = await rig.set_feature(fid, 0, nsid=nsid)
            assert done.code == lib.NVME_SC_FEATURE_NOT_CHANGEABLE
        rig.device.power_cycle()
        rig.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
        rig.enable()
        assert (await rig.get_feature(fid, nsid=1)).result == 0
        assert (await rig.get_feature(fid, nsid=2)).result == 3


async def test_data_that_does_not_translate() -> None:
    async with running() as rig:
        for opcode in (GET, SET):
            done = await rig.admin(opcode, cdw10=lib.NVME_FEAT_TIMESTAMP, prp1=0xDEAD000)
            assert (done.code, done.dnr) == (lib.NVME_SC_DATA_XFER_ERROR, True)
