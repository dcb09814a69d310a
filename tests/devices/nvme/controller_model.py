"""What an NVMe controller is, as small as it can be said: the model of the state machine test.

Registers and queues are facts that one operation sets and a reset clears; a namespace is a list of numbers, one for
each block. Not here: events, logs, features, what commands in flight do during a reset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pvfio.abi import lib

__all__ = ["BLOCKS", "ENTRIES", "QUEUES", "VECTORS", "ControllerModel", "QueueFault"]

BLOCKS = 64
QUEUES = 4
ENTRIES = 32
VECTORS = QUEUES + 1

QueueFault = Literal["none", "number", "size", "large", "scattered", "offset", "vector"]


@dataclass
class ControllerModel:
    """One controller with one namespace that is looked at."""

    state: Literal["disabled", "ready", "fatal", "dead"] = "disabled"  # dead: fatal after it was ready
    shut_down: bool = False
    subsystem_was_reset: bool = False
    interrupt_mask: int = 0
    completions: set[int] = field(default_factory=set)
    submissions: dict[int, int] = field(default_factory=dict)  # queue -> its completion queue
    blocks: list[int] = field(default_factory=lambda: [0] * BLOCKS)

    @property
    def csts(self) -> int:
        """Base 3.1.3.6."""
        return (
            int(lib.NVME_CSTS_RDY) * (self.state in ("ready", "dead"))
            | int(lib.NVME_CSTS_CFS) * (self.state in ("fatal", "dead"))
            | int(lib.NVME_CSTS_SHST_CMPLT) * self.shut_down
            | int(lib.NVME_CSTS_NSSRO) * self.subsystem_was_reset
        )

    @property
    def enabled(self) -> bool:
        """CC.EN."""
        return self.state != "disabled"

    @property
    def works(self) -> bool:
        """Commands are executed."""
        return self.state == "ready" and not self.shut_down

    def disable(self) -> None:
        """A reset of the controller: everything but the admin queue's registers and the blocks (Base 3.7.2)."""
        self.state, self.shut_down, self.interrupt_mask = "disabled", False, 0
        self.completions.clear()
        self.submissions.clear()

    # What a command that is wrong in several ways may end with; nothing: it succeeds.

    def create_cq(self, number: int, fault: QueueFault) -> set[int]:
        """Base 5.4."""
        wrong = _wrong(fault)
        if number in self.completions:
            wrong.add(int(lib.NVME_SC_QID_INVALID))
        if not wrong:
            self.completions.add(number)
        return wrong

    def create_sq(self, number: int, cq: int, fault: QueueFault) -> set[int]:
        """Base 5.5."""
        wrong = _wrong(fault)
        if number in self.submissions:
            wrong.add(int(lib.NVME_SC_QID_INVALID))
        if cq not in self.completions:
            wrong.add(int(lib.NVME_SC_CQ_INVALID))
        if not wrong:
            self.submissions[number] = cq
        return wrong

    def delete_cq(self, number: int) -> set[int]:
        """Base 5.6."""
        if number not in self.completions:
            return {int(lib.NVME_SC_QID_INVALID)}
        if number in self.submissions.values():
            return {int(lib.NVME_SC_INVALID_QUEUE)}
        self.completions.remove(number)
        return set()

    def delete_sq(self, number: int) -> set[int]:
        """Base 5.7."""
        return set() if self.submissions.pop(number, None) else {int(lib.NVME_SC_QID_INVALID)}

    def beyond(self, lba: int, count: int) -> bool:
        """Some of the blocks are not there."""
        return lba + count > BLOCKS


def _wrong(fault: QueueFault) -> set[int]:
    status = {
        "number": lib.NVME_SC_QID_INVALID,
        "size": lib.NVME_SC_QUEUE_SIZE,
        "large": lib.NVME_SC_QUEUE_SIZE,
        "scattered": lib.NVME_SC_INVALID_FIELD,
        "offset": lib.NVME_SC_PRP_INVALID_OFFSET,
        "vector": lib.NVME_SC_INVALID_VECTOR,
    }.get(fault)
    return set() if status is None else {int(status)}
