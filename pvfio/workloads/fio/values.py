"""Values of fio's options: sizes, times, ranges, lists and percentages, as fio writes them.

A number may be decimal, hexadecimal or an expression in parentheses. Suffixes of sizes are powers of 1024 ("4k",
"1g", "4ki", "4kib"); with ``kb_base=1000`` those without "i" are powers of 1000 and those with it of 1024, as fio has
it. Times are seconds unless they say otherwise ("10", "500ms", "2h", "1h30m").

Not here: what an option means (options.py), the expressions' units inside of parentheses.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from typing import Any, Final

__all__ = [
    "SECOND",
    "evaluate",
    "parse_bool",
    "parse_bssplit",
    "parse_int",
    "parse_percent",
    "parse_range",
    "parse_size",
    "parse_time",
]

SECOND: Final = 10**9
_MOST: Final = 1 << 64
_LETTERS: Final = "kmgtp"
_TIMES: Final = {
    "d": 86400 * SECOND,
    "h": 3600 * SECOND,
    "m": 60 * SECOND,
    "s": SECOND,
    "ms": 10**6,
    "msec": 10**6,
    "us": 10**3,
    "usec": 10**3,
    "ns": 1,
    "nsec": 1,
}
_TIME_PART: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
_SIZE: Final = re.compile(r"(0x[0-9a-f]+|\d+(?:\.\d+)?|\(.*\))\s*(?:([kmgtp])?(i)?(?:b)?)", re.IGNORECASE)
_OPERATORS: Final[dict[type[ast.AST], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def _value_of(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_value_of(node.left), _value_of(node.right)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_value_of(node.operand)))
    raise ValueError("not a number")


def evaluate(text: str) -> float:
    """A number, or an expression of numbers, ``+ - * / %`` and parentheses. ``ValueError``."""
    if len(text) > 256:
        raise ValueError(f"{text[:32]!r}... is too long for a number")
    try:
        value = _value_of(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError, ValueError):
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a number")
    return value


def parse_size(text: str, *, kb_base: int = 1024) -> int:
    """Bytes. ``ValueError`` for what is no size, or none of 64 bits."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size (try 4096, 4k, 1g)")
    number, letter, binary = match.groups()
    base = 1024 if kb_base == 1024 or binary else 1000
    factor = base ** (_LETTERS.index(letter.lower()) + 1) if letter else 1
    exact = number.isdecimal() or number[:2].lower() == "0x"
    value = (
        int(number, 16 if number[:2].lower() == "0x" else 10) * factor
        if exact
        else int(evaluate(number) * factor)
    )
    if not 0 <= value < _MOST:
        raise ValueError(f"{text!r} is not a size of 64 bits")
    return value


def parse_percent(text: str) -> float | None:
    """The percentage in ``20%``; None where there is no percent sign. ``ValueError`` outside 0 to 100."""
    if not text.strip().endswith("%"):
        return None
    value = evaluate(text.strip()[:-1])
    if not 0 <= value <= 100:
        raise ValueError(f"{text!r} is not a percentage")
    return value


def parse_time(text: str, *, unit: str = "s") -> int:
    """Nanoseconds of a time whose numbers are of ``unit`` where they do not say otherwise. ``ValueError``."""
    word = text.strip().lower()
    if word.startswith("("):
        return int(evaluate(word) * _TIMES[unit])
    position, total = 0, 0.0
    while position < len(word):
        match = _TIME_PART.match(word, position)
        if match is None or (match[2] or unit) not in _TIMES:
            raise ValueError(f"{text!r} is not a time (try 10, 10s, 500ms, 2m)")
        total += float(match[1]) * _TIMES[match[2] or unit]
        position = match.end()
        if word[position : position + 1] == ":":
            raise ValueError(f"{text!r} is not a time (try 1h30m)")
    if not word or total >= 1 << 63:
        raise ValueError(f"{text!r} is not a time")
    return int(total)


def parse_bool(text: str) -> bool:
    """0 or 1; any other whole number is true, as fio has it."""
    word = text.strip().lower()
    if word in ("true", "yes", "on"):
        return True
    if word in ("false", "no", "off"):
        return False
    try:
        return int(word, 0) != 0
    except ValueError:
        raise ValueError(f"{text!r} is not 0 or 1") from None


def parse_int(text: str) -> int:
    """A whole number; suffixes as of sizes are allowed, as is a minus sign."""
    word = text.strip()
    return -parse_size(word[1:]) if word.startswith("-") else parse_size(word)


def parse_range(text: str, *, kb_base: int = 1024) -> tuple[int, int]:
    """``4k-64k``, or one size for both. ``ValueError`` where the end is before the beginning."""
    low, dash, high = text.partition("-")
    first = parse_size(low, kb_base=kb_base)
    last = parse_size(high, kb_base=kb_base) if dash else first
    if last < first:
        raise ValueError(f"{text!r} ends before it begins")
    return first, last


def parse_bssplit(text: str, *, kb_base: int = 1024) -> tuple[tuple[int, float], ...]:
    """``4k/10:64k/50:32k/40`` as (size, percentage) pairs. Percentages left out share what is left evenly, as fio
    has it. ``ValueError`` where they exceed 100 or sizes are 0.
    """
    sizes: list[int] = []
    shares: list[float | None] = []
    for part in text.split(":"):
        size, slash, share = part.partition("/")
        sizes.append(parse_size(size, kb_base=kb_base))
        shares.append(evaluate(share) if slash and share.strip() else None)
    given = sum(share for share in shares if share is not None)
    missing = shares.count(None)
    if given > 100 or any(share is not None and share < 0 for share in shares) or 0 in sizes:
        raise ValueError(f"{text!r} is not a split of 100 percent")
    if not missing and not math.isclose(given, 100):
        raise ValueError(f"the percentages of {text!r} add up to {given:g}, not 100")
    rest = (100 - given) / missing if missing else 0.0
    return tuple((size, rest if share is None else share) for size, share in zip(sizes, shares, strict=True))
