"""Several served devices in one guest, working at once; directly, and behind the IOMMUs QEMU has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.guest.linux.rig import Rig
from tests.guest.linux.serving import Served
from tests.guest.linux.warnings import about_devices
from tests.profiles import PROFILE

NIGHTLY = PROFILE == "nightly"
ITERATIONS = 1000 if NIGHTLY else 100

_USUAL = re.compile(r"idxd 0000:0[02]:(11|00)\.0: (No in-kernel DMA with PASID|Failed to initialize perfmon)")


@pytest.mark.parametrize(
    ("iommu", "options"),
    [
        ("none", ["--root-port"]),
        ("intel", ["--iommu", "intel"]),
        ("amd", ["--iommu", "amd"]),
        ("virtio", ["--iommu", "virtio"]),
    ],
)
def test_two_disks_and_an_accelerator(iommu: str, options: list[str], rig: Rig, tmp_path: Path) -> None:
    """One process serves them all. Behind an IOMMU every DMA address is mapped by the guest, page by page."""
    if not NIGHTLY and iommu != "intel":
        pytest.skip("nightly")
    with Served(tmp_path, "nvme,size=64M", "dsa", "nvme,size=64M") as served:
        run = rig.run(
            "pair", str(ITERATIONS), work=tmp_path, sockets=served.sockets, options=options, seconds=900
        )
    facts = run.facts
    assert [(int(thread["tests"]), int(thread["failures"])) for thread in facts["dmatest"][0]] == [
        (ITERATIONS, 0)
    ] * 2
    assert len(facts["fio"]) == 2
    for job in facts["fio"]:
        assert (job["error"], job["verified"]) == (0, 4096)
        assert job["sectors"] == job["sectors_of_block_layer"]
    # Nothing has the same name twice: Linux would warn, and take no names at all.
    first, second = facts["identifiers"]
    assert not set(first.values()) & set(second.values())
    for group in facts["iommu"].values():
        assert (group is None) == (iommu == "none")
        assert group is None or group["type"].startswith("DMA")
    assert [line for line in about_devices(facts) if not _USUAL.match(line)] == []
