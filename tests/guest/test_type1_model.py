"""Type1 against a dictionary: whatever sequence of requests, the same answers, and at the end nothing is left."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from pvfio.abi import lib
from pvfio.errors import VfioBatchError, VfioError
from pvfio.guest.type1 import Type1
from tests.profiles import tries

pytestmark = pytest.mark.touches_c

PAGE = 0x1000
UNMAP_ALL: int = lib.VFIO_DMA_UNMAP_FLAG_ALL
ENTRIES, MEMLOCK = 12, 700 * PAGE
# Two windows of IOVAs: small ones, and around the interrupt range; 2 MiB pages fit into both.
WINDOWS = (0, 0xFEC0_0000)
RESERVED = range(0xFEE0_0000, 0xFEF0_0000)


class Type1AgainstDict(RuleBasedStateMachine):
    """The model: iova -> (size, vaddr). Pages are counted; each buffer's pages hold different numbers."""

    make: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.machine = self.make(ram=16 << 20)
        self.empty = self.machine.held()
        self.type1: Type1 = self.machine.type1(entries=ENTRIES, memlock=MEMLOCK)
        memory = self.machine.memory
        self.buffers = [memory.alloc(600 * PAGE), memory.alloc(40 * PAGE, scattered=True)]
        for number, buffer in enumerate(self.buffers):
            buffer[::PAGE] = [(number * 100 + i) % 256 for i in range(len(buffer) // PAGE)]
        self.attached = [True, False]
        self.model: dict[int, tuple[int, int]] = {}

    def overlapping(self, iova: int, size: int) -> list[int]:
        return sorted(at for at, (n, _) in self.model.items() if at < iova + size and iova < at + n)

    def expected_errno(self, iova: int, size: int, pinnable: bool) -> int:
        if self.overlapping(iova, size):
            return errno.EEXIST
        if len(self.model) == ENTRIES:
            return errno.ENOSPC
        if not any(self.attached) or (iova < RESERVED.stop and iova + size > RESERVED.start):
            return errno.EINVAL
        if not pinnable:
            return errno.EFAULT
        return errno.ENOMEM if sum(n for n, _ in self.model.values()) + size > MEMLOCK else 0

    @rule(
        window=st.sampled_from(WINDOWS),
        page=st.integers(0, 1100),
        pages=st.one_of(st.integers(1, 8), st.sampled_from([40, 512, 600])),
        buffer=st.integers(0, 1),
        offset=st.integers(0, 45),
    )
    def map(self, window: int, page: int, pages: int, buffer: int, offset: int) -> None:
        iova, size = window + page * PAGE, pages * PAGE
        memory = self.buffers[buffer]
        vaddr = memory.vaddr + offset * PAGE
        pinnable = offset * PAGE + size <= len(memory)
        expected = self.expected_errno(iova, size, pinnable)
        if expected:
            with pytest.raises(VfioError) as caught:
                self.type1.map(iova, vaddr, size, 3)
            assert caught.value.errno == expected
        else:
            self.type1.map(iova, vaddr, size, 3)
            self.model[iova] = (size, vaddr)

    @rule(data=st.data(), before=st.integers(0, 3), after=st.integers(-2, 700))
    def unmap(self, data: st.DataObject, before: int, after: int) -> None:
        if not self.model:
            return
        at = data.draw(st.sampled_from(sorted(self.model)))
        start = max(0, at - before * PAGE)
        size = at - start + self.model[at][0] + after * PAGE
        if size <= 0:
            return
        found = self.overlapping(start, size)
        if found and (found[0] < start or found[-1] + self.model[found[-1]][0] > start + size):
            with pytest.raises(VfioError) as caught:
                self.type1.unmap(start, size)
            assert caught.value.errno == errno.EINVAL
            return
        assert self.type1.unmap(start, size) == sum(self.model.pop(iova)[0] for iova in found)

    @rule(
        window=st.sampled_from(WINDOWS),
        requests=st.lists(
            st.tuples(st.integers(0, 1100), st.sampled_from([1, 1, 2, 5, 40]), st.integers(0, 1)),
            min_size=1,
            max_size=8,
        ),
    )
    def map_batch(self, window: int, requests: list[tuple[int, int, int]]) -> None:
        """All or nothing: the model takes one after the other, and forgets them where one is refused."""
        taken = dict(self.model)
        refused: tuple[int, int] | None = None
        triples = []
        for index, (page, pages, buffer) in enumerate(requests):
            iova, size, memory = window + page * PAGE, pages * PAGE, self.buffers[buffer]
            triples.append((iova, memory.vaddr, size))
            expected = self.expected_errno(iova, size, size <= len(memory))
            if expected and refused is None:
                refused = expected, index
            if refused is None:
                self.model[iova] = (size, memory.vaddr)
        iovas, vaddrs, sizes = (np.array(column, np.uint64) for column in zip(*triples, strict=True))
        if refused is None:
            self.type1.map_batch(iovas, vaddrs, sizes, 3)
            return
        self.model = taken
        with pytest.raises(VfioBatchError) as caught:
            self.type1.map_batch(iovas, vaddrs, sizes, 3)
        assert (caught.value.errno, caught.value.index) == refused

    @rule(data=st.data(), grow=st.lists(st.integers(-1, 3), min_size=1, max_size=6))
    def unmap_batch(self, data: st.DataObject, grow: list[int]) -> None:
        """In order, up to the first that would split a mapping."""
        if not self.model:
            return
        flushes = self.machine.flushes()
        ranges, expected = [], []
        refused = False
        for more in grow:
            at = data.draw(st.sampled_from(sorted(self.model)), label="at") if self.model else 0
            size = max(1, self.model.get(at, (PAGE, 0))[0] // PAGE + more) * PAGE
            ranges.append((at, size))
            found = self.overlapping(at, size)
            refused = any(iova < at or iova + self.model[iova][0] > at + size for iova in found)
            if refused:
                break
            expected.append(sum(self.model.pop(iova)[0] for iova in found))
        iovas, sizes = (np.array(column, np.uint64) for column in zip(*ranges, strict=True))
        if refused:
            with pytest.raises(VfioBatchError) as caught:
                self.type1.unmap_batch(iovas, sizes)
            assert (caught.value.errno, caught.value.index) == (errno.EINVAL, len(expected))
            assert caught.value.unmapped.tolist() == expected
        else:
            assert self.type1.unmap_batch(iovas, sizes).tolist() == expected
        assert self.machine.flushes() - flushes == (len(self.type1.domains) if any(expected) else 0)

    @rule()
    def unmap_all(self) -> None:
        assert self.type1.unmap(0, 0, UNMAP_ALL) == sum(n for n, _ in self.model.values())
        self.model.clear()

    @rule(index=st.integers(0, 1), apart=st.booleans())
    def change_group(self, index: int, apart: bool) -> None:
        """Attaches or detaches; `apart`: the host refuses to share a domain."""
        group = self.machine.groups[index]
        if self.attached[index]:
            self.type1.detach_group(group)
            if not any(self.attached[:index] + self.attached[index + 1 :]):
                self.model.clear()
        else:
            if apart and any(self.attached):
                group.claim_dma_owner("vfio")
                self.machine.hypervisor.inject(
                    lib.HVCALL_ATTACH_DEVICE_DOMAIN, lib.HV_STATUS_OPERATION_DENIED
                )
            self.type1.attach_group(group)
        self.attached[index] = not self.attached[index]
        if not self.attached[index] and group.owner is not None:
            group.release_dma_owner()

    @invariant()
    def devices_see_the_model(self) -> None:
        assert {m.iova: (m.size, m.vaddr) for m in self.type1.mappings()} == self.model
        assert self.type1.dma_avail == ENTRIES - len(self.model)
        assert self.type1.account.locked == sum(n for n, _ in self.model.values())
        assert self.machine.memory.stats().pins == len(self.model)
        for index, bus in enumerate(self.machine.buses):
            if not self.attached[index]:
                continue
            for iova, (size, vaddr) in self.model.items():
                buffer = next(b for b in self.buffers if b.vaddr <= vaddr < b.vaddr + len(b))
                first = vaddr - buffer.vaddr
                for offset in (0, size - PAGE):
                    assert bus.read(iova + offset, 1)[0] == buffer[first + offset]

    def teardown(self) -> None:
        self.type1.close()
        self.buffers.clear()
        gc.collect()  # frames of refused calls hold views of the buffers
        for group in self.machine.groups:
            if group.owner is not None:
                group.release_dma_owner()
        assert self.machine.held() == self.empty
        self.machine.close()


def test_type1_against_a_dictionary(make_type1_machine: Callable[..., Any]) -> None:
    class Bound(Type1AgainstDict):
        make = staticmethod(make_type1_machine)

    run_state_machine_as_test(
        Bound, settings=settings(max_examples=tries(40), stateful_step_count=30, deadline=None)
    )
