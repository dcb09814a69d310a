"""``pvfio nvme``: every command, as lines and as JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pvfio import cli
from pvfio.cli_nvme import COMMANDS

pytestmark = pytest.mark.touches_c


def run(capfd: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of the command in this process."""
    status = cli._status(["nvme", *arguments, "--engine", "inline"])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


KEYS = {
    "list": "Devices",
    "identify": "vid",
    "id-ctrl": "mdts",
    "id-ns": "nsze",
    "smart": "data_units_read",
    "smart-log": "critical_warning",
    "error-log": "errors",
    "fw-log": "nvme0",
    "effects-log": "IOCS_02",
    "self-test-log": "results",
    "sanitize-log": "status",
    "get-feature": "Current value",
    "format": "block_size",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, capfd: Any) -> None:
    status, out, err = run(capfd, command, "--json")
    assert (status, err) == (0, "")
    assert KEYS[command] in json.loads(out)
    status, out, err = run(capfd, command)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) >= 2


def test_numbers_are_in_the_base_that_nvme_cli_shows(capfd: Any) -> None:
    lines = [line.split(" : ") for line in run(capfd, "id-ns")[1].splitlines()[1:]]
    found = {
        name.strip(): value for name, value in lines if name.strip() in ("nsze", "nuse", "nlbaf", "flbas")
    }
    assert found == {"nsze": "0x10000", "nuse": "0x10000", "nlbaf": "4", "flbas": "0x1"}


def test_what_an_image_is(tmp_path: Path, capfd: Any) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    found = json.loads(run(capfd, "id-ns", "--json", "--image", str(image))[1])
    assert (found["nsze"], found["lbafs"][1]) == (256, {"ms": 0, "ds": 12, "in_use": True})
    found = json.loads(run(capfd, "format", "--lbaf", "0", "--json", "--image", str(image))[1])
    assert found["block_size"] == 512


WRONG = [(("nothing",), 2, "there is no 'nothing'"), (("id-ns", "-n", "9"), 2, "namespace 9")]
WRONG += [(("format", "--lbaf", "40"), 1, "INVALID"), (("get-feature", "-f", "0xbf"), 1, "INVALID")]


@pytest.mark.parametrize(("arguments", "status", "part"), WRONG)
def test_what_is_refused(arguments: tuple[str, ...], status: int, part: str, capfd: Any) -> None:
    found, _, err = run(capfd, *arguments)
    assert found == status
    assert part in err
