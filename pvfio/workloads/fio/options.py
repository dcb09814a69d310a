"""fio's options by name: what their values mean, and which of them mean nothing here.

``build`` makes a ``Job`` of a section. An option that fio has and that makes no difference to a device behind a
userspace driver is taken with a note, one of no known name with a warning, and a value that cannot be is a
``JobFileError``. Not modelled: profiles, client and server, ``zonemode``, ``read_iolog``, ``latency_target``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pvfio.workloads.fio import values
from pvfio.workloads.fio.job import Distribution, Job, Mode
from pvfio.workloads.fio.jobfile import JobFileError, Section
from pvfio.workloads.fio.pattern import parse_pattern

__all__ = ["ALIASES", "IGNORED", "OPTIONS", "Notes", "build"]

Setter = Callable[["_Draft", str], None]


class Notes:
    """What is worth saying about job files: each text once, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        """A line, unless it is there."""
        if text not in self.lines:
            self.lines.append(text)


@dataclass
class _Draft:
    """A job in the making."""

    section: Section
    notes: Notes
    folder: Path
    fields: dict[str, Any]

    @property
    def kb_base(self) -> int:
        return int(self.fields.get("kb_base", 1024))


def _plain(name: str, parse: Callable[[str], Any]) -> Setter:
    def apply(draft: _Draft, text: str) -> None:
        draft.fields[name] = parse(text)

    return apply


def _size(name: str) -> Setter:
    def apply(draft: _Draft, text: str) -> None:
        draft.fields[name] = values.parse_size(text, kb_base=draft.kb_base)

    return apply


def _whole(name: str, least: int = 0, most: int = 1 << 32) -> Setter:
    def apply(draft: _Draft, text: str) -> None:
        value = values.parse_int(text)
        if not least <= value <= most:
            raise ValueError(f"{value} is not from {least} to {most}")
        draft.fields[name] = value

    return apply


def _time(name: str, unit: str = "s") -> Setter:
    return _plain(name, lambda text: values.parse_time(text, unit=unit))


def _flag(name: str) -> Setter:
    return _plain(name, values.parse_bool)


def _word(name: str, *known: str) -> Setter:
    def apply(draft: _Draft, text: str) -> None:
        if known and text not in known:
            raise ValueError(f"one of {', '.join(known)}, not {text!r}")
        draft.fields[name] = text

    return apply


def _percent_or_size(name: str) -> Setter:
    def apply(draft: _Draft, text: str) -> None:
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


def _three(name: str, parse: Callable[[str, _Draft], Any]) -> Setter:
    def apply(draft: _Draft, text: str) -> None:
        before = draft.fields.get(name, Job.__dataclass_fields__[name].default)
        words = _threes(text)
        draft.fields[name] = tuple(
            parse(word, draft) if word else before[index] for index, word in enumerate(words)
        )

    return apply


def _block(word: str, draft: _Draft) -> tuple[int, int]:
    size = values.parse_size(word, kb_base=draft.kb_base)
    if not size:
        raise ValueError("a block of 0 bytes")
    return size, size


def _block_range(word: str, draft: _Draft) -> tuple[int, int]:
    low, high = values.parse_range(word, kb_base=draft.kb_base)
    if not low:
        raise ValueError("a block of 0 bytes")
    return low, high


def _scalar(word: str, draft: _Draft) -> int:
    return values.parse_size(word, kb_base=draft.kb_base)


def _percentage(word: str, draft: _Draft) -> int:
    value = values.parse_int(word.removesuffix("%"))
    if value > 100:
        raise ValueError(f"{value} is not a percentage")
    return value


def _set_rw(draft: _Draft, text: str) -> None:
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


def _distribution(word: str, draft: _Draft) -> Distribution:
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


def _zones(words: list[str], absolute: bool, draft: _Draft) -> tuple[tuple[float, float], ...]:
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


def _set_rwmixwrite(draft: _Draft, text: str) -> None:
    draft.fields["rwmixread"] = 100 - _percentage(text, draft)


def _set_percentiles(draft: _Draft, text: str) -> None:
    words = text.split(":")
    found = sorted(values.evaluate(word) for word in words)
    if len(found) > 20 or not all(0 < share <= 100 for share in found):
        raise ValueError("at most 20 percentiles, above 0 and at most 100")
    draft.fields["percentiles"] = tuple(found)
    draft.fields["precision"] = max(len(word.partition(".")[2].strip()) for word in words)


def _set_pattern(name: str) -> Setter:
    def apply(draft: _Draft, text: str) -> None:
        draft.fields[name] = parse_pattern(text, draft.folder)

    return apply


def _set_verify(draft: _Draft, text: str) -> None:
    from pvfio.workloads.fio.checksums import CHECKSUMS

    if text in ("0", "none", "null"):
        draft.fields["verify"] = ""
        return
    name = {"crc32c-intel": "crc32c"}.get(text, text)
    if name not in (*CHECKSUMS, "meta", "pattern"):
        raise ValueError(f"{text!r} is none of {', '.join(CHECKSUMS)}, meta, pattern")
    draft.fields["verify"] = name


def _set_ioengine(draft: _Draft, text: str) -> None:
    draft.fields["ioengine"] = text.partition(":")[0]
    if text != "null":
        draft.notes.add(f"ioengine={text}: I/O goes through pvfio's NVMe driver")


def _set_gtod_reduce(draft: _Draft, text: str) -> None:
    if values.parse_bool(text):
        for name in ("disable_lat", "disable_clat", "disable_slat", "disable_bw"):
            draft.fields[name] = True


def _set_unified(draft: _Draft, text: str) -> None:
    draft.fields["unified"] = text in ("1", "mixed", "both")


def _set_group(draft: _Draft, text: str) -> None:
    draft.fields["group_reporting"] = values.parse_bool(text)


def _log(name: str, suffix: str) -> Setter:
    def apply(draft: _Draft, text: str) -> None:
        draft.fields[name] = draft.section.name if text == "1" else text

    return apply


_blocks = _three("bs", _block)
OPTIONS: Final[dict[str, Setter]] = {
    "name": _plain("name", str),
    "description": _plain("description", str),
    "rw": _set_rw,
    "ioengine": _set_ioengine,
    "filename": _plain("filename", str),
    "nrfiles": _whole("nrfiles", 1, 1 << 16),
    "size": _percent_or_size("size"),
    "io_size": _size("io_size"),
    "offset": _percent_or_size("offset"),
    "offset_increment": _size("offset_increment"),
    "number_ios": _whole("number_ios", 0, 1 << 62),
    "bs": _blocks,
    "bsrange": _three("bs", _block_range),
    "bssplit": _three("bssplit", lambda word, draft: values.parse_bssplit(word, kb_base=draft.kb_base)),
    "blockalign": _three("blockalign", _scalar),
    "iodepth": _whole("iodepth", 1, 1 << 16),
    "iodepth_batch": _whole("batch_submit", 0, 1 << 16),
    "iodepth_batch_complete_min": _whole("batch_complete_min", 0, 1 << 16),
    "iodepth_batch_complete_max": _whole("batch_complete_max", 0, 1 << 16),
    "iodepth_low": _whole("iodepth_low", 0, 1 << 16),
    "hipri": _flag("hipri"),
    "numjobs": _whole("numjobs", 1, 4096),
    "loops": _whole("loops", 1, 1 << 31),
    "runtime": _time("runtime"),
    "time_based": _flag("time_based"),
    "ramp_time": _time("ramp_time"),
    "startdelay": _time("startdelay"),
    "stonewall": _flag("stonewall"),
    "new_group": _flag("new_group"),
    "group_reporting": _set_group,
    "exitall": _flag("exitall"),
    "rwmixread": _plain("rwmixread", lambda text: float(values.parse_int(text.removesuffix("%")))),
    "rwmixwrite": _set_rwmixwrite,
    "rw_sequencer": _word("rw_sequencer", "sequential", "identical"),
    "randseed": _whole("randseed", 0, (1 << 64) - 1),
    "randrepeat": _flag("randrepeat"),
    "allrandrepeat": _flag("randrepeat"),
    "norandommap": _flag("norandommap"),
    "softrandommap": _flag("softrandommap"),
    "random_generator": _word("random_generator", "tausworthe", "tausworthe64", "lfsr"),
    "random_distribution": _three("distributions", _distribution),
    "percentage_random": _three("percentage_random", _percentage),
    "rate": _three("rate", _scalar),
    "rate_iops": _three("rate_iops", _scalar),
    "rate_min": _three("rate_min", _scalar),
    "rate_iops_min": _three("rate_iops_min", _scalar),
    "rate_process": _word("rate_process", "linear", "poisson"),
    "thinktime": _time("thinktime", "us"),
    "thinktime_blocks": _whole("thinktime_blocks", 1),
    "verify": _set_verify,
    "do_verify": _flag("do_verify"),
    "verify_only": _flag("verify_only"),
    "verify_pattern": _set_pattern("verify_pattern"),
    "verify_interval": _size("verify_interval"),
    "verify_fatal": _flag("verify_fatal"),
    "verify_write_sequence": _flag("verify_write_sequence"),
    "verifysort": _flag("verifysort"),
    "serialize_overlap": _flag("serialize_overlap"),
    "zero_buffers": _flag("zero_buffers"),
    "refill_buffers": _flag("refill_buffers"),
    "buffer_pattern": _set_pattern("buffer_pattern"),
    "fsync": _whole("fsync"),
    "fdatasync": _whole("fdatasync"),
    "end_fsync": _flag("end_fsync"),
    "continue_on_error": _word("continue_on_error", "none", "read", "write", "io", "verify", "all"),
    "percentile_list": _set_percentiles,
    "clat_percentiles": _flag("clat_percentiles"),
    "lat_percentiles": _flag("lat_percentiles"),
    "slat_percentiles": _flag("slat_percentiles"),
    "disable_lat": _flag("disable_lat"),
    "disable_clat": _flag("disable_clat"),
    "disable_slat": _flag("disable_slat"),
    "disable_bw_measurement": _flag("disable_bw"),
    "gtod_reduce": _set_gtod_reduce,
    "unified_rw_reporting": _set_unified,
    "bwavgtime": _time("bw_interval", "ms"),
    "iopsavgtime": _time("iops_interval", "ms"),
    "write_bw_log": _log("write_bw_log", "bw"),
    "write_iops_log": _log("write_iops_log", "iops"),
    "write_lat_log": _log("write_lat_log", "lat"),
    "log_avg_msec": _time("log_interval", "ms"),
    "log_offset": _flag("log_offset"),
    "kb_base": _plain("kb_base", lambda text: 1000 if values.parse_int(text) == 1000 else 1024),
}
"""Every option that does something."""

ALIASES: Final = {
    "readwrite": "rw",
    "blocksize": "bs",
    "blocksize_range": "bsrange",
    "ba": "blockalign",
    "io_limit": "io_size",
    "fileoffset": "offset",
    "iodepth_batch_submit": "iodepth_batch",
    "iodepth_batch_complete": "iodepth_batch_complete_min",
    "wait_for_previous": "stonewall",
    "start_delay": "startdelay",
    "header_interval": "verify_interval",
    "ratemin": "rate_min",
    "ratecycle": "rate_cycle",
    "disable_bw": "disable_bw_measurement",
}

IGNORED: Final = {
    "direct": "there is no page cache on the way",
    "buffered": "there is no page cache on the way",
    "directory": "files are ranges of the namespace",
    "filename_format": "files are ranges of the namespace",
    "create_on_open": "files are ranges of the namespace",
    "create_serialize": "files are ranges of the namespace",
    "create_fsync": "files are ranges of the namespace",
    "create_only": "files are ranges of the namespace",
    "overwrite": "files are ranges of the namespace",
    "fallocate": "files are ranges of the namespace",
    "filesize": "files are ranges of the namespace; size= decides",
    "file_append": "files are ranges of the namespace",
    "file_service_type": "the files of a job are one range",
    "openfiles": "the files of a job are one range",
    "unlink": "files are ranges of the namespace",
    "fill_device": "size= decides",
    "invalidate": "there is no page cache on the way",
    "fadvise_hint": "there is no page cache on the way",
    "sync": "fsync= and end_fsync= flush",
    "mem": "buffers are DMA memory",
    "iomem": "buffers are DMA memory",
    "iomem_align": "buffers are whole pages",
    "hugepage-size": "buffers are DMA memory",
    "thread": "jobs are tasks of one process",
    "cpus_allowed": "jobs are tasks of one process",
    "cpus_allowed_policy": "jobs are tasks of one process",
    "cpumask": "jobs are tasks of one process",
    "numa_cpu_nodes": "jobs are tasks of one process",
    "numa_mem_policy": "jobs are tasks of one process",
    "nice": "jobs are tasks of one process",
    "prio": "jobs are tasks of one process",
    "prioclass": "jobs are tasks of one process",
    "uid": "jobs are tasks of one process",
    "gid": "jobs are tasks of one process",
    "lockmem": "jobs are tasks of one process",
    "lockfile": "jobs are tasks of one process",
    "clocksource": "the monotonic clock is used",
    "gtod_cpu": "the monotonic clock is used",
    "registerfiles": "of another I/O engine",
    "fixedbufs": "of another I/O engine",
    "sqthread_poll": "of another I/O engine",
    "sqthread_poll_cpu": "of another I/O engine",
    "nonvectored": "of another I/O engine",
    "userspace_reap": "of another I/O engine",
    "cmdprio_percentage": "of another I/O engine",
    "exec_prerun": "nothing is run",
    "exec_postrun": "nothing is run",
    "verify_async": "verification is part of the job",
    "verify_async_cpus": "verification is part of the job",
    "verify_dump": "the report has offset, LBA and checksums",
    "verify_state_save": "no state is kept",
    "verify_state_load": "no state is kept",
    "verify_backlog": "everything is verified at the end",
    "verify_backlog_batch": "everything is verified at the end",
    "experimental_verify": "",
    "trim_verify_zero": "what is trimmed is not verified",
    "scramble_buffers": "refill_buffers= makes every buffer new",
    "dedupe_percentage": "contents make no difference to the device",
    "buffer_compress_percentage": "contents make no difference to the device",
    "buffer_compress_chunk": "contents make no difference to the device",
    "rate_cycle": "the rate is kept at all times",
    "rate_ignore_thinktime": "",
    "thinktime_spin": "thinking is sleeping",
    "thinktime_iotime": "",
    "thinktime_blocks_type": "blocks are issued ones",
    "unit_base": "",
    "bs_is_seq_rand": "",
    "rwmixcycle": "",
    "significant_figures": "",
    "error_dump": "",
    "max_open_zones": "",
    "per_job_logs": "",
    "log_max_value": "averages are logged",
    "log_unix_epoch": "",
    "exitall_on_error": "",
    "idle_prof": "",
}
"""Options fio has that make no difference here, and why where that is not plain."""


def _apply(draft: _Draft, key: str, text: str) -> None:
    name = ALIASES.get(key, key)
    if name in OPTIONS:
        try:
            OPTIONS[name](draft, text)
        except ValueError as error:
            raise JobFileError(
                f"{draft.section.where} [{draft.section.name}]", f"{key}={text}: {error}"
            ) from None
    elif name in IGNORED:
        why = IGNORED[name]
        draft.notes.add(f"{key}={text} makes no difference here" + (f": {why}" if why else ""))
    else:
        near = difflib.get_close_matches(key, [*OPTIONS, *ALIASES, *IGNORED], 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        draft.notes.add(f"warning: unknown option {key}={text}{hint}")


def build(section: Section, notes: Notes, *, folder: Path | None = None) -> Job:
    """The job of a section. ``JobFileError`` for values that cannot be, alone or together."""
    draft = _Draft(section, notes, folder or Path(), {"name": section.name})
    everything = [*section.inherited, *section.options]
    for key, text in everything:
        if key == "kb_base":
            _apply(draft, key, text)
    for key, text in everything:
        _apply(draft, key, text)
    job = Job(
        where=section.where, own=tuple(section.options), inherited=tuple(section.inherited), **draft.fields
    )
    try:
        _check(job)
    except ValueError as error:
        raise JobFileError(f"{section.where} [{section.name}]", str(error)) from None
    return job


def _check(job: Job) -> None:
    if not 0 <= job.rwmixread <= 100:
        raise ValueError(f"rwmixread={job.rwmixread:g} is not a percentage")
    if job.time_based and not job.runtime:
        raise ValueError("time_based needs a runtime")
    if job.verify == "pattern" and job.verify_pattern is None:
        raise ValueError("verify=pattern needs a verify_pattern")
    if job.verify_only and not job.verify:
        raise ValueError("verify_only needs verify")
    for direction in job.directions:
        if job.most_block(direction) > 1 << 26:
            raise ValueError(f"blocks of {job.most_block(direction)} bytes; 64 MiB is the most")
    if job.verify and job.verify_interval:
        for direction in job.directions:
            if job.least_block(direction) % job.verify_interval:
                raise ValueError(f"blocks are not multiples of verify_interval={job.verify_interval}")
    if job.mode.trim_then_write and job.verify:
        raise ValueError("trimmed blocks are not verified")
