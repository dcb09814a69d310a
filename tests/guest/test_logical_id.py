"""The registry of logical device IDs: one prefix a segment, stale registrations refused."""

from __future__ import annotations

import errno
import uuid

import pytest

from pvfio.abi.hyperv import logical_id_prefix
from pvfio.errors import IommuError
from pvfio.guest.logical_id import LogicalIdRegistry


def test_register_look_up_and_forget() -> None:
    registry = LogicalIdRegistry()
    registry.register(7, 0x1234_5678)
    registry.register(8, 0x1234_5670)
    assert registry.lookup(7) == 0x1234_5678
    assert registry.device_id(7, 0) == 0x1234_5678
    assert registry.device_id(7, 3) == 0x1234_567B
    assert registry.lookup(8) == 0x1234_5670
    registry.unregister(7)
    with pytest.raises(IommuError) as raised:
        registry.lookup(7)
    assert raised.value.errno == errno.ENODEV
    assert registry.lookup(8) == 0x1234_5670


def test_the_same_registration_again_is_fine_and_another_is_stale() -> None:
    registry = LogicalIdRegistry()
    registry.register(7, 8)
    registry.register(7, 8)
    with pytest.raises(IommuError, match="stale registration") as raised:
        registry.register(7, 16)
    assert raised.value.errno == errno.EEXIST
    assert registry.lookup(7) == 8
    registry.unregister(7)
    registry.register(7, 16)
    assert registry.lookup(7) == 16


def test_unregister_of_an_unknown_segment_is_silent() -> None:
    LogicalIdRegistry().unregister(3)


def test_no_room() -> None:
    registry = LogicalIdRegistry(limit=1)
    registry.register(1, 8)
    with pytest.raises(IommuError) as raised:
        registry.register(2, 16)
    assert raised.value.errno == errno.ENOMEM
    registry.register(1, 8)
    registry.unregister(1)
    registry.register(2, 16)


@pytest.mark.parametrize(("segment", "prefix"), [(-1, 8), (0x10000, 8), (1, 1), (1, -8), (1, 1 << 32)])
def test_what_cannot_be_registered(segment: int, prefix: int) -> None:
    with pytest.raises(ValueError):
        LogicalIdRegistry().register(segment, prefix)


@pytest.mark.parametrize("function", [-1, 8])
def test_function_numbers(function: int) -> None:
    registry = LogicalIdRegistry()
    registry.register(1, 8)
    with pytest.raises(ValueError):
        registry.device_id(1, function)


def test_a_guid_makes_a_prefix_the_registry_takes() -> None:
    guid = uuid.UUID(bytes_le=bytes(range(0xF0, 0x100)))
    registry = LogicalIdRegistry()
    registry.register(0, logical_id_prefix(guid.bytes_le))
    assert registry.device_id(0, 5) == 0xF5F4_F7F0 | 5
