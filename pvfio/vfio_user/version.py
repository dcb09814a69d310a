"""VERSION: what two ends of a vfio-user socket tell each other first, and what follows for the rest of the connection.

Models the negotiation of the specification 0.9.2 for protocol 0.0 and 0.1. A limit is what the one who names it can
take; one that is not named has the specification's default. Not modelled: twin sockets (never offered, so never used)
and migration.
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from pvfio.abi import lib
from pvfio.vfio_user.wire import Body, WireError, layout, unpack

__all__ = ["Limits", "Version"]

_HEAD: Final = layout("vfio_user_version")
_MOST_TEXT: Final = 64 << 10
_U32: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What one end can take.

    Bytes of one transfer, file descriptors of one message, maps at a time, page sizes or'ed together, and whether it
    knows REGION_WRITE_MULTI. The defaults are those of who says nothing.
    """

    max_msg_fds: int = lib.VFIO_USER_DEFAULT_MAX_MSG_FDS
    max_data_xfer_size: int = lib.VFIO_USER_DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = lib.VFIO_USER_DEFAULT_MAX_DMA_MAPS
    pgsizes: int = lib.VFIO_USER_DEFAULT_PGSIZES
    write_multiple: bool = False


_NAMES: Final = frozenset(field.name for field in fields(Limits))
_MOST: Final = {
    "max_msg_fds": _U32,
    "max_data_xfer_size": lib.VFIO_USER_MAX_MAX_DATA_XFER_SIZE,
    "max_dma_maps": _U32,
    "pgsizes": (1 << 64) - 1,
}
"""What is more than this is taken as this."""


@dataclass(frozen=True, slots=True)
class Version:
    """A VERSION body: ``named`` are the capabilities it names, None where it has no JSON at all."""

    limits: Limits = Limits()
    named: frozenset[str] | None = _NAMES
    major: int = lib.VFIO_USER_MAJOR
    minor: int = lib.VFIO_USER_MINOR

    def pack(self) -> bytes:
        """The body: the named capabilities as JSON without spaces, and a NUL."""
        head = _HEAD.pack(self.major, self.minor)
        if self.named is None:
            return head
        capabilities = {name: value for name, value in asdict(self.limits).items() if name in self.named}
        return head + json.dumps({"capabilities": capabilities}, separators=(",", ":")).encode() + b"\0"

    @classmethod
    def parse(cls, body: Body) -> Version:
        """Capabilities it does not know are passed over.

        EINVAL: too short, no JSON object that ends with a NUL, limits that are no positive numbers.
        """
        major, minor = unpack(_HEAD, body)
        text = bytes(memoryview(body)[_HEAD.size :])
        if not text:
            return cls(Limits(), None, major, minor)
        said = _capabilities(text)
        found: dict[str, Any] = {name: said[name] for name in _NAMES & said.keys()}
        for name, most in _MOST.items():
            value = found.get(name, most)
            if type(value) is not int or value < 1:
                raise WireError(errno.EINVAL, f"{name} is {value!r:.40}")
            if name in found:
                found[name] = min(value, most)
        if type(found.get("write_multiple", False)) is not bool:
            raise WireError(errno.EINVAL, "write_multiple is neither true nor false")
        return cls(Limits(**found), frozenset(found), major, minor)

    def answer(self, own: Limits) -> Version:
        """What a server with these limits replies: the client's minor or less, no capability the client did not name.

        EINVAL for another major, or a page size that is not the server's.
        """
        if self.major != lib.VFIO_USER_MAJOR:
            raise WireError(errno.EINVAL, f"protocol {self.major}.{self.minor}")
        if not self.limits.pgsizes & own.pgsizes:
            raise WireError(errno.EINVAL, f"page sizes {self.limits.pgsizes:#x}")
        named = self.named
        if named is not None and not (self.limits.write_multiple and own.write_multiple):
            named -= {"write_multiple"}
        return Version(own, named, self.major, min(self.minor, lib.VFIO_USER_MINOR))

    def check_answer(self, answer: Version) -> None:
        """For a client: EPROTO for a reply that does not fit what was asked (another major, a later minor)."""
        if answer.major != self.major or answer.minor > self.minor:
            raise WireError(
                errno.EPROTO, f"protocol {answer.major}.{answer.minor} for {self.major}.{self.minor}"
            )


def _capabilities(text: bytes) -> dict[str, Any]:
    """The object below ``capabilities``; empty where there is none."""
    value, end, rest = text.partition(b"\0")
    if len(text) > _MOST_TEXT or not end or rest.strip(b"\0"):
        raise WireError(errno.EINVAL, "capabilities do not end with a NUL")
    try:
        said = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise WireError(errno.EINVAL, f"capabilities are no JSON: {error}") from None
    found = said.get("capabilities", {}) if isinstance(said, dict) else None
    if not isinstance(found, dict):
        raise WireError(errno.EINVAL, "capabilities are no JSON object")
    return found
