"""Whatever a guest puts into registers and pages: an answer, no exception, no byte written where none
belongs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvfio.abi import ffi, lib
from pvfio.abi.hyperv import CALL_NAMES, STATUS_NAMES

pytestmark = pytest.mark.touches_c

WORD = st.integers(0, 2**64 - 1)
CODES = st.sampled_from(sorted(CALL_NAMES))
OUTPUTS = {
    lib.HVCALL_GET_IOMMU_CAPABILITIES: ffi.sizeof("struct hv_output_get_iommu_capabilities"),
    lib.HVCALL_GET_LOGICAL_DEVICE_PROPERTY: ffi.sizeof("struct hv_output_get_logical_device_property"),
}
CONTROLS = st.one_of(
    WORD,
    CODES,
    st.builds(
        lambda code, count, start: code | count << 32 | start << 48, CODES, WORD, st.integers(0, 4)
    ).map(lambda word: word & ~lib.HV_HYPERCALL_RESERVED_MASK & 2**64 - 1),
    st.builds(lambda count: lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST | count << 32, st.integers(0, 520)),
)
# Mostly words that mean something somewhere, so that calls get past their first check.
FIELDS = st.one_of(
    WORD,
    st.sampled_from([0, 1, 2, 3, 4, 7, 10, 2**64 - 1, 1 << 32 | 1, 2 << 32 | 1, 3 << 32 | 1]),
)
SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Watched:
    """A guest whose RAM is compared, whole, around each call."""

    def __init__(self, guest: Any) -> None:
        self.guest = guest
        self.ram = [guest.memory.view_guest(*r) for r in guest.memory.ram_ranges()]
        start, _ = guest.memory.ram_ranges()[0]
        self.start = start

    def call(self, control: int, input_gpa: int, output_gpa: int) -> int:
        before = [bytearray(view) for view in self.ram]
        result: int = self.guest.host.hypercall(0, control, input_gpa, output_gpa)
        size = OUTPUTS.get(control, 0) if result == 0 else 0
        if size:
            at = output_gpa - self.start
            before[0][at : at + size] = self.ram[0][at : at + size]
        assert [bytes(view) for view in self.ram] == before
        return result


@pytest.fixture
def watched(make_guest: Callable[..., Any]) -> Watched:
    guest = make_guest(ram=2 << 20, functions=2)
    guest.attach(guest.make(1, flags=0), 0)
    guest.make(2, flags=lib.HV_DOMAIN_TRANSLATION_ENABLED, root=guest.memory.guest_page())
    return Watched(guest)


def check(result: int) -> None:
    assert result & 0xFFFF in STATUS_NAMES
    assert result & ~(lib.HV_HYPERCALL_RESULT_MASK | lib.HV_HYPERCALL_REP_COMP_MASK) == 0


@SETTINGS
@given(control=CONTROLS, input_gpa=WORD, output_gpa=WORD)
def test_random_registers(watched: Watched, control: int, input_gpa: int, output_gpa: int) -> None:
    check(watched.call(control, input_gpa, output_gpa))


@SETTINGS
@given(
    control=CONTROLS,
    words=st.lists(FIELDS, min_size=1, max_size=40),
    offset=st.integers(0, 511).map(lambda n: 8 * n),
    output=st.integers(0, 511).map(lambda n: 8 * n),
)
def test_random_pages(watched: Watched, control: int, words: list[int], offset: int, output: int) -> None:
    guest = watched.guest
    data = b"".join(word.to_bytes(8, "little") for word in words)[: 4096 - offset]
    guest.memory.view_guest(guest.page + offset, len(data))[:] = data
    check(watched.call(control, guest.page + offset, guest.page + output))


@SETTINGS
@given(calls=st.lists(st.tuples(CODES, st.lists(FIELDS, min_size=5, max_size=5)), max_size=20))
def test_random_sequences(make_guest: Callable[..., Any], calls: list[tuple[int, list[int]]]) -> None:
    guest = make_guest(ram=2 << 20, functions=2)
    for code, words in calls:
        words = [guest.SELF, 0, *words[2:]] if words[0] & 1 else words
        data = b"".join(word.to_bytes(8, "little") for word in words)
        guest.memory.view_guest(guest.page, len(data))[:] = data
        control = code | (1 << 32 if code == lib.HVCALL_FLUSH_DEVICE_DOMAIN_LIST else 0)
        check(guest.host.hypercall(0, control, guest.page, guest.output))
    guest.close()
