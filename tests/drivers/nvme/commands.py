"""Commands by the array for the tests, fault rules of the device, and whether all works afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np

from pvfio.abi import ffi, lib

BLOCK = 4096


def inject(r: Any, action: int, *, opcode: int = lib.NVME_CMD_READ, sq: int = 1, **fields: int) -> int:
    rule = ffi.new("struct pv_nvme_rule *", {"sq": sq, "action": action, "per_mille": 1000, **fields})
    rule.match[0], rule.mask[0] = opcode, 0xFF
    number = int(lib.pv_nvme_inject(r.function._nvme, rule))
    assert number >= 0
    return number


def addresses(buffer: Any, count: int) -> Any:
    return np.uint64(buffer.iova) + np.arange(count, dtype=np.uint64) * np.uint64(BLOCK)


def lbas(count: int) -> Any:
    return np.arange(count, dtype=np.uint64)


async def check_works(r: Any, buffer: Any) -> None:
    """Every queue carries data, and nothing is left in flight."""
    for queue in r.nvme.queues:
        buffer[:BLOCK] = 7
        await queue.write(1, 5, buffer[:BLOCK])
        buffer[:BLOCK] = 0
        await queue.read(1, 5, buffer[:BLOCK])
        assert np.all(buffer[:BLOCK] == 7)
        assert queue.outstanding == 0
        assert queue.room == queue.depth
