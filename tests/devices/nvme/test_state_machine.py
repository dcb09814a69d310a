"""Random histories of a controller against a small model: resets of every kind, queues, commands, garbage, faults.

Through the VFIO device of a machine. Whatever is written anywhere, registers say what the model says, every block holds
what was last written to it, and memory that no command named keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pvfio.abi import dtype_of, lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.silicon import EngineKind
from tests.devices.nvme.controller_model import (
    BLOCKS,
    ENTRIES,
    QUEUES,
    VECTORS,
    ControllerModel,
    QueueFault,
)
from tests.devices.nvme.host_thread import HostThread, switch_on
from tests.devices.nvme.rig import Completion, Platform, Rig, Ring

pytestmark = pytest.mark.touches_c

Result = TypeVar("Result")

BLOCK = 4096
SCRATCH = 2  # a namespace for commands that are garbage: nobody looks at its blocks
LIST, DATA, SCRATCH_PAGE, CANARY = 0xE000, 0x10000, 0x40000, 0x50000
NOWHERE = 1 << 45
FAULTS: tuple[QueueFault, ...] = ("none", "none", "none", "number", "size", "large", "scattered", "offset")
PAIRS, RARELY = st.integers(0, QUEUES), st.integers(0, 2)
NUMBERS, PICK = st.integers(1, QUEUES), st.integers(0, QUEUES - 1)
LBAS, COUNTS = st.integers(0, BLOCKS + 2), st.integers(1, 8)
IO_OPCODES = {
    int(getattr(lib, f"NVME_CMD_{name}"))
    for name in ("FLUSH", "WRITE", "READ", "WRITE_UNCOR", "COMPARE", "WRITE_ZEROES", "DSM", "VERIFY", "COPY")
}
# Of the NVM command set, without the fabrics and vendor specific ones; 0eh and the like are other command sets'.
UNKNOWN_IO = sorted(set(range(0x7F)) - IO_OPCODES)
UNKNOWN_ADMIN = [0x03, 0x07, 0x0B, 0x0E, 0x0F, 0x12, 0x1B, 0x3F, 0x7E]


def needs(state: Callable[[Any], bool]) -> Callable[[Any], Any]:
    return precondition(lambda self: state(self.model))


working = needs(lambda model: model.works)
serving = needs(lambda model: model.works and bool(model.submissions))
enabled = needs(lambda model: model.enabled)
disabled = needs(lambda model: not model.enabled)


class ControllerMachine(RuleBasedStateMachine):
    """One controller and its model."""

    platform: Platform = "intel"
    engine: EngineKind = "inline"

    @initialize(vanishes=st.booleans(), pairs=PAIRS)
    def start(self, vanishes: bool, pairs: int) -> None:
        config = NvmeConfig(queues=QUEUES, entries=ENTRIES, max_namespaces=4)
        namespaces = (NamespaceSpec(size=BLOCKS * BLOCK), NamespaceSpec(size=BLOCKS * BLOCK))
        self.host = HostThread(config, namespaces, self.platform, self.engine)
        self.rig: Rig = self.host.rig
        self.model = ControllerModel()
        self.vanishes = vanishes
        self.cid = 0
        self.rig.memory[CANARY:] = 0xA5
        self.sqs: dict[int, Ring] = {}
        self.cqs: dict[int, Ring] = {}
        self.do(self._switch_on)
        self.enable(pairs)

    def do(self, function: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
        return self.host.call(function, *arguments)

    def store(self, offset: int, size: int, value: int) -> None:
        async def write() -> None:
            self.rig.write(offset, size, value)
            await trio.lowlevel.checkpoint()

        self.do(write)

    def load(self, offset: int, size: int) -> int:
        async def read() -> int:
            await trio.lowlevel.checkpoint()
            return self.rig.read(offset, size)

        return self.do(read)

    async def _switch_on(self) -> None:
        switch_on(self.rig)
        await trio.lowlevel.checkpoint()

    # Registers

    @disabled
    @rule(pairs=PAIRS)
    def enable(self, pairs: int) -> None:
        """As drivers do, with some queues at once."""

        async def go() -> None:
            self.rig.enable()
            await self.rig.settle()

        self.do(go)
        self.model.state = "ready"
        for number in range(1, pairs + 1):
            self.create_completion_queue(number, "none", False)
            self.create_submission_queue(number, number, "none")

    @disabled
    @rule(
        cc=st.sampled_from(
            [
                15 << lib.NVME_CC_MPS_SHIFT,
                2 << lib.NVME_CC_AMS_SHIFT,
                7 << lib.NVME_CC_AMS_SHIFT,
                1 << lib.NVME_CC_CSS_SHIFT,
                5 << lib.NVME_CC_CSS_SHIFT,
            ]
        )
    )
    def enable_what_cannot_be(self, cc: int) -> None:
        self.store(lib.NVME_REG_CC, 4, lib.NVME_CC_ENABLE | 6 << 16 | 4 << 20 | cc)
        self.model.state = "fatal"

    def spare(self, rarely: int) -> bool:
        """Most of the time a controller that works goes on working: histories would be short otherwise."""
        return self.model.works and rarely != 0

    @enabled
    @rule(rarely=RARELY)
    def disable(self, rarely: int) -> None:
        if self.spare(rarely):
            return
        self.store(lib.NVME_REG_CC, 4, 0)
        self.model.disable()

    @rule(rarely=RARELY)
    def reset_function(self, rarely: int) -> None:
        if self.spare(rarely):
            return

        async def go() -> None:
            await self.host.device.reset()
            switch_on(self.rig)

        self.do(go)
        self.model.disable()

    @rule(word=st.sampled_from([lib.NVME_NSSR_RESET, 0, 0x654D564E, 0xFFFFFFFF]), rarely=RARELY)
    def reset_subsystem(self, word: int, rarely: int) -> None:
        if self.spare(rarely):
            return
        self.store(lib.NVME_REG_NSSR, 4, word)
        if word == lib.NVME_NSSR_RESET:
            self.do(self._switch_on)
            self.model.disable()
            self.model.subsystem_was_reset = True

    @rule(bits=st.sampled_from([int(lib.NVME_CSTS_NSSRO), 0xFFFFFFFF, 0]))
    def write_status(self, bits: int) -> None:
        self.store(lib.NVME_REG_CSTS, 4, bits)
        if bits & lib.NVME_CSTS_NSSRO:
            self.model.subsystem_was_reset = False

    @working
    @rule(how=st.sampled_from([int(lib.NVME_CC_SHN_NORMAL), int(lib.NVME_CC_SHN_ABRUPT)]), rarely=RARELY)
    def shut_down(self, how: int, rarely: int) -> None:
        if self.spare(rarely):
            return

        async def go() -> None:
            self.rig.write(lib.NVME_REG_CC, 4, self.rig.read(lib.NVME_REG_CC, 4) | how)
            await self.rig.until(lambda: self.rig.csts & lib.NVME_CSTS_SHST_MASK == lib.NVME_CSTS_SHST_CMPLT)

        self.do(go)
        self.model.shut_down = True

    @rule(bits=st.integers(0, (1 << 32) - 1), on=st.booleans())
    def mask_interrupts(self, bits: int, on: bool) -> None:
        self.store(lib.NVME_REG_INTMS if on else lib.NVME_REG_INTMC, 4, bits)
        mask = self.model.interrupt_mask
        self.model.interrupt_mask = mask | bits if on else mask & ~bits
        assert self.load(lib.NVME_REG_INTMS, 4) == self.model.interrupt_mask

    @rule(
        dword=st.one_of(st.sampled_from([0, 1, 2]), st.integers(0x38 // 4, 0xFFF // 4)),
        size=st.sampled_from([1, 2, 4]),
        value=st.integers(0, (1 << 32) - 1),
    )
    def write_what_cannot_be_written(self, dword: int, size: int, value: int) -> None:
        before = self.load(4 * dword, 4)
        self.store(4 * dword, size, value & (1 << 8 * size) - 1)
        assert self.load(4 * dword, 4) == before

    @enabled
    @rule(
        register=st.sampled_from(
            [lib.NVME_REG_AQA, lib.NVME_REG_ASQ, lib.NVME_REG_ACQ, lib.NVME_REG_ACQ + 4]
        ),
        value=st.integers(0, (1 << 32) - 1),
    )
    def move_the_admin_queue(self, register: int, value: int) -> None:
        before = self.load(register, 4)
        self.store(register, 4, value)
        assert self.load(register, 4) == before

    # Queues

    async def admin(self, opcode: int, **fields: Any) -> Completion:
        return await self.rig.wait(self.rig.submit(opcode, **fields))

    def ends(self, done: Completion, wrong: set[int]) -> None:
        assert (done.code in wrong and done.dnr) if wrong else done.status == 0, (done, wrong)

    def ask(self, opcode: int, wrong: set[int], **fields: int) -> None:
        async def go() -> Completion:
            return await self.admin(opcode, **fields)

        self.ends(self.do(go), wrong)

    def views(self, number: int) -> tuple[Any, Any]:
        base = 0x2000 * number
        area = self.rig.memory[base : base + 0x2000]
        return (
            area[: 64 * ENTRIES].view(dtype_of("struct nvme_command")),
            area[0x1000 : 0x1000 + 16 * ENTRIES].view(dtype_of("struct nvme_completion")),
        )

    def create(self, opcode: int, number: int, fault: QueueFault, cdw11: int, wrong: set[int]) -> None:
        entries = {"size": 1, "large": ENTRIES + 1}.get(fault, ENTRIES)
        address = self.rig.iova + 0x2000 * number + (0x1000 if opcode == lib.NVME_ADMIN_CREATE_CQ else 0)
        self.ask(
            opcode,
            wrong,
            cdw10=(QUEUES + 1 if fault == "number" else number) | (entries - 1) << 16,
            cdw11=cdw11 | (fault != "scattered"),
            prp1=address + 8 * (fault == "offset"),
        )

    @working
    @rule(number=NUMBERS, fault=st.sampled_from([*FAULTS, "vector"]), interrupt=st.booleans())
    def create_completion_queue(self, number: int, fault: QueueFault, interrupt: bool) -> None:
        there = number in self.model.completions
        wrong = self.model.create_cq(number, fault)
        if not there:
            self.rig.memory[0x2000 * number + 0x1000 : 0x2000 * number + 0x2000] = 0
        vector = VECTORS if fault == "vector" else number
        self.create(lib.NVME_ADMIN_CREATE_CQ, number, fault, vector << 16 | interrupt << 1, wrong)
        if not wrong:
            self.cqs[number] = Ring(number, *self.views(number))

    @working
    @rule(number=NUMBERS, cq=NUMBERS, fault=st.sampled_from(FAULTS))
    def create_submission_queue(self, number: int, cq: int, fault: QueueFault) -> None:
        wrong = self.model.create_sq(number, cq, fault)
        self.create(lib.NVME_ADMIN_CREATE_SQ, number, fault, cq << 16, wrong)
        if not wrong:
            self.sqs[number] = Ring(number, *self.views(number))

    @working
    @rule(number=st.integers(0, QUEUES + 2))
    def delete_completion_queue(self, number: int) -> None:
        self.ask(lib.NVME_ADMIN_DELETE_CQ, self.model.delete_cq(number), cdw10=number)

    @working
    @rule(number=st.integers(0, QUEUES + 2))
    def delete_submission_queue(self, number: int) -> None:
        self.ask(lib.NVME_ADMIN_DELETE_SQ, self.model.delete_sq(number), cdw10=number)

    # Commands

    def queue(self, pick: int) -> tuple[Ring, Ring]:
        numbers = sorted(self.model.submissions)
        number = numbers[pick % len(numbers)]
        return self.sqs[number], self.cqs[self.model.submissions[number]]

    def push(self, sq: Ring, opcode: int, **fields: int) -> int:
        """Identifiers are unique over all queues."""
        self.cid = self.cid % 0xFFE + 1
        sq.next_cid = self.cid
        return self.rig.push(sq, opcode, **fields)

    def io(self, pick: int, opcode: int, **fields: int) -> Completion:
        async def go() -> Completion:
            sq, cq = self.queue(pick)
            fields.setdefault("nsid", 1)
            cid = self.push(sq, opcode, **fields)
            self.rig.doorbell(sq.number, sq.tail)
            return await self.rig.wait(cid, ring=cq)

        return self.do(go)

    def pointer(self, count: int) -> dict[str, int]:
        """PRPs of the data area (Base 4.1.1): one page, two, or a list."""
        first = self.rig.iova + DATA
        entries = self.rig.memory[LIST : LIST + 8 * 8].view(np.uint64)
        entries[:] = first + BLOCK + BLOCK * np.arange(8, dtype=np.uint64)
        second = {1: 0, 2: first + BLOCK}.get(count, self.rig.iova + LIST)
        return {"prp1": first, "prp2": second}

    def transfer(self, pick: int, opcode: int, lba: int, count: int) -> Completion:
        return self.io(pick, opcode, cdw10=lba, cdw12=count - 1, **self.pointer(count))

    @property
    def words(self) -> Any:
        """The data area by block."""
        return self.rig.memory[DATA : DATA + 8 * BLOCK].view(np.uint64).reshape(8, -1)

    @serving
    @rule(pick=PICK, lba=LBAS, count=COUNTS, stamp=st.integers(1, 1 << 60))
    def write(self, pick: int, lba: int, count: int, stamp: int) -> None:
        stamps = [stamp + index for index in range(count)]
        self.words[:count] = np.array(stamps, dtype=np.uint64)[:, np.newaxis]
        done = self.transfer(pick, lib.NVME_CMD_WRITE, lba, count)
        self.ends(done, self.beyond(lba, count))
        if not done.status:
            self.model.blocks[lba : lba + count] = stamps

    @serving
    @rule(pick=PICK, lba=LBAS, count=COUNTS)
    def read(self, pick: int, lba: int, count: int) -> None:
        self.words[:] = 0xEE
        done = self.transfer(pick, lib.NVME_CMD_READ, lba, count)
        self.ends(done, self.beyond(lba, count))
        expected = self.model.blocks[lba : lba + count] if not done.status else [0xEE] * count
        assert (self.words[:count] == np.array(expected, dtype=np.uint64)[:, np.newaxis]).all()
        assert (self.words[count:] == 0xEE).all()

    @serving
    @rule(pick=PICK, lba=LBAS, count=COUNTS, wrong=st.booleans())
    def compare(self, pick: int, lba: int, count: int, wrong: bool) -> None:
        expected = (self.model.blocks[lba : lba + count] + [0] * count)[:count]
        self.words[:count] = np.array(expected, dtype=np.uint64)[:, np.newaxis]
        self.words[count - 1, -1] ^= np.uint64(wrong)
        done = self.transfer(pick, lib.NVME_CMD_COMPARE, lba, count)
        if self.model.beyond(lba, count):
            self.ends(done, self.beyond(lba, count))
        else:
            assert done.code == (lib.NVME_SC_COMPARE_FAILED if wrong else 0)

    @serving
    @rule(pick=PICK, lba=LBAS, count=COUNTS, deallocate=st.booleans())
    def write_zeroes(self, pick: int, lba: int, count: int, deallocate: bool) -> None:
        control = int(lib.NVME_RW_DEAC) * deallocate
        done = self.io(pick, lib.NVME_CMD_WRITE_ZEROES, cdw10=lba, cdw12=count - 1 | control)
        self.ends(done, self.beyond(lba, count))
        if not done.status:
            self.model.blocks[lba : lba + count] = [0] * count

    @serving
    @rule(pick=PICK)
    def flush(self, pick: int) -> None:
        self.ends(self.io(pick, lib.NVME_CMD_FLUSH), set())

    @serving
    @rule(pick=PICK, lbas=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=8))
    def read_several_at_once(self, pick: int, lbas: list[int]) -> None:
        async def go() -> list[int]:
            sq, cq = self.queue(pick)
            cids = [
                self.push(
                    sq,
                    lib.NVME_CMD_READ,
                    nsid=1,
                    cdw10=lba,
                    prp1=self.rig.iova + DATA + BLOCK * index,
                )
                for index, lba in enumerate(lbas)
            ]
            self.rig.doorbell(sq.number, sq.tail)
            return [(await self.rig.wait(cid, ring=cq)).status for cid in cids]

        self.words[:] = 0xEE
        assert not any(self.do(go))
        expected = np.array([self.model.blocks[lba] for lba in lbas], dtype=np.uint64)
        assert (self.words[: len(lbas)] == expected[:, np.newaxis]).all()

    def beyond(self, lba: int, count: int) -> set[int]:
        return {int(lib.NVME_SC_LBA_RANGE)} if self.model.beyond(lba, count) else set()

    # Garbage

    @serving
    @rule(pick=PICK, nsid=st.sampled_from([0, 3, 5, 0xFFFFFFFE]))
    def read_a_namespace_that_is_not_there(self, pick: int, nsid: int) -> None:
        done = self.io(pick, lib.NVME_CMD_READ, nsid=nsid, **self.pointer(1))
        assert done.code in (lib.NVME_SC_INVALID_NS, lib.NVME_SC_INVALID_FIELD), hex(done.code)

    @serving
    @rule(pick=PICK, opcode=st.sampled_from([lib.NVME_CMD_READ, lib.NVME_CMD_WRITE, lib.NVME_CMD_COMPARE]))
    def point_nowhere(self, pick: int, opcode: int) -> None:
        self.ends(self.io(pick, opcode, prp1=NOWHERE), {int(lib.NVME_SC_DATA_XFER_ERROR)})

    @serving
    @rule(pick=PICK, opcode=st.sampled_from(UNKNOWN_IO))
    def unknown_command(self, pick: int, opcode: int) -> None:
        self.ends(self.io(pick, opcode), {int(lib.NVME_SC_INVALID_OPCODE)})

    @working
    @rule(opcode=st.sampled_from(UNKNOWN_ADMIN), cdw10=st.integers(0, (1 << 32) - 1))
    def unknown_admin_command(self, opcode: int, cdw10: int) -> None:
        self.ask(opcode, {int(lib.NVME_SC_INVALID_OPCODE)}, cdw10=cdw10)

    @serving
    @rule(
        pick=PICK,
        opcode=st.sampled_from(sorted(IO_OPCODES)),
        rest=st.binary(min_size=63, max_size=63),
        page=st.binary(min_size=64, max_size=64),
    )
    def garbage_command(self, pick: int, opcode: int, rest: bytes, page: bytes) -> None:
        """Any 64 bytes, for the scratch namespace and memory, end with some status and do no harm."""

        async def go() -> None:
            sq, cq = self.queue(pick)
            slot = sq.tail
            cid = self.push(sq, opcode)
            raw = np.frombuffer(bytes([opcode]) + rest, dtype=dtype_of("struct nvme_command")).copy()
            raw["cid"], raw["nsid"] = cid, SCRATCH
            raw["metadata"] = raw["prp1"] = raw["prp2"] = self.rig.iova + SCRATCH_PAGE
            sq.sq[slot : slot + 1] = raw
            self.rig.doorbell(sq.number, sq.tail)
            await self.rig.wait(cid, ring=cq)

        self.rig.memory[SCRATCH_PAGE : SCRATCH_PAGE + 0x1000] = 0
        self.rig.memory[SCRATCH_PAGE : SCRATCH_PAGE + 64] = np.frombuffer(page, dtype=np.uint8)
        self.do(go)

    @rule(number=st.integers(0, 200), completion=st.booleans(), value=st.integers(0, (1 << 32) - 1))
    def ring_where_nobody_is(self, number: int, completion: bool, value: int) -> None:
        """A queue that is not there, or a value that is beyond one that is."""
        live = self.model.completions if completion else self.model.submissions
        if self.model.enabled and (number == 0 or number in live):
            value = value | 0x100
        self.store(int(lib.NVME_REG_DBS) + 4 * (2 * number + completion), 4, value)

    # Faults

    def injected(self, fault: Any, pick: int, opcode: int) -> int:
        """A command that meets a fault and does not complete; its identifier."""

        async def go() -> int:
            made = self.rig.device.inject(fault, opcode=opcode, nsid=1)
            sq, _ = self.queue(pick)
            self.words[0] = 0xDEAD
            cid = self.push(sq, opcode, nsid=1, **self.pointer(1))
            self.rig.doorbell(sq.number, sq.tail)
            await self.rig.until(lambda: made.count)
            made.clear()
            return cid

        return self.do(go)

    @serving
    @rule(pick=PICK)
    def abort_a_lost_write(self, pick: int) -> None:
        cid = self.injected("drop", pick, lib.NVME_CMD_WRITE)

        async def go() -> Completion:
            sq, cq = self.queue(pick)
            done = await self.admin(lib.NVME_ADMIN_ABORT, cdw10=cid << 16 | sq.number)
            assert (done.status, done.result) == (0, 0)
            return await self.rig.wait(cid, ring=cq)

        assert self.do(go).code == lib.NVME_SC_ABORT_REQ

    @serving
    @rule(pick=PICK, function=st.booleans(), rarely=RARELY)
    def reset_with_a_lost_write(self, pick: int, function: bool, rarely: int) -> None:
        if self.spare(rarely):
            return
        self.injected("drop", pick, lib.NVME_CMD_WRITE)
        before = self.rig.memory[: DATA - 0x2000].copy()
        if function:
            self.reset_function(0)
        else:
            self.disable(0)
        assert np.array_equal(before, self.rig.memory[: DATA - 0x2000])  # and no completion

    @serving
    @rule(pick=PICK, rarely=RARELY)
    def fail(self, pick: int, rarely: int) -> None:
        if self.spare(rarely):
            return
        self.injected("fatal", pick, lib.NVME_CMD_WRITE)

        async def go() -> None:
            await self.rig.until(lambda: self.rig.csts & lib.NVME_CSTS_CFS)

        self.do(go)
        self.model.state = "dead"

    # What is always so

    @invariant()
    def registers_say_so(self) -> None:
        if hasattr(self, "model"):
            assert self.load(lib.NVME_REG_CSTS, 4) == self.model.csts
            assert bool(self.load(lib.NVME_REG_CC, 4) & lib.NVME_CC_ENABLE) == self.model.enabled
            assert self.load(lib.NVME_REG_INTMC, 4) == self.model.interrupt_mask

    @invariant()
    def nobody_wrote_elsewhere(self) -> None:
        if hasattr(self, "model"):
            assert (self.rig.memory[CANARY:] == 0xA5).all()

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        try:
            self.look_at_every_block()
            if self.vanishes:
                self.vanish()
        finally:
            self.host.close()

    def look_at_every_block(self) -> None:
        """After one more reset, with fresh queues."""
        self.reset_function(0)
        self.enable(1)
        for lba in range(0, BLOCKS, 8):
            self.read(0, lba, 8)

    def vanish(self) -> None:
        self.injected("vanish", 0, lib.NVME_CMD_WRITE)

        async def go() -> None:
            await self.rig.until(lambda: self.rig.csts == 0xFFFFFFFF)
            self.rig.write(lib.NVME_REG_CC, 4, 0)
            assert self.rig.read(lib.NVME_REG_CAP, 8) == 0xFFFFFFFF_FFFFFFFF

        before = self.rig.memory.copy()
        self.do(go)
        assert np.array_equal(before, self.rig.memory)


class ThreadMachine(ControllerMachine):
    """The other platform, with an engine of its own."""

    platform = "amd"
    engine = "thread"


# A history is fifty steps and a machine of its own: a thousand take ten minutes.
SETTINGS = settings(stateful_step_count=50, max_examples=min(settings().max_examples, 1000))
TestController = ControllerMachine.TestCase
TestController.settings = SETTINGS
TestThreadController = ThreadMachine.TestCase
TestThreadController.settings = SETTINGS
