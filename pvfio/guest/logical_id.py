"""The registry of logical device IDs: how a hypercall names a PCI device.

Keyed by PCI domain (segment) number, because a vPCI channel is one PCI domain with one bus. A channel
registers the prefix made from its VMBus instance GUID before its root bus exists, and unregisters after the
bus is gone; the pvIOMMU driver looks the prefix up and adds the PCI function.

Not modelled: VMBus itself, and the PCI (segment:bus:device) form of the 64-bit device ID, which the
pvIOMMU's hypercalls do not use.
"""

from __future__ import annotations

import errno

from pvfio.errors import IommuError

__all__ = ["LogicalIdRegistry"]

_MAX_SEGMENT = 0xFFFF
_PREFIX_MASK = 0xFFFF_FFF8


class LogicalIdRegistry:
    """Prefixes by PCI segment. ``limit`` is how many segments there is memory for."""

    def __init__(self, *, limit: int = _MAX_SEGMENT + 1) -> None:
        self._prefixes: dict[int, int] = {}
        self._limit = limit

    def register(self, segment: int, prefix: int) -> None:
        """Makes ``prefix`` (``pvfio.abi.hyperv.logical_id_prefix``) the segment's; again the same one: nothing.

        Raises ``IommuError``: EEXIST where another prefix stands (a stale registration: the segment's last
        owner did not unregister), ENOMEM; ``ValueError`` for a segment above 16 bits or a prefix with
        function bits.
        """
        if not 0 <= segment <= _MAX_SEGMENT:
            raise ValueError(f"PCI segment {segment:#x} is not 16 bits")
        if prefix & ~_PREFIX_MASK:
            raise ValueError(f"{prefix:#x} is not a logical device ID prefix")
        standing = self._prefixes.get(segment)
        if standing == prefix:
            return
        operation = f"register logical device ID prefix {prefix:#x} for segment {segment:04x}"
        if standing is not None:
            raise IommuError(errno.EEXIST, operation, f"stale registration of {standing:#x}")
        if len(self._prefixes) >= self._limit:
            raise IommuError(errno.ENOMEM, operation)
        self._prefixes[segment] = prefix

    def unregister(self, segment: int) -> None:
        """Forgets the segment; silent where it is unknown."""
        self._prefixes.pop(segment, None)

    def lookup(self, segment: int) -> int:
        """The segment's prefix. Raises ``IommuError`` ENODEV."""
        try:
            return self._prefixes[segment]
        except KeyError:
            raise IommuError(
                errno.ENODEV, f"look up the logical device ID prefix of segment {segment:04x}", "no vPCI bus"
            ) from None

    def device_id(self, segment: int, function: int) -> int:
        """The logical device ID of a PCI function (0..7).

        Raises as ``lookup``, and ``ValueError`` for another function number.
        """
        if not 0 <= function <= 7:
            raise ValueError(f"{function} is not a PCI function number")
        return self.lookup(segment) | function
