"""Random use of the DMA API against a model: every live mapping shows its bytes, none overlaps another, and what is
unmapped is out of reach: at once where flushing is strict, after the flush where it is lazy.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfio.devices.testdev import TestDevice
from pvfio.guest.dma_api import Direction, DmaDevice, DmaMappingError, DmaSegment
from pvfio.guest.dma_domain import DomainKind
from pvfio.guest.kernel import GuestKernel
from pvfio.guest.transport import on_vp
from pvfio.host import Hypervisor, IommuConfig
from pvfio.memory import GuestMemory
from pvfio.silicon import DmaAborted

pytestmark = pytest.mark.touches_c

PAGE = 4096
BIDIRECTIONAL = Direction.BIDIRECTIONAL


@dataclass
class Model:
    """A machine without tasks, a device, and what is mapped."""

    kind: DomainKind
    untrusted: bool
    bits: int
    live: list[tuple[str, list[DmaSegment], list[Any], Any]] = field(default_factory=list)
    gone: list[DmaSegment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = GuestMemory(16 << 20, host_private=8 << 20)
        self.hypervisor = Hypervisor(self.memory, IommuConfig())
        bus = self.hypervisor.add_bus(uuid.UUID(int=5), 1)
        self.function = bus.plug(0, lambda requester: TestDevice(requester))
        self.kernel = GuestKernel(self.memory, self.hypervisor.hypercall, default_domain=self.kind)
        (device,) = self.kernel.add_bus(bus, driver=None)
        device.enable()
        self.dma = DmaDevice(self.kernel, device, mask_bits=self.bits, untrusted=self.untrusted)
        self.bus = self.function.bus
        self.before = self.memory.stats()

    def reaches(self, segment: DmaSegment) -> bool:
        try:
            self.bus.read(segment.address, segment.length)
        except DmaAborted:
            return False
        return True

    def map(self, what: str, sizes: list[int], offset: int, value: int) -> None:
        buffers: list[Any] = []
        for size in sizes:
            buffers.append(self.memory.alloc(offset + size, scattered=bool(value & 1))[offset:])
            buffers[-1][:] = value
        coherent: Any = None
        try:
            if what == "sg":
                segments = self.dma.map_sg(buffers, BIDIRECTIONAL)
            elif what == "coherent":
                coherent, address = self.dma.alloc_coherent(sizes[0])
                coherent[:] = value
                segments, buffers = [DmaSegment(address, sizes[0])], [coherent]
            else:
                address = self.dma.map_single(buffers[0], BIDIRECTIONAL)
                segments, buffers = [DmaSegment(address, sizes[0])], buffers[:1]
        except DmaMappingError:
            # Few IOVAs; or bounce buffers, which are few and small.
            assert self.bits < 32 or self.untrusted
            return
        pages = self.pages(segments)
        for _, others, _, _ in self.live:
            assert not pages & self.pages(others)
        if self.kind == "lazy":
            assert not pages & self.pages(self.gone)
        self.live.append((what, segments, buffers, coherent))

    @staticmethod
    def pages(segments: list[DmaSegment]) -> set[int]:
        return {
            page
            for address, length in segments
            for page in range(address // PAGE, (address + length - 1) // PAGE + 1)
        }

    def unmap(self, which: int) -> None:
        what, segments, _, coherent = self.live.pop(which % len(self.live))
        flushes = self.dma.domain.queue.flushes if self.dma.domain.queue else 0
        if what == "sg":
            self.dma.unmap_sg(segments, BIDIRECTIONAL)
        elif what == "coherent":
            self.dma.free_coherent(coherent, segments[0].address)
        else:
            self.dma.unmap_single(*segments[0], BIDIRECTIONAL)
        if self.kind == "strict":
            assert not any(self.reaches(segment) for segment in segments)
        elif self.dma.domain.queue and self.dma.domain.queue.flushes == flushes:
            self.gone += segments

    def flush(self) -> None:
        assert self.dma.domain.flush()
        assert not any(self.reaches(segment) for segment in self.gone)
        self.gone.clear()

    def check(self) -> None:
        for _, segments, buffers, _ in self.live:
            seen = b"".join(self.bus.read(address, length) for address, length in segments)
            assert seen == b"".join(buffer.tobytes() for buffer in buffers)

    def close(self) -> None:
        while self.live:
            self.unmap(0)
        self.flush()
        iova = self.dma.domain.iova
        assert iova is not None
        iova.check()
        assert iova.stats().live == 0
        assert (self.memory.stats().pins, self.memory.stats().table_pages) == (
            self.before.pins,
            self.before.table_pages,
        )
        self.kernel.close()
        self.hypervisor.close()


SIZE = st.one_of(st.integers(1, 3 * PAGE), st.sampled_from([PAGE, 32 * PAGE, 33 * PAGE, 100 * PAGE]))
STEP = st.one_of(
    st.tuples(
        st.sampled_from(["single", "sg", "coherent"]),
        st.lists(SIZE, min_size=1, max_size=4),
        st.sampled_from([0, 0, 7, 1000]),
        st.integers(0, 255),
    ),
    st.tuples(st.just("unmap"), st.integers(0, 50), st.integers(0, 1)),
    st.tuples(st.just("flush")),
)


@given(
    st.sampled_from(["strict", "lazy"]),
    st.booleans(),
    st.sampled_from([20, 32, 48]),
    st.lists(STEP, max_size=30),
)
def test_every_use(kind: DomainKind, untrusted: bool, bits: int, steps: list[Any]) -> None:
    model = Model(kind, untrusted and kind == "strict", bits)
    for step in steps:
        if step[0] == "unmap":
            if model.live:
                with on_vp(step[2]):
                    model.unmap(step[1])
        elif step[0] == "flush":
            model.flush()
        else:
            with on_vp(step[3] >> 1 & 1):
                model.map(*step)
        model.check()
    model.close()
