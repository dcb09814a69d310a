"""Arbitrary descriptors, batches and register writes: always an answer, never a byte outside what is mapped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import dtype_of, lib
from pvfio.devices.dsa import DsaConfig
from tests.devices.dsa.function import Function
from tests.devices.dsa.rig import LIST, MEMORY, RECORDS, SIZE, Rig

pytestmark = pytest.mark.touches_c

LOG = MEMORY + 0xD0000
STATUSES = {
    value
    for name in dir(lib)
    if name.startswith("DSA_COMP_") and "STATUS" not in name
    for value in (getattr(lib, name), getattr(lib, name) | lib.DSA_COMP_STATUS_WRITE)
}
addresses = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(MEMORY - 64, MEMORY + SIZE + 64),
    st.sampled_from([LIST, RECORDS, MEMORY, 0xFEE00000, 2**64 - 4096]),
)
opcodes = st.one_of(st.integers(0, 255), st.integers(0, 10), st.integers(0x10, 0x17), st.just(0x20))
flag_bits = st.one_of(st.integers(0, 2**24 - 1), st.sampled_from([0, 0xC, 0xE, 0x1C, 0x1000C, 0x7000C]))
halves = st.one_of(st.just(0), st.integers(0, 2**16 - 1))


@st.composite
def descs(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Anything, with a liking for what is nearly right."""
    desc = np.zeros(1, dtype_of("struct dsa_hw_desc"))
    desc["op_specific"] = np.frombuffer(
        draw(st.one_of(st.just(bytes(24)), st.binary(min_size=24, max_size=24))), "u1"
    )
    desc["pasid_priv"] = draw(st.one_of(st.just(0), st.integers(0, 2**32 - 1)))
    desc["flags_opcode"] = draw(flag_bits) | draw(opcodes) << lib.DSA_DESC_OPCODE_SHIFT
    desc["completion_addr"] = draw(st.one_of(st.just(RECORDS), addresses))
    desc["src_addr"] = draw(addresses)
    desc["dst_addr"] = draw(st.one_of(st.just(0), addresses))
    desc["xfer_size"] = draw(st.one_of(st.integers(0, 9000), st.integers(0, 2**32 - 1)))
    desc["int_handle"] = draw(halves)
    desc["rsvd1"] = draw(st.sampled_from([0, 0, 0, 1]))
    return desc


@pytest.mark.parametrize("log", [0, 2, 64])
@given(submitted=st.lists(descs(), min_size=1, max_size=4), members=st.lists(descs(), max_size=6))
def test_descriptors(
    log: int, submitted: list[np.ndarray[Any, Any]], members: list[np.ndarray[Any, Any]]
) -> None:
    """Every descriptor ends, or waits for a page and can be aborted; a record holds a known status. An event log, of
    that many entries, changes none of this.
    """
    rig = Rig()
    lib.pv_dsa_log_enable(rig.dsa, LOG, log)
    try:
        rig.memory[:] = 0
        for place, member in enumerate(members):
            rig.at(LIST + 64 * place, 64)[:] = member.view(np.uint8)
        for desc in submitted:
            rig.at(RECORDS, 32)[:] = 0
            rig.submit(desc)
            wants = int(desc["flags_opcode"][0]) & (lib.IDXD_OP_FLAG_CRAV | lib.IDXD_OP_FLAG_RCR)
            writes = int(desc["dst_addr"][0]) or int(desc["flags_opcode"][0]) >> 24 == lib.DSA_OPCODE_BATCH
            if wants == 0xC and int(desc["completion_addr"][0]) == RECORDS and not writes:
                assert int(rig.record["status"]) in STATUSES
        rig.abort(0)
        assert lib.pv_dsa_wq_drained(rig.dsa, 0, lib.pv_dsa_wq_mark(rig.dsa, 0))
        rig.memory[:] = 0
        assert rig.run(lib.DSA_OPCODE_NOOP)["status"] == lib.DSA_COMP_SUCCESS
    finally:
        rig.close()


registers = st.one_of(st.integers(0, 0x200 // 4), st.integers(0x400 // 4, 0x680 // 4)).map(
    lambda word: word * 4
)


@pytest.mark.parametrize(
    "config",
    [
        DsaConfig(),
        DsaConfig.preset("dsa2.0", occupancy_interrupt=True, wq_ats=True),
        DsaConfig(config_en=False),
    ],
    ids=["default", "all", "fixed"],
)
@given(
    writes=st.lists(
        st.tuples(registers, st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)), max_size=30
    )
)
def test_registers(config: DsaConfig, writes: list[tuple[int, int, int]]) -> None:
    """Any store, then any load; without its task a device takes one command and no more."""
    function = Function(config)
    fresh = [function.read(at, 8) for at in (0x500, 0x400)]
    try:
        for offset, size, value in writes:
            at = offset // size * size
            function.write(at, value & (1 << 8 * size) - 1, size)
            assert 0 <= function.read(at, size) < 1 << 8 * size
        function.device.function_level_reset()
        function.start()
        assert function.read(lib.IDXD_CMDSTS_OFFSET) == function.read(lib.IDXD_GENSTATS_OFFSET) == 0
        assert [function.read(at, 8) for at in (0x500, 0x400)] == fresh
        evl = (lib.IDXD_EVLCFG_OFFSET, lib.IDXD_EVLCFG_OFFSET + 8, lib.IDXD_EVLSTATUS_OFFSET)
        assert [function.read(at, 8) for at in evl] == [0, 0, 0]
    finally:
        function.device.close()
