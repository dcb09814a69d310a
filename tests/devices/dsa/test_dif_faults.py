"""Page faults in DIF operations: whole blocks are done, and the record says how to go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import lib
from tests.devices.dsa.dif_cases import Case, cases, sources
from tests.devices.dsa.dif_reference import CHECK, CHECKING, OPCODES, UPDATE, WRITING, Dif, Tags
from tests.devices.dsa.rig import CRAV_RCR, MEMORY, PAGE, RECORDS, Rig, descriptor

pytestmark = pytest.mark.touches_c

SRC, DST = MEMORY + 0x10000, MEMORY + 0x50000
AREA = 0x10000
BOF = CRAV_RCR | lib.IDXD_OP_FLAG_BOF
FAULT, WRITE = lib.DSA_COMP_PAGE_FAULT_NOBOF, lib.DSA_COMP_STATUS_WRITE
SIDES = [
    (opcode, side)
    for opcode in OPCODES
    for side in ("source", "destination")
    if (opcode, side) != (CHECK, "destination")
]
RESUME = {
    "src_upd": ("src_ref_tag_seed", "src_app_tag_mask", "src_app_tag_seed"),
    "dest_upd": ("dest_ref_tag_seed", "dest_app_tag_mask", "dest_app_tag_seed"),
}
CARRIED = {
    "src_upd": ("dif_upd_src_ref_tag", "dif_upd_src_app_tag_mask", "dif_upd_src_app_tag"),
    "dest_upd": ("dif_upd_dest_ref_tag", "dif_upd_dest_app_tag_mask", "dif_upd_dest_app_tag"),
}


def fields_of(case: Case, src: int, dst: int) -> dict[str, int]:
    fields = case.dif.fields() | {"src_addr": src, "xfer_size": len(case.source)}
    return fields if case.dif.opcode == CHECK else fields | {"dst_addr": dst}


def prepare(rig: Rig, case: Case, src: int) -> None:
    rig.at(src, len(case.source))[:] = np.frombuffer(case.source, np.uint8)
    rig.at(DST, AREA)[:] = 0x5A


def rest(dif: Dif, fields: dict[str, int], record: Any) -> dict[str, int]:
    """The descriptor of what is left, from the record alone, as a driver resubmits it."""
    done = int(record["bytes_completed"])
    left = dict(fields, src_addr=fields["src_addr"] + done, xfer_size=fields["xfer_size"] - done)
    if dif.opcode != CHECK:
        left["dst_addr"] += done // dif.step * dif.out
    for half, opcodes in (("src_upd", CHECKING), ("dest_upd", WRITING)):
        if dif.opcode in opcodes:
            left |= {seed: int(record[tag]) for seed, tag in zip(RESUME[half], CARRIED[half], strict=True)}
    return left


@pytest.mark.parametrize(("opcode", "side"), SIDES)
@given(data=st.data(), at=st.integers(0, PAGE - 1), to=st.integers(0, PAGE - 1))
def test_partial_completion(opcode: int, side: str, data: st.DataObject, at: int, to: int) -> None:
    """Any page of either side is missing: a bad block before it is found; else the fault is told, and what is left can
    be submitted with the tags of the record, to the same end as without the fault.
    """
    case = data.draw(cases((opcode,)))
    dif = case.dif
    done, status, out = dif.run(case.source)
    base, offset, step = (SRC, at, dif.step) if side == "source" else (DST, to, dif.out)
    page = data.draw(st.integers(0, (offset + case.blocks * step - 1) // PAGE))
    hole = max(page * PAGE - offset, 0)  # the first byte that is missing
    rig = Rig()
    try:
        fields = fields_of(case, SRC + at, DST + to)
        prepare(rig, case, SRC + at)
        rig.unmap(base + page * PAGE)
        record = rig.run(opcode, **fields)
        reached = hole // step
        # The check of a block comes after its data were read, and before anything is written.
        if status and (done < reached or (done == reached and side == "destination")):
            assert (record["status"], record["dif_status"]) == (lib.DSA_COMP_DIF_ERR, status)
            assert record["bytes_completed"] == done * dif.step
            return
        assert record["status"] == FAULT | WRITE * (side == "destination")
        assert (record["bytes_completed"], record["dif_status"]) == (reached * dif.step, 0)
        assert record["fault_addr"] == base + offset + hole
        written = rig.at(DST, AREA)
        assert written[to : to + reached * dif.out].tobytes() == out[: reached * dif.out]
        last = to + (hole if side == "destination" else reached * dif.out)
        assert np.all(written[:to] == 0x5A)
        assert np.all(written[last:] == 0x5A)
        left = rest(dif, fields, record)
        rig.map(base + page * PAGE)
        record = rig.run(opcode, **left)
        assert record["status"] == (lib.DSA_COMP_DIF_ERR if status else lib.DSA_COMP_SUCCESS)
        assert record["bytes_completed"] == (done - reached) * dif.step
        assert rig.at(DST + to, len(out)).tobytes() == out
    finally:
        rig.close()


@pytest.mark.parametrize(("opcode", "side"), SIDES)
@given(data=st.data(), at=st.integers(0, PAGE - 1), to=st.integers(0, PAGE - 1))
def test_block_on_fault(opcode: int, side: str, data: st.DataObject, at: int, to: int) -> None:
    """It waits for the page and goes on in the middle."""
    case = data.draw(cases((opcode,), bad=False))
    dif = case.dif
    _, status, out = dif.run(case.source)
    base, offset, step = (SRC, at, dif.step) if side == "source" else (DST, to, dif.out)
    page = data.draw(st.integers(0, (offset + case.blocks * step - 1) // PAGE))
    rig = Rig()
    try:
        prepare(rig, case, SRC + at)
        rig.unmap(base + page * PAGE)
        record = rig.run(opcode, BOF, **fields_of(case, SRC + at, DST + to))
        assert record["status"] == 0 or status
        rig.map(base + page * PAGE)
        rig.engine.kick()
        assert record["status"] == (lib.DSA_COMP_DIF_ERR if status else lib.DSA_COMP_SUCCESS)
        assert rig.at(DST + to, len(out)).tobytes() == out
    finally:
        rig.close()


def test_tags_of_a_record(rig: Rig) -> None:
    """Where each kind of tag stands after two blocks: incremented, or as it was."""
    for fixed, incrementing in ((0, 0), (1, 0), (0, 1), (1, 1)):
        src = lib.DSA_DIF_SRC_FLAG_REF_TAG_FIXED * fixed | lib.DSA_DIF_SRC_FLAG_APP_TAG_INC * incrementing
        dest = lib.DSA_DIF_DEST_FLAG_REF_TAG_FIXED * (1 - fixed) | lib.DSA_DIF_DEST_FLAG_APP_TAG_INC * (
            1 - incrementing
        )
        dif = Dif(
            UPDATE, 2, src_flags=src, dest_flags=dest, src=Tags(10, 20, 0xF000), dest=Tags(30, 40, 0x0F00)
        )
        case = Case(dif, sources(dif, 4, 0))
        prepare(rig, case, SRC)
        rig.unmap(SRC + 2 * PAGE)
        record = rig.run(UPDATE, **fields_of(case, SRC, DST))
        rig.map(SRC + 2 * PAGE)
        assert (record["status"], record["bytes_completed"]) == (FAULT, 4104)
        assert [int(record[name]) for name in CARRIED["src_upd"]] == [11 - fixed, 0xF000, 20 + incrementing]
        assert [int(record[name]) for name in CARRIED["dest_upd"]] == [30 + fixed, 0x0F00, 41 - incrementing]


@pytest.mark.parametrize("opcode", OPCODES)
def test_an_abort_ends_the_waiting(rig: Rig, opcode: int) -> None:
    dif = Dif(opcode)
    case = Case(dif, sources(dif, 20, 0))
    prepare(rig, case, SRC)
    rig.unmap(SRC + PAGE)
    record = rig.run(opcode, BOF, **fields_of(case, SRC, DST))
    rig.abort(0)
    rig.map(SRC + PAGE)
    before = rig.memory.copy()
    rig.engine.kick()
    assert record["status"] == 0
    assert np.array_equal(rig.memory, before)
    assert rig.run(opcode, **fields_of(case, SRC, DST))["status"] == lib.DSA_COMP_SUCCESS


def test_a_record_that_cannot_be_written(rig: Rig) -> None:
    """A DIF error whose record has no page goes to SWERR as the record's fault."""
    dif = Dif(CHECK)
    source = bytearray(sources(dif, 1, 0))
    source[0] ^= 1
    rig.at(SRC, len(source))[:] = np.frombuffer(bytes(source), np.uint8)
    fields = fields_of(Case(dif, bytes(source)), SRC, DST)
    rig.submit(descriptor(CHECK, completion_addr=0xDEAD0000, **fields))
    error = rig.swerr().status >> lib.IDXD_SWERR_ERROR_SHIFT & 0xFF
    assert (error, rig.swerr().fault_addr) == (lib.DSA_COMP_CRA_XLAT, 0xDEAD0000)
    assert not rig.at(RECORDS, 32).any()
