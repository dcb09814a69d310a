"""Linux's idxd driver on a served DSA: accel-config, dmatest on several channels, reconfiguration, resets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.guest.linux.rig import Rig
from tests.guest.linux.serving import Served
from tests.guest.linux.warnings import about_devices
from tests.profiles import PROFILE

ITERATIONS = 1000
OTHERS = 1000 if PROFILE == "nightly" else 100

# No PASIDs without an IOMMU that has them; the performance monitor is not modelled.
_USUAL = {
    "idxd 0000:00:10.0: No in-kernel DMA with PASID. -1",
    "idxd 0000:00:10.0: Failed to initialize perfmon. No PMU support: -19",
}
# Linux's own words when a function with kernel work queues is reset: it brings back only those of user space.
_AFTER_RESET = {"idxd dsa0: Active wq ", "idxd 0000:00:10.0: HALT: unable to re-enable wq "}


@pytest.mark.parametrize("preset", ["dsa1.0", "dsa2.0"])
def test_dmatest(preset: str, rig: Rig, tmp_path: Path) -> None:
    """Four channels; disabled, configured anew with two and two threads each; a function reset; taken off the bus.

    The second generation only at night.
    """
    if preset == "dsa2.0" and PROFILE != "nightly":
        pytest.skip("nightly")
    with Served(tmp_path, f"dsa,preset={preset}") as served:
        parts = ["identity", "configure", "4", "dmatest", str(ITERATIONS), "1", "disable"]
        parts += ["configure", "2", "dmatest", str(OTHERS), "2", "function-reset", "disable"]
        parts += ["configure", "2", "dmatest", str(OTHERS), "1", "disable", "remove"]
        parts += ["configure", "1", "dmatest", str(OTHERS), "1"]
        facts = rig.run("idxd", *parts, work=tmp_path, sockets=served.sockets, seconds=600).facts
    _check_identity(facts, 0x100 if preset == "dsa1.0" else 0x200)
    assert [len(threads) for threads in facts["dmatest"]] == [4, 4, 2, 1]
    for threads, iterations in zip(facts["dmatest"], (ITERATIONS, OTHERS, OTHERS, OTHERS), strict=True):
        for thread in threads:
            assert (int(thread["tests"]), int(thread["failures"])) == (iterations, 0)
    assert facts["disabled"] == {"dsa0": "disabled"}
    assert facts["disabled_channels"] == []
    assert facts["after_reset"]["dsa0"] == "enabled"
    assert facts["reset_methods"] == ["flr"]
    assert facts["removed"] == []
    for line in about_devices(facts):
        assert line in _USUAL or any(line.startswith(words) for words in _AFTER_RESET), line


def _check_identity(facts: dict[str, Any], version: int) -> None:
    (listed,) = facts["list"]
    assert (listed["dev"], listed["version"], listed["state"]) == ("dsa0", f"{version:#x}", "disabled")
    assert (listed["max_work_queues"], listed["max_engines"], listed["work_queue_size"]) == (8, 4, 128)
    assert facts["attributes"]["errors"] == ",".join(["00000000"] * 8)
    assert "Kernel driver in use: idxd" in facts["pci"]
    assert "FLReset+" in facts["pci"]
