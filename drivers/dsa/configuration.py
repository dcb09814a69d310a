"""Which WQs, groups and engines: what the driver wants, and what it writes to WQCFG and GRPCFG.

Every group that has a WQ gets engines, shared out evenly. Not here: PASIDs (the driver owns the whole
function), traffic classes, read-buffer limits (left at the device's reset values), occupancy interrupts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pvfio.abi import dtype_of, lib
from pvfio.drivers.dsa.workqueue import COMPLETIONS, Completion

if TYPE_CHECKING:
    from pvfio.drivers.dsa.capabilities import Capabilities
    from pvfio.vfio import Region

__all__ = ["WqConfig", "read_configuration", "resolve", "write_configuration"]


@dataclass(frozen=True, slots=True)
class WqConfig:
    """One work queue to be.

    ``size`` in descriptors (``None``: an even share of what the device has), ``threshold`` of a shared WQ
    (``None``: its size), ``priority`` 1 to 15, ``group``, and the shifts (``None``: the device's largest)
    that bound a transfer in bytes and a batch in descriptors. ``operations`` are the opcodes it may do (``None``:
    all), where the device can be told (``Capabilities.op_config``). ``ats`` false keeps its accesses out of the
    device's TLB, where the device can be told that (``Capabilities.wq_ats``).
    """

    size: int | None = None
    shared: bool = False
    threshold: int | None = None
    priority: int = 10
    group: int = 0
    block_on_fault: bool = False
    max_transfer_shift: int | None = None
    max_batch_shift: int | None = None
    completion: Completion = "hybrid"
    operations: frozenset[int] | None = None
    ats: bool = True

    def __post_init__(self) -> None:
        if self.completion not in COMPLETIONS:
            raise ValueError(f"completion is one of {', '.join(COMPLETIONS)}, not {self.completion!r}")


def resolve(wanted: Sequence[WqConfig], capabilities: Capabilities) -> list[WqConfig]:
    """Fills in what was left to the device. ``ValueError`` where the device has not that many WQs, entries
    or groups.
    """
    if not 0 < len(wanted) <= capabilities.num_wqs:
        raise ValueError(f"the device has {capabilities.num_wqs} work queues, {len(wanted)} are asked for")
    taken = sum(config.size for config in wanted if config.size is not None)
    open_sizes = sum(config.size is None for config in wanted)
    left = capabilities.total_wq_size - taken
    if left < open_sizes:
        raise ValueError(f"the device has {capabilities.total_wq_size} WQ entries, too few for these sizes")
    resolved = []
    for config in wanted:
        if config.group >= capabilities.num_groups:
            raise ValueError(
                f"the device has {capabilities.num_groups} groups, not one of number {config.group}"
            )
        if config.operations is not None:
            _check_operations(config.operations, capabilities)
        if not config.ats and not capabilities.wq_ats:
            raise ValueError("the device does not disable ATS for a work queue (WQCAP)")
        size = left // open_sizes if config.size is None else config.size
        transfer, batch = config.max_transfer_shift, config.max_batch_shift
        resolved.append(
            replace(
                config,
                size=size,
                threshold=size if config.threshold is None else config.threshold,
                max_transfer_shift=capabilities.max_transfer_shift if transfer is None else transfer,
                max_batch_shift=capabilities.max_batch_shift if batch is None else batch,
            )
        )
    return resolved


def _check_operations(operations: frozenset[int], capabilities: Capabilities) -> None:
    if not capabilities.op_config:
        raise ValueError("the device does not limit a work queue's operations (WQCAP)")
    unknown = sorted(code for code in operations if not capabilities.has_operation(code))
    if unknown:
        raise ValueError(f"the device has no operations {', '.join(hex(code) for code in unknown)}")


def _wqcfg(config: WqConfig, capabilities: Capabilities) -> np.ndarray[Any, Any]:
    raw = np.zeros(1, dtype=dtype_of("struct dsa_wqcfg"))
    raw["wq_size"] = config.size
    raw["wq_thresh"] = config.threshold if config.shared else 0
    mode = config.priority << int(lib.IDXD_WQCFG_PRIORITY_SHIFT)
    mode |= 0 if config.shared else int(lib.IDXD_WQCFG_MODE_DEDICATED)
    mode |= int(lib.IDXD_WQCFG_BOF) if config.block_on_fault else 0
    mode |= 0 if config.ats else int(lib.IDXD_WQCFG_ATS_DISABLE)
    raw["mode"] = mode
    shift = int(lib.IDXD_WQCFG_MAX_BATCH_SHIFT_SHIFT)
    raw["limits"] = (config.max_transfer_shift or 0) | (config.max_batch_shift or 0) << shift
    if capabilities.op_config:
        allowed = capabilities.opcap
        if config.operations is not None:
            allowed = sum(1 << code for code in config.operations)
        raw["op_config"] = [allowed >> 64 * word & (1 << 64) - 1 for word in range(4)]
    return raw


async def write_configuration(
    registers: Region, configs: Sequence[WqConfig], capabilities: Capabilities
) -> None:
    """Writes WQCFG and GRPCFG; the device must be disabled. WQs and groups that are not named are left as
    reset made them. Cancelled: partly written, until the next reset of the device.
    """
    for number, config in enumerate(configs):
        base = capabilities.wqcfg_offset + number * capabilities.wqcfg_stride
        words = _wqcfg(config, capabilities).view(np.uint32)[: capabilities.wqcfg_stride // 4]
        for index, word in enumerate(words.tolist()):
            await registers.write(base + 4 * index, word, 4)
    groups = sorted({config.group for config in configs})
    for position, group in enumerate(groups):
        wqs = sum(1 << number for number, config in enumerate(configs) if config.group == group)
        engines = sum(1 << engine for engine in range(position, capabilities.num_engines, len(groups)))
        base = capabilities.grpcfg_offset + group * int(lib.IDXD_GRPCFG_SIZE)
        for index in range(4):
            await registers.write(base + 8 * index, wqs >> 64 * index & (1 << 64) - 1, 8)
        await registers.write(base + int(lib.IDXD_GRPCFG_ENGINES_OFFSET), engines, 8)


async def read_configuration(
    registers: Region, capabilities: Capabilities, completion: Completion
) -> list[WqConfig]:
    """The configuration of a device that does not let software write it (GENCAP.config_en is 0).

    Cancelling leaves nothing behind.
    """
    configs = []
    for number in range(capabilities.num_wqs):
        base = capabilities.wqcfg_offset + number * capabilities.wqcfg_stride
        words = [await registers.read(base + 4 * index, 4) for index in range(8)]
        raw = np.zeros(1, dtype=dtype_of("struct dsa_wqcfg"))
        raw.view(np.uint32)[:8] = words
        mode, limits = int(raw["mode"][0]), int(raw["limits"][0])
        if not raw["wq_size"][0]:
            break
        configs.append(
            WqConfig(
                size=int(raw["wq_size"][0]),
                shared=not mode & lib.IDXD_WQCFG_MODE_DEDICATED,
                threshold=int(raw["wq_thresh"][0]),
                priority=(mode & int(lib.IDXD_WQCFG_PRIORITY_MASK)) >> int(lib.IDXD_WQCFG_PRIORITY_SHIFT),
                block_on_fault=bool(mode & lib.IDXD_WQCFG_BOF),
                max_transfer_shift=limits & int(lib.IDXD_WQCFG_MAX_XFER_SHIFT_MASK),
                max_batch_shift=(limits & int(lib.IDXD_WQCFG_MAX_BATCH_SHIFT_MASK))
                >> int(lib.IDXD_WQCFG_MAX_BATCH_SHIFT_SHIFT),
                completion=completion,
                ats=not mode & lib.IDXD_WQCFG_ATS_DISABLE,
            )
        )
    return configs
