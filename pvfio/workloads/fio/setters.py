"""What the values of fio's options mean: functions that put one into the attributes of a job in the making.

Each takes the draft and the text of the value, and raises ``ValueError`` for what cannot be. The options by name are in
options.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvfio.workloads.fio import values
from pvfio.workloads.fio.job import Distribution, Job, Mode
from pvfio.workloads.fio.jobfile import Section
from pvfio.workloads.fio.pattern import parse_pattern
from pvfio.workloads.fio.steady import KINDS, Criterion

__all__ = [
    "Draft",
    "Notes",
    "Setter",
    "a_flag",
    "a_size",
    "a_time",
    "a_word",
    "an_interval",
    "block_range",
    "block_size",
    "distribution",
    "log_name",
    "percent_or_size",
    "percentage",
    "plain",
    "scalar",
    "set_group",
    "set_gtod_reduce",
    "set_ioengine",
    "set_latency_percentile",
    "set_pattern",
    "set_percentiles",
    "set_rw",
    "set_rwmixwrite",
    "set_steady",
    "set_sync",
    "set_unified",
    "set_verify",
    "three",
    "whole_number",
]

Setter = Callable[["Draft", str], None]


class Notes:
    """What is worth saying about job files: each text once, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        """A line, unless it is there."""
        if text not in self.lines:
            self.lines.append(text)


@dataclass
class Draft:
    """A job in the making: ``fields`` are its attributes so far."""

    section: Section
    notes: Notes
    folder: Path
    fields: dict[str, Any]

    @property
    def kb_base(self) -> int:
        """What a k is."""
        return int(self.fields.get("kb_base", 1024))


def plain(name: str, parse: Callable[[str], Any]) -> Setter:
    """Whatever ``parse`` makes of it."""

    def apply(draft: Draft, text: str) -> None:
        draft.fields[name] = parse(text)

    return apply


def a_size(name: str) -> Setter:
    """A size in bytes."""

    def apply(draft: Draft, text: str) -> None:
        draft.fields[name] = values.parse_size(text, kb_base=draft.kb_base)

    return apply


def whole_number(name: str, least: int = 0, most: int = 1 << 32) -> Setter:
    """A whole number within limits."""

    def apply(draft: Draft, text: str) -> None:
        value = values.parse_int(text)
        if not least <= value <= most:
            raise ValueError(f"{value} is not from {least} to {most}")
        draft.fields[name] = value

    return apply


def a_time(name: str, unit: str = "s") -> Setter:
    """A time, of ``unit`` where it does not say otherwise, in nanoseconds."""

    return plain(name, lambda text: values.parse_time(text, unit=unit))


def an_interval(name: str, unit: str = "s") -> Setter:
    """A time after which something comes again: at least a millisecond."""

    def parse(text: str) -> int:
        found = values.parse_time(text, unit=unit)
        if found < values.SECOND // 1000:
            raise ValueError(f"{text!r} is below a millisecond")
        return found

    return plain(name, parse)


def a_flag(name: str) -> Setter:
    """0 or 1."""

    return plain(name, values.parse_bool)


def a_word(name: str, *known: str) -> Setter:
    """One of these words, or any where none is named."""

    def apply(draft: Draft, text: str) -> None:
        if known and text not in known:
            raise ValueError(f"one of {', '.join(known)}, not {text!r}")
        draft.fields[name] = text

    return apply


def percent_or_size(name: str) -> Setter:
    """``20%`` or a size."""

    def apply(draft: Draft, text: str) -> None:
        share = values.parse_percent(text)
        draft.fields[f"{name}_percent"] = share
        draft.fields[name] = 0 if share is not None else values.parse_size(text, kb_base=draft.kb_base)

    return apply


def _threes(text: str) -> list[str]:
    """``a,b,c``: a value for reads, writes, trims; a missing one is the one before it, an empty one is none."""
    words = [word.strip() for word in text.split(",")]
    if len(words) > 3:
        raise ValueError(f"{text!r} has more than three values")
    return words + [words[-1]] * (3 - len(words))


def three(name: str, parse: Callable[[str, Draft], Any]) -> Setter:
    """``a,b,c`` for reads, writes, trims."""

    def apply(draft: Draft, text: str) -> None:
        before = draft.fields.get(name, Job.__dataclass_fields__[name].default)
        words = _threes(text)
        draft.fields[name] = tuple(
            parse(word, draft) if word else before[index] for index, word in enumerate(words)
        )

    return apply


def block_size(word: str, draft: Draft) -> tuple[int, int]:
    """A block of one size."""
    size = values.parse_size(word, kb_base=draft.kb_base)
    if not size:
        raise ValueError("a block of 0 bytes")
    return size, size


def block_range(word: str, draft: Draft) -> tuple[int, int]:
    """Blocks from one size to another."""
    low, high = values.parse_range(word, kb_base=draft.kb_base)
    if not low:
        raise ValueError("a block of 0 bytes")
    return low, high


def scalar(word: str, draft: Draft) -> int:
    """A number with suffixes as of sizes."""
    return values.parse_size(word, kb_base=draft.kb_base)


def percentage(word: str, draft: Draft) -> int:
    """0 to 100."""
    value = values.parse_int(word.removesuffix("%"))
    if not 0 <= value <= 100:
        raise ValueError(f"{value} is not a percentage")
    return value


def set_rw(draft: Draft, text: str) -> None:
    """``rw=``: the kind of I/O."""
    word, _, modifier = text.partition(":")
    name = {"randtrimwrite": "trimwrite", "readwrite": "rw"}.get(word, word)
    plain = name.removeprefix("rand")
    kinds = {
        "read": (True, False, False),
        "write": (False, True, False),
        "trim": (False, False, True),
        "rw": (True, True, False),
        "readwrite": (True, True, False),
        "trimwrite": (False, True, True),
    }
    if plain not in kinds:
        raise ValueError(
            f"{text!r} is not a kind of I/O (read, write, trim, rw, randread, randwrite, randrw, ...)"
        )
    reads, writes, trims = kinds[plain]
    number = values.parse_size(modifier) if modifier else 0
    draft.fields["mode"] = Mode(word, reads, writes, trims, word.startswith("rand"), number)


def distribution(word: str, draft: Draft) -> Distribution:
    """``random_distribution``."""
    kind, *rest = word.split(":")
    if kind in ("zoned", "zoned_abs"):
        return Distribution(kind, zones=_zones(rest, kind == "zoned_abs", draft))
    center: float | None = None
    if len(rest) == 2:
        center = values.evaluate(rest.pop())
        if not 0 <= center <= 1:
            raise ValueError("the centre is from 0 to 1")
    defaults = {"random": 0.0, "zipf": 1.1, "pareto": 0.2, "normal": 0.0, "gauss": 0.0}
    if kind not in defaults or len(rest) > 1:
        raise ValueError(f"{word!r} is none of random, zipf:theta, pareto:h, normal:dev, zoned, zoned_abs")
    theta = values.evaluate(rest[0]) if rest and rest[0] else defaults[kind]
    if (kind == "zipf" and (theta <= 0 or theta == 1)) or (kind == "pareto" and not 0 < theta < 1):
        raise ValueError(f"{theta:g} is no parameter of {kind}")
    if kind in ("normal", "gauss") and not 0 < theta <= 100:
        raise ValueError(f"{theta:g} is no deviation in percent")
    return Distribution("normal" if kind == "gauss" else kind, theta, center)


def _zones(words: list[str], absolute: bool, draft: Draft) -> tuple[tuple[float, float], ...]:
    zones = []
    for word in words:
        share, slash, extent = word.partition("/")
        if not slash:
            raise ValueError(f"{word!r} is not access/size")
        size = values.parse_size(extent, kb_base=draft.kb_base) if absolute else values.evaluate(extent)
        zones.append((values.evaluate(share), float(size)))
    if (
        not zones
        or sum(share for share, _ in zones) > 100
        or (not absolute and sum(s for _, s in zones) > 100)
    ):
        raise ValueError("zones are access/size with at most 100 percent of each")
    if any(share < 0 or size <= 0 for share, size in zones):
        raise ValueError("a zone has an extent, and no negative share")
    return tuple(zones)


def set_rwmixwrite(draft: Draft, text: str) -> None:
    """``rwmixwrite=``."""
    draft.fields["rwmixread"] = 100 - percentage(text, draft)


def set_percentiles(draft: Draft, text: str) -> None:
    """``percentile_list=``."""
    words = text.split(":")
    found = sorted(values.evaluate(word) for word in words)
    if len(found) > 20 or not all(0 < share <= 100 for share in found):
        raise ValueError("at most 20 percentiles, above 0 and at most 100")
    draft.fields["percentiles"] = tuple(found)
    draft.fields["precision"] = max(len(word.partition(".")[2].strip()) for word in words)


def set_latency_percentile(draft: Draft, text: str) -> None:
    """``latency_percentile=``."""
    share = values.parse_percent(text)
    draft.fields["latency_percentile"] = share = values.evaluate(text) if share is None else share
    if not 0 <= share <= 100:
        raise ValueError(f"{text!r} is not a percentage")


def set_steady(draft: Draft, text: str) -> None:
    """``steadystate=iops_slope:0.1%``."""
    name, colon, limit = text.partition(":")
    kind = name.removesuffix("_slope")
    if kind not in KINDS or not colon:
        raise ValueError(
            f"{text!r} is not one of {', '.join(KINDS)}, with _slope or not, and a limit (iops_slope:0.1%)"
        )
    share = values.parse_percent(limit)
    if share is not None:
        number = share
    elif kind == "lat":
        number = values.parse_time(limit, unit="us")
    else:
        number = values.parse_size(limit, kb_base=draft.kb_base) if kind == "bw" else values.evaluate(limit)
    draft.fields["steady"] = Criterion(kind, kind != name, share is not None, number)


def set_sync(draft: Draft, text: str) -> None:
    """``sync=``: whether every write is durable when it completes. Data and metadata are one to a drive."""
    if text not in ("none", "0", "sync", "1", "dsync"):
        raise ValueError(f"one of none, 0, sync, 1, dsync, not {text!r}")
    draft.fields["sync"] = text not in ("none", "0")


def set_pattern(name: str) -> Setter:
    """A pattern of data."""

    def apply(draft: Draft, text: str) -> None:
        draft.fields[name] = parse_pattern(text, draft.folder)

    return apply


def set_verify(draft: Draft, text: str) -> None:
    """``verify=``."""
    from pvfio.workloads.fio.checksums import CHECKSUMS

    if text in ("0", "none", "null"):
        draft.fields["verify"] = ""
        return
    name = {"crc32c-intel": "crc32c"}.get(text, text)
    if name not in (*CHECKSUMS, "meta", "pattern"):
        raise ValueError(f"{text!r} is none of {', '.join(CHECKSUMS)}, meta, pattern")
    draft.fields["verify"] = name


def set_ioengine(draft: Draft, text: str) -> None:
    """``ioengine=``: noted, but for null."""
    draft.fields["ioengine"] = text.partition(":")[0]
    if text != "null":
        draft.notes.add(f"ioengine={text}: I/O goes through pvfio's NVMe driver")


def set_gtod_reduce(draft: Draft, text: str) -> None:
    """``gtod_reduce=``: less is measured."""
    if values.parse_bool(text):
        for name in ("disable_lat", "disable_clat", "disable_slat", "disable_bw"):
            draft.fields[name] = True


def set_unified(draft: Draft, text: str) -> None:
    """``unified_rw_reporting=``."""
    draft.fields["unified"] = text in ("1", "mixed", "both")


def set_group(draft: Draft, text: str) -> None:
    """``group_reporting=``."""
    draft.fields["group_reporting"] = values.parse_bool(text)


def log_name(name: str, suffix: str) -> Setter:
    """The name of a log, of the job where it is 1."""

    def apply(draft: Draft, text: str) -> None:
        draft.fields[name] = draft.section.name if text == "1" else text

    return apply
