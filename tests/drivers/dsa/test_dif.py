"""The driver's DIF operations against the plain definition, on every platform, engine and layout of pages."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pvfio.abi import lib
from pvfio.drivers.dsa import BatchError, DifError, DifFormat, DifTags, DsaError, descriptors
from tests.devices.dsa.dif_cases import Case
from tests.devices.dsa.dif_cases import cases as dif_cases
from tests.devices.dsa.dif_reference import CHECK, DIX, INSERT, OPCODES, STRIP, UPDATE, Dif, Tags, crc16
from tests.drivers.dsa.conftest import cases

pytestmark = pytest.mark.touches_c

Kind = tuple[str, str]
LARGE = 2 << 20
FLAGS = tuple(map(int, (0, lib.IDXD_OP_FLAG_ADDR1_TCS, lib.IDXD_OP_FLAG_CRSTS, lib.IDXD_OP_FLAG_CC)))
ROOM = 8 * 4096
LAYOUTS: dict[str, dict[str, Any]] = {
    "4K": {"size": ROOM},
    "2M": {"size": LARGE, "align": LARGE},
    "scattered": {"size": ROOM, "scattered": True},
}
PARTS = 4 * len(LAYOUTS)  # platforms and engines, and these


def format_of(dif: Dif, *, source: bool) -> DifFormat:
    """The reference's bits as the driver's words."""
    flags, tags = (dif.src_flags, dif.src) if source else (dif.dest_flags, dif.dest)
    all_ones: Literal["check", "skip", "error"] = "check"
    if flags & lib.DSA_DIF_SRC_FLAG_ALL_F:
        all_ones = "error" if flags & lib.DSA_DIF_SRC_FLAG_ALL_F_ERR else "skip"
    common: dict[str, Any] = {
        "block_size": dif.block,
        "tags": DifTags(
            ref=tags.ref,
            app=tags.app,
            app_mask=tags.mask,
            fixed_ref=bool(flags & lib.DSA_DIF_SRC_FLAG_REF_TAG_FIXED),
            incrementing_app=bool(flags & lib.DSA_DIF_SRC_FLAG_APP_TAG_INC),
        ),
        "invert_crc_seed": bool(dif.invert & lib.DSA_DIF_FLAG_INVERT_CRC_SEED),
        "invert_crc_result": bool(dif.invert & lib.DSA_DIF_FLAG_INVERT_CRC_RESULT),
    }
    if source:
        return DifFormat(
            **common,
            check_guard=not flags & lib.DSA_DIF_SRC_FLAG_GUARD_DISABLE,
            check_ref=not flags & lib.DSA_DIF_SRC_FLAG_REF_TAG_DISABLE,
            all_ones=all_ones,
            skip_app_ones=bool(flags & lib.DSA_DIF_SRC_FLAG_APP_TAG_F),
            skip_tags_ones=bool(flags & lib.DSA_DIF_SRC_FLAG_APP_REF_TAG_F),
        )
    return DifFormat(
        **common,
        pass_guard=bool(flags & lib.DSA_DIF_DEST_FLAG_GUARD_PASS),
        pass_app=bool(flags & lib.DSA_DIF_DEST_FLAG_APP_TAG_PASS),
        pass_ref=bool(flags & lib.DSA_DIF_DEST_FLAG_REF_TAG_PASS),
    )


async def operate(wq: Any, dif: Dif, dst: Any, src: Any, size: int, flags: int = 0) -> None:
    """The method of the work queue that the reference's operation is."""
    if dif.opcode == CHECK:
        await wq.dif_check(src, size, format_of(dif, source=True), flags=flags)
    elif dif.opcode == STRIP:
        await wq.dif_strip(dst, src, size, format_of(dif, source=True), flags=flags)
    elif dif.opcode == INSERT:
        await wq.dif_insert(dst, src, size, format_of(dif, source=False), flags=flags)
    elif dif.opcode == DIX:
        await wq.dix_generate(dst, src, size, format_of(dif, source=False), flags=flags)
    else:
        source, destination = format_of(dif, source=True), format_of(dif, source=False)
        await wq.dif_update(dst, src, size, source, destination, flags=flags)


async def outcome(wq: Any, case: Case, src: Any, dst: Any, src_at: int, dst_at: int, flags: int) -> None:
    """Runs one case on buffers that earlier ones have used."""
    dif, size = case.dif, len(case.source)
    done, status, out = dif.run(case.source)
    src[src_at : src_at + size] = np.frombuffer(case.source, np.uint8)
    want = np.full(ROOM, 0x5A, np.uint8)
    dst[:ROOM] = want
    want[dst_at : dst_at + len(out)] = np.frombuffer(out, np.uint8)
    caught: DifError | None = None
    try:
        await operate(wq, dif, dst[dst_at:], src[src_at:], size, flags)
    except DifError as error:
        caught = error
    assert np.array_equal(dst[:ROOM], want)
    if caught is None:
        assert status == 0
    else:
        told = caught.guard | caught.app_tag << 1 | caught.ref_tag << 2 | caught.all_ones << 3
        assert (told, caught.result, caught.bytes_completed) == (status, status, done * dif.step)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("opcode", OPCODES)
async def test_operation(running: Any, kind: Kind, layout: str, opcode: int) -> None:
    """Any format, tags, blocks, good and bad fields: exactly what the definition says, and no byte beside it."""
    async with running(*kind) as r:
        src, dst = [await r.container.alloc(**LAYOUTS[layout]) for _ in range(2)]

        @cases(PARTS)
        @given(
            case=dif_cases((opcode,)),
            src_at=st.integers(0, 4095),
            dst_at=st.integers(0, 4095),
            flags=st.sampled_from(FLAGS[:-1] if opcode == CHECK else FLAGS),
        )
        def test(case: Case, src_at: int, dst_at: int, flags: int) -> None:
            trio.from_thread.run(outcome, r.wq, case, src, dst, src_at, dst_at, flags)

        await trio.to_thread.run_sync(test)


async def in_one_buffer(wq: Any, case: Case, buffer: Any, src_at: int, dst_at: int) -> None:
    dif, size, written = case.dif, len(case.source), case.blocks * case.dif.out
    if src_at < dst_at + written and dst_at < src_at + size:
        before = np.array(buffer)
        with pytest.raises(DsaError) as caught:
            await operate(wq, dif, buffer[dst_at:], buffer[src_at:], size)
        assert caught.value.name == "DSA_COMP_OVERLAP_BUFFERS"
        assert np.array_equal(buffer, before)
    else:
        buffer[src_at : src_at + size] = np.frombuffer(case.source, np.uint8)
        await operate(wq, dif, buffer[dst_at:], buffer[src_at:], size)
        assert buffer[dst_at : dst_at + written].tobytes() == dif.run(case.source)[2]
        assert buffer[src_at : src_at + size].tobytes() == case.source


@pytest.mark.parametrize("opcode", [opcode for opcode in OPCODES if opcode != CHECK])
async def test_source_and_destination_share_no_byte(running: Any, kind: Kind, opcode: int) -> None:
    async with running(*kind) as r:
        buffer = await r.container.alloc(2 * ROOM, scattered=True)

        @cases(4)
        @given(
            case=dif_cases((opcode,), bad=False),
            src_at=st.integers(0, ROOM),
            apart=st.one_of(st.integers(-9, 9), st.integers(-ROOM, ROOM)),
            beside=st.sampled_from([-1, 0, 1]),
        )
        def test(case: Case, src_at: int, apart: int, beside: int) -> None:
            edge = {-1: src_at - case.blocks * case.dif.out, 0: src_at, 1: src_at + len(case.source)}[beside]
            dst_at = min(max(edge + apart, 0), 2 * ROOM - case.blocks * case.dif.out)
            trio.from_thread.run(in_one_buffer, r.wq, case, buffer, src_at, dst_at)

        await trio.to_thread.run_sync(test)


async def protected(r: Any, blocks: int, fmt: DifFormat) -> tuple[Any, Any]:
    """Random data, and a buffer with the same data protected."""
    data = await r.container.alloc(blocks * fmt.block_size)
    data[:] = np.random.default_rng(blocks).integers(0, 256, len(data), np.uint8)
    buffer = await r.container.alloc(blocks * fmt.protected_size)
    await r.wq.dif_insert(buffer, data, blocks * fmt.block_size, fmt)
    return data[: blocks * fmt.block_size], buffer[: blocks * fmt.protected_size]


@pytest.mark.parametrize("block_size", [512, 520, 4096, 4104])
async def test_a_life_of_blocks(running: Any, kind: Kind, block_size: int) -> None:
    """Protected, checked, retagged, stripped: the data come back, and the fields are numpy's."""
    fmt = DifFormat(block_size=block_size, tags=DifTags(ref=0xFFFFFFFE, app=0x1234))
    other = DifFormat(
        block_size=block_size, tags=DifTags(ref=7, app=9, fixed_ref=True, incrementing_app=True)
    )
    async with running(*kind) as r:
        data, first = await protected(r, 4, fmt)
        await r.wq.dif_check(first, len(first), fmt)
        second = await r.container.alloc(len(first))
        await r.wq.dif_update(second, first, len(first), fmt, other)
        await r.wq.dif_check(second, len(first), other)
        back = await r.container.alloc(len(data))
        await r.wq.dif_strip(back, second, len(first), other)
        assert np.array_equal(back[: len(data)], data)
        tuples = await r.container.alloc(4096)
        await r.wq.dix_generate(tuples, data, len(data), fmt)
        field = np.dtype([("guard", ">u2"), ("app", ">u2"), ("ref", ">u4")])
        want = first.reshape(4, fmt.protected_size)[:, block_size:]
        assert np.array_equal(tuples[:32].reshape(4, 8), want)
        assert not tuples[32:].any()
        read = np.asarray(tuples[:32]).view(field)
        guards = [crc16(bytes(block)) for block in np.asarray(data).reshape(4, block_size)]
        assert read["guard"].tolist() == guards
        assert read["app"].tolist() == [0x1234] * 4
        assert read["ref"].tolist() == [0xFFFFFFFE, 0xFFFFFFFF, 0, 1]


async def test_an_error_says_what_and_where(running: Any) -> None:
    fmt = DifFormat(tags=DifTags(ref=1))
    async with running() as r:
        _, blocks = await protected(r, 3, fmt)
        blocks[520 + 514] ^= 1
        blocks[520 + 519] ^= 1
        with pytest.raises(DifError) as caught:
            await r.wq.dif_check(blocks, len(blocks), fmt)
        error = caught.value
        assert (error.guard, error.app_tag, error.ref_tag, error.all_ones) == (False, True, True, False)
        assert (error.name, error.bytes_completed, error.result) == ("DSA_COMP_DIF_ERR", 520, 6)
        assert str(error).endswith("0x208 bytes completed: application tag, reference tag")
        submission = r.wq.dif_check_nowait(blocks, len(blocks), fmt)
        assert submission.poll()
        with pytest.raises(DifError):
            r.wq.check(submission.records[0])


async def test_going_on_after_a_fault(running: Any, kind: Kind) -> None:
    """The format of what is left is the one after the blocks that are done; then the result is as from one piece."""
    fmt = DifFormat(block_size=520, tags=DifTags(ref=5, app=6, incrementing_app=True))
    other = DifFormat(block_size=520, tags=DifTags(ref=50, app=60))
    blocks, missing = 40, 0x4000_2000
    async with running(*kind) as r:
        _, whole = await protected(r, blocks, fmt)
        want = await r.container.alloc(len(whole))
        await r.wq.dif_update(want, whole, len(whole), fmt, other)
        low = await r.container.alloc(0x2000, iova=0x4000_0000)
        high = await r.container.alloc(0x4000, iova=0x4000_3000)
        with pytest.raises(DsaError) as caught:
            await r.wq.dif_update(low.iova, whole, len(whole), fmt, other)
        error = caught.value
        done = error.bytes_completed // fmt.protected_size
        assert (error.name, error.write) == ("DSA_COMP_PAGE_FAULT_NOBOF", True)
        assert (error.fault_addr, done) == (missing, 0x2000 // 528)
        middle = await r.container.alloc(0x1000, iova=missing)
        at, left = done * 528, len(whole) - done * 528
        await r.wq.dif_update(low.iova + at, whole[at:], left, fmt.after(done), other.after(done))
        got = np.concatenate([low, middle, high])[: len(whole)]
        assert np.array_equal(got, want[: len(whole)])


async def test_vectorised(running: Any) -> None:
    """A batch of inserts, each with the reference tag of its own place, is one insert."""
    fmt = DifFormat(tags=DifTags(ref=100, app=3))
    async with running() as r:
        data, whole = await protected(r, 16, fmt)
        parts = await r.container.alloc(len(whole))
        first = np.arange(4, dtype=np.uint64) * 4
        inserts = descriptors.dif_insert(
            parts.iova + first * 520, data.iova + first * 512, 4 * 512, fmt, ref_tag=100 + first
        )
        await r.wq.batch(inserts)
        assert np.array_equal(parts[: len(whole)], whole)
        checks = descriptors.dif_check(parts.iova + first * 520, 4 * 520, fmt, ref_tag=100 + first)
        await r.wq.batch(checks)
        with pytest.raises(BatchError) as caught:
            await r.wq.batch(descriptors.dif_check(parts.iova + first * 520, 4 * 520, fmt))
        assert caught.value.failed == [1, 2, 3]


async def test_nowait_twins(running: Any) -> None:
    fmt, other = DifFormat(tags=DifTags(ref=1)), DifFormat(tags=DifTags(ref=2))
    async with running() as r:
        data = await r.container.alloc(4096)
        buffers = [await r.container.alloc(8192) for _ in range(4)]
        one, two, back, tuples = buffers
        for submission in (
            r.wq.dif_insert_nowait(one, data, 4096, fmt),
            r.wq.dif_check_nowait(one, 8 * 520, fmt),
            r.wq.dif_update_nowait(two, one, 8 * 520, fmt, other),
            r.wq.dif_strip_nowait(back, two, 8 * 520, other),
            r.wq.dix_generate_nowait(tuples, data, 4096, fmt),
        ):
            assert submission.poll()
            assert r.wq.check(submission.records[0])["status"] == lib.DSA_COMP_SUCCESS
        assert np.array_equal(tuples[:64].reshape(8, 8), one[:4160].reshape(8, 520)[:, 512:])


PLAIN, PASSING = DifFormat(), DifFormat(pass_ref=True)
MISTAKES: list[Any] = [
    lambda wq, a, b: wq.dif_check(a, 512, PLAIN),
    lambda wq, a, b: wq.dif_check(a, 0, PLAIN),
    lambda wq, a, b: wq.dif_insert(b, a, 520, PLAIN),
    lambda wq, a, b: wq.dif_insert(b[:1032], a, 1024, PLAIN),
    lambda wq, a, b: wq.dif_insert(b, a, 512, PASSING),
    lambda wq, a, b: wq.dif_strip(b, a, 1024, PLAIN),
    lambda wq, a, b: wq.dif_strip(b[:1000], a, 1040, PLAIN),
    lambda wq, a, b: wq.dif_update(b, a, 1024, PLAIN, PLAIN),
    lambda wq, a, b: wq.dif_update(b, a, 520, PLAIN, DifFormat(block_size=4096)),
    lambda wq, a, b: wq.dif_update(b, a, 520, PLAIN, DifFormat(invert_crc_seed=True)),
    lambda wq, a, b: wq.dix_generate(b, a, 520, PLAIN),
    lambda wq, a, b: wq.dix_generate(b[:15], a, 1024, PLAIN),
    lambda wq, a, b: wq.dix_generate(b, a, 512, PASSING),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
async def test_mistakes(running: Any, number: int) -> None:
    async with running() as r:
        a, b = await r.container.alloc(4096), await r.container.alloc(4096)
        with pytest.raises(ValueError):
            await MISTAKES[number](r.wq, a, b)
        assert r.wq.outstanding == 0
        with pytest.raises(DsaError) as caught:
            await r.wq.dif_insert(a[1:], a, 512, PLAIN)
        assert caught.value.name == "DSA_COMP_OVERLAP_BUFFERS"


@pytest.mark.parametrize(
    "make",
    [
        lambda: DifFormat(block_size=1024),
        lambda: DifFormat(all_ones="maybe"),  # type: ignore[arg-type]
        lambda: DifTags(ref=1 << 32),
        lambda: DifTags(ref=-1),
        lambda: DifTags(app=1 << 16),
        lambda: DifTags(app_mask=1 << 16),
    ],
)
def test_formats_are_checked(make: Any) -> None:
    with pytest.raises(ValueError):
        make()


@given(case=dif_cases())
def test_descriptors_are_the_references(case: Case) -> None:
    """Every field of a descriptor, byte for byte."""
    dif = case.dif
    source, destination = format_of(dif, source=True), format_of(dif, source=False)
    built = {
        CHECK: lambda: descriptors.dif_check(1, 2, source),
        STRIP: lambda: descriptors.dif_strip(3, 1, 2, source),
        INSERT: lambda: descriptors.dif_insert(3, 1, 2, destination),
        DIX: lambda: descriptors.dix_generate(3, 1, 2, destination),
        UPDATE: lambda: descriptors.dif_update(3, 1, 2, source, destination),
    }[dif.opcode]()
    want = descriptors.empty(1)
    want["flags_opcode"] = dif.opcode << lib.DSA_DESC_OPCODE_SHIFT
    want["src_addr"], want["xfer_size"] = 1, 2
    want["dst_addr"] = 0 if dif.opcode == CHECK else 3
    for name, value in dif.fields().items():
        want[name] = value
    alone = lib.DSA_DIF_SRC_FLAG_ALL_F_ERR  # means nothing without ALL_F
    if not dif.src_flags & lib.DSA_DIF_SRC_FLAG_ALL_F:
        want["src_upd_flags"] &= 0xFF ^ alone
    assert built.tobytes() == want.tobytes()


def test_tags_that_follow() -> None:
    tags = DifTags(ref=0xFFFFFFFF, app=0xFFFF, incrementing_app=True)
    assert (tags.after(2).ref, tags.after(2).app) == (1, 1)
    still = DifTags(ref=4, app=5, fixed_ref=True)
    assert still.after(9) == still
    assert DifFormat(tags=tags).after(1).tags == tags.after(1)
    assert DifFormat(check_app=False).source_mask == 0xFFFF
    assert Dif(INSERT, dest=Tags(3)).after(2).dest == Tags(5)
