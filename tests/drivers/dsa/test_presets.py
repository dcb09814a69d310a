"""Presets of the real parts, and devices with a fixed configuration, under the driver."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvfio.abi import lib
from pvfio.devices.dsa import DsaConfig
from pvfio.drivers.dsa import DsaError, WqConfig

pytestmark = pytest.mark.touches_c

IMS_AND_BIT_38 = 0x3F << 25 | 1 << 38


def test_values() -> None:
    """gencap and opcap as ``accel-config list`` prints them on Sapphire Rapids, less what is not modelled."""
    one, two = DsaConfig.preset("dsa1.0"), DsaConfig.preset("dsa2.0")
    assert one.gencap == 0x40915F0107 & ~IMS_AND_BIT_38
    assert (one.version, two.version) == (0x100, 0x200)
    for config in (one, two):
        sizes = (config.wqs, config.groups, config.engines, config.total_wq_size, config.read_buffers)
        assert sizes == (8, 4, 4, 128, 96)
    assert one.opcap[0] == 0x1003F03FF
    assert two.opcap[0] & ~one.opcap[0] == 1 << lib.DSA_OPCODE_TRANSL_FETCH | 1 << lib.DSA_OPCODE_DIX_GEN
    assert two.gencap & lib.IDXD_GENCAP_EVL_SUPPORT_MASK
    assert two.wqcap & lib.IDXD_WQCAP_OP_CONFIG
    assert (one.cmdcap, two.cmdcap) == (0, 0x7FFE)


def test_changes() -> None:
    config = DsaConfig.preset("dsa2.0", engines=2, event_log=False)
    assert (config.engines, config.event_log, config.op_config) == (2, False, True)
    with pytest.raises(ValueError, match=r"dsa1\.0, dsa2\.0"):
        DsaConfig.preset("dsa9")
    with pytest.raises(ValueError, match="engines"):
        DsaConfig.preset("dsa1.0", engines=65)


@pytest.mark.parametrize(
    "config",
    [
        DsaConfig.preset("dsa1.0"),
        DsaConfig.preset("dsa2.0"),
        DsaConfig.preset("dsa1.0", config_en=False),
        DsaConfig.preset("dsa2.0", config_en=False),
    ],
    ids=["dsa1.0", "dsa2.0", "dsa1.0 fixed", "dsa2.0 fixed"],
)
async def test_the_driver_runs_on_them(running: Any, kind: Any, config: DsaConfig) -> None:
    async with running(*kind, config) as r:
        a, b = await r.container.alloc(1 << 16), await r.container.alloc(1 << 16)
        a[:] = np.random.default_rng(5).integers(0, 256, a.size)
        await r.wq.memmove(b, a, a.size)
        assert np.array_equal(a, b)
        assert r.wq.size == 128
        assert r.dsa.capabilities.event_log == config.event_log
        await r.dsa.reset()
        await r.wq.fill(b, 0, b.size)
        assert not b.any()


async def test_a_fixed_configuration_is_what_it_is(running: Any) -> None:
    """What the driver asked for is not written: one dedicated WQ of the whole size."""
    config = DsaConfig(config_en=False, total_wq_size=48, block_on_fault=False)
    async with running(config=config, wqs=(WqConfig(size=4, shared=True), WqConfig())) as r:
        assert [(wq.size, wq.shared) for wq in r.dsa.wqs] == [(48, False)]
        await r.wq.noop()


async def test_a_wq_limited_to_some_operations(running: Any) -> None:
    """Others are refused by the device, and only in that WQ; what cannot be asked for is refused by the driver."""
    only = frozenset({int(lib.DSA_OPCODE_NOOP), int(lib.DSA_OPCODE_MEMMOVE)})
    wqs = (WqConfig(operations=only), WqConfig())
    async with running(config=DsaConfig.preset("dsa2.0"), wqs=wqs) as r:
        target = await r.container.alloc(4096)
        await r.wq.memmove(target, target, 64)
        with pytest.raises(DsaError) as caught:
            await r.wq.fill(target, 0, 64)
        assert caught.value.name == "DSA_COMP_BAD_OPCODE"
        await r.dsa.wq(1).fill(target, 1, 64)
    cases = ((DsaConfig(), only, "does not limit"), (DsaConfig(op_config=True), frozenset({0x7F}), "0x7f"))
    for config, operations, message in cases:
        with pytest.raises(ValueError, match=message):
            async with running(config=config, wqs=(WqConfig(operations=operations),)):
                pass


async def test_a_work_queue_without_ats(running: Any, kind: tuple[str, str]) -> None:
    """Its accesses go by the IOTLB, those of its neighbour by the device's own cache."""
    wqs = (WqConfig(), WqConfig(ats=False))
    async with running(*kind, config=DsaConfig(wq_ats=True), wqs=wqs) as r:
        target, bus = await r.container.alloc(4096), r.function.bus
        for pattern in (1, 2):
            await r.dsa.wq(1).fill(target, pattern, 4096)
            assert (target.view(np.uint64) == pattern).all()
        assert (bus.atc_stats().requests, bus.atc_stats().entries) == (0, 0)
        assert bus.tlb_stats().hits > 0
        await r.dsa.wq(0).fill(target, 3, 4096)
        assert bus.atc_stats().entries > 0
        before = bus.atc_stats()
        await r.dsa.wq(1).fill(target, 4, 4096)
        assert bus.atc_stats() == before
    with pytest.raises(ValueError, match="does not disable ATS"):
        async with running(config=DsaConfig(), wqs=(WqConfig(ats=False),)):
            pass
