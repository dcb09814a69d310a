"""What ``pvfio dmatest`` says in the end: facts for people, or one JSON document for programs.

The document has ``config``, ``threads`` (a result each), ``totals``, ``faults`` (the IOMMU's log),
``messages`` (lines about tests) and, with ``--input``, ``file``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvfio.cli_dmatest import DmatestOptions, Outcome
    from pvfio.machine import Machine
    from pvfio.workloads.dmatest import Summary
    from pvfio.workloads.filecopy import FileCopy

__all__ = ["document", "report"]

_SHOWN_FAULTS = 4


def _file_facts(options: DmatestOptions, copy: FileCopy) -> list[tuple[str, str]]:
    how = "COPY_CRC" if options.copy_crc else "MEMMOVE and CRCGEN"
    chunks = "1 chunk" if copy.chunks == 1 else f"{copy.chunks:,} chunks"
    facts = [("file", f"{options.input}: {copy.nbytes:,} bytes in {chunks}, by {how}")]
    same = "agree" if copy.device_crc == copy.expected_crc else "DIFFER"
    facts.append(
        (
            "CRC-32C",
            f"{copy.device_crc:#010x} from the device, {copy.expected_crc:#010x} from numpy: they {same}",
        )
    )
    if not options.params.noverify:
        facts.append(("verified", f"{copy.nbytes:,} bytes, and {copy.guard_bytes:,} guard bytes around them"))
    if options.output is not None:
        facts.append(("output", str(options.output)))
    return facts


def _test_facts(options: DmatestOptions, summaries: list[Summary]) -> list[tuple[str, str]]:
    moved, tests = sum(s.nbytes for s in summaries), sum(s.tests for s in summaries)
    checked = "not verified" if options.params.noverify else "every byte verified, guards too"
    if options.operation is None:
        return [("moved", f"{moved:,} bytes in {tests:,} transfers, {checked}")]
    return [(options.operation, f"{tests:,} times on {moved:,} bytes, {checked}")]


def _machine_facts(machine: Machine, before: int) -> list[tuple[str, str]]:
    faults = machine.hypervisor.faults
    logged = faults.snapshot()
    facts = [("page faults logged", str(len(logged) + faults.lost))]
    facts.extend(("", str(fault)) for fault in logged[:_SHOWN_FAULTS])
    calls = machine.kernel.transport.calls
    facts.append(
        ("hypercalls", f"{calls}, {calls - before} of them since the driver began: unmapping flushes")
    )
    return facts


def report(machine: Machine, options: DmatestOptions, outcome: Outcome) -> None:
    """Prints what happened, one fact a line, and the walk if it is wanted."""
    stage2 = {"intel": "VT-d second stage", "amd": "AMD v1"}[options.platform]
    facts = [
        ("platform", f"{options.platform}: stage 1 x86-64, stage 2 {stage2}"),
        ("engine", f"{options.engine}, completion {options.completion}"),
    ]
    if outcome.copy is not None:
        facts += _file_facts(options, outcome.copy)
    else:
        facts += _test_facts(options, outcome.summaries)
    facts += _machine_facts(machine, outcome.calls)
    facts += [("first buffer", translation.line) for translation in outcome.first]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")
    if options.walk:
        from pvfio.cli_walk import show

        for translation in outcome.first:
            print()
            show(translation, options.platform)


def _thread(summary: Summary) -> dict[str, Any]:
    channel, _, thread = summary.name.partition("-")
    return {
        "name": summary.name,
        "channel": channel,
        "thread": int(thread[len(thread.rstrip("0123456789")) :]),
        "tests": summary.tests,
        "failures": summary.failures,
        "bytes": summary.nbytes,
        "seconds": summary.seconds,
        "iops": summary.hundredths / 100,
        "kb_per_second": summary.kbs,
        "status": summary.status,
    }


def _config(options: DmatestOptions) -> dict[str, Any]:
    return {
        "platform": options.platform,
        "engine": options.engine,
        "completion": options.completion,
        "ram": options.ram,
        "devices": options.devices,
        "channels": [f"dma{device}chan{wq}" for device, wq in options.channels],
        "operation": options.operation or ("set" if options.params.memset else "copy"),
        "input": None if options.input is None else str(options.input),
        "params": asdict(options.params),
    }


def document(machine: Machine, options: DmatestOptions, outcome: Outcome) -> str:
    """The run as JSON."""
    faults = machine.hypervisor.faults
    logged = faults.snapshot()
    threads = [_thread(summary) for summary in sorted(outcome.summaries, key=lambda s: s.name)]
    result: dict[str, Any] = {
        "config": _config(options),
        "threads": threads,
        "totals": {
            "threads": len(threads),
            **{key: sum(thread[key] for thread in threads) for key in ("tests", "failures", "bytes")},
        },
        "faults": {"count": len(logged) + faults.lost, "log": [asdict(fault) for fault in logged]},
        "messages": [line for line in outcome.messages if ": summary " not in line],
    }
    if outcome.copy is not None:
        copy = asdict(outcome.copy)
        del copy["summary"]
        result["file"] = copy | {"by": "COPY_CRC" if options.copy_crc else "MEMMOVE and CRCGEN"}
    return json.dumps(result, indent=2)
