"""Numbers as fio prints them: a few significant digits and a unit."""

from __future__ import annotations

from typing import Final

__all__ = ["bytes_text", "number_text", "rate_text"]

_DECIMAL: Final = ("", "k", "M", "G", "T", "P", "E")
_BINARY: Final = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def number_text(value: float, digits: int = 4, *, binary: bool = False, unit: str = "") -> str:
    """``value`` in at most ``digits`` digits and the prefix it takes: 1432125 is "1432k", 32768 bytes "32.0KiB"."""
    step, prefixes = (1024, _BINARY) if binary else (1000, _DECIMAL)
    number, rest, prefix = int(value), None, 0
    while len(str(number)) > digits and prefix < len(prefixes) - 1:
        number, rest = divmod(number, step)
        prefix += 1
    room = digits - len(str(number)) - 1
    if rest is None:
        text = str(number)
    elif room < 1:
        text = str(number + (rest >= step // 2))
    else:
        text = f"{number + rest / step:.{room}f}"
    return f"{text}{prefixes[prefix]}{unit}"


def bytes_text(value: float, *, binary: bool = True) -> str:
    """Bytes in powers of 1024 ("44.8MiB") or of 1000 ("46.9MB")."""
    return number_text(value, binary=binary, unit="B")


def rate_text(value: float, *, binary: bool = True) -> str:
    """Bytes a second."""
    return number_text(value, binary=binary, unit="B/s")
