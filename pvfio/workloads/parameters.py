"""dmatest's parameters as the module takes them: ``channel=dma0chan0 iterations=10 dmatest=1``.

Numbers are decimal, hexadecimal (``0x``), with K, M or G where they are bytes; a boolean is one of
``1 0 y n yes no on off true false``, and true without a value. ``channel`` may come several times; of
everything else the last one counts. Dashes and underscores in names are the same, and ``dmatest.`` before
a name, as on the kernel's command line, is allowed.

Not here: ``device`` and ``test_list``; ``xor_sources`` and ``pq_sources``, for a DSA has neither operation;
``wait``: one always does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["PARAMETERS", "parse_channel", "parse_parameters", "parse_size"]

_TRUE = ("1", "y", "yes", "on", "t", "true")
_FALSE = ("0", "n", "no", "off", "f", "false")
_CHANNEL = re.compile(r"dma(\d{1,4})chan(\d{1,4})")


def _boolean(text: str) -> bool:
    word = text.lower()
    if word not in _TRUE and word not in _FALSE:
        raise ValueError(f"{text!r} is not 0 or 1")
    return word in _TRUE


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def parse_size(text: str) -> int:
    """Bytes: a number, hexadecimal with 0x, or with K, M or G (powers of 1024). ``ValueError``: none of them."""
    number, factor = text.strip(), 1
    if number[:2].lower() != "0x" and number[-1:].lower() in ("k", "m", "g"):
        factor = 1024 ** ("kmg".index(number[-1].lower()) + 1)
        number = number[:-1]
    try:
        return int(number, 0) * factor
    except ValueError:
        raise ValueError(f"{text!r} is not a size (try 4096, 0x1000, 64K, 1M)") from None


def parse_channel(text: str) -> tuple[int, int]:
    """The device's and the work queue's number in ``dma0chan1``. ``ValueError`` for another form."""
    match = _CHANNEL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a channel (try dma0chan0)")
    return int(match[1]), int(match[2])


def _what(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"{text!r} is not 0 (memcpy) or 1 (memset)")
    return text == "1"


def _run(text: str) -> None:
    if not _boolean(text):
        raise ValueError("a test that does not run does nothing")


PARAMETERS: dict[str, Callable[[str], Any]] = {
    "channel": parse_channel,
    "threads_per_chan": _number,
    "max_channels": _number,
    "iterations": _number,
    "test_buf_size": parse_size,
    "timeout": _number,
    "noverify": _boolean,
    "norandom": _boolean,
    "verbose": _boolean,
    "alignment": _number,
    "transfer_size": parse_size,
    "polled": _boolean,
    "dmatest": _what,
    "run": _run,
}
"""Each parameter and what its text means."""
_BOOLEANS = ("noverify", "norandom", "verbose", "polled", "run")


def parse_parameters(words: Sequence[str]) -> dict[str, Any]:
    """Parameters by name; ``channel`` is a list of (device, work queue), ``dmatest`` whether it is memset.

    Raises ``ValueError`` for an unknown name or a value that is none.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        name = key.removeprefix("dmatest.").replace("-", "_")
        parse = PARAMETERS.get(name)
        if parse is None:
            raise ValueError(f"unknown parameter {key!r} (there are {', '.join(PARAMETERS)})")
        if not equals and name not in _BOOLEANS:
            raise ValueError(f"{name} needs a value: {name}=...")
        try:
            value = parse(text if equals else "1")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if name == "channel":
            found.setdefault(name, []).append(value)
        elif name != "run":
            found[name] = value
    return found
