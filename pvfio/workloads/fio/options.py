"""fio's options by name.

``build`` makes a ``Job`` of a section. An option that changes nothing here is taken with a note (ignored.py), one of no
known name with a warning, and a value that cannot be is a ``JobFileError``. Not modelled: profiles, client and server,
``zonemode``, ``read_iolog``.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Final

from pvfio.workloads.fio import values
from pvfio.workloads.fio.ignored import IGNORED
from pvfio.workloads.fio.job import Job
from pvfio.workloads.fio.jobfile import JobFileError, Section
from pvfio.workloads.fio.setters import (
    Draft,
    Notes,
    Setter,
    a_flag,
    a_size,
    a_time,
    a_word,
    an_interval,
    block_range,
    block_size,
    distribution,
    log_name,
    percent_or_size,
    percentage,
    plain,
    scalar,
    set_group,
    set_gtod_reduce,
    set_ioengine,
    set_latency_percentile,
    set_pattern,
    set_percentiles,
    set_rw,
    set_rwmixwrite,
    set_steady,
    set_sync,
    set_unified,
    set_verify,
    three,
    whole_number,
)

__all__ = ["ALIASES", "IGNORED", "OPTIONS", "Notes", "build"]

_blocks = three("bs", block_size)
OPTIONS: Final[dict[str, Setter]] = {
    "name": plain("name", str),
    "description": plain("description", str),
    "rw": set_rw,
    "ioengine": set_ioengine,
    "filename": plain("filename", str),
    "size": percent_or_size("size"),
    "io_size": a_size("io_size"),
    "offset": percent_or_size("offset"),
    "offset_increment": a_size("offset_increment"),
    "number_ios": whole_number("number_ios", 0, 1 << 62),
    "bs": _blocks,
    "bsrange": three("bs", block_range),
    "bssplit": three("bssplit", lambda word, draft: values.parse_bssplit(word, kb_base=draft.kb_base)),
    "blockalign": three("blockalign", scalar),
    "iodepth": whole_number("iodepth", 1, 1 << 16),
    "iodepth_batch": whole_number("batch_submit", 0, 1 << 16),
    "iodepth_batch_complete_min": whole_number("batch_complete_min", 0, 1 << 16),
    "iodepth_batch_complete_max": whole_number("batch_complete_max", 0, 1 << 16),
    "iodepth_low": whole_number("iodepth_low", 0, 1 << 16),
    "numjobs": whole_number("numjobs", 1, 4096),
    "loops": whole_number("loops", 1, 1 << 31),
    "runtime": a_time("runtime"),
    "time_based": a_flag("time_based"),
    "ramp_time": a_time("ramp_time"),
    "startdelay": a_time("startdelay"),
    "stonewall": a_flag("stonewall"),
    "new_group": a_flag("new_group"),
    "group_reporting": set_group,
    "exitall": a_flag("exitall"),
    "exitall_on_error": a_flag("exitall_on_error"),
    "rwmixread": plain("rwmixread", lambda text: float(values.parse_int(text.removesuffix("%")))),
    "rwmixwrite": set_rwmixwrite,
    "rw_sequencer": a_word("rw_sequencer", "sequential", "identical"),
    "randseed": whole_number("randseed", 0, (1 << 64) - 1),
    "randrepeat": a_flag("randrepeat"),
    "allrandrepeat": a_flag("randrepeat"),
    "norandommap": a_flag("norandommap"),
    "random_distribution": three("distributions", distribution),
    "percentage_random": three("percentage_random", percentage),
    "rate": three("rate", scalar),
    "rate_iops": three("rate_iops", scalar),
    "rate_min": three("rate_min", scalar),
    "rate_iops_min": three("rate_iops_min", scalar),
    "rate_cycle": an_interval("rate_cycle", "ms"),
    "max_latency": three("max_latency", lambda word, draft: values.parse_time(word, unit="us")),
    "latency_target": a_time("latency_target", "us"),
    "latency_window": a_time("latency_window", "us"),
    "latency_percentile": set_latency_percentile,
    "latency_run": a_flag("latency_run"),
    "steadystate": set_steady,
    "steadystate_duration": a_time("steady_duration"),
    "steadystate_ramp_time": a_time("steady_ramp"),
    "steadystate_check_interval": an_interval("steady_interval"),
    "rate_process": a_word("rate_process", "linear", "poisson"),
    "thinktime": a_time("thinktime", "us"),
    "thinktime_blocks": whole_number("thinktime_blocks", 1),
    "verify": set_verify,
    "do_verify": a_flag("do_verify"),
    "verify_only": a_flag("verify_only"),
    "verify_pattern": set_pattern("verify_pattern"),
    "verify_interval": a_size("verify_interval"),
    "verify_fatal": a_flag("verify_fatal"),
    "verify_write_sequence": a_flag("verify_write_sequence"),
    "verifysort": a_flag("verifysort"),
    "serialize_overlap": a_flag("serialize_overlap"),
    "zero_buffers": a_flag("zero_buffers"),
    "refill_buffers": a_flag("refill_buffers"),
    "buffer_pattern": set_pattern("buffer_pattern"),
    "sync": set_sync,
    "fsync": whole_number("fsync"),
    "fdatasync": whole_number("fdatasync"),
    "end_fsync": a_flag("end_fsync"),
    "continue_on_error": a_word("continue_on_error", "none", "read", "write", "io", "verify", "all"),
    "percentile_list": set_percentiles,
    "clat_percentiles": a_flag("clat_percentiles"),
    "lat_percentiles": a_flag("lat_percentiles"),
    "slat_percentiles": a_flag("slat_percentiles"),
    "disable_lat": a_flag("disable_lat"),
    "disable_clat": a_flag("disable_clat"),
    "disable_slat": a_flag("disable_slat"),
    "disable_bw_measurement": a_flag("disable_bw"),
    "gtod_reduce": set_gtod_reduce,
    "unified_rw_reporting": set_unified,
    "bwavgtime": an_interval("bw_interval", "ms"),
    "iopsavgtime": an_interval("iops_interval", "ms"),
    "write_bw_log": log_name("write_bw_log", "bw"),
    "write_iops_log": log_name("write_iops_log", "iops"),
    "write_lat_log": log_name("write_lat_log", "lat"),
    "log_avg_msec": a_time("log_interval", "ms"),
    "kb_base": plain("kb_base", lambda text: 1000 if values.parse_int(text) == 1000 else 1024),
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
    "ss": "steadystate",
    "ss_dur": "steadystate_duration",
    "ss_ramp": "steadystate_ramp_time",
    "ss_interval": "steadystate_check_interval",
    "disable_bw": "disable_bw_measurement",
}


def _apply(draft: Draft, key: str, text: str) -> None:
    name = ALIASES.get(key, key)
    if name in OPTIONS:
        try:
            OPTIONS[name](draft, text)
        except ValueError as error:
            raise JobFileError(
                f"{draft.section.where} [{draft.section.name}]", f"{key}={text}: {error}"
            ) from None
    elif name in IGNORED:
        draft.notes.add(f"{key}={text} makes no difference here: {IGNORED[name]}")
    else:
        near = difflib.get_close_matches(key, [*OPTIONS, *ALIASES, *IGNORED], 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        draft.notes.add(f"warning: unknown option {key}={text}{hint}")


def build(section: Section, notes: Notes, *, folder: Path | None = None) -> Job:
    """The job of a section. ``JobFileError`` for values that cannot be, alone or together."""
    draft = Draft(section, notes, folder or Path(), {"name": section.name})
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
    _check_rates(job)
    if job.steady_duration and job.steady_duration < 2 * job.steady_interval:
        raise ValueError("steadystate_duration is at least two steadystate_check_interval")
    for direction in job.directions:
        if job.most_block(direction) > 1 << 26:
            raise ValueError(f"blocks of {job.most_block(direction)} bytes; 64 MiB is the most")
    if job.verify and job.verify_interval:
        for direction in job.directions:
            if any(size % job.verify_interval for size in job.sizes(direction)):
                raise ValueError(f"blocks are not multiples of verify_interval={job.verify_interval}")
    if job.mode.trim_then_write and job.verify:
        raise ValueError("trimmed blocks are not verified")


def _check_rates(job: Job) -> None:
    if (any(job.rate) and any(job.rate_iops)) or (any(job.rate_min) and any(job.rate_iops_min)):
        raise ValueError("rate and rate_iops are mutually exclusive")
    for index in range(3):
        for most, least in (
            (job.rate[index], job.rate_min[index]),
            (job.rate_iops[index], job.rate_iops_min[index]),
        ):
            if most and most < least:
                raise ValueError("the minimum rate exceeds the rate")
